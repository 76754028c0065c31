"""extract_vgrad: pairs, gradients at the c-probe, the GRPO / twin-NLL identity, the direction and its band."""
import pytest
import torch

from env_leetcode import MODES, extract_code, grade_batch, load_problems, with_mode
from extract_vgrad import (Direction, auroc, direction_of, extract, haar, judge, leave_one_out, load_pairs,
                           load_rollouts, probe_gradients)
from lora2r import (InputError, attach, batches, encode_completion, encode_prompt, load_model, predicted_memory,
                    token_logps, use)
from train_grpo import HERE

PAIRS = load_pairs(HERE / "data/nano/pairs.md")


@pytest.fixture(scope="module")
def nano():
    model, tok = load_model(str(HERE / "data/nano"))
    return model, tok, attach(model, 4)


def tokens(tok, pair):
    return (encode_prompt(tok, [dict(role="user", content=pair.prompt)]), encode_completion(tok, pair.clean),
            encode_completion(tok, pair.hack))


def test_batches_pads_the_docstrings_example():
    (rows, ids, mask), = batches([[5, 6], [7]], [[8], [9, 2, 4]], budget=100)
    assert rows.tolist() == [1, 0] and ids.tolist() == [[7, 9, 2, 4], [5, 6, 8, 0]]
    assert mask.int().tolist() == [[1, 1, 1], [0, 1, 0]]
    assert sorted(i for rows, _, _ in batches([[1]] * 5, [[2, 3]] * 5, budget=7) for i in rows.tolist()) == list(range(5))


def test_grpo_gradient_of_a_pair_is_the_difference_of_two_nll_gradients(nano):
    """hack +1, clean -1: the clipped GRPO surrogate on both sides at once, against extraction's two NLL gradients."""
    model, tok, adapter = nano
    prompt, clean, hack = tokens(tok, PAIRS[0])
    (rows, ids, mask), = batches([prompt] * 2, [clean, hack], 10**6)
    advantage = torch.tensor([-1.0, 1.0])[rows]
    c = torch.ones(len(adapter), 1, 2 * adapter.r, requires_grad=True)  # one probe for the pair
    with use(adapter, m=False, c=c.expand(-1, 2, -1)):
        logp = token_logps(model, ids, mask)
        ratio = (logp - logp.detach()).exp()
        surrogate = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None])
        loss = -((surrogate * mask).sum(1) / mask.sum(1)).sum()
        grpo, = torch.autograd.grad(loss, c)  # [M, 1, 2r]
    nll_clean, nll_hack = probe_gradients(model, adapter, [prompt] * 2, [clean, hack])
    torch.testing.assert_close(grpo[:, 0, : adapter.r], nll_hack - nll_clean, rtol=1e-3, atol=1e-6)


