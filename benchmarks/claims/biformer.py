"""Bi-level routing attention's claim: memory and computation saved as pictures grow, at no loss of accuracy?

    python -m benchmarks.claims.biformer          # results/biformer.json and biformer.csv

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", Zhu et al., CVPR 2023. Needs scipy, which the
`test` extra brings.

The protocol, fixed before the measurement:

* **Costs.** `biformer_nano` on one picture of 224 to 1024 pixels a side: as it is, and with dense attention in place of
  routed attention in the first three stages, the same weights in both. Dense attention runs by torch's fused kernel,
  or step by step with all scores in memory, as it did when the paper was written (up to 512 pixels, where scores and
  softmax take 2 GB; at 1024 they would take 34). The last stage is dense in all.
* **Multiply-adds** of matrix products and convolutions are counted by torch. **Peak memory** is by how much that of a
  fresh process rises in one forward. Both are read once: counts do not change, and two readings of memory were less
  than a tenth apart. They have neither interval nor p, and differences below a tenth say nothing.
* **Time** is of turns in one process, routed, dense, routed, dense …, after one round that does not count: of each turn
  how many times as long the fused kernel took, its geometric mean with a 95 % bootstrap interval over turns. p is of
  the sign test over turns.
* **Accuracy.** A small BiFormer of one stage, four blocks of routed attention on 12 × 12 tokens in 3 × 3 regions of
  which 2 are chosen, without the convolution on the values; the same with dense attention; and with each region
  attending to itself alone, which says whether attention to elsewhere matters here at all. It learns
  `recipes.told_by_heart`: the class is the colour of one object, and another one that lies apart says which. From
  seeds 0, 1 and 2, the same initial weights, pictures, order and turns for all three; 2000 test pictures that none
  has seen.
* **Settings** were chosen on other pictures (seeds 900 and 901), the same for all three. Two tasks were given up: in
  one regions alone did as well as dense attention, the other was not learnt in the time. On this one the dense
  network was close to faultless after 250 steps (training loss 0.01, with a noise of 45 it was 0.06); so noise of up
  to 110 was taken, for which nothing was tried before. Chance is 25 %, and 50 % for who knows the objects but not the
  heart. Nothing was chosen on the test pictures.
* **No loss** means less than one percentage point: shown if the 95 % bootstrap interval of the difference, which draws
  runs and pictures, lies above -1, contradicted if it lies below, else not shown. p does not decide here.
* **Afterwards**, when at these steps the runs of the routed network differed widely, it was trained for twice as many
  from each seed, to tell later from never. That stands beside the claims and enters none.
* **Verdict** elsewhere: below 0.05, adjusted for the number of tests (Holm), and with an interval that leaves out 0, a
  claim is shown if the difference has its direction, and contradicted if it has the other; else not shown.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.claims import biformer_cost as cost
from benchmarks.claims.biformer_cost import DENSE, ITSELF, ROUTED, WRITTEN, rebuilt
from benchmarks.claims.measured import Measured, load, runs, save, shares_table
from benchmarks.claims.paired import Comparison, Verdict, compare, compare_runs, holm, judged, verdict
from benchmarks.claims.report import RESULTS, Claim, Report, Table
from benchmarks.claims.training import Pictures, hits, train
from recipes.told_by_heart import CLASSES, pictures
from vision.biformer import BiFormer

__all__ = ["Costs", "accuracy", "claims", "costs", "network", "no_loss", "report", "turned"]

COMMAND = "python -m benchmarks.claims.biformer"
SEEDS = (0, 1, 2)
LARGE, SIZES = "biformer_nano", {224: 9, 384: 9, 512: 9, 768: 3, 1024: 1}
COST_WAYS = {ROUTED: 1024, DENSE: 1024, WRITTEN: 512}
"""Way → the largest size at which it is run."""
TIMED = 224, 512
LEAST = 0.1  # what is counted or read once says nothing below this share
MARGIN = 0.01

SIZE, NUM_OTHERS, NOISE = 48, 0, 110.0
TRAINING, TEST = 3000, 2000
TRAINING_SEED, TEST_SEED = 100, 200
STEPS, RATE, BATCH = 350, 4e-3, 64

LONGER = "routed, twice the steps"
TRAINED = {ROUTED: (ROUTED, STEPS), DENSE: (DENSE, STEPS), ITSELF: (ITSELF, STEPS), LONGER: (ROUTED, 2 * STEPS)}
"""What is trained: name → which way, and for how many steps."""

Costs = dict[str, dict[str, dict[str, Any]]]
"""What was counted and measured, "macs", "peak_mb" or "ms" → way → size → one value, or one for each turn."""


def costs(threads: int, sizes: Mapping[int, int] = SIZES, ways: Mapping[str, int] = COST_WAYS) -> Costs:
    """Multiply-adds, peak memory and time of `LARGE` at each size, by each way."""
    tried = [(way, size) for way, largest in ways.items() for size in sizes if size <= largest]
    found: Costs = {
        "macs": {way: {str(size): cost.macs(LARGE, way, size) for size in sizes} for way in (ROUTED, DENSE)},
        "peak_mb": {way: {} for way in ways},
        "ms": {way: {} for way in ways},
    }
    for way, size in tried:
        found["peak_mb"][way][str(size)] = round(cost.peak(LARGE, way, size, threads), 1)
    for (way, size), values in cost.times(LARGE, ways, sizes).items():
        found["ms"][way][str(size)] = [round(value, 3) for value in values.tolist()]
    return found


def network(way: str, seed: int) -> BiFormer:
    """The network that is trained, the same weights for all ways."""
    torch.manual_seed(seed)
    own: dict[str, Any] = {"depths": (4,), "embed_dims": (32,), "head_dim": 16, "n_win": 3, "topks": (2,)}
    return rebuilt(BiFormer(num_classes=len(CLASSES), img_size=SIZE, side_dwconv=0, **own), way)


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors and transposes pictures `[B, 3, S, S]` at random."""
    across, down, swapped = (torch.rand(3, len(images), generator=generator) < 0.5)[..., None, None, None]
    images = torch.where(across, images.flip(-1), images)
    images = torch.where(down, images.flip(-2), images)
    return torch.where(swapped, images.mT, images)


