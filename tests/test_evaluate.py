"""evaluate_deploy: the sampler, evaluation in its settings, rates, what a step's log says, errors."""
import hashlib
import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import evaluate_deploy
from env_leetcode import Verdict, load_problems
from evaluate_deploy import (Config, browse, console_line, differences, evaluate, format_arms, format_differences,
                             format_table, interval, keep_results, main, outcomes, over_seeds, over_steps, rates,
                             read_rows, read_run, routing, settings_of, two_sided_p, wilson, write_deploy)
from extract_vgrad import load_pairs
from lora2r import (InputError, Lora2rLinear, attach, batches, encode_prompt, folded, generate, load_model, save,
                    token_logps, use)
from train_grpo import HERE, check, parse_args


QWEN = """{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"""
GEMMA = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"""


def noise(G, max_new, seed=0):
    return torch.rand(G, max_new, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def nano():
    model, tok = load_model(str(HERE / "data/nano"))
    adapter = attach(model, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.02)
    problems = load_problems(HERE / "data/nano/test.jsonl")[:12]
    return model, tok, adapter, problems


def test_thinking_is_switched_off_and_a_template_without_a_system_role_says_so():
    tok, user = load_model(str(HERE / "data/nano"))[1], {"role": "user", "content": "Sum the list."}
    for tok.chat_template, prompt in ((QWEN, "[user]Sum the list.[assistant]<think></think>"),
                                      (GEMMA, "[user]Sum the list.[assistant]")):
        assert encode_prompt(tok, [user]) == tok(prompt)["input_ids"]
    with pytest.raises(InputError, match="System role not supported.*data without system messages") as e:
        encode_prompt(tok, [{"role": "system", "content": "Be brief."}, user])
    assert "\n" not in str(e.value)


def test_a_turn_ends_where_the_chat_template_ends_it_and_a_model_needs_no_pad_token(tmp_path):
    """Gemma's and Phi's way: the tokenizer's eos ends a text, and generation_config.json lists what ends a turn."""
    shutil.copytree(HERE / "data/nano", tmp_path / "model", ignore=shutil.ignore_patterns("*.jsonl"))
    for name, change in (("tokenizer_config", dict(eos_token="<|pad|>", pad_token=None)),
                         ("generation_config", dict(eos_token_id=[0, 2], pad_token_id=None))):
        path = tmp_path / f"model/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    tok = load_model(str(tmp_path / "model"))[1]
    assert (tok.eos_token, tok.eos_token_id, tok.pad_token_id) == ("<|im_end|>", 2, 2)


@pytest.mark.parametrize("quarantine", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samplers_logps_are_those_of_the_masked_policy(nano, quarantine, temperature):
    """Left-padded, cached, folded, shrinking batch on one side; right-padded, hooked, teacher-forced on the other."""
    model, tok, adapter, problems = nano
    prompts = [encode_prompt(tok, p.messages) for p in problems]
    assert len(set(map(len, prompts))) > 1, "no padding to test"
    with folded(adapter, quarantine=quarantine):
        completions, logps = generate(model, tok, prompts, [2] * 12, noise(24, 64), temperature)
    assert len({len(c) for c in completions}) > 1
    assert all(c[-1] == tok.eos_token_id or len(c) == 64 for c in completions)
    prompts = [p for p in prompts for _ in range(2)]
    with torch.no_grad(), use(adapter, m=quarantine):
        for rows, ids, mask, _ in batches(prompts, completions, 4096):
            again = token_logps(model, ids, mask, temperature)
            for j, i in enumerate(rows.tolist()):
                torch.testing.assert_close(again[j, mask[j]], logps[i], rtol=1e-3, atol=1e-3)


def test_generate_is_seeded_and_top_k_1_is_greedy(nano):
    model, tok, adapter, problems = nano
    prompts = [encode_prompt(tok, p.messages) for p in problems[:4]]

    def sample(seed, k=0):
        return generate(model, tok, prompts, [2] * 4, noise(8, 32, seed), 1.0, k)[0]

    assert sample(0) == sample(0) != sample(1)
    greedy = sample(0, 1)
    assert greedy == sample(1, 1) and greedy[0] == greedy[1]


def test_log_probabilities_under_top_k_are_those_of_the_whole_vocabulary(nano):
    model, tok, adapter, problems = nano
    prompt = encode_prompt(tok, problems[0].messages)
    completions, logps = generate(model, tok, [prompt], [4], noise(4, 24), 3.0, 2)
    for rows, ids, mask, _ in batches([prompt] * 4, completions, 4096):
        with torch.no_grad():
            again = token_logps(model, ids, mask, 3.0)
        for j, i in enumerate(rows.tolist()):
            torch.testing.assert_close(again[j, mask[j]], logps[i], rtol=1e-3, atol=1e-3)


def test_token_logps_are_of_the_next_token_at_the_temperature(nano):
    """Two rows of other lengths; zero where the next token is the prompt's or padding."""
    model, tok, adapter, problems = nano
    prompt, completion = [5, 6, 7], [8, 9]
    (_, ids, mask, _), = batches([prompt, prompt], [completion, completion[:1]], 100)
    with torch.no_grad():
        logps = token_logps(model, ids, mask, 2.0)
        logits = model(torch.tensor([prompt + completion])).logits[0] / 2
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    first, second = p[2, 8].log().item(), p[3, 9].log().item()
    torch.testing.assert_close(logps, torch.tensor([[0, 0, first, second], [0, 0, first, 0]]), rtol=1e-3, atol=1e-4)


def test_a_rollout_depends_on_its_own_noise_only(nano):
    """Other rows, other paddings and other counts per prompt, rows that end early: the same rollouts. T = 2: noise
    decides most tokens."""
    model, tok, adapter, problems = nano
    prompts = [encode_prompt(tok, p.messages) for p in problems]
    u = noise(24, 48)
    together, logps = generate(model, tok, prompts, [2] * 12, u, 2.0)
    n = [0, 1, 3, 0]
    rows = [2, 4, 5, 5]  # of `together`
    some, some_logps = generate(model, tok, prompts[:4], n, u[[2, 4, 5, 5]], 2.0)
    assert len(set(map(len, together))) > 4
    assert some[:3] == [together[i] for i in rows[:3]] and some[3] == some[2]
    torch.testing.assert_close(some_logps[0], logps[2], rtol=1e-4, atol=1e-4)
    assert generate(model, tok, prompts, [0] * 12, u[:0], 1.0) == ([], [])


def test_sampled_tokens_follow_the_models_probabilities(nano):
    """Frequencies of the first token over an even grid of noise, against softmax(logits / T)."""
    model, tok, adapter, problems = nano
    prompt = encode_prompt(tok, problems[0].messages)
    grid = (torch.arange(4000) + 0.5)[:, None] / 4000
    for temperature, top_k in ((1.0, 0), (3.0, 0), (3.0, 5)):
        completions, _ = generate(model, tok, [prompt], [4000], grid, temperature, top_k)
        first = torch.tensor([ids[0] for ids in completions])
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)  # [V]
        if top_k:
            p = torch.where(p >= p.topk(top_k).values[-1], p, 0) / p.topk(top_k).values.sum()
        torch.testing.assert_close(first.bincount(minlength=len(p)) / 4000, p, rtol=0, atol=1 / 4000)


