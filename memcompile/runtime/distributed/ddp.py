"""DistributedDataParallel around a model that is planned afterwards: its reducer must learn the new parameters."""

import gc

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memcompile.errors import PlanError

_OPTIONS = """device_ids output_device dim process_group find_unused_parameters gradient_as_bucket_view static_graph
skip_all_reduce_unused_params""".split()


def check_rebuildable(ddp: DistributedDataParallel, sharded: bool) -> None:
    """Raises PlanError for options that a DDP object cannot be initialised with a second time, or a memory that it
    cannot hold.
    """
    if sharded:
        raise PlanError(f"{type(ddp.module).__name__} is in DDP already: plan with memory_mesh= first, then wrap it")
    lost = [name for name in ("mixed_precision", "_delay_all_reduce_params") if getattr(ddp, name, None)]
    if lost:
        raise PlanError(
            f"this DDP was built with {' and '.join(name.strip('_') for name in lost)}, which cannot be carried over "
            f"to the memory's parameters: plan or compile the model first, then wrap it in DDP"
        )


def rebuild(ddp: DistributedDataParallel) -> None:
    """Initialises the same DDP object anew, with the options it has; rank 0's memory is broadcast.

    The object stays the one that the user holds. The old reducer must be gone first: its hooks on the removed
    parameters would wait for gradients that never come.
    """
    module, training, comm_hooks = ddp.module, ddp.training, ddp._comm_hooks
    module_hooks = {name: vars(ddp)[name] for name in vars(nn.Module()) if "hook" in name}
    options = {name: getattr(ddp, name) for name in _OPTIONS}
    options["bucket_cap_mb"] = None if ddp.bucket_bytes_cap_default else ddp.bucket_bytes_cap / 2**20
    if not ddp.broadcast_buffers:  # naming the default would warn: the option is deprecated
        options["broadcast_buffers"] = False
    del ddp.reducer
    del ddp.logger
    gc.collect()
    DistributedDataParallel.__init__(ddp, module, **options)
    for name, hooks in module_hooks.items():
        if isinstance(hooks, dict):
            hooks.update(vars(ddp)[name])  # those of the replicas of a sparse gradient
        vars(ddp)[name] = hooks
    ddp.training = training
    for hook, state in comm_hooks:
        ddp.register_comm_hook(state, hook)
