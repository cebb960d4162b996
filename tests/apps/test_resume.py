"""Runs that are killed, stopped, repeated or run beside each other end with the rows of one uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from support import wait_for

NANO = ("--model", "litv2_nano", "--random-weights", "--batch-size", 4, "--top-k", 2)
FORMATS = ("csv", "jsonl", "parquet")


def content(path: Path) -> object:
    """Bytes, or for Parquet the table: its bytes also depend on how rows were grouped."""
    return pq.read_table(path) if path.suffix == ".parquet" else path.read_bytes()


def rows_in_ledger(output: Path) -> int:
    """Rows that a run has promised to keep."""
    ledger = output.with_name(f"{output.name}.ledger")
    if not ledger.exists():
        return 0
    lines = ledger.read_bytes().split(b"\n")[1:-1]
    return sum(json.loads(line).get("rows", 0) for line in lines)


def has_more(output: Path, rows: int) -> bool:
    return rows_in_ledger(output) > min(rows, 159)


@pytest.fixture(scope="module")
def whole(server, photos, tmp_path_factory) -> dict[str, tuple[object, float]]:
    """Output and duration of an uninterrupted run in each format."""
    folder = tmp_path_factory.mktemp("whole")
    results = {}
    for suffix in FORMATS:
        begin = time.monotonic()
        done = server.start("classify", photos, "-o", f"rows.{suffix}", *NANO, cwd=folder).wait()
        assert done.code == 0, done.err
        results[suffix] = content(folder / f"rows.{suffix}"), time.monotonic() - begin
    return results


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_at_random_moments_and_started_again(start, run, photos, tmp_path, whole, suffix):
    expected, duration = whole[suffix]
    output = tmp_path / f"rows.{suffix}"
    moments = random.Random(suffix)
    command = ("classify", photos, "-o", output.name, *NANO)
    seen = []
    for _ in range(6):
        running = start(*command)
        before = rows_in_ledger(output)
        if moments.random() < 0.7:  # at work, which is when it matters; else anywhere, loading included
            wait_for(partial(has_more, output, before))
            time.sleep(moments.uniform(0, 0.05))
        else:
            time.sleep(moments.uniform(0, duration / 2))
        running.kill()
        code = running.wait().code
        assert code in (-signal.SIGKILL, 0)
        assert rows_in_ledger(output) >= before
        seen.append(rows_in_ledger(output))
    assert any(0 < rows < 160 for rows in seen), seen
    done = run(*command)
    assert done.code == 0, done.err
    assert content(output) == expected
    assert {p.name for p in tmp_path.iterdir()} == {output.name, f"{output.name}.ledger"}


def test_killed_while_the_parquet_file_is_made(start, run, photos, tmp_path, whole):
    command = ("classify", photos, "-o", "rows.parquet", *NANO)
    output = tmp_path / "rows.parquet"
    caught = 0
    for _ in range(4):
        running = start(*command)
        wait_for(lambda: rows_in_ledger(output) == 160)
        running.kill()
        running.wait()
        caught += (tmp_path / "rows.parquet.journal").exists()
        if output.exists():
            break
    assert caught, "no kill came between the last row and the finished file"
    done = run(*command)
    assert done.code == 0, done.err
    assert content(output) == whole["parquet"][0]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_after_the_batch_and_says_how_to_go_on(start, run, photos, tmp_path, whole, signum, code):
    command = ("classify", photos, "-o", "rows.csv", *NANO)
    running = start(*command)
    output = tmp_path / "rows.csv"
    wait_for(lambda: rows_in_ledger(output) > 0)
    os.killpg(running.pid, signum)  # as a terminal does: decode workers get it, too
    done = running.wait()
    kept = rows_in_ledger(output)
    assert done.code == code, done.err
    assert 0 < kept < 160 and kept % 4 == 0
    assert f"{kept} rows are safe; run the same command again to go on" in done.err
    assert len(output.read_bytes().splitlines()) == kept + 1
    assert run(*command).code == 0
    assert content(output) == whole["csv"][0]


def test_a_decode_worker_that_dies_ends_the_run_clearly(start, run, photos, tmp_path, whole):
    command = ("classify", photos, "-o", "rows.jsonl", *NANO, "--workers", 2)
    running = start(*command)
    wait_for(lambda: rows_in_ledger(tmp_path / "rows.jsonl") > 0)
    psutil.Process(running.pid).children()[0].kill()
    done = running.wait()
    assert done.code == 3, done.err
    assert "decode process died" in done.err and "run the same command again" in done.err
    assert run(*command).code == 0
    assert content(tmp_path / "rows.jsonl") == whole["jsonl"][0]


def test_decode_workers_do_not_outlive_a_killed_run(start, photos, tmp_path):
    """They hold batches that nobody will take, more than fits into a pipe."""
    running = start("classify", photos, "-o", "rows.csv", *NANO, "--batch-size", 16, "--workers", 2)
    wait_for(lambda: rows_in_ledger(tmp_path / "rows.csv") > 0)
    workers = psutil.Process(running.pid).children()
    running.kill()
    running.wait()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_batch_size_and_workers_may_change_on_the_way(start, run, photos, tmp_path, whole):
    running = start("classify", photos, "-o", "rows.csv", *NANO)
    wait_for(lambda: rows_in_ledger(tmp_path / "rows.csv") > 0)
    running.kill()
    running.wait()
    done = run("classify", photos, "-o", "rows.csv", *NANO, "--batch-size", 7, "--workers", 0)
    assert done.code == 0, done.err
    assert len((tmp_path / "rows.csv").read_bytes().splitlines()) == 161


def test_a_finished_run_is_not_repeated(run, photos, tmp_path):
    for suffix in FORMATS:
        first = run("classify", photos, "-o", f"o.{suffix}", *NANO, "--limit", 8)
        before = (tmp_path / f"o.{suffix}").stat()
        second = run("classify", photos, "-o", f"o.{suffix}", *NANO, "--limit", 8)
        assert first.code == second.code == 0
        assert "nothing to do" in second.err and "8 ok, 0 failed" in second.err
        assert (tmp_path / f"o.{suffix}").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("suffix", FORMATS)
def test_new_changed_and_removed_inputs_are_taken_up(run, photos, tmp_path, suffix):
    own = tmp_path / "own"
    shutil.copytree(photos, own)
    command = ("classify", own, "-o", f"o.{suffix}", *NANO)
    assert run(*command).code == 0
    files = sorted(own.rglob("*.jpg"))
    files[-1].unlink()
    shutil.copy(files[0], files[-2])
    shutil.copy(files[1], files[-1].with_name("999.jpg"))
    done = run(*command)
    assert done.code == 0, done.err
    assert "inputs have changed" in done.err
    assert run(*command[:3], f"fresh.{suffix}", *NANO).code == 0
    assert content(tmp_path / f"o.{suffix}") == content(tmp_path / f"fresh.{suffix}")


def test_another_command_may_not_add_to_an_output(run, photos, tmp_path):
    small = ("--limit", 4)
    assert run("classify", photos, "-o", "o.csv", *NANO, *small).code == 0
    before = (tmp_path / "o.csv").read_bytes()
    other = run("classify", photos, "-o", "o.csv", *NANO, *small, "--top-k", 3)
    assert other.code == 2 and "top_k was 2, is 3" in other.err and "--overwrite" in other.err
    refused = run("classify", photos, "-o", "o.csv", *NANO, *small, "--no-resume")
    assert refused.code == 2 and "exists" in refused.err
    assert (tmp_path / "o.csv").read_bytes() == before
    replaced = run("classify", photos, "-o", "o.csv", *NANO, *small, "--top-k", 3, "--overwrite")
    assert replaced.code == 0 and b"label_3" in (tmp_path / "o.csv").read_bytes()


def test_a_foreign_or_edited_output_is_left_alone(run, photos, tmp_path):
    (tmp_path / "mine.csv").write_text("my,own,table\n")
    foreign = run("classify", photos, "-o", "mine.csv", *NANO, "--limit", 4)
    assert foreign.code == 2 and "was not made by this command" in foreign.err
    assert (tmp_path / "mine.csv").read_text() == "my,own,table\n"
    assert [p.name for p in tmp_path.iterdir()] == ["mine.csv"]
    command = ("classify", photos, "-o", "o.csv", *NANO, "--limit", 8)
    assert run(*command).code == 0
    edited = (tmp_path / "o.csv").read_bytes().replace(b"ok", b"OK", 1)
    (tmp_path / "o.csv").write_bytes(edited)
    done = run(*command)
    assert done.code == 2 and "was changed after row 0 by something else" in done.err
    assert (tmp_path / "o.csv").read_bytes() == edited


def test_a_second_run_on_the_same_output_refuses(start, run, photos, tmp_path, whole):
    command = ("classify", photos, "-o", "rows.csv", *NANO)
    first = start(*command)
    wait_for(lambda: rows_in_ledger(tmp_path / "rows.csv") > 0)
    first.kill(signal.SIGSTOP)
    second = run(*command)
    first.kill(signal.SIGCONT)
    assert second.code == 2 and "another run is writing rows.csv" in second.err
    assert first.wait().code == 0
    assert content(tmp_path / "rows.csv") == whole["csv"][0]


def test_a_full_disk_keeps_what_was_written(run, photos, tmp_path, whole):
    for suffix in FORMATS:
        command = ("classify", photos, "-o", f"rows.{suffix}", *NANO)
        done = run(*command, file_limit=6000)
        kept = rows_in_ledger(tmp_path / f"rows.{suffix}")
        assert done.code == 3, done.err
        assert "cannot write" in done.err and f"{kept} rows are safe" in done.err
        assert 0 < kept < 160
        assert run(*command).code == 0
        assert content(tmp_path / f"rows.{suffix}") == whole[suffix][0]
