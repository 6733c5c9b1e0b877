"""Advice for huge pages: taken by Linux, harmless elsewhere."""

import ctypes
import platform

import pytest
import torch

from memcompile.lowering.cpu import advise_huge_pages, pages


@pytest.mark.skipif(platform.system() != "Linux", reason="madvise of huge pages is Linux's")
def test_whole_huge_pages_inside_the_table(monkeypatch):
    table = torch.empty(3 * 2**20)  # 12 MiB
    seen = []
    libc = ctypes.CDLL(None, use_errno=True)

    class Libc:
        @staticmethod
        def madvise(start, length, advice):
            seen.append((start.value, length.value))
            return libc.madvise(start, length, advice)

    monkeypatch.setattr(pages.ctypes, "CDLL", lambda *args, **kwargs: Libc)
    advise_huge_pages(table)
    ((start, length),) = seen
    assert start % 2**21 == length % 2**21 == 0
    assert table.data_ptr() <= start < start + length <= table.data_ptr() + table.nbytes
    assert length >= table.nbytes - 2 * 2**21


@pytest.mark.parametrize("table", [torch.empty(5), torch.empty(0), torch.empty(2**22, device="meta")])
def test_nothing_to_advise(table, monkeypatch):
    monkeypatch.setattr(pages.ctypes, "CDLL", None)  # would raise
    advise_huge_pages(table)
