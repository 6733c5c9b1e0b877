"""Each variant as a planned model: trained as a dense table is, compiled, saved, drawn anew, exported, stored."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import OptionError
from memcompile.checkpoint import export_safetensors, import_safetensors, load, save
from memcompile.passes.checks.captured_memory import is_lookup
from memcompile.passes.rewrite.rewrite import rewrite
from tests.checkpoint.trainings import everything
from tests.models import tiny_gpt
from tests.planned import MEMORY, assert_same, batch, gradients, planned_gpt, stop_before_inductor
from tests.runtime.table.stepping import adamw, assert_as_dense, train

EVERYTHING = {
    "variant": "pkm", "qk_norm": True, "weighting": "sigmoid", "tables": "separate", "balance_loss": 0.1,
}  # fmt: skip
PAIRS = EVERYTHING | {"variant": "peer", "value_dim": 24, "gate": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "memory": {"variant": "memory"},
    "pkm": {"variant": "pkm"},
    "peer": {"variant": "peer"},
    "peer without BatchNorm": {"variant": "peer", "query_norm": "none"},
    "peer with all options": PAIRS,
    "pkm with a gate": {"variant": "pkm", "gate": True},
    "sigmoid": {"weighting": "sigmoid"},
    "separate": {"tables": "separate"},
    "balanced": {"balance_loss": 0.1},
    "everything": EVERYTHING,
}
SIZES = {"layers": 3, "memory_layers": 2}


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(("query_mean", "query_var"))}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sparse_table_trains_as_a_dense_one(name):
    """Values, parameters and running statistics, in fp64, with rows that rest."""
    assert_as_dense(lambda model: train(model, adamw(model), range(4)), **VARIANTS[name])


@pytest.mark.parametrize("name", ["pkm", "everything", "peer with all options"])
def test_compiled_is_eager(name, monkeypatch):
    """What AOTAutograd makes of the captured graph, three steps and an evaluation; one operator a layer for Dynamo."""
    from torch._dynamo.backends.debugging import aot_eager

    captured = stop_before_inductor(monkeypatch, aot_eager)
    model = planned_gpt(layers=2, memory_layers=2, values_grad="sparse", **VARIANTS[name]).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="memcompile", fullgraph=True)
    optimizers = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(3):
        for run, optimizer in zip((model, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            run(*batch(step)).backward()
            optimizer.step()
    torch.testing.assert_close(gradients(twin), gradients(model), rtol=0, atol=1e-12)
    torch.testing.assert_close(statistics(twin), statistics(model), rtol=0, atol=1e-12)
    assert all((b != start).all() for b, start in zip(statistics(twin).values(), itertools.cycle([0, 1])))
    before = statistics(twin)
    torch.testing.assert_close(compiled.eval()(*batch(9)), model.eval()(*batch(9)), rtol=0, atol=1e-12)
    assert_same(statistics(twin), before)
    lookups = [[str(node.target) for node in graph.graph.nodes if is_lookup(node)] for graph in captured]
    assert {len(names) for names in lookups} == {2}
    overloads = {"memcompile.memory_lookup.default"} | ({"memcompile.memory_lookup.updating"} if before else set())
    assert {name for names in lookups for name in names} == overloads


@pytest.mark.parametrize("options", [EVERYTHING, PAIRS], ids=["pkm", "peer"])
def test_inductor(options):
    """Its own kernels, with the statistics' update in the graph."""
    model = planned_gpt(layers=1, **options, values_grad="sparse")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="memcompile", fullgraph=True)
    for run in (model, compiled):
        run(*batch()).backward()
    torch.testing.assert_close(gradients(twin), gradients(model), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(statistics(twin), statistics(model), rtol=1e-5, atol=1e-6)


def test_tables_of_layers_do_not_touch():
    model = planned_gpt(**SIZES, tables="separate", values_grad="sparse")
    assert model.memory_values.shape == (2 * 8**2, 32)
    model(*batch()).backward()
    rows = model.memory_values.grad.coalesce().indices()[0]
    first = model.blocks[0].ffn[2].memory
    first.half_keys.requires_grad_(False)
    with torch.no_grad():
        model.memory_values[:64] = 0
        bias = first(torch.randn(5, 32)) - first.out_bias
    assert not bias.any()
    assert (rows < 64).any() and (rows >= 64).any()


@pytest.mark.parametrize("variant", [EVERYTHING, PAIRS], ids=["pkm", "peer"])
@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_a_training_goes_on_bit_for_bit(values_grad, variant, tmp_path):
    options = SIZES | variant | {"n_keys": 16, "values_grad": values_grad}
    model, other = planned_gpt(**options), planned_gpt(seed=1, **options)
    optimizer, other_optimizer = adamw(model), adamw(other)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, step=3)
    assert memcompile.checkpoint.config(tmp_path) == memcompile.config_from(model.state_dict())
    load(tmp_path, other, other_optimizer)
    for each in ((model, optimizer), (other, other_optimizer)):
        train(*each, range(3, 6))
    assert_same(everything(other, other_optimizer), everything(model, optimizer))
    assert_same(statistics(other), statistics(model))


