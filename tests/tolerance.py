"""The one tolerance of this repository's numerical tests: no worse than the same maths in the same precision."""

import torch
from torch import Tensor


def largest_error(tensor: Tensor, exact: Tensor) -> float:
    """max |tensor - exact| in float64; 0 for empty tensors."""
    error = (tensor.detach().double() - exact.detach().double()).abs()
    return error.max().item() if error.numel() else 0.0


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "result") -> None:
    """Assert err(actual) <= 2 * (err(plain) + eps * max|exact|), with errors taken against `exact`. Where all are in
    float64, `exact` has errors of its own, and eps is four times as large.

    Args:
        actual: what is tested.
        plain: the same maths in plain PyTorch, in the same dtype as `actual`.
        exact: the same maths in float64.
        name: for the message.
    """
    assert actual.shape == exact.shape == plain.shape, (name, actual.shape, plain.shape, exact.shape)
    assert actual.dtype == plain.dtype, (name, actual.dtype, plain.dtype)
    assert exact.dtype == torch.float64, (name, exact.dtype)
    scale = largest_error(exact, torch.zeros_like(exact))
    eps = torch.finfo(actual.dtype).eps * (4 if actual.dtype is torch.float64 else 1)
    allowed = 2 * (largest_error(plain, exact) + eps * scale)
    error = largest_error(actual, exact)
    # Written so that a NaN on either side fails.
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (values up to {scale:.3g})"
