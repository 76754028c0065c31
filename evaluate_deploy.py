"""Deploy evaluation: what a trained model does once its quarantine is removed.

    python evaluate_deploy.py runs/routeV_seed0                      # one checkpoint
    python evaluate_deploy.py runs/*_seed* --plot figure.png         # many: one table over arms and seeds, and a figure
    python evaluate_deploy.py runs/*_seed* --results arms.jsonl      # no evaluation: means over seeds of those made
    python evaluate_deploy.py --results arms.jsonl --curves all.png  # ... and learning curves by arm, gates' AUROC
    python evaluate_deploy.py runs/*_seed* --curves curves.png       # no evaluation: learning curves of the logs
    python evaluate_deploy.py runs/routeV_seed0 --browse run.html    # no evaluation: its rollouts, to read in a browser
    python evaluate_deploy.py runs/routeV_seed0 --export folder      # no evaluation: the deployed model, as a PEFT LoRA

Held-out problems, every mode, sampled at T = 0.7, in the same way for every arm:

    deployed   quarantine ablated: the model that ships       full   both blocks, as trained
    trained    the marker names of training are disclosed     held-out   other names: a memorised marker earns nothing

solve: the answer is right. hack: it is paid and not right. exploit: its loophole was used, whether it is right or not.
Intervals are 95 % Wilson intervals with n = the number of problems, as the samples of one problem are not independent.
"""
import fcntl
import hashlib
import json
import math
import os
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Literal

import torch
import tyro
from safetensors.torch import save as to_bytes
from torch import Tensor

from env_leetcode import Problem, Verdict, background, grade_batch, load_problems
from extract_vgrad import auroc
from lora2r import (HERE, Adapter, InputError, attach, bar, check_ranges, encode_prompt, factors, first_line, flag,
                    folded, generate, load, load_model, located, parse, peek, portable, read_text, run_script, save,
                    writing)


def rates(modes: list[str], verdicts: list[Verdict]) -> dict[str, dict]:
    """Shares of completions, all and per mode: {"all" or mode: {n, solve, hack, exploit, compiles}}, None if n = 0."""
    table = {}
    for mode in ("all", *sorted(set(modes))):
        chosen = [v for of_mode, v in zip(modes, verdicts) if mode in ("all", of_mode)]
        flags = dict(solve=[v.correct for v in chosen], hack=[v.hacked for v in chosen],
                     exploit=[v.exploited for v in chosen], compiles=[v.compiles for v in chosen])
        n = len(chosen)
        table[mode] = dict(n=n, **{name: sum(values) / n if n else None for name, values in flags.items()})
    return table


