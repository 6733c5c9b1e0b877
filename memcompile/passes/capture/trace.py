"""Runs a model on fake tensors and keeps the FX graphs of what ran. Computes nothing, allocates nothing, unless values
decide the path: then a copy of the model runs once.

The whole model is tried first, because only its graph has every FFN together with its residual stream. Where no guess
at its inputs runs, its submodules are tried the same way, so that each part is seen in the largest context that runs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Container, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from memcompile.passes._torch import make_fx
from memcompile.passes.capture.forward import Forward, can_compute
from memcompile.passes.capture.guess import Arguments, guess_arguments
from memcompile.passes.capture.sandbox import sandbox
from memcompile.passes.capture.state import NotRestored
from memcompile.passes.capture.structure import structure
from memcompile.passes.fx import fake_value, is_in_place, memory_root

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Capture:
    """One traced module.

    Attributes:
        path: the module's path in the model; ``""`` for the whole model.
        graph: aten operators before autograd (`make_fx(pre_dispatch=True)`), fake values in ``meta["val"]``.
        parameters: the placeholders that stand for parameters, with the parameter's full name in the model: of tied
            names the model's first, in every capture.
        buffers: the placeholders that stand for buffers.
        forward: how the module was run; None for a graph that the user captured.
        output_dtypes: of the tensors that the module returned.
        only: where set, the graph counts for the blocks of these parameters alone: another graph does for the rest.
    """

    path: str
    graph: fx.Graph
    parameters: dict[fx.Node, str]
    buffers: frozenset[fx.Node]
    forward: Forward | None = None
    output_dtypes: tuple[torch.dtype, ...] = ()
    only: frozenset[str] | None = None

    def covers(self, parameter: str) -> bool:
        """Whether a reader of the parameter in this graph counts."""
        return self.only is None or parameter in self.only

    @property
    def unread(self) -> frozenset[str]:
        """The parameters that nothing in the graph reads."""
        return frozenset(name for node, name in self.parameters.items() if not node.users)

    @functools.cached_property
    def constants(self) -> frozenset[fx.Node]:
        """The nodes that depend on no input of the module. To be read of a normalised graph."""
        return _constants(self.graph, self.parameters.keys() | self.buffers)


def trace(model: nn.Module, example_inputs: Any = None) -> list[Capture]:
    """The graphs of ``model`` in execution order: one if the whole model runs on a guess (or on
    ``example_inputs``: a tuple of positional or a dict of keyword arguments), else those of the largest
    submodules that do, in registration order. Of submodules of the same structure one is traced.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with sandbox() as survivors:
        captures = list(_trace_largest(model, "", names, _as_arguments(example_inputs), {}))
        captures += _skipped_in_training(model, names, captures)
        survivors.refuse(capture.graph for capture in captures)
    if any(c.path for c in captures):
        log.debug("whole-model trace did not run; traced submodules: %s", [c.path for c in captures])
    elif captures:
        unread = frozenset.intersection(*(c.unread for c in captures))
        log.debug("parameters that no forward reads, so no block of them is found: %s", sorted(unread) or "none")
    return captures


def _trace_largest(
    module: nn.Module, path: str, names: dict[int, str], given: Arguments | None, traced: dict[Hashable, Capture | None]
) -> Iterator[Capture]:
    if not any(p.dim() >= 2 for p in module.parameters()):
        return
    like = structure(module) if path else None
    if like in traced:
        known = traced[like]
        capture = None if known is None else _renamed(known, module, path, names)
    else:
        capture = traced[like] = _trace_module(module, path, names, given)
    if capture is not None:
        yield capture
    elif given is not None:
        yield from _trace_largest(module, path, names, None, {})
    else:
        for name, child in module.named_children():
            yield from _trace_largest(child, f"{path}.{name}" if path else name, names, None, traced)


