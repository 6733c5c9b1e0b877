"""What the environment asks of the GPU's kernels."""

import os

_ON = ("1", "on", "true", "yes")


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _ON


def uses_atomics() -> bool:
    """Whether gradients of rows are summed by fp32 atomics (``MEMCOMPILE_ATOMICS=1``): the sums then differ in their
    last bits from run to run.
    """
    return os.environ.get("MEMCOMPILE_ATOMICS", "").lower() in _ON