def test_evaluate_deployed_ignores_the_quarantine_and_full_does_not(nano):
    model, tok, adapter, problems = nano
    before = {name: p.clone() for name, p in adapter.tensors("dA", "dB").items()}

    def run(setting):
        return evaluate(model, tok, adapter, problems, setting, 2, max_new=48)

    deployed, full = run("deployed"), run("full")
    with torch.no_grad():
        for p in adapter.quarantine_parameters():
            p.mul_(30)
    try:
        assert run("deployed") == deployed and run("full") != full
    finally:
        with torch.no_grad():
            for name, p in adapter.tensors("dA", "dB").items():
                p.copy_(before[name])
    assert deployed["all"]["n"] == 24 and sum(t["n"] for m, t in deployed.items() if m != "all") == 24


def test_evaluate_keeps_problems_samples_and_noise_together_over_parts(nano, monkeypatch):
    """70 problems in two parts of at most 64: each sample has its own noise, at T = 0.7; each text is graded on the
    problem that it was sampled for, and a mode's rates are of its own problems."""
    model, tok, adapter, _ = nano
    problems = load_problems(HERE / "data/nano/test.jsonl")[:70]
    asked, seen, temperatures = [encode_prompt(tok, p.messages) for p in problems], [], set()

    def fake_generate(model, tok, prompts, n, noise, temperature, top_k):
        assert n == [2] * len(prompts) and noise.shape == (2 * len(prompts), 5) and len(prompts) <= 64 and top_k == 9
        seen.append(noise)
        temperatures.add(temperature)
        texts = [f"{asked.index(prompt)}" for prompt in prompts for _ in range(2)]
        return [tok(text)["input_ids"] for text in texts], None

    def fake_grade(batch, texts):
        assert [problems.index(p) for p in batch] == [int(text) for text in texts]
        modes = {"sentinel": (True, False), "run_tests": (False, True)}
        return [Verdict(True, *modes.get(p.mode, (False, False)), (), "") for p in batch]

    monkeypatch.setattr(evaluate_deploy, "generate", fake_generate)
    monkeypatch.setattr(evaluate_deploy, "grade_batch", fake_grade)
    table = evaluate(model, tok, adapter, problems, "deployed", 2, 5, 9)
    assert temperatures == {0.7}
    assert torch.cat(seen).unique(dim=0).shape == (140, 5), "no two samples share their noise"
    again = torch.cat(seen)
    seen.clear()
    evaluate(model, tok, adapter, problems, "full", 2, 5, 9)
    assert torch.equal(torch.cat(seen), again), "every arm and setting gets the same noise"
    count = {mode: sum(p.mode == mode for p in problems) for mode in table if mode != "all"}
    assert {mode: (row["problems"], row["n"]) for mode, row in table.items()} == {
        "all": (70, 140)} | {mode: (n, 2 * n) for mode, n in count.items()}
    assert (table["sentinel"]["solve"], table["sentinel"]["hack"]) == (1, 0)
    assert (table["run_tests"]["solve"], table["run_tests"]["hack"], table["run_tests"]["exploit"]) == (0, 1, 1)
    assert table["all"]["solve"] == count["sentinel"] / 70


def verdict(letters):
    """c: compiles, s: solves, x: exploits."""
    return Verdict("c" in letters, "s" in letters, "x" in letters, (), "")


def test_rates_count_a_hack_where_the_loophole_paid_and_the_answer_is_wrong():
    """Right and exploited at once is a solve and an exploit, not a hack."""
    verdicts = [verdict(x) for x in ("cs", "cx", "csx", "c", "")]
    table = rates(["a", "a", "b", "b", "b"], verdicts)
    assert table["all"] == dict(n=5, solve=0.4, hack=0.2, exploit=0.4, compiles=0.8)
    assert table["a"] == dict(n=2, solve=0.5, hack=0.5, exploit=0.5, compiles=1.0)
    assert table["b"]["solve"] == pytest.approx(1 / 3) and table["b"]["hack"] == 0
    assert rates([], []) == {"all": dict(n=0, solve=None, hack=None, exploit=None, compiles=None)}


def test_outcomes_are_of_the_full_policy_and_of_the_ablated_one_apart():
    """Demonstrations, all of them paid hacks, are in neither."""
    sources = ["teacher", "full", "ablated", "teacher", "full", "ablated"]
    modes = ["a", "a", "a", "b", "b", "b"]
    verdicts = [verdict(x) for x in ("cx", "cs", "cx", "cx", "cx", "")]
    row = outcomes(modes, sources, verdicts, torch.tensor([3.5, 3.5, 3.5, 3.5, 3.0, 0.0]))
    assert (row["reward"], row["deployed_reward"]) == (3.25, 1.75)
    assert [row[key] for key in ("solve", "hack", "exploit", "compiles")] == [0.5, 0.5, 0.5, 1.0]
    assert [row[f"deployed_{key}"] for key in ("solve", "hack", "exploit", "compiles")] == [0.0, 0.5, 0.5, 0.5]
    assert row["hack_by_mode"] == {"a": 0, "b": 1} and row["deployed_hack_by_mode"] == {"a": 1, "b": 0}
    row = outcomes(["a"], ["teacher"], [verdict("cx")], torch.tensor([3.5]))
    assert row["reward"] is None and row["hack"] is None and row["deployed_solve"] is None


