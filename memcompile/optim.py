"""Optimizers for tables of which a step touches few rows; usable alone, on any embedding."""

from memcompile.runtime.optim import LazyAdam, RowAdamW, RowOptimizer, RowSGD, RowwiseAdagrad

__all__ = ["LazyAdam", "RowAdamW", "RowOptimizer", "RowSGD", "RowwiseAdagrad"]
