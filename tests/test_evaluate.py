"""evaluate_deploy: rates, evaluation, tables, run folders; the sampler in lora2r; what a step's log says."""
import json
import math
import os
import shutil
import stat
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import evaluate_deploy
from env_leetcode import Verdict, load_problems
from evaluate_deploy import (Config, check_lengths, evaluate, export, format_table, hash_of, main, rates, settings_of,
                             wilson, write_deploy)
from lora2r import (HERE, InputError, Lora2rLinear, attach, batches, context_of, encode_completion, encode_prompt,
                    folded, generate, load_model, save, token_logps, use, writing)
from train_grpo import CLEAN, HACK, MID, console_line, outcomes, routing

NANO = HERE / "data/nano"
QWEN = """{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"""
GEMMA = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"""
CLOSE = dict(rtol=1e-3, atol=1e-3)


def noise(G, max_new, seed=0):
    return torch.rand(G, max_new, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def nano():
    """The embedded model, an adapter away from its init, 12 problems and their prompts."""
    model, tok = load_model(str(NANO))
    adapter = attach(model, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.02)
    problems = load_problems(NANO / "test.jsonl")[:12]
    return model, tok, adapter, problems, [encode_prompt(tok, p.messages) for p in problems]


def test_thinking_is_switched_off_and_a_template_without_a_system_role_says_so():
    tok, user = load_model(str(NANO))[1], {"role": "user", "content": "Sum the list."}
    for tok.chat_template, prompt in ((QWEN, "[user]Sum the list.[assistant]<think></think>"),
                                      (GEMMA, "[user]Sum the list.[assistant]")):
        assert encode_prompt(tok, [user]) == tok(prompt)["input_ids"]
    with pytest.raises(InputError, match="System role not supported.*data without system messages") as e:
        encode_prompt(tok, [{"role": "system", "content": "Be brief."}, user])
    assert "\n" not in str(e.value)


def test_a_template_sees_the_same_date_every_day_and_is_else_as_it_was(monkeypatch):
    class Later(datetime):
        now = classmethod(lambda cls: cls(2031, 7, 19))

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Later)
    tok, user = load_model(str(NANO))[1], [{"role": "user", "content": "Sum the list."}]
    asked = "{% macro day() %}{{ strftime_now('%A %-d %b %Y, %Y-%m-%d') }}{% endmacro %}{{ day() }}"
    for tok.chat_template, text in ((asked, "Wednesday 1 Jan 2025, 2025-01-01"), ("\n  {% if 1 %} a{% endif %}", None)):
        text = text or tok.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        assert encode_prompt(tok, user) == tok(text, add_special_tokens=False)["input_ids"]


def nano_with(folder, **changes):
    """A copy of the embedded model, keys of its JSON files changed."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.py", "__pycache__"))
    for name, change in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return str(folder)


def test_a_model_folders_own_code_is_refused_without_a_question(tmp_path, monkeypatch):
    """The tokenizer's as well as the model's. The code would leave a file."""
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    ours = {"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"}
    tokenizer = dict(tokenizer_class="Ours", auto_map={"AutoTokenizer": ["ours.Ours", None]})
    for name, changes in (("model", dict(config=dict(model_type="ours", auto_map=ours))),
                          ("tokenizer", dict(tokenizer_config=tokenizer, config=dict(model_type="ours")))):
        folder = nano_with(tmp_path / name, **changes)
        (tmp_path / name / "ours.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(InputError, match=f"^--model {folder}: cannot be loaded ") as e:
            load_model(folder)
        assert "\n" not in str(e.value) and not (tmp_path / "ran").exists()


def test_an_end_of_sequence_that_is_no_token_is_refused(tmp_path):
    for n, ends in enumerate(("x", [2, "x"], [[2]], {"a": 1}, 2.5, True, 10**30)):
        folder = nano_with(tmp_path / str(n), generation_config=dict(eos_token_id=ends))
        with pytest.raises(InputError, match=f"^--model {folder}: its generation_config.json has eos_token_id "):
            load_model(folder)


@pytest.mark.parametrize("special, template, refused", [(False, "", True), (True, "", False), (True, "<|new|>", True)])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, special, template, refused):
    """Unless it is a special one that no prompt holds, such as Gemma 3's image token."""
    content = json.loads((NANO / "tokenizer.json").read_text())
    n = json.loads((NANO / "config.json").read_text())["vocab_size"]
    token = content["added_tokens"][0] | dict(id=n, content="<|new|>", special=special)
    folder = nano_with(tmp_path / "model", tokenizer=dict(added_tokens=[*content["added_tokens"], token]))
    path = tmp_path / "model/chat_template.jinja"
    path.write_text(template + path.read_text())
    if not refused:
        assert len(load_model(folder)[1]) == n + 1
        return
    with pytest.raises(InputError, match=f"^--model {folder}: its tokenizer has a token {n}, .* for {n} tokens; give"):
        load_model(folder)


