"""Losses on cross-attention maps: A-STAR's two, and those that people compare it with.

Papers:

* A-STAR: "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", Agarwal et al., ICCV
  2023, https://arxiv.org/abs/2306.14544. The authors published no code; what the paper leaves open (how a mask is
  thresholded, whether maps are normalised) is an argument here.
* Attend-and-Excite: "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models", Chefer
  et al., SIGGRAPH 2023, https://arxiv.org/abs/2301.13826.
* Divide & Bind: "Divide & Bind Your Attention for Improved Generative Semantic Nursing", Li et al., BMVC 2023,
  https://arxiv.org/abs/2307.10864.
* CONFORM: "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models", Meral et al., CVPR
  2024, https://arxiv.org/abs/2312.06059.

Written from the formulas. All losses take maps `[B, H, W, K]` of K concepts, not negative, and return one value for
each sample, `[B]`: a batch gives what its samples give one by one, and so do the gradients of its sum. They are
computed in float32 at least, whatever the precision of the maps and under autocast.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "MaskRule",
    "Normalization",
    "attend_and_excite_loss",
    "conform_loss",
    "divide_and_bind_loss",
    "normalize_maps",
    "retention_loss",
    "retention_masks",
    "segregation_loss",
]

MaskRule = Literal["half_max", "mean_std", "otsu"]
Normalization = Literal["none", "max", "sum", "min_max"]


def segregation_loss(maps: Tensor, *, eps: float = 1e-8) -> Tensor:
    """A-STAR's segregation (equation 2): how much the maps of each two concepts overlap, summed over unordered pairs.

    For a pair, `sum(min(a, b)) / sum(a + b)`: half a soft Dice score, 0 for disjoint maps, 0.5 for identical ones.
    Scaling all maps alike changes nothing; a concept that fades away lowers it too, which is for retention to prevent.

    Args:
        maps: `[B, H, W, K]`, not negative. Where two maps are equal, each gets half of the minimum's gradient.
        eps: added to the denominators; two empty maps give 0.

    Returns:
        `[B]`, from 0 to K(K - 1)/4. For a single concept 0, with a gradient of 0.

    Raises:
        TypeError: maps that are no floating-point tensor.
        ValueError: maps of another shape.
    """
    maps = _checked(maps)
    first, second = torch.triu_indices(maps.shape[-1], maps.shape[-1], offset=1, device=maps.device)
    return _overlap(maps[..., first], maps[..., second], eps).sum(-1)


def retention_loss(maps: Tensor, masks: Tensor, *, eps: float = 1e-8) -> Tensor:
    """A-STAR's retention (equation 3): how far each concept's map leaves the region of its mask, summed over concepts.

    For a concept, `1 - sum(min(a, mask)) / sum(a + mask)`: from 0.5, where map and mask are equal, to 1, where they are
    disjoint or one is empty. It compares probabilities with a mask of 0 and 1, so it depends on the maps' scale: near
    1 for small values, where it mostly asks for more attention; `normalize_maps` makes it act on shape.

    Args:
        maps: `[B, H, W, K]`, from 0 to 1.
        masks: `[B, H, W, K]`, or `[1, H, W, K]` for the same masks for every sample; bool, or from 0 to 1. What
            `retention_masks` made of the maps one step before, or a layout of the user's. A concept with an empty
            mask adds 1 and has no gradient.
        eps: added to the denominators.

    Returns:
        `[B]`, from K/2 to K.

    Raises:
        TypeError: maps that are no floating-point tensor, masks that are neither that nor bool.
        ValueError: shapes that do not fit.
    """
    maps = _checked(maps)
    if not isinstance(masks, Tensor) or not (masks.dtype == torch.bool or masks.is_floating_point()):
        raise TypeError(
            f"masks: expected a bool or floating-point tensor, got {_kind(masks)}; convert with masks.bool()."
        )
    if masks.shape not in (maps.shape, (1, *maps.shape[1:])):
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} for maps {tuple(maps.shape)}; expected the maps' shape [B, H, W, K], "
            f"or [1, H, W, K] for every sample alike. Resize masks to the maps' height and width."
        )
    return (1 - _overlap(maps, masks.to(maps), eps)).sum(-1)


@torch.no_grad()
def retention_masks(
    maps: Tensor, rule: MaskRule = "half_max", *, fraction: float = 0.5, num_stds: float = 1.0
) -> Tensor:
    """The region where each map is high: what A-STAR's retention holds a concept to. The paper gives no threshold.

    | rule | a pixel belongs to the mask |
    | --- | --- |
    | half_max | from `fraction` (τ) of the map's maximum upwards, and above 0 |
    | mean_std | above the map's mean plus `num_stds` (k) standard deviations |
    | otsu | above the split into two classes with the largest variance between them; exact, over the map's own values |

    Args:
        maps: `[B, H, W, K]`.
        rule: a row of the table.
        fraction: for 'half_max', above 0 and at most 1.
        num_stds: for 'mean_std'.

    Returns:
        `[B, H, W, K]`, bool, detached. An empty map has an empty mask by every rule; a constant one is all in the mask
        by 'half_max', and has an empty one by the others.

    Raises:
        TypeError: maps that are no floating-point tensor.
        ValueError: maps of another shape, an unknown rule, a fraction out of range.
    """
    maps = _checked(maps)
    if rule not in get_args(MaskRule):
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(map(repr, get_args(MaskRule)))}.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 1: a share of each map's maximum.")
    if rule == "half_max":
        return (maps >= fraction * maps.amax((1, 2), keepdim=True)) & (maps > 0)
    if rule == "mean_std":
        std, mean = torch.std_mean(maps, (1, 2), correction=0, keepdim=True)
        return maps > mean + num_stds * std
    return maps > _otsu_thresholds(maps)[:, None, None]


def normalize_maps(maps: Tensor, how: Normalization = "max") -> Tensor:
    """Brings each concept's map to a scale of its own; differentiable.

    Args:
        maps: `[B, H, W, K]`.
        how: 'none'; 'max': divided by its maximum; 'sum': divided by its sum, a distribution over pixels; 'min_max':
            from its minimum at 0 to its maximum at 1. A map with nothing to divide by stays as it is ('min_max': 0).

    Returns:
        `[B, H, W, K]`, float32 at least.

    Raises:
        TypeError: maps that are no floating-point tensor.
        ValueError: maps of another shape, an unknown way.
    """
    maps = _checked(maps)
    if how not in get_args(Normalization):
        raise ValueError(f"how={how!r}: expected one of {', '.join(map(repr, get_args(Normalization)))}.")
    if how == "none":
        return maps
    if how == "min_max":
        maps = maps - maps.amin((1, 2), keepdim=True)
    scale = maps.sum((1, 2), keepdim=True) if how == "sum" else maps.amax((1, 2), keepdim=True)
    return maps / _divisor(scale)


def attend_and_excite_loss(maps: Tensor) -> Tensor:
    """Attend-and-Excite's loss: what the weakest concept's maximum lacks to 1.

    Only the weakest concept gets a gradient, and only at its maximum; where several tie, they share it.

    Args:
        maps: `[B, H, W, K]`, from 0 to 1; smoothed before, as the paper does.

    Returns:
        `[B]`, from 0 to 1; maxima above 1 give 0.

    Raises:
        TypeError: maps that are no floating-point tensor.
        ValueError: maps of another shape.
    """
    return (1 - _checked(maps).amax((1, 2))).amax(-1).clamp(min=0)


def divide_and_bind_loss(
    maps: Tensor, pairs: Sequence[tuple[int, int]] = (), *, weight: float = 1.0, eps: float = 1e-8
) -> Tensor:
    """Divide & Bind's loss: `-min TV(noun)` asks for structure, `weight · JSD(attribute, noun)` for the same places.

    The total variation of a map is the sum of the absolute differences of neighbours, along rows and columns. (The
    authors' code takes the differences of rows against the last row only; this is the formula.) The Jensen-Shannon
    divergence, in nats, is between the two maps as distributions over pixels. Ours, where the paper is silent: the
    divergences of several pairs are summed.

    Args:
        maps: `[B, H, W, K]`, not negative.
        pairs: indices into K of (attribute, noun). Concepts that are no pair's attribute are the nouns of the first
            term; without pairs, all are.
        weight: of the second term (λ).
        eps: added to every pixel before a map becomes a distribution, so that an empty one is uniform.

    Returns:
        `[B]`, at most `weight · log(2)` for each pair.

    Raises:
        TypeError: maps that are no floating-point tensor.
        ValueError: maps of another shape, indices out of range, a concept paired with itself, attributes only.
    """
    maps = _checked(maps)
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"pairs={list(pairs)}: {pair} must be two different indices, (attribute, noun).")
        _check_indices(pair, maps.shape[-1], "pairs")
    attributes = {attribute for attribute, _ in pairs}
    nouns = [k for k in range(maps.shape[-1]) if k not in attributes]
    if not nouns:
        raise ValueError(f"pairs={list(pairs)} make every concept an attribute; at least one must be a noun only.")
    variation = maps.diff(dim=1).abs().sum((1, 2)) + maps.diff(dim=2).abs().sum((1, 2))  # [B, K]
    loss = -variation[:, nouns].amin(-1)
    if pairs:
        p, q = ((maps[..., list(side)] + eps).flatten(1, 2) for side in zip(*pairs, strict=True))  # [B, HW, pairs]
        loss = loss + weight * _jensen_shannon(p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)).sum(-1)
    return loss


def conform_loss(
    maps: Tensor,
    groups: Sequence[Sequence[int]] | None = None,
    previous: Tensor | None = None,
    *,
    temperature: float = 0.5,
) -> Tensor:
    """CONFORM's loss: maps of one group attract, maps of different groups repel (NT-Xent over cosine similarities).

    With `s` the cosine similarity of two flattened maps over the temperature, an ordered pair of maps (i, p) of one
    group costs `-log(exp(s_ip) / (exp(s_ip) + sum_n exp(s_in)))`, where n runs over all maps of other groups; the loss
    is the mean over such pairs. With `previous` there are two maps of each concept, now and a step before, both of the
    concept's group. Ours, where the paper is silent: the earlier maps are constants, and count as i, p and n alike; no
    pairs, as with groups of one and no `previous`, give 0.

    Args:
        maps: `[B, H, W, K]`.
        groups: indices into K, a subject with its attributes in each group; a concept in none of them is a group of
            its own, and so is every one for None.
        previous: the maps of the step before, `[B, H, W, K]`; detached.
        temperature: above 0.

    Returns:
        `[B]`, not negative.

    Raises:
        TypeError: maps that are no floating-point tensor.
        ValueError: shapes that do not fit, an index out of range or in two groups, a temperature of 0 or less.
    """
    maps = _checked(maps)
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; the paper's is 0.5.")
    labels = _group_of_each(groups or (), maps.shape[-1])
    vectors = maps.flatten(1, 2).mT  # [B, K, HW]
    if previous is not None:
        previous = _checked(previous, "previous").detach()
        if previous.shape != maps.shape:
            raise ValueError(
                f"previous of shape {tuple(previous.shape)} for maps {tuple(maps.shape)}; expected maps of the same "
                f"samples and concepts, one step before."
            )
        vectors, labels = torch.cat((vectors, previous.to(maps).flatten(1, 2).mT), 1), labels * 2
    group = torch.tensor(labels, device=maps.device)
    same = group[:, None] == group
    vectors = vectors / _divisor(vectors.norm(dim=-1, keepdim=True))
    # Not a matrix product, which autocast would do in half precision.
    similarity = (vectors[:, :, None] * vectors[:, None]).sum(-1) / temperature  # [B, N, N]
    repelled = similarity.masked_fill(same, -torch.inf).logsumexp(-1, keepdim=True)  # [B, N, 1]
    anchor, positive = (same & ~torch.eye(len(labels), dtype=torch.bool, device=maps.device)).nonzero(as_tuple=True)
    losses = F.softplus(repelled - similarity)[:, anchor, positive]
    return losses.sum(-1) / max(1, len(anchor))


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _checked(maps: Tensor, name: str = "maps") -> Tensor:
    """Maps of the right kind and shape, in float32 at least."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor [B, H, W, K], got {_kind(maps)}.")
    if maps.ndim != 4 or 0 in maps.shape[1:]:
        raise ValueError(
            f"{name} of shape {tuple(maps.shape)}; expected [B, H, W, K]: a batch, height and width of the maps, and "
            f"at least one concept. A single sample's maps [H, W, K] need a first axis: {name}[None]."
        )
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def _check_indices(indices: Sequence[int], count: int, name: str) -> None:
    if bad := [k for k in indices if not 0 <= k < count]:
        raise ValueError(f"{name}: index {bad[0]} is out of range for {count} concepts; indices count from 0.")


