"""The CPU: what it is, its memory, and its limits, which are measured in the same run as the layers."""

import ctypes
import os
import platform
import resource
import sys
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.package import build, mkl_is_held_back
from benchmarks.harness.results import Limits
from benchmarks.harness.timing import in_turns, wall_seconds

ROWS = 2**16  # rows read at once: as many as 512 tokens with 4 heads of 32 hits read
REPETITIONS = 21
_CPUINFO, _MEMINFO, _STATUS = (Path("/proc", name) for name in ("cpuinfo", "meminfo", "self/status"))


def machine() -> dict[str, Any]:
    """The processor, the threads and the versions that the figures hold for."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _kib(path: Path, field: str) -> int:
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines[field].split()[0])


def free_bytes() -> float:
    """What new processes can take: on Linux as the kernel estimates it, elsewhere half of the memory."""
    if _MEMINFO.exists():
        return _kib(_MEMINFO, "MemAvailable") * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def own_bytes(peak: bool) -> float:
    """What this process has in memory, or had at most. Elsewhere than on Linux, at most for both."""
    if _STATUS.exists():
        return _kib(_STATUS, "VmHWM" if peak else "VmRSS") * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(Path(__file__).with_name("limits.cpp"), ["-pthread"])))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.read_rows.argtypes = [pointer, integer, pointer, integer, integer, ctypes.c_bool, pointer]
    library.update_rows.argtypes = [pointer, integer, integer, pointer, integer, integer]
    library.read_rows.restype = library.update_rows.restype = ctypes.c_double
    return library


def _row_bytes(table: Tensor, rows: Tensor) -> int:
    row_bytes = table.stride(0) * table.itemsize
    assert table.is_contiguous() and rows.is_contiguous() and rows.dtype == torch.int64
    if row_bytes % 64:
        raise ValueError(f"rows are visited by cache lines of 64 bytes, and one of these has {row_bytes} bytes")
    return row_bytes


def read_rows(table: Tensor, rows: Tensor, prefetch: bool) -> float:
    """Seconds to read these rows int64 [n] with as many threads as PyTorch has, and do nothing with them."""
    row_bytes, seen = _row_bytes(table, rows), ctypes.c_int64()
    seconds: float = _library().read_rows(
        *(table.data_ptr(), row_bytes, rows.data_ptr(), len(rows), torch.get_num_threads(), prefetch),
        ctypes.byref(seen),
    )
    return seconds


def update_rows(tables: list[Tensor], rows: Tensor) -> float:
    """Seconds to read and write these distinct rows int64 [n] of each table, with as many threads as PyTorch has."""
    pointers = (ctypes.c_void_p * len(tables))(*(table.data_ptr() for table in tables))
    numbers = _row_bytes(tables[0], rows), rows.data_ptr(), len(rows), torch.get_num_threads()
    seconds: float = _library().update_rows(pointers, len(tables), *numbers)
    return seconds


def cpu_limits(table: Tensor) -> tuple[Limits, bool]:
    """For layers that read this table and multiply in its dtype, and whether rows are read faster with prefetch."""
    (bandwidth, prefetch), (gflop_s, library) = _gather_limit(table), _gemm_limit(table.dtype)
    name = f"random rows, {'with' if prefetch else 'without'} prefetch"
    return Limits(bandwidth, name, gflop_s, f"GEMM, {library}"), prefetch


def _gather_limit(table: Tensor) -> tuple[float, bool]:
    """The bandwidth of random rows in GB/s, and whether with prefetch: the faster of both, measured in turns."""

    def sample(prefetch: bool) -> float:
        # New rows at each call: the same again would be found in the caches, or their page tables would.
        return read_rows(table, torch.randint(len(table), (ROWS,)), prefetch)

    with_prefetch, without = in_turns(REPETITIONS, partial(sample, True), partial(sample, False))
    best, prefetch = min((median(with_prefetch), True), (median(without), False))
    return ROWS * table.stride(0) * table.itemsize / best / 1e9, prefetch


def _gemm_limit(dtype: torch.dtype) -> tuple[float, str]:
    """GFLOP/s of a product of 2,048 tokens with a weight [1024, 2048], and the library that is the fastest at it."""
    left, right = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 2048, dtype=dtype)
    products = {"torch.mm": partial(torch.mm, left, right)}
    if dtype == torch.float32 and mkl_is_held_back():
        products["oneDNN"] = partial(torch.ops.memcompile.onednn_mm, left, right, None)
    seconds = in_turns(REPETITIONS, *(partial(wall_seconds, product) for product in products.values()))
    best, name = min(zip(map(median, seconds), products, strict=True))
    return 2 * 2048 * 1024 * 2048 / best / 1e9, name
