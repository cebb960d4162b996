"""PSA's claim, measured on the joints of drawn figures: is regression at every pixel better with it than without?

    python -m benchmarks.claims.psa                # results/psa.json and psa.csv; some 11 minutes on one core

Paper: "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", Liu et al., arXiv 2107.00782. Needs
scipy, which the `test` extra brings.

The protocol, fixed before the measurement:

* **Pictures.** `recipes.key_points`: a stick figure with eleven joints among coloured shapes and loose sticks that look
  like its limbs. 48 pixels; 8000 to learn from (seed 0), 500 to measure on (seed 1), the same for all.
* **Network.** A convolution of stride 2, four of timm's basic blocks, 24 channels wide and dilated by 1, 2, 4 and 4,
  and a 1x1 convolution to a heat map of 24 x 24 for each joint. The attention stands between the two convolutions of a
  block, where the published networks have PSA; squeeze-and-excitation, timm's as it comes, in the same place. PSA in
  both layouts as released, which is the default here; beside it the parallel one with the spatial mask of the paper.
* **Training.** Three runs, seeds 0, 1 and 2: weights that a network shares with the one without attention begin alike,
  and all see the same batches of 32 in the same order for 300 steps of AdamW. The loss is the squared error to
  Gaussians around the joints, one cell wide. The rate was chosen on other pictures (seeds 500 and 501) and another
  order (90), weights being those of seed 0, with 200 steps: of 3e-3, 8e-3 and 1.6e-2 the last did best for the network
  without attention and for PSA in both layouts as released; SE and the paper's form were not tried at it.
* **Scores.** Of each picture the share of joints within 1.5 pixels, 1/32 of the picture's side, of where the map is
  highest, a quarter of a cell towards the higher neighbour; and the mean squared error of the maps.
* **Measured twice.** At first with 100 steps, at which nothing had converged (60 % of the joints) and nothing showed.
  Three times as many were then taken for all, nothing else was changed, and what is kept is the second measurement.
* **Verdict.** Differences are paired, their 95 % bootstrap intervals draw runs and pictures, p is of the sign test over
  pictures, adjusted for the number of claims (Holm); a claim is shown, or contradicted, where p is below 0.05 and the
  interval leaves out 0.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, get_attn
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.claims.layers import Layer, costs_table, started
from benchmarks.claims.measured import Measured, Pair, claims, load, runs, save, shares_table, spread
from benchmarks.claims.report import RESULTS, Report, Table
from benchmarks.claims.training import Pictures, logits, train
from recipes import key_points
from vision.criterion import StepLoss
from vision.psa import PolarizedSelfAttention

__all__ = [
    "LAYERS", "PAIRS", "SEEDS", "Network", "drawn", "errors_table", "heat_map_loss", "heat_maps", "measure", "peaks",
    "report",
]  # fmt: skip

COMMAND = "python -m benchmarks.claims.psa"
SEEDS = (0, 1, 2)
TRAIN_PICTURES, TRAIN_SEED = 8000, 0
TEST_PICTURES, TEST_SEED = 500, 1
STEPS, LEARNING_RATE, BATCH_SIZE = 300, 1.6e-2, 32
CHANNELS, DILATIONS, STRIDE = 24, (1, 2, 4, 4), 2
SIGMA = 1.0  # of the Gaussians, in cells
NEAR = 1.5  # pixels

LAYERS: dict[str, Layer] = {
    "none": None,
    "SE": get_attn("se"),
    "PSA(p)": PolarizedSelfAttention,
    "PSA(s)": partial(PolarizedSelfAttention, layout="sequential"),
    "PSA(p), paper's form": partial(PolarizedSelfAttention, form="paper"),
}
"""Name → attention; the network without any is the first."""

_JOINTS, _MAPS = "joints: ", "maps: "  # before the name of a layer: of which score its values are
_PUBLISHED = "2 to 4 points over standard baselines (abstract)"
_NONE = "no figure"
PAIRS = (
    Pair("PSA(p) finds more joints than no attention", _PUBLISHED, f"{_JOINTS}PSA(p)", f"{_JOINTS}none"),
    Pair("PSA(s) finds more joints than no attention", _PUBLISHED, f"{_JOINTS}PSA(s)", f"{_JOINTS}none"),
    Pair("PSA(p) finds more joints than squeeze-and-excitation", _NONE, f"{_JOINTS}PSA(p)", f"{_JOINTS}SE"),
    Pair("PSA(s) finds more joints than squeeze-and-excitation", _NONE, f"{_JOINTS}PSA(s)", f"{_JOINTS}SE"),
    Pair("PSA(p) has a smaller error of heat maps than no attention, in 1e-3", _NONE, f"{_MAPS}PSA(p)", f"{_MAPS}none",
         -1, False),
    Pair("PSA(s) has a smaller error of heat maps than no attention, in 1e-3", _NONE, f"{_MAPS}PSA(s)", f"{_MAPS}none",
         -1, False),
)  # fmt: skip


class Network(nn.Module):
    """A small network that keeps its resolution: picture in, a heat map for each joint out.

    Args:
        layer: Attention between the two convolutions of each block.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, CHANNELS, 3, stride=STRIDE)
        self.blocks = nn.Sequential(*(BasicBlock(CHANNELS, CHANNELS, dilation=own) for own in DILATIONS))
        self.head = nn.Conv2d(CHANNELS, len(key_points.JOINTS), 1)
        for block in self.blocks:
            assert isinstance(block, BasicBlock)
            block.zero_init_last()
            if layer is not None:
                block.aa = layer(CHANNELS)  # an empty slot without stride, behind the first activation

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, K, H / 2, W / 2]`."""
        return self.head(self.blocks(self.stem(x)))


def heat_maps(joints: Tensor, size: Sequence[int]) -> Tensor:
    """The maps to be learnt: Gaussians that are 1 on the joint.

    Args:
        joints: `[B, K, 2]`, x and y in pixels.
        size: Height and width of the maps, in cells.

    Returns:
        `[B, K, H, W]`.
    """
    x, y = (joints / STRIDE).unbind(-1)
    rows, columns = (
        (-(torch.arange(length, device=joints.device) + 0.5 - place[..., None]).square() / (2 * SIGMA**2)).exp()
        for length, place in zip(size, (y, x), strict=True)
    )
    return rows[..., :, None] * columns[..., None, :]


def peaks(maps: Tensor) -> Tensor:
    """Where maps are highest, a quarter of a cell towards the higher neighbour.

    Args:
        maps: `[B, K, H, W]`.

    Returns:
        `[B, K, 2]`, x and y in pixels.
    """
    width = maps.shape[3]
    index = maps.flatten(2).argmax(2)  # [B, K]
    row, column = index // width, index % width
    padded = F.pad(maps, (1, 1, 1, 1), mode="reflect").flatten(2)  # at an edge: no shift across it

    def at(down: int, right: int) -> Tensor:
        return padded.gather(2, ((row + 1 + down) * (width + 2) + column + 1 + right)[..., None])[..., 0]

    x = column + 0.5 + 0.25 * (at(0, 1) - at(0, -1)).sign()
    y = row + 0.5 + 0.25 * (at(1, 0) - at(-1, 0)).sign()
    return torch.stack([x, y], -1) * STRIDE


def heat_map_loss(model: nn.Module, images: Tensor, joints: Tensor) -> StepLoss:
    """The criterion: squared error of the maps, summed over places."""
    out = model(images)
    loss = (out - heat_maps(joints, out.shape[2:])).square().sum((2, 3)).mean()
    return StepLoss(loss, out.detach(), {"squared error": loss.detach()})


def drawn(seed: int, num: int) -> Pictures:
    """Pictures and their joints."""
    images, joints = key_points.pictures(seed, num)
    return Pictures(torch.from_numpy(images), torch.from_numpy(joints))


def measure(learnt: Pictures, test: Pictures, steps: int = STEPS, seeds: Sequence[int] = SEEDS) -> Measured:
    """Of each layer and run for each picture the share of joints that were found, and the maps' error in 1e-3.

    Args:
        learnt: What the networks learn from.
        test: What they are asked about.
        steps: Of training.
        seeds: Of the runs.
    """
    measured: Measured = {}
    for name, layer in LAYERS.items():
        for seed in seeds:
            model = started(Network, layer, seed)
            train(model, learnt, steps, seed, heat_map_loss, BATCH_SIZE, LEARNING_RATE)
            maps = logits(model, test)
            distances = (peaks(maps) - test.labels).norm(dim=2)  # [N, K]
            errors = (maps - heat_maps(test.labels, maps.shape[2:])).square().mean((1, 2, 3))
            measured[_JOINTS + name, seed] = (distances <= NEAR).double().mean(1).numpy()
            measured[_MAPS + name, seed] = errors.double().numpy() * 1e3
            found, error = measured[_JOINTS + name, seed].mean(), measured[_MAPS + name, seed].mean()
            print(f"{name}, run {seed}: {found:.1%} of the joints, error {error:.3f}e-3", flush=True)
    return measured


def errors_table(measured: Measured) -> Table:
    """The mean error of the maps of each layer."""
    rows = []
    for name in LAYERS:
        each = [float(np.mean(run)) for run in runs(measured, _MAPS + name)]
        rows.append([name, spread(each), ", ".join(f"{error:.3f}" for error in each)])
    return Table("PSA: mean squared error of the heat maps, in 1e-3", ["", "mean and 95 % interval", "runs"], rows)


def _joints_table(measured: Measured) -> Table:
    own: Measured = {(name, run): measured[_JOINTS + name, run] for name in LAYERS for run in SEEDS}
    return shares_table(f"PSA: joints within {NEAR} pixels, {TEST_PICTURES} pictures, {len(SEEDS)} runs", own)


def report(measured: Measured, costs: Table, on: Mapping[str, Any]) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    return Report(
        method="PSA",
        paper="Liu et al., arXiv 2107.00782",
        command=COMMAND,
        protocol=(
            f"The same small network with each attention, trained for {STEPS} steps on the same batches from the same "
            f"weights as far as shapes allow, {len(SEEDS)} runs; heat maps of the joints of drawn figures "
            f"(`recipes/key_points.py`); {TEST_PICTURES} other pictures to measure on. A joint is found if the highest "
            f"place of its map is within {NEAR} pixels, 1/32 of the picture's side. Differences are paired, "
            "their 95 % bootstrap intervals draw runs and pictures; p is of the sign test over pictures, adjusted for "
            "the number of claims (Holm). The script holds the whole protocol."
        ),
        machine=dict(on),
        claims=claims(measured, PAIRS, (SEEDS[0], SEEDS[-1])),
        tables=[_joints_table(measured), errors_table(measured), costs],
        details={
            "steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "batch_size": BATCH_SIZE,
            "channels": CHANNELS,
            "dilations": list(DILATIONS),
            "pictures": {"train": [TRAIN_SEED, TRAIN_PICTURES], "test": [TEST_SEED, TEST_PICTURES]},
            "costs": dataclasses.asdict(costs),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of psa.json and psa.csv")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    test = drawn(TEST_SEED, TEST_PICTURES)
    save(measure(drawn(TRAIN_SEED, TRAIN_PICTURES), test), args.out / "psa.csv")
    costs = costs_table("PSA: what the layers cost in that network", Network, LAYERS, test.batch(torch.arange(32))[0])
    on = machine.describe("torch", "timm", "scipy") | {"threads": args.threads}
    made = report(load(args.out / "psa.csv"), costs, on)
    made.save(args.out / "psa.json")
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
