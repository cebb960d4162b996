"""What a run costs per core, and what one driver can keep busy: the figures that `docs/scale.md` extrapolates from.

    python benchmarks/scale.py                  # about eight minutes on two cores
    python benchmarks/scale.py --quick          # a smoke run; its figures mean little

Workers: images a second of `classify` by processes of one thread each, one and two at once, as shards of the local
engine (each decodes for itself) and as workers of Ray. Counted after the first quarter, so that start-up is left out,
which for Ray stands beside it; JPEG photographs of 500 x 375 with grain.

Driver: CPU time that the process which lists, collects and writes spends on each batch, and its peak memory; with Ray,
on a network of one small layer and pictures of 16 pixels, since the driver sees neither. Listing: names a second of one
process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from benchmarks.batch import make_photographs  # noqa: E402

MODELS = ("tf_efficientnet_lite0", "litv2_small", "biformer_small")


class Clock:
    """Notes when rows come."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self.counts: list[int] = []
        self.used: list[float] = []

    def emit(self, sources: Sequence[Any], rows: Sequence[Any]) -> None:
        assert all(row["status"] == "ok" for row in rows)
        self.times.append(time.perf_counter())
        self.counts.append(len(rows))
        self.used.append(time.process_time())

    @property
    def span(self) -> tuple[float, float, int]:
        """When a quarter and when all of the rows had come, and how many between: workers start one by one."""
        settled = len(self.times) // 4
        return self.times[settled], self.times[-1], sum(self.counts[settled + 1 :])


def run(stage: Any, folder: str, engine: Callable[..., None], shard: tuple[int, int] | None = None) -> Clock:
    """Moves a folder's pictures through a stage."""
    from apps.batch.engines import Rest, Stop
    from apps.batch.shards import Shard
    from apps.batch.sources import Inputs

    inputs = Inputs([folder], shard=None if shard is None else Shard(*shard))
    clock = Clock()
    engine(stage, Rest(iter(inputs), inputs, 0), clock.emit, Stop())
    return clock


def on_ray(workers: int, batch_size: int) -> Callable[..., None]:
    from apps.batch.cluster import Cluster, run_ray

    return partial(run_ray, cluster=Cluster(workers=workers, device="cpu"), batch_size=batch_size, note=print)


def classifier(model: str, batch_size: int) -> Any:
    import torch

    from apps.batch.stage import Compute
    from apps.classify import Classify
    from apps.models import ModelChoice, load, resolve

    torch.set_num_threads(1)
    network = load(resolve(ModelChoice(model, random_weights=True)))
    return Classify(network, Compute(torch.device("cpu"), batch_size=batch_size))


def one_layer() -> Any:
    """`classify` with next to no network."""
    import torch
    from torch import nn

    from apps.batch.stage import Compute
    from apps.classify import Classify
    from apps.models import Network

    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "crop_mode": "center"}
    layer = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    return Classify(
        Network(layer, "one layer", [str(index) for index in range(10)], config), Compute(torch.device("cpu"))
    )


def measure_shard(model: str, folder: str, batch_size: int, index: int, count: int) -> dict[str, Any]:
    from apps.batch.engines import run_local

    engine = partial(run_local, batch_size=batch_size, workers=0)
    begin, end, images = run(classifier(model, batch_size), folder, engine, (index, count)).span
    return {"begin": begin, "end": end, "images": images}


def measure_ray(model: str, folder: str, batch_size: int, workers: int) -> dict[str, Any]:
    stage = classifier(model, batch_size)
    clock = run(stage, folder, on_ray(workers, batch_size))
    begin, end, images = clock.span
    return {"begin": begin, "end": end, "images": images, "start": clock.times[0] - clock.begin}


def measure_driver(folder: str, batch_size: int) -> dict[str, Any]:
    clock = run(one_layer(), folder, on_ray(1, batch_size))
    settled = len(clock.used) // 4  # Ray's own start is over
    spent = (clock.used[-1] - clock.used[settled]) / (len(clock.used) - 1 - settled)
    return {
        "inputs": sum(clock.counts),
        "batch_size": batch_size,
        "ms_per_batch": 1000 * spent,
        "peak_mb": machine.peak_mb(),
    }


def workers(model: str, images: int, batch_size: int) -> dict[str, Any]:
    """Rates of one model by one and by two processes, of both kinds."""
    row: dict[str, Any] = {"model": model, "images": images, "batch_size": batch_size}
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), images, "web")
        for count in (1, 2):
            shards = [_started("shard", model, folder, batch_size, index, count) for index in range(count)]
            row[f"shards_{count}"] = sum(_rate(one) for one in map(_answer, shards))
            by_ray = _answer(_started("ray", model, folder, batch_size, count))
            row[f"ray_{count}"] = _rate(by_ray)
            row["ray_start_s"] = by_ray["start"]
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}


def driver(counts: Sequence[int], batch_size: int) -> list[dict[str, Any]]:
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            _links(Path(folder), count)
            row = _answer(_started("driver", folder, batch_size))
        rows.append({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()})
    return rows


def listing(count: int) -> dict[str, Any]:
    """Names a second of a folder, in order, with what tells whether a file has changed."""
    from apps.batch.sources import Inputs

    with tempfile.TemporaryDirectory() as folder:
        _links(Path(folder), count)
        begin = time.perf_counter()
        found = sum(1 for _ in Inputs([folder]))
        seconds = time.perf_counter() - begin
    assert found == count
    return {"inputs": count, "per_second": round(count / seconds)}


def _links(folder: Path, count: int) -> None:
    from PIL import Image

    for index in range(count):
        if index % 20_000 == 0:  # a file system allows only so many names of one file
            original = folder / f"{index:07d}.png"
            Image.new("RGB", (16, 16), (90, 120, 150)).save(original)
        else:
            os.link(original, folder / f"{index:07d}.png")


def _started(*what: Any) -> subprocess.Popen[str]:
    """A process of its own for each measurement: threads and memory are a process's."""
    return subprocess.Popen(
        [sys.executable, __file__, "--measure", *map(str, what)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def _rate(answer: dict[str, Any]) -> float:
    return answer["images"] / (answer["end"] - answer["begin"])


def _measure(kind: str, *arguments: str) -> dict[str, Any]:
    measures = {"shard": measure_shard, "ray": measure_ray, "driver": measure_driver}
    values = [int(argument) if argument.isdigit() else argument for argument in arguments]
    return measures[kind](*values)  # pyright: ignore[reportArgumentType, reportCallIssue]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="few images of one model")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(*options.measure)))
        return
    few = options.quick
    images = 64 if few else options.images
    report = {
        "machine": machine.describe("torch", "ray", "pillow"),
        "workers": [workers(model, images, options.batch_size) for model in (MODELS[:1] if few else MODELS)],
        "driver": driver([1_000] if few else [2_000, 40_000], 32),
        "listing": listing(10_000 if few else 200_000),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
