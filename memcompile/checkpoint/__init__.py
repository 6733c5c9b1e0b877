"""Checkpoints of trainings with a memory, on `torch.distributed.checkpoint`: atomic, verified, resharded when loaded.

memcompile.checkpoint.save("run", model, optimizer, step=100, extra=scheduler.state_dict())
step, extra, _ = memcompile.checkpoint.load("run", model, optimizer)
"""

from memcompile.checkpoint.asynchronous import SaveHandle
from memcompile.checkpoint.loading import Loaded, config, load, steps
from memcompile.checkpoint.saving import save

__all__ = ["Loaded", "SaveHandle", "config", "load", "save", "steps"]
