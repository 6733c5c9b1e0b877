"""A sharded table against the whole one: sums, and all gradients, on four ranks and on one.

Every rank computes what the whole table gives for the tokens of all ranks, and compares its own part.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from memcompile.lowering import memory_lookup, operator
from memcompile.lowering.distributed.sharded_pairs import sharded_pairs
from memcompile.lowering.distributed.sharded_table import Shards, chunk_sizes, most_tokens, sharded_gather
from tests.lowering.cases import TENSOR_NAMES, Case
from tests.lowering.gather.stepped import MISSING, stepped
from tests.lowering.gather.test_pairs import leaves_of
from tests.lowering.gather.test_table_pairs import hits_of
from tests.lowering.gather.test_weighted_gather import make
from tests.runtime.distributed.processes import run_on_ranks
from tests.tolerance import largest_error

RANKS = 4
TOKENS = {"even": (6, 6, 6, 6), "uneven": (3, 9, 5, 7), "none on some": (0, 5, 0, 4)}
VALUE_DIMS = {"even": 8, "uneven": 10, "empty": 2}
VALUES = TENSOR_NAMES.index("values")
SETTINGS = [*itertools.product((1, 0), ("dense", "sparse"), TOKENS, VALUE_DIMS, (False,))]
# Pairs, of 9 slots: the last rank has none.
SETTINGS += [*itertools.product((0,), ("dense", "sparse"), TOKENS, ("even",), (True,))]


def layer(value_dim: int, dtype: torch.dtype, n_keys: int = 7, pairs: bool = False) -> list[Tensor]:
    tensors = Case(leading=(4,), value_dim=value_dim, n_keys=n_keys, dtype=dtype, pairs=pairs).tensors()
    return [t.detach().clone() if t is not None else None for t in tensors]


def results(
    tensors: list[Tensor | None], weight: Tensor, gradient: str, shards: Shards | None = None, **options: Any
) -> dict[str, Tensor]:
    """The output and the gradients of the sum of output * weight; sparse ones as dense."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    top_k = min(4, tensors[TENSOR_NAMES.index("half_keys")].shape[2])
    out = memory_lookup(*leaves, heads=2, top_k=top_k, values_grad=gradient, shards=shards, **options)
    (out * weight).sum().backward()
    found = {"out": out.detach()}
    for name, leaf in zip(TENSOR_NAMES, leaves, strict=True):
        if leaf is not None:
            found[name] = leaf.grad.to_dense()
    if leaves[VALUES].grad.is_sparse:
        found["touched"] = leaves[VALUES].grad.coalesce().indices()[0]
    return found


def part_of(table: Tensor, shards: Shards) -> Tensor:
    return table.narrow(shards.dim, shards.offset, shards.own)


def against_whole(
    rank: int, ranks: int, dim: int, gradient: str, tokens: tuple[int, ...], value_dim: int, pairs: bool = False
) -> dict:
    """The largest errors of this rank's results, in fp64 and in fp32, and those of the whole table in fp32."""
    errors: dict[str, dict[str, float]] = {}
    start, own = sum(tokens[:rank]), tokens[rank]
    for dtype in (torch.float64, torch.float32):
        whole = layer(value_dim, dtype, n_keys=3 if pairs else 7, pairs=pairs)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sum(tokens), 12, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.randn(sum(tokens), 9, generator=generator, dtype=torch.float64).to(dtype)
        expected = results([x, *whole[1:]], weight, gradient, pairs=pairs)
        if dtype is torch.float64:
            exact = expected
        shards = Shards(dist.group.WORLD.group_name, chunk_sizes(whole[VALUES].shape[dim], ranks), rank, dim)
        mine = [x[start : start + own], *whole[1:]]
        mine[VALUES] = part_of(whole[VALUES], shards)
        found = results(mine, weight[start : start + own], gradient, shards, pairs=pairs)
        for name in found:
            if name == "values":
                found[name] = found[name] * ranks  # the mean over ranks
                exact_part, whole_part = part_of(exact[name], shards), part_of(expected[name], shards)
            elif name in ("out", "x"):
                exact_part, whole_part = exact[name][start : start + own], expected[name][start : start + own]
            elif name == "touched":
                continue
            else:
                dist.all_reduce(found[name])
                exact_part, whole_part = exact[name], expected[name]
            scale = largest_error(exact[name], torch.zeros_like(exact[name]))
            eps = torch.finfo(dtype).eps
            allowed = 2 * largest_error(whole_part, exact_part) + (64 if dtype is torch.float64 else 4) * eps * scale
            errors.setdefault(str(dtype), {})[name] = largest_error(found[name], exact_part) / max(allowed, 1e-300)
        if gradient == "sparse" and part_of(whole[VALUES], shards).numel():
            rows = expected["touched"]
            if dim == 0:
                rows = rows[(rows >= shards.offset) & (rows < shards.offset + shards.own)] - shards.offset
            assert torch.equal(found["touched"], rows), "a row is touched by padding, or by hits of other ranks' rows"
    return errors


