"""The private PyTorch API of the runtime, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from torch import Tensor
from torch._dynamo import OptimizedModule

__all__ = ["OptimizedModule", "sparse_parts"]


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [sparse_dim, nnz] and values [nnz, ...] of a sparse COO tensor, coalesced or not, without a copy."""
    return tensor._indices(), tensor._values()
