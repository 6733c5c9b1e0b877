"""What Inductor is told: the passes that this package runs on its graphs, and what its on-disk caches key on.

    the user's own      `post_grad_custom_pre_pass`, as Inductor would run it
    merge_scatters      sparse gradients of one table become one operator
    order_collectives   in the order in which they were traced, on every rank
    onednn              large fp32 products on the CPU, where PyTorch's MKL is held back

FxGraphCache and AOTAutogradCache key on the graph and on PyTorch, and on the `uuid()` of a custom graph pass:
`inductor_patches` gives them one. Importing this file imports Inductor, so `memcompile.lowering` does not import it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from memcompile.common.pipeline import Pipeline, is_dumping
from memcompile.lowering._torch import GraphPass, KeyedPass, configured_pre_passes, graph_pass_base, run_graph_pass
from memcompile.lowering.inductor.caches import source_digest
from memcompile.lowering.inductor.gemm import mkl_is_held_back, use_onednn
from memcompile.lowering.inductor.merge_scatters import merge_scatters
from memcompile.lowering.inductor.order_collectives import order_collectives
from memcompile.lowering.triton.register import load_in_graphs
from memcompile.lowering.triton.support import uses_atomics
from memcompile.version import __version__

# What each counts, and what it does to a graph.
_PASSES: dict[str, tuple[str, Callable[[torch.fx.Graph], int]]] = {
    "merge_scatters": ("scatters", merge_scatters),
    "order_collectives": ("collectives held back", order_collectives),
}
_ONEDNN = {"onednn": ("products replaced", use_onednn)}


class LoweringPass(KeyedPass, graph_pass_base()):  # type: ignore[misc]
    """The user's own passes, then this package's; its uuid names the package's version, its sources and the options."""

    def __init__(self, options: str, wrapped: Sequence[GraphPass] = ()) -> None:
        self.own = _PASSES | (_ONEDNN if mkl_is_held_back() else {})
        facts = (tuple(self.own), load_in_graphs(), uses_atomics())
        self.key = ("memcompile", __version__, source_digest(), options, *facts)
        self.wrapped = tuple(wrapped)

    def __call__(self, graph: torch.fx.Graph, is_inference: bool = False) -> None:
        pipeline, graphs = Pipeline("inductor"), [("Inductor's graph, forward or backward", graph)]
        for graph_pass in self.wrapped:
            with pipeline.step("users_pass", "nodes left", graphs):
                run_graph_pass(graph_pass, graph, is_inference)
                pipeline.count = len(graph.nodes)
        for name, (counts, own) in self.own.items():
            with pipeline.step(name, counts, graphs):
                pipeline.count = own(graph)

    def uuid(self) -> Any:
        """A key, or None (no caching, by Inductor's convention) when a wrapped pass has none, or when graphs are to be
        written: a graph that comes from a cache runs no pass.
        """
        keys = [graph_pass.uuid() if hasattr(graph_pass, "uuid") else None for graph_pass in self.wrapped]
        return None if None in keys or is_dumping() else (*self.key, *keys)


def inductor_patches(options: str, given: Any = None) -> dict[str, Any]:
    """Config patches for `compile_fx`: this package's graph pass, on which Inductor's caches then key.

    Args:
        options: whatever changes the code that is generated, as a string.
        given: a `post_grad_custom_pre_pass` of this compilation, one or a list; None is what Inductor's
            configuration holds.

    The user's own pass still runs, and its uuid stays part of the key.
    """
    own = [graph_pass for graph_pass in configured_pre_passes(given) if not isinstance(graph_pass, LoweringPass)]
    return {"post_grad_custom_pre_pass": LoweringPass(options, own)}
