"""This device's limits, measured in the same run as the layers."""

import statistics
from dataclasses import dataclass

import torch

from benchmarks.gpu.device import Device

REPETITIONS = 21


@dataclass(frozen=True)
class Limits:
    copy_gb_s: float  # bytes read and written by a large copy on the device, 10**9 a second
    gemm_tflop_s: float  # of a large square product in the dtype of the layers


def measure_limits(device: Device, copy_bytes: int, gemm_size: int, dtype: torch.dtype) -> Limits:
    """In turns, so that the clocks are those of a device at work."""
    copy_bytes = min(copy_bytes, device.free_bytes() // 4)
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device.torch_device).random_()
    target = torch.empty_like(source)
    left, right = (torch.randn(gemm_size, gemm_size, device=device.torch_device).to(dtype) for _ in range(2))
    copies, products = [], []
    for _ in range(REPETITIONS):
        copies.append(device.seconds(lambda: target.copy_(source)))
        products.append(device.seconds(lambda: left @ right))
    warm = slice(REPETITIONS // 4, None)
    copy, product = statistics.median(copies[warm]), statistics.median(products[warm])
    return Limits(2 * copy_bytes / copy / 1e9, 2 * gemm_size**3 / product / 1e12)