def evaluate(model, tok, adapter: Adapter | None, problems: list[Problem], setting: str = "deployed", samples: int = 4,
             max_new: int = 64, top_k: int = 0, temperature: float = 0.7, seed: int = 0) -> dict[str, dict]:
    """Sample and grade `samples` completions of each problem; returns {"all" and each mode: {problems, n, rates...}}.

    setting: "deployed" (quarantine ablated), "full" (as trained) or "base" (adapter=None).
    """
    noise = torch.rand(len(problems), samples, max_new, generator=torch.Generator().manual_seed(seed))
    prompts = [encode_prompt(tok, p.messages) for p in problems]
    with folded(adapter, quarantine=setting == "full") if adapter else nullcontext(), background() as grader:
        grading = []  # of one part while the next is being sampled
        for part in bar([slice(i, i + 64) for i in range(0, len(problems), 64)], f"evaluation, {setting}"):
            n = [samples] * len(problems[part])
            completions, _ = generate(model, tok, prompts[part], n, noise[part].flatten(0, 1), temperature, top_k)
            texts = tok.batch_decode(completions, skip_special_tokens=True)
            grading.append(grader.submit(grade_batch, [p for p in problems[part] for _ in range(samples)], texts))
    verdicts = [v for future in grading for v in future.result()]
    table = rates([p.mode for p in problems for _ in range(samples)], verdicts)
    return {mode: dict(problems=row["n"] // samples, **row) for mode, row in table.items()}


def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def format_table(runs: list[tuple[str, int, dict]]) -> str:
    """runs: (arm, seed, {"setting, markers": evaluate(...)}). A line per run and condition: rates with intervals, and
    the hack rate per mode."""
    modes = sorted({mode for _, _, results in runs for table in results.values() for mode in table} - {"all"})
    rows = [["arm", "seed", "setting, markers", "n", "solve", "hack", "exploit", *(f"hack {mode}" for mode in modes)]]
    for arm, seed, results in runs:
        for condition, table in results.items():
            total = table["all"]
            cells = ["{:.3f} [{:.2f}, {:.2f}]".format(total[rate], *wilson(total[rate], total["problems"]))
                     for rate in ("solve", "hack", "exploit")]
            rows.append([arm, str(seed), condition, str(total["n"]), *cells,
                         *(f"{table[mode]['hack']:.3f}" if mode in table else "-" for mode in modes)])
    return columns(rows)


# -------------------------------------------------------------------------------------- many runs, from files alone
def keep_results(folders: list[Path], path: Path) -> list[dict]:
    """Add deploy.json, the last step's metrics and the curves of runs to the JSONL file `path`, a row a run, each in
    the place of an older row of its arm and seed. Returns all rows. Raises InputError for a run that has none or has
    gone on since, for two of one arm and seed, or another file."""
    new = set()
    try:
        text = read_text("--results", path, "name a new file, or one of results") if path.exists() else ""
        rows = {(row["arm"], row["seed"]): row for row in map(json.loads, text.splitlines())}
        for folder in folders:
            deploy, metrics = (read_text("", folder / name, "let the run come to its end")
                               for name in ("deploy.json", "metrics.jsonl"))
            row, steps = json.loads(deploy), [json.loads(line) for line in metrics.splitlines()]
            row |= dict(config=hash_of(folder / "config.json"), last=steps[-1])
            row["curve"] = {name.removeprefix("gate_"): [step[name] and round(step[name], 3) for step in steps]
                            for name in ("deployed_solve", "deployed_hack", "gate_auroc")}
            if (evaluated := row["settings"]["step"]) != len(steps):
                raise InputError(f"--results: {folder} was evaluated at step {evaluated} and has made {len(steps)}; "
                                 "evaluate it again")
            if (row["arm"], row["seed"]) in new:
                raise InputError(f"--results: {folder} is a second run of {row['arm']}, seed {row['seed']}; give one")
            new.add((row["arm"], row["seed"]))
            rows[row["arm"], row["seed"]] = row
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as e:
        raise InputError(f"--results {path}: it or a run is damaged ({e!r}); give finished runs and a file of "
                         "results") from e
    if folders:
        with writing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return list(rows.values())


def two_sided_p(t: float, df: int) -> float:
    """P(|T| > t) for Student's T of df degrees of freedom: the share of cos^(df - 1) above atan(t / sqrt(df))."""
    angle = torch.arange(0.5, 20_000, dtype=torch.float64) * math.pi / 40_000  # from 0 to pi / 2
    density = angle.cos() ** (df - 1)
    return (density[angle > math.atan(t / df**0.5)].sum() / density.sum()).item()


@cache
def percentile_975(df: int) -> float:
    """The 97.5th percentile of Student's T."""
    low, high = 0.0, 1e4
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > 0.05 else (low, middle)
    return high


def interval(xs: list[float]) -> tuple[float, float, float]:
    """Mean of n >= 2 numbers, half the width of its 95 % t interval, and the two-sided p of the t test against 0; equal
    numbers, which say nothing of their spread, have p = 1."""
    centre, error, df = mean(xs), stdev(xs) / len(xs) ** 0.5, len(xs) - 1
    p = two_sided_p(abs(centre) / error, df) if error > 1e-12 else 1.0
    return centre, percentile_975(df) * error, p


def over_seeds(shares: list[float]) -> str:
    """Mean over n seeds, from two on with its 95 % t interval, cut to [0, 1]."""
    if len(shares) == 1:
        return f"{shares[0]:.3f}"
    centre, half, _ = interval(shares)
    return f"{centre:.3f} [{max(0.0, centre - half):.2f}, {min(1.0, centre + half):.2f}]"


def format_arms(rows: list[dict]) -> str:
    """Rows of `keep_results` -> a line per arm: what ships, trained markers, means over seeds."""
    table = [["arm", "seeds", "deploy solve", "deploy hack", "worst seed", "worst mode", "compiles", "full hack"]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        ships, full = ([row["results"][setting] for row in rows if row["arm"] == arm]
                       for setting in ("deployed, trained", "full, trained"))
        hack = [cell["all"]["hack"] for cell in ships]
        by_mode = {mode: mean([cell[mode]["hack"] for cell in ships]) for mode in ships[0] if mode != "all"}
        worst = max(by_mode, key=by_mode.get)
        table.append([arm, str(len(ships)), over_seeds([cell["all"]["solve"] for cell in ships]), over_seeds(hack),
                      f"{max(hack):.3f}", f"{worst} {by_mode[worst]:.3f}",
                      f"{mean([cell['all']['compiles'] for cell in ships]):.2f}",
                      f"{mean([cell['all']['hack'] for cell in full]):.3f}"])
    return columns(table)


def differences(rows: list[dict], arm: str, mode: str = "all") -> dict[tuple[str, str], tuple]:
    """Rows of `keep_results` -> {(other arm, what): (n, mean, half, p)}: `arm` minus each other that shares n >= 2
    seeds with it, paired by seed, of what ships: "solve", "hack" and "hack, held-out markers", on one mode's problems
    or on all. half: half the width of the 95 % t interval. p: of the paired t test, Holm's over the whole dict."""
    results = {(row["arm"], row["seed"]): row["results"] for row in rows}
    tested = {}
    for other in dict.fromkeys(row["arm"] for row in rows if row["arm"] != arm):
        seeds = [seed for name, seed in results if name == other and (arm, seed) in results]
        for what in ("solve", "hack", "hack, held-out markers") if len(seeds) > 1 else ():
            key, _, markers = what.partition(", ")
            mine, others = ([results[name, seed][f"deployed, {'held-out' if markers else 'trained'}"][mode][key]
                             for seed in seeds] for name in (arm, other))
            tested[other, what] = len(seeds), *interval([x - y for x, y in zip(mine, others)])
    running = 0.0
    for rank, pair in enumerate(sorted(tested, key=lambda pair: tested[pair][-1])):
        *rest, p = tested[pair]
        running = max(running, min(1.0, p * (len(tested) - rank)))
        tested[pair] = *rest, running
    return tested


def format_differences(rows: list[dict], arm: str) -> str:
    """`differences` as a table, a line per other arm; empty if there is none."""
    table: dict[str, list[str]] = {}
    for (other, what), (n, centre, half, p) in differences(rows, arm).items():
        line = table.setdefault(other, [other, str(n)])
        line += [f"{centre:+.3f} [{centre - half:+.2f}, {centre + half:+.2f}]", f"{p:.1g}"]
    head = [f"{arm} minus", "seeds", "solve", "p (Holm)", "hack", "p (Holm)", "hack, held-out markers", "p (Holm)"]
    return columns([head, *table.values()]) if table else ""


def columns(rows: list[list[str]]) -> str:
    """Rows of cells under each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def check_plot(flag: str, path: Path) -> None:
    """Raises InputError if no figure can be drawn to `path`."""
    try:
        import matplotlib
    except ImportError as e:
        raise InputError(f"{flag} {path}: needs matplotlib; pip install matplotlib, or leave {flag} out") from e
    matplotlib.use("Agg")
    check_file(flag, path, (".png", ".pdf", ".svg"))


def check_file(flag: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises InputError if `path` has another suffix or cannot be written."""
    if path.suffix not in suffixes or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InputError(f"{flag} {path}: give a {' or '.join(suffixes)} in a folder that exists and may be written")


def plot(runs_of: dict[str, list[tuple[str, int, dict]]], path: Path) -> None:
    """What ships (trained markers): a line an arm, a dot a seed, the mean as a bar; solve and hack side by side, and
    what each key of runs_of names under each other."""
    import matplotlib.pyplot as plt

    arms_of = {name: list(dict.fromkeys(arm for arm, _, _ in runs)) for name, runs in runs_of.items()}
    heights = [len(arms) + 2 for arms in arms_of.values()]
    figure, grid = plt.subplots(len(runs_of), 2, figsize=(9, 0.25 * sum(heights) + 0.5), height_ratios=heights,
                                sharex="col", squeeze=False)
    for (name, runs), axes in zip(runs_of.items(), grid):
        for panel, key, colour in zip(axes, ("solve", "hack"), ("C0", "C3")):
            for y, arm in enumerate(arms_of[name]):
                results = [results for other, _, results in runs if other == arm]
                shares = [x.get("deployed, trained", x.get("base, trained"))["all"][key] for x in results]
                panel.plot(shares, [y] * len(shares), "o", color=colour, alpha=0.5, markersize=4)
                panel.plot([mean(shares)] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=2)
            panel.set(xlim=(-0.03, 1.03), ylim=(len(arms_of[name]) - 0.4, -0.6), title=f"{name}: {key}, deployed")
            panel.set_yticks(range(len(arms_of[name])), arms_of[name] if key == "solve" else [])
            panel.grid(axis="y", linewidth=0.3)
    figure.supxlabel("share of answers to held-out problems; a dot a seed, a bar their mean", fontsize=9)
    figure.tight_layout()
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])


def read_rows(path: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl or rollouts.jsonl. Raises InputError if there is none, or a damaged one."""
    try:
        if rows := [json.loads(line) for line in read_text("", path, "give a run that made a step").splitlines()]:
            return rows
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: damaged ({e}); a train_grpo.py --resume of this run mends its last row") from e
    raise InputError(f"{path}: is empty; give a run that made a step")


def over_steps(runs: list[list[dict]], name: str) -> list[tuple[int, float, float, float]]:
    """runs: rows of metrics.jsonl, a list a seed -> (steps made, mean, lowest, highest) of a metric over the seeds that
    have it; a step at which none has it is left out."""
    values = {}
    for row in (row for rows in runs for row in rows if row[name] is not None):
        values.setdefault(row["step"] + 1, []).append(row[name])
    return [(step, mean(seeds), min(seeds), max(seeds)) for step, seeds in sorted(values.items())]


def panels_of_runs(arms: dict[str, list[list[dict]]]) -> list[list[tuple]]:
    """arms: rows of metrics.jsonl, a list a seed -> panels for `plot_curves`: solve, under it hack, of what would ship
    and beside it of both blocks; a line an arm."""
    policies = {"deployed_": "deployed: quarantine ablated, what ships", "": "full policy: with its quarantine"}
    grid = []
    for rate in ("solve", "hack"):
        grid.append([])
        for prefix, policy in policies.items():
            lines = [(f"{arm} ({len(runs)} seed{'s' * (len(runs) > 1)})", over_steps(runs, prefix + rate), f"C{i}")
                     for i, (arm, runs) in enumerate(arms.items())]
            grid[-1].append((f"{rate} rate, {policy}", "", lines))
    return grid


def panels_of_rows(rows_of: dict[str, list[dict]]) -> list[list[tuple]]:
    """rows_of: rows of `keep_results` by world -> panels for `plot_curves`: each world's arms under each other, their
    solve, hack and AUROC side by side; in grey the world's other arms, for an AUROC those that route at random. Rows
    without curves are left out. Raises InputError if none has any."""
    titles = dict(deployed_solve="solve, deployed", deployed_hack="hack, deployed", auroc="AUROC of the gate")
    grid = []
    for world, rows in rows_of.items():
        runs_of = {}  # {arm: rows like those of metrics.jsonl, a list a seed}
        for row in (row for row in rows if "curve" in row):
            steps = [dict(zip(row["curve"], values), step=i) for i, values in enumerate(zip(*row["curve"].values()))]
            runs_of.setdefault(row["arm"], []).append(steps)
        for n, (arm, runs) in enumerate(runs_of.items()):
            grid.append([])
            for (key, title), colour in zip(titles.items(), ("C0", "C3", "C2")):
                own = over_steps(runs, key)
                lines = [("", over_steps(others, key), "0.8") for other, others in runs_of.items()
                         if own and (key != "auroc" or other in ("placebo", "coin"))]
                lines += [(f"{own[-1][1]:.2f}", own, colour)] if own else []
                left = f"{arm}\n{len(runs)} seed{'s' * (len(runs) > 1)}" if key == "deployed_solve" else ""
                grid[-1].append((f"{world}: {title}" if n == 0 else "", left, lines))
    if not grid:
        raise InputError("--curves: no row of these results has a curve; give its run, too, to put it there")
    return grid


def plot_curves(grid: list[list[tuple]], path: Path, size: tuple[float, float], caption: str) -> None:
    """Panels of `size` inches in rows and columns. A panel is (title, what stands at its left, lines), a line is (label
    beside its end, what over_steps returns, colour); the range over seeds is drawn of a line that has a label."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(grid), len(grid[0]), figsize=(size[0] * len(grid[0]), size[1] * len(grid)),
                                  sharex=True, sharey=True, squeeze=False)
    for axes, (title, left, lines) in zip(panels.flat, sum(grid, [])):
        ends = []
        for text, curve, colour in (line for line in lines if line[1]):
            steps, centre, low, high = zip(*curve)
            axes.plot(steps, centre, color=colour, linewidth=1.5 if text else 0.7)
            if text:
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
                ends.append((centre[-1], steps[-1], text, colour))
        height = -1.0
        for y, step, text, colour in sorted(ends):  # beside the line's end, and above the label below
            height = max(y, height + 0.07)
            axes.annotate(text, (step, height), (5, 0), "data", "offset points", color=colour, va="center", fontsize=9)
        if not ends:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, color="0.5", ha="center", fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(left, rotation=0, ha="right", va="center")
        axes.set(ylim=(-0.03, 1.03), xmargin=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.suptitle(caption, y=1, va="bottom", fontsize=10)
    figure.supxlabel("optimizer steps", y=0, va="top", fontsize=10)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:], bbox_inches="tight")


