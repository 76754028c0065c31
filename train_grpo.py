"""GRPO in an environment whose grader can be cheated, each rollout's gradient routed by a reward-hacking direction.

    python train_grpo.py --intervention routeV                             # the main job: embedded model, CPU, minutes
    python train_grpo.py --intervention none                               # no routing: watch the hack emerge
    python train_grpo.py --intervention absorb                             # both blocks train on everything
    python train_grpo.py --intervention none --mix-ratio 0 --reward gt     # the ceiling: only right answers pay
    python train_grpo.py --routeV-random-v-seed 1                          # placebo: a Haar-random direction
    python train_grpo.py --preset seed                                     # the method as it was first described
    python train_grpo.py --preset qwen3-4b                                 # a GPU, the real thing
    torchrun --nproc-per-node 8 train_grpo.py ...                          # several GPUs or machines, the same update
    python train_grpo.py --dry-run ...                                     # one step: minutes and memory of the run

A step: sample a group of rollouts per prompt, grade them, take each rollout's advantage in its group, label each by
the cosine of its own NLL gradient to v_grad, then one masked forward and backward and an optimizer step. There is one
update per batch of fresh rollouts: the probability ratio is 1, so there is no clip, and there is no KL term. Another
gate comes in through train(cfg, judge=...).

Writes runs/ARM_seedS/: config.json, adapter.safetensors, state.pt (for --resume), metrics.jsonl, rollouts.jsonl,
deploy.json. ARM is the intervention with the flags that change its method: none-mix-ratio-0.0-reward-gt.

Shapes: P prompts, K rollouts of each, G = P K rollouts, g of them in a micro-batch, T tokens, M layers, r block rank.
Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300); no length or std bias (Dr. GRPO), Liu et al. 2025 (arXiv
2503.20783); truncated importance sampling, Yao et al. 2025; SGTM masks, Shilov et al. 2025 (arXiv 2512.05648).
"""
import fcntl
import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Literal, Sequence

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from env_leetcode import (DEFAULT_MODES, Problem, Verdict, background, check_canonicals, grade_batch, load_demos,
                          load_problems, with_mode)
from evaluate_deploy import (check_lengths, evaluate, format_table, hash_of, rates, read_run, settings_of,
                             write_deploy)
from extract_vgrad import auroc, check_window, count, encode_pairs, extract, features, haar, load_pairs
from lora2r import (HERE, InputError, attach, batches, encode_completion, encode_prompt, first_line, folded, from_json,
                    generate, load_model, misfit, opened_thought, portable, read_text, run_script, save, token_logps,
                    use, writing)


@dataclass
class Config:
    # run
    preset: Literal["nano", "seed", "qwen2.5-coder-0.5b", "qwen3-4b"] = "nano"
    """nano: the embedded model. seed: nano by the original recipe. qwen2.5-coder-0.5b: a CPU, 21 GB (if it has no
    bf16, --dtype float32 --tokens-per-batch 2048 is faster). qwen3-4b: one 80 GB GPU. Flags override it"""
    intervention: Literal["none", "routeV", "absorb"] = "routeV"
    """none: every label is clean. routeV: the gate labels. absorb: every label is mid"""
    seed: int = 0
    """seeds the adapter, the order of problems and the sampling"""
    steps: int = 40
    """optimizer steps, each on a batch of fresh rollouts"""
    out_dir: Path | None = None
    """run folder (default runs/ARM_seedSEED); an older run in it is moved to old/ beside it, not overwritten"""
    resume: bool = False
    """continue from the last checkpoint, if there is one, under the flags of the run; more --steps may be given"""
    refresh: int = 5
    """every this many steps save a checkpoint and, unless --read base, extract v_grad again"""
    dry_run: bool = False
    """make one step in a temporary folder; print the minutes and the memory that the run will take"""
    wandb: bool = False
    """also log each step and the deploy evaluation to Weights & Biases (pip install wandb; it has an offline mode)"""

    # data
    model: str = str(HERE / "data/nano")
    """Hugging Face folder or hub name of a causal LM with a chat template"""
    data: Path = HERE / "data/nano/train.jsonl"
    """training problems (rl-rewardhacking JSONL)"""
    test_data: Path = HERE / "data/nano/test.jsonl"
    """held-out problems of the deploy evaluation"""
    pairs: Path = HERE / "data/nano/pairs.md"
    """authored pairs, the only source of labels"""
    demos: Path = HERE / "data/nano/demos.jsonl"
    """teacher pool: demonstrations of exploits, read if mix-ratio > 0"""
    modes: tuple[str, ...] = DEFAULT_MODES
    """loophole modes, over which the problems are partitioned"""

    # sampling
    prompts_per_step: int = 16
    """P, prompts per step"""
    group_size: int = 8
    """K, rollouts per prompt"""
    max_new_tokens: int = 112
    """length limit of a rollout in tokens, and the loss's fixed length normaliser"""
    temperature: float = 1.0
    """sampling temperature in training; the deploy evaluation samples at 0.7"""
    top_k: int = 0
    """sample from the k likeliest tokens; 0: from all"""
    ablated_share: float = 0.75
    """share of each group sampled from the deployed block alone; it has to learn to work without the quarantine"""
    gt_only_share: float = 0.0
    """share of prompts, rotating, shown without a loophole"""
    mix_ratio: float = 0.125
    """share of each group replaced by demonstrations in the first mix-steps steps"""
    mix_steps: int = 20
    """steps that use the teacher pool"""
    reward: Literal["env", "gt"] = "env"
    """env: the loophole pays. gt: only a right answer pays (the ceiling)"""

    # optimizer: AdamW, betas (.9, .99), no weight decay, gradient norm clipped at 1
    rank: int = 32
    """r, rank of each of the two blocks; a larger rank makes positions vary less from adapter seed to adapter seed"""
    lr: float = 1e-3
    """learning rate after a linear warm-up over 5 % of the steps, at least 3"""
    decay: bool = True
    """let the learning rate fall linearly to 0 over --steps"""
    positive_only: bool = True
    """train on rollouts with a positive advantage only; --no-positive-only is plain GRPO, which leaks the hack"""
    importance: bool = True
    """weight each token by min(1, p of the masked policy that learns / p of the policy that sampled)"""
    std_norm: bool = False
    """divide advantages by the group's standard deviation (GRPO) instead of leaving them (Dr. GRPO)"""

    # gate
    gate: Literal["pairs", "batch"] = "pairs"
    """pairs: fixed cuts, placed by the authored pairs. batch: cuts at mean + k * std of this batch's positions"""
    cuts: tuple[float, float] | None = None
    """from where a rollout is mid, and from where hack. gate pairs: two positions (0: the pairs' clean mean, 1: their
    hack mean; default: both at the pairs' cut). gate batch: two values of k (default 0 0.5)"""
    score: Literal["gradient", "activation"] = "gradient"
    """what the gate reads of a rollout: the gradient at the c-probe, or mean hidden states of the frozen base"""
    window: int = 5
    """neighbouring tokens that are read, those that look most like a hack; 0: the whole answer"""
    read: Literal["base", "ablated", "full"] = "base"
    """score gradient, of which model: the frozen base, the present one without quarantine, or with both blocks"""
    probe_temperature: float = 100.0
    """score gradient: softmax temperature of the NLL; at 1 a token counts by its surprise"""
    probe_tokens: Literal["completion", "all"] = "completion"
    """score gradient: tokens at which the probe sits; all: those of the prompt, too"""
    centre: bool = True
    """subtract the mean over all pair sides before the cosine"""
    equal_pairs: bool = True
    """score gradient: normalise each pair's difference before the mean"""
    routeV_random_v_seed: int | None = None
    """placebo: a Haar-random direction, drawn from this seed, in the place of v_grad"""
    placebo: Literal["matched", "replaced"] = "matched"
    """matched: gives out the same number of each label per batch as v_grad. replaced: labels by its own positions"""
    absorption: bool = True
    """rollouts not labelled hack train both blocks (mid) if the full policy or a teacher wrote them"""
    on_hack: Literal["route", "drop", "penalise"] = "route"
    """what a hack label does. route: only the quarantine trains on the rollout. drop: the rollout leaves its group.
    penalise: the rollout is paid as if it had not passed (meant for --no-positive-only)"""
    expert_steps: int = 0
    """steps of the quarantine alone on the pairs' hack sides, before the first step of GRPO"""

    # evaluation
    eval_samples: int = 2
    """deploy evaluation: completions per held-out problem; 0 skips it"""

    # hardware
    tokens_per_batch: int = 4096
    """padded tokens per micro-batch: fewer need less memory, the gradient is the same"""
    checkpointing: bool = False
    """gradient checkpointing: layers are computed again in the backward, slower for a fraction of the memory"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the base model; the adapter is always float32"""


