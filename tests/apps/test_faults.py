"""What can happen to a run while it works: files that hang, change or vanish, a clock that jumps, a lost folder."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import ROOT, wait_for

from apps.batch.decode import Decoded, Decoder, Framing
from apps.batch.engines import run_local
from apps.batch.job import Job
from apps.batch.sources import Inputs, Source
from apps.batch.stage import Compute, decode
from apps.classify import Classify
from apps.console import RunReport
from apps.errors import Stopped
from apps.models import ModelChoice, load, resolve

NANO = ("--model", "litv2_nano", "--random-weights", "--batch-size", 4, "--top-k", 1)


@pytest.fixture(scope="module")
def stage() -> Classify:
    network = load(resolve(ModelChoice("litv2_nano", random_weights=True)))
    return Classify(network, Compute(torch.device("cpu"), batch_size=4), 1)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def job(stage: Classify, inputs: Any, **options: Any) -> Job:
    engine = partial(run_local, **{"batch_size": 4, "workers": 0, **options})
    return Job(inputs, lambda: stage, {"test": "faults"}, RunReport(), engine)


class Meanwhile(Inputs):
    """Inputs of which something becomes of the tenth just after it was listed."""

    def __init__(self, folder: Path, happens: Any) -> None:
        super().__init__([str(folder)])
        self.happens = happens

    def __iter__(self) -> Iterator[Source]:
        for number, source in enumerate(super().__iter__()):
            if number == 9 and self.happens is not None:
                self.happens(Path(source.path))
                self.happens = None
            yield source


def becomes_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def is_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (becomes_a_pipe, "reading took longer than 0.5 s (--read-timeout)"),
        (is_cut, "damaged image"),
        (Path.unlink, "cannot read this file: No such file or directory"),
    ],
)
def test_a_file_that_hangs_is_cut_or_vanishes_is_one_row(stage, photos, tmp_path, happens, words, workers):
    own = tmp_path / "own"
    shutil.copytree(photos / "day 0", own)
    output = tmp_path / "rows.csv"
    summary = job(stage, Meanwhile(own, happens), workers=workers, read_timeout=0.5).to_file(str(output))
    rows = read(output)
    assert summary.rows == len(rows) == len(list((photos / "day 0").iterdir())) and summary.failed == 1
    assert [number for number, row in enumerate(rows) if row["status"] == "error"] == [9]
    assert words in rows[9]["error"]
    again = job(stage, Inputs([str(own)]), read_timeout=0.5).to_file(str(output))
    assert again.rows == len(read(output)) == len(list(Inputs([str(own)])))


def test_a_decoder_that_catches_everything_is_stopped_too():
    class Stubborn(Decoder):
        def __call__(self, source: Source) -> Decoded:
            try:
                time.sleep(30)
            except Exception:
                time.sleep(30)
            return Decoded()

    stubborn = Stubborn(lambda image: image, Framing((1, 1), 1.0, "squash"))
    begin = time.monotonic()
    batch = decode(stubborn, [Source("x")], 0.2)
    assert "longer than 0.2 s" in str(batch.decoded[0].error) and time.monotonic() - begin < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_folder_of_the_output_goes(stage, photos, tmp_path, suffix):
    """What is written to a file without a name is lost: it must not be called done, nor safe."""
    out = tmp_path / "out"
    out.mkdir()
    ours = job(stage, Meanwhile(photos, lambda _: shutil.rmtree(out)))
    with pytest.raises(Stopped, match="was removed while it was written") as caught:
        ours.to_file(str(out / f"rows.{suffix}"))
    assert "safe" not in str(caught.value)
    out.mkdir()
    summary = job(stage, Inputs([str(photos)])).to_file(str(out / f"rows.{suffix}"))
    assert summary.rows == summary.computed == 160


def test_a_clock_that_jumps_changes_nothing(stage, photos, tmp_path, monkeypatch):
    whole = tmp_path / "whole.csv"
    job(stage, Inputs([str(photos)])).to_file(str(whole))
    moments = iter([1e9, -1e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(moments))
    output = tmp_path / "rows.csv"
    summary = job(stage, Inputs([str(photos)])).to_file(str(output))
    assert output.read_bytes() == whole.read_bytes() and summary.seconds >= 0
    later = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: later() + 1e6)
    assert job(stage, Inputs([str(photos)])).to_file(str(output)).computed == 0


def test_ctrl_c_while_the_last_rows_are_written(start, run, photos, tmp_path):
    """The request comes once every row is there: the output is finished, or the next start finishes it."""
    command = ("classify", photos, "-o", "rows.parquet", *NANO)
    ledger = tmp_path / "rows.parquet.ledger"
    running = start(*command)
    wait_for(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") >= 41)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait().code in (0, 130)
    done = run(*command)
    assert done.code == 0, done.err
    assert len(set(pq.read_table(tmp_path / "rows.parquet")["path"].to_pylist())) == 160
    assert {p.name for p in tmp_path.iterdir()} == {"rows.parquet", "rows.parquet.ledger"}


LITTLE_MEMORY = """
import resource, sys
from functools import partial
from pathlib import Path
import torch
from apps.batch.engines import run_local
from apps.batch.job import Job
from apps.batch.sources import Inputs
from apps.batch.stage import Compute
from apps.classify import Classify
from apps.console import RunReport
from apps.models import ModelChoice, load, resolve
engine = partial(run_local, batch_size=4, workers=0)
network = load(resolve(ModelChoice("litv2_nano", random_weights=True)))
stage = Classify(network, Compute(torch.device("cpu"), batch_size=4), 1)
Job(Inputs([sys.argv[1]], limit=1), lambda: stage, {}, RunReport(), engine).to_file(sys.argv[2] + ".first.csv")
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (300 << 20), resource.RLIM_INFINITY))
Job(Inputs([sys.argv[1]]), lambda: stage, {}, RunReport(), engine).to_file(sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_picture_that_memory_does_not_hold_is_one_row(tmp_path, photos):
    own = tmp_path / "own"
    shutil.copytree(photos / "day 0", own)
    Image.new("L", (13_000, 13_000)).save(own / "050a.png")  # 169 million pixels, three times that in colour
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, own, tmp_path / "rows.csv"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "rows.csv")
    assert len(rows) == len(list(own.iterdir()))
    assert [row["error"] for row in rows if row["status"] == "error"] == ["not enough memory to decode this image"]
