"""The parameters that `memory_lookup` reads: their shapes and how they are drawn. "Memory Layers at Scale"
(arXiv 2412.09764), sections 2 and 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from memcompile.config import MemoryConfig
from memcompile.lowering import cpu

# A layer's own parameters, in the order of the operator's arguments; `values` follows `half_keys` there.
LAYER_PARAMETERS = (
    "query_weight", "query_bias", "half_keys", "gate_weight", "gate_bias", "out_weight", "out_bias", "temperature",
)  # fmt: skip


def values_shape(config: MemoryConfig) -> tuple[int, int]:
    """[slots, value_dim] of these (resolved) options."""
    assert config.n_keys is not None and config.value_dim is not None
    return config.n_keys**2, config.value_dim


def draw_layer(parameters: Mapping[str, Tensor | None], config: MemoryConfig) -> None:
    """Draws a layer's own parameters anew, in place: query xavier uniform, half-keys U(-key_dim**-1/2, key_dim**-1/2),
    gate and output projection N(0, width**-1/2), biases 0, temperature 10. Where the memory is added, the output
    projection is 0.
    """
    query_weight, half_keys = parameters["query_weight"], parameters["half_keys"]
    assert query_weight is not None and half_keys is not None
    normal = functools.partial(nn.init.normal_, std=1 / math.sqrt(query_weight.shape[1]))
    bound = (2 * half_keys.shape[-1]) ** -0.5
    draws: dict[str, Callable[[Tensor], Tensor]] = {
        "query_weight": nn.init.xavier_uniform_,
        "half_keys": functools.partial(nn.init.uniform_, a=-bound, b=bound),
        "gate_weight": normal,
        "out_weight": nn.init.zeros_ if config.placement == "add" else normal,
        "temperature": functools.partial(nn.init.constant_, val=10.0),  # as cosine attention starts (Swin v2)
    }
    for name in LAYER_PARAMETERS:
        parameter = parameters.get(name)
        if parameter is not None:
            draws.get(name, nn.init.zeros_)(parameter)


_BLOCK = 4096, 16  # rows and columns that are drawn at once


def draw_values(
    values: Tensor, seed: int | None = None, shape: tuple[int, int] | None = None, start: tuple[int, int] = (0, 0)
) -> None:
    """Draws ``values [slots, value_dim]`` from N(0, value_dim**-1/2), in place.

    Blocks of the table have generators of their own, so that any part of it can be drawn by itself: the table is the
    same however it is divided, on devices of one kind.

    Args:
        values: the table, or a part of it.
        seed: None takes one from PyTorch's default generator.
        shape: of the whole table; None where `values` is it.
        start: the row and column of the table that the part begins with.
    """
    _, value_dim = shape or values.shape
    seed = draw_seed() if seed is None else seed
    if values.is_meta:
        return
    (first_row, first_column), (rows, columns) = start, values.shape
    blocks_a_row = -(-value_dim // _BLOCK[1])
    generator = torch.Generator(values.device)
    for row in range(first_row - first_row % _BLOCK[0], first_row + rows, _BLOCK[0]):
        for column in range(first_column - first_column % _BLOCK[1], first_column + columns, _BLOCK[1]):
            generator.manual_seed(seed + row // _BLOCK[0] * blocks_a_row + column // _BLOCK[1])
            block = torch.randn(_BLOCK, generator=generator, device=values.device).mul_(value_dim**-0.5)
            top, left = max(row, first_row), max(column, first_column)
            bottom, right = row + _BLOCK[0] - first_row, column + _BLOCK[1] - first_column  # or where the part ends
            part = values.detach()[top - first_row : bottom, left - first_column : right]
            part.copy_(block[top - row :, left - column :][: part.shape[0], : part.shape[1]])


def draw_seed() -> int:
    """A seed of `draw_values`, by PyTorch's default generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(2**62))


def new_values(config: MemoryConfig, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A drawn table [slots, value_dim]."""
    values = nn.Parameter(torch.empty(values_shape(config), dtype=dtype, device=device))
    cpu.advise_huge_pages(values)
    draw_values(values)
    return values


def new_layer(
    config: MemoryConfig, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Parameter | None]:
    """The drawn parameters of a layer of these (resolved) options, in the order of `LAYER_PARAMETERS`, or None."""
    heads, key_dim, n_keys, value_dim = config.heads, config.key_dim, config.n_keys, config.value_dim
    assert key_dim is not None and n_keys is not None and value_dim is not None
    shapes: dict[str, tuple[int, ...]] = {
        "query_weight": (heads * key_dim, width),
        "query_bias": (heads * key_dim,),
        "half_keys": (2, heads, n_keys, key_dim // 2),
    }
    if config.gate:
        shapes |= {"gate_weight": (value_dim, width), "gate_bias": (value_dim,)}
    if config.gate or config.placement == "add" or value_dim != width:
        shapes |= {"out_weight": (width, value_dim), "out_bias": (width,)}
    if config.qk_norm:
        shapes |= {"temperature": (heads,)}
    parameters = {
        name: nn.Parameter(torch.empty(shapes[name], dtype=dtype, device=device)) if name in shapes else None
        for name in LAYER_PARAMETERS
    }
    draw_layer(parameters, config)
    return parameters