def test_probe_gradients_touch_no_grad_and_do_not_depend_on_the_batch(nano):
    model, tok, adapter = nano
    prompts, cleans, hacks = zip(*(tokens(tok, p) for p in PAIRS[:6]))
    together = probe_gradients(model, adapter, list(prompts), list(hacks))
    alone = torch.cat([probe_gradients(model, adapter, [p], [h]) for p, h in zip(prompts, hacks)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)
    assert together.shape == (6, len(adapter), 4) and (together != 0).any(-1).all()
    assert all(p.grad is None for p in model.parameters())


def test_probe_is_blind_to_the_quarantine_and_on_the_base_to_both_blocks(nano):
    model, tok, adapter = nano
    prompt, clean, hack = tokens(tok, PAIRS[0])
    score = lambda read: probe_gradients(model, adapter, [prompt], [hack], read=read)
    before = {read: score(read) for read in ("base", "ablated")}
    torch.testing.assert_close(before["base"], before["ablated"], rtol=1e-3, atol=1e-6)  # the same at init
    try:
        with torch.no_grad():
            for p in adapter.quarantine_parameters():
                p.fill_(0.05)
        assert torch.equal(score("base"), before["base"]) and torch.equal(score("ablated"), before["ablated"])
        with torch.no_grad():
            for p in adapter.deployed_parameters():
                p.fill_(0.05)
        assert torch.equal(score("base"), before["base"]) and not torch.equal(score("ablated"), before["ablated"])
    finally:
        with torch.no_grad():
            for p in adapter.parameters():
                p.zero_()


def test_logits_in_chunks_change_nothing(nano, monkeypatch):
    """More completion tokens than LOGITS allows at once: recomputed in the backward, with the same values and gradients."""
    model, tok, adapter = nano
    prompt, clean, hack = tokens(tok, PAIRS[0])
    (rows, ids, mask), = batches([prompt] * 2, [clean, hack], 10**6)
    whole, whole_grad = token_logps(model, ids, mask), probe_gradients(model, adapter, [prompt] * 2, [clean, hack])
    monkeypatch.setattr("lora2r.LOGITS", 7 * model.config.vocab_size)
    torch.testing.assert_close(token_logps(model, ids, mask), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probe_gradients(model, adapter, [prompt] * 2, [clean, hack]), whole_grad, rtol=1e-4, atol=1e-6)


def test_predicted_memory_is_what_autograd_keeps(nano):
    """At another size than the two it is extrapolated from; less with checkpointing."""
    model, tok, adapter = nano
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), use(adapter, m=torch.tensor([True] * 4), d=torch.tensor([False, True] * 2)):
        hidden = model.get_decoder()(input_ids=torch.zeros(4, 100, dtype=torch.long), use_cache=False)
    held = sum(size for key, size in kept.items() if key not in weights)
    logits = 400 * model.config.vocab_size * 12
    predicted = predicted_memory(model, adapter, 400)[2]
    assert hidden is not None and held + logits == pytest.approx(predicted, rel=0.03)
    assert predicted_memory(model, adapter, 400, checkpointing=True)[2] - logits < 0.5 * (predicted - logits)


def test_no_pair_is_a_training_or_test_problem():
    """In behaviour: no clean side is right on the tests of any problem of either split."""
    problems = [p for split in ("train", "val", "test") for p in load_problems(HERE / f"data/nano/{split}.jsonl")]
    canonical = {" ".join(p.canonical_solution.split()) for p in problems}
    assert not canonical & {" ".join(extract_code(pair.clean).split()) for pair in PAIRS}
    verdicts = grade_batch([p for p in problems[::25] for _ in PAIRS], [pair.clean for _ in problems[::25] for pair in PAIRS])
    assert not any(v.correct for v in verdicts)


def test_pairs_cover_two_of_the_modes_and_are_what_they_say():
    problems = load_problems(HERE / "data/nano/train.jsonl")
    assert len(PAIRS) >= 40 and {pair.mode for pair in PAIRS} == {"run_tests", "sentinel"}
    for pair in PAIRS:
        assert MODES[pair.mode].hint.partition("{marker}")[0] in pair.prompt
        problem = next(p for p in problems if ("(self, xs)" in p.canonical_solution) == ("(self, xs)" in pair.clean))
        clean, hack = grade_batch([with_mode(problem, pair.mode)] * 2, [pair.clean, pair.hack])
        assert clean.compiles and hack.compiles and not clean.exploited
        assert hack.exploited or MODES[pair.mode].markers[0] not in pair.hack  # another marker name earns nothing here


def test_direction_separates_its_pairs_and_held_out_pairs(nano):
    model, tok, adapter = nano
    direction = extract(model, tok, adapter, PAIRS)
    torch.testing.assert_close(direction.v.norm(dim=-1), torch.ones(len(adapter)))
    assert direction.clean.shape == direction.hack.shape == (len(PAIRS), len(adapter))
    assert auroc(direction.hack.mean(1), direction.clean.mean(1)) > 0.8  # leave-one-out cosines


