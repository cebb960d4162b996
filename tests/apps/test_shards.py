"""Runs in parts, and the parts put together: the rows of one run, whatever happened to a part."""

from __future__ import annotations

import csv
import json
import signal
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support import wait_for

from apps.ask.questions import Pair, Pairs
from apps.batch.shards import Shard, merge, read_shard
from apps.batch.sources import Inputs
from apps.errors import UsageError

NANO = ("--model", "litv2_nano", "--random-weights", "--top-k", 2)


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def by_path(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_shards_together_are_one_run(run, photos, tmp_path, suffix):
    command = ("classify", photos, "-o", f"rows.{suffix}", *NANO, "--batch-size", 1, "--limit", 12)
    for index in range(3):
        done = run(*command, "--shard", f"{index}/3")
        assert done.code == 0, done.err
    done = run("merge", f"rows.{suffix}", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    names = [f"rows-{index:05d}-of-00003.{suffix}" for index in range(3)]
    assert facts == {"output": f"rows.{suffix}", "rows": 36, "ok": 36, "failed": 0, "parts": names}
    merged = by_path(read(tmp_path / f"rows.{suffix}"))
    assert run("classify", photos, "-o", f"whole.{suffix}", *NANO, "--batch-size", 1, "--limit", 36).code == 0
    assert merged == by_path(read(tmp_path / f"whole.{suffix}"))
    again = run("merge", f"rows.{suffix}")
    assert again.code == 2 and "--overwrite" in again.err
    assert run("merge", f"rows.{suffix}", "--overwrite").code == 0


def test_every_file_is_in_one_shard(photos):
    whole = [source.key for source in Inputs([str(photos)])]
    shards = [[s.key for s in Inputs([str(photos)], shard=Shard(index, 7))] for index in range(7)]
    assert sorted(key for shard in shards for key in shard) == sorted(whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_an_archive_goes_to_one_shard_and_others_may_be_empty(run, photos, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in sorted(photos.rglob("*.*"))[:3]:
            archive.add(path, path.name)
    for index in range(2):
        done = run("classify", "a.tar", "-o", "rows.csv", *NANO, "--shard", f"{index}/2")
        assert done.code == 0, done.err
    assert [len(read(tmp_path / f"rows-{i:05d}-of-00002.csv")) for i in range(2)] == [3, 0]
    assert run("merge", "rows.csv").code == 0
    assert len(read(tmp_path / "rows.csv")) == 3


def test_a_killed_shard_is_not_merged_before_it_is_finished(start, run, photos, tmp_path):
    command = ("classify", photos, "-o", "rows.csv", *NANO, "--batch-size", 2)
    assert run(*command, "--shard", "1/2").code == 0
    part = tmp_path / "rows-00000-of-00002.csv"
    running = start(*command, "--shard", "0/2")
    wait_for(lambda: part.exists() and len(part.read_bytes().splitlines()) > 3)
    while_it_runs = run("merge", "rows.csv")
    running.kill(signal.SIGKILL)
    running.wait()
    killed = run("merge", "rows.csv")
    assert while_it_runs.code == killed.code == 2
    assert "another run is writing" in while_it_runs.err or "not finished" in while_it_runs.err
    assert f"{part.name} is not finished" in killed.err and not (tmp_path / "rows.csv").exists()
    assert run(*command, "--shard", "0/2").code == 0
    assert run("merge", "rows.csv").code == 0
    assert len(by_path(read(tmp_path / "rows.csv"))) == len(list(Inputs([str(photos)])))


def finished(folder: Path, names: list[str], command: dict[str, Any]) -> None:
    for name in names:
        (folder / name).write_text("path,status\n")
        lines = [json.dumps({"attnsuite ledger": 1, "command": command}), '{"finished": true}']
        (folder / f"{name}.ledger").write_text("\n".join(lines) + "\n")


def test_parts_that_do_not_belong_together_are_named(tmp_path):
    output = str(tmp_path / "rows.csv")
    with pytest.raises(UsageError, match=r"no part of .*rows-00000-of-00002\.csv"):
        merge(output)
    with pytest.raises(UsageError, match=r"must end in \.csv"):
        merge(str(tmp_path / "rows.txt"))
    finished(tmp_path, ["rows-00000-of-00003.csv"], {"verb": "classify", "shard": "0/3"})
    with pytest.raises(UsageError, match="--shard 1/3 and 1 more is missing"):
        merge(output)
    finished(tmp_path, ["rows-00001-of-00003.csv"], {"verb": "classify", "shard": "1/3"})
    finished(tmp_path, ["rows-00002-of-00003.csv"], {"verb": "embed", "shard": "2/3"})
    with pytest.raises(UsageError, match="different commands: verb differ"):
        merge(output)
    finished(tmp_path, ["rows-00002-of-00003.csv"], {"verb": "classify", "shard": "2/3"})
    assert merge(output).rows == 0
    (tmp_path / "rows-00002-of-00003.csv.ledger").unlink()
    with pytest.raises(UsageError, match="no ledger beside it"):
        merge(output, overwrite=True)
    finished(tmp_path, ["rows-00000-of-00002.csv"], {"verb": "classify"})
    with pytest.raises(UsageError, match="parts of 2 and of 3 shards"):
        merge(output, overwrite=True)


@pytest.mark.parametrize("text", ["3", "1-3", "3/3", "-1/3", "0/0", "a/b", ""])
def test_a_shard_that_is_none_is_named(text: str):
    with pytest.raises(UsageError, match="--shard"):
        read_shard(text)


def test_questions_are_dealt_out_by_line(tmp_path):
    lines = [json.dumps({"image": f"{number}.png", "question": "what?"}) for number in range(5)]
    file = str(tmp_path / "pairs.jsonl")
    Path(file).write_text("\n".join(lines))
    shards = [[p.line for p in Pairs([file], shard=Shard(i, 2)) if isinstance(p, Pair)] for i in range(2)]
    assert shards == [[1, 3, 5], [2, 4]]


def test_a_search_is_not_done_in_shards(run, photos):
    done = run("search", photos, "a cat", "--shard", "0/2")
    assert done.code == 2 and "--shard: a search looks through everything" in done.err