def tensor_parallel(rank: int) -> dict[str, bool]:
    """All ranks have the same tokens: gate and output projection by columns, no all-gather of slots."""
    close = {}
    for gate, out in itertools.product((True, False), (True, False)):
        whole = layer(10, torch.float64)
        for name, kept in (("gate_weight", gate), ("gate_bias", gate), ("out_weight", out), ("out_bias", out)):
            whole[TENSOR_NAMES.index(name)] = whole[TENSOR_NAMES.index(name)] if kept else None
        weight = torch.randn(4, 9 if out else 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        expected = results(whole, weight, "sparse")
        shards = Shards(dist.group.WORLD.group_name, chunk_sizes(10, RANKS), rank, 1, same_tokens=True)
        cut = {"values": 1, "gate_weight": 0, "gate_bias": 0, "out_weight": 1}
        own = [
            t if t is None or n not in cut else t.narrow(cut[n], shards.offset, shards.own)
            for n, t in zip(TENSOR_NAMES, whole, strict=True)
        ]
        found = results(own, weight, "sparse", shards)
        for name, tensor in found.items():
            full = expected[name].narrow(cut[name], shards.offset, shards.own) if name in cut else expected[name]
            close[f"{name}, gate={gate}, out={out}"] = torch.allclose(tensor.double(), full.double(), atol=1e-12)
    return close


def agreed(rank: int) -> list[int]:
    name = dist.group.WORLD.group_name
    return [most_tokens(3 * rank, name, torch.device("cpu")), most_tokens(7 - rank, name, torch.device("cpu"))]


def too_many(rank: int) -> str:
    tensors = layer(8, torch.float32)
    shards = Shards(dist.group.WORLD.group_name, chunk_sizes(8, RANKS), rank, 1)
    tensors[VALUES] = part_of(tensors[VALUES], shards)
    try:
        memory_lookup(*tensors, heads=2, top_k=4, shards=shards, capacity=3)
    except RuntimeError as error:
        return str(error)
    return ""


def on_four(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {
        setting: against_whole(rank, RANKS, *setting[:2], TOKENS[setting[2]], VALUE_DIMS[setting[3]], setting[4])
        for setting in SETTINGS
    }
    return {**found, "parallel": tensor_parallel(rank), "agreed": agreed(rank), "too many": too_many(rank)}


def on_one(rank: int) -> list[dict]:
    ways = (1, False), (0, False), (0, True)
    return [
        against_whole(0, 1, dim, gradient, (5,), 10, pairs) for dim, pairs in ways for gradient in ("dense", "sparse")
    ]


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_on_ranks(on_four, RANKS)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_sharded_table_is_the_whole_one_to_rounding(ranks, setting):
    for rank, errors in enumerate(ranks):
        for dtype, ratios in errors[setting].items():
            worst = max(ratios, key=ratios.__getitem__)
            assert ratios[worst] <= 1, f"rank {rank}, {dtype}: {worst} errs {ratios[worst]:.1f} times what is allowed"


def test_one_rank_alone():
    for errors in run_on_ranks(on_one, 1)[0]:
        assert all(ratio <= 1 for ratios in errors.values() for ratio in ratios.values())


def test_tensor_parallelism_is_the_whole_layer(ranks):
    for rank in ranks:
        assert all(rank["parallel"].values()), [name for name, close in rank["parallel"].items() if not close]


def test_ranks_agree_on_the_most_tokens(ranks):
    assert all(rank["agreed"] == [9, 7] for rank in ranks)


def test_more_tokens_than_agreed_upon_raise_on_every_rank(ranks):
    assert all("4 tokens" in rank["too many"] and "at most 3" in rank["too many"] for rank in ranks)


@pytest.mark.parametrize(("total", "number"), [(10, 4), (8, 4), (2, 4), (0, 3), (7, 7), (9, 1)])
def test_parts_are_those_of_chunk(total, number):
    chunks = [len(chunk) for chunk in torch.arange(total).chunk(number)] if total else []
    assert chunk_sizes(total, number) == (*chunks, *([0] * (number - len(chunks))))


def assert_no_backward_after_a_step(values: Tensor, out: Tensor) -> None:
    with torch.no_grad():
        values.mul_(2)  # as a step would
    with pytest.raises(RuntimeError, match=r"call backward\(\) before step\(\)"):
        out.sum().backward()


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rule", MISSING)
def test_a_part_is_read_with_the_state_of_its_rows(rule, dim, gradient):
    table = stepped(rule, torch.float64)
    _, slots, weights, grad = make()
    found = []
    for read in (
        lambda x, w: sharded_gather(x, slots, w, Shards("", (x.shape[dim],), 0, dim), 5, gradient, table.row_state),
        lambda x, w: operator("table_gather")(x, slots, w, table.row_state, gradient),
    ):
        x, w = table.values.clone().requires_grad_(), weights.clone().requires_grad_()
        out = read(x, w)
        found.append((out.detach(), *(g.to_dense() for g in torch.autograd.grad(out, (x, w), grad, retain_graph=True))))
        assert_no_backward_after_a_step(x, out)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    assert largest_error(found[0][0], operator("weighted_gather")(table.values, slots, weights)) > 1e-6


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
@pytest.mark.parametrize("rule", MISSING)
def test_a_part_of_pairs_is_read_with_the_state_of_its_rows(rule, gradient):
    table = stepped(rule, torch.float64)
    data, found = hits_of(table), []
    for read in (
        lambda *given: sharded_pairs(*given, Shards("", (11,), 0, 0), 5, gradient, table.row_state),
        lambda *given: operator("table_pairs")(*given, table.row_state, gradient)[0],
    ):
        values, weights, x = leaves_of(data)
        out = read(values, data.slots, weights, x)
        grads = torch.autograd.grad(out, (values, weights, x), data.grad, retain_graph=True)
        found.append((out.detach(), *(g.to_dense() for g in grads)))
        assert_no_backward_after_a_step(values, out)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    assert largest_error(found[0][0], operator("pair_gather")(*data[:4])[0]) > 1e-6


@pytest.mark.parametrize("pairs", [False, True])
def test_torch_func_is_refused(pairs):
    tensors = layer(8, torch.float32, pairs=pairs)
    shards = Shards("nobody", (49,), 0, 0)

    def loss(values: Tensor) -> Tensor:
        others = [*tensors[:VALUES], values, *tensors[VALUES + 1 :]]
        return memory_lookup(*others, heads=2, top_k=4, shards=shards, pairs=pairs).sum()

    with pytest.raises(NotImplementedError, match="unsharded model"):
        torch.func.grad(loss)(tensors[VALUES])


@pytest.mark.parametrize("pairs", [False, True])
def test_second_derivatives_are_refused(pairs):
    tensors = [None if t is None else t.requires_grad_() for t in layer(8, torch.float64, pairs=pairs)]
    out = memory_lookup(*tensors, heads=2, top_k=4, shards=Shards("", (49,), 0, 0), capacity=4, pairs=pairs)
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(out.sum(), tensors[VALUES], create_graph=True)
