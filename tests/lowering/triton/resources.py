"""What the GPU's kernels take of each GPU: writes docs/kernels.md.

    python -m tests.lowering.triton.resources

Compiles the whole catalogue for each target, without a GPU: some minutes on one core.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from tests.lowering.triton.catalogue import Instance, instances
from tests.lowering.triton.offline import TARGETS, Resources

PAGE = Path(__file__).parents[3] / "docs" / "kernels.md"

_HEAD = """# What the GPU's kernels take

`python -m tests.lowering.triton.resources` writes this page: each Triton kernel in each configuration that
`memcompile/lowering/triton/configs.py` picks, compiled for four GPUs without one, by torch {torch} and triton {triton}.

A cell is registers a thread (on gfx942 vector registers a lane) and bytes of shared memory a block. {spills}
`tests/lowering/triton/test_kernels.py` holds the kernels to these numbers. Integers of 1 are constants to Triton, and
multiples of 16 are known to be such, so a kernel is compiled more than once; sizes that make no difference share a row.
Names in capitals are the kernel's constants.
"""
_NO_SPILLS = "None spills."
_SPILLS = "Spills are bytes a thread that did not fit in registers."


def cell(resources: Resources) -> str:
    """Of the table: registers, shared memory, and spills where there are any."""
    spills = f", **spills {resources.spills}**" if resources.spills else ""
    return f"{resources.registers}, {resources.shared:,}{spills}"


def page(found: Mapping[Instance, Mapping[str, Resources]]) -> str:
    """The page, of what each instance takes of each target."""
    spills = any(taken.spills for row in found.values() for taken in row.values())
    lines = [_HEAD.format(torch=torch.__version__, triton=triton.__version__, spills=_SPILLS if spills else _NO_SPILLS)]
    for kernel, group in itertools.groupby(found, key=lambda instance: instance.kernel):
        lines += [f"## {kernel}", "", f"| sizes | configuration | {' | '.join(TARGETS)} |"]
        lines.append(f"| --- | --- |{' ---: |' * len(TARGETS)}")
        for instance in group:
            cells = " | ".join(cell(found[instance][target]) for target in TARGETS)
            lines.append(f"| {instance.sizes} | {instance.configuration} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def read_page() -> tuple[str, dict[str, dict[str, str]]]:
    """Of the page as it lies there: the version of Triton, and by instance and target its cells."""
    text = PAGE.read_text()
    version = re.search(r"triton (\S+)\.\n", text)
    assert version is not None
    rows: dict[str, dict[str, str]] = {}
    kernel = ""
    for line in text.splitlines():
        if line.startswith("## "):
            kernel = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith(("| sizes", "| ---")):
            sizes, _, *cells = line.strip("| ").split(" | ")
            rows[f"{kernel} {sizes}"] = dict(zip(TARGETS, cells, strict=True))
    return version.group(1), rows


def main() -> None:
    found: dict[Instance, dict[str, Resources]] = {instance: {} for instance in instances()}
    every = list(itertools.product(found, TARGETS))
    for instance, target in tqdm(every, unit="kernel"):
        found[instance][target] = instance.compile(target).resources
    PAGE.write_text(page(found))
    spilt = sum(taken.spills > 0 for row in found.values() for taken in row.values())
    print(f"{PAGE}: {len(every)} kernels, {spilt} of them spill")


if __name__ == "__main__":
    main()
