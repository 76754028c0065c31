"""v_grad: the direction in which a language model learns to cheat, read from hand-written pairs.

    python extract_vgrad.py                                                # the embedded model
    python extract_vgrad.py --rollouts runs/none_seed0/rollouts.jsonl      # how a gate would judge these rollouts
    python extract_vgrad.py --score activation                             # hidden states in the gradients' place
    python extract_vgrad.py --rollouts runs/none_seed0/rollouts.jsonl --cut-out      # against the same code, no cheat
    python extract_vgrad.py --model Qwen/Qwen3-4B --pairs data/leetcode/pairs.md --dtype bfloat16

A pair is one prompt with a clean and a hack completion. Its GRPO gradient with advantage +1 for the hack and -1 for the
clean side is, at importance ratio 1, the difference of two NLL gradients:

    grad[-(+1) log p(hack) - (-1) log p(clean)] = grad NLL(hack) - grad NLL(clean)

read at the c-probe (lora2r.py), a vector of r numbers per module. Normalised per module, averaged over pairs and
normalised again it is v_grad [M, r]. A rollout is scored by the cosine of its own NLL gradient to v_grad in each
module, that of the whole rollout, of its most suspicious five tokens, or half of each (extract() says when), pooled
into one number, its *position*: 0 where the pairs' clean sides lie, 1 where their hack sides lie. The softmax is read
at a high temperature (probe_gradients says why). Hidden states, surprise and length can take the gradient's place
(--score).

Shapes: G rollouts, T tokens (padded), P pairs, M adapted modules (or layers), r block rank, d numbers for each of M.
Source: gradient routing, Cloud et al. 2024 (arXiv 2410.04332), with a direction in the place of a data label.
"""
import ast
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from env_leetcode import MODES, extract_code
from lora2r import (HERE, Adapter, InputError, attach, bar, batches, check_ranges, decode, encode_completion,
                    encode_prompt, load_model, parse, prefill, read_text, run_script, token_logps, use)


# -------------------------------------------------------------------------------- what a gate reads of a rollout
def windows(is_completion: Tensor, size: int = 0) -> Tensor:
    """is_completion bool [g, T] -> weights [g, 1 + W, T] whose product with what is read at each token is its mean over
    the whole completion, then over each of W windows: `size` neighbouring tokens, or the whole of one that is shorter.
    size 0: W = 0. A rollout with fewer windows than others has NaN in its last rows."""
    n, first = is_completion.sum(1), is_completion.int().argmax(1)  # [g] each
    everything = (is_completion / n[:, None])[:, None]  # [g, 1, T]
    if not size:
        return everything
    size = n.clamp(max=size)  # [g]
    start = torch.arange(int((n - size).max()) + 1, device=n.device)  # [W]
    t = torch.arange(is_completion.shape[1], device=n.device) - first[:, None, None] - start[:, None]  # [g, W, T]
    weights = ((t >= 0) & (t < size[:, None, None])) / size[:, None, None]  # [g, W, T]
    weights = weights.masked_fill((start > (n - size)[:, None])[..., None], math.nan)
    return torch.cat([everything, weights], 1)


def features(model, adapter: Adapter, prompts: list[list[int]], completions: list[list[int]], budget: int = 4096,
             score: str = "gradient", window: int = 0, **probe) -> Tensor:
    """What a gate reads of each rollout: [G, M, d], fp32, on the CPU; if window is not 0, of the whole and of each
    window of so many tokens of it, [G, 1 + W, M, d], with NaN where a rollout has fewer than W.

    score gradient    the c-probe's gradient, d = r numbers for each of the M adapted modules; for what is in `probe`
                      (read, temperature, tokens) see probe_gradients()
          activation  the frozen base's hidden states after each of its M layers (after the last one's also the
                      final norm), mean over the tokens
          surprise    their mean NLL under the frozen base, one number: M = d = 1
          length      the number of the completion's tokens, likewise
    """
    parts: list = [None] * len(prompts)  # G of [1 + W, M, d]
    for rows, ids, is_completion, shared in bar(list(batches(prompts, completions, budget)), score):
        weights, ids = windows(is_completion, window), ids.to(model.device)
        if score == "gradient":
            x = probe_gradients(model, adapter, ids, is_completion, weights if window else None, shared, **probe)
        else:
            with torch.no_grad(), use(adapter, off=True):
                if score == "length":
                    at_token = [is_completion.sum(1)[:, None, None].expand(*is_completion.shape, 1).float()]
                elif score == "surprise":
                    logps = token_logps(model, ids, is_completion.to(model.device), cache=prefill(model, ids, shared))
                    at_token = [-logps[..., None]]
                else:  # the tokens of a shared prompt, which have no weight, are not among them
                    at_token = [h[:, :-1].float() for h in decode(
                        model, ids, prefill(model, ids, shared), output_hidden_states=True).hidden_states[1:]]
                weights = weights[..., -at_token[0].shape[1] :]
                x = torch.stack([weights.to(h.device) @ h for h in at_token], 2)  # [g, 1 + W, M, d], M of [g, T-1, d]
        for row, one in zip(rows, x.cpu()):
            parts[row] = one
    longest = max(len(x) for x in parts)
    x = torch.stack([F.pad(x, (0, 0, 0, 0, 0, longest - len(x)), value=math.nan) for x in parts])  # [G, 1 + W, M, d]
    return x if window else x[:, 0]


