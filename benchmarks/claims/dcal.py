"""DCAL's claims, measured on bodies that differ in one small part: is it told better, and is it looked at?

    python -m benchmarks.claims.dcal     # results/dcal.json and dcal.csv

Paper: "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification", Zhu et al.,
CVPR 2022, arXiv 2205.02151. Needs scipy, which the `test` extra brings.

The protocol, fixed before the measurement:

* **Pictures.** `recipes.small_parts`, 64 pixels: eight classes by the colour and shape of a mark of 8 to 10 pixels on a
  body, and two marks on the ground that say nothing. 2000 to learn from, drawn anew for each seed; 800 to measure on,
  the same for all.
* **Network.** timm's vision transformer with patches of 8 pixels, width 64, 4 blocks, from scratch, and DCAL on it
  (`DCAL.from_vit`), which starts from the very same weights. All variants of a seed see the same batches.
* **Variants.** Plain; GLCA alone and PWCA alone, their loss weighted as DCAL's; DCAL. A step of DCAL takes about 2.4
  times as long as a plain one, so plain training is also given 2.4 times the steps.
* **Settings.** 300 steps of 32 pictures at a rate of 2e-3. Number and kind of marks, width, rate and about how many
  steps were chosen with plain training on other pictures and weights (seeds 100, 101), so that it is right on about
  three quarters; DCAL ran there once, at 400 steps (78 → 82 %), and nothing was chosen by it.
* **Figures.** Accuracy, of GLCA and SA fused where there is GLCA, as in the paper. Attention is the rollout of all
  blocks from the class token, as in the paper's pictures: the share, of all that falls on patches, on those of which
  the mark on the body covers an eighth or more, and the same of marks on the ground, which mislead.
* **Verdict.** Three seeds; differences are paired by picture, 95 % intervals are bootstraps over runs and pictures, p
  is of the sign test over pictures, adjusted for the number of claims (Holm). A claim is shown, or contradicted, where
  p is below 0.05 and the interval leaves out 0.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.claims.layers import macs, parameters, times
from benchmarks.claims.measured import Measured, Pair, claims, load, runs, save, spread
from benchmarks.claims.report import RESULTS, Report, Table
from benchmarks.claims.training import Criterion, Pictures, cross_entropy, hits, scaled, train
from recipes.small_parts import CLASSES, Parts, pictures
from vision.attention import record_attention
from vision.criterion import StepLoss, classification_loss
from vision.dcal import DCAL, DCALCriterion, fused_logits
from vision.dcal.dcal import Inference
from vision.rollout import rollout_row

__all__ = ["PAIRS", "SEEDS", "VARIANTS", "TwoBranches", "attention_shares", "build", "measure", "report"]

COMMAND = "python -m benchmarks.claims.dcal"
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 300, 32, 2e-3
TRAIN, TEST, TRAIN_SEED, TEST_SEED, LOOSE = 2000, 800, 10, 1000, 2
SIZE, PATCH = 64, 8


class TwoBranches(nn.Module):
    """DCAL's loss without its third branch: SA, and GLCA or PWCA, weighted by learnt uncertainties.

    Args:
        other: 'glca' or 'pwca'.
    """

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other = other
        self.log_vars = nn.Parameter(torch.zeros(2))

    def forward(self, model: nn.Module, images: Tensor, target: Tensor) -> StepLoss:
        """The loss of one step of a `DCAL`."""
        assert isinstance(model, DCAL)
        if self.other == "glca":
            tokens = model.forward_features(images)
            sa, other = model.head(tokens[:, 0]), model.glca_head(tokens[:, -1])
        else:
            sa, _, other = model(images, branches=True).logits
        parts = {"sa": classification_loss(sa, target), self.other: classification_loss(other, target)}
        losses = torch.stack(list(parts.values()))
        loss = ((-self.log_vars).exp() * losses + self.log_vars).sum() / 2
        out = fused_logits(sa, other) if self.other == "glca" else sa
        return StepLoss(loss, out.detach(), {name: part.detach() for name, part in parts.items()})


@dataclass(frozen=True)
class Variant:
    """How a network is trained and asked.

    Attributes:
        criterion: 'plain', 'glca', 'pwca' or 'dcal'.
        inference: What it answers with; None for a network without GLCA.
        length: Its steps, in those of plain training.
    """

    criterion: str
    inference: Inference | None = None
    length: float = 1.0

    def loss(self) -> Criterion:
        """What a step takes."""
        if self.criterion in ("glca", "pwca"):
            return TwoBranches(self.criterion)
        return DCALCriterion() if self.criterion == "dcal" else cross_entropy


PLAIN, GLCA, PWCA, DUAL, LONGER = "plain", "GLCA alone", "PWCA alone", "DCAL", "plain, as long as DCAL"
VARIANTS = {
    PLAIN: Variant("plain"),
    GLCA: Variant("glca", "both"),
    PWCA: Variant("pwca", "sa"),
    DUAL: Variant("dcal", "both"),
    LONGER: Variant("plain", length=2.4),
}
ASKED_SA = "DCAL, asked without GLCA"


def _pair(claim: str, published: str, ours: str, theirs: str = PLAIN, what: str = "accuracy", sign: int = 1) -> Pair:
    return Pair(claim, published, f"{what}: {ours}", f"{what}: {theirs}", sign)


_SEEN = "shown in pictures, no figure"
PAIRS = (
    _pair("DCAL tells classes that differ in a small part better", "CUB, DeiT-Ti: 82.1 → 84.6 % (table 1)", DUAL),
    _pair("GLCA alone tells them better", "CUB, DeiT-Ti: 82.1 → 83.1 % (ablation)", GLCA),
    _pair("PWCA alone tells them better", "CUB, DeiT-Ti: 82.1 → 83.1 % (ablation)", PWCA),
    _pair("DCAL tells them better than plain training that takes as long", "no figure", DUAL, LONGER),
    _pair("With DCAL more of the attention is on the part", _SEEN, DUAL, what="part"),
    _pair("With DCAL less of the attention is on marks that mislead", _SEEN, DUAL, what="loose", sign=-1),
)


def build(seed: int, inference: Inference | None) -> nn.Module:
    """The network of a seed: the transformer, or DCAL on it."""
    torch.manual_seed(seed)
    vit = VisionTransformer(SIZE, PATCH, num_classes=len(CLASSES), embed_dim=64, depth=4, num_heads=4, mlp_ratio=2)
    return vit if inference is None else DCAL.from_vit(vit, inference)


def as_pictures(parts: Parts) -> Pictures:
    """Drawn pictures as training takes them."""
    return Pictures(torch.from_numpy(parts.images), torch.from_numpy(parts.labels))


def _covered(masks: NDArray[np.float32]) -> Tensor:
    """Which patches a mask `[N, H, W]` covers an eighth of, `[N, h * w]`."""
    return F.avg_pool2d(torch.from_numpy(masks)[:, None], PATCH).flatten(1) >= 1 / 8


@torch.inference_mode()
def attention_shares(model: nn.Module, parts: Parts, batch_size: int = 200) -> dict[str, NDArray[np.float64]]:
    """Of the class token's rollout over patches, the shares on the part and on loose marks, `[N]` each."""
    covered = {"part": _covered(parts.parts), "loose": _covered(parts.loose)}
    rows = []
    for images in torch.from_numpy(parts.images).split(batch_size):
        with record_attention(model.get_submodule("blocks")) as layers:
            model(scaled(images))
        rows.append(rollout_row([kept.attn for maps in layers.values() for kept in maps])[:, 1:])
    reached = torch.cat(rows)
    reached = reached / reached.sum(1, keepdim=True)
    return {name: (reached * where).sum(1).double().numpy() for name, where in covered.items()}


