"""README and docs/: links resolve, the README stays short, every option is documented, and the quick start runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import memcompile
from tests.models import tiny_gpt
from tests.planned import batch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = {"README.md": 160, "CONTRIBUTING.md": 120}  # at most


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file or heading is not there."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = []
    for link in links:
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One Heading\n[1](#one-heading) [2](#other) [3](missing.md) [4](page.md#no) [5](https://a.b/c)\n")
    assert broken_links(page) == ["#other", "missing.md", "page.md#no"]


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("name", LINES)
def test_pages_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LINES[name]


def test_every_option_is_in_a_table_of_the_options():
    rows = "\n".join(re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE))
    for field in dataclasses.fields(memcompile.MemoryConfig):
        assert f"`{field.name}`" in rows, f"docs/options.md has no line for {field.name}"


def test_the_quick_start_runs(tmp_path, monkeypatch, lowered):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().partition("## Quick start")[2].partition("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    trained = {"build_model": tiny_gpt, "batches": [batch(seed) for seed in range(3)]}
    exec(first, trained)
    loaded = {"build_model": tiny_gpt, "torch": torch, "memcompile": memcompile}
    exec(second, loaded)

    assert lowered, "the model was compiled"
    expected, actual = trained["model"].state_dict(), loaded["model"].state_dict()
    assert expected.keys() == actual.keys()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    states = trained["optimizer"].state_dict()["state"], loaded["optimizer"].state_dict()["state"]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