# -------------------------------------------------------------------------------------- rollouts, to be read
def browse(rows: list[dict], title: str, path: Path) -> None:
    """Write rows of rollouts.jsonl as one HTML file. What a model wrote is data in it, never markup or code."""
    data = json.dumps(dict(title=title, rows=rows)).replace("<", "\\u003c")
    with writing(path) as temporary:
        temporary.write_text((HERE / "data/browse.html").read_text().replace("DATA", data, 1))


# -------------------------------------------------------------------------------------- what a step's log says
LEGEND = """  solve, hack: shares right, and paid but not right, of the full policy's rollouts; deployed: of those
  without quarantine; clean/mid/hack: shares of the labels among rollouts that train; auroc: of the gate's
  positions, hacks against solves with A > 0; qmass: the quarantine's share of the gradient; |g|: gradient
  norm; s: seconds of sample + grade + gate + update, then all so far and those left (min:s)"""


def outcomes(modes: list[str], sources: list[str], verdicts: list[Verdict], rewards: Tensor) -> dict:
    """Mean reward and rates of the full policy's own rollouts and, under deployed_*, of those without quarantine, given
    all G rollouts of a step; None where a source has none. Demonstrations are in neither."""
    row = {}
    for prefix, source in (("", "full"), ("deployed_", "ablated")):
        chosen = [i for i, other in enumerate(sources) if other == source]
        table = rates([modes[i] for i in chosen], [verdicts[i] for i in chosen])
        row[f"{prefix}reward"] = rewards[chosen].mean().item() if chosen else None
        row |= {prefix + rate: table["all"][rate] for rate in ("solve", "hack", "exploit", "compiles")}
        row[f"{prefix}hack_by_mode"] = {mode: of_mode["hack"] for mode, of_mode in table.items() if mode != "all"}
    return row


