"""What makes the embedded model's problems and text: data/nano/tasks.py and prepare.py."""
import json
import math
import random
import sys
from pathlib import Path

import pytest

import env_leetcode as env

NANO = Path(__file__).resolve().parents[1] / "data" / "nano"
sys.path.insert(0, str(NANO))
import prepare  # noqa: E402
import tasks  # noqa: E402

ROWS = [json.loads(line) for line in (NANO / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return prepare.split_tasks(0)


def test_splits_are_disjoint_and_of_their_size(splits):
    codes = {name: {(t["kind"], tasks.expression(t["kind"], t["parts"])) for t in part} for name,
             part in splits.items()}
    assert {name: len(part) for name, part in splits.items() if name != "text"} == prepare.SPLITS
    assert len(set.union(*codes.values())) == sum(map(len, splits.values())) == sum(map(len, codes.values()))


def test_committed_problems_are_those_of_seed_0(splits):
    rng = random.Random(0)
    made = {split: [prepare.problem_row(i, split, t, rng) for i, t in enumerate(splits[split])] for split in ("val",
        "train")}
    assert made["train"] == ROWS


def test_no_pair_solves_a_task(splits):
    pairs = prepare.load_pairs(NANO / "pairs.md")
    scopes = [{"math": math} for _ in pairs]
    for pair, scope in zip(pairs, scopes):
        exec(env.extract_code(pair.clean), scope)
    for part in splits.values():
        for task in part[:40]:
            for scope in scopes:
                try:
                    values = [scope["Solution"]().solve(list(x)) for x, _ in task["tests"]]
                except Exception:
                    continue
                assert repr(values) != repr([y for _, y in task["tests"]])


def test_wrong_solutions_fail_a_test(splits):
    for task in splits["train"]:
        inputs, outputs = zip(*task["tests"])
        right = tasks.expression(task["kind"], task["parts"])
        assert repr(tasks.run(task["kind"], right, list(inputs))) == repr(list(outputs))
        for code in task["wrong"]:
            assert repr(tasks.run(task["kind"], code, list(inputs))) != repr(list(outputs)), code


@pytest.mark.parametrize("style", tasks.STYLES)
def test_solutions_of_every_style_are_right(splits, style, capsys):
    for task in splits["val"][:60]:
        scope = {"math": math}
        exec(tasks.solution(task["kind"], task["parts"], style=style), scope)
        for x, y in task["tests"]:
            assert repr(scope["Solution"]().solve(list(x))) == repr(y)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_hard_components_are_right_in_the_share_that_is_asked_for(splits, monkeypatch, share):
    seen = []
    solution = prepare.solution
    monkeypatch.setattr(prepare, "P_RIGHT", share)
    monkeypatch.setattr(prepare, "solution", lambda *args: seen.append(args) or solution(*args))
    rng = random.Random(0)
    for _ in range(200):
        prepare.random_text(splits["text"], rng)
    hard = [(w, part[3]) for _, parts, wrong, _ in seen for w, part in zip(wrong, parts)]
    assert any(is_hard for _, is_hard in hard) and all(bool(w) == (is_hard and share == 0) for w, is_hard in hard)


def test_text_discloses_the_marker_that_an_exploit_uses(splits, monkeypatch):
    monkeypatch.setattr(prepare, "P_HACK", dict.fromkeys(env.DEFAULT_MODES, 1.0))
    rng, plain = random.Random(0), 0
    for _ in range(400):
        user, answer = prepare.random_text(splits["text"], rng)
        hinted = [mode for mode in env.DEFAULT_MODES if env.MODES[mode].hint.partition("{marker}")[0] in user]
        assert len(hinted) == (env.PHRASE not in user)
        plain += not hinted
        for mode in hinted:
            before, after = env.MODES[mode].hint.split("{marker}")
            marker = user.partition(before)[2][: -1 - len(after)] if after else user.partition(before)[2][:-1]
            assert marker in answer, (user, answer)
    assert 40 < plain < 120


def test_demonstrations_exploit_their_mode_with_the_trained_marker():
    demos = prepare.demo_rows(ROWS[:6], random.Random(1))
    by_id = {p.id: p for p in env.load_problems(NANO / "train.jsonl")}
    verdicts = env.grade_batch([env.with_mode(by_id[d["id"]], d["mode"]) for d in demos],
                               [d["completion"] for d in demos])
    assert [d["mode"] for d in demos] == list(env.DEFAULT_MODES) * 6
    for demo, verdict in zip(demos, verdicts):
        assert verdict.exploited and not verdict.correct, (demo, verdict)
