"""product_key_topk against its rule written in plain Python, and against brute force over all n * n sums."""

import math
import struct

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from memcompile.lowering.search.product_key_topk import candidate_pairs
from tests.lowering.reference import product_key_topk_reference

product_key_topk = torch.ops.memcompile.product_key_topk.default

# Few distinct values, so that most draws tie; 2**24 + 1 rounds when it is added to.
TYING = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, float(2**24), 1e30])
ANY = st.floats(width=32)


def best_first(value: float) -> tuple[bool, float]:
    """A sort key: NaN before all numbers, then from the largest down; -0.0 and 0.0 alike."""
    return (False, 0.0) if math.isnan(value) else (True, -value)


def rounded_sum(a: float, b: float) -> float:
    """a + b in float32."""
    return torch.tensor(a + b, dtype=torch.float64).float().item()


def rule(first: list[float], second: list[float], top_k: int) -> tuple[list[float], list[int]]:
    """The documented rule for one token and head."""
    n = len(first)
    ranked = [sorted(range(n), key=lambda i, half=half: (best_first(half[i]), i)) for half in (first, second)]
    pairs = [(a, b) for a in range(n) for b in range(n) if (a + 1) * (b + 1) <= top_k]
    sums = {(a, b): rounded_sum(first[ranked[0][a]], second[ranked[1][b]]) for a, b in pairs}
    best = sorted(pairs, key=lambda pair: (best_first(sums[pair]), pair))[:top_k]
    return [sums[p] for p in best], [ranked[0][a] * n + ranked[1][b] for a, b in best]


@st.composite
def scores_and_k(draw, elements):
    n, tokens, heads = draw(st.integers(1, 8)), draw(st.integers(0, 3)), draw(st.integers(1, 2))
    flat = draw(st.lists(elements, min_size=2 * tokens * heads * n, max_size=2 * tokens * heads * n))
    scores = torch.tensor(flat, dtype=torch.float32).reshape(2, heads, tokens, n).transpose(1, 2)
    return scores, draw(st.one_of(st.just(n), st.integers(1, n)))


@given(scores_and_k(st.one_of(TYING, ANY)))
def test_it_follows_the_rule(drawn):
    scores, top_k = drawn
    logits, slots = product_key_topk(scores, top_k)
    _, tokens, heads, _ = scores.shape
    assert logits.shape == slots.shape == (tokens, heads, top_k)
    assert slots.dtype == torch.int32
    assert logits.dtype == torch.float32
    for token in range(tokens):
        for head in range(heads):
            expected_logits, expected_slots = rule(*scores[:, token, head].tolist(), top_k)
            assert slots[token, head].tolist() == expected_slots
            torch.testing.assert_close(
                logits[token, head], torch.tensor(expected_logits), rtol=0, atol=0, equal_nan=True
            )


@given(scores_and_k(st.one_of(TYING, ANY)), st.sampled_from([torch.float32, torch.float64]))
def test_it_is_brute_force_over_all_pairs(drawn, dtype):
    scores, top_k = drawn
    assume(not ((scores == math.inf).any() and (scores == -math.inf).any()))
    logits, slots = product_key_topk(scores.to(dtype), top_k)
    expected_logits, expected_slots = product_key_topk_reference(scores.to(dtype), top_k)
    assert torch.equal(slots.long(), expected_slots)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("quantum", [None, 0.5, 4.0])
@pytest.mark.parametrize(("n_keys", "top_k"), [(100, 32), (33, 33), (257, 1), (64, 16)])
def test_many_keys(n_keys, top_k, quantum):
    scores = torch.randn(2, 6, 3, n_keys, generator=torch.Generator().manual_seed(n_keys))
    if quantum is not None:
        scores = (scores / quantum).round() * quantum
    logits, slots = product_key_topk(scores, top_k)
    expected_logits, expected_slots = product_key_topk_reference(scores, top_k)
    assert torch.equal(slots.long(), expected_slots)
    assert torch.equal(logits, expected_logits)


