"""The training step once more, as naively as it can be written, for test_train.py to compare a run with.

One rollout at a time, in float64, by the literal formulas: y = W x + B (A x) - B0 (A0 x), a loss token by token, AdamW
written out. Nothing of the scripts' own arithmetic is used, only files, problems and the grader.

Shapes: T tokens of one completion, M modules, r block rank, as in the scripts.
"""
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_grpo
from env_leetcode import load_problems, with_mode
from evaluate_deploy import RunFolder
from extract_vgrad import haar, load_pairs
from lora2r import load_model

BLOCKS = ("deployed", "quarantine")


# ---------------------------------------------------------------- a run, with what it does not write
def record(cfg: train_grpo.Config) -> SimpleNamespace:
    """train(cfg) with, per step, its rollouts and the adapter before it, and per optimizer step the gradients."""
    seen = SimpleNamespace(cfg=cfg, rollouts=[], before=[], grads=[], adapter=None)
    gather, checkpoint = train_grpo.gather, RunFolder.checkpoint

    def gather_and_keep(xs):
        if xs and isinstance(xs[0], train_grpo.Rollout):
            seen.rollouts.append(sorted(xs, key=lambda x: (x.j, x.k)))
        return gather(xs)

    def checkpoint_and_keep(run, step):
        seen.adapter = run.adapter
        seen.before.append({name: t.detach().double() for name, t in run.adapter.tensors("dA", "dB").items()})
        checkpoint(run, step)

    def keep_gradients(optimizer, args, kwargs):
        if seen.adapter is None:  # not before the first checkpoint: the expert's
            return
        named = seen.adapter.tensors("dA", "dB")
        seen.grads.append({name: None if p.grad is None else p.grad.double() for name, p in named.items()})

    assert cfg.refresh == 1, "a checkpoint before every step"
    hook = register_optimizer_step_pre_hook(keep_gradients)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_grpo, "gather", gather_and_keep)
        patch.setattr(RunFolder, "checkpoint", checkpoint_and_keep)
        try:
            seen.path = train_grpo.train(cfg)
        finally:
            hook.remove()
    seen.saved = load_file(seen.path / "adapter.safetensors")
    return seen


# ---------------------------------------------------------------- a model
class Literal(nn.Module):
    """A linear layer and its adapter by the formula, for one rollout with the mask (m, d)."""

    def __init__(self, W, A0, B0):
        super().__init__()
        self.W, self.A0, self.B0 = W, A0, B0  # [d_out, d_in], block -> [r, d_in], block -> [d_out, r]

    def forward(self, x):  # [1, T, d_in]
        y = x @ self.W.T
        for block, on, cut in zip(BLOCKS, (not self.off, self.m), (self.d, False)):
            if on:
                added = (x @ self.A[block].T) @ self.B[block].T - (x @ self.A0[block].T) @ self.B0[block].T
                y = y + (added.detach() if cut else added)
        self.x, self.y = x, y
        return y


