"""What CONTRIBUTING promises of the package's shape, read from its sources: arrows between rooms, no circles, small
folders and files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memcompile"
CODE = {".py", ".cpp", ".h"}
MOST_LINES, MOST_FILES = 350, 12

# What each room may import. Modules beside the rooms are the front door, which may import all.
BASE = {"common", "config", "errors", "version"}
ROOMS = {
    "common": {"config", "errors", "version"},
    "lowering": BASE,
    "passes": {"lowering", *BASE},
    "runtime": {"lowering", *BASE},
    "checkpoint": {"runtime", *BASE},
    "slots": {"runtime", "lowering", *BASE},
    "cost": BASE,
    "config": BASE,
    "errors": set(),
    "version": set(),
}
# What a room does not know.
UNKNOWN = {
    "lowering": ("torch.optim", "transformers", "x_transformers"),
    "passes": ("torch.optim",),
    "runtime": ("torch.fx",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path, lazy: bool) -> Iterator[str]:
    """The modules and names that a file imports, but for type checkers; `lazy`: in functions too."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


def imported_modules(name: str, lazy: bool) -> set[str]:
    """The package's own modules that one imports by name."""
    found = set()
    for imported in imports(MODULES[name], lazy):
        own = imported if imported in MODULES else imported.rpartition(".")[0]  # a module, or a name in one
        if own in MODULES:
            found.add(own)
    return found


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, in order; empty where there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for following in sorted(graph[node]):
                if found := search(following, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in graph if (found := search(node, []))), [])


def test_no_circle_of_imports():
    graph = {name: imported_modules(name, lazy=False) for name in MODULES}
    assert not (circle := circle_in(graph)), " -> ".join(circle)


def test_circles_are_found():
    assert circle_in({"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room):
    """From each room to those that it may know, lazily too."""
    names = [name for name in MODULES if name.split(".")[1:2] == [room]]
    assert names
    allowed = ROOMS[room] | {room}
    wrong = {
        f"{name} -> {imported}"
        for name in names
        for imported in imported_modules(name, lazy=True)
        if (imported.split(".")[1:2] or ["the front door"])[0] not in allowed
    }
    assert not wrong


@pytest.mark.parametrize("room", UNKNOWN)
def test_what_a_room_does_not_know(room):
    wrong = {
        f"{name} -> {imported}"
        for name, path in MODULES.items()
        if name.split(".")[1:2] == [room]
        for imported in imports(path, lazy=True)
        for unknown in UNKNOWN[room]
        if f"{imported}.".startswith(f"{unknown}.")
    }
    assert not wrong


def test_folders_are_small():
    counts = {
        str(folder.relative_to(ROOT)): sum(file.suffix in CODE for file in folder.iterdir())
        for folder in (PACKAGE, *PACKAGE.rglob("*"))
        if folder.is_dir()
    }
    assert not {folder: count for folder, count in counts.items() if count > MOST_FILES}


def test_files_are_short():
    files = [file for top in ("memcompile", "benchmarks", "examples") for file in (ROOT / top).rglob("*")]
    lines = {str(file.relative_to(ROOT)): file.read_text().count("\n") for file in files if file.suffix in CODE}
    assert len(lines) > 200
    assert not {file: count for file, count in lines.items() if count > MOST_LINES}
