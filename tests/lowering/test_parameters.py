"""The shapes of a layer's tensors and how they are drawn, as options say; and the operator's other arguments."""

from __future__ import annotations

import math

import pytest
import torch

from memcompile import MemoryConfig
from memcompile.lowering.parameters import (
    draw_values,
    lookup_options,
    new_buffers,
    new_layer,
    new_values,
    values_shape,
)

SIZES = {"memory_layers": ["a", "b", "c"], "n_keys": 8, "key_dim": 6, "value_dim": 24, "heads": 2, "top_k": 4}


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (64, 24)),
        ({"tables": "separate"}, (3 * 64, 24)),
        ({"variant": "peer"}, (64, 40 + 24)),
        ({"variant": "peer", "tables": "separate"}, (3 * 64, 40 + 24)),
    ],
)
def test_the_table(options, shape):
    config = MemoryConfig(**SIZES, **options)
    assert values_shape(config, 40) == shape
    assert new_values(config, 40, torch.float32, torch.device("cpu")).shape == shape


def test_pairs_are_drawn_by_the_size_of_each():
    torch.manual_seed(0)
    config = MemoryConfig(**SIZES | {"n_keys": 64}, variant="peer")
    values = new_values(config, 400, torch.float32, torch.device("cpu")).detach()
    u, v = values[:, :400], values[:, 400:]
    for part, deviation in ((u, 400**-0.5), (v, 24**-0.5)):
        assert part.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * part.numel()))
    assert u[:, -1].std().item() == pytest.approx(400**-0.5, rel=0.1)
    assert v[:, 0].std().item() == pytest.approx(24**-0.5, rel=0.1)


def test_a_part_of_a_table_of_pairs_is_drawn_as_the_whole():
    whole, part = torch.empty(100, 70), torch.empty(30, 40)
    draw_values(whole, seed=3, pair_at=45)
    draw_values(part, 3, (100, 70), (50, 20), pair_at=45)
    assert torch.equal(part, whole[50:80, 20:60])


def test_a_table_without_pairs_is_drawn_as_before_there_were_any():
    values = torch.empty(5, 8)
    draw_values(values, seed=3)
    drawn = torch.randn(4096, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(values, drawn[:5, :8].mul(8**-0.5))
    assert MemoryConfig(**SIZES).pair_at(40) == 0


@pytest.mark.parametrize("options", [{"variant": "pkm"}, {"variant": "peer"}, {"query_norm": "batch"}], ids=str)
def test_batch_norm_is_the_identity_at_first(options):
    config = MemoryConfig(**SIZES, **options)
    layer = new_layer(config, 40, torch.bfloat16, torch.device("cpu"))
    buffers = new_buffers(config, torch.bfloat16, torch.device("cpu"))
    assert (layer["query_scale"] == 1).all() and not layer["query_shift"].any()
    assert {name: (tuple(b.shape), b.dtype) for name, b in buffers.items()} == {
        "query_mean": ((12,), torch.float32),
        "query_var": ((12,), torch.float32),
    }
    assert not buffers["query_mean"].any() and (buffers["query_var"] == 1).all()
    for other in (MemoryConfig(**SIZES), MemoryConfig(**SIZES, variant="peer", query_norm="none")):
        assert not any(new_buffers(other, torch.float32, torch.device("cpu")).values())
        assert new_layer(other, 40, torch.float32, torch.device("cpu"))["query_scale"] is None


def test_each_layer_has_slots_of_its_own_or_all_of_them():
    separate = MemoryConfig(**SIZES, tables="separate", weighting="sigmoid")
    expected = {"heads": 2, "top_k": 4, "weighting": "sigmoid", "first_slot": 128, "num_tables": 3, "pairs": False}
    assert lookup_options(separate, 2) == expected
    assert lookup_options(MemoryConfig(**SIZES), 2)["first_slot"] == 0
