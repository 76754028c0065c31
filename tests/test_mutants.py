"""mutants.py: its table fits the code, and (slow) every wrong edit in it is noticed."""
import subprocess
import sys

import pytest
from mutants import MUTANTS, ROOT, fault_of


def test_each_row_still_applies_and_names_a_test():
    """An edit of the scripts that moves what a row replaces is seen at once, not only by the slow test."""
    faults = [f"{row[0]}: {row[1]!r}: {fault_of(*row)}" for row in MUTANTS if fault_of(*row)]
    assert not faults, "\n".join(faults)
    assert len(MUTANTS) >= 60 and len(set(MUTANTS)) == len(MUTANTS)


@pytest.mark.slow
def test_every_wrong_edit_is_noticed():
    done = subprocess.run([sys.executable, "tests/mutants.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
