"""What timm's own tests ask of a model, asked of every name that this package registers.

BiFormer's and LITv2's have their own, `test_timm_contract.py`. Numbers run at 64 pixels; what needs none runs on the
meta device.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_model_input_config, get_pretrained_cfg, save_for_hf
from timm.models._manipulate import group_with_matcher
from torch import nn

import vision  # noqa: F401 - registers the models
from vision.segmentation import Segmenter

NAMES = [
    name
    for name in timm.list_models(exclude_filters=["biformer_*", "litv2_*"])
    if timm.model_entrypoint(name).__module__.partition(".")[0] == "vision"
]
SEGMENTERS = [n for n in NAMES if fnmatch.fnmatch(n, "*_ocr") or fnmatch.fnmatch(n, "*_seg")]
CLASSIFIERS = [n for n in NAMES if n not in SEGMENTERS]
TRANSFORMERS = ("sparsifiner_*", "dcal_*")  # built for one image size, tokens all of one stride

# Each of these has the modules of a smaller one that is tested always, and takes seconds to be filled with numbers.
LARGE = ("*_small*", "*_large_*", "*_base_*", "*_base", "*_w48*", "*_medium*", "*101")

every = pytest.mark.parametrize("name", NAMES)
numbers = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if any(fnmatch.fnmatch(n, p) for p in LARGE) else n for n in NAMES],
)
classifiers = pytest.mark.parametrize("name", CLASSIFIERS)


def is_transformer(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in TRANSFORMERS)


def at_64(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **({"img_size": 64} if is_transformer(name) else {}), **kwargs)


def settled(name: str, **kwargs: Any) -> Any:
    """In evaluation, with batch norms that know the statistics: without them an untrained HRNet's logits reach 1e7."""
    model = at_64(name, **kwargs).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model.eval()


def meta(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, device="meta", **kwargs) if kwargs else copy.deepcopy(_meta(name))


@functools.cache
def _meta(name: str) -> Any:
    """Building takes longer than copying."""
    return timm.create_model(name, device="meta")


def blank(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_every_name_has_a_configuration_and_a_documented_entry():
    assert len(NAMES) >= 45
    assert all(get_pretrained_cfg(name) is not None for name in NAMES)
    for name in NAMES:
        entry = timm.model_entrypoint(name)
        assert entry.__doc__ and next(iter(inspect.signature(entry).parameters)) == "pretrained", name
    assert set(timm.list_models(name_matches_cfg=True)) >= set(NAMES)


@numbers
def test_forward_backward(name: str):
    """Every parameter has a gradient; evaluation is finite, repeatable and the same with checkpointing."""
    model = at_64(name, num_classes=7).train()
    x = torch.randn(2, 3, 64, 64)
    out = model(x)
    assert out.shape == ((2, 7, 64, 64) if name in SEGMENTERS else (2, 7)) and out.isfinite().all()
    out.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.eval().double()  # an untrained HRNet makes 1e-3 of what float32 rounds off
    x = x.double()
    with torch.no_grad():
        expected = model(x)
        assert expected.isfinite().all() and torch.equal(model(x), expected)
        model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-6, atol=1e-6 * max(1.0, float(expected.std())))


@every
def test_configuration_describes_the_network(name: str):
    model = meta(name).eval()
    cfg = model.pretrained_cfg
    state_dict = model.state_dict()
    assert state_dict[f"{cfg['first_conv']}.weight"].shape[1] == model.in_chans == cfg["input_size"][0] == 3
    heads = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert all(state_dict[f"{head}.weight"].shape[0] == cfg["num_classes"] == model.num_classes for head in heads)
    assert cfg["mean"] and cfg["std"] and cfg["interpolation"]
    layers = model.get_classifier()
    known = {model.get_submodule(head) for head in heads}  # a segmentation network has an auxiliary one beside it
    found = set(layers) if isinstance(layers, tuple | list) else {layers}
    assert found <= known and (found == known or name in SEGMENTERS)


@classifiers
def test_surface(name: str):
    model = meta(name).eval()
    features = model.forward_features(blank(2, *model.pretrained_cfg["input_size"]))
    assert features.shape[1 if features.ndim == 4 else -1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 1000)
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, model.head_hidden_size) and model.num_classes == 0
    model.reset_classifier(11)
    assert model.forward_head(features).shape == (2, 11) and model.num_classes == 11
    assert meta(name, num_classes=0).eval().forward_head(features).shape == (2, model.head_hidden_size)


@every
def test_in_chans(name: str):
    model = meta(name, in_chans=4)
    assert model.in_chans == 4
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).weight.shape[1] == 4


