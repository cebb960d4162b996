"""Attention switched on in vision-language models of transformers, and off again.

Three switches, each a context manager and, by `.apply`, a handle; on the model that you have, alone or together:

    with compress_visual_tokens(model, keep_ratio=0.25), inhibit_cross_modality(model):
        tokens = model.generate(**inputs)

`multimodal.explain` shows what a token reads of the pictures, `multimodal.aki` is the model of the paper on
modality-mutual attention, and `register_family` teaches all of it another kind of models.
"""

from .cmai import inhibit_cross_modality
from .layout import Family, VisualLayout, find_layout, register_family
from .mma import modality_mutual_attention, mutual_mask
from .switches import Handle, Switch
from .vmtc import compress_visual_tokens

__all__ = [
    "Family",
    "Handle",
    "Switch",
    "VisualLayout",
    "compress_visual_tokens",
    "find_layout",
    "inhibit_cross_modality",
    "modality_mutual_attention",
    "mutual_mask",
    "register_family",
]
