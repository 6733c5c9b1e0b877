"""ValueTable: the values that all layers of a memory read, and the state of their rows, in one object; and every one of
the process, and which optimizers hold them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memcompile.common.sites import VALUES_NAME
from memcompile.config import MemoryConfig
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.gather.table_gather import TABLE_LOCK, gather
from memcompile.runtime._torch import at_once, is_exporting, local_part, whole_like, without_torch_function
from memcompile.runtime.table.current_values import refuse_alias, show_current, show_stored, stored
from memcompile.runtime.table.gradient import watch_gradient
from memcompile.runtime.table.row_gradient import as_tensor, row_gradient
from memcompile.runtime.table.row_state import HeldRowState, row_state_arguments
from memcompile.runtime.table.rules import RULES, AdamW, Options, Rule, State
from memcompile.runtime.table.shown_state import ShownState
from memcompile.runtime.table.warnings.unread import tell_unread

if TYPE_CHECKING:
    from memcompile.runtime.distributed.sharding import ShardedValues
    from memcompile.runtime.table.gradient import Replicas


class ValueTable:
    """The values [slots, value_dim] of a memory, as far as this process holds them, and the state of their rows.

    The values are a parameter of the owner, read through it at each use: ``load_state_dict(assign=True)``, ``to_empty``
    and sharding replace parameters. The state of the rows is the table's. `optimizer.state[values]` shows its tensors,
    and what is loaded or put there is taken over in the next step.

    A row that a step does not touch may miss something, which it makes up for when it is touched next. **Who reads the
    table passes `row_state` along with the values**, and reads every row as it is after all steps; who reads the
    values alone calls `flush` first.

    Attributes:
        owner: the module that the values are a parameter of.
        sharded: how the values lie on a mesh; None where each process has all of them.
        replicas: the DDP that the model is in, where the gradient of the values is sparse.
        model: gives the model that was planned, whose names optimizers' states are saved with; None once it is gone.
        flushed: whether all rows were flushed since replicas of the model last agreed on it.
        drawn: the version of the values as they were drawn for the plan; with another one they were written since.
        name: of no other table of the process.
        row_filter: what a step makes of the gradient first, if anything; the table has no weight decay then.
    """

    def __init__(self, owner: nn.Module, config: MemoryConfig) -> None:
        self.owner, self.config = owner, config
        self.model: Callable[[], nn.Module | None] = lambda: None
        self.sharded: ShardedValues | None = None
        self.replicas: Replicas | None = None
        self.flushed = False
        self.row_filter: Callable[[Tensor], Tensor] | None = None
        self.drawn: int | None = None
        self._state: State | None = None
        self._rule: type[Rule] = AdamW
        self._options = AdamW.defaults
        self._stepped: nn.Parameter | None = None  # what the state is of
        self._lay: tuple[torch.device, torch.dtype] | None = None  # where and how, in the last step
        self._shown = ShownState()
        self._optimizer: weakref.finalize | None = None  # runs when the optimizer is gone
        self._row_state = HeldRowState(self)
        self.name = self._row_state.name

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no optimizer and no DDP yet: its rows miss nothing, and have no state."""
        self.flush()
        return {"owner": self.owner, "config": self.config, "sharded": self.sharded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["owner"], state["config"])  # type: ignore[misc]
        self.sharded = state["sharded"]

    # --- the values ----------------------------------------------------------------------------------------

    @property
    def values(self) -> nn.Parameter:
        """The parameter [slots, value_dim]; a DTensor where it is sharded."""
        return getattr(self.owner, VALUES_NAME)  # type: ignore[no-any-return]

    @property
    def part(self) -> nn.Parameter:
        """What this process holds of the values: what layers read, and steps move."""
        return self.values if self.sharded is None else self.sharded.part(self.values)

    @property
    def part_in_graphs(self) -> nn.Parameter:
        """The same for Dynamo, which can neither trace how it is kept the same (that is done before a graph runs) nor
        take a DTensor that has a sparse gradient.
        """
        return self.values if self.sharded is None or self.sharded.own is None else self.sharded.own

    @property
    def grad(self) -> Tensor | None:
        """The gradient of `part`, which is what this process holds of `values.grad`."""
        return None if self.values.grad is None else local_part(self.values.grad)

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        if grad is None:
            self.values.grad = None
        elif self.sharded is None:
            self.values.grad = row_gradient(grad, self.values)
        else:
            self.values.grad = whole_like(self.values, grad)

    @property
    def gradient(self) -> str:
        """What gradient the values get: as planned where they are a parameter of the owner's own, not a parametrization
        or FSDP's view of a shard, and of a dtype that rows are stepped in; else dense.
        """
        fsdp = self.sharded is None and hasattr(type(self.owner), "set_requires_gradient_sync")
        values = self.part_in_graphs if torch.compiler.is_compiling() else self.values
        alone = isinstance(values, nn.Parameter) and not fsdp
        return self.config.gradient if alone and values.dtype is not torch.float16 else "dense"

    def watch_gradient(self) -> None:
        """Sees every gradient that the values get from here on. Idempotent: values that were replaced are watched."""
        self._move_state()
        if self._state is None and self._stepped is not self.part:
            self._step_from_here_on(self.part)
            self._row_state.put(self._no_row_state())
        if self._may_miss:
            show_current(self.values, self)
        watch_gradient(self)

    # --- reading -------------------------------------------------------------------------------------------

    def row_state(self, values: Tensor) -> Sequence[Tensor]:
        """What rows of these values have missed, as `memory_lookup` takes it. Rows of other values than those that are
        stepped have missed nothing: inside `functional_call`, or of a parameter that was replaced.
        """
        refuse_alias(values)
        if is_exporting() or not self.is_stepped(values):
            return ()
        return self._row_state.get()

    def is_stepped(self, values: Tensor) -> bool:
        """Whether these values are the parameter that steps move, not another in its place."""
        return self._stepped is None or values is self._stepped

    def in_graph(self, values: Tensor) -> Tensor:
        """The values for an operation that Dynamo traces: a copy [slots, dim] of the rows as they are when the graph
        runs, through which gradients reach the values.
        """
        if is_exporting():
            flush_while_traced(self.name)
        row_state = self.row_state(values)
        if not row_state:
            return values
        with without_torch_function():
            slots = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
            ones = torch.ones(values.shape[0], 1, device=values.device, dtype=values.dtype)
            return gather(values, slots, ones, row_state, "dense")

    @torch.compiler.disable
    @at_once()  # whatever traces or transforms what the program does
    def flush(self) -> None:
        """Makes all rows do, in place, what they have missed. Who reads the table with its state reads the same numbers
        before and after: autograd need not know, and a backward whose forward came before goes on.
        """
        with TABLE_LOCK:
            self._flush()

    def _flush(self) -> None:
        if self._stepped is None or self._state is None or "last_step" not in self._state:
            return
        self._move_state()
        moved = self._rule(_local(self._stepped), self._state, self._options, self.shards).flush()
        self._put_row_state()
        self.flushed = self.flushed or moved

    # --- stepping ------------------------------------------------------------------------------------------

    @torch.compiler.disable
    @at_once()
    def step(self, optimizer: Optimizer, rule: type[Rule], options: Options) -> None:
        """Steps the rows that the values' gradient touches, by a rule with these options, as a part of the step of the
        optimizer that holds them.
        """
        grad = self.grad
        if grad is not None and _unscaled(optimizer, grad):
            if self.row_filter is not None:
                grad, options = self.row_filter(as_tensor(grad)), options | {"weight_decay": 0.0}
            with TABLE_LOCK:
                rows = self._go_on(optimizer, rule, options)
                try:
                    try:
                        rows.step(as_tensor(grad))
                    finally:
                        self._publish(optimizer, rows.state)
                finally:  # again, where an interrupt came between the lines of the first
                    self._publish(optimizer, rows.state)
                tell_unread(self, rows.state)

    def _publish(self, optimizer: Optimizer, state: State) -> None:
        """Shows the state to who reads rows, and to who looks at the optimizer. Idempotent."""
        self._put_row_state()
        if not self._shown.is_in(optimizer, self.values, state):
            self._shown.show(optimizer, self, state)

    def _go_on(self, optimizer: Optimizer, rule: type[Rule], options: Options) -> Rule:
        """Goes on from the state that the optimizer has for the values: the one that this table showed there last, one
        that was loaded or put there, or none.
        """
        if not self._shown.is_in(optimizer, self.values, self._state) or rule is not self._rule:
            self.flush()
            self._state = self._shown.taken_over(optimizer, self, rule) or rule.new_state(_local(self.part), options)
            self._follow(optimizer)
        assert self._state is not None
        self._step_from_here_on(self.part)
        self._rule, self._options = rule, options
        self._lay = (self.part.device, self.part.dtype)
        rows = rule(_local(self.part), self._state, options, self.shards)
        rows.start()  # moves the state with values that were moved or cast
        return rows

    def _step_from_here_on(self, part: nn.Parameter) -> None:
        """Steps move this parameter, and not the one before it."""
        if self._stepped is not None and self._stepped is not part:
            show_stored(self._stepped)
        self._stepped = part

    def _follow(self, optimizer: Optimizer) -> None:
        """When the optimizer is gone, the values stay as its last step has them, and the state goes. Not when the
        process ends, where tensors can be freed in any order.
        """
        if self._optimizer is not None:
            self._optimizer.detach()
        self._optimizer = weakref.finalize(optimizer, _end, weakref.ref(self))
        self._optimizer.atexit = False

    def _move_state(self) -> None:
        """Moves the state with values that were moved or cast since the last step, in the optimizer too."""
        values, state = self._stepped, self._state
        if values is None or state is None or self._lay == (values.device, values.dtype):
            return
        followed = self._optimizer.peek() if self._optimizer is not None else None
        shown = followed is not None and self._shown.is_in(followed[0], self.values, state)
        self._rule(_local(values), state, self._options).start()
        self._lay = (values.device, values.dtype)
        self._put_row_state()
        if followed is not None and shown:
            self._shown.show(followed[0], self, state)

    def end(self) -> None:
        """The rows are stepped no longer, or by other state: they are flushed, and their state goes."""
        self.flush()
        if self._optimizer is not None:
            self._optimizer.detach()
        self._state, self._shown, self._optimizer = None, ShownState(), None
        self._row_state.put(self._no_row_state())

    @property
    def _may_miss(self) -> bool:
        """Whether rows miss steps by the rule, or by one of those that an optimizer may bring."""
        rule = self.config.values_optimizer
        return self.config.gradient == "sparse" and (rule is None or RULES[rule].misses)

    def _no_row_state(self) -> Sequence[Tensor]:
        """Of a table that no step has touched: as many tensors as of one that is stepped, and of the same kind, for the
        graphs that are compiled before.
        """
        if not self._may_miss or self._stepped is None:
            return ()
        dtype = torch.bfloat16 if self.config.values_state_dtype == "bfloat16" else sum_dtype(self._stepped)
        return row_state_arguments({}, self._stepped.shape[1], self._stepped.device, dtype)

    def _put_row_state(self) -> None:
        before = self._row_state.get()
        misses = self.config.gradient == "sparse" and "last_step" in (self._state or ())  # a dense one touches all rows
        if before or misses:
            self._row_state.put(row_state_arguments(self._state or {}, self.part.shape[1], before=before))

    @property
    def state(self) -> State | None:
        """Of the rows; None before the first step."""
        return self._state

    @property
    def shards(self) -> Shards | None:
        """How the table lies of which `part` is a part."""
        return None if self.sharded is None else self.sharded.shards


