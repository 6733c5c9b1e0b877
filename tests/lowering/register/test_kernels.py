"""A device's kernels are loaded by the first call there: once, without a word, by whichever thread comes first."""

import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from memcompile.lowering import cpu
from memcompile.lowering.register.kernels import IN_PYTORCH, LateKernels
from memcompile.lowering.register.schema import NAMESPACE, SCHEMAS, operator

ROOT = Path(__file__).parents[3]


@pytest.fixture
def probe():
    """An operator that is 1 in operations of PyTorch; the CPU's kernel, once it is loaded, returns 2."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define("probe(Tensor x) -> Tensor")
    library.impl("probe", torch.ones_like, "CompositeExplicitAutograd")
    kernels = torch.library.Library(NAMESPACE, "IMPL")
    loads: list[float] = []

    def load(there: bool = True) -> bool:
        loads.append(time.monotonic())
        if there:
            kernels.impl("probe", lambda x: torch.full_like(x, 2), "CPU")
        return there

    yield load, loads
    kernels._destroy()
    library._destroy()


def result() -> float:
    return float(operator("probe")(torch.zeros(())))


def test_the_first_call_loads_once_and_says_nothing(probe):
    load, loads = probe
    late = LateKernels("CPU", load)
    late.load_at_first_call(["probe"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [result() for _ in range(3)] == [2, 2, 2]
    assert late() and len(loads) == 1


def test_asked_for_before_the_first_call(probe):
    load, loads = probe
    late = LateKernels("CPU", load)
    late.load_at_first_call(["probe"])
    assert late() and result() == 2 and len(loads) == 1


def test_kernels_that_are_not_there(probe):
    load, loads = probe
    late = LateKernels("CPU", lambda: load(there=False))
    late.load_at_first_call(["probe"])
    assert [result(), result()] == [1, 1] and not late() and len(loads) == 1


def test_an_interrupted_load_is_tried_again(probe):
    load, loads = probe

    def interrupted() -> bool:
        if not loads:
            loads.append(0.0)
            raise KeyboardInterrupt
        return load()

    late = LateKernels("CPU", interrupted)
    late.load_at_first_call(["probe"])
    with pytest.raises(KeyboardInterrupt):
        result()
    assert result() == 2 and len(loads) == 2


def test_threads_that_come_at_once(probe):
    load, loads = probe
    barrier, found = threading.Barrier(4), []

    def slow() -> bool:
        time.sleep(0.2)
        return load()

    late = LateKernels("CPU", slow)
    late.load_at_first_call(["probe"])

    def call() -> None:
        barrier.wait()
        found.append(result())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and {*found} <= {1, 2} and result() == 2  # until they are there others run


def test_each_operator_with_a_kernel_of_the_cpu_waits_for_it():
    if not cpu.load():
        pytest.skip("no C++ compiler: the operators run as PyTorch operators here")
    has_kernel = {
        name for name in SCHEMAS if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    }
    assert has_kernel == {*IN_PYTORCH, "onednn_mm"}


QUIET = """
import warnings
warnings.simplefilter("error")
import torch
from memcompile.lowering import operator
operator("weighted_gather")(torch.randn(7, 5), torch.tensor([[1, 6]]), torch.tensor([[2.0, 3.0]]))
"""


def test_no_kernel_takes_the_place_of_another():
    """PyTorch warns of it, from C++ too."""
    cpu.load()  # its build is said
    environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "INFO"}
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and "Overriding" not in done.stderr, done.stderr
