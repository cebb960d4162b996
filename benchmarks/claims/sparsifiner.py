"""Sparsifiner's claim, measured on a small transformer: less attention computed, hardly less told right?

    python -m benchmarks.claims.sparsifiner --processes 3    # results/sparsifiner.json and sparsifiner.csv

Paper: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", Wei et al.,
CVPR 2023, arXiv 2303.13755: 48 to 69 % fewer multiply-adds of attention, accuracy within 0.4 points, which in its
figures are DeiT-S with 0.3 and with 0.1 of the keys. Needs scipy, which the `test` extra brings.

The protocol, fixed before the measurement:

* **Pictures.** `recipes.named_shapes`: one object on a ground of stripes and spots, 36 classes of colour and shape, 32
  pixels, the object 0.75 to 0.92 of the side; 8000 to learn from (seed 0), 3000 to measure on (seed 1), the same for
  all.
* **Networks.** DeiT's with small settings: patches of 4 × 4 pixels, so 64 tokens and the class token, width 64, 2
  heads, 4 blocks. Predictors as in the paper: 6 tokens to a basis vector, half the channels, 8 coefficients, basis
  above 0.02.
* **Training.** Three runs, seeds 0, 1 and 2, batches of 32. The dense teacher: 600 steps. Its weights, and predictors
  that learn its attention for 150 steps, are where all students of the run begin; then everything but the predictors
  learns from labels and teacher by the paper's losses and weights for 150 steps, on the same batches. Students: 0.3 and
  0.1 of the keys; dense attention, as long distilled; 0.1 of the keys by predictors that never learned.
* **Choice of settings.** On other pictures (seeds 100 and 101) and one teacher from another seed: the size of the
  objects, the teacher's steps and rate, so that it tells some 85 to 90 %; the predictors' rate (1e-2 rather than 3e-3)
  by their own loss; steps and rate of the distillation are those that were tried first, with half as many steps again.
* **Cost.** Multiply-adds of matrix products, counted as they run by the gathering path, predictors included, over those
  of dense attention, 2 N² C each block. Time of whole networks, in turns, over the dense one's.
* **Verdicts.** Right or wrong for each picture and run; differences are paired, their 95 % bootstrap intervals draw
  runs and pictures. "Within 0.4 points" is shown if the interval lies above -0.4 points, contradicted if it lies below.
  That trained predictors do better than untrained ones: by the sign test over pictures, below 0.05, and an interval
  that leaves out 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.claims.layers import parameters, times
from benchmarks.claims.measured import Measured, Pair, claims, load, save, shares_table, within
from benchmarks.claims.report import RESULTS, Claim, Report, Table
from benchmarks.claims.training import Pictures, hits, train
from benchmarks.sparsifiner import MacCounter, published_rows
from recipes import named_shapes
from vision.sparsifiner import Sparsifiner, SparsifinerCriterion

__all__ = ["MARGIN", "SEEDS", "STUDENTS", "attention_macs", "costs", "drawn", "measure_run", "network", "report"]

COMMAND = "python -m benchmarks.claims.sparsifiner --processes 3"
SEEDS = (0, 1, 2)
SIZE, DIAMETERS = 32, (0.75, 0.92)
TRAIN_PICTURES, TRAIN_SEED = 8000, 0
TEST_PICTURES, TEST_SEED = 3000, 1
BATCH_SIZE = 32
STEPS = {"teacher": 600, "attn_recon": 150, "cls_distill": 150}
RATES = {"teacher": 3e-3, "attn_recon": 1e-2, "cls_distill": 5e-4}
MARGIN = 0.004
DEIT_DENSE = 357.7  # millions of multiply-adds, as published

TEACHER, DENSE, BLIND = "dense teacher", "dense, distilled too", "0.1 of the keys, predictors untrained"
STUDENTS: dict[str, tuple[float | None, bool]] = {
    DENSE: (None, True),
    "0.3 of the keys": (0.3, True),
    "0.1 of the keys": (0.1, True),
    BLIND: (0.1, False),
}
"""Name → share of the keys, None for all; and whether its predictors learned the teacher's attention."""

