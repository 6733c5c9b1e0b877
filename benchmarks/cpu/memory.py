"""One memory layer (Memory+) four times: by memcompile, and as one writes it in PyTorch, eager and under Inductor."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common.layer import (
    agreed_error,
    bag,
    layer_parameters,
    layer_work,
    naive,
    our_layer,
    plain,
    relative_error,
)
from benchmarks.common.setting import Contestant, Layer, Setting, compiled, trained


def memory_contestants(setting: Setting, table: Tensor, most_tokens_of_naive: int | None) -> list[Contestant]:
    """The four; the naive gather only where a number of tokens for it is given."""
    values, work = table[: setting.num_slots], layer_work(setting)

    def contestant(
        name: str, layer: Callable[[dict[str, nn.Parameter]], Layer], most_tokens: int | None = None
    ) -> Contestant:
        p = layer_parameters(setting)  # each its own, so that none finds another's in the caches
        return Contestant(name, layer(p), trained(p.values()), work, setting.n_keys, most_tokens)

    found = [
        contestant("memcompile", lambda p: our_layer(setting, values, p)),
        contestant("eager", lambda p: lambda x: plain(x, values, p, setting, bag)),
        contestant("Inductor", lambda p: compiled(lambda x: plain(x, values, p, setting, bag))),
    ]
    if most_tokens_of_naive:
        found.append(
            contestant(
                "Inductor, naive gather",
                lambda p: compiled(lambda x: plain(x, values, p, setting, naive)),
                most_tokens_of_naive,
            )
        )
    return found


def check_agreement(contestants: list[Contestant], tokens: int, width: int, dtype: torch.dtype) -> None:
    """Whether the four compute the same; a benchmark of something else is worth nothing.

    Raises:
        RuntimeError: they do not.
    """
    x = torch.randn(tokens, width, dtype=dtype)
    with torch.no_grad():
        expected = {c.n_keys: c.layer(x) for c in contestants if c.name == "eager"}
        for contestant in contestants:
            if contestant.name in ("memcompile", "Inductor", "Inductor, naive gather"):
                error = relative_error(contestant.layer(x), expected[contestant.n_keys])
                if not error < agreed_error(dtype):
                    raise RuntimeError(f"{contestant.name} differs from eager by {error:.1e} of the output's norm")
