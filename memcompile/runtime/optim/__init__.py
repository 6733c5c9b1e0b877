"""Optimizers for tables of which a step touches few rows: their cost is that of the rows touched, not of the table.

Each is a `torch.optim.Optimizer` for parameters [slots, ...] whose `.grad` is sparse COO with one sparse dimension
(`nn.Embedding(sparse=True)`, memcompile's values), or dense.
"""

from memcompile.runtime.optim.lazy_adam import LazyAdam
from memcompile.runtime.optim.row_adamw import RowAdamW
from memcompile.runtime.optim.row_optimizer import RowOptimizer
from memcompile.runtime.optim.row_sgd import RowSGD
from memcompile.runtime.optim.row_wise_adagrad import RowwiseAdagrad

__all__ = ["LazyAdam", "RowAdamW", "RowOptimizer", "RowSGD", "RowwiseAdagrad"]
