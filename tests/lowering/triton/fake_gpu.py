"""Inductor's own source for a GPU that is not there: forward and backward of a function or a module.

The CPU stands for the GPU while AOTAutograd traces (a CPU build has no autograd for CUDA); then the graphs' inputs and
device arguments become fake CUDA tensors, and the rest of Inductor runs on them: post-grad passes, lowering, scheduling
and code generation. Device queries are answered by `fake_gpu`. The source is never run; `generated.py` reads it.
Private PyTorch API, tried on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._functorch.config
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.lowering.triton.offline import SHARED_LIMITS

DEVICE = torch.device("cuda:0")
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


# --- The GPU that is not there ----------------------------------------------------------------------------------------


class _StubDriver:
    """What Triton and Inductor ask of a driver before anything is launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        limits = {
            "max_shared_mem": SHARED_LIMITS[f"sm_{capability}"],
            "multiprocessor_count": MULTIPROCESSORS[capability],
            "max_num_regs": 65_536,
            "warpSize": 32,
        }
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda


def _properties(capability: int) -> types.SimpleNamespace:
    shared = SHARED_LIMITS[f"sm_{capability}"]
    return types.SimpleNamespace(
        name=f"fake sm_{capability}",
        type="cuda",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=MULTIPROCESSORS[capability],
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1_024,
        L2_cache_size=50 << 20,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5_120,
        gcnArchName="",
        uuid="0",
        pci_bus_id=0,
    )


