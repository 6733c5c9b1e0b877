"""fp32 matrix products by oneDNN where PyTorch's MKL is held back: on AMD processors with AVX-512 MKL runs its AVX2
kernels (200 against 460 GFLOP/s on two Zen 5 cores). A pass over Inductor's graph, forward and backward.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from memcompile.lowering._torch import has_onednn_linear, onednn_linear
from memcompile.lowering.schema import LIBRARY, NAMESPACE, operator

_MANY = 2**14  # elements of an operand or the product, from which it is worth a call of its own


@functools.cache
def mkl_is_held_back() -> bool:
    """Whether fp32 products are MKL's, on a processor whose AVX-512 it does not use."""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not mkl or not has_onednn_linear():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "AuthenticAMD" in vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_onednn(graph: fx.Graph) -> None:
    """Replaces the fp32 products on the CPU, `aten.mm` and `aten.addmm` with a bias a column, in place."""
    for node in [*graph.nodes]:
        if node.target is torch.ops.aten.mm.default:
            operands = (*node.args, None)
        elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
            operands = (*node.args[1:], node.args[0])
        else:
            continue
        values = [operand.meta["val"] for operand in operands if operand is not None]
        bias_fits = len(values) == 2 or values[2].dim() == 1
        if bias_fits and all(map(_is_plain, values)) and _is_large([*values, node.meta["val"]]):
            with graph.inserting_before(node):
                product = graph.call_function(operator("onednn_mm"), operands)
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)


def _is_plain(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.dtype is torch.float32


def _is_large(values: Sequence[Tensor]) -> bool:
    fixed = ([size for size in value.shape if isinstance(size, int)] for value in values)  # tokens may be symbolic
    return max(torch.Size(sizes).numel() for sizes in fixed) >= _MANY


def _kernel(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return onednn_linear(left, right.t(), bias)


def _fake(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


LIBRARY.impl("onednn_mm", _kernel, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(f"{NAMESPACE}::onednn_mm", _fake, lib=LIBRARY)
