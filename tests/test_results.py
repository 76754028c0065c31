"""data/results: judges by hand, one arm from the command to its row, and the pages against the rows."""
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from env_leetcode import Verdict
from lora2r import InputError
from train_grpo import CLEAN, HACK, Rollout

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("arms", ROOT / "data/results/arms.py")
arms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(arms)


def rollouts(*verdicts: tuple[str, bool, bool]) -> list[Rollout]:
    """One for each (mode, correct, exploited)."""
    return [Rollout(0, k, "full", mode, [1], [2] * (k + 1), torch.zeros(k + 1), "",
                    Verdict(True, correct, exploited, (), "")) for k, (mode, correct, exploited) in enumerate(verdicts)]


SOME = rollouts(("sentinel", True, True), ("sentinel", True, False), ("run_tests", False, True),
                ("run_tests", False, False))


def test_an_oracle_flags_exploits_right_or_not_with_each_modes_recall():
    assert arms.Oracle(0, {})(SOME, 0, None, None).tolist() == [HACK, CLEAN, HACK, CLEAN]
    assert arms.Oracle(0, {"sentinel": 0.0})(SOME, 0, None, None).tolist() == [CLEAN, CLEAN, HACK, CLEAN]
    assert arms.Oracle(0, {}, accuracy=0.0)(SOME, 0, None, None).tolist() == [CLEAN, HACK, CLEAN, HACK]
    label = arms.Oracle(0, {"sentinel": 0.25}, accuracy=0.9)(SOME * 1000, 0, None, None).view(1000, 4)
    flagged = (label == HACK).float().mean(0)
    expected = torch.tensor([0.25 * 0.9 + 0.75 * 0.1, 0.1, 0.9, 0.1])
    assert (flagged - expected).abs().max() < 0.04


def test_draws_depend_on_seed_and_step_alone():
    judge = arms.Random(3, 0.5)
    first = judge(SOME * 50, 7, None, None)
    assert torch.equal(first, arms.Random(3, 0.5)(SOME * 50, 7, None, None))
    assert not torch.equal(first, judge(SOME * 50, 8, None, None))
    assert not torch.equal(first, arms.Random(4, 0.5)(SOME * 50, 7, None, None))
    assert abs((first == HACK).float().mean() - 0.5) < 0.15


@pytest.mark.parametrize("sides, labels", [
    # clean 1, 3 (mean 2, std sqrt 2), hack 6, 8 (mean 7, the same std): the cut is half way, at 4.5
    ([1, 3, 6, 8], [CLEAN, CLEAN, CLEAN, CLEAN, HACK, HACK]),
    ([6, 8, 1, 3], [HACK, HACK, HACK, HACK, CLEAN, CLEAN])])  # where hacks are shorter
def test_a_scalar_is_cut_between_the_sides_of_the_pairs(sides, labels):
    judge = arms.Scalar("length", arms.length, [[1], [1]], [[2] * n for n in sides])
    some = rollouts(*[("sentinel", True, False)] * 6)  # of 1 to 6 tokens
    assert judge(some, 0, None, None).tolist() == labels and judge.cut == 4.5


def test_an_arm_is_run_once_and_kept_as_a_row(tmp_path, small, monkeypatch):
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (small | dict(eval_samples=1)).items())
    cfg = arms.Config(("oracle", "inoculation"), seeds=(5,), recall={"sentinel": 0.5}, flags=flags, suffix="-half",
                      runs=tmp_path / "runs", results=tmp_path / "rows.jsonl")
    arms.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [("oracle-half", 5), ("inoculation-half", 5)]
    assert {"honest_solve", "exploit"} <= rows[0]["results"]["deployed, trained"]["all"].keys()
    assert len(rows[0]["curve"]["deployed_exploit"]) == 1
    config = json.loads((tmp_path / "runs/oracle-half-5/config.json").read_text())
    assert config["judge"] == "oracle-sentinel0.5" and "oracle" in config["arm"]
    shown = json.loads((tmp_path / "runs/inoculation-half-5/rollouts.jsonl").read_text().splitlines()[0])
    assert shown["prompt"][-1]["content"].startswith(arms.INOCULATION)
    monkeypatch.setattr(arms, "train", lambda *args: pytest.fail("run twice"))
    arms.main(cfg)
    with pytest.raises(InputError, match="bribery"):
        arms.main(arms.Config(("bribery",)))
    with pytest.raises(InputError, match="--recall .* --suffix"):  # else it would be taken for the row of another arm
        arms.main(arms.Config(("oracle",), recall={"sentinel": 0.5}))


def numbers(text: str) -> set[str]:
    """Numbers in a text, without their signs; those in names (nano-3, H10, 3e-5) are none."""
    return set(re.findall(r"(?<![\w.+-])[-+]?(\d+(?:\.\d+)?)(?![\w-]|\.\d)", text))


def test_numbers_are_told_from_names():
    assert numbers("nano-3, H10, 3e-5 and Qwen2.5-Coder-0.5B: -4.5 points [-18.1, +9.0], n = 3.") == {
        "4.5", "18.1", "9.0", "3"}


def test_tables_and_prose_are_what_the_rows_say(monkeypatch):
    for package in ("pandas", "matplotlib", "scipy"):
        pytest.importorskip(package, reason="tables.py needs data/results/requirements.txt")
    monkeypatch.syspath_prepend(ROOT / "data/results")
    import tables
    checked = 0
    for page in tables.PAGES:
        for _, name, text, _ in tables.MARKED.findall(page.read_text()):
            assert text == tables.text_of(name), f"{page.name}, {name}: run python data/results/tables.py --update"
        prose = tables.MARKED.sub("", page.read_text())
        for paragraph in re.split(r"\n\n|\n(?=- )", prose):
            if cited := re.search(r"\(tables? ([\w, -]+)\)\s*$", paragraph):
                printed = "".join(tables.text_of(name) for name in cited[1].split(", "))
                unknown = numbers(paragraph[:cited.start()]) - numbers(printed)
                assert not unknown, f"{page.name}: {sorted(unknown)} is not in table {cited[1]}"
                checked += 1
    assert checked > 10


def test_readme_is_short_and_knows_the_sizes_of_the_files():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    assert len(text.split()) <= 2200 and len(re.findall(r"\d+(?:[.,]\d+)?", text)) <= 200
    sizes = dict(re.findall(r"^    (\w+\.py) +(\d+) ", text, re.MULTILINE))
    assert sizes == {path.name: str(len(path.read_text().splitlines())) for path in ROOT.glob("*.py")}
