"""examples/sharded.py: a rank that is killed changes nothing, and other numbers of ranks take its checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("airportsdata")

import facts_model
import sharded

import memcompile.checkpoint
from tests.checkpoint.trainings import everything
from tests.planned import assert_same
from tests.torchrun import ROOT, Finished, torchrun

SCRIPT = ROOT / "examples" / "sharded.py"
STEPS, EVERY, KILLED_AT = 24, 8, 20
# Of 1,024 rows a step hits at most 800.
MODEL = "--facts 6 --width 16 --keys 32 --top-k 4 --heads 2 --batch 8 --no-compile --lr 0.03".split()
TINY = [*MODEL, "--steps", str(STEPS), "--save-every", str(EVERY)]


class Run(NamedTuple):
    folder: Path
    output: str

    @property
    def losses(self) -> list[tuple[int, float]]:
        lines = (self.folder / sharded.LOSSES).read_text().splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def run(folder: Path, *options: str, restarts: int = 0) -> Run:
    code, output = torchrun(SCRIPT, *TINY, "--folder", folder, *options, restarts=restarts)
    assert code == 0, output
    return Run(folder, output)


def alone(*arguments: object) -> Finished:
    """In one process, without torchrun."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=environment, text=True, timeout=120, check=False, **both)
    return Finished(done.returncode, done.stdout)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("killed"), "--kill-at", str(KILLED_AT), restarts=1)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """All state of a finished training, whole, in this process."""
    options = sharded.parse([*TINY, "--folder", str(folder)])
    facts = sharded.facts_of(options, torch.device("cpu"))
    model = facts_model.Transformer(facts.vocabulary, options.width, options.layers)
    memcompile.plan(model, memory=memcompile.checkpoint.config(folder))
    optimizer = torch.optim.AdamW(model.parameters())
    assert memcompile.checkpoint.load(folder, model, optimizer).step == STEPS
    return everything(model, optimizer)


def line_of(name: str, output: str) -> str:
    return re.search(rf"^{name} .*$", output, re.MULTILINE).group()


def test_a_killed_rank_changes_nothing(uninterrupted, killed):
    steps = [step for step, _ in killed.losses]
    again = steps.index(KILLED_AT - 1) + 1  # where the second start begins
    assert steps[:again] == list(range(1, KILLED_AT))
    assert steps[again:] == list(range(steps[again], STEPS + 1))
    assert steps[again] in (EVERY + 1, 2 * EVERY + 1), "the save may not have been over"
    assert f"resumed from step {steps[again] - 1}" in killed.output
    assert dict(killed.losses) == dict(uninterrupted.losses)
    assert set(killed.losses) == set(uninterrupted.losses)
    assert_same(loaded(killed.folder), loaded(uninterrupted.folder))


def test_the_table_of_figures(killed):
    parameters = {name: p.numel() for name, p in loaded(killed.folder).items() if name.startswith("model.")}
    table = parameters["model.memory_values"]
    figures = {
        "ranks": 2,
        "parameters": sum(parameters.values()),
        "parameters a rank": sum(parameters.values()) - table // 2,
        "table": 4 * table,
        "table a rank": 2 * table,
    }
    for name, figure in figures.items():
        assert re.search(rf"^{name} +{figure:,}( |$)", killed.output, re.MULTILINE), (name, figure)


def test_one_process_recalls_the_same(killed, capsys):
    assert sharded.main(["--evaluate", str(killed.folder), "--no-compile"]) == 0
    told = capsys.readouterr().out
    assert line_of("recall", told) == line_of("recall", killed.output)
    assert " 0.0%" not in told
    assert f"step {STEPS} of {STEPS}, saved by 2 rank(s)" in told


def test_one_process_goes_on_from_two(killed):
    """Without torchrun, and with the table cut otherwise."""
    code, output = alone(*TINY, "--folder", killed.folder, "--by", "rows")
    assert code == 0, output
    assert f"resumed from step {STEPS}" in output
    assert line_of("recall", output) == line_of("recall", killed.output)


def test_another_training_is_told(killed):
    code, output = alone(*TINY, "--folder", killed.folder, "--width", 32)
    assert code == 2
    assert "has another training (--width 16 there, 32 here)" in output and "Traceback" not in output


def test_checkpoints_of_another_program_are_left_alone(killed, tmp_path):
    shutil.copytree(killed.folder / f"step_{STEPS}", tmp_path / f"step_{STEPS}")
    code, output = alone(*TINY, "--folder", tmp_path)
    assert code == 2 and "has checkpoints, and not of this example" in output
    assert [path.name for path in tmp_path.iterdir()] == [f"step_{STEPS}"]


def test_a_training_that_saved_nothing_is_in_nobodys_way(tmp_path):
    options = sharded.parse([*TINY, "--folder", str(tmp_path)])
    assert sharded.other_training(options) == ""
    assert sharded.other_training(sharded.parse([*TINY, "--folder", str(tmp_path), "--width", "32"])) == ""


@pytest.mark.parametrize(
    ("ranks", "name", "options"),
    [
        (1, "--steps", "--steps 1"),
        (1, "--save-every", "--save-every 0"),
        (1, "--by", "--by blocks"),
        (1, "--top-k", "--top-k 9 --keys 8"),
        (1, "--folder", f"--folder {SCRIPT}"),
        (1, "--evaluate", f"--evaluate {SCRIPT.parent}"),
        (2, "--evaluate", f"--evaluate {SCRIPT.parent}"),
        (3, "--batch", "--batch 256"),
    ],
)
def test_wrong_options_are_named(capsys, monkeypatch, tmp_path, ranks, name, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(SystemExit) as stopped:
        sharded.main(options.split())
    assert stopped.value.code == 2
    assert f"argument {name}:" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_answers_out(ranks):
    """Each fact is looked at once, by one rank, whatever the last batch has."""
    facts = facts_model.Facts.encode(facts_model.Facts.available()[:45])
    answers = torch.nn.functional.one_hot(facts.targets.clamp(min=0), facts.vocabulary).float()
    rows = {tuple(tokens.tolist()): row for row, tokens in enumerate(facts.tokens)}
    wrong = torch.zeros(facts_model.LONGEST_CITY + 1, facts.vocabulary)

    def model(tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) == 8 // ranks
        known = [rows.get(tuple(each.tolist()), 1) for each in tokens]
        right = torch.stack([wrong if row % 3 == 0 else answers[row] for row in known])
        return torch.nn.functional.pad(right, (0, 0, facts_model.CODE_LENGTH, 0))

    counts = [facts_model.right_answers(model, facts, 8, rank, ranks) for rank in range(ranks)]
    assert sum(counts) == 30


def test_batches_are_a_function_of_seed_and_step():
    facts = facts_model.Facts.encode(facts_model.Facts.available()[:20])
    batches = facts.batches(seed=3, size=8)
    for step in range(7):
        tokens, targets = next(batches)
        again, targets_again = next(facts.batches(seed=3, size=8, skip=step))
        assert torch.equal(tokens, again) and torch.equal(targets, targets_again)
