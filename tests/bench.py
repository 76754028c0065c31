"""Where the time of a training step goes. Not a test; run it on an idle machine:

    python tests/bench.py                                                       # the embedded model
    python tests/bench.py --preset qwen3-4b --model DIR --dtype float32 --max-new-tokens 128 --group-size 4

It takes the flags of train_grpo.py, makes at most 7 steps at a time, and prints medians, one section after another:

    matmul      the machine's matmul rate in --dtype at size 2048 (a GPU's: 8192), the peak that shares are of
    sampling    tokens/s of our sampler with the adapter; of the bare model in our sampler; of the bare model in Hugging
                Face's generate, same batch; naively: one generate call per prompt through the adapter's modules
    phases      seconds of sample, grade, gate and update in train_grpo.train itself (from its metrics.jsonl). The
                update's share of the peak counts the operations of its matmuls, of base and adapter
    trl         seconds and tokens/s of whole steps, and of those of TRL's GRPOTrainer: same model, prompts, grader and
                loss, a peft LoRA of rank 2r on the same layers. Left out without `pip install trl peft datasets`
"""
import io
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from env_leetcode import grade_batch, load_problems  # noqa: E402
from lora2r import (TARGETS, attach, batches, encode_completion, encode_prompt, folded, generate,  # noqa: E402
                    load_model, run_script, token_logps, use)
from train_grpo import BETAS, GRAD_CLIP, LABELS, Config, draws, learning, parse_args, train  # noqa: E402

PHASES = ("sample", "grade", "gate", "update")


def rates_of(actions: dict, rounds: int = 5) -> dict[str, float]:
    """What each action does per second, by the number that it returns: medians over rounds. Each round has all actions,
    so that they meet the same load; a round before the first warms up."""
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            done = action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rates[name].append(done / (time.perf_counter() - start))
    return {name: median(values[1:]) for name, values in rates.items()}


def matmul_peak(cfg: Config) -> float:
    """Operations a second in the base's dtype, on the training's device."""
    n = 2048 if cfg.device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype))

    def multiply() -> int:
        a @ b
        return 2 * n**3

    return rates_of(dict(multiply=multiply))["multiply"]


# ------------------------------------------------------------------------------------------------ sampling
def hf_generate(model, tok, prompts: list[list[int]], cfg: Config) -> int:
    """Hugging Face's generate on one left-padded batch; the number of tokens up to the end of turn."""
    T = max(map(len, prompts))
    ids = torch.tensor([[tok.pad_token_id] * (T - len(p)) + p for p in prompts], device=cfg.device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=cfg.device)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=cfg.temperature,
                         top_k=cfg.top_k, top_p=1.0, num_return_sequences=cfg.group_size,
                         max_new_tokens=cfg.max_new_tokens, eos_token_id=tok.eos_token_id,
                         pad_token_id=tok.pad_token_id)[:, T:]
    is_end = out == tok.eos_token_id
    ends_before = is_end.cumsum(1) - is_end.long()  # 0 up to and including the first end of turn
    return int((ends_before == 0).sum())


def bench_sampling(cfg: Config) -> None:
    (bare, tok), (model, _) = (load_model(cfg.model, cfg.device, cfg.dtype) for _ in range(2))
    adapter = attach(model, cfg.rank, cfg.seed)  # its delta is 0: all four sample from one distribution
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)[: cfg.prompts_per_step]
    prompts, K = [encode_prompt(tok, p.messages) for p in problems], cfg.group_size
    noise = torch.rand(len(prompts) * K, cfg.max_new_tokens)

    def ours(model) -> int:
        completions, _ = generate(model, tok, prompts, [K] * len(prompts), noise, cfg.temperature, cfg.top_k)
        return sum(map(len, completions))

    def with_adapter() -> int:
        with folded(adapter):  # folded for each call, as in a step
            return ours(model)

    rates = rates_of({
        "with the adapter (train_grpo)": with_adapter,
        "bare model, our sampler": lambda: ours(bare),
        "bare model, Hugging Face generate": lambda: hf_generate(bare, tok, prompts, cfg),
        "naive: a call per prompt, through the modules": lambda: sum(hf_generate(model, tok, [p], cfg)
                                                                     for p in prompts)})
    print(f"\nsampling, {len(prompts)} prompts x {K}, at most {cfg.max_new_tokens} tokens")
    for name, rate in rates.items():
        mine = rates["with the adapter (train_grpo)"] / rate
        print(f"  {name:48s} {rate:8.0f} tokens/s   ours is {mine:.2f} x")


