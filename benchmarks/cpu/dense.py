"""What a memory layer stands in for: FFNs, and a mixture of experts with as many parameters as the table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.dense import gelu_ffn, swiglu_ffn
from benchmarks.common.setting import Contestant, Setting, Work, draw
from memcompile.lowering import inductor_patches
from memcompile.lowering.inductor.gemm import mkl_is_held_back

OUR_GEMMS = "SwiGLU, our GEMMs"
HIDDEN_MULTIPLE = 32


def ffn_contestants(setting: Setting) -> list[Contestant]:
    """On AMD, where memcompile takes its fp32 products from oneDNN, also an FFN that does: the same GEMMs for both."""
    found = [gelu_ffn(setting), swiglu_ffn(setting, HIDDEN_MULTIPLE)]
    if mkl_is_held_back() and setting.dtype == torch.float32:
        found.append(swiglu_ffn(setting, HIDDEN_MULTIPLE, OUR_GEMMS, inductor_patches("benchmark")))
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
