"""train_grpo: its arithmetic by hand, whole steps against reference.py, arms and options, files, bad input."""
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

import reference
import train_grpo
from env_leetcode import DEFAULT_MODES, MODES, Verdict, grade_batch, load_problems
from extract_vgrad import haar, load_demos, load_pairs
from lora2r import InputError, Lora2rLinear, encode_prompt, load_model, peek
from train_grpo import (CLEAN, HACK, HERE, LABELS, MASKS, MID, Config, advantages, draws, match_shares,
                        parse_args, policy_loss, train)

NAN = math.nan


def close(value, expected, **tolerance):
    torch.testing.assert_close(value, torch.tensor(expected), **(tolerance or dict(rtol=0, atol=1e-5)))


# -------------------------------------------------------------------------------- the arithmetic, by hand
def test_labels_are_the_masks_of_the_three_zones():
    """Rows (m, d): clean trains the deployed block alone, mid both, hack the quarantine beside a detached deployed."""
    assert (LABELS[CLEAN], LABELS[MID], LABELS[HACK]) == ("clean", "mid", "hack")
    assert MASKS.dtype == torch.bool
    assert MASKS[[CLEAN, MID, HACK]].tolist() == [[False, False], [True, False], [True, True]]


def test_advantages_are_of_a_groups_own_mean():
    """Means 2 and 0.5, not the batch's 1.25; a group without a spread trains nothing."""
    rewards = torch.tensor([[3.5, 2.0, 0.5], [0.5, 0.5, 0.5]])
    close(advantages(rewards), [[1.5, 0.0, -1.5], [0.0, 0.0, 0.0]])
    close(advantages(rewards, std_norm=True), [[1.5 / 1.5001, 0.0, -1.5 / 1.5001], [0.0, 0.0, 0.0]])
    close(advantages(4 * rewards, std_norm=True)[0], [1.0, 0.0, -1.0], rtol=0, atol=1e-4)
    close(advantages(torch.tensor([[2.0, 0.0]]), std_norm=True), [[1 / 1.41431, -1 / 1.41431]])  # n - 1, as GRPO has it


def loss_of(ratio, advantage, weight=1.0, **options):
    """policy_loss of one rollout with one token whose old probability is 0.4."""
    old = torch.tensor([[0.4]]).log()
    sampled = old - math.log(weight)
    options = dict(clip_eps=0.2, importance=True) | options
    logp, is_completion = old + math.log(ratio), torch.tensor([[True]])
    return policy_loss(logp, old, sampled, torch.tensor([advantage]), is_completion, **options)


@pytest.mark.parametrize("weight, importance, cost, truncated", [
    (0.3, True, -0.6, 0), (1.0, True, -2.0, 0), (3.0, True, -2.0, 1), (3.0, False, -2.0, 0), (0.3, False, -2.0, 0),
    (NAN, True, -2.0, 0)])
def test_importance_weight_is_truncated_at_1_and_1_for_a_demonstration(weight, importance, cost, truncated):
    """weight: p of the masked policy before the step, over p of the policy that sampled."""
    loss, stats = loss_of(1.0, 2.0, weight, importance=importance)
    close(loss, cost)
    assert stats.tolist() == [0, 0, truncated, 1]


def test_policy_loss_sums_over_completion_tokens_of_rows_with_their_own_advantage():
    """Two rollouts of 2 and 1 completion tokens; NaN or not, the rest costs, counts and moves nothing."""
    is_completion = torch.tensor([[False, True, True], [False, True, False]])
    old = torch.log(torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.5, 0.9]]))
    logp = torch.log(torch.tensor([[0.1, 0.5, 0.75], [0.1, 0.25, 0.1]])).requires_grad_()
    sampled = torch.log(torch.tensor([[0.1, 1.0, 0.5], [0.1, 0.25, 0.1]]))
    loss, stats = policy_loss(logp, old, sampled, torch.tensor([1.0, -2.0]), is_completion, clip_eps=0.2)
    # row 0: 0.5 * 1 + 1 * min(1.5, 1.2) = 1.7; row 1: min(1, 2) * min(0.5 * -2, 0.8 * -2) = -1.6
    close(loss, -1.7 + 1.6)
    assert stats.tolist() == [0, 2, 1, 3]
    loss.backward()
    close(logp.grad, [[0, -0.5, 0], [0, 0, 0]])  # the two clipped tokens are constants


def test_old_policy_and_weight_are_constants_of_the_gradient():
    """At ratio 1 the gradient of a token's loss is -w A."""
    logp = torch.log(torch.tensor([[0.5, 0.5]])).requires_grad_()
    sampled = torch.log(torch.tensor([[1.0, 0.25]]))
    policy_loss(logp, logp.detach(), sampled, torch.tensor([3.0]), torch.ones(1, 2).bool())[0].backward()
    close(logp.grad, [[-1.5, -3.0]])


def test_gate_thresholds_and_degenerate_batches(capsys):
    """A position at a cut belongs above it. Batch: mean 0.25, std 0.5 of n - 1 numbers."""
    pairs, batch = Config(cut_mid=0.25, cut_hack=0.75), Config(gate="batch", k_mid=0.0, k_hack=1.5)

    def gate(position, cfg, cut=9.9):
        return train_grpo.gate(position, cut, cfg)

    assert gate(torch.tensor([0.2, 0.25, 0.5, 0.75, 2.0]), pairs).tolist() == [CLEAN, MID, MID, HACK, HACK]
    assert gate(torch.tensor([0.0, 0.0, 0.0, 1.0]), batch).tolist() == [CLEAN, CLEAN, CLEAN, HACK]
    assert gate(torch.tensor([0.0, 0.0, 0.0, 1.0]), replace(batch, k_hack=1.6)).tolist() == [CLEAN, CLEAN, CLEAN, MID]
    assert gate(torch.tensor([0.0, 2.0, 1.0]), batch).tolist() == [CLEAN, MID, MID]  # 1 is the mean; 2 < 1 + 1.5
    assert gate(torch.tensor([0.5, 0.5]), pairs).tolist() == [MID, MID]  # no spread and one rollout are fine for it
    assert gate(torch.ones(1), pairs).tolist() == [HACK]
    assert gate(torch.tensor([0.2, 0.4, 0.8]), Config(), cut=0.4).tolist() == [CLEAN, HACK, HACK]  # where pairs say
    assert gate(torch.tensor([0.2, 0.4, 0.8]), Config(cut_mid=0.1), cut=0.4).tolist() == [MID, HACK, HACK]
    assert gate(torch.tensor([0.2, 0.4, 0.8]), Config(cut_mid=0.5), cut=0.3).tolist() == [CLEAN, HACK, HACK]
    assert gate(torch.tensor([0.2, 0.4, 0.8]), Config(cut_hack=0.7), cut=0.4).tolist() == [CLEAN, CLEAN, HACK]
    assert capsys.readouterr().out == ""
    for position, cfg in (([0.1, NAN], pairs), ([math.inf, 0.9], pairs), ([0.1, NAN], batch), ([0.1, 0.1], batch),
                          ([0.1], batch)):
        assert gate(torch.tensor(position), cfg).tolist() == [MID] * len(position)
        assert "degenerate batch" in capsys.readouterr().out


