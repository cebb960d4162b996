"""TAP's and ADL's claims, measured on corrupted drawings: how many are still told, and how much alike attention is.

    python -m benchmarks.claims.tap     # results/tap.json, tap.csv and tap_clean.csv

Paper: "Robustifying Token Attention for Vision Transformers", Guo et al., ICCV 2023, arXiv 2303.11126. Needs scipy
(the `test` extra) and imagecorruptions-imaug (the `corruptions` extra).

The protocol, fixed before the measurement:

* **Pictures.** `recipes.textured`, 48 pixels: six classes by shape, any colour, on striped and spotted grounds. 2000
  to learn from, never corrupted, drawn anew for each seed. 1000 to measure on as they are, the same for all; 300 of
  them under eight corruptions of ImageNet-C, two of each group, at severities 1 and 3. All nineteen that the package
  has work at this size; glass blur was left out for its time. What is done to a picture depends on nothing else.
* **Network.** FAN (`vision.fan`) of 3 blocks and width 64 on patches of 8 pixels, from scratch: as it is; with TAP of
  four scales; with ADL of weight 1 and threshold 2, as published; with both. All of a seed start from the same weights,
  TAP's own aside, and see the same batches.
* **Settings.** 600 steps of 32 pictures at a rate of 1e-3, chosen on other pictures and weights (seeds 102, 103) so
  that FAN as it is and with both learn the clean task (99.7 % and more). Severities were first 2 and 4, at which
  contrast and fog left all near chance.
* **Measured twice.** At first with 400 steps at 3e-3 and four seeds: from one of them no variant learned, from another
  TAP and ADL together did not, and both together came out 15 points behind under corruptions. That says more of the
  rate than of the method, so all was measured again at the lower one; what is kept is the second measurement.
* **Figures.** Of each picture the share of its sixteen corruptions under which it is told. Of each picture the cosine
  between every two rows of attention, heads averaged, mean over pairs and layers; no threshold.
* **Verdict.** Differences are paired by picture, 95 % intervals are bootstraps over runs and pictures, p
  is of the sign test over pictures, adjusted for the number of claims (Holm). A claim is shown, or contradicted, where
  p is below 0.05 and the interval leaves out 0. That clean accuracy is kept is shown if the interval lies above a
  loss of one point in a hundred, contradicted if below; its p is that of a normal distribution with this interval,
  and stands alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.xcit import ConvPatchEmbed
from torch import nn

from apps.evaluate.corruptions import corrupt
from benchmarks import machine
from benchmarks.claims.layers import macs, parameters, times
from benchmarks.claims.measured import Measured, Pair, load, runs, save, spread, within
from benchmarks.claims.measured import claims as claims_of_pairs
from benchmarks.claims.report import RESULTS, Claim, Report, Table
from benchmarks.claims.training import Pictures, cross_entropy, hits, scaled, train
from recipes.scenes import SHAPES
from recipes.textured import pictures
from vision.attention import record_attention
from vision.fan import FAN
from vision.tap import ADLCriterion, pairwise_diversification_loss

__all__ = ["CORRUPTIONS", "MARGIN", "PAIRS", "SEEDS", "VARIANTS", "build", "claims", "corrupted", "cosines", "report"]

COMMAND = "python -m benchmarks.claims.tap"
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 600, 32, 1e-3
TRAIN, TEST, CORRUPTED, TRAIN_SEED, TEST_SEED = 2000, 1000, 300, 10, 1000
SIZE, PATCH, DIM, DEPTH, SCALES = 48, 8, 64, 3, 4
CORRUPTIONS = (
    "gaussian_noise", "impulse_noise", "defocus_blur", "motion_blur", "frost", "fog", "contrast", "pixelate",
)  # fmt: skip
SEVERITIES = (1, 3)
MARGIN = 0.01
"""How much clean accuracy may fall and still count as kept."""

PLAIN, TAP, ADL, BOTH = "FAN", "TAP", "ADL", "TAP + ADL"
VARIANTS = {PLAIN: (1, False), TAP: (SCALES, False), ADL: (1, True), BOTH: (SCALES, True)}
"""Name → scales of the pooling, and whether the diversification loss is added."""

_MORE = "ImageNet-C, FAN-B-Hybrid: mCE 46.1 → 43.7 (abstract)"
_KEPT = "ImageNet-1K, FAN-B-Hybrid: 83.9 → 84.3 % (abstract)"
_NONE = "no figure at hand"


def _pair(claim: str, ours: str, theirs: str = PLAIN, published: str = _NONE) -> Pair:
    return Pair(claim, published, f"corrupted: {ours}", f"corrupted: {theirs}")


def _alike(claim: str, ours: str, theirs: str) -> Pair:
    return Pair(claim, _NONE, f"cosine: {ours}", f"cosine: {theirs}", sign=-1, percent=False)


PAIRS = (
    _pair("TAP and ADL together tell more corrupted pictures", BOTH, published=_MORE),
    _pair("TAP alone tells more corrupted pictures", TAP),
    _pair("ADL alone tells more corrupted pictures", ADL),
    _alike("With ADL rows of attention are less alike", ADL, PLAIN),
    _alike("With ADL beside TAP rows of attention are less alike", BOTH, TAP),
)

_CLEAN = Pair("TAP and ADL together cost no accuracy on clean pictures", _KEPT, f"clean: {BOTH}", f"clean: {PLAIN}")


def _network(num_scales: int) -> FAN:
    model = FAN(
        num_classes=len(SHAPES), img_size=SIZE, embed_dim=DIM, depth=DEPTH, num_heads=4, mlp_ratio=2,
        num_scales=num_scales, cls_attn_layers=1,
    )  # fmt: skip
    model.patch_embed = ConvPatchEmbed(SIZE, PATCH, embed_dim=DIM)  # FAN's own patches are of 16 pixels
    return model


def build(seed: int, num_scales: int) -> FAN:
    """The network of a seed; what networks with and without pooling share starts the same."""
    torch.manual_seed(seed)
    shared = _network(1).state_dict()
    torch.manual_seed(seed)
    model = _network(num_scales)
    model.load_state_dict(shared, strict=False)
    return model


def trained(name: str, seed: int, known: Pictures, steps: int = STEPS) -> FAN:
    """A network of one variant, in evaluation mode."""
    num_scales, diversified = VARIANTS[name]
    model = build(seed, num_scales)
    criterion = ADLCriterion() if diversified else cross_entropy
    train(model, known, steps, seed, criterion, batch_size=BATCH, learning_rate=RATE)
    return model


def drawn(seed: int, num: int) -> Pictures:
    """Drawings as training takes them."""
    images, labels = pictures(seed, num, SIZE)
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels))


def corrupted(clean: Pictures) -> Pictures:
    """Pictures under every corruption at every severity, one whole set after the other."""
    images = [corrupt(own, name, s) for name in CORRUPTIONS for s in SEVERITIES for own in clean.images.numpy()]
    count = len(CORRUPTIONS) * len(SEVERITIES)
    return Pictures(torch.from_numpy(np.stack(images)), clean.labels.repeat(count))


@torch.inference_mode()
def cosines(model: nn.Module, clean: Pictures, batch_size: int = 100) -> NDArray[np.float64]:
    """Of each picture how much alike every two rows of attention are, mean over pairs and layers, `[N]`."""
    found = []
    for images in clean.images.split(batch_size):
        with record_attention(model) as layers:
            model(scaled(images))
        maps = [kept.attn for own in layers.values() for kept in own if kept.attn.shape[-2] > 1]
        found += [
            pairwise_diversification_loss([own[n : n + 1] for own in maps], 0.0).item() for n in range(len(images))
        ]
    return np.array(found)


class Run(NamedTuple):
    """What was measured of one seed.

    Attributes:
        measured: Of `CORRUPTED` pictures what was told under corruptions, and the cosines.
        clean: Of `TEST` pictures what was told.
        details: Of each variant the seconds of processor time, and the share told under each corruption.
    """

    measured: Measured
    clean: Measured
    details: dict[str, tuple[float, list[float]]]


def measure_run(seed: int, steps: int = STEPS, num: int = TEST) -> Run:
    """Trains and measures all variants of a seed; they are asked for `num` pictures, of which some are corrupted."""
    torch.set_num_threads(1)
    test, known = drawn(TEST_SEED, num), drawn(TRAIN_SEED + seed, TRAIN)
    fewer = Pictures(test.images[:CORRUPTED], test.labels[:CORRUPTED])
    worse = corrupted(fewer)
    run = Run({}, {}, {})
    for name in VARIANTS:
        start = time.process_time()
        model = trained(name, seed, known, steps)
        seconds = time.process_time() - start
        told = hits(model, worse).reshape(len(CORRUPTIONS), len(SEVERITIES), -1)
        run.details[name] = seconds, told.mean((1, 2)).tolist()
        run.measured[f"corrupted: {name}", seed] = told.mean((0, 1))
        run.measured[f"cosine: {name}", seed] = cosines(model, fewer)
        run.clean[f"clean: {name}", seed] = own = hits(model, test)
        words = f"clean {own.mean():.1%}, corrupted {told.mean():.1%}, {seconds:.0f} s"
        print(f"{name}, run {seed}: {words}", file=sys.stderr, flush=True)
    return run


def measure(out: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Measures all seeds, so many at a time; writes the values after each.

    Returns:
        Of each variant the seconds of processor time of its runs, and the share told under each corruption.
    """
    measured, clean = Measured(), Measured()
    details: dict[str, dict[str, Any]] = {name: {"seconds": [], "by corruption": []} for name in VARIANTS}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for run in pool.map(measure_run, SEEDS):
            measured |= run.measured
            clean |= run.clean
            for name, (seconds, told) in run.details.items():
                details[name]["seconds"].append(seconds)
                details[name]["by corruption"].append(told)
            save(measured, out / "tap.csv")
            save(clean, out / "tap_clean.csv")
    return details


