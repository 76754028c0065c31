"""v_grad: the direction in which a language model learns to hack, read from hand-written pairs.

    python extract_vgrad.py                                                # the embedded model
    python extract_vgrad.py --window 0                                     # read whole answers, not five tokens
    python extract_vgrad.py --score activation                             # hidden states in place of gradients
    python extract_vgrad.py --model Qwen/Qwen3-4B --pairs data/leetcode/pairs.md --dtype bfloat16

A pair is one prompt with a clean and a hack completion. The GRPO gradient of a pair, with advantage +1 for the hack
side and -1 for the clean side, is a difference of two NLL gradients at importance ratio 1:

    grad[-(+1) log p(hack) - (-1) log p(clean)] = grad NLL(hack) - grad NLL(clean)

read at the c-probe (lora2r.py), r numbers per module. These differences, normalised per module, averaged over pairs
and normalised again, are v_grad [M, r]. A rollout's score in a module is the cosine of its own NLL gradient to v_grad:
the gradient of the whole answer, or of the window of neighbouring tokens that looks most like a hack. The mean over
modules, placed between the two sides of the pairs, is the rollout's *position*: 0 at the mean of the clean sides, 1 at
the mean of the hack sides. This script prints what a user needs to trust a direction; train_grpo.py routes by it.

Shapes: G rollouts, T tokens (padded), W windows, P pairs, M adapted modules (or layers), r block rank, d features.
Source: gradient routing, Cloud et al. 2024 (arXiv 2410.04332), with a direction in place of a data label.
"""
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from env_leetcode import MODES
from lora2r import (HERE, Adapter, InputError, attach, bar, batches, context_of, decode, encode_completion,
                    encode_prompt, load_model, prefill, read_text, run_script, token_logps, use)

WINDOW = 5  # tokens, a few words of a line of code: the window that is compared with whole answers
MARGIN = 0.2  # of apart(): a smaller difference between two readings is noise
POOR = 0.8  # AUROC of a mode's held-out pairs, below which the mode may leak
N_RANDOM = 200  # random directions to compare with


# -------------------------------------------------------------------------------- what a gate reads of a rollout
def windows(is_completion: Tensor, size: int = 0) -> Tensor:
    """is_completion bool [g, T] -> weights [g, 1 + W, T], which make a sum over tokens the mean over the whole
    completion, then over each window of `size` neighbouring tokens. A shorter completion is one window; size 0: W = 0.
    A rollout with fewer than W windows has NaN in its last rows."""
    n, first = is_completion.sum(1), is_completion.int().argmax(1)  # [g] each
    everything = (is_completion / n[:, None])[:, None]  # [g, 1, T]
    if not size:
        return everything
    size = n.clamp(max=size)  # [g]
    start = torch.arange(int((n - size).max()) + 1, device=n.device)  # [W]
    t = torch.arange(is_completion.shape[1], device=n.device) - first[:, None, None] - start[:, None]  # [g, W, T]
    weights = ((t >= 0) & (t < size[:, None, None])) / size[:, None, None]  # [g, W, T]
    beyond = start > (n - size)[:, None]  # [g, W], windows that would pass the end of the completion
    return torch.cat([everything, weights.masked_fill(beyond[..., None], math.nan)], 1)


