"""FfnSite: one feed-forward block found in a model. The word that passes, runtime and front door share."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FfnSite:
    """A feed-forward block, described by the parameters that it reads.

    Attributes:
        name: path of the module that owns the block, e.g. ``model.layers.4.mlp`` (``""`` is the model itself).
        up: names of the up-projections' weights: one, or two where a gate multiplies.
        down: name of the down-projection's weight.
        width: features of the residual stream that the block reads and writes.
        hidden: features between the projections.
        pattern: the operators met from source to sink, e.g. ``linear > gelu > linear``.
        flops: FLOPs a token of its projections (a multiply-add is two).
        calls: how often one forward of the model runs the block.
        replaced: every parameter that the block alone reads: weights, biases, inner norms.
        refusal: None, or the sentence that says why the block is left alone.
    """

    name: str
    up: tuple[str, ...]
    down: str
    width: int
    hidden: int
    pattern: str
    flops: int
    calls: int = 1
    replaced: tuple[str, ...] = ()
    refusal: str | None = None
