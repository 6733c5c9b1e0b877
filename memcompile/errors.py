"""The errors that memcompile raises; each message names the module or option concerned and what to do about it."""


class MemcompileError(Exception):
    """Base class of every error raised by memcompile."""


class OptionError(MemcompileError, ValueError):
    """An option is unknown, or its type or value is wrong."""


class PlanError(MemcompileError, RuntimeError):
    """The model cannot be planned as asked: no FFN, too few of them, already planned, already sharded."""


class CollectiveError(MemcompileError, RuntimeError):
    """A collective of sharded values failed: another rank hangs or has died."""


class CaptureError(MemcompileError, RuntimeError):
    """A captured graph or a running model does not match its plan; it is never run as a dense model instead."""


class CheckpointError(MemcompileError, RuntimeError):
    """A checkpoint could not be written, is damaged, or is not of this model; raised on every rank."""
