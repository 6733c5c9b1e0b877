"""What Inductor generates of a memory layer for a GPU: which kernels run, what is fused into them, what is allocated.
At real sizes, with no GPU: the source is read and its kernels are compiled, never run.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import memcompile
from memcompile.lowering import memory_lookup, operator
from memcompile.lowering.inductor.graph_pass import inductor_patches
from memcompile.lowering.triton import cost, support
from tests.lowering.triton.fake_gpu import Sources, generated_sources
from tests.lowering.triton.generated import allocations, extern_calls, launches, triton_kernels
from tests.models import Block, plain_ffn

# Each number tells what it counts: heads * key_dim is 512 + 128, chunks of hits are 4,096.
TOKENS, WIDTH, HEADS, HALF_DIM, N_KEYS, TOP_K, VALUE_DIM = 512, 1280, 5, 64, 2048, 32, 1024
SLOTS = N_KEYS**2

OURS = (
    *("select_stored", "select_computed", "rank_candidates", "weighted_gather_rows"),
    *("gather_dot_rows", "sum_chunks", "join_chunks", "add_atomically"),
    *("pair_gather_rows", "pair_grads_rows"),
)
GEMMS = {f"extern_kernels.{name}" for name in ("mm", "bmm", "addmm", "bmm_dtype")}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


class Lookup(nn.Module):
    """A memory layer with a gate and an output projection, of parameters that hold no data."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, trains_values: bool = True, autocast: bool = False) -> None:
        super().__init__()
        shapes = {
            "query_weight": (HEADS * 2 * HALF_DIM, WIDTH),
            "half_keys": (2, HEADS, N_KEYS, HALF_DIM),
            "values": (SLOTS, VALUE_DIM),
            "gate_weight": (VALUE_DIM, WIDTH),
            "out_weight": (WIDTH, VALUE_DIM),
        }
        for name, shape in shapes.items():
            trains = trains_values or name != "values"
            self.register_parameter(name, nn.Parameter(meta(*shape, dtype=dtype), requires_grad=trains))
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):  # the CPU stands for the GPU here
            return memory_lookup(
                x, self.query_weight, None, self.half_keys, self.values, self.gate_weight, None, self.out_weight,
                heads=HEADS, top_k=TOP_K,
            )  # fmt: skip


class GraphSpy:
    """A graph pass that keeps what `copy_` writes to, and which arguments each kernel is said to write."""

    def __init__(self) -> None:
        self.copied_to: list[str] = []
        self.written: dict[str, set[str]] = {}

    def __call__(self, graph: fx.Graph) -> None:
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        for node in graph.nodes:
            if node.target is torch.ops.aten.copy_.default:
                self.copied_to.append(str(node.args[0]))
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
                self.written.setdefault(name, set()).update(node.kwargs["tensors_to_clone"])

    def uuid(self) -> None:
        return None


def gpu_sources(function: Callable[..., Any], inputs: list[Any], **options: Any) -> Sources:
    """`generated_sources` with this package's pass and kernels."""
    spy = options.pop("spy", None)
    patches = options.pop("config_patches", {}) | inductor_patches("", spy)
    with mock.patch.object(support, "is_gpu", return_value=True):
        return generated_sources(function, inputs, config_patches=patches, **options)


@functools.cache
def sources_of(
    stored: bool, *, dtype: torch.dtype = torch.bfloat16, trains_values: bool = True, autocast: bool = False
) -> tuple[Sources, GraphSpy]:
    spy = GraphSpy()
    with mock.patch.object(cost, "stores_scores", return_value=stored):
        module = Lookup(dtype, trains_values, autocast)
        return gpu_sources(module, [meta(TOKENS, WIDTH, dtype=dtype, requires_grad=True)], spy=spy), spy


def ours(source: str) -> list[str]:
    """Kernels of this package that are launched, in order, without the numbers that Inductor appends."""
    names = (re.sub(r"_\d+$", "", name) for name in launches(source))
    return [name for name in names if name in OURS]


def templates(source: str) -> list[str]:
    """The texts of the kernels that the template made, in the order of their launches."""
    kernels = triton_kernels(source)
    return [kernels[name] for name in launches(source) if name.startswith("triton_tem")]


def has_sigmoid(kernel: str) -> bool:
    """Whether a generated kernel computes a sigmoid, as its own operation or as 1 / (1 + exp(-x))."""
    return "tl.sigmoid" in kernel or "libdevice.exp" in kernel or "tl_math.exp" in kernel


def code(source: str) -> str:
    """What runs: the source without comments, hints to its tuner, and the benchmark at its end."""
    text = source.partition("\ndef get_args()")[0].partition("\ndef benchmark_compiled_module")[0]
    return re.sub(r"#.*|inductor_meta=.*", "", text)


