"""A rank-2r LoRA whose two blocks train apart; then the tokens, log-probabilities, sampling and files around it.

Each target nn.Linear of a frozen base model becomes y = W x + B (A x) - B0 (A0 x), with A [2r, d_in] and B [d_out, 2r]
trained from their frozen Gaussian init A0, B0: the delta is exactly 0 at init, but A x is not, so gradients flow.
Ranks [:r] are the *deployed* block, ranks [r:] the *quarantine*. B A has no cross terms: the blocks are two independent
adapters in one layer. A mask (m, d) per rollout says what they do, and which of them trains:

    label   m  d   forward                  trains
    clean   0  0   deployed                 deployed
    mid     1  0   deployed + quarantine    both
    hack    1  1   deployed + quarantine    quarantine (the deployed block's output is detached)

    model, tok = load_model("data/nano")
    adapter = attach(model, r=32)
    with use(adapter, m=m, d=d):                           # bool [G], one entry per rollout
        token_logps(model, ids, is_completion).sum().backward()
    adapter.drop_untrained(trains_dep=bool((~d).any()), trains_quar=bool(m.any()))
    optimizer.step()
    with folded(adapter, quarantine=False):                # the model that ships
        generate(model, tok, prompts, n, noise, temperature=0.7)
    save(adapter, "adapter.safetensors", {"arm": "routeV"})

Shapes: G rollouts (rows of a batch), T tokens, V vocabulary, M adapted layers, r block rank, d_in, d_out of a layer.
Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); gradient routing, Cloud et al. 2024 (arXiv 2410.04332); masks on a
part of the weights that is later removed: SGTM, Shilov et al. 2025 (arXiv 2512.05648).
"""
import copy
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Iterator, NoReturn

import huggingface_hub
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save as to_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache, logging
from transformers.cache_utils import StaticLayer

HERE = Path(__file__).resolve().parent
TARGETS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
FORMAT = "vgrout-lora2r-2"
SHARED = 512  # prefix sharing: smallest saving, in tokens, for which the rollouts of a prompt get their own micro-batch
LOGITS = 2**27  # fp32 logits that exist at once (0.5 GB, and as much again for each step of the log-softmax)


# ------------------------------------------------------------------------------------------------ the adapter
class Block(nn.Module):
    """One rank-r adapter, stored as its difference from init: A = A0 + dA [r, d_in], B = B0 + dB [d_out, r]."""

    def __init__(self, A0: Tensor, B0: Tensor):
        super().__init__()
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)
        self.dA = nn.Parameter(torch.zeros_like(A0))
        self.dB = nn.Parameter(torch.zeros_like(B0))

    def weight(self) -> Tensor:
        """The delta B A - B0 A0 as a matrix [d_out, d_in]."""
        return (self.B0 + self.dB) @ self.dA + self.dB @ self.A0

    def factors(self) -> tuple[Tensor, Tensor]:
        """The delta as a LoRA of rank 2r: [dA; A0] [2r, d_in] and [B, dB] [d_out, 2r].

        [A; A0] and [B, -B0] have the same product, but as a small difference of large numbers: bf16 would lose most of
        it. dA and A differ by a constant, so the gradients are equal, too.
        """
        return torch.cat([self.dA, self.A0]), torch.cat([self.B0 + self.dB, self.dB], dim=1)

    def forward(self, x: Tensor) -> Tensor:  # [G, T, d_in] -> [G, T, d_out]
        down, up = self.factors()  # fp32; the matmuls have x's dtype
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


class ReadProbe(torch.autograd.Function):
    """The c-probe, a virtual diagonal between A and B: y + sum_w weights[w, t] B ((c_w - 1) * A x_t), which is y where
    c is 1. Its gradient is, for each w, the sum over tokens of weights[w, t] (B^T dy_t) * (A x_t)."""

    @staticmethod
    def forward(ctx, y: Tensor, c: Tensor, h: Tensor, B: Tensor, weights: Tensor):
        ctx.save_for_backward(h, B, weights)  # h = A x [G, T, r], B [d_out, r], weights [G, W, T]
        return y.data  # [G, T, d_out]; not a view: some models change the output in place

    @staticmethod
    def backward(ctx, g: Tensor):
        h, B, weights = ctx.saved_tensors
        at_token = (g @ B) * h  # [G, T, r]
        return g, weights @ at_token.float(), None, None, None  # [G, W, r], the gradient of c


@dataclass
class State:
    """What a forward needs to know, set by `use` for all layers at once."""
    m: Tensor | bool = True  # quarantine on: indices of such rows; a bool holds for every row
    d: Tensor | bool = False  # deployed block detached: bool [G, 1, 1]; a bool holds for every row
    off: bool = False  # the base model alone
    c: Tensor | None = None  # probe [M, G, W, r]
    weights: Tensor | None = None  # of the probe's tokens [G, W, T]
    G: int | None = None  # rows that per-row masks and the probe are for; None: any number


