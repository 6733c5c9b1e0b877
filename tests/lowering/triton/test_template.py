"""A version of PyTorch whose Inductor is not known: said once, and graphs hold the kernel in the template's place."""

import importlib
import logging
import sys
from typing import Any

import pytest
import torch

import memcompile.lowering.triton as folder
from memcompile.lowering import inductor_patches
from memcompile.lowering.triton import load, template
from tests.lowering.triton import test_generated_code as known
from tests.lowering.triton.fake_gpu import generated_sources
from tests.lowering.triton.generated import allocations, extern_calls, launches

_inductor: Any = importlib.import_module("memcompile.lowering.triton._inductor")


@pytest.fixture
def unregistered(monkeypatch):
    """As where Inductor does not know it. The true registration stays in Inductor: it can be done once in a process."""
    load.load_in_graphs()
    monkeypatch.setattr(template, "register", lambda: False)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "memcompile.lowering.triton.template")
    return lambda: [record.getMessage() for record in caplog.records if record.name == template.__name__]


def moved(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("TritonTemplate() got an unexpected keyword argument 'grid'")


def no_module(monkeypatch):
    monkeypatch.setitem(sys.modules, _inductor.__name__, None)  # an import of it raises ImportError
    monkeypatch.delattr(folder, "_inductor")


def no_name(monkeypatch):
    monkeypatch.delattr(_inductor, "SymbolicGridFn")


def other_arguments(monkeypatch):
    monkeypatch.setattr(_inductor, "TritonTemplate", moved)


@pytest.mark.parametrize("change", [no_module, no_name, other_arguments])
def test_an_unknown_inductor_is_said(monkeypatch, warnings, change):
    template.register()
    change(monkeypatch)
    assert template.register.__wrapped__() is False
    (message,) = warnings()
    assert torch.__version__ in message and "gate is not fused" in message


def test_it_is_said_once(monkeypatch, warnings):
    template.register()
    no_module(monkeypatch)
    template.register.cache_clear()
    assert [template.register() for _ in range(3)] == [False] * 3
    assert len(warnings()) == 1
    template.register.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(template, "_register", lambda inductor: None)  # done in this process
    assert template.register() is True


def test_graphs_then_hold_the_kernel(unregistered):
    """The same kernels but for the template; the gate is one more. The numbers are those of the same loop."""
    module = known.Lookup()
    sources = known.gpu_sources(module, [known.meta(known.TOKENS, known.WIDTH, requires_grad=True)])
    assert known.ours(sources.forward)[1:] == ["rank_candidates", "weighted_gather_rows"]
    gathered = ["gather_dot_rows", *["join_chunks"] * 2, *["sum_chunks"] * 2, "weighted_gather_rows"]
    assert sorted(known.ours(sources.backward)) == gathered
    gates = [name for name in launches(sources.forward) if "silu" in name]
    assert len(gates) == 1 and gates[0].startswith("triton_poi")
    for source in (sources.forward, sources.backward):
        assert not known.templates(source)
        known.assert_no_detours(source)
    table = ((known.SLOTS, known.VALUE_DIM), torch.bfloat16)
    assert table not in allocations(sources.forward)
    assert allocations(sources.backward).count(table) == 1


def test_a_choice_that_cannot_be_made_leaves_a_call(monkeypatch, warnings):
    """Known only where a graph is lowered, too late for the kernel: the operator itself is called."""
    monkeypatch.setattr(_inductor.TritonTemplate, "maybe_append_choice", moved)
    source = known.gpu_sources(known.gated, known.gather_inputs()).forward
    assert extern_calls(source) == ["torch.ops.memcompile.weighted_gather.default"]
    assert len(warnings()) == 1


def test_the_lowering_of_a_device_that_is_not_served_is_a_call():
    """The CPU's graph holds the operator too, in the same process."""
    source = generated_sources(
        known.gated,
        [
            torch.empty(64, 24, dtype=torch.float64),
            torch.empty(5, 6, dtype=torch.int32),
            torch.empty(5, 6, dtype=torch.float64),
            torch.empty(5, 24, dtype=torch.float64),
        ],
        config_patches=inductor_patches(""),
    ).forward
    assert extern_calls(source) == ["torch.ops.memcompile.weighted_gather.default"]
