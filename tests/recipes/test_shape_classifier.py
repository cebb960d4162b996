"""The classifier that ships: it is what its recipe makes, it tells what its card says, and commands know it by name."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import nn

import weights
from apps.catalog import catalog
from apps.errors import UsageError
from apps.models import ModelChoice
from benchmarks.claims.paired import rate_interval
from recipes import shape_classifier as recipe
from recipes.named_shapes import NAMES, pictures, sample
from recipes.scenes import draw, masks
from recipes.textured import texture
from vision.biformer import BiFormer, BiLevelRoutingAttention
from vision.explain import attended, heatmap

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    return timm.create_model(f"local-dir:{weights.shipped(recipe.NAME)}", pretrained=True).eval()


def test_what_ships_is_small_and_what_the_recipe_makes(shipped: nn.Module):
    files = {path.name: path.stat().st_size for path in weights.shipped(recipe.NAME).iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "README.md"} and sum(files.values()) < 5e6
    built = recipe.build()
    assert isinstance(shipped, BiFormer) and isinstance(built, BiFormer)
    assert {n: t.shape for n, t in shipped.state_dict().items()} == {n: t.shape for n, t in built.state_dict().items()}
    routed = [own for own in shipped.modules() if isinstance(own, BiLevelRoutingAttention)]
    assert [own.topk for own in routed] == [1, 4, 16, 16] and {own.n_win for own in routed} == {4}


def test_the_card_says_what_is_measured(shipped: nn.Module):
    text = (weights.shipped(recipe.NAME) / "README.md").read_text(encoding="utf-8")
    said = re.search(r"\| colour and shape \| ([\d.]+)% \(95 % interval ([\d.]+)% to ([\d.]+)%\) \|", text)
    assert said is not None
    share, low, high = (float(figure) / 100 for figure in said.groups())
    expected = rate_interval(round(share * recipe.MEASURED), recipe.MEASURED)
    assert (low, high) == pytest.approx(expected, abs=2e-3) and share > 0.95
    found = recipe.measure(shipped, 360, seed=30_000)  # pictures that were not in the card's measurement
    spread = (share * (1 - share) / 360) ** 0.5
    assert abs(found["class"] - share) < 4 * spread + 0.005
    assert found["class"] <= min(found["colour"], found["shape"])
    again = recipe.card(shipped, recipe.STEPS, 3.0, num=72)
    assert [line.split("|")[1:2] for line in again.splitlines()[25:]] == [
        line.split("|")[1:2] for line in text.splitlines()[25:]
    ]


def test_training_is_repeatable_and_learns():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = recipe.build()
        recipe.train(model, steps=2)
        assert not model.training
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_is_saved_is_what_is_loaded(tmp_path, shipped: nn.Module):
    recipe.save(shipped, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = recipe.prepared(pictures(0, 36, recipe.SIZE)[0][:4])
    assert torch.equal(loaded(image), shipped(image))
    ours, theirs = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, weights.shipped(recipe.NAME))
    )
    for key in ("architecture", "num_classes", "label_names", "model_args"):
        assert ours[key] == theirs[key], key


def test_commands_know_it_by_its_name():
    network = ModelChoice(recipe.NAME).resolve().load(lambda got, total: None)
    assert list(network.labels) == list(NAMES) and network.label == f"{recipe.ARCHITECTURE} ({recipe.NAME})"
    images, labels = pictures(40_000, 36, recipe.SIZE)
    config = network.data_config
    assert config["input_size"] == (3, 64, 64) and {*config["mean"], *config["std"]} == {0.5}
    prepare = create_transform(**config, is_training=False)
    seen = torch.stack([prepare(Image.fromarray(own.transpose(1, 2, 0))) for own in images])  # type: ignore[operator]
    torch.testing.assert_close(seen, recipe.prepared(images), atol=1e-5, rtol=0)
    with torch.inference_mode():
        told = network.module(seen).argmax(1).numpy()
    assert (told == labels).mean() > 0.9
    with pytest.raises(UsageError, match=f"did you mean {recipe.NAME}"):
        ModelChoice("shapes_biformr").resolve()


def test_the_list_of_models_marks_it():
    (facts,) = catalog(recipe.NAME, everything=False)
    assert (facts.name, facts.family, facts.source, facts.here) == (
        recipe.NAME, "biformer", "ships with attnsuite", True
    )  # fmt: skip
    assert facts.params == pytest.approx(1.47, abs=0.01) and facts.gmacs is not None and facts.gmacs < 0.1


def test_it_looks_at_the_object(shipped: nn.Module):
    rng = np.random.default_rng(5)
    inside, share = [], []
    image = torch.zeros(0)
    for _ in range(12):
        scene = sample(rng, None, (0.4, 0.5))
        image = recipe.prepared(draw(scene, 64, texture(rng, 64)).transpose(2, 0, 1)[None])
        seen, mask = heatmap(shipped, image)[0].numpy(), masks(scene, 64)[0] > 0.5
        inside.append(seen[mask].mean() / seen.mean())
        share.append(mask.mean())
    assert np.mean(inside) > 1.3 and max(share) < 0.3
    routed = attended(shipped, image, (0.1, 0.1), 0, connectivity=True)
    assert routed.shape == (1, 64, 64) and float((routed > 0).float().mean()) == 1 / 16, "one region of 16"
