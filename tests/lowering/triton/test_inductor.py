"""The template of `weighted_gather`: what Inductor makes of it; and where its Inductor is not known, which is said
once, graphs hold the kernel in its place.
"""

import importlib
import logging
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import select_algorithm

import memcompile.lowering.triton as folder
from memcompile.lowering import operator
from memcompile.lowering.inductor.graph_pass import inductor_patches
from memcompile.lowering.triton import configs, register, support
from tests.lowering.triton.addresses import overflowing_offsets
from tests.lowering.triton.fake_gpu import first_choice, generated_sources
from tests.lowering.triton.generated import allocations, compile_kernels, extern_calls, launches, triton_kernels
from tests.lowering.triton.test_generated_code import (
    SLOTS,
    TOKENS,
    VALUE_DIM,
    WIDTH,
    Lookup,
    assert_no_detours,
    gpu_sources,
    meta,
    ours,
    templates,
)

_inductor: Any = importlib.import_module("memcompile.lowering.triton._inductor")


def gated(values: Tensor, slots: Tensor, weights: Tensor, gate: Tensor) -> Tensor:
    return operator("weighted_gather")(values, slots, weights) * F.silu(gate)


def gather_inputs(
    tokens: int = TOKENS, slots: int = SLOTS, value_dim: int = VALUE_DIM, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    hits = 128
    return [
        meta(slots, value_dim, dtype=dtype),
        meta(tokens, hits, dtype=torch.int32),
        meta(tokens, hits, dtype=torch.float32),
        meta(tokens, value_dim, dtype=dtype),
    ]


def block_sizes(choice: Any) -> tuple[int, int]:
    found = re.search(
        r"BLOCK_COLUMNS=(\d+).*BLOCK_HITS=(\d+)|BLOCK_HITS=(\d+).*BLOCK_COLUMNS=(\d+)", choice.description
    )
    columns, hits, hits_, columns_ = found.groups()
    return int(hits or hits_), int(columns or columns_)


def autotuned(index: int) -> tuple[str, list[tuple[int, int]]]:
    """The source with choice `index` of those that are offered, and the blocks of all of them."""
    blocks: list[tuple[int, int]] = []

    def choose(name: str, choices: Any) -> Any:
        assert name == "memcompile_weighted_gather"
        blocks.extend(map(block_sizes, choices))
        return choices[index]

    sources = gpu_sources(gated, gather_inputs(), config_patches={"max_autotune": True}, choose=choose)
    return sources.forward, blocks


@pytest.mark.parametrize("index", range(len(configs.GATHERING)))
def test_max_autotune_offers_every_configuration(index):
    """Each compiles without spills, and its rows are addressed in 64 bits."""
    source, blocks = autotuned(index)
    wanted = [(config["BLOCK_HITS"], config["BLOCK_COLUMNS"]) for config in configs.gather_configs(TOKENS, VALUE_DIM)]
    assert blocks == wanted and len(wanted) == len(configs.GATHERING)
    target = ("sm_90", "sm_80", "sm_100", "gfx942")[index % 4]
    for where in {"sm_90", target}:
        (kernel,) = compile_kernels(source, where)
        assert kernel.compiled.resources.spills == 0
        assert kernel.compiled.resources.registers <= 128
        assert overflowing_offsets(kernel.compiled, ["arg_values", "arg_slots", "arg_weights"]) == []


def test_without_max_autotune_nothing_is_measured():
    def choose(name: str, choices: Any) -> Any:
        raise AssertionError(f"{name} had {len(choices)} choices")

    (template,) = templates(gpu_sources(gated, gather_inputs(), choose=choose).forward)
    best = configs.gather_configs(TOKENS, VALUE_DIM)[0]
    assert f"BLOCK_HITS : tl.constexpr = {best['BLOCK_HITS']}" in template
    assert f"BLOCK_COLUMNS : tl.constexpr = {best['BLOCK_COLUMNS']}" in template


@pytest.mark.parametrize(
    ("tokens", "slots", "value_dim"), [(TOKENS, 2**20, 1000), (2**22, 2**20, 1024), (TOKENS, 2**31, 4096)]
)
def test_the_templates_addresses(tokens, slots, value_dim):
    """Rows of a table, and of outputs and a gate of 2**32 numbers."""
    source = gpu_sources(gated, gather_inputs(tokens, slots, value_dim), choose=first_choice).forward
    (kernel,) = compile_kernels(source)
    pointers = re.findall(r"%(\w+): !tt\.ptr", kernel.compiled.asm["ttir"].partition("{\n")[2].splitlines()[0])
    largest = {"arg_slots": slots - 1, "program_id(0)": tokens - 1, "program_id(1)": -(-value_dim // 8) - 1}
    names = pointers or ["arg_values", "arg_slots", "arg_weights"]
    assert len(names) >= 5
    assert overflowing_offsets(kernel.compiled, names, largest) == []


def test_a_choice_is_measured_on_a_part_of_the_table(monkeypatch):
    """Inputs to measure on: a table of a terabyte has no second copy."""
    made: list[dict[int, Any]] = []
    autotune = _inductor.autotune_select_algorithm

    def spy(*args: Any, input_gen_fns: dict[int, Any]) -> Any:
        made.append(input_gen_fns)
        return autotune(*args, input_gen_fns=input_gen_fns)

    monkeypatch.setattr(_inductor, "autotune_select_algorithm", spy)
    gpu_sources(gated, gather_inputs(slots=2**31), config_patches={"max_autotune": True})
    assert made and {*made[0]} == {0, 1}


def test_the_cpu_runs_what_it_ran():
    """Where `is_gpu` is not patched the graphs hold the operators, and the CPU calls its own kernels of them."""
    source = generated_sources(
        lambda values, slots, weights, gate: gated(values, slots, weights, gate),
        [
            torch.empty(64, 24),
            torch.empty(5, 6, dtype=torch.int32),
            torch.empty(5, 6, requires_grad=True),
            torch.empty(5, 24),
        ],
        config_patches=inductor_patches(""),
        gpu=False,
    )
    assert extern_calls(source.forward) == ["torch.ops.memcompile.weighted_gather.default"]
    assert extern_calls(source.backward) == ["torch.ops.memcompile.gather_dot.default"]
    assert not triton_kernels(source.forward) and not triton_kernels(source.backward)


# --- An Inductor that is not known ------------------------------------------------------------------------------------


@pytest.fixture
def unregistered(monkeypatch):
    """As where Inductor does not know it. The true registration stays in Inductor: it can be done once in a process."""
    register.load_in_graphs()
    monkeypatch.setattr(register, "register_template", lambda: False)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, support.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == support.__name__]


def moved(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("TritonTemplate() got an unexpected keyword argument 'grid'")


def no_module(monkeypatch):
    monkeypatch.setitem(sys.modules, _inductor.__name__, None)  # an import of it raises ImportError
    monkeypatch.delattr(folder, "_inductor")


def no_name(monkeypatch):
    monkeypatch.delattr(select_algorithm, "SymbolicGridFn")
    monkeypatch.delitem(sys.modules, _inductor.__name__)  # imported again it raises ImportError
    monkeypatch.delattr(folder, "_inductor")


def other_arguments(monkeypatch):
    monkeypatch.setattr(_inductor, "TritonTemplate", moved)


@pytest.mark.parametrize("change", [no_module, no_name, other_arguments])
def test_an_unknown_inductor_is_said(monkeypatch, warnings, change):
    register.register_template()
    change(monkeypatch)
    assert register.register_template.__wrapped__() is False
    (message,) = warnings()
    assert torch.__version__ in message and "gate is not fused" in message


def test_it_is_said_once(monkeypatch, warnings):
    register.register_template()
    no_module(monkeypatch)
    register.register_template.cache_clear()
    assert [register.register_template() for _ in range(3)] == [False] * 3
    assert len(warnings()) == 1
    register.register_template.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(_inductor, "register_template", lambda: None)  # done in this process
    assert register.register_template() is True


def test_graphs_then_hold_the_kernel(unregistered):
    """The same kernels but for the template; the gate is one more. The numbers are those of the same loop."""
    module = Lookup()
    sources = gpu_sources(module, [meta(TOKENS, WIDTH, requires_grad=True)])
    assert ours(sources.forward)[1:] == ["rank_candidates", "weighted_gather_rows"]
    gathered = ["gather_dot_rows", *["join_chunks"] * 2, *["sum_chunks"] * 2, "weighted_gather_rows"]
    assert sorted(ours(sources.backward)) == gathered
    gates = [name for name in launches(sources.forward) if "silu" in name]
    assert len(gates) == 1 and gates[0].startswith("triton_poi")
    for source in (sources.forward, sources.backward):
        assert not templates(source)
        assert_no_detours(source)
    table = ((SLOTS, VALUE_DIM), torch.bfloat16)
    assert table not in allocations(sources.forward)
    assert allocations(sources.backward).count(table) == 1


def test_a_choice_that_cannot_be_made_leaves_a_call(monkeypatch, warnings):
    """Known only where a graph is lowered, too late for the kernel: the operator itself is called."""
    monkeypatch.setattr(_inductor.TritonTemplate, "maybe_append_choice", moved)
    source = gpu_sources(gated, gather_inputs()).forward
    assert extern_calls(source) == ["torch.ops.memcompile.weighted_gather.default"]
    assert len(warnings()) == 1


def test_the_lowering_of_a_device_that_is_not_served_is_a_call():
    """The CPU's graph holds the operator too, in the same process."""
    source = generated_sources(
        gated,
        [
            torch.empty(64, 24, dtype=torch.float64),
            torch.empty(5, 6, dtype=torch.int32),
            torch.empty(5, 6, dtype=torch.float64),
            torch.empty(5, 24, dtype=torch.float64),
        ],
        config_patches=inductor_patches(""),
    ).forward
    assert extern_calls(source) == ["torch.ops.memcompile.weighted_gather.default"]