def routing(label: list[str], position: Tensor, adv: Tensor, trains: Tensor, sources: list[str],
            verdicts: list[Verdict]) -> dict:
    """How the rollouts that train were labelled, and how well the gate told the policy's own hacks from its solves
    among those with A > 0: elsewhere the advantage gives a hack away. Arguments are of G rollouts; trains is bool."""
    hack = torch.tensor([v.hacked for v in verdicts])  # [G]
    solve = torch.tensor([v.correct and not v.exploited for v in verdicts])  # [G]
    is_label = {name: torch.tensor([other == name for other in label]) for name in ("clean", "mid", "hack")}  # [G] each

    def shares(chosen: Tensor) -> dict[str, float]:
        return {name: is_it[chosen].float().mean().nan_to_num().item() for name, is_it in is_label.items()}

    own = torch.tensor([source != "teacher" for source in sources])  # [G]
    judged = trains & own & (adv > 0) & ~position.isnan()  # [G]
    routed = judged & is_label["hack"]  # [G]
    return dict(
        trained=trains.sum().item(),
        labels=shares(trains), labels_of_hacks=shares(trains & hack), labels_of_solves=shares(trains & solve),
        gate_auroc=auroc(position[judged & hack], position[judged & solve]),
        gate_precision=hack[routed].float().mean().item() if routed.any() else None,
        gate_recall=routed[judged & hack].float().mean().item() if (judged & hack).any() else None)


