"""What the machine itself takes to read and write rows of tables as large as the values and Adam's moments."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from memcompile.lowering import cpu
from memcompile.lowering.cpu.build import build

TABLES = 3


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(Path(__file__).with_name("hardware.cpp"), ["-pthread"])))
    library.update_rows.restype = ctypes.c_double
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.update_rows.argtypes = [pointer, integer, integer, pointer, integer, integer]
    return library


def new_tables(num_slots: int, row_bytes: int) -> list[Tensor]:
    """In huge pages: the least that a walk through page tables can cost."""
    found = [torch.empty(num_slots, row_bytes, dtype=torch.uint8) for _ in range(TABLES)]
    for table in found:
        cpu.advise_huge_pages(table)
        table.zero_()
    return found


def update_rows(tables: list[Tensor], rows: Tensor) -> float:
    """Seconds for these distinct rows int64 [n] of each table, with as many threads as PyTorch has."""
    row_bytes = tables[0].stride(0)
    if row_bytes % 64:
        raise ValueError(f"rows are updated by cache lines of 64 bytes, and one of these has {row_bytes} bytes")
    assert rows.dtype == torch.int64 and rows.is_contiguous()
    pointers = (ctypes.c_void_p * len(tables))(*(table.data_ptr() for table in tables))
    seconds: float = _library().update_rows(
        pointers, len(tables), row_bytes, rows.data_ptr(), len(rows), torch.get_num_threads()
    )
    return seconds
