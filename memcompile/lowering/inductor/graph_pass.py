"""What Inductor is told: the pass that this package runs on its graphs, and the options that its on-disk caches key on.

FxGraphCache and AOTAutogradCache key on the graph and on PyTorch, and on the `uuid()` of a custom graph pass:
`inductor_patches` gives them one. Importing this file imports Inductor, so `memcompile.lowering` does so only when one
of its names is asked for.
"""

from collections.abc import Sequence
from typing import Any

import torch

from memcompile.lowering._torch import GraphPass, KeyedPass, configured_pre_passes, graph_pass_base, run_graph_pass
from memcompile.lowering.inductor.caches import source_digest
from memcompile.lowering.inductor.gemm import mkl_is_held_back, use_onednn
from memcompile.lowering.inductor.merge_scatters import merge_scatters
from memcompile.lowering.inductor.order_collectives import order_collectives
from memcompile.lowering.triton.load import load_in_graphs
from memcompile.lowering.triton.settings import uses_atomics
from memcompile.version import __version__


class LoweringPass(KeyedPass, graph_pass_base()):  # type: ignore[misc]
    """The user's own pass, then this package's; its uuid names the package's version, its sources and the options."""

    def __init__(self, options: str, wrapped: Sequence[GraphPass] = ()) -> None:
        self.use_onednn = mkl_is_held_back()
        facts = (self.use_onednn, load_in_graphs(), uses_atomics())
        self.key = ("memcompile", __version__, source_digest(), options, *facts)
        self.wrapped = tuple(wrapped)

    def __call__(self, graph: torch.fx.Graph, is_inference: bool = False) -> None:
        for graph_pass in self.wrapped:
            run_graph_pass(graph_pass, graph, is_inference)
        merge_scatters(graph)
        order_collectives(graph)
        if self.use_onednn:
            use_onednn(graph)

    def uuid(self) -> Any:
        """A key, or None (no caching, by Inductor's convention) when a wrapped pass has none."""
        keys = [graph_pass.uuid() if hasattr(graph_pass, "uuid") else None for graph_pass in self.wrapped]
        return None if None in keys else (*self.key, *keys)


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
