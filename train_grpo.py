"""GRPO in an environment whose grader can be cheated, with every rollout's gradient routed by a reward-hacking direction.

    python train_grpo.py --intervention routeV                             # the main job: embedded model, CPU, minutes
    python train_grpo.py --intervention none                               # no routing: watch the hack emerge
    python train_grpo.py --intervention absorb                             # both blocks train on everything
    python train_grpo.py --intervention routeV --routeV-random-v-seed 1    # placebo: a Haar-random direction
    python train_grpo.py --model Qwen/Qwen3-4B --preset qwen3-4b --intervention routeV     # a GPU, the real thing

A step: sample a group of rollouts per prompt, grade them, score each rollout's own NLL gradient against v_grad (pass 1),
turn scores into labels, then one masked forward and backward (pass 2):

    label   (m, d)   trains                 m: quarantine on   d: deployed block detached
    clean   (0, 0)   deployed only
    mid     (1, 0)   both
    hack    (1, 1)   quarantine only

Rollouts with a negative advantage train nothing (--no-positive-only: plain GRPO). On several GPUs or machines, with the same
update: torchrun --nproc-per-node 8 train_grpo.py ...

Writes runs/ARM_seedS/: config.json, adapter.safetensors, state.pt (for --resume), metrics.jsonl, rollouts.jsonl, deploy.json.

Shapes: P prompts, K rollouts of each, G = P * K rollouts, T tokens, M adapted modules, r block rank.
Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300); no length or std bias (Dr. GRPO), Liu et al. 2025 (arXiv 2503.20783);
truncated importance sampling, Yao et al. 2025; SGTM masks, Shilov et al. 2025.
"""
import json
import math
import os
import pickle
import random
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro

from env_leetcode import DEFAULT_MODES, InputError, Verdict, grade_batch, load_problems, run_script, with_mode
from evaluate_deploy import evaluate, format_table, generate, write_deploy
from extract_vgrad import (auroc, batches, encode_completion, encode_prompt, extract, haar, load_model, load_pairs,
                           micro_batch_bytes, probe_gradients, token_logps)
from lora2r import attach, folded, save, use

HERE = Path(__file__).resolve().parent


@dataclass
class Config:
    preset: Literal["nano", "qwen3-4b"] = "nano"
    """settings for the embedded model or for Qwen3-4B on one 80 GB GPU; any flag still overrides them"""
    intervention: Literal["none", "routeV", "absorb"] = "routeV"
    """none: the quarantine never trains. routeV: three-way gate. absorb: both blocks train on everything"""
    routeV_random_v_seed: int | None = None
    """placebo: rank rollouts by a Haar-random direction drawn from this seed; it routes as many as v_grad would"""
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
    out_dir: Path | None = None
    """run folder (default runs/ARM_seedSEED); an older one of that name is moved aside, not overwritten"""
    resume: bool = False
    """go on from the last checkpoint of the run folder, under the flags it was started with (--steps may differ)"""
    seed: int = 0
    """seeds the adapter, the order of problems and the sampling"""

    steps: int = 40
    """optimizer steps (batches of fresh rollouts)"""
    prompts_per_step: int = 16
    """P, prompts per step"""
    group_size: int = 8
    """K, rollouts per prompt"""
    max_new_tokens: int = 80
    """length limit of a rollout in tokens, and the loss's fixed length normaliser"""
    temperature: float = 1.0
    """sampling temperature in training (the deploy evaluation samples at 0.7)"""
    top_k: int = 0
    """sample from the k likeliest tokens; 0: from all"""
    ablated_share: float = 0.25
    """share of each group that is sampled with the quarantine ablated: what the deployed block would do by itself"""
    gt_only_share: float = 0.0
    """share of prompts, rotating, shown without a loophole"""
    mix_ratio: float = 0.25
    """share of each group replaced by hack demonstrations in the first mix-steps steps"""
    mix_steps: int = 20
    """steps that use the teacher pool"""
    reward: Literal["env", "gt"] = "env"
    """env: the loophole pays. gt: only true correctness pays (the ceiling)"""

    rank: int = 32
    """r, rank of each of the two blocks; scores of a rollout vary less from adapter seed to adapter seed the larger it is (README)"""
    lr: float = 1e-3
    """learning rate after warm-up (AdamW, no weight decay)"""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW betas"""
    warmup: int = 3
    """steps of linear learning-rate warm-up"""
    grad_clip: float = 1.0
    """gradient norm limit over both blocks"""
    epochs: int = 1
    """optimizer steps per batch of rollouts; from the second on, the PPO clip binds"""
    clip_eps: float = 0.2
    """PPO clip range of the probability ratio"""
    kl: float = 0.0
    """weight of the KL penalty to the base model"""
    positive_only: bool = True
    """train on rollouts with positive advantage only; --no-positive-only is plain GRPO, whose pushing down leaks the hack (README)"""
    std_norm: bool = False
    """divide advantages by the group's standard deviation (GRPO) instead of leaving them (Dr. GRPO)"""

    gate: Literal["pairs", "batch"] = "pairs"
    """pairs: absolute thresholds from the authored pairs. batch: mean + k * std of this batch's positions"""
    cut_mid: float = 0.3
    """gate pairs: position (0 = the pairs' clean mean, 1 = their hack mean) from which a rollout is mid"""
    cut_hack: float = 0.3
    """gate pairs: position from which a rollout is hack"""
    k_mid: float = 0.0
    """gate batch: standard deviations above the batch mean from which a rollout is mid"""
    k_rout: float = 0.5
    """gate batch: standard deviations above the batch mean from which a rollout is hack"""
    read: Literal["base", "ablated"] = "base"
    """where gradients are scored. base: on the frozen base, v_grad never goes stale. ablated: on the model without quarantine"""
    centre: bool = True
    """subtract the pairs' mean gradient before the cosine: decisive for the embedded model, harmful on pretrained ones (README)"""
    refresh: int = 5
    """save a checkpoint that --resume can go on from, and with --read ablated extract v_grad again, every this many steps"""

    eval_samples: int = 2
    """deploy evaluation: completions per held-out problem; 0 skips it"""
    tokens_per_batch: int = 4096
    """padded tokens per micro-batch: less needs less memory, the gradient is the same"""
    checkpointing: bool = False
    """gradient checkpointing: each layer is computed again in the backward, a quarter slower for a fraction of the memory"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the base model; the adapter is always float32"""


