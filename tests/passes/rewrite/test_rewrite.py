"""Captured graphs with memory: what they compute, whose names they have, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import memcompile
from memcompile import FfnSite, MemoryConfig, OptionError, PlanError
from memcompile.passes import find_in_graph, rewrite
from memcompile.passes.checks.captured_memory import is_lookup
from tests.models import HIDDEN, VOCABULARY, WIDTH, ZOO, around, plain_ffn, tiny_gpt
from tests.planned import MEMORY, assert_same, gradients, lookups

CONFIG = MemoryConfig(**MEMORY)


def tokens(batch: int = 3, time: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(batch))


def gpt(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return tiny_gpt(layers)


def exported(model: nn.Module, *args: Any, **options: Any) -> fx.GraphModule:
    return torch.export.export(model, args, **options).module()


def rewritten(graph_module: fx.GraphModule, sites: list[FfnSite], **options: Any) -> fx.GraphModule:
    torch.manual_seed(1)
    return rewrite(graph_module, sites, **{"memory": CONFIG} | options)


def planned(model: nn.Module, sites: list[FfnSite], **options: Any) -> nn.Module:
    """The live model with the same sites and the same draws as `rewritten`."""
    torch.manual_seed(1)
    memcompile.plan(model, memory_layers=[site.down for site in sites], **MEMORY | options)
    return model


def seeded(model: nn.Module, *args: Any) -> Tensor:
    """One forward with its dropout drawn from one seed."""
    torch.manual_seed(2)
    return model(*args)


def assert_same_parameters(graph_module: fx.GraphModule, model: nn.Module) -> None:
    assert_same(dict(graph_module.named_parameters()), dict(model.named_parameters()))


# --- exported programs --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_an_exported_model_equals_the_planned_one(name, training):
    torch.manual_seed(0)
    model, args = ZOO[name]()
    model.train(training)
    graph_module = exported(model, *args)
    before = seeded(graph_module, *args)
    sites = memcompile.find_ffns(graph_module)
    assert sites == memcompile.find_ffns(model)

    result = rewritten(graph_module, sites)
    live = planned(model, sites)
    torch.testing.assert_close(seeded(result, *args), seeded(live, *args))
    assert lookups(result.graph) == sum(site.calls for site in sites)
    assert_same_parameters(result, live)
    assert torch.equal(seeded(graph_module, *args), before)
    assert not torch.allclose(seeded(result, *args), before)


def test_gradients_are_those_of_the_planned_model():
    model = gpt()
    graph_module = exported(model, tokens())
    result = rewritten(graph_module, memcompile.find_ffns(model)[1:2])
    live = planned(model, memcompile.find_ffns(graph_module)[1:2])
    for each in (result, live):
        each(tokens()).square().sum().backward()
    expected = gradients(live)
    for name, gradient in gradients(result).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda message, name=name: f"{name}: {message}")


def test_hugging_face_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    graph_module = exported(model, tokens())
    sites = memcompile.find_ffns(graph_module)
    assert [site.name for site in sites] == [f"model.layers.{i}.mlp" for i in range(3)]
    result, live = rewritten(graph_module, sites[1:2]), planned(model, sites[1:2])
    torch.testing.assert_close(result(tokens()).logits, live(tokens()).logits)
    assert_same_parameters(result, live)


@pytest.mark.parametrize("decomposed", [False, True])
def test_dynamic_shapes_stay_dynamic(decomposed):
    dynamic = ({0: Dim("batch"), 1: Dim("time", max=60)},)
    model = gpt()
    program = torch.export.export(model, (tokens(),), dynamic_shapes=dynamic)
    graph_module = (program.run_decompositions() if decomposed else program).module()
    sites = memcompile.find_ffns(graph_module)
    result, live = rewritten(graph_module, sites), planned(model, sites)
    other = tokens(2, 9)
    torch.testing.assert_close(result(other), live(other))
    again = torch.export.export(result, (tokens(),), dynamic_shapes=dynamic).module()  # no new guard refuses this
    torch.testing.assert_close(again(other), live(other))
    assert graph_module(other).shape == (2, 9, VOCABULARY)


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_blocks_inside_of_higher_order_operators(context):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.context = gpt(), context

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner.tokens(x)
            with self.context():
                x = self.inner.blocks[0](x)
            x = self.inner.blocks[1](x)
            with self.context():
                return self.inner.blocks[2](x)

    model = Model()
    graph_module = exported(model, tokens())
    before = graph_module(tokens())
    sites = memcompile.find_ffns(graph_module)
    assert sites == memcompile.find_ffns(model)
    chosen = sites[:2]  # one in a body, one outside of all
    if context is torch.no_grad:  # where a plan leaves FFNs alone
        model.context = torch.enable_grad
    result, live = rewritten(graph_module, chosen), planned(model, chosen)
    model.context = context
    torch.testing.assert_close(result(tokens()), live(tokens()))
    assert_same_parameters(result, live)
    assert torch.equal(graph_module(tokens()), before)


class Flattened(nn.Module):
    """Flattens its tokens for one of its projections."""

    def __init__(self, width: int, hidden: int, flat_up: bool) -> None:
        super().__init__()
        self.up, self.down, self.flat_up = nn.Linear(width, hidden), nn.Linear(hidden, width), flat_up

    def forward(self, x: Tensor) -> Tensor:
        if self.flat_up:
            return self.down(F.relu(self.up(x.flatten(0, -2))).view(*x.shape[:-1], -1))
        return self.down(F.relu(self.up(x)).flatten(0, -2)).view(x.shape)


def test_what_changes_a_buffer_stays():
    """Nothing reads what a higher-order operator returns that counts calls without gradients."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt(1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.calls.add_(1)
            return self.model(x)

    graph_module = exported(Counting(), tokens())
    (site,) = memcompile.find_ffns(graph_module)
    result = rewritten(graph_module, [site])
    for calls in (1, 2):
        result(tokens())
        assert result.calls == calls


