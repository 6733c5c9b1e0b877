"""A table of pairs: its operator against two gathers, and against embeddings and einsum: python -m benchmarks.cpu.pairs

Each row of the table is read once by the operator, and twice by embeddings, which write what they read, as PEER-pytorch
does. Times are medians of rounds in which all are measured in turns; ratios are to the operator's.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.package import advise_huge_pages, load_kernels, operator
from benchmarks.harness.timing import in_turns, wall_seconds

Hits = tuple[Tensor, Tensor, Tensor]  # slots and weights [tokens, hits], x [tokens, d]


def one_pass(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    return operator("table_pairs")(values, slots, weights, x, [], "sparse")[0]


def two_gathers(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    u, v = values[:, : x.shape[1]], values[:, x.shape[1] :]
    dots = operator("gather_dot")(u, slots, x)
    return operator("weighted_gather")(v, slots, weights * F.gelu(dots))


def embeddings(values: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Of two tables, which are halves here; eager, as PEER-pytorch runs."""
    down, up = (F.embedding(slots, half) for half in (values[:, : x.shape[1]], values[:, x.shape[1] :]))
    activation = F.gelu(torch.einsum("td,thd->th", x, down)) * weights.to(x.dtype)
    return torch.einsum("th,thd->td", activation, up)


CONTESTANTS = {"one pass": one_pass, "two gathers": two_gathers, "embeddings + einsum": embeddings}


def seconds(
    contestant: Callable[..., Tensor], values: Tensor, hits: Callable[[], Hits], learns: bool, backward: bool
) -> float:
    """Of one call, with new hits; `learns`: whether the table has a gradient, sparse or dense as it comes."""
    slots, weights, x = hits()
    table = values.detach().requires_grad_(learns)
    if not backward:
        with torch.no_grad():
            return wall_seconds(contestant, table, slots, weights, x)

    def step() -> None:
        contestant(table, slots, weights.requires_grad_(), x.requires_grad_()).sum().backward()

    return wall_seconds(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--log-slots", type=int, default=16)
    args = parser.parse_args()
    load_kernels()
    torch.manual_seed(0)
    count = 2**args.log_slots
    print(f"{args.tokens} tokens, 128 hits each, {count:,} slots; ms, and times the operator's", end="\n\n")
    print("| d | dtype | direction |", *(f"{name} |" for name in CONTESTANTS))
    print("| ---: | --- | --- |" + " ---: |" * len(CONTESTANTS))
    for d in (256, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.empty(count, 2 * d, dtype=dtype)
            advise_huge_pages(values)
            values.normal_()

            def hits(d: int = d, dtype: torch.dtype = dtype) -> Hits:
                slots = torch.randint(count, (args.tokens, 128), dtype=torch.int32)
                return (
                    slots,
                    torch.rand(args.tokens, 128).softmax(-1),
                    torch.randn(args.tokens, d).mul_(d**-0.5).to(dtype),
                )

            drawn = hits()
            exact, *others = (contestant(values, *drawn).float() for contestant in CONTESTANTS.values())
            for other in others:
                torch.testing.assert_close(other, exact, rtol=0.05, atol=0.05)
            ways = {
                "forward": (False, False),
                "forward + backward, frozen table": (False, True),
                "forward + backward": (True, True),
            }
            for way, (learns, backward) in ways.items():
                samples = [partial(seconds, c, values, hits, learns, backward) for c in CONTESTANTS.values()]
                in_turns(1, *samples)
                times = [median(of) for of in in_turns(args.rounds, *samples)]
                cells = " | ".join(f"{1e3 * time:.1f} ({time / times[0]:.2f} x)" for time in times)
                print(f"| {d} | {str(dtype).removeprefix('torch.')} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
