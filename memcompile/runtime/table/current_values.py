"""The values of a table whose rows may have missed steps, and the tensors that share their memory: whoever reads them
sees every row as it is after all steps.

**The invariant.** Between two steps, rows as they are stored may lack steps that they have missed. No reader sees that:

- The layers read the values with the state of their rows, in eager mode and in graphs of every backend
  (`ValueTable.row_state`). No row is written.
- Every function of PyTorch that is called on the values, or on a tensor that shares their memory, comes through
  `__torch_function__` below. The table is flushed before a function reads or writes numbers. A function that Dynamo
  traces is given a copy of the rows as they are when the graph runs. A sharded table is flushed by the rank that reads.
- What reads memory and calls no function of PyTorch on the values is hooked where it starts: state dicts and copies
  (`runtime.state_dicts`, `runtime.pool`), states of optimizers (`runtime.table.hooks`), `torch.func` transforms
  (`runtime.layer`), replicas of DDP (`runtime.table.gradient`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import GetSetDescriptorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memcompile.common.functions import writes
from memcompile.errors import CaptureError
from memcompile.lowering._torch import functorch_is_active
from memcompile.runtime._torch import never_compiled_alone, pytree, without_torch_function

if TYPE_CHECKING:
    from memcompile.runtime.table.table import ValueTable

_TABLE = "_memcompile_table"  # the attribute of values and aliases that is a weak reference to their table

# Attributes that are numbers; every other one of a tensor tells how it lies, or is of autograd.
_NUMBERS = frozenset("data real imag T H mT mH".split())
_PROPERTIES = [n for n, v in vars(torch._C.TensorBase).items() if isinstance(v, GetSetDescriptorType)]
# What reads no number of the values. What is not listed flushes them, which is right for everything, and slower.
_KEEPS = frozenset(_PROPERTIES) - _NUMBERS
_KEEPS |= frozenset(
    """size stride dim ndimension numel nelement element_size storage_offset is_contiguous is_floating_point is_signed
    is_inference is_same_size is_pinned is_shared is_conj is_neg _is_view get_device __len__ __hash__ __dir__
    register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad backward new_empty new_zeros new_ones
    new_full empty_like zeros_like ones_like full_like rand_like randn_like randint_like
    _has_compatible_shallow_copy_type""".split()
)
# Kernels of graphs ask the values for their memory, and take the state of their rows. Writers of files ask an alias.
_MEMORY = frozenset(["data_ptr", "untyped_storage"])


class _Current:
    """What values and their aliases share: they reach their table, and flush it for who reads them."""

    __slots__ = ()

    @classmethod
    @never_compiled_alone
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return _traced(func, args, kwargs)
        if _keeps(func) or (_name(func) in _MEMORY and type(args[0]) is TableValues):
            with without_torch_function():
                return func(*args, **kwargs)
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _Current)]
        for value in read:
            _flush(value)
        with without_torch_function():
            result = func(*args, **kwargs)
            return result if functorch_is_active() else pytree.tree_map_only(Tensor, partial(_alias, read), result)


def _name(func: Any) -> str:
    """Of a function, or of the attribute that it gets or sets."""
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name in ("__get__", "__set__") else name


def _is_ours(func: Any) -> bool:
    """Whether it is an operator of this package, which is given the state of rows along with the values."""
    return getattr(func, "__module__", "").endswith("ops.memcompile")


def _keeps(func: Any) -> bool:
    return _name(func) in _KEEPS or _is_ours(func)


@torch.compiler.assume_constant_result
def _traced_kind(func: Any) -> str:
    """Whether a function that Dynamo traces "keeps", "writes" or "reads" the numbers of its first argument."""
    if _keeps(func):
        return "keeps"
    return "writes" if writes(func) else "reads"


def _alias(read: Sequence[Any], result: Tensor) -> Tensor:
    """A result, of the class of aliases where it shares the memory of what was read."""
    if type(result) is Tensor and result.layout is torch.strided and result.numel():
        memory = result.untyped_storage().data_ptr()
        for value in read:
            if not value.is_meta and value.untyped_storage().data_ptr() == memory:
                alias = result.as_subclass(TableAlias)
                setattr(alias, _TABLE, getattr(value, _TABLE, None))
                return alias
    return result


def _traced(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call that Dynamo traces: reads rows as they are when the graph runs."""
    kind = _traced_kind(func)
    with without_torch_function():
        if kind == "keeps":
            return func(*args, **kwargs)
        if kind == "writes":
            raise CaptureError(
                "memcompile: a compiled graph writes the values of a memory, whose rows may have missed steps: write "
                "them outside of torch.compile"
            )
        args, kwargs = pytree.tree_map_only(_Current, _current_rows, (args, kwargs))
        return func(*args, **kwargs)


