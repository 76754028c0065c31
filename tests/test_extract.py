"""extract_vgrad: pairs, gradients at the c-probe, the GRPO / twin-NLL identity, the direction, its band and report."""
import math
from dataclasses import replace

import pytest
import torch
from torch import tensor as t

import extract_vgrad
from extract_vgrad import (Direction, Pair, apart, auroc, cosines, direction_of, extract, features, haar, held_out,
                           load_pairs, report, windows)
from lora2r import HERE, InputError, attach, batches, encode_completion, encode_prompt, load_model, token_logps, use

PAIRS = load_pairs(HERE / "data/nano/pairs.md")
ALIKE = [pair for pair in PAIRS if pair.mode == PAIRS[0].mode][:3]
FEW = ALIKE + [pair for pair in PAIRS if pair.mode != PAIRS[0].mode][:3]
CLOSE = dict(rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def loaded():
    model, tok = load_model(str(HERE / "data/nano"))
    return model, tok, attach(model, 4)


@pytest.fixture
def nano(loaded):
    """Model, tokenizer and adapter, which is put back to its init afterwards."""
    yield loaded
    fill(loaded[2].parameters(), 0.0)


@torch.no_grad()
def fill(parameters, value):
    for p in parameters:
        p.fill_(value)


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


def test_a_completion_ends_its_turn_and_a_prompt_opens_the_assistants(nano):
    """What the model was trained on: the end-of-turn token is a token of the completion, and the roles are marked."""
    _, tok, _ = nano
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(encode_prompt(tok, [dict(role="user", content="hi")])) == text
    assert tok.decode(encode_completion(tok, "x = 1")) == "x = 1<|im_end|>"


def test_logits_in_chunks_change_nothing(nano, monkeypatch):
    """At most 7 rows of logits at a time, computed again in the backward, with the same values and gradients."""
    model, _, adapter = nano
    (_, ids, mask, _), = batches([[5, 6]] * 2, [[*range(10, 30)], [*range(30, 40)]], 10**6)

    def both():
        logps = token_logps(model, ids, mask)
        return logps, *torch.autograd.grad(logps.sum(), adapter.deployed_parameters())

    whole, rows = both(), []
    monkeypatch.setattr("lora2r.LOGITS", 7 * model.config.vocab_size)
    hook = model.get_output_embeddings().register_forward_hook(lambda head, x, y: rows.append(len(y)))
    for chunked, at_once in zip(both(), whole, strict=True):  # entries near 0 are rounding, so each tensor as a whole
        assert (chunked - at_once).norm() <= 1e-5 * at_once.norm()
    hook.remove()
    assert max(rows) == 7 and sum(rows) == 2 * mask.sum() == 60


@pytest.mark.parametrize("how", [
    dict(), dict(window=3), dict(read="ablated"), dict(read="full", window=2), dict(tokens="all"),
    dict(score="activation"), dict(score="activation", window=3)], ids=str)
def test_a_prompt_that_is_encoded_once_changes_nothing_that_a_gate_reads(nano, monkeypatch, how):
    model, tok, adapter = nano
    fill(adapter.parameters(), 0.02)
    (a, *of_a), (b, *of_b) = (tokens(tok, pair) for pair in PAIRS[:2])
    prompts, sides = [a, a, b, b], of_a + of_b
    alone = features(model, adapter, prompts, sides, **how)
    monkeypatch.setattr("lora2r.SHARED", 0)
    encoded = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda decoder, args, kwargs: encoded.append(kwargs["input_ids"].numel()), with_kwargs=True)
    together = features(model, adapter, prompts, sides, **how)
    hook.remove()
    torch.testing.assert_close(together, alone, equal_nan=True, **CLOSE)
    assert (len(encoded) == 4) == (how.get("tokens") != "all"), "each prompt once, and the answers to it"


