"""The two attentions of DCAL, their blocks, and what is chosen for them; see the package's text."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import register_notrace_function
from timm.models.vision_transformer import Block
from torch import Tensor

from vision.inference import is_eager_cpu_inference
from vision.rollout import rollout_row

__all__ = [
    "DCALBlock",
    "GLCABlock",
    "GlobalLocalCrossAttention",
    "PairWiseCrossAttention",
    "fused_logits",
    "local_rows",
    "random_partners",
]


def _attend(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, heads, N, d]` each to the same, by timm's two paths."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale)
    return attn.attn_drop((q * attn.scale @ k.mT).softmax(-1)) @ v


def _project_out(attn: Attention, x: Tensor, source: Tensor) -> Tensor:
    """What timm's attention does behind the product: `[B, heads, N, d]` → `[B, N, C]`."""
    x = attn.norm(x.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        x = x * attn.gate(source).sigmoid()
    return attn.proj_drop(attn.proj(x))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """The tokens `rows` `[B, K]` of `[B, N, C]`, `[B, K, C]`."""
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class PairWiseCrossAttention(Attention):
    """Self-attention with a distractor: keys and values of another image beside one's own.

    `softmax(q1 [k1; k2]ᵀ / √d) [v1; v2]`, one softmax over both. It has no weights beyond those of timm's `Attention`,
    and without a partner it is that. Where the partner is the image itself it is that as well.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, partner: Tensor | None = None
    ) -> Tensor:
        """Attention over tokens.

        Args:
            x: `[B, N, C]`.
            attn_mask: as timm's, without partner only.
            is_causal: as timm's, without partner only.
            partner: `[B]`, for each image the index in the batch of the other one; None for self-attention.

        Returns:
            `[B, N, C]`.
        """
        if partner is None:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self._qkv(x)
        k, v = torch.cat((k, k[partner]), dim=2), torch.cat((v, v[partner]), dim=2)  # [B, heads, 2 N, d]
        return _project_out(self, _attend(self, q, k, v), x)

    def forward_with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention, and its map averaged over heads, `[B, N, N]`, which is no part of the graph."""
        q, k, v = self._qkv(x)
        if torch.is_grad_enabled() and self.fused_attn:  # a map of each head would be kept for the backward pass
            mean = (q.detach() * self.scale @ k.detach().mT).softmax(-1).mean(1)
            return _project_out(self, _attend(self, q, k, v), x), mean
        if self.fused_attn and not self.training and is_eager_cpu_inference(x):
            out, mean = self._head_by_head(q, k, v)
        else:
            attn = (q * self.scale @ k.mT).softmax(-1)
            out, mean = self.attn_drop(attn) @ v, attn.detach().mean(1)
        return _project_out(self, out, x), mean

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, heads, N, d] each
        return self.q_norm(q), self.k_norm(k), v

    def _head_by_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same by two buffers that fit into a CPU's cache, where a whole image's maps would not."""
        B, heads, N, d = q.shape
        out = q.new_empty(B, N, heads, d).transpose(1, 2)
        mean = q.new_zeros(B, N, N)
        scores, attn = q.new_empty(2, N, N)
        for b in range(B):
            for h in range(heads):
                torch.mm(q[b, h] * self.scale, k[b, h].T, out=scores)
                torch.softmax(scores, -1, out=attn)
                torch.mm(attn, v[b, h], out=out[b, h])
                mean[b].add_(attn, alpha=1 / heads)
        return out, mean


class GlobalLocalCrossAttention(Attention):
    """A few rows of self-attention: chosen tokens ask, all tokens answer.

    `softmax(q_local kᵀ / √d) v`. The weights are laid out as in timm's `Attention`; queries of other tokens are not
    computed.
    """

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Attention of some tokens.

        Args:
            x: `[B, N, C]`.
            rows: `[B, K]`, indices of the tokens that ask.

        Returns:
            `[B, K, C]`, in the order of `rows`.
        """
        chosen = _gather(x, rows)
        split = [self.attn_dim, 2 * self.attn_dim]
        weight_q, weight_kv = self.qkv.weight.split(split)
        bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split(split)
        q = F.linear(chosen, weight_q, bias_q).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        kv = F.linear(x, weight_kv, bias_kv).unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)  # [B, heads, N, d] each
        return _project_out(self, _attend(self, self.q_norm(q), self.k_norm(k), v), chosen)


class DCALBlock(Block):
    """timm's pre-norm block; its attention is a `PairWiseCrossAttention`."""

    attn: PairWiseCrossAttention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, partner: Tensor | None = None
    ) -> Tensor:
        """`[B, N, C]` → `[B, N, C]`; arguments as `PairWiseCrossAttention`."""
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, partner=partner)
        return self._residuals(x, y)

    def forward_with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, N, C]` → `[B, N, C]` and the head-averaged attention `[B, N, N]`."""
        y, attn = self.attn.forward_with_map(self.norm1(x))
        return self._residuals(x, y), attn

    def _residuals(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class GLCABlock(Block):
    """timm's pre-norm block; its attention is a `GlobalLocalCrossAttention`, so that only chosen tokens come out."""

    attn: GlobalLocalCrossAttention

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """`[B, N, C]` and indices `[B, K]` → `[B, K, C]`."""
        y = self.attn(self.norm1(x), rows)
        x = _gather(x, rows) + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@torch.fx.wrap
@register_notrace_function
def local_rows(maps: Sequence[Tensor], ratio: float, num_prefix_tokens: int = 1) -> Tensor:
    """The tokens that GLCA asks for: the class token and the patches with the highest rollout.

    Args:
        maps: attention of each layer, the oldest first, `[B, N, N]` or `[B, h, N, N]`.
        ratio: R of the paper, share of the patches; rounded down.
        num_prefix_tokens: class and register tokens in front of the patches.

    Returns:
        `[B, 1 + ⌊R (N - num_prefix_tokens)⌋]`: 0, then the patches' rows in ascending order.
    """
    reached = rollout_row(maps)[:, num_prefix_tokens:]
    count = int(ratio * reached.shape[1] + 1e-6)  # 0.29 * 100 is a little less than 29
    patches = reached.topk(count).indices.sort().values + num_prefix_tokens
    return F.pad(patches, (1, 0))


def random_partners(batch_size: int, device: torch.device | None = None) -> Tensor:
    """A random pairing in which no image is its own partner, unless it is alone.

    Args:
        batch_size: B.
        device: of the result.

    Returns:
        `[B]`, a permutation that is one cycle.
    """
    order = torch.randperm(batch_size, device=device)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def fused_logits(sa: Tensor, glca: Tensor) -> Tensor:
    """Logits whose softmax is the mean of two classifiers' probabilities, which the paper adds.

    Args:
        sa: `[B, num_classes]`.
        glca: `[B, num_classes]`.

    Returns:
        `[B, num_classes]`, log-probabilities.
    """
    return torch.logaddexp(sa.log_softmax(-1), glca.log_softmax(-1)) - math.log(2)