def test_a_matched_placebo_keeps_the_counts_and_gives_them_by_rank():
    label, score = torch.tensor([HACK, CLEAN, MID, HACK, CLEAN]), torch.tensor([0.1, 0.9, 0.2, -0.5, 0.4])
    assert match_shares(label, score).tolist() == [CLEAN, HACK, MID, CLEAN, HACK]


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
# A small adapter that moves far in a step, and a clip that binds
FAST = dict(rank=8, lr=6e-3, grad_clip=0.02, seed=2, ablated_share=0.25)
# A teacher has the first place of a group, the full policy the next two, the ablated one the last. --gate pairs
# reads whole answers or windows of a stated length; what pairs choose for themselves is test_extract's.
CASES = {  # name -> (preset, what departs from it)
    "everything": (Config(), FAST | dict(
        seed=4, steps=2, positive_only=False, read="ablated",
        window=0, cut_mid=0.1, cut_hack=0.4, temperature=1.2, top_k=30, gt_only_share=0.25, tokens_per_batch=400)),
    "seed": (SEED, FAST | dict(steps=2, std_norm=True, k_hack=0.9)),
    "placebo": (Config(), FAST | dict(
        seed=5, temperature=1.3, grad_clip=0.01, routeV_random_v_seed=1, cut_mid=0.1, cut_hack=0.3, window=5,
        absorption=False)),
    "seed's placebo": (SEED, FAST | dict(routeV_random_v_seed=2)),
    "dropped": (Config(), FAST | dict(
        seed=3, temperature=1.3, steps=2, grad_clip=0.005, on_hack="screen", window=5, cut_mid=-0.24)),
    "penalised": (Config(), FAST | dict(
        temperature=1.3, steps=2, on_hack="penalise", expert_steps=2, window=4, cut_mid=-0.6, absorption=False)),
    "penalised by std": (Config(), FAST | dict(
        temperature=1.3, steps=2, on_hack="penalise", std_norm=True, expert_steps=2, window=4, cut_mid=-0.6,
        absorption=False)),
    "checkpointed": (Config(), FAST | dict(
        seed=4, steps=2, checkpointing=True, window=5, cut_mid=0.1, cut_hack=0.4, positive_only=False)),
}


@pytest.fixture(scope="module", params=CASES)
def run(request, small, tmp_path_factory):
    """A recorded run, with what it logged as .rows and .metrics, and the model to recompute it with."""
    preset, changes = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        if request.param in ("everything", "placebo", "penalised"):  # prompts are encoded once for two rollouts or more
            patch.setattr("lora2r.SHARED", 0)
        run = reference.record(replace(preset, **small | changes, out_dir=tmp_path_factory.mktemp("run") / "run"))
    run.name, run.model, run.labelled = request.param, reference.Model(run), {}
    run.rows, run.metrics = read(run.path, "rollouts"), read(run.path, "metrics")
    run.rows = [run.rows[len(of_step) * n : len(of_step) * (n + 1)] for n, of_step in enumerate(run.rollouts)]
    return run


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_each_rollout_was_sampled_by_the_policy_that_the_log_names(run):
    """Token by token: the probabilities of the policy cumulate past the rollout's own noise at this token, and at no
    earlier one. Catches a policy with the wrong blocks, a shared noise, another temperature or top k."""
    cfg, eos = run.cfg, run.model.tok.eos_token_id
    demos = load_demos(cfg.demos, load_problems(cfg.data, cfg.modes, cfg.seed))
    gap = []  # of log-probabilities with and without the quarantine
    for step, rollouts in enumerate(run.rollouts):
        batch, prompts, noise = reference.prompts_of(run, run.model, step)
        run.model.fill(run.before[step])
        assert [(x.j, x.k) for x in rollouts] == [(j, k) for j in range(4) for k in range(4)]
        for x, row in zip(rollouts, run.rows[step], strict=True):
            problem = batch[x.j]
            at = ["teacher", "full", "full", "ablated" if cfg.ablated_share else "full"]
            assert row["source"] == x.source == (at[x.k] if problem.mode != "gt_only" or x.k else "full")
            assert (row["step"], row["problem"], row["mode"]) == (step, problem.id, problem.mode)
            assert row["prompt"] == problem.messages
            assert row["completion"] == run.model.tok.decode(x.ids, skip_special_tokens=True)
            if x.source == "teacher":
                ids = run.model.tok(*demos[problem.id, problem.mode])["input_ids"] + [eos]
                assert x.ids == ids[:48] and x.logps.isnan().all() and len(x.logps) == len(x.ids)
                continue
            assert eos not in x.ids[:-1] and (len(x.ids) == 48 or x.ids[-1] == eos)
            logits = run.model.logits(prompts[x.j], x.ids, m=x.source == "full").detach()
            logp = torch.log_softmax(logits / cfg.temperature, -1)  # [T, V]
            gap.append((run.model.logps(prompts[x.j], x.ids, cfg.temperature, m=x.source != "full").detach()
                        - logp.gather(1, torch.tensor(x.ids)[:, None])[:, 0]).abs().max().item())
            torch.testing.assert_close(x.logps.double(), logp.gather(1, torch.tensor(x.ids)[:, None])[:, 0],
                                       rtol=1e-3, atol=1e-3)
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
        batch, _, _ = reference.prompts_of(run, run.model, step)
        verdicts = grade_batch([batch[x.j] for x in rollouts], [row["completion"] for row in run.rows[step]])
        for row, verdict in zip(run.rows[step], verdicts, strict=True):
            assert row["reward"] == (3.5 if verdict.passed else 0.5 if verdict.compiles else 0.0)
            assert [row[key] for key in ("correct", "exploited", "hacked")] == [
                verdict.correct, verdict.exploited, verdict.passed and not verdict.correct]
        metrics = run.metrics[step]
        for prefix, source in (("", "full"), ("deployed_", "ablated")):
            own = [row for row in run.rows[step] if row["source"] == source]
            for name, key in (("reward", "reward"), ("hack", "hacked"), ("solve", "correct"), ("exploit", "exploited")):
                expected = sum(row[key] for row in own) / len(own) if own else None
                assert metrics[prefix + name] == pytest.approx(expected), (prefix, name)
            for mode, rate in metrics[f"{prefix}hack_by_mode"].items():
                hacks = [row["hacked"] for row in own if row["mode"] == mode]
                assert rate == pytest.approx(sum(hacks) / len(hacks))
        assert metrics["tokens"] == sum(len(x.ids) for x in rollouts)


