"""The Hypothesis strategy: draws a model's choices, then makes them fit together."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import spec
from tests.fuzz.misses import MISSES
from tests.fuzz.spec import Block, Ffn, Model

_SHAREABLE = ("no residual", "gate", "multiplied with the stream", "conditions tokens")
_VIEWS = ("chunk", "torch.chunk", "split", "unflatten and unbind")
_IN_PLACE = ("F.relu({h}, inplace=True)", "{h}.relu_()", "nn.ReLU(inplace=True)")
_OFTEN = st.sampled_from((False, False, False, True))  # "rarely True", and shrinks to False


def _mostly_first(choices: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.one_of(st.just(choices[0]), st.sampled_from(choices))


@st.composite
def ffns(draw: st.DrawFn) -> Ffn:
    home = draw(st.sampled_from(spec.HOMES))
    ffn = Ffn(
        hidden=draw(st.sampled_from((20, 14, 15, 16, 24, 30))),
        home=home,
        bias=draw(st.booleans()),
        dropout=draw(_mostly_first(spec.DROPOUTS)),
    )
    if home == "sequential":
        norm = draw(_mostly_first(("none", "nn.LayerNorm", "nn.RMSNorm")))
        return dataclasses.replace(ffn, activation=draw(st.sampled_from(spec.MODULES)), inner_norm=norm)
    return dataclasses.replace(
        ffn,
        projection=draw(_mostly_first(spec.PROJECTIONS)),
        gating=draw(st.sampled_from(spec.GATINGS)),
        gate_last=draw(st.booleans()),
        activation=draw(st.sampled_from(spec.ACTIVATIONS)),
        cast=draw(_mostly_first(spec.CASTS)),
        inner_norm=draw(_mostly_first(spec.INNER_NORMS)),
        flat=draw(_OFTEN),
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    return Block(
        ffn=draw(ffns()),
        miss=draw(st.one_of(st.none(), st.sampled_from(tuple(MISSES)))),
        late=draw(st.booleans()),
        layout=draw(_mostly_first(spec.LAYOUTS)),
        norm=draw(st.sampled_from(spec.NORMS)),
        mixer=draw(st.sampled_from(spec.MIXERS)),
        residual=draw(st.sampled_from(spec.RESIDUALS)),
        scale=draw(_mostly_first(spec.SCALES)),
        drop_path=draw(_OFTEN),
        checkpoint=draw(_OFTEN),
        shared=draw(_OFTEN),
    )


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Models of one to three blocks, each an FFN or, by one broken obligation, none."""
    width = draw(st.sampled_from((6, 8, 10, 12)))
    depth = draw(st.sampled_from((1, 2, 1, 2, 3)))
    model = Model(
        blocks=tuple(draw(st.lists(blocks(), min_size=depth, max_size=depth))),
        width=width,
        tokens=draw(st.sampled_from((5, 3, 7, width, 14))),  # 14 is a hidden width
        batch=draw(st.sampled_from((2, 3))),
        stem=draw(_mostly_first(spec.STEMS)),
        head=draw(st.sampled_from(spec.HEADS)),
        output=draw(_mostly_first(spec.OUTPUTS)),
        dtype=draw(_mostly_first(spec.DTYPES)),
        cache=draw(_mostly_first(spec.CACHES)),
        training=draw(st.booleans()),
        guess=draw(st.booleans()),
    )
    return fitted(model)


def fitted(model: Model) -> Model:
    """The model nearest to ``model`` that is valid, and whose misses are misses."""
    blocks = list(model.blocks)
    for i, block in enumerate(blocks):
        block = _fitted_block(block, blocks[0] if i else None, model)
        blocks[i] = block
        if block.miss == "down tied to the next block":
            following = blocks[i + 1] if i + 1 < len(blocks) else Block()
            blocks[i + 1 : i + 2] = [dataclasses.replace(following, ffn=block.ffn, miss=None, shared=False)]
        if block.miss == "up tied to the embedding":  # which has one shape
            blocks[i + 1 :] = [
                b if b.miss != block.miss else dataclasses.replace(b, miss=None) for b in blocks[i + 1 :]
            ]
        model = _forced(model, block.miss)
    if any(block.miss == "detached" for block in blocks):  # the rest has a backward
        blocks = [dataclasses.replace(b, residual="x = x + y") if b.residual == "x += y" else b for b in blocks]
        blocks = [dataclasses.replace(b, miss=None) if b.miss == "source overwritten" else b for b in blocks]
    if model.head == "tied" and model.stem not in ("embedding", "positions"):
        model = dataclasses.replace(model, head="linear")
    return dataclasses.replace(model, blocks=tuple(blocks))


def _fitted_block(block: Block, first: Block | None, model: Model) -> Block:
    change: dict[str, Any] = {}
    shareable = first is not None and first.ffn.home != "inline" and first.miss in (None, *_SHAREABLE)
    if not shareable or block.miss not in (None, *_SHAREABLE):
        block = dataclasses.replace(block, shared=False)
    if block.shared:
        assert first is not None
        change["ffn"] = first.ffn
    block = _forced(dataclasses.replace(block, **change), block.miss)
    if model.stem == "none" and block.layout in ("parallel", "macaron") and block.residual == "x += y":
        block = dataclasses.replace(block, residual="x = x + y")  # it would overwrite the model's input
    if block.shared:
        return block
    ffn = _forced(block.ffn, block.miss)
    if block.miss and MISSES[block.miss].hidden is not None:
        ffn = dataclasses.replace(ffn, hidden=model.width + MISSES[block.miss].hidden)
    elif ffn.hidden <= model.width or block.miss == "token MLP":
        ffn = dataclasses.replace(ffn, hidden=20)
    if ffn.activation == "nn.PReLU()" or ffn.gating == "F.glu" or block.miss == "pruned":
        ffn = dataclasses.replace(ffn, cast="none")  # a weight of the model's dtype, or of another until its hook runs
    if ffn.cast == "down in float32":
        ffn = dataclasses.replace(ffn, projection="linear", cast="none" if block.miss else ffn.cast)
    views = _VIEWS if block.miss is None else (*_VIEWS, "view and select", "slices", "every other")
    if ffn.gating in views and ffn.activation in _IN_PLACE:
        ffn = dataclasses.replace(ffn, activation="F.relu({h})")  # autograd has no rule for it
    if ffn.home == "sequential" and (ffn.gating, ffn.projection, ffn.flat) != ("plain", "linear", False):
        ffn = dataclasses.replace(ffn, home="module")
    return dataclasses.replace(block, ffn=ffn)


def _forced(spec: Any, miss: str | None) -> Any:
    """``spec`` with the fields that its miss needs."""
    if miss is None:
        return spec
    names = {field.name for field in dataclasses.fields(spec)}
    needed = {name: allowed for name, allowed in MISSES[miss].force.items() if name in names}
    return dataclasses.replace(
        spec, **{name: allowed[0] for name, allowed in needed.items() if getattr(spec, name) not in allowed}
    )
