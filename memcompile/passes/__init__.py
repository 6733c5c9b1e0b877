"""FX in, answers out: which FFNs a model or a captured graph has, and the graph rewritten. Knows no optimizer."""

from memcompile.passes.detect.detect import find_in_graph
from memcompile.passes.rewrite.rewrite import rewrite

__all__ = ["find_in_graph", "rewrite"]