class Lora2rLinear(nn.Module):
    """A frozen linear layer `.base` with a deployed and a quarantine block."""

    def __init__(self, base: nn.Linear, A0: Tensor, B0: Tensor, index: int, state: State):
        super().__init__()
        self.base, self.index, self.state = base, index, state
        self.deployed, self.quarantine = (Block(a.clone(), b.clone()) for a, b in zip(A0.chunk(2), B0.chunk(2, dim=1)))

    def forward(self, x: Tensor) -> Tensor:  # [G, T, d_in] -> [G, T, d_out]
        s, block = self.state, self.deployed
        if x.dim() == 2 and s.G:  # some shared experts get rollouts and tokens in one dimension
            return self.forward(x.view(s.G, -1, x.shape[1])).flatten(0, 1)
        y = self.base(x)
        if not s.off:
            if s.G not in (None, len(x)):
                raise ValueError(f"use() got masks or probes of {s.G} rollouts, but the forward has {len(x)} rows: "
                                 "give one entry per row of input_ids, or m=True / m=False for all")
            deployed = block(x)
            # THE CUT: a rollout with d sends no gradient into the deployed dA and dB, nor through this block into x.
            # The value stays: the quarantine then learns only what the deployed block does not already explain.
            if s.d is True:
                deployed = deployed.detach()
            elif s.d is not False:
                deployed = torch.where(s.d, deployed.detach(), deployed)
            y = y + deployed
            if s.m is True:
                y = y + self.quarantine(x)
            elif s.m is not False:
                # Rows with m = 0 never enter the quarantine, not even times 0: no gradient and no NaN passes between.
                y = y.index_add(0, s.m, self.quarantine(x.index_select(0, s.m)))
        if s.c is not None and torch.is_grad_enabled():
            A, B = (block.A0, block.B0) if s.off else (block.A0 + block.dA, block.B0 + block.dB)
            with torch.no_grad():  # the probe alone is asked for
                h = F.linear(x, A.to(x.dtype))  # [G, T, r]
            y = ReadProbe.apply(y, s.c[self.index], h, B.detach().to(x.dtype), s.weights[..., -x.shape[1] :])
        return y


class Adapter:
    """The M adapted layers of one model: `.modules` maps name to Lora2rLinear in order, `.r` is the block rank."""

    def __init__(self, model: nn.Module, modules: dict[str, Lora2rLinear], r: int, base: dict[str, str], state: State):
        self.model, self.modules, self.r, self.base, self.state = model, modules, r, base, state  # base: fingerprint
        self.context = ""  # "use" or "folded" while inside one

    def __len__(self) -> int:
        return len(self.modules)

    def tensors(self, *keys: str, blocks: tuple[str, ...] = ("deployed", "quarantine")) -> dict[str, Tensor]:
        """The tensors called dA, dB, A0 or B0, not copied, under the names that they have on disk."""
        return {f"{name}.{block}.{key}": getattr(getattr(module, block), key)
                for name, module in self.modules.items() for block in blocks for key in keys}

    def deployed_parameters(self) -> list[nn.Parameter]:
        return list(self.tensors("dA", "dB", blocks=("deployed",)).values())

    def quarantine_parameters(self) -> list[nn.Parameter]:
        return list(self.tensors("dA", "dB", blocks=("quarantine",)).values())

    def parameters(self) -> list[nn.Parameter]:
        return self.deployed_parameters() + self.quarantine_parameters()

    def drop_untrained(self, trains_dep: bool, trains_quar: bool) -> None:
        """Between backward and optimizer.step(): a block that no rollout of the step trains gets .grad = None. By a
        zero gradient AdamW would still move it, with its momentum."""
        for p in [] if trains_dep else self.deployed_parameters():
            p.grad = None
        for p in [] if trains_quar else self.quarantine_parameters():
            p.grad = None

    def coverage(self) -> str:
        """How much of the decoder's weight matrices is adapted, and the names of the layers that are not."""
        sizes: Counter[str] = Counter()  # by a layer's last name, which is "base" inside a Lora2rLinear
        for name, module in self.model.get_decoder().named_modules():
            for p in [] if isinstance(module, (nn.Embedding, Block)) else module.parameters(recurse=False):
                sizes[name.rpartition(".")[2]] += p.numel() if p.dim() > 1 else 0
        left_out = ", ".join(sorted(name for name, size in sizes.items() if size and name != "base"))
        share = f"adapts {100 * sizes['base'] // sizes.total()} % of the decoder's weights"
        return f"{share}; left out: {left_out}" if left_out else share