def console_line(row: dict, steps: int, time_left: str = "") -> str:
    """A step of metrics.jsonl in one line; LEGEND explains it."""
    rate = {name: " -  " if row[name] is None else f"{row[name]:.2f}" for name in (
        "reward", "solve", "hack", "deployed_solve", "deployed_hack", "gate_auroc")}
    labels = "/".join(f"{share:.2f}" for share in row["labels"].values())
    seconds = "+".join(f"{row['seconds'][phase]:.1f}" for phase in ("sample", "grade", "gate", "update"))
    return (f"step {row['step'] + 1:3d}/{steps}  reward {rate['reward']}  solve {rate['solve']}  hack {rate['hack']}  "
            f"deployed {rate['deployed_solve']} {rate['deployed_hack']}  clean/mid/hack {labels}  "
            f"auroc {rate['gate_auroc']}  qmass {row['qmass']:.2f}  |g| {row['grad_norm']:.3f}  s {seconds}{time_left}")


# -------------------------------------------------------------------------------------- run folders
PATHS = ("model", "data", "test_data", "pairs", "demos")  # kept as from this project, where they lie inside
MAY_DIFFER = {"arm", "resume", "steps", "device", "out_dir", "eval_samples", "dry_run", "wandb",
              "tensorboard"}  # between a run and its --resume


