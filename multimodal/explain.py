"""Where a vision-language model looks while it writes an answer: text-to-image attention, drawn over the picture.

:func:`attended` lets the model write a given answer again and notes what the last token read of the image tokens at
each step: layer by layer and head by head, or rolled out through the layers (Abnar and Zuidema, "Quantifying Attention
Flow in Transformers", ACL 2020, https://arxiv.org/abs/2005.00928). It is what was in fact attended to, under whatever
switches of this package are on. What a merged token of VMTC got is shared out to its members as these were merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from .draw import overlay, seen_part
from .grids import on_grids, one_grid, picture_grids, places_known
from .layout import VisualLayout, find_layout
from .recording import LastRows, Rolled, recording

__all__ = ["Attended", "attended"]


@dataclass(frozen=True)
class Attended:
    """What the tokens of an answer read of the pictures.

    Attributes:
        answer: The tokens, `[T]`; each is written by the token before it, whose attention this is.
        weights: Their attention to the image tokens, `[T, l, h, N]` float32. The sum over `N` is the share that the
            pictures get; the rest goes to text. Rolled out there is one layer, the last, and one head, the mean.
        layers, heads: Indices of the layers and heads in `weights`.
        grids: Where in their pictures the image tokens lie (:func:`multimodal.grids.picture_grids`); None where that is
            not known.
    """

    answer: Tensor
    weights: Tensor
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    grids: list[list[Tensor]] | None

    def values(self, token: int | None = None, layer: int | None = None, head: int | None = None) -> Tensor:
        """The weights of one token, layer and head; the mean over all where None is given.

        Args:
            token: Index into the answer; negative ones count from its end.
            layer, head: One of `layers`, one of `heads`.

        Returns:
            `[N]`.

        Raises:
            ValueError: If there is no such token, layer or head.
        """
        count = len(self.answer)
        if token is not None and not -count <= token < count:
            raise ValueError(f"token={token}: the answer has {count} tokens, so give one of {-count} to {count - 1}")
        chosen = self.weights if token is None else self.weights[token][None]
        for dim, name, value, known in ((1, "layer", layer, self.layers), (2, "head", head, self.heads)):
            if value is not None:
                if value not in known:
                    raise ValueError(f"{name}={value} was not recorded; recorded are {', '.join(map(str, known))}")
                chosen = chosen.narrow(dim, known.index(value), 1)
        return chosen.mean((0, 1, 2))

    def maps(self, token: int | None = None, layer: int | None = None, head: int | None = None) -> list[Tensor]:
        """The same as maps over the pictures, `[H, W]` each.

        Raises:
            ValueError: As :meth:`values` does; or where it is not known how image tokens lie in their picture.
        """
        if self.grids is None:
            raise ValueError(
                "where the image tokens of this model lie in their picture is not known; give grid=(height, width) to "
                "attended, if they lie on one, row by row. Those of a resampler lie nowhere; .weights has what each got"
            )
        values = self.values(token, layer, head)
        return [on_grids(values, grids).sum(0) for grids in self.grids]

    def draw(
        self,
        picture: Image.Image,
        index: int = 0,
        *,
        token: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        processor: Any = None,
        quantile: float = 1.0,
    ) -> Image.Image:
        """One picture with its map over it, from none to the most that any place gets.

        Args:
            picture: The picture.
            index: Which of the prompt's pictures it is.
            token, layer, head: As of :meth:`values`.
            processor: The model's processor, so that what it crops away is not drawn (LLaVA-1.5 sees the middle
                square).
            quantile: Places above this quantile all look like the most. Below 1 it keeps a few tokens that draw
                attention wherever the question is from hiding the others.

        Returns:
            RGB, as large as the picture, or larger where that is small.

        Raises:
            ValueError: As :meth:`maps` does; or if there is no such picture, or for a wrong quantile.
        """
        maps = self.maps(token, layer, head)
        if not 0 <= index < len(maps):
            raise ValueError(f"index={index}: the prompt has {len(maps)} pictures, which count from 0")
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile={quantile} must be above 0 and at most 1")
        seen = picture if processor is None else seen_part(processor, picture)
        field = maps[index]
        most = field.flatten().quantile(quantile).clamp(min=torch.finfo(field.dtype).tiny)
        return overlay(seen, (field / most).clamp(0, 1).numpy())


def attended(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    answer: Tensor | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    rollout: bool = False,
    grid: tuple[int, int] | None = None,
) -> Attended:
    """What the tokens of an answer read of the pictures in their prompt, under the switches that are on.

    The answer is written again, token by token and with a cache, as `generate` does. No attention matrix is held: of
    each layer the scores of one row (with `rollout` of a chunk of rows, at most 64 MiB at once). What is kept is
    `4 * T * l * h * N` bytes for `T` tokens, or with `rollout` `4 * l * (L + T) * N` while it runs, for `l` layers of
    `h` heads and a prompt of `L` tokens, `N` of them image tokens.

    Args:
        model: A vision-language model of a supported family, with an attention implementation of `eager`, `sdpa` or
            `flex_attention`.
        inputs: Of one prompt, as the model's processor makes them.
        answer: Tokens of the answer, with the prompt before them or without; what comes after an end marker is left
            out. None asks the model: `model.generate(**inputs)`.
        layers: Indices of the layers that are recorded, or rolled through; negative ones count from the last. All by
            default.
        heads: Likewise of the heads.
        rollout: Through the layers, `R_l = (A_l + I) / 2 · R_(l-1)` with `A_l` the mean over heads: what reaches the
            last layer of an image token, also by way of other tokens.
        grid: Height and width of each picture in tokens, for a family whose grids are not known.

    Raises:
        TypeError: For a model of no supported family, or one that was compiled.
        ValueError: For inputs of several prompts or of none with a picture, an empty answer, wrong layers, heads or
            grid, or an attention implementation without scores (FlashAttention).
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or len(ids) != 1:
        found = "none" if ids is None else f"a shape of {tuple(ids.shape)}"
        raise ValueError(f"inputs need input_ids of one prompt, [1, L], but have {found}; give one prompt at a time")
    layout = find_layout(model, ids, inputs.get("attention_mask"))
    if not layout.image.any():
        raise ValueError("no image token is in input_ids, so there is nothing to look at; give a prompt with a picture")
    config = model.get_decoder().config
    chosen = _chosen("layers", layers, config.num_hidden_layers), _chosen("heads", heads, config.num_attention_heads)
    grids = _grids(model, inputs, layout, grid)
    with torch.no_grad():
        tokens = _answer(model, inputs, ids[0], answer)
        record = (Rolled if rollout else LastRows)(*chosen)
        forced = _Forced(tokens)
        with recording(model, record):
            plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
            plain |= dict.fromkeys(("temperature", "top_p", "top_k"))  # transformers says where they are not used
            generate: Any = model.generate
            generate(**inputs, logits_processor=[forced], max_new_tokens=len(tokens), **plain)
    weights = record.weights()
    if rollout:
        chosen = chosen[0][-1:], (0,)
    return Attended(tokens[: len(weights)].cpu(), weights @ record.shares, *chosen, grids)


