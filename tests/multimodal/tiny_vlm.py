"""Real vision-language models of transformers, small enough for tests: random weights, every family of the layout.

Each family is a function that gives a model and a batch for it: two prompts of different length, padded on the left,
with image tokens expanded and every other input that the model's processor would make. :func:`batch` makes any other.
Models are built once and shared, so a test that changes one changes a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

PAD, BOS, STOP, NEWLINE, FAKE, VISION_START, VISION_END, VIDEO, IMAGE_ID = 0, 1, 50, 51, 52, 53, 54, 55, 56
GLOBAL, TILE = 57, 58  # what names the whole picture, and its first tile; the second tile is 59
VOCABULARY = 64

IMAGE = -1
"""In a prompt for :func:`batch`: a picture."""

PROMPTS = ((BOS, 10, 11, IMAGE, 20, 21, 22, 23, STOP, 30), (BOS, IMAGE, 24, 25, STOP))
"""Those of every family's batch."""

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
TEXT = {
    **LAYERS,
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # random maps are nearly flat with less
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
VISION = {**LAYERS, "image_size": 16, "patch_size": 4}
LLAVA = {"image_token_index": IMAGE_ID, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}


def _model(kind: Callable[..., PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config).eval()
    # Larger queries and keys: attention then differs from token to token, as that of trained models does.
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj.weight", "k_proj.weight", "qkv.weight")):
            parameter.data *= 3
    model.generation_config.update(pad_token_id=PAD, eos_token_id=None, do_sample=False, max_new_tokens=4)
    # A random model may well answer with the image token, which no real one is trained to say.
    model.generation_config.suppress_tokens = [IMAGE_ID, VIDEO]
    return model


@functools.cache
def _llava_clip() -> PreTrainedModel:
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), **LLAVA)
    return _model(LlavaForConditionalGeneration, config)


@functools.cache
def _llava_siglip() -> PreTrainedModel:
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    changes = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), **{**LLAVA, **changes})
    return _model(LlavaForConditionalGeneration, config)


@functools.cache
def _llava_next() -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_grid_pinpoints=[[16, 32], [32, 16]],
        **LLAVA,
    )
    return _model(LlavaNextForConditionalGeneration, config)


@functools.cache
def _llava_onevision() -> PreTrainedModel:
    changes = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_grid_pinpoints=[[16, 32], [32, 16]],
        video_token_index=VIDEO,
        **{**LLAVA, **changes},
    )
    return _model(LlavaOnevisionForConditionalGeneration, config)


def _qwen(config: Any, vision: dict[str, Any]) -> Any:
    return config(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 2, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, **vision},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


@functools.cache
def _qwen2_vl() -> PreTrainedModel:
    config = _qwen(Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2})
    return _model(Qwen2VLForConditionalGeneration, config)


@functools.cache
def _qwen2_5_vl() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16}
    config = _qwen(Qwen2_5_VLConfig, {**sizes, "fullatt_block_indexes": [1]})
    return _model(Qwen2_5_VLForConditionalGeneration, config)


def _tiled(config: Any) -> Any:
    return config(
        vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_ID, scale_factor=2, pad_token_id=PAD
    )


@functools.cache
def _idefics3() -> PreTrainedModel:
    return _model(Idefics3ForConditionalGeneration, _tiled(Idefics3Config))


@functools.cache
def _smolvlm() -> PreTrainedModel:
    return _model(SmolVLMForConditionalGeneration, _tiled(SmolVLMConfig))


@functools.cache
def _paligemma() -> PreTrainedModel:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE_ID,
        vocab_size=VOCABULARY,
        projection_dim=32,
        hidden_size=32,
    )
    return _model(PaliGemmaForConditionalGeneration, config)


