"""ValuesStepper: steps the values of a pool by rows, as a part of the user's own optimizer.

The values are in that optimizer's groups but while its `step()` runs (`steps.py`). A row optimizer steps them right
after it, with the options that their group has by then, and their own learning rate. Their state is in
`optimizer.state`, in the layout of the PyTorch optimizer of the same mathematics: so one checkpoint holds it, and
dense and sparse training read each other's.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memcompile.errors import OptionError
from memcompile.runtime._torch import at_once, local_part
from memcompile.runtime.adoption import live_optimizers
from memcompile.runtime.counterparts import are_alike, rate_like, row_optimizer_in
from memcompile.runtime.fused_update import FusedUpdate
from memcompile.runtime.optim import RowOptimizer
from memcompile.runtime.pool import MemoryPool, live_pools
from memcompile.runtime.values_gradient import watch_gradient

log = logging.getLogger(__name__)

_saving: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that bring rows up to date before they are saved
_INNER = "_memcompile_inner"  # marks the row optimizers of steppers, which are no user's
_OWN_STATE = ("last_step", "rates", "changes", "eps")  # what rows have missed: nothing, in what is saved


def stepper_in(optimizer: Optimizer, pool: MemoryPool, kind: type[RowOptimizer]) -> ValuesReader:
    """Who steps the values of a pool in this optimizer; from here on nobody else does."""
    if pool.stepper is None or not pool.stepper.is_for(pool, optimizer, kind):
        release(pool)
        own = isinstance(optimizer, RowOptimizer)
        pool.stepper = ValuesReader(pool, optimizer) if own else ValuesStepper(pool, optimizer, kind)
    return pool.stepper


def stepper_of(values: Tensor, needed: bool = False) -> ValuesReader | None:
    """Who steps the rows of this table, a planned model's values or a view of all of them; None if nobody does yet.

    Args:
        needed: an optimizer that holds the values and has made no step yet is looked for.
    """
    for pool in live_pools():
        stepper = pool.stepper
        if stepper is None and needed and pool.table.data_ptr() == values.data_ptr():
            stepper = _find_stepper(pool)
        if stepper is not None and stepper.values.data_ptr() == values.data_ptr() and not values.is_meta:
            return stepper
    return None


def _find_stepper(pool: MemoryPool) -> ValuesReader | None:
    found: list[tuple[Optimizer, type[RowOptimizer]]] = []
    for optimizer in live_optimizers():
        for group in optimizer.param_groups:
            if any(p is pool.values for p in group["params"]) and not hasattr(optimizer, _INNER):
                kind = row_optimizer_in(optimizer, group, pool.config)
                found += [] if kind is None else [(optimizer, kind)]
    if len(found) > 1:
        names = ", ".join(type(optimizer).__name__ for optimizer, _ in found)
        raise OptionError(
            f"values_grad='fused' updates the memory's values in the backward, and does not know by which of the "
            f"optimizers that hold them: {names}. Delete the others, or use values_grad='sparse'"
        )
    return stepper_in(found[0][0], pool, found[0][1]) if found else None


def release(pool: MemoryPool) -> None:
    """Somebody else steps the rows from here on: they are brought up to date first."""
    if pool.stepper is not None:
        pool.stepper.end()
        pool.stepper = None


class ValuesReader:
    """Reads the values of one pool as they are by now, for `lowering.sparse_table`.

    Attributes:
        values: what is stepped: the parameter, or this rank's part of it. A model may hold another by now, after
            `load_state_dict(assign=True)` or inside `functional_call`.
        held: the parameter, as the user's optimizer holds it.
        rows: the row optimizer that steps the values: here the user's own.
        moved_all: whether all rows were brought up to date, since replicas of the model last did so too.
    """

    rows: RowOptimizer
    moved_all = False

    def __init__(self, pool: MemoryPool, optimizer: Optimizer) -> None:
        self.values, self.held = pool.table, pool.values
        self._pool = weakref.ref(pool)
        self._optimizer = weakref.ref(optimizer)
        if optimizer not in _saving:
            _saving.add(optimizer)
            optimizer.register_state_dict_pre_hook(catch_up_values_of)
        self._finalizer = weakref.finalize(optimizer, _retire, weakref.ref(pool), weakref.ref(self))
        self._finalizer.atexit = False
        watch_gradient(pool)
        self._start(optimizer)

    def _start(self, optimizer: Optimizer) -> None:
        assert isinstance(optimizer, RowOptimizer)
        self.rows = optimizer

    @property
    def pool(self) -> MemoryPool:
        pool = self._pool()
        assert pool is not None, "a stepper lives in its pool"
        return pool

    @property
    def optimizer(self) -> Optimizer | None:
        """The user's; None once it is gone."""
        return self._optimizer()

    def is_for(self, pool: MemoryPool, optimizer: Optimizer, kind: type[RowOptimizer]) -> bool:
        """Whether this steps the values that a pool has now in this optimizer, by this class."""
        same = self.values is pool.table and self.held is pool.values
        return same and self.optimizer is optimizer and type(self.rows) is kind

    def gather(self, slots: Tensor, weights: Tensor) -> Tensor:
        """As `weighted_gather`, of the rows as they are by now."""
        self._take_over_state()
        return self.rows.current_gather(self.values, slots, weights)

    def dot(self, slots: Tensor, grad: Tensor) -> Tensor:
        """As `gather_dot`, of the rows as they are by now."""
        self._take_over_state()
        return self.rows.current_dot(self.values, slots, grad)

    def end(self) -> None:
        """Brings the rows up to date for who comes next."""
        self._finalizer.detach()
        self.catch_up()

    def take_factors(self, slots: Tensor, weights: Tensor, grad: Tensor) -> None:
        """Takes what one layer adds to a fused update."""
        raise OptionError(
            f"values_grad='fused' updates the values within an optimizer of the rest, and {type(self.rows).__name__} "
            f"was given them itself: use values_grad='sparse'"
        )

    def update(self) -> None:
        """Does the fused update, when all layers have added to it."""

    @at_once()  # in an evaluation, or when the optimizer is collected, whenever that is
    def catch_up(self) -> None:
        """Brings all rows up to date with the last step. Those who read them have seen them so: autograd need not know,
        and a backward whose forward came before goes on.
        """
        self._take_over_state()
        self.rows.catch_up(self.values, tell_autograd=False)
        self.moved_all = True

    def _take_over_state(self) -> None:
        """Nothing: the state is the row optimizer's own."""


