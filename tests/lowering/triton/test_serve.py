"""Which calls the GPU's kernels serve, asked with tensors of a GPU that is not there."""

import importlib.util
import logging

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memcompile.lowering import cpu
from memcompile.lowering.triton import launch, serve
from memcompile.lowering.triton.serve import MAX_TOP_K, gpu_kernel, graph_kernel, row_kernel, serves
from tests.lowering.triton import test_generated_code as generated

CUDA, OTHER = torch.device("cuda:0"), torch.device("cuda:1")
HALF_AND_FULL = (torch.float32, torch.float16, torch.bfloat16)
MODE = FakeTensorMode()


def on(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return FakeTensor(MODE, torch.empty(shape, dtype=dtype, device="meta"), device)


def search_arguments(dtype: torch.dtype = torch.float32, device: torch.device = CUDA, top_k: int = 4) -> tuple:
    return on(device, 5, 2, 12, dtype=dtype), on(device, 2, 2, 100, 6, dtype=dtype), top_k


def gather_arguments(dtype: torch.dtype = torch.float32) -> tuple:
    return on(CUDA, 100, 8, dtype=dtype), on(CUDA, 5, 4, dtype=torch.int32), on(CUDA, 5, 4)


def row_arguments(name: str, dtype: torch.dtype = torch.float32, device: torch.device = CUDA) -> list:
    rows = on(device, 5, dtype=torch.int64)
    values, grad = on(device, 100, 8, dtype=dtype), on(device, 5, 8)
    if name == "row_sgd":
        return [values, None, rows, grad, on(device, 5, dtype=torch.float64), 0.1, 7]
    if name == "row_adagrad":
        return [values, None, on(device, 100), rows, grad, 0.1, 1e-8, 0.0, False, 7]
    plans = rows, on(device, 3, 3, dtype=torch.float64), on(device, 3, 1, 8, dtype=torch.float64)
    moments = on(device, 100, 8), on(device, 100, 8)
    return [values, None, *moments, rows, grad, *plans, torch.zeros(6, dtype=torch.float64), 7]


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr(serve, "is_gpu", lambda device: device.type == "cuda")


@pytest.fixture
def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "triton" else find(name, *args)
    )
    serve.has_triton.cache_clear()
    yield
    serve.has_triton.cache_clear()


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_a_gpu_runs_triton(dtype):
    assert gpu_kernel("product_key_search", *search_arguments(dtype)) is launch.product_key_search
    assert gpu_kernel("weighted_gather", *gather_arguments(dtype)) is launch.weighted_gather
    assert gpu_kernel("gather_dot", *gather_arguments(dtype)[:2], on(CUDA, 5, 8, dtype=dtype)) is launch.gather_dot
    slots, weights = gather_arguments()[1:]
    assert gpu_kernel("weighted_scatter", slots, weights, on(CUDA, 5, 8, dtype=dtype), 9) is launch.weighted_scatter


