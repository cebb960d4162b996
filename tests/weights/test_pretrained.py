from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import timm
import torch
from file_server import FileServer
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import ResNet
from timm.models.resnet import BasicBlock

import weights
import weights.manifest

SAMPLES = Path(__file__).parents[2] / "samples"

# A small network of timm's own plays the part of an architecture whose checkpoints we know.
NAME = "resnet10t.c3_in1k"  # the tag is one that timm knows
ARGS = {"block": BasicBlock, "layers": (1, 1, 1, 1), "stem_width": 32, "stem_type": "deep_tiered"}


@pytest.fixture
def published(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> ResNet:
    """A network whose official file is on the server; it was trained with an argument that is not the default."""
    entry = dataclasses.replace(
        weights.entry("litv2_small"), name=NAME, architecture="resnet10t", model_args={"avg_down": True}
    )
    monkeypatch.setitem(weights.manifest._manifest(), NAME, entry)
    torch.manual_seed(0)
    network = ResNet(**ARGS, avg_down=True)
    buffer = io.BytesIO()
    torch.save({"model": network.state_dict(), "epoch": 299}, buffer)
    server.content = buffer.getvalue()
    return network


def test_pretrained_true_fetches_and_loads(published: ResNet, server: FileServer):
    loaded = weights.build_model(ResNet, "resnet10t", True, **ARGS)
    assert weights.differences(loaded.state_dict(), published.state_dict()) is None
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), published.parameters(), strict=True))
    weights.build_model(ResNet, "resnet10t", True, **ARGS)
    assert len(server.log) == 1, "the second network comes from the store"


def test_a_tag_names_the_checkpoint(published: ResNet, monkeypatch: pytest.MonkeyPatch):
    other = dataclasses.replace(weights.entry(NAME), default=False)
    monkeypatch.setitem(weights.manifest._manifest(), NAME, other)
    loaded = weights.build_model(ResNet, "resnet10t", True, pretrained_cfg="c3_in1k", **ARGS)
    assert torch.equal(loaded.fc.weight, published.fc.weight)


def test_without_pretrained_nothing_is_fetched_but_the_arguments_hold(published: ResNet, server: FileServer):
    network = weights.build_model(ResNet, "resnet10t", False, **ARGS)
    assert set(network.state_dict()) == set(published.state_dict())
    plain = weights.build_model(ResNet, "resnet10t", False, avg_down=False, **ARGS)
    assert set(plain.state_dict()) != set(published.state_dict()), "the caller's argument wins"
    assert server.log == []


def test_the_head_is_adapted_as_timm_does(published: ResNet):
    network = weights.build_model(ResNet, "resnet10t", True, num_classes=7, in_chans=1, **ARGS)
    assert network.fc.weight.shape[0] == 7 and network.conv1[0].weight.shape[1] == 1
    assert torch.equal(network.layer4[0].conv1.weight, published.layer4[0].conv1.weight)


def test_the_filter_of_the_method_sees_the_file(published: ResNet):
    seen: list[str] = []

    def rename(state_dict: dict[str, torch.Tensor], model: ResNet) -> dict[str, torch.Tensor]:
        seen.extend(state_dict)
        return state_dict

    weights.build_model(ResNet, "resnet10t", True, pretrained_filter_fn=rename, **ARGS)
    assert set(seen) == set(published.state_dict())


def test_a_source_of_the_callers_own_is_respected(published: ResNet, server: FileServer, tmp_path):
    mine = {name: tensor + 1 for name, tensor in published.state_dict().items()}
    weights.save_state_dict(mine, tmp_path / "mine.safetensors")
    overlay = {"file": str(tmp_path / "mine.safetensors")}
    network = weights.build_model(ResNet, "resnet10t", True, pretrained_cfg_overlay=overlay, **ARGS)
    assert torch.equal(network.fc.weight, mine["fc.weight"])
    assert server.log == []


