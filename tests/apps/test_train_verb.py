"""`attnsuite train` from pictures to a folder that the other verbs and timm read."""

from __future__ import annotations

import csv
import json
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from drawn import COLOURS, draw_classes
from PIL import Image
from safetensors.torch import load_file

from apps.errors import Stopped, UsageError
from apps.labelled import find
from apps.models import ModelChoice, load, resolve
from apps.train.data import Order, Pictures, parts, transform_for
from apps.train.methods import mixed, mixer_for
from apps.train.settings import Learning
from apps.train.trainer import memory_explained

SHORT = ("--device", "cpu", "--workers", 0)
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    return draw_classes(tmp_path_factory.mktemp("data") / "colours", each=20)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The log."""
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def broken(folder: Path) -> Path:
    """A picture cut short."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1500])
    return folder / "cut.jpg"


def test_it_learns_and_what_it_leaves_can_be_used(run, colours, tmp_path):
    done = run(
        "train", colours, "-m", "resnet10t", "--img-size", 32, "-o", "run", "--epochs", 6, "--lr", 0.003, "--json",
        "--tensorboard", *SHORT,
    )  # fmt: skip
    assert done.code == 0, done.err
    outcome = json.loads(done.out)
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == list("123456")
    best = max(rows, key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    assert outcome["best_epoch"] == int(best["epoch"]) and outcome["best_top1"] == float(best["val_top1"]) >= 0.75
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert list((tmp_path / "run" / "tensorboard").iterdir())

    folder = tmp_path / "run" / "best"
    assert json.loads((folder / "config.json").read_text())["label_names"] == list(COLOURS)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    said = run("classify", colours, "-m", f"local-dir:{folder}", "--json", "--device", "cpu")
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert len(answers) == 60 and {answer["label_1"] for answer in answers} <= set(COLOURS)
    right = np.mean([answer["label_1"] == Path(answer["path"]).parent.name for answer in answers])
    assert right >= 0.75
    with torch.inference_mode():
        scores = model(transform(Image.open(colours / "red" / "00.png"))[None]).softmax(1)[0]
    answer = next(answer for answer in answers if answer["path"].endswith("red/00.png"))
    assert answer["label_1"] == COLOURS[scores.argmax()] and answer["prob_1"] == pytest.approx(
        float(scores.max()), abs=1e-4
    )


def test_published_weights_get_a_new_classifier(run, colours, tmp_path):
    done = run("train", colours, "--pretrained", "--img-size", 64, "-o", "run", "--epochs", 1, *SHORT)
    assert done.code == 0, done.err
    assert (
        "tf_efficientnet_lite0.in1k tells 1,000 classes apart and does not know 3 of these 3, such as 'blue'"
        in done.err
    )
    assert "layer decay 0.75" in done.err
    stem = load_file(tmp_path / "run" / "last" / "model.safetensors")["conv_stem.weight"]
    assert torch.allclose(stem, load(resolve(ModelChoice())).module.conv_stem.weight, atol=3e-3)


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("dcal", {"sa", "glca", "pwca"}),
        ("adl", {"task", "diversification"}),
        ("sparsifiner", {"cls", "cls_distill", "token_distill", "attn_self_distill"}),
    ],
)
def test_methods_train_with_their_own_criterion(run, tmp_path, method, terms):
    data = draw_classes(tmp_path / "few", each=5)
    common = ("train", data, "--img-size", 32, "--epochs", 1, "--batch-size", 6, "--mixup", 0.2, *SHORT)
    dense, extra = "deit_tiny_patch16_224", ()
    if method == "sparsifiner":
        assert run(*common, "-m", dense, "-o", "dense").code == 0
        extra = ("--teacher", "local-dir:dense/best")
    model = {"dcal": dense, "adl": "test_vit", "sparsifiner": f"sparsifiner_{dense}"}[method]
    done = run(*common, "-m", model, "--method", method, *extra, "-o", "run")
    assert done.code == 0, done.err
    row = rows_of(tmp_path / "run")[0]
    assert {name.removeprefix("part_") for name in row if name.startswith("part_")} == terms
    config = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert config["architecture"] == {"dcal": f"dcal_{dense}"}.get(method, model)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert len(state["own"]) == (method == "dcal")
    if method == "dcal":
        assert state["own"][0].abs().min() > 0  # weights between the losses are learned
    said = run("classify", data, "-m", "local-dir:run/last", "--limit", 1, "--json", "--device", "cpu")
    assert said.code == 0, said.err
    assert json.loads(said.out)["label_1"] in COLOURS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "plane"), "--method plane: expected plain, dcal, adl, sparsifiner"),
        (("--opt", "adamm"), "--opt adamm: timm has no such optimiser"),
        (("--sched", "plateau"), "--sched plateau: expected cosine"),
        (("--augment", "heavy"), "--augment heavy: expected none, light, strong"),
        (("--batch-size", 100), "--batch-size 100 is larger than the 48 pictures to learn from; try 6"),
        (("--lr", 0), "--lr 0.0: expected a number above 0"),
        (("-m", "resnet10t", "--method", "adl"), "--method adl needs attention, of which resnet10t has none"),
        (("--method", "dcal"), "--method dcal could not save what it makes of test_vit; choose of dcal_deit_base"),
        (("--method", "sparsifiner"), "predictors, which test_vit has not"),
        (("-m", "sparsifiner_deit_tiny_patch16_224", "--method", "sparsifiner"), "--teacher local-dir:DIR/best"),
        (("-m", "resnet5000"), "no model is called 'resnet5000'"),
        (("--device", "cuda:7"), "choose a GPU by CUDA_VISIBLE_DEVICES"),
        (("--img-size", 50), "--img-size 50 does not suit test_vit"),
    ],
)
def test_what_cannot_be_trained_is_said_and_leaves_nothing(run, colours, tmp_path, options, said):
    done = run("train", colours, "-m", "test_vit", "--img-size", 32, "-o", "run", *SHORT, *options)
    assert done.code == 2, done.err
    assert said in done.err
    assert not (tmp_path / "run" / "state.pt").exists()


