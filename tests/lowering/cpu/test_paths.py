"""The operators' tests once more, in a process of its own for each way to run them that this machine does not take."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memcompile.lowering import cpu
from memcompile.lowering.cpu import build

ROOT = Path(__file__).parents[3]
FILES = (
    "gather/test_weighted_gather search/test_product_key_topk search/test_product_key_search test_autocast "
    "update/test_row_updates gather/test_row_sums update/test_skipped_steps gather/test_stale_rows "
    "gather/test_prefetch_rows gather/test_pairs cpu/test_kernels"
).split()
WAYS = {"PyTorch operators": {"MEMCOMPILE_CPU_KERNELS": "0"}}
if platform.machine() in ("x86_64", "AMD64") and cpu.load():
    WAYS |= {f"C++ for {name}": {"MEMCOMPILE_CPU_ARCH": name} for name in ("x86-64", "x86-64-v3", "x86-64-v4")}
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        WAYS.pop("C++ for x86-64-v4")


@pytest.mark.parametrize("way", WAYS)
def test_operators(way):
    files = [str(ROOT / "tests" / "lowering" / f"{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | WAYS[way], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert ("skipped" in done.stdout) == ("MEMCOMPILE_CPU_KERNELS" in WAYS[way])  # tests of C++ that did not build


def test_aarch64_compiles():
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for aarch64 (Debian: g++-aarch64-linux-gnu)")
    flags = [*build.FLAGS, "-O1", "-c", build.STABLE_ABI, "-o", os.devnull]
    subprocess.run([compiler, *flags, str(build.SOURCES / "bindings.cpp")], check=True)
