"""Norms and clamps of sparse gradients: those of the dense tensor, or a refusal."""

import math

import pytest
import torch
from torch import Tensor, nn

from memcompile.lowering._torch import has_kernel
from memcompile.runtime.patches import sparse_clipping


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    class Owner:
        pass

    owner = Owner()
    sparse_clipping.PATCH.hold(owner)
    yield
    del owner


ORDERS = (1.0, 2.0, 2.5, math.inf)


def sparse(rows: int = 4, coalesced: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    """[11, 3] with this many rows stored, twice each unless coalesced."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(11, generator=generator)[:rows].sort().values.unsqueeze(0)
    values = torch.randn(rows, 3, generator=generator).to(dtype)
    if coalesced:
        return torch.sparse_coo_tensor(indices, values, (11, 3), is_coalesced=True, check_invariants=True)
    return torch.sparse_coo_tensor(indices.repeat(1, 2), values.repeat(2, 1), (11, 3), check_invariants=True)


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 4, 11])
@pytest.mark.parametrize("order", ORDERS)
def test_norms(order, rows, coalesced):
    grad = sparse(rows, coalesced)
    norm = torch.linalg.vector_norm(grad, order)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(grad.to_dense(), order), rtol=1e-12, atol=0)
    assert torch.linalg.vector_norm(grad.float(), order, dtype=torch.float64).dtype is torch.float64


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_clipping_by_norm(order, foreach):
    clipped = []
    for grad in (sparse(), sparse().to_dense()):
        parameters = [nn.Parameter(torch.zeros(11, 3).double()), nn.Parameter(torch.ones(5).double())]
        parameters[0].grad, parameters[1].grad = grad, torch.arange(5).double()
        norm = nn.utils.clip_grad_norm_(parameters, 0.5, order, error_if_nonfinite=True, foreach=foreach)
        clipped.append((norm, parameters[0].grad.to_dense(), parameters[1].grad))
    torch.testing.assert_close(*clipped, rtol=1e-12, atol=0)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("rows", [0, 4])
def test_clipping_by_value(rows, foreach):
    parameter = nn.Parameter(torch.zeros(11, 3).double())
    parameter.grad = sparse(rows)
    expected = parameter.grad.to_dense().clamp(-0.3, 0.3)
    nn.utils.clip_grad_value_(parameter, 0.3, foreach=foreach)
    assert parameter.grad.is_coalesced() and torch.equal(parameter.grad.to_dense(), expected)


def test_a_norm_that_is_not_finite_is_seen():
    parameter = nn.Parameter(torch.zeros(11, 3).double())
    parameter.grad = sparse() * math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(parameter, 1.0, error_if_nonfinite=True)


def test_what_would_need_the_zeros_is_refused():
    for call, message in (
        (lambda: sparse().clamp_min_(0.1), "would fill it"),
        (lambda: sparse().clamp_max_(-0.1), "would fill it"),
        (lambda: sparse().clamp_(0.1, 0.2), "would fill it"),
        (lambda: sparse(coalesced=False).clamp_max_(0.1), "not coalesced"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()


@pytest.mark.skipif(
    has_kernel("aten::linalg_vector_norm", "SparseCPU") and torch.__version__ >= "2.15",
    reason="PyTorch's own norms of sparse tensors",
)
def test_norms_that_are_refused():
    for options in ({"ord": 0}, {"ord": -1}, {"dim": 0}, {"keepdim": True}):
        with pytest.raises(NotImplementedError, match="orders above 0"):
            torch.linalg.vector_norm(sparse(), **options)