@pytest.mark.parametrize(
    ("available", "hip", "capability", "expected"),
    [(True, None, (8, 0), True), (True, None, (12, 0), True), (True, None, (7, 5), False), (False, None, (9, 0), False),
     (True, "6.4", (9, 4), True)],
)  # fmt: skip
def test_which_gpus(monkeypatch, available, hip, capability, expected):
    """NVIDIA's from Ampere on, which have bf16, and AMD's."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert serve.is_gpu.__wrapped__(CUDA) is expected
    assert not serve.is_gpu.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta", "mps", "xpu"])
def test_other_devices_do_not(device):
    assert gpu_kernel("product_key_search", *search_arguments(device=torch.device(device))) is None
    assert not serves(torch.device(device), HALF_AND_FULL)


def test_float64_is_not_served():
    assert gpu_kernel("product_key_search", *search_arguments(torch.float64)) is None
    values, slots, _ = gather_arguments()
    assert gpu_kernel("weighted_gather", values, slots, on(CUDA, 5, 4, dtype=torch.float64)) is None
    assert not serves(CUDA, [torch.float32, torch.float64])
    assert serves(CUDA, [torch.float32, torch.int32, torch.int64])


def test_tensors_of_two_devices_are_not_served():
    values, slots, _ = gather_arguments()
    assert gpu_kernel("weighted_gather", values, slots, on(OTHER, 5, 4)) is None


def test_layouts_that_are_not_strided_are_not_served(monkeypatch):
    monkeypatch.setattr(serve, "is_gpu", lambda device: True)
    values, slots, weights = torch.zeros(10, 8), torch.zeros(5, 4, dtype=torch.int32), torch.zeros(5, 4)
    assert gpu_kernel("weighted_gather", values, slots, weights) is launch.weighted_gather
    assert gpu_kernel("weighted_gather", values.to_sparse(), slots, weights) is None
    assert gpu_kernel("weighted_gather", values, slots, weights.to_sparse()) is None


def test_long_lists_are_not_served():
    assert gpu_kernel("product_key_search", *search_arguments(top_k=MAX_TOP_K)) is not None
    assert gpu_kernel("product_key_search", *search_arguments(top_k=MAX_TOP_K + 1)) is None
    assert gpu_kernel("product_key_topk", on(CUDA, 2, 5, 2, 100), MAX_TOP_K + 1) is None
    # The last argument of another operator is no number of slots.
    slots, weights = gather_arguments()[1:]
    assert gpu_kernel("weighted_scatter", slots, weights, on(CUDA, 5, 8), 10**6) is not None


def test_without_triton_nothing_is_served_and_it_is_said_once(without_triton, caplog):
    caplog.set_level(logging.WARNING, serve.__name__)
    for _ in range(3):
        assert gpu_kernel("product_key_search", *search_arguments()) is None
        assert gpu_kernel("weighted_gather", *gather_arguments()) is None
    (record,) = (record for record in caplog.records if record.name == serve.__name__)
    assert "Triton is not installed" in record.getMessage()


def test_without_triton_a_cpu_is_told_nothing(without_triton, caplog):
    assert gpu_kernel("product_key_search", *search_arguments(device=torch.device("cpu"))) is None
    assert not caplog.records


def test_in_graphs_a_template_stands_for_its_operator(monkeypatch):
    monkeypatch.setattr(serve, "is_keyed", lambda: True)
    monkeypatch.setattr(serve, "TEMPLATED", {"weighted_gather"})
    assert graph_kernel("weighted_gather", *gather_arguments()) is None
    assert graph_kernel("product_key_search", *search_arguments()) is not None
    monkeypatch.setattr(serve, "TEMPLATED", set())
    assert graph_kernel("weighted_gather", *gather_arguments()) is not None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert graph_kernel("weighted_gather", *gather_arguments()) is None
    assert serves(torch.device("cpu"), [torch.float32])


def test_a_graph_that_is_not_keyed_holds_operators():
    """Compiled by another backend than ours: its caches would not see changed kernels."""
    assert graph_kernel("product_key_search", *search_arguments()) is None


def test_a_graph_of_long_lists_runs_operators(monkeypatch):
    """Under autograd the search comes apart into GEMMs and `product_key_topk`, which is called."""
    monkeypatch.setattr(cpu, "load", lambda: False)  # the CPU stands for the GPU
    query, half_keys = generated.meta(64, 2, 16, requires_grad=True), generated.meta(2, 2, 256, 8)
    source = generated.gpu_sources(
        lambda query, half_keys: torch.ops.memcompile.product_key_search(query, half_keys, MAX_TOP_K + 1),
        [query, half_keys],
    ).forward
    assert generated.ours(source) == []
    assert "torch.ops.memcompile.product_key_topk.default" in generated.extern_calls(source)


ROW_OPERATORS = pytest.mark.parametrize("name", ["row_adam", "row_adagrad", "row_sgd"])


@ROW_OPERATORS
def test_rows_are_updated_by_triton(name):
    """In every dtype that the operators take. `row_adam` has its numbers on the CPU; nothing else may be elsewhere."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert row_kernel(name, *row_arguments(name, dtype)) is getattr(launch, name)
    assert row_kernel(name, *row_arguments(name, device=torch.device("cpu"))) is None
    for position, argument in enumerate(row_arguments(name)):
        if isinstance(argument, Tensor) and argument.device != torch.device("cpu"):
            mixed = row_arguments(name)
            mixed[position] = on(OTHER if position else torch.device("cpu"), *argument.shape, dtype=argument.dtype)
            assert row_kernel(name, *mixed) is None


@ROW_OPERATORS
def test_without_triton_rows_are_updated_by_pytorch(name, without_triton):
    assert row_kernel(name, *row_arguments(name)) is None
