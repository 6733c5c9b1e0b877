"""What a model's forward can reach and change, besides its parameters and buffers: noted before a forward that is only
for memcompile, and put back after it.

The reach is that of the model's own code. It starts at the module tree and follows attributes, containers, closures,
default arguments and thread-locals; of globals, classes and imported modules it follows the names that the code reads.
Code of PyTorch and of the standard library is not read. What a forward keeps out of this reach, `survivors` finds.
"""

from __future__ import annotations

import collections
import contextvars
import copy
import dataclasses
import functools
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.errors import PlanError
from memcompile.passes._torch import TorchDispatchMode
from memcompile.passes.capture.put_back import (
    ITERATORS,
    MISSING,
    attributes_of,
    content_of,
    contents,
    exchange,
    fill_array,
    fill_cell,
    fill_slot,
    grad_of,
    is_equal,
    point,
    position,
    refill,
    rewind,
    storage,
    stream_of,
    stream_of_module,
)
from memcompile.passes.capture.survivors import holds_fake

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_FOREIGN = frozenset({"torch", "numpy", "memcompile", "sympy", "triton", "functorch"}) | sys.stdlib_module_names
# Of the foreign, the modules whose instances hold what a program puts into them.
_HOLDERS = frozenset("builtins collections types functools weakref _weakref _thread queue _queue".split())
_ATOMS = frozenset({int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, types.CodeType})
_CONTAINERS: tuple[Any, ...] = (collections.OrderedDict, dict, list, set, collections.deque, bytearray)
_SEEDING = frozenset("manual_seed seed set_rng_state fork_rng default_generator default_generators".split())
_LIFECYCLE = frozenset("__init__ __new__ __init_subclass__ __reduce__ __reduce_ex__ __setstate__ __getstate__".split())
_BY_STRING = frozenset("getattr setattr hasattr globals vars __dict__ import_module modules".split())
_LARGEST_ARRAY = 2**26  # bytes of a NumPy array that is copied; a larger one is data


class NotRestored(PlanError):
    """A forward changed what cannot be put back."""


@dataclasses.dataclass
class _Scope:
    """Globals, a class or a module: its bindings of the names that the code reads, and which names it had."""

    owner: Any  # a dict, or a class
    keys: frozenset[str]
    names: set[str] = dataclasses.field(default_factory=set)
    before: dict[str, Any] = dataclasses.field(default_factory=dict)

    def restore(self) -> None:
        now = vars(self.owner) if isinstance(self.owner, type) else self.owner
        changed = {name: value for name, value in self.before.items() if now.get(name, MISSING) is not value}
        added = [name for name in (now.keys() - self.keys) & self.names if type(now[name]) is not types.ModuleType]
        changed |= dict.fromkeys(added, MISSING)
        for name, value in changed.items():
            if isinstance(self.owner, dict):
                self.owner.pop(name) if value is MISSING else self.owner.__setitem__(name, value)
            else:
                type.__delattr__(self.owner, name) if value is MISSING else type.__setattr__(self.owner, name, value)