class Model:
    """The base model with an adapter of one run."""

    def __init__(self, run: SimpleNamespace):
        self.model, self.tok = load_model(run.cfg.model)
        self.model.double()
        self.model.get_input_embeddings().weight.requires_grad_(True)  # so that every layer's output has a gradient
        self.layers = {}
        for name in sorted({key.rsplit(".", 2)[0] for key in run.saved}):
            A0, B0 = ({block: run.saved[f"{name}.{block}.{key}"].double() for block in BLOCKS} for key in ("A0", "B0"))
            parent, _, child = name.rpartition(".")
            self.layers[name] = Literal(getattr(self.model.get_submodule(parent), child).weight.detach(), A0, B0)
            setattr(self.model.get_submodule(parent), child, self.layers[name])

    def fill(self, tensors):
        """Take the adapter's dA and dB, by the names that they have on disk."""
        for name, layer in self.layers.items():
            layer.A = {b: (layer.A0[b] + tensors[f"{name}.{b}.dA"]).detach().requires_grad_() for b in BLOCKS}
            layer.B = {b: (layer.B0[b] + tensors[f"{name}.{b}.dB"]).detach().requires_grad_() for b in BLOCKS}

    def logits(self, prompt, ids, m=True, d=False, off=False):
        """Token ids -> the logits from which each of `ids` was drawn, [T, V]."""
        for layer in self.layers.values():
            layer.m, layer.d, layer.off = m and not off, d, off
        return self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]

    def logps(self, prompt, ids, temperature=1.0, **mask):
        logp = torch.log_softmax(self.logits(prompt, ids, **mask) / temperature, -1)  # [T, V]
        return torch.stack([row[token] for row, token in zip(logp, ids)])  # [T]

    def probe(self, prompt, ids, cfg, read):
        """Gradient of the mean NLL at the deployed block's probe: (B^T g) * (A x), summed over the tokens, then
        of each window that of the summed NLL, its mean over the window's tokens: [1 + W, M, r]."""
        mask = {"base": dict(off=True), "ablated": dict(m=False), "full": dict(m=True)}[read]
        nll = -self.logps(prompt, ids, cfg.probe_temperature, **mask).mean()
        first = len(prompt) - 1 if cfg.probe_tokens == "completion" else 0  # the last prompt token predicts ids[0]
        grads = torch.autograd.grad(nll, [layer.y for layer in self.layers.values()])  # M of [1, T, d_out]
        rows = []
        for layer, g in zip(self.layers.values(), grads):
            A, B = (layer.A0, layer.B0) if read == "base" else (layer.A, layer.B)
            rows.append(((g @ B["deployed"]) * (layer.x @ A["deployed"].T))[0, first:].detach())
        at_token = torch.stack(rows, 1)  # [T, M, r]
        n = len(ids)
        size = min(n, cfg.window)
        starts = range(n - size + 1) if size and cfg.probe_tokens == "completion" else ()
        return torch.stack([at_token.sum(0), *(n * at_token[i : i + size].mean(0) for i in starts)])

    def encode(self, messages):
        text = self.tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tok(text)["input_ids"]

    def parameters(self):
        """name -> A or B, under the names of dA and dB on disk."""
        return {f"{name}.{block}.d{key}": getattr(layer, key)[block]
                for name, layer in self.layers.items() for block in BLOCKS for key in "AB"}


# ---------------------------------------------------------------- the step
def prompts_of(run, model, step):
    """The step's P problems as its rollouts saw them, and their token ids."""
    cfg = run.cfg
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)
    stream = train_grpo.draws(cfg, len(problems))
    for _ in range(step + 1):
        chosen, noise = next(stream)
    batch = [problems[n] for n in chosen]
    if cfg.gt_only_share == 0.25:  # the first of every four prompts
        batch = [with_mode(p, "gt_only") if (step * len(batch) + j) % 4 == 0 else p for j, p in enumerate(batch)]
    return batch, [model.encode(p.messages) for p in batch], noise


def cosine(a, b):  # [..., r] -> [...]
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def suspect(read, v):
    """Of the whole and its windows, [1 + W, M, r], the cosines [M] to v: those of the window whose mean is highest, if
    there are windows, else the whole's."""
    whole, *windows = (cosine(x, v) for x in read)
    return max(windows, key=torch.mean) if windows else whole


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def direction(cfg, clean, hack):
    """Of the pairs' sides, a list of [M, r] each: the sum of their differences, each of length 1 if pairs are equal."""
    return unit(sum(unit(y - x) if cfg.equal_pairs else y - x for x, y in zip(clean, hack)))


def pair_probes(cfg, model):
    """Gradients of the clean and of the hack sides, [1 + W, M, r] for each; extraction never sees the quarantine."""
    read = "base" if cfg.read == "base" else "ablated"
    sides = {"clean": [], "hack": []}
    for pair in load_pairs(cfg.pairs):
        for side in sides:
            ids = model.tok(getattr(pair, side))["input_ids"] + [model.tok.eos_token_id]
            prompt = model.encode([dict(role="user", content=pair.prompt)])
            sides[side].append(model.probe(prompt, ids, cfg, read))
    return sides["clean"], sides["hack"]


