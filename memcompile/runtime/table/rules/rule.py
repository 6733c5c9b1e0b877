"""What a rule is, and what the rules share: the start of a step, checks of options, and Adam's moments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from memcompile.errors import OptionError
from memcompile.lowering.cpu.pages import advise_huge_pages
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.update.stochastic_rounding import seed_of_step
from memcompile.runtime.table.touched_rows import as_rows, touched_rows

State = dict[str, Any]  # of one table: `step` int, and tensors
Options = dict[str, Any]  # a group of an optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
COMMON_OPTIONS: Options = {"maximize": False, "master_weights": False, "seed": 0}


def _nothing(*args: Any) -> None:
    """For rules in which a row that a step does not touch stands still."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the rows of a table [slots, dim] are stepped.

    Attributes:
        name: as `values_optimizer` has it.
        defaults: its options, and what they are by default.
        check: `check(options)` raises OptionError for what the rule does not serve.
        start: `start(table, state, options)` adds to a new state, or to one that PyTorch's optimizer of the same
            mathematics saved, what it lacks.
        step: `step(table, state, rows, grad, options, shards)` counts a step and does it, for distinct rows int64 [n]
            and their gradient [n, dim] in the dtype of sums.
        flush: `flush(table, state, rows, options, shards)` makes rows int64 [n] do the steps that they have missed.
        saved: what PyTorch's optimizer of the same mathematics saves, beside `step`.
        misses: whether rows that a step does not touch miss something. Then the state has `last_step` int32 [slots] and
            `history`: see `lowering.gather.table_gather`.
    """

    name: str
    defaults: Options
    check: Callable[[Options], None]
    start: Callable[[Tensor, State, Options], None]
    step: Callable[[Tensor, State, Tensor, Tensor, Options, Shards | None], None]
    flush: Callable[[Tensor, State, Tensor, Options, Shards | None], None] = _nothing
    saved: frozenset[str] = frozenset()
    misses: bool = False


def new_state(table: Tensor, rule: Rule, options: Options) -> State:
    """The state of a table that no step has touched."""
    state: State = {"step": 0}
    if options["master_weights"] and table.dtype is torch.bfloat16:
        state["master"] = table.detach().float()
    rule.start(table, state, options)
    return state


@torch.no_grad()
def step_rows(
    table: Tensor, state: State, rule: Rule, grad: Tensor, options: Options, shards: Shards | None = None
) -> None:
    """One step of the rows that a gradient touches; a table of more dimensions is [slots, -1].

    Bit for bit reproducible, whatever the order of a row's duplicates in the gradient.

    Args:
        grad: sparse COO with one sparse dimension, coalesced or not, or dense, which touches all rows.

    Raises:
        ValueError: another layout.
    """
    rows, grad = touched_rows(grad, sum_dtype(table))
    rule.step(table, state, rows, -grad if options["maximize"] else grad, options, shards)
    increment_version(table)


@torch.no_grad()
def flush_rows(
    table: Tensor,
    state: State,
    rule: Rule,
    options: Options,
    rows: Tensor | None = None,
    shards: Shards | None = None,
) -> bool:
    """Makes rows do, in place, what they have missed; all of them where `rows` is None. Returns whether any had.

    Autograd is not told: who reads the table with its state reads the same numbers before and after.
    """
    if not rule.misses or "last_step" not in state:
        return False
    table = table.data
    last_step, step = state["last_step"], state["step"]
    missed = (last_step if rows is None else last_step[rows]) != step
    missing = missed.nonzero()[:, 0] if rows is None else rows[missed]
    for part in torch.split(missing, _ROWS):
        rule.flush(table, state, part, options, shards)
    return bool(len(missing))


_ROWS = 2**16  # that are flushed in one call: so many numbers of missed steps there may be


def tables(table: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
    """The parameter [slots, dim], and its fp32 master, if there is one."""
    return as_rows(table), as_rows(state["master"]) if "master" in state else None


def start_moments(table: Tensor, state: State, options: Options) -> None:
    """Adds Adam's moments where they are missing, zeros in huge pages where there are any: rows are read at random."""
    dtype = options.get("state_dtype") or sum_dtype(table)
    for name in MOMENTS:
        if name in state:
            state[name] = state[name].to(table.device, dtype).contiguous()
            continue
        state[name] = torch.empty_like(table, dtype=dtype, memory_format=torch.contiguous_format)
        advise_huge_pages(state[name])
        state[name].zero_()


def step_seed(state: State, options: Options, shards: Shards | None) -> int:
    """The seed of the step that is being done; ranks with parts of one table round apart."""
    return seed_of_step(options["seed"] + (shards.rank if shards else 0), state["step"])


def check_common(options: Options) -> None:
    """Raises OptionError unless the options that all rules take can be served."""
    for option in ("lr", "weight_decay"):
        require(option, options[option], float(options[option]) >= 0, "0 or more")
    require("seed", options["seed"], isinstance(options["seed"], int), "an integer")


def check_moments(options: Options) -> None:
    """Raises OptionError unless 0 <= beta < 1 for both, eps is positive, and moments can have their `state_dtype`."""
    betas = options["betas"]
    require("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    require("eps", options["eps"], options["eps"] > 0, "positive: rows without gradients have exp_avg_sq = 0")
    given = options["state_dtype"]
    require("state_dtype", given, given in (None, torch.float32, torch.bfloat16), "None, float32 or bfloat16")


def require(option: str, value: Any, holds: bool, expected: str) -> None:
    """Raises OptionError, naming the option, unless it holds."""
    if not holds:
        raise OptionError(f"{option}: expected {expected}; got {value}")
