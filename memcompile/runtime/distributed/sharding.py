"""`shard`: the values of a planned model become a DTensor, of which each rank of a memory group holds a part, which
layers read and optimizers step.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from memcompile.common.sites import VALUES_NAME
from memcompile.errors import OptionError, PlanError
from memcompile.lowering._torch import functorch_is_active, is_traced
from memcompile.lowering.distributed.sharded_table import Shards, chunk_sizes, most_tokens
from memcompile.lowering.parameters import draw_seed, draw_values, new_layer
from memcompile.runtime import patches
from memcompile.runtime._torch import local_part, sized_at_run_time
from memcompile.runtime.optimizer_state import parameters_of
from memcompile.runtime.pool import MemoryPool, pool_of
from memcompile.runtime.wrappers import is_in_ddp, is_sharded, live_optimizers, unwrap

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

DIMS = {"columns": 1, "rows": 0}
TOKENS = ("uneven", "even", "shared")
CUT = {"gate_weight": 0, "gate_bias": 0, "out_weight": 1}  # under tensor parallelism: the dim of value_dim
_ORDER = "The order is: plan, shard, then DDP or fully_shard, then the optimizer"
# Its size is what graphs have for the most tokens of a rank, until that is agreed upon. Not an attribute of what a
# module holds: Dynamo takes the sizes of those for constants.
_ROOM = sized_at_run_time(torch.empty(1, device="cpu").expand(1_000_003))


@dataclasses.dataclass(eq=False)
class ShardedValues:
    """How the values of a pool lie on a mesh.

    Attributes:
        mesh: of one dimension, the memory group, or of two, replicas before it.
        shards: the cut over the memory group.
        tokens: "uneven", "even" or "shared": see `memcompile.shard`.
        own: the part as a leaf of autograd; `part` keeps it up to date.
    """

    mesh: DeviceMesh
    shards: Shards
    tokens: str
    own: nn.Parameter | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedValues:
        """Of a copied model, whose values have a storage of their own."""
        return ShardedValues(self.mesh, self.shards, self.tokens)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Of the values on the mesh."""
        return (*([Replicate()] * (self.mesh.ndim - 1)), Shard(self.shards.dim))

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part; None where no others do."""
        return self.mesh.get_group(0) if self.mesh.ndim == 2 and self.mesh.size(0) > 1 else None

    @property
    def memory_mesh(self) -> DeviceMesh:
        """The memory group alone."""
        return self.mesh if self.mesh.ndim == 1 else self.mesh[self.mesh.mesh_dim_names[-1]]  # type: ignore[index]

    def part(self, values: nn.Parameter) -> nn.Parameter:
        """This rank's part of the values, on their storage: one leaf, whatever is loaded or cast. Its gradient is made
        theirs: `runtime.table.gradient`.
        """
        local = local_part(values)
        if self.own is None or self.own.is_meta != local.is_meta:  # which share no leaf
            self.own = nn.Parameter(local.detach(), requires_grad=values.requires_grad)
        elif (self.own.data_ptr(), self.own.dtype, self.own.shape) != (local.data_ptr(), local.dtype, local.shape):
            self.own.data = local.detach()
        return self.own.requires_grad_(values.requires_grad)  # type: ignore[return-value]

    def capacity(self, x: Tensor, in_statistics: bool) -> int | None:
        """The `capacity` of a lookup of the tokens x [..., width].

        Args:
            in_statistics: whether the layer takes their statistics, in training. The ranks agree here then: one token
                is an error that all of them raise, before any takes part in the lookup.
        """
        tokens = x.shape[:-1].numel()
        if self.tokens == "even":
            return tokens
        if self.tokens == "shared":
            return None
        if torch.compiler.is_compiling():
            return _ROOM.shape[0]  # agreed upon before the graph runs
        if not in_statistics or functorch_is_active() or is_traced(x):
            return None
        return most_tokens(tokens, self.shards.group, x.device, tokens == 1)


def shard(model: nn.Module, mesh: DeviceMesh, *, by: str | None = None, tokens: str = "uneven") -> None:
    """Shards the values of a planned model over a mesh, in place: `model.memory_values` becomes a DTensor.

    A collective: every rank of the mesh calls it.

    Every rank of the memory group has tokens of its own, as ranks of DDP have, and reads the slots of all of the group
    for its part of the table ("Memory Layers at Scale", arXiv 2412.09764, section 3). The values' gradient is the
    mean over the ranks, replicas included, as DDP's is.

    Args:
        model: planned, in no DDP or FSDP yet, and in no optimizer. Its values are those of the mesh's first rank; to
            never have all of them in one place, plan with ``memory_mesh=``, or on the meta device.
        mesh: of one dimension, the ranks that share one table (``mesh["memory"]``); or of two, replicas of such groups
            before it, as for ``fully_shard``: ``mesh["replicate", "memory"]``.
        by: "columns" (balanced whatever slots are hot), or "rows" for tables with fewer than 32 bytes a rank and row.
            None is "columns", and "rows" for the variant "peer", whose pairs are read whole.
        tokens: "uneven": ranks may have any number of tokens, and tell each other how many in each forward (a host
            synchronisation on a GPU). "even": they promise to have equally many. "shared": tensor parallelism, all
            ranks of the group have the same tokens; gate and output projection are cut too, and no slots travel.

    Raises:
        PlanError: not planned, sharded otherwise, in DDP, FSDP or an optimizer; the plans of the ranks differ.
        OptionError: a mesh of other dimensions, an unknown option, or a gradient that sharding does not serve.
    """
    root, ddp = unwrap(model)
    pool = pool_of(root)
    if pool is None:
        raise PlanError(
            f"{type(root).__name__} has no memory to shard: call memcompile.plan(model, ...) first. {_ORDER}"
        )
    sharded = cut(pool, mesh, by, tokens)
    if pool.table.sharded is not None:
        check_same(pool, sharded)
        return
    if ddp or is_in_ddp(root):
        raise PlanError(f"{type(root).__name__} is in DistributedDataParallel already. {_ORDER}")
    if is_sharded(root):
        raise PlanError(f"parameters of {type(root).__name__} are sharded already. {_ORDER}")
    replaced = {id(pool.values)} | {id(p) for p in (_to_cut(pool) if tokens == "shared" else {}).values()}
    for optimizer in live_optimizers():
        if any(id(p) in replaced for p in parameters_of(optimizer)):
            raise PlanError(f"{type(optimizer).__name__} holds the memory's parameters already. {_ORDER}")
    check_plans_agree(pool, sharded)
    values = distribute_tensor(pool.values.detach(), mesh, sharded.placements)
    pool.owner._parameters[VALUES_NAME] = nn.Parameter(values, requires_grad=pool.values.requires_grad)
    pool.table.sharded = sharded
    patches.hold(pool)
    pool.table.watch_gradient()
    cut_layers(pool)


def cut(pool: MemoryPool, mesh: DeviceMesh, by: str | None, tokens: str) -> ShardedValues:
    """How the values of a pool lie on a mesh. `by` and `tokens` are those of `shard`.

    Raises:
        OptionError: a mesh of other dimensions, an unknown option, or values that sharding does not serve.
    """
    config = pool.config
    if not isinstance(mesh, DeviceMesh) or mesh.ndim > 2:
        raise OptionError(
            f"mesh: expected a DeviceMesh of one dimension, the memory group, or of two, replicas and memory group; "
            f"got {mesh!r}"
        )
    if mesh.ndim == 2 and not mesh.mesh_dim_names:
        raise OptionError("mesh: its two dimensions need names, mesh_dim_names=('replicate', 'memory')")
    if mesh.get_coordinate() is None:
        raise OptionError(f"mesh: this rank is not in {mesh}: each rank shards over the mesh that it is in")
    if by is None:
        by = "rows" if config.has_pairs else "columns"
    if by not in DIMS:
        raise OptionError(f"by must be 'columns' or 'rows', got {by!r}")
    if tokens not in TOKENS:
        raise OptionError(f"tokens must be 'uneven', 'even' or 'shared', got {tokens!r}")
    if config.has_pairs and (by == "columns" or tokens == "shared"):
        raise OptionError(
            "variant='peer' has rows of two vectors, which columns and tensor parallelism would cut: shard by rows "
            "(by='rows' of shard, shard_by='rows' of plan, or neither), with tokens='even' or 'uneven'"
        )
    if tokens == "shared" and by == "rows":
        raise OptionError("tokens='shared' is tensor parallelism, which needs by='columns'")
    if config.values_storage != "device":
        raise OptionError(
            f"values_storage={config.values_storage!r} keeps all values in one place, and for inference: shard values "
            f"on the devices, or serve them from one process"
        )
    dim, memory = DIMS[by], mesh.ndim - 1
    sizes = chunk_sizes(pool.values_shape[dim], mesh.size(memory))
    group, rank = mesh.get_group(memory).group_name, mesh.get_local_rank(memory)
    return ShardedValues(mesh, Shards(group, sizes, rank, dim, same_tokens=tokens == "shared"), tokens)


def check_same(pool: MemoryPool, sharded: ShardedValues) -> None:
    """Raises PlanError where a pool lies otherwise than asked for now."""
    now = pool.table.sharded
    if now is None or (now.mesh, now.shards, now.tokens) != (sharded.mesh, sharded.shards, sharded.tokens):
        how = "not sharded" if now is None else f"sharded over {now.mesh} with tokens={now.tokens!r}"
        raise PlanError(f"the memory of {type(pool.owner).__name__} is {how} already: build the model anew. {_ORDER}")


def check_plans_agree(pool: MemoryPool, sharded: ShardedValues) -> None:
    """Raises PlanError, on every rank, where another has another plan. A collective."""
    parameters = {name: p for name, p in pool.owner.named_parameters() if name != VALUES_NAME}
    mine: dict[str, Any] = {
        **pool.config.to_dict(),
        "by": "columns" if sharded.shards.by_columns else "rows",
        "tokens": sharded.tokens,
        **{f"parameters[{name!r}]": f"{list(p.shape)} {p.dtype}" for name, p in parameters.items()},
    }
    plans = [(dist.get_rank(), mine)]
    for dim in reversed(range(sharded.mesh.ndim)):  # all ranks of the mesh have all plans before any raises
        group = sharded.mesh.get_group(dim)
        everyones: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyones, plans, group=group)
        plans = [plan for of_rank in everyones for plan in of_rank]
    (first, expected), *others = plans
    for rank, plan in others:
        differing = [name for name in {**expected, **plan} if plan.get(name) != expected.get(name)]
        if differing:
            told = ", ".join(f"{name} {expected.get(name)!r} and {plan.get(name)!r}" for name in differing[:5])
            raise PlanError(
                f"ranks {first} and {rank} share one memory, but have planned otherwise: {told}. Build the same model "
                f"with the same options on every rank"
            )


def new_sharded_values(pool: MemoryPool, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A drawn table of which each rank makes its own part alone; it is the same for any number of ranks. A collective
    unless on the meta device.
    """
    assert pool.table.sharded is not None
    sharded, shape = pool.table.sharded, pool.values_shape
    own = (shape[0], sharded.shards.own) if sharded.shards.by_columns else (sharded.shards.own, shape[1])
    part = torch.empty(own, dtype=dtype, device=device)
    draw_part(part, sharded, pool)
    whole = DTensor.from_local(
        part, sharded.mesh, sharded.placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
    return nn.Parameter(whole)


def draw_part(part: Tensor, sharded: ShardedValues, pool: MemoryPool) -> None:
    """Draws a part of a pool's table in place, with the seed of the mesh's first rank. A collective unless on the meta
    device.
    """
    seed = draw_seed()
    if part.is_meta:
        return
    common = torch.tensor([seed], device=part.device)
    _broadcast(common, sharded)
    offset = sharded.shards.offset
    start = (0, offset) if sharded.shards.by_columns else (offset, 0)
    draw_values(part, int(common), pool.values_shape, start, pool.config.pair_at(pool.width))


def cut_layers(pool: MemoryPool) -> None:
    """Where all ranks of the group have the same tokens, cuts gates and output projections as the values are, and makes
    the rest of the layers that of the group's first rank. A collective then, unless on the meta device.
    """
    sharded = pool.table.sharded
    assert sharded is not None
    if sharded.tokens != "shared":
        return
    to_cut = _to_cut(pool)
    for (layer, name), parameter in to_cut.items():
        part = distribute_tensor(parameter.detach(), sharded.memory_mesh, [Shard(CUT[name])])
        layer._parameters[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)
    for layer in pool.layers.values():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if not isinstance(tensor, DTensor) and not tensor.is_meta:
                _broadcast(tensor.detach(), sharded)


def redraw_layer(layer: MemoryLayer, pool: MemoryPool) -> None:
    """Draws the parameters of a layer anew that tensor parallelism has cut, as one process would. A collective."""
    sharded = pool.table.sharded
    assert sharded is not None
    weight = layer.query_weight
    for name, drawn in new_layer(pool.config, layer.width, weight.dtype, weight.device).items():
        parameter = layer._parameters[name]
        if parameter is None or drawn is None:
            continue
        whole = drawn.detach()
        _broadcast(whole, sharded)
        cut = isinstance(parameter, DTensor)
        part = whole.narrow(CUT[name], sharded.shards.offset, sharded.shards.own) if cut else whole
        local_part(parameter).detach().copy_(part)


def _to_cut(pool: MemoryPool) -> dict[tuple[MemoryLayer, str], nn.Parameter]:
    layers = pool.layers.values()
    found = {(layer, name): layer._parameters[name] for layer in layers for name in CUT}
    return {place: parameter for place, parameter in found.items() if parameter is not None}


def _broadcast(tensor: Tensor, sharded: ShardedValues) -> None:
    """What the first rank of the mesh has."""
    for dim in range(sharded.mesh.ndim):
        dist.broadcast(tensor, group=sharded.mesh.get_group(dim), group_src=0)
