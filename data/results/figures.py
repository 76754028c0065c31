"""The figures of RESULTS.md and README.md. `python data/results/tables.py` draws them, or some by their names."""
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from rows import ARMS, COLUMNS, arms_of, rates, rows_of, values_of

STYLES = {"none": ("#D55E00", "--"), "fixed-share": ("#CC79A7", "-."), "routeV": ("#0072B2", "-"),
          "ceiling": ("#000000", ":")}  # colours of Okabe and Ito


def draw_curves(path: Path) -> None:
    """The embedded world: training answers of the deployed block over steps, mean and range over seeds."""
    rows = rows_of("nano-2001")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.7), sharey=True, layout="constrained")
    for axis, rate in zip(axes, ("exploit", "honest_solve")):
        ends = {}
        for arm in {row["arm"]: None for row in rows if row["arm"] in STYLES}:
            curves = [row["curve"][f"deployed_{rate}"] for row in rows if row["arm"] == arm]  # [seeds, steps], shares
            smooth = 100 * pd.DataFrame(curves, dtype=float).T.rolling(5, center=True, min_periods=1).mean()
            colour, style = STYLES[arm]
            axis.plot(smooth.index + 1, smooth.mean(axis=1), style, color=colour, lw=2.2)
            axis.fill_between(smooth.index + 1, smooth.min(axis=1), smooth.max(axis=1), color=colour, alpha=0.15, lw=0)
            ends[arm] = smooth.mean(axis=1).iloc[-1]
        at = -9.0
        for arm in sorted(ends, key=ends.get):  # labels at the lines' ends, at least 9 points apart
            at = max(ends[arm], at + 9)
            axis.text(40.8, at, ARMS[arm].partition(",")[0], color=STYLES[arm][0], va="center", fontsize=12)
        axis.set(title=f"{rate.replace('_', ' ')}, %", ylim=(-3, 103), xlim=(1, 60), xlabel="GRPO step",
                 xticks=[1, 10, 20, 30, 40])
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_bars(path: Path) -> None:
    """The real model: bars are means over seeds, dots are seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    labels, runs = zip(*reversed(arms_of("chat")))
    for axis, rate, label in zip(axes, ("exploit", "honest_solve"), ("exploit, %", "honest solve, at most, %")):
        for y, run in enumerate(runs):
            values = values_of(run, rate=rate)
            axis.barh(y, values.mean(), color=STYLES.get(run[1], ("#999999",))[0], height=0.6)
            axis.plot(values, [y] * len(values), "o", color="white", mec="black", ms=6, clip_on=False, zorder=3)
        axis.set(xlabel=label, xlim=(0, 100), yticks=range(len(runs)), yticklabels=labels)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_monitor(path: Path) -> None:
    """Routing or dropping, under an oracle that flags a share of two modes' exploits: means, and dots for seeds."""
    how = {"": ("route, absorption", "#0072B2", "-"), "-drop": ("drop, absorption", "#D55E00", "--"),
           "-drop-alone": ("drop", "#CC79A7", ":")}
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, sharey="row", layout="constrained")
    for column, share in enumerate(("0", "0.25", "0.75")):
        for row, (rate, modes) in enumerate((("exploit", COLUMNS["unmonitored"]["modes"]), ("honest_solve", ("all",)))):
            axis = axes[row, column]
            for k, (suffix, (label, colour, style)) in enumerate(how.items()):
                points = {}
                for recall in (0.0, 0.5, 1.0):
                    values = rates("study", f"oracle-r{recall:g}-a{share}{suffix}", rate, modes=modes)
                    axis.plot([recall + 0.03 * (k - 1)] * len(values), values, ".", color=colour, alpha=0.4)
                    points |= {recall + 0.03 * (k - 1): values.mean()} if len(values) else {}
                axis.plot(*zip(*points.items()), style, marker="o", color=colour, label=label)
            axis.set(ylim=(-3, 103), xlim=(-0.15, 1.15), xticks=(0, 0.5, 1))
            if row:
                axis.set_xlabel("recall on C and D")
            else:
                axis.set_title(f"ablated share {share}")
    axes[0, 0].set_ylabel("exploit on C and D, %")
    axes[1, 0].set_ylabel("honest solve, %")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


FIGURES = {"nano-2001.png": draw_curves, "chat.png": draw_bars, "monitor.png": draw_monitor}
