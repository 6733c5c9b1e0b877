"""Compiled against eager: one node for Dynamo, the same numbers, no storm of recompiles, nothing dense saved."""

import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._functorch.aot_autograd import make_boxed_func

from memcompile.lowering import cpu, memory_lookup
from tests.lowering.cases import VARIANTS, Case, cases, gradients, leaves


def layer(case):
    return lambda *tensors: memory_lookup(*tensors, **case.options)


def assert_same_as_eager(case, backend, tolerance):
    tensors = case.tensors()
    output = torch.compile(layer(case), backend=backend, fullgraph=True)(*tensors)
    expected = memory_lookup(*tensors, **case.options)
    assert output.dtype == expected.dtype
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(output, expected, **tolerance)
    torch.testing.assert_close(gradients(output, tensors, grad), gradients(expected, tensors, grad), **tolerance)


@settings(max_examples=15)
@given(cases(dtypes=(torch.float32, torch.bfloat16)))
def test_aot_eager_is_eager(case):
    torch._dynamo.reset()
    assert_same_as_eager(case, "aot_eager", {"rtol": 0, "atol": 0})


@pytest.mark.parametrize("variant", ["plain", "full", "pairs"])
def test_inductor(variant):
    # Fused, fp32 sums are ordered otherwise; sums of a few tens of terms of size one.
    assert_same_as_eager(VARIANTS[variant], "inductor", {"rtol": 1e-5, "atol": 1e-5})


def test_inductor_without_tokens():
    assert_same_as_eager(Case(leading=(0,)), "inductor", {"rtol": 0, "atol": 0})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inductor_without_gradients(mode):
    case = VARIANTS["full"]
    tensors = [None if t is None else t.detach() for t in case.tensors()]
    compiled = torch.compile(layer(case), fullgraph=True)
    with mode():
        torch.testing.assert_close(compiled(*tensors), layer(case)(*tensors), rtol=1e-5, atol=1e-5)


def operators(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_one_node_in_dynamos_graph():
    case = VARIANTS["full"]
    recorder = EagerAndRecordGraphs()
    torch.compile(layer(case), backend=recorder, fullgraph=True)(*case.tensors())
    assert len(recorder.graphs) == 1
    assert operators(recorder.graphs[0].graph) == ["memcompile.memory_lookup.default"]


@pytest.mark.parametrize("variant", ["full", "pairs"])
def test_one_node_in_an_exported_program(variant):
    case = VARIANTS[variant]
    x, *rest = (None if t is None else t.detach() for t in case.tensors())

    class Memory(torch.nn.Module):
        def forward(self, x):
            return memory_lookup(x, *rest, **case.options)

    exported = torch.export.export(Memory(), (x,))
    assert operators(exported.graph) == ["memcompile.memory_lookup.default"]
    torch.testing.assert_close(exported.module()(x), Memory()(x), rtol=0, atol=0)


@pytest.mark.parametrize("pairs", [False, True])
def test_dynamic_tokens_do_not_recompile(pairs):
    case = Case(pairs=pairs)
    _, *rest = case.tensors()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(case), backend=counter, fullgraph=True)
    for tokens in (5, 8, 13, 32, 7, 64):
        x = torch.randn(tokens, case.width, requires_grad=True)
        output = compiled(x, *rest)
        torch.testing.assert_close(output, layer(case)(x, *rest), rtol=0, atol=0)
        output.sum().backward()
    assert counter.frame_count == 2  # once for 5 tokens, once for any number


def traced(case, device="cpu"):
    """The forward and the backward graph that AOTAutograd hands to Inductor."""
    graphs = []

    def keep(graph_module, example_inputs):
        graphs.append(graph_module.graph)
        return make_boxed_func(graph_module.forward)

    tensors = [None if t is None else t.detach().to(device).requires_grad_() for t in case.tensors()]
    partition = torch._functorch.partitioners.min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    torch.compile(layer(case), backend=backend, fullgraph=True)(*tensors).sum().backward()
    forward, backward = graphs
    return forward, backward


def shapes(nodes):
    values = [node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node)]
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_comes_apart_into_gemms_and_our_operators(device):
    forward, backward = (operators(graph) for graph in traced(VARIANTS["full"], device))
    assert "memcompile.memory_lookup.default" not in forward
    assert forward.count("aten.addmm.default") == 3
    assert forward.count("memcompile.weighted_gather.default") == 1
    whole = device == "cpu" and cpu.load()  # one kernel scores and searches
    assert forward.count("memcompile.product_key_search.default") == whole
    assert forward.count("aten.bmm.default") == (not whole)  # both halves' scores in one
    assert forward.count("memcompile.product_key_topk.default") == (not whole)
    assert backward.count("memcompile.gather_dot.default") == 1
    assert backward.count("memcompile.weighted_scatter.default") == 2  # values and half-keys
    assert backward.count("memcompile.weighted_gather.default") == 1  # the query
    assert not any("product_key" in name for name in backward)  # the search is not done again


def test_pairs_come_apart_into_their_operators():
    forward, backward = (operators(graph) for graph in traced(VARIANTS["pairs"]))
    assert forward.count("memcompile.pair_gather.default") == 1
    assert backward.count("memcompile.pair_grads.default") == backward.count("memcompile.pair_scatter.default") == 1


def test_nothing_dense_is_saved_or_built_in_the_backward():
    tokens, n_keys, value_dim = 211, 43, 97
    case = Case(leading=(tokens,), n_keys=n_keys, top_k=5, value_dim=value_dim)
    forward, backward = traced(case)
    hits = case.heads * case.top_k
    saved = shapes(next(n for n in forward.nodes if n.op == "output").args[0])
    assert (tokens, case.heads, case.top_k) in saved or (tokens, hits) in saved
    for shape in saved + shapes(backward.nodes):
        assert torch.Size(shape).numel() < tokens * hits * value_dim  # gathered rows
        assert not (tokens in shape and n_keys in shape)  # scores


def test_compiled_torch_func_grad():
    case = Case(dtype=torch.float64)
    tensors = [None if t is None else t.detach() for t in case.tensors()]

    def loss(x, half_keys, values):
        x_first = [x, *tensors[1:3], half_keys, values, *tensors[5:]]
        return memory_lookup(*x_first, **case.options).pow(2).sum()

    of = torch.func.grad(loss, (0, 1, 2))
    arguments = tensors[0], tensors[3], tensors[4]
    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), of(*arguments))


def test_compiled_autograd_of_an_eager_forward():
    case = VARIANTS["full"]
    tensors, expected = leaves(case.tensors()), leaves(case.tensors())
    layer(case)(*expected).sum().backward()
    compiler = torch.compile(backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        layer(case)(*tensors).sum().backward()
    for actual, eager in zip(tensors, expected, strict=True):
        torch.testing.assert_close(actual.grad, eager.grad)


def test_compiled_gradients_match_with_the_values_frozen():
    case = Case()
    tensors = leaves(case.tensors())
    tensors[4].requires_grad_(False)
    torch.compile(layer(case), backend="aot_eager", fullgraph=True)(*tensors).sum().backward()
    expected = leaves(case.tensors())
    expected[4].requires_grad_(False)
    memory_lookup(*expected, **case.options).sum().backward()
    assert tensors[4].grad is None
    torch.testing.assert_close(tensors[3].grad, expected[3].grad, rtol=0, atol=0)
