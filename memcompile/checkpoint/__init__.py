"""Checkpoints of trainings with a memory, on `torch.distributed.checkpoint`: atomic, checked, resharded when loaded.

memcompile.checkpoint.save("run", model, optimizer, step=100, extra=scheduler.state_dict())
step, extra, _ = memcompile.checkpoint.load("run", model, optimizer)
"""

from memcompile.checkpoint.asynchronous import SaveHandle, wait
from memcompile.checkpoint.formats.exporting import export_safetensors
from memcompile.checkpoint.formats.importing import import_safetensors
from memcompile.checkpoint.listing import config, steps
from memcompile.checkpoint.loading import Loaded, load
from memcompile.checkpoint.saving import save

__all__ = [
    "Loaded",
    "SaveHandle",
    "config",
    "export_safetensors",
    "import_safetensors",
    "load",
    "save",
    "steps",
    "wait",
]