@pytest.mark.parametrize("options", [EVERYTHING, PAIRS], ids=["pkm", "peer"])
def test_safetensors_have_the_statistics_and_the_plan(options, tmp_path):
    model = planned_gpt(**SIZES, **options)
    train(model, adamw(model), range(2))
    export_safetensors(model, tmp_path)
    other = tiny_gpt(layers=3)
    memcompile.plan(other, memory=memcompile.checkpoint.config(tmp_path))
    import_safetensors(tmp_path, other)
    assert_same(statistics(other), statistics(model))
    assert torch.equal(other.eval()(batch()[0]), model.eval()(batch()[0]))


def test_statistics_start_anew_where_parameters_do():
    model = planned_gpt(**SIZES, variant="pkm")
    start = statistics(model)
    for reset in (memcompile.reset_parameters, lambda model: model.to_empty(device="cpu")):
        model(*batch())
        assert not any(torch.equal(b, start[name]) for name, b in statistics(model).items())
        reset(model)
        assert_same(statistics(model), start)


def test_statistics_of_a_half_model_are_fp32_until_it_is_cast():
    torch.manual_seed(0)
    model = tiny_gpt(layers=2).bfloat16()
    memcompile.plan(model, memory_layers=1, variant="pkm", **MEMORY)
    assert {b.dtype for b in statistics(model).values()} == {torch.float32}
    model(*batch()).backward()
    model.bfloat16()
    model(*batch()).backward()
    assert {b.dtype for b in statistics(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [EVERYTHING, PAIRS], ids=["pkm", "peer"])
def test_exported(options, training):
    model = planned_gpt(**SIZES, **options).train(training)
    twin, start, tokens = copy.deepcopy(model), statistics(model), batch()[0]
    program = torch.export.export(model, (tokens,))
    if not training:
        assert sum(str(n.target) == "memcompile.memory_lookup.default" for n in program.graph.nodes) == 2
    exported = program.module()
    torch.testing.assert_close(exported(tokens), twin(tokens))
    state = exported.state_dict()
    torch.testing.assert_close({name: state[name] for name in start}, statistics(twin))
    moved = [name for name, b in statistics(twin).items() if not torch.equal(b, start[name])]
    assert moved == [*start] * training


@pytest.mark.parametrize("options", [EVERYTHING, PAIRS], ids=["pkm", "peer"])
def test_in_a_file(options, tmp_path):
    model, tokens = planned_gpt(**SIZES, **options).eval(), batch()[0]
    expected, state = model(tokens), model.state_dict()
    memcompile.store_values(model, tmp_path / "table")
    assert torch.equal(model(tokens), expected)
    other = tiny_gpt(layers=3).eval()
    config = memcompile.config_from(state).to_dict()
    memcompile.plan(other, **config | {"values_storage": "mmap", "values_path": tmp_path / "table"})
    del state["memory_values"]
    other.load_state_dict(state, strict=False)
    assert torch.equal(other(tokens), expected)


def test_explained():
    explanation = memcompile.explain(planned_gpt(**SIZES, **EVERYTHING))
    assert_expected_inline(
        explanation.memory.partition("\nvalues:")[0],
        """\
memory: 128 slots (8 half-keys a side) x 32 in 2 layer(s), 2 heads x top 4, key_dim 8; values float32
variant pkm: BatchNorm of the query, no gate, unit norm of query and keys, sigmoid weights, a table for each layer, balance loss 0.1""",  # noqa: E501
    )
    for form, options in {
        "memory: no gate": {"variant": "memory"},
        "memory+: a gate, unit norm of query and keys": {"qk_norm": True},
        "pkm: BatchNorm of the query, a gate": {"query_norm": "batch"},
        "peer: BatchNorm of the query, pairs [u | v], no gate": {"variant": "peer"},
        "peer: pairs [u | v], no gate": {"variant": "peer", "query_norm": "none"},
    }.items():
        assert f"\nvariant {form}\n" in memcompile.explain(planned_gpt(**options)).memory
    assert "variant" not in memcompile.explain(planned_gpt()).memory


@pytest.mark.parametrize("variant", [{"variant": "memory"}, {"variant": "peer", "query_norm": "none"}], ids=str)
def test_a_rewritten_graph_is_the_planned_model(variant):
    model, tokens = tiny_gpt(layers=3), batch()[0]
    graph = torch.export.export(model, (tokens,)).module()
    sites = memcompile.find_ffns(graph)
    options = {**MEMORY, "tables": "separate", "weighting": "sigmoid", **variant}
    torch.manual_seed(1)
    rewritten = rewrite(graph, sites, memory=memcompile.MemoryConfig(**options))
    torch.manual_seed(1)
    memcompile.plan(model, memory_layers="all", **options)
    torch.testing.assert_close(rewritten(tokens), model(tokens))
    assert_same(dict(rewritten.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "pkm"}, "query_norm='batch', which variant='pkm' has here, differs in train and eval mode"),
        ({"variant": "peer"}, "query_norm='batch', which variant='peer' has here, differs in train and eval mode"),
        ({"query_norm": "batch"}, "query_norm='batch', which variant='memory\\+' has here, differs in train and eval"),
        ({"balance_loss": 0.1}, r"for inference give memory=dataclasses.replace\(config, balance_loss=0\); to train"),
    ],
)
def test_what_a_captured_graph_cannot_have(options, message):
    graph = torch.export.export(tiny_gpt(layers=1), (batch()[0],)).module()
    with pytest.raises(OptionError, match=message):
        rewrite(graph, memcompile.find_ffns(graph), memory=memcompile.MemoryConfig(**MEMORY, **options))


