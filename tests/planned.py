"""What the tests of planned models share: a small memory, a compiler that stops before Inductor, comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import memcompile
from memcompile.passes.checks.captured_memory import is_lookup
from tests.models import BATCH, TIME, VOCABULARY, tiny_gpt

MEMORY: dict[str, Any] = {"n_keys": 8, "heads": 2, "top_k": 4, "key_dim": 8}


def planned_gpt(
    layers: int = 2, memory_layers: Any = 1, seed: int = 0, dropout: float = 0.0, **options: Any
) -> nn.Module:
    """A planned `tiny_gpt`; the same seed gives the same model."""
    torch.manual_seed(seed)
    model = tiny_gpt(layers=layers, dropout=dropout)
    memcompile.plan(model, memory_layers=memory_layers, **MEMORY | options)
    return model


def batch(seed: int = 0, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Tokens and targets, [size, TIME] each."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCABULARY, (2, size, TIME), generator=generator)
    return tokens, targets


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A dense copy of every gradient, by name; every parameter must have one."""
    return {name: p.grad.to_dense() if p.grad.is_sparse else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and bit for bit the same tensors."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{different} differ"


def plain_attention() -> contextlib.AbstractContextManager[None]:
    """For compiled models in fp64: torch 2.11 has no backward for the CPU's fused attention in it."""
    return sdpa_kernel(SDPBackend.MATH)


def lookups(graph: fx.Graph) -> int:
    return sum(map(is_lookup, graph.nodes))


def stop_before_inductor(monkeypatch: pytest.MonkeyPatch, run: Callable) -> list[fx.GraphModule]:
    """Has ``run(graph_module, inputs)`` run what Dynamo captured and our backend verified, in the place of Inductor,
    which takes ten times as long. Returns the list that the captured graphs are added to.
    """
    captured: list[fx.GraphModule] = []

    def compile_fx(graph_module: fx.GraphModule, example_inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        captured.append(graph_module)
        return run(graph_module, example_inputs)

    monkeypatch.setattr("memcompile.backend.compile_fx", compile_fx)
    return captured
