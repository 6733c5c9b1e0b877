"""The sparse gradient of a table, for programs that do with it what they do with any gradient.

What PyTorch has for sparse tensors runs as it is. For the rest the gradient is made dense: for a moment where it is
read (``isfinite``, ``abs().max()``), and for good where it is written (noise is added) or where a view of it is taken.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memcompile.common.functions import writes
from memcompile.runtime._torch import never_compiled_alone, pytree, without_torch_function

_DENSE = "_memcompile_dense"  # what a gradient that was made dense is now
_VALUES = "_memcompile_values"  # the parameter that it is the gradient of
# What gives the gradient itself: it has no graph, and an alias of a sparse tensor does not follow what is done to it.
_SELF = frozenset(
    [Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, Tensor.contiguous, Tensor.data.__get__]  # type: ignore[attr-defined]
)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
# Functions that give a view, or memory of NumPy's, of a dense tensor: what is written there is of the gradient. Those
# that sparse tensors have give a copy.
_VIEWS = frozenset(
    """view view_as reshape reshape_as flatten ravel unflatten unsqueeze squeeze t transpose permute movedim narrow
    chunk split unbind select expand expand_as diagonal numpy __array__ __getitem__""".split()
)


class RowGradient(Tensor):
    """A sparse COO gradient [slots, dim] whose functions are those of a dense one."""

    @classmethod
    @never_compiled_alone
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with without_torch_function():
            if func in _SELF and type(args[0]) is RowGradient:
                return args[0]
            if func == _SET_DATA and args[0] is args[1]:
                return None
            given = pytree.tree_map_only(Tensor, now, (args, kwargs))
            if not any(type(leaf) is RowGradient for leaf in pytree.tree_leaves(given)):
                return func(*given[0], **given[1])
            is_view = getattr(func, "__name__", "") in _VIEWS
            if not is_view:
                with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):  # of kernels that are missing
                    return pytree.tree_map_only(Tensor, _as_row_gradient, func(*given[0], **given[1]))
            dense = pytree.tree_map_only(RowGradient, _made_dense if is_view or writes(func) else _to_dense, given)
            return func(*dense[0], **dense[1])  # raises where the call is wrong

    def __reduce_ex__(self, protocol: Any) -> Any:
        return as_tensor(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _as_row_gradient(copy.deepcopy(as_tensor(self), memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(as_tensor(self))


def row_gradient(grad: Tensor, values: Tensor | None = None) -> Tensor:
    """The same gradient, sparse, as one with the functions of a dense one. It becomes the dense gradient of `values`
    where it is made dense for good.
    """
    if grad.is_sparse and type(grad) is Tensor:
        grad.__class__ = RowGradient
    if type(grad) is RowGradient and values is not None:
        setattr(grad, _VALUES, weakref.ref(values))
    return grad


def as_tensor(grad: Tensor) -> Tensor:
    """A gradient as it is now, sparse or dense, as a tensor of PyTorch's own class."""
    grad = now(grad)
    if type(grad) is not RowGradient:
        return grad  # type: ignore[no-any-return]
    with without_torch_function():
        indices, values = grad._indices(), grad._values()
        return torch.sparse_coo_tensor(
            indices,
            values,
            grad.shape,
            device=values.device,  # PyTorch's default device would win over that of the parts
            check_invariants=False,
            is_coalesced=grad.is_coalesced(),
        )


def now(tensor: Tensor) -> Any:
    """The dense tensor that a gradient has become; any other tensor as it is."""
    return getattr(tensor, _DENSE, tensor) if type(tensor) is RowGradient else tensor


def _as_row_gradient(tensor: Tensor) -> Tensor:
    return row_gradient(tensor) if tensor.layout is torch.sparse_coo else tensor


def _to_dense(gradient: RowGradient) -> Tensor:
    return as_tensor(gradient).to_dense()


def _made_dense(gradient: RowGradient) -> Tensor:
    """What a gradient is from here on: in the hands of who has it, and of its parameter."""
    dense = _to_dense(gradient)
    setattr(gradient, _DENSE, dense)
    values = getattr(gradient, _VALUES, lambda: None)()
    if values is not None and values.grad is gradient:
        values.grad = dense
    return dense
