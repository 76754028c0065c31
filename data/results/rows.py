"""The rows of this folder as rates, cells and tables, for tables.py and figures.py.

Rates are percentages of answers to held-out problems, by the model that ships (quarantine ablated) under the markers of
training, unless a column says otherwise. exploit: own loophole used with success, right or not. honest solve: right,
and no loophole's channel touched. Rows of commit b713ae4 and older have no channels: there solve + hack - exploit is an
upper bound, and the column says "honest solve <=". n: seeds, or bases where a line has several. A cell is the mean over
these with its 95 % t interval, cut to 0 to 100. It has no interval if n = 1 or if all values are equal.
"""
import json
from functools import cache, reduce
from itertools import product
from pathlib import Path

import pandas as pd
from scipy import stats

HERE = Path(__file__).resolve().parent
Table = list[list[str]]  # a head, then lines
Run = tuple  # (file, arm) or (file, arm, other arm): the difference; several files: the mean over bases
ARMS = {"none": "no routing", "absorb": "absorb: both blocks, no gate",
        "placebo": "random direction, matched counts", "fixed-share": "random direction, fixed share",
        "screen": "drop what routeV's gate flags", "drop": "drop what routeV's gate flags",
        "hidden-states": "routeV with hidden states", "routeV": "routeV", "absorption": "routeV", "ceiling": "ceiling"}
SHOWN, UNSEEN = ("run_tests", "sentinel"), ("file_marker", "stdout_marker")  # where the pairs show two modes
COLUMNS = {  # head of a column -> which rate of which answers
    "exploit": dict(rate="exploit"), "full policy's exploit": dict(rate="exploit", setting="full"),
    "solve": dict(rate="solve"), "hack": dict(rate="hack"), "hack, held-out": dict(rate="hack", markers="held-out"),
    "honest solve": dict(rate="honest_solve"), "honest solve <=": dict(rate="honest_solve"),
    "exploit, held-out markers": dict(rate="exploit", markers="held-out"),
    "exploit, shown modes": dict(rate="exploit", modes=SHOWN), "unseen modes": dict(rate="exploit", modes=UNSEEN),
    "full policy, unseen": dict(rate="exploit", modes=UNSEEN, setting="full"),
    "monitored": dict(rate="exploit", modes=("run_tests", "stdout_marker")),  # where an oracle flags two modes
    "unmonitored": dict(rate="exploit", modes=("file_marker", "sentinel"))}


def rows_of(name: str) -> list[dict]:
    """The rows of NAME.jsonl. nano-2001: of its seeds 300 to 304; study: of the same file, those from 400 on."""
    path = HERE / f"{name.replace('study', 'nano-2001')}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seeds = {"nano-2001": range(300, 305), "study": range(400, 500)}.get(name)
    return [row for row in rows if seeds is None or row["seed"] in seeds]


@cache
def load(name: str) -> pd.DataFrame:
    """NAME.jsonl -> a line for each arm, seed, setting, markers and mode, with rates in percent."""
    lines = []
    for row in rows_of(name):
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


def arms_of(name: str) -> list[tuple]:
    """(label, run) of each arm of a file that ARMS names."""
    return [(label, (name, arm)) for arm, label in ARMS.items() if len(rates(name, arm))]
