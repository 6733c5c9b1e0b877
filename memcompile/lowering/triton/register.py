"""Registers the Triton kernels as kernels of the operators: for eager calls on a GPU, when the first of them comes, and
in the graphs that are compiled for one. Functions import `launch` and `_inductor`, which import Triton and Inductor.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import decompose_in_graphs, is_keyed
from memcompile.lowering.register.kernels import IN_PYTORCH, LateKernels, without_autocast
from memcompile.lowering.register.schema import LIBRARY, NAMESPACE
from memcompile.lowering.triton import support

# Which arguments each of the kernels takes.
_IN_GRAPHS: dict[str, Callable[..., bool]] = {  # graphs hold these in the place of the operator
    "product_key_search": support.supports_search,
    "product_key_topk": support.supports_search,
    "weighted_gather": support.supports_tensors,
    "gather_dot": support.supports_tensors,
    "weighted_scatter": support.supports_tensors,
    "pair_gather": support.supports_tensors,
    "pair_grads": support.supports_tensors,
    "pair_scatter": support.supports_tensors,
}
SUPPORTS = _IN_GRAPHS | dict.fromkeys(("row_adam", "row_adagrad", "row_sgd"), support.supports_update)


def load_for(key: str) -> bool:
    """Registers the kernels for a device's dispatch key. Returns that they are there."""
    from memcompile.lowering.triton import launch

    for name in SUPPORTS:
        LIBRARY.impl(name, functools.partial(run, name, getattr(launch, name)), key)  # type: ignore[no-untyped-call]
    return True


def run(name: str, kernel: Callable[..., Any], *args: Any) -> Any:
    """The operator `name`, by its Triton kernel where that supports the arguments, else in operations of PyTorch."""
    in_pytorch = IN_PYTORCH[name]
    if not SUPPORTS[name](*args):
        return in_pytorch(*args)
    in_pytorch.check(*args)
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with without_autocast(tensor.device), torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        return kernel(*args)


# PyTorch dispatches ROCm's tensors to CUDA's key too.
load = LateKernels("CUDA", lambda: support.has_triton() and load_for("CUDA"))


@functools.cache
def load_in_graphs() -> bool:
    """Has graphs that our backend compiles for a GPU hold the kernels, for Inductor to generate. Returns whether it
    generates `weighted_gather`.
    """
    if support.is_interpreted() or not support.is_installed():
        return False
    _register_bodies()
    return register_template()


@functools.cache
def _register_bodies() -> None:
    for name in _IN_GRAPHS:
        decompose_in_graphs(f"{NAMESPACE}::{name}", functools.partial(body_in_graph, name), LIBRARY)


def body_in_graph(name: str, *args: Any) -> Callable[..., Any] | None:
    """What a graph that is traced holds in the place of operator `name`; None where it holds the operator itself."""
    from memcompile.lowering.triton import launch

    if support.is_interpreted() or not is_keyed() or not _IN_GRAPHS[name](*args):
        return None
    if name == "weighted_gather" and register_template():
        return None
    return getattr(launch, name)  # type: ignore[no-any-return]


@functools.cache
def register_template() -> bool:
    """Tells Inductor of the template of `weighted_gather`, once. Whether this version of torch is one that it runs on;
    on another, graphs hold the kernel itself: the same answers, the gate in a kernel of its own.
    """
    try:
        from memcompile.lowering.triton import _inductor

        _inductor.register_template()
    except (ImportError, AttributeError, TypeError) as error:
        support.say_unknown_inductor(error)
        return False
    return True