@contextlib.contextmanager
def fake_gpu(capability: int = 90) -> Iterator[None]:
    """Inside, PyTorch and Triton see one GPU of this compute capability: 80, 90 or 100. Nothing can run on it."""
    properties = _properties(capability)
    cuda = {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *args, **kwargs: True,
    }
    kept = ("current_device", "device_count", "get_device_properties", "is_bf16_supported")
    interface = {name: cuda[name] for name in kept} | {
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "is_available": lambda: True,
    }
    worker = {name: cuda[name] for name in ("current_device", "get_device_properties")}
    stub = _StubDriver(capability)
    with contextlib.ExitStack() as stack:

        def patch(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        for name, function in cuda.items():
            patch(torch.cuda, name, function)
        for owner, functions in (
            (device_interface.CudaInterface, interface),
            (device_interface.CudaInterface.Worker, worker),
        ):
            for name, function in functions.items():
                patch(owner, name, staticmethod(function))
        patch(torch.version, "cuda", torch.version.cuda or "13.0")
        patch(triton_helpers, "set_driver_to_gpu", lambda: None)  # generated kernels call it when they are imported
        patch(driver, "_active", stub)
        patch(driver, "_default", stub)
        for module, name, value in _imported_by_value(stub):
            patch(module, name, value)
        stack.callback(DeviceProperties.create.cache_clear)
        DeviceProperties.create.cache_clear()
        yield


def _imported_by_value(stub: _StubDriver) -> Iterator[tuple[Any, str, Any]]:
    """Functions of one question each that Inductor's files import from each other, and keep answers of."""
    answers = {
        "get_gpu_shared_memory": lambda: SHARED_LIMITS[f"sm_{stub.capability}"],
        "get_max_num_sms": lambda: MULTIPROCESSORS[stub.capability],
        "get_num_sms": lambda: MULTIPROCESSORS[stub.capability],
        "has_triton": lambda *args: True,
        "is_big_gpu": lambda *args: True,
        "triton_backend": lambda: None,
        "triton_hash_with_backend": lambda: "fake",
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("torch._inductor") or name == "torch.utils._triton":
            for answer in answers.keys() & vars(module).keys():
                yield module, answer, answers[answer]


# --- Sources ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sources:
    """The Python files that Inductor would run.

    Attributes:
        forward: of the forward.
        backward: of the backward; None if nothing requires a gradient.
    """

    forward: str
    backward: str | None


class _SourceIsKnown(BaseException):
    """Leaves Inductor where it would compile the source. No `Exception`, which Inductor would wrap."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source


def first_choice(name: str, choices: Sequence[Any]) -> Any:
    """Of what may compute one node: the first that was offered."""
    return choices[0]


def generated_sources(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    dynamic_tokens: bool = False,
    capability: int = 90,
    config_patches: Mapping[str, Any] | None = None,
    while_tracing: AbstractContextManager[Any] | None = None,
    choose: Callable[[str, Sequence[Any]], Any] = first_choice,
    gpu: bool = True,
) -> Sources:
    """What Inductor would run on a GPU for ``function(*inputs)``, and for its backward.

    Args:
        function: a function that closes over no tensors, or a module, whose parameters and buffers become inputs too.
        inputs: tensors, on any device (meta for large ones: only shapes, strides, dtypes and `requires_grad` are read),
            or numbers and None as they are.
        dynamic_tokens: the first dimension of every input (not of parameters) is symbolic; equal sizes share a symbol.
        capability: 80, 90 or 100.
        config_patches: Inductor's options, as `torch.compile` takes.
        while_tracing: entered around all of it, for patches of the test's own. CPU tensors stand for GPU tensors while
            the graphs are traced, so what decides by `device` needs one.
        choose: called with a name and several choices (templates, or extern kernels) where Inductor would measure.
        gpu: False for the source that the CPU would run.

    Not as on a GPU: what asks for a CPU while the graphs are traced, such as attention, which becomes the CPU's flash
    kernel (`while_tracing=sdpa_kernel(SDPBackend.MATH)` keeps to operators that a GPU has).
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    call, arguments = _flat(function, inputs, mode, dynamic_tokens)
    found: dict[bool, str] = {}

    def inner_compile(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable:
        is_backward = bool(kwargs.get("is_backward"))
        try:
            inputs = _on_the_gpu(graph_module, mode) if gpu else example_inputs
            compile_fx.compile_fx_inner(graph_module, inputs, **kwargs)
        except _SourceIsKnown as known:
            found[is_backward] = known.source
        return graph_module.forward

    # One thread: with more, Inductor's worker processes begin to compile each kernel as soon as it is generated.
    patches = {"force_disable_caches": True, "compile_threads": 1, **(config_patches or {})}
    with (
        tempfile.TemporaryDirectory() as folder,  # where a cache is disabled Inductor leaves an empty one behind
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
        fake_gpu(capability),
        _no_measurements(choose),
        mock.patch.object(GraphLowering, "compile_to_module", _stop),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        while_tracing or contextlib.nullcontext(),
    ):
        compile_fx.compile_fx(call, arguments, inner_compile=inner_compile, config_patches=patches)
    return Sources(found[False], found.get(True))


def _stop(graph: GraphLowering) -> Any:
    source = graph.codegen()[0]
    raise _SourceIsKnown(getattr(source, "value", source))


@contextlib.contextmanager
def _no_measurements(choose: Callable[[str, Sequence[Any]], Any]) -> Iterator[None]:
    original = AlgorithmSelectorCache.__call__

    def one_choice(self: Any, name: str, choices: list[Any], *args: Any, **kwargs: Any) -> Any:
        return original(self, name, [choose(name, choices)] if len(choices) > 1 else choices, *args, **kwargs)

    with mock.patch.object(AlgorithmSelectorCache, "__call__", one_choice):
        yield


class _Call(nn.Module):
    """Flat tensors in, a flat tuple out: what `compile_fx` takes when no Dynamo has been there."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.call = function

    def forward(self, *arguments: Any) -> tuple[Any, ...]:
        return tuple(pytree.tree_leaves(self.call(*arguments)))


def _flat(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode, dynamic_tokens: bool
) -> tuple[nn.Module, list[Any]]:
    """The call and its arguments: parameters first, then inputs; numbers and None are constants of the call."""
    own: dict[str, Tensor] = {}
    if isinstance(function, nn.Module):
        own = {**dict(function.named_parameters()), **dict(function.named_buffers())}
    constants = {index: value for index, value in enumerate(inputs) if not isinstance(value, Tensor)}
    tensors = [value for value in inputs if isinstance(value, Tensor)]

    def call(*arguments: Any) -> Any:
        parameters, rest = dict(zip(own, arguments, strict=False)), iter(arguments[len(own) :])
        values = tuple(constants[index] if index in constants else next(rest) for index in range(len(inputs)))
        if isinstance(function, nn.Module):
            return torch.func.functional_call(function, parameters, values)
        return function(*values)

    fakes = [_fake(tensor, mode) for tensor in own.values()]
    fakes += [_fake(tensor, mode, dynamic=dynamic_tokens) for tensor in tensors]
    return _Call(call), fakes


def _fake(tensor: Tensor, mode: FakeTensorMode, dynamic: bool = False) -> Tensor:
    """A fake CPU leaf of the same geometry."""
    with torch.no_grad():
        shaped = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        context = None
        if dynamic and tensor.dim():
            sizes = [DimDynamic.DUCK, *[DimDynamic.STATIC] * (tensor.dim() - 1)]
            context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fake = mode.from_tensor(shaped, static_shapes=not dynamic, symbolic_context=context)
        with mode:
            fake = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="cpu")
    return fake.requires_grad_(tensor.requires_grad)


def _on_the_gpu(graph_module: fx.GraphModule, mode: FakeTensorMode) -> list[Any]:
    """Moves the devices that a graph names to the GPU, and returns its inputs there. The rest follows from them."""
    assert detect_fake_mode([node.meta.get("val") for node in graph_module.graph.nodes]) in (mode, None)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return DEVICE
        if isinstance(value, FakeTensor):
            with torch.no_grad():
                shaped = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return FakeTensor(mode, shaped, DEVICE)
        return value

    for node in graph_module.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(moved, (node.args, node.kwargs))
        for key in {"val", "eager_input_vals"} & node.meta.keys():
            node.meta[key] = pytree.tree_map(moved, node.meta[key])
    graph_module.recompile()
    return [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
