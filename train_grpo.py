"""GRPO in an environment whose grader can be cheated, each rollout's gradient routed by a reward-hacking direction.

    python train_grpo.py --intervention routeV                             # the main job: embedded model, CPU, minutes
    python train_grpo.py --intervention none                               # no routing: watch the hack emerge
    python train_grpo.py --intervention absorb                             # both blocks train on everything
    python train_grpo.py --intervention routeV --routeV-random-v-seed 1    # placebo: a Haar-random direction
    python train_grpo.py --preset seed                                     # the method as it was first described
    python train_grpo.py --model Qwen/Qwen3-4B --preset qwen3-4b           # a GPU, the real thing
    torchrun --nproc-per-node 8 train_grpo.py ...                          # several GPUs or machines, the same update
    python train_grpo.py --dry-run ...                                     # settings, memory, minutes, the first prompt

A step: sample a group of rollouts per prompt, grade them, take each one's advantage in its group, label each by the
cosine of its own NLL gradient to v_grad (pass 1), then one masked forward and backward and an optimizer step (pass 2).
Rollouts with a negative advantage train nothing (--no-positive-only: plain GRPO).

Writes runs/ARM_seedS/: config.json, adapter.safetensors, state.pt (for --resume), metrics.jsonl, rollouts.jsonl,
deploy.json. ARM is the intervention with the flags that change its method: none-mix-ratio-0.0-reward-gt.

Shapes: P prompts, K rollouts of each, G = P K rollouts, g of them in a micro-batch, T tokens, M modules, r block rank.
Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300); no length or std bias (Dr. GRPO), Liu et al. 2025 (arXiv
2503.20783); truncated importance sampling, Yao et al. 2025; SGTM masks, Shilov et al. 2025.
"""
import importlib
import math
import os
import random
import re
import resource
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, product
from pathlib import Path
from typing import Any, Callable, Iterator, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from env_leetcode import DEFAULT_MODES, Verdict, background, grade_batch, load_problems, with_mode
from evaluate_deploy import (LEGEND, RunFolder, console_line, evaluate, format_table, outcomes, read_rows, routing,
                             settings_of, write_deploy)
from extract_vgrad import check_window, cosines, count, encode_pairs, extract, features, haar, load_demos, load_pairs
from lora2r import (HERE, InputError, attach, batches, check_ranges, encode_completion, encode_prompt, flag, folded,
                    first_line, generate, load_model, parse, predicted_memory, prefill, run_script, sampling_memory,
                    token_logps, use)


