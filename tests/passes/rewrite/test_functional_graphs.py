"""Graphs of functional code with memory, and graphs that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import memcompile
from memcompile import FfnSite, OptionError, PlanError
from memcompile.passes import find_in_graph, rewrite
from tests.models import HIDDEN, WIDTH, plain_ffn
from tests.passes.rewrite.rewritten import (
    CONFIG,
    exported,
    gpt,
    planned,
    rewritten,
    tokens,
)
from tests.planned import assert_same

# --- functional code ----------------------------------------------------------------------------


def functional(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,))


@pytest.mark.parametrize("placement", ["replace", "add"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [True, False])
def test_weights_that_are_passed_in(pre_dispatch, mode, placement):
    model = gpt()
    weights = dict(model.named_parameters())
    graph_module = make_fx(functional(model), tracing_mode=mode, pre_dispatch=pre_dispatch)(weights, tokens())
    sites = find_in_graph(graph_module)
    assert sites == memcompile.find_ffns(model)
    result = rewritten(graph_module, sites[1:], memory=dataclasses.replace(CONFIG, placement=placement))
    live = planned(model, sites[1:], placement=placement)

    drawn = result.meta["memcompile"]
    now = dict(live.named_parameters())
    assert_same(drawn, {name: now[name] for name in drawn})
    assert now.keys() == drawn.keys() | (weights.keys() - {n for s in sites[1:] for n in s.parameters} & weights.keys()
                                         if placement == "replace" else weights.keys())  # fmt: skip
    for name in now:
        if name.endswith("memory.out_weight"):
            nn.init.eye_(now[name])
    x = tokens(2, 9) if mode == "symbolic" else tokens()
    torch.testing.assert_close(result(now, x), live(x))


@pytest.mark.parametrize("named", [True, False])
def test_weights_that_are_passed_one_by_one(named):
    model = gpt(2)
    names = [name for name, _ in model.named_parameters()]
    flat = [p for _, p in model.named_parameters()]
    graph_module = make_fx(lambda x, *weights: functional(model)(dict(zip(names, weights, strict=True)), x))(
        tokens(), *flat
    )
    inputs = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    parameters = dict(zip(inputs[1:], names, strict=True)) if named else None
    sites = find_in_graph(graph_module, parameters)
    if named:
        assert sites == memcompile.find_ffns(model)
    result = rewritten(graph_module, sites, parameters=parameters)

    taken = [str(node.target) for node in result.graph.find_nodes(op="placeholder")]
    drawn = result.meta["memcompile"]
    given = dict(zip(inputs, [tokens(), *flat], strict=True))
    kept = [given[name] for name in taken[: -len(drawn)]]
    output = result(*kept, *drawn.values())
    live = planned(model, memcompile.find_ffns(model))
    torch.testing.assert_close(output, live(tokens()))


def test_under_autocast():
    model = gpt()
    weights = dict(model.named_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph_module = make_fx(functional(model))(weights, tokens())  # casts are nodes of the graph
    sites = find_in_graph(graph_module)
    result, live = rewritten(graph_module, sites), planned(model, sites)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = live(tokens())
    torch.testing.assert_close(result(dict(live.named_parameters()), tokens()), expected)


def test_nodes_without_values():
    model = gpt()
    graph_module = exported(model, tokens())
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        del node.meta["val"]
    sites = memcompile.find_ffns(graph_module)
    assert sites == memcompile.find_ffns(model)
    assert all("val" not in n.meta for n in graph_module.graph.nodes if n.target is torch.ops.aten.linear.default)
    result, live = rewritten(graph_module, sites), planned(model, sites)
    torch.testing.assert_close(result(tokens()), live(tokens()))


# --- refusals -----------------------------------------------------------------------------------


def changed(**values: Any) -> Callable[[FfnSite], FfnSite]:
    return lambda site: dataclasses.replace(site, **values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed(down="elsewhere.weight"),
            r"'blocks.0.ffn' is no feed-forward block of this graph: it has no elsewhere",
        ),
        (changed(down="head.weight"), r"no feed-forward block of this graph: head.weight is read by linear"),
        (changed(parameters=("blocks.0.ffn.0.weight",)), r"'blocks.0.ffn' is not the same in this graph"),
        (changed(refusal="it is an expert"), r"'blocks.0.ffn' cannot become a memory: it is an expert"),
    ],
)
def test_a_site_that_is_not_in_the_graph(change, message):
    model = gpt(1)
    graph_module = exported(model, tokens())
    code = graph_module.code
    with pytest.raises(PlanError, match=message):
        rewrite(graph_module, [change(memcompile.find_ffns(model)[0])])
    assert graph_module.code == code and not hasattr(graph_module, "memory_values")


def test_a_weight_with_other_readers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner.blocks[0].ffn[2].weight.square().sum()

    graph_module = exported(Model(), tokens())
    first, second = memcompile.find_ffns(graph_module)
    assert second.refusal is None
    with pytest.raises(PlanError, match=r"'inner.blocks.0.ffn' cannot become.* also read by .*outside of the block"):
        rewrite(graph_module, [dataclasses.replace(first, refusal=None), second])


def test_a_graph_with_its_backward():
    model = gpt(1)
    weights = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional(model)(parameters, x).square().sum()

    graph_module = make_fx(torch.func.grad(loss))(weights, tokens())
    with pytest.raises(PlanError, match=r"'blocks.0.ffn' .*also read by"):
        rewrite(graph_module, memcompile.find_ffns(model))


def test_what_is_no_captured_graph():
    captured: list[fx.GraphModule] = []
    torch.compile(gpt(1), backend=lambda graph_module, _: captured.append(graph_module) or graph_module)(tokens())
    with pytest.raises(PlanError, match="not of ATen operators"):
        find_in_graph(captured[0])
    with pytest.raises(PlanError, match="not of ATen operators"):
        find_in_graph(fx.symbolic_trace(plain_ffn(WIDTH, HIDDEN)))
    with pytest.raises(OptionError, match=r"takes an fx\.GraphModule"):
        rewrite(gpt(1), memcompile.find_ffns(gpt(1)))
    graph_module = exported(gpt(1), tokens())
    with pytest.raises(OptionError, match="sites must be"):
        rewrite(graph_module, [])
    with pytest.raises(OptionError, match="names 'weight', which is no input"):
        find_in_graph(graph_module, ["weight"])
    with pytest.raises(PlanError, match=r"memcompile\.passes\.rewrite"):
        memcompile.plan(graph_module)
    result = rewrite(graph_module, memcompile.find_ffns(graph_module))
    with pytest.raises(PlanError, match="'memory_values' already"):
        rewrite(result, memcompile.find_ffns(graph_module))
