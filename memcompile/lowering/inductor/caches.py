"""What PyTorch's caches of compiled code depend on, besides the graph: the sources of this package.

A graph names an operator and not what it computes, so a cache would return the code of another version. This tag serves
every backend, plain Inductor too; `inductor.py` adds the options to the key of ours.
"""

import hashlib
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
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def tag_caches() -> None:
    """Adds this package's sources to the tag that all of `torch.compile`'s caches key on, after the user's own."""
    own = f"memcompile {__version__} {source_digest()}"
    given = torch.compiler.config.cache_key_tag
    if own not in given:
        torch.compiler.config.cache_key_tag = f"{given} {own}".strip()
