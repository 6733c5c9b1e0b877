"""Finds the feed-forward blocks of a model or a graph: the first steps of a plan, and all that `find_ffns` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from memcompile.common.pipeline import Pipeline
from memcompile.common.sites import FfnSite
from memcompile.passes.capture.graphs import Parameters, Scope, is_captured, read
from memcompile.passes.capture.trace import Capture, trace
from memcompile.passes.detect.blocks import Block, find_blocks


def find_ffns(model: nn.Module, example_inputs: Any = None) -> list[FfnSite]:
    """The feed-forward blocks of ``model`` in execution order, matched on FX graphs and never by name.

    The model runs on fake tensors, or, where values decide its path, a copy of it runs once. A block found only where
    it cannot be proved safe to replace carries the reason in ``refusal``.

    Args:
        model: any module; its parameters may be on the meta device. A captured graph of ATen operators
            (``torch.export.export(model, args).module()``) is read as it is.
        example_inputs: a tuple of positional or a dict of keyword arguments for one forward. Needed only where
            no guess at the inputs runs and the submodules alone do not show every block.
    """
    if isinstance(model, fx.GraphModule) and is_captured(model):
        return find_in_graph(model)
    _, blocks = find_in_model(Pipeline("find"), model, example_inputs)
    return [block.site for block in blocks]


def find_in_graph(graph_module: fx.GraphModule, parameters: Parameters | None = None) -> list[FfnSite]:
    """The feed-forward blocks of a captured graph of ATen operators, found as in a model. Nothing runs.

    Args:
        graph_module: from ``torch.export.export(model, args).module()``, or from ``make_fx`` with the weights among
            the inputs.
        parameters: which inputs are weights: a dict from the placeholders to the names that the sites shall have, or
            a list of placeholders, named as they are. By default they are the module's own parameters; without any,
            the inputs that are read as weights, named by their keys where they are passed in a dict.

    Raises:
        OptionError: ``parameters`` names an input that is not there.
        PlanError: the graph is not of ATen operators, or does not say which shapes it has.
    """
    return [block.site for block in find_in_scopes(read(graph_module, parameters))]


def find_in_model(pipeline: Pipeline, model: nn.Module, example_inputs: Any) -> tuple[list[Capture], list[Block]]:
    """The graphs of a model, and the blocks in them."""
    with pipeline.step("trace", "graphs"):
        captures = trace(model, example_inputs)
        pipeline.count = len(captures)
    return captures, find_blocks(captures, model, pipeline)


def find_in_scopes(scopes: Sequence[Scope]) -> list[Block]:
    """The blocks in captured graphs, in execution order."""
    blocks = find_blocks([scope.capture for scope in scopes], None, Pipeline("find"))
    order = {node: position for scope in scopes for node, position in scope.order.items()}
    return sorted(blocks, key=lambda block: min(order[call.region.down.node] for call in block.calls))
