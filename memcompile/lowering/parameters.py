"""What `memory_lookup` is given for options: the shapes of parameters, how they are drawn, and its other arguments.
"Memory Layers at Scale" (arXiv 2412.09764), sections 2 and 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.config import MemoryConfig
from memcompile.lowering import cpu

# A layer's own parameters, in the order in which they are drawn.
LAYER_PARAMETERS = (
    "query_weight", "query_bias", "half_keys", "gate_weight", "gate_bias", "out_weight", "out_bias", "temperature",
    "query_scale", "query_shift",
)  # fmt: skip
# A layer's buffers, and what they start with.
LAYER_BUFFERS = {"query_mean": 0.0, "query_var": 1.0}


def lookup_options(config: MemoryConfig, layer: int) -> dict[str, Any]:
    """The arguments of `memory_lookup`, in eval mode, that are no tensors and follow from (resolved) options.

    Args:
        layer: its number among the memory's layers.
    """
    assert config.n_keys is not None
    return {
        "heads": config.heads,
        "top_k": config.top_k,
        "weighting": config.weighting,
        "first_slot": layer * config.n_keys**2 if config.tables == "separate" else 0,
        "num_tables": config.slots // config.n_keys**2,
        "pairs": config.has_pairs,
    }


def values_shape(config: MemoryConfig, width: int) -> tuple[int, int]:
    """[slots, numbers of a row] of these (resolved) options, for layers of this width. A row is v [value_dim], or
    [u | v] with u [width] in the variant "peer".
    """
    assert config.value_dim is not None
    return config.slots, config.value_dim + config.pair_at(width)


def draw_layer(parameters: Mapping[str, Tensor | None], config: MemoryConfig) -> None:
    """Draws a layer's own parameters anew, in place: query xavier uniform, half-keys U(-key_dim**-1/2, key_dim**-1/2),
    gate and output projection N(0, width**-1/2), biases 0, temperature 10, scale and shift of BatchNorm 1 and 0. Where
    the memory is added, the output projection is 0.
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
        "query_scale": nn.init.ones_,
    }
    for name in LAYER_PARAMETERS:
        parameter = parameters.get(name)
        if parameter is not None:
            draws.get(name, nn.init.zeros_)(parameter)


_BLOCK = 4096, 16  # rows and columns that are drawn at once


def draw_values(
    values: Tensor,
    seed: int | None = None,
    shape: tuple[int, int] | None = None,
    start: tuple[int, int] = (0, 0),
    pair_at: int = 0,
) -> None:
    """Draws ``values [slots, value_dim]`` from N(0, value_dim**-1/2), in place. Of rows [u | v] each part is drawn by
    its own size.

    Blocks of the table have generators of their own, so that any part of it can be drawn by itself: the table is the
    same however it is divided, on devices of one kind.

    Args:
        values: the table, or a part of it.
        seed: None takes one from PyTorch's default generator.
        shape: of the whole table; None where `values` is it.
        start: the row and column of the table that the part begins with.
        pair_at: the column at which v begins.
    """
    _, value_dim = shape or values.shape
    of_u, of_v = max(1, pair_at) ** -0.5, (value_dim - pair_at) ** -0.5
    seed = draw_seed() if seed is None else seed
    if values.is_meta:
        return
    deviations = torch.tensor([of_u] * pair_at + [of_v] * (value_dim - pair_at + _BLOCK[1]), device=values.device)
    (first_row, first_column), (rows, columns) = start, values.shape
    blocks_a_row = -(-value_dim // _BLOCK[1])
    generator = torch.Generator(values.device)
    for row in range(first_row - first_row % _BLOCK[0], first_row + rows, _BLOCK[0]):
        for column in range(first_column - first_column % _BLOCK[1], first_column + columns, _BLOCK[1]):
            generator.manual_seed(seed + row // _BLOCK[0] * blocks_a_row + column // _BLOCK[1])
            block = torch.randn(_BLOCK, generator=generator, device=values.device)
            block *= deviations[column : column + _BLOCK[1]]
            top, left = max(row, first_row), max(column, first_column)
            bottom, right = row + _BLOCK[0] - first_row, column + _BLOCK[1] - first_column  # or where the part ends
            part = values.detach()[top - first_row : bottom, left - first_column : right]
            part.copy_(block[top - row :, left - column :][: part.shape[0], : part.shape[1]])


def draw_seed() -> int:
    """A seed of `draw_values`, by PyTorch's default generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(2**62))


def new_values(config: MemoryConfig, width: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A drawn table of the `values_shape`."""
    values = nn.Parameter(torch.empty(values_shape(config, width), dtype=dtype, device=device))
    cpu.advise_huge_pages(values)
    draw_values(values, pair_at=config.pair_at(width))
    return values


def new_buffers(config: MemoryConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
    """The buffers of a layer of these (resolved) options, [heads * key_dim] in at least float32, or None: the running
    statistics of BatchNorm of the query.
    """
    if not config.has_batch_norm:
        return dict.fromkeys(LAYER_BUFFERS)
    assert config.key_dim is not None
    size, dtype = config.heads * config.key_dim, torch.promote_types(dtype, torch.float32)
    buffers = {name: torch.empty(size, dtype=dtype, device=device) for name in LAYER_BUFFERS}
    draw_buffers(buffers)
    return {**buffers}


def draw_buffers(buffers: Mapping[str, Tensor | None]) -> None:
    """Has a layer's buffers start anew, in place."""
    for name, start in LAYER_BUFFERS.items():
        buffer = buffers.get(name)
        if buffer is not None:
            nn.init.constant_(buffer, start)


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
    if config.has_gate:
        shapes |= {"gate_weight": (value_dim, width), "gate_bias": (value_dim,)}
    if config.has_gate or config.placement == "add" or value_dim != width:
        shapes |= {"out_weight": (width, value_dim), "out_bias": (width,)}
    if config.qk_norm:
        shapes |= {"temperature": (heads,)}
    if config.has_batch_norm:
        shapes |= {"query_scale": (heads * key_dim,), "query_shift": (heads * key_dim,)}
    parameters = {
        name: nn.Parameter(torch.empty(shapes[name], dtype=dtype, device=device)) if name in shapes else None
        for name in LAYER_PARAMETERS
    }
    draw_layer(parameters, config)
    return parameters
