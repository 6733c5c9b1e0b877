"""Shared by all tests: a fresh Dynamo for each, and Inductor left out where only the captured graphs matter."""

from __future__ import annotations

import signal

import pytest
import torch

from tests import heap

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other, and for xdist's other worker
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and all they start, ignore it


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    torch.compiler.reset()
    heap.freeze()


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
