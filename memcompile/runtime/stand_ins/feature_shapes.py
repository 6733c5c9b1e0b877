"""Shape arithmetic of a hidden activation: where its tokens end and its features begin. Knows no tensor's values.

Shapes are split in leading dimensions, which count tokens and may be symbolic, and feature dimensions, which are
integers. Functions return None where an operator would mix the two.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

Features = tuple[int, ...]


def viewed(sizes: Sequence[Any], tokens: Any, features: Features) -> tuple[Sequence[Any], Features] | None:
    """``view(sizes)`` of ``tokens`` vectors of ``features``: the leading sizes, and the features.

    One of the sizes may be -1. Features are known by their product where they hold no -1, because sizes of
    tokens may be symbolic and each comparison of them is a guard.
    """
    total = math.prod(features)
    for rank in range(1, len(sizes) + 1):
        leading, trailing = sizes[: len(sizes) - rank], sizes[len(sizes) - rank :]
        if not isinstance(trailing[0], int):
            break
        known = math.prod([size for size in trailing if size != -1])
        if -1 not in trailing and known == total:
            return leading, tuple(trailing)
        if -1 in trailing and total % known == 0 and math.prod(leading) == tokens:
            return leading, unflattened(total, trailing)
    return None


def broadcast(shapes: Sequence[Features]) -> Features | None:
    """Features of an elementwise result."""
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        return None
    sizes = list(zip(*shapes, strict=True))
    widest = [max(of_dim) for of_dim in sizes]
    fits = all(size in (1, most) for of_dim, most in zip(sizes, widest, strict=True) for size in of_dim)
    return tuple(widest) if fits else None


def indexed(index: Any, leading: int, features: Features) -> Features | None:
    """``h[index]`` where the index takes every token: full slices or an ellipsis, then features."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (leading + len(features) - taken)
    at = [i for i, item in enumerate(items) if item is Ellipsis]
    items = items[: at[0]] + rest + items[at[0] + 1 :] if at else items + rest
    if any(item != slice(None) for item in items[:leading]):
        return None
    result: list[int] = []
    position = 0
    for item in items[leading:]:
        if item is None:
            result.append(1)
            continue
        if isinstance(item, slice):
            result.append(_length(item, features[position]))
        elif not isinstance(item, int):
            return None
        position += 1
    return None if -1 in result else tuple(result)


def _length(item: slice, size: int) -> int:
    """Elements that a slice takes of ``size``; -1 for one that PyTorch refuses."""
    # Not by `slice.indices`, which Dynamo 2.11 does not know
    step = 1 if item.step is None else item.step
    start, stop = 0 if item.start is None else item.start, size if item.stop is None else item.stop
    if step < 1:
        return -1
    start = max(0, start + size) if start < 0 else min(start, size)
    stop = max(0, stop + size) if stop < 0 else min(stop, size)
    return max(0, -((start - stop) // step))


def unflattened(size: int, sizes: Sequence[int]) -> Features:
    """``sizes`` with the one that is -1 resolved."""
    known = math.prod([part for part in sizes if part != -1])
    return tuple([size // known if part == -1 else part for part in sizes])


def parts(size: int, split: int | Sequence[int]) -> list[int]:
    """Sizes of the pieces of ``split``: each of one size, the last smaller, or as given."""
    if not isinstance(split, int):
        return list(split)
    whole, rest = divmod(size, split)
    return [split] * whole + [rest] * (rest > 0)


def listed(sizes: tuple) -> Any:
    """Sizes that are given one by one, or as one sequence."""
    return sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], (int, torch.SymInt)) else sizes
