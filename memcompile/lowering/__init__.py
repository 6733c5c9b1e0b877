"""The operators of memcompile and how each device runs them. Importing this package registers all of them."""

from typing import TYPE_CHECKING, Any

from memcompile.lowering import cpu
from memcompile.lowering.gather import prefetch_rows, row_sums, stale_rows, table_gather, weighted_gather
from memcompile.lowering.inductor import caches
from memcompile.lowering.memory_lookup import memory_lookup
from memcompile.lowering.reference import memory_lookup_reference, product_key_topk_reference
from memcompile.lowering.register import flops
from memcompile.lowering.register.kernels import IN_PYTORCH
from memcompile.lowering.register.schema import LIBRARY, NAMESPACE, SCHEMAS, operator
from memcompile.lowering.search import product_key_search, product_key_topk
from memcompile.lowering.triton.register import load as load_triton
from memcompile.lowering.triton.register import load_for
from memcompile.lowering.triton.support import is_interpreted
from memcompile.lowering.update import row_adagrad, row_adam, row_sgd, skipped_steps

if TYPE_CHECKING:
    from memcompile.lowering.inductor.graph_pass import LoweringPass, inductor_patches

__all__ = [
    "LIBRARY",
    "NAMESPACE",
    "SCHEMAS",
    "LoweringPass",
    "caches",
    "cpu",
    "flops",
    "inductor_patches",
    "memory_lookup",
    "memory_lookup_reference",
    "operator",
    "prefetch_rows",
    "product_key_search",
    "product_key_topk",
    "product_key_topk_reference",
    "row_adagrad",
    "row_adam",
    "row_sgd",
    "row_sums",
    "skipped_steps",
    "stale_rows",
    "table_gather",
    "weighted_gather",
]

if is_interpreted():
    load_for("CPU")
else:
    cpu.load.load_at_first_call(IN_PYTORCH)
load_triton.load_at_first_call(IN_PYTORCH)


def __getattr__(name: str) -> Any:
    # Inductor takes longer to import than everything else here, and only who compiles needs it.
    if name in ("LoweringPass", "inductor_patches"):
        from memcompile.lowering.inductor import graph_pass as inductor

        return getattr(inductor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
