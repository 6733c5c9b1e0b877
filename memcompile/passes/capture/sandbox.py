"""What surrounds a forward pass that is traced: the model is as it was afterwards, and the graph shows all that ran."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import logging
import random
import sys
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from memcompile.passes._torch import FakeTensor, get_proxy_mode, pytree

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_caches: weakref.WeakSet[functools._lru_cache_wrapper[Any]] = weakref.WeakSet()


@contextlib.contextmanager
def restored_afterwards(model: nn.Module) -> Iterator[None]:
    """Undoes what a forward pass may do: caches stored on modules, lazily made buffers, random state, and
    the fake parameters that `functional_call` leaves in a module that is reached by two paths.

    Hooks do not run: they are the user's own code with effects of its own, and it expects no fake tensors. The hooks by
    which a Hugging Face model collects its own hidden states do, because its forward reads what they collect.
    """
    saved, tensors = [], []
    for module in model.modules():
        state = dict(module.__dict__)
        saved.append((module, state, [c for v in state.values() for c in _containers(v)]))
        module.__dict__.update({hooks: _of_the_model(state[hooks]) for hooks in HOOKS})
        # What is no parameter and no buffer is not faked, and operators on constants alone do run. A table of
        # more than a few MiB is not copied: none is seen that a forward writes without an activation.
        small = (v for v in state.values() if type(v) is torch.Tensor and v.numel() <= 2**20)
        tensors += [(tensor, tensor._version, tensor.detach().clone()) for tensor in small]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = None if numpy is None else numpy.random.get_state()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if has_cuda else ()):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpys)
        for module, state, contents in saved:
            for name in module.__dict__.keys() - state.keys():
                del module.__dict__[name]
            module.__dict__.update(state)
            for container, content in contents:
                container.clear()
                fill = container.extend if isinstance(container, (list, collections.deque)) else container.update
                fill(content)
        for tensor, version, content in tensors:
            if tensor._version != version:
                tensor.detach().copy_(content)


def _of_the_model(hooks: Any) -> Any:
    modules = {key: getattr(hook, "__module__", None) or "" for key, hook in hooks.items()}
    return type(hooks)((key, hook) for key, hook in hooks.items() if modules[key].startswith("transformers."))


_CONTAINERS = (dict, list, set, collections.OrderedDict, collections.defaultdict, collections.deque)


def _containers(value: Any, depth: int = 4) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with a copy of its content."""
    if type(value) in _CONTAINERS and depth:
        yield value, value.copy()
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item, depth - 1)


def note_caches() -> None:
    """Finds every `functools.lru_cache` of the process and keeps it: `gc.freeze` hides those that exist by then."""
    _caches.update(f for f in gc.get_objects() if type(f) is functools._lru_cache_wrapper)


@contextlib.contextmanager
def caches_without_fakes() -> Iterator[None]:
    """Empties every `functools.lru_cache` that kept a fake tensor: a later call would return it to the real model."""
    try:
        yield
    finally:
        note_caches()
        for cache in [c for c in _caches if c.cache_info().currsize]:
            results = gc.get_referents(cache)  # of a cache without bounds they are the values of a dict
            if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(results)):
                cache.cache_clear()


@contextlib.contextmanager
def muted_loggers() -> Iterator[None]:
    """Mutes loggers that report each failed guess as an error of the user's."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses", "torch.fx.experimental")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def data_traced() -> contextlib.AbstractContextManager[Any]:
    """Makes ``x.data`` mean ``x.detach()``: tracing does not see what is written to a true ``x.data``."""
    data: Any = torch.Tensor.data
    return mock.patch.object(torch.Tensor, "data", property(lambda tensor: tensor.detach(), data.__set__))


AUTOGRAD_FUNCTION = "autograd_function"  # in a node's meta: the class whose forward ran it


def functions_marked() -> contextlib.AbstractContextManager[Any]:
    """Marks the nodes that run inside an `autograd.Function`: its backward is its own, whatever the graph shows.
    Reentrant activation checkpointing is one too, but differentiates what it ran.
    """
    apply = torch.autograd.Function.__dict__["apply"]  # a classmethod, written in C from torch 2.15 on

    def marking(cls: type, *args: Any, **kwargs: Any) -> Any:
        mode = get_proxy_mode()
        if mode is None or cls is CheckpointFunction:
            return apply.__get__(None, cls)(*args, **kwargs)
        before = next(iter(reversed(mode.tracer.graph.nodes)))
        result = apply.__get__(None, cls)(*args, **kwargs)
        node = before.next
        while node.op != "root":
            node.meta[AUTOGRAD_FUNCTION] = cls.__name__
            node = node.next
        return result

    return mock.patch.object(torch.autograd.Function, "apply", classmethod(marking))
