"""The connector of AKI: a Perceiver resampler, from any number of image features to a fixed number of vision tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["PerceiverAttention", "PerceiverResampler"]


class PerceiverAttention(nn.Module):
    """Latents attend to the image features and to themselves.

    Args:
        dim: Width of features and latents.
        num_heads: Attention heads.
        head_dim: Width of a head.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * num_heads * head_dim, bias=False)  # keys, then values
        self.to_out = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """What the latents gather, without the residual.

        Args:
            features: `(N, P, C)`.
            latents: `(N, V, C)`.

        Returns:
            `(N, V, C)`.
        """
        latents = self.norm_latents(latents)
        seen = torch.cat((self.norm_media(features), latents), dim=1)  # [N, P + V, C]
        keys, values = self.to_kv(seen).chunk(2, dim=-1)
        query, keys, values = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (self.to_q(latents), keys, values)
        )
        gathered = scaled_dot_product_attention(query, keys, values)  # [N, h, V, d]
        return self.to_out(gathered.transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    """Learned latents that read the image features layer by layer and are then projected to the language model's width.

    Features carry no positions here: what the vision tower has put into them must do.

    Args:
        dim: Width of the image features and the latents.
        out_dim: Width of the language model.
        num_latents: Vision tokens for each picture.
        depth: Layers.
        num_heads: Attention heads of a layer.
        head_dim: Width of a head.
        ff_mult: Width of the feed-forward layers, in multiples of `dim`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_latents: int = 144,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(dim, num_heads, head_dim), _feed_forward(dim, ff_mult)))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Vision tokens of each picture.

        Args:
            features: `(N, P, C)`: P features of N pictures.

        Returns:
            `(N, V, out_dim)`.
        """
        latents = self.latents.to(features.dtype).expand(len(features), -1, -1)  # [N, V, C]
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            latents = latents + attention(features, latents)
            latents = latents + feed_forward(latents)
        return self.projection(self.norm(latents))


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, mult * dim, bias=False), nn.GELU(), nn.Linear(mult * dim, dim, bias=False)
    )