def test_pictures_that_cannot_be_read_stop_a_run_unless_left_out(run, tmp_path):
    data = draw_classes(tmp_path / "few", each=5)
    name = broken(data / "red")
    command = ("train", data, "-m", "test_vit", "--img-size", 32, "--epochs", 1, "-o", "run", *SHORT)
    done = run(*command)
    assert done.code == 2
    assert f"unreadable: {name}: damaged image" in done.err and "--skip-unreadable" in done.err
    done = run(*command, "--skip-unreadable")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert record["left_out"].keys() == {str(name)}
    counts = re.search(r"(\d+) pictures to learn from, (\d+) to measure on", done.err)
    assert counts is not None and int(counts[1]) + int(counts[2]) == 15


def test_a_folder_with_something_else_is_not_touched(run, colours, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    done = run("train", colours, "-m", "test_vit", "-o", "run", *SHORT)
    assert done.code == 2 and "holds something else, such as thesis.txt" in done.err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_classes_have_to_agree(tmp_path):
    draw_classes(tmp_path / "data" / "train", each=2)
    draw_classes(tmp_path / "data" / "val", each=1, colours=("red", "purple"))
    with pytest.raises(UsageError, match=r"\(val\) has 1 of 2 classes that .*\(train\) does not know: 'purple'"):
        parts(str(tmp_path / "data"), 0.2, 0, print)


def test_a_share_of_each_class_is_held_out(tmp_path):
    data = draw_classes(tmp_path / "few", each=10)
    found = parts(str(data), 0.2, 0, print)
    assert found.train.counts() == [8, 8, 8] and found.val.counts() == [2, 2, 2]
    assert not set(found.train.sources) & set(found.val.sources)
    (tmp_path / "val.csv").write_text(found.val_list() or "")
    assert find(str(tmp_path / "val.csv")).sources == found.val.sources
    assert parts(str(data), 0.2, 0, print) == found != parts(str(data), 0.2, 1, print)
    draw_classes(tmp_path / "few", each=1, colours=("purple",))
    with pytest.raises(UsageError, match="classes with one picture: purple"):
        parts(str(data), 0.2, 0, print)


@pytest.mark.parametrize("processes", [1, 3])
def test_every_picture_comes_once_an_epoch_whatever_the_processes(processes):
    alone = Order(23, 4, 0, 1, seed=5)
    shares = [Order(23, 4, process, processes, seed=5) for process in range(processes)]
    seen = []
    for epoch in (0, 1):
        for order in (alone, *shares):
            order.epoch, order.first = epoch, 0
        steps = [list(chain(*batches)) for batches in zip(*shares, strict=True)]
        assert [len(step) for step in steps] == [alone.step_size(step) for step in range(4)] == [6, 6, 6, 5]
        assert steps == list(alone)
        seen.append([index for step in steps for _, index in step])
        alone.first = 2
        assert list(alone) == steps[2:]  # what an epoch that is gone on with sees
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(23)) and seen[0] != seen[1]


def test_how_a_picture_is_varied_depends_on_seed_epoch_and_place_alone(colours):
    data = find(str(colours))
    pictures = [Pictures(data, transform_for(CONFIG, "strong", True), 3, seed) for seed in (0, 0, 1)]
    torch.rand(7)
    first = [picture[2, 5] for picture in pictures]
    assert torch.equal(first[0][0], first[1][0]) and first[0][1] == data.targets[5]
    assert not torch.equal(first[0][0], first[2][0])
    assert not torch.equal(pictures[0][3, 5][0], first[0][0])
    plain = Pictures(data, transform_for({**CONFIG, "crop_pct": 1.0}, "none", True), 3, 0)
    assert torch.equal(plain[0, 5][0], plain[1, 5][0])


def test_mixup_keeps_the_sum_of_targets_and_odd_batches():
    mixer = mixer_for(Learning(mixup=0.5, cutmix=0.5, smoothing=0.1), 3)
    images, targets = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    np.random.seed(0)  # noqa: NPY002 - it is what timm draws from
    out, soft = mixed(mixer, images, targets)
    assert out.shape == images.shape and torch.equal(out[4], images[4]) and not torch.equal(out[:4], images[:4])
    torch.testing.assert_close(soft.sum(1), torch.ones(5))
    torch.testing.assert_close(soft[4], torch.tensor([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3]))


def test_too_little_memory_suggests_a_size():
    with pytest.raises(Stopped, match="memory does not suffice for 64 pictures a step of x; try --batch-size 32"):
        with memory_explained(64, "x"):
            torch.empty(1 << 55)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with memory_explained(64, "x"):
            torch.ones(2, 3) @ torch.ones(2, 3)


def test_defaults_suit_the_data():
    small, large = (Learning().recipe(count, trained=True) for count in (30, 50_000))
    assert (small.batch_size, small.steps, large.batch_size, large.steps) == (16, 2, 64, 782)
    assert Learning().recipe(9, trained=True).batch_size == 9 and Learning().recipe(400, trained=True).batch_size == 32
    assert not Learning(epochs=1).recipe(30, trained=False).ema and large.ema
    assert large.lr == pytest.approx(1e-3) and small.lr == pytest.approx(5e-4) and large.layer_decay == 0.75
    assert Learning().recipe(50_000, trained=False).layer_decay == 1
