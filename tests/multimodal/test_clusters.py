"""Compression of image tokens as functions: against loops, properties of K-Means, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.clusters import compress, merge, spherical_kmeans


def tokens(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return features, torch.rand(shape[:-1], generator=generator, dtype=torch.float64)


def test_primary_tokens_stay_and_others_are_merged_as_loops_do_it():
    features, scores = tokens(3, 20, 5)
    features = features.float()
    left, index, target = compress(features, scores, 6, 3)
    assert left.shape == (3, 9, 5) and index.shape == (3, 9)
    for row in range(3):
        best = sorted(range(20), key=lambda i: -float(scores[row, i]))[:6]
        assert [int(target[row, i]) for i in best] == best
        assert index[row].tolist() == sorted(set(target[row].tolist()))
        for place, feature in zip(index[row].tolist(), left[row], strict=True):
            members = [i for i in range(20) if target[row, i] == place]
            assert place == max(members, key=lambda i: float(scores[row, i]))
            mean = sum(scores[row, i] * features[row, i] for i in members) / sum(scores[row, i] for i in members)
            if place in best:
                assert members == [place] and torch.equal(feature, features[row, place])
            torch.testing.assert_close(feature, mean.float(), rtol=1e-5, atol=1e-5)


def test_tokens_end_where_their_cluster_is_most_like_them():
    features, scores = tokens(2, 40, 6)
    assignment = spherical_kmeans(features, 5, scores, rounds=100)
    unit = F.normalize(features.float(), dim=-1)
    for row in range(2):
        centres = torch.stack([unit[row, assignment[row] == k].sum(0) for k in range(5)])
        assert torch.equal((unit[row] @ F.normalize(centres, dim=-1).T).argmax(1), assignment[row])


def test_it_starts_from_the_best_token_and_goes_on_to_the_least_like_any():
    features, scores = tokens(1, 30, 4)
    unit = F.normalize(features[0], dim=-1)
    seeds = [int(scores[0].argmax())]
    while len(seeds) < 6:
        seeds.append(min(range(30), key=lambda i: max(float(unit[i] @ unit[s]) for s in seeds)))
    assignment = spherical_kmeans(features, 6, scores, rounds=0)
    assert assignment[0, seeds].tolist() == list(range(6))
    nearest = (unit @ unit[seeds].T).argmax(1)
    assert torch.equal(assignment[0], nearest)


def test_groups_far_apart_are_found_whatever_their_length():
    directions = torch.eye(4).repeat_interleave(5, 0)[None]
    noise, scores = tokens(1, 20, 4)
    features = directions * torch.arange(1, 21).view(1, 20, 1) + 0.05 * noise
    assignment = spherical_kmeans(features, 4, scores)[0].view(4, 5)
    assert all(len(set(group.tolist())) == 1 for group in assignment) and len(set(assignment[:, 0].tolist())) == 4


def test_no_cluster_is_empty_even_of_twins():
    features = torch.ones(2, 7, 3)
    features[1] = tokens(7, 3)[0]
    for clusters in range(1, 8):
        for rounds in (0, 10):
            assignment = spherical_kmeans(features, clusters, torch.rand(2, 7), rounds=rounds)
            assert all(row.unique().numel() == clusters for row in assignment)


def test_a_picture_is_compressed_the_same_alone_in_a_batch_and_again():
    features, scores = tokens(4, 24, 8)
    together = compress(features, scores, 5, 4)
    again = compress(features, scores, 5, 4)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for row in range(4):
        alone = compress(features[row : row + 1], scores[row : row + 1], 5, 4)
        assert torch.equal(alone.index[0], together.index[row]) and torch.equal(alone.target[0], together.target[row])
        torch.testing.assert_close(alone.features[0], together.features[row])


@pytest.mark.parametrize("kept, merged", [(6, 0), (5, 1), (6, 3)])
def test_all_tokens_are_the_tokens_themselves(kept: int, merged: int):
    features, scores = tokens(2, 6, 4)
    left, index, target = compress(features, scores, kept, merged)
    assert torch.equal(left, features) and torch.equal(index, target) and index[1].tolist() == list(range(6))


def test_without_clusters_the_rest_is_dropped_and_without_primary_ones_all_are_merged():
    features, scores = tokens(1, 8, 4)
    dropped, merged = compress(features, scores, 3, 0), compress(features, scores, 0, 1)
    assert (dropped.target == -1).sum() == 5 and torch.equal(dropped.features[0], features[0, dropped.index[0]])
    assert merged.index.tolist() == [[int(scores.argmax())]]
    expected = (scores[..., None] * features).sum(1) / scores.sum()
    torch.testing.assert_close(merged.features[0], expected, rtol=1e-5, atol=1e-6)


def test_a_cluster_of_zeros_is_a_plain_mean():
    features, _ = tokens(1, 4, 3)
    mean = merge(features, torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0.0, 0.0, 0.0, 2.0]]), 2)
    torch.testing.assert_close(mean[0], torch.stack([features[0, :2].mean(0), features[0, 3]]), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_weighted_means():
    features, scores = tokens(1, 9, 3)
    features = features.float().requires_grad_()
    left, index, target = compress(features, scores, 2, 2)
    left.sum().backward()
    share = torch.tensor(
        [float(scores[0, i] / scores[0, target[0] == target[0, i]].sum()) for i in range(9)]
    )  # of a token in what it went into
    torch.testing.assert_close(features.grad, share[None, :, None].expand(1, 9, 3))
    assert index.shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_chooses_as_single_precision_does(dtype: torch.dtype):
    features, scores = tokens(1, 16, 4)
    half = features.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, index, target = compress(half, scores, 4, 3)
    exact = compress(half.float(), scores, 4, 3)
    assert left.dtype == dtype and torch.equal(index, exact.index) and torch.equal(target, exact.target)
    torch.testing.assert_close(left, exact.features.to(dtype))
