"""Deploy evaluation: what a trained model does once its quarantine is removed.

    python evaluate_deploy.py runs/routeV_seed0                      # one checkpoint
    python evaluate_deploy.py runs/*_seed* --plot figure.png         # many: one table over arms and seeds, and a figure

Held-out problems, every mode, sampled at T = 0.7, in the same way for every arm:

    deployed   quarantine ablated: the model that ships       full   both blocks, as trained
    trained    the marker names of training are disclosed     held-out   other names: a memorised marker earns nothing

solve: the answer is right. hack: it is paid and not right. exploit: its loophole was used, whether it is right or not.
Intervals are 95 % Wilson intervals with n = the number of problems, as the samples of one problem are not independent.
"""
import json
import math
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from env_leetcode import Problem, Verdict, grade_batch, load_problems
from extract_vgrad import auroc
from lora2r import (Adapter, InputError, attach, encode_prompt, folded, generate, load, load_model, peek, run_script,
                    save)


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
    with folded(adapter, quarantine=setting == "full") if adapter else nullcontext(), ThreadPoolExecutor(1) as grader:
        grading = []  # of one part while the next is being sampled
        for part in (slice(i, i + 64) for i in range(0, len(problems), 64)):
            n = [samples] * len(problems[part])
            completions, _ = generate(model, tok, prompts[part], n, noise[part].flatten(0, 1), temperature, top_k)
            texts = [tok.decode(ids, skip_special_tokens=True) for ids in completions]
            grading.append(grader.submit(grade_batch, [p for p in problems[part] for _ in range(samples)], texts))
    verdicts = [v for future in grading for v in future.result()]
    table = rates([p.mode for p in problems for _ in range(samples)], verdicts)
    return {mode: dict(problems=row["n"] // samples, **row) for mode, row in table.items()}


def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


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
    for colour, arm in enumerate(sorted({arm for arm, _, _ in runs})):
        points = [results["deployed, trained"]["all"] for other, _, results in runs if other == arm]
        axes.scatter([p["hack"] for p in points], [p["solve"] for p in points], color=f"C{colour}",
                     label=f"{arm} (n = {len(points)} seeds)")
    axes.set(xlabel="deploy hack rate", ylabel="deploy solve rate", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
             title="Held-out problems, quarantine ablated, T = 0.7")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# -------------------------------------------------------------------------------------- what a step's log says
LEGEND = """  solve, hack: shares right, and paid but not right, of the full policy's rollouts; deployed: of those
  without quarantine; clean/mid/hack: shares of the labels among rollouts that train; auroc: of the gate's
  positions, hacks against solves with A > 0; qmass: the quarantine's share of the gradient; |g|: gradient
  norm; s: seconds of sample + grade + gate + update"""


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


def console_line(row: dict, steps: int) -> str:
    """A step of metrics.jsonl in one line; LEGEND explains it."""
    rate = {name: " -  " if row[name] is None else f"{row[name]:.2f}" for name in (
        "reward", "solve", "hack", "deployed_solve", "deployed_hack", "gate_auroc")}
    labels = "/".join(f"{share:.2f}" for share in row["labels"].values())
    seconds = "+".join(f"{row['seconds'][phase]:.1f}" for phase in ("sample", "grade", "gate", "update"))
    return (f"step {row['step'] + 1:3d}/{steps}  reward {rate['reward']}  solve {rate['solve']}  hack {rate['hack']}  "
            f"deployed {rate['deployed_solve']} {rate['deployed_hack']}  clean/mid/hack {labels}  "
            f"auroc {rate['gate_auroc']}  qmass {row['qmass']:.2f}  |g| {row['grad_norm']:.3f}  s {seconds}")


# -------------------------------------------------------------------------------------- run folders
class RunFolder:
    """What a run leaves: config.json, adapter.safetensors, state.pt, metrics.jsonl, rollouts.jsonl, deploy.json."""

    def __init__(self, path: Path, config: dict, adapter: Adapter, optimizer: torch.optim.Optimizer):
        self.path, self.adapter, self.optimizer = path, adapter, optimizer
        self.config = json.loads(json.dumps(config, default=str))

    def resume(self) -> int:
        """Put adapter and optimizer back to the last checkpoint; the number of steps that it has behind it. Raises
        InputError if there is none, or if the run was started with other flags."""
        try:
            state = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
            before = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as e:
            raise InputError(f"--resume: {self.path} has no readable state.pt and config.json ({e}); "
                             "name a run with --out-dir, or start afresh") from e
        keys = self.config.keys() - {"resume", "steps", "device", "out_dir"}
        differ = [f"{key} was {before.get(key)}, is {self.config[key]}" for key in sorted(keys)
                  if before.get(key) != self.config[key]]
        if differ:
            raise InputError(f"--resume: {self.path} was started with other flags ({'; '.join(differ)}); give the same")
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, saved in zip(self.adapter.parameters(), state["adapter"], strict=True):
                p.copy_(saved)
        return state["step"]

    def open(self, step: int) -> None:
        """Begin (step 0; an older run of that name is kept as NAME.1, NAME.2, ...) or go on from `step`: log rows of
        that step and later are dropped, since it is made again."""
        if step == 0 and self.path.exists():
            n = next(n for n in range(1, 10**6) if not self.path.with_name(f"{self.path.name}.{n}").exists())
            self.path.rename(self.path.with_name(f"{self.path.name}.{n}"))
            print(f"{self.path} exists: moved to {self.path.name}.{n}")
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        self.logs = []
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            rows = (self.path / name).read_text().splitlines(keepends=True) if step else []
            self.logs.append(open(self.path / name, "w"))
            self.logs[-1].writelines(row for row in rows if json.loads(row)["step"] < step)

    def checkpoint(self, step: int) -> None:
        """Write the adapter, and with it in one file all that --resume needs to go on with `step`."""
        metadata = {key: str(self.config[key]) for key in ("arm", "seed", "model")} | {"step": str(step)}
        save(self.adapter, self.path / "adapter.safetensors", metadata)
        state = dict(step=step, optimizer=self.optimizer.state_dict(),
                     adapter=[p.detach() for p in self.adapter.parameters()])
        torch.save(state, self.path / ".state.tmp")
        (self.path / ".state.tmp").replace(self.path / "state.pt")

    def log(self, metrics: dict, rollouts: list[dict]) -> None:
        """One row of metrics.jsonl and the step's rows of rollouts.jsonl."""
        for file, rows in zip(self.logs, ([metrics], rollouts)):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()


def read_run(folder: Path) -> dict:
    """config.json of a run folder; raises InputError when it is not one."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["arm"], config["model"], config["test_data"], config["modes"]
    except OSError as e:
        raise InputError(f"{folder}: no readable config.json; give a run folder that train_grpo.py wrote") from e
    except (ValueError, KeyError) as e:
        raise InputError(f"{folder / 'config.json'}: damaged ({e!r}); give a folder that train_grpo.py wrote") from e
    return config


def write_deploy(folder: Path, arm: str, seed: int, results: dict) -> None:
    """Write deploy.json: either the whole new one or, if that fails, the old one stays."""
    temporary = folder / ".deploy.json.tmp"
    temporary.write_text(json.dumps(dict(arm=arm, seed=seed, temperature=0.7, results=results), indent=1) + "\n")
    temporary.replace(folder / "deploy.json")


def export(model, adapter: Adapter, path: str | Path, tokenizer=None) -> None:
    """Write an ordinary Hugging Face folder: the deployed block merged into the weights, the quarantine left out.

    `model` is unchanged afterwards. Raises InputError if `path` is there already.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already; remove it or name another folder for the export")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with folded(adapter, quarantine=False):
            model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -------------------------------------------------------------------------------------- the script
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


def main(cfg: Config) -> None:
    if not cfg.checkpoints:
        raise InputError("no checkpoint given; e.g. python evaluate_deploy.py runs/routeV_seed0")
    configs = [read_run(folder) for folder in cfg.checkpoints]
    headers = [peek(folder / "adapter.safetensors") for folder in cfg.checkpoints]
    runs = []
    for folder, config, header in zip(cfg.checkpoints, configs, headers):
        model, tok = load_model(config["model"], cfg.device, config["dtype"])
        path, modes = cfg.data or config["test_data"], tuple(config["modes"])
        problems = {markers: load_problems(path, modes, 0, heldout_markers=markers == "held-out")
                    for markers in ("trained", "held-out")}
        args = (cfg.samples, config["max_new_tokens"], config["top_k"], cfg.temperature, cfg.seed)
        if cfg.base and not runs:
            results = {f"base, {markers}": evaluate(model, tok, None, ps, "base", *args)
                       for markers, ps in problems.items()}
            runs.append(("base", 0, results))
        adapter = attach(model, header["r"])
        load(adapter, folder / "adapter.safetensors")
        results = {f"{setting}, {markers}": evaluate(model, tok, adapter, ps, setting, *args)
                   for setting in ("deployed", "full") for markers, ps in problems.items()}
        write_deploy(folder, config["arm"], config["seed"], results)
        runs.append((config["arm"], config["seed"], results))
    print(format_table(runs))
    if cfg.plot:
        plot([run for run in runs if run[0] != "base"], cfg.plot)
        print(f"figure: {cfg.plot}")


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
