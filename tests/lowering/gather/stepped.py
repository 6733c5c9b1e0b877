"""Tables in the middle of a training: values, the state of their rows as operators take it, and the flushed table."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from memcompile.runtime.table.row_state import row_state_arguments
from memcompile.runtime.table.rules import MOMENTS, RULES, Options, Rule, State
from tests.runtime.optim.sequences import SCHEDULES, Sequence

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MISSING = sorted(name for name, rule in RULES.items() if rule.misses)


@dataclasses.dataclass
class Stepped:
    """A table that a rule has stepped, and what it misses."""

    values: Tensor  # [slots, dim]
    state: State
    rule: type[Rule]
    options: Options

    @property
    def row_state(self) -> list[Tensor]:
        return list(row_state_arguments(self.state, self.values.shape[1]))

    def flushed(self, dtype: torch.dtype) -> Tensor:
        """A copy, flushed in `dtype`; in fp64 with the numbers that the table and its state have."""
        table = self.values.to(dtype, copy=True)
        state = {n: v.clone() if isinstance(v, Tensor) else v for n, v in self.state.items() if n != "master"}
        if dtype is torch.float64:
            state |= {name: state[name].double() for name in MOMENTS if name in state}
        self.rule(table, state, self.options).flush()
        return table


def stepped(
    rule: str = "row_adamw",
    dtype: torch.dtype = torch.float32,
    steps: int = 40,
    slots: int = 11,
    dim: int = 6,
    schedule: str = "constant",
    weight_decay: float = 0.1,
    seed: int = 0,
    **more: Any,
) -> Stepped:
    """A table after `steps` steps. One of fp16 is stepped in fp32 and rounded, as a `ValueTable` does."""
    sequence = Sequence(seed, steps, slots, dim, schedule, weight_decay)
    options = {**RULES[rule].defaults, "weight_decay": weight_decay, **more}
    wide = torch.float32 if dtype is torch.float16 else dtype
    table = sequence.initial(wide)
    state = RULES[rule].new_state(table, options)
    for grad, lr in sequence.gradients(wide):
        options["lr"] = lr
        RULES[rule](table, state, options).step(grad)
    return Stepped(table.to(dtype), state, RULES[rule], options)


def tables() -> st.SearchStrategy[Stepped]:
    """Of every rule whose rows may miss something, every dtype, and any history; some before the first step."""
    drawn = {
        "rule": st.sampled_from(MISSING),
        "dtype": st.sampled_from(DTYPES),
        "steps": st.integers(0, 60),
        "slots": st.integers(2, 40),
        "dim": st.sampled_from([1, 3, 16, 37]),
        "schedule": st.sampled_from(sorted(SCHEDULES)),
        "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
        "seed": st.integers(0, 2**32),
        "master_weights": st.booleans(),
    }
    return st.builds(stepped, **drawn) | st.builds(_in_half_moments, **{**drawn, "rule": st.just("row_adamw")})


def _in_half_moments(dtype: torch.dtype, **drawn: Any) -> Stepped:
    return stepped(dtype=dtype, state_dtype=None if dtype is torch.float64 else torch.bfloat16, **drawn)
