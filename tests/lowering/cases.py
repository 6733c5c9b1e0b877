"""Small memory layers to test with, strategies that draw them, and a look inside: which slots were read."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.lowering.reference import product_key_topk_reference

TENSOR_NAMES = (
    "x",
    "query_weight",
    "query_bias",
    "half_keys",
    "values",
    "gate_weight",
    "gate_bias",
    "out_weight",
    "out_bias",
    "temperature",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer: its sizes, which parts it has, the dtype of its tensors, and whether they are contiguous."""

    leading: tuple[int, ...] = (5,)
    width: int = 12
    heads: int = 2
    top_k: int = 4
    n_keys: int = 7
    half_dim: int = 3
    value_dim: int = 10
    out_dim: int | None = 9
    bias: bool = True
    gate: bool = True
    qk_norm: bool = False
    weighting: str = "softmax"
    tables: int = 1  # that lie one after the other, of which the layer has the last
    pairs: bool = False
    dtype: torch.dtype = torch.float32
    strided: bool = False
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"heads": self.heads, "top_k": self.top_k}
        if self.weighting != "softmax":
            options["weighting"] = self.weighting
        if self.tables > 1:
            options["first_slot"] = (self.tables - 1) * self.n_keys**2
            options["num_tables"] = self.tables
        if self.pairs:
            options["pairs"] = True
        return options

    def tensors(self) -> list[Tensor | None]:
        """The arguments of memory_lookup before `heads`, as leaves that require gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            wide = (*shape[:-1], 2 * shape[-1]) if self.strided else shape
            tensor = (torch.randn(wide, generator=generator, dtype=torch.float64) * scale).to(self.dtype)
            if self.strided:
                tensor = tensor[..., ::2]
            return tensor.requires_grad_()

        rows, thin = self.heads * 2 * self.half_dim, self.width**-0.5
        return [
            leaf(*self.leading, self.width),
            leaf(rows, self.width, scale=thin),
            leaf(rows) if self.bias else None,
            leaf(2, self.heads, self.n_keys, self.half_dim),
            leaf(self.tables * self.n_keys**2, self.value_dim + (self.width if self.pairs else 0)),
            leaf(self.value_dim, self.width, scale=thin) if self.gate else None,
            leaf(self.value_dim) if self.gate and self.bias else None,
            leaf(self.out_dim, self.value_dim, scale=thin) if self.out_dim else None,
            leaf(self.out_dim) if self.out_dim and self.bias else None,
            leaf(self.heads, scale=3.0) if self.qk_norm else None,
        ]

    def batch_norm(self, leaves: bool = True) -> dict[str, Tensor]:
        """BatchNorm of the query, far from the identity: leaves that require gradients, and running statistics."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = torch.randn(4, self.heads * 2 * self.half_dim, generator=generator, dtype=torch.float64)
        scale, shift, mean, var = drawn[0].exp(), drawn[1], drawn[2], drawn[3].exp()
        learnt = {"query_scale": scale.to(self.dtype), "query_shift": shift.to(self.dtype)}
        dtype = torch.promote_types(self.dtype, torch.float32)
        running = {"query_mean": mean.to(dtype), "query_var": var.to(dtype)}
        return {name: tensor.requires_grad_(leaves) for name, tensor in learnt.items()} | running


@st.composite
def cases(draw: Any, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """Layers of odd sizes, with every part on or off, k up to n, and no tokens at all now and then."""
    n_keys = draw(st.integers(1, 9))
    leading = draw(
        st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 3), st.integers(1, 3)), st.just(()))
    )
    qk_norm = draw(st.booleans())
    # In one dimension a unit vector is 1 or -1: gradients are zero.
    least = 2 if qk_norm else 1
    return Case(
        leading=leading,
        width=draw(st.integers(least, 13)),
        heads=draw(st.integers(1, 3)),
        top_k=draw(st.one_of(st.just(n_keys), st.integers(1, n_keys))),
        n_keys=n_keys,
        half_dim=draw(st.integers(least, 7)),
        value_dim=draw(st.integers(1, 19)),
        out_dim=draw(st.one_of(st.none(), st.integers(1, 11))),
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        qk_norm=qk_norm,
        weighting=draw(st.sampled_from(["softmax", "sigmoid"])),
        tables=draw(st.integers(1, 3)),
        pairs=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


VARIANTS = {
    "plain": Case(gate=False, out_dim=None, bias=False),
    "gate": Case(out_dim=None),
    "out": Case(gate=False),
    "full": Case(qk_norm=True),
    "sigmoid": Case(weighting="sigmoid", tables=3),
    "pairs": Case(gate=False, pairs=True),
}


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    return replace(case, dtype=dtype)


def leaves(tensors: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """The same values as fresh leaves, in another dtype when one is given."""
    return [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def gradients(output: Tensor, tensors: list[Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    """The gradient of every tensor that is there, by name."""
    named = [(name, t) for name, t in zip(TENSOR_NAMES, tensors, strict=True) if t is not None]
    found = torch.autograd.grad(output, [t for _, t in named], grad.to(output.dtype))
    return dict(zip([name for name, _ in named], found, strict=True))


class Recorder(TorchDispatchMode):
    """Keeps the scores that were searched, and what was chosen.

    Where the search is one kernel the scores are none of its results: they are computed anew from its arguments.
    """

    scores: Tensor  # [2, tokens, heads, n]
    weights: Tensor
    slots: Tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.memcompile.product_key_topk.default:
            self.scores, (logits, self.slots) = args[0].clone(), out
            self.weights = logits.softmax(-1)
        elif func is torch.ops.memcompile.product_key_search.default:
            self.scores, (self.weights, self.slots) = scores_of(*args[:2]), out
        return out


def scores_of(query: Tensor, half_keys: Tensor) -> Tensor:
    """Both halves' scores in plain PyTorch, in float32 or better: [2, tokens, heads, n]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.einsum(
        "thsd,shnd->sthn", query.detach().to(dtype).unflatten(-1, (2, -1)), half_keys.detach().to(dtype)
    )


def assert_best(slots: Tensor, scores: Tensor, top_k: int) -> None:
    """Assert that a head's slots are its `top_k` best by `scores`, in their order, but for the rounding of a sum."""
    logits, _ = product_key_topk_reference(scores.double(), top_k)
    chosen = logits_at(scores.double(), slots)
    rounding = 8 * torch.finfo(scores.dtype).eps * scores.abs().sum(0).amax().item() if scores.numel() else 0
    torch.testing.assert_close(chosen, logits, rtol=0, atol=rounding)
    ranked = slots.sort(dim=-1).values
    assert (ranked[..., 1:] > ranked[..., :-1]).all(), "a slot was chosen twice"


def logits_at(scores: Tensor, slots: Tensor) -> Tensor:
    """The sums of both halves' scores at slots [tokens, heads, k]."""
    n_keys = scores.shape[-1]
    return scores[0].gather(-1, slots.long() // n_keys) + scores[1].gather(-1, slots.long() % n_keys)


def weights_at(scores: Tensor, slots: Tensor) -> Tensor:
    """The softmax of these sums over a head's slots."""
    return logits_at(scores, slots).softmax(-1)