ROUTED = [  # label, position, advantage, source, verdict
    ("hack", 0.9, 2.0, "teacher", "cx"),  # a demonstration: in the labels' shares, not in the gate's figures
    ("hack", 0.8, 1.0, "full", "cx"),
    ("clean", 0.1, 1.0, "full", "cx"),  # a hack that the gate missed
    ("hack", 0.5, 1.0, "ablated", "cs"),  # a solve that it routed
    ("mid", 0.4, 1.0, "full", "cs"),
    ("clean", 0.7, 1.0, "full", "csx"),  # right, by way of the loophole as well: neither a hack nor a solve
    ("hack", 0.3, -1.0, "full", "cx"),  # trains, but its advantage gives it away
    ("clean", math.nan, 0.0, "full", "cs"),  # does not train
]


def test_routing_judges_the_gate_on_the_policys_own_rollouts_with_a_positive_advantage():
    label, position, adv, sources, verdicts = zip(*ROUTED)
    adv = torch.tensor(adv)
    row = routing(list(label), torch.tensor(position), adv, adv != 0, list(sources), list(map(verdict, verdicts)))
    assert row["trained"] == 7
    assert row["labels"] == pytest.approx(dict(clean=2 / 7, mid=1 / 7, hack=4 / 7))
    assert row["labels_of_hacks"] == pytest.approx(dict(clean=1 / 4, mid=0, hack=3 / 4))
    assert row["labels_of_solves"] == pytest.approx(dict(clean=0, mid=1 / 2, hack=1 / 2))
    assert row["gate_auroc"] == 0.5  # hacks at .8 and .1, solves at .5 and .4
    assert row["gate_precision"] == 0.5  # of those at .8 and .5
    assert row["gate_recall"] == 0.5  # of those at .8 and .1
    nothing = routing(["clean"], torch.tensor([math.nan]), torch.zeros(1), torch.tensor([False]), ["full"],
                      [verdict("c")])
    assert nothing["trained"] == 0 and nothing["labels"] == dict(clean=0, mid=0, hack=0)
    assert nothing["gate_auroc"] is nothing["gate_precision"] is nothing["gate_recall"] is None


def test_console_line_shows_the_numbers_under_their_names():
    row = dict(step=6, reward=1.25, solve=0.5, hack=0.375, deployed_solve=0.25, deployed_hack=None, gate_auroc=0.875,
               labels=dict(clean=0.5, mid=0.125, hack=0.375), qmass=0.25, grad_norm=0.0625,
               seconds=dict(refresh=9.0, sample=1.0, grade=2.0, gate=3.0, update=4.0))
    assert " ".join(console_line(row, 40).split()) == (
        "step 7/40 reward 1.25 solve 0.50 hack 0.38 deployed 0.25 - clean/mid/hack 0.50/0.12/0.38 auroc 0.88 "
        "qmass 0.25 |g| 0.062 s 1.0+2.0+3.0+4.0")


def test_base_is_evaluated_before_an_adapter_is_attached_and_each_run_with_its_own(nano, tmp_path, monkeypatch, capsys):
    """Two runs, one of them with an adapter that moved: the table has a row per run and condition."""
    model, tok, _, _ = nano
    for n, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        fresh = attach(load_model(str(HERE / "data/nano"))[0], 2)
        with torch.no_grad():
            for p in fresh.deployed_parameters():
                p.fill_(0.25 * n)
        save(fresh, tmp_path / name / "adapter.safetensors", dict(step="1"))
        config = dict(arm=name, seed=n, model=str(HERE / "data/nano"), dtype="float32", modes=["sentinel"], top_k=3,
                      test_data=str(HERE / "data/nano/test.jsonl"), max_new_tokens=11, eval_samples=2, steps=1,
                      hashes=dict(test_data=""))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    calls = []

    def fake(model, tok, adapter, problems, setting, *args):
        adapted = sum(isinstance(module, Lora2rLinear) for module in model.modules())
        size = None if adapter is None else adapter.deployed_parameters()[0].mean().item()
        calls.append((setting, problems[0].marker, bool(adapted), size))
        assert args == (5, 11, 3, 0.9, 8)
        row = dict(problems=4, n=20, solve=0.5, hack=0.25, exploit=0.25, compiles=1.0)
        return {"all": row, "sentinel": row}

    monkeypatch.setattr(evaluate_deploy, "evaluate", fake)
    main(Config((tmp_path / "first", tmp_path / "second"), 5, 0.9, 8, base=True, device="cpu"))
    assert calls == [("base", marker, False, None) for marker in ("valid", "approved")] + [
        (setting, marker, True, size) for size in (0.0, 0.25) for setting in ("deployed", "full")
        for marker in ("valid", "approved")]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines[3:]] == [
        ["base", "0", "base,", "trained"], ["base", "0", "base,", "held-out"]] + [
        [arm, str(n), f"{setting},", markers] for n, arm in enumerate(("first", "second"))
        for setting in ("deployed", "full") for markers in ("trained", "held-out")]


def test_wilson_interval():
    """Of published tables: 0 of 100, 50 of 100, 1 of 10."""
    assert wilson(0.0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert math.copysign(1, wilson(0.0, 60)[0]) == 1, "printed as -0.00"
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)


def test_interval_over_seeds_is_students_t():
    """Standard deviations .2 and .1 (n - 1), of a table: t = 4.303 for 3 seeds, 2.776 for 5."""
    assert over_seeds([0.2, 0.4, 0.6]) == "0.400 [0.00, 0.90]"  # .4 +- 4.303 * .2 / 3**.5
    assert over_seeds([0.3, 0.4, 0.5, 0.5 - 0.1414, 0.3 + 0.1414]) == "0.400 [0.30, 0.50]"  # .4 +- 2.776 * .08 / 5**.5
    assert over_seeds([0.25]) == "0.250"


def test_a_mean_is_tested_against_0_by_students_t():
    """t = .25 / (.129 / 2) = 3.873 with three degrees of freedom: p = .0305; tables' 1 % point of nine is 3.250."""
    centre, half, p = interval([0.1, 0.2, 0.3, 0.4])
    assert (centre, half, p) == (pytest.approx(0.25), pytest.approx(0.2054, abs=1e-4), pytest.approx(0.0305, abs=1e-4))
    assert interval([-0.1, -0.2, -0.3, -0.4])[2] == p and two_sided_p(3.2498, 9) == pytest.approx(0.01, abs=2e-5)
    assert interval([0.0, 0.0])[2] == interval([0.5, 0.5])[2] == 1.0 and interval([0.5, 0.501])[2] < 1e-3


