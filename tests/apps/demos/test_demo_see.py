"""The page See: what it shows is what the verbs compute; what it cannot do it says in words."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import timm
import torch
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from support import SAMPLES
from timm.models import save_for_hf

from apps.demos import seeing
from apps.demos.alive import Alive
from apps.demos.host import Host, Settings, said
from apps.demos.uploads import read_upload
from apps.errors import UsageError
from vision.explain import attended, heatmap

DEFAULTS: dict[str, Any] = {
    "image": None, "sample": "cat", "model": "shapes_biformer", "other": "", "method": "auto", "target": "",
    "untrained": False, "opacity": 0.6, "api_name": "/see",
}  # fmt: skip
PLACE: dict[str, Any] = {
    "image": None, "sample": "cat", "model": "shapes_biformer", "x": 50, "y": 50, "layer": "", "connectivity": False,
    "untrained": False, "opacity": 0.6, "api_name": "/attend",
}  # fmt: skip


def silent(*args: Any, **options: Any) -> None:
    assert args or options


def test_what_it_says_is_what_the_verb_says(run, tmp_path):
    done = run("classify", SAMPLES / "cat.jpg", SAMPLES / "coffee.jpg", "-o", "rows.csv")
    assert done.code == 0, done.err
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text("utf-8").splitlines()))
    host = Host()
    for row in rows:
        picture = read_upload(row["path"], host.settings)
        with seeing.borrowed(host, "tf_efficientnet_lite0", False, silent) as stage:  # pyright: ignore
            seen = seeing.look(stage, picture, "", "auto")
        assert [*seen.classes] == [row[f"label_{rank}"] for rank in range(1, 6)]
        assert [*seen.classes.values()] == pytest.approx([float(row[f"prob_{rank}"]) for rank in range(1, 6)], abs=1e-5)
        assert seen.target == row["label_1"] and seen.label == row["model"]
    assert len(host.pool.names) == 1


def test_maps_are_those_of_the_library():
    host, picture = Host(), Image.open(SAMPLES / "cat.jpg").convert("RGB")
    with seeing.borrowed(host, "shapes_biformer", False, silent) as stage:  # pyright: ignore
        images = stage.normalise(np.asarray(stage.decoder.transform(picture))[None])
        seen = seeing.look(stage, picture, "red circle", "attention")
        target = list(stage.network.labels).index("red circle")
        expected = heatmap(stage.module, images, target, "attention")[0].numpy()
        assert np.abs(seen.heat - expected).max() < 1e-3
        view, heat = seeing.attend(stage, picture, 50, 50, "stages.1.0.attn", False)
        left, top, right, bottom = view.box
        height, width = view.picture.shape[:2]
        at = ((height / 2 - top) / (bottom - top), (width / 2 - left) / (right - left))
        assert np.abs(heat - attended(stage.module, images, at, "stages.1.0.attn")[0].numpy()).max() < 1e-3
        regions = seeing.connected(stage, picture, 50, 50)
    assert [name.split(".")[1] for name, _, _ in regions] == ["0", "1", "2", "3"]
    shares = [float((one > 0).mean()) for _, _, one in regions]
    assert shares[0] < shares[1] < shares[2], "fewer regions the finer the map"


def test_activations_are_counted_while_they_live():
    def count(module: torch.nn.Module) -> int:
        images = torch.ones(1000)
        with torch.inference_mode(), Alive() as alive:
            module(images)
        return alive.most

    one = torch.nn.ReLU()
    assert count(one) == 4000
    assert count(torch.nn.Sequential(one, one, one)) == 8000, "what went in and what comes out, not what went before"
    assert count(torch.nn.ReLU(inplace=True)) == 0


@pytest.fixture
def client(connect: Any) -> Any:
    return partial(connect, "see")


def test_over_the_wire(client):
    see = client(max_models=1)
    *_, files, facts = _see(see.predict(**{**DEFAULTS, "other": "tf_efficientnet_lite0"}))
    models = facts["models"]
    assert [m["model"] for m in models] == ["biformer_nano (shapes_biformer)", "tf_efficientnet_lite0.in1k"]
    assert "cat" in models[1]["label_1"] and models[1]["params"] == 4.65
    assert all(m["milliseconds"] > 0 and m["weights_mb"] > 1 and m["activations_mb"] > 0 for m in models)
    with Image.open(files[0]) as first, Image.open(files[1]) as second:
        assert first.size == second.size and first.tobytes() != second.tobytes()
    rows = list(csv.DictReader(Path(files[2]).read_text("utf-8").splitlines()))
    assert [row["model"] for row in rows] == [m["model"] for m in models]
    *_, facts = see.predict(**PLACE)
    label = "biformer_nano (shapes_biformer)"
    assert facts == {"model": label, "x": 50, "y": 50, "layer": "last", "share": 1.0, "stages": 4}
    *_, facts = see.predict(**{**PLACE, "layer": "stages.0.0.attn", "connectivity": True})
    assert 0 < facts["share"] < 0.2


def _see(result: tuple[Any, ...]) -> tuple[Any, ...]:
    slider, first, second, costs, *files, facts = result
    return slider, first, second, costs, files, facts


def test_mistakes_are_said_in_words(client, broken):
    see = client()
    for path, words in broken:
        with pytest.raises(AppError, match=f"(?i){words}"):
            see.predict(**{**DEFAULTS, "sample": "", "image": handle_file(path)})
    for change, words in (
        ({"sample": ""}, "no picture yet"),
        ({"model": ""}, "no model is chosen"),
        ({"model": "litv2_smal"}, "did you mean litv2_small"),
        ({"model": "local-dir:/etc"}, "without --allow-local"),
        ({"model": "hf-hub:somebody/something"}, "expected the name of a registered model"),
        ({"model": "../../etc/passwd"}, "expected the name of a registered model"),
        ({"target": "purple fish"}, "is no class of"),
        ({"method": "rollout"}, "cannot be shown so"),
    ):
        with pytest.raises(AppError, match=f"(?i){words}"):
            see.predict(**{**DEFAULTS, **change})
    for change, words in (
        ({"x": 101}, "greater than maximum"),
        ({"x": 1}, "only the middle of the picture"),
        ({"layer": "stages.9"}, "layers of attention"),
        ({"model": "tf_efficientnet_lite0"}, "no attention that can be recorded"),
    ):
        with pytest.raises(AppError, match=f"(?i){words}"):
            see.predict(**{**PLACE, **change})
    assert see.predict(**DEFAULTS)[-1]["models"][0]["label_1"], "and the server goes on"


def test_weights_that_cannot_be_had_are_named(client, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("ATTNSUITE_MIRROR", "http://127.0.0.1:9")
    see = client()
    for name in ("litv2_small", "litv2_nano", "resnet18"):  # ours, of which there are none at all, timm's
        with pytest.raises(AppError, match=f"{name}.*hoose one that is here, such as .* or tick") as caught:
            see.predict(**{**DEFAULTS, "model": name})
        assert "--" not in str(caught.value), "a page has no options of the command line"


def test_a_class_that_is_none_is_said_without_options():
    host, picture = Host(), Image.open(SAMPLES / "cat.jpg").convert("RGB")
    with seeing.borrowed(host, "tf_efficientnet_lite0", False, silent) as stage:  # pyright: ignore
        for target, words in (("wolfram", "^'wolfram' is no class"), ("1000", "^1000: "), ("cat", "fits 16 classes")):
            with pytest.raises(UsageError, match=words):
                seeing.look(stage, picture, target, "auto")


def test_untrained_weights_are_called_so_and_taken_where_there_are_no_others(client):
    question = {**DEFAULTS, "model": "litv2_nano", "other": "shapes_biformer", "untrained": True}
    *_, facts = client().predict(**question)
    labels = [model["model"] for model in facts["models"]]
    assert labels == ["litv2_nano (random weights)", "biformer_nano (shapes_biformer)"]
    assert seeing.check(Host(), "tf_efficientnet_lite0", True).origin == "manifest"
    with pytest.raises(UsageError, match="did you mean litv2_small"):
        seeing.check(Host(), "litv2_smal", True)


def test_out_of_memory_is_said_and_over_with(client, monkeypatch):
    see = client()

    def greedy(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(seeing, "look", greedy)
        with pytest.raises(AppError, match="not enough memory on this server"):
            see.predict(**DEFAULTS)
    assert see.predict(**DEFAULTS)[-1]["models"]


def test_a_folder_of_a_training_run_is_shown_where_allowed(client, tmp_path):
    network = timm.create_model("biformer_nano", num_classes=2)
    save_for_hf(network, str(tmp_path / "best"), {"label_names": ["cat", "dog"]}, safe_serialization=True)
    name = f"local-dir:{tmp_path / 'best'}"
    *_, facts = client(allow_local=True).predict(**{**DEFAULTS, "model": name})
    assert facts["models"][0]["model"] == "biformer_nano (best)" and len(facts["models"][0]["classes"]) == 2
    assert Host(Settings(model=name)).check_model(name) == name, "the owner's own model needs no leave"


def test_a_wrong_model_of_the_owners_ends_the_command(run):
    done = run("demo", "see", "--model", "litv2_smal")
    assert done.code == 2 and "did you mean litv2_small" in done.err


def test_defects_are_called_so_and_logged(capsys):
    with pytest.raises(gr.Error, match="a defect of the demo"), said():
        raise KeyError("<b>secret</b>")
    assert "KeyError" in capsys.readouterr().err
    with pytest.raises(gr.Error) as caught, said():
        raise UsageError("<script>alert(1)</script>")
    assert "<" not in caught.value.message


def test_settings_have_a_pool_of_their_size():
    host = Host(Settings(max_models=1))
    for name in ("shapes_biformer", "tf_efficientnet_lite0", "shapes_biformer"):
        with seeing.borrowed(host, name, False, silent):  # pyright: ignore
            assert len(host.pool.names) == 1


def test_vision_transformers_are_rolled_out_and_show_their_places():
    host, picture = Host(), Image.open(SAMPLES / "cat.jpg").convert("RGB")
    with seeing.borrowed(host, "deit_tiny_patch16_224", True, silent) as stage:  # pyright: ignore
        images = stage.normalise(np.asarray(stage.decoder.transform(picture))[None])
        seen = seeing.look(stage, picture, "", "rollout")
        assert np.abs(seen.heat - heatmap(stage.module, images, None, "rollout")[0].numpy()).max() < 1e-3
        assert len(seen.layers) == 12 and seeing.connected(stage, picture, 50, 50) == []
        _, heat = seeing.attend(stage, picture, 50, 50, "3", False)
        assert heat.shape == (224, 224) and heat.max() == 1


def test_kept_keys_of_sparsifiner():
    host, picture = Host(), Image.open(SAMPLES / "cat.jpg").convert("RGB")
    with seeing.borrowed(host, "sparsifiner_deit_tiny_patch16_224", True, silent) as stage:  # pyright: ignore
        images = stage.normalise(np.asarray(stage.decoder.transform(picture))[None])
        view, heat = seeing.attend(stage, picture, 50, 50, "blocks.3.attn", True)
        left, top, right, bottom = view.box
        height, width = view.picture.shape[:2]
        at = ((height / 2 - top) / (bottom - top), (width / 2 - left) / (right - left))
        assert np.abs(heat - attended(stage.module, images, at, "blocks.3.attn", True)[0].numpy()).max() < 1e-3
    assert 0.1 < float((heat > 0).mean()) < 0.9, "some keys are kept, others are not"
