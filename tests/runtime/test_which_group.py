"""Which group of which optimizer each of a memory's parameters joins, where optimizers were built before the plan."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import memcompile
from memcompile import OptionError
from tests.models import GATED_HIDDEN, WIDTH, InlineGatedBlock, Transformer, tiny_gpt
from tests.planned import MEMORY, batch
from tests.runtime.optimizers import (
    FillingBeforeItsParent,
    FillingMuon,
    Muon,
    MuonOfStates,
    MuonWithAuxiliary,
    StackingMuon,
    Whitening,
    held,
    memory,
)

# --- each layer follows its own FFN --------------------------------------------------------------------------------


def rest(model: nn.Module) -> list[nn.Parameter]:
    """What is in no block."""
    in_blocks = {id(p) for p in model.blocks.parameters()}
    return [p for p in model.parameters() if id(p) not in in_blocks]


def test_one_group_a_block():
    model = tiny_gpt(layers=4)
    groups = [{"params": [*b.parameters()], "lr": 0.5**i, "weight_decay": 0.1 * i} for i, b in enumerate(model.blocks)]
    optimizer = AdamW([*groups, {"params": rest(model)}], lr=1e-3)
    memcompile.plan(model, memory_layers=[1, 3], **MEMORY)
    first, last = memory(model, "blocks.1"), memory(model, "blocks.3")
    assert held(model, optimizer) == [set(), first | {"memory_values"}, set(), last, set()]


def test_layer_decay_with_a_schedule_and_a_group_of_vectors_for_each_block():
    """As of vision models: a group for each block and kind, some blocks frozen and in no group."""
    model = tiny_gpt(layers=3)
    model.blocks[0].requires_grad_(False)
    kinds: list[Callable[[Tensor], bool]] = [lambda p: p.dim() > 1, lambda p: p.dim() <= 1]
    groups = [{"params": [p for p in b.parameters() if kind(p)]} for b in model.blocks[1:] for kind in kinds]
    optimizer = SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step, i=i: 0.5**i for i in range(4)])
    memcompile.plan(model, memory_layers="all", **MEMORY)
    for block, (matrices, vectors) in ((1, (0, 1)), (2, (2, 3))):
        found, own = held(model, optimizer), memory(model, f"blocks.{block}")
        assert found[matrices] | found[vectors] == own | ({"memory_values"} if block == 1 else set())
        assert found[vectors] == {name for name in own if model.get_parameter(name).dim() == 1}
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.5**i for i in range(4)]


@pytest.mark.parametrize("order", [1, -1])
def test_an_optimizer_for_each_block(order):
    model = tiny_gpt(layers=3)
    optimizers = [AdamW(block.parameters()) for block in list(model.blocks)[::order]][::order]
    others = SGD(rest(model), lr=0.1)
    memcompile.plan(model, memory_layers="all", **MEMORY)
    for number, optimizer in enumerate(optimizers):
        table = {"memory_values"} if number == 0 else set()
        assert held(model, optimizer) == [memory(model, f"blocks.{number}.") | table]
    assert held(model, others) == [set()]


def test_vectors_of_an_ffn_without_biases_follow_those_of_their_block():
    model = Transformer([InlineGatedBlock(WIDTH, GATED_HIDDEN) for _ in range(2)])
    kinds: list[Callable[[Tensor], bool]] = [lambda p: p.dim() > 1, lambda p: p.dim() <= 1]
    optimizer = AdamW([{"params": [p for p in b.parameters() if kind(p)]} for b in model.blocks for kind in kinds])
    memcompile.plan(model, memory_layers="all", **MEMORY)
    vectors = {name for name in memory(model) if model.get_parameter(name).dim() == 1}
    assert [names & vectors for names in held(model, optimizer)] == [
        set(), memory(model, "blocks.0") & vectors, set(), memory(model, "blocks.1") & vectors
    ]  # fmt: skip


def test_where_biases_alone_are_trained_the_memory_is_trained_with_them():
    model = tiny_gpt(layers=2)
    optimizer = AdamW([p for name, p in model.named_parameters() if name.endswith("bias")])
    memcompile.plan(model, memory_layers=1, **MEMORY)
    assert held(model, optimizer) == [memory(model)]


def test_the_log_says_what_the_table_joined(caplog):
    model = tiny_gpt(layers=2)
    optimizer = SGD([{"params": model.head.parameters()}, {"params": model.blocks.parameters()}], lr=0.1)
    with caplog.at_level(logging.INFO, "memcompile"):
        memcompile.plan(model, memory_layers=1, **MEMORY)
    assert "the table joined group 1 of SGD, as blocks.1.ffn.0.weight" in [r.getMessage() for r in caplog.records]
    assert held(model, optimizer) == [set(), memory(model)]


def test_frozen_parameters_that_an_optimizer_holds():
    model = tiny_gpt(layers=2)
    optimizer = AdamW(model.parameters())
    model.blocks.requires_grad_(False)
    memcompile.plan(model, memory_layers=1, **MEMORY)
    assert held(model, optimizer) == [memory(model)]
    assert all(model.get_parameter(name).requires_grad for name in memory(model))


class Wrapped(Optimizer):
    """As of accelerate: shows the groups of another."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state


