"""The weighted gather of rows on its own."""

import torch
from torch import Tensor, nn

from benchmarks.common.layer import bag, naive
from benchmarks.common.results import FORWARD
from benchmarks.common.setting import Setting, compiled
from benchmarks.gpu.case import GATHER, OURS, Case, Entry
from memcompile.lowering import inductor_patches

BAG = "F.embedding_bag"


def gather_case(setting: Setting, table: nn.Parameter, tokens: int, all_peers: bool) -> Case:
    """Rows at random. Bytes count every read of a row: those read twice are too far apart to be found in a cache. (The
    bytes of a whole layer count each row once, whatever its tokens share.)
    """
    hits, itemsize = setting.hits, table.itemsize
    flops = 2.0 * tokens * hits * setting.value_dim
    moved = tokens * ((hits + 1) * setting.value_dim * itemsize + hits * 8)  # rows, outputs, slots and weights
    gather = torch.ops.memcompile.weighted_gather

    def draw(count: int) -> tuple[Tensor, ...]:
        slots = torch.randint(setting.num_slots, (count, hits), dtype=torch.int32, device=table.device)
        return slots, torch.rand(count, hits, device=table.device).softmax(dim=-1)

    runs = {
        OURS: compiled(lambda s, w: gather(table, s, w), inductor_patches("benchmark"), dynamic=False),
        "memcompile, eager": lambda s, w: gather(table, s, w),
        BAG: lambda s, w: bag(table, s, w.to(table.dtype)),
    }
    if all_peers:
        runs["Inductor, naive gather"] = compiled(lambda s, w: naive(table, s, w.to(table.dtype)), dynamic=False)
    entries = tuple(Entry(name, run, flops, moved) for name, run in runs.items())
    return Case(GATHER, setting, tokens, FORWARD, draw, entries, reference=BAG)