def test_a_checkpoint_with_a_balance_loss_serves_in_float16():
    """Where the loss itself is not served: its training is refused, at the first forward of it."""
    state, tokens = planned_gpt(balance_loss=0.1).state_dict(), batch()[0]
    model = tiny_gpt(layers=2).half().eval()
    memcompile.plan(model, memory=memcompile.config_from(state))
    model.load_state_dict(state)
    twin = planned_gpt().half().eval()
    twin.load_state_dict(state)
    assert torch.equal(model(tokens), twin(tokens))
    with pytest.raises(NotImplementedError, match="balance_loss"):
        model.train()(tokens)


@pytest.mark.parametrize("balance_loss", [0.0, 0.1])
def test_checkpointed_blocks_in_a_graph_of_symbolic_sizes(balance_loss, monkeypatch):
    """Dynamo makes floats inputs of such a graph, and blocks that are checkpointed cannot have them."""
    from torch._dynamo.backends.debugging import aot_eager

    stop_before_inductor(monkeypatch, aot_eager)
    model, (tokens, _) = planned_gpt(layers=2, memory_layers=2, balance_loss=balance_loss), batch()
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    compiled = torch.compile(model, backend="memcompile", fullgraph=True, dynamic=True)
    for run in (eager, compiled):
        run(tokens).sum().backward()
    torch.testing.assert_close(gradients(model), gradients(eager))
