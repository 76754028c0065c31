"""The invariants of the adapter, on tiny random models. G rollouts, T tokens, M modules, r block rank."""
import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, DynamicCache, Gemma3Config, Gemma3ForCausalLM,
                          Gemma3ForConditionalGeneration, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM,
                          MistralForCausalLM, Phi3ForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)

import lora2r
from evaluate_deploy import export
from lora2r import (HERE, Adapter, InputError, Lora2rLinear, ablate, attach, batches, folded, generate, load,
                    load_model, peek, predicted_memory, prefill, replayed, run_script, sampling_memory, save,
                    token_logps, use)

SIZES = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=61,
             max_position_embeddings=64, initializer_range=0.2, rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
ONE_LAYER_SLIDES = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
KINDS = {"llama": (LlamaForCausalLM, {}),
         "qwen2": (Qwen2ForCausalLM, dict(tie_word_embeddings=True, **ONE_LAYER_SLIDES)),
         "qwen3": (Qwen3ForCausalLM, dict(head_dim=8, **ONE_LAYER_SLIDES)),
         "gemma3": (Gemma3ForCausalLM, dict(head_dim=8, sliding_window=4, tie_word_embeddings=True,
                                            layer_types=["sliding_attention", "full_attention"])),
         "mistral": (MistralForCausalLM, dict(sliding_window=4)),
         "phi3": (Phi3ForCausalLM, dict(sliding_window=4))}
MODES = {"clean": (False, False), "mid": (True, False), "hack": (True, True)}  # (m, d)
R = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices here are too small to share: several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(kind="qwen3", dtype=torch.float64, seed=0, layers=2):
    make_model, options = KINDS[kind]
    torch.manual_seed(seed)
    model = make_model(make_model.config_class(num_hidden_layers=layers, **SIZES, **options)).eval().to(dtype)
    if dtype == torch.float64:  # Hugging Face's RMSNorm computes in fp32; in float64 gradients compare to many digits
        for norm in (module for name, module in model.named_modules() if name.rpartition(".")[2].endswith("norm")):
            norm.forward = partial(F.rms_norm, normalized_shape=norm.weight.shape, eps=1e-6,
                                   weight=norm.weight + (kind == "gemma3"))  # Gemma's scale is 1 + weight
    return model


@torch.no_grad()
def stir(adapter: Adapter, seed=0, size=0.1) -> Adapter:
    """Move both blocks away from init, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.copy_(size * torch.randn(p.shape, generator=generator))
    return adapter


def tiny_adapter(kind="qwen3", dtype=torch.float64, stirred=True, **options):
    """A model with its adapter, which in float64 is cast as well."""
    model = tiny_model(kind, dtype)
    adapter = attach(model, R, **options)
    if dtype == torch.float64:
        model.double()
    return model, stir(adapter) if stirred else adapter


def tokens(G=3, T=9, seed=0):
    return torch.randint(3, 61, (G, T), generator=torch.Generator().manual_seed(seed))


def nll(model, ids, mask=None):
    """Summed NLL per rollout, [G]; `mask` is 1 on real tokens (left padding)."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (loss * (mask[:, :-1] * mask[:, 1:])).sum(1)


def grads(adapter: Adapter):
    """All gradients by name (a missing one is zero), and clears them."""
    named = adapter.tensors("dA", "dB")
    out = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}
    for p in named.values():
        p.grad = None
    return out


def masks(*modes):
    m, d = zip(*(MODES[mode] for mode in modes))
    return {"m": torch.tensor(m), "d": torch.tensor(d)}


def values(adapter: Adapter):
    return {name: t.detach().clone() for name, t in adapter.tensors("dA", "dB", "A0", "B0").items()}


def assert_same(a: dict, b: dict, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=f"{name}: {{}}".format, **(tolerance or dict(rtol=0, atol=0)))


@pytest.mark.parametrize("outcome, status, says", [
    (None, 0, ""), (False, 1, ""), (FloatingPointError("step 3: nan"), 1, "error: step 3: nan\n"),
    (InputError("--lr x: give a number"), 2, "error: --lr x: give a number\n")])
def test_run_script_turns_an_error_into_one_line_and_an_exit_status(capsys, outcome, status, says):
    def main(config):
        assert config == "config"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as e:
        run_script(main, "config")
    assert (e.value.code, capsys.readouterr().err) == (status, says)


# ---- attach and init


@pytest.mark.parametrize("kind", KINDS)
def test_attach_adapts_every_projection_and_freezes_the_base(kind):
    model = tiny_model(kind, torch.float32)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    rng = torch.get_rng_state()
    adapter = attach(model, R)
    assert set(adapter.modules) == linears - {"lm_head"} and adapter.r == R
    assert len(adapter) == 2 * (4 if kind == "phi3" else 7)  # Phi's q, k, v are one layer, and so are gate and up
    assert torch.equal(torch.get_rng_state(), rng)  # attaching does not change what the run draws next
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}
    for name, module in adapter.modules.items():
        assert model.get_submodule(name) is module and isinstance(module, Lora2rLinear)
        for block in (module.deployed, module.quarantine):
            assert block.A0.shape == (R, module.base.in_features) and block.B0.shape == (module.base.out_features, R)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_is_exactly_zero_at_init(kind, dtype):
    model, ids = tiny_model(kind, dtype), tokens()
    before = model(ids).logits
    adapter = attach(model, R)
    assert torch.equal(model(ids).logits, before)
    for mode in MODES:
        with use(adapter, **masks(mode, mode, mode)):
            assert torch.equal(model(ids).logits, before)


