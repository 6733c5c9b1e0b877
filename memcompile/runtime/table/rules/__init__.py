"""How rows are stepped: each rule is a few functions of (state, rows, gradient, options), and knows no optimizer."""

from memcompile.runtime.table.rules.adamw import ADAMW
from memcompile.runtime.table.rules.lazy_adam import LAZY_ADAM
from memcompile.runtime.table.rules.row_wise_adagrad import ROW_WISE_ADAGRAD
from memcompile.runtime.table.rules.rule import Options, Rule, State, step_rows
from memcompile.runtime.table.rules.sgd import SGD

RULES: dict[str, Rule] = {rule.name: rule for rule in (ADAMW, LAZY_ADAM, ROW_WISE_ADAGRAD, SGD)}

__all__ = ["ADAMW", "LAZY_ADAM", "ROW_WISE_ADAGRAD", "RULES", "SGD", "Options", "Rule", "State", "step_rows"]