def _squares(count: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def _one_run(model: Any, counts: Sequence[int]) -> dict[str, Tensor]:
    return {"pixel_values": _squares(sum(counts), 3, 16, 16)}


def _any_resolution(model: Any, counts: Sequence[int]) -> dict[str, Tensor]:
    """Every other picture is wide, the others tall; all are cut into two tiles behind a small view of the whole."""
    sizes = [(16, 28) if i % 2 == 0 else (30, 16) for i in range(sum(counts))]
    return {"pixel_values": _squares(len(sizes), 3, 3, 16, 16), "image_sizes": torch.tensor(sizes)}


def _patches(model: Any, counts: Sequence[int]) -> dict[str, Tensor]:
    """Pictures of 4 × 6 and 8 × 4 patches by turns, which make 6 and 8 tokens."""
    grid = torch.tensor([(1, 4, 6) if i % 2 == 0 else (1, 8, 4) for i in range(sum(counts))])
    return {"pixel_values": _squares(int(grid.prod(1).sum()), 3 * 2 * 4 * 4), "image_grid_thw": grid}


def _tiles(model: Any, counts: Sequence[int]) -> dict[str, Tensor]:
    """Three tiles a picture; rows with fewer pictures are filled with zeros."""
    tiles = _squares(3 * sum(counts), 3, 16, 16).split([3 * count for count in counts])
    return {"pixel_values": torch.nn.utils.rnn.pad_sequence(list(tiles), batch_first=True)}


_PICTURES: dict[str, Callable[[Any, Sequence[int]], dict[str, Tensor]]] = {
    "llava": _one_run,
    "llava_next": _any_resolution,
    "llava_onevision": _any_resolution,
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "idefics3": _tiles,
    "smolvlm": _tiles,
    "paligemma": _one_run,
}


def _expanded(kind: str, length: int) -> list[int]:
    """The tokens of a picture, as the family's processor writes them."""
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        return [VISION_START, *[IMAGE_ID] * length, VISION_END]
    if kind in ("idefics3", "smolvlm"):
        tile = [IMAGE_ID] * (length // 3)
        first, second = [FAKE, TILE, *tile], [FAKE, TILE + 1, *tile]
        return [*first, NEWLINE, *second, NEWLINE, NEWLINE, FAKE, GLOBAL, *tile, FAKE]
    return [IMAGE_ID] * length


def _lengths(model: Any, pictures: dict[str, Tensor], count: int) -> list[int]:
    with torch.no_grad():
        features = model.get_image_features(**pictures, return_dict=True).pooler_output
    if model.config.model_type in ("idefics3", "smolvlm"):  # of each row, not of each picture
        return [sum(len(row) for row in features) // count] * count
    return [len(feature) for feature in features]


def batch(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, *, padding: str = "left") -> dict[str, Tensor]:
    """Inputs for a model: token ids with :data:`IMAGE` for each picture, expanded, padded and with pixels."""
    kind = model.config.model_type
    counts = [list(prompt).count(IMAGE) for prompt in prompts]
    pictures = _PICTURES[kind](model, counts) if sum(counts) else {}
    lengths = iter(_lengths(model, pictures, sum(counts)) if sum(counts) else ())
    rows = [
        torch.tensor([id for token in prompt for id in (_expanded(kind, next(lengths)) if token == IMAGE else [token])])
        for prompt in prompts
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=padding)
    real = [torch.ones(len(row), dtype=torch.long) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(real, batch_first=True, padding_side=padding)
    inputs = {"input_ids": ids, "attention_mask": mask, **pictures}
    if kind.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    return inputs


def llava_clip() -> tuple[Any, dict[str, Tensor]]:
    """LLaVA with a CLIP vision tower, whose sequence begins with a class token, and Llama."""
    return _llava_clip(), batch(_llava_clip())


def llava_siglip() -> tuple[Any, dict[str, Tensor]]:
    """LLaVA with a SigLIP vision tower and Llama."""
    return _llava_siglip(), batch(_llava_siglip())


def llava_next() -> tuple[Any, dict[str, Tensor]]:
    """LLaVA-NeXT: tiles and newline features, all under one run of image tokens."""
    return _llava_next(), batch(_llava_next())


def llava_onevision() -> tuple[Any, dict[str, Tensor]]:
    """LLaVA-OneVision with SigLIP and Qwen2."""
    return _llava_onevision(), batch(_llava_onevision())


def qwen2_vl() -> tuple[Any, dict[str, Tensor]]:
    """Qwen2-VL: positions in three dimensions, markers around a picture."""
    return _qwen2_vl(), batch(_qwen2_vl())


def qwen2_5_vl() -> tuple[Any, dict[str, Tensor]]:
    """Qwen2.5-VL, whose vision encoder attends in windows but for its last layer."""
    return _qwen2_5_vl(), batch(_qwen2_5_vl())


def idefics3() -> tuple[Any, dict[str, Tensor]]:
    """Idefics3: a picture is two tiles and a view of the whole, with markers and line breaks between."""
    return _idefics3(), batch(_idefics3())


def smolvlm() -> tuple[Any, dict[str, Tensor]]:
    """SmolVLM, whose prompts are those of Idefics3."""
    return _smolvlm(), batch(_smolvlm())


def paligemma() -> tuple[Any, dict[str, Tensor]]:
    """PaliGemma, whose prompts are seen in both directions."""
    return _paligemma(), batch(_paligemma())


FAMILIES = {
    family.__name__: family
    for family in (
        llava_clip,
        llava_siglip,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        idefics3,
        smolvlm,
        paligemma,
    )
}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Of one forward, `[B, L, V]`."""
    return model(**inputs).logits


def continued(inputs: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """Inputs for a prompt together with its answer, at the positions that `generate` gives them."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    more = {**inputs, "input_ids": sequences, "attention_mask": mask}
    if "mm_token_type_ids" in inputs:  # Qwen's positions follow from the mask
        more["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    else:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return more


def same(got: Tensor, expected: Tensor) -> None:
    """Float32 rounds differently in another order of sums: to 1e-5 of the largest logit."""
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
