"""v_grad: the direction in which a language model learns to cheat, read from hand-written pairs.

    python extract_vgrad.py                                                       # the embedded model
    python extract_vgrad.py --seed 1 --rollouts runs/none_seed0/rollouts.jsonl    # how a gate would judge these rollouts
    python extract_vgrad.py --model Qwen/Qwen3-4B --pairs data/leetcode/pairs.md

A pair is one prompt with a clean and a hack completion. Its GRPO gradient with advantage +1 for the hack and -1 for the
clean side is, at importance ratio 1, the difference of two NLL gradients:

    grad[-(+1) log p(hack) - (-1) log p(clean)] = grad NLL(hack) - grad NLL(clean)

read at the c-probe (lora2r.py), a vector of r numbers per module. Averaged over pairs and normalised per module it is
v_grad [M, r]. It is read on the frozen base model: a model that has learned to cheat is no longer surprised by a cheat.
A rollout's score is the cosine of its own NLL gradient to v_grad, placed per module in a band whose edges come from the pairs.

Shapes: G rollouts, T tokens (padded), P pairs, M adapted modules, r block rank.
Source: gradient routing, Cloud et al. 2024 (arXiv 2410.04332), with a direction in the place of a data label.
"""
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from env_leetcode import MODES, InputError, run_script
from lora2r import Adapter, attach, use


LOGITS = 2**27  # at most so many fp32 logits exist at once (0.5 GB, and as much again for each step of the log-softmax)


# ------------------------------------------------------------------------------------------------ model and tokens
def load_model(name: str, device: str = "cpu", dtype: str = "float32"):
    """(model in eval mode, tokenizer) of a local folder or hub name. Raises InputError naming it when it cannot be loaded."""
    try:
        tok = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise InputError(f"--model {name}: cannot be loaded ({reason}); give a Hugging Face folder or hub name") from e
    if tok.chat_template is None:
        raise InputError(f"--model {name}: its tokenizer has no chat template; use an instruct model")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    return model, tok


def encode_prompt(tok, messages: list[dict]) -> list[int]:
    """Token ids of a chat prompt up to where the assistant begins to write."""
    text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    return tok(text, add_special_tokens=False)["input_ids"]


def encode_completion(tok, text: str) -> list[int]:
    """Token ids of a whole completion, with its end-of-turn token."""
    return tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id]