def _local(values: Tensor) -> Tensor:
    return local_part(stored(values))


def _end(table: weakref.ref[ValueTable]) -> None:
    alive = table()
    if alive is not None:
        alive.end()


def _unscaled(optimizer: Optimizer, grad: Tensor) -> bool:
    """What a fused optimizer does with the numbers that GradScaler leaves to it; False where the step is skipped."""
    scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if found_inf is not None and bool(found_inf):
        return False
    if scale is not None:
        (grad._values() if grad.is_sparse else grad).div_(scale)
    return True


live_tables: weakref.WeakSet[ValueTable] = weakref.WeakSet()


def is_table(parameter: Tensor) -> bool:
    """Whether a parameter is the table of a planned model, `memory_values`: for code that divides parameters among
    optimizers or groups. A table is a matrix [slots, value_dim] of which tokens read rows, as of an embedding.
    """
    return any(values_of(table) is parameter for table in live_tables)


def values_of(table: ValueTable) -> nn.Parameter | None:
    """The values; None where a deep copy failed half way, which has none, or not even parameters."""
    return table.owner.__dict__.get("_parameters", {}).get(VALUES_NAME)  # type: ignore[no-any-return]


def tables_in(optimizer: Optimizer) -> list[tuple[ValueTable, dict[str, Any]]]:
    """The tables whose values an optimizer holds, each with its group."""
    mine = {id(values_of(table)): table for table in live_tables}
    groups = getattr(optimizer, "param_groups", ())
    return [(mine[id(p)], group) for group in groups for p in group["params"] if id(p) in mine]


@torch.compiler.assume_constant_result
def flush_while_traced(name: str) -> bool:
    """Flushes the table of this name when a program is traced, and not when it runs."""
    for table in live_tables:
        if table.name == name:
            table.flush()
    return True
