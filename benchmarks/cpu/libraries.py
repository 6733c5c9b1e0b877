"""What others offer: the packages product-key-memory and PEER-pytorch, as they come, eager. Neither is required, and
neither has a gate or an output projection, which memcompile's layer has.
"""

import importlib
import math
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness.layers import Contestant, Layer, Setting, Work, trained


def _with_parameters(module: nn.Module, setting: Setting) -> None:
    """Gives a module that was made on the meta device, which draws nothing, the parameters that it still lacks."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                drawn = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
                drawn = torch.ones_like(drawn) if isinstance(part, nn.LayerNorm) else drawn
                setattr(part, name, nn.Parameter(drawn.to(setting.dtype)))


def _batch_of_one(module: nn.Module) -> Layer:
    return lambda x: module(x.unsqueeze(0)).squeeze(0)


def _search_weights(setting: Setting, n_keys: int) -> int:
    """Numbers in the query projection and the half-keys: both packages count a head's key by its half."""
    queries = setting.heads * setting.key_dim
    return queries * setting.width + queries * n_keys


def product_key_memory(package: ModuleType, setting: Setting, table: Tensor) -> Contestant:
    heads, top_k, width, n_keys = setting.heads, setting.top_k, setting.width, setting.n_keys
    with torch.device("meta"):
        module = package.PKM(width, heads=heads, num_keys=n_keys, topk=top_k, dim_head=setting.key_dim // 2)
    module.values.weight = nn.Parameter(table[: setting.num_slots], requires_grad=False)
    _with_parameters(module, setting)
    weights, hits = _search_weights(setting, n_keys), heads * top_k
    work = Work(2 * weights + 2 * hits * width, weights, hits, width, setting.num_slots)
    return Contestant("product-key-memory", _batch_of_one(module), trained(module.parameters()), work)


def peer(package: ModuleType, setting: Setting, table: Tensor) -> Contestant:
    """Experts of one hidden neuron: two rows each, so half as many of them as the table has rows."""
    heads, top_k, width = setting.heads, setting.top_k, setting.width
    m = math.isqrt(setting.num_slots // 2)
    with torch.device("meta"):
        module = package.PEER(
            width,
            heads=heads,
            num_experts=m * m,
            num_experts_per_head=top_k,
            product_key_topk=top_k,
            dim_key=setting.key_dim // 2,
            non_competing_scores=False,
        )
    half = setting.num_slots // 2
    module.weight_down_embed.weight = nn.Parameter(table[: m * m], requires_grad=False)
    module.weight_up_embed.weight = nn.Parameter(table[half : half + m * m], requires_grad=False)
    _with_parameters(module, setting)
    weights, hits = _search_weights(setting, m), heads * top_k
    work = Work(2 * weights + 4 * hits * width, weights, hits, 2 * width, m * m)
    return Contestant("PEER-pytorch", _batch_of_one(module), trained(module.parameters()), work)


_CONTESTANTS: dict[tuple[str, str], Callable[[ModuleType, Setting, Tensor], Contestant]] = {
    ("product-key-memory", "product_key_memory"): product_key_memory,
    ("PEER-pytorch", "PEER_pytorch"): peer,
}


@cache
def _imported(package: str, module: str) -> ModuleType | None:
    """The module, or None after a line that says how to install it, once."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        tqdm.write(f"{package} is left out ({error}): pip install -e '.[benchmark]'")
        return None


def library_contestants(setting: Setting, table: Tensor) -> list[Contestant]:
    """Those whose package is installed."""
    modules = [(_imported(*names), build) for names, build in _CONTESTANTS.items()]
    return [build(module, setting, table) for module, build in modules if module is not None]