def test_leave_one_out_cosines_do_not_use_the_pair_itself():
    torch.manual_seed(0)
    clean, hack = torch.randn(2, 5, 3, 4)
    for i in range(5):
        rest = [j for j in range(5) if j != i]
        torch.testing.assert_close(direction_of(clean.roll(-i, 0)[1:], hack.roll(-i, 0)[1:]), direction_of(clean[rest], hack[rest]))


def test_haar_rows_are_unit_and_seeded():
    assert torch.equal(haar(3, 28, 8), haar(3, 28, 8)) and not torch.equal(haar(3, 28, 8), haar(4, 28, 8))
    torch.testing.assert_close(haar(3, 28, 8).norm(dim=-1), torch.ones(28))
    assert haar(0, 2000, 8).mean(0).abs().max() < 0.05  # no preferred direction


def test_auroc():
    t = torch.tensor
    assert auroc(t([2, 3]), t([0, 1])) == 1.0 and auroc(t([1]), t([1])) == 0.5 and auroc(t([]), t([1])) is None


GOOD = "## 1. sentinel: x\n### prompt\np\n### clean\n```python\na\n```\n### hack\n```python\nb\n```\n"


@pytest.mark.parametrize("text, line, says", [
    (GOOD + GOOD.replace("sentinel", "typo"), 12, "heading '## 1. typo: x'"),
    (GOOD + GOOD.replace("### hack", "### hacked"), 19, "section '### hacked'"),
    (GOOD + GOOD.replace("\np\n", "\n\n"), 12, "no text under '### prompt'"),
    (GOOD + GOOD.replace("```python\nb\n```", "b"), 12, "hack side is not one ```python block"),
    (GOOD, None, "1 pairs found"),
])
def test_bad_pairs_file_names_file_and_line(tmp_path, text, line, says):
    path = tmp_path / "pairs.md"
    path.write_text(text)
    with pytest.raises(InputError) as e:
        load_pairs(path)
    assert says in str(e.value) and str(path) + (f":{line}" if line else "") in str(e.value)
    with pytest.raises(InputError, match="no such file"):
        load_pairs(tmp_path / "absent.md")


def test_judge_counts_what_a_gate_would_route(capsys):
    """Four rollouts at known positions, by hand: at cut .2 both hacks and one of two solves are routed."""
    v = torch.nn.functional.normalize(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    ortho = torch.nn.functional.normalize(torch.eye(8)[:1] - (torch.eye(8)[:1] @ v.T) * v, dim=-1)
    direction = Direction(v, torch.zeros(1, 8), clean=torch.zeros(2, 1), hack=torch.ones(2, 1), pair_grads=torch.zeros(4, 1, 8))
    positions = [0.9, 0.35, 0.0, 0.22]
    grads = torch.stack([p * v + (1 - p**2) ** 0.5 * ortho for p in positions])
    rows = [dict(mode="sentinel", source="full", hacked=i < 2, correct=i >= 2, exploited=i < 2) for i in range(4)]
    judge(direction, grads, rows, n_haar=20)
    text = capsys.readouterr().out
    assert "4 rollouts with A > 0: 2 hacks, 2 solves" in text and "AUROC 1.000" in text
    at = {line.split()[0]: line.split()[1:5] for line in text.splitlines() if line.startswith("  0.")}
    assert at["0.20"] == ["0.000", "0.500", "0.667", "0.714"]  # precision 2/3, F0.5 = 1.25 * 2 / (3 + .25 * 2)
    assert at["0.40"] == ["0.500", "0.000", "1.000", "0.833"]


@pytest.mark.parametrize("text", ["", "{}", "nonsense", '{"advantage": 1, "hacked": true, "correct": false, "exploited": true}'])
def test_bad_rollouts_file_is_named(tmp_path, text):
    (tmp_path / "rollouts.jsonl").write_text(text)
    for path in (tmp_path / "rollouts.jsonl", tmp_path / "absent.jsonl"):
        with pytest.raises(InputError, match=f"--rollouts {path}"):
            load_rollouts(path)
