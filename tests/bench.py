"""Where a step's time and memory go, beside a naive arrangement of the same. Not a test; run it on an idle machine:

    python tests/bench.py                                                       # the embedded model
    python tests/bench.py --preset qwen3-4b --model DIR --dtype float32 --max-new-tokens 128 --group-size 4

It takes the flags of train_grpo.py and measures, one after another in this process, as medians:

    matmul      the machine's matmul rate in --dtype at size 2048 (a GPU's: 8192), the peak that shares are of
    sampling    tokens/s of: our sampler with the adapter; the bare model in ours; the bare model in Hugging Face's
                generate, same batch; naively: one generate call per prompt through the adapter's modules
    phases      seconds of sample, grade, gate, update in train_grpo.train itself (from its metrics.jsonl), and naively
                on the rollouts of one such step: per group 4 forwards and 2 backwards of all rollouts, padded to the
                longest, full fp32 log-softmax; per test an interpreter. The update's share of the peak counts its
                matmuls, of base and adapter
    memory      predicted and measured peak of one micro-batch, and the arithmetic for Qwen3-4B
    trl         seconds and tokens/s of whole steps, and of those of TRL's GRPOTrainer: same model, prompts, grader and
                loss, a peft LoRA of rank 2r on the same layers. Left out without `pip install trl peft datasets`
"""
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from env_leetcode import grade_batch, load_problems  # noqa: E402
from lora2r import (TARGETS, attach, batches, encode_completion, encode_prompt, folded, generate,  # noqa: E402
                    load_model, predicted_memory, prefill, sampling_memory, token_logps, use)
from train_grpo import Config, check, draws, learning, parse_args, train  # noqa: E402

REPEATS = 5


def clock() -> float:
    """Seconds, once all work given to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(action, repeats: int = REPEATS) -> float:
    """Median over `repeats` runs, after one that warms up."""
    action()
    taken = []
    for _ in range(repeats):
        start = clock()
        action()
        taken.append(clock() - start)
    return median(taken)


def matmul_peak(cfg: Config) -> float:
    """Operations a second in the base's dtype, of the training's kind of device."""
    n = 2048 if cfg.device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype))
    return 2 * n**3 / seconds(lambda: a @ b)


def in_turns(actions: dict, repeats: int = REPEATS) -> dict[str, float]:
    """Tokens/s of each action, which returns a number of tokens: medians over rounds. Each round has all of them: they
    meet the same load."""
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for n in range(repeats + 1):  # the first round warms up
        for name, action in actions.items():
            start = clock()
            tokens = action()
            rates[name] += [tokens / (clock() - start)] * (n > 0)
    return {name: median(values) for name, values in rates.items()}


# ------------------------------------------------------------------------------------------------ sampling
def hf_generate(model, tok, prompts: list[list[int]], K: int, cfg: Config) -> int:
    """Hugging Face's generate on one left-padded batch; the number of tokens up to the end of turn."""
    T = max(map(len, prompts))
    ids = torch.tensor([[tok.pad_token_id] * (T - len(p)) + p for p in prompts], device=cfg.device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=cfg.device)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=cfg.temperature,
                         top_k=cfg.top_k, top_p=1.0, num_return_sequences=K, max_new_tokens=cfg.max_new_tokens,
                         eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)[:, T:]
    is_end = out == tok.eos_token_id
    ends_before = is_end.cumsum(1) - is_end.long()  # 0 up to and including the first end of turn
    return int((ends_before == 0).sum())