def _current_rows(values: Any) -> Tensor:
    table = table_of(values)
    return values if table is None else table.in_graph(values)  # type: ignore[no-any-return]


class TableAlias(_Current, Tensor):
    """Shares the memory of the values of a table. Saved and copied as a tensor like others."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(plain(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(plain(self), memo)


class _AsParameter:
    """Saved, copied and printed as a parameter of PyTorch's own class."""

    __slots__ = ()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(_as_parameter(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as_parameter(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            copied = memo[id(self)] = copy.deepcopy(_as_parameter(self), memo)
            table = memo.get(id(table_of(self)))  # which is copied first
            if table is not None:
                show_current(copied, table)
        return memo[id(self)]  # type: ignore[no-any-return]


class TableValues(_AsParameter, _Current, nn.Parameter):  # type: ignore[misc]
    """The values of a table."""


class TableShards(_AsParameter, _Current, DTensor):  # type: ignore[misc]
    """The values of a sharded table. These methods are none of PyTorch's functions."""

    def to_local(self, *args: Any, **kwargs: Any) -> Tensor:
        _flush(self)
        return super().to_local(*args, **kwargs)

    def full_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        _flush(self)
        return super().full_tensor(*args, **kwargs)

    def redistribute(self, *args: Any, **kwargs: Any) -> DTensor:
        _flush(self)
        return super().redistribute(*args, **kwargs)


_OWN: dict[type, type] = {nn.Parameter: TableValues, DTensor: TableShards}


def _as_parameter(values: Any) -> nn.Parameter:
    parameter = nn.Parameter(plain(values), values.requires_grad)
    vars(parameter).update({name: value for name, value in vars(values).items() if name != _TABLE})
    return parameter


def show_current(values: nn.Parameter, table: ValueTable) -> None:
    """From here on who reads this parameter sees the rows of the table as they are. Idempotent."""
    if type(values) in _OWN:
        values.__class__ = _OWN[type(values)]
        setattr(values, _TABLE, weakref.ref(table))


def show_stored(values: nn.Parameter) -> None:
    """The parameter is one like others again: it is not the table's any longer."""
    for cls, own in _OWN.items():
        if type(values) is own:
            values.__class__ = cls
            delattr(values, _TABLE)


def _flush(values: Any) -> None:
    table = table_of(values)
    if table is not None:
        table.flush()


def table_of(values: Any) -> ValueTable | None:
    """The table that values, or their alias, are of, while it is alive."""
    of = getattr(values, _TABLE, None)
    return None if of is None else of()  # type: ignore[no-any-return]


def plain(values: Tensor) -> Tensor:
    """The same memory, flushed, as a tensor of PyTorch's own class."""
    _flush(values)
    return stored(values)


@torch.no_grad()
def stored(values: Tensor) -> Tensor:
    """The same memory as it stands, as a tensor of PyTorch's own class."""
    with without_torch_function():
        detached = values.detach()
        return detached if isinstance(detached, DTensor) else detached.as_subclass(Tensor)  # type: ignore[arg-type]


def is_alias(values: Tensor) -> bool:
    """Whether these share the memory of the values of a table, and are not its parameter."""
    return type(values) is TableAlias


def refuse_alias(values: Tensor) -> None:
    """Raises CaptureError where Dynamo traces a read of memory that is the values' by another tensor, which a graph
    would read as it is stored. Without ``fullgraph=True``, Dynamo then leaves the call to eager mode.
    """
    if torch.compiler.is_dynamo_compiling() and is_alias(values):
        raise CaptureError(
            "memcompile: a compiled graph reads the values of a memory through a view or a detached tensor that was "
            "taken before, whose rows may have missed steps: give it the parameter itself, or a clone"
        )