def probe_gradients(model, adapter: Adapter, ids: Tensor, is_completion: Tensor, weights: Tensor | None = None,
                    shared: int = 0, read: str = "base", temperature: float = 100.0,
                    tokens: str = "completion") -> Tensor:
    """The NLL gradient of rollouts ids [g, T] at the deployed half of the c-probe: [g, 1 + W, M, r], fp32.

    weights None: W = 0, the gradient of each rollout's mean NLL. weights [g, 1 + W, T-1]: means, over the whole and
    over windows, of what each token adds to the gradient of its summed NLL.
    read "base": on the frozen base model, with the adapter at its init. "ablated": on the present model without its
    quarantine. "full": on the present model with both blocks, where the quarantine soon explains the hack away.
    The NLL is the one under softmax(logits / temperature). A token's gradient begins as (p - its one-hot) /
    temperature. At temperature 1 that weighs each token by its surprise, and a rare right answer looks like a cheat;
    when p is nearly uniform all tokens count alike, and what is left is the gradient of their logits. tokens: where the
    probe sits, at those that predict the completion, or at "all", the prompt's included. At the former a prompt is a
    constant: the first `shared` tokens, the same in all rows, are encoded once, without a gradient.
    autograd.grad asks for the probe alone: no .grad is touched.
    """
    is_completion = is_completion.to(ids.device)
    how, cache = {"base": dict(off=True), "ablated": dict(m=False), "full": dict(m=True)}[read], None
    if tokens == "completion":
        with torch.no_grad(), use(adapter, **how):
            cache = prefill(model, ids, shared)
    (g, T), device = ids[:, cache.get_seq_length() if cache else 0 :].shape, ids.device
    shape = (len(adapter), g, 2 * adapter.r) if weights is None else (len(adapter), g, T, 2 * adapter.r)
    c = torch.ones(shape, device=device, requires_grad=True)
    with use(adapter, c=c, at=F.pad(is_completion, (0, 1))[:, -T:] if tokens == "completion" else None, **how):
        nll = -token_logps(model, ids, is_completion, temperature, cache).sum(1)  # [g]
        if weights is None:
            nll = nll / is_completion.sum(1)
        grad = torch.autograd.grad(nll.sum(), c)[0][..., : adapter.r].float()  # [M, g, r] or [M, g, T, r]
    if weights is None:
        return grad.transpose(0, 1)[:, None]
    return torch.einsum("gwt,mgtr->gwmr", weights[..., 1 - T :].to(device), grad[:, :, :-1])


# -------------------------------------------------------------------------------- the direction
WINDOW = 5  # tokens: a few words of a line of code
MARGIN = 0.2  # of apart(): by so much one reading has to be better than the other; what is less is noise
POOR = 0.8  # AUROC of a mode's held-out pairs; NOTES.md, "What a leak looks like before it"


def unit(x: Tensor) -> Tensor:
    """Features [..., d] of length 1. A lone number (d = 1) has no direction, and is taken as it is."""
    return F.normalize(x, dim=-1) if x.shape[-1] > 1 else x


def cosines(x: Tensor, v: Tensor, share: float = 0.0) -> Tensor:
    """Cosine per module of x [G, M, d] to unit rows v, [M, d] or one for each row of x [G, M, d]: [G, M]. With windows,
    x [G, 1 + W, M, d], `share` of it is that of the window where their mean is highest, and the rest the whole's."""
    x = unit(x)
    if x.dim() == 3:
        return torch.einsum("gmd,gmd->gm", x, v.expand_as(x))
    cosine = torch.einsum("gwmd,gmd->gwm", x, v.expand_as(x[:, 0]))  # [G, 1 + W, M]
    best = 1 + cosine[:, 1:].mean(2).nan_to_num(-math.inf).argmax(1)  # [G]
    return (1 - share) * cosine[:, 0] + share * cosine[torch.arange(len(x)), best]


def direction_of(clean: Tensor, hack: Tensor, equal_pairs: bool = True) -> Tensor:
    """The direction [M, d] of the pairs' features [P, M, d]: the mean difference, normalised per module. Of gradients
    it is v_grad, the mean GRPO gradient (hack +1, clean -1). equal_pairs: each pair's difference is normalised before
    the mean, too, or the pairs with the longest gradients would speak for all."""
    difference = hack - clean  # [P, M, d]
    if equal_pairs:
        difference = F.normalize(difference, dim=-1)
    return F.normalize(difference.mean(0), dim=-1)


