"""Stand-ins for one rehearsal: whether a model's own code runs with them is known before its parameters leave it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from memcompile.common.sites import FfnSite
from memcompile.runtime.install import put_stand_ins


class CountingLayer:
    """What stand-ins call in the place of a memory layer: returns its input, and counts.

    Attributes:
        calls: how often it ran.
    """

    def __init__(self, site: FfnSite, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.width, self.calls = site.name or site.down, site.width, 0
        self.query_weight = types.SimpleNamespace(dtype=dtype, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 1


@contextlib.contextmanager
def counting_stand_ins(root: nn.Module, sites: Sequence[FfnSite], adds: bool) -> Iterator[list[CountingLayer]]:
    """Puts stand-ins with counting layers into the FFNs of ``sites``; afterwards the model is as it was."""
    names = [name for site in sites for name in site.parameters]
    holders = {id(h): h for h in (root.get_submodule(name.rpartition(".")[0]) for name in names)}.values()
    before = [(h, type(h), dict(h.__dict__), dict(h._parameters)) for h in holders]
    layers = []
    try:
        for site in sites:
            down = root.get_parameter(site.down)
            layers.append(CountingLayer(site, down.dtype, down.device))
            put_stand_ins(root, site, layers[-1], adds)
        yield layers
    finally:
        for holder, cls, attributes, parameters in before:
            holder.__class__ = cls
            for name in holder.__dict__.keys() - attributes.keys():
                del holder.__dict__[name]
            holder._parameters.clear()
            holder._parameters.update(parameters)  # in their order
