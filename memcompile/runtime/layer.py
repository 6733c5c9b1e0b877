"""MemoryLayer: the parameters that one replaced FFN owns, and the call of the op with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.lowering import memory_lookup
from memcompile.runtime.checkpoint import encode_plan
from memcompile.runtime.pool import MemoryPool

_Optional = Tensor | None
LayerTensors = tuple[Tensor, Tensor, Tensor, Tensor, _Optional, _Optional, _Optional, _Optional, _Optional]


class MemoryLayer(nn.Module):
    """Product-key memory in the place of one FFN: ``x [..., width] -> [..., width]``.

    Query, half-keys, gate and output projection are its own; the values are the pool's.
    "Memory Layers at Scale" (arXiv 2412.09764), sections 2 and 3.

    Attributes:
        name: path of the module that owned the FFN.
        query_weight: [heads * key_dim, width], xavier uniform.
        query_bias: [heads * key_dim], zero.
        half_keys: [2, heads, n_keys, key_dim / 2], U(-key_dim**-1/2, key_dim**-1/2).
        gate_weight, gate_bias: [value_dim, width], N(0, width**-1/2), and [value_dim]; None without a gate.
        out_weight, out_bias: [width, value_dim], N(0, width**-1/2), and [width]; None in a plain Memory with
            value_dim == width.
        temperature: [heads], 10; None without qk-norm.
    """

    def __init__(self, pool: MemoryPool, name: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        config = pool.config
        assert config.key_dim is not None and config.n_keys is not None and config.value_dim is not None
        self.name = name
        self.width, self.heads, self.top_k = width, config.heads, config.top_k
        self.pool: MemoryPool
        object.__setattr__(self, "pool", pool)  # not a submodule: the values belong to the root

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        query_dim, value_dim = config.heads * config.key_dim, config.value_dim
        projects = config.gate or value_dim != width
        self.query_weight = parameter(query_dim, width)
        self.query_bias = parameter(query_dim)
        self.half_keys = parameter(2, config.heads, config.n_keys, config.key_dim // 2)
        self.gate_weight = parameter(value_dim, width) if config.gate else None
        self.gate_bias = parameter(value_dim) if config.gate else None
        self.out_weight = parameter(width, value_dim) if projects else None
        self.out_bias = parameter(width) if projects else None
        self.temperature = parameter(config.heads) if config.qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the layer's own parameters anew; the pool's values stay."""
        nn.init.xavier_uniform_(self.query_weight)
        bound = (2 * self.half_keys.shape[-1]) ** -0.5
        nn.init.uniform_(self.half_keys, -bound, bound)
        for weight in (self.gate_weight, self.out_weight):
            if weight is not None:
                nn.init.normal_(weight, std=1 / math.sqrt(self.width))
        for bias in (self.query_bias, self.gate_bias, self.out_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.temperature is not None:
            nn.init.constant_(self.temperature, 10.0)  # as cosine attention starts (Swin v2)

    def tensors(self) -> LayerTensors:
        """What the op reads besides the tokens, in the order of its arguments."""
        return (
            self.query_weight,
            self.query_bias,
            self.half_keys,
            self.pool.values,
            self.gate_weight,
            self.gate_bias,
            self.out_weight,
            self.out_bias,
            self.temperature,
        )

    def forward(self, x: Tensor) -> Tensor:
        return memory_lookup(x, *self.tensors(), heads=self.heads, top_k=self.top_k)

    def get_extra_state(self) -> Tensor:
        return encode_plan(self.pool)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the plan was compared with this model's before anything was loaded."""

    def extra_repr(self) -> str:
        config: Any = self.pool.config
        return (
            f"width={self.width}, slots={config.n_keys**2}, heads={self.heads}, top_k={self.top_k}, "
            f"key_dim={config.key_dim}, value_dim={config.value_dim}, gate={config.gate}"
        )