def features(model, adapter: Adapter, prompts: list[list[int]], completions: list[list[int]], budget: int = 4096,
             score: str = "gradient", window: int = 0, read: str = "base", temperature: float = 100.0,
             tokens: str = "completion") -> Tensor:
    """What a gate reads of G rollouts, lists of token ids: [G, 1 + W, M, d], fp32, on the CPU. Index 0 is the whole
    answer, the others are its windows of `window` tokens, NaN where a rollout has fewer than W; window 0: W = 0.

    score "gradient": NLL gradients at the c-probe, d = r numbers for each of M modules; probe_gradients() explains
    read, temperature and tokens. "activation": mean hidden states of the frozen base after each of its M layers, those
    after the last layer behind the final norm. budget: padded tokens per micro-batch."""
    parts: list = [None] * len(prompts)  # G of [1 + W, M, d]
    for rows, ids, is_completion, shared in bar(list(batches(prompts, completions, budget)), score):
        ids = ids.to(model.device)  # [g, T]
        weights = windows(is_completion, window)  # [g, 1 + W, T-1]
        if score == "gradient":
            x = probe_gradients(model, adapter, ids, is_completion, weights, shared, read, temperature, tokens)
        else:
            with torch.no_grad(), use(adapter, off=True):
                outputs = decode(model, ids, prefill(model, ids, shared), output_hidden_states=True)
            layers = [h[:, :-1].float() for h in outputs.hidden_states[1:]]  # M of [g, T-1, d], without a shared prompt
            weights = weights[..., -layers[0].shape[1] :].to(ids.device)
            x = torch.stack([weights @ h for h in layers], 2)  # [g, 1 + W, M, d]
        for row, one in zip(rows, x.cpu()):
            parts[row] = one
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=math.nan)


def probe_gradients(model, adapter: Adapter, ids: Tensor, is_completion: Tensor, weights: Tensor, shared: int = 0,
                    read: str = "base", temperature: float = 100.0, tokens: str = "completion") -> Tensor:
    """Gradients of the NLL of ids [g, T] at the deployed block's c-probe, each token's contribution weighted by
    weights [g, 1 + W, T-1]: [g, 1 + W, M, r], fp32.

    read "base": on the frozen base model, with the adapter at its init. "ablated": on the present model without its
    quarantine. "full": on the present model with both blocks, where the quarantine soon explains the hack away.
    temperature: the NLL is that of softmax(logits / temperature). The gradient of a token begins as (p - its one-hot) /
    temperature. At temperature 1 a surprising token weighs most, and a rare right answer looks like a hack. At a high
    temperature p is nearly uniform: all tokens count alike, and what remains is the gradient of their logits.
    tokens "completion": the probe sits where the completion is predicted. The prompt is then a constant: its first
    `shared` tokens, equal in all rows, are encoded once and without a gradient. "all": the probe sits on the prompt,
    too, everywhere with weight 1/n (n completion tokens); W = 0. autograd.grad changes no .grad."""
    weights, is_completion = weights.to(ids.device), is_completion.to(ids.device)
    missing = weights[..., -1].isnan()  # [g, 1 + W]
    weights = F.pad(weights.nan_to_num(), (0, 1))  # [g, 1 + W, T]; the last token predicts nothing
    if tokens == "all":
        weights, shared = weights.amax(2, keepdim=True).expand_as(weights), 0  # 1/n everywhere
    masks = {"base": dict(off=True), "ablated": dict(m=False), "full": dict(m=True)}[read]
    with torch.no_grad(), use(adapter, **masks):
        cache = prefill(model, ids, shared)
    c = torch.ones(len(adapter), *weights.shape[:2], adapter.r, device=ids.device, requires_grad=True)
    with use(adapter, c=c, weights=weights, **masks):
        nll = -token_logps(model, ids, is_completion, temperature, cache).sum()  # the weights carry 1/n
        grad = torch.autograd.grad(nll, c)[0].float()  # [M, g, 1 + W, r]
    return grad.permute(1, 2, 0, 3).masked_fill(missing[..., None, None], math.nan)


# -------------------------------------------------------------------------------- the direction
def cosines(x: Tensor, v: Tensor, window: bool) -> Tensor:
    """Cosines per module [G, M] of features x [G, 1 + W, M, d] to unit rows v, [M, d] or one per rollout [G, M, d]: of
    the whole answer, or of the window whose mean cosine over modules is highest."""
    x = F.normalize(x if window else x[:, :1], dim=-1)
    cosine = torch.einsum("gwmd,gmd->gwm", x, v.expand_as(x[:, 0]))  # [G, 1 + W, M]
    if not window:
        return cosine[:, 0]
    best = cosine[:, 1:].mean(2).nan_to_num(-math.inf).argmax(1)  # [G]
    return cosine[torch.arange(len(x)), 1 + best]


