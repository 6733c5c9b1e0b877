"""The project's zoo: 40 architectures and 30 traps, tiny, from configs, and what is to be found in each."""

from tests.zoo.handwritten import HANDWRITTEN, TORCH
from tests.zoo.hf import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.zoo.libraries import TIMM, X_TRANSFORMERS
from tests.zoo.traps import TRAPS
from tests.zoo.vision_audio import AUDIO, VISION

__all__ = ["MODELS", "TRAPS"]

MODELS = [*DECODERS, *ENCODERS, *ENCODER_DECODERS, *VISION, *AUDIO, *TORCH, *HANDWRITTEN, *TIMM, *X_TRANSFORMERS]
