"""train_grpo: arithmetic by hand, whole steps against reference.py, the hook, arms and options, what a run leaves."""
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import reference
import train_grpo
from env_leetcode import MODES, grade_batch, load_demos, load_problems
from extract_vgrad import load_pairs
from lora2r import InputError, Lora2rLinear, attach, load_model, peek
from train_grpo import (CLEAN, HACK, HERE, LABELS, MID, Config, Rollout, advantages, arm_of, draws,
                        importance_weight, match_counts, name_of, parse_args, train)

NAN = math.nan
GATE = train_grpo.gate


def close(value, expected, **tolerance):
    torch.testing.assert_close(value, torch.tensor(expected), **(tolerance or dict(rtol=0, atol=1e-5)))


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------- the arithmetic, by hand
def test_advantages_are_of_a_groups_own_mean():
    """Means 2 and 0.5, not the batch's 1.25; a group without a spread trains nothing."""
    rewards = torch.tensor([[3.5, 2.0, 0.5], [0.5, 0.5, 0.5]])
    close(advantages(rewards), [[1.5, 0.0, -1.5], [0.0, 0.0, 0.0]])
    close(advantages(rewards, std_norm=True), [[1.5 / 1.5001, 0.0, -1.5 / 1.5001], [0.0, 0.0, 0.0]])
    close(advantages(4 * rewards, std_norm=True)[0], [1.0, 0.0, -1.0], rtol=0, atol=1e-4)
    close(advantages(torch.tensor([[2.0, 0.0]]), std_norm=True), [[1 / 1.41431, -1 / 1.41431]])  # n - 1, as GRPO has it


@pytest.mark.parametrize("rewards, plain, by_std", [
    ([3.5, 1.0, 0.5, 0.5], [2.125, -0.375, -0.875, -0.875], [1.47956, -0.26110, -0.60923, -0.60923]),  # mean 1.375
    ([NAN, 1.0, 0.5, 0.5], [0.0, 1 / 3, -1 / 6, -1 / 6], [0.0, 1.15430, -0.57715, -0.57715]),  # mean 2/3
    ([NAN, 1.0, 0.5, NAN], [0.0, 0.25, -0.25, 0.0], [0.0, 0.70691, -0.70691, 0.0]),
    ([NAN, NAN, 0.5, NAN], [0.0] * 4, [0.0] * 4),  # one that is left alone learns nothing
    ([NAN, NAN, NAN, NAN], [0.0] * 4, [0.0] * 4)])
def test_a_dropped_rollout_counts_in_no_mean_and_has_no_advantage(rewards, plain, by_std):
    """Its reward is NaN. Beside a group of which nothing is dropped: mean 1, standard deviation sqrt(4 / 3)."""
    rewards = torch.tensor([rewards, [2.0, 0.0, 2.0, 0.0]])
    close(advantages(rewards), [plain, [1.0, -1.0, 1.0, -1.0]])
    close(advantages(rewards, std_norm=True), [by_std, [0.86595, -0.86595, 0.86595, -0.86595]])


def test_importance_weight_is_truncated_at_1_and_1_for_a_demonstration():
    """p that learns over p that sampled: .3, 1, 3, none, and infinitely more; and it is a constant of the gradient."""
    logp = torch.log(torch.tensor([[0.3, 0.5, 0.9, 0.2, 0.5]])).requires_grad_()
    sampled = torch.tensor([[0.0, math.log(0.5), math.log(0.3), NAN, -math.inf]])
    weight = importance_weight(logp, sampled)
    close(weight, [[0.3, 1.0, 1.0, 1.0, 1.0]])
    assert not weight.requires_grad


def test_gate_thresholds_and_degenerate_batches(capsys):
    """A position at a cut belongs above it. Batch: mean 0.25, std 0.5 of n - 1 numbers."""
    pairs, batch = Config(cuts=(0.25, 0.75)), Config(gate="batch", cuts=(0.0, 1.5))

    def gate(position, cfg, cut=9.9):
        return train_grpo.gate(torch.tensor(position), cut, cfg).tolist()

    assert gate([0.2, 0.25, 0.5, 0.75, 2.0], pairs) == [CLEAN, MID, MID, HACK, HACK]
    assert gate([0.0, 0.0, 0.0, 1.0], batch) == [CLEAN, CLEAN, CLEAN, HACK]
    assert gate([0.0, 0.0, 0.0, 1.0], replace(batch, cuts=(0.0, 1.6))) == [CLEAN, CLEAN, CLEAN, MID]
    assert gate([0.0, 2.0, 1.0], batch) == [CLEAN, MID, MID]  # 1 is the mean; 2 < 1 + 1.5
    assert gate([0.0, 1.0, 2.0, 1.5], Config(gate="batch")) == [CLEAN, CLEAN, HACK, MID]  # 1.125, 1.125 + .854 / 2
    assert gate([0.5, 0.5], pairs) == [MID, MID] and gate([1.0], pairs) == [HACK]  # no spread is needed
    assert gate([0.2, 0.4, 0.8], Config(), cut=0.4) == [CLEAN, HACK, HACK]  # where the pairs place it
    assert capsys.readouterr().out == ""
    for position, cfg in (([0.1, NAN], pairs), ([math.inf, 0.9], pairs), ([0.1, NAN], batch), ([0.1, 0.1], batch),
                          ([0.1], batch)):
        assert gate(position, cfg) == [MID] * len(position)
        assert "degenerate batch" in capsys.readouterr().out


def test_a_matched_placebo_keeps_the_counts_and_gives_them_by_rank():
    label, score = torch.tensor([HACK, CLEAN, MID, HACK, CLEAN]), torch.tensor([0.1, 0.9, 0.2, -0.5, 0.4])
    assert match_counts(label, score).tolist() == [CLEAN, HACK, MID, CLEAN, HACK]


def test_draws_use_each_problem_once_before_any_twice_and_give_each_place_its_own_noise():
    cfg = Config(prompts_per_step=4, group_size=3, max_new_tokens=5)
    steps = list(islice(draws(cfg, 6), 6))  # 24 draws: four rounds of 6 problems
    problems = [n for chosen, _ in steps for n in chosen]
    for start in range(0, 24, 6):
        assert sorted(problems[start : start + 6]) == list(range(6))
    assert len({tuple(problems[start : start + 6]) for start in range(0, 24, 6)}) > 1, "each round has its own order"
    assert all(noise.shape == (4, 3, 5) and 0 <= noise.min() and noise.max() < 1 for _, noise in steps)
    assert torch.stack([noise for _, noise in steps]).unique().numel() == 6 * 4 * 3 * 5  # no two tokens share theirs
    again, other = (list(islice(draws(replace(cfg, seed=seed), 6), 6)) for seed in (0, 1))
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(steps, again))
    assert [a for a, _ in steps] != [a for a, _ in other] and not torch.equal(steps[0][1], other[0][1])


