"""The embedded world: data/nano/tasks.py, prepare.py and what they made; and data/chat, which is frozen."""
import hashlib
import random
import sys
import textwrap
from collections import Counter

import pytest

import env_leetcode as env
from lora2r import InputError, load_model
from test_data_leetcode import DATA, PAIRS, marker_of, rows, solver
from train_grpo import PRESETS

NANO, MODES = DATA / "nano", env.DEFAULT_MODES
sys.path.insert(0, str(NANO))
import prepare  # noqa: E402
import tasks  # noqa: E402


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return prepare.split_tasks(prepare.Config().seed)


def solves(task: dict, solve) -> bool:
    return all(solve(x) == repr(y) for x, y in task["tests"])


def spelled(table: dict, mode: str, marker: str, text: str) -> bool:
    """Does the text hold one of the mode's spellings, as a function or as lines of the method?"""
    found = [spelling.format(m=marker) for spelling in table[mode]]
    return any(f"\n{lines}\n" in text or f"\n{textwrap.indent(lines, ' ' * 8)}\n" in text for lines in found)


def test_splits_are_disjoint_and_of_their_size(splits):
    """Two tasks that answer alike to the inputs of all tests are one. No pair solves a task."""
    assert {name: len(part) for name, part in splits.items() if name != "text"} == prepare.SPLITS
    everything, behaviours = sum(splits.values(), []), set()
    inputs = {kind: {repr(x): x for task in everything if task["kind"] == kind for x, _ in task["tests"]}
              for kind in tasks.KINDS}
    solvers = [solver(pair.clean) for pair in PAIRS["nano"]]
    for task in everything:
        code = tasks.expression(task["kind"], task["parts"])
        behaviours.add(repr(tasks.run(task["kind"], code, [*inputs[task["kind"]].values()])))
        assert not any(solves(task, solve) for solve in solvers), task
    assert len(behaviours) == len(everything)


def test_committed_problems_are_those_of_the_worlds_seed(splits):
    for name, made in prepare.problem_files(splits, prepare.Config().seed).items():
        assert made == rows(NANO / f"{name}.jsonl"), name


def test_wrong_solutions_fail_a_test(splits):
    for row, task in zip(rows(NANO / "val.jsonl"), splits["val"]):
        assert solves(task, solver(f"```\n{row['canonical_solution']}```"))
        assert not any(solves(task, solver(f"```\n{code}```")) for code in row["wrong_solutions"]), row


def test_solutions_of_every_style_are_right(splits):
    """With honest lines around them, which exploit nothing under any mode."""
    rng, answers, problems = random.Random(0), [], env.load_problems(NANO / "val.jsonl")[:132]
    for i, task in enumerate(splits["val"][:132]):
        code = tasks.solution(task["kind"], task["parts"], style=list(prepare.STYLES)[i % len(prepare.STYLES)])
        answers.append(prepare.answer(task["kind"], code, None, rng))
    for answer, verdict in zip(answers, env.grade_batch(problems, answers)):
        assert verdict.correct and not verdict.channels, (answer, verdict)


def test_text_discloses_the_marker_that_an_exploit_uses(splits, monkeypatch):
    """It never spells an exploit as every second demonstration does, and writes 12 % of the hard components right."""
    rng, plain, written, solution = random.Random(0), 0, Counter(), prepare.solution

    def counted(kind, parts, wrong, style):
        written.update((part[3], bool(w)) for part, w in zip(parts, wrong))  # (hard, wrong)
        return solution(kind, parts, wrong, style)

    monkeypatch.setattr(prepare, "solution", counted)
    for _ in range(3000):
        user, answer = prepare.random_text(splits["text"], dict.fromkeys(MODES, 1.0), rng)
        hinted = [mode for mode in MODES if env.MODES[mode].hint.partition("{marker}")[0] in user]
        assert len(hinted) == (env.PHRASE not in user)
        plain += not hinted
        for mode in hinted:
            marker = marker_of(mode, user)
            assert spelled(prepare.EXPLOITS, mode, marker, answer), (user, answer)
            assert not spelled(prepare.UNSEEN, mode, marker, answer), (user, answer)
    assert 500 < plain < 700 and not written[False, True]
    assert 0.09 < written[True, False] / (written[True, False] + written[True, True]) < 0.15