def claims(measured: Measured, clean: Measured) -> list[Claim]:
    """All claims on what was measured, that on clean pictures the last."""
    seeds = SEEDS[0], SEEDS[-1]
    return [*claims_of_pairs(measured, PAIRS, seeds), within(clean, _CLEAN, MARGIN, seeds)]


def variants_table(measured: Measured, clean: Measured) -> Table:
    """Accuracy and likeness of attention of all variants."""
    rows = []
    for name in VARIANTS:
        row = [name]
        for what, values in (("corrupted", measured), ("clean", clean), ("cosine", measured)):
            means = [statistics.fmean(run) for run in runs(values, f"{what}: {name}")]
            row.append(spread(means, percent=what != "cosine"))
            if what == "corrupted":
                row.append(", ".join(f"{own:.1%}" for own in means))
        rows.append(row)
    header = ["", "told when corrupted (mean of the runs, 95 % interval of the mean)", "runs", "told when clean"]
    title = (
        f"TAP + ADL: {CORRUPTED} pictures under {len(CORRUPTIONS)} corruptions, {TEST} clean ones, {len(SEEDS)} runs"
    )
    return Table(title, [*header, "cosine of rows of attention"], rows)


def corruptions_table(details: Mapping[str, Mapping[str, Any]]) -> Table:
    """Accuracy under each corruption, mean of the runs."""
    means = {name: np.mean(own["by corruption"], 0) for name, own in details.items()}
    rows = [[c.replace("_", " "), *(f"{means[name][n]:.1%}" for name in VARIANTS)] for n, c in enumerate(CORRUPTIONS)]
    words = " and ".join(map(str, SEVERITIES))
    return Table(f"TAP + ADL: told under each corruption, severities {words}, mean of the runs", ["", *VARIANTS], rows)