def test_an_optimizer_in_a_wrapper_gets_each_parameter_once():
    model = tiny_gpt(layers=2)
    optimizer = Muon([p for p in model.blocks.parameters() if p.dim() == 2])
    others = AdamW([*rest(model), *(p for p in model.blocks.parameters() if p.dim() != 2)])
    wrappers = [Wrapped(others), Wrapped(optimizer)]
    memcompile.plan(model, memory_layers=1, **MEMORY)
    everything = [id(p) for o in (optimizer, others) for group in o.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    assert memory(model, "half_keys", "values") < held(model, wrappers[0])[0]
    assert {g.optimizer for g in memcompile.explain(model).optimizers} == {"AdamW", "Muon"}


# --- optimizers for matrices ---------------------------------------------------------------------------------------


def by_dimensions(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2


def by_block(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and name.startswith("blocks.")


def without_embeddings(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and not any(word in name for word in ("tokens", "positions", "head"))


def of_ffns(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and ".ffn." in name


SPLITS = [by_dimensions, by_block, without_embeddings, of_ffns]
BUILDS: dict[str, Callable[[list[Tensor], list[Tensor]], list[Optimizer]]] = {
    "torch's, first": lambda matrices, others: [torch.optim.Muon(matrices), AdamW(others)],
    "torch's, last": lambda matrices, others: [AdamW(others), torch.optim.Muon(matrices)],
    "a user's": lambda matrices, others: [SGD(others, lr=0.1), Muon(matrices)],
    "without the name": lambda matrices, others: [Whitening(matrices), AdamW(others)],
    "embeddings apart": lambda matrices, others: [
        SGD([*(p for p in others if p.dim() == 2), nn.Parameter(torch.zeros(1))], lr=0.1),
        AdamW([p for p in others if p.dim() != 2]),
        Muon(matrices),
    ],
    "flags": lambda m, o: [MuonWithAuxiliary([{"params": m, "use_muon": True}, {"params": o, "use_muon": False}])],
    "flags, last": lambda m, o: [
        MuonWithAuxiliary([{"params": o, "use_muon": False}, {"params": m, "use_muon": True}])
    ],
    "flags of states": lambda matrices, others: [MuonOfStates(matrices, others)],
    "groups of a shape": lambda matrices, others: [StackingMuon(matrices, others)],
}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("build", BUILDS)
def test_matrices_alone_go_to_muon(splits, build):
    model = tiny_gpt(layers=2)
    named = [*model.named_parameters()]
    matrices = [p for name, p in named if splits(name, p)]
    optimizers = BUILDS[build](matrices, [p for name, p in named if not splits(name, p)])
    memcompile.plan(model, memory_layers=1, values_grad="sparse", **MEMORY)
    everything = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(set(everything)) == len(everything)
    assert {id(p) for p in model.parameters()} <= set(everything)
    by_muon = {
        name
        for o in optimizers
        for group, names in zip(o.param_groups, held(model, o), strict=True)
        for name in names
        if type(o).__name__ in ("Muon", "Whitening")
        or group.get("use_muon", group.get("kind") == "muon")
        or o.state.get(model.get_parameter(name), {}).get("use_muon")
    }
    expected = memory(model, "query_weight", "gate_weight", "out_weight")
    if build == "groups of a shape":  # a matrix of another shape than any group's joins none of them
        shapes = {p.shape for p in matrices}
        expected = {name for name in expected if model.get_parameter(name).shape in shapes}
    assert by_muon == expected
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        model.zero_grad()
        model(*batch(step)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_the_table_goes_where_the_embeddings_are_and_half_keys_where_the_vectors_are():
    model = tiny_gpt(layers=2)
    splits = {"embeddings": [], "head": [], "matrices": [], "vectors": []}
    for name, p in model.named_parameters():
        top = name.split(".")[0]
        kind = "embeddings" if top in ("tokens", "positions") else "head" if top == "head" else None
        splits[kind or ("matrices" if p.dim() == 2 else "vectors")].append(p)
    groups = [{"params": splits[kind]} for kind in ("head", "vectors", "embeddings")]
    optimizer, muon = AdamW(groups), Muon(splits["matrices"])
    memcompile.plan(model, memory_layers=1, placement="add", **MEMORY)
    vectors = memory(model, "bias", "half_keys", "temperature")
    assert held(model, optimizer) == [set(), vectors, {"memory_values"}]
    assert held(model, muon) == [memory(model) - vectors - {"memory_values"}]


def test_muon_alone_gets_matrices_and_the_rest_is_told(caplog):
    model = tiny_gpt(layers=2)
    muon = Muon([p for p in model.parameters() if p.dim() == 2])
    with caplog.at_level(logging.WARNING, "memcompile"):
        memcompile.plan(model, memory_layers=1, **MEMORY)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no optimizer holds parameters of the memory: memory_values and 4 parameters of 1 layer" in message
    assert "Muon takes matrices alone" in message
    assert held(model, muon) == [memory(model, "query_weight", "gate_weight", "out_weight")]


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_gradients_of_zeros_before_the_step_of_a_parent_are_none_of_the_tables(values_grad):
    results = []
    for kind in (MuonWithAuxiliary, FillingBeforeItsParent):
        torch.manual_seed(0)
        model = tiny_gpt(layers=2)
        memcompile.plan(model, memory_layers=1, values_grad=values_grad, **MEMORY)
        optimizer = kind([{"params": [*model.parameters()], "use_muon": False}])
        for step in range(3):
            optimizer.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()
        results.append(model.memory_values.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_an_optimizer_that_makes_gradients_of_zeros_is_refused(values_grad):
    """It would step the table a second time."""
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, values_grad=values_grad, **MEMORY)

    def build(*holds: bool) -> Optimizer:
        kept = [p for p in model.parameters() if memcompile.is_table(p) in holds]
        kinds = [
            [p for p in kept if (p.dim() == 2 and not memcompile.is_table(p)) is matrix] for matrix in (True, False)
        ]
        return FillingMuon(
            [{"params": kind, "use_muon": muon} for kind, muon in zip(kinds, (True, False), strict=True)]
        )

    model(*batch()).backward()
    gradient = model.memory_values.grad
    with pytest.raises(OptionError, match="FillingMuon gives parameters without a gradient one of zeros"):
        build(True, False).step()
    assert model.memory_values.grad is gradient
    before = model.memory_values.detach().clone()
    for optimizer in (build(False), AdamW([model.memory_values])):
        optimizer.step()
    memcompile.flush(model)
    moved = (model.memory_values - before).abs()
    assert 0 < moved.max() < 1.1e-3, "one step, at values_lr"


def test_other_optimizers_take_tensors_of_any_shape():
    """Matrices and vectors in two optimizers of PyTorch's: the table and the half-keys are with the matrices."""
    model = tiny_gpt(layers=2)
    matrices = SGD([p for p in model.parameters() if p.dim() > 1], lr=0.1)
    vectors = AdamW([p for p in model.parameters() if p.dim() <= 1])
    memcompile.plan(model, memory_layers=1, **MEMORY)
    assert held(model, vectors) == [memory(model, "bias")]
    assert held(model, matrices) == [memory(model) - memory(model, "bias")]


def test_is_table():
    model, other = tiny_gpt(layers=2), tiny_gpt(layers=2)
    assert not any(map(memcompile.is_table, model.parameters()))
    for planned in (model, other):
        memcompile.plan(planned, memory_layers=1, **MEMORY)
    assert [name for name, p in model.named_parameters() if memcompile.is_table(p)] == ["memory_values"]
    assert not memcompile.is_table(torch.zeros_like(other.memory_values))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("filtered", [True, False])
def test_muon_built_after_the_plan(filtered):
    """The usual filter gives it the table, which steps its rows itself."""
    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, values_grad="sparse", **MEMORY)
    of_muon = [p for p in model.parameters() if p.dim() == 2 and not (filtered and memcompile.is_table(p))]
    others = [p for p in model.parameters() if not any(p is q for q in of_muon)]
    optimizers = [torch.optim.Muon(of_muon, lr=1e-2), AdamW(others)]
    assert any(p is model.memory_values for p in of_muon) is not filtered
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(*batch()).backward()
    untouched = model.memory_values.grad.to_dense().any(-1).logical_not()
    for optimizer in optimizers:
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    moved = (model.memory_values - before["memory_values"])[untouched].abs().max()
    assert moved < 1e-4  # by weight decay at most, where Muon would move every row
