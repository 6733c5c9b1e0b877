"""FlopCounterMode counts the operators of this layer, forward and backward."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from memcompile.lowering import memory_lookup
from memcompile.lowering.search.product_key_topk import candidate_pairs
from tests.lowering.cases import Case


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    flops = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    apart = [flops.pop(op) for op in ("aten.bmm", "memcompile.product_key_topk") if op in flops]
    if apart:  # the search, where no kernel does it whole
        assert len(apart) == 2
        flops["memcompile.product_key_search"] = sum(apart)
    return flops


def test_forward_and_backward():
    case = Case(leading=(5,))
    tensors = case.tensors()
    hits, key_dim, candidates = case.heads * case.top_k, 2 * case.half_dim, len(candidate_pairs(case.top_k)[0])
    outputs = []
    forward = counted(lambda: outputs.append(memory_lookup(*tensors, **case.options)))
    assert forward == {
        "aten.addmm": 2 * 5 * (12 * 12 + 10 * 12 + 9 * 10),  # query, gate and output projections
        "memcompile.product_key_search": 5 * case.heads * (2 * key_dim * case.n_keys + candidates),
        "memcompile.weighted_gather": 2 * 5 * hits * case.value_dim,
    }
    backward = counted(lambda: outputs[0].sum().backward())
    rows, keys = 2 * 5 * hits * case.value_dim, 2 * 5 * hits * key_dim
    assert backward["memcompile.gather_dot"] == rows
    assert backward["memcompile.weighted_scatter"] == rows + keys
    assert backward["memcompile.weighted_gather"] == keys
    assert "memcompile.product_key_search" not in backward  # nothing dense over the keys


def test_pairs_have_twice_the_dots():
    """Forward of all columns of a pair once, and so in the backward; then the gradient of the table."""
    case, counts = Case(leading=(5,), gate=False, pairs=True), []
    columns = 2 * 5 * case.heads * case.top_k * (case.width + case.value_dim)
    for gradient, gather, grads, scatter in (
        ("dense", "pair_gather", "pair_grads", "pair_scatter"),
        ("sparse", "table_pairs", "table_pair_grads", "sparse_scatter"),
    ):
        outputs, tensors = [], case.tensors()
        forward = counted(lambda: outputs.append(memory_lookup(*tensors, **case.options, values_grad=gradient)))  # noqa: B023
        assert forward[f"memcompile.{gather}"] == columns
        backward = counted(lambda: outputs[0].sum().backward())  # noqa: B023
        assert backward[f"memcompile.{grads}"] == backward[f"memcompile.{scatter}"] == columns
        counts.append((sum(forward.values()), sum(backward.values())))
    assert counts[0] == counts[1]


def test_inference_mode_and_meta_tensors_count_the_same():
    case = Case(leading=(5,))
    tensors = case.tensors()
    with torch.no_grad():
        expected = counted(lambda: memory_lookup(*tensors, **case.options))
    on_meta = [None if t is None else t.detach().to("meta") for t in tensors]
    assert counted(lambda: memory_lookup(*on_meta, **case.options)) == expected
    with torch.inference_mode():
        inference = counted(lambda: memory_lookup(*[None if t is None else t.clone() for t in tensors], **case.options))
    assert sum(inference.values()) == sum(expected.values())


def test_a_sparse_gradient_counts_the_same():
    case, totals = Case(leading=(5,)), []
    for gradient in ("dense", "sparse"):
        outputs, tensors = [], case.tensors()
        forward = counted(lambda: outputs.append(memory_lookup(*tensors, **case.options, values_grad=gradient)))  # noqa: B023
        backward = counted(lambda: outputs[0].sum().backward())  # noqa: B023
        totals.append((sum(forward.values()), sum(backward.values())))
    assert totals[0] == totals[1]
