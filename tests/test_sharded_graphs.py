"""The code that Inductor generates for a sharded model: which collectives, of which sizes, and what stands between."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore

import memcompile
from memcompile.cost.job import Job
from memcompile.cost.wire import layer_collectives
from memcompile.runtime._torch import local_part, whole_like
from memcompile.sharded_graphs import agreement_of
from tests.planned import MEMORY, batch, planned_gpt
from tests.runtime.distributed.sharded import memory_mesh, sharded_gpt

LAYERS = 3
COLLECTIVE = re.compile(r"(buf\d+) = torch\.ops\._c10d_functional\.(\w+)\.default\(")
SIZE = re.compile(r"assert_(?:size_stride|tensor_metadata)\((buf\d+), \(([\d, ]+)\)")
WAIT = re.compile(r"_c10d_functional\.wait_tensor\.default\((buf\d+)\)")
COMPUTE = re.compile(r"extern_kernels\.\w*mm\(|mkldnn|onednn_mm")


@pytest.fixture
def fake_ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A job of so many ranks, of which this process is one, and no other exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    torch._dynamo.reset()
    yield request.param
    dist.destroy_process_group()
    torch._dynamo.reset()


def generated(model: nn.Module, size: int = 3, backward: bool = True) -> list[str]:
    """The code of the forward, and of the backward."""
    if model.memory_values.dtype is torch.float64:  # whose attention has no backward in compiled graphs of 2.11
        model.float()
    run = torch.compile(model, backend="memcompile", fullgraph=True)

    def step() -> None:
        loss = run(*batch(size=size))
        if backward:
            loss.backward()

    _, code = run_and_get_code(step)
    return [source[source.index("def call") :] for source in code]


def collectives(code: str) -> Counter[str]:
    return Counter(name for _, name in COLLECTIVE.findall(code))


@pytest.mark.parametrize("fake_ranks", [4], indirect=True)
@pytest.mark.parametrize("tokens", ["even", "uneven"])
def test_columns_take_one_all_gather_and_one_all_to_all_a_layer(fake_ranks, tokens):
    forward, backward = generated(sharded_gpt(memory_mesh(4), tokens=tokens, layers=4, memory_layers=LAYERS))
    assert collectives(forward) == {"all_gather_into_tensor": LAYERS, "all_to_all_single": LAYERS}
    assert collectives(backward) == {"all_to_all_single": 2 * LAYERS}  # the second is a reduce-scatter on a GPU


@pytest.mark.parametrize("fake_ranks", [4], indirect=True)
def test_rows_take_one_all_gather_and_one_reduce_scatter_a_layer(fake_ranks):
    forward, backward = generated(sharded_gpt(memory_mesh(4), by="rows", layers=4, memory_layers=LAYERS))
    on_the_cpu = {"all_gather_into_tensor": LAYERS, "all_to_all_single": LAYERS}
    assert collectives(forward) == collectives(backward) == on_the_cpu


@pytest.mark.parametrize("fake_ranks", [4], indirect=True)
def test_tensor_parallelism_gathers_no_slots(fake_ranks):
    forward, backward = generated(sharded_gpt(memory_mesh(4), tokens="shared", layers=4, memory_layers=LAYERS))
    reduced = re.compile(r"_c10d_functional\.all_reduce_?\.default")
    assert len(reduced.findall(forward)) == LAYERS and len(reduced.findall(backward)) == 2 * LAYERS
    assert not collectives(forward).keys() | collectives(backward).keys() - {"all_reduce", "all_reduce_"}


@pytest.mark.parametrize("fake_ranks", [4], indirect=True)
@pytest.mark.parametrize("by", ["columns", "rows"])
def test_the_table_is_never_sent(fake_ranks, by):
    """What is sent is of the tokens: with other tokens it has other sizes, and none is as large as a rank's part."""
    model = sharded_gpt(memory_mesh(4), by=by, tokens="even", n_keys=128, layers=4, memory_layers=LAYERS)
    part = model.memory_values.to_local().numel()
    sizes = sent_sizes(generated(model))
    assert sizes and max(sizes) < part / 4
    torch._dynamo.reset()
    assert min(more / less for more, less in zip(sent_sizes(generated(model, size=6)), sizes, strict=True)) > 1.5


def sent_sizes(code: list[str]) -> list[int]:
    """The numbers of elements of what every collective returns."""
    return [elements for part in code for _, elements in results_of_collectives(part)]


def results_of_collectives(code: str) -> list[tuple[str, int]]:
    """Each collective's name, and the number of elements that it returns, which the code asserts."""
    sizes = {name: math.prod(map(int, re.findall(r"\d+", shape))) for name, shape in SIZE.findall(code)}
    return [(operation, sizes[name]) for name, operation in COLLECTIVE.findall(code)]


@pytest.mark.parametrize("fake_ranks", [4], indirect=True)
def test_compute_stands_between_start_and_wait(fake_ranks):
    """The gate's product while columns travel forward, and four products a layer while gradients of weights do."""
    forward, backward = generated(sharded_gpt(memory_mesh(4), layers=4, memory_layers=LAYERS))
    assert products_between(forward)["all_to_all_single"] == [1] * LAYERS
    assert min(products_between(backward)["all_to_all_single"][1::2]) >= 2


def products_between(code: str) -> dict[str, list[int]]:
    """How many matrix products stand between each collective's start and its wait."""
    lines, started, found = code.splitlines(), {}, {}
    for at, line in enumerate(lines):
        if line.lstrip().startswith("#"):
            continue
        if start := COLLECTIVE.search(line):
            started[start[1]] = at, start[2]
        elif (wait := WAIT.search(line)) and wait[1] in started:
            begin, name = started[wait[1]]
            found.setdefault(name, []).append(sum(bool(COMPUTE.search(between)) for between in lines[begin:at]))
    return found


