"""The whole layer: by memcompile, by the same mathematics in PyTorch, and the FFNs that it replaces."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common.dense import GELU, SWIGLU, gelu_ffn, swiglu_ffn
from benchmarks.common.layer import bag, layer_parameters, layer_work, naive, our_layer, plain
from benchmarks.common.setting import Contestant, Layer, Setting, compiled
from benchmarks.gpu.case import LAYER, OURS, Case, Entry

EAGER, EAGER_BAG = "eager", "eager, F.embedding_bag"
HIDDEN_MULTIPLE = 64


def layer_contestants(setting: Setting, table: nn.Parameter, all_peers: bool) -> list[Contestant]:
    """Each memory layer has parameters of its own; the table is everyone's."""
    work = layer_work(setting)

    def contestant(name: str, layer: Callable[[dict[str, nn.Parameter]], Layer]) -> Contestant:
        with table.device:
            p = layer_parameters(setting)
        return Contestant(name, layer(p), (table, *p.values()), work, setting.n_keys)

    found = [
        contestant(OURS, lambda p: our_layer(setting, table, p)),
        contestant(EAGER, lambda p: lambda x: plain(x, table, p, setting, naive)),
        contestant(EAGER_BAG, lambda p: lambda x: plain(x, table, p, setting, bag)),
    ]
    if all_peers:
        found += [
            contestant("Inductor", lambda p: compiled(lambda x: plain(x, table, p, setting, naive))),
            contestant("Inductor, F.embedding_bag", lambda p: compiled(lambda x: plain(x, table, p, setting, bag))),
        ]
    with table.device:
        found.append(swiglu_ffn(setting, HIDDEN_MULTIPLE))
        if all_peers:
            found.append(gelu_ffn(setting))
    return found


def layer_case(
    setting: Setting, table: nn.Parameter, contestants: list[Contestant], tokens: int, direction: str
) -> Case:
    def draw_tokens(count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, setting.width, device=table.device).to(setting.dtype),)

    itemsize = setting.dtype.itemsize
    entries = tuple(
        Entry(c.name, c.layer, c.work.flops * tokens, c.work.bytes(tokens, setting.width, itemsize), c.parameters)
        for c in contestants
    )
    return Case(
        LAYER, setting, tokens, direction, draw_tokens, entries, EAGER_BAG, frozenset((SWIGLU, GELU)), table=table
    )
