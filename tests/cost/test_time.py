"""Times by hand, what makes them longer, and how near they are to the figures of the design's model."""

from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcompile.cost.job import Job
from memcompile.cost.time import Hardware, exchanges_of, times_of, wire_seconds
from memcompile.cost.wire import Collective, step_collectives
from memcompile.errors import OptionError

HARDWARE = Hardware(nvlink=100.0, network=10.0, hbm=1000.0, nvlink_latency=1.0, network_latency=2.0)


def seconds(operation, received, ranks, in_node):
    return wire_seconds(Collective("", operation, "memory", received), ranks, in_node, HARDWARE)


def test_inside_a_node_all_is_nvlink():
    for operation in ("all_gather", "all_to_all", "reduce_scatter", "all_reduce"):
        assert seconds(operation, 7000, 8, 8) == 1 + 7000 / 100
        assert seconds(operation, 7000, 1, 1) == 0


def test_between_nodes_an_all_to_all_brings_each_rank_its_own_bytes():
    assert seconds("all_to_all", 31_000, 32, 8) == pytest.approx(2 + 24_000 / 10 + 7_000 / 100)


def test_between_nodes_a_gather_crosses_once_a_node():
    """Of 31 ranks' 1,000 bytes 24 come from other nodes: each of the 8 adapters brings 3, and NVLink the other 28."""
    assert seconds("all_gather", 31_000, 32, 8) == pytest.approx(2 + 3_000 / 10 + 28_000 / 100)
    assert seconds("all_gather", 3_000, 4, 1) == pytest.approx(2 + 3_000 / 10)


def test_replicas_of_a_rank_share_a_node_where_groups_are_small():
    asked = Job(slots=2**20, value_dim=64, gpus=32, tokens=64)
    for ranks, in_node in ((1, 8), (2, 4), (8, 1), (16, 1)):
        _, (gradient,) = exchanges_of(asked, HARDWARE, ranks)
        (sent,) = step_collectives(asked, ranks)
        assert astuple(gradient)[:4] == astuple(sent)
        assert gradient.seconds == wire_seconds(sent, 32 // ranks, in_node, HARDWARE)


def test_a_collective_ends_with_its_slowest_rank():
    asked = Job(slots=2**20, value_dim=10, gpus=4, layers=2)  # 3, 3, 3 and 1 columns
    (_, outputs, gradients, _), _ = exchanges_of(asked, HARDWARE, 4)
    assert outputs.received_bytes == 8192 * 9 * 2
    assert gradients.received_bytes == 3 * 8192 * 3 * 2
    assert outputs.total_bytes == 2 * 8192 * 9 * 2
    assert outputs.seconds == 2 * (1 + 8192 * 9 * 2 / 100)


@pytest.mark.parametrize(("ranks", "wire", "local"), [(8, 0.3, 3.9), (64, 3.6, 4.2), (256, 11.0, 17.0)])
def test_near_the_figures_of_the_design(ranks, wire, local):
    """They had 6 bytes a hit and 2 a weight's gradient, where 8 and 4 are sent."""
    asked = Job(slots=2**26, value_dim=2048, gpus=ranks, layers=1)
    times = times_of(asked, Hardware(), ranks)
    assert wire <= times.layers_wire * 1e3 <= 1.5 * wire
    assert times.gather * 1e3 == pytest.approx(local, rel=0.05)


def test_the_total_is_the_sum_of_the_parts():
    times = times_of(Job(slots=2**20, value_dim=64, gpus=16), Hardware(), 8)
    parts = (times.layers_wire, times.step_wire, times.search, times.gather, times.update)
    assert times.total == pytest.approx(sum(parts)) and all(part > 0 for part in parts)


jobs = st.builds(
    Job,
    slots=st.sampled_from([2**14, 2**20, 2**26]),
    value_dim=st.integers(1, 2048),
    gpus=st.sampled_from([8, 16, 64]),
    tokens=st.integers(1, 2**14),
    by=st.sampled_from(["columns", "rows"]),
    values_grad=st.sampled_from(["sparse", "dense"]),
    optimizer=st.sampled_from(["adamw", "lazy_adam", "row_wise_adagrad", "sgd"]),
)


@given(jobs, st.sampled_from([1, 2, 8]), st.integers(1, 2**14))
def test_more_tokens_never_take_less(job, ranks, more):
    assert (
        times_of(replace(job, tokens=job.tokens + more), HARDWARE, ranks).total >= times_of(job, HARDWARE, ranks).total
    )


@given(jobs, st.sampled_from([1, 2, 8]))
def test_more_layers_never_take_less(job, ranks):
    assert times_of(replace(job, layers=4), HARDWARE, ranks).total > times_of(job, HARDWARE, ranks).total


@given(jobs, st.sampled_from([1, 2, 8]), st.sampled_from(["nvlink", "network", "hbm"]))
def test_faster_hardware_never_takes_longer(job, ranks, rate):
    faster = replace(HARDWARE, **{rate: 2 * getattr(HARDWARE, rate)})
    assert times_of(job, faster, ranks).total <= times_of(job, HARDWARE, ranks).total


@given(jobs, st.sampled_from([1, 2, 4]))
def test_a_larger_group_sends_more_in_its_layers(job, ranks):
    assert times_of(job, HARDWARE, 2 * ranks).layers_wire > times_of(job, HARDWARE, ranks).layers_wire


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hbm": 0}, "hbm must be positive, got 0"),
        ({"network": float("nan")}, "network must be positive, got nan"),
        ({"nvlink": float("inf")}, "nvlink must be positive, got inf"),
        ({"network_latency": -1}, "network_latency must be 0 or more, got -1"),
        ({"gpus_per_node": 0}, "gpus_per_node must be positive, got 0"),
        ({"model_memory": 80 * 2**30}, "model_memory must be below gpu_memory, got 80 of 80 GiB"),
    ],
)
def test_wrong_hardware_is_an_error_that_names_the_option(options, message):
    with pytest.raises(OptionError, match=message):
        Hardware(**options)
    Hardware(nvlink_latency=0, network_latency=0, model_memory=0)
