"""The FFNs that a memory layer stands in for, under Inductor."""

from typing import Any

import torch.nn.functional as F

from benchmarks.common.setting import Contestant, Setting, Work, compiled, draw

GELU, SWIGLU = "FFN, GELU 4d", "FFN, SwiGLU 8/3 d"


def gelu_ffn(setting: Setting) -> Contestant:
    width, hidden = setting.width, 4 * setting.width
    up, up_bias = draw(setting, hidden, width), draw(setting, hidden)
    down, down_bias = draw(setting, width, hidden), draw(setting, width)
    layer = compiled(lambda x: F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias))
    weights = 2 * width * hidden
    return Contestant(GELU, layer, (up, up_bias, down, down_bias), Work(2 * weights, weights))


def swiglu_ffn(
    setting: Setting, multiple_of: int, name: str = SWIGLU, options: dict[str, Any] | None = None
) -> Contestant:
    """As in Llama: no biases, three matrices, a hidden size that makes it as large as the other."""
    width = setting.width
    hidden = -(-8 * width // (3 * multiple_of)) * multiple_of
    gate, up, down = draw(setting, hidden, width), draw(setting, hidden, width), draw(setting, width, hidden)
    layer = compiled(lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), options)
    weights = 3 * width * hidden
    return Contestant(name, layer, (gate, up, down), Work(2 * weights, weights))
