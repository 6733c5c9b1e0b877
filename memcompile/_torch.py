"""The private PyTorch API of the front door, imported here and nowhere else beside it.

Tried with torch 2.11, 2.13 and 2.15. Inductor is imported at the first compilation, as torch.compile itself does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx
from torch._dynamo import list_backends, register_backend
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

__all__ = ["OVERLAP", "compile_fx", "free_unbacked_symbols", "inductor_options", "list_backends", "register_backend"]

# Options of Inductor that move compute between the start of a collective and the wait for it, which it does not by
# default. In the order that its configuration recommends.
OVERLAP: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": [
        "reorder_communication_preserving_peak_memory",
        "sink_waits_iterative",
        "reorder_communication_preserving_peak_memory",
    ],
}


@functools.lru_cache
def inductor_options() -> tuple[str, ...]:
    """The first part of every name that ``torch.compile(options=...)`` takes for Inductor."""
    from torch._inductor import list_options

    return tuple({name.partition(".")[0] for name in list_options()})


def compile_fx(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, patches: dict[str, Any]
) -> Callable:
    """Inductor, with the options of a ``torch.compile`` mode and then ``patches`` in force."""
    from torch._inductor import compile_fx as module
    from torch._inductor import list_mode_options

    options = dict(list_mode_options(mode)) if mode else {}
    return cast(Callable, module.compile_fx(graph_module, example_inputs, config_patches=options | patches))
