"""Pass 3, detect: the feed-forward blocks of a model, each proved or refused with its reason. One detector for all."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from memcompile.common.sites import FfnSite
from memcompile.common.token_wise import CASTS, NORMS, RESHAPES
from memcompile.passes.capture.graphs import Parameters, Scope, is_captured, read
from memcompile.passes.capture.trace import Capture, trace
from memcompile.passes.detect.layout import prove_features_last, stream_read
from memcompile.passes.detect.normalize import normalize, operator_name
from memcompile.passes.detect.projection import find_projections
from memcompile.passes.detect.region import Refusal, Region, find_region, prove_closed, prove_one_source
from memcompile.passes.detect.registration import Registration, common_owner
from memcompile.passes.detect.residual import Sink, prove_residual, prove_unrouted
from memcompile.passes.detect.token_wise import prove_token_wise

log = logging.getLogger(__name__)


def find_ffns(model: nn.Module, example_inputs: Any = None) -> list[FfnSite]:
    """The feed-forward blocks of ``model`` in execution order, matched on FX graphs and never by name.

    The model runs on fake tensors, or, where values decide its path, a copy of it runs once. A block found only where
    it cannot be proved safe to replace carries the reason in ``refusal``.

    Args:
        model: any module; its parameters may be on the meta device. A captured graph of ATen operators
            (``torch.export.export(model, args).module()``) is read as it is.
        example_inputs: a tuple of positional or a dict of keyword arguments for one forward. Needed only where
            no guess at the inputs runs and the submodules alone do not show every block.
    """
    if isinstance(model, fx.GraphModule) and is_captured(model):
        return find_in_graph(model)
    return [block.site for block in find_blocks(trace(model, example_inputs), model)]


def find_in_graph(graph_module: fx.GraphModule, parameters: Parameters | None = None) -> list[FfnSite]:
    """The feed-forward blocks of a captured graph of ATen operators, found as in a model. Nothing runs.

    Args:
        graph_module: from ``torch.export.export(model, args).module()``, or from ``make_fx`` with the weights among
            the inputs.
        parameters: which inputs are weights: a dict from the placeholders to the names that the sites shall have, or
            a list of placeholders, named as they are. By default they are the module's own parameters; without any,
            the inputs that are read as weights, named by their keys where they are passed in a dict.

    Raises:
        OptionError: ``parameters`` names an input that is not there.
        PlanError: the graph is not of ATen operators, or does not say which shapes it has.
    """
    return [block.site for block in find_in_scopes(read(graph_module, parameters))]


def find_in_scopes(scopes: Sequence[Scope]) -> list[Block]:
    """The blocks in captured graphs, in execution order."""
    order = {node: position for scope in scopes for node, position in scope.order.items()}
    blocks = find_blocks([scope.capture for scope in scopes], None)
    return sorted(blocks, key=lambda block: min(order[call.region.down.node] for call in block.calls))


@dataclasses.dataclass(frozen=True)
class Block:
    """A site, and all calls of it in the graphs."""

    site: FfnSite
    calls: Sequence[Candidate]


def find_blocks(captures: Sequence[Capture], model: nn.Module | None) -> list[Block]:
    """The blocks in the graphs, which are normalized in place.

    Args:
        model: the module that the graphs were traced from, whose ties and hooks count too; None where the graphs are
            all there is.
    """
    found: list[Candidate] = []
    for capture in captures:
        normalize(capture.graph)
        found.extend(c for c in _candidates(capture) if all(map(capture.speaks_for, c.replaced)))
    _refuse_unproved_boundaries(found, model)
    _refuse_parallel_branches(found)
    blocks = _in_order(_merge_calls(found, captures, model), captures)
    for site in [block.site for block in blocks]:
        log.debug("%s %s: %s", "refused" if site.refusal else "found", site.down, site.refusal or site.pattern)
    return blocks


@dataclasses.dataclass
class Candidate:
    """One call of a block: where in which graph, and why it may not be replaced."""

    region: Region
    capture: Capture
    sink: Sink = Sink.RESIDUAL
    refusal: str | None = None

    @property
    def replaced(self) -> tuple[str, ...]:
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
            candidate.sink = prove_residual(region, capture)
        except Refusal as refusal:
            candidate.refusal = str(refusal)
        if candidate.refusal is None or _resembles_ffn(region):
            yield candidate


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
    alike = collections.Counter(c.signature for c in found if c.refusal is None)
    for candidate in found:
        if candidate.refusal is not None or candidate.sink is not Sink.BOUNDARY:
            continue
        if model is None or not candidate.capture.path:
            candidate.refusal = "its output leaves the model before it joins a residual stream: a head, not an FFN"
        elif alike[candidate.signature] < 2 or not _stands_alone_beside_a_norm(candidate, found, model):
            candidate.refusal = (
                "its residual stream is not visible, and it does not stand alone beside a norm in repeated layers: "
                "pass example_inputs"
            )


def _stands_alone_beside_a_norm(candidate: Candidate, found: list[Candidate], model: nn.Module) -> bool:
    """Whether the module that runs the block has a norm (a child with vectors alone, where the block does not start
    with one) and no other candidate nor a bank of expert weights in it.
    """
    path = candidate.capture.path.rpartition(".")[0]
    while path and isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        path = path.rpartition(".")[0]  # these have no forward of their own
    caller, width = model.get_submodule(path), candidate.region.down.width_out
    inside = {c.replaced for c in found if not path or c.capture.path.startswith(f"{path}.")}
    bank = any(p.dim() > 2 for m in caller.modules() if not isinstance(m, _ConvNd) for p in m.parameters(recurse=False))
    children = [list(child.parameters()) for child in caller.children()]
    norm = operator_name(candidate.region.source) in NORMS or any(
        own and all(p.shape == (width,) for p in own) for own in children
    )
    return norm and not bank and inside == {candidate.replaced}


def _refuse_parallel_branches(found: list[Candidate]) -> None:
    readers = collections.defaultdict(set)
    for candidate in found:
        if candidate.refusal is None:
            readers[stream_read(candidate.region.source, candidate.capture)].add(candidate.replaced)
    for candidate in found:
        stream = stream_read(candidate.region.source, candidate.capture)
        if candidate.refusal is None and len(readers[stream]) > 1:
            candidate.refusal = "several blocks read one stream: parallel branches or experts, not one FFN"


def _merge_calls(found: list[Candidate], captures: Sequence[Capture], model: nn.Module | None) -> list[Block]:
    """One block for all calls of the same parameters, refused if any call is, or if they are read elsewhere."""
    calls: dict[tuple[str, ...], list[Candidate]] = {}
    for candidate in found:
        calls.setdefault(candidate.replaced, []).append(candidate)
    owners = collections.Counter(name for replaced in calls for name in replaced)
    registration = Registration(model) if model is not None else None
    blocks = []
    for replaced, candidates in calls.items():
        refusal = next((c.refusal for c in candidates if c.refusal), None)
        refusal = refusal or _parameter_refusal(replaced, candidates, captures, owners, registration)
        region, capture = candidates[0].region, candidates[0].capture
        up = tuple(capture.parameters[p.weight] for p in region.up)
        down = capture.parameters[region.down.weight]
        site = FfnSite(
            name=common_owner([*up, down]),
            up=up,
            down=down,
            width=region.down.width_out,
            hidden=region.down.width_in,
            pattern=_pattern(region),
            flops=sum(2 * p.width_in * p.width_out for p in (*region.up, region.down)),
            calls=len(candidates),
            replaced=replaced,
            refusal=refusal,
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


def _parameter_refusal(
    replaced: tuple[str, ...],
    candidates: list[Candidate],
    captures: Sequence[Capture],
    owners: collections.Counter,
    registration: Registration | None,
) -> str | None:
    """Why these parameters cannot be taken out of the model, None where they can."""
    region = candidates[0].region
    if len({p.weight for p in (*region.up, region.down)}) <= len(region.up):
        return "two of its projections share one weight"
    for name in replaced:
        if owners[name] > 1:
            return f"{name} also belongs to another block"
    refusal = registration.refusal(replaced) if registration is not None else None
    if refusal is not None:
        return refusal
    inside = frozenset[fx.Node]().union(*(c.region.all_nodes for c in candidates))
    for placeholder in [
        p for c in captures for p, name in c.parameters.items() if name in replaced and c.speaks_for(name)
    ]:
        for user in placeholder.users:
            if user not in inside:
                return f"one of its weights is also read by {operator_name(user)} outside of the block"
    return None


def _pattern(region: Region) -> str:
    quiet = CASTS | RESHAPES | {"getitem"}
    between = [operator_name(node) for node in region.nodes if operator_name(node) not in quiet]
    return " > ".join([*["linear"] * len(region.up), *between, "linear"])
