"""VMTC as functions of features and scores: primary tokens, K-Means under cosine similarity, weighted means.

See :mod:`multimodal.vmtc` for the paper and for what of it is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Compressed", "compress", "merge", "spherical_kmeans"]


class Compressed(NamedTuple):
    """Fewer tokens of a batch of pictures.

    Attributes:
        features: Of those that are left, in the order of the picture, `[B, K, C]`.
        index: Which tokens these were, ascending, `[B, K]`; of a merged one, its highest-scoring member.
        target: Which of the `N` tokens each went into, `[B, N]`: itself, a merged one, or -1 where it was dropped.
    """

    features: Tensor
    index: Tensor
    target: Tensor


def compress(features: Tensor, scores: Tensor, num_kept: int, num_merged: int, *, rounds: int = 10) -> Compressed:
    """Keeps the tokens with the highest scores and merges the others; a batch of pictures with as many tokens each.

    Args:
        features: `[B, N, C]`. Gradients flow through what is kept and merged, not through the choice of it.
        scores: `[B, N]`, not negative.
        num_kept: Primary tokens, which stay as they are.
        num_merged: Tokens that the others are merged into; with 0 they are dropped.
        rounds: Of K-Means, at most.

    Returns:
        `num_kept + num_merged` tokens, or all that there are.
    """
    B, N = scores.shape
    if num_kept + num_merged >= N:
        index = torch.arange(N, device=features.device).expand(B, N)
        return Compressed(features, index, index)
    order = scores.argsort(dim=1, descending=True, stable=True)
    primary, others = order[:, :num_kept], order[:, num_kept:].sort(1).values  # [B, P], [B, R]
    target = torch.full_like(order, -1).scatter(1, primary, primary)
    left, index = _take(features, primary), primary
    if num_merged:
        redundant, weights = _take(features, others), scores.gather(1, others)
        assignment = spherical_kmeans(redundant.detach(), num_merged, weights, rounds=rounds)
        place = others.gather(1, _best_members(assignment, weights, num_merged))  # [B, M]
        target = target.scatter(1, others, place.gather(1, assignment))
        merged = merge(redundant, assignment, weights, num_merged)
        with torch.autocast(features.device.type, enabled=False):  # which does not know of every mixture of types
            left = torch.cat([left, merged], 1)
        index = torch.cat([primary, place], 1)
    index, by_place = index.sort(1)
    return Compressed(_take(left, by_place), index, target)


def _take(features: Tensor, index: Tensor) -> Tensor:
    rows = torch.arange(len(index), device=index.device)[:, None]
    return features[rows, index]


@torch.no_grad()
def spherical_kmeans(features: Tensor, clusters: int, scores: Tensor, *, rounds: int = 10) -> Tensor:
    """K-Means under cosine similarity, the same each time.

    It starts from the token with the highest score and goes on to the one that is least like any chosen before. A round
    that would leave a cluster empty is not made, so that there are always as many as asked for. Takes memory for the
    similarities of all pairs, `[B, R, R]`.

    Args:
        features: `[B, R, C]`.
        clusters: How many, M; at most R.
        scores: `[B, R]`.
        rounds: At most so many.

    Returns:
        Cluster of each token, `[B, R]` int64.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        alike = unit @ unit.transpose(1, 2)  # [B, R, R]
        seeds = _farthest_first(alike, clusters, scores.argmax(1))  # [B, M]
        to_seeds = alike.gather(2, seeds[:, None].expand(-1, alike.shape[1], -1))  # [B, R, M]
        order = torch.arange(clusters, device=seeds.device).expand_as(seeds)
        assignment = to_seeds.argmax(2).scatter(1, seeds, order)  # a seed's twin does not take it away
        for _ in range(rounds):
            members = F.one_hot(assignment, clusters).to(alike.dtype)  # [B, R, M]
            to_sums = alike @ members  # products with the sum of each cluster
            lengths = (members * to_sums).sum(1, keepdim=True).clamp(min=1e-12).sqrt()
            moved = (to_sums / lengths).argmax(2)
            filled = torch.zeros_like(seeds, dtype=torch.bool).scatter(1, moved, True).all(1, keepdim=True)
            moved = torch.where(filled, moved, assignment)
            if torch.equal(moved, assignment):
                break
            assignment = moved
    return assignment


def _farthest_first(alike: Tensor, clusters: int, first: Tensor) -> Tensor:
    """Tokens that are unlike each other, `[B, M]`, from similarities `[B, R, R]` and the first token `[B]`."""
    chosen, rows = [first], torch.arange(len(alike), device=alike.device)
    closest = alike[rows, first]  # to any that is chosen, [B, R]
    for _ in range(clusters - 1):
        closest = closest.scatter(1, chosen[-1][:, None], torch.inf)
        chosen.append(closest.argmin(1))
        closest = torch.maximum(closest, alike[rows, chosen[-1]])
    return torch.stack(chosen, 1)


def merge(features: Tensor, assignment: Tensor, scores: Tensor, clusters: int) -> Tensor:
    """One token for each cluster: `sum_i s_i x_i / sum_i s_i`.

    Args:
        features: `[B, R, C]`; gradients flow to them.
        assignment: Cluster of each token, `[B, R]`.
        scores: `[B, R]`, not negative. A cluster of zeros has equal weights.
        clusters: How many, M.

    Returns:
        `[B, M, C]`.
    """
    members = F.one_hot(assignment, clusters).transpose(1, 2).float()  # [B, M, R]
    weights = members * scores.float()[:, None]
    total = weights.sum(2, keepdim=True)
    weights = torch.where(total > 0, weights, members)
    with torch.autocast(features.device.type, enabled=False):
        merged = (weights / weights.sum(2, keepdim=True)) @ features.float()
    return merged.to(features.dtype)


def _best_members(assignment: Tensor, scores: Tensor, clusters: int) -> Tensor:
    """The member of each cluster with the highest score, `[B, M]`."""
    outside = F.one_hot(assignment, clusters).transpose(1, 2) == 0  # [B, M, R]
    return scores[:, None].masked_fill(outside, -torch.inf).argmax(2)