@pytest.mark.parametrize("flat_up", [True, False])
def test_tokens_that_only_one_projection_flattens(flat_up):
    torch.manual_seed(0)
    model = around(lambda width, hidden: Flattened(width, hidden, flat_up), layers=2)
    dynamic = ({0: Dim("batch"), 1: Dim("time", max=60)},)
    graph_module = exported(model, tokens(), dynamic_shapes=dynamic)
    sites = memcompile.find_ffns(graph_module)
    result, live = rewritten(graph_module, sites), planned(model, sites)
    torch.testing.assert_close(result(tokens(2, 9)), live(tokens(2, 9)))


def test_memory_that_is_added_keeps_the_ffn():
    model = gpt()
    graph_module = exported(model, tokens())
    sites = memcompile.find_ffns(graph_module)[:2]
    result = rewritten(graph_module, sites, memory=dataclasses.replace(CONFIG, placement="add"))
    live = planned(model, sites, placement="add")
    assert torch.equal(result(tokens()), graph_module(tokens()))
    assert_same_parameters(result, live)
    for each in (result, live):
        for name, parameter in each.named_parameters():
            if name.endswith("memory.out_weight"):
                nn.init.eye_(parameter)
    torch.testing.assert_close(result(tokens()), live(tokens()))
    assert not torch.allclose(result(tokens()), graph_module(tokens()))


class Headed(nn.Module):
    """A model inside another: the table lies on the inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = gpt(), nn.Linear(VOCABULARY, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("strict", [False, True])
def test_values_lie_where_a_plan_puts_them(strict):
    model = Headed()
    graph_module = torch.export.export(model, (tokens(),), strict=strict).module()
    sites = memcompile.find_ffns(model)[:2]
    result, live = rewritten(graph_module, sites), planned(model, sites)
    assert result.body.memory_values.shape == live.body.memory_values.shape
    memcompile.reset_parameters(live)
    result.load_state_dict(live.state_dict())
    assert_same_parameters(result, live)
    torch.testing.assert_close(result(tokens()), live(tokens()))
    with pytest.raises(PlanError, match=r"'body\.memory_values' already"):
        rewrite(result, sites)


def test_loads_the_state_dict_of_the_planned_model():
    model = gpt()
    result = rewritten(exported(model, tokens()), memcompile.find_ffns(model)[:1])
    live = planned(model, memcompile.find_ffns(model)[:1])
    memcompile.reset_parameters(live)
    assert not torch.equal(result.memory_values, live.memory_values)
    result.load_state_dict(live.state_dict())
    assert_same_parameters(result, live)


def test_default_options():
    model = gpt()
    result = rewrite(exported(model, tokens()), memcompile.find_ffns(model))
    assert result(tokens()).shape == (3, 5, VOCABULARY)
    assert lookups(result.graph) == 3
    assert torch.equal(copy.deepcopy(result)(tokens()), result(tokens()))


def test_nodes_say_where_they_come_from():
    result = rewritten(exported(gpt(1), tokens()), memcompile.find_ffns(gpt(1)))
    (lookup,) = filter(is_lookup, result.graph.nodes)
    assert lookup.meta["val"].shape == (3, 5, WIDTH)
    assert [path for path, _ in lookup.meta["nn_module_stack"].values()][-1] == "blocks.0.ffn.2"
    assert all("val" in node.meta for node in lookup.all_input_nodes)
    assert not {"gelu", "linear_2", "linear_3"} & {node.name for node in result.graph.nodes}


def test_saved_loaded_and_compiled_ahead_of_time(tmp_path):
    model = gpt(1).eval()
    sites = memcompile.find_ffns(model)
    result, live = rewritten(exported(model, tokens()), sites), planned(model, sites)
    with torch.no_grad():
        expected = live(tokens())
        program = torch.export.export(result, (tokens(),))
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2")
        torch.testing.assert_close(loaded.module()(tokens()), expected)
        package = torch._inductor.aoti_compile_and_package(loaded, package_path=str(tmp_path / "compiled.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(tokens()), expected)


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
    loss = lambda parameters, x: functional(model)(parameters, x).square().sum()  # noqa: E731
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
