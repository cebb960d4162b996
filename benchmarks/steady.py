"""Runs that are long, and runs that are cut: memory against the number of inputs, and 20,000 pictures with broken ones.

    python benchmarks/steady.py                       # both, about twenty minutes on two cores: results/steady.json
    python benchmarks/steady.py --quick --json x.json   # a smoke run; its figures mean little

Memory: the most that the main process and its decode process hold in a fresh run into a CSV file, over 1,000, 100,000
and 1,000,000 pictures of 8 pixels in one folder (hard links), one tar archive and one Parquet file; and of the same
command given again, which finds a row for every input. Listing, decoding, rows and ledger are those of every verb, the
network is a mean.

Soak: `attnsuite classify` on pictures of which one in a hundred is broken, in turns of several kinds. Once it runs
undisturbed, once it is killed (SIGKILL) at moments that the seed chooses, and started again until it is through. Both
must hold one row an input, in order, with an error exactly where something is broken, and be the same table.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apps.batch.decode import Decoder, Framing
from apps.batch.engines import run_local
from apps.batch.job import Job
from apps.batch.sources import Inputs
from apps.batch.stage import Batch, Column, Compute, Row, Stage
from apps.console import RunReport
from apps.models import Network
from benchmarks.machine import describe, peak_mb

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results/steady.json"
_SIDE = 8
_COMMAND = "from apps.cli import main; main()"
_LINKS = 50_000  # a file system allows only so many names of one file


class Mean(Stage):
    """The mean of each picture."""

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("mean", "number"),)

    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        return [{"mean": float(value)} for value in images.mean((1, 2, 3))]

    def describe(self, row: Row) -> str:
        return f"{row['mean']:.3f}"


def small_pixels(image: Image.Image) -> np.ndarray:
    """`(3, 8, 8)`, uint8."""
    return np.asarray(image.resize((_SIDE, _SIDE))).transpose(2, 0, 1)


def run_mean(path: str, output: str) -> dict[str, Any]:
    """A whole run in this process, with one decode process; what came of it, and the peak of this process."""
    config = {"input_size": (3, _SIDE, _SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    network = Network(torch.nn.Identity(), "mean", [], config, transform=small_pixels)
    decoder = Decoder(small_pixels, Framing((_SIDE, _SIDE), 1.0, "squash"))
    stage = Mean(network, Compute(torch.device("cpu"), batch_size=128), decoder=decoder)
    engine = partial(run_local, batch_size=128, workers=1)
    summary = Job(Inputs([path]), lambda: stage, {"benchmark": "steady"}, RunReport(), engine).to_file(output)
    return {"rows": summary.rows, "failed": summary.failed, "computed": summary.computed, "main_mb": peak_mb()}


def make_folder(path: Path, count: int) -> Path:
    """Hard links to pictures, in one folder."""
    path.mkdir()
    original = path
    for index in range(count):
        name = path / f"{index:07d}.png"
        if index % _LINKS == 0:
            original = name
            name.write_bytes(_picture(index))
        else:
            os.link(original, name)
    return path


def make_tar(path: Path, count: int) -> Path:
    """One archive."""
    content = _picture(0)
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for index in range(count):
            member = tarfile.TarInfo(f"{index:07d}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - else it remembers them all
    return path.with_suffix(".tar")


def make_parquet(path: Path, count: int) -> Path:
    """One file in row groups of 20,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content, group = _picture(0), 20_000
    with pq.ParquetWriter(path.with_suffix(".parquet"), pa.schema([("image", pa.binary())])) as writer:
        for begin in range(0, count, group):
            writer.write_table(pa.table({"image": pa.array([content] * min(group, count - begin), pa.binary())}))
    return path.with_suffix(".parquet")


LAYOUTS: dict[str, Callable[[Path, int], Path]] = {"folder": make_folder, "tar": make_tar, "parquet": make_parquet}


