"""Attention to predicted keys only: masked, which any device does well, or gathered, which multiplies nothing else."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision.attention import AttentionTap, attend
from vision.inference import is_eager_cpu_inference
from vision.sparsifiner.blockwise import blockwise_attention
from vision.sparsifiner.predictor import ConnectivityPredictor, top_k_mask

__all__ = [
    "AttentionPath",
    "Connectivity",
    "SparsifinerAttention",
    "connectivity",
    "gathered_attention",
    "record_connectivity",
]

AttentionPath = Literal["auto", "masked", "gather", "dense"]
"""How a `SparsifinerAttention` computes: `masked` and `gather` give the same; `dense` attends to all keys."""


class Connectivity(NamedTuple):
    """What one layer predicted and did with it, kept by `record_connectivity`; part of the autograd graph."""

    coef: Tensor
    """`[B, heads, N - 1, rank]`: coefficients of the basis, for all queries but the class token."""
    scores: Tensor
    """`[B, heads, N - 1, N]`: the connectivity scores, by which keys are chosen."""
    mask: Tensor
    """`[B, heads, N, N]`, bool: who attends to whom; row 0, the class token's, is all ones."""
    logits: Tensor
    """`[B, heads, N, N]`: scaled products of all queries and keys."""
    attn: Tensor
    """`[B, heads, N, N]`: the attention applied; rows sum to 1, or to 0 where a query has no key."""

    @property
    def dense_attn(self) -> Tensor:
        """`[B, heads, N, N]`: what the attention would be to all keys."""
        return self.logits.softmax(-1)


class _Recorder:
    """Where the layers put what they predicted."""

    def __init__(self, reconstruct: bool) -> None:
        self.layers: list[Connectivity] = []
        self.reconstruct = reconstruct


