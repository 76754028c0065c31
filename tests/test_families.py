"""Each causal language model of transformers, in tiny: it works from sampling to export, or one line refuses it.

    python -m pytest tests/test_families.py --slow -s        # prints the list of architectures
"""
import inspect
import signal
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as FAMILIES

import lora2r
from evaluate_deploy import export
from lora2r import InputError, attach, batches, folded, generate, token_logps, use
from train_grpo import Config, train

SIZES = dict(  # whatever of it a config knows
    vocab_size=300, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, is_decoder=True,
    hidden_size=32, d_model=32, n_embd=32, lru_width=32, intermediate_size=48, ffn_dim=48, decoder_ffn_dim=48,
    num_hidden_layers=4, n_layer=4, decoder_layers=2, encoder_layers=1, max_position_embeddings=64, n_positions=64,
    num_attention_heads=4, n_head=4, decoder_attention_heads=4, encoder_attention_heads=4, num_key_value_heads=2,
    head_dim=8, rotary_dim=8, sliding_window=4, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_topk=2, n_group=1, topk_group=1,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_head_dim=16,
    linear_num_heads=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_head_dim=8, linear_key_head_dim=8,
    linear_value_head_dim=8,
    mamba_n_heads=8, mamba_d_head=8, mamba_expand=2, mamba_d_state=8, mamba_num_heads=8, mamba_head_dim=8,
    ssm_state_size=8, full_attention_interval=2, attn_layer_period=2, attn_layer_offset=1, image_size=28)
HYBRID = ["linear_attention", "full_attention"] * 2
SHARED_KEYS = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
VISION = dict(model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
              image_size=28)
EXTRAS = dict(  # by model_type
    bamba=dict(attn_layer_indices=[1]), bailing_hybrid=dict(layer_group_size=2), falcon_h1=dict(mamba_d_ssm=64),
    gemma3=dict(vision_config=VISION, mm_tokens_per_image=4), gemma3n_text=SHARED_KEYS, gemma4_text=SHARED_KEYS,
    gpt_neo=dict(attention_types=[[["global", "local"], 2]]), kimi_linear=dict(layer_types=HYBRID),
    lfm2_moe=dict(layer_types=["conv", "full_attention"] * 2), zaya=dict(num_experts_per_tok=1),
    zamba2=dict(layers_block_type=["linear_attention", "hybrid"] * 2))


def tiny_config(config_class):
    known = {*inspect.signature(config_class).parameters, *config_class.attribute_map}
    for parent in config_class.__mro__:
        known |= vars(parent).get("__annotations__", {}).keys()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has as many keys as queries
        sizes["num_key_value_heads"] = 4
    for name, part in config_class.sub_configs.items():
        if part is not transformers.AutoConfig:
            sizes[name] = tiny_config(part).to_dict()
    return config_class(**sizes | EXTRAS.get(config_class.model_type, {}))


def tiny(config_class):
    config = tiny_config(config_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 2e7:
        raise MemoryError(f"{size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def check(model, folder, **options):
    """Sampled and trained log-probabilities are equal, a hack rollout trains the quarantine alone, a shared prefix
    changes no gradient, and what is exported is the ablated model."""
    adapter = attach(model, 3, **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    prompts, noise = [list(range(5, 10)), list(range(20, 37))], torch.rand(4, 12)
    with folded(adapter, quarantine=False):
        completions, sampled = generate(model, SimpleNamespace(eos_token_id=2), prompts, [2, 2], noise, 0.7)
    (rows, ids, is_completion, _), = batches([p for p in prompts for _ in range(2)], completions, 1000)
    with torch.no_grad(), use(adapter, m=False):
        trained = token_logps(model, ids, is_completion, 0.7)
        expected = model(input_ids=ids).logits
    for row, logps, mask in zip(rows, trained, is_completion):
        torch.testing.assert_close(logps[mask], sampled[row], rtol=1e-4, atol=1e-4)
    m, d = torch.tensor([[True, True, False, True], [True, False, False, False]])
    for row in range(4):  # all rollouts are in the forward; only this one has a loss
        with use(adapter, m, d):
            token_logps(model, ids, is_completion)[row].sum().backward()
        found = [any(p.grad is not None and p.grad.any() for p in block)
                 for block in (adapter.deployed_parameters(), adapter.quarantine_parameters())]
        assert found == [not d[row], m[row]]
        model.zero_grad()
    gradients, same = [], rows >= 2  # the two rollouts of the second prompt
    for shared in (0, 16):
        logps = token_logps(model, ids[same], is_completion[same], 0.7, shared)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), adapter.parameters())]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    export(model, adapter, folder)
    with torch.no_grad():
        logits = type(model).from_pretrained(folder).eval()(input_ids=ids).logits
        with use(adapter, off=True):
            base = model(input_ids=ids).logits
    assert (base - expected).norm() > 1e-3 * expected.norm() and (logits - expected).norm() < 1e-5 * expected.norm()


