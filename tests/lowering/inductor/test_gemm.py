"""fp32 products by oneDNN: the same numbers, in place of the products it may replace and of no others."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile.lowering.inductor import gemm
from memcompile.lowering.inductor.graph_pass import inductor_patches
from tests.tolerance import assert_as_accurate

onednn_mm = torch.ops.memcompile.onednn_mm.default


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["plain", "left transposed", "right transposed", "both transposed"])
def test_product(layout, bias):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((33, 70), (70, 51)))
    if layout in ("left transposed", "both transposed"):
        left = left.t().contiguous().t()
    if layout in ("right transposed", "both transposed"):
        right = right.t().contiguous().t()
    b = torch.randn(51, generator=generator) if bias else None
    plain = left @ right if b is None else torch.addmm(b, left, right)
    exact = left.double() @ right.double() + (0 if b is None else b.double())
    assert_as_accurate(onednn_mm(left, right, b), plain, exact)


@pytest.mark.parametrize("bias", [torch.randn(51, 3)[:, 1], torch.randn(1).expand(51)], ids=["apart", "expanded"])
def test_a_bias_at_any_stride(bias):
    left, right = torch.randn(33, 70), torch.randn(70, 51)
    exact = torch.addmm(bias.double(), left.double(), right.double())
    assert_as_accurate(onednn_mm(left, right, bias), torch.addmm(bias, left, right), exact)


def test_nothing_to_sum():
    left, right, bias = torch.randn(33, 0), torch.randn(0, 51), torch.randn(51)
    assert torch.equal(onednn_mm(left, right, None), torch.zeros(33, 51))
    assert torch.equal(onednn_mm(left, right, bias), bias.expand(33, 51))


def test_nodes_that_another_pass_made():
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.output(graph.call_function(torch.ops.aten.mm.default, (x, w)))
    gemm.use_onednn(graph)
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_opcheck(tokens, trained):
    args = [torch.randn(*shape, requires_grad=trained) for shape in ((tokens, 7), (7, 4), (4,))]
    torch.library.opcheck(onednn_mm, args)


def replaced(function, *tensors):
    graph_module = make_fx(function, tracing_mode="fake")(*tensors)
    gemm.use_onednn(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    assert_as_accurate(graph_module(*tensors), function(*tensors), function(*(t.double() for t in tensors)))
    return [str(node.target) for node in graph_module.graph.nodes].count("memcompile.onednn_mm.default")


X, W, B = torch.randn(64, 128), torch.randn(128, 256), torch.randn(256)


@pytest.mark.parametrize(
    ("count", "function", "tensors"),
    [
        (2, lambda x, w: (x @ w) @ w.t(), (X, W)),
        (1, torch.addmm, (B, X, W)),
        (0, torch.addmm, (torch.randn(64, 256), X, W)),
        (0, torch.addmm, (torch.randn(1), X, W)),
        (0, lambda b, x, w: torch.addmm(b, x, w, beta=0.5), (B, X, W)),
        (0, torch.mm, (X.double(), W.double())),
        (0, torch.mm, (X.bfloat16(), W.bfloat16())),
        (0, torch.mm, (X[:, :16], W[:16, :16])),
        (0, torch.mm, (X.to("meta"), W.to("meta"))),
    ],
    ids="forward_and_transposed bias whole_bias one_bias scaled_bias float64 bfloat16 small another_device".split(),
)
def test_which_products_are_replaced(count, function, tensors):
    if tensors[0].device.type == "meta":
        graph = make_fx(function)(*tensors).graph
        gemm.use_onednn(graph)
        assert not graph.find_nodes(op="call_function", target=onednn_mm)
    else:
        assert replaced(function, *tensors) == count


@pytest.mark.parametrize("held_back", [False, True])
def test_compiled_forward_and_backward(held_back, monkeypatch):
    """Whatever this processor is, both ways compile, and Inductor's cache does not take one for the other."""
    calls = []
    kernel = gemm.onednn_linear
    monkeypatch.setattr(gemm, "onednn_linear", lambda *args: calls.append(args) or kernel(*args))
    monkeypatch.setattr("memcompile.lowering.inductor.graph_pass.mkl_is_held_back", lambda: held_back)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 640), torch.nn.GELU(), torch.nn.Linear(640, 512))
    torch._dynamo.reset()
    compiled = torch.compile(model, options=inductor_patches("test"), dynamic=True)
    for tokens in (5, 9):
        x = torch.randn(tokens, 512, requires_grad=True)
        expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
        actual = torch.autograd.grad(compiled(x).square().sum(), [x, *model.parameters()])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (12 if held_back else 0)  # 2 projections, forward and 2 products backward, for 2 inputs


@pytest.mark.parametrize(
    ("vendor", "capability", "held_back"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_where_mkl_is_held_back(vendor, capability, held_back, monkeypatch):
    if not (torch.backends.mkl.is_available() and gemm.has_onednn_linear()):
        held_back = False
    monkeypatch.setattr(gemm.Path, "exists", lambda self: True)
    monkeypatch.setattr(gemm.Path, "read_text", lambda self: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert gemm.mkl_is_held_back.__wrapped__() == held_back