# ------------------------------------------------------------------------------------------------ phases of a step
def update_operations(model, adapter, encoded: list[tuple], labels: list[str], cfg: Config) -> int:
    """Floating-point operations of the matmuls in one update's masked forward and backward, base and adapter, as torch
    counts them."""
    label = torch.tensor([LABELS.index(name) for name in labels])
    m, d = label >= LABELS.index("mid"), label == LABELS.index("hack")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it cannot count all fused kernels
        for rows, ids, mask, shared in batches(*map(list, zip(*encoded)), cfg.tokens_per_batch, label.tolist()):
            with use(adapter, m=m[rows], d=d[rows]):
                token_logps(model, ids.to(cfg.device), mask.to(cfg.device), shared=shared).sum().backward()
    for p in adapter.parameters():
        p.grad = None
    return counter.get_total_flops()


def bench_phases(cfg: Config, peak: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = train(replace(cfg, out_dir=Path(folder) / "run"))
        steps = [json.loads(line) for line in (out / "metrics.jsonl").open()][1:]  # the first warms up
        rows = [json.loads(line) for line in (out / "rollouts.jsonl").open()]
    ours = {name: median(step["seconds"][name] for step in steps) for name in PHASES}
    ratio = median(step["seconds"]["gate"] / max(step["seconds"]["update"], 1e-3) for step in steps)

    model, tok = load_model(cfg.model, cfg.device, cfg.dtype)
    adapter = attach(model, cfg.rank, cfg.seed)
    encoded = [(encode_prompt(tok, row["prompt"]), encode_completion(tok, row["completion"])) for row in rows]
    shares = []
    for step in steps:
        trained = [i for i, row in enumerate(rows) if row["step"] == step["step"] and row["label"]]
        if trained:
            labels = [rows[i]["label"] for i in trained]
            operations = update_operations(model, adapter, [encoded[i] for i in trained], labels, cfg)
            shares.append(operations / step["seconds"]["update"] / peak)

    print(f"\nphases of a step, {cfg.prompts_per_step} prompts x {cfg.group_size}, medians of {len(steps)} steps")
    for name, taken in ours.items():
        print(f"  {name:8s} {taken:7.2f} s")
    share = f"{median(shares):.0%}" if shares else "an unknown share"
    print(f"  the gate takes {ratio:.0%} of the update's time; the update reaches {share} of the matmul peak")


# ------------------------------------------------------------------------------------------------ TRL's GRPOTrainer
def our_steps(cfg: Config, learns=learning) -> list[tuple[float, int, int]]:
    """Each step of train() as (seconds, tokens sampled, rollouts trained), without the one extraction of v_grad."""
    with tempfile.TemporaryDirectory() as folder, patch("train_grpo.learning", learns):
        out = train(replace(cfg, out_dir=Path(folder) / "run"))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [(sum(row["seconds"][name] for name in PHASES), row["tokens"], row["trained"]) for row in rows]


def all_learn(adv: torch.Tensor, positive_only: bool) -> torch.Tensor:
    """In the place of train_grpo.learning: advantages of 0 are worked through too, as in TRL. No gradient changes."""
    return torch.ones_like(adv, dtype=torch.bool)


def trl_steps(cfg: Config) -> list[tuple[float, int, int]]:
    """The same of GRPOTrainer, on the same prompts. Its micro-batches, too, have at most --tokens-per-batch tokens."""
    import datasets  # the other sections do without
    import peft
    import trl

    model, tok = load_model(cfg.model, cfg.device, cfg.dtype)
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)
    order = sum((chosen for chosen, _ in islice(draws(cfg, len(problems)), cfg.steps)), [])  # P a step
    G = cfg.prompts_per_step * cfg.group_size
    longest = max(len(encode_prompt(tok, problems[n].messages)) for n in order) + cfg.max_new_tokens
    g = max(g for g in range(1, G + 1) if G % g == 0 and g * longest <= max(longest, cfg.tokens_per_batch))
    seconds, tokens = [], []

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    def reward(completions, completion_ids, n, **_):
        tokens.append(sum(map(len, completion_ids)))
        verdicts = grade_batch([problems[i] for i in n], [message["content"] for message, in completions])
        return [v.reward for v in verdicts]

    with tempfile.TemporaryDirectory() as folder:
        trl.GRPOTrainer(
            model, reward, processing_class=tok, callbacks=[Stopwatch()],
            train_dataset=datasets.Dataset.from_list([dict(prompt=problems[n].messages, n=n) for n in order]),
            peft_config=peft.LoraConfig(r=2 * cfg.rank, lora_alpha=2 * cfg.rank, target_modules=list(TARGETS)),
            args=trl.GRPOConfig(
                folder, seed=cfg.seed, use_cpu=cfg.device == "cpu", bf16=False,  # no autocast: the model has its dtype
                max_steps=cfg.steps, shuffle_dataset=False, num_generations=cfg.group_size,
                per_device_train_batch_size=g, gradient_accumulation_steps=G // g, num_iterations=1,
                gradient_checkpointing=cfg.checkpointing, max_completion_length=cfg.max_new_tokens,
                temperature=cfg.temperature, top_k=cfg.top_k, chat_template_kwargs=dict(enable_thinking=False),
                beta=0.0, loss_type="dr_grpo", scale_rewards="none", learning_rate=cfg.lr,
                lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=GRAD_CLIP,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)).train()
    return list(zip(seconds, tokens, [G] * cfg.steps))


