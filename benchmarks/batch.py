"""Throughput of `classify` and `embed` against what their parts allow, and memory against the number of inputs.

    python benchmarks/batch.py                  # all of it, about fifteen minutes on two cores
    python benchmarks/batch.py --quick          # a smoke run; its figures mean little
    python benchmarks/batch.py --only throughput --published inference.py   # also timm's own script, fetched by hand

Throughput: whole runs into a CSV file over photographs made from `samples/`: like ImageNet's (500 x 375, JPEG) and like
a camera's (12 megapixels), with grain, so that they take as long to decode as real ones. *Bare* is the same network on
tensors that are ready in memory, same batch, threads and cores. Decoding (file to uint8 tensor, transform included)
takes the same cores; its CPU time is measured alone, and *possible* is the rate of a run that does nothing else:
min(workers / decode, bare, cores / (threads / bare + decode)). Runs and bare network in turns in one process, A B A B;
loading and one warm-up are left out of both; medians of the turns' ratios. *Left alone* is the network as PyTorch and
glibc have it: memory given back after every layer, channels first. Random weights: speed does not depend on them.

Memory: peak resident memory of the largest process of a fresh run over 1,000 and over 100,000 paths in one folder,
hard links to small pictures; listing, decode processes, rows and ledger are those of `classify`, the network is a stub.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402

SAMPLES = ROOT / "samples"
_LINKS = 20_000


_SIZES = {"web": (500, 375), "camera": (4000, 3000)}
# Verb, model, photographs, threads (0 for a thread a core, 1 to leave the other cores to decoding), and how many times
# --images: a light network needs many before the start weighs nothing.
_RUNS = (
    ("classify", "tf_efficientnet_lite0", "web", 0, 6),
    ("classify", "tf_efficientnet_lite0", "web", 1, 3),
    ("classify", "litv2_small", "web", 0, 1),
    ("classify", "biformer_small", "web", 0, 1),
    ("embed", "tf_efficientnet_lite0", "web", 0, 6),
    ("classify", "tf_efficientnet_lite0", "camera", 0, 0.5),
    ("classify", "tf_efficientnet_lite0", "camera, --fast-decode", 0, 1.5),
)


def make_photographs(folder: Path, count: int, kind: str) -> None:
    """Crops of the sample photographs, every fourth upright, with the grain of a sensor.

    No two files are alike, save that a camera's, which take a second each to make, begin anew after sixteen.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    samples = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    for index in range(count):
        if kind == "camera" and index >= 16:
            os.link(folder / f"{index % 16:04d}.jpg", folder / f"{index:04d}.jpg")
            continue
        photo, share = samples[index % len(samples)], rng.uniform(0.7, 1)
        width, height = int(photo.width * share), int(photo.height * share)
        left, top = (int(rng.integers(0, spare + 1)) for spare in (photo.width - width, photo.height - height))
        long, short = _SIZES[kind]
        size = (long, short) if index % 4 else (short, long)
        photo = photo.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
        grainy = np.asarray(photo, np.float32) + rng.normal(0, 4, (photo.height, photo.width, 1)).astype(np.float32)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(
            folder / f"{index:04d}.jpg", quality=int(rng.integers(85, 96))
        )


def measure_run(
    verb: str, model: str, kind: str, threads: int, count: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Images a second of a verb's whole run, of the bare network, and of what decoding leaves possible."""
    import torch

    from apps.batch.processor import keep_freed_memory
    from apps.batch.sources import Inputs
    from apps.batch.stage import Compute
    from apps.classify import Classify
    from apps.embed import Embed
    from apps.models import ModelChoice, load, resolve
    from apps.run import default_workers

    workers = default_workers() if options.workers is None else options.workers
    if threads:
        torch.set_num_threads(threads)
    network = load(resolve(ModelChoice(model, random_weights=True)))
    stage = {"classify": Classify, "embed": Embed}[verb](
        network, Compute(torch.device("cpu"), batch_size=options.batch_size)
    )
    images = torch.randn(options.batch_size, *network.data_config["input_size"])
    kind, _, fast = kind.partition(", ")
    if fast:
        stage.decoder = stage.decoder.reduced()
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), count, kind)
        decode = decode_seconds(stage.decoder, list(Inputs([folder], limit=32 if kind == "web" else 8)))
        bare_rate(stage.module, images, options.batch_size)
        alone = bare_rate(stage.module, images, 2 * options.batch_size)
        keep_freed_memory()
        images = images.contiguous(memory_format=torch.channels_last)
        bare_rate(stage.module, images, 2 * options.batch_size)
        job_rate(stage, Inputs([folder], limit=options.batch_size), workers, options.batch_size)
        pairs = [
            (
                bare_rate(stage.module, images, count if kind == "web" else 4 * options.batch_size),
                job_rate(stage, Inputs([folder]), workers, options.batch_size),
            )
            for _ in range(options.turns)
        ]
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    possible = [min(max(workers, 1) / decode, bare, cores / (threads / bare + decode)) for bare, _ in pairs]
    return {
        "verb": verb, "model": model, "photographs": f"{kind} {fast}".strip(), "images": count,
        "batch_size": options.batch_size,
        "threads": threads, "workers": workers, "left_alone": round(alone, 2),
        "bare": round(statistics.median(bare for bare, _ in pairs), 2), "decode_ms": round(1000 * decode, 2),
        "possible": round(statistics.median(possible), 2), "run": round(statistics.median(job for _, job in pairs), 2),
        "of_bare": round(statistics.median(job / bare for bare, job in pairs), 3),
        "of_possible": round(statistics.median(job / most for most, (_, job) in zip(possible, pairs, strict=True)), 3),
    }  # fmt: skip


