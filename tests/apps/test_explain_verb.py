"""`attnsuite explain`: pictures, bare maps and rows."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support import SAMPLES

from apps.batch.decode import View
from apps.batch.engines import run_local
from apps.batch.job import Job
from apps.batch.sources import Inputs
from apps.batch.stage import Compute
from apps.console import RunReport
from apps.errors import UsageError
from apps.explain import Explain, blend, class_index
from apps.models import Network


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]


def test_heat_lies_on_the_object(run, tmp_path):
    """Class activation of the default network finds the cup of coffee, and another class lies elsewhere."""
    done = run("explain", SAMPLES, "-o", "maps", "--npy")
    assert done.code == 0, done.err
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "maps")}
    assert set(rows) == {p.name for p in SAMPLES.glob("*.jpg")}
    coffee = rows["coffee.jpg"]
    assert coffee["label"] == "espresso" and coffee["prob"] > 0.9
    assert coffee["heatmap"] == "maps/coffee.jpg.png" and coffee["array"] == "maps/coffee.jpg.npy"
    heat = np.load(tmp_path / coffee["array"])
    assert heat.shape == (224, 224) and heat.dtype == np.float32 and heat.min() == 0 and heat.max() == 1
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert 60 < x < 180 and 60 < y < 190
    picture, photo = Image.open(tmp_path / coffee["heatmap"]), Image.open(SAMPLES / "coffee.jpg")
    assert picture.size == photo.size
    changed = np.abs(np.asarray(picture, int) - np.asarray(photo, int)).sum(axis=2)
    assert not changed[:, :20].any(), "what the network did not see is left as it is"
    assert changed[:, 100:400].mean() > 20

    named = run("explain", SAMPLES / "coffee.jpg", "-o", "table", "--npy", "--target", "wooden spoon")
    assert named.code == 0, named.err
    (row,) = rows_of(tmp_path / "table")
    assert row["label"] == "wooden spoon" and row["prob"] < 0.1
    assert np.abs(np.load(tmp_path / row["array"]) - heat).mean() > 0.1


@pytest.mark.parametrize("model", ["litv2_nano", "biformer_nano"])
def test_our_backbones_are_explained(run, tmp_path, model):
    done = run("explain", SAMPLES, "-o", "maps", "--model", model, "--random-weights", "--limit", 2)
    assert done.code == 0, done.err
    for row in rows_of(tmp_path / "maps"):
        assert row["model"] == f"{model} (random weights)"
        with Image.open(tmp_path / row["heatmap"]) as picture:
            assert picture.size == (row["width"], row["height"])


def test_names_mirror_the_inputs_and_never_collide(run, tmp_path):
    for folder in ("one", "two/deep"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a.jpg", "a.png"):
            shutil.copy(SAMPLES / "cat.jpg", tmp_path / folder / name)
    options = ("--model", "test_convnext", "--random-weights")
    done = run("explain", "one", "two", "-o", "maps", *options)
    assert done.code == 0, done.err
    made = sorted(str(p.relative_to(tmp_path / "maps")) for p in (tmp_path / "maps").rglob("*.png"))
    assert made == [f"{folder}/a.{s}.png" for folder in ("one", "two/deep") for s in ("jpg", "png")]
    assert run("explain", "one", "-o", "single", *options).code == 0
    assert (tmp_path / "single/a.jpg.png").exists()


def test_errors_are_rows_and_the_rest_goes_on(run, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / "in/good.jpg")
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / f"in/{'long' * 62}.jpg")  # with .png behind it, too long a name
    (tmp_path / "in/bad.jpg").write_bytes(b"")
    options = ("--model", "test_convnext", "--random-weights")
    done = run("explain", "in", "-o", "maps", *options)
    assert done.code == 1
    bad, good, long = rows_of(tmp_path / "maps")
    assert bad["error"] == "the file is empty" and bad["heatmap"] is None
    assert good["status"] == "ok" and (tmp_path / good["heatmap"]).exists()
    assert long["status"] == "error" and "File name too long" in long["error"]
    again = run("explain", "in", "-o", "maps", *options)
    assert again.code == 1 and "nothing to do" in again.err


def test_a_network_that_cannot_be_explained_leaves_nothing(tmp_path):
    """It has no feature map, which shows when it first runs; the output must not then belong to that command."""
    config = {"input_size": (3, 8, 8), "mean": (0,) * 3, "std": (1,) * 3, "crop_pct": 1.0, "crop_mode": "center"}
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    network = Network(flat, "flat", ["a", "b"], config)
    stage = Explain(network, Compute(torch.device("cpu")), str(tmp_path), str(SAMPLES))
    job = Job(Inputs([str(SAMPLES)]), lambda: stage, {}, RunReport(), partial(run_local, batch_size=2, workers=0))
    with pytest.raises(UsageError, match="flat cannot be explained"):
        job.to_file(str(tmp_path / "rows.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_a_folder(run, tmp_path):
    (tmp_path / "file").touch()
    done = run("explain", SAMPLES, "-o", "file")
    assert done.code == 2 and "cannot make the output folder file" in done.err


@pytest.mark.parametrize(
    ("target", "words"),
    [("5000", "classes 0 to 999"), ("no such thing", "is no class"), ("shark", "fits")],
)
def test_a_target_that_is_none(run, target, words):
    done = run("explain", SAMPLES / "cat.jpg", "-o", "maps", "--target", target)
    assert done.code == 2 and words in done.err


def test_targets_by_index_name_or_part():
    network = Network(None, "net", ["tabby, tabby cat", "tiger cat", "tiger", "tiger shark, Galeocerdo"], {})
    assert [class_index(network, t) for t in ("0", "Tabby Cat", "tiger", "galeo", "tiger cat")] == [0, 0, 2, 3, 1]


def test_blending_follows_the_box_and_the_opacity():
    picture = np.full((40, 60, 3), 128, np.uint8)
    heat = np.zeros((8, 8))
    heat[:4] = 1
    hot = cv2.applyColorMap(np.full((1, 1), 255, np.uint8), cv2.COLORMAP_TURBO)[0, 0, ::-1]
    full = blend(View(picture, (10.0, 0.0, 50.0, 40.0)), heat, 1.0)
    assert full[5, 30].tolist() == hot.tolist() and full[35, 30].tolist() == [128] * 3
    assert (full[:, :10] == 128).all() and (full[:, 50:] == 128).all()
    assert (blend(View(picture, (10.0, 0.0, 50.0, 40.0)), heat, 0.0) == 128).all()
    beyond = blend(View(picture, (-20.0, -30.0, 80.0, 70.0)), np.ones((8, 8)), 1.0)
    assert (beyond == hot).all()


def test_where_a_place_attends(run, tmp_path):
    """A row of one layer's attention; with --connectivity the regions that BiFormer routes to."""
    own = ("--model", "biformer_nano", "--random-weights", "--npy", "--at", "0.2,0.7")
    for options in (("--layer", "-1"), ("--layer", "stages.1.0.attn", "--connectivity")):
        done = run("explain", SAMPLES / "cat.jpg", "-o", "maps", *own, *options, "--overwrite")
        assert done.code == 0, done.err
        heat = np.load(tmp_path / "maps" / "cat.jpg.npy")
        assert heat.shape == (224, 224) and heat.max() == 1
        assert "--connectivity" not in options or set(np.unique(heat)) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--at", "0.5"), "--at 0.5: expected X,Y as fractions"),
        (("--at", "0.5,1"), "--at 0.5,1: expected X,Y as fractions"),
        (("--at", "a,b"), "--at a,b: expected X,Y as fractions"),
        (("--layer", "3"), "give that with --at X,Y"),
        (("--method", "rise"), "--method rise: expected one of auto, attention, activation, rollout"),
        (("--method", "activation", "--at", "0.5,0.5"), "give one of them"),
        (("--at", "0.5,0.5"), "EfficientNet has no attention that can be recorded"),
        (("--method", "attention"), "EfficientNet has no attention to record"),
        (
            ("--model", "litv2_nano", "--random-weights", "--at", "0.5,0.5", "--layer", "99"),
            "has 3 layers of attention",
        ),
    ],
)
def test_what_cannot_be_drawn_is_a_wrong_command(run, options, message):
    done = run("explain", SAMPLES / "cat.jpg", "-o", "maps", *options)
    assert done.code == 2 and message in done.err, done.err
