"""How an operator of ours gets its kernel, its fake, its vmap rule and its derivative.

The derivative is an `autograd.Function` registered as the operator's Autograd kernel, entered on every call.
`torch.library.register_autograd` enters its Function only when an input requires a gradient, and so returns a
silent zero for forward-mode differentiation; ours raises.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from memcompile.lowering._torch import autograd_kernel, below_autograd, decompose_in_graphs
from memcompile.lowering.register.dispatch import anywhere
from memcompile.lowering.register.schema import LIBRARY, NAMESPACE, operator
from memcompile.lowering.triton.serve import gpu_kernel, graph_kernel


def register_operator(
    name: str,
    *,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    setup_context: Callable[[Any, Any, Any], None],
    backward: Callable[..., Any],
    under_autograd: Callable[..., Any] | None = None,
) -> None:
    """Give the operator `name` all of its rules.

    Args:
        name: a key of `schema.SCHEMAS`.
        check: raises ValueError for arguments that the operator cannot serve; the rest may assume what it holds.
        kernel: one implementation for all devices, in operations of PyTorch; `anywhere` tells what runs in its place.
        fake: shapes and dtypes of the outputs.
        vmap: a rule as `torch.library.register_vmap` takes it.
        setup_context, backward: as in `torch.autograd.Function`. `backward` is built of differentiable
            operations, so that derivatives of any order exist.
        under_autograd: what runs below autograd, the operator itself by default. An operator that gives its
            body here is taken apart whenever it is traced with autograd, and keeps its derivative.
    """
    run = under_autograd or operator(name)

    def forward(*args: Any) -> Any:
        check(*args)
        with below_autograd():
            return run(*args)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} has no forward-mode derivative. "
            "Use reverse mode: backward(), torch.func.grad, vjp or jacrev."
        )

    title = "".join(part.capitalize() for part in name.split("_"))
    differentiable = autograd_kernel(title, forward=forward, setup_context=setup_context, backward=backward, jvp=jvp)
    run_anywhere = anywhere(name, check, kernel, gpu_kernel)
    LIBRARY.impl(name, run_anywhere, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, differentiable, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=LIBRARY)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=LIBRARY)
    decompose_in_graphs(f"{NAMESPACE}::{name}", functools.partial(graph_kernel, name), LIBRARY)