def attach(model: nn.Module, r: int, seed: int = 0, targets: tuple[str, ...] = TARGETS) -> Adapter:
    """Freeze `model` and replace every nn.Linear whose last name is in `targets` by a Lora2rLinear, inside the decoder
    alone: the LM head and a vision tower stay as they are.

    A0 ~ N(0, 1/d_in), B0 ~ N(0, 1/2r), drawn on the CPU from `seed` in module order. The adapter is fp32 whatever the
    base is: cast and move the model first. Raises InputError for a model that cannot be adapted.
    """
    if r < 1:
        raise InputError(f"adapter rank r = {r}: give a block rank of at least 1")
    if any(isinstance(module, Lora2rLinear) for module in model.modules()):
        raise InputError("this model already has an adapter: use that one, or load the model afresh")
    decoder = set(model.get_decoder().modules())
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if isinstance(module, nn.Linear) and module in decoder}
    chosen = {name: base for name, base in linears.items() if name.rpartition(".")[2] in targets}
    if not linears:
        kinds = {type(x).__name__ for x in decoder if hasattr(x, "weight") and not isinstance(x, nn.Embedding)}
        raise InputError("--model: only nn.Linear layers can be adapted, and its decoder has none "
                         f"({', '.join(sorted(kinds))}); use another model")
    if not chosen:
        found = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise InputError(f"--model: none of its decoder's linear layers ({found}) is called {', '.join(targets)}; "
                         "name some of them in lora2r.TARGETS, or use another model")
    if len({base.weight for base in chosen.values()}) < len(chosen):
        raise InputError("--model: some of its layers share their weights, and one weight can have only one adapter; "
                         "use another model")
    model.requires_grad_(False)
    base_model, state = fingerprint(model), State()
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, Lora2rLinear] = {}
    for index, (name, base) in enumerate(chosen.items()):
        A0 = torch.randn(2 * r, base.in_features, generator=generator, dtype=torch.float32) / base.in_features**0.5
        B0 = torch.randn(base.out_features, 2 * r, generator=generator, dtype=torch.float32) / (2 * r) ** 0.5
        modules[name] = Lora2rLinear(base, A0, B0, index, state).to(base.weight.device)
        model.set_submodule(name, modules[name])
    adapter = Adapter(model, modules, r, base_model, state)
    rehearse(adapter)
    return adapter


@contextmanager
def use(adapter: Adapter, m: Tensor | bool | None = None, d: Tensor | bool | None = None, off: bool = False,
        c: Tensor | None = None, weights: Tensor | None = None) -> Iterator[None]:
    """Set what the forwards inside need; put back what was there before, also after an exception.

    m: bool [G], quarantine on (None: everywhere). d: bool [G], deployed block detached (None: nowhere). A plain bool
    holds for every row of any batch: use(adapter, m=False) is the model with the quarantine ablated.
    off: the base model alone; the probe is then read at the adapter's init.
    c: the deployed block's probe, ones [M, G, W, r] with requires_grad. weights [G, W, T]: how much of each token
    enters each of W readings; of a forward of the last T' tokens the last T' weights count. Then
    torch.autograd.grad(nll.sum(), c) is [M, G, W, r]; under torch.no_grad nothing is probed.
    Under gradient checkpointing the backward runs the forward again: call it inside the context too.
    Raises ValueError for wrong shapes, for (m, d) = (0, 1), under which nothing would train, and inside `folded`.
    """
    if adapter.context == "folded":
        raise ValueError("use() inside folded(): folded weights have no blocks to mask or probe; leave folded() first")
    if off and (m is not None or d is not None):
        raise ValueError("off=True is the base model alone: it takes no m or d")
    m, d = torch.as_tensor(True if m is None else m), torch.as_tensor(False if d is None else d)
    for name, mask in (("m", m), ("d", d)):
        if mask.dtype != torch.bool or mask.dim() > 1:
            raise ValueError(f"{name} is {mask.dtype} {list(mask.shape)}: it must be bool [G], one entry per rollout")
    if m.dim() and d.dim() and len(m) != len(d):
        raise ValueError(f"m and d disagree on the number of rollouts G: {len(m)} and {len(d)}")
    if (d.cpu() & ~m.cpu()).any():
        raise ValueError("(m, d) = (0, 1): quarantine off and deployed block detached, nothing would train")
    if c is not None and (weights is None or c.shape != (len(adapter), *weights.shape[:2], adapter.r)):
        raise ValueError(f"probe c is {list(c.shape)}: it must be [M, G, W, r] with M = {len(adapter)}, r = {adapter.r}"
                         " and weights [G, W, T]")
    G = max((len(mask) for mask in (m, d) if mask.dim()), default=None) if c is None else len(weights)
    device = next(iter(adapter.modules.values())).deployed.dA.device
    # A mask that is equal for all rows becomes a bool: it costs no indexing, and holds for a shared prefix's one row.
    m = bool(m.all()) if m.all() or not m.any() else m.nonzero()[:, 0].to(device)
    d = bool(d.all()) if d.all() or not d.any() else d[:, None, None].to(device)
    per_row = c is not None or isinstance(m, Tensor) or isinstance(d, Tensor)
    before = adapter.context, dict(vars(adapter.state))
    try:
        adapter.context = "use"
        vars(adapter.state).update(m=m, d=d, off=off, c=c, weights=weights, G=G if per_row else None)
        yield
    finally:
        adapter.context = before[0]
        vars(adapter.state).update(before[1])


@contextmanager
def folded(adapter: Adapter, quarantine: bool = True) -> Iterator[None]:
    """Sample fast: the model gets its plain linear layers back, with weights W + dW; undone bit-exactly afterwards.

    quarantine=False folds the deployed block alone: the model that ships. No gradients inside. W + dW is rounded to the
    base's dtype: in bf16 the folded policy is close to, but not quite, what the blocks compute.
    """
    if adapter.context:
        raise ValueError(f"folded() inside {adapter.context}(): leave that context first")
    originals = {name: module.base.weight.data for name, module in adapter.modules.items()}
    try:
        adapter.context = "folded"
        with torch.no_grad():
            for name, module in adapter.modules.items():
                dW = module.deployed.weight() + (module.quarantine.weight() if quarantine else 0)  # [d_out, d_in], fp32
                module.base.weight.data = (originals[name] + dW).to(originals[name].dtype)
                adapter.model.set_submodule(name, module.base)
            yield
    finally:
        for name, module in adapter.modules.items():
            module.base.weight.data = originals[name]
            adapter.model.set_submodule(name, module)
        adapter.context = ""


