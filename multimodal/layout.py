"""Where the pictures are in a sequence: image tokens, the markers around them, text and padding, family by family.

All switches of this package ask the same question of a prompt, and every family of models answers it differently: LLaVA
puts one run of image tokens for each picture, Qwen2-VL puts markers around the run, Idefics3 and SmolVLM cut a picture
into tiles with markers and line breaks between them. :func:`find_layout` gives one answer for all,
:func:`register_family` teaches it another.

Prompts are meant as the model's own processor makes them: the image token repeated once for each vision token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

__all__ = [
    "Family",
    "VisualLayout",
    "arguments_of",
    "cache_of",
    "family_of",
    "find_layout",
    "register_family",
    "valid_tokens",
]


@dataclass(frozen=True)
class Family:
    """What has to be known of a family of vision-language models. The decoder is `model.get_decoder()` in all.

    Attributes:
        name: What messages call it.
        classes: Names of its classes, e.g. `("LlavaForConditionalGeneration",)`; subclasses belong to it too.
        image_token_id: The id that stands once for each vision token.
        frame_token_ids: Ids of the markers that belong to a picture: around it, or between its tiles. Empty where there
            are none, or where `tiled` finds them.
        tiled: Pictures come in tiles, each led in by a marker and a few tokens that name the tile; one more marker
            closes the picture. The marker is the first of `frame_token_ids`; where these are empty, since the model's
            configuration does not hold it, it is the token right after a row's last image token, as the family's
            processor puts it there.
        vision_attention: The self-attention of the vision encoder whose weights rank the patches: that of the layer
            whose output feeds the projector. It has `q_proj` and `k_proj`, or one `qkv`. None where there is none.
        class_token: Whether the vision encoder's sequence begins with a class token.
    """

    name: str
    classes: tuple[str, ...]
    image_token_id: Callable[[PreTrainedModel], int] = lambda model: model.config.image_token_id
    frame_token_ids: Callable[[PreTrainedModel], frozenset[int]] = lambda model: frozenset()
    tiled: bool = False
    vision_attention: Callable[[PreTrainedModel], nn.Module] | None = None
    class_token: Callable[[PreTrainedModel], bool] = lambda model: False


@dataclass(frozen=True)
class VisualLayout:
    """Where things are in a batch of token sequences.

    Attributes:
        image: Image tokens, `[B, L]` bool.
        block: Which picture of its row an image token belongs to, counted from 0; -1 elsewhere, `[B, L]` int64. Tiles
            of one picture are one block. Pictures with no token at all between them, as LLaVA allows, look like one.
        frame: Markers that belong to a picture and are neither image nor text, `[B, L]` bool.
        valid: What is not padding, `[B, L]` bool.
    """

    image: Tensor
    block: Tensor
    frame: Tensor
    valid: Tensor

    @property
    def text(self) -> Tensor:
        """All that is no image token, no marker and no padding, `[B, L]` bool."""
        return self.valid & ~self.image & ~self.frame


_families: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Teaches all switches another family of models; a class that was known already is taken over.

    Raises:
        ValueError: For a family that names no classes.
    """
    if not family.classes:
        raise ValueError(f"the family {family.name!r} names no classes; give those of its models, by name")
    _families.update(dict.fromkeys(family.classes, family))


def family_of(model: PreTrainedModel) -> Family:
    """The family that a model belongs to.

    Raises:
        TypeError: Where it belongs to none that is known, with those that are.
    """
    for kind in type(model).__mro__:
        if (family := _families.get(kind.__name__)) is not None:
            return family
    raise TypeError(
        f"{type(model).__name__} is not supported; supported are {', '.join(sorted(_families))}. "
        "multimodal.layout.register_family adds another"
    )


def find_layout(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | BlockMask | dict[str, Any] | None = None,
    *,
    offset: int = 0,
    frame_token_ids: Collection[int] | None = None,
) -> VisualLayout:
    """Finds the pictures in a batch of prompts.

    Args:
        model: A model of a supported family.
        input_ids: `[B, L]` int, image tokens repeated once for each vision token, padded on any side.
        attention_mask: 0 at padding, `[B, offset + L]`; or any mask that transformers has prepared for `generate`. All
            tokens are valid without it.
        offset: How many tokens are in the cache already, before those of `input_ids`.
        frame_token_ids: Instead of the family's own. For Idefics3 and SmolVLM the id of `<fake_token_around_image>`
            (`processor.tokenizer.convert_tokens_to_ids`), for prompts that do not end a picture with it.

    Raises:
        TypeError: For a model of no supported family.
        ValueError: If `input_ids` is not two-dimensional, has video tokens, or the mask does not fit it.
    """
    family = family_of(model)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, length]")
    video = getattr(model.config, "video_token_id", None)
    if video is not None and bool((input_ids == video).any()):
        raise ValueError(f"the prompt has video tokens (id {video}); only pictures are supported")
    frames = family.frame_token_ids(model) if frame_token_ids is None else frozenset(frame_token_ids)
    image = input_ids == family.image_token_id(model)
    valid = valid_tokens(input_ids, attention_mask, offset)
    if family.tiled:
        frame, begins = _tiles(input_ids, image, valid, next(iter(frames), None))
    else:
        frame = torch.isin(input_ids, torch.tensor(sorted(frames), dtype=input_ids.dtype, device=input_ids.device))
        begins = _run_starts(image)
    block = torch.where(image, begins.cumsum(1) - 1, -1)
    return VisualLayout(image=image, block=block, frame=frame & valid, valid=valid)


