"""Tokens that are alike, put together: K-Means under cosine similarity, in batches, and weighted means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["best_members", "merge", "spherical_kmeans"]


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


def best_members(assignment: Tensor, scores: Tensor, clusters: int) -> Tensor:
    """The member of each cluster with the highest score, `[B, M]`."""
    outside = F.one_hot(assignment, clusters).transpose(1, 2) == 0  # [B, M, R]
    return scores[:, None].masked_fill(outside, -torch.inf).argmax(2)
