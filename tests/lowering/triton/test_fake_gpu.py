"""The harness itself: what Inductor generates for a GPU that is not there, read and compiled."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
from torch.library import triton_op, wrap_triton

import memcompile
from memcompile.lowering.inductor.graph_pass import inductor_patches
from tests.lowering.triton.addresses import overflowing_offsets
from tests.lowering.triton.fake_gpu import generated_sources
from tests.lowering.triton.generated import allocations, compile_kernels, extern_calls, launches, triton_kernels


def tensor(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def attention_scores(x: Tensor, weight: Tensor) -> Tensor:
    return torch.softmax(x @ weight, -1)


# --- A user's kernel --------------------------------------------------------------------------------------------------


@triton.jit
def _add_kernel(left, right, output, numel, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    tl.store(output + index, tl.load(left + index, mask=inside) + tl.load(right + index, mask=inside), mask=inside)


@triton_op("memcompile_harness::add", mutates_args=())
def add(left: Tensor, right: Tensor) -> Tensor:
    output = torch.empty_like(left)
    wrap_triton(_add_kernel)[(triton.cdiv(left.numel(), 1024),)](left, right, output, left.numel(), 1024)
    return output


add.register_autograd(lambda ctx, grad: (grad, grad))


# --- A template -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("memcompile_harness::gather", mutates_args=())
def gather(values: Tensor, slots: Tensor) -> Tensor:
    return values[slots]


gather.register_fake(lambda values, slots: values.new_empty(slots.shape[0], values.shape[1]))


@SymbolicGridFn
def _gather_grid(tokens, value_dim, meta, *, cdiv):
    return (tokens, cdiv(value_dim, meta["BLOCK"]), 1)


_GATHER = TritonTemplate(
    name="memcompile_harness_gather",
    grid=_gather_grid,
    source=r"""
{{def_kernel("values", "slots")}}
    token = tl.program_id(0).to(INDEX_DTYPE)
    value_dim = {{size("values", 1)}}
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + token)WIDE
    row = tl.load(values + slot * value_dim + column, mask=column < value_dim, other=0.0)[None, :]
    tokens_index = token + tl.zeros([1, 1], tl.int32)
    columns_index = column[None, :]
    mask = columns_index < value_dim
    {{store_output(("tokens_index", "columns_index"), "row", "mask", val_shape=("1", "BLOCK"))}}
