"""The kernels that update rows of tables in place: `row_adam`, `row_adagrad`, `row_sgd`. Bound by memory bandwidth.

A program has ROWS of the rows that a step touches, or BLOCK_COLUMNS of their columns. Rows are distinct, so that every
number has one owner, which reads it once and writes it once. A row that the table does not have is left out.

Tables are contiguous [num_slots, value_dim]; `slots` [total] are the rows' numbers. Where there is a `master`, in fp32,
it is updated, and `param` in bf16 is the nearest to it. Sums are in fp32, of fp64 tables in fp64. A kernel's numbers
come as fp64: Triton takes a float for fp32 unless it is told. Roots and quotients are rounded to nearest, and fp32 is
stored as bf16 stochastically.
"""

import triton
import triton.language as tl

_PARAM = tl.constexpr(0)
_EXP_AVG = tl.constexpr(1)
_EXP_AVG_SQ = tl.constexpr(2)  # the tables of a step, which round apart, as in `row_tables`


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


@triton.jit
def _rows_of_program(slots, total, num_slots, ROWS: tl.constexpr):
    """Where the rows of a program are among those touched, their numbers, and which are there. All [ROWS], int64."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(slots + position, mask=position < total, other=-1)
    return position, row, (row >= 0) & (row < num_slots)


@triton.jit
def _load_table(param, master, row, row_ok, column, value_dim, SUM: tl.constexpr):
    """What is updated [rows, columns], the offsets where it is, and which of it is there."""
    ok = row_ok[:, None] & (column < value_dim)[None, :]
    at = row[:, None] * value_dim + column.to(tl.int64)[None, :]
    pointers = param + at if master is None else master + at
    return tl.load(pointers, mask=ok, other=0.0).to(SUM), at, ok


@triton.jit
def _store_table(param, master, at, x, row, column, ok, seed):
    if master is None:
        store_rows(param, at, x, row, column, ok, seed, _PARAM)
    else:
        tl.store(master + at, x, mask=ok)
        tl.store(param + at, x.to(tl.bfloat16), mask=ok)


@triton.jit
def _panel(panel, root, eps, row_ok, MOMENTS: tl.constexpr):
    """One panel's skipped steps, for m = 1: of sqrt(v) [ROWS, columns] and the rows' panels, [ROWS] pointers."""
    SUM: tl.constexpr = root.dtype
    scaled = root * tl.load(panel, mask=row_ok, other=0.0).to(SUM)[:, None]
    inverse = 1.0 / (scaled + eps)  # in fp32 to two units in the last place, without branches
    y = scaled * inverse
    powers = tl.load(panel + MOMENTS, mask=row_ok, other=0.0).to(SUM)[:, None]
    for i in tl.static_range(1, MOMENTS):
        powers = powers * y + tl.load(panel + (MOMENTS - i), mask=row_ok, other=0.0).to(SUM)[:, None]
    return powers * inverse


@triton.jit(do_not_specialize=["total", "panels_each", "seed"])
def update_adam(
    param, master, exp_avg, exp_avg_sq, slots, grad, missed_steps, decays, panels, counts,
    total, num_slots, value_dim, panels_each, seed: tl.uint32,
    decay: tl.float64, beta1: tl.float64, beta2: tl.float64, rate: tl.float64, scale: tl.float64, eps: tl.float64,
    taken1: tl.float64, taken2: tl.float64,
    ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """See `row_adam`; taken1 and taken2 are 1 - beta1 and 1 - beta2. Any of master, grad [total, value_dim] and
    missed_steps [total] may be None; so may counts [entries], how many of its panels_each an entry uses: then one.

    Grid: (blocks of rows, blocks of columns).
    """
    SUM: tl.constexpr = tl.float64 if param.dtype.element_ty == tl.float64 else tl.float32
    position, row, row_ok = _rows_of_program(slots, total, num_slots, ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    x, at, ok = _load_table(param, master, row, row_ok, column, value_dim, SUM)
    m = tl.load(exp_avg + at, mask=ok, other=0.0).to(SUM)
    v = tl.load(exp_avg_sq + at, mask=ok, other=0.0).to(SUM)
    if counts is None and grad is not None:  # with the rest; not where it would take registers for long
        g = tl.load(grad + position[:, None] * value_dim + column[None, :], mask=ok, other=0.0)
    below = number(eps, SUM)
    if missed_steps is not None:
        entry = tl.load(missed_steps + position, mask=row_ok, other=0)
        first = panels + entry * panels_each * (MOMENTS + 1)
        root = square_root(v)
        if counts is None:
            steps = _panel(first, root, below, row_ok, MOMENTS)
        else:
            steps = tl.zeros([ROWS, BLOCK_COLUMNS], SUM)
            for _ in range(0, tl.max(tl.load(counts + entry, mask=row_ok, other=0), 0)):
                steps += _panel(first, root, below, row_ok, MOMENTS)
                first += MOMENTS + 1
        past = decays + 3 * entry
        x = x * tl.load(past, mask=row_ok, other=0.0).to(SUM)[:, None] - m * steps
        m *= tl.load(past + 1, mask=row_ok, other=0.0).to(SUM)[:, None]
        v *= tl.load(past + 2, mask=row_ok, other=0.0).to(SUM)[:, None]
    if grad is not None:
        if counts is not None:
            g = tl.load(grad + position[:, None] * value_dim + column[None, :], mask=ok, other=0.0)
        taken = number(taken1, SUM)
        # As torch.lerp: from the nearer end, so that what is near m or near g has their precision.
        is_near = taken < 0.5
        m = tl.where(is_near, m, g) + tl.where(is_near, taken, -number(beta1, SUM)) * (g - m)
        v = v * number(beta2, SUM) + number(taken2, SUM) * (g * g)
        x = x * number(decay, SUM) - quotient(number(rate, SUM) * m, square_root(v) * number(scale, SUM) + below)
    _store_table(param, master, at, x, row, column, ok, seed)
    store_rows(exp_avg, at, m, row, column, ok, seed, _EXP_AVG)
    store_rows(exp_avg_sq, at, v, row, column, ok, seed, _EXP_AVG_SQ)


@triton.jit
def _tile(param, master, grad, position, row, row_ok, column, value_dim, added, SUM: tl.constexpr):
    """x, g = grad + added * x, where they are, and which are there: [ROWS, columns]."""
    x, at, ok = _load_table(param, master, row, row_ok, column, value_dim, SUM)
    g = tl.load(grad + position[:, None] * value_dim + column.to(tl.int64)[None, :], mask=ok, other=0.0)
    return x, g + added * x, at, ok


@triton.jit(do_not_specialize=["total", "seed"])
def update_adagrad(
    param, master, squares, slots, grad, total, num_slots, value_dim, seed: tl.uint32,
    lr: tl.float64, eps: tl.float64, added: tl.float64, kept: tl.float64,
    ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x = kept * x - lr / (sqrt(squares) + eps) * g with g = grad + added * x, where squares [num_slots] grow by the
    means of g**2. WHOLE: a block has all of a row; where it has not, a row is read twice. Grid: (blocks of rows,).
    """
    SUM: tl.constexpr = tl.float64 if param.dtype.element_ty == tl.float64 else tl.float32
    position, row, row_ok = _rows_of_program(slots, total, num_slots, ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    more = number(added, SUM)
    x, g, at, ok = _tile(param, master, grad, position, row, row_ok, column, value_dim, more, SUM)
    sums = g * g
    if not WHOLE:
        for start in range(BLOCK_COLUMNS, value_dim, BLOCK_COLUMNS):
            x, g, at, ok = _tile(param, master, grad, position, row, row_ok, start + column, value_dim, more, SUM)
            sums += g * g
    total_squares = tl.load(squares + row, mask=row_ok, other=0.0)
    total_squares += quotient(tl.sum(sums, 1), tl.zeros([ROWS], SUM) + value_dim)
    tl.store(squares + row, total_squares, mask=row_ok)
    step = quotient(number(lr, SUM), square_root(total_squares)[:, None] + number(eps, SUM))  # [ROWS, 1]
    if WHOLE:
        _store_table(param, master, at, x * number(kept, SUM) - step * g, row, column, ok, seed)
    else:
        for start in range(0, value_dim, BLOCK_COLUMNS):
            x, g, at, ok = _tile(param, master, grad, position, row, row_ok, start + column, value_dim, more, SUM)
            x = x * number(kept, SUM) - step * g
            _store_table(param, master, at, x, row, start + column, ok, seed)


@triton.jit(do_not_specialize=["total", "seed"])
def update_sgd(
    param, master, slots, grad, decays, total, num_slots, value_dim, seed: tl.uint32, rate: tl.float64,
    ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """x = decay * x - rate * g; master, grad [total, value_dim] and decays [total] fp64 may be None. Grid: (blocks of
    rows, blocks of columns).
    """
    SUM: tl.constexpr = tl.float64 if param.dtype.element_ty == tl.float64 else tl.float32
    position, row, row_ok = _rows_of_program(slots, total, num_slots, ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    x, at, ok = _load_table(param, master, row, row_ok, column, value_dim, SUM)
    if decays is not None:
        x *= tl.load(decays + position, mask=row_ok, other=1.0).to(SUM)[:, None]
    if grad is not None:
        g = tl.load(grad + position[:, None] * value_dim + column[None, :], mask=ok, other=0.0)
        x -= number(rate, SUM) * g
    _store_table(param, master, at, x, row, column, ok, seed)
