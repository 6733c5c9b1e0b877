"""The sizes of a memory that follow from the model."""

import dataclasses

import pytest
import torch

import memcompile
from memcompile import MemoryConfig, OptionError
from memcompile.common.sizes import resolve
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


def test_keys_that_were_given_were_not_chosen():
    options = {"tables": "separate", "memory_layers": "all", "n_keys": 32768}
    with pytest.raises(OptionError, match=r"lower n_keys, or choose fewer memory_layers$"):
        memcompile.plan(tiny_gpt(layers=3), **options)


@pytest.mark.parametrize(
    ("options", "variant", "gate", "query_norm"),
    [
        ({}, "memory+", True, "none"),
        ({"variant": "memory"}, "memory", False, "none"),
        ({"gate": False}, "memory", False, "none"),
        ({"variant": "memory", "gate": True}, "memory+", True, "none"),
        ({"variant": "pkm"}, "pkm", False, "batch"),
        ({"variant": "pkm", "gate": True}, "pkm", True, "batch"),
        ({"query_norm": "batch"}, "pkm", True, "batch"),
        ({"variant": "memory", "query_norm": "batch"}, "pkm", False, "batch"),
        ({"variant": "pkm", "query_norm": "none"}, "memory", False, "none"),
        ({"variant": "peer"}, "peer", False, "batch"),
        ({"variant": "peer", "query_norm": "none"}, "peer", False, "none"),
        ({"variant": "peer", "gate": True}, "peer", True, "batch"),
    ],
)
def test_one_memory_has_one_form_of_options(options, variant, gate, query_norm):
    site = memcompile.find_ffns(tiny_gpt(layers=1))[0]
    resolved = resolve(MemoryConfig(**options), [site], 1000)
    assert (resolved.variant, resolved.gate, resolved.query_norm) == (variant, gate, query_norm)


def test_pairs_are_as_wide_as_every_block():
    site = memcompile.find_ffns(tiny_gpt(layers=1))[0]
    wider = dataclasses.replace(site, width=64)
    with pytest.raises(OptionError, match=r"those chosen have the widths \[32, 64\]: choose blocks of one width"):
        resolve(MemoryConfig(variant="peer"), [site, wider], 1000)
    assert resolve(MemoryConfig(variant="memory"), [site, wider], 1000).value_dim == 64


def test_the_number_of_keys_that_is_chosen_counts_all_numbers_of_the_values():
    site = memcompile.find_ffns(tiny_gpt(layers=1))[0]
    sites, parameters = [site] * 4, 32 * 128**2  # with 4 times as many the values have 256 half-keys a side
    chosen = {
        name: resolve(MemoryConfig(**options), sites, parameters).n_keys
        for name, options in {
            "shared": {},
            "separate": {"tables": "separate"},
            "pairs": {"variant": "peer"},
        }.items()
    }
    assert chosen == {"shared": 256, "separate": 128, "pairs": 128}