def _picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), (shade % 256, 99, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def measure_memory(layout: str, count: int) -> list[dict[str, Any]]:
    """A first run, and the same command once more."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = LAYOUTS[layout](Path(folder, "inputs"), count)
        output = Path(folder, "rows.csv")
        results = []
        for which in ("first", "again"):
            begin = time.perf_counter()
            command = [sys.executable, __file__, "--mean", str(path), str(output)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            peaks = watch(process)
            out, err = process.communicate()
            if process.returncode:
                raise RuntimeError(err)
            told = json.loads(out)
            assert (told["rows"], told["failed"]) == (count, 0) and told["computed"] == count * (which == "first"), told
            peaks.pop(process.pid, None)
            results.append({
                "layout": layout, "inputs": count, "run": which, "main_mb": round(told["main_mb"], 1),
                "worker_mb": round(max(peaks.values(), default=0), 1), "seconds": round(time.perf_counter() - begin, 1),
            })  # fmt: skip
        with open(output, "rb") as rows:
            assert sum(1 for _ in rows) == count + 1
    return results


def watch(process: subprocess.Popen[str], until: Callable[[], bool] = lambda: False) -> dict[int, float]:
    """Waits for a process, or for `until`; the most MB that it and each of its children held, by process."""
    peaks: dict[int, float] = {}
    while process.poll() is None and not until():
        for pid in (process.pid, *_children(process.pid)):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            if "VmHWM:" in status:
                peaks[pid] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        time.sleep(0.1)
    return peaks


def _children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def make_soak(folder: Path, count: int, seed: int) -> set[str]:
    """Pictures of a few hundred pixels, and what is no picture; the names of the latter."""
    folder.mkdir()
    random_numbers = np.random.default_rng(seed)
    whole: list[tuple[str, bytes]] = []
    for index in range(min(count, 1_000)):
        suffix, form = ((".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP"))[index % 3]
        width, height = random_numbers.integers(40, 300, 2)
        coarse = Image.fromarray(random_numbers.integers(0, 256, (6, 8, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(buffer, form)
        whole.append((suffix, buffer.getvalue()))
    broken = set(random_numbers.permutation(count)[: count // 100].tolist())
    names = set()
    for index in range(count):
        suffix, content = whole[index % len(whole)]
        path = folder / f"{index:05d}{suffix}"
        if index in broken:
            names.add(str(path))
            _break(path, content, len(names) % 8)
        else:
            path.write_bytes(content)
    (folder / "folder.jpg").mkdir()  # is no input
    return names


def _break(path: Path, content: bytes, kind: int) -> None:
    if kind == 0:
        path.write_bytes(b"")
    elif kind == 1:
        path.write_bytes(content[: len(content) // 2])
    elif kind == 2:
        path.write_text("this is no picture")
    elif kind == 3:
        path.write_bytes(b"PK\3\4" + bytes(200))
    elif kind == 4:
        path.symlink_to("nowhere.jpg")
    elif kind == 5:
        os.mkfifo(path)
    elif kind == 6:
        path.symlink_to(path.name)
    else:
        path.write_bytes(content[:30])


def soak(folder: Path, count: int, seed: int, kills: int, model: str) -> dict[str, Any]:
    """One undisturbed run, one that is killed again and again."""
    broken = make_soak(folder / "pictures", count, seed)
    begin = time.perf_counter()
    process = _classify(folder, "whole.parquet", model)
    peaks = watch(process)
    seconds = time.perf_counter() - begin
    out, err = process.communicate()
    if process.returncode != 1:  # as it says where rows are errors
        raise RuntimeError(err)
    told = json.loads(out)
    killed_after = _run_with_kills(folder, count, seed, kills, model)
    rows = _checked_rows(folder / "whole.parquet", folder / "pictures", broken)
    same = rows.equals(_checked_rows(folder / "cut.parquet", folder / "pictures", broken))
    assert same
    return {
        "model": model, "inputs": count, "broken": len(broken), "errors": rows["status"].to_pylist().count("error"),
        "reasons": len(set(rows["error"].to_pylist()) - {None}), "seconds": round(seconds, 1),
        "images_per_second": round(told["computed"] / told["seconds"], 1), "peak_mb": round(max(peaks.values()), 1),
        "kills": len(killed_after), "killed_after_rows": killed_after, "same_table": same,
    }  # fmt: skip


def _run_with_kills(folder: Path, count: int, seed: int, kills: int, model: str) -> list[int]:
    """How many rows were safe at each kill, before the run that came to its end."""
    ledger, after = folder / "cut.parquet.ledger", []
    share = random.Random(seed)
    for number in range(kills):
        goal = int(count * (number + share.random()) / kills)
        process = _classify(folder, "cut.parquet", model)
        watch(process, lambda goal=goal: _recorded(ledger) >= goal)
        time.sleep(share.random() / 10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        after.append(_recorded(ledger))
    process = _classify(folder, "cut.parquet", model)
    _, err = process.communicate()
    if process.returncode != 1:
        raise RuntimeError(err)
    return after


def _recorded(ledger: Path) -> int:
    """Rows in the whole lines of a ledger that is being written."""
    if not ledger.exists():
        return 0
    lines = ledger.read_bytes().rpartition(b"\n")[0].split(b"\n")[1:]
    return sum(json.loads(line).get("rows", 0) for line in lines)


def _checked_rows(output: Path, pictures: Path, broken: set[str]) -> Any:
    import pyarrow.parquet as pq

    rows = pq.read_table(output)
    names = sorted(str(path) for path in pictures.iterdir() if path.name != "folder.jpg")
    assert rows["path"].to_pylist() == names
    failed = {row["path"] for row in rows.select(["path", "status"]).to_pylist() if row["status"] == "error"}
    assert failed == broken, failed ^ broken
    return rows


def _classify(folder: Path, output: str, model: str) -> subprocess.Popen[str]:
    arguments = [str(folder / "pictures"), "-o", str(folder / output), "--model", model, "--random-weights", "--json"]
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, "classify", *arguments, "--top-k", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def print_tables(results: dict[str, Any]) -> None:
    """The figures as Markdown."""
    print("| inputs in | how many | run | main process (MB) | decode process (MB) | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in results.get("memory", ()):
        cells = (row[name] for name in ("run", "main_mb", "worker_mb", "seconds"))
        print(f"| {row['layout']} | {row['inputs']:,} | {' | '.join(map(str, cells))} |")
    print(json.dumps(results.get("soak"), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("memory", "soak"))
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--images", type=int, default=20_000, help="of the soak")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--model", default="litv2_nano", help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--json", type=Path, default=RESULT, help="figures that are there already stay, if not made anew"
    )
    parser.add_argument("--mean", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mean:
        print(json.dumps(run_mean(*options.mean)))
        return
    if options.quick:
        options.counts, options.images, options.kills = [100, 2_000], 400, 2
    results = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {}
    results |= describe("torch", "pillow", "pyarrow")
    if options.only != "soak":
        kept = [row for row in results.get("memory", ()) if row["layout"] not in options.layouts]
        results["memory"] = kept + [
            row for layout in options.layouts for count in options.counts for row in measure_memory(layout, count)
        ]
    if options.only != "memory":
        with tempfile.TemporaryDirectory() as folder:
            results["soak"] = soak(Path(folder), options.images, options.seed, options.kills, options.model)
    print_tables(results)
    options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
