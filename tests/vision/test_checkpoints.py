"""From official files, our store and saved folders into networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from parity import rule
from test_timm_contract import PUBLISHED, create, images, small
from timm.models import get_pretrained_cfg, load_state_dict, save_for_hf
from torch import Tensor, nn

import weights

TAGGED = timm.list_models(module=["biformer", "litv2"], include_tags=True, pretrained=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files as the authors publish them, one per family; BiFormer's names are not ours."""
    folder = tmp_path_factory.mktemp("official")
    found = {}
    for name in ("biformer_tiny", "litv2_small"):
        found[name] = folder / f"{name}.pth"
        training = {"optimizer": {"state": {}}, "lr_scheduler": {"base_lr": 5e-4}, "epoch": 299, "max_accuracy": 82.0}
        torch.save({"model": rule.state_dict(rule.load(name)["state_dict"]), **training}, found[name])
    return found


def assert_is_the_official_network(name: str, model: nn.Module) -> None:
    golden = rule.load(name)
    with torch.inference_mode():
        logits = model.eval()(rule.inputs(**golden["input"]))
    expected = torch.tensor(golden["logits"]["first16"])
    torch.testing.assert_close(logits[0, :16], expected, rtol=1e-3, atol=30 * golden["logits"]["rounding"])


@pytest.mark.parametrize("name", ["biformer_tiny", "litv2_small"])
def test_a_file_of_the_callers_own(name: str, files: dict[str, Path]):
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(files[name])})
    assert_is_the_official_network(name, model)


@pytest.mark.parametrize("name", ["biformer_tiny", "litv2_small"])
def test_pretrained_takes_the_weights_from_the_store(name: str, files: dict[str, Path], store: Path):
    weights.import_file(name, files[name])
    model = timm.create_model(name, pretrained=True)
    assert_is_the_official_network(name, model)
    assert Path(model.pretrained_cfg["file"]).is_relative_to(store)
    features = timm.create_model(f"{name}.in1k", pretrained=True, features_only=True, out_indices=(1, 2)).eval()
    golden = rule.load(name)
    with torch.inference_mode():
        for stage, feature in zip((1, 2), features(rule.inputs(**golden["input"])), strict=True):
            rule.assert_matches(feature, golden["features"][f"stage{stage}"], f"{name}, stage {stage}")


@pytest.mark.parametrize("name", ["biformer_tiny", "litv2_small"])
def test_other_channels_and_classes_are_adapted(name: str, files: dict[str, Path]):
    overlay = {"file": str(files[name])}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5)
    official = rule.state_dict(rule.load(name)["state_dict"])
    first = model.pretrained_cfg["first_conv"]
    summed = official[f"{first}.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.get_submodule(first).weight.detach(), summed)
    assert model.head.weight.shape == (5, model.num_features)
    assert torch.equal(model.norm.weight, official["norm.weight"])
    assert model.eval()(images(1, 1, 64, 64)).shape == (1, 5)
    headless = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    assert isinstance(headless.head, nn.Identity) and torch.equal(headless.norm.weight, official["norm.weight"])


def test_a_file_that_does_not_fit_says_which_entries(files: dict[str, Path]):
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0"):
        timm.create_model("litv2_nano", pretrained=True, pretrained_cfg_overlay={"file": str(files["biformer_tiny"])})


def test_a_network_without_published_weights_says_so():
    for name in ("biformer_nano", "litv2_nano"):
        with pytest.raises(RuntimeError, match="No pretrained weights exist"):
            timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", TAGGED)
def test_configuration_repeats_the_manifest(name: str):
    cfg, entry = get_pretrained_cfg(name), weights.entry(name)
    assert cfg is not None and cfg.has_weights
    assert cfg.url == entry.url and cfg.url.startswith("https://")
    assert cfg.license == entry.license and cfg.license in ("mit", "apache-2.0")
    assert cfg.origin_url == entry.origin_url and cfg.paper_name == entry.paper
    assert entry.paper_url.endswith(cfg.paper_ids.removeprefix("arXiv:"))
    assert any("@inproceedings" in note for note in cfg.notes), "the citation"


def test_every_published_network_is_in_the_manifest_and_the_other_way_round():
    ours = [e for family in ("biformer", "litv2") for e in weights.entries() if e.family == family]
    assert sorted(e.name for e in ours) == sorted(TAGGED)
    assert sorted({e.architecture for e in ours}) == sorted(PUBLISHED)


def test_preprocessing_is_that_of_the_papers():
    for name in PUBLISHED:
        cfg = get_pretrained_cfg(name)
        assert cfg is not None and cfg.interpolation == "bicubic"
        assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
        at_384 = name == "litv2_base_384"
        assert cfg.input_size == ((3, 384, 384) if at_384 else (3, 224, 224))
        assert (cfg.crop_pct, cfg.crop_mode) == ((1.0, "squash") if at_384 else (0.875, "center"))


@pytest.mark.parametrize(("tag", "low_heads"), [("alpha0_0", 0), ("alpha0_5", 6), ("alpha0_9", 10), ("alpha1_0", 12)])
def test_a_tag_of_the_head_split_study_builds_its_split(tag: str, low_heads: int):
    model = timm.create_model(f"litv2_small.{tag}_in1k", device="meta")
    attn = model.layers[2].blocks[0].attn
    assert (attn.l_heads, attn.h_heads) == (low_heads, 12 - low_heads)


def randomised(model: nn.Module) -> nn.Module:
    """So that nothing equals a fresh network's value by chance."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


@small
def test_saved_and_created_again(small: str, tmp_path: Path):
    model = randomised(create(small, num_classes=7, img_size=(64, 96), drop_path_rate=0.1))
    model.set_input_size((96, 64))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(2, 3, 96, 64)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x)), "bit for bit"
    assert again._model_args["img_size"] in ((96, 64), [96, 64])
    fresh = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    assert not torch.equal(fresh.head.weight, again.head.weight)
    narrow = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1)
    assert narrow.head.weight.shape[0] == 3 and torch.equal(narrow.norm.weight, again.norm.weight)


@small
def test_state_dict_round_trip(small: str, tmp_path: Path):
    model = randomised(create(small))
    file = tmp_path / "weights.safetensors"
    weights.save_state_dict(model.state_dict(), file)
    again = create(small).eval()
    again.load_state_dict(load_state_dict(str(file)))
    x = images()
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))


@small
def test_no_tensor_of_a_state_dict_depends_on_the_image_size(small: str):
    def shapes(**kwargs: tuple[int, int]) -> dict[str, torch.Size]:
        state_dict: dict[str, Tensor] = create(small, device="meta", **kwargs).state_dict()
        return {name: tensor.shape for name, tensor in state_dict.items()}

    assert shapes() == shapes(img_size=(64, 320))
