"""Near-misses: each breaks one obligation of an FFN that may be replaced, so the detector must leave it alone.

A table of code. ``{h}`` is the hidden activation, ``{own}`` the prefix of the FFN's own attributes, ``{x}`` its source.
"""

from __future__ import annotations

import dataclasses
from typing import Any

PRE = ("pre", "sandwich")  # layouts whose source is not the stream itself
NAMED = ("linear",)  # projections that are modules
FUSED = ("chunk", "split", "slices", "every other", "torch.chunk", "unflatten and unbind", "view and select", "F.glu")


@dataclasses.dataclass(frozen=True)
class Miss:
    """How a block is spoilt.

    Attributes:
        between: statements that stand between the projections.
        init: statements that the FFN's ``__init__`` runs, behind its projections.
        after: statements behind the down-projection, on ``y``.
        stream: the FFN also takes the residual stream, as ``stream``.
        kept: what the FFN returns beside its output; the model passes it on as ``use`` says.
        around: statements in place of ``y = ffn(n)``; ``{ffn}`` calls the FFN, ``{experts}`` are two of them.
        use: an expression that the model adds to what it returns; ``penalty`` is added to the output itself.
        force: what a spec must have for the miss to be one: field -> what it may be, the first where it is not.
        hidden: in place of the hidden width, from the width.
        lonely: what the model's other blocks are said to be does not count: parts of it cannot be traced.
    """

    between: str = ""
    init: str = ""
    after: str = ""
    stream: bool = False
    kept: str = ""
    around: str = ""
    use: str = ""
    force: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    hidden: int | None = None
    lonely: bool = False


def _mixing(between: str, init: str = "", after: str = "", **force: tuple[Any, ...]) -> Miss:
    return Miss(between, init, after, force={"flat": (False,), "home": ("module", "inline")} | force)


def _reading(between: str, init: str = "", **force: tuple[Any, ...]) -> Miss:
    return Miss(
        between, init, stream=True, force={"home": ("module", "inline"), "flat": (False,), "layout": PRE} | force
    )


def _escaping(use: str) -> Miss:
    force = {"home": ("module", "inline"), "checkpoint": (False,), "flat": (False,)}
    return Miss("kept = {h}", kept="kept", use=use, force=force)


def _around(code: str, **force: tuple[Any, ...]) -> Miss:
    return Miss(around=code, force={"layout": ("pre",)} | force)


def _experts(code: str, lonely: bool = False) -> Miss:
    force = {"layout": ("pre",), "home": ("module",)}
    return Miss(around=code, force=force, lonely=lonely)


def _weights(init: str, **force: tuple[Any, ...]) -> Miss:
    return Miss(init=init, force={"projection": NAMED} | force)


_NO_FUSED = ("plain", "gated")
_ROUTED = "weights, chosen = self.router(n).softmax(-1).topk(1, dim=-1)\n"
_SELECTED = "{experts}[0](n) * weights * (chosen == 0) + {experts}[1](n) * weights * (chosen == 1)"

