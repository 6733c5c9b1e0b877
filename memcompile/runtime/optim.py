"""Optimizers for tables of which a step touches few rows: their cost is that of the rows touched, not of the table.

Each is a `torch.optim.Optimizer` around a rule of `runtime.table.rules`, for tables of any model.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memcompile.errors import OptionError
from memcompile.runtime.optimizer_state import load_exactly
from memcompile.runtime.table import rules
from memcompile.runtime.table.rules import Options, Rule
from memcompile.runtime.table.rules.rule import DTYPES, require
from memcompile.runtime.table.touched_rows import check_layout


class RowOptimizer(Optimizer):
    """A step updates the rows [slots, dim] that a gradient touches; a parameter of more dimensions is [slots, -1].

    Gradients are sparse COO in dim 0 (`nn.Embedding(sparse=True)`), coalesced or not, or dense, which touches all rows.
    An empty gradient is a step; a gradient of None is none. A step is bit for bit reproducible, and does not depend on
    the order of duplicates. Parameters are float32, float64 or bfloat16 and contiguous.

    Args:
        params: parameters or groups of them.
        options: of the rule.
        maximize: steps along the gradient.
        master_weights: bf16 parameters are the nearest to fp32 masters, which are kept in the state. Otherwise they
            are rounded stochastically.
        seed: of what is rounded stochastically, together with the number of the step.

    Raises:
        OptionError: an option's value, or a parameter, is not served.
    """

    rule: type[Rule]

    def __init__(
        self,
        params: Iterable[Any],
        options: Options,
        *,
        maximize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        common = {"maximize": maximize, "master_weights": master_weights, "seed": seed}
        super().__init__(params, self.rule.defaults | options | common)

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
            ValueError: a gradient has another layout than sparse COO in dim 0 or dense; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.rule.check(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    check_layout(parameter.grad)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        _check_parameter(parameter, group)
                        self.state[parameter] = self.rule.new_state(parameter, group)
                    self.rule(parameter, self.state[parameter], group).step(parameter.grad)
        return loss

    @torch.no_grad()
    def flush(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Makes rows do, in place, the steps that they have missed: call it before the parameter is read.

        Args:
            parameter: one of this optimizer's.
            rows: int32 or int64, of any shape, repeats allowed: the rows that are about to be read. None is all.

        Raises:
            OptionError: the parameter is not in this optimizer, or rows are no integers.
            IndexError: a row is not in the table.
        """
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            raise OptionError(f"the parameter {list(parameter.shape)} is not in this optimizer")
        if rows is not None:
            require("rows", rows.dtype, rows.dtype in (torch.int32, torch.int64), "int32 or int64")
            rows = torch.unique(rows.detach().to(parameter.device).reshape(-1).long())
            if len(rows) and (rows[0] < 0 or rows[-1] >= parameter.shape[0]):
                raise IndexError(f"rows {int(rows[0])} to {int(rows[-1])} of a table of {parameter.shape[0]}")
        state = self.state.get(parameter)
        if state and self.rule(parameter, state, group).flush(rows):
            torch.autograd.graph.increment_version(parameter)

    def catch_up(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """The former name of :meth:`flush`."""
        warnings.warn("catch_up of optimizers for rows is flush now", FutureWarning, stacklevel=2)
        self.flush(parameter, rows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, with every tensor in the dtype that it was saved in.

        The state of PyTorch's optimizer of the same mathematics may be loaded too: dense training goes on by rows.

        Raises:
            OptionError: an option that was saved is not served, or a state is of another optimizer, or of a parameter
                of another size. Nothing has changed then.
        """
        handle = self.register_load_state_dict_pre_hook(_check_saved)  # after those that may change the state dict
        try:
            load_exactly(self, super().load_state_dict, state_dict)
        finally:
            handle.remove()
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    state["step"] = int(state.get("step", 0))  # PyTorch's is a tensor, and SGD has none
                    self.rule(parameter, state, group).start()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.rule.defaults.items():
                group.setdefault(option, value)


def _check_saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, RowOptimizer)
    rule, groups = optimizer.rule, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        return  # PyTorch says so
    own = {"betas", "eps"} & rule.defaults.keys()  # which PyTorch's optimizer of the same mathematics has, too
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        if lacking := own - saved.keys():
            raise OptionError(
                f"the state is of another optimizer than {rule.name}: it has no {', '.join(sorted(lacking))}"
            )
        optimizer._check({**rule.defaults, **saved, "params": group["params"]})
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            state = {name: v for name, v in state_dict["state"].get(number, {}).items() if v is not None}
            if state:
                rule.check_state(parameter, state)


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


class RowAdamW(RowOptimizer):
    """`torch.optim.AdamW` (Loshchilov & Hutter, arXiv 1711.05101), to rounding, for every row.

    A row that a step does not touch stays as it is, and does all the steps that it missed, under the learning rates,
    weight decays and betas that they had, when it is touched next or flushed (`lowering.update.skipped_steps`). So
    before rows are read, in a forward, an evaluation or a checkpoint of the model, call `flush`.

    State of a parameter: `exp_avg` and `exp_avg_sq` of its shape, `last_step` int32 [slots], `step`, `master` fp32 if
    asked for, and `history`, float64, of the rates: one entry a change, at most max(1024, slots) of them. With more,
    or when eps has changed, all rows are flushed; every other step but the first costs O(touched rows).

    Args:
        lr: learning rate, a number or a tensor of one; any scheduler may change it.
        betas: with beta1**2 < beta2, so that a row's steps without gradients die out. Schedulers may change them.
        eps: positive.
        weight_decay: decoupled; lr * weight_decay < 1.
        amsgrad: refused. Its denominator is a maximum over all steps, and a row would have to do each.
        state_dtype: of the moments. None is float32, float64 for float64 parameters; bfloat16 is rounded
            stochastically.
        params, maximize, master_weights, seed: see `RowOptimizer`.
    """

    rule = rules.AdamW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        if amsgrad:
            raise OptionError("amsgrad: a maximum over skipped steps cannot be made up for; use amsgrad=False")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, options, maximize=maximize, master_weights=master_weights, seed=seed)


class LazyAdam(RowOptimizer):
    """`torch.optim.SparseAdam`, to rounding, with weight decay by choice.

    A row's moments decay, and it moves and decays, in the steps that touch it; the bias correction counts all steps. No
    row misses anything.

    State of a parameter: `exp_avg` and `exp_avg_sq` of its shape, `step`, and `master` fp32 if asked for.

    Args:
        lr: learning rate, a number or a tensor of one.
        betas, eps: as in `torch.optim.SparseAdam`; eps is positive and added to sqrt(exp_avg_sq) before the bias
            correction.
        weight_decay: decoupled, as in AdamW, and of touched rows alone.
        state_dtype: of the moments, as of `RowAdamW`.
        params, maximize, master_weights, seed: see `RowOptimizer`.
    """

    rule = rules.LazyAdam

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, options, maximize=maximize, master_weights=master_weights, seed=seed)


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with the sum, over a row's steps, of the mean of its gradient's squares: FBGEMM's
    `EXACT_ROWWISE_ADAGRAD`.

        sum[row] += mean(g**2);  x -= lr / (sqrt(sum[row]) + eps) * g

    A row is updated once a step, by its summed gradient. With one number a row it is `torch.optim.Adagrad`. Rows that a
    step does not touch stay as they are, weight decay included, as in FBGEMM.

    State of a parameter: `sum` [slots], fp32 or, for float64 parameters, float64; `step`; and `master` fp32 if asked
    for.

    Args:
        lr: learning rate, a number or a tensor of one.
        eps: added to the root.
        weight_decay: of touched rows. By default L2, added to the gradient before its squares; `decoupled` multiplies
            the row by 1 - lr * weight_decay. FBGEMM's weight decay modes 1 and 2.
        initial_accumulator_value: what `sum` starts with.
        params, maximize, master_weights, seed: see `RowOptimizer`.
    """

    rule = rules.RowWiseAdagrad

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        initial_accumulator_value: float = 0.0,
        maximize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        options: Options = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        super().__init__(
            params,
            options | {"initial_accumulator_value": initial_accumulator_value},
            maximize=maximize,
            master_weights=master_weights,
            seed=seed,
        )


class RowSGD(RowOptimizer):
    """`torch.optim.SGD` without momentum, to rounding, for every row: x -= lr * (g + weight_decay * x).

    Without weight decay a row that a step does not touch stands still, and there is no state but the count of steps.
    With it, a row misses its decay until it is touched or flushed. The state is then `last_step` int32 [slots] and
    `history`, as of `RowAdamW`.

    Args:
        lr: learning rate, a number or a tensor of one.
        momentum: 0. Its buffer would be as large as the table, and with it a skipped step is a 2 x 2 matrix, whose
            products over a schedule have no compact prefix.
        weight_decay: as in `torch.optim.SGD`; lr * weight_decay < 1.
        params, maximize, master_weights, seed: see `RowOptimizer`.
    """

    rule = rules.SGD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        if momentum:
            raise OptionError("momentum: RowSGD has none; for momentum that untouched rows keep, use RowAdamW")
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay},
            maximize=maximize,
            master_weights=master_weights,
            seed=seed,
        )
