"""The training objective of DCAL."""

import math

import torch
from torch import Tensor, nn

from vision.criterion import StepLoss, classification_loss, unwrapped
from vision.dcal.dcal import DCAL
from vision.dcal.operators import fused_logits

__all__ = ["DCALCriterion", "batch_hard_triplet_loss"]


def batch_hard_triplet_loss(features: Tensor, target: Tensor, margin: float = 0.3) -> Tensor:
    """Each image against its farthest of the same class and its nearest of another (Hermans et al., 2017).

    Paper: "In Defense of the Triplet Loss for Person Re-Identification", https://arxiv.org/abs/1703.07737.

    Args:
        features: `[B, C]`; distances are Euclidean.
        target: `[B]`, classes.
        margin: what the farthest positive must be nearer than the nearest negative.

    Returns:
        Scalar, mean over the images that have both in the batch; 0 where none has.
    """
    features = features.float()
    squared = (features.unsqueeze(1) - features.unsqueeze(0)).square().sum(-1)
    distance = squared.clamp(min=1e-12).sqrt()  # [B, B]; a distance of 0 has no gradient
    same = target.unsqueeze(1) == target.unsqueeze(0)
    positive = same & ~torch.eye(len(target), dtype=torch.bool, device=target.device)
    farthest = distance.masked_fill(~positive, 0).amax(1)
    nearest = distance.masked_fill(same, math.inf).amin(1)
    valid = positive.any(1) & ~same.all(1)
    loss = (farthest - nearest.masked_fill(~valid, 0) + margin).relu() * valid
    return loss.sum() / valid.sum().clamp(min=1)


class DCALCriterion(nn.Module):
    """The loss of all three branches, weighted by learnt uncertainties.

    Papers: DCAL, and "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics", Kendall
    et al., CVPR 2018, https://arxiv.org/abs/1705.07115, in the form of FairMOT, https://arxiv.org/abs/2004.01888.

    `½ Σ (exp(-w_i) L_i + w_i)` over SA, GLCA and PWCA, `w_i` from 0. Add this module's parameters to the optimiser.

    Args:
        label_smoothing: of the cross-entropies.
        triplet_margin: for re-identification, adds `batch_hard_triplet_loss` of the class tokens to each branch;
            None for categories.
    """

    def __init__(self, label_smoothing: float = 0.0, triplet_margin: float | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.triplet_margin = triplet_margin
        self.log_vars = nn.Parameter(torch.zeros(3))

    def forward(self, model: nn.Module, images: Tensor, target: Tensor) -> StepLoss:
        """The loss of one step.

        Args:
            model: a `DCAL` with classifiers, in a data-parallel or compiled wrapper or not.
            images: normalised, `[B, C, H, W]`.
            target: `[B]` classes, or without triplets `[B, num_classes]` probabilities.

        Returns:
            The loss, logits of SA and GLCA fused, and the terms `sa`, `glca`, `pwca`, and `triplet_…` of each.

        Raises:
            TypeError: the model is no `DCAL`.
            ValueError: it has no classifiers, or triplets are asked of soft targets.
        """
        inner = unwrapped(model)
        if not isinstance(inner, DCAL):
            raise TypeError(f"DCALCriterion needs a vision.dcal.DCAL, got {type(inner).__name__}; see DCAL.from_vit.")
        if not inner.num_classes:
            raise ValueError("DCALCriterion needs classifiers; call model.reset_classifier(num_classes) first.")
        if self.triplet_margin is not None and target.ndim != 1:
            raise ValueError(f"target of shape {tuple(target.shape)}: triplets need class indices, [B].")
        logits, features = model(images, branches=True)
        names = ("sa", "glca", "pwca")
        parts = {n: classification_loss(x, target, self.label_smoothing) for n, x in zip(names, logits, strict=True)}
        losses = torch.stack(list(parts.values()))
        if self.triplet_margin is not None:
            triplets = [batch_hard_triplet_loss(x, target, self.triplet_margin) for x in features]
            parts.update({f"triplet_{n}": x for n, x in zip(names, triplets, strict=True)})
            losses = losses + torch.stack(triplets)
        loss = ((-self.log_vars).exp() * losses + self.log_vars).sum() / 2
        fused = fused_logits(logits[0].detach(), logits[1].detach())
        return StepLoss(loss, fused, {name: value.detach() for name, value in parts.items()})