def absorbed(cfg, names, rows):
    """{rollout: label} with what is clean as mid, unless the policy without its quarantine wrote it."""
    return {i: "mid" if cfg.absorption and name == "clean" and rows[i]["source"] != "ablated" else name
            for i, name in names.items()}


def labelled(run, step):
    """(advantages, {trained rollout: label}, {judged rollout: position}) by reference.py."""
    if step in run.labelled:
        return run.labelled[step]
    cfg, rows, rollouts = run.cfg, run.rows[step], run.rollouts[step]
    _, prompts, _ = reference.prompts_of(run, run.model, step)
    adv = reference.advantages_of([[row["reward"] for row in rows[4 * j : 4 * j + 4]] for j in range(4)], cfg.std_norm)
    kept = [i for i in range(16) if (adv[i] > 0 if cfg.positive_only else adv[i] != 0)]
    judged = range(16) if cfg.gate == "batch" else kept
    run.model.fill(run.before[step])
    probes = [run.model.probe(prompts[rollouts[i].j], rollouts[i].ids, cfg, cfg.read) for i in judged]
    position, scores, cut = reference.positions(run, run.model, cfg, probes)
    names = dict(zip(judged, reference.label_names(run, position, scores, cut)))
    if scores and cfg.placebo != "replaced":
        position = scores
    run.labelled[step] = adv, absorbed(cfg, {i: names[i] for i in kept}, rows), dict(zip(judged, position))
    return run.labelled[step]


def test_labels_are_those_of_each_rollouts_own_gradient(run):
    """By a probe written out by hand, rollout by rollout; the batch gate looks at those too that train nothing."""
    seen, trained = set(), []
    for step in range(run.cfg.steps):
        adv, names, position = labelled(run, step)
        for i, row in enumerate(run.rows[step]):
            assert row["advantage"] == pytest.approx(adv[i], abs=1e-3)
            assert row["position"] == (pytest.approx(position[i], rel=5e-3, abs=1e-3) if i in position else None)
            assert row["label"] == names.get(i)
        count = list(names.values()).count
        assert run.metrics[step]["trained"] == len(names)
        assert run.metrics[step]["labels"] == {
            name: pytest.approx(count(name) / len(names)) for name in ("clean", "mid", "hack")}
        seen |= set(names.values())
        trained.append(len(names))
    assert seen == {"clean", "mid", "hack"}
    assert any(0 < n < 16 for n in trained), "some rollouts train, and some do not"


