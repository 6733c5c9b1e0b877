"""Projections: every spelling of ``x @ W + b`` with whole, plain parameters, in one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx
from torch.fx.node import Argument

from memcompile.common.token_wise import CASTS, TRANSPOSES
from memcompile.passes.capture.trace import Capture
from memcompile.passes.fx import ancestors, fake_value, ndim, operator_name


@dataclasses.dataclass(frozen=True)
class Projection:
    """``node = input @ weight + bias``, of features ``width_in`` to ``width_out``.

    Attributes:
        nodes: every node that belongs to it: the product, the bias addition, casts and transposes of weights.
        weight, bias: placeholders of the parameters.
        derived: the weight is computed from parameters at each call, of which ``weight`` is the largest.
    """

    node: fx.Node
    nodes: frozenset[fx.Node]
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    width_in: int
    width_out: int
    derived: bool = False


def find_projections(capture: Capture) -> dict[fx.Node, Projection]:
    """Every projection of the graph by its result; a bias added by a separate ``add`` moves the result there."""
    found: dict[fx.Node, Projection] = {}
    for node in capture.graph.nodes:
        projection = _projection(node, capture)
        if projection is not None:
            projection = _with_added_bias(projection, capture)
            found[projection.node] = projection
    return found


def _projection(node: fx.Node, capture: Capture) -> Projection | None:
    operands = _operands(node)
    if operands is None:
        return None
    activation, weight, bias, transposed = operands
    if not isinstance(activation, fx.Node) or not isinstance(weight, fx.Node):
        return None
    parameter, nodes = _parameter(weight, capture)
    derived = parameter is None and weight in capture.constants
    if derived:
        nodes = ancestors(weight)
        sizes = {a: v.numel() for a in nodes if a in capture.parameters and (v := fake_value(a)) is not None}
        parameter = max(sizes, key=sizes.__getitem__, default=None)
        nodes = {a for a in nodes if a.op == "call_function"}
    value = fake_value(weight)
    if parameter is None or value is None or value.dim() != 2 or activation in capture.constants:
        return None
    bias_parameter = None
    if isinstance(bias, fx.Node):
        bias_parameter, between = _parameter(bias, capture)
        if bias_parameter is None:
            return None
        nodes |= between
    width_out, width_in = map(int, value.shape if transposed else reversed(value.shape))
    return Projection(
        node, frozenset({node, *nodes}), activation, parameter, bias_parameter, width_in, width_out, derived
    )


def _operands(node: fx.Node) -> tuple[Argument, Argument, Argument, bool] | None:
    """Activation, weight and bias of what may be a projection, and whether the weight is [out, in]."""
    name, args = operator_name(node), node.args
    if name == "linear":
        return args[0], args[1], args[2] if len(args) > 2 else node.kwargs.get("bias"), True
    if name == "addmm" and not node.kwargs:
        return args[1], args[2], args[0], False
    if name in ("matmul", "mm"):
        return args[0], args[1], None, False
    if name == "tensordot":
        activation, weight, along, contracted = args[:4]
        rank = ndim(activation) if isinstance(activation, fx.Node) else -1
        if along in ([-1], [rank - 1]) and contracted in ([0], [1], [-1], [-2]):
            return activation, weight, None, contracted in ([1], [-1])
    if name == "einsum":
        operands = node.all_input_nodes
        contraction = parse_einsum(str(args[0]), [ndim(operand) for operand in operands])
        if contraction is not None:
            which, transposed = contraction
            return operands[1 - which], operands[which], None, transposed
    return None


def parse_einsum(equation: str, ranks: Sequence[int]) -> tuple[int, bool] | None:
    """Which operand of an einsum of two is the matrix of a projection ``[..., in] -> [..., out]``, and whether it
    is stored [out, in]; None for any other einsum.
    """
    inputs, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or len(ranks) != 2:
        return None
    for which in (1, 0):
        matrix, activation = terms[which], terms[1 - which]
        if ranks[which] != 2 or len(set(matrix)) != 2 or len(matrix) != 2 or len(set(activation)) != len(activation):
            continue
        contracted = activation[-1:]
        new = matrix.replace(contracted, "", 1)
        if len(new) == 1 and new not in activation and output == activation[:-1] + new:
            return which, matrix[1] == contracted
    return None


def _parameter(node: fx.Node, capture: Capture) -> tuple[fx.Node | None, set[fx.Node]]:
    """The parameter that casts and transposes were made of, if there is one, and the nodes between."""
    between: set[fx.Node] = set()
    while node not in capture.parameters:
        name = operator_name(node)
        if (name not in CASTS and name not in TRANSPOSES) or not isinstance(node.args[0], fx.Node):
            return None, between
        between.add(node)
        node = node.args[0]
    return node, between


def _with_added_bias(projection: Projection, capture: Capture) -> Projection:
    """``x @ W`` followed by ``+ b`` with a parameter of the output's width is one projection."""
    users = list(projection.node.users)
    if projection.bias is not None or len(users) != 1 or operator_name(users[0]) != "add" or users[0].kwargs:
        return projection
    (add,) = users
    others = [arg for arg in add.args if arg is not projection.node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return projection
    bias, between = _parameter(others[0], capture)
    value = fake_value(others[0])
    if bias is None or value is None or tuple(value.shape) != (projection.width_out,):
        return projection
    nodes = projection.nodes | {add} | between
    return dataclasses.replace(projection, node=add, nodes=nodes, bias=bias)
