"""Loads the C++ kernels, which register themselves for the CPU."""

import logging
import os

import torch

from memcompile.lowering.cpu.build import BuildError, kernels
from memcompile.lowering.register.kernels import LateKernels
from memcompile.lowering.triton.support import is_interpreted

log = logging.getLogger(__name__)


def _load() -> bool:
    """Loads the C++ kernels of memcompile's operators, built first where they are not in the cache.

    Returns whether they are there. Where they cannot be built, or ``MEMCOMPILE_CPU_KERNELS`` is 0 or off, the operators
    run as PyTorch operators: the same answers, several times slower, said once in the log.
    """
    if is_interpreted():  # then the CPU runs the GPU's kernels
        return False
    asked = os.environ.get("MEMCOMPILE_CPU_KERNELS", "1")
    if asked.lower() in ("0", "off", "false", "no"):
        log.warning(
            "MEMCOMPILE_CPU_KERNELS=%s: memory layers run as PyTorch operators on the CPU, which is slower", asked
        )
        return False
    try:
        torch.ops.load_library(kernels())  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as error:
        log.warning("memory layers run as PyTorch operators on the CPU, which is slower: %s", error)
        return False
    return True


load = LateKernels("CPU", _load)
