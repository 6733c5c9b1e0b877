"""The sizes of a memory that follow from the model."""

import pytest
import torch

import memcompile
from memcompile import OptionError
from memcompile.runtime.pool import pool_of
from tests.models import tiny_gpt


def on_meta(width):
    with torch.device("meta"):
        return tiny_gpt(width=width)


@pytest.mark.parametrize("width", [32, 64, 256, 1024, 4096])
def test_default_keys_fit_the_model(width):
    """The largest power of two in [64, 1024] that keeps the values within four times the dense model."""
    model = on_meta(width)
    budget = 4 * sum(p.numel() for p in model.parameters())
    memcompile.plan(model, memory_layers=1)
    n = pool_of(model).config.n_keys
    assert n in (64, 128, 256, 512, 1024)
    assert n == 64 or n**2 * width <= budget
    assert n == 1024 or (2 * n) ** 2 * width > budget


def test_default_sizes_follow_the_width():
    model = on_meta(256)
    memcompile.plan(model, memory_layers=1)
    config = pool_of(model).config
    sizes = (config.n_keys, config.key_dim, config.value_dim, config.heads, config.top_k)
    assert sizes == (128, 128, 256, 4, 32)
    assert model.memory_values.device.type == "meta"
    assert model.memory_values.shape == (config.n_keys**2, 256)


def test_top_k_larger_than_the_default_keys():
    with pytest.raises(OptionError, match=r"top_k=65 exceeds n_keys=64.*chosen for a model of this size"):
        memcompile.plan(tiny_gpt(), memory_layers=1, top_k=65)