def batches(prompts: list[list[int]], completions: list[list[int]], budget: int):
    """Cut rollouts into micro-batches of similar length with at most `budget` padded tokens each.

    prompts and completions are G lists of token ids. Yields (rows, ids, mask): rows [g], the indices into the input; ids
    [g, T] right-padded with 0, mask [g, T-1] true where ids[:, 1:] is a completion token.

        prompts [[5, 6], [7]], completions [[8], [9, 2, 4]], any budget ->
        ids [[7, 9, 2, 4], [5, 6, 8, 0]], mask [[1, 1, 1], [0, 1, 0]], rows [1, 0]
    """
    size = [len(p) + len(c) for p, c in zip(prompts, completions)]
    order = sorted(range(len(size)), key=lambda i: -size[i])
    while order:
        g = max(1, budget // size[order[0]])
        rows, order = order[:g], order[g:]
        T = size[rows[0]]
        ids = torch.zeros(len(rows), T, dtype=torch.long)  # [g, T]
        mask = torch.zeros(len(rows), T - 1, dtype=torch.bool)  # [g, T-1]
        for j, i in enumerate(rows):
            ids[j, : size[i]] = torch.tensor(prompts[i] + completions[i])
            mask[j, len(prompts[i]) - 1 : size[i] - 1] = True
        yield torch.tensor(rows), ids, mask


def token_logps(model, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of each completion token, [g, T-1], zero outside mask. The vocabulary is only touched where mask is true, and for
    LOGITS numbers at a time: more than that are computed again in the backward instead of kept.

    Right padding needs no attention mask: causal attention never looks at it from a real token.
    """
    head = model.get_output_embeddings()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][mask]  # [N, d], N completion tokens
    target = ids[:, 1:][mask]  # [N]
    logp_of = lambda h, t: -F.cross_entropy(head(h).float() / temperature, t, reduction="none")  # noqa: E731
    n = max(1, LOGITS // head.out_features)
    if len(target) <= n:
        logp = logp_of(hidden, target)  # [N]
    else:
        logp = torch.cat([checkpoint(logp_of, h, t, use_reentrant=False) for h, t in zip(hidden.split(n), target.split(n))])  # [N]
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


def micro_batch_bytes(model, adapter: Adapter, tokens: int, checkpointing: bool = False) -> int:
    """Predicted peak of what a masked forward and backward of `tokens` padded tokens adds to the memory of weights and optimizer.

    What autograd keeps is counted, not modelled: two small forwards give a constant (the adapter's concatenated matrices) and a
    slope in bytes per token. At its peak all of it is alive beside one chunk of logits, as if every token were a completion's. A
    checkpointed layer keeps its input only, and one layer at a time is there in full: an upper bound, as that comes after the logits.
    """
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: list[dict[int, int]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in weights:
            kept[-1][t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    for T in (16, 32):
        kept.append({})
        ids = torch.zeros(2, T, dtype=torch.long, device=next(model.parameters()).device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), use(adapter, m=torch.tensor([True, True]), d=torch.tensor([False, True])):
            graph = model.get_decoder()(input_ids=ids, use_cache=False)  # keeps what it packed alive, so that no address comes twice
        del graph
    small, large = (sum(sizes.values()) for sizes in kept)
    slope = (large - small) / 32  # bytes per token
    constant, layers, width = small - 32 * slope, model.config.num_hidden_layers, model.config.hidden_size
    if checkpointing:
        itemsize = next(model.parameters()).element_size()
        constant, slope = constant / layers, slope / layers + layers * width * itemsize
    logits = min(tokens * model.config.vocab_size, LOGITS) * 3 * 4  # log-softmax and two gradients, float32
    return int(constant + tokens * slope + logits)


# ------------------------------------------------------------------------------------------------ gradients at the c-probe
def probe_gradients(model, adapter: Adapter, prompts: list[list[int]], completions: list[list[int]], budget: int = 8192,
                    read: str = "base") -> Tensor:
    """Each rollout's own NLL gradient at the deployed half of the c-probe: [G, M, r], fp32, on the CPU.

    read "base": on the frozen base model, with the adapter at its init. read "ablated": on the present model without its
    quarantine. (On the full model the quarantine explains the hack away.) The NLL is the mean over the rollout's tokens.
    autograd.grad asks for the probe alone: no .grad of A or B is touched.
    """
    device = next(model.parameters()).device
    out = torch.zeros(len(prompts), len(adapter), adapter.r)  # [G, M, r]
    for rows, ids, mask in batches(prompts, completions, budget):
        ids, mask = ids.to(device), mask.to(device)
        c = torch.ones(len(adapter), len(rows), 2 * adapter.r, device=device, requires_grad=True)  # [M, g, 2r]
        with use(adapter, off=True, c=c) if read == "base" else use(adapter, m=False, c=c):
            nll = -token_logps(model, ids, mask).sum(1) / mask.sum(1)  # [g]
            grad, = torch.autograd.grad(nll.sum(), c)  # [M, g, 2r]
        out[rows] = grad[..., : adapter.r].transpose(0, 1).float().cpu()
    return out


def haar(seed: int, M: int, r: int) -> Tensor:
    """The placebo: M unit rows drawn uniformly from the sphere, [M, r]."""
    return F.normalize(torch.randn(M, r, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ------------------------------------------------------------------------------------------------ pairs
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

    Raises InputError with file and line for a missing file, an unknown mode, a part that is missing, empty or not fenced."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--pairs {path}: no such file; give a Markdown file of authored pairs such as data/nano/pairs.md")
    pairs, parts, part, head, fenced = [], {}, None, None, False

    def close():
        if head is None:
            return
        line, name, mode = head
        for key in ("prompt", "clean", "hack"):
            text = "\n".join(parts.get(key, [])).strip()
            if not text:
                raise InputError(f"{path}:{line}: pair {name!r} has no text under '### {key}'; add it")
            if key != "prompt" and not (text.startswith("```python\n") and text.endswith("```")):
                raise InputError(f"{path}:{line}: pair {name!r}: the {key} side is not one ```python block; fence it")
        pairs.append(Pair(name, mode, *("\n".join(parts[k]).strip() for k in ("prompt", "clean", "hack"))))

    for n, text in enumerate(path.read_text().splitlines(), 1):
        fenced ^= text.startswith("```")
        if text.startswith("## ") and not fenced:
            close()
            match = re.fullmatch(r"## \d+\. (\w+): (.+)", text)
            if not match or match[1] not in MODES:
                raise InputError(f"{path}:{n}: heading {text!r}; write '## 7. MODE: task' with MODE one of {', '.join(MODES)}")
            head, parts, part = (n, text[3:], match[1]), {}, None
        elif text.startswith("### ") and not fenced and head:
            part = text[4:].strip()
            if part not in ("prompt", "clean", "hack") or part in parts:
                raise InputError(f"{path}:{n}: section {text!r}; each pair has one '### prompt', '### clean' and '### hack'")
            parts[part] = []
        elif part:
            parts[part].append(text)
    close()
    if len(pairs) < 2:
        raise InputError(f"{path}: {len(pairs)} pairs found; a direction needs at least 2, better 40")
    return pairs


# ------------------------------------------------------------------------------------------------ direction and bands
def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """P(a positive scores above a negative), ties half; None when either side is empty."""
    if not len(positive) or not len(negative):
        return None
    a, b = positive[:, None], negative[None]
    return ((a > b).float() + 0.5 * (a == b).float()).mean().item()


def direction_of(clean: Tensor, hack: Tensor) -> Tensor:
    """v_grad [M, r] of pair gradients [P, M, r]: the mean GRPO gradient of (hack +1, clean -1), normalised per module.

    NLL descends along minus its gradient, so hack - clean of the NLL gradients is what both sides are compared by."""
    return F.normalize((hack - clean).mean(0), dim=-1)


@dataclass(frozen=True)
class Direction:
    """v_grad with what turns a gradient into a position."""
    v: Tensor
    """[M, r], unit rows"""
    centre: Tensor
    """[M, r], subtracted from a gradient before its cosine: the mean over all pair sides, or 0"""
    clean: Tensor
    """[P, M] cosines of the clean sides, each to the direction of the other pairs (leave-one-out)"""
    hack: Tensor
    """[P, M] cosines of the hack sides, likewise"""
    pair_grads: Tensor
    """[2P, M, r] gradients of the clean, then of the hack sides"""

    def summary(self) -> str:
        """One line: how well held-out pairs are told apart, and the band of gate "pairs"."""
        clean, hack = self.clean.mean(1), self.hack.mean(1)
        return (f"v_grad: held-out pairs ranked right {(hack > clean).float().mean():.2f}, AUROC {auroc(hack, clean):.2f}, "
                f"band {clean.mean():+.3f} to {hack.mean():+.3f}")

    def cosines(self, grads: Tensor) -> Tensor:
        """grads [G, M, r] -> [G, M]."""
        return torch.einsum("gmr,mr->gm", F.normalize(grads - self.centre, dim=-1), self.v)

    def band(self, gate: str) -> tuple[Tensor, Tensor]:
        """Edges between which a position runs from 0 to 1. gate "batch": p75 of the clean and of the hack sides, per module
        [M]; gate "pairs": means of the pooled clean and hack cosines, scalars."""
        if gate == "batch":
            return self.clean.quantile(0.75, dim=0), self.hack.quantile(0.75, dim=0)
        return self.clean.mean(), self.hack.mean()

    def position(self, grads: Tensor, gate: str) -> Tensor:
        """grads [G, M, r] -> pooled positions [G]; modules whose band is empty or inverted on the pairs are left out."""
        cosines, (low, high) = self.cosines(grads), self.band(gate)
        if gate == "pairs":
            return (cosines.mean(1) - low) / (high - low)
        ok = high > low
        return ((cosines - low) / (high - low))[:, ok].mean(1)


def extract(model, tok, adapter: Adapter, pairs: list[Pair], system: list[dict] = (), budget: int = 8192,
            read: str = "base", centre: bool = True) -> Direction:
    """Read v_grad and its bands from the pairs; `read` as in probe_gradients. centre: subtract the mean over all pair sides from
    every gradient before its cosine."""
    prompts = [encode_prompt(tok, [*system, dict(role="user", content=p.prompt)]) for p in pairs]
    sides = [encode_completion(tok, p.clean) for p in pairs] + [encode_completion(tok, p.hack) for p in pairs]
    grads = probe_gradients(model, adapter, prompts * 2, sides, budget, read)  # [2P, M, r]
    clean, hack = grads.chunk(2)  # [P, M, r] each
    mean = grads.mean(0) * centre  # [M, r]
    others = [direction_of(clean.roll(-i, 0)[1:], hack.roll(-i, 0)[1:]) for i in range(len(pairs))]  # P of [M, r]
    cos = lambda side: (F.normalize(side - mean, dim=-1) * torch.stack(others)).sum(-1)  # [P, M]
    return Direction(direction_of(clean, hack), mean, cos(clean), cos(hack), grads)


# ------------------------------------------------------------------------------------------------ diagnostics
@dataclass
class Config:
    model: str = str(Path(__file__).resolve().parent / "data/nano")
    """Hugging Face folder or hub name of a causal LM with a chat template"""
    pairs: Path = Path(__file__).resolve().parent / "data/nano/pairs.md"
    """authored pairs"""
    rank: int = 32
    """r, rank of each of the two blocks"""
    seed: int = 0
    """seeds the adapter's Gaussian init"""
    centre: bool = True
    """subtract the mean over all pair sides before the cosine"""
    rollouts: Path | None = None
    """a run's rollouts.jsonl: also print which of its hacks and solves a gate with this direction would route, at several cuts"""
    n_haar: int = 200
    """random directions to compare with"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    dtype: str = "float32"
    """dtype of the base model"""


def report(direction: Direction, pairs: list[Pair], names: list[str], n_haar: int) -> None:
    """Print what a user needs to trust a direction."""
    P, M, grads = len(pairs), len(names), direction.pair_grads
    clean, hack = direction.cosines(grads).mean(1).chunk(2)  # [P] each, scored by the direction they made
    out_clean, out_hack = direction.clean.mean(1), direction.hack.mean(1)  # [P] each, scored by the other pairs' direction
    random = [replace(direction, v=haar(s, M, grads.shape[-1])) for s in range(n_haar)]
    random_auc = torch.tensor([auroc(*d.cosines(grads).mean(1).chunk(2)[::-1]) for d in random])
    print(f"{P} pairs, {M} modules, r = {grads.shape[-1]}")
    print(f"  pairs ranked right   {(hack > clean).float().mean():.3f}   held out (leave-one-out) {(out_hack > out_clean).float().mean():.3f}")
    print(f"  AUROC of pair scores {auroc(hack, clean):.3f}   held out (leave-one-out) {auroc(out_hack, out_clean):.3f}")
    print(f"  {n_haar} Haar directions   AUROC mean {random_auc.mean():.3f}, 95th percentile {random_auc.quantile(0.95):.3f}, max {random_auc.max():.3f}")
    for mode in sorted({p.mode for p in pairs}):
        i = torch.tensor([n for n, p in enumerate(pairs) if p.mode == mode])
        print(f"  {mode:13s} {len(i):3d} pairs, held out: ranked right {(out_hack > out_clean)[i].float().mean():.3f}, AUROC {auroc(out_hack[i], out_clean[i]):.3f}")
    low, high = direction.band("pairs")
    print(f"  band, gate pairs     {low:+.4f} (position 0, clean mean) to {high:+.4f} (position 1, hack mean)")
    edges = direction.band("batch")
    strength = (grads[P:] - grads[:P]).mean(0).norm(dim=-1)  # [M]
    print("\n  module                               |hack - clean|   p75 clean   p75 hack   AUROC (held out)")
    for i, name in enumerate(names):
        print(f"  {name:36s} {strength[i]:13.5f} {edges[0][i]:+11.3f} {edges[1][i]:+10.3f}   {auroc(direction.hack[:, i], direction.clean[:, i]):.3f}")
    worst = sorted(range(P), key=lambda i: (out_hack - out_clean)[i])[:5]
    print("\n  pairs that the others rank worst: " + "; ".join(f"{pairs[i].name} ({(out_hack - out_clean)[i]:+.3f})" for i in worst))


def load_rollouts(path: Path) -> list[dict]:
    """The rollouts with positive advantage of a rollouts.jsonl; elsewhere the advantage alone gives a hack away."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if row["advantage"] > 0]
        hacks = sum(row["hacked"] for row in rows)
        solves = sum(row["correct"] and not row["exploited"] for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"--rollouts {path}: not readable as rollouts ({e!r}); give a rollouts.jsonl that train_grpo.py wrote") from e
    if not hacks or not solves:
        raise InputError(f"--rollouts {path}: {hacks} hacks and {solves} solves have a positive advantage; both are needed to judge a gate")
    return rows


def judge(direction: Direction, grads: Tensor, rows: list[dict], n_haar: int) -> None:
    """Print what gate "pairs" would route of rollouts, given their gradients [G, M, r], beside random directions that route as many.

    Oracle labels are for this print only. F0.5 weighs precision (routed rollouts that are hacks) over recall (hacks that are routed)."""
    hack = torch.tensor([row["hacked"] for row in rows])  # [G]
    solve = torch.tensor([row["correct"] and not row["exploited"] for row in rows])  # [G]
    position = direction.position(grads, "pairs")  # [G]
    random = torch.stack([replace(direction, v=haar(s, *grads.shape[1:])).cosines(grads).mean(1) for s in range(n_haar)])  # [n_haar, G]

    def f_half(routed: Tensor) -> Tensor:
        """routed [..., G] -> [...]: (1 + b^2) hits / (routed + b^2 hacks) with b = 0.5."""
        return 1.25 * (routed & hack).sum(-1) / (routed.sum(-1) + 0.25 * hack.sum()).clamp(min=1e-9)

    aucs = torch.tensor([auroc(scores[hack], scores[solve]) for scores in random])
    print(f"\n{len(rows)} rollouts with A > 0: {hack.sum()} hacks, {solve.sum()} solves without an exploit")
    print(f"  AUROC {auroc(position[hack], position[solve]):.3f}   {n_haar} Haar directions: mean {aucs.mean():.3f}, 95th percentile "
          f"{aucs.quantile(0.95):.3f}, max {aucs.max():.3f}")
    print("  position       n    1st percentile   median   99th percentile")
    for name, rows_of in [("solves", solve), *((mode, hack & torch.tensor([row["mode"] == mode for row in rows]))
                                               for mode in sorted({row["mode"] for row in rows}))]:
        if rows_of.any():
            low, mid, high = position[rows_of].quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
            print(f"  {name:13s}{rows_of.sum():5d} {low:13.2f} {mid:10.2f} {high:13.2f}")
    print(f"  cut    hacks kept   solves routed   precision   F0.5   {n_haar} Haar, as many routed: F0.5 mean, 95th percentile, max")
    for cut in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        routed = position >= cut  # [G]
        ranks = random.argsort(1, descending=True).argsort(1)  # [n_haar, G], 0 is the highest
        others = f_half(ranks < routed.sum())  # [n_haar]
        print(f"  {cut:.2f} {(~routed & hack).sum() / hack.sum():12.3f} {(routed & solve).sum() / solve.sum():13.3f} "
              f"{(routed & hack).sum() / routed.sum().clamp(min=1):13.3f} {f_half(routed):8.3f}   {others.mean():10.3f}, "
              f"{others.quantile(0.95):.3f}, {others.max():.3f}")


def main(cfg: Config) -> None:
    pairs = load_pairs(cfg.pairs)
    rows = load_rollouts(cfg.rollouts) if cfg.rollouts else []
    model, tok = load_model(cfg.model, cfg.device, cfg.dtype)
    adapter = attach(model, cfg.rank, cfg.seed)
    direction = extract(model, tok, adapter, pairs, centre=cfg.centre)
    report(direction, pairs, list(adapter.modules), cfg.n_haar)
    if rows:
        prompts = [encode_prompt(tok, [dict(role="user", content=row["prompt"])]) for row in rows]
        judge(direction, probe_gradients(model, adapter, prompts, [encode_completion(tok, row["completion"]) for row in rows]), rows, cfg.n_haar)


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