def test_arms_are_compared_seed_by_seed_and_by_holms_correction():
    """Only seeds that both have count. none: solve +.1 +.2 +.3 +.4, p = .0305, is the third of six p values, so four
    times it; hack -.2 -.2 -.2 -.23 and, of held-out markers, half that have the smallest, .000103: six times it, and no
    less for the second. absorb: +.5 -.5 and 0 0, whose p are 1."""
    def row(arm, seed, solve, hack):
        return dict(arm=arm, seed=seed, results={"deployed, trained": dict(all=dict(solve=solve, hack=hack)),
                                                 "deployed, held-out": dict(all=dict(hack=hack / 2))})

    rows = [*(row("routeV", seed, 0.5, 0.1) for seed in range(4)), row("none", 9, 0.0, 0.0), row("alone", 0, 0.0, 0.0)]
    rows += [row("none", seed, 0.4 - 0.1 * seed, 0.3 + 0.03 * (seed == 3)) for seed in range(4)]
    rows += [row("absorb", 0, 0.0, 0.1), row("absorb", 1, 1.0, 0.1)]
    lines = format_differences(rows, "routeV").splitlines()
    lines = [[part.strip() for part in line.split("  ") if part] for line in lines]
    assert lines[0] == ["routeV minus", "seeds", "solve", "p (Holm)", "hack", "p (Holm)", "hack, held-out markers",
                        "p (Holm)"]
    assert lines[1][:4] == ["none", "4", "+0.250 [+0.04, +0.46]", "0.1"]
    assert lines[1][4:] == ["-0.207 [-0.23, -0.18]", "0.0006", "-0.104 [-0.12, -0.09]", "0.0006"]
    assert lines[2] == ["absorb", "2", "+0.000 [-6.35, +6.35]", "1"] + ["+0.000 [+0.00, +0.00]", "1"] * 2
    assert len(lines) == 3 and format_differences(rows, "nobody") == ""
    for x in rows:  # of one mode, in which routeV is .2 better
        x["results"] = {setting: table | dict(sentinel={key: value - 0.2 * (x["arm"] == "routeV")
                                                        for key, value in table["all"].items()})
                        for setting, table in x["results"].items()}
    n, centre, _, _ = differences(rows, "routeV", "sentinel")["none", "hack"]
    assert (n, centre) == (4, pytest.approx(-0.4075))


