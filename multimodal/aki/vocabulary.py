"""Embedding and output layer of a language model whose vocabulary grew by a few tokens with tables of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ExtendedEmbedding", "ExtendedHead"]


class ExtendedEmbedding(nn.Embedding):
    """An embedding whose ids from `num_base` on stand in a second, small table.

    Args:
        rows: Rows of the first table; those from `num_base` on are padding and not used.
        dim: Width.
        num_base: Ids of the first table.
        num_additional: Ids of the second.
        padding_idx: Id whose embedding is not trained.
    """

    def __init__(self, rows: int, dim: int, num_base: int, num_additional: int, padding_idx: int | None = None) -> None:
        super().__init__(rows, dim, padding_idx)
        self.num_base = num_base
        self.additional_embedding = nn.Embedding(num_additional, dim)

    def forward(self, input: Tensor) -> Tensor:
        """Embeds ids `(…)` as `(…, C)`."""
        is_additional = input >= self.num_base
        base = super().forward(input.masked_fill(is_additional, 0))
        additional = self.additional_embedding((input - self.num_base).clamp_min(0))
        return torch.where(is_additional[..., None], additional.to(base.device), base)


class ExtendedHead(nn.Linear):
    """An output layer with logits of a second, small table after the first `num_base` of its own.

    Args:
        dim: Width.
        rows: Rows of the first table; the logits of those from `num_base` on are left out.
        num_base: Logits of the first table.
        num_additional: Logits of the second.
    """

    def __init__(self, dim: int, rows: int, num_base: int, num_additional: int) -> None:
        super().__init__(dim, rows)
        self.num_base = num_base
        self.additional_fc = nn.Linear(dim, num_additional)

    def forward(self, input: Tensor) -> Tensor:
        """Logits `(…, num_base + num_additional)` of states `(…, C)`."""
        base = super().forward(input)[..., : self.num_base]
        return torch.cat((base, self.additional_fc(input).to(base.device)), dim=-1)