_DEIT = "of DeiT-S on ImageNet-1K (project page)"
_PUBLISHED = {
    0.3: f"79.82 → 79.83 at 48 % fewer multiply-adds, {_DEIT}",
    0.1: f"79.82 → 79.42 at 69 % fewer multiply-adds, {_DEIT}",
}
_THAN = {
    TEACHER: "than the dense teacher",
    DENSE: "than a dense network that was distilled as long",
}
WITHIN = tuple(
    Pair(
        f"With {rate} of the keys the network is no 0.4 points worse {than}",
        _PUBLISHED[rate] if name == TEACHER else "no figure",
        f"{rate} of the keys",
        name,
    )
    for name, than in _THAN.items()
    for rate in _PUBLISHED
)
PAIRS = (
    Pair(
        "Predictors that learned the teacher's attention choose better keys than untrained ones",
        "no figure",
        "0.1 of the keys",
        BLIND,
    ),
)


def network(keep_rate: float | None = None) -> Sparsifiner:
    """The network, `[B, 3, 32, 32]` → `[B, 36]`, with a share of the keys or, if None, with dense attention."""
    return Sparsifiner(
        img_size=SIZE,
        patch_size=4,
        num_classes=len(named_shapes.NAMES),
        embed_dim=64,
        depth=4,
        num_heads=2,
        mlp_ratio=2.0,
        weight_init="jax",  # a deviation of 0.02, as usual, is too small for this width
        keep_rate=keep_rate or 1.0,
        attention_path="auto" if keep_rate else "dense",
    )


def drawn(seed: int, num: int) -> Pictures:
    """Pictures and their classes."""
    images, labels = named_shapes.pictures(seed, num, SIZE, DIAMETERS)
    return Pictures(torch.from_numpy(images), torch.from_numpy(labels))


def taught(
    teacher: nn.Module,
    start: Mapping[str, Tensor],
    keep_rate: float | None,
    phase: Any,
    learnt: Pictures,
    seed: int,
    steps: int,
) -> Sparsifiner:
    """A network after one phase of training.

    Args:
        teacher: Dense.
        start: The state that it begins with.
        keep_rate: See `network`.
        phase: Of `SparsifinerCriterion`.
        learnt: What it learns from.
        seed: Of the order.
        steps: Of the phase.
    """
    model = network(keep_rate)
    model.load_state_dict(start)
    criterion = SparsifinerCriterion(teacher, phase)
    criterion.set_trainable(model)
    train(model, learnt, steps, seed, criterion, BATCH_SIZE, RATES[phase])
    return model


def measure_run(
    seed: int, steps: Mapping[str, int] = STEPS, num_learnt: int = TRAIN_PICTURES, num_test: int = TEST_PICTURES
) -> Measured:
    """Trains teacher and students of a seed, and asks each of the test pictures.

    Args:
        seed: Of the run.
        steps: Of teacher and phases.
        num_learnt: Pictures to learn from.
        num_test: Pictures to be asked about.
    """
    torch.set_num_threads(1)
    learnt, test = drawn(TRAIN_SEED, num_learnt), drawn(TEST_SEED, num_test)
    measured: Measured = {}

    def ask(name: str, model: nn.Module) -> None:
        measured[name, seed] = hits(model, test)
        print(f"{name}, run {seed}: {measured[name, seed].mean():.1%}", file=sys.stderr, flush=True)

    torch.manual_seed(seed)
    teacher = network()
    from_labels = SparsifinerCriterion(weights={"cls_distill": 0.0, "token_distill": 0.0})
    from_labels.set_trainable(teacher)  # all but its predictors, which are never asked
    train(teacher, learnt, steps["teacher"], seed, from_labels, BATCH_SIZE, RATES["teacher"])
    ask(TEACHER, teacher)
    untrained = teacher.state_dict()
    trained = taught(teacher, untrained, 0.1, "attn_recon", learnt, seed, steps["attn_recon"]).state_dict()
    for name, (rate, knows) in STUDENTS.items():
        start = trained if knows else untrained
        ask(name, taught(teacher, start, rate, "cls_distill", learnt, seed, steps["cls_distill"]))
    return measured