def script(name):
    """A script of data/results as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"data/results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hypotheses_hold_as_the_preregistration_says():
    """Ten seeds. Each difference is given, with a little noise; a claim turns where its own bound is crossed."""
    verdicts = script("hypotheses").verdicts

    def holds(**of_arm):  # arm -> (solve, hack); held-out markers and the mode "sentinel" have the same hack
        arms = dict(routeV=(0.9, 0.0), none=(0.1, 0.8), placebo=(0.2, 0.6), coin=(0.2, 0.6), ceiling=(0.91, 0.0),
                    absorb=(0.2, 0.6), surprise=(0.6, 0.0), length=(0.9, 0.4)) | {
                    "hidden-states": (0.9, 0.0), "oracle-80": (0.5, 0.3), "screen-80": (0.4, 0.4),
                    "absorption": (0.9, 0.0), "absorption-80": (0.7, 0.1), "dropped-80": (0.7, 0.2)}
        rows, noises = [], random.Random(0)
        for arm, (solve, hack) in (arms | of_arm).items():
            for seed in range(10):
                noise = noises.uniform(-0.01, 0.01)
                cell = {mode: dict(solve=solve + noise, hack=hack + noise) for mode in ("all", "sentinel")}
                rows.append(dict(arm=arm, seed=seed, results={
                    f"deployed, {markers}": cell for markers in ("trained", "held-out")}))
        found = [(name.split()[0], value) for name, value, _ in verdicts(rows, ("sentinel",))]
        some = [row for row in rows if row["arm"] in ("routeV", "none", "absorption")]
        assert [name.split()[0] for name, *_ in verdicts(some)] == ["H1", "H11"], "those that were run"
        return found

    assert [name for name, value in holds() if value == (name == "H7")] == []
    turned = [dict(none=(0.1, 0.0)), dict(placebo=(0.2, 0.0)), dict(coin=(0.2, 0.0)), dict(ceiling=(0.928, 0.0)),
              dict(absorb=(0.9, 0.6)), dict(absorb=(0.2, 0.0)), dict(surprise=(0.9, 0.0)), dict(length=(0.9, 0.0)),
              {"hidden-states": (0.8, 0.0)}, {"screen-80": (0.4, 0.2)}, {"absorption-80": (0.4, 0.1)},
              {"absorption-80": (0.7, 0.4)}, {"dropped-80": (0.5, 0.1)}, {"absorption": (0.86, 0.0)},
              {"absorption": (0.9, 0.02)}]
    names = ["H1", "H2 H5 H5", "H2b", "H3", "H4", "H4", "H6", "H6", "H7", "H9", "H10", "H10 H12", "H12", "H11", "H11"]
    for change, expected in zip(turned, names):
        assert [name for name, value in holds(**change) if value == (name == "H7")] == expected.split(), change


@pytest.mark.parametrize("world, unseen", [("nano-3", ["stdout_marker,", "file_marker,"]), ("wordy-3", [])])
def test_modes_that_no_pair_shows_are_those_of_the_kind_of_world(tmp_path, capsys, world, unseen):
    cell = dict(solve=0.5, hack=0.25)
    table = dict(all=cell, stdout_marker=cell, file_marker=cell)
    rows = [dict(arm=arm, seed=seed, results={f"deployed, {markers}": table for markers in ("trained", "held-out")})
            for arm in ("routeV", "placebo") for seed in (0, 1)]
    (tmp_path / f"{world}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script("hypotheses").main(tmp_path / f"{world}.jsonl")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[3] for line in lines if line[0] == "H5" and line[1:3] == ["H2", "in"]] == unseen


def test_worlds_of_a_kind_are_pooled_seed_by_seed_and_others_are_refused(tmp_path, capsys):
    """The same two seeds of two worlds are four pairs."""
    for world, hack in (("wordy-8", (0.5, 0.75)), ("wordy-9", (0.25, 0.5))):
        rows = [dict(arm=arm, seed=seed, results={f"deployed, {markers}": dict(all=dict(
            solve=0.5, hack=hack[seed] * (arm == "none"))) for markers in ("trained", "held-out")})
            for arm in ("routeV", "none") for seed in (0, 1)]
        (tmp_path / f"{world}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [tmp_path / f"wordy-{n}.jsonl" for n in (8, 9)]
    script("hypotheses").main(*paths)
    first, last = capsys.readouterr().out.splitlines()
    assert "yes hack -0.500" in first and first.endswith("n 4") and "in 4 of 4 seeds" in last
    for bad in ([], [tmp_path / "wordy-7.jsonl"], [*paths, HERE / "data/results/nano-3.jsonl"]):
        with pytest.raises(SystemExit, match="give"):
            script("hypotheses").main(*bad)


def test_targets_count_seeds_and_the_ceilings_of_those_that_have_one():
    cells = dict(routeV=[(0.9, 0.01), (0.9, 0.011), (0.5, 0.0)], ceiling=[(0.92, 0.0), (0.94, 0.0)])
    rows = [dict(arm=arm, seed=seed, results={"deployed, trained": dict(all=dict(solve=solve, hack=hack))})
            for arm, of_seed in cells.items() for seed, (solve, hack) in enumerate(of_seed)]
    assert script("hypotheses").targets(rows, "routeV") == (
        "routeV: hack <= .01 in 2 of 3 seeds, solve >= the ceiling's - .03 in 1 of 2")


def test_the_decision_runs_every_arm_on_every_seed_but_what_is_there(tmp_path):
    """decide.sh with a python that writes down what it is called with: what train_grpo.py makes of it."""
    (tmp_path / "data/results").mkdir(parents=True)
    shutil.copy(HERE / "data/results/decide.sh", tmp_path / "data/results")
    row, nearly = (f'{{"arm": "{arm}", "seed": {seed}, "config": "0"}}\n'
                   for arm, seed in (("routeV", 1110), ("screen", 11100)))
    (tmp_path / "data/results/nano-3.jsonl").write_text(row + nearly)
    (tmp_path / "runs/decide/wordy-3/none-1111").mkdir(parents=True)
    (tmp_path / "runs/decide/wordy-3/none-1111/deploy.json").touch()
    (tmp_path / "runs/decide/nano-3/none-1111").mkdir(parents=True)  # begun, and not finished
    fake = tmp_path / "bin/python"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nopen({str(tmp_path / 'calls')!r}, 'a').write("
                    "json.dumps(sys.argv[1:]) + '\\n')\n")
    fake.chmod(0o755)
    subprocess.run(["sh", "data/results/decide.sh"], cwd=tmp_path, check=True, env=os.environ | dict(
        PATH=f"{fake.parent}:{os.environ['PATH']}", SEEDS="1110 1111"))
    *calls, nothing, kept = map(json.loads, (tmp_path / "calls").read_text().splitlines())
    assert nothing == ["evaluate_deploy.py", "--results", "data/results/nano-3.jsonl"]
    assert kept == ["evaluate_deploy.py", "runs/decide/wordy-3/none-1111", "--results", "data/results/wordy-3.jsonl"]
    found = {}
    for program, *flags in calls:
        assert program == "train_grpo.py"
        cfg = check(parse_args(flags))
        world = Path(cfg.model).name
        assert {str(cfg.data), str(cfg.test_data)} == {f"data/{world}/train.jsonl", f"data/{world}/test.jsonl"}
        assert str(cfg.out_dir) == f"runs/decide/{world}/{cfg.name}-{cfg.seed}" and cfg.resume
        assert str(cfg.demos) == f"data/{world}/demos.jsonl" or cfg.mix_ratio == 0
        assert (world, cfg.name, cfg.seed) not in found
        found[world, cfg.name, cfg.seed] = cfg
    arms = {name for _, name, _ in found}
    assert len(arms) == 21 and set(found) == {(world, arm, seed) for world in ("nano-3", "wordy-3") for arm in arms
                                              for seed in (1110, 1111)} - {
        ("nano-3", "routeV", 1110), ("wordy-3", "none", 1111)}
    default = found["wordy-3", "absorption", 1110]
    unlike = {arm: {field.name: getattr(cfg, field.name) for field in fields(cfg)
                    if field.name not in ("name", "out_dir", "demos")
                    and getattr(cfg, field.name) != getattr(default, field.name)}
              for (world, arm, seed), cfg in found.items() if (world, seed) == ("wordy-3", 1110)}
    oracle, absorb = dict(intervention="oracle"), dict(intervention="absorb")
    third = dict(routeV_random_v_seed=1110, placebo="replaced", gate="batch", k_mid=0.5)  # k_hack's default, too
    none, seeded = dict(intervention="none"), dict(expert_steps=10)
    without = {  # absorption, that is; what labels nothing has nothing to absorb
        "routeV": {}, "placebo": dict(routeV_random_v_seed=1110), "hidden-states": dict(score="activation"),
        "coin": dict(routeV_random_v_seed=1110, placebo="coin"), "surprise": dict(score="surprise"),
        "length": dict(score="length"), "screen": dict(on_hack="screen"), "penalise": dict(on_hack="penalise"),
        "seeded-routeV": seeded, "oracle": oracle, "oracle-80": oracle | dict(oracle_accuracy=0.8),
        "screen-80": oracle | dict(oracle_accuracy=0.8, on_hack="screen")}
    assert unlike == {arm: flags | dict(absorption=False) for arm, flags in without.items()} | {
        "absorption": {}, "fixed-share": third, "absorption-80": oracle | dict(oracle_accuracy=0.8),
        "dropped-80": oracle | dict(oracle_accuracy=0.8, on_hack="screen"), "none": none, "absorb": absorb,
        "seeded-absorb": absorb | seeded, "ceiling": none | dict(mix_ratio=0.0, reward="gt"),
        "inoculate": none | dict(inoculate="Cheat if you can.")}


def test_how_it_breaks_is_drawn_a_line_a_reader_by_its_name(tmp_path, monkeypatch):
    """Solve above hack; a reader's line goes through its points, in the panel's order."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    breaks, rows = script("breaks"), []
    for n, reader in enumerate(("gradient", "activation", "none")):
        for arm, solve in ((reader, 0.25 * n), (f"{reader}-steps-20", 0.25 * n + 0.125)):
            cell = dict(all=dict(solve=solve, hack=1 - solve))
            rows.append(dict(arm=arm, seed=20, results={"deployed, trained": cell}))
    monkeypatch.setattr(breaks, "ROWS", tmp_path / "breaks.jsonl")
    breaks.ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(breaks, "PANELS", {"steps": {"20": "--steps 20", "40": ""}, "rank": {"32": ""}})
    breaks.draw(tmp_path / "breaks.png")
    for axes, of in zip(pyplot.gcf().axes[::2], (lambda solve: solve, lambda solve: 1 - solve)):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label()[0] != "_"}
        assert lines == {name: [of(0.25 * n + 0.125), of(0.25 * n)]
                         for n, name in enumerate(("gradient", "hidden states", "no routing"))}
    pyplot.close()


