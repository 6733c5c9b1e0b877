"""The table says what the candidates are; JSON says the same and survives a round trip."""

import json
import re

import pytest

from memcompile.cost.groups import best, candidates, remedies
from memcompile.cost.job import Job
from memcompile.cost.report import as_json, assumptions, misfit, table
from memcompile.cost.time import Hardware

HARDWARE = Hardware()
LARGE = Job(slots=2**26, value_dim=2048, gpus=256)
TOO_LARGE = Job(slots=2**26, value_dim=2048, gpus=8)


def rows_of(text):
    """Mark, ranks and the numbers of each candidate's line."""
    found = {}
    for line in text.splitlines():
        if re.match(r"[ *!] +[\d,]+ +[\d,]+ \|", line):
            numbers = [float(n.replace(",", "")) for n in re.findall(r"[\d.,]+", line)]
            found[int(numbers[0])] = (line[0], numbers)
    return found


def test_the_table_has_a_line_for_each_candidate():
    found = candidates(LARGE, HARDWARE)
    rows = rows_of(table(LARGE, HARDWARE, found))
    assert list(rows) == [c.ranks for c in found]
    for candidate, (mark, numbers) in zip(found, rows.values(), strict=True):
        assert mark == ("*" if candidate is best(found) else " " if candidate.fits else "!")
        assert numbers[1] == candidate.replicas
        assert numbers[6] == pytest.approx(candidate.memory.total / 2**30, rel=5e-4, abs=0.06)
        assert sum(numbers[2:6]) == pytest.approx(numbers[6], rel=1e-3, abs=0.3)
        assert numbers[-1] == pytest.approx(candidate.times.total * 1e3, rel=5e-4, abs=0.06)
        assert sum(numbers[9:-1]) == pytest.approx(numbers[-1], rel=1e-3, abs=0.3)
        received = sum(e.total_bytes for e in candidate.layer_exchanges)
        assert numbers[7] == pytest.approx(received / 2**20, abs=0.6)


def test_the_table_is_aligned():
    lines = table(LARGE, HARDWARE, candidates(LARGE, HARDWARE)).splitlines()
    header = next(i for i, line in enumerate(lines) if line.lstrip().startswith("ranks"))
    body = lines[header + 2 : header + 2 + len(candidates(LARGE, HARDWARE))]
    assert {len(line) for line in (lines[header], lines[header + 1], *body)} == {len(lines[header])}
    bars = [i for i, letter in enumerate(lines[header]) if letter == "|"]
    assert all(line[i] == "|" for line in body for i in bars)
    assert all(len(line) <= 120 for line in lines)


def test_the_table_says_what_was_assumed_and_what_else_there_is():
    text = " ".join(table(LARGE, HARDWARE, candidates(LARGE, HARDWARE)).split())
    for sentence in assumptions(LARGE, HARDWARE):
        assert sentence in text
    assert "with --values-grad dense the best were groups of 128" in text and "nothing overlaps" in text
    assert "all_gather" in text and "reduce_scatter" in text


def test_one_gpu_sends_nothing():
    job = Job(slots=2**16, value_dim=64, gpus=1)
    text = table(job, HARDWARE, candidates(job, HARDWARE))
    assert "nothing is sent" in text and "best: 1 group(s) of 1 rank(s)" in text


def test_what_does_not_fit_says_so_and_what_helps():
    found = candidates(TOO_LARGE, HARDWARE)
    said = misfit(TOO_LARGE, HARDWARE, found)
    assert "groups of 8 take the least, 170.6 GiB a rank, and 60.0 of 80.0 GiB are free" in said
    assert all(word in said for word in remedies(TOO_LARGE, HARDWARE))
    text = table(TOO_LARGE, HARDWARE, found)
    assert said in text and "! does not fit" in text and "best:" not in text
    assert {mark for mark, _ in rows_of(text).values()} == {"!"}


def test_nothing_helps():
    full = Hardware(gpu_memory=2**20, model_memory=2**20 - 1)
    assert misfit(LARGE, full, candidates(LARGE, full)).endswith("No option makes it fit.")


@pytest.mark.parametrize("job", [LARGE, TOO_LARGE], ids=["fits", "too large"])
def test_json_survives_a_round_trip(job):
    found = candidates(job, HARDWARE)
    content = as_json(job, HARDWARE, found)
    read = json.loads(json.dumps(content))
    assert read == content
    assert Job(**read["job"]) == job and Hardware(**read["hardware"]) == HARDWARE
    chosen = best(found)
    assert read["best"] == (chosen.ranks if chosen else None)
    assert bool(read["remedies"]) == (chosen is None)
    for candidate, line in zip(found, read["candidates"], strict=True):
        assert line["ranks"] * line["replicas"] == job.gpus and line["fits"] == candidate.fits
        memory, seconds = line["memory"], line["seconds"]
        assert memory.pop("total") == sum(memory.values()) == candidate.memory.total
        assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
        wire = sum(e["seconds"] for e in line["exchanges"])
        assert wire == pytest.approx(seconds["layers_wire"] + seconds["step_wire"])
        assert all(e["total_bytes"] == e["count"] * e["received_bytes"] for e in line["exchanges"])


def test_rows_say_how_skewed_they_are():
    job = Job(slots=2**20, value_dim=64, gpus=8, by="rows", skew=23)
    assert "the busiest rank has 23 times the mean of the hits (--skew)" in assumptions(job, HARDWARE)
    assert not any("--skew" in line for line in assumptions(LARGE, HARDWARE))