def bench_sampling(cfg: Config) -> None:
    (bare, tok), (model, _) = (load_model(cfg.model, cfg.device, cfg.dtype) for _ in range(2))
    adapter = attach(model, cfg.rank, cfg.seed)  # its delta is 0: all four sample from one distribution
    problems = load_problems(cfg.data, cfg.modes, cfg.seed)[: cfg.prompts_per_step]
    prompts, K = [encode_prompt(tok, p.messages) for p in problems], cfg.group_size
    n, noise = [K] * len(prompts), torch.rand(len(prompts) * K, cfg.max_new_tokens)

    def ours(model) -> int:
        return sum(map(len, generate(model, tok, prompts, n, noise, cfg.temperature, cfg.top_k)[0]))

    def naive() -> int:
        return sum(hf_generate(model, tok, [p], K, cfg) for p in prompts)

    def with_adapter() -> int:
        with folded(adapter):  # for each call, as in a step
            return ours(model)

    rates = in_turns({
        "bare model, our sampler": lambda: ours(bare),
        "bare model, Hugging Face generate": lambda: hf_generate(bare, tok, prompts, K, cfg),
        "with the adapter (train_grpo)": with_adapter,
        "naive: a call per prompt, through the modules": naive})
    mine = rates["with the adapter (train_grpo)"]
    print(f"\nsampling, {len(prompts)} prompts x {K}, at most {cfg.max_new_tokens} tokens")
    for name, rate in rates.items():
        print(f"  {name:48s} {rate:8.0f} tokens/s   ours is {mine / rate:.2f} x")


# ------------------------------------------------------------------------------------------------ the naive step
def naive_grade(problem, code: str) -> bool:
    """One interpreter per test: setup, code, assert. For canonical solutions: it would not contain a model's code."""
    return all(subprocess.run([sys.executable, "-c", f"{problem.setup_code}\n{code}\n{test.source}"],
                              capture_output=True).returncode == 0 for test in problem.tests)


def naive_passes(model, adapter, groups: list[tuple[list, list]], cfg: Config) -> tuple[float, float]:
    """(gate, update) seconds: per group of rollouts a forward for old log-probabilities, one for the reference, forward
    and backward for the gate, forward and backward for the update, on right-padded batches with the log-softmax of all
    positions in fp32."""
    def logps(ids):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return torch.log_softmax(logits / cfg.temperature, -1).gather(2, ids[:, 1:, None])[..., 0]  # [K, T-1]

    longest = max(len(p) + len(c) for prompts, completions in groups for p, c in zip(prompts, completions))
    gate = update = 0.0
    for prompts, completions in groups:
        rows, ids, mask, _ = next(batches(prompts, completions, 10**9))
        ids = torch.nn.functional.pad(ids, (0, longest - ids.shape[1])).to(cfg.device)
        mask = torch.nn.functional.pad(mask, (0, longest - 1 - mask.shape[1])).to(cfg.device)
        start = clock()
        c = torch.ones(len(adapter), len(ids), 2 * adapter.r, device=cfg.device, requires_grad=True)
        with use(adapter, m=False, c=c):
            torch.autograd.grad(-(logps(ids) * mask).sum(), c)
        gate += clock() - start
        start = clock()
        with torch.no_grad(), use(adapter, m=True):
            old = logps(ids)
        with torch.no_grad(), use(adapter, off=True):
            ref = logps(ids)
        with use(adapter, m=True):
            logp = logps(ids)
            ((-(logp - old).exp() + 0.0 * (ref - logp)) * mask).sum().backward()
        update += clock() - start
    for p in adapter.parameters():
        p.grad = None
    return gate, update


def update_operations(model, adapter, encoded: list[tuple], labels: list[str], cfg: Config) -> int:
    """Floating-point operations of the matmuls in one update's masked forward and backward, base and adapter, as torch
    counts them."""
    m, d = torch.tensor([label != "clean" for label in labels]), torch.tensor([label == "hack" for label in labels])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it cannot count all fused kernels
        for rows, ids, mask, shared in batches(*map(list, zip(*encoded)), cfg.tokens_per_batch, labels):
            ids, mask = ids.to(cfg.device), mask.to(cfg.device)
            with use(adapter, m=m[rows][:1], d=d[rows][:1]):
                cache = prefill(model, ids, shared)
            with use(adapter, m=m[rows], d=d[rows]):
                token_logps(model, ids, mask, cache=cache).sum().backward()
    for p in adapter.parameters():
        p.grad = None
    return counter.get_total_flops()


