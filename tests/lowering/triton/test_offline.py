"""The harness itself: kernels compiled with no GPU, and what is read of them."""

import os
import re
import subprocess
import sys

import pytest
import triton
import triton.language as tl

from tests.lowering.triton.offline import SHARED_LIMITS, TARGETS, compile_kernel


@triton.jit
def _add(left, right, output, numel, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    tl.store(output + index, tl.load(left + index, mask=inside) + tl.load(right + index, mask=inside), mask=inside)


@triton.jit
def _normalise(row, output, BLOCK: tl.constexpr):
    """All of a row is alive until its sum is known."""
    index = tl.arange(0, BLOCK)
    numbers = tl.load(row + index)
    tl.store(output + index, numbers / tl.sum(numbers))


@triton.jit
def _multiply(left, right, output, ROWS: tl.constexpr, INNER: tl.constexpr):
    row, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    a = tl.load(left + row[:, None] * INNER + inner[None, :])
    b = tl.load(right + inner[:, None] * ROWS + row[None, :])
    tl.store(output + row[:, None] * ROWS + row[None, :], tl.dot(a, b))


ADD = {"left": "*fp32", "right": "*fp32", "output": "*fp32", "numel": "i32"}
NORMALISE = {"row": "*fp32", "output": "*fp32"}
MULTIPLY = {"left": "*bf16", "right": "*bf16", "output": "*fp32"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_compiles(target):
    compiled = compile_kernel(_add, ADD, {"BLOCK": 1024}, target=target)
    assert compiled.name == "_add"
    assert 8 <= compiled.resources.registers <= 64
    assert compiled.resources.spills == 0
    assembly = compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    machine_code = compiled.asm["hsaco" if target.startswith("gfx") else "cubin"]
    assert machine_code.startswith(b"\x7fELF")
    assert re.search(rf"target.*\b{target}", assembly)


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen(target):
    """On one warp of 32 a thread holds 256 numbers and may have 255 registers; AMD's lanes have 128 by our choice."""
    options = {"waves_per_eu": 4} if target.startswith("gfx") else {}
    kept = compile_kernel(_normalise, NORMALISE, {"BLOCK": 8192}, num_warps=8, target=target).resources
    spilt = compile_kernel(_normalise, NORMALISE, {"BLOCK": 8192}, num_warps=1, target=target, **options).resources
    assert kept.spills == 0 < spilt.spills
    assert kept.registers < spilt.registers == (128 if options else 255)


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_is_seen(target):
    """It is asked for at the launch, so it does not stand in the machine code. AMD keeps one operand in registers."""
    resources = compile_kernel(_multiply, MULTIPLY, {"ROWS": 64, "INNER": 64}, target=target).resources
    operand = 64 * 64 * 2
    assert operand <= resources.shared <= SHARED_LIMITS[target]
    assert target.startswith("gfx") or 2 * operand <= resources.shared < 3 * operand
    assert resources.spills == 0


def test_options_reach_the_compiler():
    few = compile_kernel(_normalise, NORMALISE, {"BLOCK": 8192}, maxnreg=32).resources
    free = compile_kernel(_normalise, NORMALISE, {"BLOCK": 8192}).resources
    assert few.registers <= 32 < free.registers
    assert few.spills > free.spills == 0


def test_divisible_arguments_widen_loads():
    wide = compile_kernel(_add, ADD, {"BLOCK": 1024}, divisible=["left", "right", "output", "numel"])
    narrow = compile_kernel(_add, ADD, {"BLOCK": 1024}, divisible=[])
    assert ".v4.b32" in wide.asm["ptx"] and ".v4.b32" not in narrow.asm["ptx"]


def test_an_autotuned_kernel_is_unwrapped():
    tuned = triton.autotune([triton.Config({}, num_warps=2)], key=["numel"])(_add)
    assert compile_kernel(tuned, ADD, {"BLOCK": 256}).resources.spills == 0


def test_names_are_checked():
    with pytest.raises(KeyError, match=r"no argument.*BLOK"):
        compile_kernel(_add, ADD, {"BLOK": 1024})
    with pytest.raises(KeyError, match="numel"):
        compile_kernel(_add, {name: ADD[name] for name in ("left", "right", "output")}, {"BLOCK": 1024})


def test_an_interpreted_kernel_is_refused():
    program = (
        "import tests.lowering.triton.test_offline as t\n"
        "try: t.compile_kernel(t._add, t.ADD, {'BLOCK': 1024})\n"
        "except TypeError as error: print(error)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "without TRITON_INTERPRET" in done.stdout
