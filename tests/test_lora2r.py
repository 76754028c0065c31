"""The invariants of the adapter, on tiny random models. G rollouts, T tokens, W weightings, M modules, r block rank."""
import copy
import json
from functools import partial
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import lora2r
from evaluate_deploy import export
from lora2r import (HERE, InputError, Lora2rLinear, attach, batches, folded, generate, load, load_model, peek, prefill,
                    replayed, save, token_logps, use)

SIZES = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=61,
             max_position_embeddings=64, initializer_range=0.2, rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
ONE_LAYER_SLIDES = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
KINDS = {"Llama": {},
         "Qwen2": dict(tie_word_embeddings=True, **ONE_LAYER_SLIDES),
         "Qwen3": dict(head_dim=8, **ONE_LAYER_SLIDES),
         "Gemma3": dict(head_dim=8, sliding_window=4, tie_word_embeddings=True,
                        layer_types=["sliding_attention", "full_attention"]),
         "Mistral": dict(sliding_window=4),
         "Phi3": dict(sliding_window=4)}
MODES = {"clean": (False, False), "mid": (True, False), "hack": (True, True)}  # (m, d)
R = 3


def tiny_model(kind="Qwen3", dtype=torch.float64, seed=0, layers=2):
    make_model = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(seed)
    config = make_model.config_class(num_hidden_layers=layers, **SIZES, **KINDS[kind])
    model = make_model(config).eval().to(dtype)
    if dtype == torch.float64:  # Hugging Face's RMSNorm computes in fp32; in float64 gradients compare to many digits
        for norm in (module for name, module in model.named_modules() if name.rpartition(".")[2].endswith("norm")):
            norm.forward = partial(F.rms_norm, normalized_shape=norm.weight.shape, eps=1e-6,
                                   weight=norm.weight + (kind == "Gemma3"))  # Gemma's scale is 1 + weight
    return model


def tiny_adapter(kind="Qwen3", dtype=torch.float64, size=0.1, **options):
    """A model with its adapter, cast as well in float64, whose blocks lie `size` from init, as after training."""
    model, generator = tiny_model(kind, dtype), torch.Generator().manual_seed(0)
    adapter = attach(model, R, **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(size * torch.randn(p.shape, generator=generator))
    if dtype == torch.float64:
        model.double()
    return model, adapter


def tokens(G=3, T=9, seed=0):
    return torch.randint(3, 61, (G, T), generator=torch.Generator().manual_seed(seed))


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


PROMPTS = [tokens(1, T, seed=T)[0].tolist() for T in (2, 9, 5)]


def nll(model, ids, mask=None):
    """Summed NLL per rollout, [G]; `mask` is 1 on real tokens (left padding)."""
    mask = torch.ones_like(ids) if mask is None else mask
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (loss * (mask[:, :-1] * mask[:, 1:])).sum(1)


def grads(adapter):
    """All gradients by name (a missing one is zero), and clears them."""
    found = {}
    for name, p in adapter.tensors("dA", "dB").items():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return found


def masks(*modes):
    m, d = zip(*(MODES[mode] for mode in modes))
    return {"m": torch.tensor(m), "d": torch.tensor(d)}


def values(adapter):
    return {name: t.detach().clone() for name, t in adapter.tensors("dA", "dB", "A0", "B0").items()}


def assert_same(a: dict, b: dict, rtol=0.0, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)


def literal(x, block):
    """The delta as it is defined: B A x - B0 A0 x."""
    A0, B0, A, B = (t.to(x) for t in (block.A0, block.B0, block.A0 + block.dA, block.B0 + block.dB))
    return x @ A.T @ B.T - x @ A0.T @ B0.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_attach_adapts_every_projection_and_freezes_the_base(kind, dtype):
    """And under every mask the delta is exactly zero at init."""
    model, ids = tiny_model(kind, dtype), tokens()
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    before, rng = model(ids).logits, torch.get_rng_state()
    adapter = attach(model, R)
    assert torch.equal(torch.get_rng_state(), rng)  # attaching does not change what the run draws next
    assert set(adapter.modules) == linears - {"lm_head"} and adapter.r == R
    assert len(adapter) == 2 * (4 if kind == "Phi3" else 7)  # Phi's q, k, v are one layer, and so are gate and up
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}
    for modes in (["clean"] * 3, ["mid"] * 3, ["hack", "clean", "mid"]):
        with use(adapter, **masks(*modes)):
            assert torch.equal(model(ids).logits, before)