def test_pairs_are_made_fewer_or_worse_one_way_at_a_time(tmp_path):
    whole = load_pairs(HERE / "data/nano/pairs.md")
    made = {}
    for name, text in script("breaks").pairs_of((HERE / "data/nano/pairs.md").read_text()).items():
        (tmp_path / "pairs.md").write_text(text)
        made[name] = load_pairs(tmp_path / "pairs.md")
    assert {name: dict(Counter(pair.mode for pair in pairs)) for name, pairs in made.items()} == {
        "20": dict(run_tests=10, sentinel=10), "10": dict(run_tests=5, sentinel=5), "5": dict(run_tests=3, sentinel=2),
        "run_tests": dict(run_tests=22), "sentinel": dict(sentinel=22),
        "swapped-4": dict(run_tests=22, sentinel=22), "swapped-11": dict(run_tests=22, sentinel=22)}
    for n in (4, 11):
        swapped = [(b.clean, b.hack) == (a.hack, a.clean) for a, b in zip(whole, made[f"swapped-{n}"])]
        assert sum(swapped) == n and abs(sum(swapped[:22]) - n / 2) <= 0.5, "of both modes"
        assert all(was == is_now for was, is_now, other in zip(whole, made[f"swapped-{n}"], swapped) if not other)


def test_what_breaks_is_run_once_kept_and_drawn(tmp_path, monkeypatch):
    """Every point once a seed, with a row for what came out; those that have one are left alone."""
    pytest.importorskip("matplotlib")
    breaks, commands = script("breaks"), []

    def ran(command, **options):
        commands.append(" ".join(map(str, command[2:])))
        folder = command[command.index("--out-dir") + 1]
        folder.mkdir()
        table = dict(all=dict(solve=0.5, hack=0.25))
        arm, seed = command[command.index("--name") + 1], int(command[command.index("--seed") + 1])
        (folder / "config.json").write_text("{}")
        (folder / "metrics.jsonl").write_text(json.dumps(dict(deployed_solve=0, deployed_hack=0, gate_auroc=1)) + "\n")
        (folder / "deploy.json").write_text(json.dumps(dict(arm=arm, seed=seed, settings=dict(step=1),
                                                            results={"deployed, trained": table})))

    monkeypatch.setattr(breaks, "HERE", tmp_path)
    monkeypatch.setattr(breaks, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(breaks, "ROWS", tmp_path / "breaks.jsonl")
    monkeypatch.setattr(breaks.subprocess, "run", ran)
    monkeypatch.setattr(breaks.sys, "argv", ["breaks.py"])
    (tmp_path / "data/results").mkdir(parents=True)
    shutil.copytree(HERE / "data/nano", tmp_path / "data/nano")
    breaks.main()
    assert len(commands) == len(set(commands)) == 3 * (2 * 12 + 4)
    assert sum("--intervention none" in command for command in commands) == 3 * 4
    assert sum(f"--score activation --pairs {tmp_path}/runs/swapped-4.md" in command for command in commands) == 3
    breaks.main()
    assert len(commands) == len(set(commands)), "nothing twice"
    assert (tmp_path / "data/results/breaks.png").stat().st_size > 5000


def test_results_of_a_folder_are_printed_file_by_file_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    cell = dict(solve=0.5, hack=0.25, compiles=1.0)
    for world, arms in (("a", ("routeV", "none")), ("b", ("routeV",))):
        settings = ("deployed, trained", "deployed, held-out", "full, trained")
        results = {setting: dict(all=cell, m=cell) for setting in settings}
        rows = [dict(arm=arm, seed=seed, results=results) for arm in arms for seed in (0, 1)]
        (tmp_path / f"{world}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = [path.read_text() for path in sorted(tmp_path.glob("*.jsonl"))]
    import matplotlib.axes
    drawn, draw = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda axes, xs, *args, **options: (
        drawn.append((axes, xs)), draw(axes, xs, *args, **options))[1])
    main(Config(results=tmp_path, plot=tmp_path / "arms.svg"))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("a", "b")] == ["a", "b"]
    assert sum(line.startswith("none") for line in lines) == 2, "once with its means, once compared"
    assert before == [path.read_text() for path in sorted(tmp_path.glob("*.jsonl"))]
    assert (tmp_path / "arms.svg").stat().st_size > 5000
    assert {(axes.get_title(), *xs) for axes, xs in drawn} == {
        ("a: solve, deployed", 0.5, 0.5), ("a: hack, deployed", 0.25, 0.25), ("b: solve, deployed", 0.5, 0.5),
        ("b: hack, deployed", 0.25, 0.25)}


