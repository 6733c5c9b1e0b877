"""The search's kernels against its rule and the fp64 oracle: odd sizes, k = n, ties, NaN, no tokens, half dtypes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.lowering.triton import cost
from tests.lowering.cases import assert_best, scores_of, weights_at
from tests.lowering.reference import product_key_topk_reference
from tests.lowering.search.test_product_key_topk import ANY, TYING, rule, scores_and_k
from tests.tolerance import assert_as_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
product_key_search = torch.ops.memcompile.product_key_search.default
product_key_topk = torch.ops.memcompile.product_key_topk.default


@settings(max_examples=16)
@given(scores_and_k(st.one_of(TYING, ANY)))
def test_the_rule(drawn):
    scores, top_k = drawn
    logits, slots = product_key_topk(scores, top_k)
    _, tokens, heads, _ = scores.shape
    for token in range(tokens):
        for head in range(heads):
            expected_logits, expected_slots = rule(*scores[:, token, head].tolist(), top_k)
            assert slots[token, head].tolist() == expected_slots
            expected = torch.tensor(expected_logits)
            torch.testing.assert_close(logits[token, head], expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=12)
@given(
    n_keys=st.integers(100, 300), top_k=st.integers(1, 64), quantum=st.sampled_from([0.0, 0.25, 2.0]), data=st.data()
)
def test_longer_lists(n_keys, top_k, quantum, data):
    scores = torch.randn(2, 1, 1, n_keys, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if quantum:  # ties, whole rows of them
        scores = (scores / quantum).round() * quantum
    if data.draw(st.booleans()):
        scores[0, 0, 0, data.draw(st.integers(0, n_keys - 1))] = data.draw(st.sampled_from([math.nan, math.inf]))
    logits, slots = product_key_topk(scores, top_k)
    expected_logits, expected_slots = product_key_topk_reference(scores, top_k)
    assert torch.equal(slots.long(), expected_slots)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0, equal_nan=True)


def adversarial(name: str) -> torch.Tensor:
    """Rows of 2,048 scores whose best fall into few groups, so that the first threshold lets hundreds pass."""
    ascending = torch.arange(2048.0)
    interleaved = ascending.reshape(16, 128).t().reshape(-1)
    row = {"few groups": interleaved, "equal but few": (interleaved / 500).floor(), "descending": ascending.flip(0)}[
        name
    ]
    return row.expand(2, 1, 1, 2048)


@pytest.mark.parametrize("name", ["few groups", "equal but few", "descending"])
@pytest.mark.parametrize("top_k", [1, 5, 32, 64])
def test_rows_that_need_more_passes(name, top_k):
    scores = adversarial(name)
    logits, slots = product_key_topk(scores, top_k)
    expected_logits, expected_slots = product_key_topk_reference(scores, top_k)
    assert torch.equal(slots.long(), expected_slots)
    assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("name", ["few groups", "equal but few", "descending"])
@pytest.mark.parametrize("top_k", [5, 64])
def test_computed_rows_that_need_more_passes(monkeypatch, name, top_k):
    """The same scores as products, exact in fp16, over more columns than one step multiplies."""
    monkeypatch.setattr(cost, "stores_scores", lambda *_: False)
    scores = adversarial(name)
    query = torch.zeros(1, 1, 2, 90, dtype=torch.half)
    query[..., 80] = 1
    half_keys = torch.zeros(2, 1, 2048, 90, dtype=torch.half)
    half_keys[..., 80] = scores[:, 0]
    weights, slots = product_key_search(query.flatten(-2), half_keys, top_k)
    logits, expected = product_key_topk_reference(scores, top_k)
    assert torch.equal(slots.long(), expected)
    torch.testing.assert_close(weights, logits.softmax(-1))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_search(monkeypatch, launched, dtype, stored):
    """Both forms: an exact choice, and the weights of all examples within the tolerance rule: those of one are few."""
    monkeypatch.setattr(cost, "stores_scores", lambda *_: stored)
    triples = []

    @settings(max_examples=8)
    @given(
        tokens=st.integers(0, 2 if stored else 5),
        n_keys=st.integers(1, 50),
        half_dim=st.integers(1, 40),
        data=st.data(),
    )
    def run(tokens, n_keys, half_dim, data):
        top_k = data.draw(st.one_of(st.just(min(n_keys, 16)), st.integers(1, min(n_keys, 16))))
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(tokens, 1, 2 * half_dim, generator=generator).to(dtype)
        half_keys = torch.randn(2, 1, n_keys, half_dim, generator=generator).to(dtype)
        weights, slots = product_key_search(query, half_keys, top_k)
        plain, exact = scores_of(query, half_keys), scores_of(query.double(), half_keys.double())
        assert_best(slots, plain, top_k)
        triples.append([t.flatten() for t in (weights, weights_at(plain, slots), weights_at(exact, slots))])

    run()
    assert_as_accurate(*(torch.cat(tensors) for tensors in zip(*triples, strict=True)))
    form = "select_stored" if stored else "select_computed"
    assert set(launched) == {form, "rank_candidates"}


@pytest.mark.parametrize("stored", [True, False])
def test_the_forms_agree_on_numbers_that_are_exact(monkeypatch, stored):
    """Small integers have exact products: the same weights, bit for bit, and ties broken alike."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (5, 2, 12), generator=generator).half()
    half_keys = torch.randint(-2, 3, (2, 2, 70, 6), generator=generator).half()
    monkeypatch.setattr(cost, "stores_scores", lambda *_: stored)
    weights, slots = product_key_search(query, half_keys, 9)
    logits, expected = product_key_topk_reference(scores_of(query, half_keys), 9)
    assert torch.equal(slots.long(), expected)
    torch.testing.assert_close(weights, logits.softmax(-1))


def test_nan_stays_in_its_head():
    query, half_keys = torch.randn(3, 2, 8), torch.randn(2, 2, 20, 4)
    query[1, 0, 2] = math.nan
    weights, slots = product_key_search(query, half_keys, 4)
    assert ((slots >= 0) & (slots < 400)).all()
    is_nan = torch.zeros(3, 2, 4, dtype=torch.bool)
    is_nan[1, 0] = True
    assert torch.equal(weights.isnan(), is_nan)
