"""`--runtime`: the same rows from ONNX Runtime and from OpenVINO."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from support import SAMPLES
from torch import nn

from apps.batch.exported import exported
from apps.errors import UsageError
from apps.options import Prepared


def test_labels_are_the_same_and_probabilities_within_a_hundred_thousandth(run):
    rows = {}
    for runtime in ("torch", "onnx", "openvino"):
        done = run("classify", SAMPLES, "--batch-size", 3, "--runtime", runtime, "--json")  # the last batch is short
        assert done.code == 0, done.err
        rows[runtime] = [json.loads(line) for line in done.out.splitlines()]
    assert len(rows["torch"]) >= 5 and len(rows["torch"]) % 3
    for one, other in zip(2 * rows["torch"], rows["onnx"] + rows["openvino"], strict=True):
        assert one["label_1"] == other["label_1"] and one["path"] == other["path"]
        for rank in range(1, 6):
            assert one[f"prob_{rank}"] == pytest.approx(other[f"prob_{rank}"], abs=1e-5)


def test_features_of_our_own_networks_are_the_same(run, tmp_path: Path):
    vectors = {}
    for runtime in ("torch", "openvino"):
        done = run(
            "embed", SAMPLES / "cat.jpg", "--model", "litv2_nano", "--random-weights", "--runtime", runtime, "--json"
        )
        assert done.code == 0, done.err
        vectors[runtime] = np.array(json.loads(done.out)["embedding"])
    np.testing.assert_allclose(vectors["openvino"], vectors["torch"], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--amp",), "--runtime onnx and --amp exclude each other"),
        (("--compile",), "--runtime onnx and --compile exclude each other"),
        (("--engine", "ray", "--gpus-per-worker", "1"), "--runtime onnx is for the CPU: add --device cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(run, options: tuple[str, ...], words: str):
    done = run("classify", SAMPLES, "--runtime", "onnx", *options)
    assert done.code == 2 and words in done.err and "Traceback" not in done.err, done.err


def test_a_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(UsageError, match=r'needs onnxruntime: pip install "attnsuite\[onnx\]"'):
        Prepared(runtime="onnx").compute(torch.device("cpu"), on_gpu=False, suited=32)


def test_an_operation_that_onnx_lacks_is_a_line():
    class Decomposed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(images).abs()

    module = Decomposed()
    with pytest.raises(UsageError, match=r"cannot be run by ONNX Runtime .*eig.*leave out --runtime"):
        exported(module, module, torch.randn(1, 3, 8, 8), "onnx")


def test_a_classifier_left_out_is_left_out_of_the_export():
    module = timm.create_model("test_vit").eval()
    images = torch.randn(2, *module.pretrained_cfg["input_size"])
    call = exported(module, lambda x: module.forward_head(module.forward_features(x), pre_logits=True), images, "onnx")
    with torch.no_grad():
        wanted = module.forward_head(module.forward_features(images), pre_logits=True)
    torch.testing.assert_close(call(images), wanted, atol=1e-5, rtol=1e-4)
