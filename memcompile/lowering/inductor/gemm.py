"""fp32 matrix products by oneDNN where PyTorch's MKL is held back: on AMD processors with AVX-512 MKL runs its AVX2
kernels (200 against 460 GFLOP/s on two Zen 5 cores). A pass over Inductor's graph, forward and backward.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor, fx

from memcompile.lowering._torch import has_onednn_linear, onednn_linear, size_hint
from memcompile.lowering.register.operators import register_for_graphs
from memcompile.lowering.register.schema import operator

_MANY = 2**20  # multiplications from which oneDNN is faster, the cost of its call included


@functools.cache
def mkl_is_held_back() -> bool:
    """Whether fp32 products are MKL's, on a processor whose AVX-512 it does not use."""
    if not torch.backends.mkl.is_available() or not has_onednn_linear():  # type: ignore[no-untyped-call]
        return False
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "AuthenticAMD" in vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_onednn(graph: fx.Graph) -> int:
    """Replaces the large fp32 products on the CPU, `aten.mm` and `aten.addmm` with a bias a column, in place, and
    returns how many. With max-autotune too: Inductor's own products on a CPU ask for weights that are constants.
    """
    replaced = 0
    for node in [*graph.nodes]:
        if node.target is torch.ops.aten.mm.default:
            operands = (*node.args, None)
        elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
            operands = (*node.args[1:], node.args[0])
        else:
            continue
        # Nodes that another pass has made may have no values.
        values = [operand.meta.get("val") for operand in operands if operand is not None]
        if all(map(_is_plain, values)) and _is_served(*values):
            with graph.inserting_before(node):
                product = graph.call_function(operator("onednn_mm"), operands)
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)
            replaced += 1
    return replaced


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype is torch.float32


def _is_served(left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product [m, k] @ [k, n] is large, and its bias one number a column."""
    multiplications = size_hint(left.shape[0]) * size_hint(left.shape[1]) * size_hint(right.shape[1])
    return multiplications >= _MANY and (bias is None or bias.shape == right.shape[1:])


def _kernel(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    if left.shape[1] == 0:  # which oneDNN refuses
        return left @ right if bias is None else torch.addmm(bias, left, right)
    # It reads matrices at their strides, and a bias as if it had none.
    return onednn_linear(left, right.t(), None if bias is None else bias.contiguous())


def _fake(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


register_for_graphs("onednn_mm", _kernel, _fake, "CPU")