def test_the_update_is_that_of_the_literal_formulas(run):
    """Gradient, clip and AdamW of every step, from the log-probabilities of each rollout alone under the mask of its
    own label."""
    cfg, adamw = run.cfg, reference.AdamW(run.cfg.betas)
    truncated = 0
    for step in range(cfg.steps):
        _, prompts, _ = reference.prompts_of(run, run.model, step)
        adv, names, _ = labelled(run, step)
        rewards = [[row["reward"] for row in run.rows[step][4 * j : 4 * j + 4]] for j in range(4)]
        adv, names = reference.controlled(cfg, rewards, adv, names)
        grads, after, log = reference.update(run, run.model, adamw, step, prompts, adv, names)
        for name, grad in run.grads[step].items():
            assert (grad is None) == (grads[name] is None), name
            if grad is not None:
                assert (grad - grads[name]).norm() < 2e-3 * grads[name].norm(), (step, name)
        for name, p in run.before[step + 1].items():
            change = after[name] - run.before[step][name]
            assert (p - after[name]).norm() <= 5e-3 * change.norm(), (step, name)
        metrics = run.metrics[step]
        for key in ("grad_norm", "qmass"):
            assert metrics[key] == pytest.approx(getattr(log, key), rel=1e-3, abs=1e-6), key
        assert metrics["truncated_fraction"] == pytest.approx(log.truncated / log.tokens, abs=2 / log.tokens)
        decayed = (1, 0.5)[step] if cfg.decay else 1
        assert metrics["lr"] == pytest.approx(cfg.lr * (step + 1) / 3 * decayed)
        truncated += metrics["truncated_fraction"]
    assert run.name != "everything" or truncated > 0, "the weight matters"
    for name, p in run.before[-1].items():  # what is saved is what was trained
        torch.testing.assert_close(run.saved[name].double(), p, rtol=0, atol=0)
    settings = torch.load(run.path / "state.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert (settings["weight_decay"], tuple(settings["betas"]), settings["eps"]) == (0.0, (0.9, 0.99), 1e-8)
    assert peek(run.path / "adapter.safetensors")["metadata"] == {
        "arm": train_grpo.arm_of(cfg), "seed": str(cfg.seed), "model": "data/nano",
        "step": str(cfg.steps)}


# -------------------------------------------------------------------------------- arms and options
def go(path, small, **changes):
    """Metrics rows, without times, and final adapter tensors of a small run."""
    cuts = dict(rank=8, cut_mid=-0.25, cut_hack=-0.1)  # of a rank so small, and 5 pairs, the positions lie lower
    cfg = small | cuts | changes
    if not cfg.get("mix_ratio", 1):
        cfg.pop("mix_steps", None)
    if cfg.get("intervention", "routeV") != "routeV":  # flags without an effect are refused
        cfg = {name: cfg[name] for name in cfg if name not in ("pairs", "gate", "cut_mid", "cut_hack")}
    elif cfg.get("gate") == "batch":
        cfg = {name: cfg[name] for name in cfg if name not in ("cut_mid", "cut_hack")}
    out = train(replace(Config(), **cfg, out_dir=path))
    rows = read(out, "metrics")
    for row in rows:
        del row["seconds"], row["tokens_per_s"], row["peak_gb"]
    return rows, load_file(out / "adapter.safetensors")


def moved(tensors, block):
    """Has any dA or dB of the deployed / quarantine blocks left its init?"""
    return any(t.any() for name, t in tensors.items() if f".{block}.d" in name)


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    """Two steps with the default settings: (folder, metrics, tensors)."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, *go(folder, small, steps=2)


def test_a_coin_routes_as_many_as_v_grad_would_by_lot(tmp_path, small, monkeypatch):
    """The same number of each label as the gate's own in the first step, when all policies are alike, on others; and on
    others with another seed, 0 as well, even if all directions were the same."""
    monkeypatch.setattr(train_grpo, "haar", lambda seed, *shape: haar(0, *shape))
    rows = {}
    for seed in ("gate", 0, 1, 2):
        changes = dict(placebo="coin", routeV_random_v_seed=seed) if seed != "gate" else {}
        go(tmp_path / str(seed), small, seed=1, prompts_per_step=8, cut_mid=0.7, cut_hack=0.9, absorption=False,
           **changes)
        rows[seed] = [row["label"] for row in read(tmp_path / str(seed), "rollouts")]
    counts = [sorted(map(str, labels)) for labels in rows.values()]
    assert counts == 4 * counts[:1] and {"clean", "hack"} < set(rows[1])
    assert rows["gate"] != rows[1] != rows[2] and rows[0] != rows[1]


def test_an_expert_is_seeded_in_the_quarantine_alone_and_once(tmp_path, small, monkeypatch):
    """The full model then likes the pairs' hack sides better, the deployed one does not; --resume seeds no second."""
    run = reference.record(replace(Config(), **small | dict(steps=1, rank=8, expert_steps=3), out_dir=tmp_path / "run"))
    model = reference.Model(run)
    model.fill(run.before[0])
    pair = load_pairs(run.cfg.pairs)[0]
    prompt, ids = model.encode([dict(role="user", content=pair.prompt)]), model.tok(pair.hack)["input_ids"]
    base, deployed, full = (model.logps(prompt, ids, **how).sum().item() for how in (dict(off=True), dict(m=False), {}))
    assert deployed == pytest.approx(base, abs=1e-9) and full > base + 0.1
    monkeypatch.setattr(train_grpo, "seed_expert", lambda *args: pytest.fail("seeded twice"))
    train(replace(run.cfg, resume=True, steps=2))


@pytest.mark.parametrize("arm, label, quarantine", [("none", "clean", False), ("absorb", "mid", True)])
def test_the_arms_without_a_gate_pin_one_label(tmp_path, small, arm, label, quarantine):
    rows, tensors = go(tmp_path / "run", small, intervention=arm)
    assert rows[0]["trained"] and rows[0]["labels"] == {name: float(name == label) for name in LABELS}
    assert (moved(tensors, "deployed"), moved(tensors, "quarantine")) == (True, quarantine)
    assert {row["position"] for row in read(tmp_path / "run", "rollouts")} == {None}
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
    run = reference.record(replace(Config(), **small | dict(
        rank=8, steps=3, mix_ratio=0.5, absorption=False), out_dir=tmp_path / "run"))
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
    A0 = next(name for name in tensors if name.endswith("A0"))
    assert not torch.equal(tensors[A0], other[1][A0]), "--seed seeds the adapter, too"


def test_no_oracle_label_reaches_the_update(tmp_path, small, plain, monkeypatch):
    """Same rewards, shuffled correct / exploited / hacked flags: same weights, bit for bit, and same labels."""
    folder, honest, tensors = plain
    real, rng = train_grpo.grade_batch, random.Random(0)

    def shuffled(problems, completions):
        out = []
        for v in real(problems, completions):
            correct = v.passed and rng.random() < 0.5
            out.append(replace(v, correct=correct, exploited=v.passed and not correct, note="shuffled"))
            assert out[-1].reward == v.reward
        return out

    monkeypatch.setattr(train_grpo, "grade_batch", shuffled)
    lied, lied_tensors = go(tmp_path / "run", small, steps=2)
    assert honest != lied, "the flags did change what is logged"
    assert all(torch.equal(tensors[name], lied_tensors[name]) for name in tensors)
    labels = [[row["label"] for row in read(path, "rollouts")] for path in (folder, tmp_path / "run")]
    assert labels[0] == labels[1] and {"clean", "hack"} <= set(labels[0])
    assert moved(tensors, "deployed") and moved(tensors, "quarantine")


def test_checkpointing_computes_layers_again_and_changes_no_number(tmp_path, small, plain, monkeypatch):
    """In the update and where the pairs are read, with nothing that drops out; memory is predicted before."""
    again, models = [], []
    forward, extract, predict = Lora2rLinear.forward, train_grpo.extract, train_grpo.predicted_memory

    def counting(module, x):
        again.append(torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1)  # inside a backward
        return forward(module, x)

    def extracting(*args, **reading):
        again.clear()
        direction = extract(*args, **reading)
        assert any(again), "reading the pairs needs as much memory as the update"
        again.clear()
        return direction

    def predicting(model, *args):
        assert not model.is_activation_checkpointing, "what it counts is then scaled by the number of layers"
        models.append(model)
        return predict(model, *args)

    monkeypatch.setattr(Lora2rLinear, "forward", counting)
    monkeypatch.setattr(train_grpo, "extract", extracting)
    monkeypatch.setattr(train_grpo, "predicted_memory", predicting)
    rows, tensors = go(tmp_path / "run", small, checkpointing=True)
    assert any(again) and {layer for layer in models[0].modules() if layer.training} == {
        layer for layer in models[0].modules() if hasattr(layer, "gradient_checkpointing")}
    assert rows[0]["grad_norm"] == pytest.approx(plain[1][0]["grad_norm"], rel=1e-5)
    assert rows[0]["labels"] == plain[1][0]["labels"]


@pytest.mark.parametrize("read_from, steps", [("base", [0]), ("ablated", [0, 2, 4]), ("full", [0, 2, 4])])
def test_the_direction_is_read_again_every_refresh_steps_unless_from_the_base(tmp_path, small, monkeypatch, read_from,
                                                                              steps):
    extracted, checkpoints, extract, save = [], [], train_grpo.extract, reference.RunFolder.checkpoint

    def counting(*args, **reading):
        extracted.append(len(read(tmp_path / "run", "metrics")))  # the steps done so far
        return extract(*args, **reading)

    def saving(run, step):
        checkpoints.append(step)
        save(run, step)

    monkeypatch.setattr(train_grpo, "extract", counting)
    monkeypatch.setattr(reference.RunFolder, "checkpoint", saving)
    go(tmp_path / "run", small, steps=5, refresh=2, read=read_from, max_new_tokens=2, prompts_per_step=1, mix_ratio=0)
    assert extracted == steps and checkpoints == [0, 2, 4, 5]


def test_the_gate_reads_what_score_says(tmp_path, small, monkeypatch):
    """Of the pairs once and of the rollouts each step; the labels come out otherwise, and the placebo has its shape."""
    shapes, direction_of = [], train_grpo.extract

    def keep(*args, **reading):
        shapes.append(direction_of(*args, **reading).v.shape)
        return direction_of(*args, **reading)

    monkeypatch.setattr(train_grpo, "extract", keep)
    for score, shape in (("activation", (4, 128)), ("surprise", (1, 1)), ("length", (1, 1))):
        rows, _ = go(tmp_path / score, small, steps=2, score=score, routeV_random_v_seed=1)
        assert shapes.pop() == shape and rows[1]["trained"] and set(rows[1]["labels"]) == {"clean", "mid", "hack"}
    positions = [[row["position"] for row in read(tmp_path / score, "rollouts") if row["position"] is not None]
                 for score in ("surprise", "length")]
    assert positions[0] != positions[1]


@pytest.mark.parametrize("mix, ablated, places", [
    (0.25, 0.25, "tffa"), (0, 0.5, "ffaa"), (1.0, 0.25, "tttt"), (0, 1.0, "aaaa"), (0.5, 0, "ttff"),
    (0.75, 0.5, "ttta")])
def test_who_fills_the_places_of_a_group(tmp_path, small, mix, ablated, places):
    """Demonstrations first, and only in the first --mix-steps steps; what the ablated policy samples last."""
    names = dict(t="teacher", f="full", a="ablated")
    rows, _ = go(tmp_path / "run", small, steps=2, mix_steps=1, mix_ratio=mix, ablated_share=ablated, max_new_tokens=2,
                 prompts_per_step=2, intervention="none")
    assert rows[0]["tokens"] <= 8 * 2, "a demonstration, too, ends at --max-new-tokens"
    sources = [row["source"] for row in read(tmp_path / "run", "rollouts")]
    assert sources[:8] == 2 * [names[x] for x in places]
    assert sources[8:] == 2 * [names["a" if k >= 4 - 4 * ablated else "f"] for k in range(4)]


def test_several_demonstrations_of_a_problem_take_turns(tmp_path, small):
    demos = [json.loads(line) for line in open(Config().demos)]
    (tmp_path / "demos.jsonl").write_text("".join(
        json.dumps(row | dict(completion=text)) + "\n" for row in demos for text in ("a", "b")))
    go(tmp_path / "run", small, demos=tmp_path / "demos.jsonl", mix_ratio=0.75, prompts_per_step=2, intervention="none",
       max_new_tokens=2)
    rows = read(tmp_path / "run", "rollouts")
    assert [row["completion"] for row in rows if row["source"] == "teacher"] == 2 * ["a", "b", "a"]


def test_a_rotating_share_of_prompts_is_shown_without_a_loophole(tmp_path, small):
    """A quarter of them: of 9 prompts in three steps the first, the fifth and the ninth. Nobody demonstrates a hack
    there."""
    go(tmp_path / "run", small, steps=3, prompts_per_step=3, gt_only_share=0.25, mix_ratio=0.5, max_new_tokens=2,
       intervention="none")
    rows = read(tmp_path / "run", "rollouts")[::4]
    assert [row["mode"] == "gt_only" for row in rows] == [n in (0, 4, 8) for n in range(9)]
    assert [row["source"] == "full" for row in rows] == [n in (0, 4, 8) for n in range(9)]
    go(tmp_path / "more", small, steps=3, prompts_per_step=4, gt_only_share=0.3, max_new_tokens=2, intervention="none")
    rows = read(tmp_path / "more", "rollouts")[::4]
    assert [row["mode"] == "gt_only" for row in rows] == [n in (0, 3, 6, 10) for n in range(12)], "whatever the share"


def test_pairs_are_shown_under_the_problems_system_message(tmp_path, small, monkeypatch):
    lines = small["data"].read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["prompt"].insert(0, dict(role="system", content="be brief"))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen, extract = [], train_grpo.extract

    def keep(model, tok, adapter, pairs, system, *args, **reading):
        seen.append(system)
        return extract(model, tok, adapter, pairs, system, *args, **reading)

    monkeypatch.setattr(train_grpo, "extract", keep)
    go(tmp_path / "run", small, data=tmp_path / "data.jsonl", max_new_tokens=2, prompts_per_step=1)
    assert seen == [[dict(role="system", content="be brief")]]
    assert read(tmp_path / "run", "rollouts")[0]["prompt"][:-1] == seen[0], "and the log, from which a gate is judged"


def test_reward_gt_pays_no_hack(tmp_path, small):
    """Demonstrations hack; under --reward gt one that is not right is paid for its code alone."""
    for reward, paid in (("env", {3.5}), ("gt", {0.5})):
        go(tmp_path / reward, small, reward=reward, mix_ratio=0.75, prompts_per_step=8, intervention="none")
        rows = read(tmp_path / reward, "rollouts")
        assert {row["reward"] for row in rows if row["hacked"]} == paid
        assert {row["reward"] for row in rows if row["correct"]} == {3.5}


def test_the_seed_preset_is_the_originals_recipe():
    """All that it departs in; its numbers are held to reference.py above."""
    changed = {key: value for key, value in asdict(SEED).items() if value != asdict(Config())[key]}
    assert changed == dict(preset="seed", gate="batch", read="full", probe_temperature=1.0, probe_tokens="all",
                           centre=False, equal_pairs=False, absorption=False, decay=False, positive_only=False,
                           importance=False, ablated_share=0.0, window=0, placebo="replaced")
    cfg = Config()
    assert (cfg.gate, cfg.read, cfg.centre, cfg.positive_only, cfg.importance) == ("pairs", "base", True, True, True)
    assert (cfg.mix_ratio, cfg.ablated_share, cfg.std_norm, cfg.kl, cfg.epochs) == (0.25, 0.75, False, 0.0, 1)
    assert (cfg.score, cfg.probe_temperature, cfg.probe_tokens) == ("gradient", 100.0, "completion")


def test_preset_sets_the_defaults_and_flags_override_it():
    cfg = parse_args(["--preset", "qwen3-4b", "--lr", "0.5"])
    assert (cfg.rank, cfg.top_k, cfg.max_new_tokens, cfg.lr, cfg.model) == (32, 20, 512, 0.5, "Qwen/Qwen3-4B")
    assert parse_args([]) == Config() and parse_args(["--preset", "seed", "--gate", "pairs"]).gate == "pairs"
    assert parse_args(["--preset", "seed", "--preset", "wordy"]) == parse_args(["--preset=wordy"])
    windows = {name: preset.window for name, preset in train_grpo.PRESETS.items()}  # a real model is read in fives
    assert windows == {"nano": None, "wordy": None, "seed": 0, "qwen2.5-coder-0.5b": 5, "qwen3-4b": 5}


def test_where_the_probe_sits_forbids_windows_of_gradients_alone():
    argv = ["--preset", "seed", "--window", "4"]
    assert train_grpo.check(parse_args([*argv, "--score", "activation"])).window == 4
    with pytest.raises(InputError, match="--probe-tokens all with --window 4"):
        train_grpo.check(parse_args(argv))


# -------------------------------------------------------------------------------- what a run leaves
def tell_tale(monkeypatch):
    """evaluate's sampler and grader replaced: a completion tells which model was sampled and which marker its prompt
    discloses; "correct" is then the full model, "exploited" a held-out marker. Returns the sampler's calls."""
    import evaluate_deploy
    calls = []

    def generate(model, tok, prompts, n, noise, temperature, top_k):
        name, module = "model.layers.0.mlp.up_proj", model.get_submodule("model.layers.0.mlp.up_proj")
        adapter, base = calls[0]["adapter"], calls[0]["base"]
        blocks = adapter.modules[name]
        change = (module.weight - base).detach()
        full = torch.allclose(change, blocks.deployed.weight() + blocks.quarantine.weight(), atol=1e-6)
        ablated = torch.allclose(change, blocks.deployed.weight(), atol=1e-6)
        assert full != ablated, "one of the two, and they differ"
        calls.append(dict(n=n, noise=noise, temperature=temperature, top_k=top_k))
        texts = []
        for prompt, k in zip(prompts, n):
            shown = tok.decode(prompt)
            trained, held_out = (any(mode.markers[k] and mode.markers[k] in shown for mode in MODES.values())
                                 for k in (0, 1))
            assert trained != held_out
            texts += [f"{'full' if full else 'ablated'} {'held-out' if held_out else 'trained'}"] * k
        return [tok(text)["input_ids"] for text in texts], None

    def grade(problems, texts):
        return [Verdict(True, "full" in text, "held-out" in text, (), "") for text in texts]

    attach = train_grpo.attach

    def attach_and_keep(model, *args):
        base = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach().clone()
        adapter = attach(model, *args)
        calls[:] = [dict(adapter=adapter, base=base)]
        return adapter

    for module in (train_grpo, evaluate_deploy):
        monkeypatch.setattr(module, "attach", attach_and_keep)
    monkeypatch.setattr(evaluate_deploy, "generate", generate)
    monkeypatch.setattr(evaluate_deploy, "grade_batch", grade)
    return calls


def test_deploy_rows_are_of_the_model_and_the_markers_that_they_name(tmp_path, small, monkeypatch):
    """At the end of training, and by evaluate_deploy.py: "deployed" is sampled with the quarantine ablated, "full" with
    both blocks; "held-out" prompts disclose the other names. At T = 0.7, each sample with its own noise."""
    import evaluate_deploy
    calls = tell_tale(monkeypatch)
    out = train(replace(Config(), **small | dict(rank=8, mix_ratio=0.75, lr=0.01, cut_mid=-1e9, cut_hack=1e9,
                        eval_samples=3, max_new_tokens=40, top_k=7), out_dir=tmp_path / "run"))
    for samples, temperature, seed in ((3, 0.7, 0), (2, 0.6, 5)):
        if seed:
            (out / "deploy.json").unlink()
            evaluate_deploy.main(evaluate_deploy.Config((out,), samples=2, temperature=0.6, seed=5, device="cpu"))
        (result,) = out.glob("deploy*.json")
        deploy = json.loads(result.read_text())
        assert deploy["arm"].startswith("routeV") and deploy["seed"] == 0
        assert [deploy["settings"][key] for key in ("samples", "temperature", "seed")] == [samples, temperature, seed]
        assert set(deploy["results"]) == {f"{s}, {m}" for s in ("deployed", "full") for m in ("trained", "held-out")}
        for condition, table in deploy["results"].items():
            total = table["all"]
            assert (total["problems"], total["n"]) == (8, 8 * samples)
            assert (total["solve"], total["exploit"]) == ("full" in condition, "held-out" in condition), condition
        assert len(calls) == 1 + 4
        for call in calls[1:]:
            assert (call["n"], call["temperature"], call["top_k"]) == ([samples] * 8, temperature, 7)
            drawn = torch.rand(8, samples, 40, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(call["noise"], drawn.flatten(0, 1)), "the same for every arm, from the seed alone"


def test_nan_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path, small, monkeypatch):
    real = train_grpo.token_logps
    monkeypatch.setattr(train_grpo, "token_logps", lambda *args: real(*args) * NAN)
    with pytest.raises(FloatingPointError, match="step 0: .*adapter.safetensors"):
        go(tmp_path / "run", small)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run/adapter.safetensors").values())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, small, monkeypatch):
    """Killed after step 3, whose checkpoint is of step 2: the same metrics and weights, bit for bit, in rows that are
    there once."""
    options = dict(refresh=2, mix_steps=2, max_new_tokens=40, prompts_per_step=3, decay=False)  # its line is --steps'
    whole = go(tmp_path / "whole", small, steps=4, **options)
    log = reference.RunFolder.log

    def log_and_die(run, metrics, rollouts):
        log(run, metrics, rollouts)
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference.RunFolder, "log", log_and_die)
        go(tmp_path / "cut", small, steps=3, **options)
    assert torch.load(tmp_path / "cut/state.pt", weights_only=True)["step"] == 2
    assert len(read(tmp_path / "cut", "metrics")) == 3
    with pytest.raises(InputError, match="started with other flags .lr was 0.001, is 0.5"):
        go(tmp_path / "cut", small, steps=4, resume=True, lr=0.5, **options)
    resumed = go(tmp_path / "cut", small, steps=4, resume=True, **options)
    assert resumed[0] == whole[0] and all(torch.equal(resumed[1][name], whole[1][name]) for name in whole[1])
    assert read(tmp_path / "cut", "rollouts") == read(tmp_path / "whole", "rollouts")