# ------------------------------------------------------------------------------------------------ tokens
DATE = datetime(2025, 1, 1)  # today, for every chat template: on another day a run would see other prompts
CODES = [f"%{code}" for code in [*"aAbBdHIjmMpSyY", "-d", "-m"]]
FILTERS = "".join(f"|replace('{code}', '{DATE.strftime(code)}')" for code in CODES)
CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{FILTERS} }}}}{{% endmacro %}}\n"


def load_model(name: str, device: str = "cpu", dtype: str = "float32"):
    """(model in eval mode, tokenizer) of a local folder or hub name. Raises InputError when they cannot be loaded, or
    when the weights are not exactly those that the model needs: what is missing would be random."""
    def load(**where):
        tok = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        return tok, AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False, **where)

    try:
        torch.zeros(1, device=device).item()
    except Exception as e:  # torch raises nearly anything
        raise InputError(f"--device {device}: is not on this machine; give another, such as cpu") from e
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its report on odd weights is twenty lines; ours is one
    try:
        try:
            tok, (model, info) = load(local_files_only=True)
        except OSError:
            if Path(name).exists():
                raise
            huggingface_hub.model_info(name, timeout=5)  # without a network `load` would try for a minute
            tok, (model, info) = load()
    except Exception as e:  # damaged files raise nearly anything
        raise InputError(f"--model {name}: cannot be loaded ({first_line(e)}); give a Hugging Face folder or, with a "
                         "network, a hub name") from e
    finally:
        logging.set_verbosity(verbosity)
    for kind in ("missing", "unexpected", "mismatched"):
        if odd := sorted(map(str, info[f"{kind}_keys"])):
            raise InputError(f"--model {name}: {len(odd)} {kind} weights, the first is {odd[0]}; save or copy it again")
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config.get_text_config(), key, None) not in (None, 1.0):
            raise InputError(f"--model {name}: its config has {key}: here logits are what the head says; use another")
    if tok.chat_template is None:
        raise InputError(f"--model {name}: its tokenizer has no chat template; use an instruct model")
    if tok.eos_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no end-of-turn token; set eos_token")
    tok.as_loaded = copy.deepcopy(tok)  # for an export
    turn, ends = encode_prompt(tok, [{"role": "user", "content": "-"}]), model.generation_config.eos_token_id
    if isinstance(ends, list):  # of a text and of a turn: Gemma's and Phi's tokenizers call the former eos
        tok.eos_token_id = next((token for token in turn if token in ends), tok.eos_token_id)
    if odd := [end for end in ends_of(model, tok) if type(end) is not int or abs(end) >= 2**63]:
        raise InputError(f"--model {name}: its generation_config.json has eos_token_id {odd[0]!r:.40}; give token ids")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    # Gemma 3's token for an image has no row in the weights of the text models, and no text holds it.
    special = {token for token, added in tok.added_tokens_decoder.items() if added.special}
    highest = max(set(tok.get_vocab().values()) - special | {*turn, tok.eos_token_id})
    if highest >= (rows := len(model.get_input_embeddings().weight)):
        raise InputError(f"--model {name}: its tokenizer has a token {highest}, its weights are for {rows} tokens; "
                         "give the model its own tokenizer")
    # cuDNN's attention, under torch 2.11 to 2.13, has NaN gradients on an H100 or H200 where there is a mask, as with a
    # shared prompt, and the length is 64 more than a multiple of 128: pytorch issue 196678
    torch.backends.cuda.enable_cudnn_sdp(False)
    return model.to(device).eval(), tok


def context_of(model) -> int:
    """How many tokens a prompt and its completion may have. Longrope and dynamic rope change the rotation of all keys
    once a row passes the original context: the sampler's cached keys would differ from the update's."""
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # of all layers, or of each type
    limits = [rope.get("original_max_position_embeddings") for rope in ropes
              if rope.get("rope_type") in ("longrope", "dynamic")]
    return min(filter(None, [*limits, getattr(config, "max_position_embeddings", None)]), default=10**9)


def ends_of(model, tok) -> list[int]:
    """The tokens that end a completion: the tokenizer's end of turn, and those of generation_config.json."""
    ends = model.generation_config.eos_token_id
    return [tok.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]


def encode_prompt(tok, messages: list[dict]) -> list[int]:
    """Token ids of a chat prompt up to where the assistant begins to write. Raises InputError where the tokenizer's
    chat template fails."""
    try:
        text = tok.apply_chat_template(messages, chat_template=CLOCK + tok.get_chat_template(), tokenize=False,
                                       add_generation_prompt=True, enable_thinking=False)
    except Exception as e:  # a template is a program
        raise InputError(f"--model {tok.name_or_path}: its chat template fails ({first_line(e)}); repair it, or use "
                         "another model, or data without system messages if it takes none") from e
    return tok(text, add_special_tokens=False)["input_ids"]


