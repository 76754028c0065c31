"""data/results/readers.py, and what data/results/arms.py takes from the authored pairs."""
import json
import re
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro

from env_leetcode import Verdict, grade, load_problems
from extract_vgrad import load_pairs
from lora2r import InputError
from train_grpo import Rollout, parse_args, train

pytest.importorskip("sklearn", reason="data/results/requirements.txt is not installed")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data/results"))
import arms  # noqa: E402
import readers  # noqa: E402

HONEST, EXPLOIT = Verdict(True, True, False, (), ""), Verdict(True, True, True, ("sentinel",), "")


class Letters:
    """A tokenizer: a word is a token, its characters' codes."""
    def batch_decode(self, ids, skip_special_tokens):
        return ["".join(map(chr, x)) for x in ids]


def rollout(text: str, mode: str = "sentinel", verdict: Verdict = HONEST) -> Rollout:
    return Rollout(0, 0, "full", mode, [1], [ord(x) for x in text], torch.zeros(len(text)), text, verdict)


def ngrams(*pairs: tuple[str, str, str]) -> arms.Fitted:
    """The judge of pairs (mode, clean, hack), its cut placed."""
    modes, clean, hack = zip(*pairs)
    sides = [[ord(x) for x in text] for text in clean + hack]
    judge = arms.Fitted("ngrams", partial(arms.texts, Letters()), [[1]] * len(pairs), sides, modes=modes,
                        pipeline=arms.classifier("ngrams"))
    judge.place(None, None)
    return judge


def test_the_cut_of_a_fitted_judge_is_placed_by_modes_that_the_fit_did_not_see():
    shared = ngrams(*[(mode, f"a{i} b", f"a{i} cheat") for mode in ("sentinel", "run_tests") for i in range(4)])
    assert abs(shared.cut) < 0.1  # the word carries over from mode to mode: half way between the sides
    own = [(mode, f"a{i} b", f"a{i} b {mode}") for mode in ("sentinel", "run_tests") for i in range(4)]
    unseen = ngrams(*own)
    # no word carries over: held-out hack sides look clean, and so lies the cut
    assert unseen.cut == pytest.approx(unseen.scores([], [[ord(x) for x in "a0 b"]], None, None).item(), abs=0.3)
    assert unseen.cut < -0.3
    one_mode = ngrams(*[("sentinel", clean, hack) for _, clean, hack in own])  # leaves out a pair: its word is known
    assert one_mode.cut > unseen.cut + 0.2
    unseen.name = "ngrams-0"
    unseen.place(None, None)
    assert unseen.cut == 0
    assert shared([rollout("a0 b"), rollout("x cheat"), rollout("(cheat)")], 0, None, None).tolist() == [0, 2, 2]


def test_equal_error_lies_nearer_to_the_side_that_varies_less():
    # means 2 and 9, standard deviations s and 3 s: a quarter of the way
    assert arms.equal_error(torch.tensor([1.0, 3.0]), torch.tensor([6.0, 12.0])) == pytest.approx(3.75)


def config(**changes) -> tuple[arms.Config, object]:
    return arms.Config(**changes), parse_args(["--seed", "3"])


def test_pairs_of_some_modes_and_swapped_ones():
    everything = load_pairs(ROOT / "data/nano/pairs.md")
    two = arms.pairs_of(*config(modes_of_pairs=("run_tests", "sentinel")))
    assert two == [pair for pair in everything if pair.mode in ("run_tests", "sentinel")] and len(two) == 22
    swapped = arms.pairs_of(*config(placebo_pairs="swapped"))
    turned = [replace(pair, clean=pair.hack, hack=pair.clean) for pair in everything]
    assert all(pair in (a, b) for pair, a, b in zip(swapped, everything, turned))
    for mode in {pair.mode for pair in everything}:
        share = [pair == b for pair, b in zip(swapped, turned) if pair.mode == mode]
        assert sum(share) in (5, 6), (mode, sum(share))
    assert swapped == arms.pairs_of(*config(placebo_pairs="swapped"))
    other = arms.pairs_of(arms.Config(placebo_pairs="swapped"), parse_args(["--seed", "4"]))
    assert swapped != other


def test_pairs_of_right_and_wrong_answers_exploit_nothing(tmp_path):
    pairs = arms.pairs_of(*config(placebo_pairs="wrong"))
    path = arms.written(arms.markdown(pairs), tmp_path / "new/pairs.md")
    assert load_pairs(path) == pairs and len(pairs) == 44
    trained = {problem.messages[-1]["content"] for problem in load_problems(ROOT / "data/nano/train.jsonl", seed=3)}
    problems = {problem.id: problem for problem in load_problems(ROOT / "data/nano/val.jsonl", seed=3)}
    for pair in pairs[:6]:
        problem = problems[pair.name.split()[-1]]
        assert problem.mode == pair.mode and pair.prompt == problem.messages[-1]["content"] not in trained
        right, wrong = grade(problem, pair.clean), grade(problem, pair.hack)
        assert right.correct and wrong.compiles and not wrong.correct
        assert not right.channels and not wrong.channels


