"""The parts of `attnsuite evaluate` one by one: classes, measures, corruptions, the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from support import ROOT, SAMPLES
from torch import nn

from apps.errors import UsageError
from apps.evaluate.classes import match
from apps.evaluate.corruptions import CORRUPTIONS, corrupt, read_corruptions, read_severities
from apps.evaluate.draw import draw_confusion
from apps.evaluate.measure import Measures, class_scores, read_metrics, wilson
from apps.evaluate.reference import Reference, corruption_errors, read_reference
from apps.models import Network


def network(labels: list[str], ids: list[str] | None = None) -> Network:
    module = nn.Identity()
    module.pretrained_cfg = {"label_names": ids} if ids else {}  # pyright: ignore - timm keeps it there
    return Network(module, "net", labels, {})


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (["tench, Tinca tinca", "crane"], (0, 2)),
        (["n01440764", "n02012849"], (0, 2)),
        (["Tinca_Tinca", "great-white shark"], (0, 1)),
        (["1", "0"], (1, 0)),
    ],
    ids=["labels", "ids", "one of several words", "numbers"],
)
def test_classes_are_found_by_any_of_their_names(names, targets):
    net = network(
        ["tench, Tinca tinca", "great white shark, white shark", "crane"], ["n01440764", "n01484850", "n02012849"]
    )
    assert match(names, net).targets == targets


def test_labels_that_are_numbers_are_names():
    assert match(["7", "0"], network(["7", "3", "0"])).targets == (0, 2)


def test_a_name_of_two_classes_is_refused_with_both():
    net = network(["crane", "heron", "crane"], ["n02012849", "n0", "n03126707"])
    with pytest.raises(UsageError, match=r"call it one of n02012849 \(crane\), n03126707 \(crane\)"):
        match(["crane"], net)
    assert match(["n03126707"], net).targets == (2,)


def test_two_names_of_one_class_are_refused():
    with pytest.raises(UsageError, match="put their pictures together"):
        match(["cat", "tabby"], network(["cat, tabby", "dog"]))


def test_unknown_names_are_listed_with_the_nearest():
    with pytest.raises(UsageError, match=r"2 of the 3 .*'catt' \(near: 'cat'\), 'xyzzy'; rename them$"):
        match(["catt", "dog", "xyzzy"], network(["cat", "dog"]))
    with pytest.raises(UsageError, match=r"--in-order$"):
        match(["catt", "hund"], network(["cat", "dog"]))
    assert match(["catt", "hund"], network(["cat", "dog"]), in_order=True).targets == (0, 1)


def test_a_network_without_classes_or_names_is_refused():
    with pytest.raises(UsageError, match="no classifier"):
        match(["a"], network([]))
    with pytest.raises(UsageError, match="3 classes without names, and the data have 2"):
        match(["a", "b"], network(["class_0", "class_1", "class_2"]))


@pytest.mark.parametrize(("right", "n"), [(0, 1), (6, 10), (10, 10), (731, 1000)])
def test_interval_is_that_of_scipy(right, n):
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_measures_are_those_computed_by_hand():
    measures = Measures(3, ("top1", "ece", "confusion"))
    measures.update(torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1]]), torch.tensor([0, 1]))
    measures.update(torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.6, 0.3]]), torch.tensor([1, 1]))
    scores = measures.scores()
    assert scores["top1"].value == 0.75
    assert scores["top1"].n == 4
    # bins of a fifteenth: 0.9 alone (right), 0.8 alone (wrong), 0.6 twice (right both times)
    assert scores["ece"].value == pytest.approx((0.1 + 0.8 + 2 * 0.4) / 4, abs=1e-6)
    assert measures.confusion is not None
    assert measures.confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    found, none = class_scores(measures.confusion, [1, 2])
    assert (found.accuracy.value, found.accuracy.n, found.taken_for, found.taken) == (pytest.approx(2 / 3), 3, 0, 1)
    assert none.accuracy.n == 0
    assert none.taken_for is None


def test_top5_counts_the_five_likeliest():
    measures = Measures(8, ("top5",))
    odds = torch.arange(8.0).softmax(0).expand(8, 8)
    measures.update(odds, torch.arange(8))
    assert measures.scores()["top5"].value == 5 / 8


def test_metrics_that_say_nothing_are_left_out_aloud():
    assert read_metrics(None, 1000) == (("top1", "top5", "ece", "confusion"), "")
    assert read_metrics(None, 4) == (("top1", "ece", "confusion"), "without top5: with 4 classes it is always 1")
    assert "confusion" not in read_metrics(None, 20_000)[0]
    with pytest.raises(UsageError, match="always 1"):
        read_metrics("top1,top5", 4)


def photo(size: int = 64) -> np.ndarray:
    with Image.open(SAMPLES / "coffee.jpg") as picture:
        return np.asarray(picture.convert("RGB").resize((size, size))).transpose(2, 0, 1)


def distance(name: str, severity: int, clean: np.ndarray) -> float:
    made = corrupt(clean, name, severity)
    assert made.shape == clean.shape
    assert made.dtype == np.uint8
    return float(((made.astype(float) - clean) ** 2).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_repeat_and_get_worse(name):
    clean = photo()
    before: Any = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(corrupt(clean, name, 3), corrupt(clean.copy(), name, 3))
    after: Any = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(after[1], before[1])
    assert after[2:] == before[2:]
    assert distance(name, 5, clean) > 0
    if name != "saturate":  # takes colour away at 1 and 2 and adds it from 3 on
        assert distance(name, 5, clean) > distance(name, 1, clean)


def test_chance_differs_from_picture_to_picture():
    clean = photo()
    other = clean.copy()
    other[0, 0, 0] ^= 1
    noise = corrupt(clean, "gaussian_noise", 1).astype(int) - corrupt(other, "gaussian_noise", 1)
    assert (noise != 0).mean() > 0.5


@pytest.mark.parametrize("name", ["gaussian_noise", "fog", "jpeg_compression"])
def test_grey_pictures_stay_grey(name):
    assert corrupt(photo()[:1], name, 2).shape == (1, 64, 64)


def test_corruptions_are_told_by_name_and_by_set():
    assert read_corruptions(None) == ()
    assert len(read_corruptions("common")) == 15
    assert read_corruptions("all") == CORRUPTIONS
    assert read_corruptions("noise, fog") == ("gaussian_noise", "shot_noise", "impulse_noise", "fog")
    with pytest.raises(UsageError, match="did you mean weather"):
        read_corruptions("wether")


@pytest.mark.parametrize(("text", "severities"), [("1-5", (1, 2, 3, 4, 5)), ("3", (3,)), ("5,1-2", (1, 2, 5))])
def test_severities(text, severities):
    assert read_severities(text) == severities


@pytest.mark.parametrize("text", ["0", "6", "3-1", "", "a", "1.5"])
def test_severities_that_are_none(text):
    with pytest.raises(UsageError, match="--severities"):
        read_severities(text)


def test_reference_files_are_checked(tmp_path):
    def reading(content: object, severities: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Reference:
        (tmp_path / "ref.json").write_text(json.dumps(content))
        return read_reference(str(tmp_path / "ref.json"), ["fog"], severities)

    assert reading({"clean": 0.4, "fog": 0.8}) == Reference({"fog": 0.8}, 0.4)
    assert reading({"fog": [0.1, 0.2, 0.3, 0.4, 0.5]}, (1, 5)).over("fog", (1, 5)) == pytest.approx(0.3)
    for content, message in (
        ([0.8], "expected an object"),
        ({"fog": 0.8, "mist": 0.1}, "'mist' is no corruption"),
        ({"fog": [0.8]}, "or five of"),
        ({"fog": True}, "expected an error from 0 to 1"),
        ({"fog": 0.8, "clean": [0.1] * 5}, "must be one number"),
    ):
        with pytest.raises(UsageError, match=message):
            reading(content)
    with pytest.raises(UsageError, match="mean over severities 1 to 5"):
        reading({"fog": 0.8}, (1, 2))
    with pytest.raises(UsageError, match="no error for fog"):
        reading({"snow": 0.8})


def test_another_evaluation_may_be_the_reference(tmp_path):
    top1 = {str(severity): {"top1": {"value": 0.9 - severity / 10}} for severity in (1, 3)}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"metrics": {"top1": {"value": 0.75}}, "corruptions": {"fog": top1}}))
    reference = read_reference(str(path), ["fog"], (1, 3))
    assert reference.clean == 0.25
    assert reference.over("fog", (1, 3)) == pytest.approx(0.3)
    with pytest.raises(UsageError, match="no error at severity 2"):
        read_reference(str(path), ["fog"], (1, 2))
    path.write_text(json.dumps({"metrics": {"ece": {"value": 0.1}}}))
    with pytest.raises(UsageError, match="no top-1 accuracies"):
        read_reference(str(path), [], ())


def test_corruption_error_is_one_for_the_reference_itself():
    errors = {"fog": {s: 0.1 * s + 0.3 for s in range(1, 6)}}
    same = Reference(errors, 0.2)
    assert corruption_errors(errors, 0.2, same) == {"fog": {"ce": pytest.approx(1), "relative_ce": pytest.approx(1)}}
    assert corruption_errors(errors, 0.2, Reference({"fog": 0.0}))["fog"] == {"ce": None, "relative_ce": None}


@pytest.mark.parametrize("classes", [2, 20, 60, 1000])
def test_the_picture_fits_a_screen_and_shows_each_cell(classes):
    counts = np.zeros((classes, classes + 1), int)
    counts[np.arange(classes), np.arange(classes)] = 9
    counts[0, -1] = 3
    picture = np.asarray(draw_confusion(counts, [f"class {index}" for index in range(classes)], "net"))
    assert picture.shape[0] < 1300
    yellow = (picture == (253, 231, 37)).all(axis=2)  # the upper end of viridis: every other row is all right
    assert yellow.any(axis=1).sum() >= (classes - 1) * max(1, 900 // classes - 20)


def test_the_picture_needs_a_row_for_each_name():
    with pytest.raises(ValueError, match="expected"):
        draw_confusion(np.zeros((2, 2), int), ["a", "b"], "net")


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom apps.cli import app\nsys.argv = ['attnsuite', 'evaluate', '--help']\n"
        "try:\n    app()\nfinally:\n    assert not {'torch', 'timm', 'torchmetrics'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--corruptions" in done.stdout