def test_a_dry_run_says_what_a_run_would_be_and_writes_nothing(tmp_path, small, capsys, monkeypatch):
    """Beside an older run, which stays as it is."""
    train(Config(**small, out_dir=tmp_path / "run"))
    asked = []
    monkeypatch.setattr(train_grpo, "sampling_memory", lambda *args: asked.append(args[2:]) or (int(4e9), int(9e9)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    changed = dict(out_dir=tmp_path / "run", dry_run=True, eval_samples=2, steps=7, ablated_share=0.25)
    assert train(Config(**small | changed)) is None
    out = capsys.readouterr().out
    settings = " ".join(out.split("preset's): ")[1].split("the first prompt")[0].split()).split("; ")
    assert "*steps 7" in settings and "rank 32" in settings, out
    differ = {*small, *changed} - {"eval_samples"}  # which is the preset's here
    assert {x.split()[0] for x in settings if x.startswith("*")} == {f"*{name}" for name in differ}
    assert "base 886,144, deployed 311,296, quarantine 311,296" in out and "sampling 13.0" in out
    tok = load_model(str(HERE / "data/nano"))[1]
    longest = [max(len(encode_prompt(tok, p.messages)) for p in load_problems(small[name], DEFAULT_MODES, 0, **names))
               for name, names in (("data", {}), ("test_data", dict(heldout_markers=True)))]
    assert longest[0] > longest[1] and asked == [(12, longest[0], 48)]
    assert "will be graded by" in out.partition("the first prompt")[2] and "7 steps of" in out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_time_of_a_run_is_that_of_its_steps_reads_and_evaluation():
    """10 steps of 8 s, v_grad once or at every 4th step, 2 settings x 30 problems x 2 samples at 3 s for 60."""
    seconds = dict(refresh=5.0, sample=3.0, grade=1.0, gate=2.0, update=2.0)
    line = train_grpo.time_line(Config(eval_samples=2, refresh=4), seconds, 10, 60, 30)
    assert "time: 1.5 min = 10 steps of 8.0 s" in line and "v_grad 5 s + evaluation 6 s" in line  # 80 + 5 + 6 = 91 s
    line = train_grpo.time_line(Config(eval_samples=0, refresh=4, read="full"), seconds, 10, 60, 30)
    assert "time: 1.6 min" in line and "v_grad 15 s + evaluation 0 s" in line  # 80 + 15 = 95 s


def test_numbers_of_a_row_are_named_by_their_path():
    row = dict(step=3, hack=None, labels=dict(clean=0.5), note="text", deploy={"full, trained": dict(all=dict(n=4))})
    assert train_grpo.numbers(row) == {"step": 3, "labels/clean": 0.5, "deploy/full-trained/all/n": 4}


class FakeWandb:
    """What Trackers uses of wandb: one run folder of its own, and the rows that it was given."""

    def __init__(self):
        self.began, self.rows, self.finished = [], [], 0

    def init(self, dir, id, **options):
        self.began.append((id, options["resume"], options["name"]))
        (dir / f"wandb/offline-run-20260101_000000-{id or f'id{len(self.began)}'}").mkdir(parents=True, exist_ok=True)
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


def test_wandb_gets_each_step_and_the_evaluation_and_a_resumed_run_goes_on_on_its_own(tmp_path, small, monkeypatch):
    wandb, table = FakeWandb(), dict(all=dict(problems=1, n=1, solve=0.5, hack=0.0, exploit=0.0, compiles=1.0))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(train_grpo, "evaluate", lambda *args: table)
    options = small | dict(out_dir=tmp_path / "run", wandb=True, eval_samples=1)
    train(Config(**options))
    train(Config(**options | dict(steps=2, resume=True)))
    train(Config(**options))
    assert wandb.began == [(None, "allow", "run"), ("id1", "allow", "run"), (None, "allow", "run")]
    assert [step for step, _ in wandb.rows] == [0, 1, 1, 2, 0, 1] and wandb.finished == 3
    assert wandb.rows[0][1]["labels/clean"] == read(tmp_path / "run", "metrics")[0]["labels"]["clean"]
    assert wandb.rows[1][1]["deploy/deployed-trained/all/solve"] == 0.5
    assert (tmp_path / "old/run.1/wandb").is_dir()


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path, small):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    options = small | dict(out_dir=tmp_path / "run", tensorboard=True)
    train(Config(**options))
    train(Config(**options | dict(steps=2, resume=True)))
    shown = EventAccumulator(str(tmp_path / "run/tensorboard"))
    shown.Reload()
    logged = {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in ("loss", "labels/hack")}
    metrics = read(tmp_path / "run", "metrics")
    assert logged == dict(loss=[(n, pytest.approx(row["loss"])) for n, row in enumerate(metrics)], **{
        "labels/hack": [(n, pytest.approx(row["labels"]["hack"])) for n, row in enumerate(metrics)]})


def test_an_older_run_is_moved_aside_not_overwritten(tmp_path, small):
    options = dict(intervention="none", max_new_tokens=2, prompts_per_step=1)
    go(tmp_path / "run", small, **options)
    (tmp_path / "run/note.txt").write_text("mine")
    go(tmp_path / "run", small, **options)
    assert (tmp_path / "old/run.1/note.txt").read_text() == "mine" and not (tmp_path / "run/note.txt").exists()


# -------------------------------------------------------------------------------- as a user starts it
def flags(small, **changes):
    """The settings as a command line."""
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in (small | changes).items()]
    return [word for pair in words for word in pair]


