"""Adam's update of the rows that a step touches, on its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common.setting import Setting
from benchmarks.gpu.case import OURS, STEP, UPDATE, Case, Entry
from memcompile.lowering import operator
from memcompile.lowering.update.row_adam import moments_of

SPARSE, FUSED = "torch.optim.SparseAdam", "torch.optim.AdamW, fused, all rows"
MOST_SLOTS = 2**16
TABLES = 7  # of which a row is read or written: values and both moments each, and the gradient


def update_case(setting: Setting, device: torch.device, tokens: int, all_peers: bool) -> Case:
    """One row a token, fp32 with fp32 moments. All update the same values, so none is compared with another."""
    slots, dim = max(tokens, min(setting.num_slots, MOST_SLOTS)), setting.value_dim
    values = nn.Parameter(torch.randn(slots, dim, device=device))
    moments = [torch.zeros_like(values) for _ in range(2)]
    numbers = torch.tensor([1.0, 0.9, 0.999, 1e-3, 1.0, 1e-8], dtype=torch.float64)
    decays = torch.full((1, 3), 0.9, dtype=torch.float64, device=device)
    panels = torch.full((1, 1, 1 + moments_of(values.dtype)), 1e-3, dtype=torch.float64, device=device)
    sparse = torch.optim.SparseAdam([values], lr=1e-3)

    def draw(count: int) -> tuple[Tensor, ...]:
        rows = torch.randperm(slots, device=device)[:count].sort().values
        return rows, torch.randn(count, dim, device=device)

    def ours(rows: Tensor, grad: Tensor) -> None:
        operator("row_adam")(values, None, *moments, rows, grad, None, None, None, numbers, 0)

    def late(rows: Tensor, grad: Tensor) -> None:
        plans = torch.zeros_like(rows), decays, panels
        operator("row_adam")(values, None, *moments, rows, grad, *plans, numbers, 0)

    def sparse_adam(rows: Tensor, grad: Tensor) -> None:
        values.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad, values.shape, is_coalesced=True)
        sparse.step()
        values.grad = None

    runs: dict[str, Callable[..., None]] = {OURS: ours, "memcompile, rows that are late": late, SPARSE: sparse_adam}
    if all_peers:
        runs[FUSED] = _fused(values)
    moved = float(tokens * (TABLES * dim * values.itemsize + 8))
    entries = tuple(Entry(name, run, 0.0, moved) for name, run in runs.items())
    return Case(UPDATE, setting, tokens, STEP, draw, entries, SPARSE, frozenset(runs) - {SPARSE})


def _fused(values: nn.Parameter) -> Callable[..., None]:
    """Dense AdamW, with a gradient that is there already."""
    dense, gradient = torch.optim.AdamW([values], lr=1e-3, fused=True), torch.randn_like(values)

    def run(rows: Tensor, grad: Tensor) -> None:
        values.grad = gradient
        dense.step()
        values.grad = None

    return run