def test_a_failing_fetch_fails_the_build(published: ResNet, server: FileServer):
    server.statuses = [404]
    with pytest.raises(weights.WeightsError, match="404"):
        weights.build_model(ResNet, "resnet10t", True, **ARGS)


@pytest.fixture
def fitting(published: ResNet, monkeypatch: pytest.MonkeyPatch) -> weights.Entry:
    """The entry as the registered architecture has it, so that imports are compared with a network."""
    entry = dataclasses.replace(weights.entry(NAME), model_args={})
    monkeypatch.setitem(weights.manifest._manifest(), NAME, entry)
    return entry


def test_an_import_that_fits_is_taken(fitting: weights.Entry, tmp_path):
    good = timm.create_model("resnet10t").state_dict()
    torch.save({"model": good}, tmp_path / "good.pth")
    path = weights.import_file(NAME, tmp_path / "good.pth")
    assert weights.differences(weights.load_state_dict(path), good) is None


def test_an_import_that_does_not_fit_says_where(fitting: weights.Entry, tmp_path, store):
    bad = timm.create_model("resnet10t").state_dict()
    bad["stranger"] = bad.pop("layer1.0.bn1.weight")
    bad["fc.bias"] = torch.zeros(21)
    torch.save({"model": bad}, tmp_path / "bad.pth")
    with pytest.raises(weights.WeightsError, match=r"bad\.pth does not fit resnet10t") as caught:
        weights.import_file(NAME, tmp_path / "bad.pth")
    said = str(caught.value)
    assert "layer1.0.bn1.weight" in said and "stranger" in said and "fc.bias" in said and "21" in said
    assert weights.path_of(NAME) is None
    assert {p.name for p in (store / NAME).iterdir()} <= {".lock"}


def test_an_official_file_arrives_in_a_model_of_ours(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    import vision  # noqa: F401 - registers the architecture

    entry = dataclasses.replace(
        weights.entry("litv2_small"), name="litv2_nano.probe", architecture="litv2_nano", model_args={"alpha": 0.25}
    )
    monkeypatch.setitem(weights.manifest._manifest(), entry.name, entry)
    trained = timm.create_model("litv2_nano", alpha=0.25).eval()
    buffer = io.BytesIO()
    torch.save({"model": trained.state_dict(), "optimizer": {}, "max_accuracy": 82.0, "epoch": 299}, buffer)
    server.content = buffer.getvalue()
    loaded = timm.create_model("litv2_nano", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))
    features = timm.create_model("litv2_nano", pretrained=True, features_only=True, in_chans=1)
    assert len(features(x[:, :1])) == 4


def classify(sample: str) -> list[tuple[str, float]]:
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(weights.state_dict_for("tf_efficientnet_lite0", model))
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        photograph = Image.open(SAMPLES / sample).convert("RGB")
        probs = model(transform(photograph).unsqueeze(0)).softmax(-1)[0]
    names = ImageNetInfo()
    return [(names.index_to_description(int(i)), float(probs[i])) for i in probs.argsort(descending=True)[:3]]


def test_the_packaged_classifier_knows_a_cup_of_espresso():
    (label, prob), *_ = classify("coffee.jpg")
    assert label == "espresso" and prob == pytest.approx(0.951, abs=0.01)


def test_the_packaged_classifier_knows_a_cat():
    assert classify("cat.jpg")[0][0] == "tiger cat"


def test_the_packaged_weights_refuse_another_network():
    with pytest.raises(weights.WeightsError, match=r"tf_efficientnet_lite0\.in1k have \d+ entries, the network has"):
        weights.state_dict_for("tf_efficientnet_lite0", timm.create_model("tf_efficientnet_lite1"))
    wider = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    with pytest.raises(weights.WeightsError, match=r"would become classifier\.weight \(10, 1280\)"):
        weights.state_dict_for("tf_efficientnet_lite0", wider)