MISSES: dict[str, Miss] = {
    # What mixes tokens between the projections.
    "roll": _mixing("{h} = torch.roll({h}, 1, 1)"),
    "pad": _mixing("{h} = F.pad({h}, (0, 0, 1, -1))"),
    "shift": _mixing("{h} = torch.cat([torch.zeros_like({h}[:, :1]), {h}[:, :-1]], dim=1)"),
    "cumsum": _mixing("{h} = {h}.cumsum(1)"),
    "flip": _mixing("{h} = {h}.flip(1)"),
    "centred over tokens": _mixing("{h} = {h} - {h}.mean(1, keepdim=True)"),
    "mean over tokens": _mixing("{h} = {h} + torch.mean({h}, dim=1, keepdim=True)"),
    "maximum over tokens": _mixing("{h} = {h} / (1 + {h}.abs().amax(dim=-2, keepdim=True))"),
    "mean over batch": _mixing("{h} = {h} + {h}.mean(0, keepdim=True)"),
    "softmax over tokens": _mixing("{h} = {h} * {h}.softmax(dim=1)"),
    "norm over tokens": _mixing("{h} = F.layer_norm({h}, {h}.shape[1:])"),
    "scale of all": _mixing("{h} = {h} / {h}.detach().norm()"),
    "conv": _mixing(
        "{h} = {own}mix({h}.transpose(1, 2)).transpose(1, 2)",
        "{own}mix = nn.Conv1d({hidden}, {hidden}, 3, padding=1, groups={hidden})",
    ),
    "batch norm": _mixing("{h} = {own}mix({h}.transpose(1, 2)).transpose(1, 2)", "{own}mix = nn.BatchNorm1d({hidden})"),
    "transposed and reshaped": _mixing("{h} = {h}.transpose(1, 2).reshape({h}.shape)"),
    "tokens into features": _mixing("{h} = {h}.flatten(1).roll(1, -1).view({h}.shape)"),
    "token matmul": _mixing(
        "{h} = {own}mix @ {h}", "{own}mix = nn.Parameter(torch.eye({tokens}) + 0.1)", guess=(False,)
    ),
    "self attention": _mixing("{h} = torch.softmax({h} @ {h}.transpose(1, 2), -1) @ {h}"),
    # What makes it another function than an FFN.
    "softmax over features": _mixing("{h} = {h}.softmax(-1)"),
    "top-k of features": _mixing("{h} = {h} * ({h} >= {h}.topk(2, dim=-1).values[..., -1:])"),
    "no nonlinearity": _mixing("", gating=("plain",)),
    "third projection": _mixing("{h} = {own}third({h})", "{own}third = nn.Linear({hidden}, {hidden})"),
    "LoRA of up": _mixing(
        "{h} = {h} + ({x} @ {own}a) @ {own}b",
        "{own}a = nn.Parameter(torch.randn({width}, 2))\n{own}b = nn.Parameter(torch.randn(2, {hidden}))",
        gating=_NO_FUSED,
    ),
    "LoRA of down": _mixing(
        "lora = ({h} @ {own}a) @ {own}b",
        "{own}a = nn.Parameter(torch.randn({hidden}, 2))\n{own}b = nn.Parameter(torch.randn(2, {width}))",
        after="y = y + lora",
    ),
    "serial adapter": _mixing(
        "",
        "{own}narrow, {own}wide = nn.Linear({width}, 3), nn.Linear(3, {width})",
        after="y = y + {own}wide(F.relu({own}narrow(y)))",
    ),
    "serial adapter without residual": _mixing(
        "",
        "{own}narrow, {own}wide = nn.Linear({width}, 3), nn.Linear(3, {width})",
        after="y = {own}wide(F.relu({own}narrow(y)))",
    ),
    # What does not train.
    "no_grad": _around(
        "grad = torch.is_grad_enabled()\ntorch.set_grad_enabled(False)\ny = {ffn}\ntorch.set_grad_enabled(grad)"
    ),
    "detached": _mixing("", after="y = y.detach()", guess=(False,)),
    # What reads more than the source.
    "two sources": _reading(
        "{h} = {h} * torch.sigmoid({own}other(stream))", "{own}other = nn.Linear({width}, {hidden})"
    ),
    "mask from the stream": _reading("{h} = {h} * (stream.sum(-1, keepdim=True) > 0)"),
    "conditioned": _reading(
        "{h} = {h} * (1 + {own}film(stream.mean(1, keepdim=True)))", "{own}film = nn.Linear({width}, {hidden})"
    ),
    "mask from a buffer": _mixing(
        "{h} = {h} * {own}mask[: {h}.shape[1]]", '{buffer}("{prefix}mask", (torch.arange(64) % 2).float()[:, None])'
    ),
    "source overwritten": _mixing("{x}.mul_(0.5)", layout=PRE),
    "source overwritten as data": _mixing("{x}.data.mul_(0.5)", layout=PRE),
    # What escapes.
    "hidden returned": _escaping("{kept}"),
    "hidden penalised": _escaping("penalty: 0.01 * {kept}.abs().mean()"),
    "hidden probed": _escaping("self.probe{i}({kept})"),
    "hidden used by the next block": _escaping("next: self.probe{i}({kept})"),
    "hidden stored": Miss("{own}last = {h}.detach()", force={"home": ("module", "inline"), "checkpoint": (False,)}),
    "output returned": Miss(  # `y += x` would make it the stream
        kept="y",
        use="{kept}",
        force={
            "checkpoint": (False,),
            "residual": ("x = x + y", "x = y + x", "x = x.add(y)", "x = torch.add(x, y)", "x += y"),
        },
    ),
    # Where the output goes.
    "no residual": _around("y = {ffn}\nx = 0"),
    "gate": _around("y = {ffn}\ny = x * torch.sigmoid(y)\nx = 0"),
    "multiplied with the stream": _around("y = {ffn}\ny = x * y\nx = 0"),
    "conditions tokens": _around(
        "n = n.mean(1, keepdim=True)\ny = {ffn}", residual=("x = x + y", "x = y + x", "x += y")
    ),
    "token MLP": _around("n = n.transpose(1, 2)\ny = {ffn}\ny = y.transpose(1, 2)", guess=(False,), scale=("none",)),
    # Experts and branches.
    "two FFNs on one source": _experts("y = {experts}[0](n) + {experts}[1](n)"),
    "experts by top-k": _experts(_ROUTED + f"y = {_SELECTED}"),
    "shared expert": _experts(_ROUTED + "y = {ffn}\n" + f"y = y + {_SELECTED}"),
    "experts by weight": _experts(
        "weights = self.router(n).softmax(-1)\n"
        "y = weights[..., :1] * {experts}[0](n) + weights[..., 1:] * {experts}[1](n)"
    ),
    "experts by index": _experts(
        "chosen = self.router(n).argmax(-1)\ny = torch.zeros_like(n)\n"
        "for i, expert in enumerate({experts}):\n    y[chosen == i] = expert(n[chosen == i])",
        lonely=True,
    ),
    "mixture of depths": _around(
        "chosen = self.router(n)[..., :1].topk(2, dim=1).indices.expand(-1, -1, n.shape[-1])\nwhole = n\n"
        "n = n.gather(1, chosen)\ny = {ffn}\ny = torch.zeros_like(whole).scatter(1, chosen, y)"
    ),
    # Widths.
    "adapter": Miss(hidden=-2),
    "as wide as the model": Miss(hidden=0),
    # Weights that cannot be taken out.
    "gradient hook": _weights("{up}.weight.register_hook(lambda grad: 0.5 * grad)"),
    "forward hook": _weights("{down}.register_forward_hook(lambda module, args, output: 2 * output)"),
    "forward pre-hook": _weights("{up}.register_forward_pre_hook(lambda module, args: None)"),
    "weight norm": _weights("nn.utils.parametrizations.weight_norm({down})"),
    "spectral norm": _weights("nn.utils.parametrizations.spectral_norm({up})"),
    "pruned": _weights('torch.nn.utils.prune.l1_unstructured({down}, "weight", 0.5)'),
    "up tied to down": Miss(
        force={"projection": NAMED, "gating": ("plain",), "home": ("module", "inline"), "cast": ("none",)}
    ),
    "up tied to the embedding": Miss(
        force={"projection": NAMED, "gating": ("plain",), "stem": ("embedding", "positions")}
    ),
    "down tied to the next block": Miss(force={"projection": NAMED}),
    "weight penalised": Miss(use="penalty: 1e-3 * {weight}.square().sum()", force={"projection": NAMED}),
}