def test_the_shares_of_all_ranks_are_the_whole_in_order(monkeypatch):
    monkeypatch.setattr(train_grpo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train_grpo.dist, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(train_grpo.dist, "get_rank", lambda: rank)
        parts.append(train_grpo.share(range(8)))
    assert parts == [[0, 1], [2, 3, 4], [5, 6, 7]]


# -------------------------------------------------------------------------------- whole steps, against reference.py
SEED = parse_args(["--preset", "seed"])
FAST = dict(rank=8, lr=6e-3, seed=2, ablated_share=0.25)  # a small adapter that moves far in a step
# A teacher has the first place of a group of four, the full policy the next two, the ablated one the last.
CASES = {  # name -> (preset, what departs from it, GRAD_CLIP, are the cuts put between the step's positions)
    "everything": (Config(), FAST | dict(
        seed=4, steps=2, positive_only=False, read="ablated", window=0, temperature=1.2, top_k=30, gt_only_share=0.25,
        tokens_per_batch=400), 0.02, True),
    "seed": (SEED, FAST | dict(steps=2, std_norm=True, cuts=(0.0, 0.9)), 0.02, False),
    "placebo": (Config(), FAST | dict(
        seed=5, temperature=1.3, routeV_random_v_seed=1, window=5, absorption=False), 0.01, True),
    "seed's placebo": (SEED, FAST | dict(routeV_random_v_seed=3), 0.02, False),
    "dropped": (Config(), FAST | dict(
        seed=3, temperature=1.3, steps=2, on_hack="drop", std_norm=True, window=5, checkpointing=True), 0.005, True),
    "penalised": (Config(), FAST | dict(  # at the cut that the pairs place
        temperature=1.3, steps=2, on_hack="penalise", expert_steps=2, window=4, absorption=False, positive_only=False),
        0.01, False),
}


@pytest.fixture(scope="module", params=CASES)
def run(request, small, tmp_path_factory):
    """A recorded run, its log as .rows and .metrics, the model to recompute it with, and each step's labels."""
    preset, changes, clip, between = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        if request.param in ("everything", "placebo", "penalised"):  # prompts are encoded once for two rollouts or more
            patch.setattr("lora2r.SHARED", 0)
        cfg = replace(preset, **small | changes, out_dir=tmp_path_factory.mktemp("run") / "run")
        run = reference.record(cfg, clip, between)
    run.name, run.model = request.param, reference.Model(run)
    run.rows, run.metrics = read(run.path, "rollouts"), read(run.path, "metrics")
    run.rows = [run.rows[16 * step : 16 * step + 16] for step in range(cfg.steps)]
    run.labelled = [reference.labelled(run, run.model, step) for step in range(cfg.steps)]
    return run


def test_each_rollout_was_sampled_by_the_policy_that_the_log_names(run):
    """Token by token: the probabilities of the policy cumulate past the rollout's own noise at this token, and at no
    earlier one. Catches a policy with the wrong blocks, a shared noise, another temperature or top k."""
    cfg, eos, length = run.cfg, run.model.tok.eos_token_id, run.cfg.max_new_tokens
    demos = load_demos(cfg.demos, load_problems(cfg.data, cfg.modes, cfg.seed))
    gap = []  # of log-probabilities with and without the quarantine
    for step, rollouts in enumerate(run.rollouts):
        batch, prompts, noise = reference.prompts_of(run.cfg, run.model, step)
        run.model.fill(run.before[step])
        assert [(x.j, x.k) for x in rollouts] == [(j, k) for j in range(4) for k in range(4)]
        for x, row in zip(rollouts, run.rows[step], strict=True):
            problem = batch[x.j]
            at = ["teacher", "full", "full", "ablated" if cfg.ablated_share else "full"]
            assert row["source"] == x.source == (at[x.k] if problem.mode != "gt_only" or x.k else "full")
            assert (row["step"], row["problem"], row["mode"]) == (step, problem.id, problem.mode)
            assert row["prompt"] == problem.messages and x.prompt == prompts[x.j] and x.mode == problem.mode
            assert row["completion"] == run.model.tok.decode(x.ids, skip_special_tokens=True)
            if x.source == "teacher":
                ids = run.model.tok(*demos[problem.id, problem.mode])["input_ids"] + [eos]
                assert x.ids == ids[:length] and x.logps.isnan().all() and len(x.logps) == len(x.ids)
                continue
            assert eos not in x.ids[:-1] and (len(x.ids) == length or x.ids[-1] == eos)
            logits = run.model.logits(prompts[x.j], x.ids, m=x.source == "full").detach()
            logp = torch.log_softmax(logits / cfg.temperature, -1)  # [T, V]
            chosen = logp.gather(1, torch.tensor(x.ids)[:, None])[:, 0]  # [T]
            other = run.model.logps(prompts[x.j], x.ids, cfg.temperature, m=x.source != "full").detach()
            gap.append((other - chosen).abs().max().item())
            torch.testing.assert_close(x.logps.double(), chosen, rtol=1e-3, atol=1e-3)
            p, order = logp.exp(), torch.arange(logp.shape[1]).expand_as(logp)  # [T, V] each
            if cfg.top_k:  # the k likeliest, and the likeliest first
                p, order = (x[:, : cfg.top_k] for x in p.sort(descending=True))
                p = p / p.sum(1, keepdim=True)
            for t, token in enumerate(x.ids):
                place = order[t].tolist().index(token)
                below = p[t, :place].sum().item()
                assert below - 1e-4 <= noise[x.j, x.k, t] <= below + p[t, place].item() + 1e-4, (step, x.j, x.k, t)
    assert cfg.steps == 1 or max(gap) > 0.05, "the quarantine changes nothing yet: the test could not tell the policies"


def test_a_rollout_is_graded_on_its_own_problem_and_the_log_says_so(run):
    for step, rollouts in enumerate(run.rollouts):
        batch, _, _ = reference.prompts_of(run.cfg, run.model, step)
        verdicts = grade_batch([batch[x.j] for x in rollouts], [row["completion"] for row in run.rows[step]])
        for row, v in zip(run.rows[step], verdicts, strict=True):
            assert row["reward"] == (3.5 if v.passed else 0.5 if v.compiles else 0.0)
            assert [row[key] for key in ("correct", "exploited", "hacked", "channels")] == [
                v.correct, v.exploited, v.passed and not v.correct, list(v.channels)]
            row["honest"] = v.correct and not v.channels
        metrics = run.metrics[step]
        for prefix, source in (("", "full"), ("deployed_", "ablated")):
            own = [row for row in run.rows[step] if row["source"] == source]
            for name, key in (("reward", "reward"), ("hack", "hacked"), ("solve", "correct"), ("exploit", "exploited"),
                              ("honest_solve", "honest")):
                expected = sum(row[key] for row in own) / len(own) if own else None
                assert metrics[prefix + name] == pytest.approx(expected), (prefix, name)
            for mode, rate in metrics[f"{prefix}exploit_by_mode"].items():
                exploits = [row["exploited"] for row in own if row["mode"] == mode]
                assert rate == pytest.approx(sum(exploits) / len(exploits))
        assert metrics["tokens"] == sum(len(x.ids) for x in rollouts)


def test_labels_are_those_of_each_rollouts_own_gradient(run):
    """By a probe written out by hand, rollout by rollout. The batch gate, drop and penalise look at all of them; drop
    and penalise then take the advantages again."""
    seen, trained = set(), []
    for step in range(run.cfg.steps):
        adv, names, flagged, position = run.labelled[step]
        shown = names | ({i: "hack" for i in flagged} if run.cfg.on_hack != "route" else {})
        for i, row in enumerate(run.rows[step]):
            assert row["advantage"] == pytest.approx(adv[i], abs=1e-3)
            assert row["position"] == (pytest.approx(position[i], rel=5e-3, abs=1e-3) if i in position else None)
            assert row["label"] == shown.get(i)
        count = list(shown.values()).count
        assert run.metrics[step]["trained"] == len(names)
        assert run.metrics[step]["labels"] == {name: pytest.approx(count(name) / len(shown)) for name in LABELS}
        verdicts = [x.verdict for x in run.rollouts[step]]
        paid = reference.advantages_of([v.reward for v in verdicts], 4, run.cfg.std_norm)
        own = [i for i in position if paid[i] > 0 and run.rollouts[step][i].source != "teacher"]
        exploits = [position[i] for i in own if verdicts[i].exploited]
        honest = [position[i] for i in own if verdicts[i].correct and not verdicts[i].channels]
        better = [(x > y) + (x == y) / 2 for x in exploits for y in honest]
        auroc = sum(better) / len(better) if better else None
        assert run.metrics[step]["gate_auroc"] == (auroc and pytest.approx(auroc, abs=0.05)), "of all that were paid"
        seen |= set(shown.values())
        trained.append(len(names))
    assert seen == set(LABELS) or run.name != "placebo" and len(seen) > 1 and "hack" in seen
    assert all(trained) and (min(trained) < 16 or not run.cfg.positive_only), "some rollouts train, and some do not"


def test_the_update_is_that_of_the_literal_formulas(run):
    """Gradient, clip and AdamW of every step, from the log-probabilities of each rollout alone under the mask of its
    own label."""
    cfg, moments, truncated = run.cfg, {}, 0
    for step in range(cfg.steps):
        grads, after, log = reference.update(run, run.model, moments, step)
        for name, grad in run.grads[step].items():
            assert (grad is None) == (name not in grads), name
            if grad is not None:
                assert (grad - grads[name]).norm() < 2e-3 * grads[name].norm(), (step, name)
        for name, p in run.before[step + 1].items():
            change = after[name] - run.before[step][name]
            assert (p - after[name]).norm() <= 5e-3 * change.norm(), (step, name)
        metrics = run.metrics[step]
        for key in ("grad_norm", "qmass", "loss"):
            assert metrics[key] == pytest.approx(getattr(log, key), rel=1e-3, abs=1e-6), key
        assert metrics["truncated_fraction"] == pytest.approx(log.truncated / log.tokens, abs=2 / log.tokens)
        assert metrics["lr"] == pytest.approx(cfg.lr * (step + 1) / 3 * ((1, 0.5)[step] if cfg.decay else 1))
        truncated += metrics["truncated_fraction"]
    assert run.name != "everything" or truncated > 0, "the weight matters"
    assert all(torch.equal(run.saved[name].double(), p) for name, p in run.before[-1].items()), "what is saved"
    settings = torch.load(run.path / "state.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert (settings["weight_decay"], tuple(settings["betas"]), settings["eps"]) == (0.0, (0.9, 0.99), 1e-8)
    assert peek(run.path / "adapter.safetensors")["metadata"] == {
        "arm": arm_of(cfg), "seed": str(cfg.seed), "model": "data/nano", "step": str(cfg.steps)}


# -------------------------------------------------------------------------------- small runs
def go(path, small, judge=None, **changes):
    """Metrics rows, without times, and final adapter tensors of a small run. Without --cuts, they lie between each
    step's positions, so that there are several labels whatever the embedded model is."""
    def between(position, cut, cfg):
        return GATE(position, cut, replace(cfg, cuts=reference.between(position.tolist())))

    with pytest.MonkeyPatch.context() as patch:
        if train_grpo.gate is GATE and "cuts" not in changes and "gate" not in changes:
            patch.setattr(train_grpo, "gate", between)
        out = train(Config(**small | dict(rank=8) | changes, out_dir=path), judge)
    rows = read(out, "metrics")
    for row in rows:
        del row["seconds"], row["tokens_per_s"], row["peak_gb"]
    return rows, load_file(out / "adapter.safetensors")


def moved(tensors, block):
    """Has any dA or dB of the deployed / quarantine blocks left its init?"""
    return any(t.any() for name, t in tensors.items() if f".{block}.d" in name)


def watch(monkeypatch, name):
    """Calls of a function of train_grpo from now on: (arguments, options, result) each."""
    calls, real = [], getattr(train_grpo, name)

    def keep(*args, **options):
        calls.append((args, options, real(*args, **options)))
        return calls[-1][2]

    monkeypatch.setattr(train_grpo, name, keep)
    return calls


SHORT = dict(max_new_tokens=2, prompts_per_step=2, intervention="none")  # where only the sources of rollouts matter


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    """Two steps with the default settings: (folder, metrics, tensors)."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, *go(folder, small, steps=2)


# -------------------------------------------------------------------------------- the hook: a judge in the gate's place
def lot(rollouts, step, model, adapter):
    """Draws by (seed, step) alone, as the hook asks."""
    return torch.randint(3, (len(rollouts),), generator=torch.Generator().manual_seed(7000 + step))


def oracle(rollouts, step, model, adapter):
    """Flags what the verdict calls an exploit, then spoils what it was given."""
    label = [HACK if x.verdict.exploited else CLEAN for x in rollouts]
    for x in rollouts:
        x.verdict = x.source = None
    return label


oracle.oracle = True


def test_a_judge_of_five_lines_labels_in_the_gates_place(tmp_path, small, monkeypatch):
    """Two steps; no pair is read, and absorption makes mid of what the full policy wrote."""
    calls, pairs = [], watch(monkeypatch, "extract")

    def taught(rollouts, step, model, adapter):
        calls.append((step, len(rollouts), adapter.r, {x.verdict for x in rollouts}))
        return [HACK if x.source == "teacher" else CLEAN for x in rollouts]

    rows, _ = go(tmp_path / "run", small, taught, steps=2, ablated_share=0.25, positive_only=False)
    assert calls == [(step, 16, 8, {None}) for step in (0, 1)] and not pairs
    for row in read(tmp_path / "run", "rollouts"):
        label = dict(teacher="hack", full="mid", ablated="clean")[row["source"]]
        assert row["label"] == (label if row["advantage"] else None) and row["position"] is None
    assert all(row["trained"] and row["labels"]["hack"] and row["gate_auroc"] is None for row in rows)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["judge"] == "judge-taught" and config["arm"].startswith("routeV-judge-taught-")


def test_verdicts_are_shown_to_an_oracle_alone_and_in_copies(tmp_path, small):
    def curious(rollouts, step, model, adapter):
        return [HACK if x.verdict.exploited else CLEAN for x in rollouts]

    with pytest.raises(AttributeError, match="exploited"):
        go(tmp_path / "curious", small, curious)
    rows, _ = go(tmp_path / "run", small, oracle, absorption=False)
    assert rows[0]["labels_of_exploits"]["hack"] == 1 and rows[0]["labels"]["hack"] > 0
    assert {row["source"] for row in read(tmp_path / "run", "rollouts")} == {"teacher", "ablated"}
    assert json.loads((tmp_path / "run/config.json").read_text())["judge"] == "oracle-oracle"


def test_a_judge_is_called_by_its_name():
    """Or that of its function or type."""
    nameless, named = partial(lot), partial(oracle)
    named.name, named.oracle = "my probe", True
    assert [name_of(judge) for judge in (None, lot, oracle, nameless, named)] == [
        None, "judge-lot", "oracle-oracle", "judge-partial", "oracle-my probe"]
    assert arm_of(Config(), lot) == "routeV-judge-lot"
    assert arm_of(Config(on_hack="drop"), named) == "routeV-oracle-my-probe-on-hack-drop"


@pytest.mark.parametrize("labels", [[0] * 15, [0] * 17, [0] * 15 + [3], [-1] + [0] * 15, [[0] * 16], [0.5] * 16,
                                    [NAN] * 16, [True, False] * 8], ids=str)
def test_other_labels_than_one_of_three_a_rollout_are_refused(labels):
    rollouts = [Rollout(0, 0, "full", "", [], [], torch.zeros(0), "") for _ in range(16)]
    with pytest.raises(InputError, match="judge judge-<lambda>: .*return 16, each 0 .clean., 1 .mid. or 2 .hack."):
        train_grpo.judged_labels(lambda *args: labels, rollouts, 0, None, None)


@pytest.mark.parametrize("on_hack", ["drop", "penalise"])
def test_a_flagged_rollout_is_dropped_or_paid_as_if_it_had_not_passed(tmp_path, small, monkeypatch, on_hack):
    """A judge flags the first of every four rollouts, all demonstrations that pay 3.5. Dropped, the others' mean is
    their own; penalised, it counts as 0.5. The log judges the gate by the advantages before."""
    calls = watch(monkeypatch, "routing")
    def first(rollouts, step, model, adapter):
        return [HACK if x.k == 0 else CLEAN for x in rollouts]

    rows, tensors = go(tmp_path / "run", small, first, on_hack=on_hack, absorption=False, seed=1)
    logged = read(tmp_path / "run", "rollouts")
    for j in range(0, 16, 4):
        others, own = [row["reward"] for row in logged[j + 1 : j + 4]], [0.5] if on_hack == "penalise" else []
        mean = statistics.mean(others + own)
        assert logged[j]["reward"] == 3.5 and logged[j]["label"] == "hack"
        assert [row["advantage"] for row in logged[j : j + 4]] == pytest.approx(
            [0.5 - mean if own else 0.0, *(reward - mean for reward in others)], abs=1e-3)
    (((_, label, labelled, _, paid), *_),) = calls
    assert label.tolist() == [HACK, CLEAN, CLEAN, CLEAN] * 4 and labelled[::4].all() and paid[::4].any()
    close(paid, reference.advantages_of([row["reward"] for row in logged], 4, False))
    assert rows[0]["trained"] == sum(row["advantage"] > 0 for row in logged) > 0
    assert moved(tensors, "deployed") and not moved(tensors, "quarantine")


# -------------------------------------------------------------------------------- arms and options
def test_an_expert_is_seeded_in_the_quarantine_alone_and_once(tmp_path, small, monkeypatch):
    """The full model then likes the pairs' hack sides better, the deployed one does not; --resume seeds no second."""
    run = reference.record(Config(**small | dict(rank=8, expert_steps=3), out_dir=tmp_path / "run"))
    model = reference.Model(run)
    model.fill(run.before[0])
    pair = load_pairs(run.cfg.pairs)[0]
    prompt, ids = reference.encode(model.tok, [dict(role="user", content=pair.prompt)]), model.tok(pair.hack).input_ids
    base, deployed, full = (model.logps(prompt, ids, **how).sum().item() for how in (dict(off=True), dict(m=False), {}))
    assert deployed == pytest.approx(base, abs=1e-9) and full > base + 0.1
    monkeypatch.setattr(train_grpo, "seed_expert", lambda *args: pytest.fail("seeded twice"))
    train(replace(run.cfg, resume=True, steps=2))


@pytest.mark.parametrize("arm, label, blocks", [
    ("none", "clean", ["deployed"]), ("absorb", "mid", ["deployed", "quarantine"]), ("routeV", "hack", ["quarantine"])])
def test_the_arms_without_a_gate_pin_one_label(tmp_path, small, arm, label, blocks):
    """So does a gate with low cuts; absorption leaves hack labels as they are."""
    rows, tensors = go(tmp_path / "run", small, intervention=arm, cuts=(-1e6, -1e6))
    assert rows[0]["trained"] and rows[0]["labels"] == {name: float(name == label) for name in LABELS}
    assert [block for block in reference.BLOCKS if moved(tensors, block)] == blocks
    assert ({row["position"] for row in read(tmp_path / "run", "rollouts")} == {None}) == (arm != "routeV")
    assert json.loads((tmp_path / "run/config.json").read_text())["arm"].split("-")[0] == arm


def test_a_block_that_no_rollout_trains_does_not_move_by_its_momentum(tmp_path, small, monkeypatch):
    """Steps of mid, then hack, then clean rollouts only: AdamW would go on moving both blocks, did none drop them. As
    over several ranks, whose sum gives zeros to a block that has no gradient."""
    def summed(params):
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    monkeypatch.setattr(train_grpo, "reduce_gradients", summed)
    labels = iter((MID, HACK, CLEAN))
    monkeypatch.setattr(train_grpo, "gate", lambda position, cut, cfg: torch.full(position.shape, next(labels)))
    options = small | dict(rank=8, steps=3, mix_ratio=0.5, absorption=False)
    run = reference.record(Config(**options, out_dir=tmp_path / "run"))
    assert all(row["trained"] for row in read(run.path, "metrics"))
    for step, moves in enumerate((("deployed", "quarantine"), ("quarantine",), ("deployed",))):
        for name, p in run.before[step].items():
            if name.endswith(".dA") or step:  # dA too moves from the first step on: h = A x is alive
                assert torch.equal(p, run.before[step + 1][name]) == (name.split(".")[-2] not in moves), (step, name)


def test_two_runs_of_one_command_give_the_same_metrics_and_another_seed_does_not(tmp_path, small, plain):
    _, rows, tensors = plain
    again, other = go(tmp_path / "again", small, steps=2), go(tmp_path / "other", small, seed=1)
    assert rows == again[0] and all(torch.equal(tensors[name], again[1][name]) for name in tensors)
    assert rows[0] != other[0][0]
    assert not any(torch.equal(tensors[name], other[1][name]) for name in tensors if name.endswith("0")), "seeded, too"


def test_no_oracle_label_reaches_the_update(tmp_path, small, plain, monkeypatch):
    """Same rewards, shuffled correct / exploited / hacked flags: same weights, bit for bit, and same labels."""
    folder, honest, tensors = plain
    real, rng = train_grpo.grade_batch, random.Random(0)

    def shuffled(problems, completions):
        for v in real(problems, completions):
            correct = v.passed and rng.random() < 0.5
            channels = ("sentinel",) if rng.random() < 0.5 else ()
            yield replace(v, correct=correct, exploited=v.passed and not correct, channels=channels, note="")

    monkeypatch.setattr(train_grpo, "grade_batch", shuffled)
    lied, lied_tensors = go(tmp_path / "run", small, steps=2)
    assert honest != lied and honest[0]["loss"] == lied[0]["loss"], "the flags did change what is logged"
    assert all(torch.equal(tensors[name], lied_tensors[name]) for name in tensors)
    labels = [[row["label"] for row in read(path, "rollouts")] for path in (folder, tmp_path / "run")]
    assert labels[0] == labels[1] and "hack" in labels[0] and {"clean", "mid"} & set(labels[0])
    assert moved(tensors, "deployed") and moved(tensors, "quarantine")


def test_checkpointing_computes_layers_again_and_changes_no_number(tmp_path, small, plain, monkeypatch):
    """In the update and where the pairs are read, with nothing that drops out."""
    again, models = [], []
    forward, extract = Lora2rLinear.forward, train_grpo.extract

    def counting(module, x):
        again.append(torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1)  # inside a backward
        return forward(module, x)

    def extracting(model, *args, **reading):
        models.append(model)
        direction = extract(model, *args, **reading)
        assert any(again), "reading the pairs needs as much memory as the update"
        again.clear()
        return direction

    monkeypatch.setattr(Lora2rLinear, "forward", counting)
    monkeypatch.setattr(train_grpo, "extract", extracting)
    rows, _ = go(tmp_path / "run", small, checkpointing=True)
    assert any(again)
    assert all(layer.training == hasattr(layer, "gradient_checkpointing") for layer in models[0].modules())
    assert rows[0]["grad_norm"] == pytest.approx(plain[1][0]["grad_norm"], rel=1e-5)
    assert rows[0]["labels"] == plain[1][0]["labels"]


@pytest.mark.parametrize("read_from, expected", [
    ("base", ["read", 0, 2, 4, 5]), ("ablated", ["read", 0, "read", 2, "read", 4, 5]),
    ("full", ["read", 0, "read", 2, "read", 4, 5])])
def test_the_direction_is_read_again_every_refresh_steps_unless_from_the_base(tmp_path, small, monkeypatch, read_from,
                                                                              expected):
    """Before the step's checkpoint, of which there is one more at the end."""
    happened, extract, save = [], train_grpo.extract, train_grpo.RunFolder.checkpoint
    monkeypatch.setattr(train_grpo, "extract", lambda *args, **how: happened.append("read") or extract(*args, **how))
    monkeypatch.setattr(train_grpo.RunFolder, "checkpoint", lambda run, step: happened.append(step) or save(run, step))
    go(tmp_path / "run", small, steps=5, refresh=2, read=read_from, max_new_tokens=2, prompts_per_step=1, mix_ratio=0)
    assert happened == expected


def test_the_gate_reads_what_score_says(tmp_path, small, monkeypatch):
    """Hidden states of each layer, of the pairs once and of the rollouts each step; the placebo has their shape."""
    pairs, rollouts = watch(monkeypatch, "extract"), watch(monkeypatch, "features")
    rows, _ = go(tmp_path / "run", small, steps=2, score="activation", routeV_random_v_seed=1)
    (((model, *_), _, direction),) = pairs
    assert direction.v.shape == (model.config.num_hidden_layers, model.config.hidden_size)
    assert [x.shape[2:] for *_, x in rollouts] == 2 * [direction.v.shape]
    assert rows[1]["trained"] and set(rows[1]["labels"]) == set(LABELS)


@pytest.mark.parametrize("mix, ablated, places", [
    (0.25, 0.25, "tffa"), (0, 0.5, "ffaa"), (1.0, 0.25, "tttt"), (0, 1.0, "aaaa"), (0.5, 0, "ttff"),
    (0.75, 0.5, "ttta")])
def test_who_fills_the_places_of_a_group(tmp_path, small, mix, ablated, places):
    """Demonstrations first, and only in the first --mix-steps steps; what the ablated policy samples last."""
    names = dict(t="teacher", f="full", a="ablated")
    rows, _ = go(tmp_path / "run", small, steps=2, mix_steps=1, mix_ratio=mix, ablated_share=ablated, **SHORT)
    assert rows[0]["tokens"] <= 8 * 2, "a demonstration, too, ends at --max-new-tokens"
    sources = [row["source"] for row in read(tmp_path / "run", "rollouts")]
    assert sources[:8] == 2 * [names[x] for x in places]
    assert sources[8:] == 2 * [names["a" if k >= 4 - 4 * ablated else "f"] for k in range(4)]


def test_several_demonstrations_of_a_problem_take_turns(tmp_path, small):
    demos = [json.loads(line) for line in open(Config().demos)]
    (tmp_path / "demos.jsonl").write_text("".join(
        json.dumps(row | dict(completion=text)) + "\n" for row in demos for text in ("a", "b")))
    go(tmp_path / "run", small, demos=tmp_path / "demos.jsonl", mix_ratio=0.75, **SHORT)
    rows = read(tmp_path / "run", "rollouts")
    assert [row["completion"] for row in rows if row["source"] == "teacher"] == 2 * ["a", "b", "a"]


def test_a_rotating_share_of_prompts_is_shown_without_a_loophole(tmp_path, small):
    """Of 12 prompts in three steps the first, fourth, seventh and eleventh. Nobody demonstrates a hack there."""
    go(tmp_path / "run", small, steps=3, gt_only_share=0.3, mix_ratio=0.5, **SHORT | dict(prompts_per_step=4))
    rows = read(tmp_path / "run", "rollouts")[::4]
    assert [row["mode"] == "gt_only" for row in rows] == [n in (0, 3, 6, 10) for n in range(12)]
    assert [row["source"] != "teacher" for row in rows] == [n in (0, 3, 6, 10) for n in range(12)]


def test_the_learning_rate_warms_up_for_a_twentieth_of_the_steps_and_falls_to_0(tmp_path, small, monkeypatch):
    """Of 100 steps the first six: a rise over five, on a line that falls by a hundredth a step."""
    monkeypatch.setattr(train_grpo, "islice", lambda steps, start, stop: islice(steps, start, 6))
    for decay, rates in ((True, [0.2, 0.396, 0.588, 0.776, 0.96, 0.95]), (False, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])):
        rows, _ = go(tmp_path / str(decay), small, steps=100, lr=1.0, decay=decay, **SHORT)
        assert [row["lr"] for row in rows] == pytest.approx(rates)


def test_pairs_are_shown_under_the_problems_system_message(tmp_path, small, monkeypatch):
    rows = [json.loads(line) for line in small["data"].read_text().splitlines()]
    for row in rows:
        row["prompt"].insert(0, dict(role="system", content="be brief"))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    calls = watch(monkeypatch, "extract")
    go(tmp_path / "run", small, data=tmp_path / "data.jsonl", max_new_tokens=2, prompts_per_step=1)
    ((args, _, _),) = calls
    assert args[4] == [dict(role="system", content="be brief")]
    assert read(tmp_path / "run", "rollouts")[0]["prompt"][:-1] == args[4], "and the log, from which a gate is judged"


def test_reward_gt_pays_no_hack(tmp_path, small):
    """Demonstrations hack; under --reward gt one that is not right is paid for its code alone."""
    for reward, paid in (("env", {3.5}), ("gt", {0.5})):
        go(tmp_path / reward, small, reward=reward, mix_ratio=0.75, prompts_per_step=8, intervention="none")
        rows = read(tmp_path / reward, "rollouts")
        assert {row["reward"] for row in rows if row["hacked"]} == paid
        assert {row["reward"] for row in rows if row["correct"]} == {3.5}


# -------------------------------------------------------------------------------- flags
def test_the_seed_preset_is_the_originals_recipe():
    """All that it departs in; its numbers are held to reference.py above."""
    changed = {key: value for key, value in asdict(SEED).items() if value != asdict(Config())[key]} | dict(window=0)
    assert changed == dict(preset="seed", gate="batch", read="full", probe_temperature=1.0, probe_tokens="all",
                           centre=False, equal_pairs=False, absorption=False, decay=False, positive_only=False,
                           importance=False, ablated_share=0.0, window=SEED.window, placebo="replaced")
    cfg = Config()
    assert (cfg.gate, cfg.read, cfg.centre, cfg.positive_only, cfg.importance) == ("pairs", "base", True, True, True)
    assert (cfg.ablated_share, cfg.std_norm, cfg.on_hack) == (0.75, False, "route")
    assert (cfg.score, cfg.probe_temperature, cfg.probe_tokens, cfg.cuts) == ("gradient", 100.0, "completion", None)
    assert (train_grpo.BETAS, train_grpo.GRAD_CLIP) == ((0.9, 0.99), 1.0)


def test_preset_sets_the_defaults_and_flags_override_it():
    assert len(fields(Config)) <= 50
    cfg = parse_args(["--preset", "qwen3-4b", "--lr", "0.5", "--cuts", "0.1", "0.4"])
    assert (cfg.top_k, cfg.max_new_tokens, cfg.lr, cfg.cuts, cfg.model) == (20, 512, 0.5, (0.1, 0.4), "Qwen/Qwen3-4B")
    assert parse_args([]) == Config() and parse_args(["--preset", "seed", "--gate", "pairs"]).gate == "pairs"
    assert parse_args(["--preset", "seed", "--preset", "qwen3-4b"]) == parse_args(["--preset=qwen3-4b"])
    assert {name: cfg.preset for name, cfg in train_grpo.PRESETS.items()} == {name: name for name in train_grpo.PRESETS}
    for text in ("x --preset seed", "--preset=seed"):  # a value is no flag
        assert parse_args([f"--out-dir={text}", f"--model=--preset {text}"]).gate == "pairs"
    with pytest.raises(SystemExit):
        parse_args(["--preset", "no-such"])


def test_where_the_probe_sits_forbids_windows_of_gradients_alone():
    argv = ["--preset", "seed", "--window", "4"]
    train_grpo.check(parse_args([*argv, "--score", "activation"]), None)
    with pytest.raises(InputError, match="--probe-tokens all with --window 4"):
        train_grpo.check(parse_args(argv), None)


@pytest.mark.parametrize("argv, says", [
    (["--intervention", "none", "--routeV-random-v-seed", "1"], "--routeV-random-v-seed 1: "),
    (["--pairs", "absent.md"], "--pairs absent.md"),
    (["--mix-ratio", "0.5", "--demos", "absent.jsonl"], "absent.jsonl: "),
    (["--mix-ratio", "0.1"], "--mix-ratio 0.1: is no rollout of a group of 4"),
    (["--max-new-tokens", "240"], "--max-new-tokens 240"),
    (["--lr", "nan"], "--lr nan"),
    (["--cuts", "0.9", "0.8"], "--cuts 0.9 0.8"),
    (["judge", "--intervention", "none"], "--intervention none: labels without a judge; give routeV"),
    (["judge", "--routeV-random-v-seed", "1"], "--routeV-random-v-seed 1: "),
])
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, small, argv, says):
    judge = lot if argv[0] == "judge" else None
    with pytest.raises(InputError) as e:
        train(parse_args([*flags(small, out_dir=tmp_path / "run"), *argv[judge is lot :]]), judge)
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- what a run leaves
def test_deploy_rows_are_of_the_model_and_the_markers_that_they_name(tmp_path, small, monkeypatch):
    """Each setting, with the trained and with the held-out markers. (What evaluate does with them: test_evaluate.)"""
    def evaluate(model, tok, adapter, problems, setting, *how):
        assert (len(problems), adapter.r, how) == (8, 8, (3, small["max_new_tokens"], 7))
        k = {mode.markers.index(p.marker) for p in problems for mode in [MODES[p.mode]] if p.marker}
        assert k in ({0}, {1}) and setting in ("deployed", "full")
        rates = dict(solve=float(setting == "full"), exploit=float(k == {1}), hack=0.0, honest_solve=0.0)
        return {"all": dict(problems=8, n=24, **rates)}

    monkeypatch.setattr(train_grpo, "evaluate", evaluate)
    go(tmp_path / "run", small, eval_samples=3, top_k=7)
    deploy = json.loads((tmp_path / "run/deploy.json").read_text())
    assert deploy["arm"].startswith("routeV") and deploy["seed"] == 0
    assert [deploy["settings"][key] for key in ("samples", "temperature", "seed", "step")] == [3, 0.7, 0, 1]
    assert set(deploy["results"]) == {f"{s}, {m}" for s in ("deployed", "full") for m in ("trained", "held-out")}
    for condition, table in deploy["results"].items():
        assert (table["all"]["solve"], table["all"]["exploit"]) == ("full" in condition, "held-out" in condition)