def decode_seconds(decoder: Any, sources: list[Any]) -> float:
    """CPU time from a file to the pixels that the network takes, an image: the median of three passes."""
    passes = []
    for _ in range(4):
        begin = time.process_time()
        for source in sources:
            assert decoder(source).error is None
        passes.append((time.process_time() - begin) / len(sources))
    return statistics.median(passes[1:])


def bare_rate(module: Any, images: Any, count: int) -> float:
    """Images a second of the network on one batch in memory, over and over."""
    import torch

    batches = -(-count // len(images))
    begin = time.perf_counter()
    with torch.inference_mode():
        for _ in range(batches):
            module(images)
    return batches * len(images) / (time.perf_counter() - begin)


def compare_published(script: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole command `classify` and of timm's script on the same files, weights and batch, in turns.

    Each with its own defaults, which on two cores are two decode processes for both.
    """
    import torch

    from apps.models import ModelChoice, load, resolve

    with tempfile.TemporaryDirectory() as folder:
        photographs, weights = Path(folder, "photographs"), Path(folder, "weights.pth")
        photographs.mkdir()
        make_photographs(photographs, options.images, "web")
        torch.save(load(resolve(ModelChoice(model, random_weights=True))).module.state_dict(), weights)
        common = ["--model", model, "--checkpoint", str(weights), "--batch-size", str(options.batch_size)]
        ours = [
            sys.executable, "-c", "from apps.cli import main; main()", "classify", str(photographs), *common,
            "-o", f"{folder}/ours.csv", "--overwrite",
        ]  # fmt: skip
        theirs = [
            options.published_python, "-c",
            "import runpy, sys, vision; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
            str(script), str(photographs), *common, "--results-file", f"{folder}/theirs.csv",
            "--device", "cpu", "--topk", "5", "--no-console-results",
        ]  # fmt: skip
        pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(options.turns)]
    return {
        "model": model, "images": options.images, "seconds": round(statistics.median(own for own, _ in pairs), 2),
        "published_seconds": round(statistics.median(other for _, other in pairs), 2),
        "ratio": round(statistics.median(other / own for own, other in pairs), 3),
    }  # fmt: skip


def _seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - begin


def job_rate(stage: Any, inputs: Any, workers: int | None, batch_size: int) -> float:
    """Images a second of a whole run into a CSV file, from the first file listed to the last row on disk."""
    from apps.batch.engines import run_local
    from apps.batch.job import Job
    from apps.console import RunReport
    from apps.run import default_workers

    workers = default_workers() if workers is None else workers
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
    engine = partial(run_local, batch_size=32, workers=default_workers())
    Job(Inputs([folder]), lambda: stage, {}, RunReport(), engine).to_file(output)


def print_tables(results: dict[str, Any]) -> None:
    """The figures as Markdown."""
    for name in ("throughput", "published"):
        if rows := results.get(name):
            print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
            print("".join(f"| {' | '.join(map(str, row.values()))} |\n" for row in rows))
    if memory := results.get("memory"):
        print("| inputs | peak memory (MB) | seconds |")
        print("| --- | --- | --- |")
        for row in memory:
            print(f"| {row['inputs']:,} | {row['peak_mb']} | {row['seconds']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, help="decode processes; by default what the command takes")
    parser.add_argument("--only", choices=("throughput", "memory"))
    parser.add_argument("--published", type=Path, help="timm's inference.py, for its time on the same files")
    parser.add_argument(
        "--published-python", default=sys.executable, help="of an environment with timm, torch and pandas, for it"
    )
    parser.add_argument("--quick", action="store_true", help="few images, one turn")
    parser.add_argument("--json", type=Path, help="also write the figures here, beside what is there already")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--classify-with-a-stub", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.classify_with_a_stub:
        classify_with_a_stub(*options.classify_with_a_stub)
        return
    if options.quick:
        options.images, options.turns = 32, 1
    if options.run:
        verb, model, kind, threads, count = options.run
        print(json.dumps(measure_run(verb, model, kind, int(threads), int(count), options)))
        return
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    results["machine"] = machine.describe("torch", "timm", "pillow")
    if options.only != "memory":
        results["throughput"] = [
            _in_a_fresh_process(*map(str, what), str(int(times * options.images))) for *what, times in _RUNS
        ]
    if options.published:
        models = dict.fromkeys(model for _, model, *_ in _RUNS)
        results["published"] = [compare_published(options.published.resolve(), model, options) for model in models]
    if options.only != "throughput":
        results["memory"] = measure_memory([100, 1_000] if options.quick else [1_000, 100_000])
    print_tables(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _in_a_fresh_process(*run: str) -> dict[str, Any]:
    """The allocator's settings cannot be undone, so that every run has its own process."""
    done = subprocess.run([sys.executable, *sys.argv, "--run", *run], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
