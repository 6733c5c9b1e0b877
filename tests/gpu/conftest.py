"""Tests that need a GPU: each is skipped where there is none.

`MEMCOMPILE_GPU_TESTS=cpu python -m pytest tests/gpu` rehearses them on the CPU, with small sizes, for whoever changes
them without a GPU at hand. That says nothing of any kernel of a GPU.
"""

import gc
import os
from pathlib import Path

import pytest
import torch

from tests.gpu.sizes import REAL, SMALL

HERE = Path(__file__).parent
REHEARSAL = os.environ.get("MEMCOMPILE_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available() and not REHEARSAL:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture(scope="session")
def sizes():
    return SMALL if REHEARSAL else REAL


@pytest.fixture
def needs_memory(device):
    """A function of bytes that skips the test where fewer are free."""

    def check(needed):
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            if free < needed:
                pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")

    return check