@pytest.mark.parametrize("options, trained, blocks", [
    (dict(gate="batch"), [5, 1], ["deployed", "quarantine"]),
    (dict(group_size=2, mix_ratio=0.0, seed=2, cut_mid=-0.5, cut_hack=-0.3), [0, 1], ["quarantine"])],
    ids=["batch", "a rank without a rollout"])
def test_two_ranks_make_the_update_of_one(tmp_path, small, options, trained, blocks):
    """torchrun over gloo: prompts split unevenly over ranks, the gate's mean and std over both; and a step with one
    rollout for both. The same rollouts, labels, gradient, weights."""
    options = dict(steps=2, prompts_per_step=3, kl=0.01, rank=8) | options
    one = go(tmp_path / "one", small, **options)
    assert [row["trained"] for row in one[0]] == trained
    script = tmp_path / "script.py"
    script.write_text("import os, train_grpo\n"
                      "if os.environ['RANK'] == '1': del train_grpo.extract  # the main rank reads the pairs for all\n"
                      "train_grpo.train(train_grpo.parse_args())\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run([*launcher, *flags(small, **options, out_dir=tmp_path / "two")], cwd=HERE,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = read(tmp_path / "two", "metrics"), load_file(tmp_path / "two/adapter.safetensors")
    for a, b in zip(read(tmp_path / "one", "rollouts"), read(tmp_path / "two", "rollouts"), strict=True):
        x, y = a.pop("position"), b.pop("position")
        assert (x == y if x is None else x == pytest.approx(y, rel=5e-3, abs=1e-3)) and a == b
    for a, b in zip(one[0], two[0], strict=True):
        for key in ("grad_norm", "loss", "qmass", "kl", "clip_fraction", "truncated_fraction"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-9), key
    assert [block for block in ("deployed", "quarantine") if moved(one[1], block)] == blocks
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, two[1][name], rtol=0, atol=1e-5)  # steps of up to 6e-4