@contextmanager
def record_connectivity(model: nn.Module, reconstruct: bool = False) -> Iterator[list[Connectivity]]:
    """Keeps the connectivity of every layer, as long as the context lasts.

    Inside it all layers compute step by step and keep several `[B, heads, N, N]`. A compiled network has to be
    recorded before it is compiled.

    Args:
        model: a network with `SparsifinerAttention` in it.
        reconstruct: predict without any sparsity, and attend to all keys: how the predictor is trained to reconstruct
            a teacher's attention.

    Yields:
        One entry per layer and call, in the order of the calls. Empty until the model runs.

    Raises:
        ValueError: there is no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, SparsifinerAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SparsifinerAttention whose connectivity could be recorded.")
    before = [layer.recorder for layer in layers]
    recorder = _Recorder(reconstruct)
    try:
        for layer in layers:
            layer.recorder = recorder
        yield recorder.layers
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.recorder = value


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float, drop: float = 0.0) -> Tensor:
    """Attention of each query to a few keys of its own; no product with another key is computed.

    Args:
        q: `[B, heads, Nq, d]`.
        k: `[B, heads, N, d]`.
        v: `[B, heads, N, d]`.
        index: int64, `[B, heads, Nq, b]`: which keys each query attends to; each at most once.
        scale: factor on the scores.
        drop: rate of dropout on the attention.

    Returns:
        `[B, heads, Nq, d]`. Memory O(Nq * b * d) per head.
    """
    B, heads, Nq, b = index.shape
    rows = index.reshape(B, heads, Nq * b, 1).expand(-1, -1, -1, q.shape[-1])
    near_k, near_v = (t.gather(2, rows).reshape(B, heads, Nq, b, -1) for t in (k, v))
    attn = (near_k @ q.unsqueeze(-1)).squeeze(-1) * scale  # [B, heads, Nq, b]
    attn = F.dropout(attn.softmax(-1), drop) if drop else attn.softmax(-1)
    return (attn.unsqueeze(-2) @ near_v).squeeze(-2)


class SparsifinerAttention(nn.Module):
    """Multi-head attention in which each query attends only to the keys that its connectivity predictor chose.

    The class token, the first of all, attends to everything. Scores choose keys and do nothing else: their values never
    enter the attention, and no gradient reaches the predictor from the output (in training it gets zeros, so that
    wrappers which wait for a gradient of every parameter are served). Only `vision.sparsifiner.SparsifinerCriterion`
    trains it.

    Args:
        dim: width C.
        num_heads: number of heads.
        num_tokens: N, the class token included.
        qkv_bias: bias on queries, keys and values.
        keep_rate: share of keys per query; the budget is `ceil(keep_rate * num_tokens)`.
        score_threshold: keep the keys that score above this, however many, in place of a budget; None for the budget.
        attn_drop: dropout on the attention (the authors' code takes the rate and never applies it).
        proj_drop: dropout after the last projection.
        attention_path: 'masked' multiplies all and masks; 'gather' multiplies what is kept; 'auto' takes the faster;
            'dense' ignores the predictor.
        prune_query_rows: queries of pruned tokens attend to nothing, rather than with a zero query.
        **predictor: arguments of `ConnectivityPredictor`.

    Raises:
        ValueError: `dim` does not divide by `num_heads`, a keep rate outside (0, 1], an unknown path, or a path that
            needs a budget where there is none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_tokens: int = 197,
        qkv_bias: bool = False,
        keep_rate: float = 0.25,
        score_threshold: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attention_path: AttentionPath = "auto",
        prune_query_rows: bool = False,
        device=None,
        dtype=None,
        **predictor: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide by num_heads={num_heads}.")
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate={keep_rate} is a share of keys; expected more than 0 and at most 1.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.keep_rate = keep_rate
        self.score_threshold = score_threshold
        self.attn_drop = attn_drop
        self.prune_query_rows = prune_query_rows
        self.key_grid: tuple[int, int] = (0, 0)
        self.recorder: _Recorder | None = None
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.mask_predictor = ConnectivityPredictor(num_tokens, num_heads, self.head_dim, **predictor, **dd)
        self.tap = AttentionTap()
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.set_attention_path(attention_path)

    def set_attention_path(self, path: AttentionPath) -> None:
        """Chooses how to compute, see the class; the weights are the same for all ways."""
        if path not in get_args(AttentionPath):
            raise ValueError(f"attention_path={path!r}: expected one of {', '.join(get_args(AttentionPath))}.")
        if path == "gather" and self.score_threshold is not None:
            raise ValueError(
                "attention_path='gather' needs the same number of keys for each query, which score_threshold="
                f"{self.score_threshold} does not give; use 'masked', or keep_rate without score_threshold."
            )
        self.attention_path: AttentionPath = path

    def budget(self, num_kept: int | None = None) -> int:
        """Keys per query.

        Args:
            num_kept: patch tokens that are still there; None for all.
        """
        budget = math.ceil(self.keep_rate * self.mask_predictor.num_tokens)
        return budget if num_kept is None else min(budget, num_kept)

    def connect(self, scores: Tensor, budget: int) -> Tensor:
        """From scores `[..., N]` to the mask of chosen keys, bool of the same shape."""
        if self.score_threshold is not None:
            return scores > self.score_threshold
        return top_k_mask(scores, budget)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        kept: Tensor | None = None,
        num_kept: int | None = None,
    ) -> Tensor:
        """Attention among the tokens of each image.

        Args:
            x: `[B, N, C]`, the class token first.
            attn_mask: here because timm's networks pass it on; must be None.
            is_causal: likewise; must be False.
            kept: bool, `[B, N]`: tokens that were not pruned; None for all.
            num_kept: how many patch tokens that leaves in each image.

        Returns:
            `[B, N, C]`.

        Raises:
            ValueError: a mask, or another number of tokens than the predictor was built for.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal: the predictor alone says who attends to whom; pass neither.")
        B, N, C = x.shape
        q, k, v = self.heads(x, kept)
        if self.recorder is not None:
            x = self._recorded(q, k, v, kept, num_kept, self.recorder)
        elif self.attention_path == "dense":
            x = attend(q, k, v, self.scale, tap=self.tap, key_grid=self.key_grid)
        elif self._runs_blockwise(q):
            budget = self.budget(num_kept)
            gather = self._gathers(budget)
            x = blockwise_attention(q, k, v, self.mask_predictor, budget, self.scale, gather, kept)
            x = x * kept[:, None, :, None] if self.prune_query_rows and kept is not None else x
        elif self.attention_path == "gather" and not self.tap.is_open:
            x = self._gathered(q, k, v, kept, self.budget(num_kept))
        else:
            x = self._masked(q, k, v, self.connectivity(q, k, kept, num_kept), kept)
        x = self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))
        return x + self._no_gradient() if self.training and torch.is_grad_enabled() else x

    def heads(self, x: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[B, heads, N, d]`; 0 for tokens that are not kept."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        if kept is not None:
            qkv = qkv * kept[:, :, None, None, None]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def class_attention(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """The class token's attention to all tokens, mean over heads: `[B, N]`, from the input of `forward`."""
        B, N, C = x.shape
        (w_q, w_k, _), bias = self.qkv.weight.chunk(3), self.qkv.bias
        b_q, b_k = (None, None) if bias is None else (bias[:C], bias[C : 2 * C])
        q = F.linear(x[:, :1], w_q, b_q).reshape(B, 1, self.num_heads, -1).transpose(1, 2)
        k = F.linear(x, w_k, b_k).reshape(B, N, self.num_heads, -1).transpose(1, 2)
        if kept is not None:
            k = k * kept[:, None, :, None]
        return (q @ k.mT * self.scale).softmax(-1).mean(1).squeeze(1)

    def scores(self, q: Tensor, k: Tensor, kept: Tensor | None = None) -> Tensor:
        """Connectivity scores `[B, heads, N - 1, N]`; those of keys that are not kept are -inf."""
        predictor = self.mask_predictor
        return _without_pruned(predictor.coefficients(q, k, kept=kept) @ predictor.basis(), kept)

    def connectivity(self, q: Tensor, k: Tensor, kept: Tensor | None = None, num_kept: int | None = None) -> Tensor:
        """Who attends to whom: bool, `[B, heads, N, N]`; row 0 is the class token's."""
        with torch.no_grad():  # a choice has no gradient
            return self._with_class_row(self.connect(self.scores(q, k, kept), self.budget(num_kept)), kept)

    def _with_class_row(self, mask: Tensor, kept: Tensor | None) -> Tensor:
        mask = torch.cat((torch.ones_like(mask[:, :, :1]), mask), 2)
        return mask & kept[:, None, :, None] if self.prune_query_rows and kept is not None else mask

    def _runs_blockwise(self, q: Tensor) -> bool:
        return (
            is_eager_cpu_inference(q)
            and not self.training
            and not self.tap.is_open
            and self.score_threshold is None
            and self.mask_predictor.coef_top_k > 0
            and q.dtype in (torch.float32, torch.float64)
        )

    def _gathers(self, budget: int) -> bool:
        """Whether the keys are gathered: where nothing says so, only in inference on a CPU, with few of many keys."""
        if self.attention_path != "auto":
            return self.attention_path == "gather"
        num_tokens = self.mask_predictor.num_tokens
        return num_tokens >= 512 and 8 * budget <= num_tokens

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kept: Tensor | None) -> Tensor:
        """Attention where `mask`, `[B, heads, N, N]`, is True; 0 for a query without any key."""
        drop = self.attn_drop if self.training else 0.0
        if not self.tap.is_open and not self._may_have_no_key(kept):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=drop, scale=self.scale)
        attn = self.tap(_softmax_where(q @ k.mT * self.scale, mask), self.key_grid)
        return (F.dropout(attn, drop) if drop else attn) @ v

    def _may_have_no_key(self, kept: Tensor | None) -> bool:
        return self.score_threshold is not None or (self.prune_query_rows and kept is not None)

    def _gathered(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, budget: int) -> Tensor:
        drop = self.attn_drop if self.training else 0.0
        with torch.no_grad():
            index = self.scores(q, k, kept).topk(budget, sorted=False).indices
        first = F.scaled_dot_product_attention(q[:, :, :1], k, v, dropout_p=drop, scale=self.scale)
        x = torch.cat((first, gathered_attention(q[:, :, 1:], k, v, index, self.scale, drop)), 2)
        return x * kept[:, None, :, None] if self.prune_query_rows and kept is not None else x

    def _recorded(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, num_kept: int | None, recorder: _Recorder
    ) -> Tensor:
        """Step by step, every intermediate result kept."""
        raw = recorder.reconstruct
        coef = self.mask_predictor.coefficients(q, k, raw, kept)
        scores = _without_pruned(coef @ self.mask_predictor.basis(raw), kept)
        mask = self._with_class_row(self.connect(scores, self.budget(num_kept)), kept)
        logits = q @ k.mT * self.scale
        dense = raw or self.attention_path == "dense"
        attn = logits.softmax(-1) if dense else _softmax_where(logits, mask)
        recorder.layers.append(Connectivity(coef, scores, mask, logits, attn))
        return F.dropout(self.tap(attn, self.key_grid), self.attn_drop, self.training) @ v

    def _no_gradient(self) -> Tensor:
        """0, with a zero gradient to whatever the output does not depend on."""
        return 0.0 * torch.stack([p.sum() for p in self.mask_predictor.parameters()]).sum()


