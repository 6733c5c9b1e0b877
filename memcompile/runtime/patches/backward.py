"""`torch.autograd._engine_run_backward`: the error of a backward names the collective of a sharded table that failed.

No public way: hooks of autograd see tensors and not errors.
Until: process groups name the operation that timed out on every backend.
The same: a backward that raises nothing, and every other error.
"""

from collections.abc import Callable
from typing import Any

from memcompile.common.patch import Patch, Replaced
from memcompile.runtime._torch import autograd
from memcompile.runtime.distributed.collective_errors import named_collectives


def _named(run_backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with named_collectives("backward"):
        return run_backward(*args, **kwargs)


PATCH = Patch(Replaced(autograd, "_engine_run_backward", _named))
