"""`--engine ray`: the same rows from workers of a cluster, whatever dies; and what fits on it."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import pickle
import resource
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import wait_for

from apps.batch.cluster import Cluster, run_ray, share_out
from apps.batch.engines import run_local
from apps.batch.job import Job
from apps.batch.sources import Inputs
from apps.batch.stage import Batch, Compute, Row
from apps.classify import Classify
from apps.console import RowText, RunReport
from apps.embed import Embed
from apps.errors import Stopped, UsageError
from apps.explain import Explain
from apps.models import ModelChoice, Network, load, resolve

# Ray reads these when it is imported: quiet, no report to its makers, and no second Ray by itself.
os.environ |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}
ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
NODE = {"CPU": 8.0, "memory": float(32 << 30)}
GPU_NODE = {**NODE, "GPU": 2.0}


# --- what fits


@pytest.mark.parametrize(
    ("asked", "nodes", "workers", "gpus"),
    [
        ({}, [NODE, NODE], 16, 0),
        ({"cpus": 3}, [NODE, NODE], 4, 0),  # two on each; what is left of one cannot be put to that of the other
        ({"memory": 10}, [NODE, NODE], 6, 0),
        ({"workers": 2}, [NODE], 2, 0),
        ({}, [GPU_NODE, NODE], 2, 1),
        ({"gpus": 0.5}, [GPU_NODE], 4, 0.5),
        ({"device": "cpu"}, [GPU_NODE], 8, 0),
        ({"gpus": 1, "cpus": 4}, [GPU_NODE], 1, 1),  # a core is left for decoding
    ],
)
def test_as_many_workers_as_there_is_room_for(asked, nodes, workers, gpus):
    share = share_out(Cluster(**asked), nodes)
    assert (share.workers, share.gpus) == (workers, gpus)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"workers": 9}, "--num-workers 9 does not fit: with 1 CPU for each worker there is room for 8 on 1 node;"),
        ({"cpus": 9}, "no worker fits: each needs 9 CPU, and the largest of 1 node has 8 CPU;"),
        ({"memory": 64}, "no worker fits: each needs 1 CPU, 64 GiB"),
        ({"device": "cuda"}, "no worker fits: each needs 1 CPU, 1 GPU and one core for decoding"),
    ],
)
def test_what_ray_would_wait_for_for_ever_is_refused(asked, says):
    with pytest.raises(UsageError) as error:
        share_out(Cluster(**asked), [NODE])
    assert says in str(error.value)


def test_without_ray_a_line_says_how_to_get_it(monkeypatch, capsys):
    from apps.cli import app

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else there(name))
    with pytest.raises(SystemExit) as end:
        app(["classify", "x.jpg", "--engine", "ray"])
    assert end.value.code == 2
    assert capsys.readouterr().err == 'error: --engine ray needs Ray: pip install "attnsuite[ray]"\n'


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-workers", "2"], "--num-workers: this is about --engine ray"),
        (["--ray-address", "auto"], "--ray-address: this is about --engine ray"),
        (["--engine", "ray", "--workers", "2"], "--workers: with --engine ray it is --num-workers"),
        (
            ["--engine", "ray", "--ray-address", "127.0.0.1:1"],
            "--ray-address 127.0.0.1:1: nobody answers",
        ),
        (["--engine", "ray", "--ray-address", "head"], "--ray-address head: expected HOST:PORT"),
    ],
)
def test_options_that_cannot_be(run, photos, options, says):
    done = run("classify", photos, "--model", "litv2_nano", "--random-weights", *options)
    assert done.code == 2 and done.out == ""
    assert says in done.err and "Traceback" not in done.err


# --- the same rows


def fill_memory() -> None:
    """Files of `memory://` are those of one process; each of Ray's gets its own."""
    fs = fsspec.filesystem("memory")
    for index in range(5):
        content = io.BytesIO()
        Image.new("RGB", (20 + index, 16), (40 * index, 0, 0)).save(content, "PNG")
        fs.pipe(f"/ray-bucket/{index}.png", content.getvalue())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster on this machine; Ray takes its word for the GPU."""
    ray.init(
        num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20,
        logging_level="ERROR", runtime_env={"worker_process_setup_hook": fill_memory},
    )  # fmt: skip
    yield Cluster(gpus=0, workers=1)
    ray.shutdown()


@pytest.fixture(scope="module")
def network() -> Network:
    return load(resolve(ModelChoice("test_efficientnet", random_weights=True)))


@pytest.fixture(scope="module")
def stage(network: Network) -> Classify:
    return Classify(network, Compute(torch.device("cpu")), 2)


def job(stage: Any, inputs: Inputs, engine: Callable[..., None], **options: Any) -> Job:
    return Job(inputs, lambda: stage, {"test": "ray"}, RunReport(), engine, **options)


def on_ray(cluster: Cluster, batch_size: int = 8, note: Callable[[str], None] = print) -> Callable[..., None]:
    return partial(run_ray, cluster=cluster, batch_size=batch_size, note=note)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 pictures, one in a hundred broken."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for index in range(2000):
        place = folder / f"{index % 7}" / f"{index:04d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(place)
        if index % 100 == 50:
            place.write_bytes(place.read_bytes()[: index // 20])
    return folder


def test_two_thousand_files_give_the_rows_of_the_local_engine(cluster, stage, many, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        job(stage, Inputs([str(many)]), partial(run_local, batch_size=64, workers=0)).to_file(str(tmp_path / "a.csv"))
    finally:
        torch.set_num_threads(threads)
    both = Cluster(gpus=0, workers=2)
    summary = job(stage, Inputs([str(many)]), on_ray(both, batch_size=64)).to_file(str(tmp_path / "b.csv"))
    assert (summary.rows, summary.failed) == (2000, 20)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()  # the order, too


def test_every_kind_of_input_and_a_limit(cluster, stage, photos, tmp_path):
    """The worker is told that it has a GPU, so that other tasks decode for it."""
    pictures = sorted(photos.rglob("*.jpg"))[:6]
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for picture in pictures[:3]:
            archive.add(picture, picture.name)
    pq.write_table(pa.table({"image": [picture.read_bytes() for picture in pictures[3:]]}), tmp_path / "p.parquet")
    fill_memory()
    with_gpu = Cluster(gpus=1, device="cpu")
    arguments = [str(tmp_path / "s.tar"), str(tmp_path / "p.parquet"), f"file://{pictures[0]}", "memory://ray-bucket"]
    for name, engine in (("a", partial(run_local, batch_size=4, workers=0)), ("b", on_ray(with_gpu, 4))):
        job(stage, Inputs(arguments, limit=11), engine).to_file(str(tmp_path / f"{name}.csv"))
    assert [row["status"] for row in rows(tmp_path / "a.csv")] == ["ok"] * 11
    assert [row["path"] for row in rows(tmp_path / "a.csv")][-1] == "memory:///ray-bucket/3.png"
    assert rows(tmp_path / "a.csv") == rows(tmp_path / "b.csv")


def test_stages_can_be_sent(network, tmp_path):
    compute = Compute(torch.device("cpu"), compile=True)
    for stage in (
        Classify(network, compute),
        Embed(network, compute, 1),
        Explain(network, compute, "out", str(tmp_path)),
    ):
        sent = ray.cloudpickle.loads(ray.cloudpickle.dumps(stage))
        assert sent.columns == stage.columns


def test_nothing_is_written_where_the_engine_refuses(stage, photos):
    def full(*arguments: Any) -> None:
        raise UsageError("no worker fits")

    shown = io.StringIO()
    with pytest.raises(UsageError, match="no worker fits"):
        job(stage, Inputs([str(photos)]), full).to_screen(RowText(shown, "csv"))
    assert shown.getvalue() == ""
    job(stage, Inputs([str(photos)], limit=2), partial(run_local, batch_size=8, workers=0)).to_screen(
        RowText(shown, "csv")
    )
    header, *lines = shown.getvalue().splitlines()
    assert header.startswith("path,") and len(lines) == 2


# --- what dies


def kill_worker() -> None:
    """Kills the process of Ray's that holds the stage."""
    workers = [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or [])]
    for worker in workers:
        worker.kill()
    assert workers


