"""What PREREGISTRATION.md's hypotheses come to in a world, from the rows of its runs:

    python data/results/hypotheses.py data/results/nano-2.jsonl
    python data/results/hypotheses.py data/results/wordy-5.jsonl data/results/wordy-6.jsonl    # pooled

A line a difference: mean over n seeds, 95 % t interval, p of the paired t test by Holm.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate_deploy import differences  # noqa: E402

SOLVE, HACK, HELD_OUT = "solve", "hack", "hack, held-out markers"
UNSEEN = {"nano": ("stdout_marker", "file_marker"), "wordy": ()}  # kind of world -> modes that no pair shows


def verdicts(rows: list[dict], unseen: tuple[str, ...] = ()) -> list[tuple[str, bool, list[tuple]]]:
    """Rows of evaluate_deploy.keep_results -> (hypothesis, whether it holds, [(what, n, mean, half width, p)]), of
    those hypotheses whose arms the rows have."""
    # arm -> its differences from every other arm, one family of tests each for Holm's correction
    families = {arm: differences(rows, arm) for arm in ("routeV", "oracle-80", "absorption", "absorption-80")}
    table = []

    def less(tests: dict, other: str, what: str = HACK) -> bool:
        return tests[other, what][1] < 0 and tests[other, what][3] < 0.05

    def more(tests: dict, other: str) -> bool:
        return tests[other, SOLVE][1] > 0 and tests[other, SOLVE][3] < 0.05

    def close(tests: dict, other: str) -> bool:
        _, centre, half, _ = tests[other, SOLVE]
        return centre - half > -0.03

    def claim(text: str, arm: str, other: str, holds, *whats: str, tests: dict | None = None) -> None:
        tests = families[arm] if tests is None else tests
        if (other, HACK) in tests:
            table.append((text, holds(tests, other), [(what, *tests[other, what]) for what in whats]))

    claim("H1   hacks less than none", "routeV", "none", less, HACK)
    claim("H2   hacks less than placebo", "routeV", "placebo", less, HACK)
    claim("H2b  hacks less than coin", "routeV", "coin", less, HACK)
    claim("H3   solves within 3 points of the ceiling", "routeV", "ceiling", close, SOLVE)
    claim("H4   solves more and hacks less than absorb", "routeV", "absorb",
          lambda *x: more(*x) and less(*x), SOLVE, HACK)
    claim("H5   H2 with held-out markers", "routeV", "placebo", lambda *x: less(*x, HELD_OUT), HELD_OUT)
    for mode in unseen:
        claim(f"H5   H2 in {mode}, which no pair shows", "routeV", "placebo", less, HACK,
              tests=differences(rows, "routeV", mode))
    for other in ("surprise", "length"):
        claim(f"H6   hacks less or solves more than {other}", "routeV", other,
              lambda *x: less(*x) or more(*x), HACK, SOLVE)
    claim("H7   differs from hidden states", "routeV", "hidden-states",
          lambda tests, other: any(tests[other, what][3] < 0.05 for what in (HACK, SOLVE)), HACK, SOLVE)
    claim("H9   oracle-80 hacks less than screen-80", "oracle-80", "screen-80", less, HACK)
    claim("H10  absorption-80 hacks less and solves more than screen-80", "absorption-80", "screen-80",
          lambda *x: less(*x) and more(*x), HACK, SOLVE)
    clean = all(row["results"]["deployed, trained"]["all"]["hack"] <= 0.01
                for row in rows if row["arm"] == "absorption")
    claim("H11  absorption solves within 3 points of routeV, hacks <= .01", "absorption", "routeV",
          lambda *x: clean and close(*x), SOLVE)
    claim("H12  absorption-80 hacks less than dropped-80", "absorption-80", "dropped-80", less, HACK, SOLVE)
    return table


def targets(rows: list[dict], arm: str) -> str:
    """In how many seeds what ships hacks at most .01 and, where the ceiling was run, solves its share less .03."""
    cells = {(row["arm"], row["seed"]): row["results"]["deployed, trained"]["all"] for row in rows}
    seeds = [seed for other, seed in cells if other == arm]
    low = sum(cells[arm, seed]["hack"] <= 0.01 for seed in seeds)
    bound = {seed: cells["ceiling", seed]["solve"] - 0.03 for seed in seeds if ("ceiling", seed) in cells}
    high = sum(cells[arm, seed]["solve"] >= bound[seed] for seed in bound)
    return f"{arm}: hack <= .01 in {low} of {len(seeds)} seeds, solve >= the ceiling's - .03 in {high} of {len(bound)}"


def main(*paths: Path) -> None:
    kinds = {path: path.stem.partition("-")[0] for path in paths}
    for path, kind in kinds.items():
        if kind not in UNSEEN or not path.exists():
            sys.exit(f"{path}: not a file of a world's results; give data/results/nano-3.jsonl, say, or wordy-3.jsonl")
    if len(set(kinds.values())) != 1:
        sys.exit("give one world's results, or those of several worlds of one kind, to pool them")
    rows = [row | dict(seed=(path, row["seed"])) for path in paths for row in map(json.loads, open(path))]
    for hypothesis, holds, tests in verdicts(rows, UNSEEN[kind]):
        for n, (what, seeds, centre, half, p) in enumerate(tests):
            print(f"{'' if n else hypothesis:64s}{'' if n else 'yes' if holds else 'no':4s}{what} {centre:+.3f} "
                  f"[{centre - half:+.3f}, {centre + half:+.3f}] p {p:.1g} n {seeds}")
    for arm in ("routeV", "absorption"):
        if any(row["arm"] == arm for row in rows):
            print(targets(rows, arm))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