def _skipped_in_training(model: nn.Module, names: dict[int, str], captures: Sequence[Capture]) -> Iterator[Capture]:
    """The graph in eval mode of what one forward in train mode happened to leave out (layer drop)."""
    if not captures or captures[0].path or not captures[0].unread or not any(m.training for m in model.modules()):
        return
    (whole,) = captures
    assert whole.forward is not None
    for compute in (False, True) if can_compute(model) else (False,):
        try:
            capture = _trace_once(model, "", names, dataclasses.replace(whole.forward, compute=compute, training=False))
        except NotRestored:
            raise
        except Exception as error:  # as in train mode, the owner's code may fail in any way
            log.debug("the model does not trace in eval mode: %s", str(error))
            continue
        found = whole.unread - capture.unread
        if found:
            yield dataclasses.replace(capture, only=found)
        return


def _trace_module(module: nn.Module, path: str, names: dict[int, str], given: Arguments | None) -> Capture | None:
    """The module's graph on the arguments given, or on the first guess that runs; None where none does."""
    device, label = next(module.parameters()).device, f"module {path!r}" if path else "the model"
    for compute in (False, True) if not path and can_compute(module) else (False,):
        for arguments in [given] if given is not None else guess_arguments(module):
            try:
                return _trace_once(module, path, names, Forward(arguments, compute, device=device))
            except NotRestored:
                raise
            except Exception as error:  # a guess may fail in any way that the owner's code can
                failure = str(error)  # a log that kept the error would keep its frames, and the tensors in them
                log.debug("%s does not trace on %s: %s", label, arguments, failure)
    if given is not None:
        log.warning("memcompile: %s does not run on example_inputs (%s); guessing instead", label, failure)
    return None


def _trace_once(module: nn.Module, path: str, names: dict[int, str], forward: Forward) -> Capture:
    tracer = functools.partial(make_fx, pre_dispatch=True, _error_on_data_dependent_ops=False)
    graph = forward.run(module, tracer).graph
    placeholders = graph.find_nodes(op="placeholder")
    full_names = [names[id(p)] for p in module.parameters()]
    buffers = placeholders[len(full_names) :][: sum(1 for _ in module.buffers())]
    returned = graph.find_nodes(op="output")[0].all_input_nodes
    dtypes = tuple(value.dtype for node in returned if (value := fake_value(node)) is not None)
    return Capture(path, graph, dict(zip(placeholders, full_names, strict=False)), frozenset(buffers), forward, dtypes)


def _renamed(capture: Capture, module: nn.Module, path: str, names: dict[int, str]) -> Capture:
    """The capture of a module that has the structure of the one that was captured."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(capture.graph, copies))
    full_names = [names[id(p)] for p in module.parameters()]
    parameters = {copies[n]: name for n, name in zip(capture.parameters, full_names, strict=True)}
    buffers = frozenset(copies[n] for n in capture.buffers)
    return Capture(path, graph, parameters, buffers, capture.forward, capture.output_dtypes)


def _as_arguments(example_inputs: Any) -> Arguments | None:
    match example_inputs:
        case None:
            return None
        case dict():
            return Arguments((), example_inputs)
        case (tuple(args), dict(kwargs)):
            return Arguments(args, kwargs)
        case [*args]:
            return Arguments(tuple(args), {})
    return Arguments((example_inputs,), {})


def _constants(graph: fx.Graph, given: Container[fx.Node]) -> frozenset[fx.Node]:
    """Every node whose ancestors among placeholders are all in ``given`` (parameters and buffers), those included.

    A constant that an activation is written into (a cache, running statistics, an output allocated first) is none.
    """
    written: set[fx.Node] = set()
    while True:
        constants: set[fx.Node] = set()
        for node in graph.nodes:
            made = node in given if node.op == "placeholder" else all(a in constants for a in node.all_input_nodes)
            if made and node not in written:
                constants.add(node)
        found = {
            root
            for node in graph.nodes
            if is_in_place(node) and node not in constants and (root := memory_root(node)) in constants
        }
        if not found:
            return frozenset(constants)
        written |= found
