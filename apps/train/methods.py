"""The objectives that `--method` chooses from, each as a `vision` criterion, and the optimiser over all that learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision.criterion import StepLoss, classification_loss

from ..errors import UsageError
from .network import Built, Start, teacher_for
from .settings import Learning, Recipe

__all__ = ["Plain", "criterion_for", "mixer_for", "optimizer_for", "scheduler_for"]


class Plain(nn.Module):
    """Cross-entropy.

    Args:
        label_smoothing: As in `classification_loss`.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, model: nn.Module, images: Tensor, target: Tensor) -> StepLoss:
        """The loss of one step; images `[B, C, H, W]`, target `[B]` or `[B, num_classes]`."""
        logits = model(images)
        return StepLoss(classification_loss(logits, target, self.label_smoothing), logits.detach(), {})


def criterion_for(start: Start, built: Built, classes: Sequence[str], smoothing: float) -> nn.Module:
    """The objective of a method; also settles which weights of the network are trained.

    Args:
        start: Which method.
        built: The network.
        classes: Names of the classes.
        smoothing: Of labels.

    Raises:
        UsageError: The method cannot train this network.
    """
    if start.method == "dcal":
        from vision.dcal import DCALCriterion

        return DCALCriterion(smoothing)
    if start.method == "adl":
        from vision.attention import attention_layers
        from vision.tap import ADLCriterion

        if not attention_layers(built.module):
            raise UsageError(f"--method adl needs attention, of which {built.label} has none; choose a transformer")
        return ADLCriterion(label_smoothing=smoothing)
    if start.method == "sparsifiner":
        from vision.sparsifiner import SparsifinerCriterion

        assert start.teacher is not None
        teacher = teacher_for(start.teacher, built, classes)
        criterion = SparsifinerCriterion(teacher, "joint", label_smoothing=smoothing)
        criterion.set_trainable(built.module)
        return criterion
    return Plain(smoothing)


def optimizer_for(module: nn.Module, criterion: nn.Module, learning: Learning, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser over the network, with layer decay, and over what the criterion learns itself.

    Raises:
        UsageError: timm has none of that name.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    decay = recipe.layer_decay if recipe.layer_decay < 1 else None
    known = [str(name) for name in list_optimizers()]
    if learning.opt not in known:
        raise UsageError(f"--opt {learning.opt}: timm has no such optimiser; there are {', '.join(known)}")
    try:
        optimizer = create_optimizer_v2(module, learning.opt, recipe.lr, learning.weight_decay, layer_decay=decay)
    except (ImportError, AssertionError, RuntimeError) as error:
        raise UsageError(f"--opt {learning.opt} cannot be used here: {error}") from error
    if own := [parameter for parameter in criterion.parameters() if parameter.requires_grad]:
        optimizer.add_param_group({"params": own, "weight_decay": 0.0})
    return optimizer


def scheduler_for(optimizer: torch.optim.Optimizer, learning: Learning, recipe: Recipe) -> Any:
    """timm's schedule, told of every step; None where the rate stays.

    Raises:
        UsageError: timm has none of that name, or it waits for a plateau.
    """
    from timm.scheduler import create_scheduler_v2

    names = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
    if learning.sched not in names:
        raise UsageError(f"--sched {learning.sched}: expected {', '.join(names)}")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=learning.sched,
        num_epochs=learning.epochs,
        warmup_epochs=recipe.warmup_steps / recipe.steps,  # pyright: ignore[reportArgumentType] - times steps
        warmup_lr=recipe.lr / 100,
        min_lr=recipe.lr / 100,
        decay_epochs=None if learning.sched != "step" else max(1, learning.epochs // 3),
        decay_milestones=[round(share * learning.epochs) for share in (0.5, 0.75)],
        step_on_epochs=False,
        updates_per_epoch=recipe.steps,
    )
    return scheduler


def mixer_for(learning: Learning, classes: int) -> Any:
    """timm's mixup and CutMix, or None."""
    if not learning.mixup and not learning.cutmix:
        return None
    from timm.data.mixup import Mixup

    return Mixup(learning.mixup, learning.cutmix, label_smoothing=learning.smoothing, num_classes=classes)


def mixed(mixer: Any, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures `[B, C, H, W]` mixed with each other, and targets `[B, num_classes]`; the last of an odd batch stays."""
    from timm.data.mixup import mixup_target

    even = len(images) // 2 * 2
    rest = mixup_target(targets[even:], mixer.num_classes, 1.0, mixer.label_smoothing)
    if not even:
        return images, rest
    first, soft = mixer(images[:even].clone(), targets[:even])
    return torch.cat([first, images[even:]]), torch.cat([soft, rest])