register_notrace_module(SparsifinerAttention)  # not as a decorator, whose result has no type


def _without_pruned(scores: Tensor, kept: Tensor | None) -> Tensor:
    return scores if kept is None else scores.masked_fill(~kept[:, None, None, :], -torch.inf)


def _softmax_where(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries marked; 0 elsewhere, and in rows without any."""
    empty = ~mask.any(-1, keepdim=True)
    return logits.masked_fill(~(mask | empty), -torch.inf).softmax(-1).masked_fill(empty, 0.0)


def connectivity(model: nn.Module, images: Tensor, query: tuple[int, int]) -> Tensor:
    """The keys that one patch attends to, in every block and head.

    Args:
        model: a `Sparsifiner`.
        images: normalised, `[B, C, H, W]`.
        query: row and column of the patch that asks, from 0.

    Returns:
        Bool, `[B, depth, heads, h, w]`: True for the patches that are its keys. Whether the class token is one too is
        left out.

    Raises:
        ValueError: a network without connectivity, or a query outside the grid of patches.
    """
    with record_connectivity(model) as layers:
        h, w = next(module.key_grid for module in model.modules() if isinstance(module, SparsifinerAttention))
        row, col = query
        if not (0 <= row < h and 0 <= col < w):
            raise ValueError(f"query={query}: expected a row from 0 to {h - 1} and a column from 0 to {w - 1}.")
        training = [module for module in model.modules() if module.training]
        try:
            with torch.no_grad():
                model.eval()(images)
        finally:
            for module in training:
                module.training = True
    masks = torch.stack([layer.mask[:, :, 1 + row * w + col, 1:] for layer in layers], 1)
    return masks.unflatten(-1, (h, w))
