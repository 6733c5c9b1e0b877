"""Optimizers that are alive when a model is planned are adopted."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import memcompile
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch
from tests.runtime.table.test_hooks import VALUES_LR, backward, layout, step_sizes

# --- adoption ---------------------------------------------------------------------------------------------------


def gpt_and(make) -> tuple[nn.Module, Optimizer]:
    model = tiny_gpt(layers=2)
    return model, make(model)


def held(*optimizers: Optimizer) -> list[int]:
    return [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]


def test_replaced_parameters_and_their_state_leave_and_the_memory_joins():
    model, optimizer = gpt_and(lambda m: AdamW(m.parameters(), lr=1e-3))
    backward(model)
    optimizer.step()
    kept = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.blocks[0].parameters()}
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())
    assert set(optimizer.state) <= set(model.parameters())
    for parameter in model.blocks[0].parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], kept[id(parameter)])
    backward(model)
    assert all(step.any() for step in step_sizes(optimizer, list(model.parameters())))
    assert set(optimizer.state) == set(model.parameters())


def test_matrices_and_vectors_join_the_groups_of_their_kind():
    def make(model: nn.Module) -> Optimizer:
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        return AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)

    model, optimizer = gpt_and(make)
    before = [(id(g), id(g["params"])) for g in optimizer.param_groups]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert [(id(g), id(g["params"])) for g in optimizer.param_groups] == before
    for group, is_kind in zip(optimizer.param_groups, (lambda p: p.dim() > 1, lambda p: p.dim() <= 1), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if is_kind(p)}


def test_an_adopted_optimizer_has_the_order_of_a_new_one():
    """Checkpoints of optimizers match parameters by position."""
    model, adopted = gpt_and(lambda model: AdamW(model.parameters(), lr=1e-3))
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert held(adopted) == [id(p) for p in model.parameters()]
    backward(model)
    adopted.step()
    resumed = AdamW(model.parameters(), lr=1e-3)
    resumed.load_state_dict(adopted.state_dict())
    for parameter in model.parameters():
        assert torch.equal(resumed.state[parameter]["exp_avg"], adopted.state[parameter]["exp_avg"])


def without_ffn_biases() -> nn.Module:
    model = tiny_gpt(layers=2)
    for block in model.blocks:
        block.ffn[0].bias = block.ffn[2].bias = None
    return model


def test_vectors_join_the_matrices_where_there_is_one_group():
    model = without_ffn_biases()
    optimizer = SGD(model.parameters(), lr=0.1)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())


def test_vectors_join_the_group_of_vectors_where_the_ffn_has_no_bias():
    model = without_ffn_biases()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = SGD([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.1)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() <= 1 for p in optimizer.param_groups[1]["params"])


def test_two_optimizers_that_share_the_work_never_hold_a_parameter_twice():
    model = tiny_gpt(layers=2)
    matrices = SGD([p for p in model.parameters() if p.dim() > 1], lr=0.1)
    vectors = AdamW([p for p in model.parameters() if p.dim() <= 1], lr=0.1)
    memcompile.plan(model, memory_layers=2, **MEMORY)
    assert sorted(held(matrices, vectors)) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() > 1 for g in matrices.param_groups for p in g["params"])

    by_block = tiny_gpt(layers=2)
    rest = [p for n, p in by_block.named_parameters() if "blocks.1" not in n]
    first, second = SGD(by_block.blocks[1].parameters(), lr=0.1), SGD(rest, lr=0.1)
    memcompile.plan(by_block, memory_layers=2, **MEMORY)
    assert sorted(held(first, second)) == sorted(id(p) for p in by_block.parameters())


def test_two_optimizers_for_the_same_parameters_are_both_adopted():
    model = tiny_gpt(layers=2)
    optimizers = [SGD(model.parameters(), lr=0.1), AdamW(model.parameters(), lr=0.1)]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    for optimizer in optimizers:
        assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())


def test_strangers_are_left_alone():
    model, other = tiny_gpt(layers=2), tiny_gpt(layers=2)
    strangers = [SGD(other.parameters(), lr=0.1), SGD(model.head.parameters(), lr=0.1)]
    before = [layout(optimizer) for optimizer in strangers]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert [layout(optimizer) for optimizer in strangers] == before


def test_names_of_parameters_stay_beside_their_parameters():
    model, optimizer = gpt_and(lambda m: SGD(m.named_parameters(), lr=0.5))
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    backward(model)
    optimizer.step()
    (group,) = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert len(names) == len(group["params"])


@pytest.mark.parametrize("fused", [None, True])
def test_adagrad_is_adopted_with_the_state_it_expects(fused):
    model, optimizer = gpt_and(lambda m: Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.1, fused=fused))
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    backward(model)
    gradient = model.memory_values.grad
    (size,) = step_sizes(optimizer, [model.memory_values])
    torch.testing.assert_close(size, VALUES_LR * gradient / ((gradient**2 + 0.1).sqrt() + 1e-10), rtol=1e-4, atol=1e-7)


def test_lbfgs_is_adopted_in_mid_training():
    model, optimizer = gpt_and(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        return loss

    optimizer.step(closure)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    first = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    assert closure().item() < first


# --- adoption where the memory is added -------------------------------------------------------------------------


def test_an_added_memory_joins_and_nothing_leaves():
    model, optimizer = gpt_and(lambda m: AdamW(m.parameters(), lr=1e-3))
    backward(model)
    optimizer.step()
    state = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    assert held(optimizer) == [id(p) for p in model.parameters()]
    assert all(torch.equal(optimizer.state[p]["exp_avg"], average) for p, average in state.items())
    backward(model)
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())


def test_an_added_memory_joins_the_groups_of_its_ffn():
    model = tiny_gpt(layers=2)
    ffn, rest = model.blocks[1].ffn, [p for n, p in model.named_parameters() if "blocks.1.ffn" not in n]
    matrices = SGD([p for p in ffn.parameters() if p.dim() > 1], lr=0.1)
    vectors = SGD([p for p in ffn.parameters() if p.dim() <= 1], lr=0.1)
    stranger = SGD(rest, lr=0.1)
    before = layout(stranger)
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    assert layout(stranger) == before
    owners = {id(p) for p in ffn.parameters()} | {id(model.memory_values)}
    for optimizer, is_kind in ((matrices, lambda p: p.dim() > 1), (vectors, lambda p: p.dim() <= 1)):
        assert set(held(optimizer)) == {id(p) for p in model.parameters() if id(p) in owners and is_kind(p)}


def test_lbfgs_with_an_added_memory_forgets_its_history():
    model, optimizer = gpt_and(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2))

    def closure() -> Tensor:
        backward(model)
        return model(*batch()).detach()

    optimizer.step(closure)
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    before = model.blocks[1].ffn[2].memory.out_bias.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(model.blocks[1].ffn[2].memory.out_bias, before)


# --- names, wrappers, and optimizers that are gone ----------------------------------------------------------------


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.model(*batch)


@pytest.mark.parametrize("planned", ["whole", "part"])
def test_names_are_those_of_the_module_that_the_optimizer_was_built_from(planned):
    whole = WithLoss(tiny_gpt(layers=2))
    optimizer = SGD(whole.named_parameters(), lr=0.1)
    memcompile.plan(whole if planned == "whole" else whole.model, memory_layers=[1], **MEMORY)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in whole.named_parameters()]
    assert held(optimizer) == [id(p) for p in whole.parameters()]


def test_an_optimizer_that_was_dropped_does_not_count():
    """Its scheduler keeps it in a circle until the collector runs."""
    model = tiny_gpt(layers=2)
    dropped = AdamW(model.parameters())
    torch.optim.lr_scheduler.StepLR(dropped, 1)
    del dropped
    optimizer = SGD(model.parameters(), lr=0.1)
    gc.disable()
    try:
        memcompile.plan(model, memory_layers=[1], **MEMORY)
    finally:
        gc.enable()
    assert held(optimizer) == [id(p) for p in model.parameters()]
    assert [group.optimizer for group in memcompile.explain(model).optimizers] == ["SGD"]


def test_an_optimizer_between_two_plans():
    """Of two models: the second plan adopts what was built after the first."""
    first, second = tiny_gpt(layers=2), tiny_gpt(layers=2)
    memcompile.plan(first, memory_layers=[1], **MEMORY)
    both = AdamW([*first.parameters(), *second.parameters()])
    memcompile.plan(first, memory_layers=[1], **MEMORY)  # again, which changes nothing
    memcompile.plan(second, memory_layers=[0], **MEMORY)
    assert sorted(held(both)) == sorted(id(p) for m in (first, second) for p in m.parameters())


class Prodigal(SGD):
    """Groups of its own kind, and state of each parameter from the start."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["distance"], group["norms"] = 1e-6, [0.0, 1.0]
            for parameter in group["params"]:
                self.state[parameter]["layer_wise"] = parameter.dim() > 1

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["layer_wise"]  # as it was said when the optimizer was built
        return super().step(closure)


def test_groups_with_options_of_their_own_and_states_that_are_made_with_the_optimizer():
    model = tiny_gpt(layers=2)
    optimizer = Prodigal([{"params": b.parameters()} for b in model.blocks], lr=0.1)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    before = {name: p.detach().clone() for name, p in model.blocks[1].named_parameters()}
    backward(model)
    optimizer.step()
    assert not [name for name, p in model.blocks[1].named_parameters() if torch.equal(p, before[name])]
    matrix = model.blocks[1].ffn[2].memory.query_weight
    assert optimizer.state[matrix]["layer_wise"] and not optimizer.state[model.blocks[1].norm1.bias]["layer_wise"]
