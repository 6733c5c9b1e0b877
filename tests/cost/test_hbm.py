"""Traffic of a GPU's memory, by hand."""

from dataclasses import replace

import pytest

from memcompile.cost.hbm import gather_bytes, moved, search_bytes, update_bytes
from memcompile.cost.job import Job

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
