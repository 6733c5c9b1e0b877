"""DistributedDataParallel around a model that is planned afterwards: its reducer must learn the new parameters."""

from __future__ import annotations

import gc

from torch.nn.parallel import DistributedDataParallel


def rebuild(ddp: DistributedDataParallel) -> None:
    """Initialises the same DDP object anew, with the options it has; rank 0's memory is broadcast.

    The object stays the one that the user holds. The old reducer must be gone first: its hooks on the removed
    parameters would wait for gradients that never come.
    """
    module, training = ddp.module, ddp.training
    options = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "broadcast_buffers": ddp.broadcast_buffers,
        "process_group": ddp.process_group,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
    }
    del ddp.reducer
    del ddp.logger
    gc.collect()
    DistributedDataParallel.__init__(ddp, module, **options)
    ddp.training = training
