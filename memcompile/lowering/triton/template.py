"""`weighted_gather` as a template of Inductor's, which generates the kernel, autotunes it with max-autotune, and fuses
what follows into its store, so that y * silu(gate) costs no pass over y.
"""

import functools
import inspect
import logging
from typing import Any

import torch

from memcompile.lowering._torch import is_keyed
from memcompile.lowering.register.schema import operator
from memcompile.lowering.triton.configs import gather_configs
from memcompile.lowering.triton.support import supports

log = logging.getLogger(__name__)

# The loop over rows is that of the kernel that eager launches: its source follows the template's.
_SOURCE = r"""
{{def_kernel("values", "slots", "weights")}}
    token = tl.program_id(0).to(tl.int64)
    value_dim = {{size("values", 1)}}
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    sums = weighted_sum(
        values, slots + token * HITS, weights + token * HITS, HITS, column, column < value_dim, value_dim, 1,
        BLOCK_HITS, BLOCK_COLUMNS,
    )
    sums = sums[None, :]
    row_index = tl.program_id(0).to(INDEX_DTYPE) + tl.zeros([1, 1], INDEX_DTYPE)
    column_index = column.to(INDEX_DTYPE)[None, :]
    mask = column_index < value_dim
    {{store_output(("row_index", "column_index"), "sums", "mask", val_shape=("1", "BLOCK_COLUMNS"))}}
"""

_EXAMPLE_ROWS = 2**18  # of a table to measure on: more than any cache holds, far from a whole one


@functools.cache
def register() -> bool:
    """Tells Inductor of the template, once. Whether this version of torch is one that it runs on; on another, graphs
    hold the kernel itself (`torch.library.wrap_triton`): the same answers, the gate in a kernel of its own.
    """
    try:
        from memcompile.lowering.triton import _inductor

        _register(_inductor)
    except (ImportError, AttributeError, TypeError) as error:
        _say_unknown(error)
        return False
    return True


def _say_unknown(error: Exception) -> None:
    log.warning(
        "torch %s is not a version whose Inductor is known (%s): memory layers run, but their gate is not fused",
        torch.__version__, error,
    )  # fmt: skip


def _register(inductor: Any) -> None:
    from memcompile.lowering.triton.kernels.gather import weighted_sum

    @inductor.SymbolicGridFn
    def grid(tokens: Any, value_dim: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, int]:
        return tokens, cdiv(value_dim, meta["BLOCK_COLUMNS"]), 1

    template = inductor.TritonTemplate(
        name="memcompile_weighted_gather", grid=grid, source=_SOURCE + inspect.getsource(weighted_sum.fn)
    )
    overload = operator("weighted_gather")

    @inductor.lower(overload)
    def lower_weighted_gather(values: Any, slots: Any, weights: Any) -> Any:
        (tokens, hits), (num_slots, value_dim) = (inductor.stored_shape(tensor) for tensor in (slots, values))
        hits, value_dim = inductor.static(hits), inductor.static(value_dim)
        is_supported = supports(values.get_device(), [values.get_dtype(), weights.get_dtype()])
        if not is_supported or hits is None or value_dim is None or not is_keyed():
            return inductor.call_operator(overload, values, slots, weights)
        inputs = [inductor.contiguous(tensor) for tensor in (values, slots, weights)]
        layout = inductor.output_layout(values, [tokens, value_dim])
        configs = gather_configs(inductor.hint(tokens), value_dim)
        choices: list[Any] = []
        try:
            for config in configs if inductor.is_autotuned() else configs[:1]:
                error = template.maybe_append_choice(
                    choices, input_nodes=inputs, layout=layout, num_stages=1, num_warps=config.num_warps,
                    HITS=hits, BLOCK_HITS=config.block_hits, BLOCK_COLUMNS=config.block_columns,
                )  # fmt: skip
                if error is not None:
                    raise error
        except (TypeError, AttributeError, NotImplementedError) as error:
            _say_unknown(error)
            return inductor.call_operator(overload, values, slots, weights)
        rows = min(inductor.hint(num_slots), _EXAMPLE_ROWS)
        examples = {
            0: lambda node: torch.zeros(rows, value_dim, dtype=node.get_dtype(), device=node.get_device()),
            1: lambda node: torch.randint(
                rows,
                [inductor.hint(size) for size in node.get_size()],
                dtype=node.get_dtype(),
                device=node.get_device(),
            ),
        }
        return inductor.autotune("memcompile_weighted_gather", choices, inputs, layout, examples)
