"""The harness itself: 32-bit offsets that may overflow are found, and those that cannot are not."""

import pytest
import triton
import triton.language as tl

from tests.lowering.triton.addresses import overflowing_offsets
from tests.lowering.triton.offline import TARGETS, compile_kernel

SIGNATURE = {
    "values": "*bf16",
    "slots": "*i32",
    "weights": "*fp32",
    "output": "*fp32",
    "value_dim": "i32",
}
CONSTANTS = {"HITS": 64, "BLOCK": 256}


@triton.jit
def _gather(values, slots, weights, output, value_dim, HITS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """``WIDE``: 0 never widens, 1 widens the product (too late), 2 the slots."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < value_dim
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, HITS, 8):
        hit = start + tl.arange(0, 8)
        slot = tl.load(slots + token * HITS + hit)
        weight = tl.load(weights + token * HITS + hit)
        if WIDE == 2:
            slot = slot.to(tl.int64)
        row = slot * value_dim
        if WIDE == 1:
            row = row.to(tl.int64)
        tile = tl.load(values + row[:, None] + column[None, :], mask=inside[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32) * weight[:, None], 0)
    tl.store(output + token * value_dim + column, total, mask=inside)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_in_64_bits(target):
    compiled = compile_kernel(_gather, SIGNATURE, {**CONSTANTS, "WIDE": 2}, target=target)
    assert overflowing_offsets(compiled, ["values", "slots", "weights", "output"]) == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wide", [0, 1])
def test_rows_in_32_bits_are_found(wide, target):
    compiled = compile_kernel(_gather, SIGNATURE, {**CONSTANTS, "WIDE": wide}, target=target)
    faults = overflowing_offsets(compiled, ["values", "slots", "weights", "output"])
    assert len(faults) == 1 and faults[0].startswith("values: ") and "arith.muli" in faults[0]
    assert overflowing_offsets(compiled, ["slots", "weights", "output"]) == []


def test_rows_in_32_bits_are_right_where_the_table_is_small():
    compiled = compile_kernel(_gather, SIGNATURE, {**CONSTANTS, "WIDE": 0})
    assert overflowing_offsets(compiled, ["values"], {"slots": 2**20 - 1, "value_dim": 1024}) == []
    assert overflowing_offsets(compiled, ["values"], {"slots": 2**21 + 1, "value_dim": 1024}) != []


@triton.jit
def _own_rows(starts, order, grad, output, hits, value_dim, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Every kind of control flow: a bounded `for`, a `while`, branches, a running pointer, and a row from the grid."""
    slot = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    first, last = tl.load(starts + slot), tl.load(starts + slot + 1)
    if last > first:
        total = tl.zeros([BLOCK], tl.float32)
        for hit in range(first, last):
            token = tl.load(order + hit).to(tl.int64)
            total += tl.load(grad + token * value_dim + column)
    else:
        total = tl.full([BLOCK], 1.0, tl.float32)
    low, high = hits * 0, hits
    while low < high:
        middle = low + (high - low) // 2
        if tl.load(order + middle) < slot:
            low = middle + 1
        else:
            high = middle
    pointer = grad + column
    for _ in range(low):
        total += tl.load(pointer)
        pointer += value_dim
    nearest = tl.max(tl.minimum(tl.load(order + column), 7), 0)
    total += tl.load(grad + nearest * value_dim + column)
    row = slot.to(tl.int64) if WIDE else slot
    tl.store(output + row * value_dim + column, total)


@pytest.mark.parametrize("wide", [True, False])
def test_control_flow(wide):
    signature = {
        "starts": "*i32",
        "order": "*i32",
        "grad": "*fp32",
        "output": "*fp32",
        "hits": "i32",
        "value_dim": "i32",
    }
    compiled = compile_kernel(_own_rows, signature, {"BLOCK": 256, "WIDE": wide})
    bounds = {"value_dim": 4096, "program_id(0)": 2**22, "starts": 2**20, "hits": 2**20}
    faults = overflowing_offsets(compiled, ["output", "grad", "starts"], bounds)
    assert [fault.split(":")[0] for fault in faults] == ([] if wide else ["output"])
    assert overflowing_offsets(compiled, ["grad"]) != []  # the nearest one, of a row of 2**31 numbers
    # A binary search's bounds are carried by its loop: whether they grow without end is not known.
    assert "arith.addi" in overflowing_offsets(compiled, ["order"], bounds)[0]
    assert overflowing_offsets(compiled, ["order"], bounds, products_only=True) == []


@triton.jit
def _returns_early(values, output, numel):
    index = tl.program_id(0)
    if index >= numel:
        return
    tl.store(output + index, tl.load(values + index))


def test_what_is_not_understood_raises():
    compiled = compile_kernel(_returns_early, {"values": "*fp32", "output": "*fp32", "numel": "i32"}, {})
    with pytest.raises(ValueError, match="control flow"):
        overflowing_offsets(compiled, ["values"])
    compiled = compile_kernel(_gather, SIGNATURE, {**CONSTANTS, "WIDE": 2})
    with pytest.raises(ValueError, match="no address is computed from \\['table'\\]"):
        overflowing_offsets(compiled, ["table"])
