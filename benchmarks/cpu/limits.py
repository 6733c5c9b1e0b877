"""This machine's limits, measured in the same run as the layers: how fast rows are read at random and matrices
multiplied.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from memcompile.lowering.cpu.build import build
from memcompile.lowering.inductor.gemm import mkl_is_held_back

ROWS = 2**16  # rows read at once: as many as 512 tokens with 4 heads of 32 hits read
REPETITIONS = 21


@dataclass(frozen=True)
class Limits:
    """The machine's, for one dtype."""

    gather_gb_s: float  # bytes of random rows of the very table that the layers read, 10**9 a second
    gather_prefetched: bool  # whether software prefetch gave that, or its absence
    gemm_gflop_s: float
    gemm: str  # the library that gave that


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(Path(__file__).with_name("limits.cpp"), ["-pthread"])))
    library.read_rows.restype = ctypes.c_double
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.read_rows.argtypes = [pointer, integer, pointer, integer, integer, ctypes.c_bool, pointer]
    return library


def random_rows(table: Tensor, rows: int = ROWS) -> Tensor:
    """Row numbers, new ones at each call: the same again would be found in the caches, or their page tables would."""
    return torch.randint(len(table), (rows,))


def read_rows(table: Tensor, rows: Tensor, prefetch: bool) -> float:
    """Seconds to read these rows of the table with as many threads as PyTorch has, and do nothing with them."""
    row_bytes = table.stride(0) * table.itemsize
    assert table.is_contiguous() and rows.dtype == torch.int64
    if row_bytes % 64:
        raise ValueError(f"rows are read by cache lines of 64 bytes, and one of these has {row_bytes} bytes")
    threads, seen = torch.get_num_threads(), ctypes.c_int64()
    seconds: float = _library().read_rows(
        table.data_ptr(), row_bytes, rows.data_ptr(), len(rows), threads, prefetch, ctypes.byref(seen)
    )
    return seconds


def gather_limit(table: Tensor) -> tuple[float, bool]:
    """The bandwidth of random rows in GB/s, and whether with prefetch: the faster of both, measured in turns."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(REPETITIONS):
        for prefetch, measured in seconds.items():
            measured.append(read_rows(table, random_rows(table), prefetch))
    best, prefetch = min((statistics.median(measured), prefetch) for prefetch, measured in seconds.items())
    return ROWS * table.stride(0) * table.itemsize / best / 1e9, prefetch


def gemm_limit(dtype: torch.dtype) -> tuple[float, str]:
    """GFLOP/s of a product of 2,048 tokens with a weight [1024, 2048], and the library that is the fastest at it."""
    left, right = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 2048, dtype=dtype)
    products: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(left, right)}
    if dtype == torch.float32 and mkl_is_held_back():
        products["oneDNN"] = lambda: torch.ops.memcompile.onednn_mm(left, right, None)
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(REPETITIONS):
        for name, product in products.items():
            start = time.perf_counter()
            product()
            seconds[name].append(time.perf_counter() - start)
    best, name = min((statistics.median(measured), name) for name, measured in seconds.items())
    return 2 * 2048 * 1024 * 2048 / best / 1e9, name


def measure_limits(table: Tensor) -> Limits:
    """The limits for layers that read this table and multiply in its dtype."""
    gather_gb_s, prefetched = gather_limit(table)
    gemm_gflop_s, gemm = gemm_limit(table.dtype)
    return Limits(gather_gb_s, prefetched, gemm_gflop_s, gemm)