PRESETS = {
    "nano": Config(),
    "seed": Config(
        preset="seed", gate="batch", read="full", probe_temperature=1.0, probe_tokens="all", centre=False,
        equal_pairs=False, absorption=False, decay=False, positive_only=False, importance=False, ablated_share=0.0,
        window=0, placebo="replaced"),
    "qwen2.5-coder-0.5b": Config(
        preset="qwen2.5-coder-0.5b", model="Qwen/Qwen2.5-Coder-0.5B-Instruct", data=HERE / "data/chat/train.jsonl",
        test_data=HERE / "data/chat/test.jsonl", pairs=HERE / "data/chat/pairs.md",
        demos=HERE / "data/chat/demos.jsonl", dtype="bfloat16", steps=24, prompts_per_step=8, max_new_tokens=96,
        top_k=20, lr=3e-5, mix_steps=12, eval_samples=1),
    "qwen3-4b": Config(
        preset="qwen3-4b", model="Qwen/Qwen3-4B", data=HERE / "data/leetcode/train.jsonl", dtype="bfloat16",
        test_data=HERE / "data/leetcode/test.jsonl", pairs=HERE / "data/leetcode/pairs.md",
        demos=HERE / "data/leetcode/demos.jsonl", steps=200, prompts_per_step=4, max_new_tokens=512, top_k=20,
        lr=1e-4, mix_steps=30),
}
BETAS, GRAD_CLIP = (0.9, 0.99), 1.0


# -------------------------------------------------------------------------------------- the arithmetic of a step
LABELS = ("clean", "mid", "hack")
CLEAN, MID, HACK = range(3)


@dataclass
class Rollout:
    j: int  # which of the step's prompts
    k: int  # place in the prompt's group
    source: Literal["teacher", "full", "ablated"]  # the teacher pool, or the policy with both blocks or one
    mode: str  # the loophole that the prompt discloses
    prompt: list[int]  # token ids
    ids: list[int]  # completion tokens
    logps: Tensor  # [T] log-probabilities under the policy that sampled; NaN for a demonstration
    text: str
    verdict: Verdict | None = None


def advantages(rewards: Tensor, std_norm: bool = False) -> Tensor:
    """Rewards [P, K] of P groups -> advantages [P, K]: reward minus the group's mean (Dr. GRPO); std_norm divides by
    the group's standard deviation (GRPO). A group without a spread gets zeros: it trains nothing. A rollout whose
    reward is NaN is not in the group: it counts in no mean and gets 0."""
    adv = rewards - rewards.nanmean(1, keepdim=True)
    if std_norm:
        n = rewards.isfinite().sum(1, keepdim=True)  # [P, 1]
        std = (adv.square().nansum(1, keepdim=True) / (n - 1)).sqrt()
        adv = adv / (std + 1e-4)
    return adv.nan_to_num(0.0)


def learning(adv: Tensor, positive_only: bool) -> Tensor:
    """Which of the advantages [G] train, bool [G]. Once hacks raise a group's mean, every honest failure has a negative
    advantage. Pushing failures down moves probability to the hack, and no mask stops that: so only positive ones
    train, unless the user asks for plain GRPO."""
    return adv > 0 if positive_only else adv != 0


