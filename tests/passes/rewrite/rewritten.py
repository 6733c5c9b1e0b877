"""Captured graphs, the same with memory, and the planned models that these are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import memcompile
from memcompile import FfnSite, MemoryConfig
from memcompile.passes import rewrite
from tests.models import VOCABULARY, tiny_gpt
from tests.planned import MEMORY, assert_same

CONFIG = MemoryConfig(**MEMORY)


def tokens(batch: int = 3, time: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(batch))


def gpt(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return tiny_gpt(layers)


def exported(model: nn.Module, *args: Any, **options: Any) -> fx.GraphModule:
    return torch.export.export(model, args, **options).module()


def rewritten(graph_module: fx.GraphModule, sites: list[FfnSite], **options: Any) -> fx.GraphModule:
    torch.manual_seed(1)
    return rewrite(graph_module, sites, **{"memory": CONFIG} | options)


def planned(model: nn.Module, sites: list[FfnSite], **options: Any) -> nn.Module:
    """The live model with the same sites and the same draws as `rewritten`."""
    torch.manual_seed(1)
    memcompile.plan(model, memory_layers=[site.down for site in sites], **MEMORY | options)
    return model


def seeded(model: nn.Module, *args: Any) -> Tensor:
    """One forward with its dropout drawn from one seed."""
    torch.manual_seed(2)
    return model(*args)


def assert_same_parameters(graph_module: fx.GraphModule, model: nn.Module) -> None:
    assert_same(dict(graph_module.named_parameters()), dict(model.named_parameters()))
