"""What PyTorch's caches of compiled code depend on, besides the graph: the sources of this package.

A graph names an operator and not what it computes, so a cache would return the code of another version. This tag serves
every backend, plain Inductor too; `graph_pass.py` adds the options to the key of ours.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from memcompile.version import __version__


@lru_cache
def source_digest() -> str:
    """SHA-256 of every source file of `memcompile.lowering`, by name and content."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


_planning = threading.local()  # `depth`: in how many contexts of `traced_to_plan` the thread is
_traced_alone = False  # an operator was compiled while no planned model had tagged the caches


def tag_caches() -> None:
    """Adds this package's sources to the tag that all of `torch.compile`'s caches key on, after the user's own."""
    given = torch.compiler.config.cache_key_tag
    if _tag() not in given:
        torch.compiler.config.cache_key_tag = f"{given} {_tag()}".strip()


def untag_caches() -> None:
    """Takes it out, unless graphs with operators were compiled that are no planned model's: they may be again."""
    if not _traced_alone:
        torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(_tag(), "").strip()


@contextlib.contextmanager
def traced_to_plan() -> Iterator[None]:
    """What this thread traces in here is looked at, and not compiled."""
    _planning.depth = getattr(_planning, "depth", 0) + 1
    try:
        yield
    finally:
        _planning.depth -= 1


def tag_traced() -> None:
    """Tags the caches when an operator of this package is traced: exported programs and rewritten graphs are compiled
    where no model is planned.
    """
    global _traced_alone
    if getattr(_planning, "depth", 0) == 0 and _tag() not in torch.compiler.config.cache_key_tag:
        _traced_alone = True
        tag_caches()


def _tag() -> str:
    return f"memcompile {__version__} {source_digest()}"