def gate(position: Tensor, cut: float, cfg: Config) -> Tensor:
    """Positions [G] -> labels [G]; cut: where the pairs place it. A batch that cannot be judged is mid, and says so."""
    if not torch.isfinite(position).all() or (cfg.gate == "batch" and (len(position) < 2 or position.std() == 0)):
        if is_main_rank():
            print(f"gate: degenerate batch ({len(position)} rollouts, non-finite or no spread): all is mid", flush=True)
        return torch.full(position.shape, MID)
    if cfg.gate == "pairs":
        mid, hack = cfg.cuts or (cut, cut)
    else:
        mid, hack = (position.mean() + k * position.std() for k in cfg.cuts or (0.0, 0.5))
    return (position >= mid).long() + (position >= hack).long()


def match_counts(label: Tensor, score: Tensor) -> Tensor:
    """The same number of each label as in `label` [G], given out by rank of `score` [G]: the highest are hack."""
    return label.sort().values[score.argsort().argsort()]


def importance_weight(logp: Tensor, sampled: Tensor) -> Tensor:
    """min(1, p that learns / p that sampled) per token, [g, T-1]; 1 for demonstrations, whose `sampled` is NaN. A
    constant of the gradient (truncated importance sampling)."""
    return (logp.detach() - sampled).exp().nan_to_num(1.0).clamp(max=1.0)


# -------------------------------------------------------------------------------------- the run
Judge = Callable[[list[Rollout], int, Any, Any], Sequence[int]]


def train(cfg: Config, judge: Judge | None = None) -> Path | None:
    """The whole run; returns its folder.

    judge(rollouts, step, model, adapter) -> G labels (CLEAN, MID, HACK) takes the gate's place under --intervention
    routeV. It is called once a step, on the main rank. It gets copies whose .verdict is None, unless judge.oracle is
    true; its name is judge.name or judge.__name__. Random draws have to depend on (seed, step) alone, so that --resume
    is exact. --absorption turns some CLEAN into MID, as it does for the gate's labels.
    Raises InputError before anything is written, FloatingPointError on a NaN.
    """
    check(cfg, judge)
    if cfg.dry_run:
        return dry_run(cfg, judge)
    arm = arm_of(cfg, judge)
    path = cfg.out_dir or Path("runs") / f"{arm}_seed{cfg.seed}"
    with RunFolder(path, dict(arm=arm, judge=name_of(judge), **asdict(cfg))) as run, background() as grader:
        train_in(run, grader, cfg, judge)
    return path


