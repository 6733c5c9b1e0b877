"""FfnSite: one feed-forward block found in a model. The word that passes, runtime and front door share."""

from __future__ import annotations

import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Iterable

VALUES_NAME = "memory_values"  # the parameter of the root that all layers read
LAYER_NAME = "memory"  # on each module that holds, or held, a chosen FFN's down-projection


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FfnSite:
    """A feed-forward block, described by the parameters that it reads.

    Attributes:
        name: path of the module that owns the block, e.g. ``model.layers.4.mlp`` (``""`` is the model itself).
        up: names of the up-projections' weights: one, or two where a gate multiplies.
        down: name of the down-projection's weight.
        width: features of the residual stream that the block reads and writes.
        hidden: features between the projections.
        pattern: the operators from source to sink, e.g. ``linear > gelu > linear``.
        flops: FLOPs a token of its projections (a multiply-add is two).
        calls: how often one forward of the model runs the block.
        parameters: every parameter that the block alone reads: weights, biases, inner norms. They leave the model
            where the memory replaces the block, and stay where it is added.
        refusal: None, or the sentence that says why the block cannot get a memory.
        by_name: it gets one where ``memory_layers`` names it, and is refused where it does not.
    """

    name: str
    up: tuple[str, ...]
    down: str
    width: int
    hidden: int
    pattern: str
    flops: int
    calls: int = 1
    parameters: tuple[str, ...] = ()
    refusal: str | None = None
    by_name: bool = False

    @property
    def replaced(self) -> tuple[str, ...]:
        """The former name of ``parameters``."""
        warnings.warn("FfnSite.replaced is FfnSite.parameters now", FutureWarning, stacklevel=2)
        return self.parameters

    @property
    def stack(self) -> str:
        """The repeated container that the block sits in: the path before the first number in ``name``.

        ``encoder.block.3.layer.1.DenseReluDense`` is of ``encoder.block``. Where no part of the path is a number, one
        that ends a part counts, the last of them: ``t5.block3.mlp`` is of ``t5.block``. Without a number it is the
        parent's path, so that siblings make one stack.
        """
        number = re.search(r"(?<![^.])\d+(?![^.])", self.name)
        if number is None:
            number = next(reversed(list(re.finditer(r"\d+(?![^.])", self.name))), None)
        return self.name.rpartition(".")[0] if number is None else self.name[: number.start()].rstrip("._")


def common_path(paths: Iterable[str]) -> str:
    """The longest path that all of these start with."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, levels))


def owner_path(sites: Iterable[FfnSite], runs: Callable[[str], bool]) -> str:
    """Path of the module that holds the table of these sites: the lowest that contains their stacks and that ``runs``,
    which a list of modules does not. "" is the model itself.
    """
    path = common_path(site.stack for site in sites)
    while path and not runs(path):
        path = path.rpartition(".")[0]
    return path