def trained(variant: Variant, seed: int, known: Pictures, steps: int = STEPS) -> nn.Module:
    """A network of one variant, in evaluation mode."""
    model = build(seed, variant.inference)
    steps = round(variant.length * steps)
    train(model, known, steps, seed, variant.loss(), batch_size=BATCH, learning_rate=RATE)
    return model


def measure_run(seed: int, steps: int = STEPS, num: int = TEST) -> tuple[Measured, dict[str, float]]:
    """Trains all variants of a seed, and measures them on `num` pictures.

    Returns:
        The values, and of each variant the seconds of processor time of its training.
    """
    torch.set_num_threads(1)
    test, known = pictures(TEST_SEED, num, SIZE, LOOSE), as_pictures(pictures(TRAIN_SEED + seed, TRAIN, SIZE, LOOSE))
    measured: Measured = {}
    seconds: dict[str, float] = {}
    for name, variant in VARIANTS.items():
        start = time.process_time()
        model = trained(variant, seed, known, steps)
        seconds[name] = time.process_time() - start
        measured[f"accuracy: {name}", seed] = found = hits(model, as_pictures(test))
        for what, share in attention_shares(model, test).items():
            measured[f"{what}: {name}", seed] = share
        if name == DUAL:
            assert isinstance(model, DCAL)
            model.inference = "sa"
            measured[f"accuracy: {ASKED_SA}", seed] = hits(model, as_pictures(test))
        print(f"{name}, run {seed}: {found.mean():.1%}, {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    return measured, seconds


def measure(out: Path, processes: int) -> dict[str, list[float]]:
    """Measures all seeds, so many at a time; writes `dcal.csv` after each.

    Returns:
        Of each variant the seconds of processor time of its runs.
    """
    measured: Measured = {}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for values, own in pool.map(measure_run, SEEDS):
            measured |= values
            for name, each in own.items():
                seconds[name].append(each)
            save(measured, out / "dcal.csv")
    return seconds


def variants_table(measured: Measured) -> Table:
    """Accuracy and attention of all variants."""
    rows = []
    for name in (*VARIANTS, ASKED_SA):
        each = [statistics.fmean(run) for run in runs(measured, f"accuracy: {name}")]
        row = [name, spread(each, percent=True), ", ".join(f"{own:.1%}" for own in each)]
        for what in ("part", "loose"):
            shares = [statistics.fmean(run) for run in runs(measured, f"{what}: {name}")]
            row.append(spread(shares, percent=True) if shares else "as DCAL")
        rows.append(row)
    test = pictures(TEST_SEED, TEST, SIZE, LOOSE)
    even = [f"{_covered(masks).double().mean().item():.1%}" for masks in (test.parts, test.loose)]
    rows.append(["chance, even attention", f"{1 / len(CLASSES):.1%}", "", *even])
    header = ["training", "accuracy (mean of the runs, 95 % interval of the mean)", "runs"]
    return Table(
        f"DCAL: {TEST} pictures, {len(SEEDS)} runs", [*header, "attention on the part", "on misleading marks"], rows
    )


def costs(turns: int = 40) -> dict[str, list[Any]]:
    """Of each way to ask: parameters, multiply-adds, and the median time over plain's of forward passes in turns."""
    asked: dict[str, Inference | None] = {PLAIN: None, GLCA: "both", PWCA: "sa", DUAL: "both"}
    models = {name: build(0, inference).eval() for name, inference in asked.items()}
    images = torch.randn(32, 3, SIZE, SIZE)
    found = times(models, images, turns)
    table: dict[str, list[Any]] = {}
    for name, model in models.items():
        counted = copy.deepcopy(model)
        if isinstance(counted, DCAL) and counted.inference == "sa":
            counted.glca = counted.glca_norm = counted.glca_head = nn.Identity()  # what is not asked needs not be kept
        with record_attention(counted):  # a fused product would not be counted
            number = macs(counted, images[:1])
        ratios = [own / plain for own, plain in zip(found[name], found[PLAIN], strict=True)]
        table[name] = [parameters(counted), number, statistics.median(ratios)]
    return table


def costs_table(cost: Mapping[str, list[Any]], seconds: Mapping[str, list[float]]) -> Table:
    """What each takes to ask and to train."""
    rows = []
    for name, (count, number, ratio) in cost.items():
        steps = statistics.median(own / plain for own, plain in zip(seconds[name], seconds[PLAIN], strict=True))
        rows.append([name, f"{count / 1e3:.1f} k", f"{number / 1e6:.2f} M", f"{ratio:.2f}", f"{steps:.2f}"])
    header = ["", "parameters", "MACs of a picture", "forward time, batch 32, over plain", "training step over plain"]
    return Table("DCAL: what is needed to ask it (PWCA has no part in that), and to train it", header, rows)


def report(
    measured: Measured, cost: Mapping[str, list[Any]], seconds: Mapping[str, list[float]], on: Mapping[str, Any]
) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    return Report(
        method="DCAL",
        paper="Zhu et al., CVPR 2022, arXiv 2205.02151",
        command=COMMAND,
        protocol=(
            f"Bodies that differ in one small mark (`recipes/small_parts.py`), {SIZE} pixels, {len(CLASSES)} classes, "
            f"{LOOSE} marks beside the body that mislead. A vision transformer of 4 blocks and width 64, from scratch, "
            f"{STEPS} steps of {BATCH}, plainly or with DCAL on it: same initial weights, same batches, {len(SEEDS)} "
            f"seeds, {TEST} pictures to measure on. Attention is rollout from the class token, its share on patches of "
            "the part. Intervals are bootstraps over runs and pictures; p is of the sign test over pictures, adjusted "
            "for the number of claims (Holm). The script holds the whole protocol."
        ),
        machine=dict(on),
        claims=claims(measured, PAIRS, (SEEDS[0], SEEDS[-1])),
        tables=[variants_table(measured), costs_table(cost, seconds)],
        details={
            "steps": STEPS,
            "batch": BATCH,
            "learning rate": RATE,
            "training pictures": TRAIN,
            "cost": {name: list(own) for name, own in cost.items()},
            "training seconds": {name: list(own) for name, own in seconds.items()},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of dcal.json and dcal.csv")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time, each on one thread")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = measure(args.out, args.processes)
    on = machine.describe("torch", "timm", "scipy") | {"threads": 1}
    made = report(load(args.out / "dcal.csv"), costs(), seconds, on)
    made.save(args.out / "dcal.json")
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
