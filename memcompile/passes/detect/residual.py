"""The proof that an FFN's output joins the residual stream of its source: what tells an FFN from a head or a router."""

from __future__ import annotations

from torch import fx

from memcompile.common import token_wise as kinds
from memcompile.passes.capture.trace import Capture
from memcompile.passes.detect.layout import stream_read
from memcompile.passes.detect.projection import Projection
from memcompile.passes.detect.region import Refusal, Region
from memcompile.passes.fx import fake_value, features, operator_name, reach, tokens

# What may stand between an FFN's output and the stream that it joins ...
_TO_STREAM = kinds.LINEAR | kinds.CASTS | kinds.DROPOUTS | kinds.NORMS | kinds.RESHAPES | {"getitem", "cat", "stack"}
# ... and between the stream and what an FFN reads, which only has to be made of it.
_FROM_STREAM = kinds.TOKEN_WISE | {"getitem", "batch_norm", "pad", "constant_pad_nd", "roll"}
_SELECTIONS = frozenset({"topk", "argmax", "sort", "argsort", "one_hot", "max"})
_GATHERS = frozenset({"index", "index_select", "gather", "take", "masked_select"})
_SCATTERS = frozenset("scatter scatter_ scatter_add scatter_add_ index_put index_put_ index_copy index_copy_".split())
_SCATTERS |= {"index_add", "index_add_", "masked_scatter", "masked_scatter_", "scatter_reduce"}
_CONTINUES = kinds.NORMS | kinds.PROJECTIONS | {"add", "sub", "batch_norm"}
_PENALTIES = frozenset({"pow", "square", "abs", "norm", "linalg_vector_norm", "mse_loss"})
_BROADCAST = "its output is broadcast over the stream: it conditions tokens, it is not their FFN"
_ROUTER_REACH = 12  # nodes from a router's projection to its selection


def prove_residual(region: Region, capture: Capture) -> bool:
    """Raises Refusal unless the output is added to the stream that the source was taken from. False where the graph
    ends first, which proves nothing: the caller has to look for other evidence.
    """
    stream = _stream_of(region.source, capture)
    current = region.down.node
    while True:
        users = list(current.users)
        if not users:
            raise Refusal("its output is not used")
        if any(user.op == "output" for user in users):
            return False
        after_norm = _explicit_norm(current, users)
        if after_norm is not None:
            current = after_norm
            continue
        if len(users) > 1:
            names = ", ".join(sorted({operator_name(user) for user in users}))
            raise Refusal(f"its output has several consumers ({names})")
        (user,) = users
        name = operator_name(user)
        others = [a for a in user.all_input_nodes if a is not current]
        meets_stream = any(not stream.isdisjoint(_stream_of(other, capture)) for other in others)
        if name == "sub" and user.args[0] is current:  # towards x + a * (f - x), a step of a normalized Transformer
            current = user
            continue
        if meets_stream and _joins(user, current):
            _prove_joined(user, current, region, stream)
            return True
        if meets_stream and name in ("mul", "div") and any(_same_shape(other, current) for other in others):
            raise Refusal("its output scales the stream that it read: a gate, not an FFN")
        if _repeats(user, current):
            raise Refusal(_BROADCAST)
        if name not in _TO_STREAM:
            raise Refusal(f"its output goes to {name}, not to the residual stream that it read")
        current = user


def _prove_joined(total: fx.Node, output: fx.Node, region: Region, stream: set[fx.Node]) -> None:
    """Raises Refusal unless the sum of output and stream is the stream of the next block."""
    if not _same_shape(total, output):
        raise Refusal(_BROADCAST)
    if features(total) != region.down.width_out:
        raise Refusal(f"it works on parts of a stream that is {features(total)} wide: heads or groups, not tokens")
    if _only_feeds_a_penalty(total, operator_name(total)):
        raise Refusal("its sum with the stream only feeds a penalty: an autoencoder, not an FFN")
    if any(operator_name(node) in _GATHERS for node in stream):
        onwards = reach([total], lambda node: [user for user in node.users if operator_name(user) in _TO_STREAM])
        if any(operator_name(user) in _SCATTERS for node in onwards for user in node.users):
            raise Refusal("its tokens are picked out of the stream and scattered back: a mixture of depths")


