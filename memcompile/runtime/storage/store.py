"""store_values(): moves a table from memory into a file, when training is over."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

from torch import nn

from memcompile.common.sites import VALUES_NAME
from memcompile.config import LEARNING_DEFAULTS
from memcompile.errors import PlanError
from memcompile.runtime.adoption import leave_optimizers
from memcompile.runtime.interrupts import uninterrupted
from memcompile.runtime.pool import memory_of
from memcompile.runtime.storage.frozen_values import form_of, keep_in_place, open_values
from memcompile.runtime.storage.values_file import write
from memcompile.runtime.wrappers import is_sharded, unwrap

log = logging.getLogger(__name__)


def store_values(model: nn.Module, path: str | os.PathLike[str], *, progress: bool | None = None) -> None:
    """Writes the values of a planned model to a file, from which the model then reads them, as a model does that was
    planned with ``values_storage="mmap", values_path=path``. Their memory is free when no other object refers to it.
    They do not learn any more, and are removed from the optimizers.

    The file is written a chunk at a time, and appears when it is whole.

    Args:
        model: on any device; a compiled model compiles again. Under DDP give the module inside, on one rank.
        path: of a file in a directory that exists. A file that is there is replaced; models that read it keep the old
            rows.
        progress: whether a bar is shown; None shows one from a GiB on.

    Raises:
        PlanError: the model has no memory, is wrapped by DDP, sharded or on the meta device.
        OSError: the file cannot be written; the model stays as it is.
    """
    pool = memory_of(model)
    root, parallel = unwrap(model)
    if parallel:
        raise PlanError("store_values() takes the model inside DDP, whose reducer waits for the values' gradient")
    if is_sharded(root) or pool.values.is_meta:
        raise PlanError(
            f"{type(root).__name__} has not all of its values here: load the checkpoint of its training into "
            f"one process, unsharded, and store them there"
        )
    path = os.fspath(path)
    pool.table.flush()
    write(path, pool.values.detach(), progress, form_of(pool.config, pool.width))
    values = open_values(path)
    frozen: dict[str, Any] = {**LEARNING_DEFAULTS, "values_storage": "mmap", "values_path": path}
    with uninterrupted():
        pool.table.end()
        leave_optimizers(pool.values)
        pool.owner._parameters[VALUES_NAME] = values
        if not pool.config.frozen:
            keep_in_place(root)
        pool.config = pool.table.config = dataclasses.replace(pool.config, **frozen)
        pool.requested = dataclasses.replace(pool.requested, **frozen)
    log.info("values %s %s now lie in %s", list(values.shape), values.dtype, values.path)
