"""The fault campaign in short; in full: ``make faults``."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_runs_that_are_killed_end_as_the_undisturbed_one() -> None:
    command = [sys.executable, "-m", "tests.faults", "--kills", "4", "--seed", "5", "--only-kills"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_the_whole_campaign() -> None:
    command = [sys.executable, "-m", "tests.faults", "--kills", "200", "--seed", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
