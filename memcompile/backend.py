"""The Dynamo backend: verifies that a captured graph runs the planned memory, then hands it to Inductor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from memcompile._torch import compile_fx
from memcompile.errors import PlanError
from memcompile.lowering import cache_key_patches
from memcompile.passes.verify import is_lookup, verify
from memcompile.runtime.pool import MemoryPool, live_pools

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
        layers: dict[Hashable, dict[str, torch.nn.Parameter]] = {
            (id(pool), name): dict(layer.named_parameters()) for pool in pools for name, layer in pool.layers.items()
        }
        calls: dict[Hashable, int] | None = (
            {(id(pool), site.down): site.calls for pool in pools for site in pool.chosen} if self.whole else None
        )
        verify(graph_module, example_inputs, layers, calls)
        return _lower(graph_module, example_inputs, repr([pool.config for pool in pools]), **kwargs)


def memcompile(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable:
    """The backend by its name alone, for graphs of a model that `memcompile.plan` changed.

    Raises:
        PlanError: the graph holds no memory: the model was never planned.
    """
    if not any(is_lookup(node) for module in graph_module.modules() for node in _nodes(module)):
        raise PlanError(_NOT_PLANNED)
    return _lower(graph_module, example_inputs, key="", **kwargs)


def _nodes(module: torch.nn.Module) -> Sequence[fx.Node]:
    return list(module.graph.nodes) if isinstance(module, fx.GraphModule) else ()


def _lower(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    key: str,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    return compile_fx(graph_module, example_inputs, mode, {**(options or {}), **cache_key_patches(key)})
