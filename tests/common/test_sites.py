"""FfnSite: the stack that a block sits in, and the former name of its parameters."""

import dataclasses

import pytest

from memcompile import FfnSite

SITE = FfnSite(
    name="layers.3.mlp",
    up=("layers.3.mlp.up.weight",),
    down="layers.3.mlp.down.weight",
    width=32,
    hidden=128,
    pattern="linear > gelu > linear",
    flops=2 * 2 * 32 * 128,
    parameters=("layers.3.mlp.up.weight", "layers.3.mlp.down.weight"),
)


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("t5.encoder.block.3.mlp", "t5.encoder.block"),
        ("t5.block3.mlp", "t5.block"),
        ("encoder.block.3.layer.1.DenseReluDense", "encoder.block"),
        ("layers.11.mlp", "layers"),
        ("3.mlp", ""),
        ("block3.mlp", "block"),
        ("body.block_3.mlp", "body.block"),
        ("t5_encoder.layers.0.mlp", "t5_encoder.layers"),
        ("encoder.mlp", "encoder"),
        ("mlp", ""),
        ("", ""),
    ],
)
def test_the_stack_of_a_block(name, stack):
    assert dataclasses.replace(SITE, name=name).stack == stack


def test_the_former_name_of_the_parameters_still_works_with_a_warning():
    with pytest.warns(FutureWarning, match=r"FfnSite\.replaced is FfnSite\.parameters now"):
        assert SITE.replaced == SITE.parameters