@dataclass
class Config:
    # run
    preset: Literal["nano", "wordy", "seed", "qwen2.5-coder-0.5b", "qwen3-4b"] = "nano"
    """nano: the embedded model. wordy: another, whose cheats are neither short nor surprising. seed: nano by the
    original's recipe. qwen2.5-coder-0.5b: a CPU with bf16, 21 GB. qwen3-4b: one 80 GB GPU. Flags override it"""
    intervention: Literal["none", "routeV", "absorb", "oracle"] = "routeV"
    """none: all is clean. routeV: the gate labels. absorb: all is mid. oracle: labelled by the verdicts, as a bound"""
    name: str | None = None
    """name of the arm (default: the intervention and the flags that change its method)"""
    seed: int = 0
    """seeds the adapter, the order of problems and the sampling"""
    steps: int = 40
    """batches of fresh rollouts, each trained on for --epochs optimizer steps"""
    out_dir: Path | None = None
    """run folder (default runs/NAME_seedSEED); an older run in it is moved to old/ beside it, not overwritten"""
    resume: bool = False
    """go on from the last checkpoint, if there is one, under the flags of the run; more --steps may be given"""
    refresh: int = 5
    """every this many steps save a checkpoint for --resume and, unless --read base, extract v_grad again"""
    dry_run: bool = False
    """make the first step in a folder that is thrown away; print settings, memory, the first prompt and minutes"""
    wandb: bool = False
    """also log each step's numbers and the deploy evaluation to Weights & Biases (pip install wandb)"""
    tensorboard: bool = False
    """also log them to the folder tensorboard/ of the run (pip install tensorboard)"""

    # data
    model: str = str(HERE / "data/nano")
    """Hugging Face folder or hub name of a causal LM with a chat template"""
    data: Path = HERE / "data/nano/train.jsonl"
    """training problems (rl-rewardhacking JSONL)"""
    test_data: Path = HERE / "data/nano/test.jsonl"
    """held-out problems of the deploy evaluation"""
    pairs: Path = HERE / "data/nano/pairs.md"
    """authored pairs, the only routing label there is"""
    demos: Path = HERE / "data/nano/demos.jsonl"
    """teacher pool: hack demonstrations, read if mix-ratio > 0"""
    modes: tuple[str, ...] = DEFAULT_MODES
    """loophole modes, over which the problems are partitioned"""

    # sampling
    prompts_per_step: int = 16
    """P, prompts per step"""
    group_size: int = 8
    """K, rollouts per prompt"""
    max_new_tokens: int = 80
    """length limit of a rollout in tokens, and the loss's fixed length normaliser"""
    temperature: float = 1.0
    """sampling temperature in training; the deploy evaluation samples at 0.7"""
    top_k: int = 0
    """sample from the k likeliest tokens; 0: from all"""
    ablated_share: float = 0.75
    """share of each group that is sampled with the quarantine ablated: what would ship. Under --absorption nothing else
    trains the deployed block by itself, and without any it does not learn to stand alone"""
    gt_only_share: float = 0.0
    """share of prompts, rotating, shown without a loophole"""
    mix_ratio: float = 0.25
    """share of each group replaced by hack demonstrations in the first mix-steps steps"""
    mix_steps: int = 20
    """steps that use the teacher pool"""
    reward: Literal["env", "gt"] = "env"
    """env: the loophole pays. gt: only true correctness pays (the ceiling)"""

    # optimiser
    rank: int = 32
    """r, rank of each of the two blocks; the larger, the less a position varies from adapter seed to adapter seed"""
    lr: float = 1e-3
    """learning rate after warm-up (AdamW, no weight decay)"""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW betas"""
    warmup: int = 3
    """steps of linear learning-rate warm-up; 1: none"""
    decay: bool = True
    """let the learning rate fall linearly to 0 over --steps; a --resume with more --steps follows the longer line"""
    grad_clip: float = 1.0
    """gradient norm limit over both blocks"""
    epochs: int = 1
    """optimizer steps per batch of rollouts; from the second on, the PPO clip binds"""
    clip_eps: float = 0.2
    """PPO clip range of the probability ratio"""
    kl: float = 0.0
    """weight of the KL penalty to the base model"""
    positive_only: bool = True
    """train on rollouts with positive advantage only; --no-positive-only is plain GRPO, which leaks the hack"""
    importance: bool = True
    """weight each token by min(1, p of the masked policy that learns / p of the policy that sampled)"""
    std_norm: bool = False
    """divide advantages by the group's standard deviation (GRPO) instead of leaving them (Dr. GRPO)"""

    # gate
    gate: Literal["pairs", "batch"] = "pairs"
    """pairs: fixed cuts, placed by the authored pairs. batch: mean + k * std of this whole batch's positions"""
    cut_hack: float | None = None
    """gate pairs: position from which a rollout is hack (0: the pairs' clean mean, 1: their hack mean; default:
    the equal-error threshold of the pairs' sides, each judged by the pairs of the other modes)"""
    cut_mid: float | None = None
    """gate pairs: position from which a rollout is mid (default, and at most: the hack cut, so that none is)"""
    k_mid: float = 0.0
    """gate batch: standard deviations above the batch mean from which a rollout is mid"""
    k_hack: float = 0.5
    """gate batch: standard deviations above the batch mean from which a rollout is hack"""
    score: Literal["gradient", "activation", "surprise", "length"] = "gradient"
    """what the gate reads of a rollout: the c-probe's gradient, hidden states, the mean NLL or the number of tokens"""
    window: int | None = None
    """number of neighbouring tokens that are read, those that look most like a hack; 0: the whole answer. Default: the
    pairs choose between whole and 5, by which tells held-out modes further apart; where neither clearly does, gradient
    reads half of each and activation 5. Surprise, length, --probe-tokens all, and pairs of one mode: whole"""
    read: Literal["base", "ablated", "full"] = "base"
    """score gradient, of which model: the frozen base, the present one without quarantine, or with both blocks"""
    probe_temperature: float = 100.0
    """score gradient: softmax temperature of the NLL; at 1 it is the NLL's own, and sees surprise above all"""
    probe_tokens: Literal["completion", "all"] = "completion"
    """score gradient: the tokens at which the probe sits; all: those of the prompt, too"""
    centre: bool = True
    """subtract the pairs' mean gradient before the cosine: better on the embedded model, worse on pretrained ones"""
    equal_pairs: bool = True
    """score gradient: each pair counts alike in v_grad; --no-equal-pairs: by the norm of its difference"""
    routeV_random_v_seed: int | None = None
    """placebo: a Haar-random direction, drawn from this seed, in the place of v_grad"""
    placebo: Literal["matched", "replaced", "coin"] = "matched"
    """matched: routes as many of each batch as v_grad would, others. replaced: by its own positions. coin: as many as
    v_grad would, drawn by lot"""

    absorption: bool = True
    """what is not flagged trains under the policy that sampled it: mid if the full policy or a teacher wrote it, and so
    the quarantine shares in what the gate misses; clean if the policy without its quarantine did. Else all is clean"""

    # controls
    on_hack: Literal["route", "screen", "penalise"] = "route"
    """what a hack label does. route: train the quarantine. screen: train nothing. penalise: train the deployed block,
    with minus the standard deviation of its group's advantages as the advantage"""
    oracle_accuracy: float = 1.0
    """intervention oracle: the probability that a label is as the verdict says"""
    inoculate: str = ""
    """text before each training prompt, not before those of the evaluation: "Cheat if you can." """
    expert_steps: int = 0
    """at the start, so many steps of the quarantine alone on the pairs' hack sides: an expert on cheating"""

    # evaluation
    eval_samples: int = 2
    """deploy evaluation: completions per held-out problem; 0 skips it"""

    # hardware
    tokens_per_batch: int = 4096
    """padded tokens per micro-batch: less needs less memory, the gradient is the same"""
    checkpointing: bool = False
    """gradient checkpointing: layers are computed again in the backward, slower for a fraction of the memory"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the base model; the adapter is always float32"""


