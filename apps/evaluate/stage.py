"""The network on labelled pictures: its predictions as rows, its measures for each kind of corruption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..batch.stage import Batch, Column, Compute, Row, Stage
from ..models import Network
from .corruptions import CorruptingDecoder, Sample
from .measure import Measures

__all__ = ["Evaluate", "Plan"]

Variant = tuple[str, int] | None


@dataclass(frozen=True)
class Plan:
    """All pictures as they are, then all of them for each corruption and severity.

    Attributes:
        samples: The pictures.
        corruptions: Names.
        severities: From 1 to 5.
    """

    samples: Sequence[Sample]
    corruptions: Sequence[str] = ()
    severities: Sequence[int] = ()

    @property
    def variants(self) -> list[Variant]:
        """None for pictures as they are, then corruption and severity."""
        return [None, *((name, severity) for name in self.corruptions for severity in self.severities)]

    def __len__(self) -> int:
        return len(self.samples) * len(self.variants)

    def __iter__(self) -> Iterator[Sample]:
        for variant in self.variants:
            for sample in self.samples:
                yield sample if variant is None else replace(sample, corruption=variant[0], severity=variant[1])


class Evaluate(Stage):
    """Compares the most likely class with the right one.

    Args:
        network: The network with its labels and preprocessing.
        compute: How to run it.
        plan: What it will be given.
        metrics: Names of what is measured; of corrupted pictures, what is one number.

    Attributes:
        measures: What was measured, for each variant of the plan.
    """

    def __init__(self, network: Network, compute: Compute, plan: Plan, metrics: Sequence[str]) -> None:
        super().__init__(network, compute)
        own = self.decoder
        self.decoder = CorruptingDecoder(own.transform, own.framing, own.channels, own.view_size, own.keep_strips)
        single = [name for name in metrics if name != "confusion"] or ["top1"]
        classes = len(network.labels)
        self.measures = {v: Measures(classes, metrics if v is None else single) for v in plan.variants}

    @property
    def columns(self) -> tuple[Column, ...]:
        """`label, predicted, prob, correct`."""
        return (
            Column("label", "text"),
            Column("predicted", "text"),
            Column("prob", "number"),
            Column("correct", "integer"),
        )

    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """Probabilities of all classes go into the measures, the largest into the row."""
        probabilities = self.forward(images).softmax(dim=1).cpu()
        samples = [_sample(batch, place) for place in places]
        targets = torch.tensor([sample.target for sample in samples])
        sound = probabilities.isfinite().all(dim=1)
        for variant in dict.fromkeys(sample.variant for sample in samples):
            chosen = sound & torch.tensor([sample.variant == variant for sample in samples])
            self.measures[variant].update(probabilities[chosen], targets[chosen])
        best = probabilities.max(dim=1)
        return [
            self._row(s, p, i)
            if fine
            else {"error": "the network returned values that are not numbers; run it without --amp"}
            for s, p, i, fine in zip(samples, best.values.tolist(), best.indices.tolist(), sound.tolist(), strict=True)
        ]

    def rows(self, batch: Batch) -> list[Row]:
        """Rows as of any stage; the right label also stands in those of pictures that cannot be read."""
        rows = super().rows(batch)
        for place, row in enumerate(rows):
            row["label"] = self.network.labels[_sample(batch, place).target]
        return rows

    def describe(self, row: Row) -> str:
        """`tabby as lynx, 61.2 %`."""
        return f"{row['label']} as {row['predicted']}, {row['prob']:.1%}"

    def _row(self, sample: Sample, probability: float, index: int) -> Row:
        right = int(index == sample.target)
        return {"predicted": self.network.labels[index], "prob": round(probability, 6), "correct": right}


def _sample(batch: Batch, place: int) -> Sample:
    sample = batch.sources[place]
    assert isinstance(sample, Sample)
    return sample
