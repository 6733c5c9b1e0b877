"""The operators of memcompile and how each device runs them. Importing this package registers all of them."""

from memcompile.lowering import cpu
from memcompile.lowering.gather import pairs, prefetch_rows, stale_rows, table_gather, table_pairs, weighted_gather
from memcompile.lowering.memory_lookup import memory_lookup
from memcompile.lowering.register import flops
from memcompile.lowering.register.kernels import IN_PYTORCH
from memcompile.lowering.register.schema import operator
from memcompile.lowering.search import batch_norm, count_hits, hit_scores, product_key_search, product_key_topk
from memcompile.lowering.triton.register import load as load_triton
from memcompile.lowering.triton.register import load_for
from memcompile.lowering.triton.support import is_interpreted
from memcompile.lowering.update import row_adam, row_tables, skipped_steps

__all__ = ["cpu", "memory_lookup", "operator"]

_REGISTERED_BY_IMPORT = (
    pairs, prefetch_rows, stale_rows, table_gather, table_pairs, weighted_gather, flops, batch_norm, count_hits,
    hit_scores, product_key_search, product_key_topk, row_adam, row_tables, skipped_steps,
)  # fmt: skip

if is_interpreted():
    load_for("CPU")
else:
    cpu.load.load_at_first_call(IN_PYTORCH)
load_triton.load_at_first_call(IN_PYTORCH)