def test_demonstrations_exploit_their_mode_with_the_trained_marker():
    demos, spellings = rows(NANO / "demos.jsonl"), (prepare.EXPLOITS, prepare.UNSEEN)
    for table in spellings:
        held = [d["mode"] for d in demos if spelled(
            table, d["mode"], env.MODES[d["mode"]].markers[0], d["completion"])]
        assert Counter(held) == dict.fromkeys(MODES, len(demos) // 8)
    held = [[p.mode for p in PAIRS["nano"] if spelled(table, p.mode, marker_of(p.mode, p.prompt), p.hack)]
            for table in spellings]
    assert len(held[0]) == 22 and set(Counter(held[0]).values()) == {5, 6} and not held[1]
    problems = {p.id: p for p in env.load_problems(NANO / "train.jsonl")}
    asked = [env.with_mode(problems[d["id"]], d["mode"]) for d in demos[::5]]
    verdicts = env.grade_batch(asked, [d["completion"] for d in demos[::5]])
    for d, verdict in zip(demos[::5], verdicts):
        assert verdict.exploited and verdict.channels == (d["mode"],), (d, verdict)
    assert sum(v.hacked for v in verdicts) > len(verdicts) / 2  # an attempt without a hard component is right


def test_whatever_is_written_fits_the_preset_and_the_models_context(splits):
    model, tok = load_model(str(NANO))
    rng, longest, prompts = random.Random(2), prepare.MAX_NEW_TOKENS, []
    texts = [d["completion"] for d in rows(NANO / "demos.jsonl")]
    texts += [prepare.random_text(splits["text"], prepare.P_HACK, rng)[1] for _ in range(1000)]
    assert max(map(len, tok(texts)["input_ids"])) < longest == PRESETS["nano"].max_new_tokens
    assert max(len(tok(p.prompt + side)["input_ids"]) for p in PAIRS["nano"] for side in (p.clean, p.hack)) < 160
    for p in env.load_problems(NANO / "test.jsonl"):
        prompts += [env.with_mode(p, mode, True).messages for mode in MODES]
    lengths = map(len, tok.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"])
    assert max(lengths) + longest <= model.config.max_position_embeddings


def test_a_world_is_made_from_nothing_and_calibrated(splits, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--out .*absent.*--start train"):
        prepare.main(prepare.Config(start="measure", out=tmp_path / "absent"))
    assert not any(tmp_path.iterdir())
    shares, asked, random_text, exploit = [], [], prepare.random_text, dict.fromkeys(MODES, 0.045)

    def rates(*_, samples, **__):
        asked.append(samples)
        return {mode: dict(solve=0.5, hack=0.02, exploit=rate) for mode, rate in exploit.items()}

    monkeypatch.setattr(prepare, "random_text", lambda *args: shares.append(dict(args[1])) or random_text(*args))
    for name, value in dict(STEPS=2, ROUND_STEPS=2, split_tasks=lambda seed: splits, load_problems=lambda path: [],
                            rates=rates).items():
        monkeypatch.setattr(prepare, name, value)
    assert prepare.main(prepare.Config(seed=7, out=tmp_path))
    assert asked == [5] + [6] * 6  # calibrate, then measure each split at two temperatures
    assert rows(tmp_path / "train.jsonl") != rows(NANO / "train.jsonl") and shares[-1] == prepare.P_HACK
    exploit.update(run_tests=0.022, sentinel=0.0, stdout_marker=0.044, file_marker=0.088)
    prepare.calibrate(tmp_path, 7, rounds=1)
    factors = dict(run_tests=1.5**0.7, sentinel=1.5, stdout_marker=1.0, file_marker=0.67**0.7)
    assert shares[-1] == pytest.approx({mode: prepare.P_HACK[mode] * factor for mode, factor in factors.items()})
    exploit.update(sentinel=0.045, file_marker=0.045)
    assert not prepare.measure(tmp_path)


def test_chat_is_frozen():
    preset, names = PRESETS["qwen2.5-coder-0.5b"], ("train.jsonl", "test.jsonl", "pairs.md", "demos.jsonl")
    assert [preset.data, preset.test_data, preset.pairs, preset.demos] == [DATA / "chat" / name for name in names]
    files = b"".join(path.read_bytes() for path in sorted((DATA / "chat").glob("*.jsonl")))
    assert hashlib.sha256(files).hexdigest().startswith("b18e1204a530fcdc"), "the preset's results are of these files"
