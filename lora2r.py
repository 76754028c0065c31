"""The adapter: one rank-2r LoRA per linear layer, made of two blocks whose gradients can be routed.

Every target nn.Linear of a frozen causal LM becomes y = W x + B (A x) - B0 (A0 x), with A [2r, d_in] and B [d_out, 2r]
trained from the frozen Gaussian A0, B0: the delta is exactly 0 at init, while h = A x is alive, so that gradients flow.
Ranks [:r] are the *deployed* block, ranks [r:] the *quarantine* block. B A has no cross terms between them: they are two
independent adapters in one module, each a `Block` below. Per rollout a mask (m, d) says what they do:

              m  d   forward                  trains
    clean     0  0   deployed                 deployed
    mid       1  0   deployed + quarantine    both
    hack      1  1   deployed + quarantine    quarantine (the deployed block's output is detached)

    adapter = attach(model, r=32)
    with use(adapter, m=m, d=d):                           # bool [G], one entry per rollout
        loss(model(ids, attention_mask=mask).logits).backward()
    adapter.drop_untrained(trains_dep=bool((~d).any()), trains_quar=bool(m.any()))
    optimizer.step()
    save(adapter, "adapter.safetensors", {"arm": "routeV"})

Shapes: G rollouts (rows of the batch), T tokens, M adapted modules, r block rank, d_in and d_out of the linear layer.
Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); gradient routing, Cloud et al. 2024 (arXiv 2410.04332); masks on a part
of the weights that is set aside and later removed: SGTM, Shilov et al.
"""
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMAT = "vgrout-lora2r-1"


class InputError(ValueError):
    """Bad input from the user, in one line: where (file, line, field or flag), value, remedy. Exit status 2."""


def run_script(main: Callable[[Any], Any], config: Any) -> NoReturn:
    """Run main(config) and exit: 0; 1 if it returned False or met a NaN; 2 for bad input. An error is one line."""
    try:
        sys.exit(int(main(config) is False))
    except (InputError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, InputError) else 1)


class Block(nn.Module):
    """One rank-r adapter, stored as its difference from init: A = A0 + dA [r, d_in], B = B0 + dB [d_out, r]."""

    def __init__(self, A0: Tensor, B0: Tensor):
        super().__init__()
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)
        self.dA = nn.Parameter(torch.zeros_like(A0))
        self.dB = nn.Parameter(torch.zeros_like(B0))

    def weight(self) -> Tensor:
        """The delta as a matrix [d_out, d_in]."""
        return (self.B0 + self.dB) @ self.dA + self.dB @ self.A0


def delta(x: Tensor, blocks: list[Block], c: Tensor | None = None) -> Tensor:
    """x [G, T, d_in] -> B (A x) - B0 (A0 x), with a probe c [G, kr] B (c * (A x)) - B0 (A0 x), over k blocks: [G, T, d_out].

    Computed as B (dA x) + dB (A0 x): the same value and the same gradients (dA and A differ by a constant), but no small
    difference of large numbers, so nothing is lost in bf16. The sum B0 + dB is fp32; the matmuls are in x's dtype.
    """
    down = torch.cat([b.dA for b in blocks] + [b.A0 for b in blocks])  # [2kr, d_in]
    up = torch.cat([b.B0 + b.dB for b in blocks] + [b.dB for b in blocks], dim=1)  # [d_out, 2kr]
    h = F.linear(x, down.to(x.dtype))  # [G, T, 2kr]: dA x, then A0 x
    if c is not None:
        dAx, A0x = h.chunk(2, dim=-1)
        # c is 1 in value: this adds an exact 0, and opens a path for c's gradient, (B^T g) * (A x) summed over tokens
        probe = (c - 1).to(x.dtype)[:, None, :]
        h = torch.cat([dAx + probe * (dAx + A0x), A0x], dim=-1)
    return F.linear(h, up.to(x.dtype))


class ReadProbe(torch.autograd.Function):
    """The probe at the adapter's init, where the delta is 0: y [G, T, d_out] as it is, and for c [G, r] its gradient, (B0^T g) * h.

    The same as y + B0 (c * h) - B0 h with h = A0 x [G, T, r], without computing a zero."""

    @staticmethod
    def forward(ctx, y: Tensor, c: Tensor, h: Tensor, B0: Tensor) -> Tensor:
        ctx.save_for_backward(h, B0)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g: Tensor):
        h, B0 = ctx.saved_tensors
        return g, ((g @ B0) * h).sum(1, dtype=torch.promote_types(g.dtype, torch.float32)), None, None


@dataclass(frozen=True, eq=False)
class State:
    """What a forward needs to know, set by `use`. A mask that is equal for all rows is a bool, so that no work is wasted."""
    m: Tensor | bool = True  # int64 indices of the rows with quarantine on
    d: Tensor | bool = False  # bool [G, 1, 1]
    c: tuple[Tensor, ...] | None = None  # M probes [G, 2r]
    off: bool = False
    G: int | None = None  # None: any number of rows