def held_out(cfg, groups, windows, mean):
    """(clean cosine, hack cosine) of each pair to the direction of the pairs of other groups, [M] each."""
    clean, hack = ([x[0] for x in side] for side in windows)
    found = []
    for p, own in enumerate(groups):
        v = direction(cfg, *([side[q] for q, group in enumerate(groups) if group != own] for side in (clean, hack)))
        found.append([suspect(side[p] - mean, v) for side in windows])
    return found


def positions(run, model, cfg, probes):
    """Probe gradients of rollouts, G of [1 + W, M, r] -> G positions, G scores for a placebo's ranks, the cut."""
    windows = pair_probes(cfg, model)
    clean, hack = (torch.stack([x[0] for x in side]) for side in windows)  # [pairs, M, r] each
    n = len(clean)
    mean = (clean.sum(0) + hack.sum(0)) / (2 * n) if cfg.centre else torch.zeros_like(clean[0])
    v = direction(cfg, clean, hack)
    random = None
    if cfg.routeV_random_v_seed is not None:
        # placed by the file's order of modules, in which the run's direction has its rows
        names = [key.removesuffix(".deployed.dA") for key in run.before[0] if key.endswith(".deployed.dA")]
        drawn = dict(zip(names, haar(cfg.routeV_random_v_seed, *v.shape).double()))
        random = torch.stack([drawn[name] for name in model.layers])
    if random is not None and cfg.placebo == "replaced":
        v = random
    if cfg.gate == "pairs":
        one_by_one = held_out(cfg, range(n), windows, mean)
        low = sum(x.mean() for x, _ in one_by_one) / n
        high = sum(x.mean() for _, x in one_by_one) / n
        out = [(suspect(g - mean, v).mean() - low) / (high - low) for g in probes]
        modes = [pair.mode for pair in load_pairs(cfg.pairs)]  # the cut is for modes that no pair shows
        sides = held_out(cfg, modes, windows, mean) if len(set(modes)) > 1 and cfg.placebo != "replaced" else one_by_one
        placed = [[((x.mean() - low) / (high - low)).item() for x in side] for side in zip(*sides)]
        (a, b), (spread_a, spread_b) = map(statistics.mean, placed), map(statistics.stdev, placed)
        cut = a + (b - a) * spread_a / (spread_a + spread_b)  # as many standard deviations from the one as the other
    else:
        assert n == 5, "of five numbers the 75th percentile is the second largest"
        low = torch.stack([cosine(g - mean, v) for g in clean]).sort(0).values[3]  # [M]
        high = torch.stack([cosine(g - mean, v) for g in hack]).sort(0).values[3]  # [M]
        cut = None
        usable = [k for k in range(len(v)) if high[k] > low[k]]
        out = []
        for g in probes:
            placed = (suspect(g - mean, v) - low) / (high - low)  # [M]
            out.append(sum(placed[k] for k in usable) / len(usable))
    scores = None if random is None else [suspect(g - mean, random).mean().item() for g in probes]
    return [x.item() for x in out], scores, cut


def label_names(run, position, scores, cut):
    """Positions of the rollouts that the gate judges -> "clean", "mid" or "hack" for each."""
    cfg, n = run.cfg, len(position)
    hack = cut if cfg.cut_hack is None else cfg.cut_hack
    mid = hack if cfg.cut_mid is None else min(cfg.cut_mid, hack)
    if cfg.gate == "batch":
        mean = sum(position) / n
        std = math.sqrt(sum((x - mean) ** 2 for x in position) / (n - 1))
        mid, hack = mean + cfg.k_mid * std, mean + cfg.k_hack * std
    nearest = min(abs(x - cut) for x in position for cut in (mid, hack))
    assert nearest > 1e-3, f"a position lies {nearest} from a cut, where rounding decides: choose another cut"
    names = ["hack" if x >= hack else "mid" if x >= mid else "clean" for x in position]
    if scores is None or cfg.placebo == "replaced":
        return names
    ranked = sorted(range(n), key=lambda i: -scores[i])  # the highest first
    given = ["hack"] * names.count("hack") + ["mid"] * names.count("mid") + ["clean"] * names.count("clean")
    return [given[ranked.index(i)] for i in range(n)]


