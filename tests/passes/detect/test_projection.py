"""Projections: every spelling of ``x @ W + b`` is seen as one, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memcompile.passes.capture.trace import trace
from memcompile.passes.detect.projection import find_projections

IN, OUT = 6, 9


class Spelling(nn.Module):
    """A model of one projection, spelt by ``function(x, weight, bias)``; ``weight`` is [in, out] where asked."""

    def __init__(self, function, transposed=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((IN, OUT) if transposed else (OUT, IN)))
        self.bias, self.function = nn.Parameter(torch.randn(OUT)), function

    def forward(self, x):
        return self.function(x, self.weight, self.bias) * 2


def addmm(x, w, b):
    return torch.addmm(b, x.reshape(-1, IN), w).view(*x.shape[:-1], OUT)


SPELLINGS = {  # name -> (function, weight is [in, out], has a bias)
    "linear": (F.linear, False, True),
    "linear without bias": (lambda x, w, b: F.linear(x, w), False, False),
    "addmm": (addmm, True, True),
    "matmul": (lambda x, w, b: x @ w, True, False),
    "matmul and add": (lambda x, w, b: x @ w + b, True, True),
    "add in front": (lambda x, w, b: b + x @ w, True, True),
    "transposed": (lambda x, w, b: x @ w.T + b, False, True),
    "t()": (lambda x, w, b: x @ w.t(), False, False),
    "transpose()": (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)), False, False),
    "permute()": (lambda x, w, b: x @ w.permute(1, 0), False, False),
    "mm": (lambda x, w, b: x.reshape(-1, IN).mm(w), True, False),
    "cast at use": (lambda x, w, b: F.linear(x.double(), w.double(), b.double()), False, True),
    "linear, bias added": (lambda x, w, b: F.linear(x, w) + b, False, True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    function, transposed, biased = SPELLINGS[name]
    (capture,) = trace(Spelling(function, transposed), (torch.randn(2, 3, IN),))
    ((node, projection),) = find_projections(capture).items()
    assert projection.node is node
    assert (projection.width_in, projection.width_out) == (IN, OUT)
    assert capture.parameters[projection.weight] == "weight"
    assert (projection.bias and capture.parameters[projection.bias]) == ("bias" if biased else None)
    assert projection.input not in projection.nodes
    assert all(user not in projection.nodes for user in node.users)


NOT_ONE = {
    "scaled weight": lambda x, w, b: F.linear(x, w * 2, b),
    "weight made of two": lambda x, w, b: F.linear(x, w + b[:, None], b),
    "part of a weight": lambda x, w, b: F.linear(x, w[: OUT - 1], b[: OUT - 1]),
    "batched weight": lambda x, w, b: x @ w.T.expand(2, IN, OUT),
    "weight on the left": lambda x, w, b: (w @ x.transpose(1, 2)).transpose(1, 2),
    "weight from an activation": lambda x, w, b: F.linear(x, x[0].repeat(3, 1)) + w.sum(),
    "computed bias": lambda x, w, b: F.linear(x, w, b * 2),
    "scaled addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, IN), w.T, alpha=2.0),
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_what_is_no_projection(name):
    (capture,) = trace(Spelling(NOT_ONE[name]), (torch.randn(2, 3, IN),))
    assert all(projection.derived for projection in find_projections(capture).values())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: (lambda y: (y + b) * y)(x @ w.T),  # the product is read without its bias too
        lambda x, w, b: x @ w.T + b[:1],  # broadcast over features
        lambda x, w, b: torch.add(x @ w.T, b, alpha=2),
        lambda x, w, b: x @ w.T + b * 2,
    ],
)
def test_what_is_added_but_no_bias(function):
    (capture,) = trace(Spelling(function), (torch.randn(2, 3, IN),))
    (projection,) = find_projections(capture).values()
    assert projection.bias is None
