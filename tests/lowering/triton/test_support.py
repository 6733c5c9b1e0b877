"""Which calls run on the GPU's kernels, asked with tensors of a GPU that is not there."""

import contextlib
import dataclasses
import importlib.util
import logging

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memcompile.lowering import cpu
from memcompile.lowering.register.kernels import IN_PYTORCH
from memcompile.lowering.triton import register, support
from memcompile.lowering.triton.register import SUPPORTS, body_in_graph, load_in_graphs
from memcompile.lowering.triton.support import MAX_TOP_K, supports
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
    first = [on(device, 100, 8, dtype=dtype), None, rows, on(device, 5, 8), 7]
    if name == "row_sgd":
        return [*first, on(device, 5, dtype=torch.float64), 0.1]
    if name == "row_adagrad":
        return [*first, on(device, 100), 0.1, 1e-8, 0.0, False]
    missed = rows, on(device, 3, 3, dtype=torch.float64), on(device, 3, 1, 8, dtype=torch.float64)
    return [*first, on(device, 100, 8), on(device, 100, 8), *missed, torch.zeros(6, dtype=torch.float64)]


def is_supported(name: str, *args) -> bool:
    return SUPPORTS[name](*args)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr(support, "is_gpu", lambda device: device.type == "cuda")


@pytest.fixture
def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "triton" else find(name, *args)
    )
    support.has_triton.cache_clear()
    yield
    support.has_triton.cache_clear()


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_a_gpu_runs_triton(dtype):
    assert is_supported("product_key_search", *search_arguments(dtype))
    assert is_supported("weighted_gather", *gather_arguments(dtype))
    assert is_supported("gather_dot", *gather_arguments(dtype)[:2], on(CUDA, 5, 8, dtype=dtype))
    slots, weights = gather_arguments()[1:]
    assert is_supported("weighted_scatter", slots, weights, on(CUDA, 5, 8, dtype=dtype), 9)
    assert is_supported("pair_gather", *gather_arguments(dtype), on(CUDA, 5, 3, dtype=dtype))


def test_it_is_registered_for_the_gpu_and_loaded_by_the_first_call_there():
    """HIP's tensors have the same key."""
    for name in SUPPORTS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"memcompile::{name}", "CUDA")


def test_what_is_not_supported_runs_in_operations_of_pytorch(monkeypatch):
    """Inside the kernel that is registered: the arguments reach `IN_PYTORCH` as they are."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    for name, args, supported in (
        ("weighted_gather", gather_arguments(), True),
        ("weighted_gather", gather_arguments(torch.float64), False),
        ("product_key_search", search_arguments(top_k=MAX_TOP_K + 1), False),
        ("row_sgd", row_arguments("row_sgd"), True),
    ):

        def kernel(*given):
            calls.append(("triton", given))

        plain = dataclasses.replace(IN_PYTORCH[name], kernel=lambda *given: calls.append(("PyTorch", given)))
        monkeypatch.setitem(IN_PYTORCH, name, plain)
        register.run(name, kernel, *args)
        assert calls.pop() == ("triton" if supported else "PyTorch", tuple(args))
        with pytest.raises(ValueError, match=r"expected"):
            register.run(name, kernel, args[0].flatten(), *args[1:])
        assert not calls


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
    assert support.is_gpu.__wrapped__(CUDA) is expected
    assert not support.is_gpu.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta", "mps", "xpu"])
def test_other_devices_do_not(device):
    assert not is_supported("product_key_search", *search_arguments(device=torch.device(device)))
    assert not supports(torch.device(device), HALF_AND_FULL)


def test_float64_is_not_supported():
    assert not is_supported("product_key_search", *search_arguments(torch.float64))
    values, slots, _ = gather_arguments()
    assert not is_supported("weighted_gather", values, slots, on(CUDA, 5, 4, dtype=torch.float64))
    assert not supports(CUDA, [torch.float32, torch.float64])
    assert supports(CUDA, [torch.float32, torch.int32, torch.int64])


def test_tensors_of_two_devices_are_not_supported():
    values, slots, _ = gather_arguments()
    assert not is_supported("weighted_gather", values, slots, on(OTHER, 5, 4))


def test_layouts_that_are_not_strided_are_not_supported(monkeypatch):
    monkeypatch.setattr(support, "is_gpu", lambda device: True)
    values, slots, weights = torch.zeros(10, 8), torch.zeros(5, 4, dtype=torch.int32), torch.zeros(5, 4)
    assert is_supported("weighted_gather", values, slots, weights)
    assert not is_supported("weighted_gather", values.to_sparse(), slots, weights)
    assert not is_supported("weighted_gather", values, slots, weights.to_sparse())


def test_long_lists_are_not_supported():
    assert is_supported("product_key_search", *search_arguments(top_k=MAX_TOP_K))
    assert not is_supported("product_key_search", *search_arguments(top_k=MAX_TOP_K + 1))
    assert not is_supported("product_key_topk", on(CUDA, 2, 5, 2, 100), MAX_TOP_K + 1)
    # The last argument of another operator is no number of slots.
    slots, weights = gather_arguments()[1:]
    assert is_supported("weighted_scatter", slots, weights, on(CUDA, 5, 8), 10**6)


def test_without_triton_nothing_is_supported_and_it_is_said_once(without_triton, caplog):
    caplog.set_level(logging.WARNING, support.__name__)
    for _ in range(3):
        assert not is_supported("product_key_search", *search_arguments())
        assert not is_supported("weighted_gather", *gather_arguments())
    (record,) = (record for record in caplog.records if record.name == support.__name__)
    assert "Triton is not installed" in record.getMessage()


def test_without_triton_a_cpu_is_told_nothing(without_triton, caplog):
    assert not is_supported("product_key_search", *search_arguments(device=torch.device("cpu")))
    load_in_graphs.cache_clear()
    assert load_in_graphs() is False
    assert not caplog.records
    load_in_graphs.cache_clear()


def test_in_graphs_a_template_stands_for_its_operator(monkeypatch):
    monkeypatch.setattr(register, "is_keyed", lambda: True)
    monkeypatch.setattr(register, "register_template", lambda: True)
    assert body_in_graph("weighted_gather", *gather_arguments()) is None
    assert body_in_graph("product_key_search", *search_arguments()) is not None
    monkeypatch.setattr(register, "register_template", lambda: False)
    assert body_in_graph("weighted_gather", *gather_arguments()) is not None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert body_in_graph("weighted_gather", *gather_arguments()) is None
    assert supports(torch.device("cpu"), [torch.float32])


def test_a_graph_that_is_not_keyed_holds_operators():
    """Compiled by another backend than ours: its caches would not see changed kernels."""
    assert body_in_graph("product_key_search", *search_arguments()) is None


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
        assert is_supported(name, *row_arguments(name, dtype))
    assert not is_supported(name, *row_arguments(name, device=torch.device("cpu")))
    for position, argument in enumerate(row_arguments(name)):
        if isinstance(argument, Tensor) and argument.device != torch.device("cpu"):
            mixed = row_arguments(name)
            mixed[position] = on(OTHER if position else torch.device("cpu"), *argument.shape, dtype=argument.dtype)
            assert not is_supported(name, *mixed)


@ROW_OPERATORS
def test_without_triton_rows_are_updated_by_pytorch(name, without_triton):
    assert not is_supported(name, *row_arguments(name))
