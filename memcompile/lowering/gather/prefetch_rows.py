"""`prefetch_rows`: asks the system for rows of a table that is mapped from a file, before they are read.

It starts to read what is not in memory yet, all rows at once, and waits for none: a disk serves many requests in the
time of one, and a gather asks for one page after the other. It returns a copy of the slots: a gather by these comes
after it in every graph, and keeps it there. There is no derivative.
"""

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import check_slots
from memcompile.lowering.register.operators import register_operator
from memcompile.lowering.register.schema import expect, operator
from memcompile.lowering.register.vmap import fold_into_tokens, unfold_tokens


def _check(values: Tensor, slots: Tensor) -> None:
    check_slots(slots)
    expect("values", values, ("num_slots", "value_dim"))


def _prefetch(values: Tensor, slots: Tensor) -> Tensor:
    """As the CPU's kernels do it in `prefetch.h`; where there is no madvise, nothing is read ahead."""
    if values.device.type == "cpu" and hasattr(mmap, "MADV_WILLNEED"):
        madvise = ctypes.CDLL(None).madvise
        stride, size = values.stride(0) * values.element_size(), values.shape[1] * values.element_size()
        for row in torch.unique(slots).tolist():  # type: ignore[no-untyped-call]
            start = values.data_ptr() + row * stride
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            madvise(ctypes.c_void_p(page), ctypes.c_size_t(start + size - page), mmap.MADV_WILLNEED)
    return slots.clone(memory_format=torch.contiguous_format)


def _fake(values: Tensor, slots: Tensor) -> Tensor:
    return slots.new_empty(slots.shape)


def _vmap(info: Any, in_dims: Any, values: Tensor, slots: Tensor) -> tuple[Tensor, int]:
    if in_dims[0] is not None:  # several tables are no file
        return slots.clone(), in_dims[1]
    folded = fold_into_tokens(slots, in_dims[1], info.batch_size)
    return unfold_tokens(operator("prefetch_rows")(values, folded), info.batch_size), 0


register_operator("prefetch_rows", check=_check, kernel=_prefetch, fake=_fake, vmap=_vmap)