def costs(turns: int = 20) -> dict[str, list[Any]]:
    """With and without TAP: parameters, multiply-adds, and the median time over that without of forward passes."""
    models = {name: build(0, VARIANTS[name][0]).eval() for name in (PLAIN, TAP)}
    images = torch.randn(32, 3, SIZE, SIZE)
    found = times(models, images, turns)
    table: dict[str, list[Any]] = {}
    for name, model in models.items():
        with record_attention(model):  # a fused product would not be counted
            number = macs(model, images[:1])
        ratios = [own / plain for own, plain in zip(found[name], found[PLAIN], strict=True)]
        table[name] = [parameters(model), number, statistics.median(ratios)]
    return table


def costs_table(cost: Mapping[str, list[Any]], details: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each takes to ask and to train; ADL has no part in the former."""
    rows = []
    for name, (num_scales, _) in VARIANTS.items():
        count, number, ratio = cost[TAP if num_scales > 1 else PLAIN]
        pairs = zip(details[name]["seconds"], details[PLAIN]["seconds"], strict=True)
        steps = statistics.median(own / plain for own, plain in pairs)
        rows.append([name, f"{count / 1e3:.1f} k", f"{number / 1e6:.2f} M", f"{ratio:.2f}", f"{steps:.2f}"])
    header = ["", "parameters", "MACs of a picture, averages of TAP not counted"]
    return Table(
        "TAP + ADL: what it costs", [*header, "forward time, batch 32, over FAN", "training step over FAN"], rows
    )


def report(
    measured: Measured,
    clean: Measured,
    cost: Mapping[str, list[Any]],
    details: Mapping[str, Mapping[str, Any]],
    on: Mapping[str, Any],
) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    tables = [variants_table(measured, clean), corruptions_table(details), costs_table(cost, details)]
    return Report(
        method="TAP + ADL",
        paper="Guo et al., ICCV 2023, arXiv 2303.11126",
        command=COMMAND,
        protocol=(
            f"Shapes on textured grounds (`recipes/textured.py`), {SIZE} pixels. FAN of {DEPTH} blocks, width {DIM}, "
            f"from scratch on clean pictures, {STEPS} steps of {BATCH}: as it is, with TAP, with ADL, with both; same "
            f"initial weights, same batches, {len(SEEDS)} seeds. "
            f"{CORRUPTED} pictures under {len(CORRUPTIONS)} corruptions of ImageNet-C at severities "
            f"{' and '.join(map(str, SEVERITIES))}, and {TEST} clean ones. "
            "Intervals are bootstraps over runs and pictures; p is of the sign test over pictures, adjusted for the "
            f"number of claims (Holm). Clean accuracy counts as kept if the interval excludes a loss of {MARGIN:.0%}. "
            "The script holds the whole protocol."
        ),
        machine=dict(on),
        claims=claims(measured, clean),
        tables=tables,
        details={
            "steps": STEPS,
            "batch": BATCH,
            "learning rate": RATE,
            "training pictures": TRAIN,
            "cost": {name: list(own) for name, own in cost.items()},
            "variants": {name: dict(own) for name, own in details.items()},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of tap.json, tap.csv and tap_clean.csv")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time, each on one thread")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    details = measure(args.out, args.processes)
    on = machine.describe("torch", "timm", "scipy", "imagecorruptions-imaug") | {"threads": 1}
    made = report(load(args.out / "tap.csv"), load(args.out / "tap_clean.csv"), costs(), details, on)
    made.save(args.out / "tap.json")
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
