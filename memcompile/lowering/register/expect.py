"""What operators ask of their tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def expect(
    name: str, tensor: Tensor, shape: Sequence[int | str], *dtypes: torch.dtype, contiguous: bool = False
) -> None:
    """Raises ValueError, which names the argument, unless the tensor has this shape and one of these dtypes.

    Args:
        shape: its sizes; a word stands for any size.
        dtypes: with none of them, any that is floating point.
        contiguous: whether the tensor must be.
    """
    sizes = zip(shape, tensor.shape, strict=False)
    has_shape = len(shape) == tensor.dim() and all(isinstance(size, str) or size == own for size, own in sizes)
    has_dtype = tensor.dtype in dtypes if dtypes else tensor.is_floating_point()
    if has_shape and has_dtype and (tensor.is_contiguous() or not contiguous):
        return
    kind = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "floating point"
    wanted = f"{'contiguous ' if contiguous else ''}{kind} [{', '.join(map(str, shape))}]"
    raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype} {list(tensor.shape)}")