class State(TorchDispatchMode):
    """The state that the code of ``module`` reaches, as it is when this is made. As a mode it surrounds a forward that
    computes, and keeps what operators overwrite; a forward on fake tensors calls `save`.
    """

    def __init__(self, module: nn.Module, computes: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # by id; it keeps them alive, so that no id is used twice
        self._pending: list[Any] = [module]
        self._names, self._unread = {"forward"}, set[str]()  # that the code reads as attributes
        self._bases: set[type] = set()  # the classes that it may find them in
        self._scopes: dict[int, _Scope] = {}
        self._caches: list[tuple[Any, int]] = []
        self._iterators: list[tuple[Any, Any, Any]] = []
        self._overwritten: dict[int, tuple[Tensor, Tensor]] = {}
        self._computes = self._draws = computes
        self._storages = {storage(t) for t in (*module.parameters(), *module.buffers())}
        while self._pending or self._unread:
            while self._pending:
                self._visit(self._pending.pop())
            new, self._unread = self._unread, set()
            self._names |= new
            for base in list(self._bases):
                self._read(base, new)
        self._streams = list(self._shared_streams())

    def restore(self) -> None:
        """Puts everything back.

        Raises:
            NotRestored: the forward advanced a generator, which cannot be undone.
        """
        for tensor, content in reversed(self._overwritten.values()):  # of two aliases the first was kept as it was
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(content)
        self._overwritten.clear()
        for scope in self._scopes.values():
            scope.restore()
        for undo in self._undo:
            undo()
        alone = threading.active_count() == 1
        for is_own, get, put, before in self._streams:
            if (is_own or self._draws or alone) and not is_equal(get(), before):
                put(before)
        for cache, size in self._caches:
            if cache.cache_info().currsize > size and (size == 0 or holds_fake(cache)):
                cache.cache_clear()
        for iterator, before, twin in self._iterators:
            if position(iterator) != before and (twin is None or not exchange(iterator, twin)):
                raise NotRestored(
                    f"the model's forward advances {iterator!r}, which planning runs and cannot turn back: build the "
                    f"model anew, and keep a number or a list in the place of the iterator"
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.save(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def save(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keeps a copy of each tensor of the model's own that an operator is about to overwrite."""
        schema = getattr(function, "_schema", None)
        if schema is None or not schema.is_mutable:
            return
        given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value: Any = given.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
                        self._save(tensor)
                        self._draws |= torch.Tag.nondeterministic_seeded in function.tags

    def _save(self, tensor: Tensor) -> None:
        whole = tensor if tensor._base is None else tensor._base
        if id(whole) not in self._overwritten and (not self._computes or storage(whole) in self._storages):
            self._overwritten[id(whole)] = whole, whole.detach().clone()

    # --- the walk ------------------------------------------------------------------------------------------------

    def _visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _ATOMS or id(value) in self._seen or issubclass(kind, (type, types.ModuleType)):
            return  # classes and modules are read where code names them
        self._seen[id(value)] = value
        if kind is types.FunctionType:
            self._visit_function(value)
        elif kind is functools._lru_cache_wrapper:
            self._caches.append((value, value.cache_info().currsize))
            self._pending.append(value.__wrapped__)
        elif kind is types.CellType:
            content = content_of(value)
            self._undo.append(functools.partial(fill_cell, value, content))
            self._pending.append(content)
        elif issubclass(kind, Tensor):
            self._visit_tensor(value)
        elif kind in ITERATORS:
            twin = None if kind is types.GeneratorType else copy.copy(value)
            self._iterators.append((value, position(value), twin))
            if kind is types.GeneratorType and value.gi_frame is not None:
                self._read_code(value.gi_code, value.gi_frame.f_globals)
                self._pending.extend(value.gi_frame.f_locals.values())
        elif kind is contextvars.ContextVar:  # a forward runs in a copied context
            self._pending.append(value.get(None))
        elif kind in (types.MethodType, types.BuiltinMethodType):
            self._pending.extend((value.__self__, getattr(value, "__func__", None)))
            if isinstance(value.__self__, type):  # a class method
                self._visit_class(value.__self__)
        else:
            self._visit_instance(value)

    def _visit_class(self, cls: type, names: Set[str] = frozenset()) -> None:
        """A class, whose attributes any code that is reached may call, read and write by their names."""
        if cls.__module__ == "builtins":
            return
        for base in cls.__mro__[:-1]:
            if base not in self._bases:
                self._bases.add(base)
                implicit = {name for name in vars(base) if name.startswith("__")}  # operators, __getattr__
                self._read(base, self._names | (implicit - _LIFECYCLE))
            if names:
                self._read(base, names)

    def _visit_function(self, function: types.FunctionType) -> None:
        self._visit_attributes(function)
        if not _is_foreign(function.__module__):
            self._pending.extend(function.__closure__ or ())
            self._pending.extend(function.__defaults__ or ())
            self._pending.extend((function.__kwdefaults__ or {}).values())
            self._read_code(function.__code__, function.__globals__)

    def _read_code(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        names = _names_in(code)
        self._read(scope, names)
        for name in names & sys.modules.keys():  # imported in the function
            self._read(vars(sys.modules[name]), names)
        self._unread |= names - self._names

    def _read(self, owner: Any, names: Set[str]) -> None:
        """Notes the bindings of these names; the code that has the names reads modules and classes by them, too."""
        now = vars(owner) if isinstance(owner, type) else owner
        scope = self._scopes.get(id(owner))
        if scope is None:
            scope = self._scopes[id(owner)] = _Scope(owner, frozenset(now))
        new = names - scope.names
        scope.names |= new
        for name in new & now.keys():
            value = scope.before[name] = now[name]
            if type(value) is types.ModuleType:
                self._pending.extend(stream_of_module(value))
                self._read(vars(value), names)
            elif issubclass(type(value), type):
                self._visit_class(value, names | _LIFECYCLE)  # which may make objects of it
            else:
                self._pending.append(value)

    def _visit_tensor(self, tensor: Tensor) -> None:
        self._visit_attributes(tensor)
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
            self._storages.add(storage(tensor))
            self._undo.append(functools.partial(point, tensor, tensor.detach(), grad_of(tensor)))

    def _visit_instance(self, value: Any) -> None:
        cls, stream = type(value), stream_of(value)
        if stream is not None:
            self._undo.append(functools.partial(rewind, *stream, stream[0]()))
        if _is_foreign(cls.__module__) and cls.__module__ not in _HOLDERS and not issubclass(cls, nn.Module):
            self._visit_array(value)
            return
        self._visit_class(cls)
        self._visit_attributes(value)
        base = next((base for base in _CONTAINERS if issubclass(cls, base)), None)
        if base is not None:
            content = contents(base, value)
            self._undo.append(functools.partial(refill, base, value, content))
            self._pending.extend([*content.keys(), *content.values()] if isinstance(content, dict) else content)
        elif issubclass(cls, (tuple, frozenset)):
            self._pending.extend(value)
        elif cls is functools.partial:
            self._pending.extend((value.func, value.args, value.keywords))
        elif issubclass(cls, weakref.ref):
            self._pending.append(value())
        elif cls in (property, staticmethod, classmethod, functools.cached_property):
            self._pending.extend(getattr(value, name, None) for name in ("fget", "fset", "__func__", "func"))

    def _visit_attributes(self, value: Any) -> None:
        attributes = attributes_of(value)
        if attributes is not None:
            before = attributes.copy()
            self._undo.append(lambda: refill(dict, attributes_of(value), before))
            skipped = HOOKS if issubclass(type(value), nn.Module) else ()  # hooks do not run
            self._pending.extend(v for name, v in before.items() if name not in skipped)
        for slot in _slots(type(value)):  # type: ignore[arg-type]
            content = content_of(slot, value)
            self._undo.append(functools.partial(fill_slot, slot, value, content))
            self._pending.append(content)

    def _visit_array(self, value: Any) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray) and value.nbytes <= _LARGEST_ARRAY:
            self._undo.append(functools.partial(fill_array, value, value.copy()))

    def _shared_streams(self) -> Iterator[tuple[bool, Callable[[], Any], Callable[[Any], None], Any]]:
        """What all threads of the process draw from, and whether the model's code draws from it or seeds it: only then
        is it put back while there are other threads. A forward on fake tensors draws nothing from PyTorch's.
        """
        seeds = not _SEEDING.isdisjoint(self._names)
        streams: list[tuple[bool, Any, Any]] = [(seeds, torch.get_rng_state, torch.set_rng_state)]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            streams += [(seeds, g.get_state, g.set_state) for g in torch.cuda.default_generators]
        for module in (random, sys.modules.get("numpy")):
            streams += [(id(s) in self._seen, *(stream_of(s) or ())) for s in stream_of_module(module)]
        streams.append(("set_default_dtype" in self._names, torch.get_default_dtype, torch.set_default_dtype))
        for is_own, get, put in streams:
            yield is_own, get, put, get()


def _is_foreign(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _FOREIGN


def _names_in(code: types.CodeType) -> set[str]:
    """Every global and attribute that the code names, in strings too where it looks attributes up by them."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
        elif isinstance(constant, str) and not _BY_STRING.isdisjoint(code.co_names):
            names.add(constant)
    return names


@functools.cache
def _slots(cls: Any) -> list[Any]:
    own = (c for c in cls.__mro__ if "__slots__" in vars(c) and not _is_foreign(c.__module__))
    return [slot for c in own for slot in vars(c).values() if type(slot) is types.MemberDescriptorType]
