"""How each kind of thing that holds state is read, and put back where it has changed. `state` finds the things."""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import pickle
import random
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MISSING: Any = object()


def stream_of_module(module: Any) -> list[Any]:
    """The generator behind a module's functions."""
    if module is random:
        return [random._inst]  # type: ignore[attr-defined]
    numpy = sys.modules.get("numpy")
    return [numpy.random.mtrand._rand] if numpy is not None and module in (numpy, numpy.random) else []


def stream_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How the state of a generator of random numbers is read and written."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state, value.set_state
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return lambda: value.bit_generator.state, functools.partial(setattr, value.bit_generator, "state")
    return None


def rewind(get: Callable[[], Any], put: Callable[[Any], None], before: Any) -> None:
    if not is_equal(get(), before):
        put(before)


def is_equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else pickle.dumps(a) == pickle.dumps(b)


_PLAIN: tuple[Any, ...] = ([], (), "", range(0))
ITERATORS = (types.GeneratorType, itertools.count, *(type(iter(c)) for c in _PLAIN))


def position(iterator: Any) -> Any:
    """How far it is advanced."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        return None if frame is None else (frame.f_lasti, {name: id(v) for name, v in frame.f_locals.items()})
    return repr(iterator) if isinstance(iterator, itertools.count) else operator.length_hint(iterator)


def exchange(iterator: Any, twin: Any) -> bool:
    """Puts a copy that was not advanced in the place of an iterator; False where something else than a container, an
    attribute or a closure holds it.
    """
    for holder in gc.get_referrers(iterator):
        if isinstance(holder, types.CellType):
            holder.cell_contents = twin
        elif isinstance(holder, (dict, list)):
            for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                if value is iterator:
                    holder[key] = twin
        elif not (isinstance(holder, types.FrameType) or (isinstance(holder, tuple) and holder[-1] is twin)):  # ours
            return False
    return True


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def grad_of(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def point(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Undoes ``tensor.data = other`` and ``tensor.grad = other``."""
    if (tensor.data_ptr(), tensor.shape) != (data.data_ptr(), data.shape):
        tensor.data = data
    if tensor.is_leaf and tensor.grad is not grad:
        tensor.grad = grad


def fill_array(array: Any, content: Any) -> None:
    if array.flags.writeable and array.tobytes() != content.tobytes():
        array[...] = content


def content_of(holder: Any, owner: Any = None) -> Any:
    """What a cell or an object's slot holds, if anything."""
    try:
        return holder.cell_contents if owner is None else holder.__get__(owner)
    except (ValueError, AttributeError):  # it is empty
        return MISSING


def fill_cell(cell: types.CellType, content: Any) -> None:
    if content is MISSING:
        del cell.cell_contents
    elif content_of(cell) is not content:
        cell.cell_contents = content


def fill_slot(slot: Any, owner: Any, content: Any) -> None:
    now = content_of(slot, owner)
    if now is not content and content is MISSING:
        slot.__delete__(owner)
    elif now is not content:
        slot.__set__(owner, content)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """An object's own attributes, without running code of its class."""
    if issubclass(type(value), threading.local):
        return value.__dict__  # those of this thread
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def contents(base: Any, container: Any) -> Any:
    """A copy of what a container of this class, or of a subclass, holds."""
    return dict(base.items(container)) if issubclass(base, dict) else list(base.__iter__(container))


def refill(base: Any, container: Any, content: Any) -> None:
    """Makes a container hold what it held, if it does not."""
    now, before = contents(base, container), content
    if issubclass(base, dict):
        now, before = [*now.keys(), *now.values()], [*before.keys(), *before.values()]
    ids, ids_before = [*map(id, now)], [*map(id, before)]
    if (sorted(ids) != sorted(ids_before)) if base is set else (ids != ids_before):
        base.clear(container)
        (base.update if hasattr(base, "update") else base.extend)(container, content)