def test_vision_tower_is_not_adapted():
    """Gemma 3 from 4B up comes as a model of text and images."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=dict(head_dim=8, num_hidden_layers=1, **SIZES), vision_config=vision, mm_tokens_per_image=4))
    adapter = attach(model, R)
    assert "q_proj" in {name.rpartition(".")[2] for name, _ in model.model.vision_tower.named_modules()}
    assert len(adapter) == 7 and all(name.startswith("model.language_model.layers.") for name in adapter.modules)


def test_init_has_the_stated_variance():
    """In fp32 on any base, from the seed alone; the blocks start apart, or ablation would be mere shrinkage."""
    bf16, fp32, other_seed = (attach(tiny_model(dtype=dtype), 32, seed=seed) for dtype, seed in
                              [(torch.bfloat16, 0), (torch.float32, 0), (torch.float32, 1)])
    assert {t.dtype for t in values(bf16).values()} == {torch.float32}
    assert_same(values(bf16), values(fp32))
    for name, t in fp32.tensors("A0", "B0").items():
        assert not torch.equal(t, other_seed.tensors("A0", "B0")[name])
        assert not torch.equal(t, fp32.tensors("A0", "B0")[name.replace("deployed", "quarantine")]) or "quar" in name
        variance = 1 / t.shape[1] if name.endswith("A0") else 1 / 64  # 1 / d_in and 1 / 2r
        assert t.var().item() == pytest.approx(variance, rel=0.2) and 32 in t.shape


def test_attach_errors_name_the_value_and_the_remedy():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    for model, r, says in ((gpt2, R, r"only nn.Linear.*\(Conv1D, .*use another"),
                           (tiny_adapter()[0], R, "already has an adapter"),
                           (tiny_model(), 0, "r = 0.*at least 1")):
        with pytest.raises(InputError, match=says):
            attach(model, r)


@pytest.mark.parametrize("modes", [("clean", "mid", "hack"), ("hack", "clean", "mid"), *([mode] * 2 for mode in MODES)],
                         ids=" ".join)
@pytest.mark.parametrize("size", [0, 0.1], ids=["init", "trained"])
def test_gradient_table(size, modes):
    """A layer's output, and its gradients with respect to x and to both blocks, are those of the literal formulas."""
    _, adapter = tiny_adapter(size=size)
    for module in adapter.modules.values():
        x = torch.randn(len(modes), 5, module.base.in_features, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(len(modes), 5, module.base.out_features, dtype=torch.float64)
        deployed, quarantine = literal(x, module.deployed), literal(x, module.quarantine)  # [G, T, d_out]
        table = dict(clean=deployed, mid=deployed + quarantine, hack=deployed.detach() + quarantine)
        expected = module.base(x) + torch.stack([table[mode][row] for row, mode in enumerate(modes)])
        with use(adapter, **masks(*modes)):
            y = module(x)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
        inputs = [x, *module.deployed.parameters(), *module.quarantine.parameters()]
        ours, theirs = (torch.autograd.grad(z, inputs, upstream, materialize_grads=True) for z in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        trained = [bool(grad.norm() > 0.1) for grad in ours[1:]]  # and exactly zero is what must not train
        assert trained == [bool(grad.any()) for grad in ours[1:]]
        assert trained == [set(modes) != {"hack"}] * 2 + [set(modes) != {"clean"}] * 2


@pytest.mark.parametrize("other", MODES)
def test_nan_in_the_quarantine_never_reaches_a_clean_row(other):
    _, adapter = tiny_adapter()
    module = next(iter(adapter.modules.values()))
    with torch.no_grad():
        module.quarantine.dA.fill_(float("nan"))
    x = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    with use(adapter, **masks("clean", other)):
        y = module(x)
        gx, = torch.autograd.grad(y.sum(), x)
    assert y[0].isfinite().all() and gx[0].isfinite().all()
    assert y[1].isfinite().all() == (other == "clean")


def train(model, adapter, modes, optimizer=None, drop=True):
    """AdamW steps with the given mode per row, in micro-batches of one row, as a trainer would do them."""
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)  # the hard case: gradients are zeros, not None
        for row, mode in enumerate(modes):
            with use(adapter, **masks(mode)):
                nll(model, tokens()[row:row + 1]).sum().backward()
        if drop:
            adapter.drop_untrained(trains_dep=set(modes) != {"hack"}, trains_quar=set(modes) != {"clean"})
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("mode, drop, still", [
    ("hack", True, "deployed"), ("clean", True, "quarantine"), ("mid", True, None), ("hack", False, None)])
def test_block_that_must_not_train_does_not_move_under_adamw_with_momentum(mode, drop, still):
    """Nor do its moments decay: it resumes where it was. Without drop_untrained it would move."""
    model, adapter = tiny_adapter(dtype=torch.float32)
    optimizer = train(model, adapter, ["mid", "mid"])  # builds momentum in both blocks
    moments = copy.deepcopy({name: optimizer.state[p]["exp_avg"] for name, p in adapter.tensors("dA", "dB").items()})
    before = values(adapter)
    train(model, adapter, [mode, mode], optimizer, drop)
    for name, p in adapter.tensors("dA", "dB").items():
        rests = name.split(".")[-2] == still
        assert torch.equal(before[name], p) == torch.equal(moments[name], optimizer.state[p]["exp_avg"]) == rests, name


def probe(adapter, G=3, T=9):
    """Options of use(): c, ones [M, G, W, r], and weights [G, W, T]."""
    return dict(c=torch.ones(len(adapter), G, 2, R, requires_grad=True), weights=uniform(G, 2, T))


@pytest.mark.parametrize("kind, modes", list(zip(KINDS, permutations(MODES))), ids=KINDS)
def test_mixed_batch_equals_its_rollouts_alone_under_left_padding(kind, modes):
    """Losses, gradients and probe gradients."""
    model, adapter = tiny_adapter(kind)
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [2]])).long()
    ids, reading = tokens() * mask, probe(adapter)
    with use(adapter, **masks(*modes), **reading):
        together = nll(model, ids, mask)
        together.sum().backward()
    mixed = grads(adapter)
    for row, mode in enumerate(modes):
        own = probe(adapter, G=1) | dict(weights=reading["weights"][row:row + 1])
        with use(adapter, **masks(mode), **own):
            alone = nll(model, ids[row:row + 1, mask[row] == 1])  # without the padding
            alone.sum().backward()
        torch.testing.assert_close(together[row:row + 1], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(reading["c"].grad[:, row:row + 1], own["c"].grad, rtol=1e-4, atol=1e-5)
    assert_same(mixed, grads(adapter), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, dict(m=False), dict(off=True)], ids=["both blocks", "ablated", "off"])
