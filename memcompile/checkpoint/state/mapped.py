"""Values that lie in a file are not loaded: a checkpoint that has other ones is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from memcompile.checkpoint.formats.reading import Part
from memcompile.checkpoint.state.model_state import mapped_in
from memcompile.common.progress import Progress
from memcompile.errors import PlanError
from memcompile.runtime.storage.safetensors_format import bytes_of
from memcompile.runtime.storage.values_file import read_header


def check_mapped(
    root: nn.Module,
    saved: Mapping[str, TensorStorageMetadata],
    read: Callable[[str, Part], None],
    source: object,
    bar: Progress,
) -> None:
    """Compares what was saved of values that lie in a file, in its dtype, with the checksum of the file.

    Args:
        read: reads a part of a saved tensor, by its name.

    Raises:
        PlanError: they differ.
    """
    for name, values in mapped_in(root).items():
        if name not in saved:
            continue
        header, digest = read_header(values.path), hashlib.sha256()
        bar.start("comparing", header.entry.nbytes)
        for first, end in header.chunks():
            rows = torch.empty(end - first, header.shape[1], dtype=header.dtype, device="cpu")
            read(name, Part((first, 0), rows))
            digest.update(bytes_of(rows))
            bar.add(rows.nbytes)
        bar.close()
        if digest.hexdigest() != values.checksum:
            raise PlanError(
                f"{source} has other {name} than {values.path!r}, where the model's lie, and loading does not write "
                f"them: plan with values_storage='device', load, and store_values() anew"
            )
