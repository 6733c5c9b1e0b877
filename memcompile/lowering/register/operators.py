"""How an operator of ours is registered: its kernel, its fake, its vmap rule and its derivative.

The derivative is an `autograd.Function` registered as the operator's Autograd kernel, entered on every call.
`torch.library.register_autograd` enters its Function only when an input requires a gradient, and so returns a
silent zero for forward-mode differentiation; ours raises.
"""

from collections.abc import Callable
from typing import Any

import torch

from memcompile.lowering._torch import autograd_kernel, below_autograd, is_traced
from memcompile.lowering.inductor.caches import tag_traced
from memcompile.lowering.register.kernels import IN_PYTORCH, InPyTorch
from memcompile.lowering.register.schema import LIBRARY, NAMESPACE, operator

Function = Callable[..., Any]


def register_operator(
    name: str, *, check: Function, kernel: Function, fake: Function, vmap: Function | None = None
) -> None:
    """Registers an operator that has no derivative: what it returns requires no gradient, whatever it is given.

    Args:
        name: a key of `schema.SCHEMAS`.
        check: raises ValueError for arguments that the operator cannot take; the rest may assume what it holds.
        kernel: one implementation for all devices, in operations of PyTorch; devices may have their own.
        fake: shapes and dtypes of the outputs.
        vmap: a rule as `torch.library.register_vmap` takes it.
    """
    _register(name, InPyTorch(check, torch.no_grad()(kernel)), fake, vmap, torch.library.fallthrough_kernel)


def register_arguments(name: str, arguments: type[Any]) -> None:
    """Registers such an operator by a class of its arguments, in the order of its schema, with the methods `check`,
    `fake`, and `run` for the kernel.
    """
    register_operator(
        name,
        check=lambda *args: arguments(*args).check(),
        kernel=lambda *args: arguments(*args).run(),
        fake=lambda *args: arguments(*args).fake(),
    )


def register_for_graphs(
    name: str,
    kernel: Function,
    fake: Function,
    key: str,
    derivative: Function = torch.library.fallthrough_kernel,
    vmap: Function | None = None,
) -> None:
    """Registers an operator with one kernel, for the dispatch key `key`. By default it has no derivative: it is of
    graphs in which derivatives are there already.
    """
    if vmap is not None:
        torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=LIBRARY)
    LIBRARY.impl(name, torch.no_grad()(kernel), key)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, derivative, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def register_differentiable(
    name: str,
    *,
    check: Function,
    kernel: Function,
    fake: Function,
    backward: Function,
    vmap: Function | None = None,
    setup_context: Function | None = None,
    under_autograd: Function | None = None,
) -> None:
    """Registers an operator with its derivative.

    Args:
        backward: as in `torch.autograd.Function`, built of differentiable operations, so that derivatives of any order
            exist.
        setup_context: as in `torch.autograd.Function`. By default the first three inputs are saved.
        under_autograd: what runs below autograd, the operator itself by default. An operator that gives its
            body here is taken apart whenever it is traced with autograd, and keeps its derivative.
        The rest is as in `register_operator`.
    """
    run = under_autograd or operator(name)

    def forward(*args: Any) -> Any:
        check(*args)
        with below_autograd():
            return run(*args)

    methods = {"forward": forward, "setup_context": setup_context or _save_three, "backward": backward}
    _register(name, InPyTorch(check, kernel), fake, vmap, autograd_kernel(f"{NAMESPACE}::{name}", **methods))


def _save_three(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _register(name: str, in_pytorch: InPyTorch, fake: Function, vmap: Function | None, derivative: Function) -> None:
    def checked_fake(*args: Any) -> Any:
        if any(map(is_traced, args)):
            tag_traced()
        in_pytorch.check(*args)
        return fake(*args)

    IN_PYTORCH[name] = in_pytorch
    LIBRARY.impl(name, in_pytorch, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, derivative, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=LIBRARY)
