"""`attnsuite classify`: the most likely classes of every image, the network's own or such as are given in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .batch.stage import Batch, Column, Compute, Row, Stage
from .errors import UsageError
from .models import Network

if TYPE_CHECKING:
    from .clip.tower import Words

__all__ = ["Classify", "in_words"]


class Classify(Stage):
    """Labels and probabilities of the `top_k` most likely classes.

    Args:
        network: The network with its labels and preprocessing.
        compute: How to run it.
        top_k: How many classes; None for five, or all if there are fewer.

    Raises:
        UsageError: The network has no classes, or not as many.
    """

    def __init__(self, network: Network, compute: Compute, top_k: int | None = None) -> None:
        classes = len(network.labels)
        if not classes:
            raise UsageError(f"{network.label} has no classifier; use `attnsuite embed` for its features")
        if top_k is not None and top_k > classes:
            raise UsageError(f"--top-k {top_k} asks for more than the {classes} classes of {network.label}")
        super().__init__(network, compute)
        self.top_k = min(5, classes) if top_k is None else top_k

    @property
    def columns(self) -> tuple[Column, ...]:
        """`label_1, prob_1, label_2, …`."""
        ranks = range(1, self.top_k + 1)
        return tuple(c for r in ranks for c in (Column(f"label_{r}", "text"), Column(f"prob_{r}", "number")))

    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """Softmax over all classes, then the largest."""
        probabilities, classes = self.forward(images).softmax(dim=1).topk(self.top_k)
        return [self._row(p, c) for p, c in zip(probabilities.tolist(), classes.tolist(), strict=True)]

    def describe(self, row: Row) -> str:
        """`espresso 95.2 %, cup 1.3 %`."""
        return ", ".join(f"{row[f'label_{r}']} {row[f'prob_{r}']:.1%}" for r in range(1, self.top_k + 1))

    def _row(self, probabilities: list[float], classes: list[int]) -> Row:
        if probabilities[0] != probabilities[0]:
            return {"error": "the network returned values that are not numbers; run it without --amp"}
        row: Row = {}
        for rank, (probability, index) in enumerate(zip(probabilities, classes, strict=True), start=1):
            row[f"label_{rank}"] = self.network.labels[index]
            row[f"prob_{rank}"] = round(probability, 6)
        return row


def in_words(labels: str | None, templates: Sequence[str] | None, clip: bool) -> Words | None:
    """The classes that the user gives, if any.

    Args:
        labels: `--labels`.
        templates: `--template`.
        clip: Whether a CLIP was named, which has no classes of its own.

    Raises:
        UsageError: They cannot be read, or an option lacks the labels that it is about.
    """
    if labels is None:
        if clip or templates:
            which = "--clip and --clip-checkpoint" if clip else "--template"
            raise UsageError(f"{which}: this is about labels in words; give them: --labels 'cat, dog'")
        return None
    from .clip.tower import read_words

    return read_words(labels, templates)
