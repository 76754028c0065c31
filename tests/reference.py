"""The training step once more, as naively as it can be written, for test_train.py to compare a run with.

One rollout at a time, in float64, by the literal formulas: y = W x + B (A x) - B0 (A0 x), a loss token by token, AdamW
written out. Nothing of the scripts' own arithmetic is used, only files, problems and the grader.

Shapes: T tokens of one completion, M modules, r block rank, as in the scripts.
"""
import math
import statistics
from dataclasses import replace
from itertools import islice, product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

import train_grpo
from env_leetcode import load_problems, with_mode
from extract_vgrad import haar, load_pairs
from lora2r import load_model
from train_grpo import RunFolder

BLOCKS = ("deployed", "quarantine")


# ---------------------------------------------------------------- a run, with what it does not write
def record(cfg: train_grpo.Config, clip: float = 1.0, thirds: bool = False) -> SimpleNamespace:
    """train(cfg) with, per step, its rollouts, the adapter before it, its clipped gradients and the gate's cuts.

    clip: GRAD_CLIP. thirds: each step's cuts lie between its positions, so that there are rollouts of each label,
    whatever the embedded model is. cfg.refresh has to be 1: a checkpoint before every step."""
    run = SimpleNamespace(cfg=cfg, clip=clip, rollouts=[], before=[], grads=[], cuts=[])
    gather, gate, checkpoint = train_grpo.gather, train_grpo.gate, RunFolder.checkpoint

    def gather_and_keep(xs):
        if xs and isinstance(xs[0], train_grpo.Rollout):
            run.rollouts.append(sorted(xs, key=lambda x: (x.j, x.k)))
        return gather(xs)

    def gate_by_thirds(position, cut, cfg):
        cfg = replace(cfg, cuts=between(position.tolist())) if thirds else cfg
        run.cuts.append(cfg.cuts)
        return gate(position, cut, cfg)

    def checkpoint_and_keep(folder, step):
        tensors = folder.adapter.tensors("dA", "dB")
        if run.before:  # they stay until the next step's backward
            run.grads.append({name: None if t.grad is None else t.grad.double() for name, t in tensors.items()})
        run.before.append({name: t.detach().double() for name, t in tensors.items()})
        checkpoint(folder, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_grpo, "gather", gather_and_keep)
        patch.setattr(train_grpo, "gate", gate_by_thirds)
        patch.setattr(train_grpo, "GRAD_CLIP", clip)
        patch.setattr(RunFolder, "checkpoint", checkpoint_and_keep)
        run.path = train_grpo.train(cfg)
    run.saved = load_file(run.path / "adapter.safetensors")
    return run


