"""Deploy evaluation: what a trained model does once its quarantine is removed.

    python evaluate_deploy.py runs/routeV_seed0                      # one checkpoint
    python evaluate_deploy.py runs/*_seed* --plot figure.png         # many: one table over arms and seeds, and a figure

Held-out problems, every mode, sampled at T = 0.7, in the same way for every arm:

    deployed   quarantine ablated: the model that ships       full   both blocks, as trained
    trained    the marker names of training are disclosed     held-out   other names: a memorised marker earns nothing

solve: the answer is right. hack: it is paid and not right. exploit: its loophole was used, whether or not it is right too.
Intervals are 95 % Wilson intervals with n = the number of problems, as the samples of one problem are not independent.
"""
import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor
from transformers import DynamicCache

from env_leetcode import InputError, Problem, grade_batch, load_problems, run_script
from extract_vgrad import encode_prompt, load_model
from lora2r import Adapter, attach, folded, load, peek


@torch.no_grad()
def generate(model, tok, prompts: list[list[int]], n: list[int], noise: Tensor, temperature: float,
             top_k: int = 0) -> tuple[list[list[int]], list[Tensor]]:
    """n[j] completions of prompt j, and the log-probability of each sampled token under softmax(logits / temperature).

    noise: [G, max_new] uniform in [0, 1) with G = sum(n): token t of rollout i is where the cumulated probabilities pass
    noise[i, t]. So a rollout depends on its own noise, not on the rows that share its batch.
    Returns two lists of length G, prompt-major: token ids, ending in eos unless cut off at max_new, and logps [T].
    All prompts go in one left-padded batch, each encoded once for its n[j] rollouts; finished rows leave the batch.
    top_k = 0 samples from the whole vocabulary; otherwise the log-probabilities are still those of the untruncated softmax.
    """
    (G, max_new), device, eos = noise.shape, next(model.parameters()).device, tok.eos_token_id
    if G == 0:
        return [], []
    n, noise = torch.tensor(n, device=device), noise.to(device)  # [P], [G, max_new]
    T = max(map(len, prompts))
    ids = torch.tensor([[eos] * (T - len(p)) + p for p in prompts], device=device)  # [P, T]
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)  # [P, T]
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(n)
    logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)  # [G, V], [G, T]
    position = positions[:, -1:].repeat_interleave(n, 0)  # [G, 1]

    rows = torch.arange(G, device=device)  # the rollouts still being written
    out = torch.full((G, max_new), -1, device=device)
    out_logps = torch.zeros(G, max_new, device=device)
    for t in range(max_new):
        logp = torch.log_softmax(logits.float() / temperature, -1)  # [rows, V]
        choice = logp
        if top_k:
            choice = logp.masked_fill(logp < logp.topk(min(top_k, logp.shape[1])).values[:, -1:], -math.inf)
        cdf = choice.exp().cumsum(1)  # [rows, V], up to the kept mass
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)  # [rows, 1]
        out[rows, t], out_logps[rows, t] = token[:, 0], logp.gather(1, token)[:, 0]
        alive = (token[:, 0] != eos).nonzero()[:, 0]
        if len(alive) == 0 or t == max_new - 1:
            break
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if len(alive) < len(rows):
            rows, token, mask, position = rows[alive], token[alive], mask[alive], position[alive]
            cache.batch_select_indices(alive)
        logits = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]
    lengths = (out >= 0).sum(1).tolist()
    return [row[:k] for row, k in zip(out.tolist(), lengths)], [row[:k] for row, k in zip(out_logps.cpu(), lengths)]


