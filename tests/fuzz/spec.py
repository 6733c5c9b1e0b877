"""What the fuzzer says about a model: plain data, from which the source is written and the truth follows.

Every field's first choice is the simplest, so that a failing model shrinks towards a small pre-norm GPT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

PROJECTIONS = ("linear", "x @ w", "x @ w.T", "F.linear", "addmm", "einsum")
GATINGS = (
    *("plain", "gated", "chunk", "torch.chunk", "split", "slices", "every other"),
    *("unflatten and unbind", "view and select", "F.glu"),
)
FUNCTIONS = (
    *("F.gelu({h})", 'F.gelu({h}, approximate="tanh")', "F.relu({h})", "F.relu({h}, inplace=True)", "F.silu({h})"),
    *("torch.relu({h})", "torch.sigmoid({h})", "torch.tanh({h})", "{h}.relu()", "{h}.relu_()", "{h}.sigmoid()"),
    *("{h}.clamp(min=0)", "torch.maximum({h}, torch.zeros_like({h}))", "F.elu({h})", "F.softplus({h})"),
    *("F.relu({h}).square()", "F.relu({h}) ** 2", "torch.pow(F.relu({h}), 2)"),
    *("{h} * torch.sigmoid({h})", "{h} * torch.sigmoid(1.702 * {h})", "{h} * torch.tanh(F.softplus({h}))"),
    "0.5 * {h} * (1.0 + torch.tanh(0.7978845608 * ({h} + 0.044715 * torch.pow({h}, 3.0))))",
    *("{h} * 0.5 * (1.0 + torch.erf({h} / 1.41421))", "torch.where({h} > 0, {h}, 0.01 * {h})"),
    "{h} * torch.sigmoid({own}beta * {h})",
)
MODULES = ("nn.GELU()", "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU()", "nn.Mish()", "nn.Hardswish()", "nn.PReLU()")
ACTIVATIONS = FUNCTIONS + MODULES
CASTS = ("none", "to(float32), to(dtype)", "float(), type_as", "float(), to(weight.dtype)", "down in float32")
INNER_NORMS = ("none", "nn.LayerNorm", "nn.RMSNorm", "rms spelt out")
DROPOUTS = ("none", "between", "after", "both")
HOMES = ("module", "inline", "sequential")

LAYOUTS = ("pre", "post", "branch norm", "sandwich", "parallel", "macaron")
NORMS = ("nn.LayerNorm", "nn.RMSNorm", "RmsNorm")  # the last is spelt out
MIXERS = ("attention", "spelt-out attention", "mean", "cumulative mean", "wide cumulative mean", "conv")
RESIDUALS = ("x = x + y", "x = y + x", "x = x.add(y)", "x = torch.add(x, y)", "y += x; x = y", "x += y")
SCALES = ("none", "half", "layer scale")

STEMS = ("embedding", "positions", "none", "linear")
HEADS = ("linear", "none", "tied", "pooler", "projector", "transform")
OUTPUTS = ("tensor", "tuple", "dict")
CACHES = ("none", "plain object", "global", "lru_cache", "class", "closure", "default", "thread-local", "real tensor")
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float64")


@dataclasses.dataclass(frozen=True)
class Ffn:
    """One FFN: ``y = down(act(up(x)))`` and how each part of it is written."""

    hidden: int = 20
    home: str = HOMES[0]
    projection: str = PROJECTIONS[0]
    bias: bool = True
    gating: str = GATINGS[0]
    gate_last: bool = False
    activation: str = ACTIVATIONS[0]
    cast: str = CASTS[0]
    inner_norm: str = INNER_NORMS[0]
    dropout: str = DROPOUTS[0]
    flat: bool = False  # two-dimensional inside


@dataclasses.dataclass(frozen=True)
class Block:
    """A token mixer and an FFN on a residual stream; ``miss`` names the one obligation that the FFN breaks, if any."""

    ffn: Ffn = Ffn()
    miss: str | None = None
    late: bool = False  # the miss stands behind the activation, not before
    layout: str = LAYOUTS[0]
    norm: str = NORMS[0]
    mixer: str = MIXERS[0]
    residual: str = RESIDUALS[0]
    scale: str = SCALES[0]
    drop_path: bool = False
    checkpoint: bool = False
    shared: bool = False  # runs the first block's FFN


@dataclasses.dataclass(frozen=True)
class Model:
    """A whole Transformer, and how the detector is asked."""

    blocks: tuple[Block, ...] = (Block(),)
    width: int = 6
    tokens: int = 5
    batch: int = 2
    stem: str = STEMS[0]
    head: str = HEADS[0]
    output: str = OUTPUTS[0]
    dtype: str = DTYPES[0]
    cache: str = CACHES[0]  # where a table that is added to the stream is kept
    training: bool = True
    guess: bool = False  # no example inputs are given

    @property
    def trainable(self) -> bool:
        """Whether autograd runs it: not where a tensor that it needs is overwritten."""
        return not any(b.residual == "x += y" or b.miss == "source overwritten" for b in self.blocks)


def features(model: Model) -> Iterator[str]:
    """What a model was made of, a word for each choice: for the table of what was generated."""
    yield from _choices("model", model)
    for block in model.blocks:
        yield from _choices("block", block)
        yield from _choices("ffn", block.ffn)


def _choices(kind: str, spec: object) -> Iterator[str]:
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        if isinstance(value, (str, bool)):
            yield f"miss: {value}" if field.name == "miss" else f"{kind}.{field.name}: {value}"
