"""Helpers that a forward calls and that keep something, each elsewhere: a tensor, a count, a position in a stream."""

from __future__ import annotations

import builtins
import collections
import contextvars
import dataclasses
import functools
import itertools
import operator
import queue
import random
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn

from tests.models import WIDTH, Block, Transformer, plain_ffn

GLOBAL: dict[int, Tensor] = {}
LAST: Any = None
CALLS = 0
SEEN: list[Tensor] = []
LOCAL = threading.local()
VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("kept", default=None)
BY_OBJECT: Any = weakref.WeakKeyDictionary()


def table(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None] * 0.01


class Rotary:
    shared: Any = None
    by_length: ClassVar[dict[int, Tensor]] = {}
    instance: Any = None

    def __init__(self) -> None:
        self.table, self.calls, self.mean, self.running = None, 0, 0.0, torch.zeros(3)

    def __call__(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = table(x)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1
        self.running.add_(1)
        self.running[:2].mul_(3)
        return x + self.table

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        cls.shared, cls.added = table(x), x
        cls.by_length[x.shape[1]] = table(x)
        return x + cls.shared

    @classmethod
    def single(cls) -> Rotary:
        cls.instance = cls.instance or cls()
        return cls.instance

    @functools.lru_cache  # noqa: B019
    def cached(self, length: int) -> Tensor:
        return torch.arange(length)[:, None] * 0.01

    @functools.cached_property
    def once(self) -> Tensor:
        return torch.arange(WIDTH) * 0.01


class Boxes:
    def __init__(self) -> None:
        self.queue, self.last, self.named = queue.Queue(), collections.deque(maxlen=2), types.SimpleNamespace(x=None)
        self.ordered, self.counts, self.kinds = collections.OrderedDict(), collections.Counter(), {1}

    def __call__(self, x: Tensor) -> Tensor:
        self.queue.put(x)
        self.last.append(x)
        self.named.x = self.ordered[len(self.ordered)] = x
        self.counts["calls"] += 1
        self.kinds.add(x.shape[1])
        return x


class Draws:
    def __init__(self) -> None:
        self.array, self.numpy, self.python = numpy.zeros(3), numpy.random.default_rng(0), random.Random(0)
        self.torch, self.ids, self.items = torch.Generator().manual_seed(0), itertools.count(), iter([1, 2, 3, 4, 5])

    def __call__(self, x: Tensor) -> Tensor:
        self.array += self.numpy.random() + self.python.random() + random.random() + numpy.random.rand()
        torch.rand(2, generator=self.torch)
        return x * (next(self.ids) + 1) * next(self.items)


@dataclasses.dataclass(slots=True)
class Slots:
    kept: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        self.kept = table(x)
        return x + self.kept


def in_globals(x: Tensor) -> Tensor:
    global LAST, CALLS
    LAST, CALLS = x, CALLS + 1
    SEEN.append(x)
    globals()["MADE_BY_THE_FORWARD"] = x
    return x + GLOBAL.setdefault(x.shape[1], table(x))


def in_a_local_of_threads(x: Tensor) -> Tensor:
    LOCAL.kept = table(x)
    return x + LOCAL.kept


def in_a_context_variable(x: Tensor) -> Tensor:
    VARIABLE.set(table(x))
    return x + VARIABLE.get()


def in_other_modules(x: Tensor) -> Tensor:
    nn.Module.kept_by_the_forward = builtins.kept_by_the_forward = torch.kept_by_the_forward = x
    return x


def in_a_default(x: Tensor, kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return x + kept.setdefault(x.shape[1], table(x))


def in_its_attribute(x: Tensor) -> Tensor:
    in_its_attribute.kept = table(x)
    return x + in_its_attribute.kept


def of_a_weak_key(x: Tensor) -> Tensor:
    BY_OBJECT[GLOBAL_KEY] = table(x)
    return x + BY_OBJECT[GLOBAL_KEY]


GLOBAL_KEY = Rotary()


@functools.lru_cache
def frequencies(length: int) -> Any:
    return {"angles": (torch.arange(length)[:, None] * 0.01,)}


def of_two_calls(kept: dict[int, Tensor], x: Tensor) -> Tensor:
    return x + kept.setdefault(x.shape[1], table(x))


def in_a_closure() -> Callable[[Tensor], Tensor]:
    kept, calls = None, 0

    def add(x: Tensor) -> Tensor:
        nonlocal kept, calls
        kept, calls = table(x), calls + 1
        return x + kept

    return add


def in_a_real_tensor() -> Callable[[Tensor], Tensor]:
    running = torch.ones(5)

    def add(x: Tensor) -> Tensor:
        running.mul_(2)
        running.data.add_(1)
        running.view(-1)[:2].zero_()
        return x + running.sum()

    return add


# Each makes a new helper.
KEEPERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "attribute": Rotary,
    "class": lambda: Rotary.of_class,
    "single object": lambda: lambda x: Rotary.single()(x),
    "lru_cache of a method": lambda: functools.partial(lambda rotary, x: x + rotary.cached(x.shape[1]), Rotary()),
    "cached_property": lambda: functools.partial(lambda rotary, x: x + rotary.once, Rotary()),
    "boxes": Boxes,
    "draws": Draws,
    "slots": Slots,
    "globals": lambda: in_globals,
    "thread-local": lambda: in_a_local_of_threads,
    "context variable": lambda: in_a_context_variable,
    "other modules": lambda: in_other_modules,
    "default": lambda: in_a_default,
    "function attribute": lambda: in_its_attribute,
    "weak dictionary": lambda: of_a_weak_key,
    "lru_cache": lambda: lambda x: x + frequencies(x.shape[1])["angles"][0],
    "partial": lambda: functools.partial(of_two_calls, {}),
    "closure": in_a_closure,
    "real tensor": in_a_real_tensor,
}


class Keeping(Transformer):
    """Calls a helper on the embedding; with ``by_value`` a value decides the path, so that planning computes."""

    def __init__(self, helpers: list[Callable[[Tensor], Tensor]], by_value: bool = False) -> None:
        super().__init__([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(2)])
        self.helpers, self.by_value = helpers, by_value

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.by_value and tokens.float().mean().item() < -1:
            return tokens
        x = self.tokens(tokens)
        for helper in self.helpers:
            x = helper(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def everything(value: Any, seen: set[int] | None = None) -> Any:
    """What is kept in all of these places, as a value that can be compared."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return (type(value).__name__, value.tolist() if type(value) is Tensor else None)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, functools._lru_cache_wrapper):
        return value.cache_info().currsize
    if type(value) is type(iter([])):
        return operator.length_hint(value)
    if id(value) in seen or isinstance(value, type(threading.Lock())):
        return None
    seen.add(id(value))
    if isinstance(value, dict):
        return [(repr(key), everything(v, seen)) for key, v in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return [everything(item, seen) for item in value]
    if isinstance(value, functools.partial):
        return everything(value.args, seen)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [everything(part, seen) for part in (cells, value.__defaults__, vars(value))]
    if isinstance(value, Slots):
        return everything(value.kept, seen)
    if isinstance(value, types.MethodType):
        return None
    own = getattr(value, "__dict__", None)
    return everything(own, seen) if own and type(value).__module__ != "_thread" else repr(value)


def places(model: Keeping) -> Any:
    """All that the helpers of a model keep, wherever."""
    spaces = (builtins, torch, nn.Module)
    return everything(
        [
            model.helpers, GLOBAL, LAST, CALLS, SEEN, vars(LOCAL), VARIABLE.get(), len(BY_OBJECT), frequencies,
            "MADE_BY_THE_FORWARD" in globals(), [hasattr(space, "kept_by_the_forward") for space in spaces],
            in_a_default, in_its_attribute, Rotary.shared, Rotary.by_length, hasattr(Rotary, "added"),
            Rotary.instance, Rotary.cached, random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state(),
        ]
    )  # fmt: skip
