"""Losses on attention maps: closed forms, the papers' formulas spelt out slowly, gradients, and what they lead to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline
from torch import Tensor

from diffusion.losses import (
    attend_and_excite_loss,
    conform_loss,
    divide_and_bind_loss,
    normalize_maps,
    retention_loss,
    retention_masks,
    segregation_loss,
)

# Rounding of sums of some hundred float32 values.
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}
GRID = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")


def random_maps(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def blob(y: float, x: float, sigma: float) -> Tensor:
    """A Gaussian on 16 × 16 pixels, 1 at its centre."""
    return torch.exp(-((GRID[0] - y) ** 2 + (GRID[1] - x) ** 2) / (2 * sigma**2))


def halves(count: int = 2) -> Tensor:
    """Maps `[1, 4, 4, count]` of ones, each on columns of its own."""
    maps = torch.zeros(1, 4, 4, count)
    for k in range(count):
        maps[:, :, k, k] = 1
    return maps


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "segregation": segregation_loss,
    "retention": lambda maps: retention_loss(maps, random_maps(1, *maps.shape[1:], seed=1) > 0.5),
    "attend_and_excite": attend_and_excite_loss,
    "divide_and_bind": divide_and_bind_loss,
    "divide_and_bind_pairs": partial(divide_and_bind_loss, pairs=[(0, 2)], weight=3.0),
    "conform_groups": partial(conform_loss, groups=[(0, 1), (2,)]),
    "conform_previous": lambda maps: conform_loss(maps, previous=random_maps(*maps.shape[1:], seed=2).expand_as(maps)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_gradients_agree_with_finite_differences(loss: Callable[[Tensor], Tensor]):
    assert torch.autograd.gradcheck(loss, random_maps(2, 4, 5, 3).requires_grad_())


@every_loss
def test_a_batch_is_its_samples_one_by_one(loss: Callable[[Tensor], Tensor]):
    maps = random_maps(3, 6, 5, 3, dtype=torch.float32).requires_grad_()
    together = loss(maps)
    alone = torch.cat([loss(maps[i : i + 1]) for i in range(3)])
    assert together.shape == (3,)
    torch.testing.assert_close(together, alone, **CLOSE)
    (gradient,) = torch.autograd.grad(together.sum(), maps)
    for i in range(3):
        one = maps[i : i + 1].detach().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(one).sum(), one)[0], gradient[i : i + 1], **CLOSE)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(loss: Callable[[Tensor], Tensor], dtype: torch.dtype):
    maps = random_maps(2, 8, 8, 3).to(dtype).requires_grad_()
    value = loss(maps)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(maps.detach().float()), atol=0, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), maps)
    assert gradient.dtype == dtype and gradient.isfinite().all()


@every_loss
def test_autocast_changes_nothing(loss: Callable[[Tensor], Tensor]):
    maps = random_maps(2, 8, 8, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(maps)
    torch.testing.assert_close(value, loss(maps), atol=0, rtol=0)


@every_loss
def test_empty_maps_give_finite_values_and_gradients(loss: Callable[[Tensor], Tensor]):
    maps = torch.zeros(2, 8, 8, 3, dtype=torch.float16, requires_grad=True)
    value = loss(maps)
    (gradient,) = torch.autograd.grad(value.sum(), maps)
    assert value.isfinite().all() and gradient.isfinite().all()


# Segregation


@pytest.mark.parametrize("count", [2, 3, 5])
def test_segregation_counts_each_pair_once_and_identical_maps_half(count: int):
    one = random_maps(2, 8, 8, 1)
    pairs = count * (count - 1) / 2
    torch.testing.assert_close(
        segregation_loss(one.expand(-1, -1, -1, count)), torch.full((2,), pairs / 2).double(), **CLOSE
    )


def test_segregation_of_disjoint_maps_is_zero():
    assert segregation_loss(halves(4)).item() == 0


def test_segregation_is_the_formula_of_the_paper():
    maps = random_maps(2, 5, 7, 4)
    for value, sample in zip(segregation_loss(maps), maps, strict=True):
        expected = 0.0
        for m, n in itertools.combinations(range(4), 2):
            above, below = 0.0, 0.0
            for i, j in itertools.product(range(5), range(7)):
                above += min(sample[i, j, m].item(), sample[i, j, n].item())
                below += sample[i, j, m].item() + sample[i, j, n].item()
            expected += above / below
        assert value.item() == pytest.approx(expected, rel=1e-7)


def test_segregation_of_one_concept_is_zero_with_a_gradient_of_zero():
    maps = random_maps(2, 8, 8, 1).requires_grad_()
    value = segregation_loss(maps)
    assert value.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(value.sum(), maps)
    assert not gradient.any()


def test_segregation_of_two_empty_maps_is_zero():
    assert segregation_loss(torch.zeros(1, 8, 8, 2)).item() == 0


def test_segregation_keeps_its_value_when_all_maps_are_scaled_and_not_when_one_is():
    maps = random_maps(2, 8, 8, 2)
    torch.testing.assert_close(segregation_loss(0.01 * maps), segregation_loss(maps), **CLOSE)
    vanishing = segregation_loss(maps * torch.tensor([1, 1e-4]))
    assert (vanishing < 1e-3).all() and (segregation_loss(maps) > 0.2).all()


def test_segregation_lowers_the_smaller_value_and_halves_ties():
    # Two pixels: in one the first map is the smaller, in the other both are equal.
    maps = torch.tensor([[0.2, 0.6], [0.4, 0.4]], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(segregation_loss(maps, eps=0).sum(), maps)
    shared, total = 0.6, 1.6
    whole, half, none = (share / total - shared / total**2 for share in (1, 0.5, 0))
    torch.testing.assert_close(gradient.flatten(), torch.tensor([whole, none, half, half], dtype=torch.float64))


@pytest.mark.parametrize("name", ["segregation", "attend_and_excite", "divide_and_bind"])
def test_the_order_of_concepts_does_not_matter(name: str):
    maps = random_maps(2, 8, 8, 4)
    torch.testing.assert_close(LOSSES[name](maps[..., [2, 0, 3, 1]]), LOSSES[name](maps))


def test_the_order_of_concepts_does_not_matter_when_what_belongs_to_them_follows():
    maps, masks, order = random_maps(2, 8, 8, 3), random_maps(2, 8, 8, 3, seed=1) > 0.5, [2, 0, 1]
    torch.testing.assert_close(retention_loss(maps[..., order], masks[..., order]), retention_loss(maps, masks))
    torch.testing.assert_close(
        conform_loss(maps[..., order], [(0, 1)], previous=masks[..., order].double()),
        conform_loss(maps, [(2, 0)], previous=masks.double()),
    )
    torch.testing.assert_close(divide_and_bind_loss(maps[..., order], [(0, 1)]), divide_and_bind_loss(maps, [(2, 0)]))


def free_maps(first: Tensor, second: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """What gradient descent on segregation makes of logits `[16, 16]` of two of eight tokens.

    Returns:
        Mass of the two tokens' maps before and after, `[2]` each, and the loss after.
    """
    logits = torch.zeros(1, 16, 16, 8)
    logits[0, ..., 0], logits[0, ..., 1] = first, second

    def maps() -> Tensor:
        return logits.softmax(-1)[..., :2]

    before = maps().sum((0, 1, 2))
    for _ in range(steps):
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(segregation_loss(maps()).sum(), logits)
        logits = (logits - 200 * gradient).detach()
    return before, maps().sum((0, 1, 2)), segregation_loss(maps())


def test_segregation_of_blobs_with_peaks_apart_separates_them_and_both_grow():
    before, after, loss = free_maps(3 * blob(7, 6, 2), 3 * blob(7, 8, 2), 100)
    torch.testing.assert_close(before, torch.tensor([41.0, 41.0]), atol=0.5, rtol=0)
    torch.testing.assert_close(after.sort().values, torch.tensor([81.0, 89.0]), atol=4, rtol=0)
    assert loss.item() < 0.01


def test_segregation_of_blobs_with_one_peak_starves_the_weaker():
    before, after, loss = free_maps(3 * blob(7, 7, 2), 1 * blob(7, 7, 2), 10)
    assert before[1].item() == pytest.approx(32.5, abs=0.5)
    assert after[0] > 2 * before[0] and after[1] < 0.56 * before[1]
    assert loss.item() < 0.1


# Retention


def test_retention_of_a_map_in_its_own_mask_is_a_half_and_off_it_one():
    maps = halves(2)
    assert retention_loss(maps, maps.bool()).item() == pytest.approx(2 * 0.5)
    assert retention_loss(maps, maps.flip(-1).bool()).item() == 2
    assert retention_loss(maps, torch.zeros_like(maps, dtype=torch.bool)).item() == 2
    assert retention_loss(torch.zeros_like(maps), maps.bool()).item() == 2


def test_retention_is_the_formula_of_the_paper():
    maps, masks = random_maps(2, 5, 7, 3), random_maps(2, 5, 7, 3, seed=1) > 0.6
    for value, sample, mask in zip(retention_loss(maps, masks), maps, masks, strict=True):
        expected = 0.0
        for m in range(3):
            above, below = 0.0, 0.0
            for i, j in itertools.product(range(5), range(7)):
                above += min(sample[i, j, m].item(), float(mask[i, j, m]))
                below += sample[i, j, m].item() + float(mask[i, j, m])
            expected += 1 - above / below
        assert value.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("maximum", "in_place", "shifted"),
    [(0.01, 0.993, 0.998), (0.05, 0.966, 0.992), (0.1, 0.936, 0.985), (0.5, 0.790, 0.950), (1.0, 0.706, 0.930)],
)
def test_retention_depends_on_the_scale_of_the_maps(maximum: float, in_place: float, shifted: float):
    masks = retention_masks(blob(7, 6, 3)[None, ..., None])
    there, beside = (maximum * blob(7, x, 3)[None, ..., None] for x in (6, 12))
    # How much of the shifted blob is cut off by the border moves the second figure.
    assert retention_loss(there, masks).item() == pytest.approx(in_place, abs=0.0015)
    assert retention_loss(beside, masks).item() == pytest.approx(shifted, abs=0.004)
    assert retention_loss(normalize_maps(there), masks).item() == pytest.approx(0.706, abs=0.0015)


def test_masks_are_float_or_bool_and_one_set_serves_all_samples():
    maps, masks = random_maps(3, 8, 8, 2), random_maps(1, 8, 8, 2, seed=1) > 0.5
    expected = retention_loss(maps, masks.expand(3, -1, -1, -1))
    for given in (masks, masks.float(), masks.half()):
        torch.testing.assert_close(retention_loss(maps, given), expected)


def test_a_concept_with_an_empty_mask_gets_no_gradient():
    maps = random_maps(1, 8, 8, 2).requires_grad_()
    masks = torch.ones(1, 8, 8, 2, dtype=torch.bool)
    masks[..., 1] = False
    (gradient,) = torch.autograd.grad(retention_loss(maps, masks).sum(), maps)
    assert gradient[..., 0].all() and not gradient[..., 1].any()


# Masks


def test_masks_take_the_pixels_that_the_rules_say():
    values = torch.tensor([0.0, 0.1, 0.2, 0.39, 0.4, 0.7]).view(1, 2, 3, 1)

    def taken(*args, **kwargs) -> int:
        masks = retention_masks(values, *args, **kwargs)
        assert masks.dtype == torch.bool and masks.shape == values.shape
        assert (masks == (values >= values.flatten()[-int(masks.sum())])).all()
        return int(masks.sum())

    assert taken() == 3  # from 0.35
    assert taken(fraction=0.25) == 4  # from 0.175
    assert taken(fraction=1.0) == 1
    mean, std = values.mean().item(), values.std(correction=0).item()
    for num_stds in (-0.5, 0.2, 1.0):
        expected = int((values > mean + num_stds * std).sum())
        assert taken("mean_std", num_stds=num_stds) == expected
    assert taken("otsu") == 3  # between 0.2 and 0.39


@pytest.mark.parametrize("seed", range(3))
def test_otsu_masks_are_those_of_opencv(seed: int):
    random = np.random.default_rng(seed)
    pictures = random.integers(0, 256, (2, 9, 16, 3)).astype(np.uint8)
    pictures[0, ..., 1] = random.integers(0, 3, (9, 16)) * 90  # many equal values
    pictures[1, ..., 2] = random.normal(60, 10, (9, 16)).clip(0, 255) + 120 * (random.random((9, 16)) < 0.2)
    masks = retention_masks(torch.from_numpy(pictures).double(), "otsu").numpy()
    for b, k in itertools.product(range(2), range(3)):
        picture = np.ascontiguousarray(pictures[b, ..., k])
        _, expected = cv2.threshold(picture, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        np.testing.assert_array_equal(masks[b, ..., k], expected.astype(bool))


@pytest.mark.parametrize("rule", ["half_max", "mean_std", "otsu"])
def test_masks_ignore_the_scale_of_a_map_and_are_detached(rule):
    maps = random_maps(2, 8, 8, 3, dtype=torch.float32).requires_grad_()
    masks = retention_masks(maps, rule)
    assert not masks.requires_grad and masks.any() and not masks.all()
    assert torch.equal(retention_masks(maps * torch.tensor([1.0, 0.125, 4.0]), rule), masks)
    assert torch.equal(masks[1:], retention_masks(maps[1:], rule))


@pytest.mark.parametrize("rule", ["half_max", "mean_std", "otsu"])
def test_an_empty_map_has_an_empty_mask(rule):
    assert not retention_masks(torch.zeros(1, 4, 4, 2), rule).any()


@pytest.mark.parametrize(("rule", "expected"), [("half_max", True), ("mean_std", False), ("otsu", False)])
def test_a_constant_map_is_all_or_nothing(rule, expected: bool):
    for shape in ((1, 4, 4, 2), (1, 1, 1, 2)):
        assert (retention_masks(torch.full(shape, 0.25), rule) == expected).all()


# Normalisation


def test_each_map_gets_a_scale_of_its_own():
    maps = 0.1 + random_maps(2, 8, 8, 3)
    assert torch.equal(normalize_maps(maps, "none"), maps)
    peaks = maps.amax((1, 2), keepdim=True)
    torch.testing.assert_close(normalize_maps(maps, "max"), maps / peaks)
    torch.testing.assert_close(normalize_maps(maps, "sum").sum((1, 2)), torch.ones(2, 3).double())
    stretched = normalize_maps(maps, "min_max")
    assert not stretched.amin((1, 2)).any() and (stretched.amax((1, 2)) == 1).all()
    torch.testing.assert_close(stretched * (peaks - maps.amin((1, 2), keepdim=True)), maps - maps.amin((1, 2), True))


@pytest.mark.parametrize("how", ["none", "max", "sum", "min_max"])
def test_normalisation_is_differentiable_also_where_a_map_is_empty(how):
    maps = random_maps(2, 4, 4, 2)
    assert torch.autograd.gradcheck(partial(normalize_maps, how=how), maps.requires_grad_())
    empty = torch.zeros(1, 4, 4, 2, dtype=torch.float16, requires_grad=True)
    normal = normalize_maps(empty, how)
    assert not normal.any() and torch.autograd.grad(normal.square().sum(), empty)[0].isfinite().all()


# Attend-and-Excite


def test_attend_and_excite_is_what_diffusers_computes():
    maps = 1.2 * random_maps(4, 8, 8, 3)
    maps[3] += 1  # all maxima above 1
    for value, sample in zip(attend_and_excite_loss(maps), maps, strict=True):
        maxima = [sample[..., k].max() for k in range(3)]
        assert value.item() == float(StableDiffusionAttendAndExcitePipeline._compute_loss(maxima))


def test_attend_and_excite_moves_the_weakest_concept_at_its_maximum_only():
    maps = (random_maps(1, 8, 8, 3) * torch.tensor([0.9, 0.4, 0.7])).requires_grad_()
    (gradient,) = torch.autograd.grad(attend_and_excite_loss(maps).sum(), maps)
    assert gradient.sum() == -1 and gradient.count_nonzero() == 1
    assert gradient[..., 1].argmin() == maps[..., 1].argmax()


# Divide & Bind


def test_divide_and_bind_finds_the_variation_of_the_flattest_noun():
    maps = random_maps(1, 5, 7, 3)
    variations = []
    for k in range(3):
        a = maps[0, ..., k].tolist()
        rows = sum(abs(a[i + 1][j] - a[i][j]) for i in range(4) for j in range(7))
        columns = sum(abs(a[i][j + 1] - a[i][j]) for i in range(5) for j in range(6))
        variations.append(rows + columns)
    assert divide_and_bind_loss(maps).item() == pytest.approx(-min(variations))
    flattest = variations.index(min(variations))
    others = [v for k, v in enumerate(variations) if k != flattest]
    # As an attribute, the flattest no longer counts.
    pairs = [(flattest, (flattest + 1) % 3)]
    assert divide_and_bind_loss(maps, pairs, weight=0).item() == pytest.approx(-min(others))


def test_a_point_varies_four_times_its_height():
    maps = torch.zeros(1, 5, 5, 1)
    maps[0, 2, 2] = 0.5
    assert divide_and_bind_loss(maps).item() == -2


def test_binding_is_the_jensen_shannon_divergence_of_each_pair():
    maps = random_maps(1, 4, 4, 4)
    loss = partial(divide_and_bind_loss, maps, [(0, 2), (1, 3)])
    bound = loss(weight=0.5) - loss(weight=0)
    expected = 0.0
    for a, b in ((0, 2), (1, 3)):
        p, q = (maps[0, ..., k].flatten() / maps[..., k].sum() for k in (a, b))
        middle = (p + q) / 2
        expected += sum(
            float(u * math.log(u / m) + v * math.log(v / m)) / 2 for u, v, m in zip(p, q, middle, strict=True)
        )
    assert bound.item() == pytest.approx(0.5 * expected, rel=1e-6)


def test_binding_is_zero_for_equal_shapes_and_log_two_for_disjoint_ones():
    maps = halves(2).double()
    flat = partial(divide_and_bind_loss, weight=0)
    assert (divide_and_bind_loss(maps, [(0, 1)]) - flat(maps, [(0, 1)])).item() == pytest.approx(math.log(2), rel=1e-5)
    same = torch.stack([maps[..., 0], 0.1 * maps[..., 0]], -1)
    assert (divide_and_bind_loss(same, [(0, 1)]) - flat(same, [(0, 1)])).item() == pytest.approx(0, abs=1e-6)


# CONFORM


def slow_conform(current: Tensor, earlier: Tensor | None, labels: list[int], temperature: float) -> float:
    """NT-Xent of one sample's maps `[H, W, K]`, pair by pair."""
    vectors = [current[..., k].flatten() for k in range(current.shape[-1])]
    if earlier is not None:
        vectors += [earlier[..., k].flatten() for k in range(current.shape[-1])]
        labels = labels * 2

    def s(i: int, j: int) -> float:
        a, b = vectors[i], vectors[j]
        return float(a @ b / (a.norm() * b.norm())) / temperature

    terms = []
    for i, p in itertools.permutations(range(len(vectors)), 2):
        if labels[i] == labels[p]:
            negatives = sum(math.exp(s(i, n)) for n in range(len(vectors)) if labels[n] != labels[i])
            terms.append(-math.log(math.exp(s(i, p)) / (math.exp(s(i, p)) + negatives)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("has_previous", [False, True])
def test_conform_is_the_contrastive_formula(temperature: float, has_previous: bool):
    maps, previous = random_maps(2, 4, 5, 5), random_maps(2, 4, 5, 5, seed=1)
    values = conform_loss(maps, [(3, 0), (1, 4)], previous if has_previous else None, temperature=temperature)
    for i, value in enumerate(values):
        expected = slow_conform(maps[i], previous[i] if has_previous else None, [0, 1, 2, 0, 1], temperature)
        assert value.item() == pytest.approx(expected, rel=1e-6)


def test_conform_of_lone_concepts_needs_the_step_before():
    maps = random_maps(2, 4, 4, 3).requires_grad_()
    value = conform_loss(maps)
    assert value.tolist() == [0, 0] and not torch.autograd.grad(value.sum(), maps)[0].any()
    earlier = conform_loss(maps, previous=maps)
    assert (earlier > 0).all() and torch.autograd.grad(earlier.sum(), maps)[0].any()


def test_conform_of_one_group_has_nothing_to_repel():
    maps = random_maps(1, 4, 4, 2).requires_grad_()
    value = conform_loss(maps, [(0, 1)])
    assert value.item() == 0 and not torch.autograd.grad(value.sum(), maps)[0].any()


def test_conform_takes_the_step_before_as_a_constant():
    previous = random_maps(1, 4, 4, 2, seed=1).requires_grad_()
    value = conform_loss(random_maps(1, 4, 4, 2).requires_grad_(), previous=previous)
    assert torch.autograd.grad(value.sum(), previous, allow_unused=True)[0] is None


def test_conform_prefers_groups_together_and_others_apart():
    a, b = blob(4, 4, 2), blob(12, 12, 2)
    good, bad = torch.stack([a, a, b], -1)[None], torch.stack([a, b, b], -1)[None]
    assert conform_loss(good, [(0, 1), (2,)]).item() < 0.2 < conform_loss(bad, [(0, 1), (2,)]).item()


# What is refused

MAPS = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segregation_loss(MAPS[0]), r"\(4, 4, 3\).*\[B, H, W, K\].*maps\[None\]"),
        (lambda: segregation_loss(MAPS[..., :0]), "at least one concept"),
        (lambda: attend_and_excite_loss(MAPS[:, :0]), "height and width"),
        (lambda: retention_loss(MAPS, MAPS[:, :2] > 0), r"masks of shape \(2, 2, 4, 3\) for maps \(2, 4, 4, 3\)"),
        (lambda: retention_loss(MAPS, MAPS[..., :1] > 0), "masks of shape"),
        (lambda: retention_masks(MAPS, "quarter"), "rule='quarter'.*'half_max', 'mean_std', 'otsu'"),  # pyright: ignore
        (lambda: retention_masks(MAPS, fraction=0.0), "fraction=0.0 must be above 0"),
        (lambda: retention_masks(MAPS, fraction=1.5), "at most 1"),
        (lambda: normalize_maps(MAPS, "mean"), "how='mean'.*'min_max'"),  # pyright: ignore[reportArgumentType]
        (lambda: divide_and_bind_loss(MAPS, [(0, 3)]), "pairs: index 3 is out of range for 3 concepts"),
        (lambda: divide_and_bind_loss(MAPS, [(-1, 1)]), "index -1 is out of range"),
        (lambda: divide_and_bind_loss(MAPS, [(1, 1)]), "two different indices"),
        (lambda: divide_and_bind_loss(MAPS, [(0, 1), (1, 2), (2, 0)]), "every concept an attribute"),
        (lambda: conform_loss(MAPS, [(0, 3)]), "groups: index 3"),
        (lambda: conform_loss(MAPS, [(0, 1), (1, 2)]), "concept 1 stands in them twice"),
        (lambda: conform_loss(MAPS, previous=MAPS[:1]), r"previous of shape \(1, 4, 4, 3\)"),
        (lambda: conform_loss(MAPS, temperature=0), "temperature=0 must be above 0"),
    ],
)
def test_bad_values_are_named(call: Callable[[], Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segregation_loss((MAPS * 9).long()), "maps: expected a floating-point tensor.*torch.int64"),
        (lambda: segregation_loss(MAPS.numpy()), "ndarray"),  # pyright: ignore[reportArgumentType]
        (lambda: retention_loss(MAPS, (MAPS * 9).long()), "masks: expected a bool or floating-point.*torch.int64"),
        (lambda: conform_loss(MAPS, previous=MAPS > 0), "previous: expected a floating-point tensor.*torch.bool"),
    ],
)
def test_bad_kinds_are_named(call: Callable[[], Tensor], message: str):
    with pytest.raises(TypeError, match=message):
        call()
