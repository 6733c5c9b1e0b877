"""SGD without momentum for every row, to rounding: x -= lr * (g + weight_decay * x).

Without weight decay a row that a step does not touch stands still. With it, such a row misses a product of
(1 - lr * weight_decay) over steps, under any schedule: the exponential of a difference of prefix sums.
"""

import functools

from torch import Tensor

from memcompile.errors import OptionError
from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.missed_steps import factors_of_step, missed_decays
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime.table.rules.rule import COMMON_OPTIONS, Options, Rule, require_decay_below_1


class SGD(Rule):
    name = "row_sgd"
    defaults = COMMON_OPTIONS
    misses = True  # from the first step with weight decay on

    @classmethod
    def check(cls, options: Options) -> None:
        super().check(options)
        if options.get("momentum") or options.get("nesterov"):
            raise OptionError("momentum: SGD by rows has none; for momentum that untouched rows keep, use row_adamw")
        require_decay_below_1(options)

    def _step(self, rows: Tensor, grad: Tensor) -> None:
        lr, weight_decay = self.rates
        if weight_decay:
            self.start_misses()
        self.state["step"] += 1
        if "last_step" in self.state:
            self.record(lr, factors_of_step(lr, weight_decay, (0.0, 0.0)))
        self._run(rows, grad, lr)

    def _flush(self, rows: Tensor) -> None:
        self._run(rows, None, 0.0)

    def _run(self, rows: Tensor, grad: Tensor | None, rate: float) -> None:
        state, decays = self.state, None
        if "last_step" in state:
            decays = missed_decays(RateHistory(state["history"]), state["last_step"][rows], state["step"])
        self.move(rows, functools.partial(operator("row_sgd"), *self.tables(), rows, grad, self.seed(), decays, rate))
