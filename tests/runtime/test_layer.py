"""MemoryLayer: its parameters, how they start, and that its forward is the specification's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import memcompile
from tests.lowering.reference import memory_lookup_reference
from tests.models import WIDTH, tiny_gpt
from tests.planned import planned_gpt
from tests.tolerance import assert_as_accurate


def layer_of(model: nn.Module) -> nn.Module:
    return model.blocks[1].ffn[2].memory


VARIANTS = {
    "memory+": ({}, {"query_weight", "query_bias", "half_keys", "gate_weight", "gate_bias", "out_weight", "out_bias"}),
    "plain": ({"gate": False}, {"query_weight", "query_bias", "half_keys"}),
    "plain, narrow": (
        {"gate": False, "value_dim": 24},
        {"query_weight", "query_bias", "half_keys", "out_weight", "out_bias"},
    ),
    "normed": (
        {"gate": False, "qk_norm": True},
        {"query_weight", "query_bias", "half_keys", "temperature"},
    ),
    "pkm": ({"variant": "pkm"}, {"query_weight", "query_bias", "half_keys", "query_scale", "query_shift"}),
    "sigmoid, separate": (
        {"variant": "memory", "weighting": "sigmoid", "tables": "separate", "memory_layers": 2},
        {"query_weight", "query_bias", "half_keys"},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_forward_of_each_variant(name):
    options, names = VARIANTS[name]
    model = planned_gpt(**options)
    layer, x = layer_of(model), torch.randn(3, 5, WIDTH)
    assert set(dict(layer.named_parameters())) == names
    value_dim = options.get("value_dim", WIDTH)
    shapes = {
        "query_weight": (2 * 8, WIDTH),
        "query_bias": (2 * 8,),
        "half_keys": (2, 2, 8, 4),
        "gate_weight": (value_dim, WIDTH),
        "gate_bias": (value_dim,),
        "out_weight": (WIDTH, value_dim),
        "out_bias": (WIDTH,),
        "temperature": (2,),
        "query_scale": (2 * 8,),
        "query_shift": (2 * 8,),
    }
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {n: shapes[n] for n in names}

    def reference(dtype: torch.dtype) -> torch.Tensor:
        tensors = {n: None if t is None else t.to(dtype) for n, t in layer.tensors(model.memory_values).items()}
        return memory_lookup_reference(
            x.to(dtype), **tensors, **layer.options, first_slot=layer.first_slot, training=True
        )

    expected = reference(torch.float32), reference(torch.float64)
    assert_as_accurate(layer(x), *expected)


def test_the_start_follows_the_papers():
    torch.manual_seed(0)
    model = tiny_gpt(layers=2, width=64)
    memcompile.plan(model, memory_layers=[1], n_keys=64, heads=4, top_k=8, key_dim=64, value_dim=128, qk_norm=True)
    layer = layer_of(model)
    deviations = {  # and how many numbers each is estimated from
        "query_weight": (layer.query_weight, math.sqrt(2 / (64 + 4 * 64))),
        "half_keys": (layer.half_keys, 64**-0.5 / math.sqrt(3)),
        "gate_weight": (layer.gate_weight, 64**-0.5),
        "out_weight": (layer.out_weight, 64**-0.5),
        "values": (model.memory_values, 128**-0.5),
    }
    for name, (tensor, expected) in deviations.items():
        sampling = 5 / math.sqrt(2 * tensor.numel())  # five standard errors of a standard deviation
        assert abs(tensor.std().item() / expected - 1) < sampling, name
        assert abs(tensor.mean().item()) < 5 * expected / math.sqrt(tensor.numel()), name
    assert layer.half_keys.abs().max() <= 64**-0.5
    for bias in (layer.query_bias, layer.gate_bias, layer.out_bias):
        assert not bias.any()
    assert (layer.temperature == 10).all()


def test_reset_parameters_leaves_the_values():
    model = planned_gpt()
    layer, values = layer_of(model), model.memory_values.clone()
    keys, bias = layer.half_keys.clone(), layer.query_bias
    with torch.no_grad():
        bias.fill_(3.0)
    layer.reset_parameters()
    assert not torch.equal(layer.half_keys, keys)
    assert not bias.any()
    assert torch.equal(model.memory_values, values)


def test_the_values_are_read_anew_at_each_call():
    model, x = planned_gpt(), torch.randn(3, 5, WIDTH)
    layer, before = layer_of(model), layer_of(model)(x)
    model.memory_values = nn.Parameter(2 * model.memory_values.detach())
    layer.gate_weight.requires_grad_(False)
    assert torch.allclose(layer(x) - layer.out_bias, 2 * (before - layer.out_bias), rtol=1e-5, atol=1e-6)
    assert "memory_values" not in dict(layer.named_parameters())


def test_a_layer_says_what_it_is():
    layer = layer_of(planned_gpt())
    sizes = "width=32, slots=64, heads=2, top_k=4, key_dim=8, value_dim=32"
    assert repr(layer) == f"MemoryLayer({sizes}, variant=memory+, gate=True, query_norm=none)"
    assert layer.name == "blocks.1.ffn"
