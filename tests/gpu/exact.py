"""Memory layers whose search is exact in any precision and any order of its sums, and what is right for them.

The numbers of the input, of the query's projection and of the half-keys are small integers times a power of two. So are
all products and sums up to the scores, and fp32 holds them. However a device multiplies, it finds the same scores and,
by the rule of `product_key_topk`, ties included, the same slots; what is left to compare is rounding.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from memcompile.lowering import memory_lookup
from tests.gpu.how import how
from tests.gpu.sizes import Layer
from tests.lowering.cases import TENSOR_NAMES, gradients
from tests.lowering.reference import memory_lookup_reference, scores_reference
from tests.tolerance import assert_as_accurate

VALUES = TENSOR_NAMES.index("values")
TERMS = 16  # of a query, so that no sum exceeds what a half dtype holds


def as_is(tensor: Tensor) -> Tensor:
    return tensor


def every_other(tensor: Tensor) -> Tensor:
    """The same numbers, with others between them in memory."""
    return torch.stack([tensor, tensor + 1], dim=-1).flatten(-2)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, with the last two dimensions the other way round in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def tensors(
    layer: Layer, dtype: torch.dtype, device: torch.device, layout: Callable[[Tensor], Tensor] = as_is, seed: int = 0
) -> list[Tensor | None]:
    """The arguments of memory_lookup before `heads`, as leaves that require gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, thin = 2 * layer.heads * layer.half_dim, layer.width**-0.5

    def leaf(tensor: Tensor) -> Tensor:
        return layout(tensor.to(dtype)).requires_grad_()

    def integers(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator, device=device).double()

    def normal(scale: float, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)

    # Sums of TERMS numbers of -2 ... 2: a standard deviation of 5.7; of the keys' integers it is 19.
    where = torch.rand(rows, layer.width, generator=generator, device=device).argsort(-1) < TERMS
    signs = 2 * (torch.rand(rows, layer.width, generator=generator, device=device) < 0.5) - 1
    query_weight = (where * signs).double()
    unit = 2.0 ** -round(math.log2(math.sqrt(layer.half_dim) * 5.7 * 19 / 2))  # scores of about 2
    return [
        leaf(integers(2, *layer.leading, layer.width)),
        leaf(query_weight),
        leaf(integers(2, rows)) if layer.bias else None,
        leaf(integers(32, 2, layer.heads, layer.n_keys, layer.half_dim) * unit),
        leaf(normal(1, layer.n_keys**2, layer.value_dim + (layer.width if layer.pairs else 0))),
        leaf(normal(thin, layer.value_dim, layer.width)) if layer.gate else None,
        leaf(normal(1, layer.value_dim)) if layer.gate and layer.bias else None,
        leaf(normal(layer.value_dim**-0.5, layer.out_dim, layer.value_dim)) if layer.out_dim else None,
        leaf(normal(1, layer.out_dim)) if layer.out_dim and layer.bias else None,
        None,
    ]


def lookup(layer: Layer, compiled: bool) -> Callable[..., Tensor]:
    def run(*arguments: Tensor | None) -> Tensor:
        return memory_lookup(*arguments, **layer.options)

    return how(run, compiled)


class HitRows:
    """In the place of a table: the rows that are read. All of a large one in float64 would fill the device."""

    def __init__(self, rows: Tensor, position: Tensor) -> None:
        self.rows, self.position = rows, position

    def __getitem__(self, slots: Tensor) -> Tensor:
        return self.rows[self.position.view(slots.shape)]


def right_slots(arguments: list[Tensor | None], layer: Layer) -> Tensor:
    """[tokens, heads, k] by the CPU's kernel, from scores in float64, which fp32 holds."""
    x, query_weight, query_bias, half_keys = (None if t is None else t.detach().double() for t in arguments[:4])
    scores = scores_reference(x, query_weight, query_bias, half_keys, None, layer.heads)
    assert torch.equal(scores.float().double(), scores), "these scores are not exact"
    return torch.ops.memcompile.product_key_topk(scores.float().cpu(), layer.top_k)[1].to(scores.device)


def reference(
    arguments: list[Tensor | None], slots: Tensor, layer: Layer, dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """The mathematics at these slots, in float64 or, for None, the arguments' own dtype.

    Returns:
        the output, its leaves, of which that of the values holds the rows that were hit, and the slots of these.
    """
    hit, position = slots.long().unique(return_inverse=True)  # [rows], [tokens, heads, k]

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(dtype or tensor.dtype, copy=True).contiguous().requires_grad_()

    found = [None if t is None else t.detach() for t in arguments]
    found[VALUES] = rows_of(arguments[VALUES].detach(), hit)
    leaves = [None if t is None else leaf(t) for t in found]
    given = [HitRows(t, position) if i == VALUES else t for i, t in enumerate(leaves)]
    return memory_lookup_reference(*given, **layer.options, slots=slots), leaves, hit


def rows_of(table: Tensor, slots: Tensor, part: int = 2**16) -> Tensor:
    """Rows [slots, value_dim], read from parts of the table that any indexing can address."""
    found = table.new_empty(len(slots), table.shape[1])
    for start in range(0, len(table), part):
        inside = (slots >= start) & (slots < start + part)
        found[inside] = table[start : start + part][slots[inside] - start]
    return found


def assert_zero_elsewhere(table: Tensor, slots: Tensor, part: int = 2**16) -> None:
    """Assert that all rows but these are zero."""
    hit = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    hit[slots] = True
    for rows, skipped in zip(table.split(part), hit.split(part), strict=True):
        assert not rows[~skipped].any(), "a row that was not hit is not zero"


Triple = tuple[Tensor, Tensor, Tensor]  # found, by plain PyTorch, exact


def compared(
    run: Callable[..., Tensor],
    arguments: list[Tensor | None],
    layer: Layer,
    around: Callable[[], AbstractContextManager] = nullcontext,
    slots: Tensor | None = None,
) -> dict[str, Triple]:
    """The output and every gradient of `run(*arguments)`, by name.

    Args:
        around: a context for `run` and the plain mathematics: autocast.
        slots: [tokens, heads, k], which `run` reads; None where its search is exact.
    """
    slots = right_slots(arguments, layer) if slots is None else slots
    exact, exact_leaves, hit = reference(arguments, slots, layer, torch.float64)
    with around():
        output = run(*arguments)
        plain, plain_leaves, _ = reference(arguments, slots, layer, None)
    grad = torch.randn(output.shape, device=output.device, dtype=output.dtype)
    actual = gradients(output, arguments, grad)
    assert_zero_elsewhere(actual["values"], hit)
    actual["values"] = rows_of(actual["values"], hit)
    of_plain, of_exact = gradients(plain, plain_leaves, grad), gradients(exact, exact_leaves, grad)
    triples = {f"gradient of {name}": (actual[name], of_plain[name], of_exact[name]) for name in actual}
    return {"output": (output, plain, exact), **triples}


def assert_right(*layers: dict[str, Triple]) -> None:
    """Assert that everything is as accurate as plain PyTorch's, in all these layers together: the largest error of
    many numbers is a steady measure, and that of a handful is a matter of luck.
    """
    for name in layers[0]:
        found = ([layer[name][i].flatten() for layer in layers] for i in range(3))
        assert_as_accurate(*map(torch.cat, found), name=name)
