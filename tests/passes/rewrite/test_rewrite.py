"""Captured graphs with memory: what they compute, whose names they have, and what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import memcompile
from memcompile import PlanError
from memcompile.passes import rewrite
from memcompile.passes.checks.captured_memory import is_lookup
from tests.models import VOCABULARY, WIDTH, ZOO, around
from tests.passes.rewrite.rewritten import (
    CONFIG,
    assert_same_parameters,
    exported,
    gpt,
    planned,
    rewritten,
    seeded,
    tokens,
)
from tests.planned import gradients, lookups

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