def test_vision_tower_is_not_adapted():
    """Gemma 3 from 4B up comes as a model of text and images."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    model = Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=dict(head_dim=8, num_hidden_layers=1, **SIZES), vision_config=vision, mm_tokens_per_image=4)).eval()
    before = model(tokens()).logits
    adapter = attach(model, R)
    assert "q_proj" in {name.rpartition(".")[2] for name, _ in model.model.vision_tower.named_modules()}
    assert len(adapter) == 7 and all(name.startswith("model.language_model.layers.") for name in adapter.modules)
    assert torch.equal(model(tokens()).logits, before)
    assert min(predicted_memory(model, adapter, 100, checkpointing=True)) > 0
    assert min(sampling_memory(model, adapter, 2, 5, 9)) > 0


def test_adapter_is_fp32_on_a_bf16_base_and_depends_on_the_seed_alone():
    adapters = [attach(tiny_model(dtype=dtype), R, seed=seed) for dtype, seed in
                [(torch.bfloat16, 0), (torch.float32, 0), (torch.float32, 1)]]
    bf16, fp32, other_seed = map(values, adapters)
    assert all(t.dtype == torch.float32 for t in bf16.values())
    assert_same(bf16, fp32)
    assert not any(torch.equal(t, other_seed[name]) for name, t in fp32.items() if name.endswith("0"))


def test_init_has_the_stated_variance():
    module = next(iter(attach(tiny_model(), 32).modules.values()))
    for block in (module.deployed, module.quarantine):
        assert block.A0.var().item() == pytest.approx(1 / 32, rel=0.2)  # 1 / d_in
        assert block.B0.var().item() == pytest.approx(1 / 64, rel=0.2)  # 1 / 2r


def test_the_two_blocks_start_apart():
    """Blocks on a shared basis would make ablation mere shrinkage."""
    for module in attach(tiny_model(), R).modules.values():
        A, B = (torch.cat([module.deployed.A0, module.quarantine.A0]),
                torch.cat([module.deployed.B0, module.quarantine.B0], dim=1))
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 2 * R


def test_attach_errors_name_the_value_and_the_remedy():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    with pytest.raises(InputError, match="lm_head.*TARGETS"):
        attach(gpt2, R)
    model, _ = tiny_adapter()
    with pytest.raises(InputError, match="already has an adapter"):
        attach(model, R)
    with pytest.raises(InputError, match="r = 0"):
        attach(tiny_model(), 0)


# ---- what trains


def literal(x, module: Lora2rLinear, A, B):
    A0 = torch.cat([module.deployed.A0, module.quarantine.A0]).to(x)
    B0 = torch.cat([module.deployed.B0, module.quarantine.B0], dim=1).to(x)
    return (x @ A.T) @ B.T - (x @ A0.T) @ B0.T


def whole(module: Lora2rLinear):
    """A [2r, d_in] and B [d_out, 2r] of the literal formula."""
    dep, quar = module.deployed, module.quarantine
    return (torch.cat([dep.A0 + dep.dA, quar.A0 + quar.dA]).detach(),
            torch.cat([dep.B0 + dep.dB, quar.B0 + quar.dB], dim=1).detach())


@pytest.mark.parametrize("stirred", [False, True], ids=["init", "trained"])
def test_value_and_gradients_are_those_of_the_literal_formula(stirred):
    _, adapter = tiny_adapter(stirred=stirred)
    for module in adapter.modules.values():
        x = torch.randn(2, 5, module.base.in_features, dtype=torch.float64, requires_grad=True)
        g = torch.randn(2, 5, module.base.out_features, dtype=torch.float64)
        A, B = (t.requires_grad_() for t in whole(module))
        y = literal(x, module, A, B)
        gA, gB, gx = torch.autograd.grad(y, (A, B, x), g)
        parameters = [getattr(block, key) for key in ("dA", "dB") for block in (module.deployed, module.quarantine)]
        ours = module.delta(x)
        dA_dep, dA_quar, dB_dep, dB_quar, dx = torch.autograd.grad(ours, [*parameters, x], g)
        dA, dB = torch.cat([dA_dep, dA_quar]), torch.cat([dB_dep, dB_quar], dim=1)
        for a, b in ((ours, y), (dA, gA), (dB, gB), (dx, gx)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert min(t.norm() for t in (dA_dep, dA_quar, dB_dep, dB_quar)) > 0.1  # alive, at init as well


GRADIENT_TABLE = [  # mode, block, its gradient
    ("clean", "deployed", "unrouted"), ("clean", "quarantine", "zero"),
    ("mid", "deployed", "unrouted"), ("mid", "quarantine", "unrouted"),
    ("hack", "deployed", "zero"), ("hack", "quarantine", "unrouted"),
]


@pytest.mark.parametrize("batch", ["alone", "mixed"])
@pytest.mark.parametrize("mode,block,expected", GRADIENT_TABLE)
def test_gradient_table(mode, block, expected, batch):
    """Zero, or the unrouted run's for the same upstream gradient. In the mixed batch the other rows have loss 0."""
    _, adapter = tiny_adapter()
    others = [other for other in MODES if other != mode] if batch == "mixed" else []
    for name, module in adapter.modules.items():
        parameters = [getattr(module, block).dA, getattr(module, block).dB]
        x = torch.randn(1 + len(others), 4, module.base.in_features, dtype=torch.float64, requires_grad=True)
        g = torch.randn(1 + len(others), 4, module.base.out_features, dtype=torch.float64)
        g[1:] = 0
        unrouted = torch.autograd.grad(module(x), parameters, g)
        with use(adapter, **masks(mode, *others)):
            routed = torch.autograd.grad(module(x), parameters, g, allow_unused=True)
        for a, b in zip(routed, unrouted):
            assert b.norm() > 0.01
            if expected == "zero":
                assert a is None or not a.any(), name
            else:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode,block,expected", GRADIENT_TABLE)