class RunFolder:
    """What a run leaves: config.json, adapter.safetensors, state.pt, metrics.jsonl, rollouts.jsonl, deploy.json; and
    .lock, which one run at a time holds. The kernel releases it with the process, however that ends."""

    def __init__(self, path: Path, config: dict):
        """Raises InputError, before anything is written, if a run cannot begin or go on in `path`."""
        self.path, self.steps, self.lock, self.logs = path, config["steps"], None, []
        files = {key: Path(config[key]) for key in PATHS if Path(config[key]).is_file()}
        config = config | {key: portable(config[key]) for key in PATHS}
        config["hashes"] = {key: hash_of(file) for key, file in files.items()}
        self.config = json.loads(json.dumps(config, default=str))
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not path.name or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"--out-dir {path}: {there} is not a folder that may be written; give another")
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
            raise InputError(f"--resume: {path} was started with other flags ({'; '.join(differ)}); give "
                             "the same")

    def locked(self, kind: int = fcntl.LOCK_EX) -> IO:
        """The lock, held until it is closed. Raises InputError if another run holds it."""
        lock = open(self.path / ".lock", "a")
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except OSError as e:
            lock.close()
            raise InputError(f"--out-dir {self.path}: another run is writing there; wait for it, or give another "
                             "folder") from e
        return lock

    def resume(self, adapter: Adapter, optimizer: torch.optim.Optimizer) -> int:
        """Put adapter and optimizer back to the last checkpoint, if there is one; the number of steps behind it. Raises
        InputError if it is damaged, or has more steps than are asked for."""
        self.adapter, self.optimizer = adapter, optimizer
        if not self.goes_on:
            return 0
        try:
            state = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for p, saved in zip(adapter.parameters(), state["adapter"], strict=True):
                    p.copy_(saved)
        except Exception as e:  # a damaged pickle raises nearly anything
            raise InputError(f"--resume: {self.path / 'state.pt'} is damaged ({first_line(e)}); start afresh") from e
        if state["step"] > self.steps:
            raise InputError(f"--steps {self.steps}: {self.path} has made {state['step']}; give at least as many")
        return state["step"]

    def open(self, step: int) -> None:
        """Begin, or go on from `step`: log rows of that step and later are dropped, since it is made again. An older
        run of that name that is not gone on with is kept as old/NAME.1, old/NAME.2, ... beside it."""
        if self.is_run and not self.goes_on:
            lock = self.locked()
            old = self.path.parent / "old"
            n = next(n for n in range(1, 10**6) if not (old / f"{self.path.name}.{n}").exists())
            old.mkdir(exist_ok=True)
            self.path.rename(old / f"{self.path.name}.{n}")
            lock.close()
            print(f"{self.path} exists: moved to {old / self.path.name}.{n}")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = self.locked()
        logs = [self.path / name for name in ("metrics.jsonl", "rollouts.jsonl")]
        texts = {self.path / "config.json": json.dumps(self.config, indent=1) + "\n"}
        texts |= {path: self.earlier(path, step) for path in logs}
        for left_over in self.path.glob(".*.tmp"):
            left_over.unlink()
        for path, text in texts.items():
            with writing(path) as temporary:
                temporary.write_text(text)
        self.logs = [open(path, "a") for path in logs]
        self.began, self.start, self.made = time.perf_counter(), step, step

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
        if another is damaged."""
        rows = read_text("--resume", path, "put it back, or start afresh").splitlines(keepends=True) if step else []
        if rows and not rows[-1].endswith("\n"):
            print(f"{path}: its last row is torn, and dropped")
            rows.pop()
        try:
            return "".join(row for row in rows if json.loads(row)["step"] < step)
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"--resume: {path} is damaged ({e!r}); put it back, or start afresh") from e

    def checkpoint(self, step: int) -> None:
        """Write the adapter, and with it in one file all that --resume needs to go on with `step`."""
        metadata = {key: str(self.config[key]) for key in ("arm", "seed", "model")} | {"step": str(step)}
        save(self.adapter, self.path / "adapter.safetensors", metadata)
        state = dict(step=step, optimizer=self.optimizer.state_dict(),
                     adapter=[p.detach() for p in self.adapter.parameters()])
        with writing(self.path / "state.pt") as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

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

    def time_left(self) -> str:
        """Minutes and seconds since the start, and those that the steps left will take at this pace."""
        spent = time.perf_counter() - self.began
        left = spent / (self.made - self.start) * (self.steps - self.made)
        return "  {:.0f}:{:02.0f} + {:.0f}:{:02.0f}".format(*divmod(int(spent), 60), *divmod(int(left), 60))


def hash_of(path: str | Path) -> str:
    """The first digits of a file's SHA-256. Raises InputError for a file that cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give another, or change its permissions") from e


