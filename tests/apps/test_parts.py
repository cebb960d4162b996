"""`-o DIR/`: a folder of Parquet files that appear one after the other, each whole, and once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import wait_for

NANO = ("--model", "litv2_nano", "--random-weights", "--batch-size", "4", "--top-k", "1")


def paths(folder: Path) -> list[str]:
    """All rows of the folder, as any reader of Parquet data sets finds them."""
    return ds.dataset(folder).to_table(columns=["path"])["path"].to_pylist()


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def command(photos: Path, *more: Any) -> tuple[Any, ...]:
    return ("classify", photos, "-o", "labels/", "--rows-per-part", 50, *NANO, *more)


def test_parts_hold_the_rows_of_one_run_in_order(run, photos, tmp_path):
    assert run(*command(photos)).code == 0
    assert run("classify", photos, "-o", "one.parquet", *NANO).code == 0
    assert parts(tmp_path / "labels") == [f"part-0000{index}.parquet" for index in range(4)]
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "labels").glob("*.parquet"))] == [
        52,
        52,
        52,
        4,
    ]
    assert ds.dataset(tmp_path / "labels").to_table().equals(pq.read_table(tmp_path / "one.parquet"))
    assert {path.name for path in (tmp_path / "labels").iterdir()} == {*parts(tmp_path / "labels"), "_ledger"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()}
    again = run(*command(photos))
    assert again.code == 0 and "nothing to do" in again.err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()}


def test_a_killed_run_goes_on_and_keeps_whole_parts(start, run, photos, tmp_path):
    first = tmp_path / "labels/part-00001.parquet"
    running = start(*command(photos))
    wait_for(first.exists)
    running.kill(signal.SIGKILL)
    running.wait()
    stamp = first.stat().st_mtime_ns
    done = run(*command(photos))
    assert done.code == 0, done.err
    assert first.stat().st_mtime_ns >= stamp  # made anew only if the ledger did not know it yet
    found = paths(tmp_path / "labels")
    assert len(found) == len(set(found)) == 160
    assert not list((tmp_path / "labels").glob("*journal*"))


@pytest.mark.parametrize("moment", ["renamed", "recorded"])
def test_a_run_that_ends_while_a_part_is_closed(run, photos, tmp_path, moment):
    """Between a part's appearance, its line in the ledger and the emptying of the journal nothing is lost or twice."""
    assert run(*command(photos, "--limit", 52)).code == 0
    folder = tmp_path / "labels"
    ledger = folder / "_ledger"
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert lines[-2].startswith(b'{"part": "part-00000.parquet"') and lines[-1] == b'{"finished": true}\n'
    whole = pq.read_table(folder / "part-00000.parquet")
    (folder / "_journal").write_bytes(b"of rows that are in the part")
    ledger.write_bytes(b"".join(lines[:-2] if moment == "renamed" else lines[:-1]))
    assert run(*command(photos, "--limit", 52)).code == 0
    assert pq.read_table(folder / "part-00000.parquet").equals(whole)
    assert parts(folder) == ["part-00000.parquet"] and not (folder / "_journal").exists()


def test_changed_inputs_make_parts_anew_from_there(run, photos, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for index in range(40):
        Image.new("RGB", (40, 30), (index, 0, 0)).save(own / f"{index:02d}.png")
    argv = ("classify", own, "-o", "labels/", "--rows-per-part", 12, *NANO)
    assert run(*argv).code == 0
    folder = tmp_path / "labels"
    before = {name: (folder / name).stat().st_mtime_ns for name in parts(folder)}
    assert len(before) == 4
    Image.new("RGB", (50, 30)).save(own / "17.png")
    (own / "39.png").unlink()
    done = run(*argv)
    assert done.code == 0 and "28 rows are made anew" in done.err
    after = {name: (folder / name).stat().st_mtime_ns for name in parts(folder)}
    assert before.keys() == after.keys()
    assert [before[name] == after[name] for name in before] == [True, False, False, False]
    table = ds.dataset(folder).to_table()
    assert [os.path.basename(path) for path in table["path"].to_pylist()] == [f"{index:02d}.png" for index in range(39)]
    assert table["width"].to_pylist()[17] == 50
    (own / "40.png").write_bytes((own / "00.png").read_bytes())  # more inputs: one more part, none anew
    assert run(*argv).code == 0
    assert len(paths(folder)) == 40
    assert [after[name] == (folder / name).stat().st_mtime_ns for name in after] == [True] * 4


def test_shards_share_a_folder(run, photos, tmp_path):
    for index in range(2):
        assert run(*command(photos, "--shard", f"{index}/2")).code == 0
    folder = tmp_path / "labels"
    assert parts(folder) == [f"0000{shard}-of-00002-part-0000{part}.parquet" for shard in (0, 1) for part in (0, 1)]
    assert len(set(paths(folder))) == len(paths(folder)) == 160
    refused = run("merge", "labels/")
    assert refused.code == 2 and "read as it is" in refused.err
    refused = run(*command(photos))
    assert refused.code == 2 and "which is no part of this run" in refused.err


def test_what_is_not_ours_is_left_alone(run, photos, tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "holiday.parquet").write_bytes(b"mine")
    refused = run(*command(photos))
    assert refused.code == 2 and "'holiday.parquet'" in refused.err
    assert run(*command(photos, "--overwrite")).code == 2  # it is not what this run would replace
    (folder / "holiday.parquet").unlink()
    assert run(*command(photos)).code == 0
    (folder / "part-00001.parquet").unlink()
    refused = run(*command(photos))
    assert refused.code == 2 and "part-00001.parquet was removed or changed" in refused.err
    assert run(*command(photos, "--overwrite")).code == 0
    assert len(paths(folder)) == 160
    refused = run("classify", photos, "-o", "rows.csv", "--rows-per-part", 5, *NANO)
    assert refused.code == 2 and "--rows-per-part is about a folder" in refused.err
    refused = run("classify", photos, "-o", "labels", *NANO)
    assert refused.code == 2 and "or in / for a folder of Parquet files" in refused.err