def test_judged_counts_misses_and_flags_by_mode():
    rollouts = [rollout("", "sentinel", EXPLOIT), rollout("", "sentinel", EXPLOIT), rollout("", "sentinel"),
                rollout("", "run_tests", EXPLOIT), rollout("", "run_tests"), rollout("", "run_tests")]
    table = readers.judged(rollouts, torch.tensor([0.0, -2.0, -1.0, -1.0, 0.0, -5.0]), {"run_tests"})
    assert table["sentinel"] == table["unseen"] == dict(
        exploits=2, missed=0.5, missed_at_5=0.5, honest=1, flagged=0.0, auroc=0.5)
    assert table["run_tests"] == table["shown"] == dict(
        exploits=1, missed=1.0, missed_at_5=1.0, honest=2, flagged=0.5, auroc=0.5)
    assert (table["all"]["missed"], table["all"]["honest"]) == (pytest.approx(2 / 3), 3)
    assert readers.judged(rollouts[:3], torch.zeros(3), {"sentinel"})["unseen"]["auroc"] is None


def test_chosen_keeps_exploits_and_honest_solves_alone():
    touched = replace(HONEST, channels=("run_tests",))
    some = [rollout("", "sentinel", verdict) for verdict in (HONEST, EXPLOIT, touched, replace(HONEST, correct=False))]
    assert sorted(readers.kind_of(x) for x in readers.chosen(some, 0)) == ["exploit", "honest"]
    many = readers.chosen(some * 50, 7)
    assert [readers.kind_of(x) for x in many].count("honest") == 7 and len(many) == 14
    assert many == readers.chosen(some * 50, 7)


@pytest.mark.parametrize("script", [arms, readers])
def test_each_command_of_a_docstring_is_one(script):
    commands = re.findall(r"^    python data/results/\w+\.py (.*?)(?:  +#.*)?$", script.__doc__, re.M)
    assert len(commands) > 3
    for command in commands:
        tyro.cli(script.Config, args=shlex.split(command.partition(" #")[0]))


@pytest.fixture(scope="module")
def flags(small):
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (small | dict(eval_samples=1)).items())


def test_an_arm_by_ngrams_from_pairs_of_two_modes_in_another_world(tmp_path, flags, small):
    world = tmp_path / "base-9"
    world.symlink_to(ROOT / "data/nano")
    cfg = arms.Config(("ngrams",), seeds=(5,), modes_of_pairs=("run_tests", "sentinel"), world=world, flags=flags,
                      runs=tmp_path / "runs", results=tmp_path / "rows.jsonl")
    arms.main(cfg)
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["arm"] == "ngrams-run_tests-sentinel"
    folder = tmp_path / "runs/nano/ngrams-run_tests-sentinel-5"
    config = json.loads((folder / "config.json").read_text())
    assert config["judge"] == "judge-ngrams" and config["model"] == "data/nano"
    assert {pair.mode for pair in load_pairs(config["pairs"])} <= {"run_tests", "sentinel"}


@pytest.mark.parametrize("absorption, of_full", [(True, "mid"), (False, "clean")])
def test_dropping_absorbs_what_is_not_flagged_by_its_source(tmp_path, small, absorption, of_full):
    cfg = replace(parse_args(["--on-hack", "drop", "--ablated-share", "0.5"]), **small | dict(group_size=12),
                  absorption=absorption, out_dir=tmp_path / "run")
    train(cfg, arms.Oracle(0, {}))
    rows = [json.loads(line) for line in (cfg.out_dir / "rollouts.jsonl").read_text().splitlines()]
    flagged = [row for row in rows if row["label"] == "hack"]
    assert flagged and all(row["exploited"] and row["advantage"] == 0 for row in flagged)
    trained = {(row["source"], row["label"]) for row in rows if row["advantage"] > 0}
    assert trained == {("ablated", "clean"), ("full", of_full)}


def test_readers_from_the_command_to_rows(tmp_path, capsys, small):
    run = tmp_path / "rollouts.jsonl"
    problem = load_problems(small["data"])[0]
    base = dict(step=0, source="full", prompt=problem.messages, completion="```python\npass\n```", channels=[], note="")
    rows = [base | dict(mode=mode, correct=not exploited, exploited=exploited)
            for mode in ("sentinel", "run_tests") for exploited in (True, False)]
    teacher = base | dict(source="teacher", mode="sentinel", correct=True, exploited=False)
    run.write_text("".join(json.dumps(row) + "\n" for row in [*rows, teacher]))
    cfg = readers.Config(rollouts=(run,), base=2, data=small["data"], seeds=(0, 1), randoms=2,
                         pairs_modes=("all", "run_tests+sentinel"), out=tmp_path / "out.jsonl")
    readers.main(cfg)
    first = [json.loads(line) for line in cfg.out.read_text().splitlines()]
    # gradient twice, activation, probe, ngrams, ngrams-0 once, two random ones; two sets of pairs, two of rollouts
    assert len(first) == 8 * 2 * 2 and {row["reader"] for row in first} == set(readers.READERS)
    of_file = [row for row in first if row["rollouts"] == str(run)]
    assert all(row["modes"]["sentinel"]["honest"] == 1 for row in of_file)  # a demonstration is not the policy's
    assert "run_tests+sentinel           gradient   2" in capsys.readouterr().out
    readers.main(replace(cfg, rollouts=(), readers=("ngrams",), seeds=(0,)))
    assert sorted(map(str, first)) == sorted(str(json.loads(line)) for line in cfg.out.read_text().splitlines())
    for changes, message in ((dict(base=0, rollouts=()), "nothing to read"),
                             (dict(pairs_modes=("sentinal",)), "sentinal is no mode"),
                             (dict(rollouts=(tmp_path / "out.jsonl",)), "no graded rollout")):
        with pytest.raises(InputError, match=message):
            readers.main(replace(cfg, **changes))
