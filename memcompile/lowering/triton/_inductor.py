"""`weighted_gather` as a template of Inductor's, which generates the kernel, autotunes it with max-autotune, and fuses
what follows into its store, so that y * silu(gate) costs no pass over y.

The private Inductor API of this folder is here, and nowhere else. Tried on torch 2.11, 2.13 and 2.15: on a version that
has moved it, importing this or `register_template` raises ImportError, AttributeError or TypeError.
"""

import inspect
from typing import Any

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V

from memcompile.lowering._torch import is_keyed
from memcompile.lowering.register.schema import operator
from memcompile.lowering.triton.configs import gather_configs
from memcompile.lowering.triton.kernels.table import weighted_sum
from memcompile.lowering.triton.support import say_unknown_inductor, supports

_NAME = "memcompile_weighted_gather"
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


@SymbolicGridFn
def _grid(tokens: Any, value_dim: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, int]:
    return tokens, cdiv(value_dim, meta["BLOCK_COLUMNS"]), 1


def _hint(size: Any) -> int:
    """A size, or what a symbolic one was when it was traced; 0 where nothing is known of it. Adds no guard."""
    return int(V.graph.sizevars.optimization_hint(size, fallback=0))


def register_template() -> None:
    """Has Inductor lower `weighted_gather` to the template."""
    overload = operator("weighted_gather")
    template = TritonTemplate(name=_NAME, grid=_grid, source=_SOURCE + inspect.getsource(weighted_sum.fn))
    call = fallback_handler(overload, add_to_fallback_set=False)  # type: ignore[no-untyped-call]

    @register_lowering(overload, type_promotion_kind=None)
    def lower_weighted_gather(values: Any, slots: Any, weights: Any) -> Any:
        (tokens, hits), (num_slots, value_dim) = slots.get_size(), values.get_size()
        is_static = all(isinstance(size, (int, sympy.Integer)) for size in (hits, value_dim))
        device, dtype = values.get_device(), values.get_dtype()
        if not (is_static and is_keyed() and supports(device, [dtype, weights.get_dtype()])):
            return call(values, slots, weights)
        hits, value_dim = int(hits), int(value_dim)
        kernel = ir.ExternKernel
        inputs = [kernel.require_contiguous(kernel.realize_input(tensor)) for tensor in (values, slots, weights)]
        layout = ir.FixedLayout(device, dtype, [tokens, value_dim])
        sizes = gather_configs(_hint(tokens), value_dim)
        choices: list[Any] = []
        try:
            for blocks in sizes if config.max_autotune else sizes[:1]:
                error = template.maybe_append_choice(
                    choices, input_nodes=inputs, layout=layout, num_stages=1, HITS=hits, **blocks
                )
                if error is not None:
                    raise error
        except (TypeError, AttributeError, NotImplementedError) as error:
            say_unknown_inductor(error)
            return call(values, slots, weights)
        rows, shape = min(_hint(num_slots), _EXAMPLE_ROWS), [_hint(size) for size in slots.get_size()]
        examples = {
            0: lambda node: torch.zeros(rows, value_dim, dtype=dtype, device=device),
            1: lambda node: torch.randint(rows, shape, dtype=node.get_dtype(), device=device),
        }
        chosen = autotune_select_algorithm(_NAME, choices, inputs, layout, input_gen_fns=examples)  # type: ignore[no-untyped-call]
        return chosen[0] if isinstance(chosen, tuple) else chosen  # with its choice, from 2.13 on
