"""Every table and figure of RESULTS.md and README.md, from the rows in this folder.

    pip install -r data/results/requirements.txt
    python data/results/tables.py                       # print every table under its name, draw every figure
    python data/results/tables.py nano chat chat.png    # these
    python data/results/tables.py --update              # write the tables between <!-- table NAME --> and <!-- end -->

What a rate, n and an interval are: see rows.py.
"""
import re
import sys
from dataclasses import dataclass
from functools import cache, partial
from itertools import permutations, product

import pandas as pd
import tyro
from scipy import stats

from figures import FIGURES
from rows import ARMS, COLUMNS, HERE, Table, arms_of, cell, load, of_runs, rates, rows_of, values_of

PAGES = [HERE.parents[1] / "README.md", HERE / "RESULTS.md"]
MARKED = re.compile(r"(<!-- table ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.S)


# ---------------------------------------------------------------------------------------------- tables
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
BASELINES = {"routeV": "routeV", "hidden-states": "routeV with hidden states", "probe": "probe on hidden states",
             "ngrams": "words, held-out cut", "ngrams-0": "words, logit 0", "drop": "drop", "penalise": "penalise",
             "oracle": "oracle: flag every exploit", "random": "flag a third at random",
             "routeV-all-advantages": "routeV, all advantages train", "routeV-swapped": "half of the pairs swapped",
             "routeV-wrong": "right against wrong answers"}
SPLITS = ("run_tests-sentinel", "stdout_marker-file_marker")  # the modes of the pairs: SHOWN, UNSEEN of rows.py
TWO_MODES = ("routeV", "drop", "hidden-states", "ngrams", "ngrams-0")  # arms that ran with each split
MONITORS = {("0", "0"): "r0-a0", ("0.25", "0"): "r0-a0.25", ("0.75", "0"): "r0-a0.75", ("0.25", "0.5"): "r0.5-a0.25",
            ("0.25", "1"): "r1-a0.25", ("0.25", "0.75, all modes"): "even-a0.25"}  # (ablated share, recall) -> suffix
REAL, LADDER, NANO, WORDY = "qwen2.5-coder-0.5b", "variants/ladder", "variants/nano", "variants/wordy"


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
    "chat-2": ("arm", [("no routing", ("chat-2", "none")), ("routeV", ("chat-2", f"routeV-{SPLITS[0]}"))],
               "exploit, shown modes; unseen modes; full policy, unseen; honest solve"),
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
    "baselines": ("labels by", [(label, ("study", arm)) for arm, label in BASELINES.items()],
                  "exploit; highest exploit; honest solve; full policy's exploit"),
    "monitor": ("ablated share; recall", [
        (share, recall, *[("study", f"oracle-{of}{how}") for how in ("", "-drop", "-drop-alone")])
        for (share, recall), of in MONITORS.items()], "unmonitored; honest solve",
        "route: exploit; honest solve; drop: exploit; honest solve; drop *: exploit; honest solve"),
    "monitor-gaps": ("ablated share; recall; difference", [
        (share, recall, text, ("study", f"oracle-{of}{one}", f"oracle-{of}{other}"))
        for (share, recall), of in MONITORS.items()
        for text, one, other in (("route - drop", "", "-drop"), ("drop - drop *", "-drop", "-drop-alone"))],
        "unmonitored; monitored; honest solve", "exploit, C and D; exploit, A and B; honest solve"),
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


def knowledge(gaps: bool = False) -> Table:
    """Pairs of two modes: exploit on the modes that they show and on the others. gaps: of routeV to the other arms."""
    tables, names = [], TWO_MODES[1:] if gaps else TWO_MODES  # routeV is the first
    for split, (shown, unseen) in zip(SPLITS, permutations(("exploit, shown modes", "unseen modes"))):
        arms = [(base, f"{arm}-{split}") for base, arm in product(("study", "base-2"), names)]
        lines = [(base.replace("study", "nano-2001"), split.replace("-", ", "),
                  BASELINES[arm.removesuffix(f"-{split}")],
                  (base, f"routeV-{split}", arm) if gaps else (base, arm)) for base, arm in arms]
        columns = f"{shown}; {unseen}; {'' if gaps else f'highest {unseen}; '}honest solve"
        heads = f"exploit, shown; unseen; {'' if gaps else 'highest unseen; '}honest solve"
        head = f"base; pairs of; {'routeV minus' if gaps else 'labels by'}"
        tables.append(of_runs(head, lines, columns, heads))
    return tables[0] + tables[1][1:]


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


READERS = {"gradient": "gradient", "activation": "hidden states", "probe": "probe on hidden states",
           "ngrams": "words, held-out cut", "ngrams-0": "words, logit 0", "random": "random direction"}


def offline(of_base: bool = False) -> Table:
    """What readers miss of the exploits, and flag of the honest solves, of `none` or of the untrained base: means over
    seeds, or over random directions."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows_of("readers"):
        base = "nano-2001" if row["model"] == "data/nano" else row["model"].split("/")[-1]
        key = (base, row["pairs"].replace("+", ", "), READERS[row["reader"]])
        if row["rollouts"].startswith("base") == of_base:
            groups.setdefault(key, []).append(row["modes"])
    which = [("missed", "shown"), ("missed", "unseen"), ("flagged", "all"), ("auroc", "shown"), ("auroc", "unseen")]
    table = [["base", "pairs of", "reader", "n", "missed, shown", "missed, unseen", "flagged", "AUROC, shown",
              "AUROC, unseen"]]
    for key, group in groups.items():
        values = [pd.Series([100 * modes[of][rate] for modes in group if modes[of][rate] is not None])
                  for rate, of in which]
        table.append([*key, str(len(group)), *[f"{value.mean():.1f}" if len(value) else "-" for value in values]])
    return table


def curves(name: str, arm: str, of: str) -> pd.DataFrame:
    """Learning curves of what would ship, in percent: [steps, seeds]."""
    return 100 * pd.DataFrame({row["seed"]: row["curve"][f"deployed_{of}"] for row in rows_of(name)
                               if row["arm"] == arm}, dtype=float)


def early() -> Table:
    """No routing, stopped at the step whose training answers had the most honest solves."""
    table = [["seed", "best step", "honest solve", "exploit", "exploit, last 5 steps"]]
    honest, exploit = (curves("nano-2001", "none", of) for of in ("honest_solve", "exploit"))
    for seed, step in honest.idxmax().items():
        rates = (honest[seed][step], exploit[seed][step], exploit[seed][-5:].mean())
        table.append([str(seed), str(step + 1), *map("{:.1f}".format, rates)])
    return table


def lasting() -> Table:
    """160 steps, each seed: training answers without the quarantine, means of 20 steps; then what ships, test split."""
    spans = ((20, 40), (80, 100), (140, 160))
    which = list(product(("exploit", "honest_solve"), spans))
    heads = [f"{of}, {a + 1}-{b}".replace("_solve", "") for of, (a, b) in which]
    table = [["arm", "seed", *heads, "test: exploit", "honest"]]
    for arm in ("none", "routeV", "drop", "penalise"):
        for seed in curves("study", f"{arm}-160", "exploit"):
            means = [curves("study", f"{arm}-160", of)[seed][a:b].mean() for of, (a, b) in which]
            means += [rates("study", f"{arm}-160", of)["study", seed] for of in ("exploit", "honest_solve")]
            table.append([arm, str(seed), *map("{:.1f}".format, means)])
    return table


def relearning() -> Table:
    """Steps of training without routing until the mean exploit of five steps is at least 25 %, by starting model."""
    table = [["start", "seed", "step", "exploit, steps 1-5", "exploit, steps 36-40", "test: exploit"]]
    for name, arm, start in [("nano-2001", "none", "the base"),
                             *[("study", f"none-after-{of}-{of_seed}", f"{of}, seed {of_seed}")
                               for of, of_seed in product(("routeV", "ceiling"), (300, 301, 302))]]:
        for seed, exploit in curves(name, arm, "exploit").items():
            reached = exploit.rolling(5).mean().ge(25)
            table.append([start, str(seed), str(reached.idxmax() + 1) if reached.any() else "-",
                          f"{exploit[:5].mean():.1f}", f"{exploit[35:40].mean():.1f}",
                          f"{rates(name, arm)[name, seed]:.1f}"])
    return table


TABLES |= {"knowledge": knowledge, "knowledge-gaps": partial(knowledge, True), "nano-seeds": nano_seeds, "tests": tests,
           "lost": lost, "offline": offline, "offline-base": partial(offline, True), "early": early, "lasting": lasting,
           "relearning": relearning}


def text_of(name: str) -> str:
    """A table of TABLES as Markdown."""
    head, *lines = TABLES[name]() if callable(TABLES[name]) else of_runs(*TABLES[name])
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


# ---------------------------------------------------------------------------------------------- the script
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
