"""The Dynamo backend: the passes over each captured graph, of which the last hands it to Inductor, whose own graphs go
through `lowering/inductor/graph_pass.py`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from memcompile._torch import OVERLAP, compile_fx, list_backends, register_backend
from memcompile.common.pipeline import Pipeline
from memcompile.errors import PlanError
from memcompile.lowering import cpu
from memcompile.lowering.inductor.graph_pass import inductor_patches
from memcompile.passes.checks.captured_memory import make_dense_where_read, verify_captured_memory
from memcompile.runtime.pool import MemoryPool, live_pools
from memcompile.sharded_graphs import agreement_of, run_sharded, tables_among

log = logging.getLogger(__name__)


class Backend:
    """What ``torch.compile`` calls with each captured graph.

    It does not keep the model alive: Dynamo never drops a backend.

    Attributes:
        pool: the memory of the model that is compiled; None for a function, which may run any planned model.
        whole: the graph must hold the whole forward (``fullgraph=True`` on the planned model itself).
    """

    def __init__(self, pool: MemoryPool | None, whole: bool) -> None:
        self._pool = None if pool is None else weakref.ref(pool)
        self.whole = whole

    @property
    def pool(self) -> MemoryPool | None:
        pool = None if self._pool is None else self._pool()
        assert (pool is None) == (self._pool is None), "the model that is compiled is alive"
        return pool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and (self._pool, self.whole) == (other._pool, other.whole)

    def __hash__(self) -> int:
        return hash((self._pool, self.whole))

    def __reduce__(self) -> tuple[type[Backend], tuple[MemoryPool | None, bool]]:
        return Backend, (self.pool, self.whole)  # a copied model is compiled with its own pool

    @property
    def __name__(self) -> str:
        return "memcompile"

    def __call__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable:
        pools = list(live_pools()) if self.pool is None else [self.pool]
        for pool in pools:
            pool.table.watch_gradient()
        pipeline, graphs = Pipeline("compile"), [("the graph that Dynamo captured", graph_module.graph)]
        with pipeline.step("verify", "lookups", graphs):
            layers, calls = self._planned(pools)
            pipeline.count = verify_captured_memory(graph_module, example_inputs, layers, calls).total()
        with pipeline.step("dense_gradient", "lookups made dense", graphs):
            values = [pool.table.part for pool in pools]
            pipeline.count = make_dense_where_read(graph_module, example_inputs, values)
            if pipeline.count:
                log.info("the compiled graph reads the memory's values outside of its layers: their gradient is dense")
        sharded = [pool for pool in pools if pool.table.sharded is not None]
        with pipeline.step("capacity", "sharded tables", graphs):
            tables = tables_among(example_inputs, sharded)
            agreement = agreement_of(graph_module, example_inputs)
            pipeline.count = len(tables)
        if agreement is not None and 0 in agreement.tokens:
            # Zeros of no tokens are constants to a compiler, which would send them before the other ranks send theirs.
            return run_sharded(graph_module, tables, agreement)
        with pipeline.step("inductor", "nodes compiled"):
            patches = (OVERLAP if sharded else {}) | dict(options or {})
            key = repr([pool.config for pool in pools])
            if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in example_inputs):
                key += f", CPU kernels: {cpu.load()}"  # built now, and not in the first step
            patches |= inductor_patches(key, patches.get("post_grad_custom_pre_pass"))
            lowered = compile_fx(graph_module, example_inputs, mode, patches)
            pipeline.count = len(graph_module.graph.nodes)
        return run_sharded(lowered, tables, agreement) if tables else lowered

    def _planned(self, pools: Sequence[MemoryPool]) -> tuple[dict[str, list[nn.Parameter]], dict[str, int] | None]:
        """Each layer's parameters; and how often it runs, where that is known. Layers have the names of their
        down-projections, after the name of their model where there may be several.
        """
        layers = {
            down if self.pool is not None else f"{type(pool.owner).__name__} {index}: {down}": pool.layer_parameters(
                down
            )
            for index, pool in enumerate(pools)
            for down in pool.layers
        }
        if not self.whole:
            return layers, None
        return layers, {site.down.removeprefix(pool.prefix): site.calls for pool in pools for site in pool.chosen}


def memcompile(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable:
    """The backend by its name alone: what a ``torch.compile`` that is not wrapped calls, for any planned model.

    Raises:
        PlanError: no model is planned, so this one runs dense.
    """
    if not any(True for _ in live_pools()):
        raise PlanError(
            "memcompile's backend was called for a model that has no memory, because `import memcompile` did not come "
            "before `torch.compile(..., backend='memcompile')`. Add `import memcompile` at the top of the program, or "
            "call memcompile.plan(model) before compiling"
        )
    return Backend(None, whole=False)(graph_module, example_inputs, **kwargs)


def register() -> None:
    """Makes the name known to Dynamo, for a `torch.compile` that was kept before it was wrapped. Idempotent: Dynamo
    knows an installed package by its entry point.
    """
    name = memcompile.__name__
    if name not in list_backends(exclude_tags=()):
        register_backend(memcompile, name=name)
