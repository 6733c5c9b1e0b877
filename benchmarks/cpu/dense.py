"""What a memory layer stands in for: FFNs, and a mixture of experts with as many parameters as the table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu.setting import Contestant, Setting, Work, compiled, draw
from memcompile.lowering import inductor_patches
from memcompile.lowering.cpu.gemm import mkl_is_held_back


def gelu_ffn(setting: Setting) -> Contestant:
    width, hidden = setting.width, 4 * setting.width
    up, up_bias = draw(setting, hidden, width), draw(setting, hidden)
    down, down_bias = draw(setting, width, hidden), draw(setting, width)
    layer = compiled(lambda x: F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias))
    weights = 2 * width * hidden
    return Contestant("FFN, GELU 4d", layer, (up, up_bias, down, down_bias), Work(2 * weights, weights))


def swiglu_ffn(setting: Setting, our_gemms: bool = False) -> Contestant:
    """As in Llama: no biases, three matrices, a hidden size that makes it as large as the other."""
    width = setting.width
    hidden = -(-8 * width // (3 * 32)) * 32
    gate, up, down = draw(setting, hidden, width), draw(setting, hidden, width), draw(setting, width, hidden)
    layer = compiled(
        lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
        inductor_patches("benchmark") if our_gemms else None,
    )
    weights = 3 * width * hidden
    name = "SwiGLU, our GEMMs" if our_gemms else "FFN, SwiGLU 8/3 d"
    return Contestant(name, layer, (gate, up, down), Work(2 * weights, weights))


def ffn_contestants(setting: Setting) -> list[Contestant]:
    """On AMD, where memcompile takes its fp32 products from oneDNN, also an FFN that does: the same GEMMs for both."""
    found = [gelu_ffn(setting), swiglu_ffn(setting)]
    if mkl_is_held_back() and setting.dtype == torch.float32:
        found.append(swiglu_ffn(setting, our_gemms=True))
    return found


def mixture_contestants(setting: Setting, table: Tensor) -> list[Contestant]:
    """One top-1 mixture, or none where the table is smaller than an expert."""
    width, hidden = setting.width, 4 * setting.width
    num_experts = setting.num_slots * width // (2 * width * hidden)
    if num_experts == 0:
        return []
    experts = table[: num_experts * 2 * hidden].view(num_experts, 2, hidden, width)
    up, down = experts.unbind(1)  # [experts, hidden, width] each
    router: nn.Parameter = draw(setting, num_experts, width)

    def layer(x: Tensor) -> Tensor:
        weight, expert = F.linear(x, router).float().softmax(dim=-1).max(dim=-1)  # [tokens]
        order = expert.argsort()
        parts = x[order].split(expert.bincount(minlength=num_experts).tolist())
        y = torch.cat([F.gelu(part @ up[e].T) @ down[e] for e, part in enumerate(parts) if len(part)])
        return y[order.argsort()] * weight.to(x.dtype).unsqueeze(-1)

    flops = 2 * num_experts * width + 4 * width * hidden
    work = Work(flops, num_experts * width, 1, 2 * hidden * width, num_experts)
    return [Contestant("MoE", layer, (router,), work, setting.n_keys)]