def opened_thought(tok, prompt: list[int]) -> str:
    """"<think>" if the chat template ends in it, else "": a completion goes on with that thought until </think>."""
    return "<think>" if tok.decode(prompt[-16:]).rstrip().endswith("<think>") else ""


def encode_completion(tok, text: str) -> list[int]:
    """Token ids of a whole completion, with its end-of-turn token."""
    return tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id]


def batches(prompts: list[list[int]], completions: list[list[int]], budget: int, labels: list[int] | None = None):
    """Cut rollouts into micro-batches of similar length with at most `budget` padded tokens each.

    prompts and completions are G lists of token ids. Yields rows [g], indices into the input; ids [g, T], right-padded
    with 0; is_completion bool [g, T-1], true where ids[:, 1:] is a token of the completion; and how many first tokens
    `prefill` may encode once for all rows: rollouts of one prompt, and of one label, go by themselves if that saves
    more than SHARED tokens; all others go together, and their number is 0.

        prompts [[5, 6], [7]], completions [[8], [9, 2, 4]], any budget ->
        rows [1, 0], ids [[7, 9, 2, 4], [5, 6, 8, 0]], is_completion [[1, 1, 1], [0, 1, 0]], 0
    """
    size = [len(p) + len(c) for p, c in zip(prompts, completions)]
    groups: dict[tuple, list[int]] = {}
    for row in sorted(range(len(size)), key=lambda row: -size[row]):
        groups.setdefault((tuple(prompts[row]), labels[row] if labels else None), []).append(row)
    alone = [(rows, len(prompt) - 1) for (prompt, _), rows in groups.items() if (len(rows) - 1) * len(prompt) > SHARED]
    others = set(range(len(size))).difference(*(rows for rows, _ in alone))
    for order, shared in [*alone, (sorted(others, key=lambda row: -size[row]), 0)]:
        while order:
            T = size[order[0]]
            g = max(1, budget // T)
            rows, order = order[:g], order[g:]
            ids = torch.zeros(len(rows), T, dtype=torch.long)  # [g, T]
            is_completion = torch.zeros(len(rows), T - 1, dtype=torch.bool)  # [g, T-1]
            for j, row in enumerate(rows):
                ids[j, : size[row]] = torch.tensor(prompts[row] + completions[row])
                is_completion[j, len(prompts[row]) - 1 : size[row] - 1] = True
            yield torch.tensor(rows), ids, is_completion, shared


def prefill(model, ids: Tensor, shared: int) -> DynamicCache | None:
    """Keys and values of the first `shared` tokens of ids [g, T], the same in all rows: encoded once, repeated g times.
    None if there are none, under gradient checkpointing, which takes no cache, and for models with recurrent layers,
    which change their state in place: the backward needs it as it was. Masks must be equal in all rows."""
    cache = DynamicCache(config=model.config)
    recurrent = any(hasattr(layer, "recurrent_states") for layer in cache.layers)
    if not shared or recurrent or model.is_activation_checkpointing:
        return None
    model.get_decoder()(input_ids=ids[:1, :shared], cache=cache)
    cache.reorder_cache(ids.new_zeros(len(ids)))
    return cache


def decode(model, ids: Tensor, cache: DynamicCache | None, **more):
    """What the decoder says of ids [g, T] from the first token that is not in `cache`."""
    done = cache.get_seq_length() if cache else 0
    return model.get_decoder()(input_ids=ids[:, done:], cache=cache, use_cache=cache is not None, **more)


def token_logps(model, ids: Tensor, is_completion: Tensor, temperature: float = 1.0,
                shared: int | DynamicCache = 0) -> Tensor:
    """log p of each completion token under softmax(logits / temperature), [g, T-1], zero elsewhere.

    shared: how many first tokens all rows have in common (`prefill` encodes them once), or their cache.
    The vocabulary is only touched at completion tokens, for LOGITS numbers at a time: more than that are computed again
    in the backward instead of kept. Right padding needs no attention mask: a token never attends to what follows it.
    """
    head = model.get_output_embeddings()
    cache = prefill(model, ids, shared) if isinstance(shared, int) else shared
    hidden = decode(model, ids, cache).last_hidden_state[:, :-1]  # [g, T-1, d], without what is in the cache
    hidden = hidden[is_completion[:, -hidden.shape[1] :]]  # [N, d]
    target = ids[:, 1:][is_completion]  # [N], N completion tokens in the batch

    def logps_of(hidden: Tensor, target: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden).float() / temperature, target, reduction="none")

    n = max(1, LOGITS // head.out_features)
    if len(target) <= n:
        logps = logps_of(hidden, target)  # [N]
    else:
        parts = zip(hidden.split(n), target.split(n))
        logps = torch.cat([checkpoint(logps_of, h, t, use_reentrant=False) for h, t in parts])  # [N]
    return logps.new_zeros(is_completion.shape).masked_scatter(is_completion, logps)


# ------------------------------------------------------------------------------------------------ sampling
REPLAYED = ("cuda",)  # devices on which a kernel takes less time than its launch


def next_logits(model, **inputs) -> Tensor:
    """The logits [g, V] of what follows the last token of each row; inputs: the decoder's."""
    return model.get_output_embeddings()(model.get_decoder()(**inputs).last_hidden_state[:, -1])


def replayed(model, cache: DynamicCache, attend: Tensor, position: Tensor, room: int) -> Callable | None:
    """A step of decoding as a CUDA graph, whose kernels are launched all at once. Its tensors keep their addresses: so
    keys and values get a cache of fixed size, with room for so many more tokens, and no row leaves the batch.

    cache: of the prompts, attend [G, T] and position [G, 1] of their tokens and of their last one. Returns step(t,
    rows, token), the logits [rows, V] after token t, [rows, 1]; None for models that do more than attend to all tokens,
    or whose positions depend on the length.
    """
    T, config = attend.shape[1], model.config.get_text_config()
    fixed = StaticCache(config=model.config, max_cache_len=T + room)
    if (config._attn_implementation != "sdpa" or "dynamic" in str(getattr(config, "rope_parameters", ""))
            or any(type(layer) is not StaticLayer for layer in fixed.layers)):
        return None
    for layer, prompt in zip(fixed.layers, cache.layers):
        layer.update(prompt.keys, prompt.values)
    ids, position = torch.zeros_like(position), position.clone()  # [G, 1] each
    attend = F.pad(attend.bool(), (0, room))[:, None, None]  # [G, 1, 1, T + room]
    inputs = dict(input_ids=ids, attention_mask=attend, position_ids=position, cache=fixed)
    if position.is_cuda:
        with torch.cuda.device(position.device):
            stream = torch.cuda.Stream()  # what is done once, such as choosing kernels, is done before the capture
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                next_logits(model, **inputs)
            torch.cuda.current_stream().wait_stream(stream)
            fixed.crop(-1)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                logits = next_logits(model, **inputs)  # [G, V]

    def step(t: int, rows: Tensor, token: Tensor) -> Tensor:
        ids[rows], attend[..., T + t] = token, True
        position.add_(1)
        if not position.is_cuda:
            return next_logits(model, **inputs)[rows]
        graph.replay()
        return logits[rows]

    return step


@torch.no_grad()
def generate(model, tok, prompts: list[list[int]], n: list[int], noise: Tensor, temperature: float,
             top_k: int = 0) -> tuple[list[list[int]], list[Tensor]]:
    """n[j] completions of prompt j, and the log-probability of each sampled token under softmax(logits / temperature).

    noise: [G, max_new] uniform in [0, 1) with G = sum(n): token t of rollout g is where the cumulated probabilities
    pass noise[g, t]. So a rollout depends on its own noise, not on the rows that share its batch.
    Returns two lists of length G, prompt-major: token ids, up to one of ends_of() or max_new of them, and logps [T].
    All prompts go in one left-padded batch, each encoded once for its n[j] rollouts; finished rows leave the batch.
    top_k = 0 samples from the whole vocabulary; else the log-probabilities are still those of the untruncated softmax.
    temperature = 0 takes the likeliest token: it is top_k = 1 at temperature 1, and so are the log-probabilities.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    (G, max_new), device = noise.shape, next(model.parameters()).device
    if G == 0:
        return [], []
    n, noise = torch.tensor(n, device=device), noise.to(device)  # [P], [G, max_new]
    T = max(map(len, prompts))
    ids = torch.tensor([[tok.eos_token_id] * (T - len(p)) + p for p in prompts], device=device)  # [P, T]
    attend = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)  # [P, T], 0 on padding
    positions = (attend.cumsum(1) - 1).clamp(min=0)  # [P, T]
    cache = DynamicCache(config=model.config)
    logits = next_logits(model, input_ids=ids, attention_mask=attend, position_ids=positions, cache=cache)  # [P, V]
    of_prompt = torch.arange(len(prompts), device=device).repeat_interleave(n)  # [G]
    cache.reorder_cache(of_prompt)  # recurrent layers can do this, but not batch_repeat_interleave
    logits, attend, position = logits[of_prompt], attend[of_prompt], positions[of_prompt, -1:]  # [G, V], [G, T], [G, 1]
    step = replayed(model, cache, attend, position, max_new) if device.type in REPLAYED else None
    cache = cache if step is None else None  # its copy is enough

    rows = torch.arange(G, device=device)  # the rollouts still being written
    ends = torch.tensor(ends_of(model, tok), device=device)
    out = torch.full((G, max_new), -1, device=device)
    out_logps = torch.zeros(G, max_new, device=device)
    for t in bar(range(max_new), "sampling"):
        logp = torch.log_softmax(logits.float() / temperature, -1)  # [rows, V]
        choice, likeliest = logp.topk(min(top_k, logp.shape[1])) if top_k else (logp, None)  # [rows, k or V]
        cdf = choice.exp().cumsum(1)  # up to the kept mass
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True)  # [rows, 1]
        token = token.clamp(max=cdf.shape[1] - 1)  # where rounding left the noise above the last sum
        token = likeliest.gather(1, token) if top_k else token
        out[rows, t], out_logps[rows, t] = token[:, 0], logp.gather(1, token)[:, 0]
        alive = torch.isin(token[:, 0], ends, invert=True).nonzero()[:, 0]
        if len(alive) == 0 or t == max_new - 1:
            break
        if step:
            rows = rows[alive]
            logits = step(t, rows, token[alive])  # [rows, V]
            continue
        position = position + 1
        attend = torch.cat([attend, attend.new_ones(len(attend), 1)], 1)
        if len(alive) < len(rows):
            rows, token, attend, position = rows[alive], token[alive], attend[alive], position[alive]
            cache.reorder_cache(alive)
        logits = next_logits(model, input_ids=token, attention_mask=attend, position_ids=position, cache=cache)
    lengths = (out >= 0).sum(1).tolist()
    logps = [row[:k].clone() for row, k in zip(out_logps.cpu(), lengths)]  # a view would take all to other ranks
    return [row[:k] for row, k in zip(out.tolist(), lengths)], logps


def rehearse(adapter: Adapter) -> None:
    """Sample, train on and probe three short rollouts of two made-up prompts, of which one is left-padded.

    Raises InputError for a model that cannot do it, that does not use an adapted layer, or whose log-probabilities are
    not those of its own forward (here all deltas are 0): because of padding, of the cache, or of what follows the head.
    """
    model, tok = adapter.model, SimpleNamespace(eos_token_id=0)
    short, long = list(range(3, 13)), list(range(13, 36))
    try:
        noise = torch.linspace(0, 0.95, 12).view(3, 4)
        completions, sampled = generate(model, tok, [short, long], [1, 2], noise, 1.0)
        (rows, ids, is_completion, _), = batches([short, long, long], completions, 10**6, labels=[0, 1, 2])
        ids, is_completion = ids.to(model.device), is_completion.to(model.device)  # [3, T], [3, T-1]
        c = torch.ones(len(adapter), 3, 1, adapter.r, device=model.device, requires_grad=True)
        m, d = torch.tensor([[True, True, False], [True, False, False]])
        with use(adapter, m, d, c=c, weights=torch.ones_like(ids, dtype=torch.float32)[:, None]):
            trained = token_logps(model, ids, is_completion)[is_completion]  # [N]
            read, *_ = torch.autograd.grad(trained.sum(), [c, *adapter.parameters()], allow_unused=True)
        for name, gradient in zip(adapter.modules, read):
            if not gradient.any():
                raise ValueError(f"it does not use {name}")
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)  # [3, T-1, V]
        own = logps.gather(2, ids[:, 1:, None])[..., 0][is_completion]  # [N]
        sampled = torch.cat([sampled[row] for row in rows]).to(own)  # [N]
        gap = torch.stack([sampled - own, trained - own]).abs().max() / logps.std()
        if not gap <= (0.2 if model.dtype == torch.bfloat16 else 1e-3):
            raise ValueError(f"its log-probabilities differ by {gap:.1e} of their spread, by padding, cache or head")
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # a model that is built in another way raises nearly anything
        kind = adapter.base["model_type"]
        raise InputError(f"--model: {kind} models do not fit this code ({first_line(e)}); use another model") from e


# ------------------------------------------------------------------------------------------------ files
def fingerprint(model: nn.Module) -> dict[str, str]:
    """Name, kind, sizes, and a hash over samples of all weights of a base model (before an adapter is attached).

    The samples are rounded to bf16, so that a checkpoint has one fingerprint whether it is loaded in fp32 or in bf16.
    """
    digest = hashlib.sha256()
    for name, w in model.named_parameters():
        sample = w.detach().flatten()[:: max(1, w.numel() // 1024)].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name} {list(w.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    keys = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    return {"name": str(getattr(model.config, "name_or_path", "")),
            **{key: str(getattr(model.config, key, "?")) for key in keys}, "weights": digest.hexdigest()[:16]}


def save(adapter: Adapter, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write dA, dB, A0, B0 of every block (fp32) with the rank, the base's fingerprint and `metadata`, atomically; the
    same adapter gives the same bytes. Raises InputError if the file cannot be written.
    """
    tensors = {name: t.detach().float().cpu() for name, t in adapter.tensors("dA", "dB", "A0", "B0").items()}
    info = dict(r=adapter.r, base=adapter.base, metadata=metadata or {})
    with writing(path) as temporary:  # one entry of metadata: several would be written in no fixed order
        temporary.write_bytes(to_bytes(tensors, metadata={FORMAT: json.dumps(info, sort_keys=True)}))


def peek(path: str | Path) -> dict:
    """What a saved adapter says of itself: {"r": int, "base": fingerprint, "metadata": what was given to `save`}.

    Raises InputError for a file that is missing, damaged or not an adapter.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give the adapter.safetensors of a run")
    try:
        with safe_open(path, framework="pt") as file:
            header, parts = file.metadata() or {}, {name: file.get_slice(name) for name in file.keys()}
            dtypes = {part.get_dtype() for part in parts.values()}
            ranks = {tuple(part.get_shape()[:1]) for name, part in parts.items() if name.endswith(".dA")}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error}); save or copy it again") from error
    if FORMAT not in header:
        raise InputError(f"{path}: its format is {next(iter(header), None)}, not {FORMAT}; give what lora2r.save wrote")
    info = from_json(header[FORMAT], f"{path}:", "save or copy it again", r=int, base=dict, metadata=dict)
    if dtypes != {"F32"} or ranks != {(info["r"],)}:
        raise InputError(f"{path}: damaged (its tensors are not all F32 and of rank {info['r']}); save or copy it "
                         "again")
    return info


def misfit(saved: Any, like: Tensor) -> str | None:
    """Why `saved` cannot be copied into the fp32 tensor `like`; None if it can."""
    if not isinstance(saved, Tensor) or saved.dtype != torch.float32 or saved.shape != like.shape:
        what = f"{saved.dtype} {list(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        return f"is {what}, not torch.float32 {list(like.shape)}"
    return None if saved.isfinite().all() else "is not finite"


@torch.no_grad()
def load(adapter: Adapter, path: str | Path) -> dict[str, str]:
    """Fill `adapter` bit-exactly from a file of `save`, and return its metadata.

    Raises InputError, with the adapter unchanged, for a bad file, another rank, other targets or another base model
    (whose name or path may differ), and for a tensor that is not finite, not of its shape, or not fp32.
    """
    info, ours = peek(path), adapter.base
    theirs = info["base"]
    if info["r"] != adapter.r:
        raise InputError(f"{path}: has rank r = {info['r']}, this adapter r = {adapter.r}; attach with r={info['r']}")
    tensors = adapter.tensors("dA", "dB", "A0", "B0")
    saved = load_file(path)
    differ = [f"{key} {theirs.get(key)} -> {ours[key]}" for key in ours
              if key != "name" and theirs.get(key) != ours[key]]
    if differ:
        names = [base.get("name") or base.get("model_type") for base in (theirs, ours)]
        raise InputError(f"{path}: was trained on base model {names[0]!r}, this one is {names[1]!r} "
                         f"({', '.join(differ)}); load it into the former")
    if odd := sorted(tensors.keys() ^ saved.keys()):
        raise InputError(f"{path}: {len(odd)} tensors differ, the first is {odd[0]}; attach with its targets")
    for name, tensor in tensors.items():
        if reason := misfit(saved[name], tensor):
            raise InputError(f"{path}: tensor {name} {reason}; save or copy it again")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    return info["metadata"]


# ------------------------------------------------------------------------------------------------ errors, text, paths
class InputError(ValueError):
    """Bad input from the user, in one line: where (file, line, field or flag), value, remedy. Exit status 2."""


def run_script(main: Callable[[Any], Any], config: Any) -> NoReturn:
    """Run main(config) and exit: 0; 1 if it returned False or met a NaN; 2 for bad input, or a file that cannot be
    written; 130 after Ctrl-C or SIGTERM. What went wrong is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(int(main(config) is False))
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, torch.OutOfMemoryError) as e:
        print(f"error: {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as e:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the threads that grade end before the process does
        print(f"\ninterrupted{e}", file=sys.stderr)
        sys.exit(130)


def first_line(e: Exception) -> str:
    """An exception in a few words."""
    return f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0]}"