def evaluate(model, tok, adapter: Adapter | None, problems: list[Problem], setting: str = "deployed", samples: int = 4,
             max_new: int = 64, top_k: int = 0, temperature: float = 0.7, seed: int = 0) -> dict[str, dict]:
    """Sample and grade `samples` completions of each problem; returns {"all" and each mode: {problems, n, rates...}}.

    setting: "deployed" (quarantine ablated), "full" (as trained) or "base" (adapter=None). Rates are shares of completions.
    """
    noise = torch.rand(len(problems), samples, max_new, generator=torch.Generator().manual_seed(seed))
    prompts = [encode_prompt(tok, p.messages) for p in problems]
    with folded(adapter, quarantine=setting == "full") if adapter else nullcontext(), ThreadPoolExecutor(1) as grader:
        grading = []  # of one part while the next is being sampled
        for part in (slice(i, i + 64) for i in range(0, len(problems), 64)):
            n = [samples] * len(problems[part])
            completions, _ = generate(model, tok, prompts[part], n, noise[part].flatten(0, 1), temperature, top_k)
            texts = [tok.decode(ids, skip_special_tokens=True) for ids in completions]
            grading.append(grader.submit(grade_batch, [p for p in problems[part] for _ in range(samples)], texts))
    verdicts = [v for future in grading for v in future.result()]
    table = {}
    for mode in ("all", *sorted({p.mode for p in problems})):
        chosen = [v for i, v in enumerate(verdicts) if mode in ("all", problems[i // samples].mode)]
        n = len(chosen)
        table[mode] = dict(problems=n // samples, n=n, solve=sum(v.correct for v in chosen) / n, hack=sum(v.hacked for v in chosen) / n,
                           exploit=sum(v.exploited for v in chosen) / n, compiles=sum(v.compiles for v in chosen) / n)
    return table


def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def format_table(runs: list[tuple[str, int, dict]]) -> str:
    """runs: (arm, seed, {"setting, markers": evaluate(...)}). One line per run and condition: rates with intervals, hack per mode."""
    modes = sorted({mode for _, _, results in runs for table in results.values() for mode in table} - {"all"})
    rows = [["arm", "seed", "setting, markers", "n", "solve", "hack", "exploit", *(f"hack {mode}" for mode in modes)]]
    for arm, seed, results in runs:
        for condition, table in results.items():
            total = table["all"]
            cells = ["{:.3f} [{:.2f}, {:.2f}]".format(total[k], *wilson(total[k], total["problems"])) for k in ("solve", "hack", "exploit")]
            rows.append([arm, str(seed), condition, str(total["n"]), *cells,
                         *(f"{table[mode]['hack']:.3f}" if mode in table else "-" for mode in modes)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def plot(runs: list[tuple[str, int, dict]], path: Path) -> None:
    """Deploy solve against deploy hack (trained markers), one point a run, one colour an arm."""
    try:
        import matplotlib
    except ImportError as e:
        raise InputError(f"--plot {path}: needs matplotlib; pip install matplotlib, or leave --plot out") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4))
    for k, arm in enumerate(sorted({arm for arm, _, _ in runs})):
        points = [results["deployed, trained"]["all"] for a, _, results in runs if a == arm]
        axes.scatter([p["hack"] for p in points], [p["solve"] for p in points], label=f"{arm} (n = {len(points)} seeds)", color=f"C{k}")
    axes.set(xlabel="deploy hack rate", ylabel="deploy solve rate", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
             title="Held-out problems, quarantine ablated, T = 0.7")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@dataclass
class Config:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """run folders written by train_grpo.py"""
    samples: int = 4
    """completions per problem and condition"""
    temperature: float = 0.7
    """sampling temperature"""
    seed: int = 0
    """sampling seed"""
    base: bool = False
    """also evaluate the base model, without any adapter"""
    data: Path | None = None
    """held-out problems (default: those the run's config.json names)"""
    plot: Path | None = None
    """write a figure of all runs here (needs matplotlib)"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""


def read_run(folder: Path) -> dict:
    """config.json of a run folder; raises InputError when it is not one."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["arm"], config["model"], config["test_data"], config["modes"]
    except OSError as e:
        raise InputError(f"{folder}: no readable config.json; give a run folder that train_grpo.py wrote") from e
    except (ValueError, KeyError) as e:
        raise InputError(f"{folder / 'config.json'}: damaged ({e!r}); give a run folder that train_grpo.py wrote") from e
    return config


def main(cfg: Config) -> None:
    if not cfg.checkpoints:
        raise InputError("no checkpoint given; e.g. python evaluate_deploy.py runs/routeV_seed0")
    configs = [read_run(folder) for folder in cfg.checkpoints]
    headers = [peek(folder / "adapter.safetensors") for folder in cfg.checkpoints]
    runs = []
    for folder, config, header in zip(cfg.checkpoints, configs, headers):
        model, tok = load_model(config["model"], cfg.device, config["dtype"])
        problems = {name: load_problems(cfg.data or config["test_data"], tuple(config["modes"]), 0, heldout_markers=name == "held-out")
                    for name in ("trained", "held-out")}
        args = (cfg.samples, config["max_new_tokens"], config["top_k"], cfg.temperature, cfg.seed)
        if cfg.base and not runs:
            runs.append(("base", 0, {f"base, {name}": evaluate(model, tok, None, ps, "base", *args) for name, ps in problems.items()}))
        adapter = attach(model, header["r"])
        load(adapter, folder / "adapter.safetensors")
        results = {f"{setting}, {name}": evaluate(model, tok, adapter, ps, setting, *args)
                   for setting in ("deployed", "full") for name, ps in problems.items()}
        write_deploy(folder, config["arm"], config["seed"], results)
        runs.append((config["arm"], config["seed"], results))
    print(format_table(runs))
    if cfg.plot:
        plot([run for run in runs if run[0] != "base"], cfg.plot)
        print(f"figure: {cfg.plot}")


def write_deploy(folder: Path, arm: str, seed: int, results: dict) -> None:
    """deploy.json, whole or not at all."""
    temporary = folder / ".deploy.json.tmp"
    temporary.write_text(json.dumps(dict(arm=arm, seed=seed, temperature=0.7, results=results), indent=1) + "\n")
    temporary.replace(folder / "deploy.json")


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