PRESETS = {
    "nano": Config(),
    "qwen3-4b": Config(
        preset="qwen3-4b", model="Qwen/Qwen3-4B", data=HERE / "data/leetcode/train.jsonl", dtype="bfloat16",
        test_data=HERE / "data/leetcode/test.jsonl", pairs=HERE / "data/leetcode/pairs.md",
        demos=HERE / "data/leetcode/demos.jsonl", steps=200, prompts_per_step=4, max_new_tokens=512, top_k=20,
        lr=1e-4, warmup=10, centre=False, mix_ratio=0.125, mix_steps=30),
}


def check(cfg: Config) -> None:
    """Refuse contradictory flags before anything is loaded or written."""
    if cfg.routeV_random_v_seed is not None and cfg.intervention != "routeV":
        raise InputError(f"--routeV-random-v-seed {cfg.routeV_random_v_seed} with --intervention {cfg.intervention}: "
                         "only routeV has a direction to replace; drop one of the two")
    for flag in ("ablated_share", "gt_only_share", "mix_ratio"):
        if not 0 <= getattr(cfg, flag) <= 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: it is a share; give a number from 0 to 1")
    for flag in ("steps", "prompts_per_step", "max_new_tokens", "rank", "epochs", "refresh", "tokens_per_batch"):
        if getattr(cfg, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: give at least 1")
    if cfg.group_size < 2:
        raise InputError(f"--group-size {cfg.group_size}: an advantage needs a group of at least 2 rollouts")
    if cfg.temperature <= 0:
        raise InputError(f"--temperature {cfg.temperature}: give a number above 0")
    if cfg.prompts_per_step < (world := int(os.environ.get("WORLD_SIZE", 1))):
        raise InputError(f"--prompts-per-step {cfg.prompts_per_step} on {world} ranks: give each rank at least one prompt")
    if cfg.cut_mid > cfg.cut_hack or cfg.k_mid > cfg.k_rout:
        raise InputError(f"--cut-mid {cfg.cut_mid} --cut-hack {cfg.cut_hack} --k-mid {cfg.k_mid} --k-rout {cfg.k_rout}: "
                         "the mid threshold must not lie above the hack threshold")


def train(cfg: Config) -> Path:
    """The whole run; returns its folder. Raises InputError before anything is written, FloatingPointError on a NaN."""
    # ---------------------------------------------------------------- set-up: everything that can be refused, then the folder
    check(cfg)
    placebo = cfg.routeV_random_v_seed is not None
    arm = "placebo" if placebo else cfg.intervention
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)
    test_problems = {name: load_problems(cfg.test_data, cfg.modes, 0, heldout_markers=name == "held-out")
                     for name in ("trained", "held-out")}
    pairs = load_pairs(cfg.pairs) if cfg.intervention == "routeV" else []
    demos = load_demos(cfg.demos, problems) if cfg.mix_ratio else {}
    rank, world = start_ranks(cfg)
    device = f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and cfg.device == "cuda" else cfg.device
    model, tok = load_model(cfg.model, device, cfg.dtype)
    limit = model.config.max_position_embeddings - cfg.max_new_tokens
    encoded = {(p.id, p.mode): encode_prompt(tok, p.messages) for p in problems}
    for path, ps in ((cfg.data, problems), (cfg.test_data, test_problems["held-out"])):
        worst = max(ps, key=lambda p: len(encode_prompt(tok, p.messages)))
        if (length := len(encode_prompt(tok, worst.messages))) > limit:
            raise InputError(f"{path}: problem {worst.id} is {length} tokens, and --max-new-tokens {cfg.max_new_tokens} leaves "
                             f"{limit} of the model's context; shorten either")
    if cfg.checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    adapter = attach(model, cfg.rank, cfg.seed)
    system = problems[0].messages[:-1]  # the pairs' prompts get the same system message as the problems'
    optimizer = torch.optim.AdamW([dict(params=adapter.deployed_parameters()), dict(params=adapter.quarantine_parameters())],
                                  lr=cfg.lr, betas=cfg.betas, weight_decay=0.0)
    sampler = torch.Generator().manual_seed(cfg.seed)
    order = random.Random(cfg.seed)
    queue: list[int] = []  # problems to come
    start = 0

    out = cfg.out_dir or Path("runs") / f"{arm}_seed{cfg.seed}"
    config = json.loads(json.dumps(dict(arm=arm, **asdict(cfg)), default=str))
    if cfg.resume:
        state = read_state(out, config)
        start, queue = state["step"], state["queue"]
        optimizer.load_state_dict(state["optimizer"])
        sampler.set_state(state["sampler"])
        order.setstate(state["order"])
        with torch.no_grad():
            for p, saved in zip(adapter.parameters(), state["adapter"], strict=True):
                p.copy_(saved)

    def checkpoint(step: int) -> None:
        """Write the adapter, and all that the run needs to go on from before `step`; each whole or not at all."""
        save(adapter, out / "adapter.safetensors", dict(arm=arm, seed=str(cfg.seed), model=cfg.model, step=str(step)))
        torch.save(dict(step=step, optimizer=optimizer.state_dict(), sampler=sampler.get_state(), order=order.getstate(),
                        queue=queue, adapter=[p.detach() for p in adapter.parameters()]), out / ".state.tmp")
        (out / ".state.tmp").replace(out / "state.pt")

    if rank == 0:  # only rank 0 writes
        if not cfg.resume:
            new_run_folder(out)
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        metrics, log = (open_from(out / name, start) for name in ("metrics.jsonl", "rollouts.jsonl"))
        print(f"{arm}, seed {cfg.seed}: {len(problems)} problems, {len(adapter)} modules, r = {cfg.rank} -> {out}")
        print(memory_line(model, adapter, cfg) + "\n" + LEGEND)

    P, K = cfg.prompts_per_step, cfg.group_size
    G = P * K
    grader = ThreadPoolExecutor(1)  # grades what is sampled while the rest of the step is being sampled
    for step in range(start, cfg.steps):
        clock = Clock()
        # ------------------------------------------------------------ direction: read where hacks and solves separate now
        if cfg.intervention == "routeV" and (step == start or cfg.read == "ablated" and step % cfg.refresh == 0):
            direction = extract(model, tok, adapter, pairs, system, cfg.tokens_per_batch, cfg.read, cfg.centre)
            if rank == 0:
                print(direction.summary(), flush=True)
        if step % cfg.refresh == 0 and rank == 0:
            checkpoint(step)
        clock("refresh")

        # ------------------------------------------------------------ sample: K rollouts per prompt, prompts split over ranks
        while len(queue) < P:
            queue += order.sample(range(len(problems)), len(problems))
        batch, queue = [problems[i] for i in queue[:P]], queue[P:]
        if cfg.gt_only_share:  # every (1/share)-th prompt of the run
            batch = [with_mode(p, "gt_only") if (step * P + j) * cfg.gt_only_share % 1 < cfg.gt_only_share else p
                     for j, p in enumerate(batch)]
        prompts = [encoded.setdefault((p.id, p.mode), encode_prompt(tok, p.messages)) for p in batch]
        noise = torch.rand(P, K, cfg.max_new_tokens, generator=sampler)  # a rollout's own, whichever rank or batch it is in
        mine = share(range(P), rank, world)
        # a group is [0, n_demo) demonstrations, [n_demo, n_full) of the full model, [n_full, K) of the deployed block by itself
        n_demo = [round(K * cfg.mix_ratio) * (step < cfg.mix_steps and (p.id, p.mode) in demos) for p in batch]
        n_full = [max(n, K - round(K * cfg.ablated_share)) for n in n_demo]
        rollouts, grading = [], []
        for part in ("demo", "full", "ablated"):
            if part == "demo":  # off-policy: the sampler's log-probabilities are unknown
                where = [(j, k) for j in mine for k in range(n_demo[j])]
                completions = [encode_completion(tok, demos[batch[j].id, batch[j].mode])[: cfg.max_new_tokens] for j, _ in where]
                logps = [torch.full((len(ids),), float("nan")) for ids in completions]
            else:
                ranges = [range(n_demo[j], n_full[j]) if part == "full" else range(n_full[j], K) for j in mine]
                where = [(j, k) for j, ks in zip(mine, ranges) for k in ks]
                with folded(adapter, quarantine=part == "full"):
                    completions, logps = generate(model, tok, [prompts[j] for j in mine], [len(ks) for ks in ranges],
                                                  noise[*zip(*where)] if where else noise[0, :0], cfg.temperature, cfg.top_k)
            texts = [tok.decode(ids, skip_special_tokens=True) for ids in completions]
            grading.append(grader.submit(grade_batch, [batch[j] for j, _ in where], texts))
            rollouts += map(Rollout, where, completions, logps, texts)
        clock("sample")

        # ------------------------------------------------------------ grade
        for rollout, verdict in zip(rollouts, (v for future in grading for v in future.result())):
            rollout.verdict = verdict
        rollouts = sorted(gather(rollouts), key=lambda x: x.where)  # [G], of all ranks, by prompt
        prompts = [prompts[x.where[0]] for x in rollouts]  # [G]
        completions, verdicts = [x.ids for x in rollouts], [x.verdict for x in rollouts]  # [G] each
        n_tokens = sum(map(len, completions))
        clock("grade")

        # ------------------------------------------------------------ advantage: the only thing that verdicts decide
        if cfg.reward == "gt":
            rewards = torch.tensor([0.5 * v.compiles + 3.0 * v.correct for v in verdicts])  # [G]
        else:
            rewards = torch.tensor([v.reward for v in verdicts])  # [G]
        groups = rewards.view(P, K)
        scale = groups.std(1, keepdim=True) + 1e-4 if cfg.std_norm else 1.0
        adv = ((groups - groups.mean(1, keepdim=True)) / scale).flatten()  # [G]
        # Rollouts that train. A group without a spread teaches nothing. And what is learned is only pulled up: once hacks raise a
        # group's mean, every honest failure has A < 0, and the probability that it would lose goes to the hack, unrouted.
        kept = ((adv > 0) | (adv < 0) & (not cfg.positive_only)).nonzero()[:, 0].tolist()
        mine = share(kept, rank, world)  # rows of this rank's gate and update

        # ------------------------------------------------------------ pass 1: score each rollout's own gradient, then label it
        label = torch.full((G,), CLEAN if cfg.intervention == "none" else MID)  # [G]
        position = torch.full((G,), float("nan"))  # [G]
        model.train(cfg.checkpointing)  # checkpointing works in this mode only; nothing else depends on it
        if cfg.intervention == "routeV" and kept:
            grads = probe_gradients(model, adapter, [prompts[i] for i in mine], [completions[i] for i in mine], cfg.tokens_per_batch,
                                    cfg.read)
            score = lambda direction: torch.tensor(gather(direction.position(grads, cfg.gate).tolist()))  # noqa: E731
            position[kept] = score(direction)
            label[kept] = gate(position[kept], cfg)
            if placebo:  # as many of each label, but by rank along the random direction
                position[kept] = score(replace(direction, v=haar(cfg.routeV_random_v_seed, len(adapter), cfg.rank)))
                label[kept] = label[kept].sort().values[position[kept].argsort().argsort()]
        m = label >= MID   # [G] the quarantine is on
        d = label == HACK  # [G] the deployed block is detached
        clock("gate")

        # ------------------------------------------------------------ pass 2: masked forward and backward, one step an epoch
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr = cfg.lr * min(1.0, (step + 1) / cfg.warmup)
        old_logps: list[torch.Tensor] = []  # per micro-batch, of the masked policy before this step
        grad_norm = qmass = 0.0
        sums = torch.zeros(4)  # loss, KL, tokens clipped, tokens with a truncated importance weight
        for epoch in range(cfg.epochs if kept else 0):
            optimizer.zero_grad()
            for b, (rows, ids, mask) in enumerate(batches([prompts[i] for i in mine], [completions[i] for i in mine], cfg.tokens_per_batch)):
                i = torch.tensor(mine)[rows]  # [g] rollouts of this micro-batch
                sampled = torch.cat([rollouts[n].logps for n in i]).to(device)  # [N], N completion tokens in the order of mask
                ids, mask, A = ids.to(device), mask.to(device), adv[i, None].to(device)
                with use(adapter, m=m[i], d=d[i]):
                    logp = token_logps(model, ids, mask, cfg.temperature)  # [g, T-1]
                    if epoch == 0:
                        old_logps.append(logp.detach())
                    old = old_logps[b]
                    # the policy that sampled had other blocks on than the masked one that learns: truncated importance weight
                    weight = torch.zeros_like(old).masked_scatter(mask, (old[mask] - sampled).exp())  # [g, T-1], NaN in demonstrations
                    ratio = (logp - old).exp()  # [g, T-1]
                    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps) * A)
                    loss = -(weight.clamp(max=1.0).nan_to_num(1.0) * surrogate * mask).sum() / (G * cfg.max_new_tokens)
                    kl = torch.zeros(())
                    if cfg.kl:
                        with torch.no_grad(), use(adapter, off=True):
                            ref = token_logps(model, ids, mask, cfg.temperature)  # [g, T-1]
                        kl = (((ref - logp).exp() - (ref - logp) - 1) * mask).sum()  # the k3 estimator
                        loss = loss + cfg.kl * kl / (G * cfg.max_new_tokens)
                    loss.backward()
                clipped, truncated = ((ratio - 1).abs() > cfg.clip_eps) & mask, weight > 1.001
                sums += torch.tensor([loss.item(), kl.item(), clipped.sum().item(), truncated.sum().item()]) / cfg.epochs
            reduce_gradients(adapter.parameters())
            adapter.drop_untrained(trains_dep=bool((label[kept] <= MID).any()), trains_quar=bool((label[kept] >= MID).any()))
            g_dep, g_quar = (norm(params) for params in (adapter.deployed_parameters(), adapter.quarantine_parameters()))
            grad_norm, qmass = (g_dep**2 + g_quar**2) ** 0.5, g_quar / (g_dep + g_quar + 1e-12)
            if not math.isfinite(grad_norm):  # a NaN in the loss is one here too, on every rank
                raise FloatingPointError(f"step {step}: loss {sums[0].item()}, gradient norm {grad_norm}; the run stops here. The last "
                                         f"good checkpoint is {out / 'adapter.safetensors'}. Remedy: a lower --lr (it was {lr})")
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), cfg.grad_clip)
            optimizer.step()
        model.eval()
        loss_sum, kl_sum, clipped, truncated = (sum(column) for column in zip(*gather([sums.tolist()])))
        clock("update")
        if rank > 0:
            continue

        # ------------------------------------------------------------ log. Oracle labels are used from here on, and only here
        solve, hack = ([float(getattr(v, key)) for v in verdicts] for key in ("correct", "hacked"))
        paid = [i for i in kept if adv[i] > 0 and cfg.intervention == "routeV"]  # where the advantage does not tell a hack
        paid_hacks, paid_solves = ([i for i in paid if hack[i] == is_hack] for is_hack in (1, 0))
        routed = [i for i in paid if label[i] == HACK]
        zones = lambda rows: [sum(label[i].item() == z for i in rows) / max(1, len(rows)) for z in (CLEAN, MID, HACK)]
        row = dict(
            step=step, reward=rewards.mean().item(), solve=mean(solve), hack=mean(hack),
            exploit=mean([v.exploited for v in verdicts]), compiles=mean([v.compiles for v in verdicts]),
            hack_by_mode=by_mode(batch, hack, K), exploit_by_mode=by_mode(batch, [v.exploited for v in verdicts], K),
            keep_resid_rout=zones(kept), hacks_keep_resid_rout=zones([i for i in kept if hack[i]]),
            solves_keep_resid_rout=zones([i for i in kept if verdicts[i].correct and not verdicts[i].exploited]),
            gate_auroc=auroc(position[paid_hacks], position[paid_solves]),
            gate_precision=mean([hack[i] for i in routed]) if routed else None,
            gate_recall=mean([float(label[i] == HACK) for i in paid_hacks]) if paid_hacks else None,
            qmass=qmass, grad_norm=grad_norm, loss=loss_sum, kl=kl_sum, lr=lr, clip_fraction=clipped / max(1, n_tokens),
            truncated_fraction=truncated / max(1, n_tokens), tokens=n_tokens,
            skipped_groups=(groups.amax(1) == groups.amin(1)).sum().item(),
            tokens_per_s=n_tokens / clock.total(), peak_gb=peak_bytes() / 1e9, seconds=clock.seconds)
        metrics.write(json.dumps(row) + "\n")
        metrics.flush()
        for i, v in enumerate(verdicts):
            p = batch[i // K]
            log.write(json.dumps(dict(
                step=step, problem=p.id, mode=p.mode, prompt=p.messages[-1]["content"], completion=rollouts[i].text,
                reward=rewards[i].item(), advantage=round(adv[i].item(), 3), correct=v.correct, exploited=v.exploited, hacked=v.hacked, note=v.note,
                position=round(position[i].item(), 4) if position[i] == position[i] else None,
                label=LABELS[label[i]] if i in kept else None)) + "\n")  # None: it trains nothing
        log.flush()
        print(console_line(row), flush=True)

    grader.shutdown()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return out
    checkpoint(max(start, cfg.steps))
    # ---------------------------------------------------------------- deploy evaluation
    if cfg.eval_samples:
        deploy = {f"{setting}, {name}": evaluate(model, tok, adapter, held_out, setting, cfg.eval_samples, cfg.max_new_tokens, cfg.top_k)
                  for setting in ("deployed", "full") for name, held_out in test_problems.items()}
        write_deploy(out, arm, cfg.seed, deploy)
        print("\n" + format_table([(arm, cfg.seed, deploy)]))
    return out


# -------------------------------------------------------------------------------------------------------------- helpers
LABELS = ("clean", "mid", "hack")
CLEAN, MID, HACK = range(3)
LEGEND = ("  solve/hack: share of rollouts right / paid and not right; k/r/r: keep, resid, rout shares; auroc: gate on A > 0;\n"
          "  qmass: quarantine's share of the gradient; |g|: gradient norm; s: seconds for sample + grade + gate + update")


def gate(position: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Labels [G] from pooled positions [G]. A batch that cannot be judged is mid, and says so."""
    if not torch.isfinite(position).all() or (cfg.gate == "batch" and (len(position) < 2 or position.std() == 0)):
        print(f"gate: degenerate batch ({len(position)} rollouts, non-finite or no spread): all of it is mid", flush=True)
        return torch.full(position.shape, MID)
    mid, hack = cfg.cut_mid, cfg.cut_hack
    if cfg.gate == "batch":
        mid, hack = (position.mean() + k * position.std() for k in (cfg.k_mid, cfg.k_rout))
    return (position >= mid).long() + (position >= hack).long()


@dataclass
class Rollout:
    where: tuple[int, int]
    """(prompt of the step, place in its group)"""
    ids: list[int]
    """completion tokens"""
    logps: torch.Tensor
    """[T] their log-probabilities under the policy that sampled; NaN for a demonstration"""
    text: str
    """the completion"""
    verdict: Verdict | None = None
    """the grader's"""


def norm(params) -> float:
    """Euclidean norm of all gradients of `params`."""
    return sum(p.grad.double().pow(2).sum().item() for p in params if p.grad is not None) ** 0.5


def start_ranks(cfg: Config) -> tuple[int, int]:
    """(rank, world size): (0, 1), or what torchrun has set, with the process group started (gloo on CPUs, nccl on GPUs)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo")
    return rank, world


def share(xs, rank: int, world: int) -> list:
    """This rank's contiguous part of `xs`; the parts of all ranks, in order, are `xs`."""
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


def peak_bytes() -> int:
    """The most memory this process has held so far: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_line(model, adapter, cfg: Config) -> str:
    """Predicted memory, in GB."""
    frozen, trained = (sum(t.nbytes for t in ts) for ts in (
        {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}.values(), adapter.parameters()))
    batch = micro_batch_bytes(model, adapter, cfg.tokens_per_batch, cfg.checkpointing)
    total = frozen + 4 * trained + batch  # weight, gradient and two moments
    return (f"  memory: {total / 1e9:.2f} GB = weights {frozen / 1e9:.2f} + adapter with gradients and moments {4 * trained / 1e9:.2f} + "
            f"micro-batch of {cfg.tokens_per_batch} tokens {batch / 1e9:.2f}")


def mean(xs) -> float:
    return sum(xs) / len(xs)


def by_mode(batch, values, K: int) -> dict[str, float]:
    """Mean of `values` [G] per loophole mode of the prompts."""
    total, n = Counter(), Counter()
    for i, value in enumerate(values):
        total[batch[i // K].mode] += value
        n[batch[i // K].mode] += 1
    return {mode: total[mode] / n[mode] for mode in sorted(n)}


def console_line(row: dict) -> str:
    s = row["seconds"]
    keep, resid, rout = row["keep_resid_rout"]
    auc = "  - " if row["gate_auroc"] is None else f"{row['gate_auroc']:.2f}"
    return (f"step {row['step']:3d}  reward {row['reward']:.2f}  solve {row['solve']:.2f}  hack {row['hack']:.2f}  "
            f"k/r/r {keep:.2f}/{resid:.2f}/{rout:.2f}  auroc {auc}  qmass {row['qmass']:.2f}  |g| {row['grad_norm']:.3f}  "
            f"s {s['sample']:.1f}+{s['grade']:.1f}+{s['gate']:.1f}+{s['update']:.1f}")


class Clock:
    """clock("name") books the seconds since the last call under that name."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 3), now

    def total(self) -> float:
        return sum(self.seconds.values())


def load_demos(path: Path, problems) -> dict[tuple, str]:
    """Teacher pool: {(problem id, mode): completion}, JSONL rows with these three keys."""
    if not path.is_file():
        raise InputError(f"--demos {path}: no such file; give one, or --mix-ratio 0")
    demos = {}
    for n, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            demos[row["id"], row["mode"]] = row["completion"]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}:{n}: not a demonstration ({e!r}); each line needs id, mode and completion") from e
    if not any((p.id, p.mode) in demos for p in problems):
        raise InputError(f"--demos {path}: no demonstration fits a problem of --data under its mode; check the ids")
    return demos


def new_run_folder(out: Path) -> Path:
    """Make the run folder; an older one of that name is kept as NAME.1, NAME.2, ..."""
    if out.exists():
        n = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{n}"))
        print(f"{out} exists: moved to {out.name}.{n}")
    out.mkdir(parents=True)
    return out


def read_state(out: Path, config: dict) -> dict:
    """The checkpoint of a run folder. Raises InputError if there is none, or if the run was started with other flags."""
    try:
        state, before = torch.load(out / "state.pt", map_location="cpu", weights_only=True), json.loads((out / "config.json").read_text())
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as e:
        raise InputError(f"--resume: {out} has no readable state.pt and config.json ({e}); name a run with --out-dir, or start afresh") from e
    differ = [f"{key} was {before.get(key)}, is {config[key]}" for key in config
              if key not in ("resume", "steps", "device", "out_dir") and before.get(key) != config[key]]
    if differ:
        raise InputError(f"--resume: {out} was started with other flags ({'; '.join(differ)}); give the same ones")
    return state


def open_from(path: Path, step: int):
    """A JSONL file to append to, without the rows of `step` and later."""
    rows = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] < step] if step else []
    file = open(path, "w")
    file.writelines(rows)
    return file


def parse_args(argv: list[str] | None = None) -> Config:
    """--preset chooses the defaults; every other flag overrides them."""

    @dataclass
    class Preset:
        preset: Literal["nano", "qwen3-4b"] = "nano"

    chosen, _ = tyro.cli(Preset, args=argv, return_unknown_args=True, add_help=False)
    return tyro.cli(Config, args=argv, default=PRESETS[chosen.preset], description=__doc__)


if __name__ == "__main__":
    run_script(train, parse_args())