def test_grpo_gradient_of_a_pair_is_the_difference_of_two_nll_gradients(nano):
    """hack +1, clean -1: the clipped GRPO surrogate on both sides at once, against extraction's two NLL gradients."""
    model, tok, adapter = nano
    prompt, clean, hack = tokens(tok, PAIRS[0])
    (rows, ids, mask, _), = batches([prompt] * 2, [clean, hack], 10**6)
    advantage = torch.tensor([-1.0, 1.0])[rows]
    c = torch.ones(len(adapter), 1, 1, adapter.r, requires_grad=True)  # one probe for the pair
    with use(adapter, m=False, c=c.expand(-1, 2, -1, -1), weights=torch.ones(2, 1, ids.shape[1])):
        logp = token_logps(model, ids, mask)
        ratio = (logp - logp.detach()).exp()
        surrogate = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None])
        loss = -((surrogate * mask).sum(1) / mask.sum(1)).sum()
        grpo, = torch.autograd.grad(loss, c)  # [M, 1, 1, r]
    nll_clean, nll_hack = features(model, adapter, [prompt] * 2, [clean, hack], temperature=1.0, tokens="all")[:, 0]
    torch.testing.assert_close(grpo[:, 0, 0], nll_hack - nll_clean, rtol=1e-3, atol=1e-6)


