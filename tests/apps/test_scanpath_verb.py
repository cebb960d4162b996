"""`attnsuite scanpath`: sampled searches of grids of objects, as tables, rows and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision.scanpath import checkpoint
from vision.scanpath.appearance import cut
from vision.scanpath.datasets import read_csv
from vision.scanpath.decoding import sample
from vision.scanpath.model import OAT, OATConfig
from vision.scanpath.objects import RegularGrid
from vision.scanpath.scenes import Scenes

SIZES: dict[str, Any] = {
    "dim": 64, "position_dim": 48, "depth": 1, "mlp_dim": 64, "crop_size": (20, 16), "pools": (2, 2), "max_length": 12,
    "extent": (4, 6),
}  # fmt: skip


def saved(folder: Path, **changes: Any) -> OAT:
    torch.manual_seed(0)
    model = OAT(OATConfig(**(SIZES | changes))).eval()
    checkpoint.save(model, folder)
    return model


@pytest.fixture
def model(tmp_path: Path) -> OAT:
    """One with random weights, in the folder `model`."""
    return saved(tmp_path / "model")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    made = [Image.fromarray(rng.integers(0, 255, (height, 120, 3), dtype=np.uint8)) for height in (80, 91)]
    for number, picture in enumerate(made):
        picture.save(tmp_path / f"in/{number}.png")
    return made


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]


GIVEN = ("scanpath", "in", "-o", "out", "--model", "model", "--grid", "2x3", "--target", "2,1", "--workers", "0")


def test_scanpaths_are_those_that_the_library_samples(run, tmp_path, model, pictures):
    done = run(*GIVEN, "--samples", "7", "--seed", "3")
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == [
        "path", "status", "error", "model", "width", "height", "target", "found", "steps", "scanpaths",
    ]  # fmt: skip
    for row, picture in zip(rows, pictures, strict=True):
        objects = RegularGrid(2, 3).on(picture.size)
        scenes = Scenes.of_objects([objects], [3], [cut(picture, objects, (20, 16))])
        expected = sample(model, scenes, 7, generator=torch.Generator().manual_seed(3)).tolist()[0]
        table = read_csv(tmp_path / row["scanpaths"])
        assert [objects.at(path.fixations).tolist() for path in table.scanpaths] == [p.tolist() for p in expected]
        for path, ids in zip(table.scanpaths, expected, strict=True):
            np.testing.assert_allclose(path.fixations, objects.centres[ids], atol=0.01)
        assert {scene.target for scene in table.scenes} == {row["target"]} == {"row 2, column 1"}
        assert table.images == (row["path"],)
        assert row["steps"] == pytest.approx(np.mean([len(ids) for ids in expected]), abs=1e-5)
        assert row["found"] == pytest.approx(np.mean([ids[-1] == 3 for ids in expected]), abs=1e-5)
        assert (row["width"], row["height"], row["model"]) == (*picture.size, "model")


def test_pictures_are_drawn_when_asked_for(run, tmp_path, model, pictures):
    done = run(*GIVEN, "--draw")
    assert done.code == 0, done.err
    for row, picture in zip(rows_of(tmp_path / "out"), pictures, strict=True):
        for name in ("drawing", "density"):
            with Image.open(tmp_path / row[name]) as drawn:
                assert drawn.size == picture.size
                assert (np.asarray(drawn.convert("RGB")) != np.asarray(picture)).any()


def test_a_film_is_written_when_asked_for(run, tmp_path, model, pictures):
    done = run(*GIVEN, "--gif", "--samples", "2")
    assert done.code == 0, done.err
    for row in rows_of(tmp_path / "out"):
        assert "drawing" not in row
        lengths = [len(path) for path in read_csv(tmp_path / row["scanpaths"]).scanpaths]
        with Image.open(tmp_path / row["film"]) as film:
            durations = []
            for frame in range(getattr(film, "n_frames", 1)):
                film.seek(frame)
                durations.append(film.info["duration"])
        assert sum(durations) == 400 * sum(lengths) + 2000


def test_the_same_command_goes_on_and_another_target_is_another_command(run, tmp_path, model, pictures):
    assert run(*GIVEN).code == 0
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    (tmp_path / "in/2.png").write_bytes((tmp_path / "in/0.png").read_bytes())
    assert run(*GIVEN).code == 0
    after = (tmp_path / "out/rows.jsonl").read_bytes()
    assert after.startswith(before) and len(rows_of(tmp_path / "out")) == 3
    first, _, copy = ((tmp_path / row["scanpaths"]).read_text().splitlines() for row in rows_of(tmp_path / "out"))
    assert [line.split(",in/")[0] for line in first] == [line.split(",in/")[0] for line in copy]
    other = run(*(*GIVEN[:-4], "--target", "1,1"))
    assert other.code == 2 and "--overwrite" in other.err


def test_a_file_that_is_no_picture_is_a_row(run, tmp_path, model, pictures):
    (tmp_path / "in/1.png").write_text("no picture")
    done = run(*GIVEN)
    assert done.code == 1
    good, bad = rows_of(tmp_path / "out")
    assert good["status"] == "ok" and bad["status"] == "error" and "not an image" in bad["error"]
    assert bad["scanpaths"] is None


def test_a_model_that_looks_at_nothing_will_do(run, tmp_path, pictures):
    saved(tmp_path / "model", appearance="none")
    assert run(*GIVEN, "--max-refixations", "0", "--temperature", "2").code == 0
    (tables,) = {row["status"] for row in rows_of(tmp_path / "out")}
    assert tables == "ok"
    paths = read_csv(tmp_path / rows_of(tmp_path / "out")[0]["scanpaths"]).scanpaths
    assert all(len(np.unique(path.fixations, axis=0)) == len(path) for path in paths)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--target", "3,1"), "--target 3,1 is not on the grid, which has rows 1 to 2 and columns 1 to 3"),
        (("--target", "0,1"), "--target 0,1: expected two numbers from 1, rows first, such as 2,5"),
        (("--target", "cup"), "--target cup: expected two numbers from 1"),
        (("--grid", "2"), "--grid 2: expected two numbers from 1, rows first, such as 3x9"),
        (("--grid", "0x4"), "--grid 0x4: expected two numbers from 1"),
        (("--grid", "5x6"), "--grid 5x6: model knows grids of up to 4 rows and 6 columns"),
        (("--model", "none"), "--model none: config.json is not there; expected search_scenes or a model's folder"),
        (("--samples", "0"), "Invalid value for '--samples'"),
    ],
)
def test_mistakes_are_named(run, tmp_path, model, pictures, given, says):
    done = run(*GIVEN, *given)
    assert done.code == 2
    assert says in " ".join(done.err.replace("│", " ").split())
    assert not (tmp_path / "out/rows.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"position": "distance_2d", "dim": 192, "position_dim": 160, "extent": (100, 100), "sigma": 60.0},
            "position='distance_2d'",
        ),
        ({"appearance": "features", "feature_dim": 3}, "has appearance='features'"),
    ],
)
def test_models_for_other_input_are_refused(run, tmp_path, pictures, changes, says):
    saved(tmp_path / "model", **changes)
    done = run(*GIVEN)
    assert done.code == 2 and says in done.err and "expected a model for crops of one size" in done.err


def test_a_damaged_model_is_named(run, tmp_path, model, pictures):
    (tmp_path / "model/config.json").write_text("{}")
    done = run(*GIVEN)
    assert done.code == 2 and "model.safetensors is not of the model that config.json describes" in done.err
