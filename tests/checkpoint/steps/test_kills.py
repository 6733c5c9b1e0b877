"""`kill -9` at any time of a save, fifty times at random and before each operation on the disk: nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_by_a_kill(tmp_path):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    at_random, before_each = json.loads(run.stdout.splitlines()[-1])
    assert at_random["kills"] == 50
    assert at_random["saves"] > 5
    assert at_random["interrupted"] > 5
    assert before_each["kills"] > 20
    assert before_each["interrupted"] > 20
