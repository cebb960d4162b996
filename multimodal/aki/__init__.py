"""AKI-4B as a model of transformers."""

from .configuration import AkiConfig
from .modeling import AkiForConditionalGeneration
from .resampler import PerceiverAttention, PerceiverResampler
from .vocabulary import ExtendedEmbedding, ExtendedHead

__all__ = [
    "AkiConfig",
    "AkiForConditionalGeneration",
    "ExtendedEmbedding",
    "ExtendedHead",
    "PerceiverAttention",
    "PerceiverResampler",
]