def test_the_short_list_of_candidates_has_the_length_the_paper_facts_give():
    assert len(candidate_pairs(32)[0]) == 119
    assert len(candidate_pairs(16)[0]) == 50


def test_nan_and_inf_stay_in_their_token_and_head():
    scores = torch.randn(2, 4, 2, 9, generator=torch.Generator().manual_seed(0))
    clean_logits, clean_slots = product_key_topk(scores, 5)
    scores[0, 1, 0, 3] = math.nan
    scores[1, 2, 1, 4] = math.inf
    # A NaN with the sign bit set and a payload is a NaN all the same.
    odd_nan = struct.unpack("f", struct.pack("I", 0xFFC12345))[0]
    scores[1, 3, 1, 0] = odd_nan
    logits, slots = product_key_topk(scores, 5)
    weights = logits.softmax(-1)
    touched = torch.zeros(4, 2, dtype=torch.bool)
    touched[1, 0] = touched[2, 1] = touched[3, 1] = True
    assert torch.equal(logits[~touched], clean_logits[~touched])
    assert torch.equal(slots[~touched], clean_slots[~touched])
    assert weights[touched].isnan().all()
    assert ((slots >= 0) & (slots < 81)).all()


def test_the_last_slot_that_int32_can_number():
    n = 46340
    scores = torch.zeros(2, 1, 1, n)
    scores[..., -1] = 1.0
    _, slots = product_key_topk(scores, 1)
    assert slots.item() == n * n - 1 < 2**31


@pytest.mark.parametrize(
    ("scores", "top_k", "message"),
    [
        (
            torch.zeros(3, 1, 1, 4),
            2,
            r"scores: expected float32 or float64 \[2, tokens, heads, n_keys\], got .*\[3, 1, 1, 4\]",
        ),
        (torch.zeros(2, 1, 4), 2, r"scores: expected"),
        (torch.zeros(2, 1, 1, 4, dtype=torch.bfloat16), 2, r"scores: expected float32 or float64.*bfloat16"),
        (torch.zeros(2, 1, 1, 4), 5, r"top_k: expected 1 <= top_k <= n_keys = 4, got 5"),
        (torch.zeros(2, 1, 1, 4), 0, r"top_k: .*got 0"),
        (torch.zeros(2, 1, 1, 46341), 2, r"46341\*\*2 slots do not fit int32"),
    ],
)
def test_errors(scores, top_k, message):
    with pytest.raises(ValueError, match=message):
        product_key_topk(scores, top_k)


def test_gradient_goes_to_the_two_scores_of_each_hit():
    scores = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    logits, slots = product_key_topk(scores, 5)
    grad = torch.randn_like(logits)
    (actual,) = torch.autograd.grad(logits, scores, grad)
    i, j = slots.long() // 6, slots.long() % 6
    expected = torch.zeros_like(scores)
    expected[0].scatter_add_(-1, i, grad)
    expected[1].scatter_add_(-1, j, grad)
    torch.testing.assert_close(actual, expected)
    assert not slots.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(tokens, dtype):
    scores = torch.randn(2, tokens, 2, 6, dtype=dtype, requires_grad=True)
    torch.library.opcheck(product_key_topk, (scores, 4))


def test_gradcheck():
    scores = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    run = lambda s: product_key_topk(s, 4)[0]  # noqa: E731
    torch.autograd.gradcheck(run, (scores,))
    torch.autograd.gradgradcheck(lambda s: run(s).exp(), (scores,))


@pytest.mark.parametrize("dim", [0, 1, 4])
def test_vmap(dim):
    scores = torch.randn(4, 2, 3, 2, 6)
    logits, slots = torch.vmap(lambda s: product_key_topk(s, 5), in_dims=dim)(scores.movedim(0, dim))
    for b in range(4):
        expected = product_key_topk(scores[b], 5)
        assert torch.equal(logits[b], expected[0])
        assert torch.equal(slots[b], expected[1])
