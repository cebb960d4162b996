"""VMTC: fewer image tokens, the telling ones kept and the others merged.

The method is that of Yang et al., "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing
Image Redundancy" (2024), https://arxiv.org/abs/2411.15453. No code was released, and we know its abstract and what
others wrote of it. Of that are the steps:

1. A patch's score is the attention between it and the class token in the vision encoder.
2. The patches with the highest scores are primary and stay as they are.
3. The others are clustered by K-Means under cosine similarity.
4. Each cluster becomes one token, its members' mean weighted by their scores: `sum_i s_i x_i / sum_i s_i`.

All else is ours, and an argument of :func:`compress_visual_tokens` where it can be otherwise: which layer and direction
the attention is of, scores where there is no class token, how many tokens are primary, where K-Means starts and when it
ends, that tokens are compressed behind the connector, and that a merged token stands where its highest-scoring member
stood.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import uncompiled
from .clusters import Compressed, compress, merge, spherical_kmeans
from .hooks import around_generate
from .layout import VisualLayout, arguments_of, cache_of, family_of, find_layout
from .shorten import Positions, Shorter, shorten
from .switches import Switch
from .token_scores import Heard, listen_to, listening, scored_attention, token_scores

__all__ = [
    "Compressed",
    "Compression",
    "Picture",
    "Shortened",
    "compress",
    "compress_visual_tokens",
    "merge",
    "spherical_kmeans",
]

Score = Literal["attention", "norm"]

_NAME = "visual token compression"
_ONE_TOKEN_A_PATCH = ("llava", "paligemma")
_ROUNDING = 1e-4  # of a share times a count, so that 0.1 of 30 tokens are 3


@dataclass(frozen=True)
class Picture:
    """What became of a picture's tokens.

    Attributes:
        row: Of the batch.
        column: In its row of the prompt, where its first token was.
        scores: Of its tokens, `[N]`.
        index, target: As of :class:`Compressed`, `[K]` and `[N]`.
    """

    row: int
    column: int
    scores: Tensor
    index: Tensor
    target: Tensor


@dataclass(frozen=True)
class Shortened:
    """What became of a batch of prompts.

    Attributes:
        pictures: In the order of the prompts.
        columns: Where in its row of the prompt each token comes from, `[B, L']`.
        attention_mask: Of the shorter prompts, `[B, L']`; what further tokens' masks are appended to, by who decodes
            with forwards of their own.
    """

    pictures: list[Picture]
    columns: Tensor
    attention_mask: Tensor


@dataclass
class Compression:
    """Settings of :func:`compress_visual_tokens`, which documents them, and what was last done under them.

    Attributes:
        last: Of the last prompt that was made shorter.
    """

    keep_ratio: float | None
    num_tokens: int | None
    merge_share: float
    score: Score
    rounds: int
    positions: Positions
    before_connector: bool
    last: Shortened | None = field(default=None, repr=False, compare=False)

    def split(self, count: int) -> tuple[int, int]:
        """How many of a picture's tokens are primary, and how many the others are merged into.

        Raises:
            ValueError: If no token would be left, or more are asked for than there are.
        """
        if self.num_tokens is not None:
            total = self.num_tokens
            if total > count:
                raise ValueError(f"num_tokens={total}, but a picture has only {count} tokens; ask for at most so many")
        else:
            total = round(self.keep_ratio * count)  # type: ignore[operator]
            if total < 1:
                raise ValueError(f"keep_ratio={self.keep_ratio} leaves none of a picture's {count} tokens; keep more")
        merged = 0 if total == count else math.floor(total * self.merge_share + _ROUNDING)
        return total - merged, merged


def _settings(
    model: PreTrainedModel,
    *,
    keep_ratio: float | None = None,
    num_tokens: int | None = None,
    merge_share: float = 1 / 6,
    score: Score = "attention",
    rounds: int = 10,
    positions: Positions = "consecutive",
    before_connector: bool = False,
) -> Compression:
    """Visual token compression (VMTC): fewer image tokens, the telling ones kept and the others merged.

    The language model gets a shorter prompt: ids, masks, token types, positions and labels lose the same tokens, and
    logits are of the shorter prompt. `generate` returns sequences that begin with the prompt as it was given. All
    defaults are ours; the paper's are not known.

    Args:
        model: A vision-language model of a supported family.
        keep_ratio: Share of each picture's tokens that are left, in (0, 1]; give this or `num_tokens`. With 1 nothing
            changes, to the bit.
        num_tokens: How many tokens of each picture are left.
        merge_share: Which part of these are merged ones, in [0, 1]; 0 drops what is not primary, 1 merges everything.
        score: What ranks the tokens: the attention that their patches receive in the vision encoder's layer before the
            connector, from the class token or, where there is none, from all patches on average ('attention'); or the
            length of their features ('norm').
        rounds: Of K-Means, at most.
        positions: Positions of the language model close up ('consecutive'), or stay those of the whole prompt
            ('source'). Those in three dimensions (Qwen-VL) always stay.
        before_connector: Tokens are merged as the vision encoder gives them, which its connector then maps; for LLaVA
            and PaliGemma, which have one token for each patch.

    Raises:
        TypeError: For a model of no supported family, one whose vision encoder is not known, or one that was compiled.
        ValueError: For wrong options. On a forward or `generate`: for a prompt without pictures, pictures that do not
            match its image tokens, or more tokens asked for than there are.
    """
    family_of(model)
    if (keep_ratio is None) == (num_tokens is None):
        raise ValueError(f"keep_ratio={keep_ratio} and num_tokens={num_tokens} were given; give one of them")
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio} must be above 0 and at most 1, as 0.25 for a quarter of the tokens")
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1")
    if not 0 <= merge_share <= 1:
        raise ValueError(f"merge_share={merge_share} must be from 0 to 1, as 1/6 for one merged token in six")
    if rounds < 0:
        raise ValueError(f"rounds={rounds} must not be negative")
    for name, value, choices in (("score", score, Score), ("positions", positions, Positions)):
        if value not in get_args(choices):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, get_args(choices)))}")
    if score == "attention":
        scored_attention(model)
    if before_connector and model.config.model_type not in _ONE_TOKEN_A_PATCH:
        raise ValueError(
            f"before_connector=True is for {' and '.join(_ONE_TOKEN_A_PATCH)}; the connector of a "
            f"{type(model).__name__} needs all patches in their places"
        )
    return Compression(keep_ratio, num_tokens, float(merge_share), score, int(rounds), positions, before_connector)


def _with_fewer_tokens(model: Any, given: dict[str, Any], settings: Compression, cached: int) -> dict[str, Any]:
    """Arguments of a forward or of `generate` with the pictures encoded, and only the tokens that are left of them."""
    if (ids := given.get("input_ids")) is None:
        raise ValueError(f"{_NAME} finds image tokens by their ids; give input_ids, not inputs_embeds alone")
    layout = find_layout(model, ids, given.get("attention_mask"), offset=cached)
    encoded, scores, compressed = _encode(model, given, layout, settings)
    changed = {**given, "mm_encoder_outputs": {"image": encoded}}
    del changed["pixel_values"]
    sizes = [len(own) for own in scores]
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
    left = torch.cat([own.index + start for own, start in zip(compressed, starts, strict=True)])
    is_left = torch.zeros(sum(sizes), dtype=torch.bool, device=left.device).scatter(0, left, True)
    stays = torch.ones_like(layout.image).masked_scatter(layout.image, is_left.to(layout.image.device))
    shorter = Shorter.of(stays, layout.valid)
    if not stays.all():
        changed = shorten(model, changed, layout, shorter, settings.positions, cached)
    places = layout.image.nonzero()[starts].tolist()
    pictures = [
        Picture(row, column, own_scores, own.index, own.target)
        for (row, column), own_scores, own in zip(places, scores, compressed, strict=True)
    ]
    settings.last = Shortened(pictures, shorter.columns, shorter.valid.long())
    return changed


def _encode(
    model: Any, given: dict[str, Any], layout: VisualLayout, settings: Compression
) -> tuple[Any, Sequence[Tensor], list[Compressed]]:
    """The output of the model's vision part, compressed; each picture's scores, and what is left of its tokens."""
    encode = model.base_model.get_image_features
    names = [name for name in inspect.signature(encode).parameters if given.get(name) is not None]
    inputs = {name: given[name] for name in names}
    inside: list[tuple[Sequence[Tensor], list[Compressed]]] = []

    def rank(heard: Heard, features: Tensor) -> Tensor:
        if settings.score == "norm":
            return features.detach().float().norm(dim=-1)
        return token_scores(model, heard, inputs, len(features)).to(features.device)

    def compress_inside(heard: Heard, features: Tensor) -> Tensor:  # [B, P, C]
        scores = rank(heard, features.flatten(0, 1)).view(features.shape[:2])
        inside.append((list(scores), _compress_each(list(features), list(scores), settings)))
        return torch.stack([own.features for own in inside[-1][1]])

    with listening(compress_inside if settings.before_connector else None) as heard:
        encoded = encode(**inputs, return_dict=True)
    if inside:
        scores, compressed = inside[0]
        _check_places(layout, [len(own) for own in scores])
        return encoded, scores, compressed
    features = torch.cat([own.flatten(0, -2) for own in encoded.pooler_output])  # [N, C]
    sizes = _sizes(model, encoded.pooler_output, layout)
    _check_places(layout, sizes, len(features))
    scores = rank(heard, features).split(sizes)
    compressed = _compress_each(features.split(sizes), scores, settings)
    left = [own.features for own in compressed]
    encoded.pooler_output = torch.stack(left) if isinstance(encoded.pooler_output, Tensor) else left
    return encoded, scores, compressed


def _check_places(layout: VisualLayout, sizes: list[int], made: int | None = None) -> None:
    """Refuses pictures that do not have their places in the prompt, where there are `made` tokens of them."""
    rows, made = layout.image.nonzero()[:, 0], sum(sizes) if made is None else made
    if len(rows) == sum(sizes) == made and all((row == row[0]).all() for row in rows.split(sizes)):
        return
    in_rows = ", ".join(map(str, layout.image.sum(1).tolist()))
    raise ValueError(
        f"the prompts have {in_rows} image tokens, but the pictures make {made}, {', '.join(map(str, sizes))} each; "
        "give each picture its place in a prompt, as the model's processor does"
    )


def _sizes(model: PreTrainedModel, features: Any, layout: VisualLayout) -> list[int]:
    """How many tokens each picture has, tiles taken together."""
    if not family_of(model).tiled:
        return [len(own) for own in features]
    row = torch.arange(len(layout.block), device=layout.block.device)[:, None] * layout.block.shape[1]
    return (row + layout.block)[layout.image].unique_consecutive(return_counts=True)[1].tolist()


def _compress_each(features: Sequence[Tensor], scores: Sequence[Tensor], settings: Compression) -> list[Compressed]:
    """Pictures of any size, those of one size together."""
    done: dict[int, Compressed] = {}
    for size in {len(own): None for own in features}:
        which = [i for i, own in enumerate(features) if len(own) == size]
        kept, merged = settings.split(size)
        batch = torch.stack([features[i] for i in which]), torch.stack([scores[i] for i in which])
        together = compress(*batch, kept, merged, rounds=settings.rounds)
        done.update(zip(which, map(Compressed, *together), strict=True))
    return [done[i] for i in range(len(features))]


_generating = ContextVar[PreTrainedModel | None]("generating from a shorter prompt", default=None)


def _before(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Before a model's forward: makes a prompt with pictures shorter."""
    if (settings := compress_visual_tokens.active(model)) is None:
        return None
    given = arguments_of(model, args, kwargs or {})
    pictures, cache = given.get("pixel_values"), cache_of(given)
    if pictures is None and _generating.get() is model:
        return None  # the prompt was made shorter before `generate` began
    cached = 0 if cache is None else int(cache.get_seq_length())
    if pictures is None:
        _check_no_pictures(given, cached)
        return None
    return (), _with_fewer_tokens(model, given, settings, cached)