def test_probe_gradient_matches_finite_differences(kind, options):
    """Of y + sum_w weights[g, w, t] B ((c_w - 1) * A x_t) in each module, along a random direction of c. Of 12 weights
    the last 9 count. The probe changes no value, and leaves no gradient in a parameter."""
    model, adapter = tiny_adapter(kind)
    ids, reading = tokens(), probe(adapter, T=12)
    with use(adapter, **options, **reading):
        value = nll(model, ids)
        gradient = torch.autograd.grad(value.sum(), reading["c"])[0].double()  # [M, G, W, r]
    assert all(p.grad is None for p in adapter.parameters())
    with torch.no_grad(), use(adapter, **options):
        assert torch.equal(nll(model, ids), value)
        for of_module, module in zip(gradient, adapter.modules.values(), strict=True):
            block, direction = module.deployed, torch.randn(3, 2, R, dtype=torch.float64)
            A, B = (block.A0, block.B0) if "off" in options else (block.A0 + block.dA, block.B0 + block.dB)

            def add(step, module, args, y):
                per_token = torch.einsum("gwt,gwr->gtr", reading["weights"][..., 3:].double(), step * direction)
                return y + (per_token * (args[0] @ A.T)) @ B.T

            sides = []
            for step in (1e-5, -1e-5):
                hook = module.register_forward_hook(partial(add, step))
                sides.append(nll(model, ids).sum())
                hook.remove()
            expected = 2e-5 * (of_module * direction).sum()
            torch.testing.assert_close(sides[0] - sides[1], expected, rtol=1e-4, atol=1e-9)