def measure(out: Path, processes: int) -> None:
    """Measures all runs, so many at a time, and keeps the values by picture."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        each = list(pool.map(measure_run, SEEDS))
    names = [TEACHER, *STUDENTS]
    save({(name, seed): run[name, seed] for name in names for seed, run in zip(SEEDS, each, strict=True)}, out)


def attention_macs(model: Sparsifiner) -> tuple[int, int]:
    """Multiply-adds for one picture as they run: of attention with its predictors, and of the whole network.

    What is not attention is the same for all paths: what dense attention leaves of the whole.

    Args:
        model: In evaluation mode; on the path 'masked' all products are counted, chosen or not.
    """
    path = model.attention_layers()[0].attention_path
    whole = _macs(model)
    model.set_attention_path("dense")
    dense = _macs(model)
    model.set_attention_path(path)
    tokens = model.attention_layers()[0].mask_predictor.num_tokens
    rest = dense - len(model.blocks) * 2 * tokens**2 * model.embed_dim
    return whole - rest, whole


def _macs(model: nn.Module) -> int:
    with torch.no_grad(), MacCounter() as counter:
        model(torch.zeros(1, 3, SIZE, SIZE))
    return counter.macs


def costs(images: Tensor, turns: int = 8) -> Table:
    """Parameters, multiply-adds and time of the networks.

    Args:
        images: Of the forward passes, `[B, 3, 32, 32]`.
        turns: Of the timing.
    """
    models = {"dense": network().eval()}
    for rate in (0.3, 0.1):
        for path in ("masked", "gather"):
            own = network(rate).eval()
            own.set_attention_path(path)
            models[f"{rate} of the keys, path '{path}'"] = own
    found = times(models, images, turns)
    dense, _ = attention_macs(models["dense"])
    rows = []
    for name, model in models.items():
        ratio = statistics.median(a / b for a, b in zip(found[name], found["dense"], strict=True))
        macs, whole = attention_macs(model)
        counts = [f"{macs / 1e6:.2f} M, {macs / dense:.0%} of dense", f"{whole / 1e6:.2f} M"]
        rows.append([name, f"{parameters(model) / 1e3:.1f} k", *counts, f"{ratio:.2f}"])
    time = f"forward time, batch {len(images)}, over dense"
    header = ["", "parameters", "MACs of attention and predictors", "MACs in all", time]
    return Table("Sparsifiner: what the networks cost", header, rows)


def deit_table() -> Table:
    """Multiply-adds of attention and predictors in DeiT-S, published and as they run here."""
    header = ["share of the keys", "published", "here, counted as it ran"]
    rows = []
    for row in published_rows():
        if row["keep_rate"] in (0.5, 0.3, 0.1):
            counts = (row["published"], row["executed"])
            rows.append([str(row["keep_rate"]), *(f"{own:.1f} M, {own / DEIT_DENSE:.0%} of dense" for own in counts)])
    return Table(f"Sparsifiner: attention of DeiT-S at 224 pixels; dense {DEIT_DENSE} M multiply-adds", header, rows)


def all_claims(measured: Measured) -> list[Claim]:
    """Of losses within the margin, then of what the predictors' training does."""
    seeds = SEEDS[0], SEEDS[-1]
    return [*(within(measured, own, MARGIN, seeds) for own in WITHIN), *claims(measured, PAIRS, seeds)]


def report(measured: Measured, cost: Table, on: Mapping[str, Any]) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    title = f"Sparsifiner: objects that were told right, {TEST_PICTURES} pictures, {len(SEEDS)} runs"
    return Report(
        method="Sparsifiner",
        paper="Wei et al., CVPR 2023",
        command=COMMAND,
        protocol=(
            "A small dense transformer learns colour and shape of drawn objects (`recipes/named_shapes.py`) "
            f"in {STEPS['teacher']} steps; its students begin with its weights and with predictors that learned its "
            f"attention for {STEPS['attn_recon']} steps, and are distilled from it for {STEPS['cls_distill']} steps, "
            f"{len(SEEDS)} runs; {TEST_PICTURES} other pictures to measure on. Differences are paired, their 95 % "
            "bootstrap intervals draw runs and pictures; a loss within 0.4 points is shown if the interval lies above "
            "-0.4 points, contradicted if it lies below. The script holds the whole protocol."
        ),
        machine=dict(on),
        claims=all_claims(measured),
        tables=[shares_table(title, measured), cost, deit_table()],
        details={
            "steps": STEPS,
            "learning_rates": RATES,
            "batch_size": BATCH_SIZE,
            "margin": MARGIN,
            "pictures": {"train": [TRAIN_SEED, TRAIN_PICTURES], "test": [TEST_SEED, TEST_PICTURES]},
            "costs": dataclasses.asdict(cost),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of sparsifiner.json and sparsifiner.csv")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one thread")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    measure(args.out / "sparsifiner.csv", args.processes)
    cost = costs(drawn(TEST_SEED, 50).batch(torch.arange(50))[0])
    on = machine.describe("torch", "timm", "scipy") | {"threads": 1}
    made = report(load(args.out / "sparsifiner.csv"), cost, on)
    made.save(args.out / "sparsifiner.json")
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