def assert_no_detours(source: str) -> None:
    """Nothing but GEMMs and the sort runs outside of kernels, no kernel scatters, and nothing waits for the GPU."""
    assert {*extern_calls(source)} <= GEMMS | {"torch.ops.aten.sort.stable"}
    assert not re.search(r"tl\.atomic|index_put|index_add|scatter", code(source))
    assert not re.search(r"\.item\(|\.tolist\(|\.cpu\(|synchronize", code(source))


FORWARD = [(True, torch.bfloat16), (True, torch.float32), (False, torch.float16)]


# --- A layer at real sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "dtype"), FORWARD)
def test_the_forward(stored, dtype):
    source = sources_of(stored, dtype=dtype)[0].forward
    assert ours(source) == ["select_stored" if stored else "select_computed", "rank_candidates"]
    assert_no_detours(source)
    scores = ["extern_kernels.bmm" if dtype is torch.float32 else "extern_kernels.bmm_dtype"] if stored else []
    assert sorted(extern_calls(source)) == sorted(["extern_kernels.mm"] * 3 + scores)


@pytest.mark.parametrize(("stored", "dtype"), FORWARD)
def test_the_gate_is_part_of_the_gather(stored, dtype):
    source = sources_of(stored, dtype=dtype)[0].forward
    (template,) = templates(source)
    (name,) = (name for name in launches(source) if name.startswith("triton_tem"))
    assert "weighted_gather" in name and "mul" in name and "silu" in name
    assert "weighted_sum" in template and has_sigmoid(template)
    others = [text for launched, text in triton_kernels(source).items() if launched != name]
    assert not any(has_sigmoid(text) for text in others if "triton_poi" in text or "triton_per" in text)
    # What follows the rows is stored once gated, once for the backward.
    assert len(re.findall(r"tl\.store\(", template)) == 2