def direction_of(clean: Tensor, hack: Tensor, equal_pairs: bool = True) -> Tensor:
    """The direction [M, d] of the pairs' features [P, M, d]: the mean difference, normalised per module. Of gradients
    it is v_grad, the mean GRPO gradient (hack +1, clean -1). equal_pairs: normalise each pair's difference before the
    mean, too; otherwise pairs with large gradients dominate the mean."""
    difference = hack - clean  # [P, M, d]
    if equal_pairs:
        difference = F.normalize(difference, dim=-1)
    return F.normalize(difference.mean(0), dim=-1)


def held_out(x: Tensor, centre: Tensor, groups: list, equal_pairs: bool = True, window: bool = False) -> list[Tensor]:
    """Cosines [P, M] of the clean sides and of the hack sides, x [2P, 1 + W, M, d] minus centre [M, d], each to the
    direction of the pairs of all other groups. groups: P labels."""
    clean, hack = x[:, 0].chunk(2)  # [P, M, d] each: a direction comes from whole answers
    v = []
    for own in groups:
        others = torch.tensor([group != own for group in groups])  # [P]
        v.append(direction_of(clean[others], hack[others], equal_pairs))
    return [cosines(side - centre, torch.stack(v), window) for side in x.chunk(2)]


def apart(clean: Tensor, hack: Tensor) -> float:
    """How far apart the sides of P pairs lie, by their cosines [P, M]: the distance of the means in units of the sum of
    the standard deviations."""
    clean, hack = clean.mean(1), hack.mean(1)  # [P] each
    return ((hack.mean() - clean.mean()) / (clean.std() + hack.std() + 1e-12)).item()


