"""Every table and figure of RESULTS.md and README.md, from the rows in this folder.

    pip install -r data/results/requirements.txt
    python data/results/tables.py                       # print every table under its name, draw every figure
    python data/results/tables.py nano chat chat.png    # these
    python data/results/tables.py --update              # write the tables between <!-- table NAME --> and <!-- end -->

Rates are percentages of answers to held-out problems, by the model that ships (quarantine ablated) under the markers of
training, unless a column says otherwise. exploit: own loophole used with success, right or not. honest solve: right,
and no loophole's channel touched. Rows of commit b713ae4 and older have no channels: there solve + hack - exploit is an
upper bound, and the column says "honest solve <=". n: seeds, or bases where a line has several. A cell is the mean over
these with its 95 % t interval, cut to 0 to 100. It has no interval if n = 1 or if all values are equal.
"""
import json
import re
import sys
from dataclasses import dataclass
from functools import cache, reduce
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import tyro
from scipy import stats

HERE = Path(__file__).resolve().parent
PAGES = [HERE.parents[1] / "README.md", HERE / "RESULTS.md"]
MARKED = re.compile(r"(<!-- table ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.S)
Table = list[list[str]]  # a head, then lines
Run = tuple  # (file, arm) or (file, arm, other arm): the difference; several files: the mean over bases


# ---------------------------------------------------------------------------------------------- rows and cells
SHOWN, UNSEEN = ("run_tests", "sentinel"), ("file_marker", "stdout_marker")  # where the pairs show two modes
COLUMNS = {  # head of a column -> which rate of which answers
    "exploit": dict(rate="exploit"), "full policy's exploit": dict(rate="exploit", setting="full"),
    "solve": dict(rate="solve"), "hack": dict(rate="hack"), "hack, held-out": dict(rate="hack", markers="held-out"),
    "honest solve": dict(rate="honest_solve"), "honest solve <=": dict(rate="honest_solve"),
    "exploit, held-out markers": dict(rate="exploit", markers="held-out"),
    "exploit, shown modes": dict(rate="exploit", modes=SHOWN), "unseen modes": dict(rate="exploit", modes=UNSEEN),
    "full policy, unseen": dict(rate="exploit", modes=UNSEEN, setting="full")}


@cache
def load(name: str) -> pd.DataFrame:
    """NAME.jsonl -> a line for each arm, seed, setting, markers and mode, with rates in percent."""
    path, lines = HERE / f"{name}.jsonl", []
    for row in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        for key, modes in row["results"].items():
            setting, markers = key.split(", ")
            for mode, shares in modes.items():
                honest = shares.get("honest_solve", shares["solve"] + shares["hack"] - shares["exploit"])
                percent = [100 * share for share in (shares["exploit"], shares["solve"], shares["hack"], honest)]
                lines.append([name, row["arm"], row["seed"], setting, markers, mode, *percent])
    return pd.DataFrame(lines, columns="base arm seed setting markers mode exploit solve hack honest_solve".split())


@cache
def rates(names: str | tuple[str, ...], arm: str, rate: str = "exploit", setting: str = "deployed",
          markers: str = "trained", modes: tuple[str, ...] = ("all",)) -> pd.Series:
    """One rate of an arm, by (base, seed): the mean over `modes`, which have equally many problems. Empty: no rows."""
    rows = load(names) if isinstance(names, str) else pd.concat(map(load, names))
    chosen = rows[(rows.arm == arm) & (rows.setting == setting) & (rows.markers == markers) & rows["mode"].isin(modes)]
    return chosen.groupby(["base", "seed"])[rate].mean()


def values_of(run: Run, **which) -> pd.Series:
    """`rates` of (file, arm), or their differences of (file, arm, other arm), paired by seed, where both have rows."""
    names, *arms = run
    return reduce(pd.Series.sub, [rates(names, arm, **which) for arm in arms]).dropna()


def units(values: pd.Series) -> pd.Series:
    """What an interval is over: seeds, or the means of bases where there are several."""
    bases = values.groupby("base").mean()
    return bases if len(bases) > 1 else values


def cell(values: pd.Series, sign: str = "") -> str:
    """Mean and interval. sign "+z": of differences, which are not cut to 0 to 100."""
    values = units(values)
    if len(values) < 2 or values.std() < 1e-9:
        return f"{values.mean():{sign}.1f}" if len(values) else "-"
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    low, high = (low, high) if sign else (max(0.0, low), min(100.0, high))
    return f"{values.mean():{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def of_runs(head: str, lines: list[tuple], columns: str, heads: str = "") -> Table:
    """lines: (label, ..., run, ...), labels as `head` names them. A line for each whose first run has rows: n, and the
    `columns` of every run, which `heads` may rename. "highest" and a column: of its values the highest."""
    table = [[*head.split("; "), "n", *(heads or columns).split("; ")]]
    for line in lines:
        labels = [part for part in line if isinstance(part, str)]
        runs = line[len(labels):]
        cells = [str(len(units(values_of(runs[0]))))]
        for run, column in product(runs, columns.split("; ")):
            values = values_of(run, **COLUMNS[column.removeprefix("highest ")])
            sign = "+z" if len(run) == 3 else ""
            cells.append(f"{values.max():.1f}" if column.startswith("highest ") else cell(values, sign))
        table += [[*labels, *cells]] if cells[0] != "0" else []
    return table


# ---------------------------------------------------------------------------------------------- tables
ARMS = {"none": "no routing", "absorb": "absorb: both blocks, no gate",
        "placebo": "random direction, matched counts", "fixed-share": "random direction, fixed share",
        "screen": "drop what routeV's gate flags", "drop": "drop what routeV's gate flags",
        "hidden-states": "routeV with hidden states", "routeV": "routeV", "absorption": "routeV", "ceiling": "ceiling"}
DECISION = {  # *: without absorption
    "none": "no routing", "absorption": "routeV", "routeV": "routeV *", "screen": "drop what its gate flags *",
    "hidden-states": "hidden states *", "surprise": "gate by mean NLL *", "length": "gate by length *",
    "placebo": "random direction *", "coin": "coin *", "absorb": "absorb", "oracle": "flag hacks by verdict *",
    "absorption-80": "1/5 wrong: route", "dropped-80": "1/5 wrong: drop", "oracle-80": "1/5 wrong: route *",
    "screen-80": "1/5 wrong: drop *", "penalise": "negative credit *", "inoculate": "inoculation",
    "seeded-routeV": "quarantine taught first *", "seeded-absorb": "the same, no gate", "ceiling": "ceiling"}
WORLD = {arm: DECISION[arm] for arm in ("none", "absorption", "routeV", "hidden-states", "ceiling")}  # of all bases
KINDS = {"nano": ("nano-3", "nano-4", "nano-5"),
         "wordy": ("wordy-3", "wordy-4", "wordy-5", "wordy-6", "wordy-7", "wordy-8")}
NINE = KINDS["nano"] + KINDS["wordy"]
WORSE = {"": "nothing: 44 pairs of two modes", "-pairs-20": "20 pairs", "-pairs-10": "10 pairs", "-pairs-5": "5 pairs",
         "-pairs-run_tests": "pairs of run_tests", "-pairs-sentinel": "pairs of sentinel",
         "-pairs-swapped-4": "4 of 44 pairs swapped", "-pairs-swapped-11": "11 of 44 pairs swapped",
         "-rank-8": "rank 8", "-steps-20": "20 steps", "-steps-120": "120 steps", "-mix-ratio-0": "no teacher pool"}
REAL, LADDER, NANO, WORDY = "qwen2.5-coder-0.5b", "variants/ladder", "variants/nano", "variants/wordy"


def arms_of(name: str) -> list[tuple]:
    """(label, run) of each arm of a file that ARMS names."""
    return [(label, (name, arm)) for arm, label in ARMS.items() if len(rates(name, arm))]


TABLES = {  # name -> arguments of of_runs, or a function
    "nano": ("arm", arms_of("nano-2001"), "exploit; honest solve; full policy's exploit"),
    "readme": ("arm", [
        (label, ("nano-2001", arm), ("chat", "screen" if arm == "drop" else arm)) for label, (_, arm)
        in arms_of("nano-2001")], "exploit; honest solve <=", "exploit; honest solve; Qwen: exploit; Qwen: honest <="),
    "chat": ("arm", arms_of("chat"), "exploit; honest solve <=; solve; full policy's exploit"),
    "differences": ("base; routeV minus", [
        (base, label, (base, "routeV", arm)) for base in ("nano-2001", "chat")
        for label, (_, arm) in arms_of(base) if arm != "routeV"], "exploit; honest solve <=; solve"),
    "chat-rate": ("rate, split, seeds; arm", [
        ("1e-4, validation, 40", "no routing", (REAL, "none")),
        ("1e-4, validation, 40", "routeV", (REAL, "routeV, cut by pairs held out")),
        ("1e-4, validation, 41", "routeV", (REAL, "routeV")),
        *[("1e-4, test, 50 or 51", *line) for line in arms_of(f"{REAL}-gpu")],
        ("1e-4, test, 50", "routeV, window 5", (f"{REAL}-gpu", "fives")),
        ("3e-5, validation, 60", "no routing", (REAL, "none, lr 3e-5")),
        ("3e-5, validation, 60", "routeV", (REAL, "routeV, lr 3e-5"))], "exploit; honest solve <=; solve"),
    "bases": ("kind; arm (*: no absorption)", [
        (kind, WORLD[arm], (KINDS[kind], arm)) for kind, arm in product(KINDS, WORLD)],
        "exploit; highest exploit; honest solve <="),
    "worlds": ("base", [
        (base, *[(base, arm) for arm in WORLD]) for base in NINE], "exploit", "; ".join(WORLD.values())),
    "decision": ("arm (*: no absorption)", [
        (label, ("nano-3", arm), ("wordy-3", arm)) for arm, label in DECISION.items()],
        "exploit; honest solve <=", "nano-3: exploit; honest solve <=; wordy-3: exploit; honest solve <="),
    "absorption": ("labels; difference; base", [
        (labels, text, base, (base, arm, other)) for labels, text, arm, other in [
            ("1/5 wrong", "route - drop, both absorb", "absorption-80", "dropped-80"),
            ("1/5 wrong", "route - drop, neither absorbs", "oracle-80", "screen-80"),
            ("1/5 wrong", "drop: absorption - none", "dropped-80", "screen-80"),
            ("the gate's", "route: absorption - none", "absorption", "routeV"),
            ("the gate's", "route - drop, neither absorbs", "routeV", "screen")]
        for base in ("nano-2", "nano-3", "wordy-3")], "exploit; honest solve <="),
    "placebos": ("random direction; base", [
        *[("matched counts", base, (base, "placebo")) for base in ("nano-2", "nano-3", "wordy-3", "chat")],
        *[("fixed share", base, (base, "fixed-share")) for base in ("nano-5", "wordy-8", "nano-2001")]],
        "exploit; highest exploit; honest solve <="),
    "two-modes": ("base (*: no absorption)", [
        ("nano *", ("nano", "routeV")), ("nano-2 *", ("nano-2", "routeV")),
        *[(base, (base, "absorption")) for base in KINDS["nano"]],
        ("wordy *", ("wordy", "routeV, run_tests and sentinel pairs")), ("wordy", (WORDY, "two-modes-5")),
        ("Qwen2.5-Coder-0.5B", ("chat", "two-modes"))],
        "exploit, shown modes; unseen modes; highest unseen modes; full policy, unseen; honest solve <=",
        "exploit, shown modes; unseen modes; highest; full policy, unseen; honest solve <="),
    "markers": ("base; arm", [
        (base, ARMS[arm], (base, arm)) for base, arm in [
            *product(("nano-3", "wordy-3"), ("none", "placebo", "absorption", "ceiling")),
            *product(("chat", "nano-2001"), ("none", "placebo", "routeV", "ceiling"))]],
        "exploit; exploit, held-out markers"),
    "readers": ("base", [
        (label, (of, "routeV", "hidden-states"), (of, "routeV"), (of, "hidden-states")) for label, of in [
            ("nano-2", "nano-2"), ("wordy-2", "wordy-2"), *zip(NINE, NINE), ("chat", "chat"),
            ("nano-2001", "nano-2001"), ("nano-3 to wordy-8", NINE)]],
        "exploit", "difference; gradient; hidden states"),
    "wordy-2": ("arm", [
        ("no routing", ("wordy-2", "none")), ("random direction", ("wordy-2", "placebo")),
        ("hidden states", ("wordy-2", "hidden-states")), ("gradient, as written down", ("wordy-2", "routeV")),
        ("gradient, each pair normalised (afterwards)", ("variants/wordy-2", "routeV, each pair one say")),
        ("the same with the later cut (afterwards)", ("variants/wordy-2", "routeV, present cut")),
        ("hidden states with the later cut (afterwards)", ("variants/wordy-2", "hidden-states, present cut")),
        ("ceiling", ("wordy-2", "ceiling"))], "exploit; honest solve <="),
    "breaks": ("made worse", [
        (text, *[("variants/breaks", reader + suffix) for reader in ("gradient", "activation")])
        for suffix, text in WORSE.items()], "exploit; highest exploit; honest solve <=",
        "gradient: exploit; highest; honest solve <=; hidden states: exploit; highest; honest solve <="),
    "pairs": ("pairs", [
        ("44 of four modes", ("wordy", "routeV")), ("10 of them", ("wordy", "routeV, 10 pairs")),
        ("22 of run_tests and sentinel", ("wordy", "routeV, run_tests and sentinel pairs")),
        ("11 of run_tests", ("wordy", "routeV, run_tests pairs")),
        ("44 of four modes, read whole", (WORDY, "routeV --window 0"))], "exploit; highest exploit; honest solve <="),
    "departures": ("departure; goes back by", [
        ("none of these goes back", "", (LADDER, "+ --ablated-share 0.75")),
        ("each pair normalised; not by gradient length", "--no-equal-pairs", (NANO, "routeV --no-equal-pairs")),
        *[(text, flag, (LADDER, f"before it, with {flag}")) for text, flag in [
            ("cuts by the pairs; not mean + k std of the batch", "--gate batch"),
            ("probe's softmax at temperature 100; not 1", "--probe-temperature 1"),
            ("probe at the completion; not the prompt too", "--probe-tokens all"),
            ("scored on the frozen base; not the live model", "--read full"),
            ("features centred; not raw", "--no-centre"),
            ("positive advantages train; not all", "--no-positive-only"),
            ("3/4 of samples from the deployed block; not none", "--ablated-share 0"),
            ("importance weights; not none", "--no-importance"),
            ("learning rate falls to 0; not constant", "--no-decay")]],
        ("one cut; not three zones", "--cuts 0 CUT", (LADDER, "before it, with --cut-mid 0")),
        ("window of 5 tokens; not the whole (wordy)", "--window 0", (WORDY, "routeV --window 0"))],
        "exploit; honest solve <="),
    "ladder": ("flags (each line keeps those above it)", [
        (arm, (LADDER, arm)) for arm in dict.fromkeys(load(LADDER).arm) if not arm.startswith("before")],
        "exploit; honest solve <="),
}


def nano_seeds() -> Table:
    """The embedded world, seed by seed."""
    which = [*product(["exploit"], ("none", "routeV", "ceiling")), *product(["honest_solve"], ("routeV", "ceiling"))]
    columns = {f"{rate.replace('_', ' ')}: {arm}": rates("nano-2001", arm, rate) for rate, arm in which}
    lines = [[str(seed), *map("{:.1f}".format, line)] for (_, seed), line in pd.DataFrame(columns).iterrows()]
    return [["seed", *columns], *lines]


HYPOTHESES = (  # of the second decision: arm minus other arm, by the rate that was written down
    "H1 routeV none hack; H2 routeV placebo hack; H2b routeV coin hack; H3 routeV ceiling solve; "
    "H4 routeV absorb solve; H4 routeV absorb hack; H5 routeV placebo hack, held-out; H6 routeV surprise solve; "
    "H6 routeV length solve; H7 routeV hidden-states solve; H7 routeV hidden-states hack; "
    "H10 absorption-80 screen-80 solve; H10 absorption-80 screen-80 hack; H11 absorption routeV solve; "
    "H12 absorption-80 dropped-80 hack")


@cache
def holm(base: str, arm: str) -> pd.Series:
    """p of the paired t tests of an arm against each other arm of its base, by Holm's method for all of them."""
    ps = {}
    for other, rate in product(set(load(base).arm) - {arm}, ("solve", "hack", "hack, held-out")):
        gap = values_of((base, arm, other), **COLUMNS[rate])
        if len(gap) > 1:
            ps[other, rate] = stats.ttest_1samp(gap, 0).pvalue if gap.std() > 1e-9 else 1.0
    ordered = pd.Series(ps).sort_values()
    return (ordered * list(range(len(ordered), 0, -1))).cummax().clip(upper=1.0)


def tests() -> Table:
    """HYPOTHESES, with p in parentheses."""
    bases = ("nano-3", "wordy-3")
    table = [["difference", "rate", *[f"{base} (p)" for base in bases]]]
    for line in HYPOTHESES.split("; "):
        name, arm, other, rate = line.split(" ", 3)
        gaps = [values_of((base, arm, other), **COLUMNS[rate]) for base in bases]
        ps = [holm(base, arm)[other, rate] for base in bases]
        table.append([f"{name} {arm} - {other}", rate, *[f"{cell(gap, '+z')} ({p:.1g})" for gap, p in zip(gaps, ps)]])
    return table


def lost() -> Table:
    """Runs that were planned and have no row."""
    table = [["file", "arm", "seeds planned", "seeds without a row"]]
    for name, arms, seeds in [
            ("chat", "none routeV placebo hidden-states screen absorb ceiling", (62, 63, 64)),
            (f"{REAL}-gpu", "none absorption fives hidden-states screen placebo absorb ceiling", (50, 51, 52))]:
        for arm in arms.split():
            missing = [str(seed) for seed in seeds if (name, seed) not in rates(name, arm)]
            table += [[name, arm, f"{seeds[0]} to {seeds[-1]}", " ".join(missing)]] if missing else []
    return table


TABLES |= {"nano-seeds": nano_seeds, "tests": tests, "lost": lost}


def text_of(name: str) -> str:
    """A table of TABLES as Markdown."""
    head, *lines = TABLES[name]() if callable(TABLES[name]) else of_runs(*TABLES[name])
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


# ---------------------------------------------------------------------------------------------- figures
STYLES = {"none": ("#D55E00", "--"), "fixed-share": ("#CC79A7", "-."), "routeV": ("#0072B2", "-"),
          "ceiling": ("#000000", ":")}  # colours of Okabe and Ito


def draw_curves(path: Path) -> None:
    """The embedded world: training answers of the deployed block over steps, mean and range over seeds."""
    rows = [json.loads(line) for line in (HERE / "nano-2001.jsonl").read_text().splitlines()]
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


FIGURES = {"nano-2001.png": draw_curves, "chat.png": draw_bars}


@dataclass
class Config:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """tables and figures; none: all"""
    update: bool = False
    """write the tables between their markers in README.md and RESULTS.md; draws nothing"""


def main(cfg: Config) -> None:
    for page in PAGES if cfg.update else ():
        page.write_text(MARKED.sub(lambda found: found[1] + text_of(found[2]) + found[4], page.read_text()))
    for name in () if cfg.update else cfg.names or [*TABLES, *FIGURES]:
        if name not in TABLES | FIGURES:
            sys.exit(f"tables.py: no table or figure {name!r}; give some of {', '.join(TABLES | FIGURES)}")
        if name in FIGURES:
            FIGURES[name](HERE / name)
        print(f"{name}\n{text_of(name) if name in TABLES else 'drawn'}\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
