"""The CPU's kernels: C++ in `src/`, built on the user's machine with the compiler that Inductor needs too."""

from memcompile.lowering.cpu.load import load
from memcompile.lowering.cpu.pages import advise_huge_pages

__all__ = ["advise_huge_pages", "load"]
