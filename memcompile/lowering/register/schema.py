"""Every operator of memcompile: its name and its signature. What each computes is in the file of its name, and there it
says what it asks of tensors, by `expect`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NAMESPACE = "memcompile"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]

SCHEMAS = {
    "memory_lookup": (
        "(Tensor x, Tensor query_weight, Tensor? query_bias, Tensor half_keys, Tensor values, "
        "Tensor? gate_weight, Tensor? gate_bias, Tensor? out_weight, Tensor? out_bias, "
        'Tensor? temperature, int heads, int top_k, str values_grad="dense", str values_storage="device", '
        'str group="", int[] parts=[], int part=0, int shard_dim=1, bool same_tokens=False, '
        'SymInt? capacity=None, Tensor[]? row_state=None, str weighting="softmax", int first_slot=0, '
        "float balance_loss=0.0, Tensor? query_scale=None, Tensor? query_shift=None, Tensor? query_mean=None, "
        "Tensor? query_var=None, bool pairs=False, int num_tables=1, Tensor? slot_offset=None, bool training=False, "
        "Tensor? slot_hits=None, Tensor? key_hits=None) -> Tensor"
    ),
    "prefetch_rows": "(Tensor values, Tensor slots) -> Tensor",
    "update_statistics": (
        "(Tensor(a!) mean, Tensor(b!) var, Tensor batch_mean, Tensor batch_var, SymInt tokens) -> ()"
    ),
    "count_hits": (
        "(Tensor slots, int first_slot, Tensor(a!) slot_hits, Tensor(b!) key_hits, Tensor? slot_offset) -> ()"
    ),
    "with_loss": "(Tensor output, Tensor loss) -> Tensor",
    "product_key_search": "(Tensor query, Tensor half_keys, int top_k) -> (Tensor weights, Tensor slots)",
    "product_key_topk": "(Tensor scores, int top_k) -> (Tensor logits, Tensor slots)",
    "weighted_gather": "(Tensor values, Tensor slots, Tensor weights) -> Tensor",
    "gather_dot": "(Tensor values, Tensor slots, Tensor grad) -> Tensor",
    "weighted_scatter": "(Tensor slots, Tensor weights, Tensor grad, SymInt num_slots) -> Tensor",
    "row_sums": (
        "(Tensor slots, Tensor weights, Tensor grad, SymInt num_slots, Tensor? more_weights=None, "
        "Tensor? more_grad=None) -> (Tensor rows, Tensor sums)"
    ),
    # A table whose rows are pairs: pairs.py.
    "pair_gather": "(Tensor values, Tensor slots, Tensor weights, Tensor x) -> (Tensor y, Tensor dots)",
    "pair_grads": (
        "(Tensor values, Tensor slots, Tensor weights, Tensor x, Tensor dots, Tensor grad) "
        "-> (Tensor grad_weights, Tensor grad_x, Tensor into, Tensor out)"
    ),
    "pair_scatter": "(Tensor slots, Tensor into, Tensor x, Tensor out, Tensor grad, SymInt num_slots) -> Tensor",
    # A table whose gradient is of the rows that were hit: table_gather.py.
    "table_gather": "(Tensor values, Tensor slots, Tensor weights, Tensor[] row_state, str gradient) -> Tensor",
    "table_dot": "(Tensor values, Tensor slots, Tensor grad, Tensor[] row_state) -> Tensor",
    "sparse_scatter": "(Tensor values, Tensor[] slots, Tensor[] weights, Tensor[] grads, bool opaque=False) -> Tensor",
    # The same of a table of pairs: table_pairs.py.
    "table_pairs": (
        "(Tensor values, Tensor slots, Tensor weights, Tensor x, Tensor[] row_state, str gradient) "
        "-> (Tensor y, Tensor dots)"
    ),
    "table_pair_grads": (
        "(Tensor values, Tensor slots, Tensor weights, Tensor x, Tensor dots, Tensor grad, Tensor[] row_state) "
        "-> (Tensor grad_weights, Tensor grad_x, Tensor into, Tensor out)"
    ),
    "skipped_steps": (
        "(Tensor rates, Tensor starts, int until, int terms, int moments) -> (Tensor decays, Tensor panels)"
    ),
    # These read rows as they are once they have made up for the steps that they missed: stale_rows.py.
    "stale_gather": (
        "(Tensor values, Tensor exp_avg, Tensor exp_avg_sq, Tensor slots, Tensor weights, Tensor missed_steps, "
        "Tensor decays, Tensor panels, float eps) -> Tensor"
    ),
    "stale_dot": (
        "(Tensor values, Tensor exp_avg, Tensor exp_avg_sq, Tensor slots, Tensor grad, Tensor missed_steps, "
        "Tensor decays, Tensor panels, float eps) -> Tensor"
    ),
    # These update rows of tables in place: row_tables.py.
    "row_adam": (
        "(Tensor(a!) param, Tensor(b!)? master, Tensor rows, Tensor? grad, int seed, Tensor(c!) exp_avg, "
        "Tensor(d!) exp_avg_sq, Tensor? missed_steps, Tensor? decays, Tensor? panels, Tensor numbers) -> ()"
    ),
    "row_adagrad": (
        "(Tensor(a!) param, Tensor(b!)? master, Tensor rows, Tensor grad, int seed, Tensor(c!) squares, "
        "float lr, float eps, float weight_decay, bool decoupled) -> ()"
    ),
    "row_sgd": (
        "(Tensor(a!) param, Tensor(b!)? master, Tensor rows, Tensor? grad, int seed, Tensor? decays, float rate) -> ()"
    ),
    "in_order": "(Tensor tensor, Tensor after) -> Tensor",  # between two collectives: order_collectives.py
    "onednn_mm": "(Tensor left, Tensor right, Tensor? bias) -> Tensor",  # a product in Inductor's graphs: cpu/gemm.py
}

# In training BatchNorm's running statistics move, and hits may be counted: overloads of their own, so that the first
# one mutates nothing.
SCHEMAS["memory_lookup.updating"] = (
    SCHEMAS["memory_lookup"]
    .replace("Tensor? query_mean", "Tensor(a!)? query_mean")
    .replace("Tensor? query_var", "Tensor(b!)? query_var")
)
SCHEMAS["memory_lookup.counting"] = (
    SCHEMAS["memory_lookup.updating"]
    .replace("Tensor? slot_hits", "Tensor(c!)? slot_hits")
    .replace("Tensor? key_hits", "Tensor(d!)? key_hits")
)

# Every operator takes its inputs at any strides, so Inductor need not copy them into a layout of eager's.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

# They ask how many rows were hit, and return as many; or whether a backward runs.
_NOT_CAPTURED = {
    "table_gather", "table_dot", "sparse_scatter", "table_pairs", "table_pair_grads", "update_statistics",
    "count_hits",
}  # fmt: skip

for _name, _signature in SCHEMAS.items():
    _unsafe = (torch.Tag.cudagraph_unsafe,) if _name in _NOT_CAPTURED else ()
    LIBRARY.define(_name + _signature, tags=(*_TAGS, *_unsafe))  # type: ignore[no-untyped-call]


def operator(name: str) -> torch._ops.OpOverload:
    """The overload `torch.ops.memcompile.<name>.default`, or that which the name ends with."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")


def expect(
    name: str, tensor: Tensor, shape: Sequence[int | str], *dtypes: torch.dtype, contiguous: bool = False
) -> None:
    """Raises ValueError, which names the argument, unless the tensor has this shape and one of these dtypes.

    Args:
        shape: its sizes; a word stands for any size.
        dtypes: with none of them, any that is floating point.
        contiguous: whether the tensor must be.
    """
    own = tensor.shape
    has_dtype = tensor.dtype in dtypes if dtypes else tensor.is_floating_point()
    if has_dtype and len(own) == len(shape) and (not contiguous or tensor.is_contiguous()):
        for size, actual in zip(shape, own, strict=True):
            if not isinstance(size, str) and size != actual:
                break
        else:
            return
    kind = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "floating point"
    wanted = f"{'contiguous ' if contiguous else ''}{kind} [{', '.join(map(str, shape))}]"
    raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype} {list(own)}")
