"""The CPU's kernels: C++ in `src/`, built on the user's machine with the compiler that Inductor needs too, and loaded
from there.
"""

import logging
import os

import torch

from memcompile.lowering.cpu.build import BuildError, kernels
from memcompile.lowering.cpu.pages import advise_huge_pages
from memcompile.lowering.register.kernels import LateKernels
from memcompile.lowering.triton.support import is_interpreted

__all__ = ["advise_huge_pages", "load"]

log = logging.getLogger(__name__)


def _load() -> bool:
    """Loads the C++ kernels of memcompile's operators, built first where they are not in the cache.

    Returns whether they are there. Where they cannot be built, or ``MEMCOMPILE_CPU_KERNELS`` is 0 or off, the operators
    run as PyTorch operators: the same answers, several times slower, said once in the log.
    """
    if is_interpreted():  # then the CPU runs the GPU's kernels
        return False
    asked = os.environ.get("MEMCOMPILE_CPU_KERNELS", "1")
    try:
        if asked.lower() in ("0", "off", "false", "no"):
            raise BuildError(f"MEMCOMPILE_CPU_KERNELS={asked}")
        torch.ops.load_library(kernels())  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as error:
        log.warning("%s: memory layers run as PyTorch operators on the CPU, which is slower", error)
        return False
    return True


load = LateKernels("CPU", _load)
