"""The proof that an FFN works token by token: where the tokens lie in each tensor between its projections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from memcompile.common import token_wise as kinds
from memcompile.passes._torch import OpOverload
from memcompile.passes.capture.trace import Capture
from memcompile.passes.detect.region import Refusal, Region
from memcompile.passes.fx import (
    dimension_order,
    fake_value,
    features,
    is_random,
    is_uniform,
    operator_name,
    reach,
    tokens,
)

# How many trailing dimensions of a tensor hold features; those before them hold the tokens of the source in its order.
# Several numbers where dimensions of size one leave it open.
_Layout = frozenset[int]
_SAME_LAYOUT = kinds.CASTS | kinds.DROPOUTS | {"glu"}


def prove_token_wise(region: Region, capture: Capture) -> None:
    """Raises Refusal unless each token of the output depends on that token of the source alone, nonlinearly."""
    hidden, count = region.down.width_in, tokens(region.up[0].node)
    if hidden < region.down.width_out:
        raise Refusal(f"its hidden width {hidden} is below the model's {region.down.width_out}: an adapter, not an FFN")
    if tokens(region.source) != count or tokens(region.down.node) != count:
        raise Refusal("its source and its output do not hold the same tokens")
    for parameter in region.parameters:
        value = fake_value(parameter)
        if value is None or value.numel() not in (1, hidden, 2 * hidden) or value.numel() != features(parameter):
            raise Refusal(f"a parameter {_shape(parameter)} that is no vector of hidden features enters between them")
    layouts: dict[fx.Node, _Layout] = {p.node: frozenset({1}) for p in region.up}
    for node in region.nodes:
        layouts[node] = _layout(node, layouts, count, capture)
    if 1 not in layouts[region.down.input]:
        raise Refusal("its hidden activation is no longer one vector a token before the down-projection")
    if not any(_is_nonlinear(node, layouts, count) for node in _hidden_path(region, count)):
        raise Refusal("there is no nonlinearity between its projections: a low-rank factorisation, not an FFN")


def _layout(node: fx.Node, layouts: Mapping[fx.Node, _Layout], count: int, capture: Capture) -> _Layout:
    name, (shape, operand) = operator_name(node), _shapes(node)
    known = next((layouts[a] for a in node.all_input_nodes if a in layouts), frozenset[int]())
    if name == "getitem" or (shape is not None and shape == operand and name in kinds.FEATURE_SPLITS | kinds.RESHAPES):
        return known
    if name in kinds.POINTWISE or (name in ("min", "max") and len(node.all_input_nodes) == 2):
        return _broadcast(node, layouts, count, capture)
    if name in kinds.RESHAPES and shape is not None:
        found = (rank for rank in range(len(shape) + 1) if shape[: len(shape) - rank].numel() == count)
        return _or_refuse(frozenset(found), f"{name} reshapes the hidden activation to {list(shape)}")
    if name in _SAME_LAYOUT and (name != "glu" or _only_features(node, known)):
        return known
    if name in kinds.NORMS and all(len(_argument(node, "normalized_shape")) <= rank for rank in known):
        return known
    if name in kinds.FEATURE_SPLITS and _only_features(node, known):
        return frozenset(rank - (name in ("unbind", "select")) for rank in known)
    if name in kinds.FEATURE_JOINS and _only_features(node, known, extra=name == "stack"):
        same = frozenset.intersection(*(layouts.get(a, frozenset()) for a in node.all_input_nodes))
        return _or_refuse(frozenset(rank + (name == "stack") for rank in same), f"{name} joins different layouts")
    if name in kinds.FEATURE_REDUCTIONS and _only_features(node, known):
        kept = bool(_argument(node, "keepdim"))
        return frozenset(rank - (0 if kept else len(_dims(node))) for rank in known)
    if name in kinds.TRANSPOSES and operand is not None and known:
        leading = len(operand) - min(known)
        if dimension_order(node, len(operand))[:leading] == list(range(leading)):  # it moves features alone
            return known
    raise Refusal(f"{name} over tokens stands between its projections")


def _broadcast(node: fx.Node, layouts: Mapping[fx.Node, _Layout], count: int, capture: Capture) -> _Layout:
    """Of operands whose features are aligned and whose tokens are the same."""
    name, shape = operator_name(node), _shapes(node)[0]
    operands = [a for a in node.all_input_nodes if a in layouts]
    common = frozenset.intersection(*(layouts[a] for a in operands))
    if shape is not None:
        common = frozenset(rank for rank in common if shape[: len(shape) - rank].numel() == count)
    _or_refuse(common, f"{name} aligns tokens with features")
    for constant in (a for a in node.all_input_nodes if a in capture.constants):
        value = fake_value(constant)
        # A channel-wise prelu counts channels from the front.
        leading = value.numel() if value is not None and name == "prelu" and value.numel() > 1 else 1
        if value is not None and name != "prelu":
            leading = max(value.shape[: max(0, value.dim() - rank)].numel() for rank in common)
        if leading != 1 and not is_uniform(constant) and not is_random(constant):
            raise Refusal(f"a constant {_shape(constant)} that differs from token to token enters between them")
    return common


def _or_refuse(layout: _Layout, sentence: str) -> _Layout:
    if not layout:
        raise Refusal(sentence)
    return layout


def _only_features(node: fx.Node, layout: _Layout, extra: bool = False) -> bool:
    """Whether the dimensions that an operator works along hold features, however the layout is read."""
    operand = _shapes(node)[1]
    dims = _dims(node)
    if operand is None or not dims:
        return False
    rank = len(operand) + extra
    return all(d % rank >= rank - extra - features for d in dims for features in layout)


def _dims(node: fx.Node) -> list[int]:
    dim = _argument(node, "dim")
    return list(dim) if isinstance(dim, (list, tuple)) else [] if dim is None else [dim]


def _argument(node: fx.Node, name: str) -> Any:
    """An operator's argument by its name in the schema, or its default there."""
    assert isinstance(node.target, OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            given = node.args[position] if position < len(node.args) else argument.default_value
            return node.kwargs.get(name, given)
    return None


def _hidden_path(region: Region, count: int) -> set[fx.Node]:
    """The nodes between the projections that carry the hidden activation; what only feeds a norm's statistics
    (one number a token) is not among them.
    """
    between = set(region.nodes)

    def carried(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [node for node in nodes if node in between and not _is_statistic(node, count)]

    return reach(carried([region.down.input]), lambda n: carried(n.all_input_nodes))


def _is_statistic(node: fx.Node, count: int) -> bool:
    value = fake_value(node)
    return value is not None and value.numel() == count


def _is_nonlinear(node: fx.Node, layouts: Mapping[fx.Node, _Layout], count: int) -> bool:
    name = operator_name(node)
    if name in ("mul", "div", "addcmul", "addcdiv"):
        factors = [a for a in node.args if isinstance(a, fx.Node) and a in layouts and not _is_statistic(a, count)]
        return len(factors) >= 2  # a gate
    return name in kinds.POINTWISE - kinds.LINEAR | {"glu", "min", "max", "amin", "amax"}


def _shapes(node: fx.Node) -> tuple[Any, Any]:
    """Shapes of the result and of the first operand, None for what is no tensor."""
    value = fake_value(node)
    first = next(iter(node.all_input_nodes), None)
    operand = fake_value(first) if first is not None else None
    return (None if value is None else value.shape), (None if operand is None else operand.shape)


def _shape(node: fx.Node) -> str:
    value = fake_value(node)
    return str(list(value.shape)) if value is not None else operator_name(node)