def read_text(flag: str, path: str | Path, remedy: str) -> str:
    """The text of a UTF-8 file, with or without a BOM. Raises InputError for one that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        reason = "not UTF-8 text" if isinstance(e, UnicodeDecodeError) else str(getattr(e, "strerror", e)).lower()
        raise InputError(f"{flag} {path}: cannot be read ({reason}); {remedy}".strip()) from e


def from_json(text: str, where: str, remedy: str, **kinds: type) -> dict:
    """The JSON object in `text`, which has a value of each type in `kinds` under its name. Raises InputError; its text
    begins with `where`."""
    try:
        found = json.loads(text)
        if type(found) is not dict:
            raise ValueError(f"it is a {type(found).__name__}, not an object")
        for name, kind in kinds.items():
            if type(found.get(name)) is not kind:  # True is no int
                raise ValueError(f"{name} is {found.get(name)!r:.40}, not of type {kind.__name__}")
    except (ValueError, RecursionError) as e:  # no JSON, or too deep, or a number of thousands of digits
        raise InputError(f"{where} damaged ({e}); {remedy}") from e
    return found


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder that becomes `path` at the end, or not at all. Raises
    InputError if it cannot."""
    path = Path(path)
    try:  # a folder with a random name, which no one else may enter
        with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as folder:
            yield Path(folder) / path.name
            os.replace(Path(folder) / path.name, path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}); check that its folder "
                         "exists, may be written and has room; what was there before is still there") from e


def portable(path: str | Path) -> str:
    """How a run remembers a path: from this project if it lies inside, else in full; a hub name as it is."""
    full = Path(path).resolve()
    inside = full.relative_to(HERE) if full.is_relative_to(HERE) else full
    return str(inside if full.exists() else path)


def located(path: str) -> str:
    """The inverse of `portable`, on any machine."""
    return str(HERE / path) if (HERE / path).exists() else path


def bar(items: Iterable, what: str) -> tqdm:
    """Iterate with a progress bar, on a terminal, from two seconds on."""
    return tqdm(items, what, leave=False, delay=2, disable=None)
