"""What Linux is told of a table's pages: huge ones for a large table, where a row read at random costs a walk through
the page tables too, and those of small pages do not fit the caches; and which pages of a file are read next.
"""

import ctypes
import logging
import mmap
import platform
from collections.abc import Iterable

from torch import Tensor

log = logging.getLogger(__name__)

_HUGE_PAGE = 2**21  # bytes


def advise_huge_pages(table: Tensor) -> None:
    """Asks Linux to back ``table``, on the CPU and not written to yet, with huge pages; elsewhere does nothing."""
    if table.device.type != "cpu" or platform.system() != "Linux":
        return
    start = -(-table.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (table.data_ptr() + table.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE):
        log.debug("no huge pages for a table of %d bytes: errno %d", table.nbytes, ctypes.get_errno())


def read_ahead(table: Tensor, rows: Iterable[int]) -> None:
    """Starts to read these rows of ``table`` [num_rows, dim], which is mapped from a file, and waits for none. The
    CPU's kernels do it in `prefetch.h`. Where there is no madvise, nothing is read ahead.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    madvise = ctypes.CDLL(None).madvise
    stride, size = table.stride(0) * table.element_size(), table.shape[1] * table.element_size()
    for row in rows:
        start = table.data_ptr() + row * stride
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(ctypes.c_void_p(page), ctypes.c_size_t(start + size - page), mmap.MADV_WILLNEED)
