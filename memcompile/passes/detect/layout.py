"""The proof that a source's last dimension counts features: after a transpose, an MLP over tokens looks the same."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from memcompile.common.token_wise import CASTS, DROPOUTS, FEATURE_SPLITS, NORMS, POINTWISE, RESHAPES, TRANSPOSES
from memcompile.passes.capture.trace import Capture
from memcompile.passes.detect.projection import Projection
from memcompile.passes.detect.region import Refusal, Region
from memcompile.passes.fx import dimension_order, fake_value, features, ndim, operator_name, tokens

_ELEMENTWISE = POINTWISE | CASTS | DROPOUTS | NORMS | {"cat", "pad", "constant_pad_nd", "roll"}
_STEMS = {"embedding": -1, "conv1d": -2, "conv2d": -3, "conv3d": -4}  # and where their features are
_MIXES = "its features are the tokens of an earlier {}: it mixes tokens"
_SAME_DIMENSIONS = (FEATURE_SPLITS - {"unbind", "select"}) | {"getitem", "batch_norm"}


def prove_features_last(region: Region, capture: Capture, projections: dict[fx.Node, Projection]) -> None:
    """Follows the last dimension of the source back through the stream; raises Refusal where a norm has its features
    in another dimension. Where there is no norm the stems of the model say which they are, and where there is no
    stem its projections.
    """
    elsewhere: dict[bool, list[str]] = {}  # is it a stem -> operators whose features are not the source's
    pending, seen = [(region.source, -1, False)], set[tuple[fx.Node, int]]()
    while pending:
        node, dim, normed = pending.pop()
        if (node, dim) in seen or node in capture.parameters:
            continue
        seen.add((node, dim))
        name, rank = operator_name(node), ndim(node)
        if dim != (1 - rank if name == "batch_norm" else -1) and (name in NORMS or name == "batch_norm"):
            raise Refusal(_MIXES.format(name))
        if not normed and (name in _STEMS or node in projections):
            found = elsewhere.setdefault(name in _STEMS, [])
            found += [name] if dim != _STEMS.get(name, -1) else []
        if node not in projections:
            proved = normed or name in NORMS or name == "batch_norm"
            pending.extend((operand, d, proved) for operand, d in _origins(node, dim))
    decisive = elsewhere.get(True, elsewhere.get(False))
    if decisive:
        raise Refusal(_MIXES.format(decisive[0]))


def stream_read(node: fx.Node, capture: Capture) -> fx.Node:
    """The node of the residual stream that norms, casts, views and scales were made of."""

    def as_wide(operand: fx.Node) -> bool:
        if fake_value(operand) is None or fake_value(node) is None:
            return operator_name(node) == "getitem" or fake_value(node) is None  # of a norm that returns its statistics
        return features(operand) == features(node) and tokens(operand) == tokens(node)

    while operator_name(node) in _ELEMENTWISE | RESHAPES | _SAME_DIMENSIONS:
        wide = [a for a in node.all_input_nodes if a not in capture.parameters and as_wide(a)]
        if len(wide) != 1:
            break
        (node,) = wide
    return node


def _origins(node: fx.Node, dim: int) -> Iterator[tuple[fx.Node, int]]:
    """Which dimensions of which operands make up dimension ``dim`` of the node; dimensions count from the end."""
    name, value = operator_name(node), fake_value(node)
    if name in _SAME_DIMENSIONS or (name in NORMS and value is None):
        yield node.all_input_nodes[0], dim
    if value is None:
        return
    operands = [(a, v.shape) for a in node.all_input_nodes if (v := fake_value(a)) is not None]
    if name in _ELEMENTWISE:
        same = (a for a, shape in operands if len(shape) >= -dim and (shape[dim] == value.shape[dim] or name == "cat"))
        yield from ((operand, dim) for operand in same)
    elif name in TRANSPOSES:
        yield operands[0][0], dimension_order(node, value.dim())[dim] - value.dim()
    elif name in RESHAPES:
        operand, shape = operands[0]
        inner, outer = value.shape[dim:][1:].numel(), value.shape[dim:].numel()  # strides that the dimension spans
        for d in range(-len(shape), 0):
            if max(inner, shape[d:][1:].numel()) < min(outer, shape[d:].numel()):
                yield operand, d
