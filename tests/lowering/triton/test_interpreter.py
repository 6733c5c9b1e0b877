"""Runs `interpreted/`, a file a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton
from packaging.version import Version

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="Triton 3.6's interpreter runs with numpy before 2.4",
)
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_kernels(name):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", str(FOLDER / f"{name}.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=FOLDER.parents[3], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