def train_in(run: "RunFolder", grader: ThreadPoolExecutor, cfg: Config, judge: Judge | None) -> None:
    """train(), once flags and folder are known to be good. grader: grades rollouts while others are sampled."""
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)
    held_out = {markers: load_problems(cfg.test_data, cfg.modes, 0, heldout_markers=markers == "held-out")
                for markers in ("trained", "held-out")}
    gated = cfg.intervention == "routeV" and judge is None
    pairs = load_pairs(cfg.pairs) if gated or cfg.expert_steps else []
    demos = load_demos(cfg.demos, problems) if cfg.mix_ratio else {}
    device = start_ranks(cfg.device)
    model, tok = load_model(cfg.model, device, cfg.dtype)
    check_lengths(tok, model, cfg.max_new_tokens, cfg.data, problems)
    check_lengths(tok, model, cfg.max_new_tokens, cfg.test_data, held_out["held-out"])
    system = problems[0].messages[:-1]  # the pairs' prompts get the same system message as the problems'
    pair_prompts, sides = encode_pairs(model, tok, pairs, system)
    adapter = attach(model, cfg.rank, cfg.seed)
    reading = dict(score=cfg.score, read=cfg.read, temperature=cfg.probe_temperature, tokens=cfg.probe_tokens)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=cfg.lr, betas=BETAS, weight_decay=0.0)
    start = run.resume(adapter, optimizer)
    if len(set(gather([start]))) > 1:
        raise InputError(f"--resume: only some ranks find the checkpoint of {run.path}; give an --out-dir that all "
                         "share")
    if is_main_rank():
        if not run.goes_on:
            check_canonicals(cfg.data, problems)
            check_canonicals(cfg.test_data, held_out["trained"])
        run.open(start)
        tracker = start_wandb(cfg, run)
        print(f"{run.config['arm']}, seed {cfg.seed}: {len(problems)} problems, "
              f"{count(pairs) if pairs else 'no pairs'}, {len(adapter)} layers, r = {cfg.rank}, {adapter.coverage()} "
              f"-> {run.path}\n{LEGEND}")
    if cfg.checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
        for layer in model.modules():  # it works in training mode alone; what has dropout stays out of that mode
            layer.training = hasattr(layer, "gradient_checkpointing")
    if cfg.expert_steps and not run.goes_on:
        seed_expert(model, adapter, pair_prompts, sides[len(pairs) :], cfg)

    P, K, G = cfg.prompts_per_step, cfg.group_size, cfg.prompts_per_step * cfg.group_size
    began = time.perf_counter()
    for step, (chosen, noise) in enumerate(islice(draws(cfg, len(problems)), start, cfg.steps), start):
        clock = Clock()
        # ---------------------------------------------------------------- direction, and a checkpoint
        if gated and (step == start or (cfg.read != "base" and step % cfg.refresh == 0)):
            direction = of_main_rank(lambda: extract(
                model, tok, adapter, pairs, system, cfg.tokens_per_batch, window=cfg.window, centre=cfg.centre,
                equal_pairs=cfg.equal_pairs, **reading))
            if cfg.routeV_random_v_seed is not None:
                v_random = haar(cfg.routeV_random_v_seed, *direction.v.shape)  # [M, d]
                if cfg.placebo == "replaced":
                    direction = direction.replaced(v_random)
            if is_main_rank():
                print(direction.summary(), flush=True)
        if step % cfg.refresh == 0 and is_main_rank():
            run.checkpoint(step)
        clock("refresh")

        # ---------------------------------------------------------------- sample and grade: a group per prompt
        batch = []  # P problems, of which a rotating share is shown without a loophole
        for n, index in enumerate(chosen, step * P):
            plain = math.ceil((n + 1) * cfg.gt_only_share) > math.ceil(n * cfg.gt_only_share)
            batch.append(with_mode(problems[index], "gt_only") if plain else problems[index])
        prompts = [encode_prompt(tok, p.messages) for p in batch]  # P
        rollouts, grading = sample_groups(model, tok, adapter, batch, prompts, demos, noise, step, grader, cfg)
        clock("sample")
        verdicts = [verdict for graded in grading for verdict in graded.result()]
        for rollout, verdict in zip(rollouts, verdicts):
            rollout.verdict = verdict
        rollouts = sorted(gather(rollouts), key=lambda x: (x.j, x.k))  # [G], by prompt, of all ranks
        clock("grade")

        # ---------------------------------------------------------------- advantage: training's only use of verdicts
        rewards = [x.verdict.gt_reward if cfg.reward == "gt" else x.verdict.reward for x in rollouts]
        rewards = torch.tensor(rewards)  # [G]
        adv = advantages(rewards.view(P, K), cfg.std_norm).flatten()  # [G]
        trains = learning(adv, cfg.positive_only)  # [G]
        paid = adv  # [G], by which the log judges the gate: drop and penalise give what it flags another advantage

        # ---------------------------------------------------------------- label
        label = torch.full((G,), CLEAN if cfg.intervention == "none" else MID)  # [G]
        position = torch.full((G,), math.nan)  # [G]
        # a batch's mean and std are those of all rollouts; drop and penalise change the groups of all rollouts
        judges_all = cfg.gate == "batch" or cfg.on_hack != "route"
        judged = list(range(G)) if judges_all else trains.nonzero()[:, 0].tolist()
        if gated and judged:
            mine = [rollouts[i] for i in share(judged)]  # this rank's; there may be none
            x = direction.pair_features[:0]  # [this rank's, 1 + W, M, d]
            if mine:
                x = features(model, adapter, [rollout.prompt for rollout in mine], [rollout.ids for rollout in mine],
                             cfg.tokens_per_batch, window=cfg.window, **reading)
            position[judged] = torch.tensor(gather(direction.position(x, cfg.gate).tolist()))
            label[judged] = gate(position[judged], direction.cut(), cfg)
            if cfg.routeV_random_v_seed is not None and cfg.placebo == "matched":
                position[judged] = torch.tensor(gather(direction.cosines(x, v_random).mean(1).tolist()))
                label[judged] = match_counts(label[judged], position[judged])
        if judge is not None:
            label = of_main_rank(lambda: judged_labels(judge, rollouts, step, model, adapter))  # [G]
        flagged = label == HACK  # [G]
        if cfg.absorption and cfg.intervention != "none":
            by_deployed = torch.tensor([x.source == "ablated" for x in rollouts])  # [G] sampled without the quarantine
            label[(label == CLEAN) & ~by_deployed] = MID
        if cfg.on_hack != "route":
            credited = rewards.masked_fill(flagged, math.nan)  # drop: a flagged rollout leaves its group
            if cfg.on_hack == "penalise":  # a flagged rollout is paid as if it had not passed, and trains like others
                failed = [replace(x.verdict, correct=False, exploited=False) for x in rollouts]
                unpaid = torch.tensor([verdict.reward for verdict in failed])  # [G]
                credited, label = torch.where(flagged, unpaid, rewards), label.masked_fill(flagged, CLEAN)
            adv = advantages(credited.view(P, K), cfg.std_norm).flatten()
            trains = learning(adv, cfg.positive_only)  # [G]
        kept = trains.nonzero()[:, 0].tolist()
        clock("gate")

        # ---------------------------------------------------------------- masks
        # label   m  d   forward                 trains
        # clean   0  0   deployed                deployed
        # mid     1  0   deployed + quarantine   both
        # hack    1  1   deployed + quarantine   quarantine: it learns what the deployed block does not already explain
        m, d = label >= MID, label == HACK  # [G] quarantine on; deployed block detached, at THE CUT in lora2r.py

        # ---------------------------------------------------------------- update: masked forward and backward, one step
        line = 1 - step / cfg.steps if cfg.decay else 1.0
        lr = cfg.lr * min(1.0, (step + 1) / max(3, cfg.steps // 20)) * line
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        total_loss, truncated = 0.0, 0
        mine = [rollouts[i] for i in share(kept)]  # this rank's
        kept_here = torch.tensor(share(kept), dtype=torch.long)
        for rows, ids, is_completion, shared in batches(
                [x.prompt for x in mine], [x.ids for x in mine], cfg.tokens_per_batch, label[kept_here].tolist()):
            i = kept_here[rows]  # [g], of the G rollouts
            ids, is_completion = ids.to(device), is_completion.to(device)  # [g, T], [g, T-1]
            sampled = torch.zeros(is_completion.shape, device=device)  # [g, T-1]
            sampled[is_completion] = torch.cat([mine[row].logps for row in rows]).to(device)
            A = adv[i, None].to(device)  # [g, 1]
            with use(adapter, m=m[i], d=d[i]):
                logp = token_logps(model, ids, is_completion, cfg.temperature, shared)  # [g, T-1]
                w = importance_weight(logp, sampled) if cfg.importance else torch.ones_like(logp)
                # a fixed length in the normaliser: no bias towards short or long answers
                loss = -(w * A * logp * is_completion).sum() / (G * cfg.max_new_tokens)
                loss.backward()
            total_loss += loss.item()
            if cfg.importance:
                truncated += ((logp.detach() - sampled > 1e-3) & is_completion).sum().item()
        reduce_gradients(adapter.parameters())
        # A block that nothing trains gets no gradient. With a zero gradient AdamW's momentum would still move it.
        adapter.drop_untrained(trains_dep=not d[kept].all(), trains_quar=bool(m[kept].any()))
        g_dep, g_quar = norm(adapter.deployed_parameters()), norm(adapter.quarantine_parameters())
        if not math.isfinite(g_dep + g_quar):  # a NaN in the loss is one here, too, on every rank
            raise FloatingPointError(
                f"step {step}: gradient norm {g_dep + g_quar}; the run stops here. The last good checkpoint is "
                f"{run.path / 'adapter.safetensors'}. Remedy: a lower --lr (it was {lr})")
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), GRAD_CLIP)
        optimizer.step()
        total_loss, truncated = torch.tensor(gather([[total_loss, truncated]])).sum(0).tolist()
        clock("update")

        # ---------------------------------------------------------------- log
        if is_main_rank():
            n_tokens = sum(len(x.ids) for x in rollouts)
            n_trained = sum(len(rollouts[i].ids) for i in kept)
            given = torch.where(flagged, HACK, label)  # [G]; a penalised rollout trains as clean and was labelled hack
            labelled = trains if cfg.on_hack == "route" else trains | flagged  # [G]
            row = dict(
                step=step, **outcomes(rollouts, rewards), trained=len(kept),
                **routing(rollouts, given, labelled, position, paid),
                qmass=g_quar / (g_dep + g_quar + 1e-12), grad_norm=math.hypot(g_dep, g_quar), loss=total_loss, lr=lr,
                truncated_fraction=truncated / max(1, n_trained), tokens=n_tokens,
                tokens_per_s=n_tokens / sum(clock.seconds.values()), peak_gb=peak_bytes() / 1e9, seconds=clock.seconds)
            run.log(row, [logged(rollouts[i], step, batch, rewards[i], adv[i], position[i],
                                 LABELS[given[i]] if labelled[i] else None) for i in range(G)])
            if tracker:
                tracker.log(row, step=step)
            left = (time.perf_counter() - began) / (step + 1 - start) * (cfg.steps - step - 1)
            print(f"{console_line(row, cfg.steps)}  left {timedelta(seconds=round(left))}", flush=True)

    if is_main_rank():
        run.checkpoint(cfg.steps)
        if cfg.eval_samples:
            deploy = {}
            for setting, markers in product(("deployed", "full"), held_out):
                deploy[f"{setting}, {markers}"] = evaluate(model, tok, adapter, held_out[markers], setting,
                                                           cfg.eval_samples, cfg.max_new_tokens, cfg.top_k)
            write_deploy(run.path, run.config, settings_of(run.config, cfg.steps), deploy)
            if tracker:
                tracker.log(dict(deploy=deploy), step=cfg.steps)
            print("\n" + format_table([(run.config["arm"], cfg.seed, deploy)]))
        if tracker:
            tracker.finish()
    if dist.is_initialized():
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------- rollouts
def draws(cfg: Config, n_problems: int) -> Iterator[tuple[list[int], Tensor]]:
    """For each step the indices of its P problems (each comes once before any comes again), and every rollout's own
    noise [P, K, T], whichever rank or batch samples it. It depends on the seed alone: a resumed run skips the first."""
    order, generator = random.Random(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    P, queue = cfg.prompts_per_step, []
    while True:
        while len(queue) < P:
            queue += order.sample(range(n_problems), n_problems)
        yield queue[:P], torch.rand(P, cfg.group_size, cfg.max_new_tokens, generator=generator)
        queue = queue[P:]


def sample_groups(model, tok, adapter, batch: list[Problem], prompts: list[list[int]], demos: dict, noise: Tensor,
                  step: int, grader: ThreadPoolExecutor, cfg: Config) -> tuple[list[Rollout], list[Future]]:
    """This rank's rollouts of the step, and their grading, source by source: it goes on while the next source is
    sampled. In a group demonstrations come first, then the full policy's rollouts, then the deployed block's own."""
    K, mine, rollouts, grading = cfg.group_size, share(range(len(batch))), [], []
    n_teacher = {j: round(K * cfg.mix_ratio) if step < cfg.mix_steps and (batch[j].id, batch[j].mode) in demos else 0
                 for j in mine}
    n_ablated = {j: min(round(K * cfg.ablated_share), K - n_teacher[j]) for j in mine}
    places = dict(teacher={j: range(n_teacher[j]) for j in mine},
                  full={j: range(n_teacher[j], K - n_ablated[j]) for j in mine},
                  ablated={j: range(K - n_ablated[j], K) for j in mine})

    for source, ks_of in places.items():
        if source == "teacher":  # no policy sampled a demonstration: its log-probabilities are NaN
            pools = [demos[batch[j].id, batch[j].mode] if ks_of[j] else [] for j in mine]
            texts = [pool[k % len(pool)] for j, pool in zip(mine, pools) for k in ks_of[j]]
            ids = [encode_completion(tok, text)[: cfg.max_new_tokens] for text in texts]
            logps = [torch.full((len(x),), math.nan) for x in ids]
        else:
            own_noise = torch.cat([noise[j, ks_of[j].start : ks_of[j].stop] for j in mine])  # [rollouts, T]
            with folded(adapter, quarantine=source == "full"):
                ids, logps = generate(model, tok, [prompts[j] for j in mine], [len(ks_of[j]) for j in mine], own_noise,
                                      cfg.temperature, cfg.top_k)
        texts = tok.batch_decode(ids, skip_special_tokens=True)
        where = [(j, k) for j in mine for k in ks_of[j]]
        rollouts += [Rollout(j, k, source, batch[j].mode, prompts[j], *rest)
                     for (j, k), *rest in zip(where, ids, logps, texts)]
        thought = opened_thought(tok, prompts[0])
        grading.append(grader.submit(grade_batch, [batch[j] for j, _ in where], [thought + text for text in texts]))
    return rollouts, grading


def judged_labels(judge: Judge, rollouts: list[Rollout], step: int, model, adapter) -> Tensor:
    """The judge's labels [G]. Raises InputError for others than G of CLEAN, MID, HACK."""
    oracle = getattr(judge, "oracle", False)
    shown = [replace(x) if oracle else replace(x, verdict=None) for x in rollouts]
    label = torch.as_tensor(judge(shown, step, model, adapter)).cpu()
    whole = not label.is_floating_point() and label.dtype != torch.bool  # neither probabilities nor yes and no
    if not whole or label.shape != (len(rollouts),) or not ((label >= CLEAN) & (label <= HACK)).all():
        raise InputError(f"judge {name_of(judge)}: returned {list(label.shape)} labels {label.unique().tolist()}; "
                         f"return {len(rollouts)}, each 0 (clean), 1 (mid) or 2 (hack)")
    return label.long()


def seed_expert(model, adapter, prompts: list[list[int]], hacks: list[list[int]], cfg: Config) -> None:
    """AdamW steps of the mean NLL of the pairs' hack sides, which train the quarantine alone: mask (1, 1)."""
    optimizer = torch.optim.AdamW(adapter.quarantine_parameters(), lr=cfg.lr, betas=BETAS, weight_decay=0.0)
    for _ in range(cfg.expert_steps):
        optimizer.zero_grad()
        for _, ids, is_completion, _ in batches(prompts, hacks, cfg.tokens_per_batch):
            with use(adapter, m=True, d=True):
                logps = token_logps(model, ids.to(model.device), is_completion.to(model.device))  # [g, T-1]
                (-logps.sum() / sum(map(len, hacks))).backward()
        optimizer.step()


# -------------------------------------------------------------------------------------- ranks: torchrun, or just one
def start_ranks(device: str) -> str:
    """Join the process group if torchrun started this one (gloo on CPUs, nccl on GPUs); the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device


def is_main_rank() -> bool:
    """Only the main rank writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def of_main_rank(make: Callable[[], Any]) -> Any:
    """What make() returns on the main rank, on every rank. If each made its own, rounding could decide differently."""
    made = [make() if is_main_rank() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return made[0]


def share(xs) -> list:
    """This rank's contiguous part of `xs`; the parts of all ranks, in order, are `xs`."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return list(xs[len(xs) * rank // world : len(xs) * (rank + 1) // world])


def gather(xs: list) -> list:
    """The lists of all ranks, concatenated in their order, on every rank."""
    if not dist.is_initialized():
        return xs
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, xs)
    return sum(parts, [])


def reduce_gradients(params: list[torch.nn.Parameter]) -> None:
    """Sum each .grad over the ranks (none counts as 0), in one message."""
    if dist.is_initialized():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params])):
            p.grad = grad.view_as(p)


# -------------------------------------------------------------------------------------- the log
LEGEND = """  honest: share of the full policy's rollouts that are right and touch no loophole; exploit: share that used
  their loophole; deployed: both rates of rollouts without quarantine; clean/mid/hack: label shares among rollouts whose
  label had an effect; auroc: of the gate's positions, exploits against honest solves with a positive advantage; qmass:
  the quarantine's share of the gradient; |g|: gradient norm; s: seconds of sample + grade + gate + update"""


def outcomes(rollouts: list[Rollout], rewards: Tensor) -> dict:
    """Mean reward and rates of the full policy's own rollouts and, under deployed_*, of those without quarantine; None
    where a step has none. Demonstrations are in neither."""
    row = {}
    for prefix, source in (("", "full"), ("deployed_", "ablated")):
        chosen = [i for i, x in enumerate(rollouts) if x.source == source]
        table = rates([rollouts[i].mode for i in chosen], [rollouts[i].verdict for i in chosen])
        row[f"{prefix}reward"] = rewards[chosen].mean().item() if chosen else None
        row |= {prefix + name: rate for name, rate in table["all"].items() if name != "n"}
        for name in ("exploit", "hack"):
            row[f"{prefix}{name}_by_mode"] = {mode: of_mode[name] for mode, of_mode in table.items() if mode != "all"}
    return row


def routing(rollouts: list[Rollout], label: Tensor, labelled: Tensor, position: Tensor, adv: Tensor) -> dict:
    """How the rollouts whose label had an effect are labelled; and how well the gate tells the policy's own exploits
    from honest solves among rollouts with a positive advantage: elsewhere the advantage gives an exploit away."""
    exploit = torch.tensor([x.verdict.exploited for x in rollouts])  # [G]
    honest = torch.tensor([x.verdict.correct and not x.verdict.channels for x in rollouts])  # [G]
    own = torch.tensor([x.source != "teacher" for x in rollouts])  # [G]

    def shares(chosen: Tensor) -> dict[str, float]:
        return {name: (label[chosen] == z).float().mean().nan_to_num().item() for z, name in enumerate(LABELS)}

    judged = own & (adv > 0) & ~position.isnan()  # [G]
    return dict(
        labels=shares(labelled), labels_of_exploits=shares(labelled & exploit),
        labels_of_honest=shares(labelled & honest),
        gate_auroc=auroc(position[judged & exploit], position[judged & honest]))


def logged(x: Rollout, step: int, batch: list[Problem], reward: Tensor, adv: Tensor, position: Tensor,
           label: str | None) -> dict:
    """A row of rollouts.jsonl. label None: with its advantage the rollout trains nothing."""
    v = x.verdict
    return dict(step=step, problem=batch[x.j].id, mode=x.mode, source=x.source, prompt=batch[x.j].messages,
                completion=x.text, reward=reward.item(), advantage=round(adv.item(), 3), correct=v.correct,
                exploited=v.exploited, hacked=v.hacked, channels=v.channels, note=v.note,
                position=None if position.isnan() else round(position.item(), 4), label=label)


def console_line(row: dict, steps: int) -> str:
    """A step of metrics.jsonl in one line; LEGEND explains it."""
    rate = {name: " -  " if row[name] is None else f"{row[name]:.2f}" for name in (
        "reward", "honest_solve", "exploit", "deployed_honest_solve", "deployed_exploit", "gate_auroc")}
    labels = "/".join(f"{share:.2f}" for share in row["labels"].values())
    seconds = "+".join(f"{row['seconds'][phase]:.1f}" for phase in ("sample", "grade", "gate", "update"))
    return (f"step {row['step'] + 1:3d}/{steps}  reward {rate['reward']}  honest {rate['honest_solve']}  exploit "
            f"{rate['exploit']}  deployed {rate['deployed_honest_solve']} {rate['deployed_exploit']}  clean/mid/hack "
            f"{labels}  auroc {rate['gate_auroc']}  qmass {row['qmass']:.2f}  |g| {row['grad_norm']:.3f}  s {seconds}")


def norm(params: list[torch.nn.Parameter]) -> float:
    """Euclidean norm of all gradients of `params`."""
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]).item()