def advantages_of(rewards, std_norm):
    """P lists of K rewards -> G advantages."""
    out = []
    for group in rewards:
        mean = sum(group) / len(group)
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / (len(group) - 1))
        out += [(x - mean) / (std + 1e-4) if std_norm else x - mean for x in group]
    return out


def controlled(cfg, rewards, adv, names):
    """What --on-hack leaves of advantages and labels: (advantages, {rollout that trains: label of its mask})."""
    if cfg.on_hack == "screen":
        return adv, {i: name for i, name in names.items() if name != "hack"}
    if cfg.on_hack == "penalise":
        adv, K = list(adv), len(rewards[0])
        for i in (i for i in names if names[i] == "hack"):
            group = rewards[i // K]
            std = math.sqrt(sum((x - sum(group) / K) ** 2 for x in group) / (K - 1))
            adv[i] = -std / (std + 1e-4) if cfg.std_norm else -std
        names = {i: "clean" if name == "hack" else name for i, name in names.items()}
    return adv, names


class AdamW:
    """Written out, without weight decay: tensors without a gradient are skipped, with their moments."""

    def __init__(self, betas):
        self.betas, self.moments = betas, {}

    def step(self, p, name, grad, lr):
        t, first, second = self.moments.get(name, (0, 0, 0))
        t, first = t + 1, self.betas[0] * first + (1 - self.betas[0]) * grad
        second = self.betas[1] * second + (1 - self.betas[1]) * grad**2
        self.moments[name] = t, first, second
        return p - lr * (first / (1 - self.betas[0] ** t)) / ((second / (1 - self.betas[1] ** t)).sqrt() + 1e-8)


def update(run, model, optimizer, step, prompts, adv, names):
    """The optimizer step from run.before[step] on. names: label per trained rollout, {i: name}. Returns the clipped
    gradients, the adapter after them, and the numbers of the log."""
    cfg, rollouts = run.cfg, run.rollouts[step]
    masks = {"clean": dict(m=False, d=False), "mid": dict(m=True, d=False), "hack": dict(m=True, d=True)}
    log = SimpleNamespace(truncated=0, tokens=0)
    model.fill(run.before[step])
    grads = {name: torch.zeros_like(p) for name, p in model.parameters().items()}
    for i, name in names.items():
        x = rollouts[i]
        logp = model.logps(prompts[x.j], x.ids, cfg.temperature, **masks[name])  # [T]
        more = [1.0] * len(x.ids) if x.source == "teacher" else (logp.detach() - x.logps).exp().tolist()
        weight = torch.tensor([min(1.0, w) if cfg.importance else 1.0 for w in more])  # [T]
        loss = -(weight * adv[i] * logp).sum() / (len(rollouts) * cfg.max_new_tokens)
        log.truncated += sum(w > 1.001 for w in more) if cfg.importance else 0
        log.tokens += len(x.ids)
        parameters = model.parameters()
        for key, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)):
            grads[key] += 0 if g is None else g
    trained = {block for name in names.values() for block in
               {"clean": BLOCKS[:1], "mid": BLOCKS, "hack": BLOCKS[1:]}[name]}
    grads = {key: g if key.split(".")[-2] in trained else None for key, g in grads.items()}
    norms = {block: math.sqrt(sum((g**2).sum().item() for key, g in grads.items()
                                  if g is not None and f".{block}." in key)) for block in BLOCKS}
    log.grad_norm, log.qmass = math.hypot(*norms.values()), norms["quarantine"] / sum(norms.values())
    assert log.grad_norm > cfg.grad_clip, "the clip binds"
    grads = {key: None if g is None else g * cfg.grad_clip / log.grad_norm for key, g in grads.items()}
    lr = cfg.lr if step >= cfg.warmup else cfg.lr * (step + 1) / cfg.warmup
    lr = lr * (cfg.steps - step) / cfg.steps if cfg.decay else lr
    after = {key: p if grads[key] is None else optimizer.step(p, key, grads[key], lr)
             for key, p in run.before[step].items()}
    return grads, after, log
