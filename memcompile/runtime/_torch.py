"""The private PyTorch API of the runtime, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._dynamo import OptimizedModule
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["OptimizedModule", "at_once", "sparse_parts"]


@contextmanager
def at_once() -> Iterator[None]:
    """Run operators on the tensors themselves, whatever traces or transforms what the program does."""
    with torch._C._DisableFuncTorch(), _disable_current_modes(), torch.inference_mode(False):
        yield


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [sparse_dim, nnz] and values [nnz, ...] of a sparse COO tensor, coalesced or not, without a copy."""
    return tensor._indices(), tensor._values()
