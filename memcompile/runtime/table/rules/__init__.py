"""How rows are stepped: each rule knows a table, the state of its rows, and options, and no optimizer."""

from memcompile.runtime.table.rules.adagrad import RowWiseAdagrad
from memcompile.runtime.table.rules.adam import MOMENTS, AdamW, LazyAdam
from memcompile.runtime.table.rules.rule import Options, Rule, State
from memcompile.runtime.table.rules.sgd import SGD

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (AdamW, LazyAdam, RowWiseAdagrad, SGD)}

__all__ = ["MOMENTS", "RULES", "SGD", "AdamW", "LazyAdam", "Options", "RowWiseAdagrad", "Rule", "State"]
