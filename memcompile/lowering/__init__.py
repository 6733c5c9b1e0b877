"""The operators of memcompile and how each device runs them. Importing this package registers all of them."""

from typing import TYPE_CHECKING, Any

from memcompile.lowering import (
    caches,
    cpu,
    flops,
    lagging_rows,
    prefetch_rows,
    product_key_search,
    product_key_topk,
    row_adagrad,
    row_adam,
    row_sgd,
    row_sums,
    skipped_steps,
    sparse_clipping,
    sparse_table,
    weighted_gather,
)
from memcompile.lowering.memory_lookup import memory_lookup
from memcompile.lowering.reference import memory_lookup_reference, product_key_topk_reference
from memcompile.lowering.schema import LIBRARY, NAMESPACE, SCHEMAS, operator

if TYPE_CHECKING:
    from memcompile.lowering.inductor import LoweringPass, inductor_patches

__all__ = [
    "LIBRARY",
    "NAMESPACE",
    "SCHEMAS",
    "LoweringPass",
    "caches",
    "cpu",
    "flops",
    "inductor_patches",
    "lagging_rows",
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
    "sparse_clipping",
    "sparse_table",
    "weighted_gather",
]

caches.tag_caches()


def __getattr__(name: str) -> Any:
    # Inductor takes longer to import than everything else here, and only who compiles needs it.
    if name in ("LoweringPass", "inductor_patches"):
        from memcompile.lowering import inductor

        return getattr(inductor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
