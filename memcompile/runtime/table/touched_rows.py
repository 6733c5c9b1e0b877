"""The rows that a gradient touches, each once, in a sum that does not depend on the order of its duplicates."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.runtime._torch import sparse_parts

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_CHUNK_ELEMENTS = 2**20


def touched_rows(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Distinct rows int64 [n], ascending, and their gradients [n, dim] in `dtype`; of a dense gradient, all rows.

    Args:
        grad: [slots, ...], sparse COO with one sparse dimension, coalesced or not, or dense.

    Raises:
        ValueError: the gradient has another layout, or more sparse dimensions.
    """
    check_layout(grad)
    if grad.layout is torch.strided:
        return torch.arange(grad.shape[0], device=grad.device), as_rows(grad).to(dtype)
    indices, values = sparse_parts(grad)
    rows, values = indices[0], as_rows(values)
    ascending = grad.is_coalesced() or bool((rows[1:] > rows[:-1]).all())  # clipping forgets that it is coalesced
    return (rows, values.to(dtype)) if ascending else sum_by_row(rows, values, dtype)


def check_layout(grad: Tensor) -> None:
    """Raises ValueError unless a gradient is one that rows are stepped by."""
    if grad.layout is not torch.strided and (grad.layout is not torch.sparse_coo or grad.sparse_dim() != 1):
        raise ValueError(
            f"grad: expected dense, or sparse COO with dim 0 sparse (nn.Embedding(sparse=True)), got {grad.layout}"
            + (f" with {grad.sparse_dim()} sparse dimensions" if grad.layout is torch.sparse_coo else "")
        )


def as_rows(tensor: Tensor) -> Tensor:
    """[n, ...] as contiguous [n, dim], without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(tensor.shape[0], tensor.shape[1:].numel())


def sum_by_row(rows: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The distinct rows, ascending, and the sums of the values [nnz, dim] of equal rows [nnz], in `dtype`.

    Floating-point sums depend on their order. Here the duplicates of a row are first ordered by a hash of their bits,
    so the sum is one of what is summed, whatever order that came in (but for two that differ with one hash of 64 bits).
    """
    order = rows.argsort(stable=True)
    ranked = rows[order]
    distinct, counts = torch.unique_consecutive(ranked, return_counts=True)  # the one wait for a GPU
    if len(distinct) == len(rows):
        return ranked, values[order].to(dtype)
    order = _fingerprints(values).argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    sums = F.embedding_bag(order, values.to(dtype), counts.cumsum(0) - counts, mode="sum")
    return distinct, sums


def _fingerprints(values: Tensor) -> Tensor:
    """A hash, int64 [nnz], of each row's bits: sums of products with fixed odd numbers, modulo 2**64."""
    factors = _factors(values.shape[1], values.device)
    bits = values.contiguous().view(_INTEGER[values.element_size()])
    size = max(1, _CHUNK_ELEMENTS // max(1, values.shape[1]))
    return torch.cat([(part.long() * factors).sum(1) for part in torch.split(bits, size)])


@functools.lru_cache(maxsize=8)
def _factors(dim: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (dim,), generator=generator, device="cpu") * 2 + 1).to(device)
