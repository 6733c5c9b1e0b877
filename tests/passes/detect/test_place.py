"""Which FFNs are chosen, and what is said where that is impossible."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcompile import FfnSite, PlanError
from memcompile.passes.detect.place import place


def site(index, name=None, refusal=None):
    name = f"layers.{index}.mlp" if name is None else name
    return FfnSite(
        name=name,
        up=(f"layers.{index}.mlp.up.weight",),
        down=f"layers.{index}.mlp.down.weight",
        width=32,
        hidden=128,
        pattern="linear > gelu > linear",
        flops=2 * 2 * 32 * 128,
        refusal=refusal,
    )


def named(*names):
    return [site(i, name=name) for i, name in enumerate(names)]


ENCODER = [f"encoder.block.{i}.layer.1.mlp" for i in range(6)]
DECODER = [f"decoder.block.{i}.layer.2.mlp" for i in range(6)]


def chosen(count, layers):
    sites = [site(i) for i in range(count)]
    return [sites.index(s) for s in place(sites, layers)]


@pytest.mark.parametrize(
    ("count", "layers", "expected"),
    [
        (24, 3, [4, 12, 20]),  # Memory Layers at Scale, section 3.1
        (24, 1, [12]),
        (4, 3, [0, 2, 3]),
        (1, 1, [0]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (12, 2, [3, 9]),
    ],
)
def test_a_number_is_centred_and_evenly_strided(count, layers, expected):
    assert chosen(count, layers) == expected


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_any_number(count_and_layers):
    count, layers = count_and_layers
    picked = chosen(count, layers)
    assert len(set(picked)) == len(picked) == layers
    assert picked == sorted(picked)
    gaps = [b - a for a, b in itertools.pairwise(picked)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    before, after = picked[0], count - 1 - picked[-1]
    assert abs(before - after) <= 1


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((0, 2), [0, 2]),
        ((2, 0), [0, 2]),
        ((-1,), [3]),
        ((-4, 3), [0, 3]),
        ((1, 1, -3), [1]),
        (("layers.1.mlp",), [1]),
        (("layers.3.mlp.down.weight", 0), [0, 3]),
    ],
)
def test_indices_and_names(layers, expected):
    assert chosen(4, layers) == expected


@pytest.mark.parametrize(
    ("names", "count", "expected"),
    [
        (ENCODER + DECODER, 2, [3, 9]),
        (ENCODER + DECODER, 6, [1, 3, 5, 7, 9, 11]),
        (ENCODER + DECODER, 3, [3, 7, 10]),  # 1.5 and 1.5: the tie goes to the later stack
        (ENCODER + DECODER, 1, [9]),
        (DECODER + ENCODER, 1, [9]),
        (ENCODER + DECODER[:2], 4, [1, 3, 5, 7]),  # 3 and 1
        (ENCODER + DECODER[:1], 2, [1, 4]),  # 1.71 and 0.29
        (ENCODER + DECODER, 12, list(range(12))),
        ([name for pair in zip(ENCODER, DECODER, strict=True) for name in pair], 2, [6, 7]),  # stacks in turns
    ],
)
def test_a_number_is_divided_over_stacks(names, count, expected):
    sites = named(*names)
    assert [sites.index(s) for s in place(sites, count)] == expected


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.integers(1, sum(sizes)))
    )
)
def test_shares_are_proportional(sizes_and_count):
    sizes, count = sizes_and_count
    sites = named(*[f"{'abcd'[s]}.{i}" for s, size in enumerate(sizes) for i in range(size)])
    picked = place(sites, count)
    assert len({s.down for s in picked}) == count
    for s, size in enumerate(sizes):
        share = sum(p.stack == "abcd"[s] for p in picked)
        assert abs(share - count * size / sum(sizes)) < 1


def test_refused_sites_do_not_count_for_their_stack():
    sites = named(*ENCODER[:2], *DECODER[:2])
    sites[0] = site(0, name=ENCODER[0], refusal="it is odd")
    assert place(sites, 2) == [sites[1], sites[3]]  # 0.67 and 1.33
    assert place(sites, 3) == sites[1:]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("decoder.*", range(6, 12)),
        ("*.block.[0-1].*", [0, 1, 6, 7]),
        (("encoder.block.5.*", "decoder.block.?.layer.2.mlp", 0), [0, 5, *range(6, 12)]),
        ("layers.3.mlp.down.*", [3]),
        (ENCODER[4], [4]),
        ("all", range(12)),
    ],
)
def test_globs(layers, expected):
    sites = named(*ENCODER, *DECODER)
    assert place(sites, layers) == [sites[i] for i in expected]


def test_a_shared_block_counts_once():
    sites = [dataclasses.replace(site(0), calls=4), site(1)]
    assert place(sites, "all") == place(sites, 2) == sites


def test_globs_and_all_pass_over_refused_sites():
    assert place(REFUSED, "all") == place(REFUSED, "layers.*") == [REFUSED[0], REFUSED[2]]


def test_a_filter():
    assert chosen(4, lambda s: s.name.endswith(("1.mlp", "2.mlp"))) == [1, 2]


def test_refused_sites_are_not_counted():
    sites = [site(0), site(1, refusal="module has hooks"), site(2), site(3)]
    assert place(sites, 3) == [sites[0], sites[2], sites[3]]
    assert place(sites, (1, -1)) == [sites[2], sites[3]]
    seen = []
    place(sites, lambda s: seen.append(s) or True)
    assert seen == [sites[0], sites[2], sites[3]]


REFUSED = [site(0), site(1, refusal="module 'up' has hooks"), site(2, name="layers.0.mlp")]


@pytest.mark.parametrize(
    ("sites", "layers", "message"),
    [
        ([], 1, "no feed-forward block to replace was found. memcompile looks for .* pass example_inputs"),
        ([site(0, refusal="it is odd")], 1, "was found. 'layers.0.mlp' was left alone: it is odd"),
        ([site(0)], 2, "memory_layers=2, but only 1 .* 'layers.0.mlp'. Ask for at most 1"),
        (REFUSED, 3, "only 2 .* Ask for at most 2. 'layers.1.mlp' was left alone: module 'up' has hooks"),
        ([site(0)], (1,), "names block 1, but there are 1: 'layers.0.mlp'"),
        ([site(0)], (-2,), "names block -2, but there are 1"),
        ([site(0)], ("mlp",), "names 'mlp', which is no feed-forward block: choose from 'layers.0.mlp'"),
        (REFUSED, ("layers.0.mlp",), "owns several blocks: choose by .*layers.0.mlp.down.*layers.2.mlp.down"),
        (REFUSED, ("layers.1.mlp",), "'layers.1.mlp' cannot become a memory: module 'up' has hooks"),
        ([site(0)], "mlp", "names 'mlp', which is no feed-forward block: choose from 'layers.0.mlp'"),
        (
            [site(0)],
            "decoder.*",
            r"'decoder.\*' matches no feed-forward block: choose from 'layers.0.mlp'",
        ),
        (
            REFUSED,
            ("*.1.mlp", 0),
            r"'\*.1.mlp' matches no block that can .* 'layers.1.mlp' was left alone: module 'up'",
        ),
        ([site(0, refusal="it is odd")], "all", "was found. 'layers.0.mlp' was left alone: it is odd"),
        ([site(0)], lambda s: False, "filter chose none of the feed-forward blocks: 'layers.0.mlp'"),
        ([site(0, name="")], lambda s: False, "chose none .*: 'layers.0.mlp.down.weight'"),
    ],
)
def test_errors_name_what_there_is(sites, layers, message):
    with pytest.raises(PlanError, match=message):
        place(sites, layers)
