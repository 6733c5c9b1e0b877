"""Loads the Triton kernels, which import Triton: for eager calls on a GPU, and for the graphs that are compiled."""

import functools

from memcompile.lowering.register.kernels import LateKernels
from memcompile.lowering.triton.settings import is_interpreted
from memcompile.lowering.triton.support import has_triton, is_installed


def _load() -> bool:
    """Registers the kernels for GPUs: for ROCm's too, which PyTorch dispatches to CUDA's key. Returns whether they are
    there.
    """
    return has_triton() and load_for("CUDA")


def load_for(key: str) -> bool:
    """Registers the kernels for a device's dispatch key."""
    from memcompile.lowering.triton.register import register_kernels

    register_kernels(key)
    return True


@functools.cache
def load_in_graphs() -> bool:
    """Has graphs that are compiled for a GPU hold the kernels. Returns whether Inductor generates `weighted_gather`."""
    if is_interpreted() or not is_installed():
        return False
    from memcompile.lowering.triton.register import register_in_graphs

    return register_in_graphs()


load = LateKernels("CUDA", _load)
