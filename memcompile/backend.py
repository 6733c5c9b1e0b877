"""The Dynamo backend: verifies that a captured graph runs the planned memory, then hands it to Inductor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from memcompile._torch import OVERLAP, compile_fx
from memcompile.errors import PlanError
from memcompile.lowering import cpu, inductor_patches
from memcompile.passes.checks.capacity import agreement_of
from memcompile.passes.checks.captured_memory import verify
from memcompile.passes.checks.dense_gradient import make_dense_where_read
from memcompile.runtime.pool import MemoryPool, live_pools
from memcompile.sharded_graphs import run_sharded, tables_among

log = logging.getLogger(__name__)

_NOT_PLANNED = (
    "memcompile's backend was called for a model that has no memory, because `import memcompile` did not come before "
    "`torch.compile(..., backend='memcompile')`. Add `import memcompile` at the top of the program, or call "
    "memcompile.plan(model) before compiling"
)


@dataclasses.dataclass(frozen=True)
class Backend:
    """What ``torch.compile`` calls with each captured graph.

    Attributes:
        pool: the memory of the model that is compiled; None for a function, which may run any planned model.
        whole: the graph must hold the whole forward (``fullgraph=True`` on the planned model itself).
    """

    pool: MemoryPool | None
    whole: bool

    @property
    def __name__(self) -> str:
        return "memcompile"

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable:
        pools = list(live_pools()) if self.pool is None else [self.pool]
        layers = {
            down if self.pool is not None else f"{type(pool.owner).__name__} {index}: {down}": list(layer.parameters())
            for index, pool in enumerate(pools)
            for down, layer in pool.layers.items()
        }
        calls = None
        if self.whole:
            calls = {site.down.removeprefix(pool.prefix): site.calls for pool in pools for site in pool.chosen}
        verify(graph_module, example_inputs, layers, calls)
        sharded = [pool for pool in pools if pool.table.sharded is not None]
        tables = tables_among(example_inputs, sharded)
        if make_dense_where_read(graph_module, example_inputs, [pool.table.part for pool in pools]):
            log.info("the compiled graph reads the memory's values beside its layers: their gradient is dense there")
        for pool in pools:
            pool.table.watch_gradient()
        agreement = agreement_of(graph_module, example_inputs)
        if agreement is not None and agreement.is_of_nothing:
            # Zeros of no tokens are constants to a compiler, which would send them before the other ranks send theirs.
            lowered: Callable = graph_module
        else:
            key = repr([pool.config for pool in pools])
            lowered = _lower(graph_module, example_inputs, key, overlaps=bool(sharded), **kwargs)
        return run_sharded(lowered, tables, agreement) if tables else lowered


def memcompile(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable:
    """The backend by its name alone: what a ``torch.compile`` that is not wrapped calls, for any planned model.

    Raises:
        PlanError: no model is planned, so this one runs dense.
    """
    if not any(True for _ in live_pools()):
        raise PlanError(_NOT_PLANNED)
    return Backend(None, whole=False)(graph_module, example_inputs, **kwargs)


def _lower(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    key: str,
    overlaps: bool,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    patches = (OVERLAP if overlaps else {}) | dict(options or {})
    if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in example_inputs):
        key += f", CPU kernels: {cpu.load()}"  # built now, and not in the first step
    patches |= inductor_patches(key, patches.get("post_grad_custom_pre_pass"))
    return compile_fx(graph_module, example_inputs, mode, patches)
