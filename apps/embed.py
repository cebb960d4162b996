"""`attnsuite embed`: the features of every image, pooled to one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .batch.stage import Batch, Column, Compute, Row, Stage
from .errors import UsageError
from .models import Network

__all__ = ["Embed"]


class Embed(Stage):
    """What the classifier would be given, or the average over one stage's feature map.

    Args:
        network: The network with its preprocessing.
        compute: How to run it.
        stage: Index of a stage, negative from the end; None for what enters the classifier.

    Raises:
        UsageError: The network has no such stage.
    """

    def __init__(self, network: Network, compute: Compute, stage: int | None = None) -> None:
        super().__init__(network, compute)
        self.stage = None if stage is None else _stage_index(network, stage)
        self._call = self._pooled if stage is None else self._of_stage

    @property
    def columns(self) -> tuple[Column, ...]:
        """`embedding`, a list of numbers."""
        return (Column("embedding", "floats"),)

    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """One vector an image, float32."""
        vectors = self.forward(images, self._call)
        good = vectors.isfinite().all(dim=1).tolist()
        problem = {"error": "the network returned values that are not numbers; run it without --amp"}
        return [{"embedding": v} if ok else problem for v, ok in zip(vectors.cpu().numpy(), good, strict=True)]

    def describe(self, row: Row) -> str:
        """Length and first values of the vector."""
        vector = row["embedding"]
        return f"{len(vector)} values: {', '.join(f'{value:.3f}' for value in vector[:4])}, …"

    def _pooled(self, images: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        return module.forward_head(module.forward_features(images), pre_logits=True).flatten(1)

    def _of_stage(self, images: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        (features,) = module.forward_intermediates(
            images, indices=[self.stage], intermediates_only=True, output_fmt="NCHW", stop_early=True
        )
        return features.mean(dim=(2, 3))


def _stage_index(network: Network, stage: int) -> int:
    """The stage counted from the front, or an error that lists the stages."""
    module: Any = network.module
    if not hasattr(module, "forward_intermediates"):
        raise UsageError(f"{network.label} does not give out its stages; leave out --stage")
    widths = [info["num_chs"] for info in module.feature_info]
    if not -len(widths) <= stage < len(widths):
        listed = ", ".join(f"{index} ({width} channels)" for index, width in enumerate(widths))
        raise UsageError(f"--stage {stage} is not a stage of {network.label}, which has {listed}")
    return stage % len(widths)
