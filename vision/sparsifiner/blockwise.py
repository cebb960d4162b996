"""Inference on a CPU: a part of the connectivity at a time, so that it stays in the cache and is never there whole.

What a key costs here decides which path is the faster one. The scores of a query are a weighted sum of a few rows of
the basis, which is what an embedding bag computes; the sum over gathered values is another. Choosing the keys is a
partition of numpy's. Predicting and choosing alone take longer than fused attention to all keys, at any length.
"""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vision.sparsifiner.predictor import ConnectivityPredictor, kth_largest, top_k_mask

__all__ = ["blockwise_attention"]

_SCORES_AT_ONCE = 2**18  # one MiB in fp32; that many ones can be counted in it
_NEVER = -1e30


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    predictor: ConnectivityPredictor,
    budget: int,
    scale: float,
    gather: bool,
    kept: Tensor | None = None,
) -> Tensor:
    """Attention of each query to the `budget` keys that score highest, of the class token to all.

    Args:
        q: `[B, heads, N, d]`, fp32 or fp64, on the CPU, without gradients.
        k: `[B, heads, N, d]`.
        v: `[B, heads, N, d]`.
        predictor: gives the scores; with `coef_top_k`.
        budget: keys per query.
        scale: factor on the products of queries and keys.
        gather: multiply with the chosen keys only, rather than with all and mask.
        kept: bool, `[B, N]`: tokens that may be keys; None for all.

    Returns:
        `[B, heads, N, d]`, in the memory of a contiguous `[B, N, heads, d]`.
    """
    B, heads, N, d = q.shape
    out = q.new_empty(B, N, heads, d).transpose(1, 2)
    basis = predictor.basis().contiguous()
    attend = _gathered if gather else _masked
    heads_at_once = max(_SCORES_AT_ONCE // N**2, 1)
    rows_at_once = max(_SCORES_AT_ONCE // N, 1)
    for i in range(B):
        of_image = None if kept is None else kept[i]
        for h in range(0, heads, heads_at_once):
            q_, k_, v_, out_ = (x[i, h : h + heads_at_once] for x in (q, k, v, out))
            query_map = predictor.query_map(k_, of_image)
            for row in range(0, N, rows_at_once):
                rows = slice(row, row + rows_at_once)
                score = partial(_scores, q_[:, rows], query_map, basis, predictor.coef_top_k, of_image, rows)
                attend(q_[:, rows], k_, v_, score, budget, scale, row == 0, out_[:, rows])
    return out


def _scores(
    q: Tensor,
    query_map: tuple[Tensor, Tensor],
    basis: Tensor,
    coef_top_k: int,
    kept: Tensor | None,
    rows: slice,
) -> Tensor:
    """Connectivity scores of a few queries, `[heads, R, d]` → `[heads, R, N]`."""
    weight, offset = query_map
    logits = torch.baddbmm(offset, q, weight)  # [heads, R, rank]
    if kept is not None:
        logits *= kept[rows, None]
    index, flat = _top_k_index(logits, min(coef_top_k, logits.shape[-1]))
    coef = logits.softmax(-1).view(-1)[flat].view(-1, index.shape[-1])
    scores = F.embedding_bag(index.view(coef.shape), basis, mode="sum", per_sample_weights=coef)
    scores = scores.view(*logits.shape[:2], -1)
    return scores if kept is None else scores.masked_fill_(~kept, -torch.inf)


def _top_k_index(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where the k largest entries of each row are, ascending: `[heads, R, N]` → `[heads, R, k]`, int64.

    Also where they are in the flattened `x`, `[heads * R * k]`.
    """
    heads, R, N = x.shape
    flat = torch.from_numpy(np.flatnonzero(top_k_mask(x, k).numpy()))
    first = torch.arange(0, heads * R * N, N).view(heads, R, 1)  # subtracting is quicker than a remainder
    return flat.view(heads, R, k) - first, flat


def _bias(score: Callable[[], Tensor], budget: int) -> Tensor:
    """What a fused kernel takes as a mask: 0 for the keys to attend to, for others as good as minus infinity."""
    bias = score()
    torch.ge(bias, kth_largest(bias, budget), out=bias)  # in place, so that it stays in the cache
    if int(bias.sum()) * bias.shape[-1] != budget * bias.numel():  # ties
        bias = top_k_mask(score(), budget).to(bias.dtype)
    return torch.add(bias.new_tensor(_NEVER), bias, alpha=-_NEVER, out=bias)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[[], Tensor],
    budget: int,
    scale: float,
    with_class: bool,
    out: Tensor,
) -> None:
    """`[heads, R, d]` by `[heads, N, d]` → `out`, `[heads, R, d]`, by way of all products."""
    bias = _bias(score, budget)
    if with_class:
        bias[:, 0] = 0.0
    out.copy_(F.scaled_dot_product_attention(q[None], k[None], v[None], bias[None], scale=scale)[0])


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[[], Tensor],
    budget: int,
    scale: float,
    with_class: bool,
    out: Tensor,
) -> None:
    """The same by way of the products with chosen keys alone."""
    heads, R, _ = q.shape
    index, _ = _top_k_index(score(), budget)
    first = torch.arange(0, R * budget + 1, budget)
    for head in range(heads):
        keys, values = k[head].contiguous(), v[head].contiguous()
        logits = _products(q[head].contiguous(), keys, first, index[head].reshape(-1), scale).view(R, budget)
        attn = logits.softmax(-1)
        out[head] = F.embedding_bag(index[head], values, mode="sum", per_sample_weights=attn)
    if with_class:
        out[:, :1] = F.scaled_dot_product_attention(q[None, :, :1], k[None], v[None], scale=scale)[0]


def _products(q: Tensor, k: Tensor, first: Tensor, index: Tensor, scale: float) -> Tensor:
    """Products of queries `[R, d]` with some of the keys `[N, d]` each, named by a compressed sparse matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            first, index, q.new_zeros(len(index)), (len(q), len(k)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, q, k.T, beta=0.0, alpha=scale).values()