def between(position):
    """The cuts in the widest gap of the second quarter of three positions or more, and in that of the third quarter."""
    x, n = sorted(position), len(position)
    quarters = [range(max(1, n // 4), n // 2 + 1), range(n // 2 + 1, 3 * n // 4 + 1)] if n > 2 else []
    places = [max(quarter, key=lambda i: x[i] - x[i - 1]) for quarter in quarters]
    return tuple((x[i] + x[i - 1]) / 2 for i in places) or None


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
    """The base model with an adapter of one run. parameters: A and B of each block, by the names of dA and dB."""

    def __init__(self, run: SimpleNamespace):
        self.model, self.tok = load_model(run.cfg.model)
        self.model.double()
        self.model.get_input_embeddings().weight.requires_grad_(True)  # so that every layer's output has a gradient
        self.init, self.layers = {key: run.saved[f"{key[:-2]}{key[-1]}0"].double() for key in run.before[0]}, {}
        for name in [key.removesuffix(".deployed.dA") for key in run.before[0] if key.endswith(".deployed.dA")]:
            A0, B0 = ({b: self.init[f"{name}.{b}.d{key}"] for b in BLOCKS} for key in "AB")
            parent, _, child = name.rpartition(".")
            self.layers[name] = Literal(getattr(self.model.get_submodule(parent), child).weight.detach(), A0, B0)
            setattr(self.model.get_submodule(parent), child, self.layers[name])

    def fill(self, tensors):
        """Take the adapter's dA and dB, by the names that they have on disk."""
        self.parameters = {key: (self.init[key] + t).detach().requires_grad_() for key, t in tensors.items()}
        for name, layer in self.layers.items():
            layer.A, layer.B = ({b: self.parameters[f"{name}.{b}.d{key}"] for b in BLOCKS} for key in "AB")

    def logits(self, prompt, ids, m=True, d=False, off=False):
        """Token ids -> the logits from which each of `ids` was drawn, [T, V]."""
        for layer in self.layers.values():
            layer.m, layer.d, layer.off = m and not off, d, off
        return self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]

    def logps(self, prompt, ids, temperature=1.0, **mask):
        return torch.log_softmax(self.logits(prompt, ids, **mask) / temperature, -1)[range(len(ids)), ids]  # [T]

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
        n, size = len(ids), min(len(ids), cfg.window)
        starts = range(n - size + 1) if size else ()
        return torch.stack([at_token.sum(0), *(n * at_token[i : i + size].mean(0) for i in starts)])


# ---------------------------------------------------------------- the labels of a step
def prompts_of(cfg, model, step):
    """The step's P problems as its rollouts saw them, their token ids, and the noise [P, K, T]."""
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)
    chosen, noise = next(islice(train_grpo.draws(cfg, len(problems)), step, None))
    batch = [problems[n] for n in chosen]
    if cfg.gt_only_share == 0.25:  # the first of every four prompts
        batch = [with_mode(p, "gt_only") if (step * len(batch) + j) % 4 == 0 else p for j, p in enumerate(batch)]
    return batch, [encode(model.tok, p.messages) for p in batch], noise


def encode(tok, messages):
    return tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def suspect(read, v):
    """Of the whole and its windows, [1 + W, M, r], the cosines [M] to v: those of the window whose mean is highest, if
    there are windows, else the whole's."""
    whole, *windows = (cosine_similarity(x, v, dim=-1) for x in read)
    return max(windows, key=torch.mean) if windows else whole


def direction(cfg, clean, hack):
    """Of the pairs' sides, a list of [M, r] each: the sum of their differences, each of length 1 if pairs are equal."""
    return normalize(sum(normalize(y - x, dim=-1) if cfg.equal_pairs else y - x for x, y in zip(clean, hack)), dim=-1)


def held_out(cfg, groups, windows, mean):
    """(clean cosine, hack cosine) of each pair to the direction of the pairs of other groups, [M] each."""
    clean, hack = ([x[0] for x in side] for side in windows)
    found = []
    for p, own in enumerate(groups):
        others = [q for q, group in enumerate(groups) if group != own]
        v = direction(cfg, [clean[q] for q in others], [hack[q] for q in others])
        found.append([suspect(side[p] - mean, v) for side in windows])
    return found


def positions(cfg, model, probes):
    """Probe gradients of rollouts, G of [1 + W, M, r] -> G positions, G scores for a placebo's ranks, the cut."""
    pairs, windows = load_pairs(cfg.pairs), ([], [])  # of the clean and of the hack sides, [1 + W, M, r] for each
    for pair, n in product(pairs, (0, 1)):
        prompt = encode(model.tok, [dict(role="user", content=pair.prompt)])
        ids = model.tok((pair.clean, pair.hack)[n])["input_ids"] + [model.tok.eos_token_id]
        # extraction never sees the quarantine
        windows[n].append(model.probe(prompt, ids, cfg, "ablated" if cfg.read == "full" else cfg.read))
    clean, hack = (torch.stack([x[0] for x in side]) for side in windows)  # [pairs, M, r] each
    mean = torch.cat([clean, hack]).mean(0) if cfg.centre else torch.zeros_like(clean[0])
    v, scores, cut = direction(cfg, clean, hack), None, None
    if cfg.routeV_random_v_seed is not None:
        random = haar(cfg.routeV_random_v_seed, *v.shape).double()
        scores = [suspect(g - mean, random).mean().item() for g in probes]
        v = random if cfg.placebo == "replaced" else v
    if cfg.gate == "batch":
        assert len(clean) == 5, "of five numbers the 75th percentile is the second largest"
        sides = (cosine_similarity(side - mean, v, dim=-1) for side in (clean, hack))  # [5, M] each
        low, high = (side.sort(0).values[3] for side in sides)  # [M] each
        usable = [k for k in range(len(v)) if high[k] > low[k]]
        placed = [(suspect(g - mean, v) - low) / (high - low) for g in probes]  # [M] each
        return [x[usable].mean().item() for x in placed], scores, cut
    one_by_one = held_out(cfg, range(len(clean)), windows, mean)
    low, high = (statistics.mean(x.mean().item() for x in side) for side in zip(*one_by_one))
    if cfg.cuts is None:  # as many standard deviations from the one as from the other, of modes that no pair shows
        sides = zip(*held_out(cfg, [pair.mode for pair in pairs], windows, mean))
        a, b = ([(x.mean().item() - low) / (high - low) for x in side] for side in sides)
        of_a = statistics.stdev(a) / (statistics.stdev(a) + statistics.stdev(b))
        cut = statistics.mean(a) + (statistics.mean(b) - statistics.mean(a)) * of_a
    return [(suspect(g - mean, v).mean().item() - low) / (high - low) for g in probes], scores, cut


def label_names(cfg, position, scores, cuts):
    """Positions of the rollouts that the gate judges -> "clean", "mid" or "hack" for each."""
    mid, hack = cuts
    if cfg.gate == "batch":
        mid, hack = (statistics.mean(position) + k * statistics.stdev(position) for k in cuts)
    nearest = min(abs(x - cut) for x in position for cut in (mid, hack))
    assert nearest > 1e-3, f"a position lies {nearest} from a cut, where rounding decides: choose another seed"
    names = ["hack" if x >= hack else "mid" if x >= mid else "clean" for x in position]
    if scores is None or cfg.placebo == "replaced":
        return names
    order = sorted(range(len(names)), key=lambda i: scores[i])  # the lowest first
    given = sorted(names, key=["clean", "mid", "hack"].index)
    return [given[order.index(i)] for i in range(len(names))]


def advantages_of(rewards, K, std_norm, dropped=()):
    """G rewards in groups of K -> G advantages. Dropped rollouts count in no mean and have the advantage 0."""
    out = []
    for i, reward in enumerate(rewards):
        group = [rewards[n] for n in range(i - i % K, i - i % K + K) if n not in dropped]
        trains = i not in dropped and len(group) > 1
        out.append(reward - statistics.mean(group) if trains else 0.0)
        out[-1] /= statistics.stdev(group) + 1e-4 if std_norm and trains else 1.0
    return out


def labelled(run, model, step):
    """(G advantages, {rollout that trains: label of its mask}, the flagged, {judged rollout: position})."""
    cfg, rollouts, K = run.cfg, run.rollouts[step], run.cfg.group_size
    rewards = [x.verdict.reward for x in rollouts]

    def learning():
        return [i for i, a in enumerate(adv) if (a > 0 if cfg.positive_only else a != 0)]

    adv = advantages_of(rewards, K, cfg.std_norm)
    judged = learning() if cfg.gate == "pairs" and cfg.on_hack == "route" else range(len(rollouts))
    model.fill(run.before[step])
    probes = [model.probe(rollouts[i].prompt, rollouts[i].ids, cfg, cfg.read) for i in judged]
    position, scores, cut = positions(cfg, model, probes)
    cuts = run.cuts[step] or ((0, 0.5) if cfg.gate == "batch" else (cut, cut))
    names = dict(zip(judged, label_names(cfg, position, scores, cuts)))
    flagged = [i for i in names if names[i] == "hack"]
    for i in names:
        if cfg.absorption and names[i] == "clean" and rollouts[i].source != "ablated":
            names[i] = "mid"
    if cfg.on_hack == "drop":
        adv = advantages_of(rewards, K, cfg.std_norm, flagged)
    if cfg.on_hack == "penalise":  # paid for what compiles alone
        for i in flagged:
            rewards[i], names[i] = 0.5 if rollouts[i].verdict.compiles else 0.0, "clean"
        adv = advantages_of(rewards, K, cfg.std_norm)
    shown = scores if scores and cfg.placebo == "matched" else position
    return adv, {i: names[i] for i in learning()}, flagged, dict(zip(judged, shown))


# ---------------------------------------------------------------- the update of a step
def adamw(p, grad, lr, moments):
    """AdamW's step without weight decay. moments: (steps, first, second) so far -> (p, moments)."""
    t, first, second = moments[0] + 1, 0.9 * moments[1] + 0.1 * grad, 0.99 * moments[2] + 0.01 * grad**2
    return p - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-8), (t, first, second)


