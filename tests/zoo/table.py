"""docs/models.md, the table of which models work: ``python -m tests.zoo.table`` writes it, tests hold it to what is
found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import memcompile
from memcompile.common.sites import FfnSite
from tests.zoo import MODELS, TRAPS
from tests.zoo.entry import Entry

COMMITTED = Path(__file__).parents[2] / "docs" / "models.md"

_INTRODUCTION = """# Which models work

`make docs` writes this page: what `memcompile.find_ffns` finds in the project's zoo (`tests/zoo`), tiny models with
random weights. In every model of the first table the memory replaces each FFN that was found, and all of this works in
train and eval mode: eager, captured by Dynamo, with gradient checkpointing. It can also be added to each FFN
(`placement="add"`), except where the remark says otherwise. `tests/zoo/test_families.py` checks that.

A pattern is that of the first FFN. A star marks models that need `example_inputs`: some of their FFNs do not run on
guessed inputs.
"""
_TRAPS = """
## What is left alone

Each trap looks like an FFN in some way. What is refused stands in `memcompile.explain(model)` with the sentence given
here; what has no sentence does not match the pattern of an FFN at all. "found beside it" counts the true FFNs of the
same model.
"""
_MODELS_HEADER = ("model", "family", "FFNs", "pattern", "remark", "left alone, and why")
_TRAPS_HEADER = ("trap", "found beside it", "why it is left alone")


def accepted(sites: Iterable[FfnSite]) -> set[str]:
    """The down-projections of the blocks that can be replaced."""
    return {site.down for site in sites if site.refusal is None}


def refusals(sites: Iterable[FfnSite]) -> list[str]:
    """The sentences that refuse the others, each once."""
    return list(dict.fromkeys(site.refusal for site in sites if site.refusal is not None))


def row(entry: Entry, sites: Sequence[FfnSite]) -> str:
    """The line of one model or trap."""
    found = [site for site in sites if site.refusal is None]
    why = "; ".join(refusals(sites))
    if entry.family == "trap":
        return _line(entry.name, str(len(found)), why)
    pattern = f"`{_in_short(found[0].pattern)}`" if found else ""
    star = "" if entry.guessed else "*"
    return _line(entry.name + star, entry.family, str(len(found)), pattern, entry.note, why)


def document(rows: Mapping[str, str]) -> str:
    """The page, given each entry's line."""
    models = [_line(*_MODELS_HEADER), _line(*("---" for _ in _MODELS_HEADER)), *(rows[entry.name] for entry in MODELS)]
    traps = [_line(*_TRAPS_HEADER), _line(*("---" for _ in _TRAPS_HEADER)), *(rows[entry.name] for entry in TRAPS)]
    return "\n".join([_INTRODUCTION, *models, _TRAPS, *traps, ""])


def committed_rows() -> dict[str, str]:
    """The lines of the page as it is in the repository, by entry."""
    lines = [line for line in COMMITTED.read_text().splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| ").removesuffix("*"): line for line in lines}


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _in_short(pattern: str, longest: int = 8) -> str:
    operators = pattern.split(" > ")
    return pattern if len(operators) <= longest else " > ".join([*operators[: longest - 2], "...", operators[-1]])


def _generated(entry: Entry) -> str:
    model, inputs = entry.new()
    return row(entry, memcompile.find_ffns(model, inputs))


if __name__ == "__main__":
    COMMITTED.write_text(document({entry.name: _generated(entry) for entry in [*MODELS, *TRAPS]}))