@pytest.mark.parametrize("fake_ranks", [1024], indirect=True)
@pytest.mark.parametrize("by", ["columns", "rows"])
def test_a_job_of_1024_ranks_sends_what_the_cost_model_says(fake_ranks, by):
    """Received bytes of the collectives in the generated code, against `memcompile.cost.wire`."""
    size, value_dim = 3, 2048
    model = planned_gpt(layers=4, memory_layers=LAYERS, value_dim=value_dim, values_grad="sparse")
    memcompile.shard(model, memory_mesh(1024), by=by, tokens="even")
    heads, top_k = MEMORY["heads"], MEMORY["top_k"]
    job = Job(slots=64, value_dim=value_dim, gpus=1024, tokens=size * 5, heads=heads, top_k=top_k, dtype="fp32", by=by)
    collectives_of_layer = layer_collectives(job, 1024)
    for code, planned in zip(generated(model, size), (collectives_of_layer[:2], collectives_of_layer[2:]), strict=True):
        found, expected_bytes = Counter(received_bytes(code, 1024)), Counter()
        for collective in planned:
            operation = "all_to_all" if collective.operation == "reduce_scatter" else collective.operation
            expected_bytes[operation, collective.received_bytes] += LAYERS
        assert found == expected_bytes


def received_bytes(code: str, ranks: int) -> Iterator[tuple[str, int]]:
    """(operation, bytes that come from other ranks) of each collective; its elements have 4 bytes here."""
    operations = {"all_gather_into_tensor": "all_gather", "all_to_all_single": "all_to_all"}
    for operation, elements in results_of_collectives(code):
        yield operations[operation], elements * 4 * (ranks - 1) // ranks


@pytest.mark.parametrize("fake_ranks", [2], indirect=True)
def test_one_graph_serves_any_number_of_tokens_and_any_agreement(fake_ranks, monkeypatch):
    """The room that ranks agree on is filled in before each run: no graph is compiled for it."""
    agreed: list[int] = []

    def most_tokens(tokens: int, group: str, device: torch.device, too_few: bool) -> int:
        assert not too_few
        agreed.append(tokens)
        return tokens + len(agreed)

    monkeypatch.setattr("memcompile.sharded_graphs.most_tokens", most_tokens)
    compiled: list[Any] = []
    monkeypatch.setattr("memcompile.backend.compile_fx", lambda graph, *args: compiled.append(graph) or graph)
    model = sharded_gpt(memory_mesh(2))
    run = torch.compile(model, backend="memcompile", fullgraph=True, dynamic=True)
    for size in (3, 4, 7, 2):
        run(*batch(size=size))
    assert agreed == [5 * size for size in (3, 4, 7, 2)] and len(compiled) == 1


@pytest.mark.parametrize("fake_ranks", [2], indirect=True)
def test_a_graph_of_no_tokens_is_not_compiled(fake_ranks, monkeypatch):
    """A compiler takes zeros of no tokens for constants, and would send them in another order than the other ranks."""

    def compile_fx(*args: Any) -> Any:
        raise AssertionError("it should not be called")

    monkeypatch.setattr("memcompile.backend.compile_fx", compile_fx)
    model = sharded_gpt(memory_mesh(2))
    run = torch.compile(model, backend="memcompile", fullgraph=True)
    assert run(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, 50)


@pytest.mark.parametrize("fake_ranks", [1], indirect=True)
def test_a_graph_is_captured_beside_a_sparse_gradient(fake_ranks, monkeypatch):
    """As for an evaluation behind the last step of a training."""
    monkeypatch.setattr("memcompile.backend.compile_fx", lambda graph, *args: graph)
    model = sharded_gpt(memory_mesh(1), values_grad="sparse")
    model(*batch()).backward()
    assert local_part(model.memory_values.grad).is_sparse
    with torch.no_grad():
        expected = model(*batch())
        assert torch.equal(torch.compile(model, backend="memcompile", fullgraph=True)(*batch()), expected)


@pytest.mark.parametrize("fake_ranks", [2], indirect=True)
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_another_backend_is_told_to_be_ours(fake_ranks, backend):
    model = sharded_gpt(memory_mesh(2))
    with pytest.raises(Exception, match="backend='memcompile'"):
        torch.compile(model, backend=backend, fullgraph=True)(*batch()).backward()


@pytest.mark.parametrize("fake_ranks", [2], indirect=True)
def test_values_that_were_cast_after_compiling_are_told(fake_ranks):
    model = sharded_gpt(memory_mesh(2), tokens="even").float()
    run = torch.compile(model, backend="memcompile")
    run(*batch())
    model.memory_values = nn.Parameter(whole_like(model.memory_values, local_part(model.memory_values).double()))
    with pytest.raises(Exception, match="cast and move it before compiling"):
        run(*batch())


@pytest.mark.parametrize("fake_ranks", [1], indirect=True)
def test_values_on_another_storage_are_read_there(fake_ranks, monkeypatch):
    monkeypatch.setattr("memcompile.backend.compile_fx", lambda graph, *args: graph)
    model = sharded_gpt(memory_mesh(1), tokens="even")
    with torch.no_grad():
        local_part(model.memory_values).fill_(0.1)
    run = torch.compile(model, backend="memcompile")
    before = run(*batch()).detach()
    moved = whole_like(model.memory_values, torch.zeros_like(local_part(model.memory_values)))
    model.memory_values = nn.Parameter(moved)
    assert float(run(*batch()).detach()) == float(model(*batch()).detach()) != float(before)


def test_graphs_without_a_capacity_have_nothing_to_agree_on():
    graph = torch.fx.symbolic_trace(nn.Linear(3, 3))
    assert agreement_of(graph, [torch.randn(2, 3)]) is None
