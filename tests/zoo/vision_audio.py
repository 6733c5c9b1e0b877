"""Hugging Face models of images, of images and text, and of sound."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import BATCH, HIDDEN, VOCABULARY, WIDTH, Entry, token_ids
from tests.zoo.hf import SIZES, SPECIAL_TOKENS, huggingface

LAYERS: dict[str, Any] = {name: size for name, size in SIZES.items() if name != "vocab_size"}
IMAGE_ENCODER: dict[str, Any] = {**LAYERS, "image_size": 16, "patch_size": 8}
TEXT_ENCODER: dict[str, Any] = {**SIZES, **SPECIAL_TOKENS, "max_position_embeddings": 32}
SPEECH_ENCODER: dict[str, Any] = {
    **LAYERS,
    **{"vocab_size": VOCABULARY, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2]},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    **{"mask_time_prob": 0.0, "apply_spec_augment": False, "layerdrop": 0.0},
}


def image(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def _image_and_text() -> dict[str, Any]:
    tokens = token_ids()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **image()}


def _image_in_text() -> dict[str, Any]:
    tokens = torch.tensor([[1, 5, 5, 5, 5, 7, 8, 9, 10, 11]] * BATCH)  # 5 stands for a patch of the image
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, **image()}


def _sound() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 200)}


def _spectrogram() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 80, 20), "labels": token_ids(7)}


VISION = [
    Entry(
        name="ViT",
        family="vision",
        build=huggingface("ViTConfig", "ViTForImageClassification", image, **IMAGE_ENCODER),
        down=r"(mlp\.fc2|layer\.\d+\.output\.dense)\.weight$",
    ),
    Entry(
        name="Swin",
        family="vision",
        build=huggingface(
            "SwinConfig",
            "SwinForImageClassification",
            lambda: image(32),
            **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
            window_size=4,
        ),
        down=r"(blocks\.\d+\.output\.dense|mlp\.fc2)\.weight$",
        note="windows; the width doubles between stages",
    ),
    Entry(
        name="Dinov2",
        family="vision",
        build=huggingface("Dinov2Config", "Dinov2Model", image, **IMAGE_ENCODER, mlp_ratio=3, use_swiglu_ffn=True),
        down=r"\.mlp\.(weights_out|down_proj)\.weight$",
        note="SwiGLU in one matrix, layer scale",
    ),
    Entry(
        name="CLIP",
        family="vision",
        build=huggingface(
            "CLIPConfig",
            "CLIPModel",
            _image_and_text,
            text_config=TEXT_ENCODER,
            vision_config=IMAGE_ENCODER,
            projection_dim=16,
        ),
        down=r"\.mlp\.fc2\.weight$",
        note="two towers",
    ),
    Entry(
        name="Siglip",
        family="vision",
        build=huggingface(
            "SiglipConfig",
            "SiglipModel",
            _image_and_text,
            text_config={**TEXT_ENCODER, "projection_size": WIDTH},
            vision_config=IMAGE_ENCODER,
        ),
        down=r"\.mlp\.fc2\.weight$",
        note="two towers; the attention-pooling head has an FFN with a residual",
    ),
    Entry(
        name="DETR",
        family="vision",
        build=huggingface(
            "DetrConfig",
            "DetrModel",
            lambda: image(32),
            **{"d_model": WIDTH, "num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False},
            **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": HIDDEN},
            **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": HIDDEN},
            backbone=None,
            backbone_config={
                **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
                "out_features": ["stage2"],
            },
        ),
        down=r"\.fc2\.weight$",
        note="convolutional backbone, queries that cross-attend",
    ),
    Entry(
        name="Llava",
        family="vision",
        build=huggingface(
            "LlavaConfig",
            "LlavaForConditionalGeneration",
            _image_in_text,
            text_config={**SIZES, "model_type": "llama", "num_key_value_heads": 2},
            vision_config={**IMAGE_ENCODER, "model_type": "clip_vision_model", "num_hidden_layers": 3},
            image_token_index=5,
            image_seq_length=4,
            vision_feature_layer=-1,
        ),
        down=r"(vision_tower\S*mlp\.fc2|language_model\S*mlp\.down_proj)\.weight$",
        note="CLIP, a projector, Llama",
        guessed=False,
    ),
]

AUDIO = [
    Entry(
        name="Whisper",
        family="audio",
        build=huggingface(
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            _spectrogram,
            **{**SPECIAL_TOKENS, "vocab_size": VOCABULARY, "d_model": WIDTH, "num_mel_bins": 80},
            **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": HIDDEN},
            **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": HIDDEN},
            **{"max_source_positions": 10, "max_target_positions": 64, "decoder_start_token_id": 1},
        ),
        down=r"\.fc2\.weight$",
        note="encoder-decoder from a spectrogram",
        guessed=False,
    ),
    Entry(
        name="Wav2Vec2",
        family="audio",
        build=huggingface("Wav2Vec2Config", "Wav2Vec2ForCTC", _sound, **SPEECH_ENCODER),
        down=r"\.feed_forward\.output_dense\.weight$",
        note="convolutions on the waveform; weight norm in the position embedding",
    ),
    Entry(
        name="Wav2Vec2Conformer",
        family="audio",
        build=huggingface(
            "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", _sound, **SPEECH_ENCODER, conv_depthwise_kernel_size=3
        ),
        down=r"\.ffn[12]\.output_dense\.weight$",
        note="two halved FFNs a layer, around attention and convolution",
    ),
]
