"""The private Inductor API of this folder, and nothing else. Tried on torch 2.11, 2.13 and 2.15.

Importing it imports Inductor; on a version that has moved it raises ImportError or AttributeError, which
`template.register` takes as a version that is not known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V

__all__ = [
    "SymbolicGridFn",
    "TritonTemplate",
    "autotune",
    "call_operator",
    "contiguous",
    "hint",
    "is_autotuned",
    "lower",
    "output_layout",
    "static",
    "stored_shape",
]


def lower(overload: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what Inductor makes of an operator, from its arguments as Inductor holds them."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = register_lowering(
        overload, type_promotion_kind=None
    )
    return decorator


def call_operator(overload: torch._ops.OpOverload, *args: Any) -> Any:
    """What Inductor makes of an operator that it has no lowering for: a call."""
    return fallback_handler(overload, add_to_fallback_set=False)(*args)  # type: ignore[no-untyped-call]


def contiguous(node: Any) -> Any:
    """A buffer of this tensor, contiguous: itself, or a copy."""
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))


def output_layout(like: Any, size: Sequence[Any]) -> Any:
    """The contiguous layout of an output with the device and dtype of `like`."""
    return ir.FixedLayout(like.get_device(), like.get_dtype(), list(size))


def stored_shape(node: Any) -> list[Any]:
    """The size of a tensor: ints, and sympy expressions where it is dynamic."""
    return list(node.get_size())


def hint(size: Any) -> int:
    """A size, or what a symbolic one was when it was traced; 0 where nothing is known of it. Adds no guard."""
    return int(V.graph.sizevars.optimization_hint(size, fallback=0))


def static(size: Any) -> int | None:
    """A size as an int; None where it is symbolic."""
    return int(size) if isinstance(size, (int, sympy.Integer)) else None


def is_autotuned() -> bool:
    """Whether Inductor was asked to measure kernels before it picks one."""
    return bool(config.max_autotune)


def autotune(
    name: str, choices: list[Any], inputs: list[Any], layout: Any, examples: dict[int, Callable[[Any], Tensor]]
) -> Any:
    """The output of the fastest choice, measured on `examples` (by position of the input) where there are several."""
    chosen = autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=examples)  # type: ignore[no-untyped-call]
    return chosen[0] if isinstance(chosen, tuple) else chosen  # with its choice, from 2.13 on
