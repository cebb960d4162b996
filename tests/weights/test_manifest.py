from __future__ import annotations

import dataclasses
import re

import pytest
from timm.models import PretrainedCfg

import weights


def test_every_published_checkpoint_of_both_methods_is_known():
    names = {e.name for e in weights.entries()}
    assert {f"litv2_{size}.in1k" for size in ("small", "medium", "base", "base_384")} <= names
    assert {f"biformer_{size}.in1k" for size in ("tiny", "small", "base", "stl", "stl_nchw")} <= names
    alphas = {e.model_args["alpha"] for e in weights.entries("litv2_small.alpha*")}
    assert alphas == {0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0}


@pytest.mark.parametrize("e", weights.entries(), ids=lambda e: e.name)
def test_an_entry_is_complete(e: weights.Entry):
    assert e.name.startswith(f"{e.architecture}.") and e.tag
    assert e.license in ("apache-2.0", "mit") or e.terms
    assert e.citation.startswith(("@inproceedings{", "@article{")) and e.paper in e.citation
    assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", e.paper_url)
    assert e.origin_url.startswith("https://github.com/")
    if e.source == "url":
        assert e.url is not None and e.url.startswith("https://") and e.package is None
    else:
        assert e.package and e.file and e.distribution and e.url is None
        assert e.sha256 is not None and len(e.sha256) == 64 and e.size


def test_an_architecture_has_one_default():
    for architecture in {e.architecture for e in weights.entries()}:
        assert sum(e.default for e in weights.entries() if e.architecture == architecture) == 1


def test_a_bare_architecture_means_its_default():
    assert weights.entry("litv2_small").name == "litv2_small.in1k"
    assert weights.entry("litv2_small.alpha0_5_in1k").model_args == {"alpha": 0.5}


def test_a_misspelt_name_is_answered_with_near_ones():
    with pytest.raises(weights.WeightsError, match=r"'litv2_smal' is known; did you mean litv2_small"):
        weights.entry("litv2_smal")
    with pytest.raises(weights.WeightsError, match=r"did you mean litv2_small\.in1k"):
        weights.entry("litv2_smal.in1k")
    with pytest.raises(weights.WeightsError, match=r"'zzz' is known \("):
        weights.entry("zzz")


def test_pattern_selects_by_name_or_architecture():
    assert {e.family for e in weights.entries("biformer*")} == {"biformer"}
    assert [e.name for e in weights.entries("*lite0")] == ["tf_efficientnet_lite0.in1k"]
    assert weights.entries("nothing*") == []


def test_entries_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.entry("litv2_small").url = "https://example.org"  # type: ignore[misc]


def test_aki_is_known_with_what_its_licence_asks():
    entry = weights.entry("aki_4b")
    assert entry.name == "aki_4b.phi3_5_mini" and entry.library == "transformers"
    assert entry.license == "cc-by-nc-4.0" and entry.terms is not None and "no commercial use" in entry.terms
    assert entry.url == "https://huggingface.co/Sony/AKI-4B-phi-3.5-mini/resolve/main/model.safetensors"
    assert [e.name for e in weights.entries() if e.terms] == [entry.name]


@pytest.mark.parametrize("e", weights.entries(), ids=lambda e: e.name)
def test_cfg_is_what_timm_accepts_with_licence_and_citation(e: weights.Entry):
    cfg = PretrainedCfg(**weights.cfg(e.name))
    assert (cfg.url, cfg.license, cfg.origin_url) == (e.url, e.license, e.origin_url)
    assert cfg.paper_ids == f"arXiv:{e.paper_url.rpartition('/')[2]}"
    assert cfg.notes is not None and cfg.notes[0] == e.citation
    assert bool(cfg.has_weights) == (e.source == "url")