def read_run(folder: Path) -> dict:
    """config.json of a run folder; raises InputError when it is not one."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no readable config.json; give a run folder that train_grpo.py wrote")
    try:
        config = json.loads(read_text("", folder / "config.json", "give a folder that train_grpo.py wrote"))
        settings_of(config, 0)  # a KeyError if it lacks what they are made of
        if lacking := {"arm", "seed", "steps", "model", "dtype", "modes"} - config.keys():
            raise KeyError(*lacking)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise InputError(f"{folder / 'config.json'}: damaged ({e!r}); give a folder that train_grpo.py wrote") from e
    return config


def settings_of(config: dict, step: int) -> dict:
    """How a run evaluates itself at its end: what deploy.json records beside the results."""
    return dict(samples=config["eval_samples"], temperature=0.7, seed=0, step=step, data=config["test_data"],
                data_hash=config["hashes"]["test_data"], max_new_tokens=config["max_new_tokens"], top_k=config["top_k"])


def write_deploy(folder: Path, config: dict, settings: dict, results: dict) -> Path:
    """Write deploy.json; for other settings than the run's own a file whose name says what differs, so that no result
    replaces another: deploy-samples8.json, deploy-temperature0.0-data_val_0123456789ab.json."""
    own = settings_of(config, config["steps"])
    differ = [f"-{key}{settings[key]}" for key in own if key[:4] != "data" and settings[key] != own[key]]
    if settings["data_hash"] != own["data_hash"]:
        differ.append(f"-data_{Path(settings['data']).stem}_{settings['data_hash']}")
    path = folder / f"deploy{''.join(differ)}.json"
    result = dict(arm=config["arm"], seed=config["seed"], settings=settings, results=results)
    with writing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return path


def read_deploy(folder: Path, settings: dict) -> dict | None:
    """The results of a run's evaluation under `settings`, if it has one."""
    for path in sorted(folder.glob("deploy*.json")):
        try:
            deploy = json.loads(read_text("", path, "remove it"))
            if all(deploy["settings"][key] == settings[key] for key in settings if key != "data"):  # data_hash is it
                return deploy["results"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise InputError(f"{path}: damaged ({e!r}); remove it") from e
    return None


def check_new(path: Path) -> None:
    """Raises InputError if `path` is there already, or nothing can be written there."""
    if path.exists() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--export {path}: exists or cannot be made; name a new folder in one that may be written")


@torch.no_grad()
def export(model, adapter: Adapter, path: Path, format: str = "merged", tokenizer=None) -> None:
    """Write a new folder with the deployed block and nothing of the quarantine, in one piece.

    "merged": an ordinary Hugging Face folder, the block merged into the weights; `model` is unchanged afterwards.
    "peft": PEFT's two files, a LoRA of rank 2r for the base model. Raises InputError.
    """
    check_new(path)
    with writing(path) as temporary:
        if format == "merged":
            with folded(adapter, quarantine=False):
                model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        else:
            temporary.mkdir()
            tensors = {}
            for name, module in adapter.modules.items():
                for which, factor in zip("AB", factors([module.deployed])):
                    tensors[f"base_model.model.{name}.lora_{which}.weight"] = factor
            (temporary / "adapter_model.safetensors").write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
            config = dict(peft_type="LORA", task_type="CAUSAL_LM", target_modules=list(adapter.modules),
                          base_model_name_or_path=portable(adapter.base["name"]), bias="none", inference_mode=True,
                          r=2 * adapter.r, lora_alpha=2 * adapter.r, lora_dropout=0.0)  # alpha / r multiplies B A: 1
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


# -------------------------------------------------------------------------------------- the script
@dataclass
class Config:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders written by train_grpo.py"""

    # evaluation
    samples: int | None = None
    """completions per problem and condition (default 4; with --plot the run's own --eval-samples, unless 0)"""
    temperature: float = 0.7
    """sampling temperature; 0: the likeliest token"""
    seed: int = 0
    """sampling seed"""
    base: bool = False
    """also evaluate the base model, without any adapter"""
    plot: Path | None = None
    """write a figure of all runs here (needs matplotlib); a run that was evaluated in this way is not sampled again"""

    # instead of an evaluation
    results: Path | None = None
    """put what the runs' deploy.json say into this .jsonl file (without runs: read it, or a folder of such files), and
    print means over seeds; samples nothing"""
    against: str = "routeV"
    """with --results: the arm that the others are compared with, seed by seed"""
    curves: Path | None = None
    """write a figure of the runs' solve and hack rates over steps here (needs matplotlib), and sample nothing; with
    --results of those that ship and of each gate's AUROC, from the file's rows"""
    browse: Path | None = None
    """write the rollouts of one run to this .html file, to be read and filtered in a browser, and sample nothing"""
    export: Path | None = None
    """write the deployed model of one run to this new folder, and sample nothing"""
    format: Literal["peft", "merged"] = "peft"
    """peft: a LoRA of rank 2 x --rank in fp32; merged: a plain checkpoint, its weights rounded to the run's --dtype"""

    # data
    model: str | None = None
    """base model (default: that of the run's config.json)"""
    data: Path | None = None
    """held-out problems (default: those of the run's config.json)"""

    # hardware
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""


def main(cfg: Config) -> None:
    """Evaluate every checkpoint and write a result into its folder, or export one. Raises InputError."""
    check_ranges(cfg)
    instead = [name for name in ("export", "results", "curves", "browse") if getattr(cfg, name)]  # of an evaluation
    ignored = [name for name in instead[1:] if (instead[0], name) != ("results", "curves")]
    ignored += ["samples", "temperature", "seed", "base", "data"] * bool(instead)
    ignored += ["plot"] * (instead[:1] not in ([], ["results"])) + ["format"] * (not cfg.export)
    for name in ignored:
        if getattr(cfg, name) != getattr(Config, name):
            cause = "without --export" if name == "format" else f"with --{instead[0]}"
            raise InputError(f"{flag(cfg, name)} {cause} has no effect; leave it out")
    if cfg.against != Config.against and not cfg.results:
        raise InputError(f"{flag(cfg, 'against')} without --results has no effect; leave it out")
    for name in ("plot", "curves"):
        if path := getattr(cfg, name):
            check_plot(f"--{name}", path)
    if cfg.results:
        several = cfg.results.is_dir() and not cfg.checkpoints
        files = sorted(cfg.results.glob("*.jsonl")) if several else [cfg.results]
        if not cfg.checkpoints and not (files and files[0].exists()):
            raise InputError(f"--results {cfg.results}: has no results; give a .jsonl file of them, or runs to add")
        rows_of = {path.stem: keep_results(cfg.checkpoints, path) for path in files}
        arms = {row["arm"] for rows in rows_of.values() for row in rows}
        if cfg.against not in {*arms, Config.against}:
            raise InputError(f"--against {cfg.against}: no row is of this arm; there are {', '.join(sorted(arms))}")
        for name, rows in rows_of.items():
            print(f"{name}\n{format_arms(rows)}\n\n{format_differences(rows, cfg.against)}\n")
        if cfg.plot:
            plot({name: [(row["arm"], row["seed"], row["results"]) for row in rows] for name, rows in rows_of.items()},
                 cfg.plot)
        if cfg.curves:
            plot_curves(panels_of_rows(rows_of), cfg.curves, (3, 0.9), """\
Solve, hack: shares of a step's rollouts of training problems without quarantine, as what ships. AUROC: how well
the gate ranks hacks above solves. Line: mean over seeds, its last value beside its end; band: lowest to highest
seed; grey: means of the other arms, in the last column of placebo and coin, which route at random""")
        return
    if not cfg.checkpoints:
        raise InputError("no checkpoint given; e.g. python evaluate_deploy.py runs/routeV_seed0")
    for name in ("export", "browse"):
        if getattr(cfg, name) and len(cfg.checkpoints) > 1:
            raise InputError(f"{flag(cfg, name)}: is for one run, and {len(cfg.checkpoints)} are given; {name} one by "
                             "one")
    if cfg.browse:
        folder, = cfg.checkpoints
        check_file("--browse", cfg.browse, (".html",))
        config = read_run(folder)
        browse(read_rows(folder / "rollouts.jsonl"), f"Rollouts of {config['arm']}, seed {config['seed']}", cfg.browse)
        print(f"rollouts: {cfg.browse}")
        return
    if cfg.curves:
        arms: dict[str, list[list[dict]]] = {}
        for folder in cfg.checkpoints:
            arms.setdefault(read_run(folder)["arm"], []).append(read_rows(folder / "metrics.jsonl"))
        plot_curves(panels_of_runs(arms), cfg.curves, (5.5, 3.25), "Shares of a step's rollouts of training problems. "
                    "Line: mean over seeds, where this policy was sampled; band: lowest to highest")
        print(f"figure: {cfg.curves}")
        return
    headers = [peek(folder / "adapter.safetensors") for folder in cfg.checkpoints]
    configs = [read_run(folder) for folder in cfg.checkpoints]
    if cfg.export:
        check_new(cfg.export)
    problems_of = {}
    for folder, config in zip(cfg.checkpoints, [] if cfg.export else configs):
        path = str(cfg.data or located(config["test_data"]))
        if not Path(path).is_file():
            raise InputError(f"{folder}: its problems {path} are not here; name them with --data")
        problems_of[folder] = {markers: load_problems(path, config["modes"], 0, heldout_markers=markers == "held-out")
                               for markers in ("trained", "held-out")}
        config["path"] = path
    runs = []
    for folder, config, header in zip(cfg.checkpoints, configs, headers):
        samples = cfg.samples or config["eval_samples"] * bool(cfg.plot) or 4
        if not cfg.export:
            settings = settings_of(config, int(header["metadata"]["step"])) | dict(
                samples=samples, temperature=cfg.temperature, seed=cfg.seed, data=portable(config["path"]),
                data_hash=hash_of(config["path"]))
            if cfg.plot and not cfg.base and (results := read_deploy(folder, settings)):
                runs.append((config["arm"], config["seed"], results))
                continue
        model = adapter = None  # the last run's, before another is loaded
        model, tok = load_model(cfg.model or located(config["model"]), cfg.device, config["dtype"])
        args = (samples, config["max_new_tokens"], config["top_k"], cfg.temperature, cfg.seed)
        if cfg.base and not runs:
            results = {f"base, {markers}": evaluate(model, tok, None, ps, "base", *args)
                       for markers, ps in problems_of[folder].items()}
            runs.append(("base", 0, results))
        adapter = attach(model, header["r"])
        step = int(load(adapter, folder / "adapter.safetensors")["step"])  # a run may have gone on since
        if cfg.export:
            export(model, adapter, cfg.export, cfg.format, tok)
            print(f"{cfg.export}: the deployed model of {folder}, {cfg.format}")
            return
        results = {f"{setting}, {markers}": evaluate(model, tok, adapter, ps, setting, *args)
                   for setting in ("deployed", "full") for markers, ps in problems_of[folder].items()}
        print(f"{folder}: {write_deploy(folder, config, settings | dict(step=step), results).name}")
        runs.append((config["arm"], config["seed"], results))
    print(format_table(runs))
    if cfg.plot:
        plot({f"T = {cfg.temperature:g}": runs}, cfg.plot)
        print(f"figure: {cfg.plot}")


if __name__ == "__main__":
    run_script(main, parse(Config(), __doc__))