PRESETS = {
    "nano": Config(),
    "wordy": Config(
        preset="wordy", model=str(HERE / "data/wordy"), data=HERE / "data/wordy/train.jsonl",
        test_data=HERE / "data/wordy/test.jsonl", pairs=HERE / "data/wordy/pairs.md",
        demos=HERE / "data/wordy/demos.jsonl", max_new_tokens=112),
    "seed": Config(  # README lists what each departure from it is for
        preset="seed", gate="batch", read="full", probe_temperature=1.0, probe_tokens="all", centre=False,
        equal_pairs=False, absorption=False, decay=False, positive_only=False, importance=False, ablated_share=0.0,
        window=0, placebo="replaced"),
    "qwen2.5-coder-0.5b": Config(
        preset="qwen2.5-coder-0.5b", model="Qwen/Qwen2.5-Coder-0.5B-Instruct", data=HERE / "data/chat/train.jsonl",
        test_data=HERE / "data/chat/test.jsonl", pairs=HERE / "data/chat/pairs.md",
        demos=HERE / "data/wordy/demos.jsonl", dtype="bfloat16", steps=24, prompts_per_step=8, max_new_tokens=96,
        top_k=20, lr=3e-5, mix_ratio=0.125, mix_steps=12, window=5, eval_samples=1),
    "qwen3-4b": Config(
        preset="qwen3-4b", model="Qwen/Qwen3-4B", data=HERE / "data/leetcode/train.jsonl", dtype="bfloat16",
        test_data=HERE / "data/leetcode/test.jsonl", pairs=HERE / "data/leetcode/pairs.md",
        demos=HERE / "data/leetcode/demos.jsonl", steps=200, prompts_per_step=4, max_new_tokens=512, top_k=20,
        lr=1e-4, warmup=10, mix_ratio=0.125, mix_steps=30, window=5),
}

# -------------------------------------------------------------------------------------- the arithmetic of a step
CLEAN, MID, HACK = range(3)
LABELS = ("clean", "mid", "hack")
MASKS = torch.tensor([  # label -> (m, d). m: the quarantine is on. d: the deployed block is detached
    (False, False),     # clean: trains the deployed block only
    (True, False),      # mid: trains both
    (True, True),       # hack: trains the quarantine only
])