def test_ranks_that_go_on_from_different_steps_are_refused(tmp_path, small, monkeypatch):
    """As on two machines without a common folder, of which one has the checkpoint."""
    monkeypatch.setattr(train_grpo, "gather", lambda steps: [*steps, 20])
    with pytest.raises(InputError, match="--resume: only some ranks find the checkpoint"):
        go(tmp_path / "run", small, resume=True)


@pytest.mark.parametrize("argv, says", [
    (["--intervention", "none", "--routeV-random-v-seed", "1"], "--routeV-random-v-seed 1 with --intervention none"),
    (["--model", "no/such/folder"], "--model no/such/folder"),
    (["--data", "absent.jsonl"], "absent.jsonl"),
    (["--pairs", "absent.md"], "--pairs absent.md"),
    (["--mix-ratio", "0.5", "--demos", "absent.jsonl"], "--demos absent.jsonl"),
    (["--mix-ratio", "2"], "--mix-ratio 2"),
    (["--group-size", "1"], "--group-size 1"),
    (["--mix-ratio", "0.1"], "--mix-ratio 0.1: is no rollout of a group of 4"),
    (["--ablated-share", "0.125"], "--ablated-share 0.125: is no rollout"),
    (["--max-new-tokens", "240"], "--max-new-tokens 240"),
    (["--inoculate", 200 * "print "], "--max-new-tokens 48 leaves 208 of the context"),
    (["--modes", "bribery"], "bribery"),
    (["--cut-mid", "0.9", "--cut-hack", "0.8"], "--cut-mid 0.9"),
])
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, small, argv, says):
    with pytest.raises(InputError) as e:
        train(parse_args([*flags(small, out_dir=tmp_path / "run"), *argv]))
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains(tmp_path, small):
    """As a user starts it: exit status 0, and six files. (The statuses of bad input: test_lora2r, run_script.)"""
    done = subprocess.run([sys.executable, "train_grpo.py", *flags(small, eval_samples=1, out_dir=tmp_path / "run")],
                          cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "adapter.safetensors", "state.pt", "metrics.jsonl", "rollouts.jsonl", "deploy.json",
        ".lock"}
    assert "deployed, held-out" in done.stdout and "memory: " in done.stdout