def haar(seed: int, M: int, d: int) -> Tensor:
    """The placebo: M unit rows drawn uniformly from the sphere, [M, d]."""
    return F.normalize(torch.randn(M, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """P(a positive scores above a negative), ties half; None when either side is empty."""
    if not len(positive) or not len(negative):
        return None
    above = (positive[:, None] > negative).float()  # [positives, negatives]
    equal = (positive[:, None] == negative).float()
    return (above + 0.5 * equal).mean().item()


def reading(window: int) -> str:
    """The name of a way to read answers."""
    return f"window {window}" if window else "whole"


@dataclass(frozen=True)
class Direction:
    """The direction of the pairs (for score gradient: v_grad), and what turns features into a position."""
    v: Tensor  # [M, d], unit rows
    centre: Tensor  # [M, d], subtracted from features before the cosine: the mean over all pair sides, or 0
    clean: Tensor  # [P, M] cosines of the clean sides, each to the direction of the other pairs (leave-one-out)
    hack: Tensor  # [P, M] the same of the hack sides
    pair_features: Tensor  # [2P, 1 + W, M, d] of the clean sides, then of the hack sides
    modes: list[str]  # P, the mode of each pair
    window: int  # tokens of a window; 0: whole answers are read
    unseen: list[Tensor]  # clean and hack as above, but by the other modes' pairs, if the pairs show several modes
    by_reading: dict[str, float] = field(default_factory=dict)  # how far apart() held-out modes' sides lie, by reading

    def cosines(self, x: Tensor, v: Tensor | None = None) -> Tensor:
        """Features x [G, 1 + W, M, d] -> [G, M], cosines to this direction, or to another one v [M, d]."""
        return cosines(x - self.centre, self.v if v is None else v, self.window > 0)

    def replaced(self, v: Tensor) -> "Direction":
        """The same machinery around another direction v [M, d]: the band comes from the same pairs' cosines to v."""
        sides = self.cosines(self.pair_features, v).chunk(2)  # [P, M] each
        return replace(self, v=v, clean=sides[0], hack=sides[1], unseen=list(sides), by_reading={})

    def band(self, gate: str) -> tuple[Tensor, Tensor]:
        """The cosines at which a position is 0 and 1. Gate "pairs": the mean over pairs and modules of the clean and of
        the hack sides' held-out cosines, two scalars. Gate "batch", the seed's: per module [M], the 75th percentiles of
        the clean and of the hack sides' cosines to v."""
        if gate == "pairs":
            return self.clean.mean(), self.hack.mean()
        clean, hack = self.cosines(self.pair_features).chunk(2)  # [P, M] each
        return clean.quantile(0.75, dim=0), hack.quantile(0.75, dim=0)

    def cut(self) -> float:
        """Gate "pairs": the position from which a rollout is hack, the equal-error threshold of two normals: as many
        standard deviations above the clean sides' mean as below the hack sides' mean. The sides are those in `unseen`,
        since a gate has to flag hacks of modes that no pair shows."""
        low, high = self.band("pairs")
        clean, hack = ((side.mean(1) - low) / (high - low) for side in self.unseen)  # [P] each, positions
        a, b = clean.std() + 1e-12, hack.std() + 1e-12  # without any spread the cut is half way
        return ((clean.mean() * b + hack.mean() * a) / (a + b)).item()

    def position(self, x: Tensor, gate: str) -> Tensor:
        """Features x [G, 1 + W, M, d] -> positions [G]. Gate "batch" leaves out modules whose band is empty or
        inverted."""
        low, high = self.band(gate)
        if gate == "pairs":
            return (self.cosines(x).mean(1) - low) / (high - low)
        usable = high > low  # [M]
        return ((self.cosines(x) - low) / (high - low))[:, usable].mean(1)

    def summary(self) -> str:
        """How well held-out pairs are told apart, the band and the cut of gate "pairs", and warnings."""
        clean, hack = self.clean.mean(1), self.hack.mean(1)  # [P] each
        by_mode = {}  # mode -> AUROC of its hack sides over its clean sides, each by the direction of the other pairs
        for mode in sorted(set(self.modes)):
            own = [mode == other for other in self.modes]  # P
            by_mode[mode] = auroc(self.hack[own].mean(1), self.clean[own].mean(1))
        worst = min(by_mode, key=by_mode.get)
        text = (f"direction: held-out pairs ranked right {(hack > clean).float().mean():.2f}, AUROC "
                f"{auroc(hack, clean):.2f} (lowest: {worst} {by_mode[worst]:.2f}), band {clean.mean():+.3f} to "
                f"{hack.mean():+.3f}, cut {self.cut():.2f}, reading: {reading(self.window)}")
        if by_mode[worst] < POOR:
            text += (f"\nwarning: {worst}: the AUROC of its held-out pairs is {by_mode[worst]:.2f}, and below {POOR} a "
                     "mode may leak; revise --pairs, or try another --score")
        for other, distance in self.by_reading.items():
            here = self.by_reading[reading(self.window)]
            if distance - here >= MARGIN:
                flag = "--window 0 (the whole answer)" if other == "whole" else f"--{other}"
                text += f"\nwarning: {flag} tells held-out modes further apart ({distance:.2f}, here {here:.2f})"
        return text


def encode_pairs(model, tok, pairs: list["Pair"], system: list[dict] = ()) -> tuple[list, list]:
    """Token ids of the prompts of P pairs, each after the messages `system`, and of their 2P sides, clean sides first.
    Raises InputError for a pair that does not fit the model's context."""
    prompts = [encode_prompt(tok, [*system, dict(role="user", content=pair.prompt)]) for pair in pairs]
    texts = [pair.clean for pair in pairs] + [pair.hack for pair in pairs]
    sides = [encode_completion(tok, text) for text in texts]
    limit = context_of(model)
    for pair, prompt, side in zip(pairs * 2, prompts * 2, sides):
        if len(prompt) + len(side) > limit:
            raise InputError(f"--pairs: pair {pair.name!r} is {len(prompt) + len(side)} tokens long, and the model's "
                             f"context has {limit}; shorten it")
    return prompts, sides


def check_window(config: Any) -> None:
    """Raises InputError for a negative --window, and for a window that --probe-tokens does not allow."""
    if config.window < 0:
        raise InputError(f"--window {config.window}: give a number of tokens, or 0 for the whole answer")
    if config.score == "gradient" and config.window and config.probe_tokens == "all":
        raise InputError(f"--probe-tokens all with --window {config.window}: a window holds tokens of the completion "
                         "alone; give --probe-tokens completion, or --window 0")


def extract(model, tok, adapter: Adapter, pairs: list["Pair"], system: list[dict] = (), budget: int = 4096,
            score: str = "gradient", read: str = "base", window: int = 0, centre: bool = True, equal_pairs: bool = True,
            temperature: float = 100.0, tokens: str = "completion") -> Direction:
    """Read the direction and its bands from the pairs, always without the quarantine (read "full" is "ablated" here).

    system: messages before each pair's prompt. centre: subtract the mean over all pair sides from every feature before
    the cosine. equal_pairs: as in direction_of(), for score gradient alone. The others: as in features().
    Pairs of several modes also tell how far apart each reading, whole or window, holds the sides of a held-out mode.
    Raises InputError if the pairs give no direction."""
    prompts, sides = encode_pairs(model, tok, pairs, system)
    modes = [pair.mode for pair in pairs]
    several_modes = len(set(modes)) > 1
    equal_pairs = equal_pairs and score == "gradient"
    size = window
    if several_modes and not (score == "gradient" and tokens == "all"):
        size = window or WINDOW  # read windows for the comparison, even if the run reads whole answers
    read = "ablated" if read == "full" else read
    x = features(model, adapter, prompts * 2, sides, budget, score, size, read, temperature, tokens)
    v = direction_of(*x[:, 0].chunk(2), equal_pairs)  # [M, d]
    if not v.any() or not v.isfinite().all():
        raise InputError("--pairs: the mean difference of hack and clean sides is zero or not finite; revise them")
    mean = x[:, 0].mean(0) if centre else torch.zeros_like(v)  # [M, d]

    unseen = {}  # reading -> clean and hack sides, [P, M] each, by the other modes' pairs
    for tried in sorted({0, size}) if several_modes else ():
        unseen[reading(tried)] = held_out(x, mean, modes, equal_pairs, tried > 0)
    by_reading = {name: apart(*cosine) for name, cosine in unseen.items()}
    if not window:
        x = x[:, :1].clone()  # the windows of a large model take gigabytes
    clean, hack = held_out(x, mean, range(len(pairs)), equal_pairs, window > 0)
    return Direction(v, mean, clean, hack, x, modes, window, unseen.get(reading(window), [clean, hack]), by_reading)


# -------------------------------------------------------------------------------- pairs
@dataclass(frozen=True)
class Pair:
    name: str  # the heading
    mode: str  # the loophole that the prompt discloses
    prompt: str  # the user message
    clean: str  # the honest completion, fenced
    hack: str  # the completion that exploits the loophole, fenced


def load_pairs(path: str | Path) -> list[Pair]:
    """Parse the Markdown of authored pairs: `## N. mode: task`, then `### prompt`, `### clean`, `### hack`.

    Raises InputError with file and line for a file that cannot be read, a heading that is not one of these, an open
    fence, a part that is missing, empty or not fenced, equal sides, and a pair that occurs twice."""
    def refuse(n: int, what: str):
        raise InputError(f"{path}:{n}: {what}")

    found: list[tuple[int, str, str, dict]] = []  # line, heading, mode, parts
    part, fence = None, 0  # the part being read, and the line where a fence was opened
    unclosed = "the fence that opens here is not closed; close it with ```"
    text = read_text("--pairs", path, "give authored pairs such as data/nano/pairs.md")
    for n, line in enumerate(text.split("\n"), 1):
        if "\0" in line:
            refuse(n, "holds a NUL byte; remove it")
        if line.startswith("```"):
            if fence and line.strip() != "```":
                refuse(fence, unclosed)
            fence = 0 if fence else n
        elif not fence and re.match(r"###? |#+ *(\d+\.|prompt$|clean$|hack$)", line):
            match = re.fullmatch(r"## (\d+\. (\w+): .+)", line)
            if match and match[2] in MODES:
                found.append((n, match[1], match[2], {}))
                part = None
                continue
            if not line.startswith("### "):
                refuse(n, f"heading {line!r}; write '## 7. MODE: task', one of {', '.join(MODES)}")
            part = line[4:].strip()
            if not found or part not in ("prompt", "clean", "hack") or part in found[-1][3]:
                refuse(n, f"section {line!r}; each pair has a '### prompt', '### clean', '### hack'")
            found[-1][3][part] = []
            continue
        if part:
            found[-1][3][part].append(line)
    if fence:
        refuse(fence, unclosed)

    pairs: list[Pair] = []
    for n, name, mode, parts in found:
        texts = {key: "\n".join(parts.get(key, [])).strip() for key in ("prompt", "clean", "hack")}
        for key, text in texts.items():
            if not text:
                refuse(n, f"pair {name!r} has no text under '### {key}'; add it")
            if key != "prompt" and not (text.startswith("```python\n") and text.endswith("```")):
                refuse(n, f"pair {name!r}: the {key} side is not one ```python block; fence it")
        if texts["clean"] == texts["hack"]:
            refuse(n, f"pair {name!r}: its two sides are equal, which gives no direction; write the hack")
        pairs.append(Pair(name, mode, **texts))
        if any(p.name == name or replace(p, name=name, mode=mode) == pairs[-1] for p in pairs[:-1]):
            refuse(n, f"pair {name!r} is there twice; remove one")
    if len(pairs) < 2:
        raise InputError(f"{path}: {len(pairs)} pairs found; a direction needs at least 2, better 40")
    return pairs


def count(pairs: list[Pair]) -> str:
    """How many pairs there are, and of which mode."""
    of_mode = Counter(pair.mode for pair in pairs)
    return f"{len(pairs)} pairs ({', '.join(f'{mode} {n}' for mode, n in sorted(of_mode.items()))})"


# -------------------------------------------------------------------------------- the report
@dataclass
class Config:
    model: str = str(HERE / "data/nano")
    """Hugging Face folder or hub name of a causal LM with a chat template"""
    pairs: Path = HERE / "data/nano/pairs.md"
    """authored pairs"""
    score: Literal["gradient", "activation"] = "gradient"
    """what is read of an answer: the gradient at the c-probe, or hidden states"""
    window: int = 5
    """neighbouring tokens that are read, those that look most like a hack; 0: the whole answer"""
    probe_temperature: float = 100.0
    """score gradient: softmax temperature of the NLL; at 1, surprising tokens weigh most"""
    probe_tokens: Literal["completion", "all"] = "completion"
    """score gradient: the tokens at which the probe sits; all: those of the prompt, too"""
    rank: int = 32
    """r, rank of each of the two blocks"""
    seed: int = 0
    """seeds the adapter's Gaussian init"""
    centre: bool = True
    """subtract the mean over all pair sides before the cosine"""
    equal_pairs: bool = True
    """score gradient: normalise each pair's difference before the mean"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the base model"""


def report(direction: Direction, pairs: list[Pair], names: list[str]) -> None:
    """Print what a user needs to trust a direction. names: of its M modules or layers."""
    P, x = len(pairs), direction.pair_features  # [2P, 1 + W, M, d]
    print(f"{count(pairs)}, features of {x.shape[-2]} x {x.shape[-1]} numbers\n{direction.summary()}\n")

    print("  direction of             sides of          n   ranked right   AUROC")
    scored_by = {"the pairs themselves": direction.cosines(x).chunk(2),
                 "the other pairs": (direction.clean, direction.hack)}
    if direction.by_reading:
        scored_by["the other modes' pairs"] = direction.unseen
    for source, (clean, hack) in scored_by.items():
        for mode in ("all", *sorted(set(direction.modes))):
            own = [mode in ("all", other) for other in direction.modes]  # P
            a, b = clean[own].mean(1), hack[own].mean(1)  # [n] each
            print(f"  {source:24s} {mode:15s} {len(a):3d} {(b > a).float().mean():14.3f} {auroc(b, a):7.3f}")
    v = torch.stack([haar(seed, *direction.v.shape) for seed in range(N_RANDOM)])  # [N_RANDOM, M, d]
    scores = torch.einsum("gwmd,nmd->ngw", F.normalize(x - direction.centre, dim=-1), v)  # [N_RANDOM, 2P, 1 + W]
    scores = scores[..., 1:].nan_to_num(-math.inf).amax(2) if direction.window else scores[..., 0]  # as in cosines()
    found = torch.tensor([auroc(score[P:], score[:P]) for score in scores])  # [N_RANDOM]
    print(f"  {N_RANDOM} random directions    all, AUROC: mean {found.mean():.3f}, 95th percentile "
          f"{found.quantile(0.95):.3f}, maximum {found.max():.3f}")
    distances = ", ".join(f"{name} {distance:.2f}" for name, distance in direction.by_reading.items())
    print(f"  distance between the sides of held-out modes: {distances or 'unknown, the pairs show one mode'}")

    norm = (x[P:, 0] - x[:P, 0]).mean(0).norm(dim=-1)  # [M]
    low, high = direction.band("batch")  # [M] each
    shown = range(len(names)) if len(names) <= 40 else norm.topk(10).indices.tolist()  # a page holds no more
    print(f"\n  {f'{len(shown)} of {len(names)} modules':35s} |hack - clean|   p75 clean   p75 hack   held-out AUROC")
    for i in shown:
        auc = auroc(direction.hack[:, i], direction.clean[:, i])
        print(f"  {names[i]:36s} {norm[i]:13.5f} {low[i]:+11.3f} {high[i]:+10.3f} {auc:16.3f}")

    margin = direction.hack.mean(1) - direction.clean.mean(1)  # [P]
    worst = [f"{pairs[i].name} ({margin[i]:+.3f})" for i in margin.argsort()[:5]]
    print(f"\n  pairs that the other pairs rank worst: {'; '.join(worst)}")


def main(cfg: Config) -> None:
    """Print the report. Raises InputError for flags and files that cannot be used."""
    check_window(cfg)
    if not 0 < cfg.probe_temperature < math.inf:  # nor is NaN
        raise InputError(f"--probe-temperature {cfg.probe_temperature}: give a finite number above 0")
    if cfg.rank < 1:
        raise InputError(f"--rank {cfg.rank}: give a rank of at least 1")
    if not 0 <= cfg.seed < 2**32:
        raise InputError(f"--seed {cfg.seed}: give a number from 0 to {2**32 - 1}")
    pairs = load_pairs(cfg.pairs)
    model, tok = load_model(cfg.model, cfg.device, cfg.dtype)
    adapter = attach(model, cfg.rank, cfg.seed)
    direction = extract(model, tok, adapter, pairs, score=cfg.score, window=cfg.window, centre=cfg.centre,
                        equal_pairs=cfg.equal_pairs, temperature=cfg.probe_temperature, tokens=cfg.probe_tokens)
    layers = [f"layer {i}" for i in range(len(direction.v))]
    report(direction, pairs, list(adapter.modules) if cfg.score == "gradient" else layers)


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