""".replace("WIDE", ".to(tl.int64)"),
)


@register_lowering(torch.ops.memcompile_harness.gather.default, type_promotion_kind=None)
def _lower_gather(values, slots):
    values, slots = (ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x)) for x in (values, slots))
    layout = ir.FixedLayout(values.get_device(), values.get_dtype(), [slots.get_size()[0], values.get_size()[1]])
    choices: list = []
    for block in (256, 512):
        _GATHER.maybe_append_choice(
            choices, input_nodes=(values, slots), layout=layout, num_stages=2, num_warps=4, BLOCK=block
        )
    chosen = autotune_select_algorithm("memcompile_harness_gather", choices, [values, slots], layout)
    return chosen[0] if isinstance(chosen, tuple) else chosen


# --- Tests ------------------------------------------------------------------------------------------------------------


def test_forward_and_backward():
    sources = generated_sources(
        attention_scores, [tensor(512, 256, requires_grad=True), tensor(256, 300, requires_grad=True)]
    )
    for source, products in ((sources.forward, 1), (sources.backward, 2)):
        assert extern_calls(source) == ["extern_kernels.mm"] * products
        (name,) = launches(source)
        assert "softmax" in name and list(triton_kernels(source)) == [name]
        assert ((512, 300), torch.float32) in allocations(source)


def test_no_backward_without_gradients():
    assert generated_sources(attention_scores, [tensor(64, 32), tensor(32, 48)]).backward is None


def test_dynamic_tokens_leave_no_number():
    inputs = [tensor(499, 256, requires_grad=True), tensor(256, 300)]
    fixed = generated_sources(lambda x, w: (x @ w).relu() * 2, inputs)
    assert ((499, 300), torch.float32) in allocations(fixed.forward)
    sources = generated_sources(lambda x: (x @ torch.ones(256, 300)).relu() * 2, inputs[:1], dynamic_tokens=True)
    for source in (sources.forward, sources.backward):
        assert not any("499" in kernel for kernel in triton_kernels(source).values())
        assert any(isinstance(shape[0], str) for shape, _ in allocations(source))
        assert not any(499 in shape for shape, _ in allocations(source))


def test_a_users_kernel():
    inputs = [tensor(300, 64, requires_grad=True), tensor(64, 64, requires_grad=True)]
    for dynamic_tokens in (False, True):
        product = (lambda x: add(x @ x.mT, x @ x.mT).relu()) if dynamic_tokens else (lambda x, w: add(x @ w, x).relu())
        sources = generated_sources(product, inputs[: 2 - dynamic_tokens], dynamic_tokens=dynamic_tokens)
        assert "_add_kernel_0" in launches(sources.forward)
        kernel = next(k for k in compile_kernels(sources.forward, configurations=1) if k.name == "_add_kernel_0")
        assert 0 < kernel.compiled.resources.registers < 64
        assert "_add_kernel_0" not in triton_kernels(sources.backward)


@pytest.mark.parametrize("block", [256, 512])
def test_a_template_takes_what_follows_into_its_kernel(block):
    sources = generated_sources(
        lambda values, slots, gate: gather(values, slots) * F.silu(gate),
        [tensor(2**16, 1000, dtype=torch.bfloat16), tensor(77, dtype=torch.int32), tensor(77, 1000)],
        choose=lambda name, choices: next(choice for choice in choices if f"BLOCK={block}" in choice.description),
    )
    (name,) = launches(sources.forward)
    assert allocations(sources.forward) == [((77, 1000), torch.float32)]
    (kernel,) = compile_kernels(sources.forward)
    assert f"BLOCK : tl.constexpr = {block}" in triton_kernels(sources.forward)[name]
    assert kernel.compiled.resources.spills == 0
    assert overflowing_offsets(kernel.compiled, ["arg_values"]) == []


@pytest.mark.parametrize(("capability", "target"), [(80, "sm_80"), (90, "sm_90"), (100, "sm_100"), (90, "gfx942")])
def test_kernels_compile_for_each_target(capability, target):
    sources = generated_sources(attention_scores, [tensor(64, 32), tensor(32, 2000)], capability=capability)
    kernels = compile_kernels(sources.forward, target)
    assert kernels
    for kernel in kernels:
        assert kernel.compiled.resources.registers > 0
        assert ("amdgcn" if target.startswith("gfx") else "cubin") in kernel.compiled.asm


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_a_planned_model_and_our_pass():
    model = nn.Sequential(*[Block(64) for _ in range(3)])
    memcompile.plan(model, memory_layers=1, n_keys=16, top_k=8)
    devices, operators = set(), []

    class Ours:
        def __call__(self, graph):
            values = [node.meta.get("val") for node in graph.nodes]
            devices.update(value.device for value in values if isinstance(value, Tensor))
            operators.append([str(node.target) for node in graph.nodes])

        def uuid(self):
            return None

    patches = inductor_patches("", Ours())
    entered = []

    @contextlib.contextmanager
    def while_tracing():
        entered.append(True)
        yield

    sources = generated_sources(
        model, [tensor(35, 64)], dynamic_tokens=True, config_patches=patches, while_tracing=while_tracing()
    )
    assert entered == [True]
    assert devices == {torch.device("cuda:0")}
    forward, backward = operators
    assert "memcompile.weighted_gather.default" in forward and "memcompile.weighted_scatter.default" in backward
    for source in (sources.forward, sources.backward):
        assert len(extern_calls(source)) > 3
        assert any("layer_norm" in name for name in launches(source))


def test_nothing_of_the_gpu_stays():
    before = (torch.cuda.device_count, torch.version.cuda)
    generated_sources(torch.relu, [tensor(8)])
    assert (torch.cuda.device_count, torch.version.cuda) == before
    assert torch._dynamo.device_interface.CudaInterface.is_available() == torch.cuda.is_available()
