"""Optimizers of models that share weights, when one of the models is planned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import memcompile
from tests.models import HIDDEN, VOCABULARY, WIDTH, Block, Transformer, plain_ffn, tiny_gpt
from tests.planned import MEMORY, batch
from tests.runtime.table.test_hooks import layout
from tests.runtime.test_adoption import held


def sharing() -> tuple[nn.Module, nn.Module, nn.Parameter]:
    """Two models, and a weight of an FFN that both have."""
    model, other = tiny_gpt(layers=2), tiny_gpt(layers=2)
    other.blocks[1].ffn[0].weight = shared = model.blocks[1].ffn[0].weight
    return model, other, shared


def test_the_optimizer_of_another_model_keeps_a_shared_weight():
    model, other, shared = sharing()
    own, others = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    before = layout(others)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert layout(others) == before and id(shared) in held(others)
    assert held(own) == [id(p) for p in model.parameters()]


def test_an_optimizer_of_both_models_keeps_it_and_gets_the_memory():
    """A teacher and a student, or a generator and a discriminator."""
    model, other, shared = sharing()
    both = SGD({id(p): p for m in (other, model) for p in m.parameters()}.values(), lr=0.1, momentum=0.9)
    (model(*batch()) + other(*batch())).backward()
    both.step()
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(both)) == sorted(id(p) for m in (model, other) for p in m.parameters())
    assert "momentum_buffer" in both.state[shared]


def test_a_shared_weight_that_one_optimizer_alone_trains_stays_in_it():
    model, other, shared = sharing()
    embedding = nn.Parameter(torch.zeros(3))
    own = SGD([*model.parameters(), embedding], lr=0.1)  # with a parameter of a loss, say
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(own)) == sorted([*(id(p) for p in model.parameters()), id(embedding), id(shared)])
    assert any(p is shared for p in other.parameters())


def test_an_optimizer_that_holds_nothing_but_shared_weights_is_another_models():
    model, other, shared = sharing()
    own, others = SGD(model.parameters(), lr=0.1), SGD([shared], lr=0.1)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert held(own) == [id(p) for p in model.parameters()]
    assert held(others) == [id(shared)] and any(p is shared for p in other.parameters())


class Task(nn.Module):
    def __init__(self, backbone: nn.Module, size: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(VOCABULARY, size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.backbone(tokens))


def test_a_part_that_two_models_share_is_planned_for_both():
    """A backbone under two heads, each with an optimizer of its own: both held its FFNs, both hold its memory."""
    backbone = tiny_gpt(layers=2)
    tasks = [Task(backbone, size) for size in (3, 4)]
    optimizers = [SGD(task.parameters(), lr=0.1) for task in tasks]
    memcompile.plan(tasks[0], memory_layers=[1], **MEMORY)
    for task, optimizer in zip(tasks, optimizers, strict=True):
        assert held(optimizer) == [id(p) for p in task.parameters()]


@pytest.mark.parametrize("shares", ["block", "ffn"])
def test_an_ffn_that_a_model_runs_in_several_blocks(shares):
    ffn = plain_ffn(WIDTH, HIDDEN)
    blocks = [Block(WIDTH, ffn)] * 3 if shares == "block" else [Block(WIDTH, ffn) for _ in range(3)]
    model = Transformer(blocks)
    rest = [p for p in model.parameters() if not any(p is q for q in ffn.parameters())]
    optimizer = AdamW([{"params": rest}, {"params": ffn.parameters(), "lr": 0.1}])
    memcompile.plan(model, memory_layers="all", **MEMORY)
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [
        id(p) for name, p in model.named_parameters() if "memory" in name
    ]