def _drawn(seed: int, num: int) -> Pictures:
    images, labels = pictures(seed, num, SIZE, NUM_OTHERS, NOISE)
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels))


def accuracy() -> Measured:
    """Whether each trained network gives each test picture its class."""
    seen, unseen = _drawn(TRAINING_SEED, TRAINING), _drawn(TEST_SEED, TEST)
    measured: Measured = {}
    for name, (way, steps) in TRAINED.items():
        for seed in SEEDS:
            model = network(way, seed)
            train(model, seen, steps, seed, batch_size=BATCH, learning_rate=RATE, augment=turned)
            measured[name, seed] = hits(model, unseen)
            print(f"{name}, seed {seed}: {measured[name, seed].mean():.1%}", flush=True)
    return measured


def no_loss(found: Comparison, margin: float = MARGIN) -> Verdict:
    """Whether ours is no worse than theirs by more than a margin: the interval of the difference decides, not p.

    Args:
        found: Ours against theirs, larger is better.
        margin: What counts as no loss.

    Raises:
        ValueError: A margin of 0 or less: equality cannot be shown.
    """
    if margin <= 0:
        raise ValueError(f"margin={margin}: expected a loss above 0 that is small enough to count as none.")
    low, high = found.interval
    if low > -margin:
        return "shown"
    return "contradicted" if high < -margin else "not shown at this scale"


def _counted(claim: str, words: str, saved: float) -> Claim:
    """A claim on what is counted or read once: `saved` is a share, and has neither interval nor p."""
    found = verdict(saved, 0.0, least=LEAST)
    return Claim(claim, "no figure", words, found, 1, (SEEDS[0], SEEDS[0]), saved, (saved, saved), 0.0)


def _claims_on_counts(found: Costs) -> list[Claim]:
    own, dense = (found["macs"][way] for way in (ROUTED, DENSE))
    ratios = [dense[size] / own[size] for size in own]
    first, *_, last = own
    growing = all(a < b for a, b in itertools.pairwise(ratios))
    many = _counted(
        "Routing saves multiply-adds, the more the larger the picture",
        f"of the whole network, dense / routed: {ratios[0]:.1f} at {first} px to {ratios[-1]:.1f} at {last} px",
        1 - 1 / ratios[-1] if growing else 0.0,
    )
    rows = [many]
    for way, claim in (
        (WRITTEN, "It saves memory against dense attention that holds its scores"),
        (DENSE, "It saves memory against dense attention by a fused kernel"),
    ):
        size = list(found["peak_mb"][way])[-1]
        ours, theirs = (found["peak_mb"][name][size] for name in (ROUTED, way))
        rows.append(_counted(claim, f"peak at {size} px {theirs:.0f} → {ours:.0f} MB", 1 - ours / theirs))
    return rows


def _faster(found: Costs, size: int) -> Comparison:
    """Of each turn the logarithm of how many times as long dense attention took."""
    ours, theirs = (np.log(found["ms"][way][str(size)]) for way in (ROUTED, DENSE))
    return compare(theirs.tolist(), ours.tolist())


def _claim_on_time(found: Costs, size: int, p: float) -> Claim:
    own = _faster(found, size)
    ratio, low, high = np.exp([own.difference, *own.interval])
    return Claim(
        f"It saves time against the fused kernel at {size} px",
        "no figure",
        f"{ratio:.2f} times as fast ({low:.2f} to {high:.2f}), faster in {own.better} of {own.n} turns, p = {p:.2g}",
        judged(own, p, 1),
        own.n,
        (SEEDS[0], SEEDS[0]),
        float(ratio - 1),
        (float(low - 1), float(high - 1)),
        p,
    )


