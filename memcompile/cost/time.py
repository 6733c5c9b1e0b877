"""Seconds of a step: bytes over rates, one part after the other; overlap is not modelled."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from memcompile.cost.job import Job
from memcompile.cost.memory import BACKWARD, gather_bytes, search_bytes, update_bytes
from memcompile.cost.wire import MEMORY, REPLICAS, Collective, layer_collectives, step_collectives
from memcompile.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Nodes of GPUs. Rates are bytes a second of one GPU in one direction, latencies seconds a collective.

    Defaults are peaks of data sheets: NVIDIA's H100 SXM (80 GB; 3.35 TB/s; NVLink 900 GB/s, both directions together),
    and one 400 Gb/s adapter a GPU, as in DGX H100. Latencies are typical of NCCL, rounded. A GPU reads whole
    pairs of 32-byte sectors. None of it was measured here: give measured rates where you have them.

    Raises:
        OptionError: a number that is not positive (latencies and model_memory may be 0), or a model that fills the GPU.
    """

    gpus_per_node: int = 8
    gpu_memory: float = 80 * 2**30
    model_memory: float = 20 * 2**30  # of the rest of the model: 1.3 billion parameters at 16 bytes
    nvlink: float = 450e9
    network: float = 50e9
    hbm: float = 3.35e12
    nvlink_latency: float = 10e-6
    network_latency: float = 25e-6
    granule: int = 64  # bytes

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            zero_too = field.name in ("model_memory", "nvlink_latency", "network_latency")
            if not (math.isfinite(value) and (value > 0 or (zero_too and value == 0))):
                raise OptionError(f"{field.name} must be {'0 or more' if zero_too else 'positive'}, got {value:g}")
        if self.free_memory <= 0:
            used, all_of_it = self.model_memory / 2**30, self.gpu_memory / 2**30
            raise OptionError(f"model_memory must be below gpu_memory, got {used:g} of {all_of_it:g} GiB")

    @property
    def free_memory(self) -> float:
        """Bytes of a GPU that the table may take."""
        return self.gpu_memory - self.model_memory


@dataclass(frozen=True)
class Exchange(Collective):
    """A collective on the rank for which it takes longest; `count` of them in a step take so many seconds together."""

    count: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """What the rank gets in all of them."""
        return self.count * self.received_bytes


@dataclass(frozen=True)
class Times:
    """Seconds of a step, of all layers."""

    layers_wire: float  # collectives of the layers
    step_wire: float  # collectives of the gradient
    search: float  # scores and selection; its matrix products are compute, and not counted
    gather: float  # rows read, and those of the gradient written
    update: float  # the optimizer, and the sum over replicas

    @property
    def total(self) -> float:
        """All of it, nothing overlapped."""
        return sum(vars(self).values())


def wire_seconds(collective: Collective, ranks: int, in_node: int, hardware: Hardware) -> float:
    """Time of a collective over `ranks` ranks, `in_node` of which share each node.

    Of the bytes that a rank receives, those from other nodes come over the network. In an all-to-all they are the
    rank's own. Otherwise all ranks of a node want the same bytes (or their sum leaves it): these cross the network once
    a node, through the adapters of all its ranks, and then NVLink, as in NCCL's rings.
    """
    if ranks == 1:
        return 0.0
    shared = 1 if collective.operation == "all_to_all" else in_node
    network = collective.received_bytes * (ranks - in_node) / (ranks - 1) / shared
    nvlink = collective.received_bytes - network
    latency = hardware.network_latency if ranks > in_node else hardware.nvlink_latency
    return nvlink / hardware.nvlink + network / hardware.network + latency


def exchanges_of(job: Job, hardware: Hardware, ranks: int) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The collectives of all layers, and those once a step, with groups of `ranks` of consecutive ranks."""
    replicas = job.gpus // ranks
    layouts = {  # how many ranks take part, and how many of them share a node: replicas of a rank are `ranks` apart
        MEMORY: (ranks, min(ranks, hardware.gpus_per_node)),
        REPLICAS: (replicas, min(replicas, max(1, hardware.gpus_per_node // ranks))),
    }

    def exchanges(of_rank: Callable[[Job, int, int], tuple[Collective, ...]], count: int) -> tuple[Exchange, ...]:
        # A collective ends when its last rank does, which is the one that holds the most or the least.
        pairs = zip(of_rank(job, ranks, 0), of_rank(job, ranks, ranks - 1), strict=True)
        slowest = [max(pair, key=lambda collective: collective.received_bytes) for pair in pairs]
        return tuple(
            Exchange(**vars(c), count=count, seconds=count * wire_seconds(c, *layouts[c.over], hardware))
            for c in slowest
        )

    return exchanges(layer_collectives, job.layers), exchanges(step_collectives, 1)


def times_of(job: Job, hardware: Hardware, ranks: int) -> Times:
    """The times of a step with groups of `ranks`."""
    layers, step = exchanges_of(job, hardware, ranks)
    gather = gather_bytes(job, ranks, hardware.granule) * (1 + BACKWARD)
    return Times(
        layers_wire=sum((e.seconds for e in layers), 0.0),
        step_wire=sum((e.seconds for e in step), 0.0),
        search=job.layers * search_bytes(job) / hardware.hbm,
        gather=job.layers * gather / hardware.hbm,
        update=update_bytes(job, ranks, hardware.granule) / hardware.hbm,
    )
