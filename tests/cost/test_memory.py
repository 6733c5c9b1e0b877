"""Memory of a rank: by hand, and as the optimizers' own states; its traffic, by hand."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from memcompile.cost.job import Job
from memcompile.cost.memory import gather_bytes, memory_of, moved, search_bytes, state_bytes, update_bytes
from memcompile.lowering.distributed.sharded_pairs import sharded_pairs
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad

GIB = 2**30


def job(**options):
    return Job(**{"slots": 2**26, "value_dim": 2048, "gpus": 256} | options)


@pytest.mark.parametrize(("ranks", "gib"), [(8, 256), (64, 32), (256, 8)])
def test_dense_adamw_with_masters_by_hand(ranks, gib):
    """2 + 4 + 2 + 8 bytes an element."""
    memory = memory_of(job(gpus=ranks, values_grad="dense", master_weights=True), ranks)
    assert memory.values + memory.masters + memory.gradient + memory.states == gib * GIB
    assert (memory.masters, memory.states) == (2 * memory.values, 4 * memory.values)


@pytest.mark.parametrize(("ranks", "gib"), [(8, 32), (64, 4), (256, 1)])
def test_row_wise_states_by_hand(ranks, gib):
    """2 bytes an element, and 4 a row, which by columns every rank of the group has."""
    memory = memory_of(job(gpus=ranks, optimizer="row_wise_adagrad"), ranks)
    assert (memory.values, memory.states, memory.masters) == (gib * GIB, 2**26 * 4, 0)
    by_rows = memory_of(job(gpus=ranks, optimizer="row_wise_adagrad", by="rows"), ranks)
    assert (by_rows.values, by_rows.states) == (gib * GIB, 2**26 * 4 // ranks)


def test_a_small_job_by_hand():
    asked = Job(slots=36, value_dim=10, gpus=4, tokens=2, layers=3, heads=2, top_k=2, unique=0.5)
    memory = memory_of(asked, 4)
    rows = asked.touched_rows(4)
    assert memory.values == 36 * 3 * 2
    assert memory.states == 36 * (2 * 3 * 4 + 4)
    assert memory.gradient == rows * (8 + 3 * 2)
    lists, outputs = 3 * (4 * 2) * 4 * 8, (4 * 2) * 3 * 2
    assert memory.buffers == lists + outputs
    assert memory.total == memory.values + memory.states + memory.gradient + memory.buffers
    assert memory_of(asked, 4, rank=3).values == 36 * 1 * 2  # the last rank has less


def test_pairs_by_hand():
    """Rows are twice as wide, and sums are not. Each layer keeps the dots of its hits, and the tokens of all ranks."""
    asked = {"slots": 2**20, "value_dim": 64, "gpus": 4, "tokens": 64, "by": "rows"}
    plain, pairs = Job(**asked), Job(**asked, variant="peer")
    assert memory_of(pairs, 4).values == 2 * memory_of(plain, 4).values
    dots, tokens = 4 * 64 * 128 * 4, 4 * 64 * 64 * 2
    assert memory_of(pairs, 4).buffers == memory_of(plain, 4).buffers + 3 * (dots + tokens) + tokens
    alone = memory_of(replace(pairs, gpus=1), 1).buffers - memory_of(replace(plain, gpus=1), 1).buffers
    assert alone == 3 * dots / 4  # of its own tokens, which the rest of the model keeps anyway
    assert gather_bytes(pairs, 4, 1) == gather_bytes(plain, 4, 1) + (64 * 128 + 4 * 64) * 64 * 2


def test_what_a_layer_of_pairs_keeps_is_what_the_code_saves():
    """On one rank of a group of which no other exists."""
    asked = Job(slots=64, value_dim=10, gpus=4, tokens=6, heads=2, top_k=2, variant="peer")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        shards = Shards(dist.group.WORLD.group_name, (16,) * 4, 0, 0)
        table, x = (torch.zeros(n, asked.row_dim, dtype=torch.bfloat16, requires_grad=True) for n in (16, 6))
        hits, weights = torch.zeros(6, asked.hits, dtype=torch.int32), torch.zeros(6, asked.hits)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: t):
            sharded_pairs(table, hits, weights, x[:, :10], shards, 6, "sparse")
    finally:
        dist.destroy_process_group()
    assert sum(saved) == memory_of(replace(asked, layers=2), 4).buffers - memory_of(replace(asked, layers=1), 4).buffers


def test_replicas_gather_the_rows_of_all():
    asked = Job(slots=2**20, value_dim=64, gpus=8, tokens=64)
    memory = memory_of(asked, 2)
    assert memory.buffers == 4 * asked.touched_rows(2) * (8 + 32 * 4)
    assert memory.gradient == asked.touched_rows(8) * (8 + 32 * 2)  # the sum has the rows of all
    dense = memory_of(Job(slots=2**20, value_dim=64, gpus=8, tokens=64, values_grad="dense"), 2)
    assert dense.gradient == dense.values and dense.buffers < memory.buffers


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", RowAdamW), ("lazy_adam", LazyAdam), ("row_wise_adagrad", RowwiseAdagrad), ("sgd", RowSGD)],
)
def test_states_are_those_of_our_optimizers(name, kind, dtype):
    slots, columns = 64, 8
    values = torch.nn.Parameter(torch.zeros(slots, columns, dtype=torch.bfloat16))
    narrow = {"state_dtype": torch.bfloat16} if dtype == "bf16" and name in ("adamw", "lazy_adam") else {}
    optimizer = kind([values], **narrow)
    values.grad = torch.ones_like(values)
    optimizer.step()
    tables = [s for s in optimizer.state[values].values() if isinstance(s, torch.Tensor) and s.shape[:1] == (slots,)]
    asked = Job(slots=slots, value_dim=columns, gpus=1, top_k=8, optimizer=name, state_dtype=dtype)
    assert slots * state_bytes(asked, columns) == sum(t.numel() * t.itemsize for t in tables)


@given(ranks=st.sampled_from([1, 2, 4, 8, 16]), by=st.sampled_from(["columns", "rows"]), dense=st.booleans())
def test_a_larger_group_holds_less_of_the_table(ranks, by, dense):
    asked = Job(slots=2**16, value_dim=64, gpus=32, by=by, values_grad="dense" if dense else "sparse")
    small, large = memory_of(asked, ranks), memory_of(asked, 2 * ranks)
    assert large.values < small.values and large.states < small.states and large.gradient < small.gradient


def test_fp32_values_are_their_own_masters():
    memory = memory_of(job(dtype="fp32", master_weights=True), 256)
    assert memory.masters == 0 and memory.values == 2 * memory_of(job(), 256).values


# --- traffic ---------------------------------------------------------------------------------------

JOB = Job(slots=2**20, value_dim=256, gpus=8, tokens=4, layers=1, heads=2, top_k=8)
HITS = 8 * 4 * 16  # of the group


@pytest.mark.parametrize(("segment", "whole"), [(1, 64), (63, 64), (64, 64), (65, 128), (96, 128), (128, 128)])
def test_short_rows_move_whole_granules(segment, whole):
    assert moved(segment, 64) == whole


def test_a_gather_by_columns():
    assert gather_bytes(JOB, 8, 64) == HITS * 8 + HITS * 64 + 32 * 64  # 32 columns in bf16 are one granule
    assert gather_bytes(replace(JOB, value_dim=128), 8, 64) == HITS * 8 + HITS * 64 + 32 * 32  # half of it is wasted


def test_a_gather_by_rows_waits_for_the_busiest_rank():
    assert gather_bytes(replace(JOB, by="rows"), 8, 64) == HITS * 8 + HITS // 8 * 512 + 32 * 512
    assert gather_bytes(replace(JOB, by="rows", skew=3), 8, 64) == HITS * 8 + 3 * HITS // 8 * 512 + 32 * 512
    assert gather_bytes(replace(JOB, by="rows", skew=23), 8, 64) == HITS * 8 + HITS * 512 + 32 * 512  # all of them


def test_a_search():
    scores = 2 * 4 * 2 * 1024
    queries, half_keys = 4 * 2 * 128 * 2, 2 * 2 * 1024 * 64 * 2
    assert search_bytes(JOB) == queries + half_keys + 3 * 4 * scores


def test_an_update():
    rows = JOB.touched_rows(8)
    values, moments, last_step = 32 * 2, 2 * 32 * 4, 4
    assert update_bytes(JOB, 8, 64) == rows * (values + 2 * (values + moments + last_step))
    assert update_bytes(replace(JOB, values_grad="dense"), 8, 64) == 2**20 * (values + 2 * (values + moments))
    assert update_bytes(replace(JOB, optimizer="sgd"), 8, 64) == rows * 3 * values


def test_an_update_reads_what_replicas_sent():
    ours = replace(JOB, optimizer="sgd")
    gathered = 4 * JOB.touched_rows(2) * (8 + 128 * 4)
    assert update_bytes(ours, 2, 64) == gathered + JOB.touched_rows(8) * 3 * 256
