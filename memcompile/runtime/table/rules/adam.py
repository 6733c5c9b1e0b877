"""Adam's rules: AdamW for every row (arXiv 1711.05101), and lazy Adam, which steps the rows that are touched alone."""

import functools

import torch
from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.cpu.pages import advise_huge_pages
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.missed_steps import MissedSteps, factors_of_step, missed_steps
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime.table.rules.rule import COMMON_OPTIONS, Options, Rule, require, require_decay_below_1
from memcompile.runtime.table.touched_rows import as_rows

MOMENTS = ("exp_avg", "exp_avg_sq")


class LazyAdam(Rule):
    """`torch.optim.SparseAdam`, to rounding, with decoupled weight decay of the rows that a step touches."""

    name = "lazy_adam"
    defaults = COMMON_OPTIONS | {"betas": (0.9, 0.999), "eps": 1e-8, "state_dtype": None}
    saved = frozenset(MOMENTS)
    no_amsgrad = "lazy Adam has none, as torch.optim.SparseAdam"

    @classmethod
    def check(cls, options: Options) -> None:
        super().check(options)
        betas, eps, given = options["betas"], options["eps"], options["state_dtype"]
        require("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
        require("eps", eps, eps > 0, "positive: rows without gradients have exp_avg_sq = 0")
        require("state_dtype", given, given in (None, torch.float32, torch.bfloat16), "None, float32 or bfloat16")
        if options.get("amsgrad"):
            raise OptionError(f"amsgrad: {cls.no_amsgrad}; use amsgrad=False")

    def start(self) -> None:
        """The moments are zeros in huge pages where there are any: rows are read at random."""
        table, state = self.table, self.state
        dtype = self.options.get("state_dtype") or sum_dtype(table)
        for name in MOMENTS:
            if name in state:
                state[name] = state[name].to(table.device, dtype).contiguous()
                continue
            state[name] = torch.empty_like(table, dtype=dtype, memory_format=torch.contiguous_format)
            advise_huge_pages(state[name])
            state[name].zero_()

    def _step(self, rows: Tensor, grad: Tensor) -> None:
        (lr, weight_decay), (beta1, beta2) = self.rates, self.options["betas"]
        step = self.state["step"] = self.state["step"] + 1
        rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        self._run(rows, grad, None, [1 - lr * weight_decay, beta1, beta2, rate, 1.0, self.options["eps"]])

    def _run(self, rows: Tensor, grad: Tensor | None, missed: MissedSteps | None, numbers: list[float]) -> None:
        moments = (as_rows(self.state[name]) for name in MOMENTS)
        parts = (None, None, None) if missed is None else (missed.entries, missed.decays, missed.panels)
        constants = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        operands = (*self.tables(), rows, grad, self.seed(), *moments, *parts, constants)
        self.move(rows, functools.partial(operator("row_adam"), *operands))


class AdamW(LazyAdam):
    """AdamW for every row, to rounding, at the cost of the rows that a step touches: see `runtime.optim.RowAdamW`."""

    name = "row_adamw"
    defaults = LazyAdam.defaults | {"weight_decay": 1e-2}
    misses = True
    no_amsgrad = "a maximum over skipped steps cannot be made up for"

    @classmethod
    def check(cls, options: Options) -> None:
        super().check(options)
        beta1, beta2 = betas = options["betas"]
        require("betas", betas, beta1**2 < beta2, "beta1**2 < beta2, so that steps without gradients die out")
        require_decay_below_1(options)

    def start(self) -> None:
        super().start()
        self.start_misses(float(self.options["eps"]))

    def _step(self, rows: Tensor, grad: Tensor) -> None:
        state, (lr, weight_decay), eps = self.state, self.rates, float(self.options["eps"])
        beta1, beta2 = (float(beta) for beta in self.options["betas"])
        if eps != RateHistory(state["history"]).eps:
            self.flush()
            state["history"] = RateHistory.new(state["step"], eps).tensor
        step = state["step"] = state["step"] + 1
        self.record(lr, factors_of_step(lr, weight_decay, (beta1, beta2)))
        rate, scale = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
        self._catch_up(rows, grad, step - 1, [1 - lr * weight_decay, beta1, beta2, rate, scale])

    def _flush(self, rows: Tensor) -> None:
        self._catch_up(rows, None, self.state["step"], [1.0, 0.0, 0.0, 0.0, 0.0])

    def _catch_up(self, rows: Tensor, grad: Tensor | None, until: int, numbers: list[float]) -> None:
        """Makes the rows do what they have missed until the step `until`, and then a step with the gradient, if any."""
        history, last_step = RateHistory(self.state["history"]), self.state["last_step"]
        missed = missed_steps(history, last_step[rows], until, sum_dtype(self.table))
        self._run(rows, grad, missed, [*numbers, history.eps])
