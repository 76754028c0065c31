"""Tests run from the repository root; `slow` ones only with `python -m pytest --slow`."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Settings of train_grpo.Config that make a run take a second: 24 problems, 8 held-out ones, 5 pairs."""
    nano, folder = Path(__file__).resolve().parents[1] / "data/nano", tmp_path_factory.mktemp("small")
    for name, n in (("train", 24), ("test", 8)):
        lines = (nano / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:: len(lines) // n][:n]))
    heads = (nano / "pairs.md").read_text().split("\n## ")
    (folder / "pairs.md").write_text("\n## ".join(heads[:1] + heads[1::10][:5]))
    return dict(data=folder / "train.jsonl", test_data=folder / "test.jsonl", pairs=folder / "pairs.md",
                steps=1, prompts_per_step=4, group_size=4, max_new_tokens=80, mix_ratio=0.25, eval_samples=0,
                refresh=1)
