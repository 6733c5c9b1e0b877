"""The Triton kernels as kernels of the operators, for a device, and in the graphs that are compiled for it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import decompose_in_graphs, is_keyed
from memcompile.lowering.register.kernels import IN_PYTORCH, without_autocast
from memcompile.lowering.register.schema import LIBRARY, NAMESPACE
from memcompile.lowering.triton import launch, template
from memcompile.lowering.triton.settings import is_interpreted
from memcompile.lowering.triton.support import are_together, supports, supports_search, supports_tensors
from memcompile.lowering.update.row_adam import RowAdam
from memcompile.lowering.update.row_tables import RowAdagrad, RowSgd, RowUpdate

Supports = Callable[..., bool]


def _supports_update(update: type[RowUpdate]) -> Supports:
    """Tables in float64 too; the numbers of `row_adam` are on the CPU, and everything else where the table is."""

    def supports_update(*args: Any) -> bool:
        given = vars(update(*args))
        tensors = [value for name, value in given.items() if isinstance(value, Tensor) and name != "numbers"]
        return are_together(tensors) and supports(tensors[0].device)

    return supports_update


# What graphs hold too, in the place of the operator.
_IN_GRAPHS: dict[str, tuple[Callable[..., Any], Supports]] = {
    "product_key_search": (launch.product_key_search, supports_search),
    "product_key_topk": (launch.product_key_topk, supports_search),
    "weighted_gather": (launch.weighted_gather, supports_tensors),
    "gather_dot": (launch.gather_dot, supports_tensors),
    "weighted_scatter": (launch.weighted_scatter, supports_tensors),
}
KERNELS = _IN_GRAPHS | {
    "row_adam": (launch.row_adam, _supports_update(RowAdam)),
    "row_adagrad": (launch.row_adagrad, _supports_update(RowAdagrad)),
    "row_sgd": (launch.row_sgd, _supports_update(RowSgd)),
}


def register_kernels(key: str) -> None:
    """Registers all of them for a device's dispatch key."""
    for name in KERNELS:
        LIBRARY.impl(name, functools.partial(run, name), key)  # type: ignore[no-untyped-call]


def run(name: str, *args: Any) -> Any:
    """The operator `name`, by Triton where it supports the arguments, else in operations of PyTorch."""
    kernel, supports_these = KERNELS[name]
    in_pytorch = IN_PYTORCH[name]
    if not supports_these(*args):
        return in_pytorch(*args)
    in_pytorch.check(*args)
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with without_autocast(tensor.device), torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        return kernel(*args)


@functools.cache
def register_in_graphs() -> bool:
    """Has graphs that our backend compiles hold the kernels, for Inductor to generate. Returns whether Inductor knows
    the template of `weighted_gather`.
    """
    for name in _IN_GRAPHS:
        decompose_in_graphs(f"{NAMESPACE}::{name}", functools.partial(body_in_graph, name), LIBRARY)
    return template.register()


def body_in_graph(name: str, *args: Any) -> Callable[..., Any] | None:
    """What a graph that is traced holds in the place of operator `name`; None where it holds the operator itself."""
    kernel, supports_these = _IN_GRAPHS[name]
    if is_interpreted() or not is_keyed() or not supports_these(*args):
        return None
    if name == "weighted_gather" and template.register():
        return None
    return launch.traced(kernel)
