"""AKI's weights and configuration, from wherever they are: all of them or an error that names what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_aki as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import weights
from multimodal.aki import AkiConfig, AkiForConditionalGeneration, load_aki

HUB_ID = "Sony/AKI-4B-phi-3.5-mini"

PUBLISHED = {
    "vision_encoder_path": "google/siglip-so400m-patch14-384",
    "lang_model_path": "microsoft/Phi-3.5-mini-instruct",
    "initial_tokenizer_len": 32012,
    "pad_token_id": 32011,
    "num_vision_tokens": 144,
    "decoder_layers_attr_name": "model.layers",
    "base_img_size": None,
    "n_px": 384,
    "norm_mean": 0.5,
    "norm_std": 0.5,
}
"""The published `config.json`."""


def check_same(found: Any, dtype: torch.dtype = torch.float32) -> None:
    """Every weight is that of the tiny model, and so are the logits."""
    expected = tiny.model()
    assert isinstance(found, AkiForConditionalGeneration) and not found.training
    state = found.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor.to(dtype)), name
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(found(**tiny.batch()).logits, expected(**tiny.batch()).logits)


def test_the_published_configuration_is_the_default(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    read, default = AkiConfig.from_pretrained(tmp_path), AkiConfig()
    assert {**read.to_dict(), "_name_or_path": ""} == {**default.to_dict(), "_name_or_path": ""}
    text, vision = default.text_config, default.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (3072, 32, 32)  # type: ignore[union-attr]
    assert text.rope_parameters["rope_type"] == "longrope"  # type: ignore[union-attr]
    half = text.hidden_size // text.num_attention_heads // 2  # type: ignore[union-attr]
    assert all(len(text.rope_parameters[f"{kind}_factor"]) == half for kind in ("short", "long"))  # type: ignore[union-attr]
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (1152, 27, 384)  # type: ignore[union-attr]


def test_a_model_that_was_saved_comes_back(tmp_path: Path):
    tiny.model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "aki"
    assert isinstance(AutoConfig.from_pretrained(tmp_path), AkiConfig)
    check_same(AkiForConditionalGeneration.from_pretrained(tmp_path))
    check_same(AutoModelForImageTextToText.from_pretrained(tmp_path))
    check_same(load_aki(tmp_path))
    check_same(load_aki(str(tmp_path), dtype=torch.bfloat16), torch.bfloat16)


def test_a_folder_as_the_authors_publish_it_is_loaded(tmp_path: Path):
    tiny.write_published(tmp_path / "aki", tmp_path / "parts")
    made = load_aki(tmp_path / "aki")
    check_same(made)
    made.save_pretrained(tmp_path / "ours")  # and what is written then needs no parts
    check_same(load_aki(tmp_path / "ours"))


def test_a_hub_id_is_looked_up_in_the_hub(tmp_path: Path):
    repository = tmp_path / "hub" / ("models--" + HUB_ID.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    tiny.write_published(repository / "snapshots" / ("0" * 40), tmp_path / "parts")
    check_same(load_aki(HUB_ID, cache_dir=tmp_path / "hub", local_files_only=True))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_is_loaded(tmp_path: Path, zipped: bool):
    state = {f"module.{name}": tensor for name, tensor in tiny.model().state_dict().items()}
    content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"param_groups": [{"lr": 1e-5}]}}
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    check_same(load_aki(tmp_path / "weights.pt", config=tiny.config()))
    check_same(load_aki(tmp_path / "weights.pt", config=tiny.config(), dtype=torch.bfloat16), torch.bfloat16)


def test_a_safetensors_file_alone_is_loaded(tmp_path: Path):
    save_file(tiny.model().state_dict(), tmp_path / "model.safetensors")
    check_same(load_aki(tmp_path / "model.safetensors", config=tiny.config()))


def test_the_name_of_the_manifest_is_fetched_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mirror").mkdir()
    save_file(tiny.model().state_dict(), tmp_path / "mirror" / "aki_4b.phi3_5_mini.pth")
    monkeypatch.setenv("ATTNSUITE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("ATTNSUITE_MIRROR", (tmp_path / "mirror").as_uri())
    check_same(load_aki("aki_4b", config=tiny.config()))
    (tmp_path / "mirror" / "aki_4b.phi3_5_mini.pth").unlink()
    check_same(load_aki("aki_4b.phi3_5_mini", config=tiny.config()))
    assert weights.verify("aki_4b") == "ok (not pinned)"


def spoilt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    del state["lang_model.lm_head.bias"]
    state["lang_model.lm_head.extra"] = torch.ones(2)
    state["vision_tokenizer.latents"] = torch.ones(7, 24)
    return state


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_missing_unknown_or_of_another_shape_is_named_at_once(tmp_path: Path, kind: str):
    tiny.write_published(tmp_path / "aki", tmp_path / "parts", spoilt(tiny.model().state_dict()))
    source, options = tmp_path / "aki", {}
    if kind == "file":
        source, options = source / "model.safetensors", {"config": tiny.config()}
    with pytest.raises(ValueError, match="does not hold the weights of this AKI configuration") as error:
        load_aki(source, **options)
    said = str(error.value)
    assert "1 missing: lang_model.lm_head.bias" in said
    assert "1 not AKI's: lang_model.lm_head.extra" in said
    assert "1 of another shape: vision_tokenizer.latents (7, 24) instead of (5, 24)" in said


def test_weights_of_another_model_are_refused_in_one_readable_line(tmp_path: Path):
    save_file({f"layer{n}.weight": torch.ones(1) for n in range(9)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; 9 not AKI's: .* and 4 more$"):
        load_aki(tmp_path / "model.safetensors", config=tiny.config())


def test_what_cannot_be_read_is_said(tmp_path: Path):
    (tmp_path / "aki.pt").write_bytes(b"<html>Sign in</html>")
    with pytest.raises(weights.WeightsError, match="web page or text"):
        load_aki(tmp_path / "aki.pt")
    for source in ("aki_5b", "litv2_small", tmp_path / "nothing", "./aki"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of AKI in the manifest \(aki_4b\) and no hub id"):
            load_aki(source)
    with pytest.raises(OSError, match="cached files"):
        load_aki("nobody/aki", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers_attr_name": "transformer.h"}, "decoder_layers_attr_name='transformer.h'"),
        ({"base_img_size": 384}, "base_img_size=384"),
        ({"n_px": 448}, "n_px=448, but its vision tower takes pictures of 384 pixels"),
    ],
)
def test_a_published_configuration_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        AkiConfig.from_pretrained(tmp_path)


def test_a_published_configuration_with_other_parts_is_refused(tmp_path: Path):
    parts = tiny.write_parts(tmp_path)
    for key, other in zip(parts, reversed(parts.values()), strict=True):
        (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, key: other}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"AKI has a (Phi3|Siglip)"):
            AkiConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_tokenizer_len": 65}, "initial_tokenizer_len is 65, but the embedding has 64 rows"),
        ({"image_token_id": 62}, "image_token_id is 62, but this vocabulary has the ids 0 to 61"),
        ({"stop_token_id": -1}, "stop_token_id is -1"),
        ({"pad_token_id": 61}, "padding must be one of the 60 tokens of the main table"),
        ({"num_vision_tokens": 0}, "num_vision_tokens is 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
    ],
)
def test_a_configuration_that_does_not_fit_together_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)