class ValuesStepper(ValuesReader):
    """Steps the values of one pool as a part of the user's optimizer, by rows.

    Attributes:
        rows: the row optimizer; it has the values alone.
    """

    def __init__(self, pool: MemoryPool, optimizer: Optimizer, kind: type[RowOptimizer]) -> None:
        self._kind, self._dtype = kind, pool.values.dtype
        self._fused = FusedUpdate()
        self._published: dict[str, Any] | None = None
        super().__init__(pool, optimizer)
        log.info("%s steps the memory's values by rows, in %s.step()", kind.__name__, type(optimizer).__name__)

    def _start(self, optimizer: Optimizer) -> None:
        dtype = self.pool.config.values_state_dtype
        takes_dtype = "state_dtype" in inspect.signature(self._kind).parameters
        options: dict[str, Any] = {"state_dtype": torch.bfloat16} if takes_dtype and dtype == "bfloat16" else {}
        self.rows = self._kind([self.values], **options)
        if self.pool.sharded is not None:
            self.rows.shards = self.pool.sharded.shards
        setattr(self.rows, _INNER, True)

    @property
    def group(self) -> dict[str, Any]:
        """The group of the user's optimizer that the values are in."""
        optimizer, held = self.optimizer, self.held
        assert optimizer is not None
        return next(g for g in optimizer.param_groups if any(p is held for p in g["params"]))

    def take_factors(self, slots: Tensor, weights: Tensor, grad: Tensor) -> None:
        self._fused.take(slots, weights, grad)

    def update(self) -> None:
        def step(slots: Tensor, weights: Tensor, grad: Tensor) -> None:
            self._step(lambda: self.rows.step_by_factors(self.values, slots, weights, grad))

        self._fused.finish(self.pool.root.parameters(), step)

    def end(self) -> None:
        if self._fused.waits_for_step:
            raise OptionError(
                "values_grad='fused' has updated the memory's values by another optimizer than the one that steps now. "
                "Use values_grad='sparse'"
            )
        super().end()

    def before_step(self) -> None:
        """The user's optimizer is about to step the rest."""
        if self.optimizer is not None and self.pool.config.gradient == "fused":
            self._fused.before_step(self.optimizer)

    @torch.compiler.disable  # how many rows there are is not for graphs
    def step(self) -> None:
        """Steps the rows of the values' gradient; the user's optimizer has stepped the rest."""
        optimizer, grad = self.optimizer, self.pool.table_grad
        if optimizer is not None and grad is not None and _unscaled(optimizer, grad):
            self._step(lambda: self.rows.step_by(self.values, grad))

    def _step(self, step: Callable[[], Any]) -> None:
        """A step of the row optimizer with the options that the values' group has now, and their own learning rate."""
        optimizer = self.optimizer
        assert optimizer is not None
        self._take_over_state()
        group, own = self.group, self.rows.param_groups[0]
        shared = own.keys() & group.keys() - {"params"}
        own.update({name: group[name] for name in shared if are_alike(group[name], self.rows.defaults.get(name))})
        if self.pool.config.values_lr is not None:
            own["lr"] = rate_like(group["lr"], self.pool.config.values_lr)
        self.rows.check(own)
        step()
        self._publish(optimizer)

    @at_once()
    def _take_over_state(self) -> None:
        """Goes on from what `optimizer.state` holds: a checkpoint may have been loaded, or the state dropped."""
        optimizer, values = self.optimizer, self.values
        if optimizer is None:
            return
        state = optimizer.state.get(self.held) or None
        cast, self._dtype = values.dtype is not self._dtype, values.dtype  # by model.to(dtype)
        if state is self._published:
            if cast and self.rows.state.get(values):
                self.rows.adopt(values, self.rows.state[values])
                self._publish(optimizer)
            return
        self._published = None
        self.rows.catch_up(values, tell_autograd=False)  # with the steps that were done
        self.rows.state.pop(values, None)
        own = None if state is None else {name: local_part(value) for name, value in state.items()}
        self._check_parts(own or {})
        if own is not None and self.rows.knows(values, own):
            self.rows.adopt(values, own)
            self._publish(optimizer)
        else:  # none, or one that another optimizer's step began with
            self._published = state

    def _check_parts(self, state: dict[str, Any]) -> None:
        """Raises OptionError for the state of a whole table where this rank has a part of it."""
        for name in self.rows.saved & state.keys():
            if self.pool.sharded is not None and state[name].shape != self.values.shape:
                raise OptionError(
                    f"the optimizer's state of the memory's values, {name} {list(state[name].shape)}, is not that of "
                    f"this rank's part, {list(self.values.shape)}: load trainings that were sharded otherwise, or not "
                    f"at all, by memcompile.checkpoint"
                )

    def _publish(self, optimizer: Optimizer) -> None:
        """Shows the state in the user's optimizer: the same tensors, and the number of steps as PyTorch has it."""
        own = self.rows.state[self.values]
        shown = {name: self._whole(value) for name, value in own.items() if name not in _OWN_STATE}
        shown["step"] = torch.tensor(float(own["step"]))
        optimizer.state[self.held] = self._published = shown

    def _whole(self, value: Any) -> Any:
        """What the user's optimizer has in the place of an entry of the state: DTensors where the values are one."""
        sharded = self.pool.sharded
        return sharded.whole(value, self.held) if sharded is not None and isinstance(value, Tensor) else value


def _unscaled(optimizer: Optimizer, grad: Tensor) -> bool:
    """What a fused optimizer does with the numbers that GradScaler leaves to it; False where the step is skipped."""
    scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if found_inf is not None and bool(found_inf):
        return False
    if scale is not None:
        (grad._values() if grad.is_sparse else grad).div_(scale)
    return True


def catch_up_values_of(optimizer: Optimizer) -> None:
    """Brings the values that are stepped in an optimizer up to date: it is about to be saved, which does not save what
    they have missed.
    """
    for pool in live_pools():
        if pool.stepper is not None and pool.stepper.optimizer is optimizer:
            pool.catch_up()


def _retire(pool_of: weakref.ref[MemoryPool], stepper_of: weakref.ref[ValuesReader]) -> None:
    """The user's optimizer is gone: the values stay as its last step has them, and its state goes."""
    pool, stepper = pool_of(), stepper_of()
    if pool is not None and stepper is not None and pool.stepper is stepper:
        stepper.catch_up()
        pool.stepper = None
