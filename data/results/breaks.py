"""How it breaks: one thing at a time made worse, and what then ships, by what the gate reads.

    python data/results/breaks.py            # the runs that are missing, two at a time (90 minutes); then the figure
    python data/results/breaks.py --draw     # the figure of what variants/breaks.jsonl holds

Nano, its validation split, seeds 20 to 22. Stopped and started again it goes on.
"""
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))
from evaluate_deploy import keep_results  # noqa: E402

RUNS, ROWS = HERE / "runs/breaks", HERE / "data/results/variants/breaks.jsonl"
SEEDS = (20, 21, 22)
READERS = {"gradient": "", "activation": "--score activation", "none": "--intervention none"}
LABELS = {"gradient": "gradient", "activation": "hidden states", "none": "no routing"}
PANELS = {  # what is made worse -> {how much: flags}; without flags it is the default
    "pairs": {"44": "", "20": "--pairs 20", "10": "--pairs 10", "5": "--pairs 5"},
    "modes with pairs": {"two": "", "run_tests": "--pairs run_tests", "sentinel": "--pairs sentinel"},
    "pairs with sides swapped": {"0": "", "4 of 44": "--pairs swapped-4", "11": "--pairs swapped-11"},
    "rank": {"32": "", "8": "--rank 8"},
    "steps": {"20": "--steps 20", "40": "", "120": "--steps 120"},
    "teachers": {"1/4": "", "none": "--mix-ratio 0"},
}


def pairs_of(text: str) -> dict[str, str]:
    """The text of pairs.md -> other files of pairs by name: fewer, evenly; of one mode; some with sides swapped."""
    head, *pairs = re.split(r"^(?=## )", text, flags=re.M)
    files = {str(n): [pairs[i * len(pairs) // n] for i in range(n)] for n in (20, 10, 5)}
    files |= {mode: [pair for pair in pairs if f" {mode}: " in pair] for mode in ("run_tests", "sentinel")}
    for n in (4, 11):
        swapped = {i * len(pairs) // n for i in range(n)}
        files[f"swapped-{n}"] = [re.sub("### (clean|hack)", lambda m: "### " + {"clean": "hack", "hack": "clean"}[m[1]],
                                        pair) if i in swapped else pair for i, pair in enumerate(pairs)]
    return {name: head + "".join(chosen) for name, chosen in files.items()}


def arm_of(reader: str, flags: str) -> str:
    """gradient-pairs-20"""
    return "-".join([reader, *re.findall(r"[\w.]+", flags)])


def run(reader: str, flags: str, seed: int, lock: Lock) -> None:
    """One run, and its row."""
    arm = arm_of(reader, flags)
    flags = READERS[reader] + re.sub(r"--pairs (\S+)", rf" --pairs {RUNS}/\1.md", f" {flags}")
    with open(RUNS / f"{arm}-{seed}.log", "a") as log:
        subprocess.run([sys.executable, "train_grpo.py", "--seed", str(seed), "--name", arm, "--resume", "--out-dir",
                        RUNS / f"{arm}-{seed}", "--test-data", "data/nano/val.jsonl", *flags.split()], cwd=HERE,
                       check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with lock:
        keep_results([RUNS / f"{arm}-{seed}"], ROWS)


def draw(path: Path) -> None:
    """A panel for each thing made worse, solve above hack; a line a reader through its means, a dot a seed."""
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    figure, grid = plt.subplots(2, len(PANELS), figsize=(2.3 * len(PANELS), 5), sharey=True, sharex="col",
                                width_ratios=[len(of_panel) for of_panel in PANELS.values()])
    for key, line in zip(("solve", "hack"), grid):
        for axes, (panel, of_panel) in zip(line, PANELS.items()):
            for colour, reader in zip(("C0", "C1", "0.6"), READERS):
                means = []
                for x, flags in enumerate(of_panel.values()):
                    shares = [row["results"]["deployed, trained"]["all"][key] for row in rows
                              if row["arm"] == arm_of(reader, flags)]
                    axes.plot([x] * len(shares), shares, "o", color=colour, alpha=0.4, markersize=4)
                    means += [(x, mean(shares))] if shares else []
                axes.plot(*zip(*means), color=colour, label=LABELS[reader])
                if len(means) == 1:  # no pairs and no quarantine without routing: the same everywhere
                    axes.axhline(means[0][1], color=colour)
            axes.set_xticks(range(len(of_panel)), of_panel)
            axes.set(ylim=(-0.03, 1.03), xmargin=0.15)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"{key}, deployed")
    for axes, panel in zip(grid[0], PANELS):
        axes.set_title(panel, fontsize=10)
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    if "--draw" not in sys.argv:
        RUNS.mkdir(parents=True, exist_ok=True)
        for name, text in pairs_of((HERE / "data/nano/pairs.md").read_text()).items():
            (RUNS / f"{name}.md").write_text(text)
        done = {(row["arm"], row["seed"]) for row in keep_results([], ROWS)}
        points = dict.fromkeys((reader, flags) for of_panel in PANELS.values() for reader in READERS
                               for flags in of_panel.values()  # no pairs and no quarantine without routing
                               if reader != "none" or not re.match("--pairs|--rank", flags))
        lock = Lock()
        with ThreadPoolExecutor(2) as pool:
            for made in [pool.submit(run, *point, seed, lock) for seed in SEEDS for point in points
                         if (arm_of(*point), seed) not in done]:
                made.result()
    if not ROWS.exists():
        sys.exit(f"{ROWS} is not there: run this without --draw first")
    draw(HERE / "data/results/breaks.png")


if __name__ == "__main__":
    main()
