"""RowOptimizer: a `torch.optim.Optimizer` around a rule of `runtime.table.rules`, for tables of any model."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memcompile.errors import OptionError
from memcompile.runtime.optimizer_state import load_exactly
from memcompile.runtime.table.rules.adamw import forget
from memcompile.runtime.table.rules.rule import DTYPES, Options, Rule, flush_rows, new_state, require, step_rows
from memcompile.runtime.table.touched_rows import distinct_rows


class RowOptimizer(Optimizer):
    """A step updates the rows [slots, dim] that a gradient touches; a parameter of more dimensions is [slots, -1].

    Gradients are sparse COO in dim 0 (`nn.Embedding(sparse=True)`), coalesced or not, or dense, which touches all rows.
    An empty gradient is a step; a gradient of None is none. A step is bit for bit reproducible, and does not depend on
    the order of duplicates.

    Options of a group that all of them take:

    * maximize: steps along the gradient.
    * master_weights: bf16 parameters are the nearest to fp32 masters, which are kept in the state. Otherwise they
      are rounded stochastically.
    * seed: of what is rounded stochastically, together with the number of the step.

    Parameters are float32, float64 or bfloat16 and contiguous.
    """

    rule: Rule

    def __init__(self, params: Any, options: Options) -> None:
        super().__init__(params, self.rule.defaults | options)

    def add_param_group(self, param_group: Options) -> None:
        """As `torch.optim.Optimizer.add_param_group`.

        Raises:
            OptionError: an option's value, or a parameter, is not served.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except OptionError:
            del self.param_groups[-1]
            raise

    def _check(self, group: Options) -> None:
        self.rule.check(group)
        for parameter in group["params"]:
            _check_parameter(parameter, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. A closure is run first, with gradients enabled, and its loss returned.

        Raises:
            OptionError: an option's value is not served; nothing has moved then.
            ValueError: a gradient has another layout than sparse COO in dim 0 or dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.rule.check(group)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        _check_parameter(parameter, group)
                        self.state[parameter] = new_state(parameter, self.rule, group)
                    step_rows(parameter, self.state[parameter], self.rule, parameter.grad, group)
        return loss

    @torch.no_grad()
    def flush(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Makes rows do, in place, the steps that they have missed: call it before the parameter is read.

        Args:
            parameter: one of this optimizer's.
            rows: int32 or int64, of any shape, repeats allowed: the rows that are about to be read. None is all.

        Raises:
            ValueError: the parameter is not in this optimizer.
            IndexError: a row is not in the table.
        """
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            raise ValueError(f"the parameter {list(parameter.shape)} is not in this optimizer")
        if rows is not None:
            rows = distinct_rows(rows.detach().to(parameter.device), parameter.shape[0])
        state = self.state.get(parameter)
        if state and flush_rows(parameter, state, self.rule, group, rows):
            torch.autograd.graph.increment_version(parameter)
        if state and rows is None:
            forget(state)

    def catch_up(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """The former name of :meth:`flush`."""
        warnings.warn("catch_up of optimizers for rows is flush now", FutureWarning, stacklevel=2)
        self.flush(parameter, rows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, with every tensor in the dtype that it was saved in.

        The state of PyTorch's optimizer of the same mathematics may be loaded too: dense training goes on by rows.

        Raises:
            OptionError: an option that was saved is not served, or a state is of another optimizer.
        """
        load_exactly(self, super().load_state_dict, state_dict)
        for group in self.param_groups:
            self._check(group)
            for parameter in group["params"]:
                if self.state.get(parameter):
                    complete_state(parameter, self.state[parameter], self.rule, group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.rule.defaults.items():
                group.setdefault(option, value)


def complete_state(table: Tensor, state: dict[str, Any], rule: Rule, options: Options) -> None:
    """Makes of a state that was saved, by a rule or by PyTorch's optimizer of the same mathematics, one to go on from.

    Raises:
        OptionError: the state is of another optimizer.
    """
    missing = rule.saved - state.keys()
    if missing:
        raise OptionError(
            f"the state is of another optimizer than {rule.name}: it has no {', '.join(sorted(missing))}, but "
            f"{', '.join(sorted(state))}"
        )
    state["step"] = int(state.get("step", 0))  # PyTorch's is a tensor, and SGD has none
    rule.start(table, state, options)


def _check_parameter(parameter: Tensor, group: Options) -> None:
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        raise OptionError(
            "params: DTensors are not stepped by rows here. The sharded table of a memory is, in torch.optim.AdamW or "
            "any other optimizer, by the rule that values_optimizer names"
        )
    require("params", parameter.dtype, parameter.dtype in DTYPES, "float32, float64 or bfloat16")
    require("params", shape, parameter.dim() > 0 and parameter.is_contiguous(), "a contiguous [slots, ...]")
    require("params", parameter.layout, parameter.layout is torch.strided, "dense parameters")
    given = group.get("state_dtype")
    require("state_dtype", given, given is None or parameter.dtype is not torch.float64, "None for float64 parameters")