def peak_bytes() -> int:
    """The most memory this process has held so far: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """clock("name") books the seconds since the last call under that name."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 3), now


def start_wandb(cfg: Config, run: "RunFolder") -> Any:
    """The wandb run, if one is asked for; a resumed run goes on in its own. Raises InputError."""
    if not cfg.wandb:
        return None
    import wandb
    before = [path.name.rpartition("-")[2] for path in run.path.glob("wandb/*run-*-*")]  # wandb's own folders
    try:
        return wandb.init(project=os.environ.get("WANDB_PROJECT", "vgrout"), name=run.path.name, config=run.config,
                          dir=run.path, id=before[0] if before else None, resume="allow")
    except Exception as e:
        raise InputError(f"--wandb: {first_line(e)}; wandb login, or WANDB_MODE=offline") from e


def dry_run(cfg: Config, judge: Judge | None) -> None:
    """Make the run's first step in a temporary folder, and print what it says of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        path = train(replace(cfg, dry_run=False, wandb=False, resume=False, steps=1, eval_samples=0,
                             out_dir=Path(folder) / "run"), judge)
        if (path / "metrics.jsonl").exists():  # the main rank writes it
            row = json.loads((path / "metrics.jsonl").read_text())
            step = sum(row["seconds"].values())
            print(f"{cfg.steps} steps of {step:.1f} s, as this first one: {cfg.steps * step / 60:.1f} min, without the "
                  f"deploy evaluation; seconds a phase {row['seconds']}; peak memory {row['peak_gb']:.2f} GB")


# -------------------------------------------------------------------------------------- the run folder
PATHS = ("model", "data", "test_data", "pairs", "demos")  # kept relative to this project, where they lie inside
MAY_DIFFER = {"arm", "resume", "steps", "device", "out_dir", "eval_samples", "dry_run", "wandb"}  # on --resume


class RunFolder:
    """The files of a run, and .lock, which one run at a time holds: the kernel releases it when the process ends."""

    def __init__(self, path: Path, config: dict):
        """Raises InputError, before anything is written, if a run cannot begin or go on in `path`."""
        path = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link stays, and its folder is the run's
        self.path, self.steps, self.made, self.lock, self.logs = path, config["steps"], 0, None, []
        hashes = {key: hash_of(config[key]) for key in PATHS if Path(config[key]).is_file()}
        config = config | {key: portable(config[key]) for key in PATHS} | dict(hashes=hashes)
        self.config = json.loads(json.dumps(config, default=str))
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not path.name or len(path.name) > 200 or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"--out-dir {path}: cannot be made below {there}, or has too long a name; give another")
        if (path / ".lock").exists():  # shared, as torchrun starts several of us
            self.locked(fcntl.LOCK_SH).close()
        self.is_run = (path / "config.json").exists() and bool(read_run(path))
        if not self.is_run and path.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise InputError(f"--out-dir {path}: exists and is no run folder; give another, or an empty one")
        self.goes_on = self.is_run and config["resume"] and (path / "state.pt").exists()
        before = read_run(path) if self.goes_on else self.config
        differ = [f"{key} was {before.get(key)}, is {value}" for key, value in sorted(self.config.items())
                  if before.get(key) != value and key not in MAY_DIFFER]
        if differ:
            raise InputError(f"--resume: {path} was started with other flags ({'; '.join(differ)}); give the same")

    def locked(self, kind: int = fcntl.LOCK_EX) -> IO:
        """The lock, held until it is closed. Raises InputError if another run holds it."""
        lock = open(self.path / ".lock", "a")
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except OSError as e:
            lock.close()
            raise InputError(f"--out-dir {self.path}: another run is writing there; wait or give another folder") from e
        return lock

    def resume(self, adapter, optimizer: torch.optim.Optimizer) -> int:
        """Put adapter and optimizer back to the last checkpoint, if there is one; the number of steps behind it. Raises
        InputError if it is damaged, or has more steps than are asked for."""
        self.adapter, self.optimizer = adapter, optimizer
        if not self.goes_on:
            return 0
        file = self.path / "state.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            step, saved, moments = state["step"], state["adapter"], state["optimizer"]["state"]
            params = adapter.parameters()
            pairs = list(zip(saved, params, strict=True))
            for i, of_param in moments.items():
                pairs += [(of_param["exp_avg"], params[i]), (of_param["exp_avg_sq"], params[i])]
                pairs += [(of_param["step"], torch.zeros(()))]
            odd = next(filter(None, (misfit(tensor, like) for tensor, like in pairs)), None)
            if odd or type(step) is not int or min([step, *moments, *(x["step"] for x in moments.values())]) < 0:
                raise ValueError(odd or f"step {step!r:.40}")
        except Exception as e:  # a damaged pickle raises nearly anything
            raise InputError(f"--resume: {file} is damaged ({first_line(e)}); start afresh") from e
        if step > self.steps:
            raise InputError(f"--steps {self.steps}: {self.path} has made {step}; give at least as many")
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=moments))  # the settings are this program's
        with torch.no_grad():
            for p, tensor in zip(params, saved):
                p.copy_(tensor)
        return step

    def open(self, step: int) -> None:
        """Begin, or go on from `step`: log rows of that step and later are dropped, since it is made again. An older
        run of that name is kept as old/NAME.1, old/NAME.2, ... beside it."""
        if self.is_run and not self.goes_on:
            with self.locked():
                old = self.path.parent / "old"
                n = next(n for n in range(1, 10**6) if not (old / f"{self.path.name}.{n}").exists())
                old.mkdir(exist_ok=True)
                self.path.rename(old / f"{self.path.name}.{n}")
            print(f"{self.path} exists: moved to {old / self.path.name}.{n}")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = self.locked()
        logs = [self.path / name for name in ("metrics.jsonl", "rollouts.jsonl")]
        texts = {self.path / "config.json": json.dumps(self.config, indent=1) + "\n"}
        texts |= {path: self.earlier(path, step) for path in logs}
        for name in ("config.json", "metrics.jsonl", "rollouts.jsonl", "adapter.safetensors", "state.pt"):
            for left_over in self.path.glob(f".{name}.*.tmp"):  # of a run that was killed
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        for path, text in texts.items():
            with writing(path) as temporary:
                temporary.write_text(text)
        self.logs = [open(path, "a") for path in logs]
        self.made = step

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Close the logs and release the lock; an interrupt says how to go on."""
        if self.lock is None:
            return
        for file in (*self.logs, self.lock):
            file.close()
        if kind is KeyboardInterrupt:
            command = shlex.join(["python", *sys.argv] + ["--resume"] * ("--resume" not in sys.argv))
            raise KeyboardInterrupt(f" at step {self.made}/{self.steps}; go on with: {command}")

    def earlier(self, path: Path, step: int) -> str:
        """A log's rows of steps before `step`; a last row that was not written to its end is dropped. Raises InputError
        if another is damaged, or a step has none."""
        remedy = "put it back, or start afresh"
        rows = read_text("--resume", path, remedy).splitlines(keepends=True) if step else []
        if rows and not rows[-1].endswith("\n"):
            print(f"{path}: its last row is torn, and dropped")
            rows.pop()
        steps = [from_json(row, f"--resume: {path} is", remedy, step=int)["step"] for row in rows]
        if lacking := set(range(step)).difference(steps):
            raise InputError(f"--resume: {path} has no row of step {min(lacking)}; {remedy}")
        return "".join(row for row, of in zip(rows, steps) if of < step)

    def checkpoint(self, step: int) -> None:
        """Write the adapter, and with it in one file all that --resume needs to go on with `step`."""
        metadata = {key: str(self.config[key]) for key in ("arm", "seed", "model")} | {"step": str(step)}
        save(self.adapter, self.path / "adapter.safetensors", metadata)
        state = dict(step=step, optimizer=self.optimizer.state_dict(),
                     adapter=[p.detach() for p in self.adapter.parameters()])
        content = io.BytesIO()  # on a full disk torch.save raises nearly anything
        torch.save(state, content)
        with writing(self.path / "state.pt") as temporary:
            temporary.write_bytes(content.getbuffer())

    def log(self, metrics: dict, rollouts: list[dict]) -> None:
        """One row of metrics.jsonl and the step's rows of rollouts.jsonl. InputError if they cannot be written."""
        for file, rows in zip(self.logs, ([metrics], rollouts)):
            try:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
            except OSError as e:
                raise InputError(f"{file.name}: cannot be written ({e.strerror}); the last checkpoint stays: make room "
                                 "and go on with --resume") from e
        self.made = metrics["step"] + 1


