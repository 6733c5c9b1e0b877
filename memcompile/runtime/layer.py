"""MemoryLayer: the parameters that the memory of one FFN owns, and the call of the op with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memcompile.lowering import memory_lookup
from memcompile.lowering._torch import functorch_is_active
from memcompile.lowering.parameters import LAYER_BUFFERS, LAYER_PARAMETERS, lookup_options, new_buffers, new_layer
from memcompile.runtime._torch import is_exporting, local_part, without_torch_function
from memcompile.runtime.distributed.collective_errors import named_collectives
from memcompile.runtime.distributed.sharding import CUT
from memcompile.runtime.pool import MemoryPool
from memcompile.runtime.stand_ins.operations import Operations
from memcompile.runtime.state_dicts import encode_plan
from memcompile.runtime.storage.drawing import draw_parameters
from memcompile.runtime.table.current_values import is_alias
from memcompile.runtime.table.hit_counts import HitCounts
from memcompile.runtime.table.table import flush_while_traced

LayerTensors = dict[str, Tensor | None]


class MemoryLayer(nn.Module):
    """Product-key memory in the place of one FFN or beside it: ``x [..., width] -> [..., width]``.

    Query, half-keys, gate and output projection are its own; the values are the pool's.
    "Memory Layers at Scale" (arXiv 2412.09764), sections 2 and 3.

    Attributes:
        name: path of the module that owned the FFN.
        operations: what the FFN did between its projections, where the layer replaced it.
        query_weight: [heads * key_dim, width], xavier uniform.
        query_bias: [heads * key_dim], zero.
        half_keys: [2, heads, n_keys, key_dim / 2], U(-key_dim**-1/2, key_dim**-1/2).
        gate_weight, gate_bias: [value_dim, width], N(0, width**-1/2), and [value_dim]; None without a gate.
        out_weight, out_bias: [width, value_dim], N(0, width**-1/2), and [width]; None in a plain Memory with
            value_dim == width that replaces its FFN. Zero where the memory is added, so that the model starts as
            it was.
        temperature: [heads], 10; None without qk-norm.
        query_scale, query_shift: [heads * key_dim], 1 and 0, of BatchNorm of the query; None without it.
        query_mean, query_var: its running statistics, buffers [heads * key_dim] of at least float32, 0 and 1.
    """

    query_weight: nn.Parameter
    query_bias: nn.Parameter
    half_keys: nn.Parameter
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None
    out_weight: nn.Parameter | None
    out_bias: nn.Parameter | None
    temperature: nn.Parameter | None
    query_scale: nn.Parameter | None
    query_shift: nn.Parameter | None
    query_mean: Tensor | None
    query_var: Tensor | None
    _slot_offset: Tensor | None  # [] int32

    def __init__(
        self, pool: MemoryPool, number: int, name: str, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """The layer of this number, from 0 on, among those of a pool."""
        super().__init__()
        config = pool.config
        self.options = lookup_options(config, number)
        self.first_slot: int = self.options.pop("first_slot")
        # As text: with dynamic=True Dynamo makes a float an input of the graph, which checkpointed blocks cannot have.
        self._balance_loss = repr(config.balance_loss)
        self.name, self.operations, self.width = name, Operations(), width
        self.pool: MemoryPool
        object.__setattr__(self, "pool", pool)  # not a submodule: the values belong to the root
        for own, parameter in new_layer(config, width, dtype, device).items():
            self.register_parameter(own, parameter)
        for own, buffer in new_buffers(config, dtype, device).items():
            self.register_buffer(own, buffer)
        self._slot_offset = self._new_slot_offset() if config.tables == "separate" else None

    def _new_slot_offset(self) -> Tensor:
        """`first_slot` for graphs, on the layer's device: Dynamo takes a module's numbers for constants, and would
        compile equal blocks one by one. No buffer: what empties, averages or loads buffers would change it.
        """
        like: Any = local_part(self._parameters.get("half_keys"))  # type: ignore[arg-type]
        if like is None or like.is_meta:  # a parameter with numbers may be put in its place
            like = torch.empty(0, device="cpu")
        with torch.inference_mode(False):
            return like.new_full((), self.first_slot, dtype=torch.int32)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        module: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._slot_offset is not None:
            self._slot_offset = self._new_slot_offset()
        if self.pool.counts is not None:
            self.pool.counts.move(local_part(self.query_weight).device)
        return module

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._slot_offset is not None:  # which `torch.load(map_location="meta")` leaves without its number
            self._slot_offset = self._new_slot_offset()

    def reset_parameters(self) -> None:
        """Draws the layer's own parameters anew; the pool's values stay. A collective where they are DTensors."""
        draw_parameters(self)

    def tensors(self, values: Tensor) -> LayerTensors:
        """What the op reads besides the tokens, by the names of its arguments; DTensors where they are sharded."""
        return {"values": values, **{name: getattr(self, name) for name in (*LAYER_PARAMETERS, *LAYER_BUFFERS)}}

    def own_tensors(self, values: Tensor) -> LayerTensors:
        """What this rank has of them."""
        tensors = self.tensors(values)
        return tensors | {name: _own_part(tensors[name]) for name in CUT}

    def forward(self, x: Tensor) -> Tensor:
        table = self.pool.table
        if torch.compiler.is_compiling():
            if is_exporting():
                flush_while_traced(table.name)  # the program is saved with the values, and not with their state
            return self._look_up(x, table.part_in_graphs)
        table.watch_gradient()  # of values of a copy, or that were loaded with assign=True
        if functorch_is_active() or not table.is_stepped(table.part):
            table.flush()  # transforms read the values alone, and `functional_call` may have been given views of them
        if table.sharded is None:
            values = table.part
            return self._look_up_alias(x, values) if is_alias(values) else self._look_up(x, values)
        with named_collectives("forward"):
            return self._look_up(x, table.part)

    def _counts(self) -> HitCounts | None:
        """What this call counts its hits in."""
        counts = self.pool.counts
        if counts is None or functorch_is_active() or is_exporting():
            return None
        return counts if torch.is_grad_enabled() or not counts.for_gradients else None

    def _look_up(self, x: Tensor, values: Tensor) -> Tensor:
        table = self.pool.table
        sharded, in_statistics = table.sharded, self.training and self.query_mean is not None
        offset = self._slot_offset
        by_number = offset is None or not torch.compiler.is_compiling() or is_exporting()  # which graphs never see
        counts = self._counts()
        with without_torch_function():  # the operator is given the state of rows
            return memory_lookup(
                x,
                **self.own_tensors(values),  # type: ignore[arg-type]
                **self.options,
                first_slot=self.first_slot if offset is None or by_number else offset,
                training=self.training,
                balance_loss=float(self._balance_loss) if self.training else 0.0,
                values_grad=table.gradient,
                values_storage=self.pool.config.values_storage,
                shards=None if sharded is None else sharded.shards,
                capacity=None if sharded is None else sharded.capacity(x, in_statistics),
                row_state=table.row_state(values),
                slot_hits=None if counts is None else counts.slot_hits,
                key_hits=None if counts is None else counts.key_hits[self.name],
            )

    @torch.compiler.disable  # graphs read memory as it is stored: see `refuse_alias`
    def _look_up_alias(self, x: Tensor, values: Tensor) -> Tensor:
        """Of values that `functional_call` was given, which share the table's memory; it is flushed."""
        return self._look_up(x, values)

    def get_extra_state(self) -> Tensor:
        return encode_plan(self.pool)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the plan was compared with this model's before anything was loaded."""

    def extra_repr(self) -> str:
        config: Any = self.pool.config
        return (
            f"width={self.width}, slots={config.n_keys**2}, heads={config.heads}, top_k={config.top_k}, "
            f"key_dim={config.key_dim}, value_dim={config.value_dim}, variant={config.variant}, gate={config.gate}, "
            f"query_norm={config.query_norm}"
        )


def _own_part(parameter: Tensor | None) -> Tensor | None:
    """The own columns, as autograd sees them, of what tensor parallelism has cut."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
