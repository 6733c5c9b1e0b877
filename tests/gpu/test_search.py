"""The search is exact: bit for bit the CPU's on the same scores, and the best slots of a query by scores in fp32."""

import math

import pytest
import torch

from memcompile.lowering.triton import cost
from tests.gpu.how import HOW, how
from tests.lowering.cases import assert_best, scores_of, weights_at
from tests.tolerance import assert_as_accurate

topk = torch.ops.memcompile.product_key_topk.default
search = torch.ops.memcompile.product_key_search.default
HEADS, TOP_K = 4, 32


def drawn(n_keys, tokens):
    return torch.randn(2, tokens, HEADS, n_keys, generator=torch.Generator().manual_seed(n_keys))


def with_special(scores, *numbers):
    """Some of the scores replaced by these numbers: in a third of the rows one, in a third many."""
    generator = torch.Generator().manual_seed(1)
    share = torch.tensor([0.0, 1.5 / scores.shape[-1], 0.4])[torch.arange(scores.shape[1]) % 3]
    replaced = torch.rand(scores.shape, generator=generator) < share[:, None, None]
    choice = torch.randint(len(numbers), scores.shape, generator=generator)
    return torch.where(replaced, torch.tensor(numbers)[choice], scores)


KINDS = {
    "random": lambda scores: scores,
    "ties": lambda scores: (scores * 2).round() / 2,
    "equal": torch.zeros_like,
    "signed zeros": lambda scores: scores.sign() * 0.0,
    "NaN": lambda scores: with_special(scores, math.nan),
    "negative NaN": lambda scores: with_special(scores, -math.nan, math.nan),
    "infinite": lambda scores: with_special(scores, math.inf, -math.inf),
    "everything": lambda scores: with_special(scores.round(), math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, 1e-45),
    "sums that round": lambda scores: scores * 2**24,
    "ascending": lambda scores: scores.sort(dim=-1).values,
}


def assert_as_on_the_cpu(scores, top_k, device, compiled=False):
    logits, slots = how(lambda s: topk(s, top_k), compiled)(scores.to(device))
    expected_logits, expected_slots = topk(scores, top_k)
    assert slots.dtype == torch.int32
    assert torch.equal(slots.cpu(), expected_slots)
    torch.testing.assert_close(logits.cpu(), expected_logits, rtol=0, atol=0, equal_nan=True)


@HOW
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_the_cpu(kind, compiled, device, sizes):
    for n_keys in sizes.search_keys:
        assert_as_on_the_cpu(KINDS[kind](drawn(n_keys, sizes.search_tokens)), TOP_K, device, compiled)


@pytest.mark.parametrize("kind", ["random", "ties", "everything"])
@pytest.mark.parametrize(
    ("n_keys", "top_k"), [(1, 1), (2, 2), (33, 33), (64, 64), (100, 32), (257, 1), (300, 7), (1025, 32), (500, 128)]
)
def test_any_number_of_keys_and_hits(n_keys, top_k, kind, device):
    for tokens in (0, 1, 29):
        assert_as_on_the_cpu(KINDS[kind](drawn(n_keys, tokens)), top_k, device)


def test_scores_at_any_strides(device):
    scores = drawn(100, 29)
    expected = topk(scores, TOP_K)[1]
    layouts = [scores.transpose(1, 2).contiguous().transpose(1, 2), scores.mT.contiguous().mT]
    for laid_out in [*layouts, torch.stack([scores, scores + 1], -1).flatten(-2)[..., ::2]]:
        moved = torch.empty_strided(laid_out.shape, laid_out.stride(), device=device).copy_(laid_out)
        assert torch.equal(topk(moved, TOP_K)[1].cpu(), expected)


@HOW
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "computed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_best_of_a_query(dtype, stored, compiled, device, sizes, needs_memory, monkeypatch):
    """In both forms of the search, whichever is cheaper."""
    needs_memory(25e9)
    monkeypatch.setattr(cost, "stores_scores", lambda *_: stored)
    for n_keys in sizes.search_keys:
        part = max(1, 2**25 // n_keys**2)  # tokens, of which all n * n sums are sorted at once
        tokens = min(sizes.search_tokens, 16 * part)
        query = torch.randn(tokens, HEADS, 2 * sizes.half_dim, device=device).to(dtype)
        half_keys = (torch.randn(2, HEADS, n_keys, sizes.half_dim, device=device) * sizes.half_dim**-0.5).to(dtype)
        weights, slots = how(lambda q, k: search(q, k, TOP_K), compiled)(query, half_keys)
        scores = scores_of(query, half_keys)
        for some_slots, some_scores in zip(slots.split(part), scores.split(part, dim=1), strict=True):
            assert_best(some_slots, some_scores, TOP_K)
        exact = scores_of(query.double(), half_keys.double())
        assert_as_accurate(weights, weights_at(scores, slots), weights_at(exact, slots), "weights")


def test_a_query_with_nan_stays_alone(device):
    query, half_keys = torch.randn(9, HEADS, 32, device=device), torch.randn(2, HEADS, 50, 16, device=device)
    weights, slots = search(query, half_keys, TOP_K)
    query[4, 1, 3] = math.nan
    spoilt_weights, spoilt_slots = search(query, half_keys, TOP_K)
    clean = torch.ones(9, HEADS, dtype=torch.bool, device=device)
    clean[4, 1] = False
    assert torch.equal(spoilt_weights[clean], weights[clean]) and torch.equal(spoilt_slots[clean], slots[clean])
    assert spoilt_weights[4, 1].isnan().all()
    assert ((spoilt_slots >= 0) & (spoilt_slots < 50 * 50)).all()
