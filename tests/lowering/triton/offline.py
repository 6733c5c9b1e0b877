"""Triton kernels compiled to machine code with no GPU: their registers, spills and shared memory.

Triton is given its target, so no driver is asked; ptxas and cuobjdump come with it. Tried on Triton 3.6, 3.7 and 3.9.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner, Heuristics

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# What one block may have, in bytes, of memory that its threads share.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: 32-bit registers a thread (AMD: vector registers a lane).
        spills: bytes a thread that did not fit in registers and live in memory (local memory; AMD: scratch).
        shared: bytes of shared memory a block, dynamic ones included.
    """

    registers: int
    spills: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel in machine code.

    Attributes:
        name: the kernel's name.
        resources: what it takes.
        asm: every stage by its name: ttir, ttgir, llir, and ptx and cubin (bytes), or amdgcn and hsaco (bytes).
    """

    name: str
    resources: Resources
    asm: dict[str, Any]


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    divisible: Iterable[str] | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    target: str = "sm_90",
    **options: Any,
) -> Compiled:
    """Compile a `@triton.jit` kernel.

    Args:
        kernel: what `@triton.jit` returned; `@triton.autotune` and `@triton.heuristics` around it are taken off.
        signature: type of each argument, as ``{"values": "*bf16", "tokens": "i32", "BLOCK": "constexpr"}``. Those named
            in `constants` may be left out.
        constants: value of each `constexpr`, None for a pointer that is not given.
        divisible: the arguments that are multiples of 16; every pointer, if None, as PyTorch allocates.
        num_warps, num_stages: as at a launch.
        target: one of `TARGETS`.
        options: others of the backend's, such as ``maxnreg``.

    Raises:
        TypeError: the kernel was decorated under ``TRITON_INTERPRET=1``, so there is nothing to compile.
        KeyError: an argument has neither a type nor a value, or there is none of that name.
    """
    while isinstance(kernel, (Autotuner, Heuristics)):
        kernel = kernel.fn
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{kernel!r} is no compiled Triton kernel: import it without TRITON_INTERPRET")
    names = kernel.arg_names
    unknown = {*signature, *constants} - {*names}
    if unknown:
        raise KeyError(f"{kernel.__name__} has no argument {sorted(unknown)}; it has {names}")
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    if divisible is None:
        divisible = [name for name, dtype in types.items() if dtype.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return compile_source(source, target, num_warps=num_warps, num_stages=num_stages, **options)


def compile_source(source: ASTSource, target: str, **options: Any) -> Compiled:
    """Compile what `compile_kernel` or Inductor made ready, for one of `TARGETS`."""
    binary = triton.compile(source, target=TARGETS[target], options=options)
    asm = dict(binary.asm)
    read = _amd_resources if TARGETS[target].backend == "hip" else _nvidia_resources
    return Compiled(binary.metadata.name, read(asm, binary.metadata.shared), asm)


def _nvidia_resources(asm: Mapping[str, Any], shared: int) -> Resources:
    """As `cuobjdump` reads them; shared memory is asked for at the launch, so the binary does not name all of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        done = subprocess.run([str(cuobjdump), "-res-usage", file.name], capture_output=True, text=True, check=True)
    functions = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    if not functions:
        raise RuntimeError(f"cuobjdump said nothing of registers: {done.stdout}{done.stderr}")
    registers, stack, static, local = (max(int(value) for value in column) for column in zip(*functions, strict=True))
    return Resources(registers, stack + local, max(static, shared))


def _amd_resources(asm: Mapping[str, Any], shared: int) -> Resources:
    """From the metadata at the end of the assembly. Scalar registers spill into vector registers, not into memory."""

    def largest(key: str) -> int:
        return max(int(value) for value in re.findall(rf"^\s*\.{key}:\s*(\d+)", asm["amdgcn"], re.MULTILINE))

    static = largest("group_segment_fixed_size")
    return Resources(largest("vgpr_count"), largest("private_segment_fixed_size"), max(static, shared))