@pytest.mark.parametrize(("stored", "dtype"), FORWARD)
def test_the_forward_allocates_no_table_and_scores_once(stored, dtype):
    found = allocations(sources_of(stored, dtype=dtype)[0].forward)
    score_count = 2 * TOKENS * HEADS * N_KEYS
    large = [buffer for buffer in found if math.prod(buffer[0]) >= score_count // 2]
    assert [(math.prod(shape), dtype) for shape, dtype in large] == ([(score_count, torch.float32)] if stored else [])


@pytest.mark.parametrize(("stored", "dtype"), FORWARD)
def test_the_backward(stored, dtype):
    source = sources_of(stored, dtype=dtype)[0].backward
    # Sums of rows twice: of values, and of half-keys.
    assert sorted(ours(source)) == ["gather_dot_rows", *["join_chunks"] * 2, *["sum_chunks"] * 2]
    (template,) = templates(source)  # the query's gradient
    assert "weighted_sum" in template
    assert_no_detours(source)
    assert extern_calls(source).count("torch.ops.aten.sort.stable") == 2


@pytest.mark.parametrize("trains_values", [True, False])
def test_the_backward_allocates_one_table_where_values_train(trains_values):
    """`values.grad` is dense by definition; nothing has a number for each token and key."""
    source = sources_of(True, trains_values=trains_values)[0].backward
    found = allocations(source)
    tables = [buffer for buffer in found if math.prod(buffer[0]) >= SLOTS * VALUE_DIM // 2]
    assert tables == [((SLOTS, VALUE_DIM), torch.bfloat16)] * trains_values
    rest = [shape for shape, _ in found if (shape, torch.bfloat16) not in tables]
    assert not [shape for shape in rest if N_KEYS in shape or math.prod(shape) >= TOKENS * HEADS * N_KEYS]
    sums = 2 if trains_values else 1
    assert ours(source).count("sum_chunks") == ours(source).count("join_chunks") == sums


@pytest.mark.parametrize(("stored", "dtype"), FORWARD)
def test_what_inductor_believes_is_written(stored, dtype):
    """Its analysis is conservative: what it takes for written is copied, or a parameter counts as mutated."""
    spy = sources_of(stored, dtype=dtype)[1]
    assert spy.written == {
        "select_stored" if stored else "select_computed": {"kept"},
        "rank_candidates": {"weights", "slots"},
        "gather_dot_rows": {"dots"},
        "sum_chunks": {"out", "begun", "left_open"},
        "join_chunks": {"out"},
    }
    assert spy.copied_to == []


def test_autocast():
    """fp32 parameters: projections in bf16, scores and the table in fp32, the gate still fused."""
    sources, spy = sources_of(True, autocast=True, dtype=torch.float32)
    assert ours(sources.forward) == ["select_stored", "rank_candidates"]
    assert_no_detours(sources.forward)
    assert_no_detours(sources.backward)
    (template,) = templates(sources.forward)
    assert has_sigmoid(template) and "'arg_values': '*fp32'" in template and "'*bf16'" in template
    assert ((SLOTS, VALUE_DIM), torch.float32) in allocations(sources.backward)
    assert not [buffer for buffer in allocations(sources.forward) if math.prod(buffer[0]) >= SLOTS * VALUE_DIM // 2]
    assert spy.copied_to == []


def test_atomics(monkeypatch):
    monkeypatch.setenv("MEMCOMPILE_ATOMICS", "1")
    slots, weights = meta(TOKENS, 128, dtype=torch.int32), meta(TOKENS, 128, dtype=torch.float32, requires_grad=True)
    values = meta(SLOTS, VALUE_DIM, requires_grad=True)
    source = gpu_sources(operator("weighted_gather"), [values, slots, weights]).backward
    assert ours(source) == ["gather_dot_rows", "add_atomically"] or ours(source) == [
        "add_atomically",
        "gather_dot_rows",
    ]
    assert extern_calls(source) == []
    # Atomics add fp32: one table of it, and the gradient that is handed on.
    tables = [dtype for shape, dtype in allocations(source) if math.prod(shape) == SLOTS * VALUE_DIM]
    assert tables == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode):
    inputs = [meta(TOKENS, WIDTH)]
    module = Lookup().requires_grad_(False)
    with mode():
        sources = gpu_sources(module, inputs)
    assert sources.backward is None
    assert ours(sources.forward)[1:] == ["rank_candidates"]
    assert_no_detours(sources.forward)
    (template,) = templates(sources.forward)
    assert has_sigmoid(template)
    assert len(re.findall(r"tl\.store\(", template)) == 1  # nothing is kept for a backward


def test_one_source_for_any_number_of_tokens():
    def generate(tokens: int) -> Sources:
        return gpu_sources(Lookup(), [meta(tokens, WIDTH, requires_grad=True)], dynamic_tokens=True)

    sources = generate(499)
    for source in (sources.forward, sources.backward):
        assert not re.search(r"\b499\b", code(source))
        assert any(isinstance(size, str) for shape, _ in allocations(source) for size in shape)
        assert_no_detours(source)
    assert ours(sources.forward)[1:] == ["rank_candidates"] and len(templates(sources.forward)) == 1
    again = generate(503)
    for one, other in ((sources.forward, again.forward), (sources.backward, again.backward)):
        assert re.sub(r"\bs\d+\b", "tokens", code(one)) == re.sub(r"\bs\d+\b", "tokens", code(other))


def test_pairs():
    """One kernel forward; backward one for the rows, and the sums of both halves from one order of the hits."""
    slots, weights = meta(TOKENS, 128, dtype=torch.int32), meta(TOKENS, 128, dtype=torch.float32, requires_grad=True)
    values, x = meta(SLOTS, WIDTH + VALUE_DIM, requires_grad=True), meta(TOKENS, WIDTH, requires_grad=True)
    spy = GraphSpy()
    sources = gpu_sources(lambda *args: operator("pair_gather")(*args)[0], [values, slots, weights, x], spy=spy)
    assert ours(sources.forward) == ["pair_gather_rows"] and extern_calls(sources.forward) == []
    assert sorted(ours(sources.backward)) == [*["join_chunks"] * 2, "pair_grads_rows", *["sum_chunks"] * 2]
    assert extern_calls(sources.backward) == ["torch.ops.aten.sort.stable"]
    assert not [shape for shape, _ in allocations(sources.forward) if math.prod(shape) > TOKENS * (WIDTH + VALUE_DIM)]
    assert spy.written["pair_gather_rows"] == {"out", "dots"} and spy.copied_to == []
    assert spy.written["pair_grads_rows"] == {"grad_weights", "grad_x", "into", "out"}


# --- A planned model ----------------------------------------------------------------------------------------------


def test_a_planned_model():
    """Of blocks alone: Inductor asks a true GPU for the gradient of an embedding."""
    model = nn.Sequential(*[Block(32, plain_ffn(32, 128)) for _ in range(2)])
    memcompile.plan(model, memory_layers=1, n_keys=16, top_k=8, heads=2)
    sources = gpu_sources(model, [meta(3, 5, 32, dtype=torch.float32)], while_tracing=sdpa_kernel(SDPBackend.MATH))
    assert ours(sources.forward)[1:] == ["rank_candidates"]
    assert sorted(ours(sources.backward)) == ["gather_dot_rows", *["join_chunks"] * 2, *["sum_chunks"] * 2]
    assert len(templates(sources.forward)) == len(templates(sources.backward)) == 1
    for source in (sources.forward, sources.backward):
        assert_no_detours(source)