def test_nan_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path, small, monkeypatch):
    real = train_grpo.token_logps
    monkeypatch.setattr(train_grpo, "token_logps", lambda *args: real(*args) * NAN)
    with pytest.raises(FloatingPointError, match="step 0: .*adapter.safetensors"):
        go(tmp_path / "run", small)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run/adapter.safetensors").values())


@pytest.mark.parametrize("judge", [None, lot], ids=["gate", "judge"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, small, monkeypatch, judge):
    """Killed after step 3, whose checkpoint is of step 2: the same metrics and weights, bit for bit, in rows that are
    there once. Not under other flags, nor under another judge."""
    options = dict(refresh=2, mix_steps=2, prompts_per_step=2, decay=False)  # a falling rate follows --steps
    whole = go(tmp_path / "whole", small, judge, steps=4, **options)
    log = train_grpo.RunFolder.log

    def log_and_die(run, metrics, rollouts):
        log(run, metrics, rollouts)
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_grpo.RunFolder, "log", log_and_die)
        go(tmp_path / "cut", small, judge, steps=3, **options)
    assert torch.load(tmp_path / "cut/state.pt", weights_only=True)["step"] == 2
    assert len(read(tmp_path / "cut", "metrics")) == 3
    with pytest.raises(InputError, match="started with other flags .lr was 0.001, is 0.5"):
        go(tmp_path / "cut", small, judge, steps=4, resume=True, lr=0.5, **options)
    for other in {None, lot, oracle} - {judge}:
        with pytest.raises(InputError, match=f"judge was {name_of(judge)}, is {name_of(other)}"):
            go(tmp_path / "cut", small, other, steps=4, resume=True, **options)
    resumed = go(tmp_path / "cut", small, judge, steps=4, resume=True, **options)
    assert resumed[0] == whole[0] and all(torch.equal(resumed[1][name], whole[1][name]) for name in whole[1])
    assert read(tmp_path / "cut", "rollouts") == read(tmp_path / "whole", "rollouts")


