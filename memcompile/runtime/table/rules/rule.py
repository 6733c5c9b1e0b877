"""What a rule is, and what the rules share: the start of a step, checks of options, and the steps that rows miss."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from memcompile.errors import OptionError
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.lowering.update.stochastic_rounding import seed_of_step
from memcompile.runtime.table.touched_rows import as_rows, touched_rows

State = dict[str, Any]  # of one table: `step` int, and tensors
Options = dict[str, Any]  # a group of an optimizer

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
COMMON_OPTIONS: Options = {"lr": 1e-3, "weight_decay": 0.0, "maximize": False, "master_weights": False, "seed": 0}
_ROWS = 2**16  # that are flushed in one call: so many numbers of missed steps there may be


class Rule:
    """How the rows of a table are stepped.

    Attributes:
        name: as `values_optimizer` has it.
        defaults: its options, and what they are by default.
        saved: what PyTorch's optimizer of the same mathematics saves, beside `step`.
        misses: whether rows that a step does not touch miss something. Then the state has `last_step` int32 [slots] and
            `history`: see `lowering.gather.table_gather`.

    Args:
        table: [slots, dim]; one of more dimensions is [slots, -1]. In fp16 it is stepped in fp32, and rounded.
        state: of its rows, which steps change.
        options: of its group.
        shards: how the table lies of which this one is a part.
    """

    name: ClassVar[str]
    defaults: ClassVar[Options]
    saved: ClassVar[frozenset[str]] = frozenset()
    misses: ClassVar[bool] = False

    def __init__(self, table: Tensor, state: State, options: Options, shards: Shards | None = None) -> None:
        self.original, self.state, self.options, self.shards = table, state, options, shards
        self.moved = False  # whether rows have moved in the step, or in the part of a flush, that is being done
        self.table = table.float() if table.dtype is torch.float16 else table

    @classmethod
    def check(cls, options: Options) -> None:
        """Raises OptionError for what the rule does not serve."""
        for option in ("lr", "weight_decay"):
            require(option, options[option], float(options[option]) >= 0, "0 or more")
        require("seed", options["seed"], isinstance(options["seed"], int), "an integer")

    @classmethod
    def check_state(cls, parameter: Tensor, state: State) -> None:
        """Raises OptionError for a state that was saved by another optimizer, or with another parameter."""
        rows = ("last_step", "history") if cls.misses else ()
        missing, others = cls.saved - state.keys(), state.keys() - {"step", "master", *rows, *cls.saved}
        if missing or others:
            has = f"no {', '.join(sorted(missing))}, but {', '.join(sorted(state))}" if missing else ", ".join(others)
            raise OptionError(f"the state is of another optimizer than {cls.name}: it has {has}")
        for name in state.keys() - {"step", "history"}:
            own, of_rows = list(parameter.shape), name in ("sum", "last_step")
            shape = list(state[name].shape) if isinstance(state[name], Tensor) else None
            if shape != own and not (of_rows and shape == own[:1]):
                expected = f"one number a row, {own[:1]}" if of_rows else own
                raise OptionError(f"the state is of another parameter: {name}: expected {expected}; got {shape}")

    @classmethod
    def new_state(cls, table: Tensor, options: Options) -> State:
        """The state of a table that no step has touched."""
        state: State = {"step": 0}
        if options["master_weights"] and table.dtype is torch.bfloat16:
            state["master"] = table.detach().float()
        cls(table, state, options).start()
        return state

    def start(self) -> None:
        """Adds to a new state, or to one that PyTorch's optimizer of the same mathematics saved, what it lacks."""

    @torch.no_grad()
    def step(self, grad: Tensor) -> None:
        """One step of the rows that a gradient touches.

        Bit for bit reproducible, whatever the order of a row's duplicates in the gradient.

        Args:
            grad: sparse COO with one sparse dimension, coalesced or not, or dense, which touches all rows.

        Raises:
            ValueError: another layout.
        """
        rows, grad = touched_rows(grad, sum_dtype(self.table))
        count, history = self.state["step"], self.state.get("history")
        header = None if history is None else history[0].clone()
        try:
            self._step(rows, -grad if self.options["maximize"] else grad)
        except BaseException:
            if not self.moved:  # the step is not counted
                self.state["step"] = count
                if history is not None:
                    self.state["history"] = history
                    history[0] = header
            raise
        self._round()
        increment_version(self.original)
        if "history" in self.state:
            self.bound_history()

    @torch.no_grad()
    def flush(self, rows: Tensor | None = None) -> bool:
        """Makes rows do, in place, what they have missed; all of them where `rows` is None. Returns whether any had.

        Autograd is not told: who reads the table with its state reads the same numbers before and after.
        """
        if not self.misses or "last_step" not in self.state:
            return False
        if rows is None and not len(RateHistory(self.state["history"])):  # no step since the last flush
            return False
        last_step, step = self.state["last_step"], self.state["step"]
        missed = (last_step if rows is None else last_step[rows]) != step
        missing = missed.nonzero()[:, 0] if rows is None else rows[missed]
        without_autograd = type(self)(self.table.data, self.state, self.options, self.shards)
        for part in torch.split(missing, _ROWS):
            without_autograd.moved = False
            without_autograd._flush(part)
        self._round()
        if rows is None:  # the history starts again
            history = RateHistory(self.state["history"])
            history.forget()
            self.state["history"] = history.tensor
        return bool(len(missing))

    def _round(self) -> None:
        if self.table is not self.original:
            self.original.data.copy_(self.table)

    def _step(self, rows: Tensor, grad: Tensor) -> None:
        """Counts a step and does it, for distinct rows int64 [n] and their gradient [n, dim] in the dtype of sums."""
        raise NotImplementedError

    def _flush(self, rows: Tensor) -> None:
        """Makes rows int64 [n] do the steps that they have missed."""
        raise NotImplementedError

    # --- what rules share ----------------------------------------------------------------------------------------

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rate and the weight decay."""
        return float(self.options["lr"]), float(self.options["weight_decay"])

    def tables(self) -> tuple[Tensor, Tensor | None]:
        """The parameter [slots, dim], and its fp32 master, if there is one."""
        return as_rows(self.table), as_rows(self.state["master"]) if "master" in self.state else None

    def seed(self) -> int:
        """Of the step that is being done; ranks with parts of one table round apart."""
        return seed_of_step(self.options["seed"] + (self.shards.rank if self.shards else 0), self.state["step"])

    def move(self, rows: Tensor, call: Callable[[], Any]) -> None:
        """Calls the operator that moves rows int64 [n]; they are as of the last step then, whatever comes in between.

        Args:
            call: of the operator alone, which returns None: it either moves the rows or raises.
        """
        try:
            try:
                self.moved = call() is None
            finally:
                self._arrive(rows)
        finally:
            self._arrive(rows)  # again, where an interrupt came between the lines of the first

    def _arrive(self, rows: Tensor) -> None:
        if self.moved and "last_step" in self.state:
            # `data`: a flush is nothing that autograd should know of
            self.state["last_step"].data.index_fill_(0, rows, self.state["step"])

    def start_misses(self, eps: float = 0.0) -> None:
        """Adds what tells the steps that rows have missed, where it is missing: every row is as of now."""
        state, device = self.state, self.table.device
        if "last_step" not in state:
            state["last_step"] = torch.full((self.table.shape[0],), state["step"], dtype=torch.int32, device=device)
            state["history"] = RateHistory.new(state["step"], eps).tensor
        else:
            state["last_step"], state["history"] = state["last_step"].to(device), state["history"].cpu()

    def record(self, lr: float, factors: list[float]) -> None:
        """Adds the step that is being done to the history."""
        history = RateHistory(self.state["history"])
        history.record(lr, factors)
        self.state["history"] = history.tensor

    def bound_history(self) -> None:
        """Flushes all rows when the history has more than max(1024, slots) entries: one row a step on average."""
        if len(RateHistory(self.state["history"])) > max(1024, self.table.shape[0]):
            self.flush()


def require(option: str, value: Any, holds: bool, expected: str) -> None:
    """Raises OptionError, naming the option, unless it holds."""
    if not holds:
        raise OptionError(f"{option}: expected {expected}; got {value}")


def require_decay_below_1(options: Options) -> None:
    """Raises OptionError where a step would turn a row around."""
    lr, decay = float(options["lr"]), float(options["weight_decay"])
    require("weight_decay", decay, lr * decay < 1, f"lr * weight_decay below 1, with lr = {lr}")