def bench_phases(cfg: Config, peak: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = train(replace(cfg, out_dir=Path(folder) / "run"))
        steps = [json.loads(line) for line in open(out / "metrics.jsonl")]
        rows = [json.loads(line) for line in open(out / "rollouts.jsonl")]
    ours = {name: median(step["seconds"][name] for step in steps[1:]) for name in ("sample", "grade", "gate", "update")}
    seconds_of = [step["seconds"] for step in steps[1:]]
    ratio = median(phases["gate"] / phases["update"] for phases in seconds_of if phases["update"] > 0.001)

    model, tok = load_model(cfg.model, cfg.device, cfg.dtype)
    adapter = attach(model, cfg.rank, cfg.seed)
    problems = {(p.id, p.mode): p for p in load_problems(cfg.data, cfg.modes, cfg.seed)}

    def encode(row: dict) -> tuple[list[int], list[int]]:
        return (encode_prompt(tok, problems[row["problem"], row["mode"]].messages),
                encode_completion(tok, row["completion"]))

    shares = []
    for step in steps[1:]:
        trained = [row for row in rows if row["step"] == step["step"] and row["label"]]
        if trained:
            labels = [row["label"] for row in trained]
            operations = update_operations(model, adapter, [encode(row) for row in trained], labels, cfg)
            shares.append(operations / step["seconds"]["update"] / peak)

    last = [row for row in rows if row["step"] == steps[-1]["step"]]
    encoded = [encode(row) for row in last]
    K = cfg.group_size
    groups = [tuple(zip(*encoded[i : i + K])) for i in range(0, len(encoded), K)]
    groups = [([*p], [*c]) for p, c in groups]
    prompts = [p[0] for p, _ in groups]
    naive = {"sample": seconds(lambda: sum(hf_generate(model, tok, [p], K, cfg) for p in prompts), 1)}
    sample = last[:: max(1, len(last) // 8)][:8]  # a few are enough: each is dozens of interpreters
    chosen = [problems[row["problem"], row["mode"]] for row in sample]
    start = time.perf_counter()
    verdicts = [naive_grade(p, p.canonical_solution) for p in chosen]
    naive["grade"] = (time.perf_counter() - start) * len(last) / len(sample)
    others = [q.canonical_solution for q in chosen[1:] + chosen[:1]]  # wrong answers, of the next problem
    verdicts += [naive_grade(p, code) for p, code in zip(chosen, others)]
    fenced = [f"```python\n{code}\n```" for code in [p.canonical_solution for p in chosen] + others]
    same = sum(v.correct == due for v, due in zip(grade_batch(chosen * 2, fenced), verdicts))
    naive["gate"], naive["update"] = map(median, zip(*(naive_passes(model, adapter, groups, cfg) for _ in range(3))))
    everything = [problems[row["problem"], row["mode"]] for row in last]
    texts = [row["completion"] for row in last]
    rate = len(last) / seconds(lambda: grade_batch(everything, texts))

    print(f"\nphases of a step, {len(prompts)} prompts x {K}, medians of {len(steps) - 1} steps; "
          f"naive: all {len(last)} rollouts of one step")
    ours["step"], naive["step"] = sum(ours.values()), sum(naive.values())
    for name in ours:
        faster = naive[name] / max(ours[name], 1e-3)
        print(f"  {name:8s} {ours[name]:7.2f} s   naive {naive[name]:7.2f} s   {faster:6.1f} x")
    print(f"  the gate adds {ratio:.0%} to the update; the update reaches {median(shares):.0%} of the matmul peak")
    naive_rate = len(last) / naive["grade"]
    print(f"  grading alone: {rate:.0f} completions/s; an interpreter per test, one after another: {naive_rate:.1f}/s: "
          f"{rate / naive_rate:.0f} x; the same verdict on {same} of {len(verdicts)} ({sum(verdicts)} right)")


# ------------------------------------------------------------------------------------------------ memory
def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def micro_batch_peak(cfg: Config, tokens: int, checkpointing: bool) -> tuple[int, int]:
    """(predicted, measured) bytes that a masked forward and backward adds. To be run in a process of its own: what
    another case has freed would still count as resident."""
    model, tok = load_model(cfg.model, cfg.device, cfg.dtype)
    adapter = attach(model, cfg.rank, cfg.seed)
    if checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    predicted = predicted_memory(model, adapter, tokens, checkpointing)[2]
    model.train(checkpointing)

    def pass_2(g: int, T: int) -> None:
        ids = torch.randint(10, model.config.vocab_size - 10, (g, T), device=cfg.device)
        mask = torch.ones(g, T - 1, dtype=torch.bool, device=cfg.device)
        mask[:, : T // 3] = False  # the prompt
        with use(adapter, m=torch.ones(g, dtype=torch.bool), d=torch.arange(g) % 2 == 0):
            token_logps(model, ids, mask).sum().backward()

    pass_2(2, 16)  # threads, code and gradients are there before the measurement
    if cfg.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
        before = resident("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    pass_2(tokens // 128, 128)
    return predicted, (resident("VmHWM") if cfg.device == "cpu" else torch.cuda.max_memory_allocated()) - before


def bench_memory(cfg: Config) -> None:
    print("\nmemory of a micro-batch, masked forward and backward")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # the C library gives freed blocks back at once: resident is alive
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for checkpointing in (False, True):
            for tokens in (cfg.tokens_per_batch // 4, cfg.tokens_per_batch):
                predicted, measured = fresh.submit(micro_batch_peak, cfg, tokens, checkpointing).result()
                print(f"  {tokens:6d} tokens, checkpointing {checkpointing!s:5s}  predicted {predicted / 1e9:6.3f} GB "
                      f"  measured {measured / 1e9:6.3f} GB   {predicted / measured:.2f} x")

    r, tokens, L = 32, 4096, 36
    sizes = {}
    for layers in (1, 2):  # what a layer costs; the vocabulary is counted apart
        config = Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers, num_attention_heads=32,
                             num_key_value_heads=8, head_dim=128, vocab_size=1024, tie_word_embeddings=True,
                             dtype="bfloat16")
        small = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
        weights = sum(p.numel() for p in small.parameters())
        lora = attach(small, r)
        small.config.vocab_size = 151_936
        adds = [predicted_memory(small, lora, tokens, checkpointing)[2] for checkpointing in (False, True)]
        sizes[layers] = (weights, sum(p.numel() for p in lora.parameters()), *adds,
                         *sampling_memory(small, lora, 32, 1024, 512))
    weights, lora, batch, batch_checkpointed, folding, cache = (
        one + (L - 1) * (two - one) for one, two in zip(sizes[1], sizes[2]))
    weights += (151_936 - 1024) * 2560
    fixed = 2 * weights + 4 * lora * 5  # bf16 base; fp32 A0, B0 frozen; dA, dB with gradient and two moments
    print(f"\nQwen3-4B, r = {r}, bf16, 32 rollouts of 1024 + 512 tokens, by arithmetic")
    print(f"  base weights 2 B x {weights / 1e9:.2f}e9 = {2 * weights / 1e9:.1f} GB; "
          f"adapter 4 B x 5 x {lora / 1e6:.0f}e6 = {20 * lora / 1e9:.1f} GB")
    print(f"  update: {tokens} tokens a micro-batch, {batch / 1e9:.1f} GB ({batch_checkpointed / 1e9:.1f} checkpointed)"
          f": peak {(fixed + batch) / 1e9:.1f} GB")
    print(f"  sampling: folded weights {folding / 1e9:.1f} GB + KV cache {cache / 1e9:.1f} GB: "
          f"peak {(fixed + folding + cache) / 1e9:.1f} GB")


# ------------------------------------------------------------------------------------------------ TRL's GRPOTrainer
def our_steps(cfg: Config, learns=learning) -> list[tuple[float, int, int]]:
    """Each step of train() as (seconds, tokens sampled, rollouts trained), without the one extraction of v_grad. cfg
    has been checked: here a flag of the gate without a gate, say, is no error."""
    with (tempfile.TemporaryDirectory() as folder, patch("train_grpo.learning", learns),
          patch("train_grpo.check", lambda cfg: cfg)):
        out = train(replace(cfg, out_dir=Path(folder) / "run"))
        rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
        rollouts = [json.loads(line) for line in open(out / "rollouts.jsonl")]
    return [(sum(row["seconds"].values()) - row["seconds"]["refresh"], row["tokens"],
             sum(x["step"] == row["step"] and x["label"] is not None for x in rollouts)) for row in rows]


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
                beta=0.0, loss_type="dr_grpo", scale_rewards="none", epsilon=cfg.clip_eps,
                learning_rate=cfg.lr, lr_scheduler_type="constant", adam_beta1=cfg.betas[0], adam_beta2=cfg.betas[1],
                max_grad_norm=cfg.grad_clip, save_strategy="no", logging_strategy="no", report_to="none",
                disable_tqdm=True)).train()
    return list(zip(seconds, tokens, [G] * cfg.steps))


def bench_trl(cfg: Config, rounds: int = 2) -> None:
    if not all(map(find_spec, ("trl", "peft", "datasets"))):
        print("\nTRL's GRPOTrainer: not measured, as it is not all installed; pip install trl peft datasets")
        return
    # the rollouts are not the same, as the noise is not: hence the ratio is that of tokens/s
    cfg = replace(check(cfg), steps=min(cfg.steps, 3), mix_ratio=0.0, epochs=1, kl=0.0)
    plain = dict(intervention="none", positive_only=False, ablated_share=0.0)
    actions = {
        f"TRL {version('trl')}, GRPOTrainer, LoRA of rank {2 * cfg.rank}": trl_steps,
        "ours, plain GRPO, advantages of 0 worked through": lambda cfg: our_steps(replace(cfg, **plain), all_learn),
        "ours, plain GRPO": lambda cfg: our_steps(replace(cfg, **plain)),
        "ours, routeV": lambda cfg: our_steps(replace(cfg, intervention="routeV"))}
    steps: dict[str, list[tuple]] = {name: [] for name in actions}
    for n in range(rounds):
        for name, action in actions.items():
            with redirect_stdout(io.StringIO()):
                steps[name] += action(replace(cfg, seed=cfg.seed + n))[1:]  # the first of each warms up
    print(f"\nwhole steps, {cfg.prompts_per_step} prompts x {cfg.group_size}, at most {cfg.max_new_tokens} tokens, in "
          f"turns, medians of {rounds * (cfg.steps - 1)}")
    theirs = None
    for name, rows in steps.items():
        taken, _, trained = map(median, zip(*rows))
        rate = median(tokens / seconds for seconds, tokens, _ in rows)
        theirs = theirs or rate
        print(f"  {name:48s} {taken:7.2f} s   {rate:6.0f} tokens/s   {trained:3.0f} rollouts train   "
              f"{rate / theirs:.2f} x")


if __name__ == "__main__":
    cfg = parse_args()
    cfg = replace(cfg, steps=min(cfg.steps, 7), eval_samples=0, mix_ratio=0.25)
    peak = matmul_peak(cfg)
    print(f"{cfg.model}, {cfg.dtype}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; "
          f"matmul {peak / 1e9:.0f} GFLOP/s")
    bench_sampling(cfg)
    bench_phases(cfg, peak)
    bench_memory(cfg)
    bench_trl(cfg)
