"""Pass 1, trace: run a model on fake tensors and keep the FX graphs of what ran. Computes nothing, allocates nothing.

The whole model is tried first, because only there does every FFN stand beside its residual stream. Where no guess
at its inputs runs, its submodules are tried the same way, so that each part is seen in the largest context that runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.func import functional_call

from memcompile.passes._torch import FakeTensorMode, make_fx
from memcompile.passes.constants import find_constants
from memcompile.passes.guess import Arguments, guess_arguments
from memcompile.passes.sandbox import data_traced, forgotten, functions_marked, quiet, untouched

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

    @functools.cached_property
    def constants(self) -> frozenset[fx.Node]:
        """The nodes that depend on no input of the module. To be read of a normalised graph."""
        return find_constants(self.graph, self.parameters.keys() | self.buffers)


def trace(model: nn.Module, example_inputs: Any = None) -> list[Capture]:
    """The graphs of ``model`` in execution order: one if the whole model runs on a guess (or on
    ``example_inputs``: a tuple of positional or a dict of keyword arguments), else those of the largest
    submodules that do, in registration order.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with quiet(), forgotten():
        captures = list(_trace_largest(model, "", names, _as_arguments(example_inputs)))
    if [c.path for c in captures] != [""]:
        log.debug("whole-model trace did not run; traced submodules: %s", [c.path for c in captures])
    return captures


def _trace_largest(module: nn.Module, path: str, names: dict[int, str], given: Arguments | None) -> Iterator[Capture]:
    if not any(p.dim() >= 2 for p in module.parameters()):
        return
    for compute in (False, True) if not path and _is_small(module) else (False,):
        for arguments in [given] if given is not None else guess_arguments(module):
            try:
                with untouched(module):
                    capture = _trace_once(module, path, names, arguments, compute)
            except Exception as error:  # a guess may fail in any way that the owner's code can
                log.debug("%s does not trace on %s: %s", _label(path), arguments, error)
                failure = error
                continue
            yield capture
            return
    if given is not None:
        log.warning("memcompile: %s does not run on example_inputs (%s); guessing instead", _label(path), failure)
        yield from _trace_largest(module, path, names, None)
        return
    for name, child in module.named_children():
        yield from _trace_largest(child, f"{path}.{name}" if path else name, names, None)


_SMALL = 2**29  # numbers in a model that may be copied to run it once


def _is_small(model: nn.Module) -> bool:
    """Whether the model is real, and small enough to run a copy of it: some paths depend on values (the tokens of an
    image, a router's choice), and some operators have no fake kernel for every dtype.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return not any(t.is_meta for t in tensors) and sum(t.numel() for t in tensors) <= _SMALL


def _trace_once(
    module: nn.Module, path: str, names: dict[int, str], arguments: Arguments, compute: bool = False
) -> Capture:
    """One forward on fake tensors, or, to ``compute``, on copies of the real ones."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next(module.parameters()).device
    full_names = [names[id(p)] for p in module.parameters()]
    as_input = _copy if compute else mode.from_tensor
    parameters = {name: as_input(p) for name, p in module.named_parameters()}
    buffers = {name: as_input(b) for name, b in module.named_buffers()}

    def run(parameters: dict, buffers: dict, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        output = functional_call(module, parameters | buffers, args, kwargs)
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]

    def argument(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if compute and not leaf.is_meta:
            return _copy(leaf)
        tensor = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=device)
        return tensor.fill_(1) if compute else tensor

    on_fakes = contextlib.nullcontext() if compute else mode
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), data_traced(), functions_marked(), on_fakes:
        args, kwargs = pytree.tree_map(argument, (arguments.args, arguments.kwargs))
        tracer = make_fx(run, pre_dispatch=True, _error_on_data_dependent_ops=False)
        graph = tracer(parameters, buffers, args, kwargs).graph
    placeholders = graph.find_nodes(op="placeholder")
    named = dict(zip(placeholders, full_names, strict=False))
    rest = placeholders[len(parameters) :]
    return Capture(path, graph, named, frozenset(rest[: len(buffers)]))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


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
