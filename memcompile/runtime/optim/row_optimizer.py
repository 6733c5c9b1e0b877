"""What the optimizers of rows share: the loop of a step, options, tables of state, and loading them as they were."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memcompile.errors import OptionError
from memcompile.lowering.cpu.pages import advise_huge_pages
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.row_tables import Gradient
from memcompile.lowering.update.stochastic_rounding import seed_of_step
from memcompile.runtime.optim.gradients import as_rows, touched_rows

Group = dict[str, Any]
State = dict[str, Any]
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_ON_THE_CPU = ("rates",)  # state that stays there


class RowOptimizer(Optimizer):
    """A step updates the rows [slots, dim] that a gradient touches; a parameter of more dimensions is [slots, -1].

    Gradients are sparse COO in dim 0, coalesced or not, or dense, which touches all rows. An empty gradient is a step;
    a gradient of None is none. A step is bit for bit reproducible, and does not depend on the order of duplicates.

    Options of a group that all of them take:

    * maximize: steps along the gradient.
    * master_weights: bf16 parameters are the nearest to fp32 masters, which are kept in the state. Otherwise they
      are rounded stochastically.
    * seed: of what is rounded stochastically, together with the number of the step.

    Parameters are float32, float64 or bfloat16 and contiguous.
    """

    shards: Shards | None = None  # how the table lies of which the one parameter is this rank's part
    saved: frozenset[str] = frozenset()  # what PyTorch's optimizer of the same mathematics saves, beside `step`

    def __init__(self, params: Any, defaults: Group) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """As `torch.optim.Optimizer.add_param_group`.

        Raises:
            OptionError: an option's value, or a parameter, is not served.
        """
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except OptionError:
            del self.param_groups[-1]
            raise

    def check(self, group: Group) -> None:
        """Raises OptionError unless the options and parameters of a group can be served."""
        for option in ("lr", "weight_decay"):
            require(option, group[option], float(group[option]) >= 0, "0 or more")
        require("seed", group["seed"], isinstance(group["seed"], int), "an integer")
        self._check_group(group)
        for parameter in group["params"]:
            _check_parameter(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. A closure is run first, with gradients enabled, and its loss returned.

        Raises:
            ValueError: a gradient has another layout than sparse COO in dim 0 or dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad, group)
        return loss

    def _step_parameter(self, parameter: Tensor, grad: Tensor, group: Group) -> None:
        rows, grad = touched_rows(grad, sum_dtype(parameter))
        self._step_rows(parameter, group, rows, Gradient(grad))

    @torch.no_grad()
    def step_by_factors(self, parameter: Tensor, slots: Tensor, weights: Tensor, grad: Tensor) -> None:
        """One step of a parameter by the gradient `weighted_scatter` of these factors, which is nowhere stored as a
        whole on the CPU. It is the step of the sparse gradient that `row_sums` has, bit for bit.

        Args:
            parameter: one of this optimizer's, [slots, dim]; its `.grad` is not read.
            slots: int32 or int64 [tokens, hits].
            weights: [tokens, hits].
            grad: [tokens, dim], of the tokens.

        Raises:
            ValueError: the parameter is not in this optimizer.
        """
        group, dtype = self._group_of(parameter), sum_dtype(parameter)
        if grad.device.type == "cpu":
            rows, ends, hits = operator("hits_by_row")(slots, parameter.shape[0])
            gradient = Gradient(grad, ends, hits, weights)
        else:  # the kernels of a GPU take sums
            rows, sums = operator("row_sums")(slots, weights, grad, parameter.shape[0])
            gradient = Gradient(sums.to(dtype))
        self._step_rows(parameter, group, rows, gradient)

    def _step_rows(self, parameter: Tensor, group: Group, rows: Tensor, gradient: Gradient) -> None:
        state = self.state[parameter]
        if not state:
            _check_parameter(parameter)
            state["step"] = 0
            if group["master_weights"] and parameter.dtype is torch.bfloat16:
                state["master"] = parameter.detach().float()
            self._start(parameter, state, group)
        if group["maximize"]:
            gradient = dataclasses.replace(gradient, grad=-gradient.grad)
        self._update(parameter, state, group, rows, gradient)
        increment_version(parameter)

    @torch.no_grad()
    def step_by(self, parameter: Tensor, grad: Tensor) -> None:
        """One step of one of this optimizer's parameters by a gradient that need not be its own. No hooks run."""
        self._step_parameter(parameter, grad, self._group_of(parameter))

    @torch.no_grad()
    def catch_up(self, parameter: Tensor, rows: Tensor | None = None, tell_autograd: bool = True) -> None:
        """Brings rows up to date: nothing to do where untouched rows stand still."""

    @torch.no_grad()
    def current_gather(self, parameter: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """`weighted_gather` [tokens, dim] over the rows as they are by now, without changing any.

        Args:
            parameter: one of this optimizer's, [slots, dim].
            slots: int32 or int64 [tokens, hits].
            weights: [tokens, hits].
        """
        return operator("weighted_gather")(parameter.detach(), slots, weights)  # type: ignore[no-any-return]

    @torch.no_grad()
    def current_dot(self, parameter: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
        """`gather_dot` [tokens, hits] of the rows as they are by now with grad [tokens, dim], without changing any."""
        return operator("gather_dot")(parameter.detach(), slots, grad)  # type: ignore[no-any-return]

    @abstractmethod
    def _check_group(self, group: Group) -> None:
        """Raises OptionError where the options of a group cannot be served."""

    @abstractmethod
    def _start(self, parameter: Tensor, state: State, group: Group) -> None:
        """Adds what a parameter that has no state needs."""

    def _complete(self, parameter: Tensor, state: State, group: Group) -> None:
        """Adds what the state of PyTorch's optimizer lacks."""

    @abstractmethod
    def _update(self, parameter: Tensor, state: State, group: Group, rows: Tensor, gradient: Gradient) -> None:
        """Counts a step and does it, for distinct rows int64 [n] and their gradient."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, with every tensor in the dtype that it was saved in.

        The state of PyTorch's optimizer of the same mathematics may be loaded too: dense training goes on by rows.

        Raises:
            OptionError: an option that was saved is not served.
        """
        for parameter, saved in loaded_states(self, super().load_state_dict, state_dict):
            for name, value in saved.items():
                self.state[parameter][name] = placed(name, value, parameter)
        for group in self.param_groups:
            self.check(group)
            for parameter in group["params"]:
                if parameter in self.state:
                    self.adopt(parameter, self.state[parameter])

    def knows(self, parameter: Tensor, state: State) -> bool:
        """Whether a state is of this optimizer, or of PyTorch's of the same mathematics: `adopt` can go on from it."""
        return self.saved <= state.keys()

    def adopt(self, parameter: Tensor, state: State) -> None:
        """Goes on from a parameter's state, this optimizer's own or that of PyTorch's of the same mathematics: the
        tensors themselves, where their dtype and layout are the ones that this optimizer would give them.
        """
        group = self._group_of(parameter)
        own = dict(state)
        own["step"] = int(own.get("step", 0))  # PyTorch's is a tensor, or SGD's is not there
        for name in own.keys() & {*MOMENTS}:
            own[name] = own[name].to(moment_dtype(parameter, group)).contiguous()
        self._complete(parameter, own, group)
        self.state[parameter] = own

    def _group_of(self, parameter: Tensor) -> Group:
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            raise ValueError(f"the parameter {list(parameter.shape)} is not in this optimizer")
        return group

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.defaults.items():
                if option != "differentiable":  # which PyTorch adds to the defaults here, and nothing reads
                    group.setdefault(option, value)


def loaded_states(
    optimizer: Optimizer, load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]
) -> list[tuple[Tensor, State]]:
    """Loads, and returns each parameter with its state as it was saved: loading casts it to the parameter's dtype."""
    seen: list[dict[str, Any]] = []
    # The last of the hooks, it sees what the others made of the dict.
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
    try:
        load(state_dict)
    finally:
        handle.remove()
    (saved,) = seen
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(p, saved["state"].get(number, {})) for p, number in zip(parameters, numbers, strict=True)]


