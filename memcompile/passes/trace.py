"""Pass 1, trace: run a model on fake tensors and keep the FX graphs of what ran. Computes nothing, allocates nothing.

The whole model is tried first, because only there does every FFN stand beside its residual stream. Where no guess
at its inputs runs, its submodules are tried the same way, so that each part is seen in the largest context that runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.func import functional_call

from memcompile.passes._torch import FakeTensor, FakeTensorMode, make_fx
from memcompile.passes.guess import Arguments, guess_arguments

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Capture:
    """One traced module.

    Attributes:
        path: the module's path in the model; ``""`` for the whole model.
        graph: aten operators before autograd (`make_fx(pre_dispatch=True)`), fake values in ``meta["val"]``.
        parameters: the parameter's full name in the model for each placeholder that stands for one. Tied names
            are represented by the model's first, in every capture.
        buffers: the placeholders that stand for buffers.
    """

    path: str
    graph: fx.Graph
    parameters: dict[fx.Node, str]
    buffers: frozenset[fx.Node]


def trace(model: nn.Module, example_inputs: Any = None) -> list[Capture]:
    """The graphs of ``model`` in execution order: one if the whole model runs on a guess (or on
    ``example_inputs``: a tuple of positional or a dict of keyword arguments), else those of the largest
    submodules that do, in registration order.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with _quiet(), _forgotten():
        captures = list(_trace_largest(model, "", names, _as_arguments(example_inputs)))
    if [c.path for c in captures] != [""]:
        log.debug("whole-model trace did not run; traced submodules: %s", [c.path for c in captures])
    return captures


def _trace_largest(module: nn.Module, path: str, names: dict[int, str], given: Arguments | None) -> Iterator[Capture]:
    if not any(p.dim() >= 2 for p in module.parameters()):
        return
    for arguments in [given] if given is not None else guess_arguments(module):
        try:
            with _untouched(module):
                capture = _trace_once(module, path, names, arguments)
            yield capture
            return
        except Exception as error:  # a guess may fail in any way that the owner's code can
            if given is not None:
                log.warning(
                    "memcompile: %s does not run on example_inputs (%s); guessing instead",
                    _label(path),
                    error,
                )
            log.debug("%s does not trace on %s: %s", _label(path), arguments, error)
    if given is not None:
        yield from _trace_largest(module, path, names, None)
        return
    for name, child in module.named_children():
        yield from _trace_largest(child, f"{path}.{name}" if path else name, names, None)


def _trace_once(module: nn.Module, path: str, names: dict[int, str], arguments: Arguments) -> Capture:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next(module.parameters()).device
    full_names = [names[id(p)] for p in module.parameters()]
    parameters = {name: mode.from_tensor(p) for name, p in module.named_parameters()}
    buffers = {name: mode.from_tensor(b) for name, b in module.named_buffers()}

    def run(parameters: dict, buffers: dict, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        output = functional_call(module, parameters | buffers, args, kwargs)
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]

    def fake(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=device)

    with mode, torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        args, kwargs = pytree.tree_map(fake, (arguments.args, arguments.kwargs))
        graph = make_fx(run, pre_dispatch=True)(parameters, buffers, args, kwargs).graph
    placeholders = graph.find_nodes(op="placeholder")
    named = dict(zip(placeholders, full_names, strict=False))
    rest = placeholders[len(parameters) :]
    return Capture(path, graph, named, frozenset(rest[: len(buffers)]))


def _as_arguments(example_inputs: Any) -> Arguments | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, dict):
        return Arguments((), example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
            return Arguments(*example_inputs)
        return Arguments(tuple(example_inputs), {})
    return Arguments((example_inputs,), {})


def _label(path: str) -> str:
    return f"module {path!r}" if path else "the model"


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Undoes what a forward pass may leave behind: caches stored on modules, lazily made buffers, random state, and
    the fake parameters that `functional_call` leaves in a module that is reached by two paths.

    Hooks stay silent meanwhile: they are the user's own code with effects of its own, and no fake tensor is for it.
    """
    containers = (dict, list, set)
    saved, tensors = [], []
    for module in model.modules():
        state = dict(module.__dict__)
        saved.append((module, state, {k: v.copy() for k, v in state.items() if type(v) in containers}))
        module.__dict__.update({hooks: type(state[hooks])() for hooks in HOOKS})
        # What is no parameter and no buffer is not faked, and operators on constants alone do run. A table of
        # more than a few MiB is not copied: none is seen that a forward writes without an activation.
        small = (v for v in state.values() if type(v) is torch.Tensor and v.numel() <= 2**20)
        tensors += [(tensor, tensor._version, tensor.detach().clone()) for tensor in small]
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        for module, state, contents in saved:
            for name in module.__dict__.keys() - state.keys():
                del module.__dict__[name]
            module.__dict__.update(state)
            for name, content in contents.items():
                _restore(state[name], content)
        for tensor, version, content in tensors:
            if tensor._version != version:
                tensor.detach().copy_(content)


def _restore(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


@contextlib.contextmanager
def _forgotten() -> Iterator[None]:
    """Empties every `functools.lru_cache` that kept a fake tensor: a later call would return it to the real model."""
    try:
        yield
    finally:
        caches = [f for f in gc.get_objects() if type(f) is functools._lru_cache_wrapper]
        for cache in [c for c in caches if c.cache_info().currsize]:
            results = gc.get_referents(cache)  # of a cache without bounds they are the values of a dict
            if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(results)):
                cache.cache_clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