def prove_unrouted(region: Region, capture: Capture, projections: dict[fx.Node, Projection]) -> None:
    """Raises Refusal for experts and their like: tokens picked by index, or a router on the same stream."""
    name = operator_name(region.source)
    if name in _GATHERS:
        raise Refusal(f"its tokens are picked by {name}: an expert of a mixture, not a dense FFN")
    stream, inside = stream_read(region.source, capture), region.all_nodes
    for reader, projection in projections.items():
        if reader in inside or stream_read(projection.input, capture) is not stream:
            continue
        if _selects(reader, stream, capture):
            raise Refusal("a router reads the same stream: an expert of a mixture, not a dense FFN")


def _stream_of(node: fx.Node, capture: Capture) -> set[fx.Node]:
    """The node and its ancestors through additions, scales, norms, views: not through projections or attention."""

    def made_of(n: fx.Node) -> list[fx.Node]:
        return [a for a in n.all_input_nodes if a not in capture.constants] if operator_name(n) in _FROM_STREAM else []

    start = [] if node in capture.constants else [node]
    return {n for n in reach(start, made_of) if fake_value(n) is not None and features(n) > 1}


def _explicit_norm(node: fx.Node, users: list[fx.Node]) -> fx.Node | None:
    """``y * rsqrt(mean(y ** 2) + eps)``: the product, where the users of ``y`` are just that."""
    products = [user for user in users if operator_name(user) in ("mul", "div") and _same_shape(user, node)]
    if len(users) != 2 or len(products) != 1:
        return None
    (statistic,) = [user for user in users if user is not products[0]]
    for _ in range(8):
        if statistic is products[0]:
            return products[0]
        if (
            operator_name(statistic) not in _FROM_STREAM
            or tokens(statistic) != tokens(node)
            or len(statistic.users) != 1
        ):
            return None
        (statistic,) = statistic.users
    return None


def _selects(router: fx.Node, stream: fx.Node, capture: Capture) -> bool:
    """Whether the projection's output is what tokens or experts are chosen by, before it joins the stream: after
    that the next block's router may follow, which says nothing about this block.
    """
    pending, seen = [(router, 0)], {router}
    while pending:
        node, distance = pending.pop()
        for user in node.users:
            if operator_name(user) in _SELECTIONS:
                return True
            others = (a for a in user.all_input_nodes if a is not node)
            ends = operator_name(user) in kinds.NORMS or (
                _joins(user, node) and any(stream in _stream_of(other, capture) for other in others)
            )
            if user not in seen and distance < _ROUTER_REACH and not ends:
                seen.add(user)
                pending.append((user, distance + 1))
    return False


def _joins(user: fx.Node, output: fx.Node) -> bool:
    """Whether the node adds the output to its other operand, and does not use it as a weight or a gate."""
    name = operator_name(user)
    if name == "lerp":
        return any(operand is output for operand in user.args[:2])
    return name in ("add", "sub") or (name == "addcmul" and user.args[0] is not output)


def _repeats(user: fx.Node, output: fx.Node) -> bool:
    """Whether the node makes several tokens of each."""
    name = operator_name(user)
    if name in kinds.FEATURE_JOINS:
        operands = user.args[0]
        return isinstance(operands, (list, tuple)) and sum(operand is output for operand in operands) > 1
    return name in ("expand", "expand_as") and tokens(user) != tokens(output)


def _only_feeds_a_penalty(total: fx.Node, join: str) -> bool:
    """Whether the sum of output and stream is a reconstruction error. No Transformer subtracts its FFN, so a
    difference has to be read as a stream is.
    """
    readers = list(total.users)
    if join == "sub":
        return not any(operator_name(reader) in _CONTINUES for reader in readers)
    squared = [reader for reader in readers if operator_name(reader) == "mul" and reader.args == (total, total)]
    penalties = [reader for reader in readers if operator_name(reader) in _PENALTIES]
    return bool(readers) and len(penalties) + len(squared) == len(readers)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    value_a, value_b = fake_value(a), fake_value(b)
    return value_a is not None and value_b is not None and value_a.shape == value_b.shape
