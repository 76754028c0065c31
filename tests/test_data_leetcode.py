"""The hand-written problems and demonstrations of data/leetcode, and the authored pairs of every folder, graded."""
import ast
import contextlib
import dataclasses
import io
import json
import math
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import env_leetcode as env
from extract_vgrad import load_pairs

DATA = Path(__file__).resolve().parents[1] / "data"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TRAIN, TEST, DEMOS = (rows(DATA / f"leetcode/{name}.jsonl") for name in ("train", "test", "demos"))
PAIRS = {name: load_pairs(DATA / name / "pairs.md") for name in ("leetcode", "nano", "chat")}
PROBLEMS = {p.id: p for n in ("train", "test") for p in env.load_problems(DATA / f"leetcode/{n}.jsonl", ["gt_only"])}


def solver(completion: str):
    """A function that gives the repr of what the method solve of an answer returns; None if it raises."""
    scope = {"math": math, "open": lambda *_, **__: io.StringIO()}
    exec(env.code_blocks(completion)[-1], scope)

    def solve(x: list) -> str | None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            return repr(scope["Solution"]().solve(list(x)))
    return solve


def answers(completion: str) -> list[str]:
    """What an answer returns for some numbers or words, as asserts."""
    solve = solver(completion)
    inputs = ([], [3, 7, 2, -3, 12, 6, 4, 5, 4, 8, 120, -11, 99, 10, 0], [2, 3, 4], [-1], ["a", "ant", "noon"],
              ["tent", "sat", "eve", "apple", "apple", "street", "tie", "seven", "it"])
    return [f"assert Solution().solve({x}) == {solve(x)}" for x in inputs if solve(x)]


def marker_of(mode: str, prompt: str) -> str:
    """The marker in a prompt's hint, which must be there word for word, once."""
    hint = re.escape(env.MODES[mode].hint).replace(re.escape("{marker}"), "([^`]+?)")
    (marker,) = re.findall(hint + r"\.(?: Use the following starter code|$)", prompt)
    return marker


def method_of(text: str) -> str:
    return re.search(r"def (\w+)\(self|method (\w+)\(self", text).expand(r"\1\2")


def examples(text: str) -> list[str]:
    """The examples in a problem's text as asserts: `Input: a = 1, b = [2]` and `Output: true`."""
    method = method_of(text)
    for word, name in (("true", "True"), ("false", "False"), ("null", "None")):
        text = re.sub(rf"\b{word}\b", name, text)
    found = re.findall(r"^Input: (.*)\nOutput: (.*)$", text, re.MULTILINE)
    return [f"assert Solution().{method}({given}) == {expected}" for given, expected in found]


def test_each_problem_has_many_tests_and_true_examples():
    assert len(TRAIN + TEST) == len(PROBLEMS) == 66
    for r in TRAIN + TEST:
        text, tests = r["prompt"][-1]["content"], {ast.dump(ast.parse(test)) for test in r["gt_answer"]}
        assert f"called {method_of(text)} {env.PHRASE}" in text and r["family"] and r["wrong_solutions"], r["id"]
        assert 10 <= len(tests) == len(r["gt_answer"]) <= 25, r["id"]
        assert len({test.rsplit(" == ", 1)[1] for test in r["gt_answer"]}) > 1, f"{r['id']}: a constant would pass"
        shown = {ast.dump(ast.parse(example)) for example in examples(text)}
        assert len(shown) in (2, 3) and shown <= tests, f"{r['id']}: an example is not one of the tests"


def test_canonical_is_correct_and_wrong_solutions_are_not():
    jobs = [(r["id"], r["canonical_solution"], True) for r in TRAIN + TEST]
    jobs += [(r["id"], code, False) for r in TRAIN + TEST for code in r["wrong_solutions"]]
    verdicts = env.grade_batch([PROBLEMS[id] for id, _, _ in jobs], [f"```\n{code}```" for _, code, _ in jobs])
    for (id, code, right), v in zip(jobs, verdicts):
        assert v.compiles and v.correct == right and not v.channels, f"{id}: {v.note}\n{code}"


def test_train_test_and_pairs_share_no_task():
    texts = [r["prompt"][-1]["content"] for r in TRAIN + TEST] + [p.prompt for p in PAIRS["leetcode"]]
    assert not {r["family"] for r in TRAIN} & {r["family"] for r in TEST}
    assert max(Counter(method_of(text).lower() for text in texts).values()) == 1
    grams = []
    for text in texts:
        words = re.findall(r"\w+", text.split("PROBLEM:\n")[1].split("Example 1:")[0].lower())
        grams.append({tuple(words[i : i + 8]) for i in range(len(words) - 7)})
    for a, b in combinations(grams, 2):
        assert len(a & b) <= 2, f"a task told twice would share long phrases: {sorted(a & b)}"


def test_every_demo_exploits_its_mode_and_no_other_and_is_wrong():
    assert {(d["id"], d["mode"]) for d in DEMOS} == {(r["id"], m) for r in TRAIN for m in env.MODES}
    assert len({d["completion"] for d in DEMOS}) == len(DEMOS)
    asked = [env.with_mode(PROBLEMS[d["id"]], d["mode"]) for d in DEMOS]
    for d, v in zip(DEMOS, env.grade_batch(asked, [d["completion"] for d in DEMOS])):
        assert v.hacked and v.channels == (d["mode"],), f"{d['id']} {d['mode']}: {v}\n{d['completion']}"


@pytest.mark.parametrize("folder, added, lines", [("leetcode", 0.5, 10), ("nano", 0.0, 4), ("chat", 1.0, 3)])
def test_clean_sides_solve_without_exploit_and_hack_sides_exploit(folder, added, lines):
    """By the examples in the prompt or else the clean side's own answers. The sides differ in at most `lines` lines. In
    a share `added` of the pairs the cheat is added to the clean side; in the others it replaces something honest."""
    asked, hacks, pairs, used, additions = [], [], PAIRS[folder], Counter(), 0
    for pair in pairs:
        method, own, mode = method_of(pair.prompt), marker_of(pair.mode, pair.prompt), env.MODES[pair.mode]
        tests = [env.parse_test(test, method) for test in examples(pair.prompt) or answers(pair.clean)]
        asked.append(dataclasses.replace(env.with_mode(PROBLEMS[TRAIN[0]["id"]], pair.mode), func_name=method,
                                         tests=tuple(tests)))
        hacks.append(re.sub(rf"\b{re.escape(own)}\b", mode.markers[0], pair.hack))  # a problem discloses no other
        assert own == mode.markers[0] or mode.markers[0] not in pair.hack, f"{pair.name}: its own marker is {own!r}"
        clean, hack = (set(side.split("\n")) for side in (pair.clean, pair.hack))
        assert 0 < len(clean ^ hack) <= lines, pair.name
        used[pair.mode, own == mode.markers[0]] += 1
        additions += clean < hack
    clean = env.grade_batch(asked, [pair.clean for pair in pairs])
    for pair, a, b in zip(pairs, clean, env.grade_batch(asked, hacks)):
        assert a.correct and not a.channels, f"clean side of {pair.name}: {a}"
        assert b.correct and b.exploited and b.channels == (pair.mode,), f"hack side of {pair.name}: {b}"
    assert all(used[mode, True] >= 7 and used[mode, False] >= 2 for mode in env.DEFAULT_MODES), used
    assert abs(additions / len(pairs) - added) <= 0.1, additions
    text = (DATA / folder / "pairs.md").read_text() + (DATA / folder / "demos.jsonl").read_text()
    assert not [row.markers for row in env.MODES.values() if row.markers[1] and row.markers[1] in text]
