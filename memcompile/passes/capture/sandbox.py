"""What surrounds a forward that is only for memcompile: the model is as it was afterwards, the graph shows all of what
ran, and other threads see nothing of it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from memcompile.passes._torch import FakeTensorMode, get_proxy_mode
from memcompile.passes.capture.state import HOOKS, State
from memcompile.passes.capture.survivors import NumberedMode, Survivors

_one_at_a_time = threading.RLock()  # two would put back what the other has changed
_NOISY = ("torch._subclasses", "torch.fx.experimental")  # they report each failed guess as an error of the user's


@contextlib.contextmanager
def sandbox() -> Iterator[Survivors]:
    """Surrounds several forwards, and gives what finds the fake tensors that they leave."""
    thread = threading.get_ident()

    def mute(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.CRITICAL

    with _one_at_a_time:
        loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(_NOISY)]
        for logger in loggers:
            logger.addFilter(mute)
        try:
            yield Survivors()
        finally:
            for logger in loggers:
                logger.removeFilter(mute)


@contextlib.contextmanager
def restored_afterwards(module: nn.Module, computes: bool) -> Iterator[FakeTensorMode | State]:
    """Gives the mode to run one forward in. It undoes what the forward does: caches that it fills, counts, buffers that
    it makes, random state, and the fake parameters that `functional_call` leaves in a module with two paths.

    Hooks do not run: they are the user's own code with effects of its own, and it expects no fake tensors. Nor do those
    of accelerate, which take the place of a forward and fetch offloaded weights. The hooks by which a Hugging Face
    model collects its own hidden states do, because its forward reads what they collect.
    """
    with _one_at_a_time:
        state = State(module, computes)
        for inner in module.modules():
            inner.__dict__.update({hooks: _of_the_model(inner.__dict__[hooks]) for hooks in HOOKS})
            if "_hf_hook" in inner.__dict__ and "_old_forward" in inner.__dict__:
                inner.__dict__["forward"] = inner.__dict__["_old_forward"]
        mode = state if computes else NumberedMode(state.save)
        # It is of all threads: none is compiled meanwhile, where any is.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        try:
            with torch.enable_grad(), eager, _DataTraced(), _functions_marked():
                yield mode
        finally:
            if isinstance(mode, NumberedMode):
                mode.save = _nothing  # its tensors live as long as the graph does, and the state need not
            state.restore()


def _nothing(*_: Any) -> None:
    """Nothing is kept of what an operator overwrites."""


def _of_the_model(hooks: Any) -> Any:
    modules = {key: getattr(hook, "__module__", None) or "" for key, hook in hooks.items()}
    return type(hooks)((key, hook) for key, hook in hooks.items() if modules[key].startswith("transformers."))


class _DataTraced(TorchFunctionMode):
    """Makes ``x.data`` mean ``x.detach()``: tracing does not see what is written to a true ``x.data``."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return args[0].detach() if func == _READ_DATA else func(*args, **(kwargs or {}))


_READ_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]

AUTOGRAD_FUNCTION = "autograd_function"  # in a node's meta: the class whose forward ran it


def _functions_marked() -> contextlib.AbstractContextManager[Any]:
    """Marks the nodes that run inside an `autograd.Function`: its backward is its own, whatever the graph shows.
    Reentrant activation checkpointing is one too, but differentiates what it ran. In other threads no graph is traced.
    """
    apply = torch.autograd.Function.__dict__["apply"]  # a classmethod, written in C from torch 2.15 on

    def marking(cls: type, *args: Any, **kwargs: Any) -> Any:
        mode = get_proxy_mode()
        if mode is None or cls is CheckpointFunction:
            return apply.__get__(None, cls)(*args, **kwargs)
        before = next(iter(reversed(mode.tracer.graph.nodes)))
        result = apply.__get__(None, cls)(*args, **kwargs)
        node = before.next
        while node.op != "root":
            node.meta[AUTOGRAD_FUNCTION] = cls.__name__
            node = node.next
        return result

    return mock.patch.object(torch.autograd.Function, "apply", classmethod(marking))
