"""What the training objectives of this package share: one call that gives the loss of one step.

A criterion is an `nn.Module` whose `forward(model, images, target)` runs the model itself, because what it needs is
more than logits: attention maps, further branches, a teacher beside. It calls `model(...)` exactly once, so that a
data-parallel wrapper sees an ordinary step; whatever it learns itself (weights between losses) are its parameters and
belong into the optimiser, never into the model.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["StepLoss", "classification_loss", "unwrapped"]


class StepLoss(NamedTuple):
    """The loss of one step, and what a training loop wants to log."""

    loss: Tensor
    """Scalar, to call `backward` on."""
    logits: Tensor
    """`[B, num_classes]`, detached: what accuracy is measured on."""
    parts: dict[str, Tensor]
    """Name → detached scalar: the terms of the loss before their weights."""


def classification_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, for class indices and for the soft targets of mixup alike.

    Args:
        logits: `[B, num_classes]`.
        target: `[B]`, integer classes, or `[B, num_classes]`, probabilities.
        label_smoothing: mixed into either kind of target.

    Returns:
        Scalar, mean over the batch.

    Raises:
        ValueError: a target of another shape.
    """
    if target.shape != logits.shape[:1] and target.shape != logits.shape:
        raise ValueError(
            f"target of shape {tuple(target.shape)} for logits {tuple(logits.shape)}; expected class indices "
            f"({len(logits)},) or probabilities of the logits' shape."
        )
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside a data-parallel or compiled wrapper."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType] - how torch.compile keeps it
        else:
            return model