def update(run, model, moments, step):
    """The optimizer step from run.before[step] on, by run.labelled[step]. moments: AdamW's, by name. Returns clipped
    gradients of what trains, the adapter after them, and the numbers of the log."""
    cfg, rollouts, (adv, names, *_) = run.cfg, run.rollouts[step], run.labelled[step]
    masks = {"clean": dict(m=False, d=False), "mid": dict(m=True, d=False), "hack": dict(m=True, d=True)}
    trains = {"clean": ["deployed"], "mid": ["deployed", "quarantine"], "hack": ["quarantine"]}
    log = SimpleNamespace(truncated=0, tokens=0, loss=0.0)
    model.fill(run.before[step])
    grads = dict.fromkeys(model.parameters)
    for i, name in names.items():
        x = rollouts[i]
        logp = model.logps(x.prompt, x.ids, cfg.temperature, **masks[name])  # [T]
        ratio = [1.0] * len(x.ids) if x.source == "teacher" else (logp.detach() - x.logps).exp().tolist()
        weight = torch.tensor([min(1.0, w) if cfg.importance else 1.0 for w in ratio])  # [T]
        loss = -(weight * adv[i] * logp).sum() / (len(rollouts) * cfg.max_new_tokens)
        found = torch.autograd.grad(loss, list(model.parameters.values()), allow_unused=True)
        for (key, grad), g in zip(grads.items(), found):
            if key.split(".")[-2] in trains[name]:
                grads[key] = g if grad is None else grad + g
        log.loss += loss.item()
        log.truncated += sum(w > 1.001 for w in ratio) if cfg.importance else 0
        log.tokens += len(x.ids)
    norms = [math.sqrt(sum((g**2).sum().item() for key, g in grads.items() if g is not None and f".{block}." in key))
             for block in BLOCKS]
    log.grad_norm, log.qmass = math.hypot(*norms), norms[1] / sum(norms)
    assert log.grad_norm > run.clip, "the clip binds"
    lr = cfg.lr * (step + 1) / 3 * ((cfg.steps - step) / cfg.steps if cfg.decay else 1)  # of the first three steps
    grads, after = {key: g for key, g in grads.items() if g is not None}, dict(run.before[step])
    for key in grads:
        grads[key] = grads[key] * run.clip / log.grad_norm
        after[key], moments[key] = adamw(after[key], grads[key], lr, moments.get(key, (0, 0, 0)))
    return grads, after, log