def test_gradient_table_through_the_whole_model_at_init(mode, block, expected):
    model, adapter = tiny_adapter(stirred=False)
    ids = tokens()
    nll(model, ids).sum().backward()
    unrouted = grads(adapter)
    with use(adapter, **masks(mode, mode, mode)):
        nll(model, ids).sum().backward()
    routed = grads(adapter)
    for name in (name for name in unrouted if f".{block}." in name):
        assert unrouted[name].any()
        torch.testing.assert_close(routed[name], unrouted[name] if expected == "unrouted" else 0 * unrouted[name])


def test_forward_table():
    """clean is the deployed block alone; mid and hack have one forward, and it is both blocks."""
    _, adapter = tiny_adapter()
    module = adapter.modules["model.layers.0.mlp.down_proj"]
    x = torch.randn(3, 4, 48, dtype=torch.float64)
    with use(adapter, **masks("clean", "mid", "hack")):
        y = module(x)
    dep, quar = x @ module.deployed.weight().T, x @ module.quarantine.weight().T
    for row, expected in enumerate((dep, dep + quar, dep + quar)):
        torch.testing.assert_close((y - module.base(x))[row], expected[row], rtol=1e-9, atol=1e-12)


def test_hack_cuts_the_path_through_the_deployed_block_into_x():
    _, adapter = tiny_adapter()
    module = next(iter(adapter.modules.values()))
    x = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 4, module.base.out_features, dtype=torch.float64)
    with use(adapter, **masks("hack")):
        gx, = torch.autograd.grad(module(x), x, g)
    torch.testing.assert_close(gx, g @ (module.base.weight + module.quarantine.weight()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("others", [["clean"], ["mid"], ["hack"]])
def test_nan_in_the_quarantine_never_reaches_a_clean_row(others):
    _, adapter = tiny_adapter()
    module = next(iter(adapter.modules.values()))
    with torch.no_grad():
        module.quarantine.dA.fill_(float("nan"))
    x = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    with use(adapter, **masks("clean", *others)):
        y = module(x)
        gx, = torch.autograd.grad(y.sum(), x)
    assert y[0].isfinite().all() and gx[0].isfinite().all()
    assert y[1].isfinite().all() == (others == ["clean"])


def train(model, adapter, modes, steps=3, optimizer=None, drop=True, ids=None):
    """AdamW steps with the given mode per row, in micro-batches of one row, as a trainer would do them."""
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    ids = tokens(len(modes)) if ids is None else ids
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)  # the hard case: gradients are zeros, not None
        for row, mode in enumerate(modes):
            with use(adapter, **masks(mode)):
                nll(model, ids[row:row + 1]).sum().backward()
        if drop:
            adapter.drop_untrained(trains_dep=set(modes) != {"hack"}, trains_quar=set(modes) != {"clean"})
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("mode,still", [("hack", "deployed"), ("clean", "quarantine")])
def test_block_that_must_not_train_does_not_move_under_adamw_with_momentum(mode, still):
    model, adapter = tiny_adapter(dtype=torch.float32)
    optimizer = train(model, adapter, ["mid", "mid"])  # builds momentum in both blocks
    before, state_before = values(adapter), copy.deepcopy(optimizer.state_dict()["state"])
    train(model, adapter, [mode, mode], optimizer=optimizer)
    after = values(adapter)
    for name in adapter.tensors("dA", "dB"):
        assert torch.equal(before[name], after[name]) == (f".{still}." in name), name
    frozen = {"deployed": adapter.deployed_parameters(), "quarantine": adapter.quarantine_parameters()}[still]
    for index, p in enumerate(adapter.parameters()):
        if any(p is q for q in frozen):  # its moments did not decay either: it resumes where it was
            assert torch.equal(optimizer.state[p]["exp_avg"], state_before[index]["exp_avg"])


def test_without_drop_untrained_adamw_would_move_it():
    model, adapter = tiny_adapter(dtype=torch.float32)
    optimizer = train(model, adapter, ["mid", "mid"])
    before = values(adapter)
    train(model, adapter, ["hack", "hack"], optimizer=optimizer, drop=False)
    assert not any(torch.equal(t, before[name]) for name, t in adapter.tensors("dA", blocks=("deployed",)).items())


def left_padded(lengths=(9, 5, 7)):
    ids, mask = tokens(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :max(lengths) - length] = 0
    return ids * mask, mask


@pytest.mark.parametrize("kind,modes", [("llama", ("clean", "mid", "hack")), ("qwen2", ("hack", "mid", "clean")),
                                        ("qwen3", ("hack", "clean", "clean")), ("qwen3", ("mid", "mid", "hack")),
                                        ("gemma3", ("clean", "mid", "hack")), ("mistral", ("hack", "mid", "clean")),
                                        ("phi3", ("mid", "clean", "hack"))])
def test_mixed_batch_equals_its_rollouts_alone_under_left_padding(kind, modes):
    model, adapter = tiny_adapter(kind)
    ids, mask = left_padded()
    with use(adapter, **masks(*modes)):
        together = nll(model, ids, mask)
        together.sum().backward()
    mixed = grads(adapter)
    alone = []
    for row, mode in enumerate(modes):
        real = mask[row] == 1
        with use(adapter, **masks(mode)):
            loss = nll(model, ids[row:row + 1, real])  # without the padding
            loss.sum().backward()
        alone.append(loss.item())
    torch.testing.assert_close(together, torch.tensor(alone, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert_same(mixed, grads(adapter), rtol=1e-9, atol=1e-10)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, adapter = tiny_adapter()
    ids, mode = tokens(), masks("clean", "mid", "hack")
    with use(adapter, **mode):
        nll(model, ids).sum().backward()
    plain = grads(adapter)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    with use(adapter, **mode):
        nll(model, ids).sum().backward()
    assert_same(grads(adapter), plain, rtol=1e-10, atol=1e-12)
    with use(adapter, **mode):
        loss = nll(model, ids).sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()  # outside, it would compute the layers again without masks: not silently


# ---- the probe


def probe(adapter: Adapter, G: int):
    return torch.ones(len(adapter), G, 2 * R, dtype=torch.float64, requires_grad=True)


def probe_gradient(model, adapter, ids, c, **options):
    with use(adapter, c=c, **options):
        return torch.autograd.grad(nll(model, ids).sum(), c)[0]


@pytest.mark.parametrize("modes", [None, ("clean", "mid", "hack")], ids=["both blocks", "mixed"])
def test_probe_leaves_the_value_exact_and_lands_in_no_parameter(modes):
    model, adapter = tiny_adapter()
    ids, mode = tokens(), {} if modes is None else masks(*modes)
    with use(adapter, **mode):
        without = nll(model, ids)
    with use(adapter, c=probe(adapter, 3), **mode):
        assert torch.equal(nll(model, ids), without)
    probe_gradient(model, adapter, ids, probe(adapter, 3), **mode)
    assert all(p.grad is None for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [None, False], ids=["both blocks", "ablated"])
@pytest.mark.parametrize("stirred", [False, True], ids=["init", "trained"])
def test_probe_gradient_matches_finite_differences(kind, m, stirred):
    model, adapter = tiny_adapter(kind, stirred=stirred)
    ids = tokens()
    gradient = probe_gradient(model, adapter, ids, probe(adapter, 3), m=m)
    assert gradient.shape == (len(adapter), 3, 2 * R) and gradient[..., :R].abs().min() > 0
    assert gradient[..., R:].any() == (m is None)
    picks = torch.randint(0, 10**6, (12, 3), generator=torch.Generator().manual_seed(1)) % torch.tensor(gradient.shape)
    for i, row, k in picks.tolist():
        sides = []
        for step in (1e-5, -1e-5):
            c = probe(adapter, 3).detach()
            c[i, row, k] += step
            with use(adapter, c=c, m=m), torch.no_grad():
                sides.append(nll(model, ids).sum())
        torch.testing.assert_close((sides[0] - sides[1]) / 2e-5, gradient[i, row, k], rtol=1e-6, atol=1e-8)


def test_probe_read_off_is_the_probe_of_an_adapter_at_init():
    """off=True with c: the base model's value exactly, and the deployed block's probe gradient from before training."""
    (model, fresh), (trained_model, trained) = tiny_adapter(stirred=False), tiny_adapter(stirred=True)
    ids = tokens()
    at_init = probe_gradient(model, fresh, ids, probe(fresh, 3), m=False)
    read_off = probe_gradient(trained_model, trained, ids, probe(trained, 3), off=True)
    torch.testing.assert_close(read_off, at_init, rtol=1e-9, atol=1e-12)
    with use(trained, off=True), torch.no_grad():
        value = nll(trained_model, ids)
    with use(trained, off=True, c=probe(trained, 3)):
        assert torch.equal(nll(trained_model, ids), value)


def test_probe_gradient_is_the_formula_and_per_rollout():
    """(B^T g) * (A x) summed over tokens; a rollout's row is what it is when the rollout runs alone."""
    model, adapter = tiny_adapter()
    module = adapter.modules["model.layers.1.mlp.down_proj"]
    x, g = torch.randn(3, 4, 48, dtype=torch.float64), torch.randn(3, 4, 32, dtype=torch.float64)
    c = probe(adapter, 3)
    with use(adapter, c=c):
        gradient, = torch.autograd.grad(module(x), c, g)
    A, B = whole(module)
    formula = torch.einsum("gto,ok,kd,gtd->gk", g, B, A, x)
    torch.testing.assert_close(gradient[module.index], formula, rtol=1e-9, atol=1e-12)
    assert not torch.cat([gradient[:module.index], gradient[module.index + 1:]]).any()

    ids, mode = tokens(), masks("clean", "mid", "hack")
    together = probe_gradient(model, adapter, ids, probe(adapter, 3), **mode)
    for row in range(3):
        own = {name: mask[row:row + 1] for name, mask in mode.items()}
        alone = probe_gradient(model, adapter, ids[row:row + 1], probe(adapter, 1), **own)
        torch.testing.assert_close(together[:, row:row + 1], alone, rtol=1e-9, atol=1e-12)
    assert not together[:, 0, R:].any() and not together[:, 2, :R].any()  # what the masks cut off reads 0


# ---- ablation, fold, export


def test_ablation_equals_never_having_had_the_quarantine():
    ids, modes = tokens(), ["clean", "mid", "hack"]
    model, adapter = tiny_adapter(stirred=False)
    train(model, adapter, modes)
    with use(adapter, m=False):
        masked = model(ids).logits
    assert not torch.allclose(model(ids).logits, masked, rtol=1e-3)
    ablate(adapter)
    assert not any(p.any() for p in adapter.quarantine_parameters())
    # one matmul over both blocks: the quarantine's terms are exactly 0, but the sum may run in another order
    torch.testing.assert_close(model(ids).logits, masked, rtol=1e-12, atol=1e-12)
    with use(adapter, m=False):
        assert torch.equal(model(ids).logits, masked)

    # the same deployed block in an adapter whose quarantine never trained
    never_model, never = tiny_adapter(stirred=False)
    with torch.no_grad():
        for p, q in zip(never.deployed_parameters(), adapter.deployed_parameters()):
            p.copy_(q)
    assert torch.equal(never_model(ids).logits, model(ids).logits)


def test_clean_training_does_not_depend_on_the_quarantine():
    finals = []
    for size in (0, 0.3):
        model, adapter = tiny_adapter(dtype=torch.float32, stirred=False)
        with torch.no_grad():
            for p in adapter.quarantine_parameters():
                p.add_(size * torch.randn_like(p))
        train(model, adapter, ["clean", "clean"])
        finals.append({name: t.detach() for name, t in adapter.tensors("dA", "dB", blocks=("deployed",)).items()})
    assert_same(*finals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quarantine", [True, False])
def test_folded_forward_equals_the_blocks_and_is_undone_bit_exactly(quarantine, dtype):
    model, adapter = tiny_adapter(dtype=dtype)
    ids = tokens()
    weights = {name: (module.base.weight, module.base.weight.detach().clone())
               for name, module in adapter.modules.items()}
    with torch.no_grad(), use(adapter, m=quarantine):
        expected = model(ids).logits
    unfolded = model(ids).logits
    with folded(adapter, quarantine=quarantine):
        assert not any(isinstance(module, Lora2rLinear) for module in model.modules())
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(model(ids).logits, expected, **close)
    with pytest.raises(KeyError), folded(adapter):
        raise KeyError
    for name, (parameter, copied) in weights.items():
        assert model.get_submodule(name) is adapter.modules[name]
        assert adapter.modules[name].base.weight is parameter and torch.equal(parameter, copied)
    assert torch.equal(model(ids).logits, unfolded) and adapter.context == ""


def test_greedy_sampling_is_the_same_folded_and_masked():
    model, adapter = tiny_adapter(dtype=torch.float32)
    ids, mask = left_padded()
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    with use(adapter, m=False):
        masked = model.generate(ids, **options)
    with folded(adapter, quarantine=False):
        assert torch.equal(model.generate(ids, **options), masked)


@pytest.mark.parametrize("kind, replay", [*((kind, False) for kind in KINDS), ("llama", True)])
def test_sampled_and_trained_log_probabilities_are_those_of_hugging_face(kind, replay, monkeypatch):
    """Left-padded with a cache, right-padded without a mask, one rollout alone: far beyond the windows of 4 tokens.
    Also with the cache of fixed size that a CUDA graph needs."""
    monkeypatch.setattr(lora2r, "REPLAYED", ("cpu",) * replay)
    model, adapter = tiny_adapter(kind, torch.float32)
    prompts = [tokens(1, T, seed=T)[0].tolist() for T in (2, 9, 5)]
    noise = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    with folded(adapter, quarantine=False):
        (first, *_), _ = generate(model, SimpleNamespace(eos_token_id=2), prompts, [2] * 3, noise, 0.7)
        eos = first[len(first) // 2]  # some of them end early, and leave the batch
        completions, sampled = generate(model, SimpleNamespace(eos_token_id=eos), prompts, [2] * 3, noise, 0.7)
    prompts = [prompt for prompt in prompts for _ in range(2)]
    assert len({len(completion) for completion in completions}) > 1
    with torch.no_grad(), use(adapter, m=False):
        (rows, ids, is_completion, _), = batches(prompts, completions, 1000)
        trained = token_logps(model, ids, is_completion, 0.7)
        for j, i in enumerate(rows.tolist()):
            whole = torch.tensor([prompts[i] + completions[i]])
            logps = torch.log_softmax(model(whole).logits[0] / 0.7, -1)[:-1].gather(1, whole[0, 1:, None])[:, 0]
            expected = logps[len(prompts[i]) - 1:]
            torch.testing.assert_close(sampled[i], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(trained[j][is_completion[j]], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, dtype", [("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_predicted_memory_of_sampling_is_that_of_a_graph(kind, dtype, monkeypatch):
    """The prompts' keys and values, repeated for their rollouts, beside the copy of fixed size; and the linear layers'
    second weights."""
    monkeypatch.setitem(KINDS, "qwen3", (Qwen3ForCausalLM, dict(head_dim=16)))  # no layer slides; 2 x 32 / 4
    model, adapter = tiny_adapter(kind, dtype)
    caches, originals = [], {name: getattr(lora2r, name) for name in ("DynamicCache", "StaticCache")}
    for name, made in originals.items():
        monkeypatch.setattr(lora2r, name, lambda made=made, **kwargs: caches.append(made(**kwargs)) or caches[-1])
    monkeypatch.setattr(lora2r, "REPLAYED", ("cpu",))
    generate(model, SimpleNamespace(eos_token_id=-1), [[3, 4, 5, 6, 7]] * 3, [2] * 3, torch.rand(6, 20), 0.7)
    held = [layer.keys.nbytes + layer.values.nbytes for cache in caches for layer in cache.layers]
    weights = [p.nbytes for name, p in model.named_parameters() if name.endswith("proj.base.weight")]
    assert len(caches) == 2 and sampling_memory(model, adapter, 6, 5, 20) == (sum(weights), sum(held))
    model.config.num_key_value_heads = None  # in place of 2: a model that does not group its 4 heads
    assert sampling_memory(model, adapter, 6, 5, 20) == (sum(weights), 2 * sum(held))


def test_a_graph_is_for_models_whose_layers_attend_to_everything():
    """And whose positions are those of any length: what a graph launches is fixed."""
    prompt = dict(attend=torch.ones(2, 3, dtype=torch.long), position=torch.full((2, 1), 2), room=4)
    for kind in KINDS:
        model, _ = tiny_adapter(kind, torch.float32)
        cache = DynamicCache(config=model.config)
        model.get_decoder()(input_ids=tokens(2, 3), cache=cache)
        assert (replayed(model, cache, **prompt) is not None) == (kind == "llama")
    model, _ = tiny_adapter("llama", torch.float32)
    model.config._attn_implementation = "eager"  # it adds the mask
    assert replayed(model, cache, **prompt) is None
    model.config._attn_implementation = "sdpa"
    assert replayed(model, cache, **prompt) is not None
    model.config.rope_parameters["rope_type"] = "dynamic"
    assert replayed(model, cache, **prompt) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_samples_what_a_kernel_at_a_time_samples(monkeypatch):
    """Prompts of several lengths, rows that end early; folded weights have other addresses each time."""
    model, tok = load_model(str(HERE / "data/nano"), "cuda")
    adapter = stir(attach(model, R), size=0.01)
    prompts = [list(range(5, 5 + T)) for T in (2, 9, 5)]
    noise, found = torch.rand(6, 20, generator=torch.Generator().manual_seed(0)), []
    for devices in ((), ("cuda",), ("cuda",)):
        monkeypatch.setattr(lora2r, "REPLAYED", devices)
        with folded(adapter):
            found.append(generate(model, tok, prompts, [2] * 3, noise, 1.0))
    for completions, logps in found[1:]:
        assert completions == found[0][0]
        torch.testing.assert_close(torch.cat(logps), torch.cat(found[0][1]), rtol=0, atol=1e-4)


def test_cudnns_attention_is_left_out():
    """Its gradients are NaN on some GPUs (lora2r.load_model)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(str(HERE / "data/nano"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("m, d", [(False, False), (True, False), (True, True)], ids=["clean", "mid", "hack"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_rollouts_share_is_encoded_once_with_the_same_gradients(kind, m, d):
    """Beyond the windows of 4 tokens: log-probabilities, and every gradient, also through the prompt's own keys."""
    model, adapter = tiny_adapter(kind)
    ids = torch.cat([tokens(1, 9).expand(3, -1), tokens(3, 7, seed=1)], 1)  # [3, 16]
    is_completion = torch.arange(15).expand(3, -1) >= torch.tensor([[8], [8], [8]])
    is_completion = is_completion & (torch.arange(15) < torch.tensor([[15], [12], [9]]))  # two are right-padded
    grads = {}
    for shared in (0, 8):
        with use(adapter, m=m, d=d):
            cache = prefill(model, ids, shared)
            logps = token_logps(model, ids, is_completion, 0.7, cache)
            (logps * torch.linspace(1, 2, 15)).sum().backward()
        grads[shared] = [logps.detach()] + [p.grad for p in adapter.parameters() if p.grad is not None]
        for p in adapter.parameters():
            p.grad = None
    assert cache.get_seq_length() == 16
    for together, apart in zip(grads[8], grads[0], strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-8)
    model.activation_checkpointing_enable()
    assert prefill(model, ids, 8) is None, "checkpointing takes no cache"


def exported(folder, kind="qwen3", dtype=torch.float32, size=0.1, format="peft"):
    """(model, adapter) with both blocks moved by `size`; the base is saved at folder/base, the export at folder/out."""
    model = tiny_model(kind, dtype)
    model.save_pretrained(folder / "base")
    adapter = stir(attach(model, R), size=size)
    export(model, adapter, folder / "out", format)
    return model, adapter


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft's
@pytest.mark.parametrize("format", ["peft", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_loaded_by_the_usual_libraries_is_the_ablated_model(kind, dtype, format, tmp_path):
    if format == "peft":
        peft = pytest.importorskip("peft", reason="loads the exported adapter with peft itself: pip install peft")
    model, adapter = exported(tmp_path, kind, dtype, format=format)
    names = tiny_model(kind).state_dict().keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / ("base" if format == "peft" else "out"), dtype=dtype)
    assert loaded.state_dict().keys() == names
    if format == "peft":
        loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "out")
        adapted = {name for name, module in loaded.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
        assert adapted == {f"base_model.model.{name}" for name in adapter.modules}
    with torch.no_grad():
        logits, full = loaded.eval()(tokens()).logits, model(tokens()).logits
        with use(adapter, m=False):
            expected = model(tokens()).logits
        with use(adapter, off=True):
            base = model(tokens()).logits
    assert min((base - expected).abs().max(), (full - expected).abs().max()) > 1
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    else:
        assert (logits - expected).norm() < 0.04 * (base - expected).norm()


def test_exported_adapter_is_a_lora_of_rank_2r_that_bf16_hardly_rounds(tmp_path):
    """lora_B lora_A is B A - B0 A0 of the deployed block; in bf16, as a server would load it, to a percent."""
    model, adapter = exported(tmp_path, size=1e-3)
    tensors, config = load_file(tmp_path / "out/adapter_model.safetensors"), json.loads(
        (tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1 and config["target_modules"] == list(adapter.modules)
    assert len(tensors) == 2 * len(adapter) and {t.dtype for t in tensors.values()} == {torch.float32}
    for name, module in adapter.modules.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        assert A.shape == (2 * R, module.base.in_features) and B.shape == (module.base.out_features, 2 * R)
        A0, B0, dA, dB = (getattr(module.deployed, key).detach().double() for key in ("A0", "B0", "dA", "dB"))
        exact = (B0 + dB) @ (A0 + dA) - B0 @ A0
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.01)):
            error = (B.to(dtype).double() @ A.to(dtype).double() - exact).norm() / exact.norm()
            assert error < tolerance, (name, dtype, error)


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_holds_nothing_that_the_quarantine_learned(format, tmp_path):
    """No row of what it learned, in no dtype; and the same bytes whatever it learned."""
    model, adapter = exported(tmp_path, format=format)
    before = model(tokens()).logits
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files and sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]

    def found(block):
        rows = [row for module in adapter.modules.values() for b in [getattr(module, block)]
                for t in (b.dA, b.A0 + b.dA, b.dB, b.B0 + b.dB) for row in t.detach()]
        pieces = [row.view(torch.uint8).numpy().tobytes() for row in rows] + [
            row.bfloat16().view(torch.uint8).numpy().tobytes() for row in rows if len(row) > R]
        return sum(piece in data for piece in pieces for data in files.values())

    assert found("quarantine") == 0 and (found("deployed") > 0 or format == "merged")
    with torch.no_grad():
        for p in adapter.quarantine_parameters():
            p.mul_(-2)
    export(model, adapter, tmp_path / "again", format)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    with torch.no_grad():
        for p in adapter.quarantine_parameters():
            p.div_(-2)
    assert torch.equal(model(tokens()).logits, before)  # exporting changed nothing


def test_export_replaces_nothing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    model, adapter = exported(tmp_path)
    with pytest.raises(InputError, match="--export .*base: exists"):
        export(model, adapter, tmp_path / "base", "merged")

    def full(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_text("a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(InputError, match="again: cannot be written .No space left"):
        export(model, adapter, tmp_path / "again", "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"] and not adapter.context


# ---- precision


def test_bf16_forward_keeps_the_delta_and_the_literal_form_loses_it():
    """After real updates: relative error of each module's delta in bf16, against float64 on the same input."""
    model, adapter = tiny_adapter(dtype=torch.float32, stirred=False)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, betas=(0.9, 0.99))
    for step in range(10):
        nll(model, tokens(seed=step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, literals = [], []
    for module in adapter.modules.values():
        x = torch.randn(4, 16, module.base.in_features).bfloat16()
        A, B = whole(module)
        double = copy.deepcopy(module).double()
        exact = literal(x.double(), double, *whole(double))
        ours.append(((module.delta(x) - exact).norm() / exact.norm()).item())
        literals.append(((literal(x, module, A.bfloat16(), B.bfloat16()) - exact).norm() / exact.norm()).item())
    assert max(ours) < 0.01, ours
    assert min(literals) > 0.5, literals  # most of it is rounding


# ---- the context


def test_use_resets_after_an_exception_and_restores_the_outer_state():
    model, adapter = tiny_adapter()
    ids = tokens()
    default = model(ids).logits
    with pytest.raises(KeyError), use(adapter, **masks("clean", "mid", "hack"), c=probe(adapter, 3)):
        raise KeyError
    assert torch.equal(model(ids).logits, default) and adapter.context == ""
    with use(adapter, m=False):
        ablated = model(ids).logits
        with use(adapter, off=True):
            base = model(ids).logits
        with pytest.raises(ValueError), use(adapter, m=torch.ones(3)):
            pass
        assert torch.equal(model(ids).logits, ablated)
    assert torch.equal(model(ids).logits, default)
    assert torch.equal(base, tiny_model()(ids).logits) and not torch.equal(base, ablated)


@pytest.mark.parametrize("options,message", [
    (dict(m=torch.ones(3)), "bool"),
    (dict(m=torch.ones(3, 1, dtype=torch.bool)), r"\[3, 1\].*bool \[G\]"),
    (dict(m=torch.tensor([True]), d=torch.tensor([True, False])), r"disagree.*\[1, 2\]"),
    (dict(m=torch.tensor([True, False]), d=torch.tensor([False, True])), r"\(0, 1\)"),
    (dict(m=False, d=True), r"\(0, 1\)"),
    (dict(c=torch.ones(14, 3, R)), r"\[14, 3, 3\].*\[14, G, 6\]"),
    (dict(off=True, m=True), "off=True"),
])
def test_use_refuses_wrong_input(options, message):
    _, adapter = tiny_adapter()
    with pytest.raises(ValueError, match=message), use(adapter, **options):
        pass


def test_contexts_refuse_what_would_go_wrong_silently():
    model, adapter = tiny_adapter()
    with folded(adapter), pytest.raises(ValueError, match="leave folded"), use(adapter):
        pass
    with use(adapter), pytest.raises(ValueError, match=r"inside use\(\)"), folded(adapter):
        pass
    with folded(adapter), pytest.raises(ValueError, match=r"inside folded\(\)"), folded(adapter):
        pass
    with use(adapter, **masks("clean", "hack")), pytest.raises(ValueError, match="2 rollouts.*3 rows"):
        model(tokens(3))


# ---- files


def test_save_and_load_round_trip_bit_exactly(tmp_path):
    model, adapter = tiny_adapter(dtype=torch.float32)
    save(adapter, tmp_path / "adapter.safetensors", {"arm": "routeV", "ä": "\n"})
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    info = peek(tmp_path / "adapter.safetensors")
    assert info["r"] == R and info["base"]["model_type"] == "qwen3"
    assert info["metadata"] == {"arm": "routeV", "ä": "\n"}
    other_model, other = tiny_adapter(dtype=torch.float32, stirred=False, seed=5)
    assert load(other, tmp_path / "adapter.safetensors") == {"arm": "routeV", "ä": "\n"}
    assert_same(values(adapter), values(other))
    assert torch.equal(model(tokens()).logits, other_model(tokens()).logits)


def test_a_base_is_the_same_in_fp32_and_bf16(tmp_path):
    adapters = [attach(tiny_model(dtype=dtype), R) for dtype in (torch.float32, torch.bfloat16)]
    save(stir(adapters[0]), tmp_path / "a")
    load(adapters[1], tmp_path / "a")
    assert_same(*map(values, adapters))


BAD_FILES = {  # what is wrong -> what the line says
    "missing": "no such file",
    "truncated": "damaged",
    "not an adapter": "format is None",
    "rank": "rank r = 2.*attach with r=2",
    "weights": "trained on base model 'first'.*this one is 'second'.*weights",
    "sizes": "trained on base model 'first'.*num_hidden_layers 1 -> 2",
    "architecture": "trained on base model 'first'.*model_type llama -> qwen3",
    "targets": "tensors differ.*attach with its targets",
}


@pytest.mark.parametrize("wrong", BAD_FILES)
def test_load_refuses_with_one_clear_line_and_leaves_the_adapter_alone(wrong, tmp_path):
    path = tmp_path / "adapter.safetensors"
    theirs = tiny_model("llama" if wrong == "architecture" else "qwen3", seed=1 if wrong == "weights" else 0,
                        layers=1 if wrong == "sizes" else 2)
    theirs.config.name_or_path = "first"
    options = {"targets": ("k_proj",)} if wrong == "targets" else {}
    save(attach(theirs, 2 if wrong == "rank" else R, **options), path)
    if wrong == "missing":
        path.unlink()
    if wrong == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if wrong == "not an adapter":
        save_file({"x": torch.zeros(1)}, path)
    ours = tiny_model()
    ours.config.name_or_path = "second"
    adapter = stir(attach(ours, R))
    before = values(adapter)
    with pytest.raises(InputError, match=BAD_FILES[wrong]) as error:
        load(adapter, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert_same(values(adapter), before)


def test_save_into_a_missing_folder_says_so_and_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    _, adapter = tiny_adapter(dtype=torch.float32)
    with pytest.raises(InputError, match="nowhere.*folder exists"):
        save(adapter, tmp_path / "nowhere" / "adapter.safetensors")
    save(adapter, tmp_path / "a")
    old = (tmp_path / "a").read_bytes()

    def disk_full(file, data):
        with file.open("wb") as handle:
            handle.write(data[:100])
        raise OSError("no space left")
    monkeypatch.setattr(type(tmp_path), "write_bytes", disk_full)
    with pytest.raises(InputError, match="no space left"):
        save(adapter, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a"]