def placed(name: str, value: Any, parameter: Tensor) -> Any:
    """An entry of a saved state where it belongs, in the dtype that it was saved in."""
    return value.to("cpu" if name in _ON_THE_CPU else parameter.device) if isinstance(value, Tensor) else value


MOMENTS = ("exp_avg", "exp_avg_sq")


def tables(parameter: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
    """The values [slots, dim] that a step updates, and the bf16 copy that it rounds them into, if there is one."""
    values = as_rows(parameter)
    return (as_rows(state["master"]), values) if "master" in state else (values, None)


def start_moments(parameter: Tensor, state: State, group: Group) -> None:
    """Adds Adam's moments, zeros in huge pages where there are any: rows of them are read at random."""
    for name in MOMENTS:
        state[name] = torch.empty_like(parameter, dtype=moment_dtype(parameter, group))
        advise_huge_pages(state[name])
        state[name].zero_()


def step_seed(state: State, group: Group, shards: Shards | None = None) -> int:
    """The seed of the step that is being done; ranks with parts of one table round apart."""
    return seed_of_step(group["seed"] + (shards.rank if shards else 0), state["step"])


def moment_dtype(parameter: Tensor, group: Group) -> torch.dtype:
    """The dtype of a parameter's moments: `state_dtype`, or that of its sums."""
    given: torch.dtype | None = group.get("state_dtype")
    return given or sum_dtype(parameter)


def check_state_dtype(group: Group) -> None:
    """Raises OptionError unless the moments of the group's parameters can have its `state_dtype`."""
    given = group["state_dtype"]
    require("state_dtype", given, given in (None, torch.float32, torch.bfloat16), "None, float32 or bfloat16")
    double = any(parameter.dtype is torch.float64 for parameter in group["params"])
    require("state_dtype", given, given is None or not double, "None for float64 parameters")


def check_betas(group: Group) -> None:
    """Raises OptionError unless 0 <= beta < 1 for both, and eps is positive."""
    betas = group["betas"]
    require("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    require("eps", group["eps"], group["eps"] > 0, "positive: rows without gradients have exp_avg_sq = 0")


def require(option: str, value: Any, holds: bool, expected: str) -> None:
    """Raises OptionError, naming the option, unless it holds."""
    if not holds:
        raise OptionError(f"{option}: expected {expected}; got {value}")


def _check_parameter(parameter: Tensor) -> None:
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        raise OptionError(
            "params: DTensors are not stepped by rows here. Sharded values of a memory are, in torch.optim.AdamW or "
            "any other, by the one that values_optimizer names"
        )
    require("params", parameter.dtype, parameter.dtype in _DTYPES, "float32, float64 or bfloat16")
    require("params", shape, parameter.dim() > 0 and parameter.is_contiguous(), "a contiguous [slots, ...]")
    require("params", parameter.layout, parameter.layout is torch.strided, "dense parameters")
