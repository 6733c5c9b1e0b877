"""examples/facts.py: what it prints and writes, what it refuses, what ctrl-C leaves, and that its recall is exact."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("airportsdata")
pytest.importorskip("matplotlib")

import facts as example
import facts_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "facts.py"
TINY = "--facts 40 --width 16 --keys 8 --top-k 4 --heads 2 --threads 1".split()


def command(*arguments: object) -> dict:
    """The arguments of subprocess.run and Popen that start the example with these options."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return {
        "args": [sys.executable, str(SCRIPT), *map(str, arguments)],
        "env": environment,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def check_results(stdout: str, out: Path) -> dict:
    """Table, picture and figures are there and tell one story; returns the figures."""
    result = json.loads((out / "facts.json").read_text())
    assert (out / "facts.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "facts.png") in stdout
    assert str(out / "facts.json") in stdout
    for name, run in result["runs"].items():
        assert all(0 <= recall <= 1 for recall in run["recalls"])
        assert run["steps"] == sorted(set(run["steps"]))
        assert len(run["steps"]) == len(run["recalls"])
        row = re.search(rf"^{re.escape(name)} .*$", stdout, re.MULTILINE).group().split()
        assert row[1] == f"{run['parameters']:,}"
        assert row[2] == f"{run['flops_per_token']:,.0f}"
        assert row[3] == f"{run['recalls'][-1]:.1%}"
        assert row[4] == f"{max(run['recalls']):.1%}"
        assert row[5] == f"{run['steps'][-1]:,}"
    return result


@pytest.mark.parametrize("mode", [[], ["--no-compile"]], ids=["compiled", "eager"])
def test_all_runs_are_reported_at_no_more_flops(tmp_path, mode):
    done = subprocess.run(**command(*TINY, "--steps", 4, "--out", tmp_path / "results", *mode), check=False)
    assert done.returncode == 0, done.stderr
    result = check_results(done.stdout, tmp_path / "results")
    dense, pkm, memory = (result["runs"][name] for name in ("dense", "pkm", "memory+"))
    assert dense["steps"] == pkm["steps"] == memory["steps"] == [0, 1, 2, 3, 4]
    assert pkm["flops_per_token"] < memory["flops_per_token"] <= dense["flops_per_token"]
    assert len({run["parameters"] for run in result["runs"].values()}) == 3
    assert result["interrupted"] is False
    assert result["facts"] == 40
    assert "recall=" in done.stderr  # the progress bar


def test_interrupt_reports_what_was_reached(tmp_path):
    options = command(*TINY, "--no-compile", "--steps", 100_000, "--out", tmp_path)
    with subprocess.Popen(**options) as process:
        shown = ""
        while "recall=" not in shown and (character := process.stderr.read(1)):
            shown += character
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    result = check_results(stdout, tmp_path)
    assert result["interrupted"] is True
    assert list(result["runs"]) == ["dense"]
    assert result["recall_ratio"] is None


def test_a_wrong_option_is_named_and_nothing_runs(tmp_path):
    done = subprocess.run(**command("--steps", 0, "--out", tmp_path / "results"), check=False)
    assert done.returncode == 2
    assert "--steps" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("--facts", "--facts 1000000"),
        ("--keys", "--keys sixty"),
        ("--keys", "--keys 5000"),
        ("--seed", "--seed -1"),
        ("--width", "--width 30"),
        ("--memory-layers", "--memory-layers 3 --layers 2"),
        ("--top-k", "--top-k 9 --keys 8"),
        ("--lr", "--lr 0"),
        ("--lr", "--lr nan"),
        ("--out", f"--out {SCRIPT}"),
    ],
)
def test_wrong_options_are_named(capsys, name, options):
    with pytest.raises(SystemExit) as stopped:
        example.main(options.split())
    assert stopped.value.code == 2
    assert f"argument {name}:" in capsys.readouterr().err


def test_a_memory_that_costs_more_than_dense_is_refused(capsys, tmp_path):
    assert example.main([*TINY, "--keys", "256", "--no-compile", "--out", str(tmp_path)]) == 2
    assert "lower --keys" in capsys.readouterr().err


def test_facts_are_real_and_their_keys_unique():
    facts = dict(facts_model.Facts.available())
    assert len(facts) == len(facts_model.Facts.available()) > 5000
    assert facts["JFK"] == "New York"
    assert all(len(code) == facts_model.CODE_LENGTH for code in facts)


def test_an_epoch_holds_each_fact_once():
    facts = facts_model.Facts.encode(facts_model.Facts.available()[: 2 * facts_model.BATCH])
    batches = facts.batches(seed=1)
    seen = torch.cat([next(batches)[0] for _ in range(2)])
    assert torch.equal(seen.unique(dim=0), facts.tokens.unique(dim=0))
    for (tokens, targets), (again, targets_again), _ in zip(facts.batches(3), facts.batches(3), range(5), strict=False):
        assert torch.equal(tokens, again)
        assert torch.equal(targets, targets_again)


def test_recall_is_that_of_greedy_decoding():
    """Trains until some facts are known and some are not, then writes each city character by character."""
    chosen = facts_model.Facts.available()[:60]
    facts = facts_model.Facts.encode(chosen)
    torch.manual_seed(0)
    model = facts_model.Transformer(facts.vocabulary, width=16, layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recall = 0.0
    for _ in range(500):
        if (recall := facts_model.exact_recall(model, facts)) > 0.3:
            break
        logits = facts_model.answer_logits(model, facts.tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), facts.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.3 < recall < 1

    written = facts.tokens.clone()
    written[:, facts_model.CODE_LENGTH + 1 :] = facts_model.PADDING
    answers = torch.empty_like(facts.targets)
    for position in range(facts_model.LONGEST_CITY + 1):
        with torch.no_grad():
            answers[:, position] = model(written)[:, facts_model.CODE_LENGTH + position].argmax(-1)
        if position < facts_model.LONGEST_CITY:
            written[:, facts_model.CODE_LENGTH + 1 + position] = answers[:, position]
    learnt = facts.targets >= 0
    right = ((answers == facts.targets) | ~learnt).all(-1)
    assert recall == pytest.approx(right.float().mean().item())
