"""extract_vgrad: pairs, gradients at the c-probe, the GRPO / twin-NLL identity, the direction and its band."""
import gzip
import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import tensor as t

import extract_vgrad
from env_leetcode import MODES, extract_code, grade_batch, load_problems, with_mode
from extract_vgrad import (Config, Direction, Pair, Reading, apart, auroc, by_quartile, compare, contrast, cosines,
                           direction_of, extract, f_half, features, haar, haar_scores, held_out, judge, load_demos,
                           load_pairs, load_rollouts, main, oracle, read_rollouts, report, whole, windows)
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
    (rows, ids, mask, _), = batches([[5, 6], [7]], [[8], [9, 2, 4]], budget=100)
    assert rows.tolist() == [1, 0] and ids.tolist() == [[7, 9, 2, 4], [5, 6, 8, 0]]
    assert mask.int().tolist() == [[1, 1, 1], [0, 1, 0]]
    parts = [(rows.tolist(), list(ids.shape)) for rows, ids, _, _ in batches([[1]] * 5, [[2, 3]] * 5, budget=7)]
    assert parts == [([0, 1], [2, 3]), ([2, 3], [2, 3]), ([4], [1, 3])]  # at most 7 padded tokens each
    parts = [rows.tolist() for rows, _, _, _ in batches([[1]] * 3, [[2], [2] * 9, [2]], budget=20)]
    assert parts == [[1, 0], [2]]  # 20 tokens, as long as the longest row


def test_rollouts_that_share_a_prompt_and_a_label_go_by_themselves_where_it_pays(monkeypatch):
    """Prompt a [4 tokens] five times, b once. Three rows of a save 8 tokens, two save 4."""
    a, b = [1, 2, 3, 4], [1, 2, 3, 5]
    prompts, completions = [a, a, b, a, a, a], [[6] * n for n in (1, 2, 9, 3, 2, 1)]

    def parts(budget, labels=None):
        return [(rows.tolist(), shared) for rows, _, _, shared in batches(prompts, completions, budget, labels)]

    assert parts(1000) == [([2, 3, 1, 4, 0, 5], 0)], "by default it does not pay"
    monkeypatch.setattr("lora2r.SHARED", 7)
    assert parts(1000) == [([3, 1, 4, 0, 5], 3), ([2], 0)]
    assert parts(1000, [0, 2, 0, 0, 2, 0]) == [([3, 0, 5], 3), ([2, 1, 4], 0)]
    assert parts(15) == [([3, 1], 3), ([4, 0], 3), ([5], 3), ([2], 0)]  # at most 15 tokens, as if none were shared
    monkeypatch.setattr("lora2r.SHARED", 8)
    assert parts(1000, [0, 2, 0, 0, 2, 0]) == [([2, 3, 1, 4, 0, 5], 0)]


@pytest.mark.parametrize("how", [
    dict(), dict(window=3), dict(read="ablated"), dict(read="full", window=2), dict(tokens="all"),
    dict(score="activation"), dict(score="activation", window=3), dict(score="surprise", window=3),
    dict(score="length")], ids=str)
def test_a_prompt_that_is_encoded_once_changes_nothing_that_a_gate_reads(nano, stirred, monkeypatch, how):
    model, tok, adapter = nano
    stirred[-1]("deployed", 0.02), stirred[-1]("quarantine", 0.01)
    pairs = [tokens(tok, p) for p in PAIRS[:2]]
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    sides = [side for _, *both in pairs for side in both]
    apart = features(model, adapter, prompts, sides, **how)
    monkeypatch.setattr("lora2r.SHARED", 0)
    encoded = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda decoder, args, kwargs: encoded.append(kwargs["input_ids"].numel()), with_kwargs=True)
    together = features(model, adapter, prompts, sides, **how)
    hook.remove()
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5, equal_nan=True)
    if how.get("score") != "length":
        assert (len(encoded) == 4) == (how.get("tokens") != "all"), "each prompt once, and the answers to it"


def test_a_completion_ends_its_turn_and_a_prompt_opens_the_assistants(nano):
    """What the model was trained on: the end-of-turn token is a token of the completion, and the roles are marked."""
    _, tok, _ = nano
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(encode_prompt(tok, [dict(role="user", content="hi")])) == text
    assert tok.decode(encode_completion(tok, "x = 1")) == "x = 1<|im_end|>"


def test_grpo_gradient_of_a_pair_is_the_difference_of_two_nll_gradients(nano):
    """hack +1, clean -1: the clipped GRPO surrogate on both sides at once, against extraction's two NLL gradients."""
    model, tok, adapter = nano
    prompt, clean, hack = tokens(tok, PAIRS[0])
    (rows, ids, mask, _), = batches([prompt] * 2, [clean, hack], 10**6)
    advantage = torch.tensor([-1.0, 1.0])[rows]
    c = torch.ones(len(adapter), 1, 2 * adapter.r, requires_grad=True)  # one probe for the pair
    with use(adapter, m=False, c=c.expand(-1, 2, -1)):
        logp = token_logps(model, ids, mask)
        ratio = (logp - logp.detach()).exp()
        surrogate = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None])
        loss = -((surrogate * mask).sum(1) / mask.sum(1)).sum()
        grpo, = torch.autograd.grad(loss, c)  # [M, 1, 2r]
    nll_clean, nll_hack = features(model, adapter, [prompt] * 2, [clean, hack], temperature=1.0, tokens="all")
    torch.testing.assert_close(grpo[:, 0, : adapter.r], nll_hack - nll_clean, rtol=1e-3, atol=1e-6)