@every
def test_features_only(name: str):
    size = (224, 224) if is_transformer(name) else (96, 96)
    model = meta(name, features_only=True, **({"img_size": 224} if is_transformer(name) else {})).eval()
    info = model.feature_info
    assert len(info) >= 3 and info.reduction() == sorted(info.reduction())
    maps = model(blank(1, 3, *size))
    for x, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        x = x.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else x
        assert x.shape == (1, channels, -(-size[0] // reduction), -(-size[1] // reduction))


@pytest.mark.parametrize("name", [n for n in CLASSIFIERS if "hrnet" not in n])  # timm's HRNet has neither
def test_intermediates_and_pruning(name: str):
    model = meta(name).eval()
    x = blank(1, *model.pretrained_cfg["input_size"])
    final, maps = model.forward_intermediates(x)
    assert model.forward_head(final).shape == (1, 1000), "the final output is what the head takes"
    assert len(maps) >= 3 and all(m.ndim == 4 for m in maps)
    kept = model.prune_intermediate_layers([1])
    (pruned,) = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert pruned.shape == maps[1].shape


@every
def test_layers_and_decay(name: str):
    model = meta(name)
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=False), return_values=False)
    covered = {parameter for group in groups.values() for parameter in group}
    assert covered == {n for n, _ in model.named_parameters()}
    assert len(groups) > 4, "layers, not one heap"
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    tokens = {n for n in covered if n in ("cls_token", "pos_embed")}
    assert tokens <= undecayed, "timm's also names tokens that a model may have and has not"


@classifiers
def test_other_sizes(name: str):
    """Another size, not square: asked for at creation, or later, and recorded for preprocessing."""
    model = meta(name, img_size=(96, 160)).eval() if takes_img_size(name) else meta(name).eval()
    assert model(blank(1, 3, 96, 160)).shape == (1, 1000)
    if hasattr(model, "set_input_size"):
        model.set_input_size((128, 64))
        assert model(blank(1, 3, 128, 64)).shape == (1, 1000)
        assert get_model_input_config(model)["input_size"] == (3, 128, 64)


def takes_img_size(name: str) -> bool:
    """All but convolutional networks of timm's classes, which take any size without being told."""
    return not fnmatch.fnmatch(name, "*resnet*") and not fnmatch.fnmatch(name, "*mobilenet*") and "hrnet" not in name


SMALLEST = [
    "sparsifiner_deit_tiny_patch16_224",
    "sparsifiner_lvvit_small",
    "ela_resnet18",
    "ela_mobilenetv2_100",
    "psa_resnet18",
    "psa_hrnet_w32",
    "dcal_deit_tiny_patch16_224",
    "fan_tiny_8_p4_hybrid",
    "tap_fan_tiny_12_p16_224",
    "tap_rvt_tiny_plus",
]
smallest = pytest.mark.parametrize("name", SMALLEST)


@smallest
def test_saved_and_created_again(name: str, tmp_path: Path):
    model = settled(name, num_classes=7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.05 * torch.rand_like(tensor))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x)), "bit for bit"
    narrow = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert narrow(torch.randn(1, 1, 64, 64)).shape == (1, 3)


@smallest
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(name: str):
    model = settled(name, num_classes=7)
    x = torch.randn(3, 3, 64, 64)
    alone = torch.cat([model(one) for one in x.split(1)])
    torch.testing.assert_close(model(x), alone, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model(x.flip(0)), alone.flip(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SMALLEST if "hrnet" not in n])  # timm's HRNet has none
def test_stochastic_depth_acts_in_training_alone(name: str):
    model = at_64(name, num_classes=7, drop_path_rate=0.7).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    drops = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    x = torch.randn(2, 3, 64, 64)
    assert 0.6 < max(drops) <= 0.7  # timm's EfficientNet stops one step short
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # residual branches may start at zero
    assert len({model(x).sum().item() for _ in range(4)}) > 1
    model.eval()
    assert torch.equal(model(x), model(x))


@smallest
def test_a_copy_works_after_a_forward_and_after_loading(name: str):
    """Nothing that was kept from the first weights outlives them."""
    model, other = (settled(name, num_classes=7) for _ in range(2))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        twin.load_state_dict(other.state_dict())
        torch.testing.assert_close(twin(x), other(x))
        assert torch.equal(model(x), expected)
        twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(twin(x), expected)


@smallest
@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_lower_precision(name: str, device: str):
    model = settled(name, num_classes=50).to(device)
    x = torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast(device, dtype=torch.bfloat16):
            out = model(x)
        whole = model.to(torch.bfloat16)(x.bfloat16())
    for low in (out, whole):
        # what the type itself loses over the layers of an untrained HRNet or MobileNet; a wrong cast loses all
        assert low.isfinite().all() and (low.float() - expected).std() < 0.4 * expected.std()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("sparsifiner_lvvit_small", "tap_fan_tiny_12_p16_224")
        else name
        for name in SMALLEST
        if "hrnet" not in name  # a compiler takes minutes for it
    ],
)
@torch.no_grad()
def test_exports_and_compiles_as_one_graph(name: str):
    model = settled(name, num_classes=7)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-4)
    more = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(exported(more), model(more), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)


def test_segmenters():
    assert all(issubclass(type(meta(name)), Segmenter) for name in SEGMENTERS) and len(SEGMENTERS) >= 2
    assert not any(isinstance(meta(name), Segmenter) for name in CLASSIFIERS)