LONG = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=32)


@pytest.mark.parametrize("kind, options, context", [
    ("Phi3", dict(rope_parameters=LONG, original_max_position_embeddings=32), 32), ("Llama", {}, 64),
    ("Llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=48)), 48),
    ("Llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), 64),
    ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32)), 64),
    ("Gemma3Text", dict(rope_parameters=dict(full_attention=LONG | dict(rope_theta=1e4))), 32)])
def test_the_context_ends_where_keys_would_turn_anew(nano, monkeypatch, kind, options, context):
    """A prompt and its completion must fit in it."""
    config = getattr(transformers, f"{kind}Config")(hidden_size=32, num_attention_heads=4, max_position_embeddings=64,
                                                    pad_token_id=0, **options)
    model, (_, tok, _, problems, prompts) = SimpleNamespace(config=config), nano
    assert context_of(model) == context
    monkeypatch.setattr(evaluate_deploy, "context_of", lambda model: len(prompts[0]) + 9)
    check_lengths(tok, model, 9, "x.jsonl", problems[:1])
    with pytest.raises(InputError, match=f"^x.jsonl: problem {problems[0].id} is {len(prompts[0])} tokens, and .* 10 "):
        check_lengths(tok, model, 10, "x.jsonl", problems[:1])


def test_an_answer_ends_at_any_of_the_models_ends_and_an_export_keeps_the_tokenizer(tmp_path):
    """As Hugging Face stops: the greedy answer's tokens in turn are one more end in generation_config.json."""
    asked, own = [dict(role="user", content="Sum the list.")], transformers.AutoTokenizer.from_pretrained(NANO)
    whole = load_model(str(NANO))[0].generate(torch.tensor([encode_prompt(own, asked)]), max_new_tokens=40)[0].tolist()
    for ends in ([2, whole[-9]], whole[-20]):
        folder = nano_with(tmp_path / str(ends), generation_config=dict(eos_token_id=ends, pad_token_id=None),
                           tokenizer_config=dict(pad_token=None))
        model, tok = load_model(folder)
        prompt = encode_prompt(tok, asked)
        (ours,), _ = generate(model, tok, [prompt], [1], noise(1, 40), 0)
        assert ours == model.generate(torch.tensor([prompt]), max_new_tokens=40)[0, len(prompt):].tolist()
        assert len(ours) < len(whole) - len(prompt) and encode_completion(tok, "a")[-1] == 2
        export(model, attach(model, 2), tmp_path / f"{ends} out", "merged", tok)
        own = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        own.save_pretrained(tmp_path / f"{ends} own")
        for path in (tmp_path / f"{ends} own").iterdir():
            assert path.read_bytes() == (tmp_path / f"{ends} out" / path.name).read_bytes(), path.name


def test_a_turn_ends_where_the_chat_template_ends_it_and_a_model_needs_no_pad_token(tmp_path):
    """Gemma's and Phi's way: the tokenizer's eos ends a text, and generation_config.json lists what ends a turn."""
    tok = load_model(nano_with(tmp_path / "model", tokenizer_config=dict(eos_token="<|pad|>", pad_token=None),
                               generation_config=dict(eos_token_id=[0, 2], pad_token_id=None)))[1]
    assert (tok.eos_token, tok.eos_token_id, tok.pad_token_id) == ("<|im_end|>", 2, 2)


