"""Models of scanpaths on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vision.scanpath.checkpoint import load, save
from vision.scanpath.model import OAT, OATConfig
from vision.scanpath.scenes import Scenes
from weights import WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {"dim": 64, "position_dim": 48, "depth": 1, "mlp_dim": 64, "extent": (3, 4)}


@pytest.mark.parametrize(
    "changes",
    [{"appearance": "none"}, {"crop_size": (20, 16), "pools": (2, 2)}, {"appearance": "features", "feature_dim": 5}],
)
def test_a_model_comes_back_as_it_was(tmp_path: Path, changes: dict[str, Any]):
    model = OAT(OATConfig(**SIZES, **changes)).eval()
    if model.appearance is not None:
        model.appearance_norm.running_mean.normal_()  # type: ignore[union-attr]
    save(model, tmp_path / "a" / "b")
    again = load(tmp_path / "a" / "b")
    assert again.config == model.config and not again.training
    looks = {"none": None, "cnn": torch.rand(12, 3, 20, 16), "features": torch.rand(12, 5)}[model.config.appearance]
    cells = [[row, column] for row in range(3) for column in range(4)]
    scenes = Scenes.stack([cells], [3], None if looks is None else [looks])
    path = torch.tensor([[0, 5, 3]])
    assert torch.equal(again(scenes, path), model(scenes, path))
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_is_kept_in_the_file(tmp_path: Path):
    model = OAT(OATConfig(**SIZES, appearance="none"))
    save(model, tmp_path)
    whole = (tmp_path / "model.safetensors").stat().st_size
    save(model.half(), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * whole
    assert load(tmp_path).blank.dtype == torch.float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(OAT(OATConfig(**SIZES, appearance="none")), tmp_path)
    return tmp_path


def test_what_is_missing_or_damaged_is_named(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    for content, says in (
        ("{", "config.json does not describe a model of scanpaths: .* is not JSON"),
        (json.dumps(config | {"wings": 2}), "unexpected keyword argument 'wings'"),
        (json.dumps(config | {"num_heads": 5}), "must be even, a multiple of num_heads=5"),
        (json.dumps(config | {"mlp_dim": 32}), "is not of the model that config.json describes"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=says):
            load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="No such file"):
        load(folder)
