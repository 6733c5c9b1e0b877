"""`MEMCOMPILE_ATOMICS=1`, in a process of its own: the layer's tests once more, with sums in any order."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_as_accurate_with_atomics(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs the memory
    here = Path(__file__).parent
    tests = [f"{here / 'test_lookup.py'}::test_output_and_gradients", f"{here / 'test_large_tables.py'}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "wide or plain or scatter"]
    environment = os.environ | {"MEMCOMPILE_ATOMICS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