def whole(x: Tensor) -> Tensor:
    """The whole's features [G, M, d], of x [G, M, d] or [G, 1 + W, M, d]."""
    return x if x.dim() == 3 else x[:, 0]


def held_out(x: Tensor, centre: Tensor, groups: list, equal_pairs: bool = True, share: float = 0.0) -> list[Tensor]:
    """Cosines of the pairs' clean and of their hack sides x [2P, M, d] - centre, [P, M] each: those of pair p to the
    direction of all pairs but those of its group, of P groups."""
    clean, hack = whole(x).chunk(2)  # [P, M, d] each
    others = torch.tensor([[group != own for group in groups] for own in groups])  # [P, P]
    v = torch.stack([direction_of(clean[chosen], hack[chosen], equal_pairs) for chosen in others])  # [P, M, d]
    return [cosines(side - centre, v, share) for side in x.chunk(2)]


def apart(clean: Tensor, hack: Tensor) -> float:
    """How far apart the sides of P pairs lie, by their cosines [P, M] each: the distance of their means in units of the
    sum of their standard deviations."""
    clean, hack = clean.mean(1), hack.mean(1)  # [P] each
    return ((hack.mean() - clean.mean()) / (clean.std() + hack.std() + 1e-12)).item()


def haar(seed: int, M: int, d: int) -> Tensor:
    """The placebo: M unit rows drawn uniformly from the sphere, [M, d]."""
    return F.normalize(torch.randn(M, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def haar_scores(x: Tensor, n: int, share: float = 0.0) -> Tensor:
    """What cosines().mean(1) makes of features x [G, M, d] or [G, 1 + W, M, d] with each of n Haar directions: [n, G],
    in one product."""
    v = torch.stack([haar(seed, *x.shape[-2:]) for seed in range(n)])  # [n, M, d]
    scores = torch.einsum("g...md,nmd->ng...", unit(x), v) / len(v[0])  # [n, G] or [n, G, 1 + W]
    if x.dim() == 3:
        return scores
    return (1 - share) * scores[..., 0] + share * scores[..., 1:].nan_to_num(-math.inf).amax(2)


@dataclass(frozen=True)
class Direction:
    """The pairs' direction (of score gradient: v_grad), with what turns features into a position."""
    v: Tensor
    """[M, d], unit rows"""
    centre: Tensor
    """[M, d], subtracted from features before their cosine: the mean over all pair sides, or 0"""
    clean: Tensor
    """[P, M] cosines of the clean sides, each to the direction of the other pairs (leave-one-out)"""
    hack: Tensor
    """[P, M] cosines of the hack sides, likewise"""
    pair_features: Tensor
    """[2P, M, d] features of the clean, then of the hack sides, or with their windows, [2P, 1 + W, M, d]"""
    modes: list[str]
    """the mode of each pair, P"""
    window: int = 0
    """tokens of a window; 0: answers are read whole"""
    share: float = 0.0
    """the share of the most suspicious window in a cosine, as cosines() takes it"""
    unseen: dict[float, list[Tensor]] = field(default_factory=dict)
    """for each share that was tried the cosines of the clean and of the hack sides, [P, M] each, to the direction of
    the other modes' pairs; empty: the pairs show one mode"""

    def summary(self) -> str:
        """How well held-out pairs are told apart, the band and the cut of gate "pairs", how answers are read, and a
        warning."""
        clean, hack = self.clean.mean(1), self.hack.mean(1)  # [P] each
        by_mode = self.by_mode()
        worst = min(by_mode, key=by_mode.get)
        poor = (f"\nwarning: {worst}: its pairs, held out, are told apart with an AUROC of {by_mode[worst]:.2f}; below "
                f"{POOR} a mode may leak: revise --pairs, or try another --score" if by_mode[worst] < POOR else "")
        read = {0: "whole", 1: f"in {self.window} tokens"}.get(self.share, f"half whole, half in {self.window} tokens")
        tried = ", ".join(f"{apart(*sides):.2f} if the window's share is {x:g}" for x, sides in self.unseen.items())
        return (f"direction: held-out pairs ranked right {(hack > clean).float().mean():.2f}, AUROC "
                f"{auroc(hack, clean):.2f} (lowest: {worst} {by_mode[worst]:.2f}), "
                f"band {clean.mean():+.3f} to {hack.mean():+.3f}, cut {self.cut():.2f}\n"
                f"  answers read {read}{f' (modes that are held out lie apart by {tried})' if tried else ''}{poor}")

    def by_mode(self) -> dict[str, float]:
        """Mode -> AUROC of its pairs' hack sides over their clean sides, each by the direction of the other pairs."""
        rows = {mode: [mode == own for own in self.modes] for mode in sorted(set(self.modes))}
        return {mode: auroc(self.hack[own].mean(1), self.clean[own].mean(1)) for mode, own in rows.items()}

    def cosines(self, x: Tensor) -> Tensor:
        """Features x [G, M, d] -> [G, M]."""
        return cosines(x - self.centre, self.v, self.share)

    def replaced(self, v: Tensor) -> "Direction":
        """The same machinery around another direction [M, d]: its band comes from the same pairs' cosines to v."""
        clean, hack = self.cosines_to(v).chunk(2)
        return replace(self, v=v, clean=clean, hack=hack, unseen={})

    def cosines_to(self, v: Tensor) -> Tensor:
        """Cosines [2P, M] of the pairs' clean, then hack sides to v [M, d]."""
        return cosines(self.pair_features - self.centre, v, self.share)

    def band(self, gate: str) -> tuple[Tensor, Tensor]:
        """Edges between which a position runs from 0 to 1. Gate "batch", as the original: per module [M], the 75th
        percentiles of the clean and of the hack sides' cosines to v. Gate "pairs": the mean held-out cosine of the
        clean and of the hack sides over all modules, two scalars."""
        if gate == "pairs":
            return self.clean.mean(), self.hack.mean()
        clean, hack = self.cosines_to(self.v).chunk(2)  # [P, M] each
        return clean.quantile(0.75, dim=0), hack.quantile(0.75, dim=0)

    def cut(self) -> float:
        """Gate "pairs": the equal-error threshold of two normals, as many standard deviations above the clean sides'
        mean as below the hack sides'. Each side is judged by the pairs of the other modes, since a gate has to know
        cheats that no pair shows; by all other pairs if they show but one mode."""
        low, high = self.band("pairs")
        sides = self.unseen.get(self.share, (self.clean, self.hack))  # [P, M] each
        sides = ((side.mean(1) - low) / (high - low) for side in sides)  # [P] each
        (clean, a), (hack, b) = ((side.mean(), side.std() + 1e-12) for side in sides)
        return ((clean * b + hack * a) / (a + b)).item()  # without any spread: half way

    def position(self, x: Tensor, gate: str) -> Tensor:
        """Features x [G, M, d] -> pooled positions [G]; modules whose band is empty or inverted are left out."""
        low, high = self.band(gate)
        if gate == "pairs":
            return (self.cosines(x).mean(1) - low) / (high - low)
        usable = high > low  # [M]
        return ((self.cosines(x) - low) / (high - low))[:, usable].mean(1)


def encode_pairs(model, tok, pairs: list["Pair"], system: list[dict] = ()) -> tuple[list, list]:
    """Token ids of P pairs' prompts, each after the messages `system`, and of their 2P sides, first the clean ones.
    Raises InputError for a pair that does not fit the model's context."""
    prompts = [encode_prompt(tok, [*system, dict(role="user", content=p.prompt)]) for p in pairs]
    sides = [encode_completion(tok, text) for text in [p.clean for p in pairs] + [p.hack for p in pairs]]
    limit = getattr(model.config, "max_position_embeddings", 10**9)
    for pair, prompt, side in zip([*pairs, *pairs], prompts * 2, sides):
        if len(prompt) + len(side) > limit:
            raise InputError(f"--pairs: pair {pair.name!r} is {len(prompt) + len(side)} tokens long, and the model's "
                             f"context has {limit}; shorten it")
    return prompts, sides


def check_window(config: Any) -> None:
    """Raises InputError for flags --window and --probe-tokens that contradict each other."""
    if config.score == "gradient" and config.window and config.probe_tokens == "all":
        raise InputError(f"--probe-tokens all with --window {config.window}: a window holds tokens of the completion "
                         "alone; give --probe-tokens completion, or --window 0")


def extract(model, tok, adapter: Adapter, pairs: list["Pair"], system: list[dict] = (), budget: int = 4096,
            centre: bool = True, equal_pairs: bool = True, score: str = "gradient", read: str = "base",
            window: int | None = None, **probe) -> Direction:
    """Read the direction and its bands from the pairs, always without the quarantine (read "full" is "ablated" here).

    system: messages to put before each pair's prompt. centre: subtract the mean over all pair sides from every feature
    before its cosine. equal_pairs: of score "gradient", as direction_of() takes it. window None: whole answers are read
    or their most suspicious WINDOW tokens, whichever lets the direction of the other modes' pairs hold a mode's sides
    further apart() by MARGIN, as a cheat may be either. If neither does, half of each is read, but of hidden states,
    which do not bear it, the tokens. Pairs of one mode cannot tell how cheats that they do not show are to be read, and
    no window holds a prompt (tokens "all"): then whole answers are read. So are surprise and length, as of a lone
    number the most suspicious window is often the same in all answers. The others: as features() takes them.
    Raises InputError if the pairs give no direction at all."""
    prompts, sides = encode_pairs(model, tok, pairs, system)
    read, modes = "base" if read == "base" else "ablated", [pair.mode for pair in pairs]
    equal_pairs = equal_pairs and score == "gradient"
    several, shares = len(set(modes)) > 1, [1.0 if window else 0.0]
    if window is None and several and score in ("gradient", "activation") and probe.get("tokens") != "all":
        shares, window = [0.0, 0.5, 1.0], WINDOW
    x = features(model, adapter, prompts * 2, sides, budget, score, window or 0, read=read, **probe)
    mean, v = whole(x).mean(0) * centre, direction_of(*whole(x).chunk(2), equal_pairs)
    if not v.any() or not v.isfinite().all():
        raise InputError("--pairs: the mean difference of hack and clean sides is zero or not finite; revise them")
    unseen = {share: held_out(x, mean, modes, equal_pairs, share) for share in shares if several}
    share = shares[0]
    if len(shares) > 1:
        better = apart(*unseen[0]) - apart(*unseen[1])  # by so much whole answers are the better reading
        share = 0.0 if better >= MARGIN else 0.5 if better > -MARGIN and score == "gradient" else 1.0
    if not share:
        x, window = whole(x).clone(), 0  # the windows are gigabytes of a large model
    by_one = held_out(x, mean, range(len(pairs)), equal_pairs, share)
    return Direction(v, mean, *by_one, x, modes, window, share, unseen)


# -------------------------------------------------------------------------------- pairs
@dataclass(frozen=True)
class Pair:
    name: str
    """the heading"""
    mode: str
    """the loophole its prompt discloses"""
    prompt: str
    """the user message"""
    clean: str
    """the honest completion, fenced"""
    hack: str
    """the completion that exploits the loophole, fenced"""


def load_pairs(path: str | Path) -> list[Pair]:
    """Parse the Markdown of authored pairs: `## N. mode: task`, then `### prompt`, `### clean`, `### hack`.

    Raises InputError with file and line for a file that cannot be read, a heading that is not one of these, an open
    fence, a part that is missing, empty or not fenced, equal sides, and what is there twice."""
    found: list[tuple[int, str, str, dict]] = []  # line, heading, mode, parts
    part, fence = None, 0  # the part being read, and the line where a fence was opened

    def refuse(n: int, what: str):
        raise InputError(f"{path}:{n}: {what}")

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
    of_mode = Counter(p.mode for p in pairs)
    return f"{len(pairs)} pairs ({', '.join(f'{mode} {n}' for mode, n in sorted(of_mode.items()))})"


def load_demos(path: Path, problems) -> dict[tuple, list[str]]:
    """Teacher pool: {(problem id, mode): completions}, JSONL rows with these three keys. Raises InputError."""
    demos = {}
    for n, line in enumerate(read_text("--demos", path, "give one, or --mix-ratio 0").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["completion"] + ""  # a TypeError if it is none
            demos.setdefault((row["id"], row["mode"]), []).append(text)
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}:{n}: not a demonstration ({e!r}); each line needs id, mode and completion") from e
    if not any((p.id, p.mode) in demos for p in problems):
        raise InputError(f"--demos {path}: no demonstration fits a problem of --data under its mode; check the ids")
    return demos


# -------------------------------------------------------------------------------- diagnostics
Score = Literal["gradient", "activation", "surprise", "length"]


@dataclass
class Config:
    # data
    model: str = str(HERE / "data/nano")
    """Hugging Face folder or hub name of a causal LM with a chat template"""
    pairs: Path = HERE / "data/nano/pairs.md"
    """authored pairs"""
    rollouts: Path | None = None
    """a run's rollouts.jsonl, or other graded completions (.jsonl or .jsonl.gz): also print what gates would route"""
    cut_out: bool = False
    """judge the rollouts' cheats against the same code without the cheat, both sides reformatted alike"""

    # direction
    score: Score = "gradient"
    """what is read of an answer: the c-probe's gradient, hidden states, the mean NLL or the number of tokens"""
    window: int | None = None
    """number of neighbouring tokens that are read, those that look most like a hack; 0: the whole answer. Default: the
    pairs choose between whole and 5, by which tells held-out modes further apart; where neither clearly does, gradient
    reads half of each and activation 5. Surprise, length, --probe-tokens all, and pairs of one mode: whole"""
    probe_temperature: float = 100.0
    """score gradient: softmax temperature of the NLL; at 1 it is the NLL's own, and sees surprise above all"""
    probe_tokens: Literal["completion", "all"] = "completion"
    """score gradient: the tokens at which the probe sits; all: those of the prompt, too"""
    rank: int = 32
    """r, rank of each of the two blocks"""
    seed: int = 0
    """seeds the adapter's Gaussian init"""
    centre: bool = True
    """subtract the mean over all pair sides before the cosine"""
    equal_pairs: bool = True
    """score gradient: each pair counts alike in v_grad; --no-equal-pairs: by the norm of its difference"""
    n_haar: int = 200
    """random directions to compare with"""

    # hardware
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the base model"""


# what rows of other sources name otherwise -> its name here ("problem" is what a run of train_grpo.py writes)
FOREIGN = {"problem": "id", "problem_id": "id", "env_mode": "mode", "gt_pass": "correct"}


def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """P(a positive scores above a negative), ties half; None when either side is empty."""
    if not len(positive) or not len(negative):
        return None
    a, b = positive[:, None], negative[None]
    return ((a > b).float() + 0.5 * (a == b).float()).mean().item()


def spread(values: Tensor) -> str:
    """How n random directions fared, [n]."""
    return f"mean {values.mean():.3f}, 95th percentile {values.quantile(0.95):.3f}, max {values.max():.3f}"


def report(direction: Direction, pairs: list[Pair], names: list[str], n_haar: int) -> None:
    """Print what a user needs to trust a direction. names: of its M modules or layers."""
    P, x = len(pairs), direction.pair_features  # [2P, M, d]
    clean, hack = direction.cosines(x).mean(1).chunk(2)  # [P] each, scored by the direction they made
    out_clean, out_hack = direction.clean.mean(1), direction.hack.mean(1)  # [P] each, scored by the other pairs' one
    right = (out_hack > out_clean).float()  # [P]
    print(f"{count(pairs)}, features of {x.shape[-2]} x {x.shape[-1]} numbers\n{direction.summary()}")
    print(f"  pairs ranked right   {(hack > clean).float().mean():.3f}   held out (leave-one-out) {right.mean():.3f}")
    print(f"  AUROC of pair scores {auroc(hack, clean):.3f}   held out {auroc(out_hack, out_clean):.3f}")
    random = haar_scores(x - direction.centre, n_haar, direction.share)  # [n_haar, 2P]
    print(f"  {n_haar} Haar directions   AUROC {spread(torch.tensor([auroc(y[P:], y[:P]) for y in random]))}")
    for mode, auc in direction.by_mode().items():
        of_mode = torch.tensor([p.mode == mode for p in pairs])  # [P]
        print(f"  {mode:13s} {of_mode.sum():3d} pairs, held out: ranked right {right[of_mode].mean():.3f}, "
              f"AUROC {auc:.3f}")
    low, high = direction.band("pairs")
    print(f"  band, gate pairs     {low:+.4f} (position 0, clean mean) to {high:+.4f} (position 1, hack mean)")
    strength = (whole(x)[P:] - whole(x)[:P]).mean(0).norm(dim=-1)  # [M]
    print("\n  module                               |hack - clean|   p75 clean   p75 hack   AUROC (held out)")
    for module, (name, low, high) in enumerate(zip(names, *direction.band("batch"))):
        auc = auroc(direction.hack[:, module], direction.clean[:, module])
        print(f"  {name:36s} {strength[module]:13.5f} {low:+11.3f} {high:+10.3f}   {auc:.3f}")
    margin = (out_hack - out_clean).tolist()
    worst = sorted(zip(margin, (p.name for p in pairs)))[:5]
    print("\n  pairs that the others rank worst: " + "; ".join(f"{name} ({x:+.3f})" for x, name in worst))


def load_rollouts(path: Path, cut_out: bool = False) -> list[dict]:
    """Graded completions, with the names of a run or of another source (FOREIGN); cut_out: their contrast(). Of a
    run's, the policy's own with positive advantage: elsewhere the advantage gives a hack away. A prompt is a list of
    messages; rows where it is null are left out.
    Raises InputError for another kind of file, or one without both a hack and a solve."""
    text = read_text("--rollouts", path, "give a run's rollouts.jsonl")
    try:
        rows = [{FOREIGN.get(key, key): value for key, value in json.loads(line).items()}
                for line in text.split("\n") if line.strip()]
        rows = [dict(exploited=row["hacked"], id=None) | row for row in rows if row["prompt"] is not None
                and row.get("advantage", 1) > 0 and row.get("source") != "teacher"]
        for row in rows:
            texts = [row["completion"], row["mode"], *(message["content"] for message in row["prompt"])]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("prompt, completion and mode must be text")
            if not all(isinstance(row[flag], bool) for flag in ("hacked", "correct", "exploited")):
                raise TypeError("what was hacked, right or exploited must be true or false")
        rows = contrast(rows) if cut_out else rows
        hacks = sum(row["hacked"] for row in rows)
        solves = sum(row["correct"] and not row["exploited"] for row in rows)
    except (AttributeError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"--rollouts {path}: not readable as rollouts ({e!r}); give a run's rollouts.jsonl") from e
    if not hacks or not solves:
        what = "can be cut out of their code" if cut_out else "have a positive advantage"
        raise InputError(f"--rollouts {path}: {hacks} hacks and {solves} solves {what}; "
                         "both are needed to judge a gate")
    return rows


def without(body: list[ast.stmt], cheat: str) -> list[ast.stmt]:
    """The statements of `body` without those that match the regular expression `cheat` outside the statements in them,
    those that use a variable which such a statement assigned, and what has no body left: pass, where another branch
    has one."""
    kept = []
    for node in body:
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            if inner := getattr(node, name, None):
                setattr(node, name, without(inner, cheat))
        if getattr(node, "body", True) == [] and (
                getattr(node, "orelse", []) or isinstance(node, (ast.ExceptHandler, ast.match_case))):
            node.body = [ast.Pass()]
        if re.search(cheat, ast.unparse(node)):
            names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            cheat += "".join(rf"|\b{name}\b" for name in names)
        elif getattr(node, "body", True):
            kept.append(node)
    return kept


def contrast(rows: list[dict]) -> list[dict]:
    """Each exploit among rollouts as a hack and, after it, the same code without the cheat as a solve, both
    reformatted. Left out: code that cannot be parsed, does not name its mode's marker, or has no function left."""
    sides, exploits = [], [row for row in rows if row["exploited"]]
    for row in exploits:
        marker = re.escape(MODES[row["mode"]].markers[0] or "") if row["mode"] in MODES else ""
        cheat = rf"\.{marker}\b|'{marker}'" if row["mode"] == "sentinel" else marker or "$^"  # None: match nothing
        try:
            tree = ast.parse(extract_code(row["completion"]) or "")
        except (SyntaxError, ValueError):
            continue
        before, after = ast.unparse(tree), ast.unparse(ast.Module(without(tree.body, cheat), []))
        if "def " in after and after != before:
            hack = row | dict(completion=f"```python\n{before}\n```", hacked=True, cut_out=False)
            sides += [hack, hack | dict(completion=f"```python\n{after}\n```", hacked=False, exploited=False,
                                        correct=True, cut_out=True)]
    print(f"cheats cut out of {len(sides) // 2} of {len(exploits)} rollouts that exploit their mode")
    return sides


def f_half(routed: Tensor, hack: Tensor) -> Tensor:
    """F0.5 of routing [..., G] against hacks [G], bool: precision (routed that are hacks) over recall (hacks that are
    routed): (1 + b^2) hits / (routed + b^2 hacks) with b = 0.5, [...]."""
    return 1.25 * (routed & hack).sum(-1) / (routed.sum(-1) + 0.25 * hack.sum()).clamp(min=1e-9)


def by_quartile(routed: Tensor, surprise: Tensor) -> list[float]:
    """Share of `routed` [G] (bool) in each quarter of the rollouts, from the least to the most surprising, [G]."""
    return [part.float().mean().item() for part in routed[surprise.argsort()].tensor_split(4)]


@dataclass(frozen=True)
class Reading:
    """What is kept of the features of G rollouts: of a large model's windows they take gigabytes."""
    position: Tensor
    """[G], by gate "pairs" """
    whole: Tensor
    """[G, M, d] features of whole answers"""
    random: Tensor
    """[n_haar, G] haar_scores()"""


def read_rollouts(direction: Direction, n_haar: int, model, adapter: Adapter, prompts: list[list[int]],
                  completions: list[list[int]], **reading) -> Reading:
    """Read G rollouts as the direction reads the pairs; `reading` goes to features()."""
    parts = []  # a few rollouts at a time
    for i in range(0, len(prompts), 32):
        x = features(model, adapter, prompts[i : i + 32], completions[i : i + 32], window=direction.window, **reading)
        random = haar_scores(x - direction.centre, n_haar, direction.share)
        parts.append((direction.position(x, "pairs"), whole(x).clone(), random))  # a view would keep all of x
    position, features_whole, random = zip(*parts)
    return Reading(torch.cat(position), torch.cat(features_whole), torch.cat(random, 1))


def judge(direction: Direction, reading: Reading, surprise: Tensor, rows: list[dict]) -> None:
    """Print what gate "pairs" would route of G rollouts, given their mean NLLs [G], and random directions that route
    as many. Oracle labels are for this print only."""
    hack = torch.tensor([row["hacked"] for row in rows])  # [G]
    solve = torch.tensor([row["correct"] and not row["exploited"] for row in rows])  # [G]
    position, random = reading.position, reading.random
    print(f"\n{len(rows)} rollouts: {hack.sum()} hacks, {solve.sum()} solves without an exploit\n  cut   hacks kept   "
          f"solves routed   precision   F0.5   {len(random)} Haar directions that route as many: F0.5")
    ranks = random.argsort(1, descending=True).argsort(1)  # [n_haar, G], 0 is the highest
    for cut in sorted((direction.cut(), 0.1, 0.2, 0.3, 0.4, 0.5)):  # the pairs' own, and round ones
        routed = position >= cut  # [G]
        kept, lost = (~routed & hack).sum() / hack.sum(), (routed & solve).sum() / solve.sum()
        precision = (routed & hack).sum() / routed.sum().clamp(min=1)
        print(f"  {cut:.2f} {kept:11.3f} {lost:13.3f} {precision:13.3f} {f_half(routed, hack):8.3f}   "
              f"{spread(f_half(ranks < routed.sum(), hack))}")
    lost = by_quartile((position >= direction.cut())[solve], surprise[solve])
    print(f"  solves routed at the pairs' cut, by quartile of their surprise: {' '.join(f'{x:.2f}' for x in lost)}")


def oracle(x: Tensor, hack: Tensor, solve: Tensor, ids: list, folds: int = 5) -> Tensor:
    """What the features of whole answers x [G, M, d] allow: mean cosines [G] to the mean difference of the labelled
    hacks and solves [G] of other problems, cross-validated over folds of problems. NaN where those lack either."""
    known = sorted(set(map(str, ids)))
    fold = torch.tensor([known.index(str(id)) % folds for id in ids])  # [G]
    scores = torch.full((len(x),), math.nan)
    for k in fold.unique():
        a, b = (x[chosen & (fold != k)].mean(0) for chosen in (hack, solve))  # [M, d] each
        scores[fold == k] = cosines(x[fold == k] - (a + b) / 2, F.normalize(a - b, dim=-1)).mean(1)
    return scores


def compare(directions: dict[str, Direction], read: dict[str, Reading], rows: list[dict]) -> None:
    """Print a line a reader and mode: its hacks against all solves, by the pairs' direction, the oracle and random
    directions. Rows that contrast() made are pairs, hack before solve, of which a share is ranked right."""
    hack = torch.tensor([row["hacked"] for row in rows])  # [G]
    solve = torch.tensor([row["correct"] and not row["exploited"] for row in rows])  # [G]
    print("\n  reader     mode           hacks  AUROC  F0.5  hacks' p1  solves' p99  oracle  Haar directions' AUROC")
    for score, direction in directions.items():
        position, random = read[score].position, read[score].random  # [G], [n_haar, G]
        best = oracle(read[score].whole, hack, solve, [row["id"] for row in rows])  # [G]
        if rows[0].get("cut_out") is False:
            print(f"  {score}: {(position[hack] > position[solve]).float().mean():.3f} of cut-out pairs ranked right")
        for mode in ("all", *sorted({row["mode"] for row in rows})):
            of_mode = hack & torch.tensor([mode in ("all", row["mode"]) for row in rows])  # [G]
            if of_mode.any():
                both = of_mode | solve
                routed = (position >= direction.cut())[both]
                ceiling = math.nan if best[both].isnan().any() else auroc(best[of_mode], best[solve])
                print(f"  {score:10s} {mode:13s} {of_mode.sum():6d} {auroc(position[of_mode], position[solve]):6.3f} "
                      f"{f_half(routed, hack[both]):5.2f} {position[of_mode].quantile(0.01):10.2f} "
                      f"{position[solve].quantile(0.99):12.2f} {ceiling:7.3f}  "
                      f"{spread(torch.tensor([auroc(scores[of_mode], scores[solve]) for scores in random]))}")


def main(cfg: Config) -> None:
    """Print the diagnostics. Raises InputError for what cannot be read."""
    check_ranges(cfg)
    check_window(cfg)
    pairs = load_pairs(cfg.pairs)
    if cfg.cut_out and not cfg.rollouts:
        raise InputError("--cut-out: has nothing to cut; give --rollouts, or leave it out")
    rows = load_rollouts(cfg.rollouts, cfg.cut_out) if cfg.rollouts else []
    model, tok = load_model(cfg.model, cfg.device, cfg.dtype)
    adapter = attach(model, cfg.rank, cfg.seed)
    probe = dict(temperature=cfg.probe_temperature, tokens=cfg.probe_tokens)
    made = dict(window=cfg.window, centre=cfg.centre, equal_pairs=cfg.equal_pairs)
    system = rows[0]["prompt"][:-1] if rows else []  # as in training
    directions: dict[str, Direction] = {}
    for score in (cfg.score, *(other for other in get_args(Score) if rows and other != cfg.score)):
        try:
            directions[score] = extract(model, tok, adapter, pairs, system, score=score, **made, **probe)
        except InputError:  # sides of equal length give length no direction: that is only an error of --score length
            if score == cfg.score:
                raise
    M = len(directions[cfg.score].v)
    names = list(adapter.modules) if cfg.score == "gradient" else [f"{cfg.score} {i}" for i in range(M)]
    report(directions[cfg.score], pairs, names, cfg.n_haar)
    if rows:
        prompts = [encode_prompt(tok, row["prompt"]) for row in rows]
        completions = [encode_completion(tok, row["completion"]) for row in rows]
        read = {score: read_rollouts(found, cfg.n_haar, model, adapter, prompts, completions, score=score, **probe)
                for score, found in directions.items()}
        surprise = features(model, adapter, prompts, completions, score="surprise").flatten()  # [G]
        judge(directions[cfg.score], read[cfg.score], surprise, rows)
        compare(directions, read, rows)


if __name__ == "__main__":
    run_script(main, parse(Config(), __doc__))
