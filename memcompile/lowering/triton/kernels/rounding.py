"""Roots and quotients rounded to nearest, numbers in the dtype of sums, and fp32 stored as bf16 stochastically."""

import triton
import triton.language as tl


@triton.jit
def number(x, SUM: tl.constexpr):
    """An argument of a kernel, fp64, in the dtype of sums: [1, 1]."""
    return tl.full([1, 1], x, SUM)


@triton.jit
def square_root(x):
    """Rounded to nearest; `tl.sqrt` of fp32 is not."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """x / y, rounded to nearest; `/` of fp32 is not."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _mixed(x):
    """A hash of 32-bit words, bit for bit that of `stochastic_rounding.py`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def store_rows(table, at, x, row, column, ok, seed, TABLE: tl.constexpr):
    """Stores x [rows, columns] at offsets `at`: bf16 from fp32 with the random bits of (seed, TABLE, row, column)."""
    if table.dtype.element_ty == tl.bfloat16:
        key = _mixed(row.to(tl.uint32) * 0x9E3779B9 + seed.to(tl.uint32) + ((TABLE * 0x85EBCA6B) & 0xFFFFFFFF))
        noise = _mixed((column.to(tl.uint32) * 0x9E3779B9)[None, :] ^ key[:, None]) & 0xFFFF
        upper = (x.to(tl.uint32, bitcast=True) + noise) >> 16
        upper = tl.where(x == x, upper, 0x7FC0)  # of NaN a carry could make a number
        tl.store(table + at, upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=ok)
    else:
        tl.store(table + at, x, mask=ok)
