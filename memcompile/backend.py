"""The Dynamo backend: the passes over each captured graph, of which the last hands it to Inductor.

verify            the graph runs the memory exactly as planned, or is refused
dense_gradient    lookups of values that something else reads too give them a dense gradient
capacity          where the graph takes what ranks that share a table agree on before each run
inductor          AOTAutograd and Inductor, whose own graphs go through `lowering/inductor/graph_pass.py`
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from memcompile._torch import OVERLAP, compile_fx, list_backends, register_backend
from memcompile.common.pipeline import Step, run
from memcompile.errors import PlanError
from memcompile.lowering import cpu
from memcompile.lowering.inductor.graph_pass import inductor_patches
from memcompile.passes.checks.capacity import Agreement, agreement_of
from memcompile.passes.checks.captured_memory import verify_captured_memory
from memcompile.passes.checks.dense_gradient import make_dense_where_read
from memcompile.runtime.pool import MemoryPool, live_pools
from memcompile.sharded_graphs import Table, run_sharded, tables_among

log = logging.getLogger(__name__)

_NOT_PLANNED = (
    "memcompile's backend was called for a model that has no memory, because `import memcompile` did not come before "
    "`torch.compile(..., backend='memcompile')`. Add `import memcompile` at the top of the program, or call "
    "memcompile.plan(model) before compiling"
)


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
        compilation = _Compilation(graph_module, example_inputs, pools, self, mode, dict(options or {}))
        run("compile", PASSES, compilation)
        assert compilation.lowered is not None
        tables = compilation.tables
        return run_sharded(compilation.lowered, tables, compilation.agreement) if tables else compilation.lowered


def memcompile(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable:
    """The backend by its name alone: what a ``torch.compile`` that is not wrapped calls, for any planned model.

    Raises:
        PlanError: no model is planned, so this one runs dense.
    """
    if not any(True for _ in live_pools()):
        raise PlanError(_NOT_PLANNED)
    return Backend(None, whole=False)(graph_module, example_inputs, **kwargs)


def register() -> None:
    """Makes the name known to Dynamo, for a `torch.compile` that was kept before it was wrapped. Idempotent: Dynamo
    knows an installed package by its entry point.
    """
    name = memcompile.__name__
    if name not in list_backends(exclude_tags=()):
        register_backend(memcompile, name=name)


@dataclasses.dataclass
class _Compilation:
    """One captured graph: what the passes read, and what each leaves for the next.

    Attributes:
        graph_module, inputs: what Dynamo captured.
        pools: the memories that it may run.
        backend: who was called.
        mode, options: of `torch.compile`, for Inductor.
        tables: where sharded values are among the inputs.
        agreement: what ranks agree on before each run, where they do.
        lowered: the compiled graph.
    """

    graph_module: fx.GraphModule
    inputs: Sequence[Any]
    pools: Sequence[MemoryPool]
    backend: Backend
    mode: str | None
    options: dict[str, Any]
    tables: list[Table] = dataclasses.field(default_factory=list)
    agreement: Agreement | None = None
    lowered: Callable | None = None

    def graphs(self) -> list[tuple[str, fx.Graph]]:
        return [("the graph that Dynamo captured", self.graph_module.graph)]


def _verify(compilation: _Compilation) -> int:
    pools, backend = compilation.pools, compilation.backend
    layers = {
        down if backend.pool is not None else f"{type(pool.owner).__name__} {index}: {down}": list(layer.parameters())
        for index, pool in enumerate(pools)
        for down, layer in pool.layers.items()
    }
    calls = None
    if backend.whole:
        calls = {site.down.removeprefix(pool.prefix): site.calls for pool in pools for site in pool.chosen}
    return verify_captured_memory(compilation.graph_module, compilation.inputs, layers, calls).total()


def _make_dense(compilation: _Compilation) -> int:
    values = [pool.table.part for pool in compilation.pools]
    made_dense = make_dense_where_read(compilation.graph_module, compilation.inputs, values)
    if made_dense:
        log.info("the compiled graph reads the memory's values outside of its layers: their gradient is dense there")
    return made_dense


def _find_capacity(compilation: _Compilation) -> int:
    sharded = [pool for pool in compilation.pools if pool.table.sharded is not None]
    compilation.tables = tables_among(compilation.inputs, sharded)
    compilation.agreement = agreement_of(compilation.graph_module, compilation.inputs)
    return len(compilation.tables)


def _lower(compilation: _Compilation) -> int:
    graph_module, agreement = compilation.graph_module, compilation.agreement
    if agreement is not None and agreement.has_an_empty_lookup:
        # Zeros of no tokens are constants to a compiler, which would send them before the other ranks send theirs.
        compilation.lowered = graph_module
        return 0
    overlaps = OVERLAP if any(pool.table.sharded is not None for pool in compilation.pools) else {}
    patches = overlaps | compilation.options
    key = repr([pool.config for pool in compilation.pools])
    if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in compilation.inputs):
        key += f", CPU kernels: {cpu.load()}"  # built now, and not in the first step
    patches |= inductor_patches(key, patches.get("post_grad_custom_pre_pass"))
    compilation.lowered = compile_fx(graph_module, compilation.inputs, compilation.mode, patches)
    return len(graph_module.graph.nodes)


PASSES = (
    Step("verify", _verify, "lookups", _Compilation.graphs),
    Step("dense_gradient", _make_dense, "lookups made dense", _Compilation.graphs),
    Step("capacity", _find_capacity, "sharded tables", _Compilation.graphs),
    Step("inductor", _lower, "nodes compiled"),
)
