"""A slowdown shows without a clock: the instructions that each kernel takes for a token, counted by callgrind."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from memcompile.lowering.cpu.build import FLAGS, compiler

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the counts are those of x86-64-v3"),
]

# For one token, counted with GCC 12 and AVX2, since valgrind knows no AVX-512. One head: 32 of 1,024 half-keys on each
# side; the scores of one side, of 256 numbers a half-key; 128 rows of 1,024 numbers, and their sums
# by row, of 4,096; the same rows as pairs of 512 numbers, and corrected for what they have missed. Of Adam, one row.
INSTRUCTIONS = {
    "search": 45_300,
    "scores": 83_100,
    "gather fp32": 44_300,
    "gather bf16": 69_500,
    "pairs fp32": 65_900,
    "pairs bf16": 90_500,
    "dots": 42_100,
    "sort": 5_400,
    "sums": 115_300,
    "stale gather": 848_000,
    "adam": 4_390,
    "adam late": 10_020,
    "adam bf16 state": 12_620,
}
ALLOWED = 1.15  # compilers differ


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("callgrind") / "count_instructions"
    source = Path(__file__).with_name("count_instructions.cpp")
    command = [*compiler(), *FLAGS, "-march=x86-64-v3", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_instructions_a_token(kernel, program):
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=*measured*", "--callgrind-out-file=/dev/null"]
    done = subprocess.run([*command, str(program), kernel], capture_output=True, text=True, check=True)
    total = re.search(r"Collected : (\d+)", done.stderr)
    assert total, done.stderr
    count = int(total.group(1)) / int(done.stdout)
    assert 0.7 * INSTRUCTIONS[kernel] < count < ALLOWED * INSTRUCTIONS[kernel], f"{kernel}: {count:,.0f} a token"
