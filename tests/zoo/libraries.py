"""Models of timm and x-transformers. `make test` installs both; elsewhere their entries are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.entry import BATCH, VOCABULARY, WIDTH, Build, Entry, token_ids
from tests.zoo.torchvision_stand_in import torchvision_stand_in


def _timm(create: Callable[[Any], nn.Module]) -> Build:
    """The model that ``create`` makes, given the package."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        with torchvision_stand_in():
            timm = pytest.importorskip("timm")
        return create(timm), {"x": torch.randn(BATCH, 3, 32, 32)}

    return build


# 16 patches; timm starts heads at zero, behind which nothing would learn in the first step, so without one.
_TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 0}
_TIMM_VIT = {**_TIMM, "embed_dim": WIDTH, "depth": 2, "num_heads": 4}


def _decoder(**options: Any) -> Build:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        x_transformers = pytest.importorskip("x_transformers")
        layers = x_transformers.Decoder(dim=WIDTH, depth=2, heads=4, attn_dim_head=8, **options)
        model = x_transformers.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=64, attn_layers=layers)
        return model, {"x": token_ids()}

    return build


_DOWN = r"attn_layers\.layers\.\d+\.1\.(fn\.)?ff\.(2|3)\.weight$"

TIMM = [
    Entry(
        name="timm ViT",
        family="timm",
        build=_timm(
            lambda timm: timm.create_model("vit_tiny_patch16_224", proj_drop_rate=0.1, drop_path_rate=0.1, **_TIMM_VIT)
        ),
        down=r"\.mlp\.fc2\.weight$",
        note="stochastic depth and dropout",
    ),
    Entry(
        name="timm Mixer",
        family="timm",
        build=_timm(lambda timm: timm.models.MlpMixer(num_blocks=2, embed_dim=16, mlp_ratio=(4.0, 4.0), **_TIMM)),
        down=r"\.mlp_channels\.fc2\.weight$",
        note="channel MLPs are FFNs; token MLPs of the same sizes are not",
        guessed=False,
    ),
    Entry(
        name="timm EVA-02",
        family="timm",
        build=_timm(lambda timm: timm.create_model("eva02_tiny_patch14_224", **_TIMM_VIT)),
        down=r"\.mlp\.fc2\.weight$",
        note="SwiGLU, rotary attention",
    ),
]

X_TRANSFORMERS = [
    Entry(
        name="x-transformers SwiGLU",
        family="x-transformers",
        build=_decoder(ff_swish=True, ff_glu=True, ff_dropout=0.1, rotary_pos_emb=True, use_rmsnorm=True),
        down=_DOWN,
        note="gate and up in one matrix, RMS norm, rotary",
    ),
    Entry(
        name="x-transformers DynamicTanh",
        family="x-transformers",
        build=_decoder(use_dynamic_tanh=True, ff_relu_squared=True, ff_post_act_ln=True),
        down=_DOWN,
        note="no norm but tanh, squared relu, layer norm on the hidden activation",
    ),
]
