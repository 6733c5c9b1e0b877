"""An FFN that does between its projections what a test says, and models with memory added to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memcompile
from memcompile.runtime.pool import pool_of
from tests.models import HIDDEN, WIDTH, around
from tests.planned import MEMORY, planned_gpt


class OperatedFfn(nn.Module):
    """Runs `operator` on its hidden activation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(hidden, hidden)
        self.operator: Callable = lambda h: h

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.operator(F.gelu(self.up(x))))


def have_had(ffn: OperatedFfn, operator: Callable, x: Tensor) -> None:
    """Makes the operator one that the FFN had when it was planned."""
    ffn.operator = operator
    ffn.down.memory.operations.records = True
    ffn(x)
    ffn.down.memory.operations.records = False


TOKEN_WISE: dict[str, Callable] = {
    "activation": torch.tanh,
    "method": lambda h: h.sigmoid(),
    "in place": lambda h: h.relu_(),
    "function in place": lambda h: F.relu(h, inplace=True),
    "arithmetic": lambda h: 1 - (2 * h + 3) / 4,
    "divided": lambda h: 1 / (1 + h),
    "in-place arithmetic": lambda h: h.mul_(2).add_(1),
    "keyword": lambda h: torch.add(h, 1, alpha=2),
    "power": lambda h: 2**h + h**2,
    "abs": abs,
    "negated": lambda h: -h,
    "gated": lambda h: h * torch.sigmoid(h),
    "cast": lambda h: h.to(torch.float64).type_as(h).contiguous(),
    "dropout": lambda h: F.dropout(h, 0.5),
    "layer norm": lambda h: F.layer_norm(h, (HIDDEN,)),
    "rms norm spelt out": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "mean over features": lambda h: h - torch.mean(h, dim=[2], keepdim=True),
    "vector norm": lambda h: h / torch.linalg.vector_norm(h, dim=-1, keepdim=True),
    "leading dimensions": lambda h: h.view(-1, HIDDEN).reshape(3, 5, -1),
    "flattened tokens": lambda h: h.flatten(0, 1).unsqueeze(0).view(3, 5, HIDDEN),
    "its own shape": lambda h: h.view(*h.shape[:-1], h.size(-1)) if h.dim() == h.ndim == 3 else None,
    "chunked": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "split": lambda h: torch.mul(*h.split([HIDDEN // 2] * 2, dim=2)),
    "sliced": lambda h: h[..., : HIDDEN // 2] * h[..., HIDDEN // 2 :],
    "glu": F.glu,
    "where": lambda h: torch.where(torch.tensor(True), h, 0.0),
    "comparison": lambda h: h * (h > 0) + torch.where(h <= 0, h, 0.0),
    "masked fill": lambda h: h.masked_fill(h < 0, 0).masked_fill_((h > 1) | ~(h < 2), 1),
    "drop path": lambda h: h * h.new_empty(3, 1, 1).bernoulli_(0.5) * (torch.rand_like(h) > 0.1),
    "statistics without the dimension": lambda h: h / h.square().mean(-1).sqrt().unsqueeze(-1),
    "variance": lambda h: (h - h.mean(-1, True)) / h.var(-1, True, True),
    "groups of features": lambda h: h.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2),
    "groups by index": lambda h: torch.cat([h.view(3, 5, 2, -1)[..., 0, :], h.view(3, 5, 2, -1).select(-2, 1)], -1),
    "unbound": lambda h: torch.cat(h.reshape(3, 5, 2, HIDDEN // 2).unbind(-2), -1),
    "permuted features": lambda h: h.view(-1, 5, 2, HIDDEN // 2).permute(0, 1, 3, 2).reshape(3, 5, HIDDEN),
    "minimum with a scalar tensor": lambda h: torch.min(h, torch.tensor(1.0)).max(torch.tensor(-1.0)),
    "minimum of two": lambda h: torch.min(h, -h) + torch.maximum(h, torch.zeros(())),
    "in groups of one": lambda h: (h.unsqueeze(-2) * h[:, :, None]).squeeze(2).view_as(h),
}


def wake(model: nn.Module) -> nn.Module:
    """Gives the memory an effect: its output projection is zero at first."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in pool_of(model).layers.values():
            layer.out_weight.normal_(generator=generator)
    return model


def added_ffn() -> OperatedFfn:
    """One to which memory was added, with an effect."""
    model = around(OperatedFfn, layers=2)
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    return wake(model).blocks[1].ffn


def added_gpt(**options) -> nn.Module:
    return wake(planned_gpt(placement="add", **options))


def trained(model: nn.Module, *inputs: Tensor, call: Callable | None = None) -> dict[str, Tensor]:
    """The output of one step, and all gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    output = (model if call is None else call)(*inputs)
    output.square().mean().backward()
    return {"output": output.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def dense_of(ffn: OperatedFfn) -> OperatedFfn:
    """The same FFN without memory."""
    dense = OperatedFfn(WIDTH, HIDDEN).to(ffn.down.weight.dtype)
    dense.up.to(ffn.up.weight.dtype)
    dense.load_state_dict({name: value for name, value in ffn.state_dict().items() if "memory" not in name})
    dense.operator = ffn.operator
    return dense
