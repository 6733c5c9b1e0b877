"""Group sizes, the best of them, and what helps where none fits."""

import shlex
from dataclasses import replace

import pytest

from memcompile.cost.groups import (
    NUMBERS_OF_GPUS,
    alternatives,
    best,
    best_by_gpus,
    candidates,
    group_sizes,
    remedies,
)
from memcompile.cost.job import Job
from memcompile.cost.time import Hardware, times_of
from memcompile.errors import OptionError

HARDWARE = Hardware()


def job(**options):
    return Job(**{"slots": 2**26, "value_dim": 2048, "gpus": 256} | options)


def with_option(asked, words):
    """A job after one remedy, as a user would take it."""
    option, value = shlex.split(words.partition(" (")[0])
    name = option.removeprefix("--").replace("-", "_")
    return replace(asked, **{name: int(value) if value.isdecimal() else value})


@pytest.mark.parametrize(
    ("gpus", "node", "sizes"),
    [
        (1, 8, [1]),
        (6, 8, [1, 2, 3, 6]),
        (8, 8, [1, 2, 4, 8]),
        (24, 8, [1, 2, 4, 8, 24]),
        (12, 4, [1, 2, 4, 12]),
        (4, 1, [1, 2, 4]),
        (256, 8, [1, 2, 4, 8, 16, 32, 64, 128, 256]),
    ],
)
def test_groups_fill_nodes_or_divide_them(gpus, node, sizes):
    assert group_sizes(job(gpus=gpus), Hardware(gpus_per_node=node)) == sizes


def test_no_rank_of_a_group_is_without_a_column_or_row():
    assert group_sizes(job(value_dim=20), HARDWARE) == [1, 2, 4, 8, 16]
    assert group_sizes(job(slots=64, top_k=4, by="rows"), HARDWARE)[-1] == 64


def test_gpus_must_fill_their_nodes():
    with pytest.raises(OptionError, match="gpus=12 do not fill nodes of gpus_per_node=8: use 8 or 16 GPUs"):
        candidates(job(gpus=12), HARDWARE)


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("gpus", [32, 256, 1024])
def test_the_best_is_the_fastest_that_fits(gpus, values_grad):
    asked = job(gpus=gpus, values_grad=values_grad)
    found = candidates(asked, HARDWARE)
    chosen = best(found)
    assert chosen.fits and chosen.memory.total <= 60 * 2**30
    assert chosen.times.total == min(times_of(asked, HARDWARE, c.ranks).total for c in found if c.fits)
    assert all(c.ranks * c.replicas == gpus for c in found)


def test_the_best_need_not_be_the_largest_group():
    assert best(candidates(job(gpus=1024, values_grad="dense"), HARDWARE)).ranks < 1024


def test_the_fastest_is_not_chosen_where_it_does_not_fit():
    asked = job(gpus=1024, values_grad="dense")
    fastest = best(candidates(asked, HARDWARE))
    chosen = best(candidates(asked, Hardware(gpu_memory=fastest.memory.total - 1, model_memory=0)))
    assert chosen.ranks != fastest.ranks and chosen.times.total > fastest.times.total


def test_the_best_of_each_number_of_gpus():
    found = best_by_gpus(job(gpus=8), HARDWARE)
    assert tuple(found) == NUMBERS_OF_GPUS
    assert found[8] is None  # as the job itself
    assert found[64] == best(candidates(job(gpus=64), HARDWARE))


def test_alternatives_are_the_best_of_other_jobs():
    found = alternatives(job(), HARDWARE)
    assert set(found) == {"--values-grad dense", "--by rows"}
    for option, candidate in found.items():
        assert candidate == best(candidates(with_option(job(), option), HARDWARE))


def test_each_remedy_makes_it_fit():
    asked = job(gpus=8)
    assert best(candidates(asked, HARDWARE)) is None
    words = remedies(asked, HARDWARE)
    assert {w.split()[0] for w in words} >= {"--optimizer", "--gpus", "--slots"}
    for word in words:
        assert best(candidates(with_option(asked, word), HARDWARE)) is not None, word


def test_the_slots_that_fit_are_the_most():
    asked = job(gpus=8)
    (word,) = (w for w in remedies(asked, HARDWARE) if w.startswith("--slots"))
    fitting = with_option(asked, word)
    more = replace(asked, slots=(fitting.n_keys + 1) ** 2)
    assert best(candidates(fitting, HARDWARE)) is not None and best(candidates(more, HARDWARE)) is None


def test_masters_can_be_left_out():
    asked = job(gpus=32, master_weights=True)
    assert best(candidates(asked, HARDWARE)) is None
    assert "without --master-weights" in remedies(asked, HARDWARE)


def test_where_no_option_helps_alone_several_do_together():
    asked = job(gpus=8, dtype="fp32", master_weights=True)
    together, *others = remedies(asked, HARDWARE)
    assert together == "--dtype bf16 --optimizer row_wise_adagrad without --master-weights"
    assert {w.split()[0] for w in others} == {"--gpus", "--slots"}
    changed = replace(asked, dtype="bf16", optimizer="row_wise_adagrad", master_weights=False)
    assert best(candidates(changed, HARDWARE)) is not None


def test_nothing_helps_a_gpu_that_is_full():
    asked = Job(slots=2**20, value_dim=64, gpus=8)
    assert remedies(asked, Hardware(gpu_memory=2**20, model_memory=2**20 - 1)) == []
