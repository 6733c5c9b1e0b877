"""Huge pages for a large table, where a row read at random costs a walk through the page tables too, and those of small
pages do not fit the caches.
"""

import ctypes
import logging
import mmap
import platform

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
