"""Every kernel in every configuration, compiled with no GPU: it compiles, nothing spills, it takes what docs/kernels.md
says, and its addresses hold the largest tables. Each instance is compiled for one target here; `resources.py` compiles
all of them for all.
"""

import pytest
import triton

from tests.lowering.triton.addresses import overflowing_offsets
from tests.lowering.triton.catalogue import Instance, instances, targets_to_test
from tests.lowering.triton.offline import SHARED_LIMITS, TARGETS
from tests.lowering.triton.resources import cell, read_page

# Registers a thread, and bytes of shared memory a block: the most that any configuration may take of any target. A
# multiprocessor has 65,536 registers: up to 128 leave room for 16 warps, and those that wait for memory want many.
MOST = {
    "add_atomically": (40, 0),
    "gather_dot_rows": (88, 2_048),
    "join_chunks": (48, 0),
    "pair_gather_rows": (128, 16_384),
    "pair_grads_rows": (128, 16_384),
    "rank_candidates": (128, 2_048),
    "select_computed": (255, 32_784),
    "select_stored": (104, 2_048),
    "sum_chunks": (72, 0),
    "update_adagrad": (88, 16_384),
    "update_adam": (72, 0),
    "update_sgd": (24, 0),
    "weighted_gather_rows": (104, 16_384),
}

# The largest that integers may be: 2**31 slots of 2**20 numbers, 2**24 tokens of 64 hits.
_TOKENS, _HEADS, _HITS, _VALUE_DIM = 2**24, 16, 64, 2**20
LARGEST = {
    "slots": 2**31 - 1,
    "num_slots": 2**31,
    "ranked": 2**31 - 1,
    "total": _TOKENS * _HITS,
    "hits": _HITS,
    "value_dim": _VALUE_DIM,
    "d": _VALUE_DIM,
    "value_row": 4 * _VALUE_DIM,
    "grad_row": 2 * _VALUE_DIM,
    "x_row": 2 * _VALUE_DIM,
    "value_column": 2,
    "grad_column": 2,
    "x_column": 2,
    "tokens": _TOKENS,
    "rows": _TOKENS * _HEADS,
    "heads": _HEADS,
    "n_keys": 46_340,
    "half_dim": 2_048,
    "keys_key": 2**14,
    "keys_column": 2**16,
    "query_column": 2**16,
    "missed_steps": 2**16,
    "counts": 64,
    "panels_each": 64,
}
# How many programs there are along the first dimension of a grid, where these are not the tokens.
PROGRAMS = {
    "rank_candidates": _TOKENS * _HEADS,
    "select_stored": _TOKENS * _HEADS,
    "select_computed": _TOKENS * _HEADS // 16,
    "sum_chunks": _TOKENS * _HITS // 16,
    "join_chunks": _TOKENS * _HITS // 16,
    "update_adagrad": _TOKENS * _HITS,
    "update_adam": _TOKENS * _HITS,
    "update_sgd": _TOKENS * _HITS,
}
# Their addresses hold in each of their steps. Of the others a sum that a loop carries counts as unbounded, so only what
# multiplies is held: there a row's length comes in.
_EVERY_STEP = {"add_atomically", "gather_dot_rows", "join_chunks", "sum_chunks", "weighted_gather_rows"}
_EVERY_STEP |= {"pair_gather_rows", "pair_grads_rows"}
_EVERY_STEP |= {"update_adagrad", "update_adam", "update_sgd"}


def _largest(instance: Instance) -> dict[str, int]:
    bounds = {name: LARGEST[name] for name in instance.signature if name in LARGEST}
    return bounds | {"program_id(0)": PROGRAMS.get(instance.kernel, _TOKENS) - 1}


CASES = [
    pytest.param(instance, target, id=f"{instance.name} {target}")
    for index, instance in enumerate(instances())
    for target in targets_to_test(index)
]


@pytest.mark.parametrize(("instance", "target"), CASES)
def test_resources_and_addresses(instance, target):
    compiled = instance.compile(target)
    taken = compiled.resources
    assert taken.registers <= 256 and taken.shared <= SHARED_LIMITS[target]
    version, rows = read_page()
    if version == triton.__version__:
        registers, shared = MOST[instance.kernel]
        assert taken.spills == 0
        assert taken.registers <= registers and taken.shared <= shared
        assert cell(taken) == rows[instance.name][target], "run python -m tests.lowering.triton.resources"
    else:  # of another compiler nothing is tuned: some give up a few bytes for the next step of occupancy
        assert taken.spills <= 64
    tables = [name for name, dtype in instance.signature.items() if dtype.startswith("*")]
    faults = overflowing_offsets(compiled, tables, _largest(instance), products_only=instance.kernel not in _EVERY_STEP)
    assert faults == []


def test_each_kernel_is_compiled_for_each_target():
    compiled = {(instance.kernel, target) for instance, target in (case.values for case in CASES)}
    assert compiled == {(kernel, target) for kernel in MOST for target in TARGETS}


def test_the_page_lists_every_instance_and_none_spills():
    _, rows = read_page()
    assert list(rows) == [instance.name for instance in instances()]
    assert not [name for name, cells in rows.items() if "spill" in str(cells)]