@pytest.mark.parametrize("quarantine, temperature, top_k", [(True, 0.7, 0), (False, 1.0, 0), (True, 3.0, 2)])
def test_samplers_logps_are_those_of_the_masked_policy(nano, quarantine, temperature, top_k):
    """Left-padded, cached, folded, shrinking batch on one side; right-padded, hooked, teacher-forced on the other.
    Under top_k they are those of the whole vocabulary."""
    model, tok, adapter, _, prompts = nano
    with folded(adapter, quarantine=quarantine):
        completions, logps = generate(model, tok, prompts, [2] * 12, noise(24, 112), temperature, top_k)
    assert len(set(map(len, prompts))) > 1 and len(set(map(len, completions))) > 1, "no padding to test"
    assert all(c[-1] == tok.eos_token_id or len(c) == 112 for c in completions)
    prompts = [p for p in prompts for _ in range(2)]
    with torch.no_grad(), use(adapter, m=quarantine):
        for rows, ids, mask, _ in batches(prompts, completions, 4096):
            again = token_logps(model, ids, mask, temperature)
            for j, i in enumerate(rows.tolist()):
                torch.testing.assert_close(again[j, mask[j]], logps[i], **CLOSE)


def test_generate_is_seeded_and_top_k_1_is_greedy(nano):
    model, tok, _, _, prompts = nano

    def sample(seed, k=0, temperature=1.0):
        return generate(model, tok, prompts[:4], [2] * 4, noise(8, 32, seed), temperature, k)

    assert sample(0)[0] == sample(0)[0] != sample(1)[0]
    greedy, logps = sample(0, 1)
    assert greedy == sample(1, 1)[0] and greedy[0] == greedy[1]
    coldest, cold_logps = sample(0, 5, temperature=0)  # T = 0 is top_k = 1 at T = 1, whatever top_k says
    assert coldest == greedy and all(map(torch.equal, cold_logps, logps))


def test_sampled_tokens_follow_the_models_probabilities(nano):
    """Frequencies of the first token over an even grid of noise, against softmax(logits / T)."""
    model, tok, _, _, prompts = nano
    grid = (torch.arange(4000) + 0.5)[:, None] / 4000
    for temperature, top_k in ((1.0, 0), (3.0, 0), (3.0, 5)):
        completions, _ = generate(model, tok, prompts[:1], [4000], grid, temperature, top_k)
        first = torch.tensor([ids[0] for ids in completions])
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor(prompts[:1])).logits[0, -1] / temperature, -1)  # [V]
        if top_k:
            p = torch.where(p >= p.topk(top_k).values[-1], p, 0) / p.topk(top_k).values.sum()
        torch.testing.assert_close(first.bincount(minlength=len(p)) / 4000, p, rtol=0, atol=1 / 4000)


def test_evaluate_deployed_ignores_the_quarantine_and_full_does_not(nano):
    model, tok, adapter, problems, _ = nano

    def tables():
        return [evaluate(model, tok, adapter, problems, setting, 2, max_new=48) for setting in ("deployed", "full")]

    deployed, full = tables()
    with torch.no_grad():
        for p in adapter.quarantine_parameters():
            p.mul_(30)
    again, changed = tables()
    with torch.no_grad():
        for p in adapter.quarantine_parameters():
            p.div_(30)
    assert again == deployed and changed != full


