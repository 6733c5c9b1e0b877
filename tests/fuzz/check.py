"""Holds the detector and the stand-ins against what is true of a generated model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

import memcompile
from memcompile.common.sites import FfnSite
from memcompile.runtime.pool import pool_of
from tests.fuzz.grammar import fitted
from tests.fuzz.misses import MISSES
from tests.fuzz.source import Source, write
from tests.fuzz.spec import Block, Ffn, Model

MEMORY: dict[str, Any] = {"n_keys": 4, "heads": 1, "top_k": 2, "key_dim": 4}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One deviation from the truth.

    Attributes:
        kind: "false positive", "miss", or "stand-in": what was accepted does not run, or not as its FFN did.
        about: the down-projection; "" where it is about none.
        reason: a sentence without names, to count findings by.
        source: the model.
    """

    kind: str
    about: str
    reason: str
    source: Source

    def __str__(self) -> str:
        return f"{self.kind}: {self.about}: {self.reason}\n\n{self.source.code}"


class DoesNotRun(Exception):
    """The generated model does not train in PyTorch: the generator's fault, and no model to look at."""


def build(source: Source) -> tuple[nn.Module, tuple]:
    """The model and its inputs; the same each time."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "fuzz"}
    exec(compile(source.code, "<fuzz>", "exec"), namespace)
    return namespace["model"], namespace["example_inputs"]


def check(model: Model) -> list[Finding]:
    """Every deviation that shows on ``model``. All that is accepted becomes memory, and runs.

    Raises:
        DoesNotRun: it is no model.
    """
    source = write(model)
    module, inputs = build(source)
    try:
        before = _step(build(source)[0], inputs, model.trainable)
    except RuntimeError as error:
        raise DoesNotRun(f"{type(error).__name__}: {error}\n\n{source.code}") from error
    example_inputs = None if model.guess else inputs
    broken: Exception | None = None
    try:
        memcompile.plan(module, memory_layers=lambda site: True, example_inputs=example_inputs, **MEMORY)
        sites = pool_of(module).sites
    except Exception as error:  # whatever the generated model runs into; or it has no FFN
        sites = memcompile.find_ffns(build(source)[0], example_inputs)
        broken = error
        if str(error).startswith("no feed-forward block"):  # none passed the rehearsal
            sites = [dataclasses.replace(site, refusal=site.refusal or str(error)) for site in sites]
    accepted = [site for site in sites if site.refusal is None]
    found = list(_compared(sites, source, model))
    if found or not accepted:
        return found
    try:
        if broken is not None:
            raise broken
        _assert_alike(_step(module, inputs, model.trainable), before)
        without = [n for n, p in module.named_parameters() if ".memory." in n and p.grad is None and model.trainable]
        assert not without, f"{without} have no gradient"
        left = {name for site in accepted for name in site.parameters} & dict(module.named_parameters()).keys()
        assert not left, f"{sorted(left)} are still parameters"
        mixed = any(block.ffn.cast == "down in float32" for block in model.blocks)
        if not mixed and all(site.down in source.whole for site in accepted):
            _assert_same_function(module, source, inputs)
    except Exception as error:
        return [Finding("stand-in", accepted[0].down, f"{type(error).__name__}: {error}", source)]
    return []


def _compared(sites: Sequence[FfnSite], source: Source, model: Model) -> Iterator[Finding]:
    refusals = {site.down: site.refusal for site in sites}
    accepted = {down for down, refusal in refusals.items() if refusal is None}
    for down in sorted(accepted - source.expected):
        yield Finding("false positive", down, "accepted", source)
    if not any(block.miss and MISSES[block.miss].lonely for block in model.blocks):
        for down in sorted(source.expected - accepted):
            yield Finding("miss", down, refusals.get(down) or "not seen", source)


def _step(module: nn.Module, inputs: tuple, trainable: bool) -> Any:
    """The output of one step forward, and back where the model can."""
    with torch.set_grad_enabled(trainable):
        output = module(*map(torch.clone, inputs))
        if trainable:
            sum(leaf.float().sum() for leaf in pytree.tree_leaves(output)).backward()
    return output


def _assert_alike(after: Any, before: Any) -> None:
    """The structure, shapes and dtypes are what they were."""
    (leaves, structure), (leaves_before, structure_before) = pytree.tree_flatten(after), pytree.tree_flatten(before)
    assert structure == structure_before, f"the output was {structure_before} and is {structure}"
    for leaf, was in zip(leaves, leaves_before, strict=True):
        assert (leaf.shape, leaf.dtype) == (was.shape, was.dtype), f"{was.dtype} {was.shape} became {leaf}"
        assert type(leaf) is type(was), f"a {type(was).__name__} became a {type(leaf).__name__}"


def _assert_same_function(planned: nn.Module, source: Source, inputs: tuple) -> None:
    """The model computes what it did where each memory runs the FFN that it replaced; in eval mode, free of dropout."""
    original, inside = build(source)[0].eval(), build(source)[0].eval()
    for down, layer in pool_of(planned).layers.items():
        layer.forward = inside.get_submodule(source.whole[down]).forward
    for name, buffer in original.named_buffers():  # spectral norm steps in each forward
        planned.get_buffer(name).copy_(buffer)
    with torch.no_grad():
        actual = pytree.tree_leaves(planned.eval()(*map(torch.clone, inputs)))
        expected = pytree.tree_leaves(original(*map(torch.clone, inputs)))
    equal = all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert equal, "with its FFNs in the memories' places the model computes something else"


def reduced(model: Model, finding: Finding) -> tuple[Model, Finding]:
    """The simplest model that shows the same: every choice that can be the first one is."""
    reduced_further = True
    while reduced_further:
        reduced_further = False
        for simpler in _simpler(model):
            same = next((f for f in _checked(simpler) if alike(f, finding)), None)
            if same is not None:
                model, finding, reduced_further = simpler, same, True
                break
    return model, finding


def alike(a: Finding, b: Finding) -> bool:
    """Whether two findings say the same, of whatever block."""
    return (a.kind, _without_names(a.reason)) == (b.kind, _without_names(b.reason))


def _without_names(reason: str) -> str:
    return " ".join(w for w in reason.split() if not any(c.isdigit() or c in "[]()'" for c in w))


def _checked(model: Model) -> list[Finding]:
    try:
        return check(model)
    except Exception:  # a simpler model may not be one
        return []


def _simpler(model: Model):
    for i in range(len(model.blocks)):
        if len(model.blocks) > 1:
            yield fitted(dataclasses.replace(model, blocks=model.blocks[:i] + model.blocks[i + 1 :]))
    for simple in _plainer(model, Model()):
        yield fitted(simple)
    for i, block in enumerate(model.blocks):
        ffns = (dataclasses.replace(block, ffn=f) for f in _plainer(block.ffn, Ffn()))
        for simple in (*_plainer(block, Block()), *ffns):
            changed = fitted(dataclasses.replace(model, blocks=(*model.blocks[:i], simple, *model.blocks[i + 1 :])))
            if changed != model:
                yield changed


def _plainer(spec: Any, plain: Any):
    for field in dataclasses.fields(spec):
        value = getattr(plain, field.name)
        if field.name not in ("blocks", "ffn") and getattr(spec, field.name) != value:
            yield dataclasses.replace(spec, **{field.name: value})
