"""`attnsuite evaluate`: a network whose answers are known by arithmetic, and a real one on photographs."""

from __future__ import annotations

import csv
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import SAMPLES
from timm.models import save_for_hf

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
LABELS = [*COLOURS, "black", "grey", "white"]
MODEL = ("-m", "local-dir:model", "--workers", "0")
SCALE = 0.22
BIAS = (0, -0.02, -0.05, 0, 0, 0)  # so that of two colours that are not shown the later one comes last


def see_colours(folder: Path, labels: list[str] | None = LABELS) -> None:
    """Saves a network that tells red, green and blue, and knows three more classes.

    Each of its first three features is the mean of a colour, all else is switched off; the classifier passes them on.
    """
    model = timm.create_model("test_vit", num_classes=6, img_size=64, global_pool="avg", class_token=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.zero_()
        filters = dict(model.named_parameters())["patch_embed.proj.weight"]
        head = dict(model.named_parameters())["head.weight"]
        for colour in range(3):
            filters[colour, colour] = 1 / filters[0, 0].numel()
            head[colour, colour] = SCALE
        dict(model.named_parameters())["head.bias"].copy_(torch.tensor(BIAS))
    names = {"label_names": labels} if labels else {}
    save_for_hf(model, str(folder), model_config=names, safe_serialization=True)


def expected_probabilities(colour: str) -> np.ndarray:
    """What that network answers, by hand: `[6]`."""
    features = np.zeros(64)
    features[:3] = (np.array(COLOURS[colour]) / 255 - 0.5) / 0.5
    normed = (features - features.mean()) / np.sqrt(features.var() + 1e-6)
    odds = np.exp(np.array([*(SCALE * normed[:3]), 0, 0, 0]) + BIAS)
    return odds / odds.sum()


@pytest.fixture
def model(tmp_path: Path) -> None:
    """The network that `MODEL` names."""
    see_colours(tmp_path / "model")


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Puts pictures of colours into the folder of a class."""

    def put(label: str, *colours: str, data: str = "data") -> None:
        folder = tmp_path / data / label
        folder.mkdir(parents=True, exist_ok=True)
        for colour in colours:
            Image.new("RGB", (64, 64), COLOURS[colour]).save(folder / f"{len(list(folder.iterdir()))}.png")

    return put


@pytest.fixture
def data(put: Callable[..., None]) -> None:
    put("red", "red", "red", "red", "green")
    put("green", "green", "green")
    put("blue", "red", "red", "blue", "green")


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_those_computed_by_hand(run, tmp_path, model, data):
    done = run("evaluate", "data", *MODEL, "-o", "out", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "out/metrics.json").read_text("utf-8"))
    assert (found["pictures"], found["classes"], found["classes_of_model"], found["unreadable"]) == (10, 3, 6, 0)
    top1 = found["metrics"]["top1"]
    assert top1["value"] == 0.6
    assert top1["n"] == 10
    assert (top1["low"], top1["high"]) == pytest.approx((0.312674, 0.831820), abs=1e-6)  # of 6 in 10, as published
    assert found["metrics"]["top5"]["value"] == pytest.approx(0.7)  # blue is sixth where it is not shown, red is fifth
    # All confidences are in one bin of fifteen, so the error of calibration is the distance of two means.
    sure = [expected_probabilities(colour).max() for colour in ["red"] * 5 + ["green"] * 4 + ["blue"]]
    assert len({int(15 * each) for each in sure}) == 1
    assert found["metrics"]["ece"]["value"] == pytest.approx(abs(np.mean(sure) - 0.6), abs=1e-5)
    assert table(tmp_path / "out/confusion.csv") == [
        {"class": "red", "red": "3", "green": "1", "blue": "0"},
        {"class": "green", "red": "0", "green": "2", "blue": "0"},
        {"class": "blue", "red": "2", "green": "1", "blue": "1"},
    ]
    rows = {row["class"]: row for row in table(tmp_path / "out/per_class.csv")}
    assert [(rows[c]["n"], rows[c]["accuracy"], rows[c]["taken_for"]) for c in COLOURS] == [
        ("4", "0.75", "green"),
        ("2", "1.0", ""),
        ("4", "0.25", "red"),
    ]
    with Image.open(tmp_path / "out/confusion.png") as picture:
        assert picture.mode == "RGB"
        assert len(picture.getcolors(1 << 20)) > 5


def test_predictions_are_rows_with_the_probability_of_the_answer(run, tmp_path, model, data):
    assert run("evaluate", "data", *MODEL, "-o", "out").code == 0
    rows = table(tmp_path / "out/predictions.csv")
    assert len(rows) == 10
    for row in rows:
        with Image.open(tmp_path / row["path"]) as picture:
            colour = next(name for name, value in COLOURS.items() if picture.getpixel((0, 0)) == value)
        assert row["label"] == Path(row["path"]).parent.name
        assert row["predicted"] == colour
        assert float(row["prob"]) == pytest.approx(expected_probabilities(colour).max(), abs=1e-5)
        assert row["correct"] == str(int(row["label"] == colour))


def test_a_picture_that_cannot_be_read_is_a_row_and_in_no_figure(run, tmp_path, model, data):
    (tmp_path / "data/red/broken.jpg").write_bytes(b"no picture")
    done = run("evaluate", "data", *MODEL, "-o", "out", "--json", "--corruptions", "fog", "--severities", "1")
    assert done.code == 1
    found = json.loads(done.out)
    assert (found["pictures"], found["unreadable"], found["failed_when_corrupted"]) == (11, 1, 0)
    assert found["metrics"]["top1"]["n"] == found["corruptions"]["fog"]["1"]["top1"]["n"] == 10
    failed = [row for row in table(tmp_path / "out/predictions.csv") if row["status"] == "error"]
    assert [(row["label"], row["predicted"]) for row in failed] == [("red", "")]
    assert failed[0]["path"].endswith("broken.jpg")
    assert "broken.jpg: not an image" in done.err


def test_all_pictures_broken_gives_no_figures_but_a_report(run, tmp_path, model):
    (tmp_path / "data/red").mkdir(parents=True)
    (tmp_path / "data/red/a.jpg").write_bytes(b"no picture")
    done = run("evaluate", "data", *MODEL, "-o", "out", "--json")
    assert done.code == 1, done.err
    assert json.loads(done.out)["metrics"]["top1"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0}


def test_on_the_screen_stands_a_table(run, model, data):
    done = run("evaluate", "data", *MODEL, "--metrics", "top1")
    assert done.code == 0, done.err
    header, line = done.out.splitlines()
    assert header.split() == ["metric", "value", "95", "%", "interval", "n"]
    assert line.split() == ["top-1", "accuracy", "60.00", "%", "31.27", "–", "83.18", "10"]
    assert "10 pictures of 3 classes" in done.err
    assert "it has 6 and may answer with any" in done.err


def test_a_real_network_on_photographs_in_folders_of_their_classes(run, tmp_path):
    for name, photo in (("n07920052", "coffee.jpg"), ("Tiger_cat", "cat.jpg")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        shutil.copy(SAMPLES / photo, tmp_path / "photos" / name)
    done = run("evaluate", "photos", "-o", "out", "--json", "--workers", "0")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["metrics"]["top1"] == {"value": 1.0, "low": pytest.approx(0.342380), "high": 1.0, "n": 2}
    assert found["classes_matched_by"] == "name"
    assert {row["label"] for row in table(tmp_path / "out/predictions.csv")} == {"espresso", "tiger cat"}


def test_data_may_be_a_csv_shards_or_divided(run, tmp_path, model, put):
    put("red", "red", "green", data="set/val")
    put("blue", "blue", "blue", data="set/val")
    put("blue", "red", data="set/train")
    lines = ["path,label", *(f"set/val/{c}/{i}.png,{c}" for c in ("red", "blue") for i in (0, 1))]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for number, line in enumerate(lines[1:]):
            path, label = line.split(",")
            (tmp_path / "label.cls").write_text(label, encoding="utf-8")
            shard.add(tmp_path / path, f"{number}.png")
            shard.add(tmp_path / "label.cls", f"{number}.cls")
    found = []
    for given in (["set"], ["set/val"], ["list.csv"], ["shard.tar"], ["set", "--split", "train"]):
        done = run("evaluate", *given, *MODEL, "--json")
        assert done.code == 0, done.err
        found.append(json.loads(done.out)["metrics"]["top1"]["value"])
    assert found == [0.75, 0.75, 0.75, 0.75, 0.0]


def test_classes_without_names_are_taken_in_order(run, tmp_path, put):
    see_colours(tmp_path / "nameless", labels=None)
    for number, label in enumerate(["a", "b", "c", "d", "e", "f"]):
        put(label, ("red", "green", "blue")[number % 3])
    done = run("evaluate", "data", "-m", "local-dir:nameless", "--json", "--workers", "0")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["classes_matched_by"], found["metrics"]["top1"]["value"]) == ("order", 0.5)


def test_corruptions_give_errors_and_mce_and_the_same_ones_again(run, tmp_path, put):
    rng = np.random.default_rng(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=64)
    save_for_hf(model, str(tmp_path / "random"), model_config={"label_names": list(COLOURS)}, safe_serialization=True)
    for label in COLOURS:
        put(label)
        for number in range(4):
            coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
            coarse.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / f"data/{label}/{number}.png")
    five = [0.5, 0.6, 0.7, 0.8, 0.9]
    (tmp_path / "ref.json").write_text(json.dumps({"clean": 0.4, "impulse_noise": 0.5, "contrast": five}))
    order = ("evaluate", "data", "-m", "local-dir:random", "--corruptions", "impulse_noise,contrast")
    first = run(*order, "--reference", "ref.json", "--json", "--metrics", "top1")
    assert first.code == 0, first.err
    again = run(*order, "--reference", "ref.json", "--json", "--metrics", "top1", "--workers", "2", "--batch-size", "7")
    assert again.out == first.out
    found = json.loads(first.out)
    summary, clean = found["corruption_summary"], 1 - found["metrics"]["top1"]["value"]
    ces = []
    for name, theirs in (("impulse_noise", 0.5), ("contrast", 0.7)):
        errors = [1 - found["corruptions"][name][str(severity)]["top1"]["value"] for severity in range(1, 6)]
        assert summary["mean_error"][name] == pytest.approx(sum(errors) / 5, abs=1e-6)
        ces.append((sum(errors) / 5 / theirs, (sum(errors) / 5 - clean) / (theirs - 0.4)))
    assert (summary["mce"], summary["relative_mce"]) == pytest.approx(tuple(np.mean(ces, axis=0)), abs=2e-5)
    shown = run(*order, "--reference", "ref.json", "--metrics", "top1")
    assert f"mCE {100 * summary['mce']:.2f} %" in shown.out


def test_severity_and_metrics_may_be_chosen(run, model, data):
    done = run("evaluate", "data", *MODEL, "--json", "--metrics", "ece", "--corruptions", "fog", "--severities", "2,4")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert list(found["metrics"]) == ["ece"]
    assert list(found["corruptions"]["fog"]) == ["2", "4"]
    assert not math.isnan(found["corruptions"]["fog"]["2"]["ece"]["value"])


MISTAKES = {
    "unknown class": (["data"], "1 of the 1 classes of the data are not among the 6"),
    "no such data": (["nowhere"], "does not exist"),
    "empty folder": (["empty"], "found no labelled pictures in empty"),
    "class without pictures": (["hollow"], "class 'blue' has no pictures"),
    "unknown corruption": (["good", "--corruptions", "fogg"], "did you mean fog?"),
    "severity 6": (["good", "--corruptions", "fog", "--severities", "1-6"], "expected numbers from 1 to 5"),
    "unknown metric": (["good", "--metrics", "top2"], "there is no 'top2'"),
    "reference without corruptions": (["good", "--reference", "ref.json"], "add --corruptions common"),
    "no such reference": (["good", "--corruptions", "fog", "--reference", "no.json"], "cannot be read"),
    "reference in per cent": (["good", "--corruptions", "fog", "--reference", "ref.json"], "88.6 % is 0.886"),
    "reference that lacks one": (["good", "--corruptions", "snow", "--reference", "fog.json"], "no error for snow"),
    "other number of classes": (["good", "--in-order"], "the data have 2 classes"),
}


@pytest.mark.parametrize(("given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(run, tmp_path, model, put, given, message):
    put("purple", "red")
    put("red", "red", data="good")
    put("blue", "blue", data="good")
    put("red", "red", data="hollow")
    put("blue", data="hollow")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ref.json").write_text('{"fog": 81.9}')
    (tmp_path / "fog.json").write_text('{"fog": 0.819}')
    done = run("evaluate", *given, *MODEL)
    assert done.code == 2, done.err
    assert message in done.err
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    assert not done.out


def test_another_evaluation_is_overwritten_only_when_asked(run, tmp_path, model, data):
    assert run("evaluate", "data", *MODEL, "-o", "out").code == 0
    before = (tmp_path / "out/metrics.json").read_bytes()
    done = run("evaluate", "data", *MODEL, "-o", "out", "--metrics", "top1")
    assert done.code == 2
    assert "--overwrite" in done.err
    assert (tmp_path / "out/metrics.json").read_bytes() == before
    assert run("evaluate", "data", *MODEL, "-o", "out", "--metrics", "top1", "--overwrite").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "predictions.csv"]
