"""Shared by all tests: a fresh Dynamo for each, and Inductor left out where only the captured graphs matter."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other, and for xdist's other worker


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def lowered(monkeypatch):
    """Each graph that reaches Inductor, as ``(graph module, config patches)``; it runs eagerly instead."""
    graphs: list[tuple[torch.fx.GraphModule, dict]] = []

    def record(graph_module, example_inputs, config_patches):
        graphs.append((graph_module, config_patches))
        return graph_module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", record)
    return graphs