def _grids(
    model: PreTrainedModel, inputs: Mapping[str, Any], layout: VisualLayout, grid: tuple[int, int] | None
) -> list[list[Tensor]] | None:
    if grid is not None:
        return one_grid(*grid, layout)
    return picture_grids(model, inputs, layout) if places_known(model) else None


def _chosen(name: str, chosen: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Indices from 0 on, ascending."""
    chosen = range(count) if chosen is None else chosen
    if not len(chosen) or any(not -count <= index < count for index in chosen):
        raise ValueError(f"{name}={list(chosen)} must be some of 0 to {count - 1}, or of {-count} to -1")
    return tuple(sorted({index % count for index in chosen}))


def _answer(model: Any, inputs: Mapping[str, Any], prompt: Tensor, answer: Tensor | Sequence[int] | None) -> Tensor:
    """The tokens of an answer `[T]`, without the prompt."""
    tokens = model.generate(**inputs)[0] if answer is None else torch.as_tensor(answer, device=prompt.device).flatten()
    if torch.equal(tokens[: len(prompt)], prompt):
        tokens = tokens[len(prompt) :]
    if not len(tokens):
        raise ValueError("the answer has no token; give one with at least one, or None to ask the model")
    return tokens


class _Forced(LogitsProcessor):
    """Lets `generate` write given tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = iter(tokens.tolist())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0
        return forced
