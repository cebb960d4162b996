"""The verbs end to end on good input."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import ROOT, SAMPLES

NANO = ("--model", "litv2_nano", "--random-weights")


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_classify_labels_the_samples_right_in_a_fresh_process(tmp_path):
    """The first command of the README, as a shell would run it."""
    code = "from apps.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "classify", str(SAMPLES), "-o", "labels.csv"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["path"].rpartition("/")[2]: row for row in read_csv(tmp_path / "labels.csv")}
    assert set(rows) == {p.name for p in SAMPLES.glob("*.jpg")}
    assert rows["coffee.jpg"]["label_1"] == "espresso" and float(rows["coffee.jpg"]["prob_1"]) > 0.9
    assert rows["cat.jpg"]["label_1"] == "tiger cat"
    assert rows["camera.jpg"]["label_1"] == "tripod"
    header = list(rows["cat.jpg"])
    assert header[:8] == ["path", "status", "error", "model", "width", "height", "label_1", "prob_1"]
    assert {row["model"] for row in rows.values()} == {"tf_efficientnet_lite0.in1k"}
    assert f"{len(rows)} ok, 0 failed" in done.stderr and done.stdout == ""


def test_three_formats_hold_the_same_rows(run, tmp_path):
    for suffix in ("csv", "jsonl", "parquet"):
        done = run("classify", SAMPLES, "-o", f"out.{suffix}", "--top-k", 2)
        assert done.code == 0, done.err
    parquet = pq.read_table(tmp_path / "out.parquet").to_pylist()
    jsonl = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert jsonl == parquet
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in parquet]
    assert read_csv(tmp_path / "out.csv") == as_text
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"out.{s}{end}" for s in ("csv", "jsonl", "parquet") for end in ("", ".ledger")
    )


def test_rows_go_to_stdout_without_output(run):
    as_csv = run("classify", SAMPLES / "cat.jpg", "--top-k", 1)
    as_json = run("classify", SAMPLES / "cat.jpg", "--top-k", 1, "--json")
    assert as_csv.code == as_json.code == 0
    (row,) = csv.DictReader(io.StringIO(as_csv.out))
    assert row["label_1"] == "tiger cat"
    parsed = json.loads(as_json.out)
    assert parsed["label_1"] == "tiger cat" and {k: str(v) for k, v in parsed.items() if v is not None} == {
        k: v for k, v in row.items() if v
    }


def test_json_with_output_prints_the_summary(run, tmp_path):
    done = run("classify", SAMPLES, "-o", "o.csv", "--json", *NANO)
    facts = json.loads(done.out)
    assert facts["rows"] == facts["ok"] == len(list(SAMPLES.glob("*.jpg"))) and facts["failed"] == 0
    assert facts["output"] == "o.csv" and facts["images_per_second"] > 0


def test_shards_patterns_and_folders_give_the_same_labels(run, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for file in sorted(SAMPLES.glob("*.jpg")):
            shard.add(file, f"deep/{file.name}")
            label = tarfile.TarInfo(f"deep/{file.stem}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"7"))
    results = {}
    for name, given in {"folder": SAMPLES, "pattern": f"{SAMPLES}/*.jpg", "shard": "shard.tar"}.items():
        done = run("classify", given, "-o", f"{name}.jsonl")
        assert done.code == 0, done.err
        results[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["path"] for row in results["shard"]] == [
        f"shard.tar::deep/{p.name}" for p in sorted(SAMPLES.glob("*.jpg"))
    ]
    without_path = [[{**row, "path": ""} for row in rows] for rows in results.values()]
    assert without_path[0] == without_path[1] == without_path[2]


def test_embed_gives_what_timm_gives(run, tmp_path):
    import timm
    import torch

    import weights

    done = run("embed", SAMPLES, "-o", "e.parquet")
    assert done.code == 0, done.err
    table = pq.read_table(tmp_path / "e.parquet").to_pylist()
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(weights.state_dict_for("tf_efficientnet_lite0.in1k", model))
    model.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        for row in table:
            expected = model(transform(Image.open(row["path"]).convert("RGB"))[None])[0].numpy()
            np.testing.assert_allclose(row["embedding"], expected, atol=2e-4)


def test_embed_of_a_stage_has_its_width_in_every_format(run, tmp_path):
    for suffix in ("csv", "jsonl", "parquet"):
        done = run("embed", SAMPLES / "cat.jpg", "-o", f"s.{suffix}", "--stage", -3)
        assert done.code == 0, done.err
    by_parquet = pq.read_table(tmp_path / "s.parquet").to_pylist()[0]["embedding"]
    by_jsonl = json.loads((tmp_path / "s.jsonl").read_text())["embedding"]
    by_csv = json.loads(read_csv(tmp_path / "s.csv")[0]["embedding"])
    assert len(by_parquet) == 40
    assert np.float32(by_jsonl).tolist() == np.float32(by_csv).tolist() == by_parquet
    wrong = run("embed", SAMPLES, "--stage", 9)
    assert wrong.code == 2 and "0 (16 channels)" in wrong.err and "4 (320 channels)" in wrong.err


def test_a_table_and_a_bar_appear_on_a_terminal(run):
    (screen, screen_end), (notes, notes_end) = pty.openpty(), pty.openpty()
    try:
        done = run(
            "classify", SAMPLES, stdout=os.ttyname(screen_end), stderr=os.ttyname(notes_end), env={"TERM": "xterm"}
        )
        table, bar = os.read(screen, 1 << 16).decode(), os.read(notes, 1 << 16).decode()
    finally:
        for fd in (screen, screen_end, notes, notes_end):
            os.close(fd)
    assert done.code == 0
    assert "tiger cat 37.9%" in table and "tf_efficientnet_lite0.in1k" in table
    assert "images/s" in bar and "5/5" in bar and "5 ok, 0 failed" in bar


def test_no_bar_where_stderr_is_no_terminal(run):
    done = run("classify", SAMPLES, "-o", "quiet.csv", *NANO)
    assert done.err.count("\n") == 1 and "\x1b" not in done.err


@pytest.mark.parametrize(
    "verb", ["classify", "embed", "explain", "models", *(f"weights {v}" for v in ("list", "fetch", "import", "verify"))]
)
def test_help_of_every_verb_shows_an_example(run, verb):
    done = run(*verb.split(), "--help")
    assert done.code == 0 and f"Example: attnsuite {verb} " in done.out