class Counting(RunReport):
    """A report that does something after so many rows."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        super().__init__()
        self.count, self.then, self.rows = count, then, 0

    def advance(self, count: int) -> None:
        self.rows += count
        if self.rows - count < self.count <= self.rows:
            self.then()


def test_a_worker_that_is_killed_is_replaced(cluster, stage, photos, tmp_path):
    report = Counting(24, kill_worker)
    working = Job(Inputs([str(photos)]), lambda: stage, {"test": "ray"}, report, on_ray(cluster))
    assert working.to_file(str(tmp_path / "a.csv")).rows == 160
    job(stage, Inputs([str(photos)]), partial(run_local, batch_size=8, workers=0)).to_file(str(tmp_path / "b.csv"))
    assert rows(tmp_path / "a.csv") == rows(tmp_path / "b.csv")


class Deadly(Classify):
    """A stage that does not survive one of its pictures."""

    def run(self, images: torch.Tensor, batch: Batch, places: Any) -> list[Row]:
        if any("100.jpg" in source.path for source in batch.sources):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
        return super().run(images, batch, places)


class Greedy(Classify):
    """A stage that memory does not suffice for, from one picture on."""

    def run(self, images: torch.Tensor, batch: Batch, places: Any) -> list[Row]:
        if any("100.jpg" in source.path for source in batch.sources):
            enough = psutil.Process().memory_info().vms + (64 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (enough, enough))
            torch.ones(1 << 28)
        return super().run(images, batch, places)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        pytest.param(Deadly, "has ended its worker 3 times; too little memory", marks=pytest.mark.slow),
        pytest.param(Greedy, "try a smaller --batch-size", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_workers_do_not_survive_ends_the_run_and_nothing_is_lost(
    cluster, network, stage, photos, tmp_path, kind, says
):
    output = str(tmp_path / "rows.csv")
    deadly = kind(network, Compute(torch.device("cpu")), 2)
    with pytest.raises(Stopped, match=says) as error:
        job(deadly, Inputs([str(photos)]), on_ray(cluster)).to_file(output)
    safe = len(rows(tmp_path / "rows.csv"))
    assert f"{safe:,} rows are safe" in str(error.value) and 0 < safe < 160
    assert job(stage, Inputs([str(photos)]), partial(run_local, batch_size=8, workers=0)).to_file(output).rows == 160
    assert len({row["path"] for row in rows(tmp_path / "rows.csv")}) == 160


def test_one_engine_goes_on_where_the_other_was_killed(start, run, photos, tmp_path):
    command = ("classify", photos, "-o", "rows.csv", "--model", "test_efficientnet", "--random-weights")
    running = start(*command, "--engine", "ray", "--num-workers", 1, "--batch-size", 4)
    ledger = tmp_path / "rows.csv.ledger"
    wait_for(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") >= 4, seconds=120)
    # Ray's agents, which hold nothing, take a while to notice.
    family = [p for p in psutil.Process(running.pid).children(recursive=True) if "Agent" not in p.name()]
    running.kill()
    running.wait()
    assert len(family) >= 3 and not psutil.wait_procs(family, timeout=60)[1]
    done = run(*command)
    assert done.code == 0, done.err
    paths = [row["path"] for row in rows(tmp_path / "rows.csv")]
    assert len(paths) == len(set(paths)) == 160


def test_an_error_of_ours_travels_and_silence_is_broken(cluster, stage, photos, tmp_path, monkeypatch):
    from apps.batch import cluster as module

    class Broken(Classify):
        def run(self, images: torch.Tensor, batch: Batch, places: Any) -> list[Row]:
            import time

            time.sleep(2)
            raise UsageError("this network cannot be asked")

    said: list[str] = []
    monkeypatch.setattr(module, "_QUIET", 0.5)
    broken = Broken(stage.network, Compute(torch.device("cpu")), 2)
    with pytest.raises(UsageError, match="this network cannot be asked"):
        job(broken, Inputs([str(photos)]), on_ray(cluster, note=said.append)).to_file(str(tmp_path / "rows.csv"))
    assert not list(tmp_path.iterdir())
    assert said[0] == "Ray: 1 worker, each with 1 CPU"
    assert any("nothing has come from Ray for 0.5 s: 1 node up" in line for line in said)


def test_what_cannot_be_sent_is_said_in_words(cluster):
    from apps.batch.ray_tasks import Failed, decoded

    class Local(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    class Place:
        def enter(self) -> None:
            raise Local(1, 2)

    result = decoded({"content": [pickle.dumps([])]}, Place(), None, None)  # pyright: ignore[reportArgumentType]
    failed = pickle.loads(result["content"][0])
    assert isinstance(failed, Failed) and str(failed.error) == "Local: 1 and 2"
