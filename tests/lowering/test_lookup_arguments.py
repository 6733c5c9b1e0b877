"""What `memory_lookup` says of arguments that do not fit each other."""

import math
import re

import pytest
import torch

from memcompile.lowering import memory_lookup
from memcompile.lowering.distributed.sharded_table import Shards
from tests.lowering.cases import TENSOR_NAMES, Case

ERRORS = {
    "x: expected [..., d], got a scalar": {"x": torch.zeros(())},
    "heads: expected at least 1, got 0": {"heads": 0},
    "query_weight: expected [heads * key_dim, d = 12], got [12, 11]": {"query_weight": torch.zeros(12, 11)},
    "query_weight: 13 rows do not divide into heads = 2": {"query_weight": torch.zeros(13, 12)},
    "query_weight: 0 rows": {"query_weight": torch.zeros(0, 12)},
    "query_weight: key_dim must be even, got 10 rows / 2 heads = 5": {"query_weight": torch.zeros(10, 12)},
    "query_bias: expected [heads * key_dim] = [12], got [11]": {"query_bias": torch.zeros(11)},
    "half_keys: expected [2, heads, n_keys, key_dim / 2], got [2, 7, 3]": {"half_keys": torch.zeros(2, 7, 3)},
    "half_keys: expected [2, heads, n_keys, key_dim / 2] = [2, 2, 7, 3], got [2, 1, 7, 3]": {
        "half_keys": torch.zeros(2, 1, 7, 3)
    },
    "values: expected [n_keys**2 = 49, value_dim], got [48, 10]": {"values": torch.zeros(48, 10)},
    "values: expected [n_keys**2 = 49, value_dim], got [196, 10]": {"values": torch.zeros(196, 10)},
    "values: expected [num_tables * n_keys**2 = 98, value_dim], got [49, 10]": {"num_tables": 2},
    "values: expected [num_tables * n_keys**2 = 98, value_dim], got [196, 10]": {
        "values": torch.zeros(196, 10),
        "num_tables": 2,
    },
    "values: 4294836225 slots do not fit int32": {
        "values": torch.zeros(1, 10).expand(65535 * 65535, 10),
        "half_keys": torch.zeros(2, 2, 13107, 3),
        "num_tables": 25,
    },
    "num_tables: expected at least 1, got 0": {"num_tables": 0},
    "values: expected pairs [49, d + value_dim] with d = 12, got [49, 12]": {
        "values": torch.zeros(49, 12),
        "pairs": True,
    },
    "gate_weight: expected [value_dim, d] = [8, 12], got [10, 12]": {"values": torch.zeros(49, 20), "pairs": True},
    "shards: a table of pairs is sharded by rows": {
        "values": torch.zeros(49, 22),
        "pairs": True,
        "shards": Shards("", (22,), 0, 1),
    },
    "gate_weight: expected [value_dim, d] = [10, 12], got [12, 10]": {"gate_weight": torch.zeros(12, 10)},
    "gate_bias: expected [value_dim] = [10], got [12]": {"gate_bias": torch.zeros(12)},
    "gate_bias: given without gate_weight": {"gate_weight": None},
    "out_weight: expected [d_out, value_dim = 10], got [9, 11]": {"out_weight": torch.zeros(9, 11)},
    "out_bias: expected [d_out] = [9], got [10]": {"out_bias": torch.zeros(10)},
    "out_bias: given without out_weight": {"out_weight": None},
    "temperature: expected [heads] = [2], got [1]": {"temperature": torch.zeros(1)},
    "first_slot: expected a multiple of n_keys**2 = 49 below 49, got 49": {"first_slot": 49},
    "first_slot: expected a multiple of n_keys**2 = 49 below 98, got 7": {
        "values": torch.zeros(98, 10),
        "num_tables": 2,
        "first_slot": 7,
    },
    "first_slot: expected a multiple of n_keys**2 = 49 below 98, got -49": {
        "values": torch.zeros(98, 10),
        "num_tables": 2,
        "first_slot": -49,
    },
    "first_slot: expected int32 [], got torch.int64 []": {"first_slot": torch.tensor(0)},
    "first_slot: expected int32 [], got torch.int32 [1]": {"first_slot": torch.zeros(1, dtype=torch.int32)},
    "balance_loss: expected a factor >= 0, got -1.0": {"balance_loss": -1.0},
    "balance_loss: expected a factor >= 0, got nan": {"balance_loss": math.nan},
    "balance_loss: expected a factor >= 0, got inf": {"balance_loss": math.inf},
    "query_scale: expected [heads * key_dim] = [12], got [11]": {"query_scale": torch.zeros(11)},
    "query_var: given without query_scale": {"query_var": torch.zeros(12)},
    "query_mean and query_var: give both, or neither": {"query_scale": torch.zeros(12), "query_mean": torch.zeros(12)},
    "slot_hits and key_hits: give both, or neither": {"slot_hits": torch.zeros(49, dtype=torch.int64)},
    "slot_hits: expected int64 [49], got torch.int64 [48]": {
        "slot_hits": torch.zeros(48, dtype=torch.int64),
        "key_hits": torch.zeros(2, 2, 7, dtype=torch.int64),
    },
    "key_hits: expected int64 [2, 2, 7], got torch.float32 [2, 2, 7]": {
        "slot_hits": torch.zeros(49, dtype=torch.int64),
        "key_hits": torch.zeros(2, 2, 7),
    },
    "weighting: expected one of softmax, sigmoid, got 'linear'": {"weighting": "linear"},
    "top_k: expected 1 <= top_k <= n_keys = 7, got 8": {"top_k": 8},
    "top_k: expected 1 <= top_k <= n_keys = 7, got 0": {"top_k": 0},
    "46341**2 slots do not fit int32": {"half_keys": torch.zeros(2, 2, 46341, 3)},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    case = Case(qk_norm=True)
    arguments = dict(zip(TENSOR_NAMES, case.tensors(), strict=True)) | case.options | ERRORS[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        memory_lookup(**arguments)


def test_a_first_slot_is_given_once():
    case = Case(tables=2)
    with pytest.raises(ValueError, match="first_slot: give a number or slot_offset, not both"):
        torch.ops.memcompile.memory_lookup(
            *case.tensors(), **case.options, slot_offset=torch.zeros((), dtype=torch.int32)
        )


def test_an_overload_refuses_what_it_does_not_declare_to_mutate():
    case, lookup = Case(), torch.ops.memcompile.memory_lookup
    hits = {"slot_hits": torch.zeros(49, dtype=torch.int64), "key_hits": torch.zeros(2, 2, 7, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"training: memory_lookup\.default moves no statistics"):
        lookup.default(*case.tensors(), **case.options, training=True)
    for overload in (lookup.default, lookup.updating):
        with pytest.raises(ValueError, match=r"slot_hits: hits are counted by memory_lookup\.counting alone"):
            overload(*case.tensors(), **case.options, **hits)
    assert not hits["slot_hits"].any()
