"""The layers of the traps: each maps [batch, time, WIDTH] to the same, as an FFN does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import plain_ffn
from tests.zoo.entry import HIDDEN, WIDTH

EXPERTS, RANK = 4, 8


def _ffn() -> nn.Module:
    return plain_ffn(WIDTH, HIDDEN)


class DenseExperts(nn.Module):
    """Every expert sees every token; a router weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(_ffn() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)  # [batch, time, EXPERTS]
        return sum(expert(x) * weights[..., i, None] for i, expert in enumerate(self.experts))


class SharedExpert(nn.Module):
    """A dense expert beside routed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.routed, self.shared = DenseExperts(), _ffn()

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


class MixtureOfDepths(nn.Module):
    """Only the tokens that a router picks pass through the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.ffn = nn.Linear(WIDTH, 1), _ffn()

    def forward(self, x: Tensor) -> Tensor:
        weight, index = torch.sigmoid(self.router(x)).topk(5, dim=1)  # [batch, 5, 1]
        index = index.expand(-1, -1, WIDTH)
        return torch.zeros_like(x).scatter(1, index, self.ffn(x.gather(1, index)) * weight)


class BatchedExperts(nn.Module):
    """All experts in one einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.1)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("btd,edf->betf", x, self.up))
        return torch.einsum("betf,efd->betd", h, self.down).mean(1)


class IndexedBank(nn.Module):
    """The weights are parts of larger parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.1)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.up[0])), self.down[0])


def _adapter() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, RANK), nn.GELU(), nn.Linear(RANK, WIDTH))


class SerialAdapter(nn.Module):
    """Houlsby's: a bottleneck with a residual of its own behind the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.adapter = _ffn(), _adapter()

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        return y + self.adapter(y)


class ParallelAdapter(SerialAdapter):
    """The bottleneck is none, the FFN beside it is one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x) + self.adapter(x)


class LowRankAdapted(nn.Module):
    """LoRA around one projection."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(width_in, width_out)
        self.a, self.b = nn.Linear(width_in, 4, bias=False), nn.Linear(4, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


class LowRankAdaptedFfn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(LowRankAdapted(WIDTH, HIDDEN), nn.GELU(), LowRankAdapted(HIDDEN, WIDTH))


def low_rank() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.1), nn.Linear(HIDDEN, WIDTH))


def low_rank_with_norm() -> nn.Module:
    """As in multi-head latent attention: a norm is not the nonlinearity of an FFN."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, WIDTH))


class TiedProjections(nn.Module):
    """Down is up, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.up(x)), self.up.weight.t())


class _Opened(nn.Module):
    """An FFN whose hidden activation is at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)


class Probed(_Opened):
    """A classifier reads the hidden activation."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h) + 0.01 * self.probe(h).sum()


class Penalised(_Opened):
    """The hidden activation is kept for a penalty on its size."""

    penalty: Tensor

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        self.penalty = h.abs().mean()
        return self.down(h)


class TokenMixer(nn.Module):
    """MLP-Mixer's MLP over tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.mlp = plain_ffn(tokens, 4 * tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class ConvolutionalFfn(nn.Module):
    """FastSpeech's."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.up = nn.Conv1d(WIDTH, HIDDEN, kernel, padding=kernel // 2)
        self.down = nn.Conv1d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class ShiftedFfn(_Opened):
    """The hidden activation of a token meets that of the one before."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h + h.roll(1, dims=1))


class GateOfAnotherSource(nn.Module):
    """Bilinear over two sources: the gate reads the tokens in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x.flip(1))) * self.up(x))


class HyperNetwork(nn.Module):
    """The weights are computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN * WIDTH), nn.Linear(WIDTH, WIDTH * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(dim=(0, 1))
        up, down = self.up(context).view(HIDDEN, WIDTH), self.down(context).view(WIDTH, HIDDEN)
        return F.linear(F.gelu(F.linear(x, up)), down)


class RecurrentGate(nn.Module):
    """An LSTM with a wide state, projected back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.lstm, self.down = nn.Linear(WIDTH, HIDDEN), nn.LSTM(HIDDEN, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h * torch.sigmoid(self.lstm(h)[0]))


class SqueezeAndExcite(nn.Module):
    """An MLP whose output scales what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = _ffn()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.mlp(x))


class WithHeads(nn.Module):
    """A conditioning MLP before a model, a projection head, a pooler and a value head behind it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.time, self.body, self.projection = _ffn(), body, _ffn()
        self.pooler = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.value = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.body(x + self.time(x.mean(1, keepdim=True)))
        return self.projection(y), self.pooler(y[:, 0]), self.value(y)
