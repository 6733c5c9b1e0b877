"""Every kernel that `launch.py` launches, in every configuration that `configs.py` picks, as instances to compile.

Instances are recorded where `launch.py` would launch, on meta tensors, and typed as Triton types a launch: an integer
of 1 becomes a constant of the kernel, a multiple of 16 is known to be one, unless the kernel specialises on neither. So
the catalogue follows the code.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.triton import configs, cost, launch
from memcompile.lowering.update.row_adam import moments_of
from tests.lowering.triton.offline import TARGETS, Compiled, compile_kernel

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
_HALF_AND_FULL = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Instance:
    """A kernel as one launch would compile it.

    Attributes:
        kernel: the kernel's name.
        sizes: of the operator's arguments, in words.
        function: what `@triton.jit` returned.
        signature: type of each argument that is no constant.
        constants: value of each that is.
        divisible: arguments that are multiples of 16.
        num_warps: as at the launch.
        num_stages: as at the launch; without one, the kernel has nothing to pipeline.
    """

    kernel: str
    sizes: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int | None

    @property
    def name(self) -> str:
        """Kernel and sizes: no two instances share them."""
        return f"{self.kernel} {self.sizes}"

    @property
    def configuration(self) -> str:
        """What `configs.py` picked: the constants in capitals, warps and stages."""
        picked = {"warps": self.num_warps} | ({"stages": self.num_stages} if self.num_stages else {})
        constants = {name: value for name, value in self.constants.items() if name.isupper()}
        return ", ".join(f"{name}={value}" for name, value in (constants | picked).items())

    @property
    def specialisation(self) -> tuple[Any, ...]:
        """Equal for two launches that run the same machine code."""
        typed, fixed = sorted(self.signature.items()), sorted(self.constants.items())
        return self.kernel, *typed, *fixed, *self.divisible, self.num_warps, self.num_stages

    def compile(self, target: str) -> Compiled:
        """Its machine code for one of `offline.TARGETS`."""
        return compile_kernel(
            self.function, self.signature, self.constants, divisible=self.divisible,
            num_warps=self.num_warps, num_stages=self.num_stages or 1, target=target,
        )  # fmt: skip


def targets_to_test(index: int) -> list[str]:
    """Where a test compiles instance `index`: one target, the next one for the next instance. As each kernel has four
    instances or more one after the other, it is compiled for each target.
    """
    return [list(TARGETS)[index % len(TARGETS)]]


# --- recording ------------------------------------------------------------------------------------


def _launches(sizes: str, run: Callable[[], Any]) -> list[Instance]:
    """What `run()`, a call of `launch.py`, would launch."""
    found: list[Instance] = []

    def record(
        function: Any, grid: Any, *args: Any, num_warps: int, num_stages: int | None = None, **constants: Any
    ) -> None:
        given = dict(zip(function.arg_names, args, strict=False))
        declared = {param.name: param.annotation_type for param in function.params if param.annotation_type}
        special = {param.name for param in function.params if not param.do_not_specialize} - {*declared}
        fixed = {name: value for name, value in given.items() if value is None or (name in special and _is_1(value))}
        signature = {name: declared.get(name) or _type(given[name]) for name in given if name not in fixed}
        divisible = tuple(name for name in signature if name in special and _is_divisible(given[name]))
        name = function.fn.__name__
        found.append(Instance(name, sizes, function, signature, fixed | constants, divisible, num_warps, num_stages))

    with mock.patch.object(launch, "_launch", record):
        run()
    return found


def _is_1(value: Tensor | int) -> bool:
    return isinstance(value, int) and value == 1


def _is_divisible(value: Tensor | int) -> bool:
    return isinstance(value, Tensor) or value % 16 == 0


def _type(value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "i32" if value < 2**31 else "i64"


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _search(
    top_k: int,
    n_keys: int = 1024,
    *,
    stored: bool,
    tokens: int = 512,
    heads: int = 4,
    half_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Instance]:
    sizes = f"top_k={top_k} n_keys={n_keys} tokens={tokens} heads={heads}"
    sizes += "" if stored else f" half_dim={half_dim} {_TYPES[dtype]}"
    query = _tensor(tokens, heads, 2 * half_dim, dtype=dtype)
    half_keys = _tensor(2, heads, n_keys, half_dim, dtype=dtype)
    with mock.patch.object(cost, "stores_scores", return_value=stored):
        return _launches(sizes, lambda: launch.product_key_search(query, half_keys, top_k))


def _topk(top_k: int, scores: Tensor, words: str) -> list[Instance]:
    return _launches(f"top_k={top_k} {words}", lambda: launch.product_key_topk(scores, top_k))


@dataclass(frozen=True)
class _Table:
    """Sizes of a call that reads or writes rows."""

    value_dim: int
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 4096
    hits: int = 128
    slots_dtype: torch.dtype = torch.int32
    strided: bool = False

    def __str__(self) -> str:
        words = f"value_dim={self.value_dim} {_TYPES[self.dtype]} tokens={self.tokens} hits={self.hits}"
        words += " int64 slots" if self.slots_dtype is torch.int64 else ""
        return words + (" every second column" if self.strided else "")

    def rows(self, count: int) -> Tensor:
        step = 2 if self.strided else 1
        return _tensor(count, self.value_dim * step, dtype=self.dtype)[:, ::step]

    def gather(self, config: configs.Config | None = None) -> list[Instance]:
        sizes = str(self)
        with ExitStack() as stack:
            if config is not None:
                sizes += f" {config['BLOCK_HITS']}x{config['BLOCK_COLUMNS']}"
                stack.enter_context(mock.patch.object(configs, "gather_configs", return_value=[config]))
            return _launches(sizes, lambda: launch.weighted_gather(self.rows(2**20), self._slots(), self._weights()))

    def dot(self) -> list[Instance]:
        return _launches(str(self), lambda: launch.gather_dot(self.rows(2**20), self._slots(), self.rows(self.tokens)))

    def scatter(self, atomics: str = "0") -> list[Instance]:
        with mock.patch.dict("os.environ", MEMCOMPILE_ATOMICS=atomics):
            return _launches(
                str(self),
                lambda: launch.weighted_scatter(self._slots(), self._weights(), self.rows(self.tokens), 2**20),
            )

    def pairs(self, d: int) -> list[Instance]:
        """Forward and backward of rows of d + value_dim numbers."""
        rows, x = replace(self, value_dim=d + self.value_dim).rows(2**20), replace(self, value_dim=d).rows(self.tokens)
        given, grad = (rows, self._slots(), self._weights(), x), self.rows(self.tokens)
        found = _launches(f"d={d} {self}", lambda: launch.pair_gather(*given))
        return found + _launches(f"d={d} {self}", lambda: launch.pair_grads(*given, self._weights(), grad))

    def _slots(self) -> Tensor:
        return _tensor(self.tokens, self.hits, dtype=self.slots_dtype)

    def _weights(self) -> Tensor:
        return _tensor(self.tokens, self.hits)


@dataclass(frozen=True)
class _Rows:
    """A call that updates rows in place, of tables in these dtypes."""

    value_dim: int = 1024
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    has_master: bool = False
    grad: bool = True
    panels: int | None = None  # of the steps that rows have skipped, if there are any
    slots: int = 2**20
    count: int = 5000

    def __str__(self) -> str:
        words = f"value_dim={self.value_dim} {_TYPES[self.dtype]}" + (" and master" if self.has_master else "")
        words += "" if self.grad else " no grad"
        return words + (f" {self.slots} slots" if self.slots != 2**20 else "")

    def adam(self) -> list[Instance]:
        missed: tuple[Tensor | None, ...] = (None, None, None)
        if self.panels is not None:
            entries = _double(7, 3), _double(7, self.panels, 1 + moments_of(self.dtype))
            missed = (_tensor(self.count, dtype=torch.int64), *entries)
        moments = self._table(self.state), self._table(self.state)
        words = f"{self} state {_TYPES[self.state]}" + ("" if self.panels is None else f" panels={self.panels}")
        numbers = torch.zeros(6, dtype=torch.float64)
        return _launches(words, lambda: launch.row_adam(*self._first(), *moments, *missed, numbers))

    def adagrad(self) -> list[Instance]:
        squares = _tensor(self.slots, dtype=sum_dtype(self._table(self.dtype)))
        return _launches(str(self), lambda: launch.row_adagrad(*self._first(), squares, 0.1, 1e-8, 0.1, True))

    def sgd(self) -> list[Instance]:
        decays = None if self.panels is None else _double(self.count)
        words = str(self) + (" decays" if self.panels is not None else "")
        return _launches(words, lambda: launch.row_sgd(*self._first(), decays, 0.1))

    def _first(self) -> tuple[Any, ...]:
        """The arguments that every update begins with."""
        master = self._table(torch.float32) if self.has_master else None
        rows = _tensor(self.count, dtype=torch.int64)
        sums = torch.promote_types(self.dtype, torch.float32)
        grad = _tensor(self.count, self.value_dim, dtype=sums) if self.grad else None
        return self._table(self.dtype), master, rows, grad, 7

    def _table(self, dtype: torch.dtype) -> Tensor:
        return _tensor(self.slots, self.value_dim, dtype=dtype)


def _double(*shape: int) -> Tensor:
    return _tensor(*shape, dtype=torch.float64)


# --- the catalogue --------------------------------------------------------------------------------

TOP_KS = (1, 8, 32, 50, 64)
VALUE_DIMS = (1000, 1024, 4096)
TOKENS = (16, 512, 4096)  # one of each range that `computed_config` tells apart


def _searches() -> Iterator[Instance]:
    for top_k in TOP_KS:
        for n_keys in (1024, 4096, top_k):
            yield from _search(top_k, n_keys, stored=True)
        for dtype in _HALF_AND_FULL:
            for tokens in TOKENS:
                yield from _search(top_k, stored=False, tokens=tokens, dtype=dtype, half_dim=256)
    yield from _search(32, 1000, stored=True)
    yield from _search(32, stored=False, dtype=torch.float16)
    for half_dim in (1, 5, 32):
        yield from _search(32, stored=False, half_dim=half_dim)
    for top_k, tokens in itertools.product((32, 64), TOKENS):  # loads are narrow where rows are no multiples of 16
        yield from _search(top_k, stored=False, tokens=tokens, half_dim=100)
    # Integers of 1 are constants.
    for stored in (True, False):
        yield from _search(32, stored=stored, tokens=1)
        yield from _search(32, stored=stored, heads=1)
        yield from _search(32, stored=stored, tokens=1, heads=1)
        yield from _search(1, 1, stored=stored, tokens=1, heads=1, half_dim=1)
        yield from _search(1, 1, stored=stored, tokens=499, half_dim=72)
    # Without a softmax, of scores at any strides.
    for top_k in (1, 8, 32, 64):
        yield from _topk(top_k, _tensor(2, 512, 4, 1024), "logits")
    yield from _topk(32, _tensor(2, 512, 4, 2048)[..., ::2], "logits every second key")


def _tables() -> Iterator[Instance]:
    sizes = [_Table(value_dim, dtype) for value_dim in VALUE_DIMS for dtype in _HALF_AND_FULL]
    sizes += [_Table(value_dim) for value_dim in (1, 5, 64, 256)]
    sizes += [_Table(1024, torch.float16), _Table(1024, hits=1), _Table(1, torch.float32, tokens=1, hits=1)]
    sizes += [_Table(1024, slots_dtype=torch.int64), _Table(1000, strided=True)]
    totals = [_Table(1024, tokens=tokens) for tokens in (512, 1024, 2048, 2**14)]  # each with a chunk of its own
    for table in sizes:
        yield from table.gather()
    for dtype in _HALF_AND_FULL:
        for config in configs.GATHERING:
            yield from _Table(4096, dtype).gather(config)
    yield from (instance for table in sizes for instance in table.dot())
    yield from (instance for table in [*sizes, *totals] for instance in table.scatter())
    yield from (instance for table in sizes for instance in table.scatter(atomics="1"))


def _pairs() -> Iterator[Instance]:
    for dtype in _HALF_AND_FULL:
        for d, value_dim in ((1024, 1024), (1000, 1000), (4096, 1024), (256, 4096), (64, 64)):
            yield from _Table(value_dim, dtype).pairs(d)
    yield from _Table(1024, torch.float16).pairs(1024)
    yield from _Table(1024, slots_dtype=torch.int64).pairs(1024)
    yield from _Table(1000, strided=True).pairs(1000)
    yield from _Table(1, torch.float32, tokens=1, hits=1).pairs(1)


def _updates() -> Iterator[Instance]:
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    forms = [(single, single, False), (double, double, False), (half, single, False), (half, single, True)]
    forms += [(single, half, False), (half, half, False)]
    for dtype, state, has_master in forms:
        rows = functools.partial(_Rows, dtype=dtype, state=state, has_master=has_master)
        for panels in (None, 1, 23):
            yield from rows(panels=panels).adam()
        yield from rows(grad=False, panels=23).adam()
        if dtype is not single or state is single:
            for value_dim in (1024, 4096, 5000):
                yield from rows(value_dim).adagrad()
            yield from rows(panels=1).sgd()
            yield from rows(grad=False, panels=1).sgd()
    for value_dim in (1, 64, 100):
        yield from _Rows(value_dim, panels=23).adam()
        yield from _Rows(value_dim).adagrad()
        yield from _Rows(value_dim).sgd()
    yield from _Rows(panels=1, slots=2**31).adam()


@functools.cache
def instances() -> tuple[Instance, ...]:
    """All that differ, by kernel."""
    different: dict[tuple[Any, ...], Instance] = {}
    for instance in (*_searches(), *_tables(), *_pairs(), *_updates()):
        different.setdefault(instance.specialisation, instance)
    return tuple(sorted(different.values(), key=lambda instance: instance.kernel))
