"""prefetch_rows: it copies the slots, starts to read the rows, and stays before the gather; `memory_lookup` with it."""

import ctypes
import mmap
import os
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile.lowering import memory_lookup, operator
from memcompile.lowering.gather import prefetch_rows
from memcompile.lowering.register.kernels import IN_PYTORCH
from memcompile.runtime.storage.frozen_values import open_values
from memcompile.runtime.storage.values_file import write
from tests.lowering.cases import Case

ROWS, DIM = 2**12, 1024  # a row is a page
prefetch = operator("prefetch_rows")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_it_copies_the_slots(dtype):
    values = torch.randn(100, 7)
    for slots in (torch.randint(100, (5, 4), dtype=dtype), torch.randint(100, (4, 5), dtype=dtype).T):
        found = prefetch(values, slots)
        assert torch.equal(found, slots) and found.dtype is dtype and found.is_contiguous()
        assert found.data_ptr() != slots.data_ptr()
        for table in (values, values.clone().requires_grad_()):
            torch.library.opcheck(prefetch, (table, slots))
    assert prefetch(values, torch.empty(0, 4, dtype=dtype)).shape == (0, 4)


def test_rows_of_other_strides():
    values = torch.randn(100, 16)
    for table in (values[:, :7], values[::2], values.T):
        slots = torch.randint(len(table), (5, 4))
        assert torch.equal(prefetch(table, slots), slots)


def test_vmap_over_slots_and_over_tables():
    values, slots = torch.randn(3, 100, 7), torch.randint(100, (3, 5, 4))
    assert torch.equal(torch.vmap(lambda s: prefetch(values[0], s))(slots), slots)
    assert torch.equal(torch.vmap(prefetch)(values, slots), slots)
    assert torch.equal(torch.vmap(lambda v: prefetch(v, slots[0]))(values), slots[:1].expand(3, 5, 4))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"slots: expected int32 or int64 \[tokens, hits\]"):
        IN_PYTORCH["prefetch_rows"](torch.randn(4, 4), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"values: expected floating point \[num_slots, value_dim\]"):
        IN_PYTORCH["prefetch_rows"](torch.randn(4), torch.zeros(2, 2, dtype=torch.int32))


@pytest.fixture
def cold(tmp_path):
    """A mapped table [ROWS, DIM] of which no page is in memory."""
    path = str(tmp_path / "values")
    write(path, torch.randn(ROWS, DIM))
    values = open_values(path)  # reads the header, and the system the rows behind it
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if in_memory(values).any():
        pytest.skip("this file system does not let go of pages")
    return values


def in_memory(values):
    """Which rows are, bool [ROWS]; Linux tells the owner of the file."""
    pages = (ctypes.c_ubyte * ROWS)()
    assert mmap.PAGESIZE == DIM * 4
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(values.data_ptr()), ctypes.c_size_t(values.nbytes), pages) == 0
    return torch.tensor([page & 1 for page in pages]).bool()


@pytest.mark.skipif(mmap.PAGESIZE != 4 * DIM or not hasattr(os, "posix_fadvise"), reason="made for pages of Linux")
@pytest.mark.parametrize(
    "hits", [4, 128]
)  # a few, which are asked for at once, and many, of which some are tried first
@pytest.mark.parametrize("run", [prefetch, prefetch_rows._prefetch], ids=["kernel", "python"])
def test_it_reads_the_rows_and_no_others(cold, run, hits):
    slots = torch.randint(ROWS, (8, hits), dtype=torch.int32)
    expected = torch.zeros(ROWS, dtype=torch.bool)
    expected[slots.long().flatten()] = True
    run(cold, slots)
    deadline = time.monotonic() + 20
    while not in_memory(cold)[expected].all():  # nobody waits for the disk but this test
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert torch.equal(in_memory(cold), expected)


# --- memory_lookup ------------------------------------------------------------------------------------------------


def operators(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def frozen(case):
    """Tensors whose values do not learn, and the layer by values_storage."""
    tensors = case.tensors()
    tensors[4] = tensors[4].detach()
    return tensors, lambda storage: lambda *t: memory_lookup(*t, **case.options, values_storage=storage)


@pytest.mark.parametrize("storage", ["host", "mmap"])
def test_values_elsewhere_give_the_same_output_and_gradients(storage):
    tensors, layer = frozen(Case())
    others = [t for t in tensors if t is not None and t.requires_grad]
    expected, found = layer("device")(*tensors), layer(storage)(*tensors)
    assert torch.equal(found, expected)
    cotangent = torch.randn_like(found)
    expected, found = (torch.autograd.grad(y, others, cotangent) for y in (expected, found))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_are_asked_for_before_the_gate_and_gathered_after_it():
    tensors, layer = frozen(Case())
    with torch.no_grad():
        graph = make_fx(layer("mmap"))(*tensors).graph
        plain = make_fx(layer("device"))(*tensors).graph
    found = operators(graph)
    ask, gather = (found.index(f"memcompile.{name}.default") for name in ("prefetch_rows", "weighted_gather"))
    assert "aten.silu.default" in found[ask:gather]
    assert "memcompile.prefetch_rows.default" not in operators(plain)
    node = next(n for n in graph.nodes if "weighted_gather" in str(n.target))
    assert "prefetch_rows" in str(node.args[1].target)  # which is what keeps the order


@pytest.mark.parametrize("training", [False, True])
def test_compiled_graphs_keep_it_before_the_gather(training):
    from torch._inductor.utils import run_and_get_code

    tensors, layer = frozen(Case())
    compiled = torch.compile(layer("mmap"), fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(training):
        found, sources = run_and_get_code(compiled, *tensors)
        torch.testing.assert_close(found, layer("mmap")(*tensors))
        more = [torch.randn(11, Case().width), *tensors[1:]]
        torch.testing.assert_close(compiled(*more), layer("mmap")(*more))
    forward = sources[0].partition("def call")[2]
    assert 0 < forward.index("prefetch_rows") < forward.index("weighted_gather")


def test_exported_programs_have_it():
    tensors, layer = frozen(Case())

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return layer("mmap")(*tensors)

    program = torch.export.export(Module(), tuple(tensors))
    torch.testing.assert_close(program.module()(*tensors), layer("device")(*tensors))
    assert operators(program.run_decompositions().graph).count("memcompile.prefetch_rows.default") == 1


@pytest.mark.parametrize("storage", ["host", "mmap"])
def test_a_layer_on_another_device_than_its_values(storage):
    tensors, layer = frozen(Case())
    with FakeTensorMode() as mode, torch.no_grad():
        fake = [None if t is None else torch.empty(t.shape, device="cuda") for t in tensors]
        fake[4] = mode.from_tensor(tensors[4])
        found = layer(storage)(*fake)
    assert found.device.type == "cuda" and found.shape == (5, 9)


@pytest.mark.parametrize("storage", ["host", "mmap"])
def test_under_vmap(storage):
    tensors, layer = frozen(Case(leading=(3, 5)))
    x, *rest = tensors
    found = torch.vmap(lambda x: layer(storage)(x, *rest))(x)
    torch.testing.assert_close(found, layer("device")(x, *rest))


def test_values_that_learn_are_refused():
    tensors = Case().tensors()
    with pytest.raises(
        ValueError, match=r"those of values_storage='mmap' do not learn: values.requires_grad_\(False\)"
    ):
        memory_lookup(*tensors, **Case().options, values_storage="mmap")
    with pytest.raises(ValueError, match="values_storage: expected one of device, host, mmap, got 'disk'"):
        memory_lookup(*tensors, **Case().options, values_storage="disk")
