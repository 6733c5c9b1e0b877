"""Checkpoints of trainings with a memory, on `torch.distributed.checkpoint`: atomic, checked, resharded when loaded.

memcompile.checkpoint.save("run", model, optimizer, step=100, extra=scheduler.state_dict())
step, extra, _ = memcompile.checkpoint.load("run", model, optimizer)
"""

from memcompile.checkpoint.formats.safetensors import export_safetensors, import_safetensors
from memcompile.checkpoint.loading import Loaded, config, load, steps
from memcompile.checkpoint.saving import SaveHandle, save, wait

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
