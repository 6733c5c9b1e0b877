"""The backend: what it is called with, what it hands to Inductor, and the keys of Inductor's caches."""

import copy
import gc
import pickle
import types
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

import memcompile
from memcompile import CaptureError, PlanError
from memcompile.backend import Backend
from memcompile.backend import memcompile as named_backend
from memcompile.passes.checks.captured_memory import is_lookup
from memcompile.runtime.pool import pool_of
from tests.models import (
    DYNAMO_TRACES_MATMUL_OF_OBJECTS,
    GATED_HIDDEN,
    HIDDEN,
    WIDTH,
    ZOO,
    Block,
    Transformer,
    plain_ffn,
    tiny_gpt,
)

SIZES = {"n_keys": 8, "top_k": 4, "heads": 2}
TOKENS = torch.randint(50, (3, 5))
COMPILABLE = [name for name in ZOO if name != "raw_parameters" or DYNAMO_TRACES_MATMUL_OF_OBJECTS]


def nodes(lowered):
    modules = [module for graph, _ in lowered for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    return [node for module in modules for node in module.graph.nodes]


def widths(lowered):
    values = [node.meta.get("example_value") for node in nodes(lowered) if node.op == "call_function"]
    return {v.shape[-1] for v in values if isinstance(v, torch.Tensor) and v.dim()}


@pytest.mark.parametrize("name", COMPILABLE)
def test_a_selected_ffn_is_one_node(name, lowered):
    model, inputs = ZOO[name]()
    model.eval()
    explanation = memcompile.plan(model, memory_layers=lambda site: True, **SIZES)
    compiled = torch.compile(model, backend="memcompile", fullgraph=True)
    output = compiled(*inputs)
    assert len(lowered) == 1
    assert sum(map(is_lookup, nodes(lowered))) == sum(row.site.calls for row in explanation.rows) == 4
    assert not widths(lowered) & {HIDDEN, GATED_HIDDEN, 2 * GATED_HIDDEN}
    torch.testing.assert_close(output, model(*inputs))


@pytest.mark.parametrize("name", [name for name in COMPILABLE if name != "shared"])
def test_the_other_ffns_stay_dense(name, lowered):
    model, inputs = ZOO[name]()
    explanation = memcompile.plan(model, memory_layers=[1], **SIZES)
    torch.compile(model, backend="memcompile", fullgraph=True)(*inputs)
    assert sum(map(is_lookup, nodes(lowered))) == 1
    assert explanation.rows[0].site.hidden in widths(lowered)


class Broken(Block):
    """A graph break in each block, so that Dynamo compiles one block and reuses it for all."""

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        torch._dynamo.graph_break()
        return x + self.ffn(self.norm2(x))


def test_graph_breaks_run_each_block_as_planned(lowered):
    model = Transformer([Broken(WIDTH, plain_ffn(WIDTH, HIDDEN)) for _ in range(4)])
    memcompile.plan(model, memory_layers=[1, 3], **SIZES)
    expected = model(TOKENS)
    assert torch.equal(torch.compile(model, backend="memcompile")(TOKENS), expected)
    assert len(lowered) > 1


def test_fullgraph_checks_that_every_layer_runs(lowered):
    class Early(Transformer):
        leave = False

        def forward(self, tokens):
            x = self.tokens(tokens)
            for block in self.blocks[: 1 if self.leave else None]:
                x = block(x)
            return self.head(x)

    model = Early([Block(WIDTH, plain_ffn(WIDTH, HIDDEN)) for _ in range(2)])
    memcompile.plan(model, memory_layers=2, **SIZES)
    compiled = torch.compile(model, backend="memcompile", fullgraph=True)
    compiled(TOKENS)
    model.leave = True
    with pytest.raises(Exception, match="the forward took another path than when it was planned") as caught:
        compiled(TOKENS)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), CaptureError)


def test_the_name_alone_wants_a_planned_model(lowered, monkeypatch):
    monkeypatch.setattr("memcompile.backend.live_pools", lambda: iter(()))
    module = torch.fx.symbolic_trace(nn.Linear(3, 4))
    with pytest.raises(PlanError, match="`import memcompile` did not come before"):
        named_backend(module, [torch.ones(2, 3)])
    assert not lowered


@pytest.mark.parametrize("block", [Block, Broken])
def test_the_name_alone_lowers_a_planned_model(block, lowered):
    """A `torch.compile` that was imported before memcompile knows the backend by its name alone."""
    model = Transformer([block(WIDTH, plain_ffn(WIDTH, HIDDEN)) for _ in range(2)])
    memcompile.plan(model, memory_layers=1, **SIZES)
    compiled = torch.compile.original(model, backend="memcompile")
    assert torch.equal(compiled(TOKENS), model(TOKENS))
    assert sum(map(is_lookup, nodes(lowered))) == 1


def test_the_users_graph_pass_still_runs(lowered):
    def users_pass(graph):
        raise AssertionError("only its place matters here")

    model = tiny_gpt(layers=2)
    options = {"post_grad_custom_pre_pass": users_pass}
    torch.compile(model, backend="memcompile", memory_layers=1, options=options, **SIZES)(TOKENS)
    ((_, patches),) = lowered
    assert patches["post_grad_custom_pre_pass"].wrapped == (users_pass,)


def test_fullgraph_of_another_method_is_no_whole_forward(lowered):
    model = tiny_gpt(layers=2)
    model.first = types.MethodType(lambda self, tokens: self.blocks[0](self.tokens(tokens)), model)
    memcompile.plan(model, memory_layers=[1], **SIZES)
    torch.compile(model.first, backend="memcompile", fullgraph=True)(TOKENS)
    assert not any(map(is_lookup, nodes(lowered)))


def cache_key(lowered, **options):
    lowered.clear()
    torch.compiler.reset()
    torch.compile(tiny_gpt(layers=2), backend="memcompile", **{"memory_layers": 1, **SIZES, **options})(TOKENS)
    ((_, patches),) = lowered
    return repr(patches["post_grad_custom_pre_pass"].uuid())


def test_the_cache_key_covers_the_configuration(lowered):
    base = cache_key(lowered)
    assert cache_key(lowered) == base
    others = [
        cache_key(lowered, top_k=2),
        cache_key(lowered, memory_layers=[0]),
        cache_key(lowered, qk_norm=True),
        cache_key(lowered, gate=False),
        cache_key(lowered, key_dim=8),
    ]
    assert len({base, *others}) == 6


def test_backends_of_one_plan_are_equal():
    """Dynamo recompiles where the backend differs."""
    model = tiny_gpt()
    with mock.patch.object(torch.compile, "original") as original:
        for _ in range(2):
            torch.compile(model, backend="memcompile", memory_layers=2, **SIZES)
    first, second = (call.kwargs["backend"] for call in original.call_args_list)
    assert first == second and hash(first) == hash(second)
    assert first.__name__ == "memcompile"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_backend_of_a_copied_model_is_the_copys(duplicate):
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, **SIZES)
    twin, backend = duplicate((model, Backend(pool_of(model), whole=True)))
    assert backend.pool is pool_of(twin) is not pool_of(model)
    assert backend.whole and backend != Backend(pool_of(model), whole=True)


def test_a_compiled_model_is_freed():
    """Dynamo keeps the backend, and what was compiled."""
    model = tiny_gpt(layers=2)
    compiled = torch.compile(model, backend="memcompile", memory_layers=1, **SIZES)
    compiled(TOKENS).sum().backward()
    values = weakref.ref(model.memory_values)
    del model, compiled
    gc.collect()
    assert values() is None
