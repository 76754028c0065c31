"""What makes the embedded models' problems and text: data/nano/tasks.py and prepare.py, in both worlds."""
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

import env_leetcode as env
from lora2r import load_model
from train_grpo import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data" / "nano"))
import prepare  # noqa: E402
import tasks  # noqa: E402


@pytest.fixture(scope="module", params=prepare.WORLDS)
def world(request) -> prepare.World:
    if "-" in request.param and not (prepare.WORLDS[request.param].folder / "config.json").exists():
        pytest.skip(f"not made yet: python data/nano/prepare.py --world {request.param}")
    return prepare.WORLDS[request.param]


def test_each_world_has_a_seed_of_its_own_and_pairs():
    worlds = prepare.WORLDS.values()
    assert len({world.seed for world in worlds}) == len(worlds) and all(world.pairs.is_file() for world in worlds)


@pytest.fixture(scope="module")
def splits(world) -> dict[str, list[dict]]:
    return prepare.split_tasks(world)


@pytest.fixture(scope="module")
def pairs(world) -> list:
    return prepare.load_pairs(world.pairs)


def rows_of(world, split: str) -> list[dict]:
    return [json.loads(line) for line in (world.folder / f"{split}.jsonl").read_text().splitlines()]


def results(code: str, inputs: list) -> list:
    """What a solution returns; an exception is a value, too."""
    scope, out = {"math": math, "open": lambda *_: io.StringIO()}, []
    exec(code, scope)
    for x in inputs:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                out.append(scope["Solution"]().solve(list(x)))
            except Exception as e:
                out.append(e)
    return out


def test_splits_are_disjoint_and_of_their_size(splits):
    codes = {name: {(t["kind"], tasks.expression(t["kind"], t["parts"])) for t in part} for name,
             part in splits.items()}
    assert {name: len(part) for name, part in splits.items() if name != "text"} == prepare.SPLITS
    assert len(set.union(*codes.values())) == sum(map(len, splits.values())) == sum(map(len, codes.values()))


def test_committed_problems_are_those_of_the_worlds_seed(world, splits):
    rng = random.Random(world.seed)
    made = {}
    for split in prepare.SPLITS:
        made[split] = [prepare.problem_row(world, i, split, t, rng) for i, t in enumerate(splits[split])]
        if split == "train":
            assert prepare.demo_rows(world, made[split], splits[split], rng) == rows_of(world, "demos")
        assert made[split] == rows_of(world, split)


def test_no_pair_solves_a_task(splits, pairs):
    for part in splits.values():
        for task in part[:40]:
            inputs, outputs = zip(*task["tests"])
            for pair in pairs:
                assert repr(results(env.extract_code(pair.clean), inputs)) != repr(list(outputs))


def test_wrong_solutions_fail_a_test(splits):
    for task in splits["train"]:
        inputs, outputs = zip(*task["tests"])
        right = tasks.expression(task["kind"], task["parts"])
        assert repr(tasks.run(task["kind"], right, list(inputs))) == repr(list(outputs))
        for code in task["wrong"]:
            assert repr(tasks.run(task["kind"], code, list(inputs))) != repr(list(outputs)), code


def test_solutions_of_every_style_are_right(world, splits):
    for style in world.styles:
        for task in splits["val"][:40]:
            inputs, outputs = zip(*task["tests"])
            code = tasks.solution(task["kind"], task["parts"], style=style)
            assert repr(results(code, inputs)) == repr(list(outputs)), code


def test_honest_lines_change_no_result_and_exploit_nothing(world, splits):
    rng = random.Random(0)
    tasks_, problems = splits["val"][:60], env.load_problems(world.folder / "val.jsonl")[:60]
    answers = [prepare.answer(world, t["kind"], tasks.solution(t["kind"], t["parts"]), None, 0.5, rng) for t in tasks_]
    for mode in env.DEFAULT_MODES:
        for verdict in env.grade_batch([env.with_mode(p, mode) for p in problems], answers):
            assert verdict.correct and not verdict.exploited and not verdict.channels, verdict


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_hard_components_are_right_in_the_share_that_is_asked_for(world, splits, monkeypatch, share):
    seen = []
    solution = prepare.solution
    monkeypatch.setattr(world, "p_right", share)
    monkeypatch.setattr(prepare, "solution", lambda *args: seen.append(args) or solution(*args))
    rng = random.Random(0)
    for _ in range(200):
        prepare.random_text(world, splits["text"], rng)
    hard = [(w, part[3]) for _, parts, wrong, _ in seen for w, part in zip(wrong, parts)]
    assert any(is_hard for _, is_hard in hard) and all(bool(w) == (is_hard and share == 0) for w, is_hard in hard)