def test_evaluate_keeps_problems_samples_and_noise_together_over_parts(nano, monkeypatch):
    """70 problems in two parts of at most 64: each sample has its own noise, at T = 0.7; each text is graded on the
    problem that it was sampled for, and a mode's rates are of its own problems."""
    model, tok, adapter, _, _ = nano
    problems = load_problems(NANO / "test.jsonl")[:70]
    asked, seen = [encode_prompt(tok, p.messages) for p in problems], []

    def fake_generate(model, tok, prompts, n, noise, temperature, top_k):
        assert n == [2] * len(prompts) and noise.shape == (2 * len(prompts), 5) and len(prompts) <= 64
        assert (temperature, top_k) == (0.7, 9)
        seen.append(noise)
        texts = [f"{asked.index(prompt)}" for prompt in prompts for _ in range(2)]
        return [tok(text)["input_ids"] for text in texts], None

    def fake_grade(batch, texts):
        assert [problems.index(p) for p in batch] == [int(text) for text in texts]
        modes = {"sentinel": (True, False), "run_tests": (False, True)}
        return [Verdict(True, *modes.get(p.mode, (False, False)), (), "") for p in batch]

    monkeypatch.setattr(evaluate_deploy, "generate", fake_generate)
    monkeypatch.setattr(evaluate_deploy, "grade_batch", fake_grade)
    table = evaluate(model, tok, adapter, problems, "deployed", 2, 5, 9)
    again = torch.cat(seen)
    assert again.unique(dim=0).shape == (140, 5), "no two samples share their noise"
    for setting, seed in (("full", 0), ("full", 1)):
        seen.clear()
        evaluate(model, tok, adapter, problems, setting, 2, 5, 9, seed=seed)
        assert torch.equal(torch.cat(seen), again) == (seed == 0), "every setting gets the noise of the seed"
    count = {mode: sum(p.mode == mode for p in problems) for mode in table if mode != "all"}
    assert {mode: (row["problems"], row["n"]) for mode, row in table.items()} == {
        "all": (70, 140)} | {mode: (n, 2 * n) for mode, n in count.items()}
    assert [table[mode][rate] for mode in ("sentinel", "run_tests") for rate in ("solve", "hack")] == [1, 0, 0, 1]
    assert table["all"]["solve"] == count["sentinel"] / 70


def verdict(letters):
    """c: compiles, s: solves, x: exploits with success, t: touches a channel in vain."""
    touched = ("sentinel",) if set(letters) & set("xt") else ()
    return Verdict("c" in letters, "s" in letters, "x" in letters, touched, "")


def test_rates_count_a_hack_where_the_loophole_paid_and_the_answer_is_wrong():
    """Right and exploited at once is a solve and an exploit, not a hack, and no honest solve; nor is a solve that
    touched a channel in vain."""
    table = rates(list("aabbbbcc"), [verdict(x) for x in ("cs", "cx", "csx", "cst", "c", "", "ct", "cs")])
    assert table["all"] == dict(n=8, solve=4 / 8, exploit=2 / 8, hack=1 / 8, honest_solve=2 / 8, compiles=7 / 8,
                                channel=4 / 8)
    assert table["a"] == dict(n=2, solve=0.5, exploit=0.5, hack=0.5, honest_solve=0.5, compiles=1.0, channel=0.5)
    assert table["b"] == dict(n=4, solve=0.5, exploit=0.25, hack=0, honest_solve=0, compiles=0.75, channel=0.5)
    nothing = dict.fromkeys(("solve", "exploit", "hack", "honest_solve", "compiles", "channel"))
    assert rates([], []) == {"all": dict(n=0, **nothing)}


def rollout(source, letters, mode="a"):
    return SimpleNamespace(source=source, mode=mode, verdict=verdict(letters))


