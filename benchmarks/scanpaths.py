"""What scanpaths cost: drawing many from a model, with kept keys and values and without, and comparing 10,000 pairs.

    python benchmarks/scanpaths.py --json benchmarks/results/scanpaths.json

The model is OAT at its default size, with random weights; both ways of drawing run in turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import machine
from vision.scanpath.decoding import StepDecoder
from vision.scanpath.metrics import fixation_edit_distance, multimatch, scanmatch, sequence_score
from vision.scanpath.model import OAT, OATConfig
from vision.scanpath.objects import RegularGrid
from vision.scanpath.scenes import Scenes

ROWS, COLUMNS, SAMPLES = 6, 14, 100
PAIRS, FIXATIONS = 10_000, 15


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def decoding(length: int, turns: int) -> dict[str, Any]:
    """100 scanpaths of one scene of 84 objects, token by token and all over again for each token."""
    torch.manual_seed(0)
    model = OAT(OATConfig(appearance="none", extent=(ROWS, COLUMNS))).eval()
    shelf = RegularGrid(ROWS, COLUMNS).on((1400, 600))
    encoded = model.encode(Scenes.of_objects([shelf], [4]))
    paths = torch.randint(ROWS * COLUMNS, (SAMPLES, length))
    repeated = encoded.select(torch.zeros(SAMPLES, dtype=torch.int64))

    def kept() -> torch.Tensor:
        decoder = StepDecoder(model, encoded, SAMPLES, length + 1)
        steps = [decoder.step(None), *(decoder.step(paths[:, t][None]) for t in range(length))]
        return steps[-1][0]

    def anew() -> torch.Tensor:
        steps = [model.decode(repeated, paths[:, :t])[:, -1] for t in range(1, length + 1)]
        return steps[-1]

    torch.testing.assert_close(kept(), anew(), rtol=1e-3, atol=1e-3)
    timed = [(seconds(kept), seconds(anew)) for _ in range(turns)]
    return {
        "fixations": length,
        "seconds": statistics.median(own for own, _ in timed),
        "ratio": statistics.median(other / own for own, other in timed),
    }


def metrics(turns: int) -> list[dict[str, Any]]:
    """10,000 pairs of scanpaths of 15 fixations, by each metric."""
    rng = np.random.default_rng(0)
    cells = np.stack(np.divmod(np.arange(ROWS * COLUMNS), COLUMNS), 1).astype(float)
    ours, theirs = rng.integers(ROWS * COLUMNS, size=(2, PAIRS, FIXATIONS))
    places, others = rng.uniform(0, 600, (2, PAIRS, FIXATIONS, 2))
    timed: dict[str, Callable[[], object]] = {
        "sequence_score": lambda: sequence_score(list(ours), list(theirs)),
        "fixation_edit_distance": lambda: fixation_edit_distance(list(ours), list(theirs)),
        "scanmatch": lambda: scanmatch(list(ours), list(theirs), cells),
        "multimatch": lambda: multimatch(list(places), list(others), (800, 600)),
    }
    return [
        {"metric": name, "seconds": statistics.median(seconds(metric) for _ in range(turns))}
        for name, metric in timed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8, 16, 32], help="fixations of a scanpath")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {
        "command": "python benchmarks/scanpaths.py",
        **machine.describe("torch", "numpy"),
        "threads": args.threads,
        "decoding": [decoding(length, args.turns) for length in args.lengths],
        "metrics": metrics(args.turns),
    }
    for row in found["decoding"]:
        print(f"{row['fixations']} fixations: {row['seconds']:.3f} s; anew for each {row['ratio']:.1f} times as long")
    for row in found["metrics"]:
        print(f"{row['metric']}: {row['seconds']:.2f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