def test_bf16_forward_keeps_the_delta_and_the_literal_form_loses_it():
    """After real updates: relative error of each block's delta in bf16, against float64 on the same input."""
    model, adapter = tiny_adapter(dtype=torch.float32, size=0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, betas=(0.9, 0.99))
    for step in range(10):
        nll(model, tokens(seed=step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in adapter.modules.values():
        for block in (module.deployed, module.quarantine):
            x = torch.randn(4, 16, module.base.in_features).bfloat16()
            exact = literal(x.double(), block)
            ours, theirs = ((y - exact).norm() / exact.norm() for y in (block(x), literal(x, block)))
            assert ours < 0.01 and theirs > 0.5 and block(x).dtype == torch.bfloat16


def test_ablation_equals_never_having_had_the_quarantine():
    (model, adapter), (never_model, never) = tiny_adapter(size=0), tiny_adapter(size=0)
    train(model, adapter, ["clean", "mid", "hack"])
    with torch.no_grad():
        for p, q in zip(never.deployed_parameters(), adapter.deployed_parameters()):
            p.copy_(q)
    with use(adapter, m=False):
        torch.testing.assert_close(model(tokens()).logits, never_model(tokens()).logits, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(tokens()).logits, never_model(tokens()).logits, rtol=1e-3)
    for own in ((model, adapter), (never_model, never)):  # nor does training on clean rollouts depend on it
        train(*own, ["clean", "clean"])
    torch.testing.assert_close(never.deployed_parameters(), adapter.deployed_parameters(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quarantine", [True, False])
def test_folded_forward_equals_the_blocks_and_is_undone_bit_exactly(quarantine, dtype):
    model, adapter = tiny_adapter(dtype=dtype)
    ids, unfolded = tokens(), model(tokens()).logits
    weights = [module.base.weight for module in adapter.modules.values()]
    with torch.no_grad(), use(adapter, m=quarantine):
        expected = model(ids).logits
    with pytest.raises(KeyError), folded(adapter, quarantine=quarantine):
        assert not any(isinstance(module, Lora2rLinear) for module in model.modules())
        error = (model(ids).logits - expected).norm() / expected.norm()  # how one bf16 logit is rounded goes by the CPU
        assert error < (5e-6 if dtype == torch.float32 else 0.04)
        raise KeyError
    assert torch.equal(model(ids).logits, unfolded) and adapter.context == ""
    assert all(module.base.weight is w for module, w in zip(adapter.modules.values(), weights))


@pytest.mark.parametrize("kind, device, replay", [
    *((kind, "cpu", False) for kind in KINDS), ("Llama", "cpu", True),
    pytest.param("Llama", "cuda", True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def test_sampled_and_trained_log_probabilities_are_those_of_hugging_face(kind, device, replay, monkeypatch):
    """Left-padded with a cache, right-padded without a mask, one rollout alone: far beyond the windows of 4 tokens.
    Also with the cache of fixed size that a CUDA graph needs, and, on a GPU, in graphs over two sets of weights."""
    monkeypatch.setattr(lora2r, "REPLAYED", (device,) * replay)
    model, adapter = tiny_adapter(kind, torch.float32)
    model.to(device)
    tok = SimpleNamespace(eos_token_id=2)
    for _ in range(2):
        with folded(adapter, quarantine=False):
            completions, sampled = generate(model, tok, PROMPTS, [2] * 3, uniform(6, 20), 0.7)
        tok.eos_token_id = completions[0][len(completions[0]) // 2]  # then some of them end early, and leave the batch
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    assert len({len(completion) for completion in completions}) > 1
    with torch.no_grad(), use(adapter, m=False):
        (rows, ids, is_completion, _), = batches(prompts, completions, 1000)
        trained = token_logps(model, ids.to(device), is_completion.to(device), 0.7).cpu()
        for j, i in enumerate(rows.tolist()):
            whole = torch.tensor([prompts[i] + completions[i]], device=device)
            logps = torch.log_softmax(model(whole).logits[0] / 0.7, -1)[:-1].gather(1, whole[0, 1:, None])[:, 0]
            expected = logps[len(prompts[i]) - 1:].cpu()
            torch.testing.assert_close(sampled[i], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(trained[j][is_completion[j]], expected, rtol=0, atol=1e-5)


def test_a_rollout_depends_on_its_own_noise_only():
    """Not on other rows, paddings and counts per prompt; and a token on the noise up to its own place."""
    sample = partial(generate, tiny_model(dtype=torch.float32), SimpleNamespace(eos_token_id=7), temperature=1.5)
    noise = uniform(6, 20)
    together, _ = sample(PROMPTS, [2] * 3, noise)
    assert len(set(map(len, together))) > 1  # some end early
    for row, alone in enumerate(together):
        assert sample([PROMPTS[row // 2]], [1], noise[row:row + 1])[0] == [alone]
    assert sample(PROMPTS[:2], [0, 3], noise[[2, 3, 3]])[0] == [together[2], together[3], together[3]]
    noise[:, 2:] = 1 - noise[:, 2:]
    for one, other in zip(together, sample(PROMPTS, [2] * 3, noise)[0]):
        assert one[:2] == other[:2] and (one[2:] != other[2:] or len(one) <= 2)


def test_a_graph_is_for_models_whose_layers_attend_to_everything():
    """And whose positions are those of any length: what a graph launches is fixed."""
    def has_graph(kind, attention="sdpa", rope="default"):
        model = tiny_model(kind, torch.float32)
        cache = transformers.DynamicCache(config=model.config)
        model.get_decoder()(input_ids=tokens(2, 3), cache=cache)
        model.config._attn_implementation = attention
        model.config.rope_parameters = dict(rope_type=rope)
        return replayed(model, cache, torch.ones(2, 3).long(), torch.full((2, 1), 2), room=4) is not None

    assert {kind: has_graph(kind) for kind in KINDS} == {kind: kind == "Llama" for kind in KINDS}
    assert not has_graph("Llama", attention="eager") and not has_graph("Llama", rope="dynamic")


def test_cudnns_attention_is_left_out():
    """Its gradients are NaN on some GPUs (lora2r.load_model)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(str(HERE / "data/nano"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("m, d", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_rollouts_share_is_encoded_once_with_the_same_gradients(kind, m, d):
    """Beyond the windows of 4 tokens: log-probabilities, and every gradient, also through the prompt's own keys. Masks
    per row hold for the prompt's one row if they are equal in all rows."""
    model, adapter = tiny_adapter(kind)
    ids = torch.cat([tokens(1, 9).expand(3, -1), tokens(3, 7, seed=1)], 1)  # [3, 16]
    place = torch.arange(15).expand(3, -1)
    is_completion = (place >= 8) & (place < torch.tensor([[15], [12], [9]]))  # two are right-padded
    found = {}
    for shared in (0, 8):
        with use(adapter, m=torch.tensor([m] * 3), d=torch.tensor([d] * 3)):
            logps = token_logps(model, ids, is_completion, 0.7, shared)
            (logps * torch.linspace(1, 2, 15)).sum().backward()
        found[shared] = dict(logps=logps.detach()) | grads(adapter)
    assert_same(found[8], found[0], rtol=1e-5, atol=1e-8)
    model.activation_checkpointing_enable()
    assert prefill(model, ids, 8) is None, "checkpointing takes no cache"


def test_use_resets_after_an_exception_and_restores_the_outer_state():
    model, adapter = tiny_adapter()
    ids, default = tokens(), model(tokens()).logits
    with pytest.raises(KeyError), use(adapter, **masks("clean", "mid", "hack"), **probe(adapter)):
        raise KeyError
    assert torch.equal(model(ids).logits, default) and adapter.context == ""
    with use(adapter, m=False):
        ablated = model(ids).logits
        with use(adapter, off=True):
            assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
        with pytest.raises(ValueError), use(adapter, m=torch.ones(3)):
            pass
        assert torch.equal(model(ids).logits, ablated) and not torch.allclose(ablated, default)
    assert torch.equal(model(ids).logits, default)
    with folded(adapter), pytest.raises(ValueError, match="leave folded"), use(adapter):
        pass
    with use(adapter), pytest.raises(ValueError, match=r"inside use\(\)"), folded(adapter):
        pass
    for modes in (("clean", "hack"), ("clean", "mid"), ("mid", "hack")):
        with use(adapter, **masks(*modes)), pytest.raises(ValueError, match="2 rollouts.*3 rows"):
            model(ids)


@pytest.mark.parametrize("options,message", [
    (dict(m=torch.ones(3)), "bool"),
    (dict(m=torch.ones(3, 1, dtype=torch.bool)), r"\[3, 1\].*bool \[G\]"),
    (dict(m=torch.tensor([True]), d=torch.tensor([True, False])), r"disagree.*1 and 2"),
    (dict(m=torch.tensor([True, False]), d=torch.tensor([False, True])), r"\(0, 1\)"),
    (dict(m=False, d=True), r"\(0, 1\)"),
    (dict(c=torch.ones(14, 3, 2, R)), r"\[14, 3, 2, 3\].*weights"),
    (dict(c=torch.ones(14, 3, 2, 2 * R), weights=uniform(3, 2, 9)), r"\[14, 3, 2, 6\].*r = 3"),
    (dict(c=torch.ones(14, 3, 1, R), weights=uniform(3, 2, 9)), r"\[14, 3, 1, 3\].*\[M, G, W, r\] with M = 14, r = 3"),
    (dict(off=True, m=True), "off=True")])
def test_use_refuses_wrong_input(options, message):
    with pytest.raises(ValueError, match=message), use(tiny_adapter()[1], **options):
        pass


def test_save_and_load_round_trip_bit_exactly(tmp_path):
    """The same adapter gives the same bytes; a base is the same in fp32 and bf16."""
    _, adapter = tiny_adapter(dtype=torch.float32)
    for name in ("adapter.safetensors", "again"):
        save(adapter, tmp_path / name, {"arm": "routeV", "ä": "\n"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "again"]
    assert (tmp_path / "adapter.safetensors").read_bytes() == (tmp_path / "again").read_bytes()
    info = peek(tmp_path / "again")
    assert info["r"] == R and info["base"]["model_type"] == "qwen3"
    for dtype in (torch.float32, torch.bfloat16):
        _, other = tiny_adapter(dtype=dtype, size=0, seed=5)
        assert load(other, tmp_path / "adapter.safetensors") == info["metadata"] == {"arm": "routeV", "ä": "\n"}
        assert_same(values(adapter), values(other))


def spoiled(change):
    """Rewrites a saved adapter, after a change to its tensors or to its header: {"r", "base", "metadata"}."""
    def spoil(path):
        tensors, info = load_file(path), peek(path)
        change(tensors, info)
        save_file(tensors, path, {lora2r.FORMAT: json.dumps(info)})
    return spoil


def each(change):
    return spoiled(lambda tensors, info: tensors.update({name: change(tensors[name]) for name in tensors}))


def last(change):
    """Spoils the tensor that is copied last: by then the others must not have been."""
    return spoiled(lambda tensors, info: tensors.update({name: change(tensors[name]) for name in [max(tensors)]}))


@pytest.mark.parametrize("model, options, spoil, says", [  # of what is in the file, and what the line says of it
    ({}, {}, lambda path: path.unlink(), "no such file"),
    ({}, {}, lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    ({}, {}, lambda path: save_file({"x": torch.zeros(1)}, path), "format is None"),
    ({}, dict(r=2), None, "rank r = 2.*attach with r=2"),
    ({}, dict(targets=("k_proj",)), None, "tensors differ.*attach with its targets"),
    (dict(seed=1), {}, None, "trained on base model 'first'.*this one is 'qwen3'.*weights"),
    (dict(layers=1), {}, None, "trained on base model 'first'.*num_hidden_layers 1 -> 2"),
    (dict(kind="Llama"), {}, None, "trained on base model 'first'.*model_type llama -> qwen3"),
    ({}, {}, each(lambda t: torch.zeros(1)), "damaged .its tensors are not all F32 and of rank 3"),
    ({}, {}, last(lambda t: t[:1].clone()), r"tensor .* is torch.float32 \[1, .*not torch.float32 \[16, 3"),
    ({}, {}, last(lambda t: t.int()), "damaged .its tensors are not all F32"),
    ({}, {}, last(lambda t: t.bfloat16()), "damaged .its tensors are not all F32"),
    ({}, {}, last(lambda t: t.fill_(float("nan"))), "tensor .* is not finite"),
    ({}, {}, spoiled(lambda tensors, info: info.update(r=10**9)), "damaged .*of rank 1000000000"),
    ({}, {}, spoiled(lambda tensors, info: info.update(r="3")), "damaged .r is '3', not of type int"),
    ({}, {}, spoiled(lambda tensors, info: info.update(base=["x"])), "damaged .base is .*, not of type dict"),
    ({}, {}, spoiled(lambda tensors, info: info.update(base={})), "trained on base model None.*model_type None"),
    ({}, {}, spoiled(lambda tensors, info: info.pop("metadata")), "damaged .metadata is None, not of type dict"),
    ({}, {}, lambda path: save_file({"x": torch.zeros(1)}, path, {lora2r.FORMAT: "[" * 10**5}), "damaged .maximum rec"),
], ids="missing truncated other rank targets weights sizes architecture scalars shape int bf16 nan ranks r base "
       "no_base metadata deep".split())
def test_load_refuses_with_one_clear_line_and_leaves_the_adapter_alone(model, options, spoil, says, tmp_path):
    path, theirs = tmp_path / "adapter.safetensors", tiny_model(**model)
    theirs.config.name_or_path = "first"
    save(attach(theirs, **dict(r=R) | options), path)
    if spoil:
        spoil(path)
    _, adapter = tiny_adapter()
    before = values(adapter)
    with pytest.raises(InputError, match=says) as error:
        load(adapter, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert_same(values(adapter), before)


def test_save_into_a_missing_folder_says_so_and_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    _, adapter = tiny_adapter()
    with pytest.raises(InputError, match="nowhere.*folder exists"):
        save(adapter, tmp_path / "nowhere" / "adapter.safetensors")
    (tmp_path / "a").write_bytes(b"old")

    def disk_full(file, data):
        file.open("wb").close()
        raise OSError("no space left")

    monkeypatch.setattr(type(tmp_path), "write_bytes", disk_full)
    with pytest.raises(InputError, match="no space left"):
        save(adapter, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def exported(folder, format, kind="Qwen3", dtype=torch.float32, size=0.1):
    """(model, adapter) with both blocks moved by `size`; the base is saved at folder/base, the export at folder/out."""
    tiny_model(kind, dtype).save_pretrained(folder / "base")
    model, adapter = tiny_adapter(kind, dtype, size)
    export(model, adapter, folder / "out", format)
    return model, adapter


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft's
@pytest.mark.parametrize("format", ["peft", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_loaded_by_the_usual_libraries_is_the_ablated_model(kind, dtype, format, tmp_path):
    if format == "peft":
        peft = pytest.importorskip("peft", reason="loads the exported adapter with peft itself: pip install peft")
    model, adapter = exported(tmp_path, format, kind, dtype)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / ("base" if format == "peft" else "out"), dtype=dtype)
    assert loaded.state_dict().keys() == tiny_model(kind).state_dict().keys()
    if format == "peft":
        loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "out")
    with torch.no_grad():
        logits, full = loaded.eval()(tokens()).logits, model(tokens()).logits
        with use(adapter, m=False):
            expected = model(tokens()).logits
        with use(adapter, off=True):
            base = model(tokens()).logits
    assert min((base - expected).abs().max(), (full - expected).abs().max()) > 1
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    assert (logits - expected).norm() < tolerance * (base - expected).norm()


def test_exported_adapter_is_a_lora_of_rank_2r_that_bf16_hardly_rounds(tmp_path):
    """lora_B lora_A is B A - B0 A0 of the deployed block; in bf16, as a server would load it, to a percent."""
    model, adapter = exported(tmp_path, "peft", size=1e-3)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1 and config["target_modules"] == list(adapter.modules)
    assert len(tensors) == 2 * len(adapter) and {t.dtype for t in tensors.values()} == {torch.float32}
    for name, module in adapter.modules.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        assert A.shape == (2 * R, module.base.in_features) and B.shape == (module.base.out_features, 2 * R)
        exact = literal(torch.eye(module.base.in_features, dtype=torch.float64), module.deployed).T
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.01)):
            error = (B.to(dtype).double() @ A.to(dtype).double() - exact).norm() / exact.norm()
            assert error < tolerance, (name, dtype, error)


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_holds_nothing_that_the_quarantine_learned(format, tmp_path):
    """The same bytes whatever it learned. Exporting changes nothing, and replaces no folder that holds files."""
    model, adapter = exported(tmp_path, format)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with torch.no_grad():
        for p in adapter.quarantine_parameters():
            p.mul_(-2)
    before = values(adapter)
    export(model, adapter, tmp_path / "again", format)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert_same(values(adapter), before)
    with pytest.raises(InputError, match="base: cannot be written"):
        export(model, adapter, tmp_path / "base", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "base", "out"]