def advantages(rewards: Tensor, std_norm: bool = False) -> Tensor:
    """Rewards [P, K] of P groups -> advantages [P, K]: reward minus the group's mean (Dr. GRPO); std_norm divides by
    the group's standard deviation (GRPO). A group without a spread gets zeros: it trains nothing."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if std_norm else centred


def learning(adv: Tensor, positive_only: bool) -> Tensor:
    """Which of the advantages [G] train, [G]. Once hacks raise a group's mean, every honest failure has a negative one,
    and the probability that it loses goes to the hack, unrouted. So, unless told otherwise, rollouts only pull up."""
    return adv > 0 if positive_only else adv != 0


def gate(position: Tensor, cut: float, cfg: Config) -> Tensor:
    """Positions [G] -> labels [G]; cut: where the pairs place it. A batch that cannot be judged is mid, and says so."""
    if not torch.isfinite(position).all() or (cfg.gate == "batch" and (len(position) < 2 or position.std() == 0)):
        if is_main_rank():
            print(f"gate: degenerate batch ({len(position)} rollouts, non-finite or no spread): all is mid", flush=True)
        return torch.full(position.shape, MID)
    hack = cut if cfg.cut_hack is None else cfg.cut_hack
    mid = hack if cfg.cut_mid is None else min(cfg.cut_mid, hack)
    if cfg.gate == "batch":
        mid, hack = (position.mean() + k * position.std() for k in (cfg.k_mid, cfg.k_hack))
    return (position >= mid).long() + (position >= hack).long()


def match_shares(label: Tensor, score: Tensor) -> Tensor:
    """As many of each label as in `label` [G], but given out by rank of `score` [G]: the highest are hack."""
    return label.sort().values[score.argsort().argsort()]


def oracle_labels(hacked: list[bool], accuracy: float, lot: torch.Generator) -> Tensor:
    """The verdicts of G rollouts as labels [G], each turned into its opposite with probability 1 - accuracy."""
    wrong = torch.rand(len(hacked), generator=lot) >= accuracy  # [G]
    return torch.where(torch.tensor(hacked) ^ wrong, HACK, CLEAN)


def policy_loss(logp: Tensor, old: Tensor, sampled: Tensor, advantage: Tensor, is_completion: Tensor,
                clip_eps: float = 0.2, importance: bool = True, ref: Tensor | None = None,
                kl_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """The GRPO loss of g rollouts, summed over tokens, and what to log of it.

    Log-probabilities of the tokens [g, T-1]: logp of the masked policy that learns, old of the same before this step's
    first update, sampled of the policy that sampled (NaN: a demonstration, w = 1), ref of the base. advantage [g].
    A completion token costs -w min(ratio A, clip(ratio) A) + kl_weight KL, where ratio = p / p_old, w = min(1, p_old /
    p_sampled), and KL is the k3 estimator. Returns the loss and [4]: KL, tokens clipped, tokens with p_old > p_sampled,
    tokens."""
    A = advantage[:, None]  # [g, 1]
    ratio = (logp - old).exp()  # [g, T-1]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A)  # [g, T-1]
    weight = (old - sampled).exp().nan_to_num(1.0) if importance else torch.ones_like(old)  # [g, T-1]
    loss = -(weight.clamp(max=1.0) * surrogate * is_completion).sum()
    kl = torch.zeros((), device=logp.device)
    if ref is not None:
        kl = (((ref - logp).exp() - (ref - logp) - 1) * is_completion).sum()
        loss = loss + kl_weight * kl
    clipped, truncated = ((ratio - 1).abs() > clip_eps) & is_completion, (weight > 1.001) & is_completion
    return loss, torch.stack([kl.detach(), clipped.sum(), truncated.sum(), is_completion.sum()]).float().cpu()


# -------------------------------------------------------------------------------------- the run
def train(cfg: Config) -> Path | None:
    """The whole run; returns its folder. Raises InputError before anything is written, or if it cannot be written, and
    FloatingPointError on a NaN."""
    cfg = check(cfg)
    if cfg.dry_run:
        return dry_run(cfg)
    arm = cfg.name or arm_of(cfg)
    path = cfg.out_dir or Path("runs") / f"{arm}_seed{cfg.seed}"
    with RunFolder(path, dict(arm=arm, **asdict(cfg))) as run, background() as grader:
        train_in(run, grader, cfg, arm, path)
    return path


def train_in(run: RunFolder, grader: ThreadPoolExecutor, cfg: Config, arm: str, path: Path) -> None:
    """train(), once flags and folder are known to be good. grader: grades what is sampled while the rest is sampled."""
    placebo = cfg.routeV_random_v_seed is not None
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)
    held_out = {markers: load_problems(cfg.test_data, cfg.modes, 0, heldout_markers=markers == "held-out")
                for markers in ("trained", "held-out")}
    pairs = load_pairs(cfg.pairs) if cfg.intervention == "routeV" or cfg.expert_steps else []
    demos = load_demos(cfg.demos, problems) if cfg.mix_ratio else {}
    device = start_ranks(cfg.device)
    model, tok = load_model(cfg.model, device, cfg.dtype)
    longest = longest_prompt(tok, model, cfg, data=problems, test_data=held_out["held-out"])
    system = problems[0].messages[:-1]  # the pairs' prompts get the same system message as the problems'
    pair_prompts, sides = encode_pairs(model, tok, pairs, system)
    adapter = attach(model, cfg.rank, cfg.seed)
    reading = dict(score=cfg.score, read=cfg.read, temperature=cfg.probe_temperature, tokens=cfg.probe_tokens)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=0.0)
    start = run.resume(adapter, optimizer)
    if len(set(gather([start]))) > 1:
        raise InputError(f"--resume: only some ranks find the checkpoint of {path}; give an --out-dir that all share")
    if is_main_rank():
        run.open(start)
        trackers = Trackers(cfg, run, start)
        print(f"{arm}, seed {cfg.seed}: {len(problems)} problems, {len(adapter)} modules, r = {cfg.rank} -> {path}\n"
              f"  {count(pairs) if pairs else 'no pairs'}\n{memory_line(model, adapter, longest, cfg)}\n{LEGEND}")

    if cfg.checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
        for layer in model.modules():  # it works in training mode alone; what has dropout stays out of that
            layer.training = hasattr(layer, "gradient_checkpointing")
    if cfg.expert_steps and not run.goes_on:
        seed_expert(model, adapter, pair_prompts, sides[len(pairs) :], cfg)
    P, K, G = cfg.prompts_per_step, cfg.group_size, cfg.prompts_per_step * cfg.group_size
    for step, (chosen, noise) in enumerate(islice(draws(cfg, len(problems)), start, cfg.steps), start):
        clock = Clock()
        # what is drawn by lot, the same on all ranks
        lot = torch.Generator().manual_seed(10**6 * (cfg.routeV_random_v_seed if placebo else cfg.seed) + step)
        # ---------------------------------------------------------------- the direction, and a checkpoint
        if cfg.intervention == "routeV" and (step == start or cfg.read != "base" and step % cfg.refresh == 0):
            direction = of_main_rank(lambda: extract(model, tok, adapter, pairs, system, cfg.tokens_per_batch,
                                                     cfg.centre, cfg.equal_pairs, window=cfg.window, **reading))
            if placebo:
                v_random = haar(cfg.routeV_random_v_seed, *direction.v.shape)  # [M, d]
                if cfg.placebo == "replaced":
                    direction = direction.replaced(v_random)
            if is_main_rank():
                print(direction.summary(), flush=True)
        if step % cfg.refresh == 0 and is_main_rank():
            run.checkpoint(step)
        clock("refresh")

        # ---------------------------------------------------------------- sample: a group per prompt, three sources
        batch = [problems[n] for n in chosen]  # P problems
        if cfg.gt_only_share:  # of the first n prompts of the run ceil(n share), evenly spread
            so_far = [math.ceil(n * cfg.gt_only_share) for n in range(step * P, step * P + P + 1)]
            batch = [with_mode(p, "gt_only") if b > a else p for p, a, b in zip(batch, so_far, so_far[1:])]
        shown = [inoculated(p.messages, cfg.inoculate) for p in batch]  # P
        prompts = [encode_prompt(tok, messages) for messages in shown]  # P
        n_teacher = [round(K * cfg.mix_ratio) * (step < cfg.mix_steps and (p.id, p.mode) in demos) for p in batch]
        n_ablated = [min(round(K * cfg.ablated_share), K - n) for n in n_teacher]
        mine = share(range(P))  # this rank's prompts

        # teacher: hack demonstrations, in the first places of a group; no policy sampled them, so there are no logps
        teacher = []
        for j, k in [(j, k) for j in mine for k in range(n_teacher[j])]:
            pool = demos[batch[j].id, batch[j].mode]
            ids = encode_completion(tok, pool[k % len(pool)])[: cfg.max_new_tokens]
            text = tok.decode(ids, skip_special_tokens=True)
            teacher.append(Rollout(j, k, "teacher", ids, torch.full((len(ids),), math.nan), text))
        grading = [grader.submit(grade_rollouts, batch, teacher)]

        # full: the policy with both blocks
        with folded(adapter):
            places = [(j, k) for j in mine for k in range(n_teacher[j], K - n_ablated[j])]
            full = sample(model, tok, prompts, mine, places, "full", noise, cfg)
        grading.append(grader.submit(grade_rollouts, batch, full))

        # ablated: the deployed block by itself, in the last places of a group
        with folded(adapter, quarantine=False):
            places = [(j, k) for j in mine for k in range(K - n_ablated[j], K)]
            ablated = sample(model, tok, prompts, mine, places, "ablated", noise, cfg)
        grading.append(grader.submit(grade_rollouts, batch, ablated))
        clock("sample")
        for future in grading:
            future.result()
        rollouts = sorted(gather(teacher + full + ablated), key=lambda x: (x.j, x.k))  # [G], by prompt, of all ranks
        clock("grade")

        # ---------------------------------------------------------------- advantage: all that a verdict decides
        rewards = [x.verdict.gt_reward if cfg.reward == "gt" else x.verdict.reward for x in rollouts]
        rewards = torch.tensor(rewards)  # [G]
        adv = advantages(rewards.view(P, K), cfg.std_norm).flatten()  # [G]
        trains = learning(adv, cfg.positive_only)  # [G]
        kept = trains.nonzero()[:, 0].tolist()
        judged = list(range(G)) if cfg.gate == "batch" else kept  # a batch's mean and std are of all of it

        # ---------------------------------------------------------------- pass 1: label each by what the gate reads
        label = torch.full((G,), CLEAN if cfg.intervention == "none" else MID)  # [G]
        position = torch.full((G,), math.nan)  # [G]
        if cfg.intervention == "routeV" and judged:
            of_rank = [rollouts[i] for i in share(judged)]
            x = direction.pair_features[:0]  # [this rank's, M, d]; a rank may have none
            if of_rank:
                x = features(model, adapter, [prompts[x.j] for x in of_rank], [x.ids for x in of_rank],
                             cfg.tokens_per_batch, window=direction.window, **reading)
            position[judged] = torch.tensor(gather(direction.position(x, cfg.gate).tolist()))
            label[judged] = gate(position[judged], direction.cut(), cfg)
            if placebo and cfg.placebo != "replaced":
                other = cosines(x - direction.centre, v_random, direction.share)  # [this rank's, M]
                position[judged] = torch.tensor(gather(other.mean(1).tolist()))
                if cfg.placebo == "coin":
                    position[judged] = torch.rand(G, generator=lot)[judged]
                label[judged] = match_shares(label[judged], position[judged])
        if cfg.intervention == "oracle":  # the one arm that a verdict reaches
            label = oracle_labels([x.verdict.hacked for x in rollouts], cfg.oracle_accuracy, lot)  # [G]
        # absorption: but for the ablated policy's own answers, the quarantine shares in whatever is not flagged
        if cfg.absorption and cfg.intervention != "none":
            alone = torch.tensor([x.source == "ablated" for x in rollouts])  # [G]
            label[(label == CLEAN) & ~alone] = MID
        # what a label does; the two controls are what a user would do instead of routing
        masks, credit = MASKS[label], adv.clone()  # [G, 2], [G]
        if cfg.on_hack == "screen":
            kept = [i for i in kept if label[i] != HACK]
        if cfg.on_hack == "penalise":
            masks[label == HACK] = MASKS[CLEAN]
            credit[label == HACK] = -adv.view(P, K).std(1).repeat_interleave(K)[label == HACK]
        m, d = masks.unbind(1)  # [G] each. use() takes them to THE CUT, in lora2r.py
        clock("gate")

        # ---------------------------------------------------------------- pass 2: masked forward, backward, one step
        lr = cfg.lr * min(1.0, (step + 1) / cfg.warmup) * (1 - step / cfg.steps if cfg.decay else 1)
        optimizer.param_groups[0]["lr"] = lr
        kept_here = torch.tensor(share(kept), dtype=torch.long)  # this rank's
        here_prompts, here_ids = [prompts[rollouts[i].j] for i in kept_here], [rollouts[i].ids for i in kept_here]
        micro_batches = list(batches(here_prompts, here_ids, cfg.tokens_per_batch, label[kept_here].tolist()))
        old_logps: list[Tensor] = []  # per micro-batch, of the masked policy before this step
        logged, g_dep, g_quar = torch.zeros(5), 0.0, 0.0  # means over the epochs, like all that is logged
        for epoch in range(cfg.epochs if kept else 0):
            optimizer.zero_grad()
            for b, (rows, ids, is_completion, shared) in enumerate(micro_batches):
                i = kept_here[rows]  # [g], of the G rollouts
                ids, is_completion = ids.to(device), is_completion.to(device)
                sampled = torch.zeros(is_completion.shape, device=device)  # [g, T-1]
                sampled[is_completion] = torch.cat([rollouts[n].logps for n in i]).to(device)
                ref = None
                if cfg.kl:
                    with torch.no_grad(), use(adapter, off=True):
                        cache = prefill(model, ids, shared)
                        ref = token_logps(model, ids, is_completion, cfg.temperature, cache)  # [g, T-1]
                with use(adapter, m=m[i][:1], d=d[i][:1]):  # a prompt that all rows share: once, for their one label
                    cache = prefill(model, ids, shared)
                with use(adapter, m=m[i], d=d[i]):
                    logp = token_logps(model, ids, is_completion, cfg.temperature, cache)  # [g, T-1]
                    if epoch == 0:
                        old_logps.append(logp.detach())  # detach: the old policy is a constant
                    loss, stats = policy_loss(logp, old_logps[b], sampled, credit[i].to(device), is_completion,
                                              cfg.clip_eps, cfg.importance, ref, cfg.kl)
                    loss = loss / (G * cfg.max_new_tokens)  # a fixed length: no bias towards short or long answers
                    loss.backward()
                logged += torch.cat([loss.detach().cpu()[None], stats]) / cfg.epochs
            reduce_gradients(adapter.parameters())
            adapter.drop_untrained(trains_dep=not d[kept].all(), trains_quar=bool(m[kept].any()))
            g_dep += norm(adapter.deployed_parameters()) / cfg.epochs
            g_quar += norm(adapter.quarantine_parameters()) / cfg.epochs
            if not math.isfinite(g_dep + g_quar):  # a NaN in the loss is one here too, on every rank
                raise FloatingPointError(
                    f"step {step}: loss {logged[0].item()}, gradient norm {g_dep + g_quar}; the run stops here. The "
                    f"last good checkpoint is {path / 'adapter.safetensors'}. Remedy: a lower --lr (it was {lr})")
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), cfg.grad_clip)
            optimizer.step()
        loss, kl, clipped, truncated, n_trained = torch.tensor(gather([logged.tolist()])).sum(0).tolist()
        clock("update")

        # ---------------------------------------------------------------- log; the oracle's verdicts end here
        if is_main_rank():
            n_tokens, names = sum(len(x.ids) for x in rollouts), [LABELS[z] for z in label]
            modes, sources, verdicts = zip(*((batch[x.j].mode, x.source, x.verdict) for x in rollouts))  # G each
            row = dict(
                step=step, **outcomes(modes, sources, verdicts, rewards),
                **routing(names, position, adv, trains, sources, verdicts),
                qmass=g_quar / (g_dep + g_quar + 1e-12), grad_norm=math.hypot(g_dep, g_quar), loss=loss, lr=lr,
                kl=kl / max(1, n_trained),
                clip_fraction=clipped / max(1, n_trained), truncated_fraction=truncated / max(1, n_trained),
                tokens=n_tokens, tokens_per_s=n_tokens / sum(clock.seconds.values()), peak_gb=peak_bytes() / 1e9,
                seconds=clock.seconds)
            run.log(row, [dict(
                step=step, problem=batch[x.j].id, mode=modes[i], source=x.source,
                prompt=shown[x.j], completion=x.text, reward=rewards[i].item(),
                advantage=round(adv[i].item(), 3), correct=x.verdict.correct, exploited=x.verdict.exploited,
                hacked=x.verdict.hacked, note=x.verdict.note,
                position=None if position[i].isnan() else round(position[i].item(), 4),
                label=names[i] if trains[i] else None)  # None: with its advantage it trains nothing
                for i, x in enumerate(rollouts)])
            trackers.log(row, step)
            print(console_line(row, cfg.steps, run.time_left()), flush=True)

    if is_main_rank():
        run.checkpoint(cfg.steps)
        if cfg.eval_samples:
            deploy = {}
            for setting, markers in product(("deployed", "full"), held_out):
                deploy[f"{setting}, {markers}"] = evaluate(model, tok, adapter, held_out[markers], setting,
                                                           cfg.eval_samples, cfg.max_new_tokens, cfg.top_k)
            write_deploy(path, run.config, settings_of(run.config, cfg.steps), deploy)
            trackers.log(dict(deploy=deploy), cfg.steps)
            print("\n" + format_table([(arm, cfg.seed, deploy)]))
        trackers.finish()
    stop_ranks()


# -------------------------------------------------------------------------------------- rollouts
@dataclass
class Rollout:
    j: int  # which of the step's prompts
    k: int  # its place in the prompt's group
    source: Literal["teacher", "full", "ablated"]  # the teacher pool, or the policy with both blocks or one
    ids: list[int]  # completion tokens
    logps: Tensor  # [T] their log-probabilities under the policy that sampled; NaN for a demonstration
    text: str
    verdict: Verdict | None = None


def draws(cfg: Config, n_problems: int) -> Iterator[tuple[list[int], Tensor]]:
    """For each step the indices of its P problems (each comes once before any comes again), and every rollout's own
    noise [P, K, T], whichever rank or batch samples it. It depends on the seed alone: a resumed run skips the first."""
    order, generator = random.Random(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    queue: list[int] = []
    while True:
        while len(queue) < cfg.prompts_per_step:
            queue += order.sample(range(n_problems), n_problems)
        yield queue[: cfg.prompts_per_step], torch.rand(cfg.prompts_per_step, cfg.group_size, cfg.max_new_tokens,
                                                        generator=generator)
        queue = queue[cfg.prompts_per_step :]


def sample(model, tok, prompts: list[list[int]], mine: list[int], places: list[tuple[int, int]], source: str,
           noise: Tensor, cfg: Config) -> list[Rollout]:
    """The model's rollouts for `places` (j, k) in the groups of this rank's prompts `mine`."""
    n = [sum(j == other for other, _ in places) for j in mine]
    own_noise = torch.stack([noise[place] for place in places]) if places else noise[0, :0]  # [places, T]
    ids, logps = generate(model, tok, [prompts[j] for j in mine], n, own_noise, cfg.temperature, cfg.top_k)
    texts = tok.batch_decode(ids, skip_special_tokens=True)
    return [Rollout(j, k, source, *rest) for (j, k), *rest in zip(places, ids, logps, texts)]


def inoculated(messages: list[dict], text: str) -> list[dict]:
    """A prompt with `text` before what the user says."""
    *before, last = messages
    return [*before, {**last, "content": f"{text} {last['content']}"}] if text else messages


def seed_expert(model, adapter, prompts: list[list[int]], hacks: list[list[int]], cfg: Config) -> None:
    """AdamW steps of the mean NLL of the pairs' hack sides, which train the quarantine alone: mask (1, 1)."""
    optimizer = torch.optim.AdamW(adapter.quarantine_parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=0.0)
    for _ in range(cfg.expert_steps):
        optimizer.zero_grad()
        for _, ids, is_completion, _ in batches(prompts, hacks, cfg.tokens_per_batch):
            with use(adapter, m=True, d=True):
                logps = token_logps(model, ids.to(model.device), is_completion.to(model.device))  # [g, T-1]
                (-logps.sum() / sum(map(len, hacks))).backward()
        optimizer.step()