def _divisor(x: Tensor) -> Tensor:
    """x, but 1 where x vanishes: dividing by a tiny number gives gradients that overflow in half precision."""
    return torch.where(x > torch.finfo(x.dtype).tiny, x, 1)


def _overlap(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """`[B, H, W, N]` twice → half the soft Dice score of each two maps, `[B, N]`."""
    total = (a + b).sum((1, 2))
    return torch.minimum(a, b).sum((1, 2)) / (_divisor(total) + eps)


def _otsu_thresholds(maps: Tensor) -> Tensor:
    """`[B, H, W, K]` → the value up to which a pixel is of the lower class, `[B, K]`; the maximum of a constant map."""
    values = maps.flatten(1, 2).sort(dim=1).values  # [B, n, K]
    n = values.shape[1]
    if n == 1:
        return values[:, 0]
    below = torch.arange(1, n, device=maps.device, dtype=maps.dtype)[:, None]  # pixels of the lower class
    sums = (values - values[:, :1]).cumsum(1)  # from the minimum upwards, so that less is lost to rounding
    low, total = sums[:, :-1], sums[:, -1:]
    # Variance between classes, but for a factor 1/n² that all splits share.
    between = (low * n - total * below).square() / (below * (n - below))
    # Equal values are not split.
    split = between.masked_fill(values[:, 1:] == values[:, :-1], -1).argmax(1, keepdim=True)  # [B, 1, K]
    is_constant = values[:, 0] == values[:, -1]
    return torch.where(is_constant, values[:, -1], values.gather(1, split).squeeze(1))


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Distributions over dimension 1, `[B, n, P]` twice, above 0 everywhere → their divergence in nats, `[B, P]`."""
    log_middle = ((p + q) / 2).log()
    return ((p * (p.log() - log_middle)).sum(1) + (q * (q.log() - log_middle)).sum(1)) / 2


def _group_of_each(groups: Sequence[Sequence[int]], count: int) -> list[int]:
    """The group of each concept; those that are in none get one of their own."""
    found: dict[int, int] = {}
    for number, group in enumerate(groups):
        _check_indices(group, count, "groups")
        for k in group:
            if k in found:
                raise ValueError(f"groups={[tuple(g) for g in groups]}: concept {k} stands in them twice.")
            found[k] = number
    return [found.get(k, len(groups) + k) for k in range(count)]
