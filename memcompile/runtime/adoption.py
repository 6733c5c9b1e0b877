"""Optimizers that are alive when a model is planned are adopted.

Nothing here adds a parameter group: schedulers (LambdaLR, OneCycleLR, SequentialLR) keep lists of one entry a group,
and checkpoints of optimizers are matched by group.
"""

import gc
import logging
from collections.abc import Container, Mapping, Set

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memcompile.common.sites import FfnSite
from memcompile.runtime.optimizer_state import parameters_of
from memcompile.runtime.pool import MemoryPool
from memcompile.runtime.table.hooks import meet
from memcompile.runtime.table.named_states import save_names
from memcompile.runtime.table.table import tables_in
from memcompile.runtime.table.warnings.untrained import tell_at_plan
from memcompile.runtime.which_group import Group, Neighbours, groups_of
from memcompile.runtime.wrappers import live_objects, live_optimizers

log = logging.getLogger(__name__)

Ffns = Mapping[str, Mapping[str, nn.Parameter]]  # the parameters of each chosen FFN, by the key of its layer


def adopt_optimizers(ffns: Ffns, pool: MemoryPool, root: nn.Module) -> int:
    """Puts the memory's parameters into the live optimizers that hold parameters of the chosen FFNs, and takes those
    out where the memory replaces them. `which_group` says which group each joins.

    Within a group it stands where the model's order of parameters puts it. Groups keep their number, order and options.
    The optimizer of another model that shares a weight with an FFN stays as it is. Where the model has an optimizer, it
    is told which of the memory's parameters joined none.

    Args:
        ffns: the parameters of each chosen FFN with their names, by the key of its layer, in execution order.

    Returns how many optimizers were changed.
    """
    replaced = {id(p): name for ffn in ffns.values() for name, p in ffn.items()}
    names = {id(p): name for name, p in root.named_parameters()}
    own, strangers, shared = _optimizers_of(names | replaced, root)
    embeddings = [id(m.weight) for m in root.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    neighbours = Neighbours(own, names | replaced, embeddings)
    changed = _join(neighbours, ffns, pool, names)
    if not pool.adds:
        changed += _leave(neighbours.groups, names | replaced, replaced.keys(), strangers, shared)
    adopted = {id(group.optimizer): group.optimizer for group in changed}.values()  # what wraps them shows their groups
    for optimizer in adopted:
        if isinstance(optimizer, torch.optim.Adagrad):
            _start_adagrad(optimizer, pool.values)
        _restart_lbfgs(optimizer)
        save_names(optimizer)
        if tables_in(optimizer):
            meet(optimizer)
        left = "" if pool.adds else "the replaced FFNs left it, "
        log.info("adopted %s: %sthe memory joined it", type(optimizer).__name__, left)
    if own:
        tell_at_plan(pool.table, own, neighbours.for_matrices)
    return len(adopted)


def leave_optimizers(parameter: nn.Parameter) -> None:
    """Takes a parameter, and its state, out of every optimizer."""
    for group in groups_of(live_optimizers()):
        if any(p is parameter for p in group.params):
            _take_out(group, {id(parameter)})
            _restart_lbfgs(group.optimizer)


def _optimizers_of(names: Mapping[int, str], root: nn.Module) -> tuple[list[Optimizer], list[Optimizer], Set[int]]:
    """The live optimizers that hold parameters of a model: its own, which hold one that no other model has, and those
    of other models; and the ids of the parameters that another model has, too, as far as it matters.
    """

    def holders() -> list[Optimizer]:
        return [o for o in live_optimizers() if any(id(p) in names for p in parameters_of(o))]

    def overlap(optimizers: list[Optimizer]) -> bool:
        held = [id(p) for group in groups_of(optimizers) for p in group.params if id(p) in names]
        return len(held) > len(set(held))

    found = holders()
    if overlap(found):
        gc.collect()  # one may be dropped, and be reached by its scheduler alone
        found = holders()
    if not overlap(found) and not any(_holds_others(o, names) for o in found):
        return found, [], frozenset()
    inside = {id(module) for module in root.modules()}
    outside = [m for m in live_objects(nn.Module) if id(m) not in inside]
    shared = {id(p) for m in outside for p in m.__dict__.get("_parameters", {}).values()} & names.keys()
    own = [o for o in found if any(id(p) in names and id(p) not in shared for p in parameters_of(o))]
    return own, [o for o in found if o not in own], shared


def _holds_others(optimizer: Optimizer, names: Container[int]) -> bool:
    return any(id(p) not in names for p in parameters_of(optimizer))


def _join(neighbours: Neighbours, ffns: Ffns, pool: MemoryPool, names: Mapping[int, str]) -> list[Group]:
    """Puts the memory's parameters into the groups of their neighbours. Returns these groups."""
    blocks = {site.down.removeprefix(pool.prefix): _block(site) for site in pool.chosen}
    layer_of = {id(p): key for key, layer in pool.layers.items() for p in layer.parameters()}
    changed = []
    for _, parameter in pool.memory_parameters():
        if not parameter.requires_grad:  # values that are for inference
            continue
        if parameter is pool.values:
            neighbour = neighbours.of_table((ffn.values(), blocks[key]) for key, ffn in ffns.items())
        else:
            key = layer_of[id(parameter)]
            neighbour = neighbours.of_layer(parameter, ffns[key].values(), blocks[key])
        if neighbour is None:
            continue
        beside = neighbours.names[id(neighbour)]
        for group in neighbours.groups_with(neighbour):
            if parameter is pool.values:
                optimizer = type(group.optimizer).__name__
                log.info("the table joined group %d of %s, as %s", group.number, optimizer, beside)
            _insert(group, parameter, neighbour, names, beside)
            changed.append(group)
    return changed


def _block(site: FfnSite) -> str:
    """Path of the block of its stack that an FFN is in: "model.layers.4" of "model.layers.4.mlp"."""
    end = site.name.find(".", len(site.stack) + 1)
    return site.name if end < 0 else site.name[:end]


def _insert(group: Group, parameter: nn.Parameter, neighbour: Tensor, names: Mapping[int, str], beside: str) -> None:
    """Puts a parameter where an optimizer that is built after planning has it: checkpoints match them by position."""
    position = {key: index for index, key in enumerate(names)}
    places = [position.get(id(p), -1) for p in group.params]
    index = next((i for i, place in enumerate(places) if place > position[id(parameter)]), len(places))
    if "param_names" in group.group:
        given = group.group["param_names"]
        name = given[[id(p) for p in group.params].index(id(neighbour))]  # of the model, or of what is around it
        prefix = name.removesuffix(beside) if name.endswith(beside) else ""
        given.insert(index, prefix + names[id(parameter)])
    group.params.insert(index, parameter)
    for optimizer in group.optimizers:  # some say there by which rule they step each parameter
        said = {k: v for k, v in optimizer.state.get(neighbour, {}).items() if isinstance(v, (bool, str))}
        if said:
            optimizer.state[parameter].update(said)


def _leave(
    groups: list[Group],
    names: Mapping[int, str],
    replaced: Set[int],
    strangers: list[Optimizer],
    shared: Set[int],
) -> list[Group]:
    """Takes the replaced parameters out of their groups. One that another model has too stays in an optimizer that
    holds more than this model's parameters, and in the last one that holds it. Returns the groups that changed.
    """
    of_both = [g for g in groups if any(_holds_others(o, names) for o in g.optimizers)]
    elsewhere = {id(p) for o in strangers for p in parameters_of(o)} | {id(p) for g in of_both for p in g.params}
    changed = []
    for group in groups:
        staying = shared if group in of_both else shared - elsewhere
        going = {id(p) for p in group.params if id(p) in replaced} - staying
        if going:
            _take_out(group, going)
            changed.append(group)
    return changed


def _take_out(group: Group, going: Container[int]) -> None:
    for optimizer in group.optimizers:
        for parameter in group.params:
            if id(parameter) in going:
                optimizer.state.pop(parameter, None)
    keep = [index for index, parameter in enumerate(group.params) if id(parameter) not in going]
    for key in ("params", "param_names"):
        if key in group.group:
            group.group[key][:] = [group.group[key][index] for index in keep]


def _start_adagrad(optimizer: torch.optim.Adagrad, values: nn.Parameter) -> None:
    """Gives new parameters their state: Adagrad makes it when it is built (torch 2.11), not in the first step. Values
    have none there before their first step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter is not values and not optimizer.state[parameter]:
                device = parameter.device if group["fused"] else None
                step = torch.zeros((), dtype=torch.get_default_dtype(), device=device)
                total = torch.full_like(parameter, group["initial_accumulator_value"])
                optimizer.state[parameter].update(step=step, sum=total)


def _restart_lbfgs(optimizer: Optimizer) -> None:
    """Its history and its size are of all parameters as one vector."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()
        optimizer._numel_cache = None