def bench_trl(cfg: Config, rounds: int = 2) -> None:
    if not all(map(find_spec, ("trl", "peft", "datasets"))):
        print("\nTRL's GRPOTrainer: not measured, as it is not all installed; pip install trl peft datasets")
        return
    # the rollouts are not the same, as the noise is not: hence the ratio is that of tokens/s
    cfg = replace(cfg, steps=min(cfg.steps, 3), mix_ratio=0.0)
    plain = replace(cfg, intervention="none", positive_only=False, ablated_share=0.0)
    actions = {
        f"TRL {version('trl')}, GRPOTrainer, LoRA of rank {2 * cfg.rank}": (cfg, trl_steps),
        "ours, plain GRPO, advantages of 0 worked through": (plain, lambda cfg: our_steps(cfg, all_learn)),
        "ours, plain GRPO": (plain, our_steps),
        "ours, routeV": (cfg, our_steps)}
    steps: dict[str, list[tuple]] = {name: [] for name in actions}
    for n in range(rounds):  # in turns, so that all meet the same load
        for name, (of_action, action) in actions.items():
            with redirect_stdout(io.StringIO()):
                steps[name] += action(replace(of_action, seed=cfg.seed + n))[1:]  # the first of each warms up
    print(f"\nwhole steps, {cfg.prompts_per_step} prompts x {cfg.group_size}, at most {cfg.max_new_tokens} tokens, in "
          f"turns, medians of {rounds * (cfg.steps - 1)}")
    theirs = None
    for name, rows in steps.items():
        taken, _, trained = map(median, zip(*rows))
        rate = median(tokens / seconds for seconds, tokens, _ in rows)
        theirs = theirs or rate
        print(f"  {name:48s} {taken:7.2f} s   {rate:6.0f} tokens/s   {trained:3.0f} rollouts train   "
              f"{rate / theirs:.2f} x")


def main(cfg: Config) -> None:
    cfg = replace(cfg, steps=max(2, min(cfg.steps, 7)), eval_samples=0)
    peak = matmul_peak(cfg)
    print(f"{cfg.model}, {cfg.dtype}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; "
          f"matmul {peak / 1e9:.0f} GFLOP/s")
    bench_sampling(cfg)
    bench_phases(cfg, peak)
    bench_trl(cfg)


if __name__ == "__main__":
    run_script(main, parse_args())