def _check_no_pictures(given: dict[str, Any], cached: int) -> None:
    if given.get("mm_encoder_outputs"):
        raise ValueError(f"{_NAME} ranks tokens while pictures are encoded; give pixel_values, not mm_encoder_outputs")
    if cached == 0:
        raise ValueError(f"no picture was given, so {_NAME} has nothing to shorten; leave the switch for text alone")
    mask: Any = given.get("attention_mask")
    new = 0 if given.get("input_ids") is None else given["input_ids"].shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and new and mask.shape[1] != cached + new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but the cache has {cached} tokens and input_ids {new} more; "
            "the prompt was made shorter: append to `settings.last.attention_mask` of the switch"
        )


def _around_generate(model: PreTrainedModel, call: Callable[..., Any], given: dict[str, Any]) -> Any:
    """`generate` from a shorter prompt; what it returns begins with the whole one."""
    if (settings := compress_visual_tokens.active(model)) is None:
        return call(**given)
    given = dict(given)
    if (ids := given.pop("inputs", None)) is not None:
        given["input_ids"] = ids
    if given.get("pixel_values") is None:
        raise ValueError(
            f"no picture was given to generate under {_NAME}; give those of the whole prompt, also where a cache has "
            "them already, and leave the switch for text alone"
        )
    changed = _without_cached_pictures(_with_fewer_tokens(model, given, settings, cached=0), settings)
    whole, short = given["input_ids"], changed["input_ids"].shape[1]
    token = _generating.set(model)
    try:
        output = call(**_fewer_in_all(model, changed, whole.shape[1] - short))
    finally:
        _generating.reset(token)

    def begin_with_whole(sequences: Tensor) -> Tensor:
        own = whole.to(sequences.device).repeat_interleave(len(sequences) // len(whole), 0)
        return torch.cat([own, sequences[:, short:]], 1)

    if isinstance(output, Tensor):
        return begin_with_whole(output)
    output.sequences = begin_with_whole(output.sequences)
    return output


def _without_cached_pictures(given: dict[str, Any], settings: Compression) -> dict[str, Any]:
    """Arguments of `generate`, which goes on behind the tokens in a cache, with the pictures that come after these."""
    cache, shortened = cache_of(given), settings.last
    cached = 0 if cache is None else int(cache.get_seq_length())
    if not cached or shortened is None:
        return given
    encoded = given["mm_encoder_outputs"]["image"]
    behind = given["input_ids"].shape[1] - cached  # columns
    new = [
        feature
        for own, feature in zip(shortened.pictures, encoded.pooler_output, strict=True)
        if shortened.columns[own.row, -behind] <= own.column
    ]
    if not new:
        return {name: value for name, value in given.items() if name != "mm_encoder_outputs"}
    encoded.pooler_output = torch.stack(new) if isinstance(encoded.pooler_output, Tensor) else new
    return given


def _fewer_in_all(model: PreTrainedModel, given: dict[str, Any], gone: int) -> dict[str, Any]:
    """Arguments of `generate` whose limits on the length of prompt and answer together count the shorter prompt."""
    config = given.get("generation_config")

    def limit(name: str) -> int | None:
        values = given.get(name), getattr(config, name, None), getattr(model.generation_config, name, None)
        return next((value for value in values if value is not None), None)

    names = ("min_length",) if limit("max_new_tokens") is not None else ("min_length", "max_length")
    changed = {name: max(value - gone, 0) for name in names if (value := limit(name))}
    if config is None or not changed:
        return given | changed
    config = copy.deepcopy(config)
    config.update(**changed)
    return {name: value for name, value in given.items() if name not in changed} | {"generation_config": config}


def _attach(model: PreTrainedModel) -> list[Callable[[], None]]:
    return [
        # Before all others: the prompt that these see is the shorter one.
        model.register_forward_pre_hook(uncompiled(_before), with_kwargs=True, prepend=True).remove,
        around_generate(model, _around_generate, outermost=True),
        listen_to(model),
    ]


compress_visual_tokens = Switch(_NAME, settings=_settings, attach=_attach)
