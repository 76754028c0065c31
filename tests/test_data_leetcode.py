"""The hand-written problems, demonstrations and authored pairs of data/leetcode, graded by the real environment."""
import ast
import json
import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

import pytest

import env_leetcode as env
from extract_vgrad import load_pairs

DATA = Path(__file__).resolve().parents[1] / "data/leetcode"
UNCOVERED = {"eq_override", "exit_code"}


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


TRAIN, TEST, DEMOS, PAIRS = rows("train.jsonl"), rows("test.jsonl"), rows("demos.jsonl"), load_pairs(DATA / "pairs.md")
ALL = TRAIN + TEST


def fenced(code):
    return f"```python\n{code}```"


def problems():
    """id -> Problem, without a loophole."""
    names = ("train.jsonl", "test.jsonl")
    return {p.id: p for name in names for p in env.load_problems(DATA / name, modes=["gt_only"])}


def story(text):
    """A problem's text without the words around it that all problems share."""
    return text.split("PROBLEM:\n")[1].split("Example 1:")[0].strip()


def example_tests(text, name):
    """The examples in a problem's text as asserts: `Input: a = 1, b = [2]` and `Output: true`."""
    found = re.findall(r"^Input: (.*)\nOutput: (.*)$", text, re.MULTILINE)
    json_names = {"true": "True", "false": "False", "null": "None"}

    def python(literal):
        tree = ast.parse(literal, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in json_names:
                node.id = json_names[node.id]
        return ast.unparse(tree)

    return [f"assert {python(f'Solution().{name}({given})')} == {python(expected)}" for given, expected in found]


def test_schema_and_counts():
    assert len(TRAIN) >= 40 and len(TEST) >= 20
    assert len({r["id"] for r in ALL}) == len({r["func_name"] for r in ALL}) == len(ALL), "ids and names are unique"
    for split, part in (("train", TRAIN), ("test", TEST)):
        for r in part:
            assert r["split"] == split and r["family"] and r["difficulty"] in ("easy", "medium"), r["id"]
            assert [m["role"] for m in r["prompt"]] == ["system", "user"], r["id"]
            assert r["prompt"][1]["content"] == r["question"], r["id"]
            assert r["question"].count(env.PHRASE) == 1, r["id"]
            assert f"called {r['func_name'].removeprefix('Solution().')} {env.PHRASE}" in r["question"], r["id"]
            assert r["prompt_metadata"]["starter_code"].rstrip() in r["question"], r["id"]
            assert r["gt_answer"] == r["answer"] and 10 <= len(r["gt_answer"]) <= 25, r["id"]
            assert len(set(r["gt_answer"])) == len(r["gt_answer"]), f"{r['id']}: tests repeat"
            assert len(r["wrong_solutions"]) in (1, 2, 3), r["id"]
            answers = Counter(t.rsplit(" == ", 1)[1] for t in r["gt_answer"])
            assert len(answers) > 1, f"{r['id']}: a constant would pass"


def test_canonical_is_correct_and_wrong_solutions_are_not():
    by_id = problems()
    jobs = [(by_id[r["id"]], fenced(r["canonical_solution"]), True) for r in ALL]
    jobs += [(by_id[r["id"]], fenced(code), False) for r in ALL for code in r["wrong_solutions"]]
    verdicts = env.grade_batch([j[0] for j in jobs], [j[1] for j in jobs])
    for (problem, code, right), v in zip(jobs, verdicts):
        assert v.compiles and v.correct == right and not v.channels, f"{problem.id}: {v.note}\n{code}"


def test_examples_in_the_text_are_true():
    for r in ALL:
        name = r["func_name"].removeprefix("Solution().")
        examples = example_tests(r["question"], name)
        assert 2 <= len(examples) <= 3, r["id"]
        known = {ast.dump(ast.parse(t)) for t in r["gt_answer"]}  # which the canonical solution passes
        for t in examples:
            assert ast.dump(ast.parse(t)) in known, f"{r['id']}: the example {t} is not one of the tests"


def test_train_test_and_pairs_share_no_task():
    texts = {r["id"]: story(r["question"]) for r in ALL} | {p.name: story(p.prompt) for p in PAIRS}
    assert len(texts) == len(ALL) + len(PAIRS)
    assert not {r["family"] for r in TRAIN} & {r["family"] for r in TEST}
    names = [r["func_name"].removeprefix("Solution().") for r in ALL]
    names += [re.search(r"def (\w+)\(self", p.prompt)[1] for p in PAIRS]
    assert max(Counter(n.lower() for n in names).values()) == 1
    words = {k: re.findall(r"\w+", v.lower()) for k, v in texts.items()}
    grams = {k: {tuple(w[i : i + 8]) for i in range(len(w) - 7)} for k, w in words.items()}
    for a, b in combinations(texts, 2):  # a task told twice would share long phrases
        assert len(grams[a] & grams[b]) <= 2, f"{a} and {b} share {sorted(grams[a] & grams[b])}"
    for a in ({r["id"] for r in TRAIN}):
        for b in ({r["id"] for r in TEST}):
            matcher = SequenceMatcher(None, words[a], words[b], autojunk=False)
            assert matcher.quick_ratio() < 0.6 or matcher.ratio() < 0.4, f"{a} and {b} tell the same story"


@pytest.mark.parametrize("heldout", [False, True])
def test_partition_over_all_modes_is_even(heldout):
    for name in ("train.jsonl", "test.jsonl"):
        shares = Counter(p.mode for p in env.load_problems(DATA / name, modes=env.MODES, heldout_markers=heldout))
        assert set(shares) == set(env.MODES) and max(shares.values()) - min(shares.values()) <= 1


def test_every_demo_exploits_its_mode_and_no_other_and_is_wrong():
    assert {(d["id"], d["mode"]) for d in DEMOS} == {(r["id"], m) for r in TRAIN for m in env.MODES}
    assert len({d["completion"] for d in DEMOS}) == len(DEMOS)
    by_id = problems()
    asked = [env.with_mode(by_id[d["id"]], d["mode"]) for d in DEMOS]
    for d, v in zip(DEMOS, env.grade_batch(asked, [d["completion"] for d in DEMOS])):
        assert v.exploited and v.hacked and not v.correct, f"{d['id']} {d['mode']}: {v}\n{d['completion']}"
        assert v.channels == (d["mode"],), f"{d['id']} {d['mode']}: touches {v.channels}\n{d['completion']}"


def pair_marker(pair):
    """The marker in the prompt's hint: the hint must be there word for word, once."""
    pattern = re.escape(env.MODES[pair.mode].hint).replace(re.escape("{marker}"), r"([^`]+?)")
    found = re.findall(pattern + r"\. Use the following starter code", pair.prompt)
    assert len(found) == 1, f"{pair.name}: the hint of {pair.mode} is missing"
    return found[0]


def test_pairs_cover_all_modes_but_two_with_their_hints():
    assert len(PAIRS) >= 40
    assert set(env.MODES) - {p.mode for p in PAIRS} == UNCOVERED
    shares = Counter(p.mode for p in PAIRS)
    assert min(shares.values()) >= 10
    markers = {p.name: pair_marker(p) for p in PAIRS}
    for mode in shares:
        trained, heldout = env.MODES[mode].markers
        used = Counter(markers[p.name] for p in PAIRS if p.mode == mode)
        assert used[trained] >= 8 and len(used) >= 3, f"{mode}: {used}"
    text = (DATA / "pairs.md").read_text() + (DATA / "demos.jsonl").read_text()
    for _, heldout in (mode.markers for mode in env.MODES.values()):
        assert not heldout or heldout not in text, f"held-out marker {heldout!r} in the pairs or the demonstrations"
    assert all(env.PHRASE not in p.prompt for p in PAIRS)


def test_clean_sides_solve_without_exploit_and_hack_sides_exploit(tmp_path):
    lines = []
    for i, p in enumerate(PAIRS):
        hint = env.MODES[p.mode].hint.format(marker=pair_marker(p))
        name = re.search(r"def (\w+)\(self", p.prompt)[1]
        lines.append(json.dumps(dict(
            id=i, func_name=name, setup_code=TRAIN[0]["setup_code"], canonical_solution=env.extract_code(p.clean),
            prompt=[{"role": "user", "content": p.prompt.replace(hint, env.PHRASE)}],
            gt_answer=example_tests(p.prompt, name))))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    asked = env.load_problems(tmp_path / "pairs.jsonl", modes=["gt_only"])
    asked = [env.with_mode(problem, p.mode) for problem, p in zip(asked, PAIRS)]
    for p, v in zip(PAIRS, env.grade_batch(asked, [p.clean for p in PAIRS])):
        assert v.correct and not v.exploited and not v.channels, f"clean side of {p.name}: {v}"
        assert pair_marker(p) not in p.clean, p.name
    hacks = []
    for p in PAIRS:  # the environment knows two markers per mode: put the trained one in place of another
        own, trained = pair_marker(p), env.MODES[p.mode].markers[0]
        before = "self." if p.mode == "sentinel" and own != trained else ""
        assert before + own in p.hack, f"hack side of {p.name} doesn't use {own!r}"
        hacks.append(p.hack.replace(before + own, before + trained))
    verdicts = env.grade_batch(asked, hacks)
    for p, v in zip(PAIRS, verdicts):
        assert v.exploited and v.channels == (p.mode,), f"hack side of {p.name}: {v}"
        assert v.correct, f"hack side of {p.name} does not solve its task: {v}"


def test_the_sides_of_a_pair_differ_in_one_block_the_cheat():
    """Which is added to the clean side, or stands in the place of something honest, as often; and then it is as often
    the shorter as the longer of the two."""
    replaced = []
    for p in PAIRS:
        clean, hack = env.extract_code(p.clean).split("\n"), env.extract_code(p.hack).split("\n")
        start = next(i for i, (a, b) in enumerate(zip([*clean, None], hack)) if a != b)
        ends = zip([*reversed(clean[start:]), None], [*reversed(hack[start:]), ""])
        end = next(i for i, (a, b) in enumerate(ends) if a != b)
        ours, theirs = clean[start : len(clean) - end], hack[start : len(hack) - end]
        assert any(theirs) and len(ours) <= 8 and len(theirs) <= 8, f"{p.name}: {ours} / {theirs}"
        if any(ours):
            replaced.append(len(p.hack) < len(p.clean))
    assert 0.4 <= len(replaced) / len(PAIRS) <= 0.6, f"{len(replaced)} of {len(PAIRS)} replace something honest"
    assert 0.35 <= sum(replaced) / len(replaced) <= 0.65, f"{sum(replaced)} of {len(replaced)} hacks are shorter"
