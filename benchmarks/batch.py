"""Throughput of `classify` against the bare model, and its memory against the number of inputs.

    python benchmarks/batch.py                  # both, about eight minutes on two cores
    python benchmarks/batch.py --quick          # a smoke run; its figures mean little

Throughput: `attnsuite classify` with `litv2_small` over 500 photographs (resized copies of `samples/`, JPEG, about
500 pixels) as a share of the same network's rate on tensors that are ready in memory, with the same batch size and
the same number of threads on the same cores. Both are measured in turns in one process, A B A B, each turn over all
photographs; loading and one warm-up batch are left out of both. The median of the turns' ratios counts.

Memory: peak resident memory of the largest process of a fresh run over 1,000 and over 100,000 paths in one folder,
hard links to small pictures; listing, decode processes, rows and ledger are those of `classify`, the network is a stub.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
_LINKS = 20_000


def make_photographs(folder: Path, count: int) -> None:
    """Copies of the sample photographs at sizes around 500 pixels, so that no two files are alike."""
    from PIL import Image

    samples = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    for index in range(count):
        photo = samples[index % len(samples)]
        scale = (460 + index % 81) / max(photo.size)
        size = (round(photo.width * scale), round(photo.height * scale))
        photo.resize(size, Image.Resampling.LANCZOS).save(folder / f"{index:04d}.jpg", quality=90)


def measure_throughput(count: int, turns: int, model: str, batch_size: int, workers: int | None) -> dict[str, Any]:
    """Images a second of the whole command and of the bare network, in turns."""
    import torch

    sys.path.insert(0, str(ROOT))
    from apps.batch.sources import Inputs
    from apps.batch.stage import Compute
    from apps.classify import Classify
    from apps.models import ModelChoice, load, resolve

    network = load(resolve(ModelChoice(model, random_weights=True)))
    stage = Classify(network, Compute(torch.device("cpu"), batch_size=batch_size))
    images = torch.randn(batch_size, *network.data_config["input_size"])
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), count)
        inputs = Inputs([folder])
        bare_rate(stage.module, images, batch_size)
        job_rate(stage, Inputs([folder], limit=batch_size), workers, batch_size)
        pairs = [
            (bare_rate(stage.module, images, count), job_rate(stage, inputs, workers, batch_size)) for _ in range(turns)
        ]
    return {
        "model": model,
        "images": count,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "workers": workers,
        "bare_images_per_second": round(statistics.median(bare for bare, _ in pairs), 2),
        "classify_images_per_second": round(statistics.median(job for _, job in pairs), 2),
        "ratio": round(statistics.median(job / bare for bare, job in pairs), 3),
        "ratios": [round(job / bare, 3) for bare, job in pairs],
    }


def bare_rate(module: Any, images: Any, count: int) -> float:
    """Images a second of the network on one batch in memory, over and over."""
    import torch

    batches = -(-count // len(images))
    begin = time.perf_counter()
    with torch.inference_mode():
        for _ in range(batches):
            module(images)
    return batches * len(images) / (time.perf_counter() - begin)


def job_rate(stage: Any, inputs: Any, workers: int | None, batch_size: int) -> float:
    """Images a second of a whole run into a CSV file, from the first file listed to the last row on disk."""
    from apps.batch.engines import run_local
    from apps.batch.job import Job
    from apps.console import RunReport
    from apps.run import default_workers

    workers = default_workers("cpu") if workers is None else workers
    with tempfile.TemporaryDirectory() as folder:
        engine = partial(run_local, batch_size=batch_size, workers=workers)
        job = Job(inputs, lambda: stage, {"benchmark": "batch"}, RunReport(), engine)
        begin = time.perf_counter()
        summary = job.to_file(os.path.join(folder, "rows.csv"))
        seconds = time.perf_counter() - begin
    assert summary.failed == 0
    return summary.rows / seconds


def measure_memory(counts: list[int]) -> list[dict[str, Any]]:
    """Peak resident memory of a run in a fresh process, by number of inputs."""
    return [_peak_memory(count) for count in counts]


def _peak_memory(count: int) -> dict[str, Any]:
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        links = Path(folder, "links")
        links.mkdir()
        for index in range(count):
            if index % _LINKS == 0:  # a file system allows only so many names of one file
                original = links / f"{index:07d}.png"
                Image.new("RGB", (16, 16), (90, 120, 150)).save(original)
            else:
                os.link(original, links / f"{index:07d}.png")
        rows = Path(folder, "rows.csv")
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, "--classify-with-a-stub", str(links), str(rows)], cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        with open(rows, encoding="utf-8") as lines:
            assert process.returncode == 0 and sum(1 for _ in lines) == count + 1
    return {"inputs": count, "peak_mb": round(usage.ru_maxrss / 1024, 1), "seconds": round(seconds, 1)}


def classify_with_a_stub(folder: str, output: str) -> None:
    """The whole of `classify`, save that the network is one small linear layer on 32 pixels."""
    import torch
    from torch import nn

    sys.path.insert(0, str(ROOT))
    from apps.batch.engines import run_local
    from apps.batch.job import Job
    from apps.batch.sources import Inputs
    from apps.batch.stage import Compute
    from apps.classify import Classify
    from apps.console import RunReport
    from apps.models import Network
    from apps.run import default_workers

    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "crop_mode": "center"}
    network = Network(
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "stub", [f"class_{i}" for i in range(10)], config
    )
    stage = Classify(network, Compute(torch.device("cpu")))
    engine = partial(run_local, batch_size=32, workers=default_workers("cpu"))
    Job(Inputs([folder]), lambda: stage, {}, RunReport(), engine).to_file(output)


def print_tables(results: dict[str, Any]) -> None:
    """The figures as Markdown."""
    if throughput := results.get("throughput"):
        print("| model | batch | threads | bare images/s | classify images/s | ratio |")
        print("| --- | --- | --- | --- | --- | --- |")
        cells = ("model", "batch_size", "threads", "bare_images_per_second", "classify_images_per_second", "ratio")
        print("| " + " | ".join(str(throughput[cell]) for cell in cells) + " |\n")
    if memory := results.get("memory"):
        print("| inputs | peak memory (MB) | seconds |")
        print("| --- | --- | --- |")
        for row in memory:
            print(f"| {row['inputs']:,} | {row['peak_mb']} | {row['seconds']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="litv2_small")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, help="decode processes; by default what the command takes")
    parser.add_argument("--threads", type=int, help="CPU threads of the network; by default all cores")
    parser.add_argument("--only", choices=("throughput", "memory"))
    parser.add_argument("--quick", action="store_true", help="few images, one turn")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--classify-with-a-stub", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.classify_with_a_stub:
        classify_with_a_stub(*options.classify_with_a_stub)
        return
    if options.quick:
        options.images, options.turns = 32, 1

    import torch

    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    if options.only != "memory":
        results["throughput"] = measure_throughput(
            options.images, options.turns, options.model, options.batch_size, options.workers
        )
    if options.only != "throughput":
        results["memory"] = measure_memory([100, 1_000] if options.quick else [1_000, 100_000])
    print_tables(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
