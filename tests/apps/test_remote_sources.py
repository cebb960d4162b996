"""Pictures at addresses, through fsspec's file system in memory, and pictures in Parquet files: the same rows."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import SAMPLES

from apps.batch.engines import run_local
from apps.batch.job import Job
from apps.batch.sources import Inputs, Source
from apps.batch.stage import Compute
from apps.classify import Classify
from apps.console import RunReport
from apps.errors import UsageError
from apps.models import ModelChoice, load, resolve

PICTURES = sorted(SAMPLES.glob("*.jpg"))


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """The samples at an address: files, one of them deeper, a shard, and a file that is none."""
    fs = fsspec.filesystem("memory")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for path in PICTURES:
            archive.add(path, path.name)
    for path in PICTURES[:2]:
        fs.pipe(f"/bucket/photos/{path.name}", path.read_bytes())
    fs.pipe(f"/bucket/photos/deep/{PICTURES[2].name}", PICTURES[2].read_bytes())
    fs.pipe("/bucket/photos/broken.jpg", PICTURES[0].read_bytes()[:4000])
    fs.pipe("/bucket/photos/notes.txt", b"x")
    fs.pipe("/bucket/shards/s.tar", (tmp_path / "s.tar").read_bytes())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def stage() -> Classify:
    network = load(resolve(ModelChoice("litv2_nano", random_weights=True)))
    return Classify(network, Compute(torch.device("cpu"), batch_size=2), 1)


def rows(stage: Classify, arguments: list[str], folder: Path, workers: int = 0) -> list[dict[str, str]]:
    output = folder / "rows.csv"
    engine = partial(run_local, batch_size=2, workers=workers)
    Job(Inputs(arguments), lambda: stage, {"test": arguments}, RunReport(), engine, overwrite=True).to_file(str(output))
    with open(output, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def names(*arguments: str, **options: Any) -> list[str]:
    return [source.name for source in Inputs(arguments, **options)]


def test_addresses_are_walked_like_folders(bucket):
    photos = "memory:///bucket/photos"
    assert names(f"{bucket}/photos") == [
        f"{photos}/astronaut.jpg", f"{photos}/broken.jpg", f"{photos}/camera.jpg", f"{photos}/deep/cat.jpg"
    ]  # fmt: skip
    assert names(f"{bucket}/photos", recursive=False) == [
        f"{photos}/{n}.jpg" for n in ("astronaut", "broken", "camera")
    ]
    assert names(f"{bucket}/photos/c*.jpg", f"{bucket}/photos/notes.txt") == [
        f"{photos}/camera.jpg",
        f"{photos}/notes.txt",
    ]
    assert names(f"{bucket}/shards") == [f"memory:///bucket/shards/s.tar::{path.name}" for path in PICTURES]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_addresses_are_those_of_files(bucket, stage, tmp_path, workers):
    found = rows(stage, [f"{bucket}/photos", f"{bucket}/shards"], tmp_path, workers)
    here = {Path(row["path"]).name: row for row in rows(stage, [str(SAMPLES)], tmp_path)}
    assert len(found) == 4 + len(PICTURES)
    for row in found:
        name = row["path"].replace("::", "/").rpartition("/")[2]
        if name == "broken.jpg":
            assert row["status"] == "error" and row["error"].startswith("damaged image")
        else:
            assert {**row, "path": ""} == {**here[name], "path": ""}


def test_a_changed_file_at_an_address_is_made_anew(bucket, stage, tmp_path):
    before = [source.stamp for source in Inputs([f"{bucket}/photos"])]
    fsspec.filesystem("memory").pipe("/bucket/photos/camera.jpg", PICTURES[3].read_bytes())
    after = [source.stamp for source in Inputs([f"{bucket}/photos"])]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("memory://bucket/none", "cannot be reached"),
        ("memory://bucket/*.png", "no file matches"),
        ("nosuch://bucket/x", "Protocol not known: nosuch"),
    ],
)
def test_addresses_that_lead_nowhere_are_named(bucket, argument, words):
    with pytest.raises(UsageError, match=words) as caught:
        Inputs([argument]).check()
    assert argument in str(caught.value)


def test_a_file_address_is_a_path(run, tmp_path):
    done = run("classify", f"file://{SAMPLES}/cat.jpg", "-o", "rows.csv", "--top-k", 1)
    assert done.code == 0, done.err
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text("utf-8").splitlines())
    assert row["path"] == f"{SAMPLES}/cat.jpg" and row["label_1"] == "tiger cat"


def as_bytes(contents: list[bytes]) -> pa.Table:
    return pa.table({"id": range(len(contents)), "image": contents})


def as_struct(contents: list[bytes]) -> pa.Table:
    cells = [{"bytes": content, "path": f"{number}.jpg"} for number, content in enumerate(contents)]
    return pa.table({"label": [0] * len(cells), "picture": cells})


@pytest.mark.parametrize("table", [as_bytes, as_struct])
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_in_parquet_give_the_same_rows(stage, tmp_path, table, workers):
    contents = [path.read_bytes() for path in PICTURES] * 3
    contents[4] = b""
    contents[5] = b"junk"
    path = tmp_path / "shard.parquet"
    pq.write_table(table(contents), path, row_group_size=4)
    found = rows(stage, [str(path)], tmp_path, workers)
    here = [row for row in rows(stage, [str(SAMPLES)], tmp_path)]
    assert [row["path"] for row in found] == [f"{path}::{number}" for number in range(15)]
    assert found[4]["error"] == "damaged image: this row holds no picture"
    assert found[5]["error"] == "not an image in a format that can be read"
    for number, row in enumerate(found):
        if number not in (4, 5):
            assert {**row, "path": ""} == {**here[number % 5], "path": ""}


def test_parquet_is_taken_when_it_is_meant(tmp_path):
    pq.write_table(as_bytes([PICTURES[0].read_bytes()]), tmp_path / "a.parquet")
    (tmp_path / "b.jpg").write_bytes(PICTURES[0].read_bytes())
    assert names(str(tmp_path)) == [f"{tmp_path}/b.jpg"], "a table beside pictures may be anything"
    assert names(f"{tmp_path}/*.parquet") == names(str(tmp_path), pattern="*.parquet") == [f"{tmp_path}/a.parquet::0"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"a": [b"x"], "b": [b"y"]}), "no column of pictures"),
        (pa.table({"a": [1]}), r"columns: a"),
        (None, "cannot read this Parquet file"),
    ],
)
def test_parquet_without_pictures_is_a_row_that_says_so(tmp_path, table, words):
    path = tmp_path / "t.parquet"
    if table is None:
        path.write_bytes(b"PAR1 is not enough PAR1")
    else:
        pq.write_table(table, path)
    (source,) = Inputs([str(path)])
    assert source.name == str(path) and words in str(source.error)


def test_rows_can_be_read_in_any_order(tmp_path):
    from apps.batch.tables import picture_bytes

    path = tmp_path / "t.parquet"
    pq.write_table(as_bytes([str(number).encode() for number in range(200)]), path, row_group_size=70)
    for row in (0, 69, 70, 199, 3, 150, 149, 148, 199, 0):
        assert picture_bytes(str(path), row, "s") == str(row).encode()
    with pytest.raises(ValueError, match="no row 200"):
        picture_bytes(str(path), 200, "s")


def test_a_source_in_a_remote_archive_reads_its_bytes_only(bucket):
    sources: list[Source] = list(Inputs([f"{bucket}/shards"]))
    assert [source.size for source in sources] == [path.stat().st_size for path in PICTURES]