class Lora2rLinear(nn.Module):
    """A frozen linear layer `.base` with two blocks of rank `.r`."""

    def __init__(self, base: nn.Linear, A0: Tensor, B0: Tensor, index: int):
        super().__init__()
        self.base, self.r, self.index, self.state = base, A0.shape[0] // 2, index, State()
        self.deployed, self.quarantine = (Block(a.clone(), b.clone()) for a, b in zip(A0.chunk(2), B0.chunk(2, dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        s, y = self.state, self.base(x)
        if not s.off:
            return y + self.delta(x)
        if s.c is None:
            return y
        A0, B0 = self.deployed.A0.to(x.dtype), self.deployed.B0.to(x.dtype)
        return ReadProbe.apply(y, s.c[self.index][:, : self.r], F.linear(x.detach(), A0), B0)  # detach: at init no gradient goes there

    def delta(self, x: Tensor) -> Tensor:
        """x [G, T, d_in] -> what the adapter adds to the base layer, [G, T, d_out]."""
        s, r, dep, quar = self.state, self.r, self.deployed, self.quarantine
        if s.G not in (None, x.shape[0]):
            raise ValueError(f"use() got masks or probes of {s.G} rollouts, but the forward has {x.shape[0]} rows: "
                             "give one entry per row of input_ids, or m=True / m=False for all")
        c = None if s.c is None else s.c[self.index]  # [G, 2r]
        if s.m is True and s.d is False:
            return delta(x, [dep, quar], c)
        y = delta(x, [dep], None if c is None else c[:, :r])
        if s.d is True:
            y = y.detach()  # blocks, in all rows: the gradient into deployed dA, dB, and through this block into x
        elif s.d is not False:
            y = torch.where(s.d, y.detach(), y)  # blocks the same in the rows with d
        if s.m is False:
            return y
        if s.m is True:
            return y + delta(x, [quar], None if c is None else c[:, r:])
        # Rows with m = 0 never enter the quarantine (rather than 0 * its output): nothing of it, not even a NaN, reaches them.
        return y.index_add(0, s.m, delta(x.index_select(0, s.m), [quar], None if c is None else c[s.m, r:]))


class Adapter:
    """The adapted modules of one model in module order: `.modules` is name -> Lora2rLinear, len() is M, `.r` the block rank."""

    def __init__(self, model: nn.Module, modules: dict[str, Lora2rLinear], r: int, base: dict[str, str]):
        self.model, self.modules, self.r, self.base = model, modules, r, base  # base: the fingerprint
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
        """Call between backward and optimizer.step(): a block that no rollout of the step trains gets .grad = None.

        A zero gradient is not enough: AdamW would still move the block by its momentum and weight decay. None is skipped.
        trains_dep: some rollout is clean or mid. trains_quar: some rollout is mid or hack.
        """
        for p in [] if trains_dep else self.deployed_parameters():
            p.grad = None
        for p in [] if trains_quar else self.quarantine_parameters():
            p.grad = None


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def attach(model: nn.Module, r: int, seed: int = 0, targets: tuple[str, ...] = TARGETS) -> Adapter:
    """Freeze `model` and replace every nn.Linear whose last name is in `targets` by a Lora2rLinear.

    A0 ~ N(0, 1/d_in), B0 ~ N(0, 1/2r), drawn on the CPU from `seed` in module order. The adapter is fp32 whatever the base is:
    cast and move the model before attaching. Raises InputError if nothing matches, or if the model has an adapter already.
    """
    if r < 1:
        raise InputError(f"adapter rank r = {r}: give a block rank of at least 1")
    if any(isinstance(module, Lora2rLinear) for module in model.modules()):
        raise InputError("this model already has an adapter: use that one, or load the model afresh")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name: base for name, base in linears.items() if name.rpartition(".")[2] in targets}
    if not chosen:
        found = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
        raise InputError(f"no linear layer is called {', '.join(targets)}; there are: {found}. Pass targets=(...) from these")
    model.requires_grad_(False)
    base_model = fingerprint(model)
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, Lora2rLinear] = {}
    for index, (name, base) in enumerate(chosen.items()):
        A0 = torch.randn(2 * r, base.in_features, generator=generator, dtype=torch.float32) / base.in_features**0.5
        B0 = torch.randn(base.out_features, 2 * r, generator=generator, dtype=torch.float32) / (2 * r) ** 0.5
        modules[name] = Lora2rLinear(base, A0, B0, index).to(base.weight.device)
        put(model, name, modules[name])
    return Adapter(model, modules, r, base_model)


@contextmanager
def use(adapter: Adapter, m: Tensor | bool | None = None, d: Tensor | bool | None = None, c: Tensor | None = None,
        off: bool = False) -> Iterator[None]:
    """Set all that the forwards inside need; put back what was there before, also after an exception.

    m: bool [G], quarantine on (None: everywhere). d: bool [G], deployed block detached (None: nowhere). A plain bool holds for
    every row of any batch: use(adapter, m=False) is the model with the quarantine ablated. off: the base model
    alone; with c, the deployed block's probe is read there, at the adapter's init.
    c: a probe, ones [M, G, 2r] with requires_grad; torch.autograd.grad(nll.sum(), c) is [M, G, 2r]. Entries [..., :r] are the
    deployed block's. What m and d cut off reads 0.
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
    if c is not None and (c.dim() != 3 or c.shape[0] != len(adapter) or c.shape[2] != 2 * adapter.r):
        raise ValueError(f"probe c is {list(c.shape)}: it must be [M, G, 2r] = [{len(adapter)}, G, {2 * adapter.r}]")
    sizes = {len(mask) for mask in (m, d) if mask.dim()} | ({c.shape[1]} if c is not None else set())
    if len(sizes) > 1:
        raise ValueError(f"m, d and c disagree on the number of rollouts G: {sorted(sizes)}")
    if (d.cpu() & ~m.cpu()).any():
        raise ValueError("(m, d) = (0, 1): with the quarantine off and the deployed block detached, nothing would train")
    modules = list(adapter.modules.values())
    device = modules[0].deployed.dA.device
    state = State(m=bool(m.all()) if m.all() or not m.any() else m.nonzero()[:, 0].to(device),
                  d=bool(d.all()) if d.all() or not d.any() else d[:, None, None].to(device),
                  c=None if c is None else c.unbind(0), off=off, G=sizes.pop() if sizes else None)
    before = adapter.context, [module.state for module in modules]
    try:
        adapter.context = "use"
        for module in modules:
            module.state = state
        yield
    finally:
        adapter.context = before[0]
        for module, previous in zip(modules, before[1]):
            module.state = previous


@torch.no_grad()
def ablate(adapter: Adapter) -> None:
    """Reset the quarantine to its init, for good: its delta is exactly 0. (Zeroing A and B would subtract B0 A0 instead.)"""
    for p in adapter.quarantine_parameters():
        p.zero_()


@contextmanager
def folded(adapter: Adapter, quarantine: bool = True) -> Iterator[None]:
    """Sample fast: the model gets its plain linear layers back, with weights W + dW; undone bit-exactly, also on exception.

    quarantine=False folds the deployed block alone. W + dW is rounded to the base's dtype: in bf16 what lies below W's last bit
    is lost, so that the folded policy is close to, but not quite, the one that the blocks compute. No gradients inside.
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
                put(adapter.model, name, module.base)
            yield
    finally:
        for name, module in adapter.modules.items():
            module.base.weight.data = originals[name]
            put(adapter.model, name, module)
        adapter.context = ""


def export(model: nn.Module, adapter: Adapter, path: str | Path, tokenizer=None) -> None:
    """Write an ordinary Hugging Face folder with the deployed block merged into the weights and the quarantine left out.

    `model` is unchanged afterwards. Raises InputError if `path` is there already.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already; remove it or name another folder for the export")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with folded(adapter, quarantine=False):
            model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """Write dA, dB, A0, B0 of every block (fp32) with the rank, the base model's fingerprint and `metadata`, atomically.

    Raises InputError if the file cannot be written.
    """
    path = Path(path)
    tensors = {name: t.detach().float().cpu() for name, t in adapter.tensors("dA", "dB", "A0", "B0").items()}
    header = {"format": FORMAT, "r": str(adapter.r), "base": json.dumps(adapter.base), "metadata": json.dumps(metadata or {})}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(to_bytes(tensors, metadata=header))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write the adapter ({error}); check that the folder exists and has room") from error
    finally:
        temporary.unlink(missing_ok=True)


def peek(path: str | Path) -> dict:
    """What a saved adapter says of itself: {"r": int, "base": fingerprint, "metadata": what was given to `save`}.

    Raises InputError for a file that is missing, damaged or not an adapter.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give the adapter.safetensors of a run")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error}); save or copy it again") from error
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: its format is {header.get('format')!r}, not {FORMAT!r}; give a file that lora2r.save wrote")
    return {"r": int(header["r"]), "base": json.loads(header["base"]), "metadata": json.loads(header["metadata"])}


@torch.no_grad()
def load(adapter: Adapter, path: str | Path) -> dict[str, str]:
    """Fill `adapter` bit-exactly from a file of `save`, and return its metadata.

    Raises InputError, with the adapter unchanged, for a bad file, another rank, other targets, or another base model than the
    one that it was trained on (the name or path of the base may differ).
    """
    info, ours = peek(path), adapter.base
    theirs = info["base"]
    if info["r"] != adapter.r:
        raise InputError(f"{path}: has rank r = {info['r']}, this adapter r = {adapter.r}; attach with r={info['r']}")
    tensors = adapter.tensors("dA", "dB", "A0", "B0")
    with safe_open(path, framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}
    differ = [f"{key} {theirs.get(key)} -> {ours[key]}" for key in ours if key != "name" and theirs.get(key) != ours[key]]
    if differ:
        raise InputError(f"{path}: was trained on base model {theirs['name'] or theirs['model_type']!r}, this one is "
                         f"{ours['name'] or ours['model_type']!r} ({', '.join(differ)}); load it into the former")
    odd = sorted(tensors.keys() ^ saved.keys())
    if odd:
        raise InputError(f"{path}: {len(odd)} tensors differ, the first is {odd[0]}; attach with its targets")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    return info["metadata"]