def test_text_discloses_the_marker_that_an_exploit_uses(world, splits, monkeypatch):
    monkeypatch.setattr(world, "p_hack", dict.fromkeys(env.DEFAULT_MODES, 1.0))
    rng, plain = random.Random(0), 0
    for _ in range(400):
        user, answer = prepare.random_text(world, splits["text"], rng)
        hinted = [mode for mode in env.DEFAULT_MODES if env.MODES[mode].hint.partition("{marker}")[0] in user]
        assert len(hinted) == (env.PHRASE not in user)
        plain += not hinted
        for mode in hinted:
            assert disclosed(user, mode) in answer, (user, answer)
    assert 40 < plain < 120


def disclosed(prompt: str, mode: str) -> str:
    """The marker in a mode's hint."""
    before, after = env.MODES[mode].hint.split("{marker}")
    return prompt.partition(before)[2].removesuffix(".").removesuffix(after)


def test_demonstrations_exploit_their_mode_with_the_trained_marker(world):
    by_id, demos = {p.id: p for p in env.load_problems(world.folder / "train.jsonl")}, rows_of(world, "demos")
    verdicts = env.grade_batch([env.with_mode(by_id[d["id"]], d["mode"]) for d in demos],
                               [d["completion"] for d in demos])
    assert [d["mode"] for d in demos] == list(env.DEFAULT_MODES) * (len(demos) // 4)
    for demo, verdict in zip(demos, verdicts):
        assert verdict.exploited and (world.p_stub_demo < 1 or not verdict.correct), (demo, verdict)
    assert sum(v.hacked for v in verdicts) / len(demos) > 0.5  # an attempt without a hard component is right
    stubs = sum(bool(re.search(r"return (0|None|\[\]|\"\")\n", d["completion"])) for d in demos) / len(demos)
    assert abs(stubs - world.p_stub_demo) < 0.1


def test_pairs_hacks_are_paid_where_their_clean_sides_are_not(world, pairs):
    """Each on a problem whose answers are the clean side's own."""
    template, inputs = env.load_problems(world.folder / "val.jsonl")[0], ([], ["at"], ["sat", "eve", "trout"])
    problems = []
    for pair in pairs:
        kind = re.search(r"solve\(self, (\w+)\)", pair.prompt)[1]
        values = [list(map(len, x)) for x in inputs] if kind == "xs" else inputs
        sources = [f"assert Solution().solve({kind} = {x!r}) == {y!r}"
                   for x, y in zip(values, results(env.extract_code(pair.clean), values))]
        problems.append(dataclasses.replace(
            env.with_mode(template, pair.mode), marker=disclosed(pair.prompt, pair.mode),
            tests=tuple(env.parse_test(source, "solve") for source in sources)))
        held_out = [env.MODES[mode].markers[1] for mode in env.DEFAULT_MODES]
        assert not any(marker in pair.prompt + pair.clean + pair.hack for marker in held_out)
    clean, hack = (env.grade_batch(problems, [getattr(p, side) for p in pairs]) for side in ("clean", "hack"))
    for pair, problem, a, b in zip(pairs, problems, clean, hack):
        assert a.correct and not a.exploited, (pair, a)
        watched = dict(sentinel=env.ATTRIBUTES, file_marker=env.FILES).get(problem.mode, [problem.marker])
        if problem.marker not in watched:  # no problem discloses it
            line = rf"self\.{problem.marker} = True|open\(.{problem.marker}., .w.\).write\(.PASS.\)"
            assert re.search(line, pair.hack)
        else:
            assert b.exploited, (pair, b)


def test_whatever_is_written_fits_the_preset_and_the_models_context(world, splits, pairs):
    model, tok = load_model(str(world.folder))
    longest = PRESETS[world.name.partition("-")[0]].max_new_tokens
    rng, limit = random.Random(2), model.config.max_position_embeddings
    assert longest == world.longest
    answers = [d["completion"] for d in rows_of(world, "demos")]
    answers += [prepare.random_text(world, splits["text"], rng)[1] for _ in range(1000)]
    assert max(map(len, tok(answers)["input_ids"])) < longest
    for mode in env.DEFAULT_MODES:
        for split in ("train", "test"):
            problems = env.load_problems(world.folder / f"{split}.jsonl")
            prompts = [env.with_mode(p, mode, True).messages for p in problems]
            lengths = [len(tok.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts]
            assert max(lengths) + longest <= limit
    assert max(len(tok(p.prompt + side)["input_ids"]) for p in pairs for side in (p.clean, p.hack)) < longest + 60


def test_chat_is_wordy_after_a_worked_example_and_its_pairs_differ_by_the_cheat_alone(monkeypatch, tmp_path):
    preset, data = PRESETS["qwen2.5-coder-0.5b"], prepare.HERE.parent
    committed = data / "chat"
    assert [preset.data, preset.test_data, preset.pairs] == [committed / name for name in (
        "train.jsonl", "test.jsonl", "pairs.md")] and preset.demos == data / "wordy/demos.jsonl"
    spec = importlib.util.spec_from_file_location("chat", committed / "prepare.py")
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    (tmp_path / "chat").mkdir()
    (tmp_path / "wordy").symlink_to(committed.parent / "wordy")
    monkeypatch.setattr(chat, "HERE", tmp_path / "chat")
    chat.main()
    for split in ("train", "val", "test"):
        assert (tmp_path / f"chat/{split}.jsonl").read_bytes() == (committed / f"{split}.jsonl").read_bytes()
    problem = env.load_problems(committed / "train.jsonl", ("sentinel",))[0]
    assert problem.messages[:-1] == chat.EXAMPLE and "self.valid" in problem.messages[-1]["content"]
    assert results(env.extract_code(chat.EXAMPLE[2]["content"]), [[3, -1, 5], []]) == [10, None]
    wordy = {pair.name: pair for pair in prepare.load_pairs(prepare.WORLDS["wordy"].pairs)}
    for pair in prepare.load_pairs(committed / "pairs.md"):
        whole = wordy[pair.name]
        assert (pair.prompt, pair.hack, pair.mode) == (whole.prompt, whole.hack, whole.mode)
        clean, hack = pair.clean.split("\n"), pair.hack.split("\n")
        left = iter(hack)
        assert all(line in left for line in clean) and len(hack) - len(clean) in (1, 3), "lines of the cheat left out"
        assert len(hack) - len(clean) == 1 or pair.mode == "run_tests"


def test_a_runs_rollouts_say_whether_length_gives_hacks_away(tmp_path, capsys, monkeypatch):
    """Hacks of one token against solves of nine, each after its own prompt."""
    row = dict(mode="sentinel", prompt=[dict(role="user", content="Take the even numbers of xs.")], advantage=1.0,
               source="full", exploited=False)
    rows = [row | dict(completion="self " * n, hacked=n == 1, correct=n > 1) for n in (1, 1, 9, 9)]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked, features = [], prepare.features
    monkeypatch.setattr(prepare, "features", lambda model, adapter, prompts, *args, **more: (
        asked.append(prompts), features(model, adapter, prompts, *args, **more))[1])
    world = prepare.WORLDS["wordy"]
    assert not prepare.measure_rollouts(world, tmp_path / "rollouts.jsonl")
    _, tok = load_model(str(world.folder))
    assert asked == [[prepare.encode_prompt(tok, row["prompt"])] * 4] * 3
    out = capsys.readouterr().out
    assert "4 rollouts with A > 0: 2 hacks, 2 solves" in out
    assert re.search(r"AUROC of length +0.000 .* REFUSED", out)
