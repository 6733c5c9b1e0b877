"""Guesses at a module's inputs, so that planning needs no example: token ids, features, images. Knows no operator."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Two sequences of seven tokens: small numbers that no model's width, heads or vocabulary is likely to share,
# so that a dimension in a graph tells what it counts.
BATCH, TOKENS = 2, 7


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments of one call. Tensors in it give shape and dtype; their values are not read."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def guess_arguments(module: nn.Module) -> Iterator[Arguments]:
    """Calls worth trying, the likeliest first. Tensors are on the meta device."""
    dummy = getattr(module, "dummy_inputs", None)  # Hugging Face models know an input of theirs
    if isinstance(dummy, dict) and all(isinstance(v, torch.Tensor) for v in dummy.values()):
        yield Arguments((), {name: value.to("meta") for name, value in dummy.items()})
    inputs = _required_inputs(module)
    if inputs == 0:
        return
    for tensor in _guess_tensors(module):
        yield Arguments((tensor,) * inputs, {})
        if "decoder_input_ids" in inspect.signature(module.forward).parameters:
            tokens = torch.empty(BATCH, TOKENS, dtype=torch.int64, device="meta")
            yield Arguments((tensor,), {"decoder_input_ids": tokens})


def _required_inputs(module: nn.Module) -> int:
    """How many positional arguments ``forward`` needs, at least one where it takes any."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = sum(p.default is p.empty for p in positional)
    return max(required, 1) if positional or variadic else 0


def _guess_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    tokens = torch.empty(BATCH, TOKENS, dtype=torch.int64, device="meta")
    first = next((m for m in module.modules() if any(True for _ in m.parameters(recurse=False))), module)
    embeds = any(isinstance(m, nn.Embedding) for m in module.modules())
    if embeds:
        yield tokens
    name, config = getattr(module, "main_input_name", None), getattr(module, "config", None)  # of Hugging Face models
    if name == "input_values":  # a waveform
        yield empty(BATCH, 4000)
    if name == "input_features":  # a spectrogram
        bins = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv1d)), None)
        bins = getattr(config, "num_mel_bins", None) or bins or 80
        positions = getattr(config, "max_source_positions", None)
        if isinstance(positions, int):
            yield empty(BATCH, bins, 2 * positions)
        yield empty(BATCH, 40, bins)
    conv = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is not None and (isinstance(first, nn.Conv2d) or name is not None or not embeds):
        for side in _image_sides(module):
            yield empty(BATCH, conv.in_channels, side, side)
    for width in _widths(module):
        yield empty(BATCH, TOKENS, width)
    if not embeds:
        yield tokens


def _widths(module: nn.Module) -> list[int]:
    """Feature widths that the first layers read, at most three."""
    parameters = (p for child in module.modules() for p in child.parameters(recurse=False))
    widths = dict.fromkeys(p.shape[-1] for p in parameters if p.dim() in (1, 2))
    return list(widths)[:3]


def _image_sides(module: nn.Module) -> Iterator[int]:
    config = getattr(module, "config", None)
    for owner in (config, module, getattr(module, "patch_embed", None)):
        for name in ("image_size", "img_size"):
            side = getattr(owner, name, None)
            side = side[0] if isinstance(side, (tuple, list)) and side else side
            if isinstance(side, int):
                yield side
    yield 224