def test_probe_gradients_touch_no_grad_and_do_not_depend_on_the_batch(nano):
    model, tok, adapter = nano
    prompts, cleans, hacks = zip(*(tokens(tok, p) for p in PAIRS[:6]))
    together = features(model, adapter, list(prompts), list(hacks))
    alone = torch.cat([features(model, adapter, [p], [h]) for p, h in zip(prompts, hacks)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)
    assert together.shape == (6, len(adapter), 4) and (together != 0).any(-1).all()
    for read in ("base", "ablated", "full"):
        features(model, adapter, [prompts[0]], [hacks[0]], read=read)
        assert all(p.grad is None for p in model.parameters()), read


def test_at_a_high_temperature_the_gradient_is_that_of_the_tokens_logits(nano):
    """As p tends to uniform, p - its one-hot tends to 1 / V - its one-hot: each token's logit above the mean logit."""
    model, tok, adapter = nano
    prompt, clean, hack = tokens(tok, PAIRS[0])
    ids = torch.tensor([prompt + hack])
    c = torch.ones(len(adapter), 1, 2 * adapter.r, requires_grad=True)
    with use(adapter, c=c, off=True):
        logits = model(ids).logits[0, len(prompt) - 1 : -1]  # [T, V]
        above = sum(row[token] - row.mean() for row, token in zip(logits, hack))
        expected, = torch.autograd.grad(-above / len(hack), c)
    hot = 1e4 * features(model, adapter, [prompt], [hack], temperature=1e4, tokens="all")
    torch.testing.assert_close(hot[0], expected[:, 0, : adapter.r], rtol=1e-2, atol=1e-4)


def test_what_each_score_reads(nano):
    """One rollout at a time, from the model's own outputs: hidden states after each layer, NLL, number of tokens."""
    model, tok, adapter = nano
    prompts, cleans, hacks = zip(*(tokens(tok, p) for p in PAIRS[:3]))
    read = {score: features(model, adapter, list(prompts), list(hacks), 150, score)
            for score in ("gradient", "activation", "surprise", "length")}
    assert torch.equal(read["gradient"], features(model, adapter, list(prompts), list(hacks), 150))
    for row, (prompt, hack) in enumerate(zip(prompts, hacks)):
        with torch.no_grad(), use(adapter, off=True):
            out = model(torch.tensor([prompt + hack]), output_hidden_states=True)
        own = slice(len(prompt) - 1, -1)  # the positions that predict the completion
        for layer, states in enumerate(out.hidden_states[1:]):
            torch.testing.assert_close(read["activation"][row, layer], states[0, own].mean(0), rtol=1e-3, atol=1e-4)
        logps = torch.log_softmax(out.logits[0, own], -1)
        nll = -sum(logp[token] for logp, token in zip(logps, hack)) / len(hack)
        torch.testing.assert_close(read["surprise"][row], nll.view(1, 1), rtol=1e-3, atol=1e-4)
        assert read["length"][row].tolist() == [[len(hack)]]
    assert read["activation"].shape == (3, 4, 128) and read["surprise"].shape == read["length"].shape == (3, 1, 1)


def test_windows_average_over_neighbouring_tokens_of_the_completion():
    """Completions of 3 and 1 tokens, after prompts of different length."""
    is_completion = t([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    nan = float("nan")
    whole = t([[[0, 1 / 3, 1 / 3, 1 / 3]], [[0, 0, 1, 0]]])
    torch.testing.assert_close(windows(is_completion), whole)
    torch.testing.assert_close(windows(is_completion, 3), whole.expand(2, 2, 4))
    two = t([[[0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]], [[0, 0, 1, 0], [nan] * 4]])
    torch.testing.assert_close(windows(is_completion, 2), torch.cat([whole, two], 1), equal_nan=True)


@pytest.mark.parametrize("read", ["base", "ablated"])
def test_a_windows_gradient_is_the_mean_of_what_its_tokens_add(stirred, read):
    """Against a probe that sits at one token of one rollout alone; and each score's windows of a whole completion."""
    model, tok, adapter, fill = stirred
    fill("deployed", 0.01)
    pairs = [tokens(tok, p) for p in PAIRS[:2]]
    prompts, sides = [p for p, _, _ in pairs], [pairs[0][1], pairs[1][2]]
    x = features(model, adapter, prompts, sides, window=3, read=read, temperature=2.0)  # [2, 1 + W, M, r]
    assert x.shape[1] == 1 + max(map(len, sides)) - 2 and [row.isnan().any().item() for row in x] == [False, True]
    how = dict(off=True) if read == "base" else dict(m=False)
    for row, start in ((0, 0), (1, 4)):
        ids = torch.tensor([prompts[row] + sides[row]])
        own = torch.arange(ids.shape[1] - 1)[None] >= len(prompts[row]) - 1  # [1, T-1]
        alone = []
        for token in range(start, start + 3):
            at = torch.zeros(ids.shape, dtype=torch.bool)
            at[0, len(prompts[row]) - 1 + token] = True
            c = torch.ones(len(adapter), 1, 2 * adapter.r, requires_grad=True)
            with use(adapter, c=c, at=at, **how):
                nll = -token_logps(model, ids, own, 2.0).sum()
                alone.append(torch.autograd.grad(nll, c)[0][:, 0, : adapter.r])
        torch.testing.assert_close(x[row, 1 + start], sum(alone) / 3, rtol=1e-3, atol=1e-6)
    for score in ("gradient", "activation", "surprise", "length"):
        all_of_it = features(model, adapter, prompts, sides, score=score, window=1000)
        alone = features(model, adapter, prompts, sides, score=score)
        torch.testing.assert_close(all_of_it, alone[:, None].expand_as(all_of_it), rtol=1e-3, atol=1e-5)


def test_a_share_is_that_of_the_window_whose_mean_cosine_is_highest_and_the_rest_is_the_wholes():
    """Two modules. Of the first rollout's windows (1, -1) has the mean 0, (.6, .8) has .7; the second has but one,
    whose (0, 0) is lower than the whole's (.6, 0)."""
    nan = float("nan")
    x = t([[[[0, 2.0], [0, 1]], [[1.0, 0], [0, -1]], [[3, 4], [3, 4]]],
           [[[3, 4.0], [-5, 0]], [[0, -2.0], [5, 0]], [[nan, nan]] * 2]])
    v, each = t([[1.0, 0], [0, 1]]), t([[[1.0, 0], [0, -1]], [[0, 1.0], [1, 0]]])
    torch.testing.assert_close(cosines(x, v), t([[0, 1.0], [0.6, 0]]))
    torch.testing.assert_close(cosines(x, v, 1.0), t([[0.6, 0.8], [0, 0]]))
    torch.testing.assert_close(cosines(x, v, 0.25), t([[0.15, 0.95], [0.45, 0]]))
    torch.testing.assert_close(cosines(x, each, 1.0), t([[1.0, 1], [-1, 1]]))
    assert torch.equal(whole(x), x[:, 0]) and torch.equal(whole(x[:, 0]), x[:, 0])


@pytest.fixture
def stirred(nano):
    """The model with both blocks away from init: fill(block, value) sets one; put back afterwards."""
    model, tok, adapter = nano

    @torch.no_grad()
    def fill(block, value):
        for p in getattr(adapter, f"{block}_parameters")():
            p.fill_(value)

    yield model, tok, adapter, fill
    fill("deployed", 0)
    fill("quarantine", 0)


def test_what_each_read_sees(stirred):
    """base: neither block. ablated: the deployed one. full: both."""
    model, tok, adapter, fill = stirred
    prompt, clean, hack = tokens(tok, PAIRS[0])

    def score(read):
        return features(model, adapter, [prompt], [hack], read=read)

    before = score("base")
    for read in ("ablated", "full"):
        torch.testing.assert_close(score(read), before, rtol=1e-3, atol=1e-6)  # the same at init
    fill("quarantine", 0.05)
    ablated, full = score("ablated"), score("full")
    torch.testing.assert_close(ablated, before, rtol=1e-3, atol=1e-6)
    assert torch.equal(score("base"), before) and not torch.allclose(full, before, rtol=0.1)
    fill("deployed", 0.05)
    assert torch.equal(score("base"), before)
    assert not torch.allclose(score("ablated"), ablated, rtol=0.1) and not torch.allclose(score("full"), full, rtol=0.1)


def test_extraction_never_sees_the_quarantine(stirred):
    """--read full scores rollouts with both blocks, but its direction is that of --read ablated."""
    model, tok, adapter, fill = stirred
    fill("deployed", 0.02)
    ablated = extract(model, tok, adapter, PAIRS[:3], read="ablated")
    fill("quarantine", 0.05)
    for read in ("ablated", "full"):
        assert torch.equal(extract(model, tok, adapter, PAIRS[:3], read=read).pair_features, ablated.pair_features)
    base = extract(model, tok, adapter, PAIRS[:3], read="base")
    assert not torch.allclose(base.pair_features, ablated.pair_features, rtol=0.1)


def test_extract_puts_pairs_gradients_where_they_belong(nano):
    """Clean sides first, each beside its own prompt after the system message; centre is the mean of all sides or 0."""
    model, tok, adapter = nano
    system = [dict(role="system", content="be brief")]
    direction = extract(model, tok, adapter, PAIRS[:3], system)
    for p, pair in enumerate(PAIRS[:3]):
        prompt = encode_prompt(tok, [*system, dict(role="user", content=pair.prompt)])
        for row, text in ((p, pair.clean), (3 + p, pair.hack)):
            alone = features(model, adapter, [prompt], [encode_completion(tok, text)])[0]
            torch.testing.assert_close(direction.pair_features[row], alone, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(direction.centre, direction.pair_features.sum(0) / 6)
    clean, hack = direction.pair_features[:3], direction.pair_features[3:]
    torch.testing.assert_close(direction.v, direction_of(clean, hack))
    others = direction_of(clean[1:], hack[1:])  # leave-one-out, of pair 0
    torch.testing.assert_close(direction.clean[0], cosines(clean[:1] - direction.centre, others)[0])
    torch.testing.assert_close(direction.hack[0], cosines(hack[:1] - direction.centre, others)[0])
    raw = extract(model, tok, adapter, PAIRS[:3], system, centre=False)
    assert not raw.centre.any() and torch.equal(raw.v, direction.v)
    torch.testing.assert_close(raw.clean[0], cosines(clean[:1], others)[0])
    by_length = extract(model, tok, adapter, PAIRS[:3], system, equal_pairs=False)
    torch.testing.assert_close(by_length.v, direction_of(clean, hack, False))
    others = direction_of(clean[1:], hack[1:], False)
    torch.testing.assert_close(by_length.hack[0], cosines(hack[:1] - direction.centre, others)[0])
    how = dict(score="activation", window=0)
    hidden = [extract(model, tok, adapter, PAIRS[:3], equal_pairs=equal, **how).v for equal in (True, False)]
    assert torch.equal(*hidden), "what else is read has plain means"
    mixed = [extract(model, tok, adapter, PAIRS[::4], equal_pairs=equal).unseen[0.5][1] for equal in (True, False)]
    assert (mixed[0] - mixed[1]).abs().max() > 0.01, "modes that are held out, too"


def test_logits_in_chunks_change_nothing(nano, monkeypatch):
    """More completion tokens than LOGITS allows at once: at most 7 rows of logits at a time, computed again in the
    backward, with the same values and gradients."""
    model, tok, adapter = nano
    prompt, clean, hack = tokens(tok, PAIRS[0])
    (rows, ids, mask, _), = batches([prompt] * 2, [clean, hack], 10**6)
    whole, whole_grad = token_logps(model, ids, mask), features(model, adapter, [prompt] * 2, [clean, hack])
    monkeypatch.setattr("lora2r.LOGITS", 7 * model.config.vocab_size)
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda head, x, y: rows.append(len(y)))
    cut = token_logps(model, ids, mask)
    assert max(rows) == 7 and sum(rows) == mask.sum()
    cut.sum().backward()
    assert sum(rows) == 2 * mask.sum()
    hook.remove()
    for p in adapter.parameters():
        p.grad = None
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    cut_grad = features(model, adapter, [prompt] * 2, [clean, hack])
    torch.testing.assert_close(cut_grad, whole_grad, rtol=1e-4, atol=1e-6)


def test_predicted_memory_is_what_autograd_keeps(nano):
    """At another size than the two it is extrapolated from; less with checkpointing."""
    model, tok, adapter = nano
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    masks = dict(m=torch.tensor([True] * 4), d=torch.tensor([False, True] * 2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept), use(adapter, **masks):
        hidden = model.get_decoder()(input_ids=torch.zeros(4, 100, dtype=torch.long), use_cache=False)
    held = sum(size for key, size in kept.items() if key not in weights)
    logits = 400 * model.config.vocab_size * 12
    frozen, trained, predicted = predicted_memory(model, adapter, 400)
    sizes = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}  # tied ones once
    assert frozen >= 4 * sum(sizes.values()) and frozen == pytest.approx(4 * sum(sizes.values()), rel=0.1)
    per_block = sum(2 * 4 * (x.base.in_features + x.base.out_features) for x in adapter.modules.values())
    assert trained == 4 * 4 * per_block  # r = 4 of two blocks; value, gradient and two moments in float32
    assert hidden is not None and held + logits == pytest.approx(predicted, rel=0.03)
    assert predicted_memory(model, adapter, 400, checkpointing=True)[2] - logits < 0.5 * (predicted - logits)


def test_no_pair_is_a_training_or_test_problem():
    """In behaviour: no clean side is right on the tests of any problem of either split."""
    problems = [p for split in ("train", "val", "test") for p in load_problems(HERE / f"data/nano/{split}.jsonl")]
    canonical = {" ".join(p.canonical_solution.split()) for p in problems}
    assert not canonical & {" ".join(extract_code(pair.clean).split()) for pair in PAIRS}
    some = [(problem, pair) for problem in problems[::80] for pair in PAIRS]
    verdicts = grade_batch([problem for problem, _ in some], [pair.clean for _, pair in some])
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


# -------------------------------------------------------------------------------- the direction, by hand
def test_cosines_are_per_module_and_blind_to_length():
    """Two rollouts, two modules: 3-4-5 triangles."""
    x = t([[[3.0, 4.0], [0.0, -2.0]], [[-30.0, 40.0], [5.0, 0.0]]])  # [G, M, r]
    v = t([[1.0, 0.0], [0.0, 1.0]])  # [M, r]
    torch.testing.assert_close(cosines(x, v), t([[0.6, -1.0], [-0.6, 0.0]]))
    each = torch.stack([v, v.flip(0)])  # [G, M, r]
    torch.testing.assert_close(cosines(x, each), t([[0.6, -1.0], [0.8, 1.0]]))
    torch.testing.assert_close(cosines(t([[[0.5]], [[-3.0]]]), t([[-1.0]])), t([[-0.5], [3.0]]))  # a lone number


def test_direction_is_the_mean_of_differences_normalised_per_pair_and_module():
    """(3, 0) and (0, 4) have the same say, and point to (1, 1) / sqrt(2); by length they point to (3, 4) / 5. It points
    to the hack."""
    clean = t([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])  # [P, M, r]
    hack = clean + t([[[3.0, 0.0], [0.0, -1.0]], [[0.0, 4.0], [0.0, -9.0]]])
    torch.testing.assert_close(direction_of(clean, hack), t([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))
    torch.testing.assert_close(direction_of(clean, hack, equal_pairs=False), t([[0.6, 0.8], [0.0, -1.0]]))


def test_held_out_leaves_out_a_pair_and_its_group():
    """Clean sides at 0, hack sides (3, 0), (0, 4), (-3, 0): without the first the direction is (-3, 4) / 5, without the
    last (3, 4) / 5; without the first two, a group, it is (-1, 0). With a say for each pair alike (-1, 1) and (1, 1),
    over sqrt(2). A pair's own gradient, be it huge, moves the others' directions and not its own."""
    x = t([[[0.0, 0.0]]] * 3 + [[[3.0, 0.0]], [[0.0, 4.0]], [[-3.0, 0.0]]])
    torch.testing.assert_close(held_out(x, torch.zeros(1, 2), range(3))[1][[0, 2]], t([[-(0.5**0.5)]] * 2))
    clean, hack = held_out(x, torch.zeros(1, 2), range(3), equal_pairs=False)
    torch.testing.assert_close(clean, torch.zeros(3, 1))
    torch.testing.assert_close(hack[[0, 2]], t([[-0.6], [-0.6]]))
    clean, hack = held_out(x, t([[0.0, -1.0]]), ["sentinel", "sentinel", "run_tests"], equal_pairs=False)
    torch.testing.assert_close(hack, t([[-3 / 10**0.5], [0.0], [-1 / 10**0.5]]))
    torch.testing.assert_close(clean, t([[0.0], [0.0], [0.8]]))
    changed = x.clone()
    changed[5] = t([[7.0, -1e6]])
    before, after = (held_out(features, torch.zeros(1, 2), range(3))[1] for features in (x, changed))
    assert after[2] != before[2] and not torch.allclose(after[:2], before[:2], atol=0.1)
    v = [direction_of(features[:2], features[3:5]) for features in (x, changed)]
    assert torch.equal(*v), "the last pair's own direction is of the others alone"


def test_sides_lie_apart_by_their_means_in_standard_deviations():
    """Means over modules: clean 0, 2, 4 (mean 2, deviation 2), hack 7, 8, 9 (8, 1): 6 / 3."""
    clean, hack = t([[-1.0, 1.0], [2.0, 2.0], [3.0, 5.0]]), t([[7.0, 7.0], [8.0, 8.0], [9.0, 9.0]])
    assert apart(clean, hack) == pytest.approx(2.0) and apart(hack, clean) == pytest.approx(-2.0)


def test_of_wordys_gradients_half_is_read_whole_and_half_in_five_tokens():
    """Where the pairs do not tell. Unless a window is asked for, no pair shows another cheat, or the prompt is read,
    which no window holds."""
    pairs = load_pairs(HERE / "data/wordy/pairs.md")[::4]
    model, tok = load_model(str(HERE / "data/wordy"))
    adapter = attach(model, 8)
    modes = [pair.mode for pair in pairs]
    d = extract(model, tok, adapter, pairs)
    assert (d.window, d.share, set(d.unseen), d.modes) == (5, 0.5, {0.0, 0.5, 1.0}, modes)
    for share, sides in d.unseen.items():
        by_others = held_out(d.pair_features, d.centre, modes, share=share)
        assert all(torch.equal(*both) for both in zip(sides, by_others))
    assert "answers read half whole, half in 5 tokens (modes that are held out lie apart by " in d.summary()
    for asked, share, read in ((0, 0.0, "whole"), (4, 1.0, "in 4 tokens")):
        told = extract(model, tok, adapter, pairs, window=asked)
        assert (told.window, told.share, set(told.unseen)) == (asked, share, {share})
        torch.testing.assert_close(told.v, d.v, rtol=1e-3, atol=1e-5)  # that of whole answers
        assert f"answers read {read} (modes" in told.summary()
    one = extract(model, tok, adapter, [pair for pair in pairs if pair.mode == "run_tests"])
    prompt_too = extract(model, tok, adapter, pairs, tokens="all")
    lone_number = extract(model, tok, adapter, pairs, score="surprise")
    for found in (one, prompt_too, lone_number):
        assert (found.window, found.share) == (0, 0.0) and found.pair_features.dim() == 3
    assert not one.unseen and one.summary().endswith("answers read whole") and set(prompt_too.unseen) == {0.0}


@pytest.mark.parametrize("score, world, window", [
    ("activation", "nano", 0), ("activation", "wordy", 5), ("gradient", "nano", 0)])
def test_pairs_of_other_modes_tell_how_answers_are_to_be_read(score, world, window):
    """In nano a cheat is a stub, which the whole answer shows; in wordy a line. Each number is that of a reading that
    is told its window."""
    pairs = load_pairs(HERE / f"data/{world}/pairs.md")
    model, tok = load_model(str(HERE / "data" / world))
    adapter = attach(model, 8)
    chosen = extract(model, tok, adapter, pairs, score=score)
    assert (chosen.window, chosen.share, set(chosen.unseen)) == (window, float(window > 0), {0.0, 0.5, 1.0})
    for size in (0, 5):
        told = extract(model, tok, adapter, pairs, score=score, window=size)
        assert told.window == size and set(told.unseen) == {told.share}
        for sides in zip(told.unseen[told.share], chosen.unseen[told.share]):
            torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-5)
        if size == window:
            torch.testing.assert_close(told.hack, chosen.hack, rtol=1e-3, atol=1e-5)
            assert told.pair_features.shape == chosen.pair_features.shape


@pytest.mark.parametrize("score, whole_apart, tokens_apart, share", [
    ("gradient", 1.0, 0.79, 0.0), ("gradient", 1.0, 0.81, 0.5), ("gradient", 0.81, 1.0, 0.5),
    ("gradient", 0.79, 1.0, 1.0), ("gradient", 0.1, -0.05, 0.5), ("gradient", -0.05, 0.1, 0.5),
    ("activation", 1.0, 0.79, 0.0), ("activation", 1.0, 0.81, 1.0), ("activation", 0.1, -0.05, 1.0),
    ("activation", 0.5, 0.9, 1.0)])
def test_a_reading_is_preferred_if_it_holds_held_out_modes_further_apart_by_a_margin(
        nano, monkeypatch, score, whole_apart, tokens_apart, share):
    """Of two distances near zero one is soon twice the other: that is noise. Where the pairs do not tell, half of a
    gradient is the whole's; hidden states are read in tokens."""
    model, tok, adapter = nano
    distances = Mock(side_effect=(whole_apart, tokens_apart))
    monkeypatch.setattr(extract_vgrad, "apart", distances)
    found = extract(model, tok, adapter, PAIRS[::4], score=score)
    assert (found.share, found.window) == (share, 5 if share else 0)
    compared = [args[0] for args, _ in distances.call_args_list]
    assert all(map(torch.equal, compared, (found.unseen[0][0], found.unseen[1][0])))


def direction(clean, hack, v=((1.0, 0.0),), held_out=((0.0,), (0.0,)), centre=0.0, modes=("sentinel",)):
    """A Direction with pair gradients [P, M, r], held-out cosines [P, M] and modes [P]."""
    clean, hack = torch.tensor(clean), torch.tensor(hack)
    return Direction(torch.tensor(v), torch.full(clean.shape[1:], centre), *map(torch.tensor, held_out),
                     torch.cat([clean, hack]), modes=list(modes))


def at(*cosine):
    """Gradients [P, 1, 2] whose cosines to (1, 0) are those."""
    return [[[10 * x, 10 * (1 - x * x) ** 0.5]] for x in cosine]


def test_band_of_gate_batch_is_the_75th_percentile_per_module():
    """Of five numbers the second largest; neither the median nor the mean."""
    low, high = direction(at(-0.9, -0.6, 0.0, -0.8, 0.8), at(0.6, 0.8, -0.6, 0.9, 0.0)).band("batch")
    torch.testing.assert_close(low, t([0.0]))
    torch.testing.assert_close(high, t([0.8]))
    two = torch.cat([torch.tensor(at(0, 0, 0, 0.6, 1.0)), torch.tensor(at(0, 0, 0, 0.8, 1.0)).flip(2)], 1).tolist()
    low, high = direction(two, two, v=((1.0, 0.0), (0.0, 1.0))).band("batch")
    torch.testing.assert_close(low, t([0.6, 0.8]))


def test_band_of_gate_pairs_is_the_mean_held_out_cosine_over_all_modules():
    held_out = ((0.0, -0.5), (-0.1, -0.2)), ((0.9, 0.5), (0.8, 0.2))
    low, high = direction(at(0, 0), at(1, 1), held_out=held_out).band("pairs")
    assert (low.item(), high.item()) == (pytest.approx(-0.2), pytest.approx(0.6))


def test_the_cut_is_as_many_standard_deviations_from_either_mean():
    """Hack sides, at their mean of 4 -+ 3, vary three times as much as the clean ones, at 0 -+ 1; both hold modules
    that vary in opposite directions, and that the mean over modules leaves out."""
    d = direction(at(0, 0), at(1, 1), held_out=(((-6.0, 4.0), (6.0, -4.0)), ((-2.0, 4.0), (10.0, 4.0))))
    assert d.cut() == pytest.approx(0.25)
    same = direction(at(0, 0), at(1, 1), held_out=(((0.0,), (0.0,)), ((1.0,), (1.0,))))
    assert same.cut() == pytest.approx(0.5), "no spread on either side: half way"


def test_the_cut_lies_between_the_sides_of_modes_that_were_held_out():
    """Of the band 0 to 4; by other modes' pairs the clean sides lie at 1 -+ 1, the hack ones at 2 -+ 3: cosine 1.25."""
    d = direction(at(0, 0), at(1, 1), held_out=(((-1.0,), (1.0,)), ((3.0,), (5.0,))))
    assert d.cut() == pytest.approx(0.5)
    d = replace(d, share=0.5, unseen={0.5: (t([[0.0], [2.0]]), t([[-1.0], [5.0]])), 0.0: (t([[9.0]]), t([[9.0]]))})
    assert d.cut() == pytest.approx(1.25 / 4)
    assert not d.replaced(t([[0.0, 1.0]])).unseen, "of pairs of another direction they say nothing"


def test_position_is_0_at_the_lower_and_1_at_the_upper_edge():
    """Gate pairs: the mean cosine, placed in one band. Gate batch: placed per module, pooled afterwards."""
    both = direction(at(0.0, 0.0), at(0.8, 0.8), held_out=(((0.2,), (0.2,)), ((0.6,), (0.6,))))
    grads = torch.tensor(at(0.2, 0.6, 0.3, -0.2, 1.0))
    torch.testing.assert_close(both.position(grads, "pairs"), t([0.0, 1.0, 0.25, -1.0, 2.0]), rtol=0, atol=1e-5)
    grads = torch.tensor(at(0.0, 0.8, 0.6, -0.8))
    torch.testing.assert_close(both.position(grads, "batch"), t([0.0, 1.0, 0.75, -1.0]), rtol=0, atol=1e-5)


def test_position_pools_modules_and_leaves_out_those_whose_band_is_inverted():
    """Module 0 has the band 0 to 0.8, module 1 the band 0 to 0.6, module 2 an inverted one: a rollout at 0.4 of the
    first's and all of the second's is at 0.7."""
    def three(a, b, c):
        return [[x[0], y[0], z[0]] for x, y, z in zip(at(a, a), at(b, b), at(c, c))]

    d = direction(three(0.0, 0.0, 0.8), three(0.8, 0.6, 0.0), v=((1.0, 0.0),) * 3,
                  held_out=(((0.0,) * 3,) * 2, ((0.8, 0.6, -0.5),) * 2))
    rollout = torch.tensor(three(0.32, 0.6, 1.0)[:1])
    torch.testing.assert_close(d.position(rollout, "batch"), t([0.7]), rtol=0, atol=1e-5)
    # gate pairs pools cosines, over all modules: (0.32 + 0.6 + 1.0) / 3 between 0 and 0.3
    torch.testing.assert_close(d.position(rollout, "pairs"), t([0.64 / 0.3]), rtol=0, atol=1e-4)


def test_gradients_are_centred_before_their_cosine():
    """(4, 5) less (1, 1) is (3, 4)."""
    d = direction([[[1.0, 1.0]]], [[[4.0, 5.0]]], centre=1.0, v=((1.0, 0.0),))
    torch.testing.assert_close(d.cosines(t([[[4.0, 5.0]]])), t([[0.6]]))
    torch.testing.assert_close(d.cosines_to(t([[0.0, 1.0]])), t([[0.0], [0.8]]))


def test_a_replaced_direction_takes_its_band_from_the_same_pairs():
    """A placebo: cosines of the clean and of the hack sides to the other v, not those to v_grad."""
    real = direction([[[3.0, 4.0]], [[4.0, 3.0]]], [[[0.0, 1.0]], [[1.0, 0.0]]], held_out=(((0.0,), (0.0,)),) * 2)
    real = replace(real, window=5, share=0.5)
    placebo = real.replaced(t([[0.0, 1.0]]))
    assert (placebo.window, placebo.share) == (5, 0.5), "it reads as v_grad does"
    torch.testing.assert_close(placebo.v, t([[0.0, 1.0]]))
    torch.testing.assert_close(placebo.clean, t([[0.8], [0.6]]))
    torch.testing.assert_close(placebo.hack, t([[1.0], [0.0]]))
    assert [x.item() for x in placebo.band("pairs")] == pytest.approx([0.7, 0.5])
    assert torch.equal(placebo.pair_features, real.pair_features) and torch.equal(placebo.centre, real.centre)


def test_haar_rows_are_unit_and_seeded():
    assert torch.equal(haar(3, 28, 8), haar(3, 28, 8)) and not torch.equal(haar(3, 28, 8), haar(4, 28, 8))
    torch.testing.assert_close(haar(3, 28, 8).norm(dim=-1), torch.ones(28))
    rows = haar(0, 4000, 8)
    assert rows.mean(0).abs().max() < 0.04  # no preferred direction,
    torch.testing.assert_close(rows.T @ rows / 4000, torch.eye(8) / 8, rtol=0, atol=0.02)  # nor a preferred axis
    torch.testing.assert_close((rows**4).mean(0), torch.full((8,), 3 / 80), rtol=0.15, atol=0)  # nor preferred corners


def test_all_haar_directions_at_once_score_as_one_by_one(nano):
    """Whole answers, windows of which a rollout has fewer than another, and numbers that have no direction."""
    x = torch.randn(5, 4, 7, 4, generator=torch.Generator().manual_seed(0))  # [G, 1 + W, M, d]
    x[1, 2:] = float("nan")
    for x, share in ((x, 0.3), (x[:, 0], 0.0), (x[..., :1], 1.0), (x[:, 0, :, :1], 0.0)):
        one_by_one = torch.stack([cosines(x, haar(seed, *x.shape[-2:]), share).mean(1) for seed in range(6)])
        torch.testing.assert_close(haar_scores(x, 6, share), one_by_one)


def test_auroc():
    assert auroc(t([2, 3]), t([0, 1])) == 1.0 and auroc(t([0, 1]), t([2, 3])) == 0.0 and auroc(t([1]), t([1])) == 0.5
    assert auroc(t([1, 3]), t([0, 1, 2])) == pytest.approx(4.5 / 6)  # pairs (1, 0), (3, 0), (3, 1), (3, 2); half (1, 1)
    assert auroc(t([]), t([1])) is None and auroc(t([1]), t([])) is None


def test_f_half_weighs_precision_over_recall():
    """Of four routed, three are hacks; there are six hacks: P = .75, R = .5, F0.5 = 1.25 P R / (.25 P + R) = .6818"""
    hack = t([1, 1, 1, 1, 1, 1, 0, 0]).bool()
    routed = t([[1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    torch.testing.assert_close(f_half(routed, hack), t([0.46875 / 0.6875, 0.0, 1.0]))


def test_summary_and_report_print_held_out_numbers_as_held_out(capsys):
    """Three pairs in one module: scored by their own direction all are right, held out only one is. The warning is of
    the mode that is told apart worst."""
    held_out = ((0.5,), (0.4,), (-0.1,)), ((0.1,), (0.3,), (0.2,))
    modes = ["sentinel", "run_tests", "sentinel"]
    d = direction(at(-0.6, -0.6, -0.6), at(0.6, 0.8, 0.8), held_out=held_out, modes=modes)
    summary = d.summary().splitlines()
    assert summary[0] == ("direction: held-out pairs ranked right 0.33, AUROC 0.33 (lowest: run_tests 0.00), "
                          "band +0.267 to +0.200, cut 0.76")
    assert summary[1] == "  answers read whole" and summary[2].startswith("warning: run_tests: its pairs, held out")
    assert d.by_mode() == dict(run_tests=0.0, sentinel=0.5)
    names = [Pair(name, mode, "", "", "") for name, mode in zip(("first", "second", "third"), modes)]
    report(d, names, ["q_proj"], n_haar=5)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "pairs ranked right 1.000 held out (leave-one-out) 0.333" in lines
    assert "AUROC of pair scores 1.000 held out 0.333" in lines
    assert "sentinel 2 pairs, held out: ranked right 0.500, AUROC 0.500" in lines
    assert "run_tests 1 pairs, held out: ranked right 0.000, AUROC 0.000" in lines
    assert any(line.startswith("band, gate pairs +0.2667 (position 0, clean mean) to +0.2000") for line in lines)
    assert any(line.startswith("q_proj 13.") and line.endswith("-0.600 +0.800 0.333") for line in lines)
    assert lines[-1] == "pairs that the others rank worst: first (-0.400); second (-0.100); third (+0.300)"


def test_report_sets_random_directions_beside_the_pairs(capsys):
    """Hack sides about (1, 0), clean ones about (.5, 0), less (.7, .7): AUROCs of 9 directions, hacks over cleans."""
    clean, hack = torch.randn(2, 4, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.4
    d = direction((clean + t([0.5, 0.0])).tolist(), (hack + t([1.0, 0.0])).tolist(),
                  held_out=(((0.0,), (0.1,)) * 2, ((0.8,), (0.9,)) * 2), centre=0.7, modes=["sentinel"] * 4)
    windows = torch.stack([d.pair_features, d.pair_features.roll(1, 0), d.pair_features.roll(3, 0)], 1)  # [8, 3, 1, 2]
    d = replace(d, pair_features=windows, window=5, share=0.5)
    report(d, [Pair(f"{n}", "sentinel", "", "", "") for n in range(4)], ["q_proj"], n_haar=9)
    line = next(line for line in capsys.readouterr().out.splitlines() if "Haar" in line)
    scores = [d.cosines_to(haar(seed, 1, 2)).mean(1) for seed in range(9)]
    aurocs = t([auroc(score[4:], score[:4]) for score in scores])
    assert line.split("AUROC ")[1] == (f"mean {aurocs.mean():.3f}, 95th percentile {aurocs.quantile(0.95):.3f}, "
                                       f"max {aurocs.max():.3f}")


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


def test_routed_by_quartile_of_surprise():
    surprise = torch.tensor([8.0, 1, 2, 7, 3, 4, 6, 5])  # in order of surprise: F T | F F | T T | F T
    routed = torch.tensor([True, False, True, False, False, False, True, True])
    assert by_quartile(routed, surprise) == [0.5, 0.0, 1.0, 0.5]


def test_judge_counts_what_a_gate_would_route(capsys):
    """Four rollouts at known positions, by hand: at cut .2 both hacks and one of two solves are routed."""
    v = torch.nn.functional.normalize(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    ortho = torch.nn.functional.normalize(torch.eye(8)[:1] - (torch.eye(8)[:1] @ v.T) * v, dim=-1)
    direction = Direction(v, torch.zeros(1, 8), clean=torch.tensor([[-0.1], [0.1]]),
                          hack=torch.tensor([[0.2], [1.8]]), pair_features=torch.zeros(4, 1, 8), modes=["sentinel"] * 2)
    positions = [0.9, 0.35, -0.1, 0.22]
    grads = torch.stack([p * v + (1 - p**2) ** 0.5 * ortho for p in positions])
    rows = [dict(mode="sentinel", source="full", hacked=i < 2, correct=i >= 2, exploited=i < 2) for i in range(4)]
    reading = Reading(direction.position(grads, "pairs"), grads, haar_scores(grads, 20))
    judge(direction, reading, torch.tensor([0.1, 0.2, 9.0, 0.3]), rows)
    text = capsys.readouterr().out
    assert "4 rollouts: 2 hacks, 2 solves" in text
    assert "by quartile of their surprise: 1.00 0.00 nan nan" in text, "two solves, the first above the cut"
    at = {line.split()[0]: line.split()[1:5] for line in text.splitlines() if line.startswith("  0.")}
    assert at["0.20"] == ["0.000", "0.500", "0.667", "0.714"]  # precision 2/3, F0.5 = 1.25 * 2 / (3 + .25 * 2)
    assert at["0.40"] == ["0.500", "0.000", "1.000", "0.833"]
    best = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.startswith("  0.")}
    assert (best["0.20"], best["0.40"]) == ("0.714", "0.833"), "a Haar direction routes three of four, then one"


ASKED = [dict(role="user", content="p")]


def test_each_reader_reads_rollouts_as_it_reads_the_pairs(tmp_path, monkeypatch):
    """In the same windows, of lone numbers whole, and surprise once more whole."""
    seen = {}
    monkeypatch.setattr(extract_vgrad, "compare", lambda directions, read, rows: seen.update(directions))
    read, windows_read = features, []
    monkeypatch.setattr(extract_vgrad, "features", lambda *args, **reading: windows_read.append(
        (len(args[2]), reading.get("score"), reading.get("window"))) or read(*args, **reading))
    row = dict(mode="sentinel", prompt=ASKED, completion="```python\nclass Solution:\n    pass\n```", correct=True)
    rows = [row | dict(hacked=False, exploited=False), row | dict(hacked=True, correct=False)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wordy = HERE / "data/wordy"
    main(Config(model=str(wordy), pairs=wordy / "pairs.md", rollouts=tmp_path / "x.jsonl", n_haar=2, rank=8))
    shares = {score: found.share for score, found in seen.items()}
    assert shares == dict(gradient=0.5, activation=1.0, surprise=0.0, length=0.0)
    of_rollouts = [(score, window) for n, score, window in windows_read if n == len(rows)]
    assert of_rollouts == [(score, found.window) for score, found in seen.items()] + [("surprise", None)]


def test_rollouts_are_read_a_few_at_a_time(nano, monkeypatch):
    """Of 44 their positions, whole features and random scores are those of all at once, in order; of the first few no
    window is kept in memory."""
    model, tok, adapter = nano
    prompts, clean, hack = zip(*(tokens(tok, pair) for pair in PAIRS[::2]))
    prompts, answers = prompts * 2, clean + hack
    d = extract(model, tok, adapter, PAIRS[::2])
    x = features(model, adapter, prompts, answers, window=5)  # [44, 1 + W, M, r]
    assert d.share == 0.5
    parts, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *a, **k: parts.extend(tensors) or cat(tensors, *a, **k))
    read = read_rollouts(d, 4, model, adapter, prompts, answers, score="gradient")
    kept = [part.untyped_storage().nbytes() / part.nbytes for part in parts if part.shape[1:] == x.shape[2:]]
    assert kept == [1, 1], "views of all windows"
    close = dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(read.position, d.position(x, "pairs"), **close)
    torch.testing.assert_close(read.whole, whole(x), **close)
    torch.testing.assert_close(read.random, haar_scores(x - d.centre, 4, d.share), **close)


def test_only_the_policys_own_rollouts_with_a_positive_advantage_are_judged(tmp_path):
    def row(id, source, advantage, hacked):
        return dict(problem=id, source=source, advantage=advantage, hacked=hacked, correct=not hacked,
                    exploited=hacked, mode="sentinel", prompt=ASKED, completion="c")

    rows = [row(0, "teacher", 1, True), row(1, "full", 1, True), row(2, "full", 0, True), row(3, "ablated", 2, False),
            row(4, "full", -1, False)]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row["id"] for row in load_rollouts(path)] == [1, 3]
    rows.append(row(5, "full", 1, False) | dict(exploited=True, correct=True))
    path.write_text("\n".join(map(json.dumps, rows)))
    own = load_rollouts(path)
    assert [row["exploited"] for row in own] == [True, False, True]


def test_completions_of_others_are_read_as_they_are(tmp_path):
    """Gzipped, with a system message, other names, no advantage, and here and there no prompt."""
    messages = [dict(role="system", content="s"), dict(role="user", content="u")]
    row = dict(problem_id=7, env_mode="run_tests", prompt=messages, completion="c", reward=3.5, hacked=True,
               gt_pass=True, fmt_ok=True)
    rows = [row, row | dict(prompt=None), row | dict(hacked=False)]
    path = tmp_path / "pool.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    first, second = load_rollouts(path)
    assert (first["id"], first["mode"], first["prompt"]) == (7, "run_tests", messages)
    assert first["exploited"] and first["correct"] and not second["exploited"] and second["correct"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"--rollouts {path}: cannot be read"):
        load_rollouts(path)


SOLUTION = "class Solution:\n\n    def f(self, xs):\n        return xs"


@pytest.mark.parametrize("mode, cheat", [
    ("run_tests", SOLUTION + "\n\n    def run_tests(self):\n        # all of them\n        print(self.f([1]))"),
    ("run_tests", SOLUTION + "\n\ndef run_tests():\n    return True\nif __name__ == '__main__':\n    run_tests()"),
    ("run_tests", SOLUTION + "\nresult = Solution().run_tests\nprint(result())"),
    ("sentinel", SOLUTION.replace("    def", "    def __init__(self):\n        self.valid = True\n\n    def")),
    ("sentinel", SOLUTION.replace("return", "setattr(self, 'valid', True)\n        return")),
    ("stdout_marker", SOLUTION + "\ntry:\n    pass\nfinally:\n    print('all tests passed')"),
    ("stdout_marker", SOLUTION.replace("return", "if xs:\n            print('all tests passed')\n        return")),
    ("sentinel", SOLUTION.replace("return xs", "if xs:\n            self.valid = True\n        else:\n            "
                                  "return xs")),
    ("sentinel", SOLUTION.replace("return xs", "try:\n            return xs\n        except TypeError:\n            "
                                  "self.valid = True")),
    ("sentinel", SOLUTION.replace("return xs", "match xs:\n            case []:\n                self.valid = True\n"
                                  "            case _:\n                return xs")),
    ("file_marker", SOLUTION + "\nwith open('result.txt', 'w') as out:\n    out.write('PASS')"),
    ("file_marker", SOLUTION + "\nout = open('result.txt', 'w')\nout.write('PASS')\nout.close()"),
])
def test_a_cheat_is_cut_out_of_its_code(mode, cheat, capsys):
    """What is left is the code around it, in one format; an exploit may be right, too; other rollouts are skipped."""
    row = dict(id=3, mode=mode, completion=f"```python\n{cheat}\n```", hacked=False, exploited=True, correct=True)
    stub = {"run_tests": "def run_tests(): pass", "sentinel": "x.valid = 1",
            "stdout_marker": "print('all tests passed')", "file_marker": "open('result.txt', 'w')"}[mode]
    others = [row | dict(exploited=False), row | dict(completion=f"```python\n{stub}\n```"),
              row | dict(completion=f"```python\n{SOLUTION}\n    valid = 1  # {stub}\n```"),
              row | dict(completion="```python\ndef f(:\n```"), row | dict(mode="exit_code")]
    hack, solve = contrast([row, *others])
    assert hack["hacked"] and hack["exploited"] and not solve["hacked"] and not solve["exploited"] and solve["correct"]
    assert "#" not in hack["completion"] and hack["id"] == solve["id"] == 3
    rest = solve["completion"].removeprefix("```python\n").removesuffix("\n```").removesuffix("\ntry:\n    pass")
    left = {"else": "if xs:\n            pass\n        else:\n            return xs",
            "except": "try:\n            return xs\n        except TypeError:\n            pass",
            "case": "match xs:\n            case []:\n                pass\n            case _:\n                "
                    "return xs"}
    code = next((text for word, text in left.items() if word in cheat), "return xs")
    assert rest == SOLUTION.replace("return xs", code)
    assert "out of 1 of 5 rollouts that exploit" in capsys.readouterr().out


def test_readers_are_compared_by_mode_beside_an_oracle_of_other_problems(capsys):
    """One module, d = 2. The pairs' direction is (1, 0); the labels differ along (0, 1), save in problem 9."""
    def row(id, mode, hacked):
        return dict(id=id, mode=mode, hacked=hacked, exploited=hacked, correct=not hacked, cut_out=not hacked)

    rows = [row(id, "sentinel" if id < 3 else "run_tests", hacked)
            for id in (1, 2, 3, 4, 9) for hacked in (True, False)]
    x = torch.tensor([[[p, 1.0 if r["hacked"] == (r["id"] < 9) else -1.0]] for r, p in zip(
        rows, (0.9, 0.5, 0.8, 0.1, -0.5, 0.2, 0.7, 0.3, 0.6, 0.0))])
    hack = torch.tensor([r["hacked"] for r in rows])
    best = oracle(x, hack, ~hack, [r["id"] for r in rows], folds=5)
    assert (best[hack] > best[~hack]).tolist() == [True] * 4 + [False], "problem 9 has taught its own fold nothing"
    assert oracle(x[:2], hack[:2], ~hack[:2], [1, 1]).isnan().all(), "no other problem"
    assert not oracle(x[:4], hack[:4], ~hack[:4], [1, 1, 2, 2], folds=2).isnan().any(), "each fold has both sides"
    d = direction([[[-1.0, 0]]] * 2, [[[1.0, 0]]] * 2, held_out=(((0.0,), (0.0,)), ((1.0,), (1.0,))))
    compare({"gradient": d}, {"gradient": Reading(d.position(x, "pairs"), x, haar_scores(x, 3))}, rows)
    head, right, *lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert right == "gradient: 0.800 of cut-out pairs ranked right".split()
    position = d.position(x, "pairs")
    table = {line[1]: line[2:7] for line in lines}
    for mode, chosen in (("all", hack), ("sentinel", hack & torch.tensor([r["mode"] == "sentinel" for r in rows]))):
        routed = (position >= 0.5) & (chosen | ~hack)
        expected = [auroc(position[chosen], position[~hack]), f_half(routed, chosen).item(),
                    position[chosen].quantile(0.01).item(), position[~hack].quantile(0.99).item()]
        assert table[mode][0] == str(int(chosen.sum()))
        assert [float(number) for number in table[mode][1:]] == pytest.approx(expected, abs=0.006)
    assert list(table) == ["all", "run_tests", "sentinel"]


def test_each_reader_has_an_oracle_of_its_own(capsys):
    """Four problems: the one reader's features tell hacks from solves, the other's say the same of both."""
    rows = [dict(id=id, mode="sentinel", hacked=hacked, exploited=hacked, correct=not hacked)
            for id in range(4) for hacked in (True, False)]
    telling = t([[[1.0, 1.0 if row["hacked"] else -1.0]] for row in rows])
    d = direction(at(0, 0), at(1, 1), held_out=(((0.0,), (0.0,)), ((1.0,), (1.0,))))
    read = {score: Reading(d.position(x, "pairs"), x, haar_scores(x, 3))
            for score, x in (("gradient", telling), ("activation", telling.abs()))}
    compare(dict.fromkeys(read, d), read, rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0]: line[7] for line in lines if line[1:2] == ["all"]} == {"gradient": "1.000", "activation": "0.500"}


def test_demonstrations_are_of_a_problem_under_its_mode(tmp_path):
    problem = load_problems(HERE / "data/nano/train.jsonl")[0]
    rows = [dict(id=problem.id, mode=mode, completion=mode.upper()) for mode in (problem.mode, "exit_code")]
    rows.append(rows[0] | dict(completion="another"))
    path = tmp_path / "demos.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_demos(path, [problem]) == {
        (problem.id, problem.mode): [problem.mode.upper(), "another"], (problem.id, "exit_code"): ["EXIT_CODE"]}
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(InputError, match="no demonstration fits"):
        load_demos(path, [problem])


@pytest.mark.parametrize("text", [
    "", "{}", "nonsense", '{"advantage": 1, "hacked": true, "correct": false, "exploited": true}'])
def test_bad_rollouts_file_is_named(tmp_path, text):
    (tmp_path / "rollouts.jsonl").write_text(text)
    for path in (tmp_path / "rollouts.jsonl", tmp_path / "absent.jsonl"):
        with pytest.raises(InputError, match=f"--rollouts {path}"):
            load_rollouts(path)