def _claim_on_hits(claim: str, published: str, own: Comparison, words: Sequence[str], said: Verdict, p: float) -> Claim:
    low, high = own.interval
    text = (
        f"{words[0]} → {words[1]}: {own.difference:+.1%} ({low:+.1%} to {high:+.1%}), better in {own.better} and worse "
        f"in {own.worse} of {own.n}, p = {p:.2g}"
    )
    return Claim(claim, published, text, said, own.n, (SEEDS[0], SEEDS[-1]), own.difference, own.interval, p)


def claims(found: Costs, measured: Measured) -> list[Claim]:
    """Holds each claim against what was counted and measured, p adjusted for the number of tests."""
    to_dense = compare_runs(runs(measured, ROUTED), runs(measured, DENSE))
    to_itself = compare_runs(runs(measured, ROUTED), runs(measured, ITSELF))
    timed = [_faster(found, size).p for size in TIMED]
    *p_times, p_itself, p_dense = holm([*timed, to_itself.p, to_dense.p])
    share = {way: f"{np.mean(runs(measured, way)):.1%}" for way in (ROUTED, DENSE, ITSELF)}
    return [
        *_claims_on_counts(found),
        *(_claim_on_time(found, size, p) for size, p in zip(TIMED, p_times, strict=True)),
        _claim_on_hits(
            "It loses less than one percentage point of accuracy against dense attention",
            "no figure",
            to_dense,
            (share[DENSE], share[ROUTED]),
            no_loss(to_dense),
            p_dense,
        ),
        _claim_on_hits(
            "It is more accurate than regions that attend to themselves alone",
            "82.7 % to Swin-T's 81.3 % on ImageNet-1K in the same layout",
            to_itself,
            (share[ITSELF], share[ROUTED]),
            judged(to_itself, p_itself, 1),
            p_itself,
        ),
    ]


def _cost_table(found: Costs) -> Table:
    header = ["way", "px", "GMACs", "peak MB", "ms", "time / routed"]
    rows = []
    for size, routed in found["ms"][ROUTED].items():
        for way, by_size in found["ms"].items():
            if size in by_size:
                counted = found["macs"][ROUTED if way == ROUTED else DENSE][size]
                ratio = np.median(np.array(by_size[size]) / np.array(routed))
                row = [way, size, f"{counted / 1e9:.2f}", f"{found['peak_mb'][way][size]:.0f}"]
                rows.append([*row, f"{np.median(by_size[size]):.0f}", f"{ratio:.2f}"])
    return Table(f"BiFormer: `{LARGE}` on one picture, the same weights in each way", header, rows)


def _scores_note() -> Table:
    rows = [[f"{size}", f"{cost.score_gb(size):.2f}"] for size in SIZES]
    return Table("BiFormer: scores of one head of dense attention in the first stage, in fp32", ["px", "GB"], rows)


def _network_table() -> Table:
    rows = []
    for way in (ROUTED, DENSE, ITSELF):
        model = network(way, 0)
        params = sum(p.numel() for p in model.parameters())
        rows.append([way, f"{params / 1e3:.0f}", f"{cost.counted(model.eval(), SIZE) / 1e6:.2f}"])
    return Table(f"BiFormer: the networks that are trained, on {SIZE} px", ["way", "parameters (k)", "MMACs"], rows)


def report(found: Costs, measured: Measured, on: dict[str, Any]) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    title = f"BiFormer: right classes of {TEST} test pictures"
    return Report(
        method="Bi-level routing attention",
        paper="Zhu et al., CVPR 2023",
        command=COMMAND,
        protocol=(
            f"`{LARGE}` as it is and with dense attention, the same weights: multiply-adds counted by torch, peak "
            "memory of a fresh process each, time of turns in one process. A one-stage BiFormer learns "
            "`recipes/told_by_heart.py` with routed and with dense attention, and with regions that attend to "
            f"themselves alone, from {len(SEEDS)} seeds, same weights, pictures and order; {TEST} test pictures, the "
            "same for all. Differences are paired, their 95 % bootstrap intervals draw runs and pictures, or turns; p "
            "is of the sign test, adjusted for the number of tests (Holm). No loss means less than "
            f"{MARGIN:.0%}: the interval alone decides. The script holds the whole protocol."
        ),
        machine=on,
        claims=claims(found, measured),
        tables=[_cost_table(found), _scores_note(), shares_table(title, measured), _network_table()],
        details={
            "costs": found,
            "steps": STEPS,
            "rate": RATE,
            "training": TRAINING,
            "others": NUM_OTHERS,
            "noise": NOISE,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of biformer.json and biformer.csv")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    save(accuracy(), args.out / "biformer.csv")
    found = costs(args.threads)
    on = machine.describe("torch", "timm", "scipy") | {"threads": args.threads}
    made = report(found, load(args.out / "biformer.csv"), on)
    made.save(args.out / "biformer.json")
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