def valid_tokens(
    input_ids: Tensor, attention_mask: Tensor | BlockMask | dict[str, Any] | None, offset: int = 0
) -> Tensor:
    """What is not padding, `[B, L]` bool; arguments as of :func:`find_layout`."""
    batch, length = input_ids.shape
    mask: Any = attention_mask
    if isinstance(mask, dict):  # one mask for each kind of layer; a token sees itself in all of them
        mask = next(iter(mask.values()))
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    query = torch.arange(length, device=input_ids.device)
    if isinstance(mask, BlockMask):
        rows = torch.arange(batch, device=input_ids.device)[:, None]
        zero = torch.zeros((), dtype=torch.long, device=input_ids.device)
        return mask.mask_mod(rows, zero, query[None], query[None] + offset).expand(batch, length)
    if mask.ndim == 4:  # prepared: padding is what does not even see itself
        own = mask[:, 0, query, query + offset].to(input_ids.device)
        own = own if own.dtype == torch.bool else own == 0
        return own.expand(batch, length)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < offset + length:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; for input_ids of shape {tuple(input_ids.shape)} after "
            f"{offset} cached tokens it must be [{batch}, {offset + length}]"
        )
    return mask[:, offset : offset + length].to(input_ids.device, torch.bool)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, as a hook with `with_kwargs=True` gets them."""
    return {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The key-value cache among a forward's arguments, by its new name or its old one."""
    cache = kwargs.get("cache")
    return cache if cache is not None else kwargs.get("past_key_values")


@functools.cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _run_starts(image: Tensor) -> Tensor:
    """Where an image token follows another token, `[B, L]` bool."""
    before = torch.nn.functional.pad(image, (1, -1))
    return image & ~before


def _tiles(input_ids: Tensor, image: Tensor, valid: Tensor, marker: int | Tensor | None) -> tuple[Tensor, Tensor]:
    """Markers of pictures in tiles, and where a picture begins; both `[B, L]` bool.

    A picture of T tiles is `<marker>name<image>…<marker>name<image>…<marker>`, with line breaks where a row of tiles
    ends. So between two tiles of one picture there is one marker, between two pictures there are two.
    """
    length = input_ids.shape[1]
    here = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    last = torch.where(image, here, -1).cummax(1).values  # the image token at or before, -1 where there is none
    after = torch.where(image, here, length).flip(1).cummin(1).values.flip(1)  # the one at or after, L without
    if marker is None:
        marker = input_ids.gather(1, (last[:, -1:] + 1).clamp(max=length - 1))  # [B, 1]
    marked = (input_ids == marker) & ~image & valid
    marked = marked & (marked & (last < 0)).any(1, keepdim=True)  # else no marker led the first picture in

    count = marked.cumsum(1)  # up to and including
    count_last = torch.where(last >= 0, count.gather(1, last.clamp(min=0)), 0)
    count_next = count.gather(1, after.clamp(max=length - 1))
    since, until = count - count_last, count_next - count
    previous = torch.nn.functional.pad(last, (1, -1), value=-1)  # for the first token of a run: the run before
    between = count - torch.where(previous >= 0, count.gather(1, previous.clamp(min=0)), 0)

    has_next = after < length
    inside = (last >= 0) & has_next & (count_next - count_last == 1)
    opening = has_next & (until == 0) & (since >= 1)
    closing = marked & torch.nn.functional.pad(image, (1, -1))
    joined = (previous >= 0) & (between == 1)
    return (inside | opening | closing) & ~image, _run_starts(image) & ~joined


def _layer_before_projector(layers: Any, config: Any) -> Any:
    """The vision layer whose output `config.vision_feature_layer` takes; the deepest where it takes several."""
    chosen = config.vision_feature_layer
    outputs = [chosen] if isinstance(chosen, int) else list(chosen)
    depth = max(output + len(layers) + 1 if output < 0 else output for output in outputs)
    if depth < 1:
        raise ValueError(f"vision_feature_layer={chosen!r} takes the embeddings, before any attention")
    return layers[depth - 1]


def _llava_attention(model: Any) -> nn.Module:
    return _layer_before_projector(model.model.vision_tower.encoder.layers, model.config).self_attn


def _llava_class_token(model: Any) -> bool:
    return hasattr(model.model.vision_tower.embeddings, "class_embedding")


def _qwen_frames(model: Any) -> frozenset[int]:
    return frozenset({model.config.vision_start_token_id, model.config.vision_end_token_id})


def _qwen_attention(model: Any) -> nn.Module:
    blocks = model.model.visual.blocks
    everywhere = getattr(model.model.visual, "fullatt_block_indexes", range(len(blocks)))  # 2.5 has windows elsewhere
    return blocks[max(everywhere)].attn


def _idefics_attention(model: Any) -> nn.Module:
    return model.model.vision_model.encoder.layers[-1].self_attn


def _paligemma_attention(model: Any) -> nn.Module:
    return model.model.vision_tower.encoder.layers[-1].self_attn


def _aki_attention(model: Any) -> nn.Module:
    return model.vision_encoder.encoder.layers[-1].self_attn


for _family in (
    Family(
        "LLaVA",
        (
            "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "LlavaOnevisionForConditionalGeneration",
        ),
        vision_attention=_llava_attention,
        class_token=_llava_class_token,
    ),
    Family(
        "Qwen-VL",
        ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        frame_token_ids=_qwen_frames,
        vision_attention=_qwen_attention,
    ),
    Family(
        "Idefics3",
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        tiled=True,
        vision_attention=_idefics_attention,
    ),
    Family("PaliGemma", ("PaliGemmaForConditionalGeneration",), vision_attention=_paligemma_attention),
    Family("AKI", ("AkiForConditionalGeneration",), vision_attention=_aki_attention),
):
    register_family(_family)
