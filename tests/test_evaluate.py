"""evaluate_deploy: the sampler's log-probabilities, evaluation in its settings, intervals, errors."""
import json

import pytest
import torch

from env_leetcode import load_problems
from evaluate_deploy import Config, evaluate, format_table, main, read_run, wilson
from lora2r import InputError, attach, batches, encode_prompt, folded, generate, load_model, token_logps, use
from train_grpo import HERE


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


@pytest.mark.parametrize("quarantine", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samplers_logps_are_those_of_the_masked_policy(nano, quarantine, temperature):
    """Left-padded, cached, folded, shrinking batch on one side; right-padded, hooked, teacher-forced on the other."""
    model, tok, adapter, problems = nano
    prompts = [encode_prompt(tok, p.messages) for p in problems]
    assert len(set(map(len, prompts))) > 1, "no padding to test"
    with folded(adapter, quarantine=quarantine):
        completions, logps = generate(model, tok, prompts, [2] * 12, noise(24, 64), temperature)
    assert len({len(c) for c in completions}) > 1 and all(c[-1] == tok.eos_token_id or len(c) == 64 for c in completions)
    prompts = [p for p in prompts for _ in range(2)]
    with torch.no_grad(), use(adapter, m=quarantine):
        for rows, ids, mask in batches(prompts, completions, 4096):
            again = token_logps(model, ids, mask, temperature)
            for j, i in enumerate(rows.tolist()):
                torch.testing.assert_close(again[j, mask[j]], logps[i], rtol=1e-3, atol=1e-3)


def test_generate_is_seeded_and_top_k_1_is_greedy(nano):
    model, tok, adapter, problems = nano
    prompts = [encode_prompt(tok, p.messages) for p in problems[:4]]
    sample = lambda seed, k=0: generate(model, tok, prompts, [3] * 4, noise(12, 48, seed), 1.0, k)[0]
    assert sample(0) == sample(0) != sample(1)
    greedy = sample(0, 1)
    assert greedy == sample(1, 1) and greedy[0] == greedy[1] == greedy[2]


def test_a_rollout_depends_on_its_own_noise_only(nano):
    """Other rows, other paddings and other counts per prompt: the same rollouts."""
    model, tok, adapter, problems = nano
    prompts = [encode_prompt(tok, p.messages) for p in problems]
    u = noise(24, 48)
    together, logps = generate(model, tok, prompts, [2] * 12, u, 1.0)
    n = [0, 1, 3, 0]
    rows = [2, 4, 5, 5]  # of `together`
    some, some_logps = generate(model, tok, prompts[:4], n, u[[2, 4, 5, 5]], 1.0)
    assert some[:3] == [together[i] for i in rows[:3]] and some[3] == some[2]
    torch.testing.assert_close(some_logps[0], logps[2], rtol=1e-4, atol=1e-4)
    assert generate(model, tok, prompts, [0] * 12, u[:0], 1.0) == ([], [])


def test_sampled_tokens_follow_the_models_probabilities(nano):
    """Frequencies of the first token over an even grid of noise, against softmax(logits / T)."""
    model, tok, adapter, problems = nano
    prompt = encode_prompt(tok, problems[0].messages)
    grid = (torch.arange(4000) + 0.5)[:, None] / 4000
    for temperature, top_k in ((1.0, 0), (3.0, 0), (3.0, 5)):
        first = torch.tensor([ids[0] for ids in generate(model, tok, [prompt], [4000], grid, temperature, top_k)[0]])
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)  # [V]
        if top_k:
            p = torch.where(p >= p.topk(top_k).values[-1], p, 0) / p.topk(top_k).values.sum()
        torch.testing.assert_close(first.bincount(minlength=len(p)) / 4000, p, rtol=0, atol=1 / 4000)


def test_evaluate_deployed_ignores_the_quarantine_and_full_does_not(nano):
    model, tok, adapter, problems = nano
    deployed, full = (evaluate(model, tok, adapter, problems, setting, 2) for setting in ("deployed", "full"))
    with torch.no_grad():
        for p in adapter.quarantine_parameters():
            p.mul_(30)
    assert evaluate(model, tok, adapter, problems, "deployed", 2) == deployed
    assert evaluate(model, tok, adapter, problems, "full", 2) != full
    assert deployed["all"]["n"] == 24 and sum(t["n"] for m, t in deployed.items() if m != "all") == 24


def test_wilson_interval():
    low, high = wilson(0.0, 100)
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(0.037, abs=1e-3)
    assert wilson(0.5, 100) == pytest.approx((0.404, 0.596), abs=1e-3)


def test_table_names_arm_seed_and_modes():
    cell = dict(problems=10, n=20, solve=0.5, hack=0.25, exploit=0.3, compiles=1.0)
    text = format_table([("none", 3, {"deployed, trained": {"all": cell, "sentinel": cell}})])
    assert "hack sentinel" in text and "none" in text and "0.250 [0.08, 0.56]" in text


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