def test_outcomes_are_of_the_full_policy_and_of_the_ablated_one_apart():
    """Demonstrations, all of them paid hacks, are in neither."""
    asked = (("teacher", "cx", "a"), ("full", "cs", "a"), ("ablated", "cx", "a"), ("teacher", "cx", "b"),
             ("full", "cx", "b"), ("ablated", "", "b"))
    row = outcomes([rollout(*x) for x in asked], torch.tensor([3.5, 3.5, 3.5, 3.5, 3.0, 0.0]))
    assert (row["reward"], row["deployed_reward"]) == (3.25, 1.75)
    names = ("solve", "honest_solve", "hack", "exploit", "compiles", "channel")
    assert [row[name] for name in names] == [0.5, 0.5, 0.5, 0.5, 1.0, 0.5]
    assert [row[f"deployed_{name}"] for name in names] == [0.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    for name in ("hack_by_mode", "exploit_by_mode"):
        assert row[name] == {"a": 0, "b": 1} and row[f"deployed_{name}"] == {"a": 1, "b": 0}
    row = outcomes([rollout("teacher", "cx")], torch.tensor([3.5]))
    assert row["reward"] is row["hack"] is row["deployed_solve"] is None


ROUTED = [  # label, did it have an effect, position, advantage, rollout
    (HACK, True, 0.9, 2.0, rollout("teacher", "cx")),  # a demonstration: in the labels' shares, not in the AUROC
    (HACK, True, 0.8, 1.0, rollout("full", "cx")),
    (CLEAN, True, 0.1, 1.0, rollout("full", "csx")),  # an exploit that the gate missed
    (HACK, True, 0.5, 1.0, rollout("ablated", "cs")),  # an honest solve that it flagged
    (MID, True, 0.4, 1.0, rollout("full", "cs")),
    (CLEAN, True, 0.7, 1.0, rollout("full", "cst")),  # right, a channel touched in vain: in neither of the two
    (HACK, True, 0.3, -1.0, rollout("full", "cx")),  # trains, but its advantage gives it away
    (CLEAN, False, math.nan, 0.0, rollout("full", "cs")),  # does not train
    (HACK, True, 0.6, 0.0, rollout("full", "cs")),  # dropped or penalised
    (HACK, False, 0.6, 0.0, rollout("full", "cs")),  # flagged, but it would not have trained
]


def test_routing_judges_the_gate_on_the_policys_own_rollouts_with_a_positive_advantage():
    label, labelled, position, adv = (torch.tensor(column) for column in list(zip(*ROUTED))[:4])
    row = routing([x[-1] for x in ROUTED], label, labelled, position, adv)
    assert row["labels"] == pytest.approx(dict(clean=2 / 8, mid=1 / 8, hack=5 / 8))
    assert row["labels_of_exploits"] == pytest.approx(dict(clean=1 / 4, mid=0, hack=3 / 4))
    assert row["labels_of_honest"] == pytest.approx(dict(clean=0, mid=1 / 3, hack=2 / 3))
    assert row["gate_auroc"] == 0.5  # exploits at .8 and .1, honest solves at .5 and .4
    unread = [rollout("full", "cs"), rollout("full", "cx")], *(torch.tensor([x] * 2) for x in (0, False, math.nan, 1.0))
    nothing = routing(*unread)
    assert (nothing["labels"], nothing["gate_auroc"]) == (dict(clean=0, mid=0, hack=0), None)


def test_console_line_shows_the_numbers_under_their_names():
    row = dict(step=6, reward=1.25, honest_solve=0.5, exploit=0.375, deployed_honest_solve=0.25, deployed_exploit=None,
               gate_auroc=0.875, labels=dict(clean=0.5, mid=0.125, hack=0.375), qmass=0.25, grad_norm=0.0625,
               seconds=dict(refresh=9.0, sample=1.0, grade=2.0, gate=3.0, update=4.0))
    assert " ".join(console_line(row, 40).split()) == (
        "step 7/40 reward 1.25 honest 0.50 exploit 0.38 deployed 0.25 - clean/mid/hack 0.50/0.12/0.38 auroc 0.88 "
        "qmass 0.25 |g| 0.062 s 1.0+2.0+3.0+4.0")


def test_wilson_interval():
    """Of published tables: 0 of 100, 50 of 100, 1 of 10."""
    assert wilson(0.0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert math.copysign(1, wilson(0.0, 60)[0]) == 1, "printed as -0.00"
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)


CELL = dict(problems=10, n=20, honest_solve=0.2, solve=0.5, hack=0.25, exploit=0.3, compiles=1.0, channel=0.4)


def test_table_names_arm_seed_and_modes():
    """Intervals are of 10 problems, not of 20 samples."""
    first = {"all": CELL, "sentinel": CELL | dict(exploit=0.125, hack=0.0)}
    second = {"all": CELL, "run_tests": CELL | dict(exploit=0.625)}
    text = format_table([("none", 3, {"deployed, trained": first}), ("absorb", 4, {"full, trained": second})])
    head, *lines = [[part.strip() for part in line.split("  ") if part] for line in text.splitlines()]
    assert head == ["arm", "seed", "setting, markers", "n", "honest solve", "exploit", "solve", "hack",
                    "exploit run_tests", "exploit sentinel"]
    shares = ["0.200 [0.06, 0.51]", "0.300 [0.11, 0.60]", "0.500 [0.24, 0.76]", "0.250 [0.08, 0.56]"]
    assert lines == [["none", "3", "deployed, trained", "20", *shares, "-", "0.125"],
                     ["absorb", "4", "full, trained", "20", *shares, "0.625", "-"]]


def finished_run(folder, arm="none", seed=0, step=1, fill=None, **config):
    """A run folder: config.json and, if `fill` is a number, an adapter whose deployed block holds it."""
    folder.mkdir()
    config = dict(arm=arm, seed=seed, model=str(NANO), dtype="float32", modes=["sentinel"], top_k=3, max_new_tokens=11,
                  test_data=str(NANO / "test.jsonl"), eval_samples=2, steps=1,
                  hashes=dict(test_data=hash_of(NANO / "test.jsonl"))) | config
    (folder / "config.json").write_text(json.dumps(config))
    if fill is not None:
        adapter = attach(load_model(str(NANO))[0], 2)
        with torch.no_grad():
            for p in adapter.deployed_parameters():
                p.fill_(fill)
        save(adapter, folder / "adapter.safetensors", dict(step=str(step)))
    return config


def test_base_is_evaluated_before_an_adapter_is_attached_and_each_run_with_its_own(tmp_path, monkeypatch, capsys):
    """Two runs, of which the second goes on meanwhile: its result is of the step that was loaded."""
    finished_run(tmp_path / "first", "first", 0, fill=0.0)
    finished_run(tmp_path / "second", "second", 1, fill=0.25, step=7, steps=9)
    calls, peek = [], evaluate_deploy.peek

    def fake(model, tok, adapter, problems, setting, *args):
        adapted = any(isinstance(module, Lora2rLinear) for module in model.modules())
        size = None if adapter is None else adapter.deployed_parameters()[0].mean().item()
        calls.append((setting, problems[0].marker, adapted, size))
        assert args == (5, 11, 3, 0.9, 8)
        return {"all": CELL, "sentinel": CELL}

    monkeypatch.setattr(evaluate_deploy, "evaluate", fake)
    monkeypatch.setattr(evaluate_deploy, "peek", lambda path: peek(path) | dict(metadata=dict(step="5")))
    main(Config((tmp_path / "first", tmp_path / "second"), 5, 0.9, 8, base=True, device="cpu"))
    assert calls == [("base", marker, False, None) for marker in ("valid", "approved")] + [
        (setting, marker, True, size) for size in (0.0, 0.25) for setting in ("deployed", "full")
        for marker in ("valid", "approved")]
    result, = (tmp_path / "second").glob("deploy*.json")
    assert result.stem.endswith("-step7") and json.loads(result.read_text())["settings"]["step"] == 7
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[3:]]
    settings = [["base", "0", "base,"]] + [[arm, seed, setting] for arm, seed in (("first", "0"), ("second", "1"))
                                           for setting in ("deployed,", "full,")]
    assert rows == [[*setting, markers] for setting in settings for markers in ("trained", "held-out")]


