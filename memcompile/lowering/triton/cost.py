"""What a search costs in its two forms, and which is the cheaper on a GPU.

Stored: one batched GEMM writes all scores, `select_stored` reads them. Computed: `select_computed` multiplies them on
the way, in each of its two passes, and keeps none. The first multiplies once, at the GEMM library's rate; the second
moves 8 bytes a score less, which pays where half-keys are short, and takes no memory that grows with tokens times keys.
Bytes and FLOPs are counted; the rates are the device's own, as it reports them.
"""

import functools
from dataclasses import dataclass, replace

import torch

from memcompile.lowering._torch import size_hint
from memcompile.lowering.triton.configs import computed_config

_PASSES = 2
_FP32 = 4


@dataclass(frozen=True)
class Search:
    """A search: `tokens` x `heads` queries of two halves of half_dim elements of itemsize bytes, n_keys half-keys."""

    tokens: int  # or SymInt
    heads: int
    n_keys: int
    half_dim: int
    itemsize: int

    @property
    def scores(self) -> int:
        return 2 * self.tokens * self.heads * self.n_keys

    @property
    def stored_bytes(self) -> int:
        return _FP32 * self.scores

    @property
    def gemm_flops(self) -> int:
        return 2 * self.scores * self.half_dim

    @property
    def key_bytes(self) -> int:
        return 2 * self.heads * self.n_keys * self.half_dim * self.itemsize

    @property
    def operand_bytes(self) -> int:
        return self.key_bytes + 2 * self.heads * self.tokens * self.half_dim * self.itemsize


@dataclass(frozen=True)
class Device:
    """A GPU: bytes/s of its memory, bytes of its L2, operations/s of all lanes, and FLOP/s of matrix products: of half
    dtypes with fp32 results by the GEMM library, the same by `tl.dot`, and of fp32.
    """

    bandwidth: float
    library_flops: float
    half_flops: float
    fp32_flops: float
    operations: float
    multiprocessors: int
    cache: float


H200 = Device(4.3e12, 800e12, 800e12, 50e12, 28e12, 132, 50e6)
# Its library has no fp32 results of half dtypes: operands are widened.
MI300X = Device(4.0e12, 100e12, 600e12, 100e12, 40e12, 304, 256e6)

# Shares of a device's rates, and lane operations a score; set from instruction counts of the compiled kernels and from
# common experience with cuBLAS and tl.dot, not yet measured on a GPU.
_GEMM_SHARE, _DOT_SHARE = 0.8, 0.5
_CACHE_SPEED = 2.5  # bandwidth of the L2 over that of the memory
_OPERATIONS = 24.0
_LAUNCH = 3e-6  # seconds
MOST_STORED = 2**31  # bytes of scores: a batch whose scores are more keeps none of them, whatever it costs


def seconds_stored(search: Search, device: Device) -> float:
    """Estimated time of a search whose scores are stored."""
    flops = device.library_flops if search.itemsize < _FP32 else device.fp32_flops
    # Scores that fit half of the L2 are read from there.
    is_cached = search.stored_bytes < device.cache / 2
    moved = search.stored_bytes / (device.bandwidth * (_CACHE_SPEED if is_cached else 1))
    gemm = max(search.gemm_flops / (flops * _GEMM_SHARE), search.operand_bytes / device.bandwidth + moved)
    select = max(moved, search.scores * _OPERATIONS / device.operations)
    return gemm + select + 2 * _LAUNCH


def seconds_computed(search: Search, device: Device, rows: int) -> float:
    """Estimated time of a search that computes its scores, `rows` queries a program."""
    flops = device.half_flops if search.itemsize < _FP32 else device.fp32_flops
    blocks = -(-search.tokens // rows)
    busy = min(1.0, 2 * blocks * search.heads / device.multiprocessors)
    padding = blocks * rows / search.tokens  # a program multiplies and compares all of its rows
    keys = blocks * search.key_bytes  # each block of queries reads them all
    product = max(search.gemm_flops * padding / (flops * _DOT_SHARE), keys / (device.bandwidth * _CACHE_SPEED))
    compare = search.scores * _OPERATIONS * padding / device.operations
    return (_PASSES * product + compare) / busy + _LAUNCH


def stores_scores(search: Search, top_k: int, device: Device) -> bool:
    """Whether to store the scores: where they fit, and it is the cheaper form for the tokens that were traced. So too
    for a number of tokens of which nothing is known (a hint of 0).

    Of symbolic tokens whether they fit is a guard: more than do compile once more.
    """
    hint = size_hint(search.tokens)
    if hint == 0:
        return True
    if search.stored_bytes > MOST_STORED:
        return False
    traced = replace(search, tokens=hint)
    config = computed_config(top_k, traced.n_keys, traced.half_dim, hint, traced.itemsize)
    return bool(seconds_stored(traced, device) <= seconds_computed(traced, device, config["ROWS"]))


@functools.cache
def device_rates(device: torch.device) -> Device:
    """The rates of this GPU, from its clocks and widths; fixed ones where it does not tell them."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return H200
    if torch.version.hip is not None:
        return MI300X
    found = torch.cuda.get_device_properties(device)
    names = ("clock_rate", "memory_clock_rate", "memory_bus_width", "multi_processor_count", "L2_cache_size")
    clock, memory_clock, width, multiprocessors, cache = (float(getattr(found, name, 0)) for name in names)
    if min(clock, memory_clock, width, multiprocessors, cache) <= 0:
        return H200
    clocks = multiprocessors * clock * 1e3  # a second, of all multiprocessors
    lanes = clocks * (64 if (found.major, found.minor) == (8, 0) else 128)
    half_flops = clocks * {8: 2048, 9: 4096, 10: 8192}.get(found.major, 2048) * 0.8  # dense, half dtypes
    return Device(
        bandwidth=2 * memory_clock * 1e3 * width / 8 * 0.9,
        library_flops=half_flops,
        half_flops=half_flops,
        fp32_flops=2 * lanes * 0.8,
        operations=lanes,
        multiprocessors=int(multiprocessors),
        cache=cache,
    )