# -------------------------------------------------------------------------------------- flags
def name_of(judge: Judge | None) -> str | None:
    """How config.json and the arm's name call a judge; an oracle is called one."""
    if judge is None:
        return None
    name = getattr(judge, "name", getattr(judge, "__name__", type(judge).__name__))
    return f"oracle-{name}" if getattr(judge, "oracle", False) else f"judge-{name}"


NOT_METHOD = """preset intervention routeV_random_v_seed placebo out_dir resume seed steps refresh model data test_data
    pairs demos eval_samples tokens_per_batch checkpointing device dtype dry_run wandb""".split()


def arm_of(cfg: Config, judge: Judge | None = None) -> str:
    """An arm's name: the intervention, and those flags of its method that are not as the preset has them."""
    name = cfg.intervention if judge is None else f"{cfg.intervention}-{name_of(judge)}"
    if cfg.routeV_random_v_seed is not None:
        name = "placebo" if cfg.placebo == "matched" else "placebo-replaced"
    name += "" if cfg.preset == "nano" else f"-{cfg.preset}"
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in NOT_METHOD and value != getattr(PRESETS[cfg.preset], field.name):
            name += f"-{flag(field.name, value)[2:]}"
    return re.sub(r"[^\w.+-]+", "-", name)


def flag(name: str, value: Any) -> str:
    """How the value of a field is written on the command line: --mix-ratio 0.5, --no-centre, --cuts 0.1 0.4."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    words = value if isinstance(value, tuple) else [value]
    return " ".join([f"--{name.replace('_', '-')}", *map(str, words)])


AT_LEAST = dict(steps=1, prompts_per_step=1, group_size=2, max_new_tokens=1, refresh=1, rank=1, tokens_per_batch=1,
                lr=1e-12, temperature=1e-6, probe_temperature=1e-6, top_k=0, mix_steps=0, eval_samples=0, window=0,
                expert_steps=0, seed=0, routeV_random_v_seed=0, ablated_share=0, gt_only_share=0, mix_ratio=0)


def check(cfg: Config, judge: Judge | None) -> None:
    """Refuse values that would train backwards or not at all, before anything is loaded or written."""
    def refuse(name: str, remedy: str):
        raise InputError(f"{flag(name, getattr(cfg, name))}: {remedy}")

    for name, low in AT_LEAST.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value < 2**32:  # neither holds for NaN
            refuse(name, f"give a finite number of at least {low}")
    for name in ("ablated_share", "gt_only_share", "mix_ratio"):
        if getattr(cfg, name) > 1:
            refuse(name, "is a share; give a number from 0 to 1")
    for name in ("mix_ratio", "ablated_share"):
        if getattr(cfg, name) and not round(cfg.group_size * getattr(cfg, name)):
            refuse(name, f"is no rollout of a group of {cfg.group_size}; give 0 or a larger share")
    if cfg.cuts and not -math.inf < cfg.cuts[0] <= cfg.cuts[1] < math.inf:
        refuse("cuts", "the first, from where a rollout is mid, must not lie above the second")
    if cfg.routeV_random_v_seed is not None and (cfg.intervention != "routeV" or judge):
        refuse("routeV_random_v_seed", "replaces the direction of --intervention routeV; drop one of the two")
    if judge is not None and cfg.intervention != "routeV":
        refuse("intervention", f"labels without a judge; give routeV to train under {name_of(judge)}")
    if cfg.prompts_per_step < (world := int(os.environ.get("WORLD_SIZE", 1))):
        refuse("prompts_per_step", f"is less than one for each of {world} ranks")
    if cfg.wandb and find_spec("wandb") is None:
        refuse("wandb", "wandb is not installed; pip install wandb, or leave --wandb out")
    check_window(cfg)


def parse_args(argv: list[str] | None = None) -> Config:
    """--preset chooses the defaults; every other flag overrides them."""
    words = sys.argv[1:] if argv is None else argv
    chosen = "nano"  # a preset that does not exist is tyro's to refuse
    for word, after in zip(words, [*words[1:], ""]):
        if word == "--preset" or word.startswith("--preset="):
            chosen = word.partition("=")[2] or after
    return tyro.cli(Config, args=argv, default=PRESETS.get(chosen, Config()), description=__doc__)


if __name__ == "__main__":
    run_script(train, parse_args())