FALCON = dict(targets=("query_key_value", "dense", "dense_4h_to_h"))  # changes what its layers return in place
DOES_NOT_FIT = r"--model: {} models do not fit this code \(.*\); use another model"


@pytest.mark.parametrize("name, options, refusal", [
    ("llama", {}, None), ("qwen2", {}, None), ("phi3", {}, None), ("qwen3_moe", {}, None), ("gemma4", {}, None),
    ("qwen2_moe", {}, None), ("qwen3_5_text", {}, None), ("falcon", FALCON, None),
    ("gpt2", {}, r"only nn.Linear.*\(Conv1D, .*use another"), ("zamba2", {}, "share their weights"),
    ("cohere", {}, DOES_NOT_FIT.format("cohere")), ("minimax", {}, DOES_NOT_FIT.format("minimax"))])
def test_a_family_works_or_is_refused_in_one_line(name, options, refusal, tmp_path):
    model = tiny(transformers.CONFIG_MAPPING[name])
    if refusal is None:
        return check(model, tmp_path / "out", **options)
    with pytest.raises(InputError, match=refusal) as error:
        attach(model, 3, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, says", [
    ("llama", "adapts 100 % of the decoder's weights"),
    ("phi", "adapts 33 % of the decoder's weights; left out: dense, fc1, fc2"),  # 2048 of 6144 a layer
    ("mixtral", "adapts 14 % of the decoder's weights; left out: experts, gate")])  # 3072 of 21632
def test_coverage_names_what_is_not_adapted(name, says):
    assert attach(tiny(transformers.CONFIG_MAPPING[name]), 3).coverage() == says


def test_a_refusal_comes_before_anything_is_written(small, tmp_path, monkeypatch):
    def refuse(adapter):
        raise InputError("it does not fit")

    monkeypatch.setattr(lora2r, "rehearse", refuse)
    with pytest.raises(InputError, match="it does not fit"):
        train(Config(**small, out_dir=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_family_works_or_is_refused(tmp_path):
    """Some three minutes. One that breaks, or that takes more than a minute, ends the walk of no other."""
    found = {stage: {} for stage in ("works", "refused", "no tiny config", "broken")}

    def out_of_time(*_):
        raise TimeoutError("60 s")

    signal.signal(signal.SIGALRM, out_of_time)
    for config_class, model_class in FAMILIES.items():
        stage, result = "no tiny config", model_class.__name__
        signal.alarm(60)
        try:
            model = tiny(config_class)
            stage = "broken"
            check(model, tmp_path / config_class.model_type)
            stage = "works"
        except InputError as e:
            stage, result = "refused", str(e)
        except Exception as e:
            result = lora2r.first_line(e)
        finally:
            signal.alarm(0)
        found[stage][config_class.model_type] = result
    for stage, families in found.items():
        print(f"\n{stage}, {len(families)}:", *(f"    {name}: {result}" for name, result in families.items()), sep="\n")
    assert not found["broken"] and len(found["works"]) >= 30 and len(found["works"]) + len(found["refused"]) >= 45