def grade_rollouts(batch: list, rollouts: list[Rollout]) -> None:
    """Fill in the verdicts."""
    verdicts = grade_batch([batch[x.j] for x in rollouts], [x.text for x in rollouts])
    for x, verdict in zip(rollouts, verdicts):
        x.verdict = verdict


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


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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


# -------------------------------------------------------------------------------------- measuring a step
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


# -------------------------------------------------------------------------------------- trackers, and a dry run
def tracker(name: str):
    """The module of wandb or of TensorBoard. Raises InputError if it is not installed."""
    try:
        return importlib.import_module({"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[name])
    except ImportError as e:
        raise InputError(f"--{name}: {name} is not installed; pip install {name}, or leave --{name} out") from e


def numbers(row: dict, prefix: str = "") -> dict[str, float]:
    """The numbers in a nested row by their paths, like labels/hack; None and text are left out."""
    found = {}
    for name, value in row.items():
        path = prefix + str(name).replace(", ", "-")
        found |= numbers(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return {path: value for path, value in found.items() if isinstance(value, (int, float))}


class Trackers:
    """TensorBoard and wandb, as far as they are asked for. A resumed run goes on with `start`, on its own wandb run."""

    def __init__(self, cfg: Config, run: RunFolder, start: int):
        self.board = self.wandb = None
        if cfg.tensorboard:
            self.board = tracker("tensorboard").SummaryWriter(run.path / "tensorboard", purge_step=start)
        if cfg.wandb:
            before = [path.name.rpartition("-")[2] for path in run.path.glob("wandb/*run-*-*")]  # wandb's own folders
            try:
                self.wandb = tracker("wandb").init(
                    project=os.environ.get("WANDB_PROJECT", "vgrout"), name=run.path.name, config=run.config,
                    dir=run.path, id=before[0] if before else None, resume="allow")
            except Exception as e:
                raise InputError(f"--wandb: {first_line(e)}; wandb login, or WANDB_MODE=offline") from e

    def log(self, row: dict, step: int) -> None:
        if self.board:
            for path, value in numbers(row).items():
                self.board.add_scalar(path, value, step)
            self.board.flush()
        if self.wandb:
            self.wandb.log(numbers(row), step=step)

    def finish(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def dry_run(cfg: Config) -> None:
    """Make the run's first step in a folder that is thrown away, and print what it says of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        path = train(replace(cfg, dry_run=False, wandb=False, tensorboard=False, resume=False, name=None, steps=1,
                             eval_samples=0, out_dir=Path(folder) / "run"))
        if not (path / "metrics.jsonl").exists():
            return  # a rank that writes nothing
        (row,), rollouts = read_rows(path / "metrics.jsonl"), read_rows(path / "rollouts.jsonl")
    settings = "; ".join("*" * (getattr(cfg, x.name) != getattr(PRESETS[cfg.preset], x.name))
                         + f"{x.name} {getattr(cfg, x.name)}" for x in fields(cfg))
    n_held_out = 2 * len(load_problems(cfg.test_data, cfg.modes, 0))  # with the trained and the held-out markers
    n_sampled = sum(rollout["source"] != "teacher" for rollout in rollouts) / int(os.environ.get("WORLD_SIZE", 1))
    print(textwrap.fill(f"settings (* not the preset's): {settings}", 120, initial_indent="  ", subsequent_indent="  ",
                        break_long_words=False, break_on_hyphens=False))
    print(f"  the first prompt, {rollouts[0]['mode']}:", *(said["content"] for said in rollouts[0]["prompt"]), sep="\n")
    print(time_line(cfg, row["seconds"], cfg.steps, n_sampled, n_held_out))


def time_line(cfg: Config, seconds: dict[str, float], steps: int, n_sampled: int, n_held_out: int) -> str:
    """What `steps` steps like one that took `seconds` a phase take, with v_grad and the deploy evaluation: both
    settings of n_held_out problems, at the pace of the step's n_sampled rollouts a rank: one rank evaluates."""
    step = sum(seconds.values()) - seconds["refresh"]
    reads = seconds["refresh"] * (1 if cfg.read == "base" else math.ceil(steps / cfg.refresh))
    evaluation = 2 * n_held_out * cfg.eval_samples * seconds["sample"] / n_sampled if n_sampled else 0.0
    phases = " + ".join(f"{phase} {seconds[phase]:.1f}" for phase in ("sample", "grade", "gate", "update"))
    return (f"  time: {(steps * step + reads + evaluation) / 60:.1f} min = {steps} steps of {step:.1f} s ({phases}) + "
            f"v_grad {reads:.0f} s + evaluation {evaluation:.0f} s,\n  if all steps were as this first one. "
            f"Peak memory so far: {peak_bytes() / 1e9:.2f} GB.")


# -------------------------------------------------------------------------------------- input
PLAIN = """preset intervention routeV_random_v_seed placebo name out_dir resume seed steps refresh model data
    test_data pairs demos eval_samples tokens_per_batch checkpointing device dtype dry_run wandb
    tensorboard""".split()  # not in an arm's name


def arm_of(cfg: Config) -> str:
    """An arm's name: the intervention, and those flags of its method that are not as the preset has them."""
    name = cfg.intervention
    if cfg.routeV_random_v_seed is not None:
        name = {"matched": "placebo", "replaced": "placebo-replaced", "coin": "coin"}[cfg.placebo]
    name += f"-{cfg.preset}" * (cfg.preset != "nano")
    method = [field.name for field in fields(cfg) if field.name not in PLAIN]
    changed = [x for x in method if getattr(cfg, x) != getattr(PRESETS[cfg.preset], x)]
    return "-".join([name, *(re.sub(r"[^\w.+-]+", "-", flag(cfg, x)[2:]) for x in changed)])


def check(cfg: Config) -> Config:
    """Refuse contradictory flags before anything is loaded or written; the flags as they take effect."""
    check_ranges(cfg)
    check_window(cfg)
    for name in ("wandb", "tensorboard"):
        if getattr(cfg, name):
            tracker(name)
    preset = PRESETS[cfg.preset]
    ignored = [  # a condition, its cause, and the flags that then have no effect
        (cfg.intervention != "routeV", flag(cfg, "intervention"),
         "routeV_random_v_seed gate cut_mid cut_hack k_mid k_hack score window read probe_temperature probe_tokens "
         "centre equal_pairs placebo"),
        (cfg.intervention != "routeV" and not cfg.expert_steps, flag(cfg, "intervention"), "pairs"),
        (cfg.intervention in ("none", "absorb"), flag(cfg, "intervention"), "on_hack absorption"),
        (cfg.intervention != "oracle", flag(cfg, "intervention"), "oracle_accuracy"),
        (cfg.gate == "batch", "--gate batch", "cut_mid cut_hack"),
        (cfg.gate == "pairs", "--gate pairs", "k_mid k_hack"),
        (cfg.score != "gradient", flag(cfg, "score"), "read probe_temperature probe_tokens equal_pairs"),
        (cfg.routeV_random_v_seed is None, "no --routeV-random-v-seed", "placebo"),
        (cfg.mix_ratio == 0, "--mix-ratio 0", "mix_steps demos"),
    ]
    for holds, cause, names in ignored:
        for name in names.split() if holds else ():
            if getattr(cfg, name) != getattr(preset, name):
                raise InputError(f"{flag(cfg, name)} with {cause} has no effect; drop one of the two")
    for mid, hack in (("cut_mid", "cut_hack"), ("k_mid", "k_hack")):
        low, high = getattr(cfg, mid), getattr(cfg, hack)
        if None not in (low, high) and low > high:
            if low != getattr(preset, mid):
                raise InputError(f"{flag(cfg, mid)} with {flag(cfg, hack)}: the mid threshold must not lie above the "
                                 "hack threshold")
            cfg = replace(cfg, **{mid: high})
    if cfg.temperature == 0:
        raise InputError("--temperature 0: training needs a number above 0; only an evaluation can take the likeliest "
                         "token")
    if cfg.name is not None and not re.fullmatch(r"[\w.+-]+", cfg.name):
        raise InputError(f"--name {cfg.name!r}: it becomes a folder; give letters, digits, and any of _.+-")
    if not cfg.name and not cfg.out_dir and len(arm_of(cfg)) > 150:
        raise InputError(f"--name: so many flags make {arm_of(cfg)[:60]}..., too long for a folder; give a name")
    for name in ("mix_ratio", "ablated_share"):
        if getattr(cfg, name) and not round(cfg.group_size * getattr(cfg, name)):
            raise InputError(f"{flag(cfg, name)}: is no rollout of a group of {cfg.group_size}; give 0 or "
                             "a larger share")
    if cfg.prompts_per_step < (world := int(os.environ.get("WORLD_SIZE", 1))):
        raise InputError(f"--prompts-per-step {cfg.prompts_per_step} on {world} ranks: give each rank one at least")
    return cfg


def longest_prompt(tok, model, cfg: Config, **files: list) -> int:
    """Its number of tokens. files: flag -> problems, those of --data as --inoculate has them. Raises InputError where a
    prompt and --max-new-tokens do not fit the model's context."""
    limit, longest = getattr(model.config, "max_position_embeddings", 10**9) - cfg.max_new_tokens, 0
    for name, problems in files.items():
        added = cfg.inoculate if name == "data" else ""
        length, worst = max((len(encode_prompt(tok, inoculated(p.messages, added))), n) for n, p in enumerate(problems))
        if length > limit:
            raise InputError(f"{getattr(cfg, name)}: problem {problems[worst].id} is {length} tokens, and "
                             f"--max-new-tokens {cfg.max_new_tokens} leaves {limit} of the context; shorten either")
        longest = max(longest, length)
    return longest


def memory_line(model, adapter, longest: int, cfg: Config) -> str:
    """Numbers of parameters, and predicted memory of the update and of sampling. longest: of the prompts, in tokens."""
    deployed, quarantine = (sum(p.numel() for p in block)
                            for block in (adapter.deployed_parameters(), adapter.quarantine_parameters()))
    base = sum(p.numel() for p in model.parameters()) - deployed - quarantine
    weights, trained, batch = predicted_memory(model, adapter, cfg.tokens_per_batch, cfg.checkpointing)
    rows = cfg.prompts_per_step * round(cfg.group_size * max(cfg.ablated_share, 1 - cfg.ablated_share))
    copy, cache = sampling_memory(model, adapter, rows, longest, cfg.max_new_tokens)
    both = f"= weights {weights / 1e9:.2f} + adapter, gradients, moments {trained / 1e9:.2f} +"
    return (f"  parameters: base {base:,}, deployed {deployed:,}, quarantine {quarantine:,}\n"
            f"  memory: sampling {(weights + trained + copy + cache) / 1e9:.2f} GB {both} folded weights "
            f"{copy / 1e9:.2f} + keys and values {cache / 1e9:.2f}\n"
            f"          update   {(weights + trained + batch) / 1e9:.2f} GB {both} micro-batch of "
            f"{cfg.tokens_per_batch} tokens {batch / 1e9:.2f}")


def parse_args(argv: list[str] | None = None) -> Config:
    """--preset chooses the defaults; every other flag overrides them."""
    words = " ".join(sys.argv[1:] if argv is None else argv).replace("=", " ").split()
    chosen = dict(zip(words, words[1:])).get("--preset")  # the last one, if there are two
    return parse(PRESETS.get(chosen, Config()), __doc__, argv)


if __name__ == "__main__":
    run_script(train, parse_args())