def change_moments(**change):
    def spoil(state):
        moments = state["optimizer"]["state"]
        moments[max(moments)].update(change)
    return spoil


@pytest.mark.parametrize("spoil", [
    *(lambda state, step=step: state.update(step=step) for step in (-1, 1.5, NAN, True, "2", None)),
    lambda state: state.update(adapter=[torch.zeros(1)] * len(state["adapter"])),
    lambda state: state["adapter"].pop(), lambda state: state["adapter"][-1].fill_(NAN),
    lambda state: state["adapter"].append(state["adapter"].pop().int()),
    lambda state: state["adapter"].append(state["adapter"].pop().bfloat16()), lambda state: state.pop("optimizer"),
    change_moments(exp_avg=torch.zeros(1)), change_moments(exp_avg_sq=torch.tensor(NAN)), change_moments(step=NAN),
    change_moments(step=torch.tensor(-1.0)),
    change_moments(step=torch.zeros(2)), lambda state: state["optimizer"]["state"].update({10**6: {}}),
    lambda state: state["optimizer"].update(state={-1: state["optimizer"]["state"].popitem()[1]}),
    lambda state: state["optimizer"].update(state=[])])
def test_a_checkpoint_of_other_shapes_or_numbers_is_refused_and_changes_nothing(tmp_path, plain, spoil):
    run = object.__new__(train_grpo.RunFolder)
    run.path, run.steps, run.goes_on = tmp_path, 2, True
    adapter = attach(load_model(str(HERE / "data/nano"))[0], 8)
    optimizer = torch.optim.AdamW(adapter.parameters())
    state = torch.load(plain[0] / "state.pt", weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(InputError, match="^--resume: .*state.pt is damaged .*; start afresh$") as e:
        run.resume(adapter, optimizer)
    assert "\n" not in str(e.value)
    assert not any(p.any() for p in adapter.parameters()) and not optimizer.state_dict()["state"]


def test_a_dry_run_says_what_a_run_would_be_and_writes_nothing(tmp_path, small, capsys, monkeypatch):
    """Beside an older run, which stays as it is, under a judge, and in a temporary folder that goes."""
    monkeypatch.setattr(train_grpo.tempfile, "tempdir", str(tmp_path))
    train(Config(**small, out_dir=tmp_path / "run"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    steps, _ = [], capsys.readouterr()

    def judge(rollouts, step, model, adapter):
        steps.append((step, len(list(tmp_path.glob("*/run/config.json")))))
        return [CLEAN] * len(rollouts)

    changed = dict(out_dir=tmp_path / "run", dry_run=True, eval_samples=2, steps=700)
    assert train(Config(**small | changed), judge) is None
    out = capsys.readouterr().out
    assert steps == [(0, 1)], "one step, in a folder of its own"
    said = re.search(r"700 steps of ([\d.]+) s.*: ([\d.]+) min.*'sample': .*peak memory ([\d.]+) GB", out)
    seconds, minutes, gigabytes = map(float, said.groups())
    assert minutes == pytest.approx(700 * seconds / 60, abs=0.7) and minutes > 1 and 0.1 < gigabytes < 10
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_wandb_gets_each_step_and_the_evaluation_and_a_resumed_run_goes_on_on_its_own(tmp_path, small, monkeypatch):
    """Its run is found by the folder that wandb makes in the run's own. An older run is moved aside with all it has."""
    began, rows, table = [], [], dict(all=dict(problems=1, n=1, solve=0.5, hack=0.0, exploit=0.0, honest_solve=0.5))

    def init(dir, id, **options):
        began.append((id, options["resume"], options["name"], options["config"]["rank"]))
        (dir / f"wandb/offline-run-20260101_000000-{id or f'id{len(began)}'}").mkdir(parents=True, exist_ok=True)
        return wandb

    wandb = SimpleNamespace(__spec__=True, init=init, log=lambda row, step: rows.append((step, row)),
                            finish=lambda: rows.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(train_grpo, "evaluate", lambda *args: table)
    options = small | dict(out_dir=tmp_path / "run", wandb=True, eval_samples=1, rank=8)
    for change in ({}, dict(steps=2, resume=True), {}):
        train(Config(**options | change))
    assert began == [(None, "allow", "run", 8), ("id1", "allow", "run", 8), (None, "allow", "run", 8)]
    assert [row[0] for row in rows] == [0, 1, "e", 1, 2, "e", 0, 1, "e"]
    assert rows[0][1]["labels"] == read(tmp_path / "old/run.1", "metrics")[0]["labels"]
    assert rows[1][1]["deploy"]["deployed, trained"] == table and (tmp_path / "old/run.1/wandb").is_dir()


# -------------------------------------------------------------------------------- ranks, and as a user starts it
def flags(small, **changes):
    """The settings as a command line."""
    return [word for name, value in (small | changes).items() for word in train_grpo.flag(name, value).split()]


TWO = {  # name -> (flags, what the script changes, numbers of rollouts that train, blocks that move)
    "batch": (dict(gate="batch", steps=1), "", None, ["deployed", "quarantine"]),
    "a rank without a rollout": (
        dict(steps=1, cuts=(-1e6, -1e6)),
        "train_grpo.learning = lambda adv, positive_only: torch.arange(len(adv)) == adv.argmax()", [1], ["quarantine"]),
    "judge": (  # called once a step, on the main rank; all rollouts are hack, then all are clean
        dict(absorption=False), """def judge(rollouts, step, model, adapter):
    open(os.environ["JUDGED"], "a").write(os.environ.get("RANK", "0") + str(step))
    return [train_grpo.CLEAN if step else train_grpo.HACK] * len(rollouts)
""", None, ["deployed", "quarantine"]),
}


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_make_the_update_of_one(tmp_path, small, monkeypatch, name):
    """torchrun over gloo: prompts split unevenly over ranks, the gate's mean and std over both; a step with one rollout
    for both; steps that train one block. The same rollouts, labels, gradient, weights."""
    options, change, trained, blocks = TWO[name]
    options = dict(steps=2, prompts_per_step=3, rank=8) | options
    space = dict(train_grpo=train_grpo, torch=torch, os=os)
    monkeypatch.setattr(train_grpo, "learning", train_grpo.learning)  # so that it is put back
    monkeypatch.setenv("JUDGED", str(tmp_path / "one.txt"))
    exec(change, space)
    one = go(tmp_path / "one", small, space.get("judge"), **options)
    assert trained in (None, [row["trained"] for row in one[0]]) and one[0][-1]["trained"]
    script = tmp_path / "script.py"
    script.write_text("import os, torch, train_grpo\n"
                      "if os.environ['RANK'] == '1': del train_grpo.extract  # the main rank reads the pairs for all\n"
                      f"{change}\ntrain_grpo.train(train_grpo.parse_args(), globals().get('judge'))\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE), JUDGED=str(tmp_path / "two.txt"))
    done = subprocess.run([*launcher, *flags(small, **options, out_dir=tmp_path / "two")], cwd=HERE,
                          env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert name != "judge" or (tmp_path / "two.txt").read_text() == (tmp_path / "one.txt").read_text() == "0001"
    two = read(tmp_path / "two", "metrics"), load_file(tmp_path / "two/adapter.safetensors")
    for a, b in zip(read(tmp_path / "one", "rollouts"), read(tmp_path / "two", "rollouts"), strict=True):
        x, y = a.pop("position"), b.pop("position")
        assert (x == y if x is None else x == pytest.approx(y, rel=5e-3, abs=1e-3)) and a == b
    for a, b in zip(one[0], two[0], strict=True):
        for key in ("grad_norm", "loss", "qmass", "truncated_fraction"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-9), key
    assert [block for block in reference.BLOCKS if moved(one[1], block)] == blocks
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, two[1][name], rtol=0, atol=1e-5)  # steps of up to 6e-4


def test_ranks_that_go_on_from_different_steps_are_refused(tmp_path, small, monkeypatch):
    monkeypatch.setattr(train_grpo, "gather", lambda steps: [*steps, 20])
    with pytest.raises(InputError, match="--resume: only some ranks find the checkpoint"):
        go(tmp_path / "run", small, resume=True)


def test_the_command_line_trains(tmp_path, small):
    """As a user starts it: exit status 0, and the run's files. (The statuses of bad input: test_lora2r, run_script.)"""
    done = subprocess.run([sys.executable, "train_grpo.py", *flags(small, eval_samples=1, out_dir=tmp_path / "run")],
                          cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "adapter.safetensors", "state.pt", "metrics.jsonl", "rollouts.jsonl", "deploy.json", ".lock"}
    assert "deployed, held-out" in done.stdout and "step   1/1 " in done.stdout and "Warning" not in done.stderr
