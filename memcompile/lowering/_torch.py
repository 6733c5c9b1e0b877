"""The private PyTorch API that this layer uses, and nothing else: the one place to look when PyTorch moves.

Tried on torch 2.11, 2.13 and 2.15. Inductor is imported inside functions: it takes longer than all the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

# Any callable on a graph: what Inductor's `post_grad_custom_pre_pass` may hold.
GraphPass = Callable[..., None]


def functorch_is_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, functionalize) is on the stack."""
    return bool(torch._C._are_functorch_transforms_active())


@contextmanager
def below_autograd() -> Iterator[None]:
    """Run operators under the autograd layer that is being handled, with the layers outside it intact.

    An `autograd.Function` switches both modes of differentiation off around its forward. Under nested
    torch.func transforms this would also hide the call from the outer transforms, which then return a
    wrong derivative and no error; so both are switched on again.
    """
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), _set_fwd_grad_enabled(True):
        yield


def autograd_kernel(name: str, **methods: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's Autograd kernel: `apply` of an autograd.Function with these static methods; it raises on
    forward-mode differentiation.

    When it runs, the dispatcher has already picked the torch.func level. `torch.autograd.Function` would pick it
    once more, through a higher-order operator that has no Autograd kernel, and raise; its base class does not.
    """

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative. Use reverse mode: backward(), torch.func.grad, vjp or jacrev."
        )

    # The one thing that `Function` adds and compiled autograd asks for.
    methods |= {"jvp": jvp, "_compiled_autograd_key": torch.autograd.Function._compiled_autograd_key}
    title = "".join(part.capitalize() for part in name.rpartition(":")[2].split("_"))
    members = {method: staticmethod(function) for method, function in methods.items()}
    function: Any = type(title, (_SingleLevelFunction,), members)

    def kernel(*args: Any) -> Any:
        with enable_single_level_autograd_function():
            return function.apply(*args)

    return kernel


class KeyedPass:
    """Marks the graph pass whose `uuid()` tells Inductor's caches what this package generates."""


def is_keyed() -> bool:
    """Whether the compilation that runs has a `KeyedPass`; without, caches would return code of other settings."""
    return any(isinstance(graph_pass, KeyedPass) for graph_pass in configured_pre_passes())


def schema_defaults(operator: torch._ops.OpOverload) -> dict[str, Any]:
    """The arguments of an operator, in their order, with their defaults."""
    return {argument.name: argument.default_value for argument in operator._schema.arguments}


def runs_in_backward() -> bool:
    """Whether a backward runs in this thread, which may recompute a forward."""
    return torch._C._current_graph_task_id() != -1


def is_traced(tensor: Tensor) -> bool:
    """Whether AOTAutograd or Dynamo is tracing what is done with the tensor."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def graph_pass_base() -> type:
    """The class that a graph pass with a cache key derives from.

    From 2.13 on a pass may ask whether the graph is one of inference; a pass that wraps others asks for them.
    """
    from torch._inductor import custom_graph_pass

    return getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)


def configured_pre_passes(given: Any = None) -> Sequence[GraphPass]:
    """The passes of `given`, or else of Inductor's `post_grad_custom_pre_pass`: none, one, or (from 2.13 on) a list."""
    from torch._inductor import config

    setting: Any = config.post_grad_custom_pre_pass if given is None else given
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, (list, tuple)) else (setting,)


def run_graph_pass(graph_pass: GraphPass, graph: torch.fx.Graph, is_inference: bool) -> None:
    """Call `graph_pass` as Inductor would."""
    from torch._inductor import custom_graph_pass

    if isinstance(graph_pass, getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())):
        graph_pass(graph, is_inference)
    else:
        graph_pass(graph)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether an operator has a kernel of its own for this dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key))


def unregister(library: torch.library.Library) -> None:
    """Takes back all that was registered by this library; the dispatcher then finds what others registered."""
    library._destroy()  # type: ignore[no-untyped-call]


def has_onednn_linear() -> bool:
    """Whether this build of PyTorch has `onednn_linear`."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN: matrices at any strides, a contiguous bias."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or what a symbolic one was when it was traced; 0 where nothing is known of it. Adds no guard."""
    return int(size) if isinstance(size, int) else int(size.node.hint or 0)


def decompose_in_graphs(
    name: str, body_for: Callable[..., Callable[..., Any] | None], library: torch.library.Library
) -> None:
    """In graphs that AOTAutograd traces, an operator's calls become the operations of `body_for(*args)`, Triton kernels
    among them, unless that is None. Exported programs keep the operator. It is what `torch.library.triton_op` does,
    for an operator that exists.
    """

    def rule(mode: Any, overload: Any, types: Any, args: Any, kwargs: Any) -> Any:
        body = None if torch.compiler.is_exporting() else body_for(*args)
        if body is None:
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return body(*args)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=library)