def test_what_each_score_reads(nano):
    """Gradients by default; else, one rollout at a time, the model's own hidden states after each layer."""
    model, tok, adapter = nano
    prompts, _, hacks = map(list, zip(*(tokens(tok, p) for p in PAIRS[:3])))
    gradients, states = (features(model, adapter, prompts, hacks, 300, score) for score in ("gradient", "activation"))
    assert torch.equal(gradients, features(model, adapter, prompts, hacks, 300)) and states.shape[1] == 1
    for prompt, hack, found in zip(prompts, hacks, states[:, 0]):
        with torch.no_grad(), use(adapter, off=True):
            layers = model(torch.tensor([prompt + hack]), output_hidden_states=True).hidden_states[1:]
        expected = [layer[0, len(prompt) - 1 : -1].mean(0) for layer in layers]  # where the completion is predicted
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_windows_average_over_neighbouring_tokens_of_the_completion():
    """Completions of 3 and 1 tokens, after prompts of different length."""
    is_completion = t([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    whole = t([[[0, 1 / 3, 1 / 3, 1 / 3]], [[0, 0, 1, 0]]])
    torch.testing.assert_close(windows(is_completion), whole)
    torch.testing.assert_close(windows(is_completion, 3), whole.expand(2, 2, 4))
    two = t([[[0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]], [[0, 0, 1, 0], [math.nan] * 4]])
    torch.testing.assert_close(windows(is_completion, 2), torch.cat([whole, two], 1), equal_nan=True)


@pytest.mark.parametrize("read, how", [("base", dict(off=True)), ("ablated", dict(m=False))])
def test_a_windows_gradient_is_the_mean_of_what_its_tokens_add(nano, read, how):
    """Against a probe that sits at one token of one rollout alone; and each score's windows of a whole completion."""
    model, tok, adapter = nano
    fill(adapter.deployed_parameters(), 0.01)
    (a, side_a, _), (b, _, side_b) = (tokens(tok, p) for p in PAIRS[:2])
    prompts, sides = [a, b], [side_a, side_b]
    x = features(model, adapter, prompts, sides, window=3, read=read, temperature=2.0)  # [2, 1 + W, M, r]
    assert x[:, :, 0, 0].isfinite().sum(1).tolist() == [len(side) - 1 for side in sides], "1 + W, one of 3 tokens less"
    for row, start in ((0, 0), (1, 4)):
        ids, first = torch.tensor([prompts[row] + sides[row]]), len(prompts[row]) - 1
        own = torch.arange(ids.shape[1] - 1)[None] >= first  # [1, T-1]
        alone = []
        for token in range(start, start + 3):
            at = torch.zeros(1, 1, ids.shape[1])
            at[..., first + token] = 1
            c = torch.ones(len(adapter), 1, 1, adapter.r, requires_grad=True)
            with use(adapter, c=c, weights=at, **how):
                alone += torch.autograd.grad(-token_logps(model, ids, own, 2.0).sum(), c)
        torch.testing.assert_close(x[row, 1 + start], sum(alone)[:, 0, 0] / 3, rtol=1e-3, atol=1e-6)
    for score in ("gradient", "activation"):
        whole, windowed = (features(model, adapter, prompts, sides, score=score, window=n) for n in (0, 1000))
        torch.testing.assert_close(windowed, whole.expand_as(windowed), **CLOSE)


def test_what_each_read_sees(nano):
    """base: neither block. ablated: the deployed one. full: both, but the direction of full is that of ablated."""
    model, tok, adapter = nano
    prompt, _, hack = tokens(tok, PAIRS[0])
    blocks = dict(base="", ablated="deployed", full="deployed, quarantine")

    def read_all():
        return {read: features(model, adapter, [prompt], [hack], read=read) for read in blocks}

    before = read_all()
    for block in ("quarantine", "deployed"):
        fill(getattr(adapter, f"{block}_parameters")(), 0.05)
        now = read_all()
        for read, seen in blocks.items():
            close = torch.allclose(now[read], before[read], rtol=0.1 if block in seen else 1e-3, atol=1e-6)
            assert close == (block not in seen), (read, block)
        before = now
    assert all(p.grad is None for p in model.parameters()), "a gate leaves no gradient behind"
    base, ablated, full = (extract(model, tok, adapter, ALIKE, read=read).pair_features for read in blocks)
    assert torch.equal(ablated, full) and not torch.allclose(base, ablated, rtol=0.1)
    fill(adapter.quarantine_parameters(), 0.0)
    assert torch.equal(extract(model, tok, adapter, ALIKE, read="full").pair_features, full)


def test_extract_puts_pairs_gradients_where_they_belong(nano):
    """Clean sides first, each beside its own prompt after the system message; centre is the mean of all sides or 0."""
    model, tok, adapter = nano
    system = [dict(role="system", content="be brief")]
    d = extract(model, tok, adapter, ALIKE, system)
    for p, pair in enumerate(ALIKE):
        prompt = encode_prompt(tok, [*system, dict(role="user", content=pair.prompt)])
        for row, text in ((p, pair.clean), (3 + p, pair.hack)):
            alone = features(model, adapter, [prompt], [encode_completion(tok, text)])[0]
            torch.testing.assert_close(d.pair_features[row], alone, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(d.centre, d.pair_features[:, 0].sum(0) / 6)
    clean, hack = d.pair_features.chunk(2)  # [3, 1, M, r]
    for equal_pairs, centre in ((True, d.centre), (True, 0 * d.centre), (False, d.centre)):
        found = extract(model, tok, adapter, ALIKE, system, centre=bool(centre.any()), equal_pairs=equal_pairs)
        assert torch.equal(found.centre, centre)
        torch.testing.assert_close(found.v, direction_of(clean[:, 0], hack[:, 0], equal_pairs))
        others = direction_of(clean[1:, 0], hack[1:, 0], equal_pairs)  # leave-one-out, of pair 0
        torch.testing.assert_close(found.clean[0], cosines(clean[:1] - centre, others, False)[0])
        torch.testing.assert_close(found.hack[0], cosines(hack[:1] - centre, others, False)[0])
    hidden = [extract(model, tok, adapter, ALIKE, score="activation", equal_pairs=x).v for x in (True, False)]
    assert torch.equal(*hidden), "equal_pairs is for gradients alone"


def test_readings_are_compared_by_modes_that_were_held_out(nano):
    """Whole answers and windows, of which the run reads one. Pairs of one mode compare nothing."""
    model, tok, adapter = nano
    modes = [pair.mode for pair in FEW]
    found = {window: extract(model, tok, adapter, FEW, window=window, equal_pairs=False) for window in (0, 5, 3)}
    for window, d in found.items():
        assert (d.modes, d.window, d.pair_features.shape[1] > 1) == (modes, window, window > 0)
        torch.testing.assert_close(d.v, found[0].v, **CLOSE)  # that of whole answers
        for sides, groups in ((d.unseen, modes), ([d.clean, d.hack], range(len(FEW)))):
            expected = held_out(d.pair_features, d.centre, groups, equal_pairs=False, window=window > 0)
            torch.testing.assert_close(sides, expected, **CLOSE)
        distances = {"whole": apart(*found[0].unseen), f"window {window or 5}": apart(*found[window or 5].unseen)}
        assert d.by_reading == pytest.approx(distances, rel=1e-2)
    many = extract(model, tok, adapter, PAIRS[::2])
    assert auroc(many.hack.mean(1), many.clean.mean(1)) > 0.8
    one = extract(model, tok, adapter, ALIKE, window=5)
    assert one.by_reading == {} and one.unseen == [one.clean, one.hack]
    assert list(extract(model, tok, adapter, FEW, tokens="all").by_reading) == ["whole"]
    with pytest.raises(InputError, match="--pairs: the mean difference .* is zero or not finite"):
        extract(model, tok, adapter, [FEW[0], replace(FEW[0], clean=FEW[0].hack, hack=FEW[0].clean)])


def test_cosines_are_per_module_and_blind_to_length():
    """Two rollouts, two modules, 3-4-5 triangles. Of the first rollout's windows (1, -1) has the mean cosine 0,
    (.6, .8) has .7; the second has but one, whose (0, 0) is lower than the whole's (.6, 0)."""
    x = t([[[[0, 2.0], [0, 1]], [[1.0, 0], [0, -1]], [[3, 4], [3, 4]]],
           [[[3, 4.0], [-5, 0]], [[0, -2.0], [5, 0]], [[math.nan] * 2] * 2]])  # [G, 1 + W, M, r]
    v, each = t([[1.0, 0], [0, 1]]), t([[[1.0, 0], [0, -1]], [[0, 1.0], [1, 0]]])  # [M, r], [G, M, r]
    torch.testing.assert_close(cosines(x, v, False), t([[0, 1.0], [0.6, 0]]))
    torch.testing.assert_close(cosines(x, each, False), t([[0, -1.0], [0.8, -1]]))
    torch.testing.assert_close(cosines(x, v, True), t([[0.6, 0.8], [0, 0]]))
    torch.testing.assert_close(cosines(x, each, True), t([[1.0, 1], [-1, 1]]))


def test_direction_is_the_mean_of_differences_normalised_per_pair_and_module():
    """(3, 0) and (0, 4) have the same say, and point to (1, 1) / sqrt(2); by length they point to (3, 4) / 5. It points
    to the hack."""
    clean = t([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])  # [P, M, r]
    hack = clean + t([[[3.0, 0.0], [0.0, -1.0]], [[0.0, 4.0], [0.0, -9.0]]])
    torch.testing.assert_close(direction_of(clean, hack), t([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))
    torch.testing.assert_close(direction_of(clean, hack, equal_pairs=False), t([[0.6, 0.8], [0.0, -1.0]]))


def test_held_out_leaves_out_a_pair_and_its_group():
    """Clean sides at 0, hack sides (3, 0), (0, 4), (-3, 0): without the first the direction is (-3, 4) / 5, without the
    last (3, 4) / 5; without the first two, a group, it is (-1, 0). With equal pairs (-1, 1) and (1, 1), over
    sqrt(2). The only windows of clean sides are (0, 1), which no direction is read from."""
    zero, nothing = torch.zeros(1, 2), [[[0.0, 0.0]]]
    x = t([nothing] * 3 + [[[[3.0, 0.0]]], [[[0.0, 4.0]]], [[[-3.0, 0.0]]]])  # [2P, 1, M, d]
    torch.testing.assert_close(held_out(x, zero, range(3))[1][[0, 2]], t([[-(0.5**0.5)]] * 2))
    clean, hack = held_out(x, zero, range(3), equal_pairs=False)
    torch.testing.assert_close(clean, torch.zeros(3, 1))
    torch.testing.assert_close(hack[[0, 2]], t([[-0.6], [-0.6]]))
    windowed = torch.cat([x, x + t([[[[0.0, 1.0]]]] * 3 + [nothing] * 3)], 1)  # [2P, 2, M, d]
    clean, same = held_out(windowed, zero, range(3), equal_pairs=False, window=True)
    torch.testing.assert_close((clean[[0, 2]], same), (t([[0.8], [0.8]]), hack))
    clean, hack = held_out(x, t([[0.0, -1.0]]), ["sentinel", "sentinel", "run_tests"], equal_pairs=False)
    torch.testing.assert_close(hack, t([[-3 / 10**0.5], [0.0], [-1 / 10**0.5]]))
    torch.testing.assert_close(clean, t([[0.0], [0.0], [0.8]]))


def test_sides_lie_apart_by_their_means_in_standard_deviations():
    """Means over modules: clean 0, 2, 4 (mean 2, deviation 2), hack 7, 8, 9 (8, 1): 6 / 3."""
    clean, hack = t([[-1.0, 1.0], [2.0, 2.0], [3.0, 5.0]]), t([[7.0, 7.0], [8.0, 8.0], [9.0, 9.0]])
    assert apart(clean, hack) == pytest.approx(2.0) and apart(hack, clean) == pytest.approx(-2.0)


def at(*cosine):
    """Features [P, 1, 1, 2] whose cosines to (1, 0) are those."""
    return t([[[[10 * x, 10 * (1 - x * x) ** 0.5]]] for x in cosine])


def direction(clean, hack, v=((1.0, 0.0),), sides=((0.0,), (0.0,)), centre=0.0, modes=("sentinel",), **more):
    """A Direction with features [P, 1 + W, M, d] of both sides, held-out cosines [P, M] and modes [P]."""
    sides = list(map(torch.tensor, sides))
    return Direction(torch.tensor(v), torch.full(clean.shape[2:], centre), *sides, torch.cat([clean, hack]),
                     **dict(modes=list(modes), window=0, unseen=sides) | more)


def test_band_of_gate_batch_is_the_75th_percentile_per_module():
    """Of five numbers the second largest; neither the median nor the mean. Gate pairs: the mean held-out cosine."""
    two = torch.cat([at(-0.9, -0.6, 0.0, -0.8, 0.8), at(0, 0, 0, 0.8, 1.0).flip(3)], 2)
    d = direction(two, at(0.6, 0.8, -0.6, 0.9, 0.0).expand(-1, -1, 2, -1), v=((1.0, 0.0), (0.0, 1.0)),
                  sides=(((0.0, -0.5), (-0.1, -0.2)), ((0.9, 0.5), (0.8, 0.2))))
    torch.testing.assert_close(d.band("batch"), (t([0.0, 0.8]), t([0.8, 0.8])))
    torch.testing.assert_close(d.band("pairs"), (t(-0.2), t(0.6)))


@pytest.mark.parametrize("sides, unseen, cut", [
    # hack sides, at 4 -+ 3, vary three times as much as clean ones, at 0 -+ 1; the modules' own spread is left out
    ((((-6.0, 4.0), (6.0, -4.0)), ((-2.0, 4.0), (10.0, 4.0))), None, 0.25),
    ((((0.0,), (0.0,)), ((1.0,), (1.0,))), None, 0.5),  # no spread on either side: half way
    # band 0 to 4; by other modes' pairs clean sides lie at 1 -+ 1, hack ones at 2 -+ 3: cosine 1.25
    ((((-1.0,), (1.0,)), ((3.0,), (5.0,))), [t([[0.0], [2.0]]), t([[-1.0], [5.0]])], 1.25 / 4)])
def test_the_cut_is_as_many_standard_deviations_from_either_mean(sides, unseen, cut):
    d = direction(at(0, 0), at(1, 1), sides=sides)
    assert replace(d, unseen=unseen or d.unseen).cut() == pytest.approx(cut)


def test_position_is_0_at_the_lower_and_1_at_the_upper_edge():
    """Gate pairs: the mean cosine, placed in one band. Gate batch: placed per module, pooled afterwards, without
    modules whose band is inverted: .4 of module 0's 0 to .8 and all of module 1's 0 to .6 make .7."""
    d = direction(at(0.0, 0.0), at(0.8, 0.8), sides=(((0.2,), (0.2,)), ((0.6,), (0.6,))))
    close = dict(rtol=0, atol=1e-4)
    torch.testing.assert_close(d.position(at(0.2, 0.6, 0.3, -0.2), "pairs"), t([0.0, 1.0, 0.25, -1.0]), **close)
    torch.testing.assert_close(d.position(at(0.0, 0.8, 0.6, -0.8), "batch"), t([0.0, 1.0, 0.75, -1.0]), **close)
    low, high, rollout = (torch.cat([at(x) for x in cosine], 2) for cosine in (
        (0.0, 0.0, 0.8), (0.8, 0.6, 0.0), (0.32, 0.6, 1.0)))
    d = direction(low, high, v=((1.0, 0.0),) * 3, sides=(((0.0,) * 3,), ((0.8, 0.6, -0.5),)))
    torch.testing.assert_close(d.position(rollout, "batch"), t([0.7]), **close)
    torch.testing.assert_close(d.position(rollout, "pairs"), t([(0.32 + 0.6 + 1.0) / 3 / 0.3]), **close)


def test_a_replaced_direction_takes_its_band_from_the_same_pairs():
    """A placebo: cosines of the sides to the other v, not to v_grad, in the same windows; the sides of held-out modes
    are cosines to v_grad, and do not say where the placebo's cut lies."""
    clean, hack = t([[[[4.0, 5.0]]], [[[5.0, 4.0]]]]), t([[[[1.0, 2.0]]], [[[2.0, 1.0]]]])  # less the centre: 3-4-5
    real = direction(clean, hack, centre=1.0, by_reading=dict(whole=1))
    torch.testing.assert_close(real.cosines(clean), t([[0.6], [0.8]]))
    x = torch.cat([real.pair_features.flip(0), real.pair_features], 1)  # the only window; whole answers are others'
    for found in (real, replace(real, window=5, pair_features=x)):
        placebo = found.replaced(t([[0.0, 1.0]]))
        torch.testing.assert_close((placebo.v, placebo.clean, placebo.hack),
                                   (t([[0.0, 1.0]]), t([[0.8], [0.6]]), t([[1.0], [0.0]])))
        assert placebo.window == found.window and torch.equal(placebo.pair_features, found.pair_features)
        assert placebo.by_reading == {} and all(map(torch.equal, placebo.unseen, (placebo.clean, placebo.hack)))


def test_haar_rows_are_unit_and_seeded():
    assert torch.equal(haar(3, 28, 8), haar(3, 28, 8)) and not torch.equal(haar(3, 28, 8), haar(4, 28, 8))
    torch.testing.assert_close(haar(3, 28, 8).norm(dim=-1), torch.ones(28))
    rows = haar(0, 4000, 8)
    assert rows.mean(0).abs().max() < 0.04  # no preferred direction,
    torch.testing.assert_close(rows.T @ rows / 4000, torch.eye(8) / 8, rtol=0, atol=0.02)  # nor a preferred axis
    torch.testing.assert_close((rows**4).mean(0), torch.full((8,), 3 / 80), rtol=0.15, atol=0)  # nor preferred corners


def test_auroc():
    assert auroc(t([2, 3]), t([0, 1])) == 1.0 and auroc(t([0, 1]), t([2, 3])) == 0.0 and auroc(t([1]), t([1])) == 0.5
    assert auroc(t([1, 3]), t([0, 1, 2])) == pytest.approx(4.5 / 6)  # pairs (1, 0), (3, 0), (3, 1), (3, 2); half (1, 1)
    assert auroc(t([]), t([1])) is None and auroc(t([1]), t([])) is None


def test_summary_and_report_print_held_out_numbers_as_held_out(capsys):
    """Three pairs in one module: scored by their own direction all are right, held out only one is, by other modes'
    pairs all but one. The warning is of the mode that is told apart worst."""
    sides = ((0.5,), (0.4,), (-0.1,)), ((0.1,), (0.3,), (0.2,))
    modes = ["sentinel", "run_tests", "sentinel"]
    d = direction(at(-0.6, -0.6, -0.6), at(0.6, 0.8, 0.8), sides=sides, modes=modes)
    first, warning = d.summary().splitlines()
    assert first == ("direction: held-out pairs ranked right 0.33, AUROC 0.33 (lowest: run_tests 0.00), "
                     "band +0.267 to +0.200, cut 0.76, reading: whole")
    assert warning.startswith("warning: run_tests: the AUROC of its held-out pairs is 0.00")
    d = replace(d, unseen=[t([[0.0], [0.5], [0.1]]), t([[0.2], [0.4], [0.6]])], by_reading=dict(whole=0.25))
    report(d, [Pair(name, mode, "", "", "") for name, mode in zip(("first", "second", "third"), modes)], ["q_proj"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("3 pairs (run_tests 1, sentinel 2), features of 1 x 2 numbers",
                 "the pairs themselves all 3 1.000 1.000", "the other pairs all 3 0.333 0.333",
                 "the other pairs run_tests 1 0.000 0.000", "the other pairs sentinel 2 0.500 0.500",
                 "the other modes' pairs all 3 0.667 0.778", "the other modes' pairs sentinel 2 1.000 1.000",
                 "distance between the sides of held-out modes: whole 0.25",
                 "q_proj 13.39983 -0.600 +0.800 0.333"):
        assert line in lines, line
    assert lines[-1] == "pairs that the other pairs rank worst: first (-0.400); second (-0.100); third (+0.300)"


def test_a_reading_that_holds_held_out_modes_further_apart_by_a_margin_is_told():
    d = direction(at(-0.6, -0.6), at(0.6, 0.8), sides=(((0.0,), (0.1,)), ((0.8,), (0.9,))), modes=["sentinel"] * 2)
    for window, whole, five, told in ((0, 0.5, 0.69, ""), (0, 0.5, 0.71, "--window 5 "), (0, 0.9, 0.5, ""),
                                      (5, 0.71, 0.5, "--window 0 (the whole answer) "), (5, 0.69, 0.5, "")):
        told = told and f"\nwarning: {told}tells held-out modes further apart (0.71, here 0.50)"
        assert replace(d, window=window, by_reading={"whole": whole, "window 5": five}).summary().endswith(
            f", reading: {'window 5' if window else 'whole'}{told}")


def test_report_sets_random_directions_beside_the_pairs(capsys, monkeypatch):
    """Hack sides about (1, 0), clean ones about (.5, 0), less (.7, .7): AUROCs of 9 directions, hacks over cleans, by
    the best of two windows, of which one side has but one."""
    clean, hack = torch.randn(2, 4, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.4
    d = direction(clean + t([0.5, 0.0]), hack + t([1.0, 0.0]), sides=(((0.0,), (0.1,)) * 2, ((0.8,), (0.9,)) * 2),
                  centre=0.7, modes=["sentinel"] * 4)
    x = torch.cat([d.pair_features, d.pair_features.roll(1, 0), d.pair_features.roll(3, 0)], 1)  # [8, 3, 1, 2]
    x[1, 2] = math.nan
    monkeypatch.setattr(extract_vgrad, "N_RANDOM", 9)
    for d in (d, replace(d, pair_features=x, window=5)):
        report(d, [Pair(f"{n}", "sentinel", "", "", "") for n in range(4)], ["q_proj"])
        line, = (line for line in capsys.readouterr().out.splitlines() if "random directions" in line)
        scores = [d.cosines(d.pair_features, haar(seed, 1, 2)).mean(1) for seed in range(9)]
        aurocs = t([auroc(score[4:], score[:4]) for score in scores])
        assert line.split("AUROC: ")[1] == (f"mean {aurocs.mean():.3f}, 95th percentile {aurocs.quantile(0.95):.3f}, "
                                            f"maximum {aurocs.max():.3f}")


GOOD = "## 1. sentinel: x\n### prompt\np\n### clean\n```python\na\n```\n### hack\n```python\nb\n```\n"


@pytest.mark.parametrize("text, line, says", [
    (GOOD + GOOD.replace("sentinel", "typo"), 12, "heading '## 1. typo: x'"),
    (GOOD + GOOD.replace("### hack", "### hacked"), 19, "section '### hacked'"),
    (GOOD + GOOD.replace("\np\n", "\n\n"), 12, "no text under '### prompt'"),
    (GOOD + GOOD.replace("```python\nb\n```", "b"), 12, "hack side is not one ```python block"),
    (GOOD + GOOD.replace("\nb\n", "\na\n"), 12, "its two sides are equal"),
    (GOOD + GOOD, 12, "is there twice"), (GOOD, None, "1 pairs found")])
def test_bad_pairs_file_names_file_and_line(tmp_path, text, line, says):
    path = tmp_path / "pairs.md"
    path.write_text(text)
    with pytest.raises(InputError) as e:
        load_pairs(path)
    assert says in str(e.value) and str(path) + (f":{line}" if line else "") in str(e.value)
