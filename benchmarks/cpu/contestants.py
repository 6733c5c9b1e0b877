"""Who takes part: memory layers, the FFNs that they replace, and a mixture of experts as large as the table."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu.libraries import library_contestants
from benchmarks.harness.layers import (
    OURS,
    Contestant,
    Setting,
    Work,
    bag,
    draw,
    gelu_ffn,
    memory_layers,
    naive,
    swiglu_ffn,
)
from benchmarks.harness.package import compile_options, mkl_is_held_back

OUR_GEMMS = "SwiGLU, our GEMMs"
EAGER, INDUCTOR, NAIVE = "eager", "Inductor", "Inductor, naive gather"
SAME = frozenset((OURS, EAGER, INDUCTOR, NAIVE))  # that compute the same
HIDDEN_MULTIPLE = 32
MOST_TOKENS = 512  # for those that take seconds for more


def contestants(settings: list[Setting], table: Tensor) -> list[list[Contestant]]:
    """For each setting, memory layers in the first rows of the table, and FFNs. The other peers are many and slow, and
    take part only where the memory is as large as the table.
    """
    ffns = ffn_contestants(settings[-1])
    found = []
    for setting in settings:
        values, largest = table[: setting.num_slots], setting == settings[-1]
        gathers = {INDUCTOR: bag} | ({NAIVE: naive} if largest else {})
        present = memory_layers(setting, values, {EAGER: bag}, gathers)
        if largest:
            present += library_contestants(setting, table) + mixture_contestants(setting, table)
        unlimited = (OURS, EAGER, INDUCTOR)
        present = [c if c.name in unlimited else dataclasses.replace(c, most_tokens=MOST_TOKENS) for c in present]
        found.append(present + ffns)
    return found


def ffn_contestants(setting: Setting) -> list[Contestant]:
    """On AMD, where memcompile takes its fp32 products from oneDNN, also an FFN that does: the same GEMMs for both."""
    found = [gelu_ffn(setting), swiglu_ffn(setting, HIDDEN_MULTIPLE)]
    if mkl_is_held_back() and setting.dtype == torch.float32:
        found.append(swiglu_ffn(setting, HIDDEN_MULTIPLE, OUR_GEMMS, compile_options()))
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
    return [Contestant("MoE", layer, (router,), work)]
