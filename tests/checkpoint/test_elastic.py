"""Ranks that torchrun starts again, killed in a step and in a save: they go on as if nothing had been, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from memcompile.checkpoint import load, steps
from tests.checkpoint.elastic import EVERY, IN_A_SAVE, IN_A_STEP, STEPS, digest, evaluation, optimizer_of, unsharded
from tests.checkpoint.trainings import everything
from tests.torchrun import ROOT, torchrun


class Run(NamedTuple):
    folder: Path
    log: list[dict[str, Any]]
    end: dict[str, Any]

    def of(self, start: int) -> dict[int, dict[str, Any]]:
        """What a start logged of each step."""
        return {line["step"]: line for line in self.log if line["start"] == start}


def run(folder: Path, kills: str, restarts: int) -> Run:
    # Where all starts share torchrun's store, one may read the addresses of those who died (pytorch#135712).
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    script = ROOT / "tests" / "checkpoint" / "elastic.py"
    code, output = torchrun(script, folder, kills, restarts=restarts, **variables)
    assert code == 0, output
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return Run(folder, log, json.loads((folder / "end.json").read_text()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("uninterrupted"), "lives", restarts=0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("killed"), "kills", restarts=2)


def test_killed_ranks_change_nothing(uninterrupted, killed):
    expected = uninterrupted.of(0)
    assert list(expected) == list(range(1, STEPS + 1))
    for start in range(3):
        for step, line in killed.of(start).items():
            assert line == {**expected[step], "start": start}
    assert killed.end == uninterrupted.end


def test_each_start_goes_on_from_the_last_save(killed):
    in_a_step, in_a_save, to_the_end = (list(killed.of(start)) for start in range(3))
    assert in_a_step == list(range(1, IN_A_STEP))
    saved = IN_A_SAVE - EVERY  # what the kill in the next save leaves
    assert in_a_save == list(range(saved + 1, in_a_save[-1] + 1)) and IN_A_SAVE < in_a_save[-1] < STEPS
    assert to_the_end == list(range(saved + 1, STEPS + 1))
    assert steps(killed.folder / "saved") == [STEPS, STEPS - EVERY, STEPS - 2 * EVERY]


def test_rows_were_behind_when_they_were_saved(uninterrupted):
    behind = [line["behind"] for line in uninterrupted.of(0).values() if "behind" in line]
    assert len(behind) == STEPS // EVERY
    assert min(behind) > 100


def test_one_process_has_the_same_training(killed):
    model = unsharded()
    optimizer = optimizer_of(model)
    assert load(killed.folder / "saved", model, optimizer).step == STEPS
    assert digest(everything(model, optimizer)) == killed.end["digest"]
    assert evaluation(model) == pytest.approx(killed.end["evaluation"], rel=1e-13)