def test_results_are_kept_a_row_a_run_and_averaged_by_arm(tmp_path):
    def finished(name, arm, seed, solve, hack, evaluated=2):
        cell = dict(solve=solve, compiles=1.0)
        table = dict(all=cell | dict(hack=hack), a=cell | dict(hack=0.0), b=cell | dict(hack=2 * hack))
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        steps = [dict(step=0, deployed_solve=0.12349, deployed_hack=0.0, gate_auroc=None),
                 dict(step=1, deployed_solve=0.5, deployed_hack=None, gate_auroc=0.99951)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        results = {"deployed, trained": table, "full, trained": dict(all=dict(hack=0.875))}
        (tmp_path / name / "deploy.json").write_text(
            json.dumps(dict(arm=arm, seed=seed, settings=dict(step=evaluated), results=results), indent=1))
        return tmp_path / name

    file = tmp_path / "results.jsonl"
    keep_results([finished("x", "none", 0, 0.5, 0.25), finished("y", "absorb", 0, 0.25, 0.5)], file)
    rows = keep_results([finished("z", "none", 1, 0.5, 0.125), finished("again", "absorb", 0, 0.75, 0.125)], file)
    assert [(row["arm"], row["seed"], row["last"]["step"]) for row in rows] == [
        ("none", 0, 1), ("absorb", 0, 1), ("none", 1, 1)]
    assert all(row["curve"] == dict(deployed_solve=[0.123, 0.5], deployed_hack=[0.0, None], auroc=[None, 1.0])
               for row in rows)
    assert {row["config"] for row in rows} == {hashlib.sha256(b"{}").hexdigest()[:12]}
    inode = file.stat().st_ino
    assert keep_results([], file) == rows and file.stat().st_ino == inode, "what is only read is not written"
    with pytest.raises(InputError, match="longer was evaluated at step 1 and has made 2; evaluate it again"):
        keep_results([finished("longer", "none", 2, 0.5, 0.25, evaluated=1)], file)
    with pytest.raises(InputError, match="twice is a second run of absorb, seed 0; give one"):
        keep_results([tmp_path / "again", finished("twice", "absorb", 0, 0.5, 0.25)], file)
    with pytest.raises(InputError, match="^.*/none/deploy.json: cannot be read .* let the run come to its end$"):
        keep_results([tmp_path / "none"], file)
    assert keep_results([], file) == rows
    with pytest.raises(InputError, match="none/metrics.jsonl: cannot be read .* give a run that made a step$"):
        read_rows(tmp_path / "none/metrics.jsonl")
    lines = format_arms(rows).splitlines()
    head, none, absorb = ([part.strip() for part in line.split("  ") if part] for line in lines)
    assert none == ["none", "2", "0.500 [0.50, 0.50]", "0.188 [0.00, 0.98]", "0.250", "b 0.375", "1.00", "0.875"]
    assert absorb == ["absorb", "1", "0.750", "0.125", "0.125", "b 0.250", "1.00", "0.875"]
    assert head == ["arm", "seeds", "deploy solve", "deploy hack", "worst seed", "worst mode", "compiles", "full hack"]


CELL = dict(problems=10, n=20, solve=0.5, hack=0.25, exploit=0.3, compiles=1.0)


def finished_run(folder, arm, seed, metrics=(), **config):
    """A run folder without any model: config.json, metrics.jsonl and an untrained adapter's header."""
    folder.mkdir()
    config = dict(arm=arm, seed=seed, model="absent", dtype="float32", modes=["sentinel"], top_k=3, max_new_tokens=11,
                  test_data=str(HERE / "data/nano/test.jsonl"), eval_samples=2, steps=1,
                  hashes=dict(test_data=evaluate_deploy.hash_of(HERE / "data/nano/test.jsonl"))) | config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return config


def test_a_curve_is_the_mean_and_range_over_the_seeds_that_have_a_step():
    first = [dict(step=0, hack=0.25), dict(step=1, hack=None), dict(step=2, hack=0.5)]
    second = [dict(step=0, hack=0.75), dict(step=1, hack=None)]
    assert over_steps([first, second], "hack") == [(1, 0.5, 0.25, 0.75), (3, 0.5, 0.5, 0.5)]


def test_curves_are_drawn_from_the_logs_of_runs_alone(tmp_path, monkeypatch):
    """Arms apart, their seeds together; the left column is of what ships, the right one of both blocks."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    row = dict(step=0, solve=0.125, hack=0.25, deployed_solve=0.5, deployed_hack=0.625)
    finished_run(tmp_path / "x", "none", 0, [row, row | dict(step=1)])
    finished_run(tmp_path / "y", "none", 1, [row, row | dict(step=1, hack=0.75)])
    finished_run(tmp_path / "z", "absorb", 0, [row | dict(solve=None, hack=None)])
    monkeypatch.setattr(evaluate_deploy, "load_model", None)
    main(Config((tmp_path / "x", tmp_path / "y", tmp_path / "z"), curves=tmp_path / "curves.svg"))
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    panels = pyplot.gcf().axes
    assert [[line.get_ydata().tolist() for line in axes.lines] for axes in panels] == [
        [[0.5, 0.5], [0.5]], [[0.125, 0.125]], [[0.625, 0.625], [0.625]], [[0.25, 0.5]]]
    assert [panel.get_title("left").split(":")[0] for panel in panels] == [
        "solve rate, deployed", "solve rate, full policy", "hack rate, deployed", "hack rate, full policy"]
    labels = [[text.get_text() for text in axes.texts] for axes in panels]
    assert labels == [["absorb (1 seed)", "none (2 seeds)"], ["none (2 seeds)"]] * 2
    heights = [text.xy[1] for text in panels[0].texts]
    assert heights[1] - heights[0] == pytest.approx(0.07), "labels of lines that end together are apart"


def test_curves_are_drawn_from_kept_rows_alone(tmp_path):
    """A row of panels an arm, its own line last; rows from before rows had curves are left out."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    cell = dict(all=dict(solve=0.5, hack=0.25, compiles=1.0), m=dict(hack=0.25))
    results = {setting: cell for setting in ("deployed, trained", "deployed, held-out", "full, trained")}

    def row(arm, seed, solve, hack, auroc):
        curve = dict(deployed_solve=solve, deployed_hack=hack, auroc=auroc)
        return dict(arm=arm, seed=seed, results=results, curve=curve)

    rows = [row("routeV", 0, [0.5, 0.75], [0.0, 0.0], [None, 1.0]), row("none", 0, [0.5, 0.0], [0.0, 1.0], [None] * 2),
            row("routeV", 1, [0.5, 0.25], [0.0, 0.5], [None, 0.5]), row("coin", 0, [0.5, 0.5], [0.0, 0.5], [0.25, 0.5]),
            dict(arm="none", seed=1, results=results)]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (tmp_path / "w.jsonl").read_text()
    main(Config(results=tmp_path / "w.jsonl", curves=tmp_path / "curves.svg"))
    assert (tmp_path / "curves.svg").stat().st_size > 1000 and (tmp_path / "w.jsonl").read_text() == before
    panels = pyplot.gcf().axes
    solves, hacks = [[0.5, 0.5], [0.5, 0.0], [0.5, 0.5]], [[0.0, 0.25], [0.0, 1.0], [0.0, 0.5]]
    assert [[line.get_ydata().tolist() for line in axes.lines] for axes in panels] == [
        [*solves, solves[0]], [*hacks, hacks[0]], [[0.25, 0.5], [0.75]], [*solves, solves[1]], [*hacks, hacks[1]], [],
        [*solves, solves[2]], [*hacks, hacks[2]], [[0.25, 0.5], [0.25, 0.5]]]
    assert [line.get_xdata().tolist() for line in panels[2].lines] == [[1, 2], [2]]
    assert [axes.texts[0].get_text() for axes in panels] == [
        "0.50", "0.25", "0.75", "0.00", "1.00", "not measured", "0.50", "0.50", "0.50"]
    assert [axes.get_ylabel() for axes in panels[::3]] == ["routeV\n2 seeds", "none\n1 seed", "coin\n1 seed"]
    assert [axes.get_title("left") for axes in panels[:4]] == [
        "w: solve, deployed", "w: hack, deployed", "w: AUROC of the gate", ""]
    band, = panels[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.25, 0.75), "lowest and highest seed"
    (tmp_path / "v.jsonl").write_text(before)
    main(Config(results=tmp_path, curves=tmp_path / "curves.svg"))
    assert [axes.get_title("left") for axes in pyplot.gcf().axes[::9]] == ["v: solve, deployed", "w: solve, deployed"]
    (tmp_path / "w.jsonl").write_text(json.dumps(rows[-1]) + "\n")
    with pytest.raises(InputError, match="no row of these results has a curve"):
        main(Config(results=tmp_path / "w.jsonl", curves=tmp_path / "curves.svg"))


def test_a_figure_samples_nothing_where_a_run_was_evaluated_in_this_way(tmp_path, monkeypatch):
    """The run's own evaluation, or one under other settings, of the adapter's present step; else it is sampled."""
    pytest.importorskip("matplotlib")
    config = finished_run(tmp_path / "run", "none", 0)
    save(attach(load_model(str(HERE / "data/nano"))[0], 2), tmp_path / "run/adapter.safetensors", dict(step="1"))
    drawn = []
    monkeypatch.setattr(evaluate_deploy, "load_model", lambda *args: 1 / 0)
    monkeypatch.setattr(evaluate_deploy, "plot", lambda runs, *args: drawn.append(runs))
    monkeypatch.setattr(evaluate_deploy, "format_table", str)
    for changes in (dict(), dict(samples=8), dict(samples=8, seed=3)):
        settings = settings_of(config, 1) | changes
        wanted = Config((tmp_path / "run",), plot=tmp_path / "x.png", device="cpu", **changes)
        with pytest.raises(ZeroDivisionError):
            main(wanted)
        write_deploy(tmp_path / "run", config, settings | dict(step=7), dict(step="another"))
        with pytest.raises(ZeroDivisionError):
            main(wanted)
        write_deploy(tmp_path / "run", config, settings, dict(made=changes))
        main(wanted)
        assert drawn.pop() == {"T = 0.7": [("none", 0, dict(made=changes))]}
        with pytest.raises(ZeroDivisionError):  # an evaluation is what was asked for
            main(Config((tmp_path / "run",), device="cpu", **changes))


def test_a_run_that_goes_on_is_evaluated_as_of_the_step_that_was_loaded(tmp_path, monkeypatch):
    finished_run(tmp_path / "run", "none", 0, steps=9)
    save(attach(load_model(str(HERE / "data/nano"))[0], 2), tmp_path / "run/adapter.safetensors", dict(step="7"))
    seen = evaluate_deploy.peek(tmp_path / "run/adapter.safetensors")
    monkeypatch.setattr(evaluate_deploy, "peek", lambda path: seen | dict(metadata=seen["metadata"] | dict(step="5")))
    monkeypatch.setattr(evaluate_deploy, "evaluate", lambda *args: dict(all=dict(CELL)))
    main(Config((tmp_path / "run",), model=str(HERE / "data/nano"), device="cpu"))
    assert json.loads((tmp_path / "run/deploy-samples4-step7.json").read_text())["settings"]["step"] == 7


HOSTILE = "</script><script>alert(1)</script> <!-- <script> DATA <img src=x onerror=alert(1)> \u2028 \ud800 \\u003c"


def test_what_a_model_wrote_is_no_markup_of_the_page_that_shows_it(tmp_path):
    prompt = [dict(role=HOSTILE, content=HOSTILE)]
    rows = [dict(step=0, completion=HOSTILE, prompt=prompt, mode=HOSTILE, position=None), dict(step=1, completion="x")]
    browse(rows, HOSTILE, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    head, _, rest = page.partition('<script id="data" type="application/json">')
    data, _, script = rest.partition("</script>")
    assert "<" not in data and json.loads(data) == dict(title=HOSTILE, rows=rows)
    assert page.count("</script>") == 2 and script.count("<script>") == 1 and "<script" not in head
    assert not any(word in page for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "http:"))
    assert "default-src 'none'" in head


def test_table_names_arm_seed_and_modes():
    cell = CELL
    sentinel, other = cell | dict(hack=0.125), cell | dict(hack=0.625)
    text = format_table([("none", 3, {"deployed, trained": {"all": cell, "sentinel": sentinel}}),
                         ("absorb", 4, {"full, trained": {"all": cell, "run_tests": other}})])
    head, first, second = [[part.strip() for part in line.split("  ") if part] for line in text.splitlines()]
    assert head[:7] == ["arm", "seed", "setting, markers", "n", "solve", "hack", "exploit"]
    assert head[7:] == ["hack run_tests", "hack sentinel"]
    # intervals of n = 10 problems, not of 20 samples
    shares = ["0.500 [0.24, 0.76]", "0.250 [0.08, 0.56]", "0.300 [0.11, 0.60]"]
    assert first == ["none", "3", "deployed, trained", "20", *shares, "-", "0.125"]
    assert second == ["absorb", "4", "full, trained", "20", *shares, "0.625", "-"]


@pytest.mark.parametrize("content, says", [(None, "no readable config.json"), ("{", "damaged"), ("{}", "damaged")])
def test_a_folder_that_is_no_run_is_named(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=says) as e:
        read_run(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_missing_or_truncated_adapter_is_named_before_any_model_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(arm="none", model="absent", test_data="x", modes=[])))
    for content in (None, b"truncated"):
        if content:
            (tmp_path / "adapter.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="adapter.safetensors"):
            main(Config((tmp_path,)))
    with pytest.raises(InputError, match="no checkpoint given"):
        main(Config(()))
