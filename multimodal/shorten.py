"""A batch of prompts with fewer tokens: ids, masks, token types, positions and labels lose the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import VisualLayout

__all__ = ["Positions", "Shorter", "shorten"]

Positions = Literal["consecutive", "source"]


@dataclass(frozen=True)
class Shorter:
    """Which tokens of a batch of prompts stay.

    Attributes:
        columns: Where in its row of the prompt each token comes from, `[B, L']`; some column of it where there is none.
        valid: Where there is one, `[B, L']` bool; padding elsewhere.
        gone: How many tokens of its row went before each token of the prompt, `[B, L]`.
    """

    columns: Tensor
    valid: Tensor
    gone: Tensor

    @classmethod
    def of(cls, stays: Tensor, valid: Tensor) -> Shorter:
        """Rows close up, and are padded again to the longest: on the right where they were so, else on the left.

        Args:
            stays: The tokens that stay, `[B, L]` bool.
            valid: What is not padding, `[B, L]` bool.
        """
        if stays.all():  # nothing closes up, not even where all rows are padded
            columns = torch.arange(stays.shape[1], device=stays.device).expand(stays.shape)
            return cls(columns, valid, torch.zeros_like(columns))
        kept = stays & valid
        lengths = kept.sum(1)
        longest, right = int(lengths.max()), not bool(valid[:, -1].all())
        order = kept.to(torch.int8).argsort(dim=1, stable=True, descending=right)  # [B, L]
        columns = order[:, :longest] if right else order[:, order.shape[1] - longest :]
        gone = (valid & ~stays).cumsum(1)
        return cls(columns, kept.gather(1, columns), gone)

    def take(self, tokens: Tensor, fill: int) -> Tensor:
        """`[B, L]` or `[K, B, L]` of the tokens that stay; padding is filled."""
        tokens = tokens.expand(*tokens.shape[:-2], *self.gone.shape)
        columns, valid = self.columns.to(tokens.device), self.valid.to(tokens.device)
        return tokens.gather(-1, columns.expand(*tokens.shape[:-1], -1)).masked_fill(~valid, fill)


def shorten(
    model: Any, inputs: dict[str, Any], layout: VisualLayout, shorter: Shorter, positions: Positions, cached: int
) -> dict[str, Any]:
    """Inputs of a model without the tokens that go; what is not of a token stays as it is.

    Args:
        model: The model.
        inputs: Of its forward or of `generate`, by name.
        layout: Of `input_ids`.
        shorter: The tokens that stay.
        positions: Whether positions `[B, L]` close up or stay as they are. Rotary positions in three dimensions
            `[3, B, L]` stay; of `[4, B, L]`, which has those of text in front, these close up.
        cached: How many tokens are in the cache, before those of the inputs.

    Raises:
        ValueError: If positions are needed and cannot be found.
    """
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError("logits_to_keep holds places in the whole prompt, which gets shorter; give a number of them")
    changed = dict(inputs)
    changed["input_ids"] = shorter.take(inputs["input_ids"], _pad_id(model))
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"][:, :1]).expand(-1, cached + shorter.gone.shape[1])
    changed["attention_mask"] = torch.cat([mask[:, :cached], shorter.take(mask[:, cached:], 0)], 1)
    for name, fill in (("token_type_ids", 0), ("mm_token_type_ids", 0), ("labels", -100)):
        if inputs.get(name) is not None:
            changed[name] = shorter.take(inputs[name], fill)
    if (whole := _whole_positions(model, inputs, layout, positions, cached)) is not None:
        changed["position_ids"] = _closed_up(whole, shorter, positions)
        _tell_deltas(model, changed)
    return changed


def _pad_id(model: Any) -> int:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _whole_positions(
    model: Any, inputs: dict[str, Any], layout: VisualLayout, positions: Positions, cached: int
) -> Tensor | None:
    """Positions of the whole prompt where the shorter one's have to be made of them; None where the model counts."""
    if inputs.get("position_ids") is not None:
        return inputs["position_ids"]
    if hasattr(model.base_model, "get_rope_index"):
        if cached:
            raise ValueError(
                "a picture that follows tokens in the cache gets its positions from position_ids; give them"
            )
        names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
        known = {"mm_token_type_ids": layout.image.int()} | {n: inputs[n] for n in names if inputs.get(n) is not None}
        return model.base_model.get_rope_index(inputs["input_ids"], **known)[0]
    if positions == "consecutive":
        return None
    return (layout.valid.cumsum(1) - 1).clamp(min=0) + cached


def _closed_up(whole: Tensor, shorter: Shorter, positions: Positions) -> Tensor:
    gone = shorter.gone.to(whole.device)
    if whole.ndim == 3 and whole.shape[0] == 4:
        gone = F.pad(gone[None], (0, 0, 0, 0, 0, 3))  # of the first alone
    elif whole.ndim == 3 or positions == "source":
        gone = torch.zeros_like(gone)
    return shorter.take((whole - gone).clamp(min=0), 0)


def _tell_deltas(model: Any, changed: dict[str, Any]) -> None:
    """Tells Qwen-VL where text goes on after the shorter prompt, as its own forward does after a whole one."""
    if hasattr(model.base_model, "rope_deltas"):
        following = changed["position_ids"][-3:].amax((0, 2))[:, None] + 1  # [B, 1]
        model.base_model.rope_deltas = following - changed["attention_mask"].sum(1, keepdim=True)
