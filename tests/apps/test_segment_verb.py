"""`attnsuite segment`: maps of classes, coloured pictures and rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from support import SAMPLES

import vision.segmentation
from apps.segment import _largest, read_scales, segmenters
from vision.psa import MultiScaleLoss

NANO = ("--model", "psa_hrnet_nano_ocr")
RANDOM = (*NANO, "--random-weights")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, nested and prefixed as the published ones are, of a network that tells dark from bright."""
    torch.manual_seed(0)
    model = timm.create_model("psa_hrnet_nano_ocr", num_classes=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small maps: more threads only wait for one another
    for _ in range(60):
        x = F.interpolate(2.0 * torch.randint(2, (4, 1, 4, 4)) - 1, scale_factor=16.0).expand(-1, 3, -1, -1)
        step = MultiScaleLoss()(model, 2 * x, (x[:, 0] > 0).long())
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    path = tmp_path_factory.mktemp("checkpoint") / "dark_bright.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    return path


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Dark on the left, bright on the right; stored lying on its side, with the tag that says so."""
    picture = np.zeros((130, 201, 3), np.uint8)
    picture[:, 120:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    (tmp_path / "in").mkdir()
    Image.fromarray(np.rot90(picture)).save(tmp_path / "in/halves.png", exif=exif)
    return tmp_path / "in/halves.png"


def test_every_pixel_of_the_upright_picture_gets_its_class(run, tmp_path, trained, halves):
    done = run("segment", "in", "-o", "maps", *NANO, "--checkpoint", trained)
    assert done.code == 0, done.err
    (row,) = rows_of(tmp_path / "maps")
    assert list(row) == [
        "path", "status", "error", "model", "width", "height", "label", "share", "classes", "classmap", "overlay",
    ]  # fmt: skip
    assert (row["width"], row["height"]) == (201, 130) and row["model"] == "psa_hrnet_nano_ocr (dark_bright.pth)"
    with Image.open(tmp_path / row["classmap"]) as indexed:
        assert indexed.mode == "P" and indexed.size == (201, 130)
        classes = np.asarray(indexed)
        colors = np.asarray(indexed.getpalette(), np.uint8).reshape(-1, 3)
    assert (classes[:, :110] == 0).mean() > 0.9 and (classes[:, 130:] == 1).mean() > 0.9
    shares = json.loads(row["classes"])
    assert list(shares) == ["class_0", "class_1"], "two classes are not the nineteen of the published network"
    assert shares["class_0"] == row["share"] == round(float((classes == 0).mean()), 6) and row["label"] == "class_0"
    assert colors[:2].tolist() == [list(color) for color in vision.segmentation.palette(["class_0", "class_1"])]
    overlay = np.asarray(Image.open(tmp_path / row["overlay"]), int)
    assert np.abs(overlay - (np.where(np.arange(201) < 120, 0, 255)[None, :, None] + colors[classes]) / 2).max() <= 1


def test_size_bounds_what_the_network_sees_and_not_the_map(run, tmp_path, trained, halves):
    done = run("segment", "in", "-o", "maps", *NANO, "--checkpoint", trained, "--size", 96, "--scales", "1,2")
    assert done.code == 0, done.err
    (row,) = rows_of(tmp_path / "maps")
    with Image.open(tmp_path / row["classmap"]) as indexed:
        classes = np.asarray(indexed)
    assert classes.shape == (130, 201) and (classes[:, :100] == 0).mean() > 0.95


def test_samples_of_any_shape_and_colours_that_can_be_left_out(run, tmp_path):
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (600, 5), "red").save(tmp_path / "strip.png")
    done = run("segment", SAMPLES / "cat.jpg", "dot.png", "strip.png", "-o", "maps", *RANDOM, "--size", 128,
               "--opacity", 0, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == 3
    for row in rows_of(tmp_path / "maps"):
        assert sum(json.loads(row["classes"]).values()) == pytest.approx(1, abs=1e-5)
        with Image.open(tmp_path / row["classmap"]) as indexed:
            assert indexed.size == (row["width"], row["height"])
    cat = next(row for row in rows_of(tmp_path / "maps") if row["path"].endswith("cat.jpg"))
    with Image.open(tmp_path / cat["overlay"]) as overlay, Image.open(SAMPLES / "cat.jpg") as photo:
        assert np.array_equal(np.asarray(overlay), np.asarray(photo)) or overlay.size != photo.size


def test_errors_are_rows_and_the_same_command_goes_on(run, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / "in/good.jpg")
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / f"in/{'long' * 61}.jpg")  # with .classes.png behind it, too long
    (tmp_path / "in/bad.jpg").write_bytes(b"")
    command = ("segment", "in", "-o", "maps", *RANDOM, "--size", 64, "--scales", "1")
    done = run(*command)
    assert done.code == 1
    bad, good, long = rows_of(tmp_path / "maps")
    assert bad["error"] == "the file is empty" and bad["classmap"] is None
    assert good["status"] == "ok" and (tmp_path / good["overlay"]).exists()
    assert long["status"] == "error" and "File name too long" in long["error"]
    again = run(*command)
    assert again.code == 1 and "nothing to do" in again.err
    other = run(*command, "--opacity", 1)
    assert other.code == 2 and "opacity" in other.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "litv2_nano", "--random-weights"), "does not segment; models that do: psa_hrnet_nano_ocr, psa_hr"),
        (NANO, "no weights are published for psa_hrnet_nano_ocr"),
        ((*RANDOM, "--scales", "0.5,big"), "expected different factors"),
        ((*RANDOM, "--scales", "1,1"), "expected different factors"),
    ],
)
def test_wrong_usage(run, tmp_path, options, words):
    done = run("segment", SAMPLES / "cat.jpg", "-o", "maps", *options)
    assert done.code == 2 and words in done.err, done.err
    assert not (tmp_path / "maps/rows.jsonl").exists()


def test_published_weights_that_cannot_be_fetched_say_how_to_import_them(run, tmp_path):
    env = {"ATTNSUITE_HOME": str(tmp_path / "store"), "ATTNSUITE_MIRROR": "http://127.0.0.1:9"}
    done = run("segment", SAMPLES / "cat.jpg", "-o", "maps", env=env)
    assert done.code == 2 and "attnsuite weights import psa_hrnet_w48_ocr.parallel_cityscapes" in done.err


@pytest.mark.parametrize("verb", ["classify", "embed"])
def test_other_verbs_send_segmentation_networks_here(run, verb):
    done = run(verb, SAMPLES / "cat.jpg", *RANDOM)
    assert done.code == 2 and "use `attnsuite segment`" in done.err


def test_help_has_an_example(run):
    done = run("segment", "--help")
    assert done.code == 0 and "Example: attnsuite segment" in done.out and "--scales" in done.out


def test_models_that_segment():
    names = segmenters()
    assert {"psa_hrnet_nano_ocr", "psa_hrnet_w48_ocr"} <= set(names) and "litv2_nano" not in names


def test_scales_are_read():
    assert read_scales(None) is None and read_scales("0.5,1, 2") == (0.5, 1.0, 2.0)


def test_maps_grow_class_by_class_as_they_would_together():
    scores = torch.randn(7, 9, 11)
    grown = F.interpolate(scores[None], (40, 33), mode="bilinear", align_corners=False)[0]
    assert torch.equal(_largest(scores, (40, 33)).long(), grown.argmax(0))
    assert torch.equal(_largest(scores, (9, 11)).long(), scores.argmax(0))
