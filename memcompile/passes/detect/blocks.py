"""Matches FFNs in normalized graphs, puts the proofs together, and makes one block of all calls of one FFN."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from memcompile.common.pipeline import Pipeline
from memcompile.common.sites import FfnSite, common_path
from memcompile.common.token_wise import CASTS, NORMS, RESHAPES
from memcompile.passes._torch import ConvNd
from memcompile.passes.capture.forward import is_dispatched
from memcompile.passes.capture.normalize import normalize
from memcompile.passes.capture.state import HOOKS
from memcompile.passes.capture.trace import Capture
from memcompile.passes.detect.layout import prove_features_last, stream_read
from memcompile.passes.detect.projection import find_projections
from memcompile.passes.detect.region import Refusal, Region, find_region, prove_closed, prove_one_source
from memcompile.passes.detect.residual import prove_residual, prove_unrouted
from memcompile.passes.detect.token_wise import prove_token_wise
from memcompile.passes.fx import operator_name

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Block:
    """A site, and all calls of it in the graphs."""

    site: FfnSite
    calls: Sequence[Candidate]


def find_blocks(captures: Sequence[Capture], model: nn.Module | None, pipeline: Pipeline) -> list[Block]:
    """The blocks in traced or captured graphs, which are normalized in place.

    Args:
        model: the module that the graphs were traced from, whose ties and hooks count too; None where the graphs are
            all there is.
    """
    graphs = [(capture.path or "the whole model", capture.graph) for capture in captures]
    with pipeline.step("normalize", "nodes changed", graphs):
        pipeline.count = sum(normalize(capture.graph) for capture in captures)
    with pipeline.step("detect", "blocks found", graphs):
        found = [c for capture in captures for c in _candidates(capture) if all(map(capture.covers, c.parameters))]
        _refuse_unproved_boundaries(found, model)
        _refuse_parallel_branches(found)
        blocks = _in_order(_merge_calls(found, captures, model), captures)
        pipeline.count = len(blocks)
    for site in (block.site for block in blocks):
        log.debug("%s %s: %s", "refused" if site.refusal else "found", site.down, site.refusal or site.pattern)
    return blocks


@dataclasses.dataclass
class Candidate:
    """One call of a block: where in which graph, and why it may not be replaced."""

    region: Region
    capture: Capture
    joins_stream: bool = True
    refusal: str | None = None
    by_name: bool = False  # it is refused only where nobody names it

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.capture.parameters[p] for p in self.region.all_parameters)

    @property
    def signature(self) -> tuple:
        return (self.region.down.width_out, self.region.down.width_in, _pattern(self.region))


def _candidates(capture: Capture) -> Iterator[Candidate]:
    projections = find_projections(capture)
    for down in projections.values():
        region = find_region(down, projections, capture)
        if region is None:
            continue
        candidate = Candidate(region, capture)
        try:
            prove_one_source(region)
            prove_token_wise(region, capture)
            prove_closed(region)
            prove_features_last(region, capture, projections)
            prove_unrouted(region, capture, projections)
            candidate.joins_stream = prove_residual(region, capture)
            _refuse_equal_widths(candidate)
        except Refusal as refusal:
            candidate.refusal = str(refusal)
        if candidate.refusal is None or candidate.by_name or _resembles_ffn(region):
            yield candidate


def _refuse_equal_widths(candidate: Candidate) -> None:
    """A head or a projector is as wide as the model. Where a block is on the stream for sure, naming it takes it."""
    hidden = candidate.region.down.width_in
    if hidden == candidate.region.down.width_out:
        candidate.by_name = candidate.joins_stream
        named = ", and memory_layers takes it by its name" if candidate.by_name else ""
        raise Refusal(
            f"its hidden width equals the model's ({hidden}): more likely a head or a projector than an FFN{named}"
        )


_ATTENTION = frozenset("scaled_dot_product_attention matmul bmm baddbmm einsum softmax flex_attention".split())


def _resembles_ffn(region: Region) -> bool:
    """Whether a refused candidate is worth a line in a report: attention's projections seen through a residual
    stream look like blocks without a hidden width of their own, and are noise there.
    """
    down = region.down
    if region.foreign or region.branches or len(region.sources) > 1:
        names = {operator_name(node) for node in (*region.foreign, *region.nodes)}
        return down.width_in > down.width_out and names.isdisjoint(_ATTENTION | NORMS)  # a norm: it spans the stream
    return down.width_in > down.width_out or (down.width_in == down.width_out and len(region.nodes) <= 3)


def _refuse_unproved_boundaries(found: list[Candidate], model: nn.Module | None) -> None:
    """A block that fills its whole graph shows no residual. Its like elsewhere in the model, each alone in a module
    that has a norm, are the evidence: layers repeat and normalise their stream, heads and experts do not.
    """
    proved = collections.Counter(c.signature for c in found if c.refusal is None)
    for candidate in found:
        if candidate.refusal is not None or candidate.joins_stream:
            continue
        if model is None or not candidate.capture.path:
            candidate.refusal = "its output leaves the model before it joins a residual stream: a head, not an FFN"
        elif proved[candidate.signature] < 2 or not _is_alone_with_a_norm(candidate, found, model):
            candidate.refusal = (
                "its residual stream is not visible, and it is not the one block of a module with a norm that repeats: "
                "pass example_inputs"
            )


def _is_alone_with_a_norm(candidate: Candidate, found: list[Candidate], model: nn.Module) -> bool:
    """Whether the module that runs the block has a norm (a child with vectors alone, where the block does not start
    with one) and no other candidate nor a bank of expert weights in it.
    """
    path = candidate.capture.path.rpartition(".")[0]
    while path and isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        path = path.rpartition(".")[0]  # these have no forward of their own
    caller, width = model.get_submodule(path), candidate.region.down.width_out
    inside = {c.parameters for c in found if not path or c.capture.path.startswith(f"{path}.")}
    bank = any(p.dim() > 2 for m in caller.modules() if not isinstance(m, ConvNd) for p in m.parameters(recurse=False))
    children = [list(child.parameters()) for child in caller.children()]
    norm = operator_name(candidate.region.source) in NORMS or any(
        own and all(p.shape == (width,) for p in own) for own in children
    )
    return norm and not bank and inside == {candidate.parameters}


def _refuse_parallel_branches(found: list[Candidate]) -> None:
    readers = collections.defaultdict(set)
    for candidate in found:
        if candidate.refusal is None or candidate.by_name:
            readers[stream_read(candidate.region.source, candidate.capture)].add(candidate.parameters)
    for candidate in found:
        stream = stream_read(candidate.region.source, candidate.capture)
        if (candidate.refusal is None or candidate.by_name) and len(readers[stream]) > 1:
            candidate.by_name = False
            candidate.refusal = "several blocks read one stream: parallel branches or experts, not one FFN"


def _merge_calls(found: list[Candidate], captures: Sequence[Capture], model: nn.Module | None) -> list[Block]:
    """One block for all calls of the same parameters, refused if any call is, or if they are read elsewhere."""
    calls: dict[tuple[str, ...], list[Candidate]] = {}
    for candidate in found:
        calls.setdefault(candidate.parameters, []).append(candidate)
    owners = collections.Counter(name for parameters in calls for name in parameters)
    tied: dict[int, set[str]] = collections.defaultdict(set)  # all names of each parameter
    for name, parameter in model.named_parameters(remove_duplicate=False) if model is not None else ():
        tied[id(parameter)].add(name)
    blocks = []
    for parameters, candidates in calls.items():
        by_name = any(c.by_name for c in candidates)
        refusal = next((c.refusal for c in candidates if c.refusal and not c.by_name), None)
        refusal = refusal or next(_parameter_refusals(parameters, candidates, captures, owners, model, tied), None)
        region, capture = candidates[0].region, candidates[0].capture
        up = tuple(capture.parameters[p.weight] for p in region.up)
        down = capture.parameters[region.down.weight]
        site = FfnSite(
            name=common_path(name.rpartition(".")[0] for name in (*up, down)),
            up=up,
            down=down,
            width=region.down.width_out,
            hidden=region.down.width_in,
            pattern=_pattern(region),
            flops=sum(2 * p.width_in * p.width_out for p in (*region.up, region.down)),
            calls=len(candidates),
            parameters=parameters,
            refusal=refusal or next((c.refusal for c in candidates if c.by_name), None),
            by_name=by_name and refusal is None,
        )
        blocks.append(Block(site, candidates))
    return blocks


def _in_order(blocks: list[Block], captures: Sequence[Capture]) -> list[Block]:
    """The blocks in execution order, also where two forwards had to be traced: the second ran them all."""
    second = next((capture for capture in captures if capture.only is not None), None)
    if second is None:
        return blocks
    position = {node: index for index, node in enumerate(second.graph.nodes)}
    first_use = {name: min(map(position.__getitem__, p.users), default=-1) for p, name in second.parameters.items()}
    return sorted(blocks, key=lambda block: first_use[block.site.down])


def _parameter_refusals(
    parameters: tuple[str, ...],
    calls: list[Candidate],
    captures: Sequence[Capture],
    owners: collections.Counter,
    model: nn.Module | None,
    tied: Mapping[int, set[str]],
) -> Iterator[str]:
    """Why these parameters cannot be taken out of the model."""
    region = calls[0].region
    if len({p.weight for p in (*region.up, region.down)}) <= len(region.up):
        yield "two of its projections share one weight"
    yield from (f"{name} also belongs to another block" for name in parameters if owners[name] > 1)
    if model is not None:
        yield from _registration_refusals(model, parameters, tied)
    inside = frozenset[fx.Node]().union(*(call.region.all_nodes for call in calls))
    read = (p for c in captures for p, name in c.parameters.items() if name in parameters and c.covers(name))
    for user in (user for placeholder in read for user in placeholder.users if user not in inside):
        yield f"one of its weights is also read by {operator_name(user)} outside of the block"


def _registration_refusals(model: nn.Module, replaced: Sequence[str], tied: Mapping[int, set[str]]) -> Iterator[str]:
    """Why the way in which these parameters are registered keeps them in the model."""
    owner = common_path(name.rpartition(".")[0] for name in replaced)
    for name in replaced:
        parameter, path = model.get_parameter(name), name.rpartition(".")[0]
        if isinstance(model.get_submodule(path), ParametrizationList):
            yield f"{name} is parametrized"
        split = (other.rpartition(".") for other in tied[id(parameter)])  # of one attribute, where layers share a block
        if len({(id(model.get_submodule(module)), leaf) for module, _, leaf in split}) > 1:
            yield f"{name} is tied to {min(tied[id(parameter)] - {name})}"
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            yield f"{name} is a {type(parameter).__name__} of {parameter.dtype}: sharded or quantised weights stay"
        if parameter.is_meta and is_dispatched(model, path):
            yield f"{name} is offloaded: plan the model where all of its weights are loaded, and dispatch it afterwards"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield f"{name} has gradient hooks, which would be lost"
    for path in (name.rpartition(".")[0] for name in replaced):
        if path != owner and _has_hooks(model.get_submodule(path)):
            yield f"module {path!r} has hooks, which would no longer see the projection"
    for path, module in model.get_submodule(owner).named_modules(prefix=owner):
        # An activation or a dropout between the projections has no parameters; attention in the same module has.
        bare = not any(True for _ in module.parameters())
        between = bare or any(name.startswith(f"{path}.") for name in replaced)
        if path != owner and between and _has_hooks(module):
            yield f"module {path!r} has hooks, which would no longer see the hidden activation"


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def _pattern(region: Region) -> str:
    unnamed = CASTS | RESHAPES | {"getitem"}
    between = [operator_name(node) for node in region.nodes if operator_name(node) not in unnamed]
    return " > ".join([*["linear"] * len(region.up), *between, "linear"])
