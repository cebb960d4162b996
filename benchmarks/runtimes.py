"""What runs a network fastest on a CPU: PyTorch as it is, compiled, in bfloat16, ONNX Runtime, OpenVINO.

    python benchmarks/runtimes.py --json benchmarks/results/runtimes.json      # about ten minutes on two cores
    python benchmarks/runtimes.py --quick                                      # a smoke run; its figures mean little

One batch in memory, all runtimes in turns in one process, A B C A B C; the medians of the turns' ratios to PyTorch as
it is (channels last, memory kept: what `attnsuite classify` runs). *Start* is the time until the first batch is out.
*Differs* is the greatest difference of a logit, as a share of the greatest logit. Random weights: speed does not
depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402

MODELS = ("tf_efficientnet_lite0", "litv2_small", "biformer_small")


def measure(model: str, batch_size: int, turns: int) -> list[dict[str, Any]]:
    """Images a second of each runtime, and what it differs by."""
    import torch

    from apps.batch.processor import keep_freed_memory
    from apps.batch.stage import Compute
    from apps.classify import Classify
    from apps.models import ModelChoice, load, resolve

    keep_freed_memory()
    network = load(resolve(ModelChoice(model, random_weights=True)))
    images = torch.randn(batch_size, *network.data_config["input_size"])
    device = torch.device("cpu")
    stages = {
        "torch": Compute(device, batch_size=batch_size),
        "--compile": Compute(device, compile=True, batch_size=batch_size),
        "--amp": Compute(device, amp=True, batch_size=batch_size),
        "--runtime onnx": Compute(device, runtime="onnx", batch_size=batch_size),
        "--runtime openvino": Compute(device, runtime="openvino", batch_size=batch_size),
    }
    runs: dict[str, Callable[[Any], Any]] = {name: Classify(network, how).forward for name, how in stages.items()}
    starts, outputs = {}, {}
    for name, run in runs.items():
        begin = time.perf_counter()
        outputs[name] = run(images)
        starts[name] = time.perf_counter() - begin
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            begin = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - begin)
    plain = outputs["torch"]
    return [
        {
            "model": model, "runtime": name, "batch_size": batch_size, "threads": torch.get_num_threads(),
            "images_per_s": round(batch_size / statistics.median(seconds[name]), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(seconds["torch"], seconds[name], strict=True)), 2),
            "start_s": round(starts[name], 1),
            "differs": float(f"{((outputs[name] - plain).abs().max() / plain.abs().max()).item():.1e}"),
        }
        for name in runs
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one light model, small batches, one turn")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.turns = 2, 1
    if options.model:
        print(json.dumps(measure(options.model, options.batch_size, options.turns)))
        return
    rows: list[dict[str, Any]] = []
    for model in MODELS[:1] if options.quick else MODELS:  # in processes of their own: the allocator stays as it is set
        command = [sys.executable, *sys.argv, "--model", model]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    print("".join(f"| {' | '.join(map(str, row.values()))} |\n" for row in rows))
    if options.json:
        results = {"machine": machine.describe("torch", "onnxruntime", "openvino"), "rows": rows}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
