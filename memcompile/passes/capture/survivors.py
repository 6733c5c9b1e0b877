"""Looks for fake tensors that outlive the forward that made them: a program that met one would return fake tensors, and
train nothing. The garbage collector finds them, whatever holds them.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from memcompile.errors import PlanError
from memcompile.passes._torch import FakeTensor, FakeTensorMode, pytree

_DEPTH = 8  # objects between a tensor and what holds it
_INSIDE = (dict, list, tuple, set, frozenset, types.CellType, types.FrameType, types.MethodType)
_ITERATORS: tuple[Any, ...] = (type(iter([])), type(iter(())), map, filter, itertools.starmap)
_numbers = itertools.count()


class NumberedMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode of one forward. Its tensors tell which forward made them.

    Attributes:
        number: of this mode; later ones have larger numbers.
        save: called with each operator that has no fake operand, and therefore runs: with it and its arguments.
    """

    def __init__(self, save: Callable[[Any, Sequence[Any], Mapping[str, Any]], None]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.number, self.save = next(_numbers), save

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.save(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Survivors:
    """The fake tensors that are made from now on."""

    def __init__(self) -> None:
        self._first = next(_numbers)

    def refuse(self, graphs: Iterable[fx.Graph] = ()) -> None:
        """Empties every `functools` cache that kept a fake tensor, and raises where something else did.

        Args:
            graphs: captured graphs, whose values stay.

        Raises:
            PlanError: it says what holds the tensor.
        """
        kept = {id(leaf) for graph in graphs for node in graph.nodes for leaf in pytree.tree_leaves(dict(node.meta))}
        if not self._alive(kept):
            return
        gc.collect()  # an exception holds its frames
        if not self._alive(kept):
            return
        frozen = gc.get_freeze_count()
        if frozen:
            gc.unfreeze()  # what is frozen may hold tensors, but is not among their referrers
        try:
            left = self._alive(kept)
            for cache in [h for h, _ in _holders(left) if isinstance(h, functools._lru_cache_wrapper)]:
                cache.cache_clear()
            left = self._alive(kept)
            # Where autograd alone holds some, in a cycle that no garbage collector sees, the program never meets them.
            name = next(filter(None, itertools.starmap(_name, _holders(left))), None)
            if name is not None:
                raise PlanError(
                    f"the model's forward keeps a tensor in {name}, where planning cannot put back what was there: "
                    f"build the model anew, and have its modules keep the tensor"
                )
        finally:
            if frozen:
                gc.freeze()

    def _alive(self, kept: set[int]) -> list[FakeTensor]:
        fakes = [o for o in gc.get_objects() if type(o) is FakeTensor and id(o) not in kept]
        return [f for f in fakes if isinstance(f.fake_mode, NumberedMode) and f.fake_mode.number > self._first]


def holds_fake(cache: Any) -> bool:
    """Whether a `functools` cache has a fake tensor among its results or arguments."""
    level, seen = [cache], {id(cache), id(cache.__wrapped__)}
    for _ in range(_DEPTH):
        level = [
            o for o in gc.get_referents(*level) if id(o) not in seen and not isinstance(o, (type, types.ModuleType))
        ]
        if any(type(o) is FakeTensor for o in level):
            return True
        seen.update(map(id, level))
    return False


def _holders(tensors: list[FakeTensor]) -> Iterator[tuple[Any, set[int]]]:
    """What refers to tensors, and what refers to that, up to objects with names; each with the ids of what it holds."""
    level: list[Any] = list(tensors)
    seen = {id(tensors), *map(id, tensors)}
    for _ in range(_DEPTH):
        if not level:
            return
        seen.add(id(level))
        found = [h for h in gc.get_referrers(*level) if id(h) not in seen and not isinstance(h, types.FrameType)]
        held = set(map(id, level))
        seen.update(map(id, found))
        yield from [(holder, held) for holder in found]
        seen.add(id(found))
        level = [h for h in found if isinstance(h, _INSIDE) and _module_of(h) is None]


def _module_of(scope: Any) -> str | None:
    """The module whose globals these are."""
    name = scope.get("__name__") if isinstance(scope, dict) else None
    return name if isinstance(name, str) and vars(sys.modules.get(name, types)) is scope else None


def _name(holder: Any, held: set[int]) -> str | None:
    module = _module_of(holder)
    if module is not None:
        return f"the global {next((n for n, v in holder.items() if id(v) in held), '?')!r} of module {module!r}"
    if isinstance(holder, types.GeneratorType) and holder.gi_code is not _holders.__code__:
        return f"the generator {holder.__qualname__!r}"
    if isinstance(holder, (types.FunctionType, type)):
        return f"{holder.__module__}.{holder.__qualname__}"
    if isinstance(holder, (*_INSIDE, *_ITERATORS, types.GeneratorType)):
        return None
    return f"an object of {type(holder).__module__}.{type(holder).__qualname__}"
