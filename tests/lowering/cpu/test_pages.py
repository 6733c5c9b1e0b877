"""Advice for huge pages: taken by Linux, harmless elsewhere."""

import ctypes
import platform
from pathlib import Path

import pytest
import torch

from memcompile.lowering import operator
from memcompile.lowering.cpu import advise_huge_pages, load, pages


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


def flags_of(address):
    """What Linux notes of the mapping that has this address: "hg" is that huge pages were advised."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            start, end = (int(number, 16) for number in name.split("-"))
            inside = start <= address < end
        elif inside and name == "VmFlags:":
            return rest
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
@pytest.mark.parametrize("name", ["row_sums", "weighted_scatter"])
def test_gradients_of_rows(name):
    assert load()
    slots = torch.randperm(2**12).int().view(64, 64)
    weights, grad = torch.rand(64, 64), torch.randn(64, 1024)
    found = operator(name)(slots, weights, grad, 2**12)
    sums = found[1] if name == "row_sums" else found  # [2**12, 1024], 16 MiB
    expected = torch.empty_like(sums)
    expected[slots.long()] = weights.unsqueeze(-1) * grad.unsqueeze(1)  # each row is one product, which is exact
    assert torch.equal(sums, expected)
    assert "hg" in flags_of(sums.data_ptr() + 2**21)
