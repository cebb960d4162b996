"""Mistakes and broken things: each gets a clear line or a row, none stops the rest or shows a traceback."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import ROOT, SAMPLES
from test_decode import broken_files

from apps.batch.sources import Inputs, decode_path

NANO = ("--model", "litv2_nano", "--random-weights")


def make_zoo(folder: Path) -> int:
    """Everything that turns up in real folders; returns how many rows it must give."""
    folder.mkdir()
    for name, (data, _) in broken_files().items():
        (folder / name).write_bytes(data)
    cat = Image.open(SAMPLES / "cat.jpg")
    cat.convert("CMYK").save(folder / "cmyk.jpg")
    cat.convert("L").save(folder / "grey.jpg")
    cat.quantize().save(folder / "palette.png")
    cat.convert("RGBA").save(folder / "alpha.webp")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "sixteen.png")
    frames = [cat.quantize(), cat.rotate(90).quantize()]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (20_000, 1)).save(folder / "line.png")
    shutil.copy(SAMPLES / "cat.jpg", os.fsencode(folder) + b"/latin \xe9\xff.jpg")
    shutil.copy(SAMPLES / "cat.jpg", folder / 'two\nlines, "quoted".jpg')
    shutil.copy(SAMPLES / "cat.jpg", folder / "back\\slash.jpg")
    (folder / "circle").symlink_to(folder)
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "locked").mkdir()
    shutil.copy(SAMPLES / "cat.jpg", folder / "locked/cat.jpg")
    (folder / "readme.txt").write_text("no image")
    make_shard(folder / "shard.tar")
    return len(broken_files()) + 11 + 4 + 3


def make_shard(path: Path) -> None:
    """Two whole members and the beginning of a third."""
    with tarfile.open(path, "w") as shard:
        for index in range(3):
            shard.add(SAMPLES / "cat.jpg", f"{index}.jpg")
    os.truncate(path, path.stat().st_size * 3 // 4)


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: v or None for k, v in row.items()} for row in csv.DictReader(file)]


def test_every_input_of_a_wild_folder_gets_its_row(run, tmp_path):
    count = make_zoo(tmp_path / "zoo")
    (tmp_path / "zoo/locked").chmod(0)
    tables = {}
    for suffix in ("csv", "jsonl", "parquet"):
        command = ("classify", "zoo", "-o", f"rows.{suffix}", "--top-k", 1, "--workers", 2, "--batch-size", 5)
        done = run(*command, plain_user=True)
        assert done.code == 1, done.err
        tables[suffix] = read_rows(tmp_path / f"rows.{suffix}")
        again = run(*command, plain_user=True)
        assert again.code == 1 and "nothing to do" in again.err
    rows = tables["jsonl"]
    for table in tables.values():
        assert [(r["path"], r["status"], r["error"], r["label_1"]) for r in table] == [
            (r["path"], r["status"], r["error"], r["label_1"]) for r in rows
        ]
    assert len(rows) == count + 1  # the cut archive also has a row of its own
    by_name = {os.fsencode(decode_path(row["path"])).rpartition(b"/")[2].decode("latin-1"): row for row in rows}
    errors = {name: row["error"] for name, row in by_name.items() if row["status"] == "error"}
    for name, (_, words) in broken_files().items():
        assert words in errors.pop(name)
    assert errors.pop("locked") == "cannot list this folder: Permission denied"
    assert errors.pop("circle") == "symbolic link loop: leads back to zoo"
    assert errors.pop("self.jpg").startswith("symbolic link loop")
    assert errors.pop("pipe.jpg") == "not a regular file"
    assert "the archive ends after" in errors.pop("shard.tar::2.jpg")
    assert "cannot read this archive" in errors.pop("shard.tar")
    assert not errors
    for name in ("latin \xe9\xff.jpg", 'two\nlines, "quoted".jpg', "back\\slash.jpg", "cmyk.jpg", "shard.tar::0.jpg"):
        assert by_name[name]["label_1"].endswith("cat"), name
    assert (by_name["line.png"]["width"], by_name["line.png"]["height"]) == (20_000, 1)
    assert (
        f"{sum(r['status'] == 'ok' for r in rows)} ok, {sum(r['status'] == 'error' for r in rows)} failed" in done.err
    )


def test_nothing_but_errors_is_exit_code_one(run, tmp_path):
    (tmp_path / "a.jpg").touch()
    done = run("classify", "a.jpg", *NANO, "--json")
    assert done.code == 1 and json.loads(done.out)["error"] == "the file is empty"
    assert "0 ok, 1 failed" in done.err


def test_odd_names_resume(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name in (b"\xff.jpg", b"new\nline.jpg"):
        shutil.copy(SAMPLES / "cat.jpg", os.fsencode(tmp_path / "in") + b"/" + name)
    assert run("classify", "in", "-o", "o.csv", *NANO).code == 0
    assert "nothing to do: o.csv has a row for each of the 2 inputs" in run("classify", "in", "-o", "o.csv", *NANO).err
    single = run("classify", os.fsdecode(b"in/\xff.jpg"), *NANO, "--json")
    assert json.loads(single.out)["path"] == "in/\\xff.jpg"


def test_duplicates_are_processed_once_with_a_note(run, tmp_path):
    done = run("classify", SAMPLES, SAMPLES / "cat.jpg", SAMPLES, "-o", "o.csv", *NANO)
    assert done.code == 0
    assert len(read_rows(tmp_path / "o.csv")) == len(list(Inputs([str(SAMPLES)])))
    assert "cat.jpg: 1 inputs were named before and are processed once" in done.err


MISTAKES = {
    "misspelt model": (("--model", "litv2_smal"), "did you mean litv2_small"),
    "part of a name": (("--model", "nfnet"), "did you mean"),
    "model of no kind": (("--model", "qqqqqqqqqqqqqq"), "attnsuite models --all"),
    "unknown tag": (("--model", "litv2_small.in22k"), "there are: in1k"),
    "path as a model": (("--model", "some/folder"), "local-dir:some/folder"),
    "no weights published": (("--model", "litv2_nano"), "--checkpoint FILE"),
    "weights out of reach": (("--model", "resnet18"), "--checkpoint FILE"),
    "hub out of reach": (("--model", "hf-hub:timm/resnet18.a1_in1k"), "did not answer"),
    "no such checkpoint": (("--model", "litv2_nano", "--checkpoint", "no.pth"), "is not a file"),
    "two kinds of weights": (("--checkpoint", "o.txt", "--random-weights"), "exclude each other"),
    "no such folder model": (("--model", "local-dir:nowhere"), "holds no config.json"),
    "too many labels": ((*NANO, "--top-k", 1001), "1000 classes"),
    "no such device": ((*NANO, "--device", "cuda:77"), "--device cuda:77 cannot be used here"),
    "device of no kind": ((*NANO, "--device", "fast"), "--device fast cannot be used here"),
    "zero batch": ((*NANO, "--batch-size", 0), "--batch-size"),
    "output suffix": (("-o", "labels.xlsx"), ".csv, .jsonl, .parquet"),
    "output folder absent": (("-o", "absent/labels.csv"), "does not exist; create it first"),
    "output is a folder": (("-o", "folder.csv"), "exists and is not a file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(run, tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "o.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    options, words = MISTAKES[name]
    done = run("classify", SAMPLES, "-o", "fine.csv", *options)
    assert done.code == 2, done.err
    assert words in " ".join(done.err.replace("│", " ").split()), done.err
    assert "Traceback" not in done.err and done.out == ""
    assert sorted(tmp_path.rglob("*")) == before, "a command that cannot start leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "'nowhere' does not exist"),
        (("*.jpg",), "no file matches"),
        ((".",), "found no images"),
        ((), "INPUT"),
    ],
)
def test_inputs_that_lead_nowhere(run, arguments, words):
    done = run("classify", *arguments)
    assert done.code == 2 and words in done.err and "Traceback" not in done.err


def test_debug_shows_the_traceback(run):
    assert "Traceback" in run("classify", "nowhere", "--debug").err


def test_a_folder_without_permission_to_write(run, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / "in")
    tmp_path.chmod(0o555)
    done = run("classify", "in", "-o", "o.csv", *NANO, plain_user=True)
    tmp_path.chmod(0o755)
    assert done.code == 2 and "no permission to write 'o.csv'" in done.err


def test_a_checkpoint_that_does_not_fit_says_what_differs(run, tmp_path):
    import timm
    import torch

    import attnsuite  # noqa: F401 - registers the model

    state = timm.create_model("litv2_nano").state_dict()
    names = list(state)
    state["extra.weight"] = state.pop(names[0])
    state[names[1]] = torch.zeros(3, 5)
    torch.save({"model": state}, tmp_path / "other.pth")
    done = run("classify", SAMPLES, "--model", "litv2_nano", "--checkpoint", "other.pth")
    assert done.code == 2 and "Traceback" not in done.err
    assert "other.pth does not fit litv2_nano: entries differ" in done.err
    assert f"1 missing ({names[0]})" in done.err and "1 unexpected (extra.weight)" in done.err
    assert "1 of another shape" in done.err and f"{names[1]} [3, 5] not [" in done.err
    (tmp_path / "noise.pth").write_bytes(b"\x00" * 5000)
    noise = run("classify", SAMPLES, "--model", "litv2_nano", "--checkpoint", "noise.pth")
    assert noise.code == 2 and "noise.pth" in noise.err and "Traceback" not in noise.err


def test_a_real_full_disk(run, photos, tmp_path):
    """On a file system of its own; RLIMIT_FSIZE stands for it where none can be mounted (test_resume)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        command = ("classify", photos, "-o", disk / "o.jsonl", *NANO, "--batch-size", 4)
        done = run(*command)
        kept = len(read_rows(disk / "o.jsonl"))
        assert done.code == 3 and "No space left on device" in done.err and f"{kept} rows are safe" in done.err
        assert 0 < kept < 160
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert run(*command).code == 0
        assert len(read_rows(disk / "o.jsonl")) == 160
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_reader_that_goes_away_ends_the_run_quietly(photos):
    command = (
        f"{sys.executable} -c 'from apps.cli import main; main()' classify {photos} {' '.join(NANO)} --batch-size 4"
    )
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 2; echo ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
    )
    header, row, code = done.stdout.splitlines()
    assert header.startswith("path,") and row.startswith(str(photos)) and code == "141"
    assert done.stderr == ""