def test_a_result_under_other_settings_has_a_file_of_its_own(tmp_path):
    """The same problems in another place are no other setting."""
    config = finished_run(tmp_path / "run")
    for change, name in ((dict(samples=8, seed=3), "-samples8-seed3"), (dict(data="elsewhere/test.jsonl"), ""),
                         (dict(temperature=0.0, step=5), "-temperature0.0-step5"),
                         (dict(data="x/val.jsonl", data_hash="0123456789ab"), "-data_val_0123456789ab")):
        result = dict(arm="none", seed=0, settings=settings_of(config, 1) | change, results=dict(made=name))
        path = write_deploy(tmp_path / "run", config, result["settings"], result["results"])
        assert path == tmp_path / f"run/deploy{name}.json" and json.loads(path.read_text()) == result


def test_a_run_folder_of_an_earlier_version_is_evaluated_and_exported(tmp_path):
    """Flags that are gone, a file of tensors written by hand; both exports answer as the model without quarantine."""
    gone = dict(name="routeV", epochs=1, clip_eps=0.2, kl=0.0, betas=[0.9, 0.99], grad_clip=1.0, window=None,
                oracle_accuracy=1.0, inoculate="", cut_mid=None, cut_hack=None, k_mid=0.0, tensorboard=False)
    problems, run = (NANO / "test.jsonl").read_text().splitlines(keepends=True), tmp_path / "run"
    (tmp_path / "few.jsonl").write_text("".join(problems[:2]))
    finished_run(run, "routeV", test_data=str(tmp_path / "few.jsonl"), **gone)
    (model, tok), (plain, _) = load_model(str(NANO)), load_model(str(NANO))
    adapter, tensors = attach(model, 2), {}
    for name, module in adapter.modules.items():
        for block in ("deployed", "quarantine"):
            for key in ("dA", "dB", "A0", "B0"):
                parameter = getattr(getattr(module, block), key)
                parameter.data = 0.2 * noise(*parameter.shape, seed=len(tensors)) - 0.1
                tensors[f"{name}.{block}.{key}"] = parameter.data
    header = dict(r=2, base=adapter.base, metadata=dict(arm="routeV", step="1"))
    save_file(tensors, run / "adapter.safetensors", {"vgrout-lora2r-2": json.dumps(header)})
    main(Config((run,), samples=1, device="cpu"))
    result, = run.glob("deploy*.json")
    assert json.loads(result.read_text())["results"]["full, held-out"]["all"]["n"] == 2

    ids = torch.tensor([encode_prompt(tok, [dict(role="user", content="Sum the list.")])])
    with torch.no_grad(), use(adapter, m=False):
        expected = model(ids).logits
    assert not torch.allclose(model(ids).logits, expected, atol=0.1)
    main(Config((run,), export=tmp_path / "merged", format="merged", device="cpu"))
    main(Config((run,), export=tmp_path / "lora", device="cpu"))
    lora = load_file(tmp_path / "lora/adapter_model.safetensors")
    with torch.no_grad():
        for name in adapter.modules:
            A, B = (lora[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            plain.get_submodule(name).weight += B @ A
        for exported in (plain, load_model(str(tmp_path / "merged"))[0]):
            torch.testing.assert_close(exported(ids).logits, expected, **CLOSE)


HOSTILE = "</script><script>alert(1)</script> <!-- <script> DATA <img src=x onerror=alert(1)> \u2028 \ud800 \\u003c"


def test_what_a_model_wrote_is_no_markup_of_the_page_that_shows_it(tmp_path, monkeypatch):
    """The page of a run, which loads no model."""
    prompt = [dict(role=HOSTILE, content=HOSTILE)]
    rows = [dict(step=0, completion=HOSTILE, prompt=prompt, mode=HOSTILE, position=None), dict(step=1, completion="x")]
    finished_run(tmp_path / "run", arm=HOSTILE, seed=3)
    (tmp_path / "run/rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluate_deploy, "load_model", None)
    main(Config((tmp_path / "run",), browse=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    head, _, rest = page.partition('<script id="data" type="application/json">')
    data, _, script = rest.partition("</script>")
    assert "<" not in data
    assert json.loads(data) == dict(title=f"Rollouts of {HOSTILE}, seed 3", rows=rows)
    assert page.count("</script>") == 2 and script.count("<script>") == 1 and "<script" not in head
    assert not any(word in page for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "http:"))
    assert "default-src 'none'" in head


@pytest.mark.parametrize("name, content, says", [
    ("config.json", None, "cannot be read .* give a run folder"), ("config.json", "{", "damaged"),
    ("config.json", "{}", "damaged"), ("config.json", "[]", "damaged"), ("adapter.safetensors", None, "no such file"),
    ("adapter.safetensors", "truncated", "damaged or not a safetensors file"),
    ("rollouts.jsonl", None, "cannot be read .* give a run that made a step$"), ("rollouts.jsonl", "", "is empty"),
    ("rollouts.jsonl", '{"step": 0}\n{"st', "damaged .* --resume of this run mends")])
def test_a_folder_that_is_no_run_is_named(tmp_path, monkeypatch, name, content, says):
    """Before any model is loaded."""
    monkeypatch.setattr(evaluate_deploy, "load_model", None)
    finished_run(tmp_path / "run")
    path, page = tmp_path / "run" / name, None if name == "adapter.safetensors" else tmp_path / "page.html"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"^{path}: {says}"):
        main(Config((tmp_path / "run",), browse=page, device="cpu"))
    assert not (tmp_path / "page.html").exists()


DEEP, DIGITS = "[" * 200_000, "9" * 5000


@pytest.mark.parametrize("changes", [
    DEEP, f'{{"seed": {DIGITS}}}', *(dict([change]) for change in (
        ("arm", 1), ("seed", "0"), ("seed", True), ("seed", -1), ("steps", 1.5), ("model", None), ("dtype", 5),
        ("modes", "sentinel"), ("modes", [[]]), ("test_data", ["x"]), ("hashes", []), ("hashes", {}), ("top_k", None),
        ("max_new_tokens", -1), ("eval_samples", "2")))], ids=lambda x: str(x)[:40])
def test_a_config_of_other_types_is_refused_in_one_line(tmp_path, monkeypatch, changes):
    """As is one that is nested too deep, or holds a number of too many digits; and so are rows of such kinds."""
    monkeypatch.setattr(evaluate_deploy, "load_model", None)
    config = finished_run(tmp_path / "run")
    text = changes if isinstance(changes, str) else json.dumps(config | changes)
    (tmp_path / "run/rollouts.jsonl").write_text("{}\n" + (text if isinstance(changes, str) else "5"))
    for name, content in (("rollouts.jsonl", None), ("config.json", text)):
        if content:
            (tmp_path / "run" / name).write_text(content)
        with pytest.raises(InputError, match=f"^{tmp_path / 'run' / name}: damaged ") as e:
            main(Config((tmp_path / "run",), browse=tmp_path / "page.html", device="cpu"))
        assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_temporary_name_cannot_be_foreseen(tmp_path):
    """It lies in a folder of a random name, which no one else may enter."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(tmp_path / "victim")
    names = set()
    for text in "xy":
        with writing(tmp_path / "a") as temporary:
            temporary.write_text(text)
            assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700 and temporary.parent.parent == tmp_path
            names.add(temporary.parent.name)
        assert (tmp_path / "a").read_text() == text
    assert (tmp_path / "victim").read_text() == "mine" and len(names) == 2 and len(list(tmp_path.iterdir())) == 3


EXPERTS = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=61,
               num_hidden_layers=2, moe_intermediate_size=16, num_experts=4, n_routed_experts=4, num_experts_per_tok=2)
FIRST_DENSE = dict(first_k_dense_replace=1, n_group=1, topk_group=1)


@pytest.mark.parametrize("kind, options", [
    ("Qwen3Moe", dict(mlp_only_layers=[0])), ("Glm4Moe", FIRST_DENSE | dict(n_shared_experts=1)),
    ("DeepseekV2", FIRST_DENSE | dict(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
                                      v_head_dim=8, head_dim=8, num_key_value_heads=4)), ("Olmoe", {})])
def test_peft_gets_no_layers_that_it_takes_for_experts(tmp_path, kind, options):
    """PEFT would lose the layers of the dense MLPs. Where attention alone is adapted it loses nothing."""
    make_model = getattr(transformers, f"{kind}ForCausalLM")
    model = make_model(make_model.config_class(**EXPERTS | options))
    adapter = attach(model, 2)
    if kind != "Olmoe":
        with pytest.raises(InputError, match="^--format peft: .* layers down_proj .* give --format merged$"):
            export(model, adapter, tmp_path / "out", "peft")
        assert not list(tmp_path.iterdir())
    else:
        export(model, adapter, tmp_path / "out", "peft")
