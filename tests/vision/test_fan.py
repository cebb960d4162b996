"""FAN: its parts against slow references, its surface where it differs from timm's XCiT, and segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features_fx import GraphExtractNet
from timm.models.xcit import PositionalEncodingFourier
from torch import Tensor, nn

import vision.inference
from vision.attention import record_attention
from vision.fan import FAN, ChannelProcessing, FANBlock, LayerNorm2dUnbiased, TokenMixing, segmentation
from vision.segmentation import segmentation_loss
from vision.tap import ADLCriterion

SMALL: dict[str, dict[str, Any]] = {
    "conv": {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_scales": 4},
    "hybrid": {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_scales": 3, "hybrid_depths": (1, 1)},
    "plain": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}
small = pytest.mark.parametrize("kind", SMALL)


def create(kind: str, **kwargs: Any) -> Any:
    return FAN(**{"num_classes": 10, **SMALL[kind], **kwargs})


def randomized(module: nn.Module) -> Any:
    """Every parameter and statistic drawn anew: a scale left at 1 hides mistakes."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.3).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return module.eval()


def test_token_mixing_is_attention():
    layer = randomized(TokenMixing(12, 3))
    x = torch.randn(2, 6, 12)
    q, (k, v) = layer.q(x), layer.kv(x).chunk(2, -1)
    out = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        out.append((q[..., part] @ k[..., part].mT / 2).softmax(-1) @ v[..., part])
    torch.testing.assert_close(layer(x, 2, 3), layer.proj(torch.cat(out, -1)))
    with pytest.raises(ValueError, match="num_heads=5"):
        TokenMixing(12, 5)


def slow_channel_processing(layer: ChannelProcessing, x: Tensor, H: int, W: int) -> Tensor:
    """Head by head, in the authors' layout."""
    d = x.shape[-1] // layer.num_heads
    mlp: Any = layer.mlp_v
    u = mlp.fc1(x)
    local = mlp.dwconv(u, H, W)  # timm's own
    v = layer.norm_v(mlp.fc2(u + mlp.gamma * local))
    q = layer.q(x)
    y = torch.empty_like(x)
    for h in range(layer.num_heads):
        part = slice(d * h, d * h + d)
        query = q[..., part].mT.softmax(-1)  # [B, d, N]
        key = x[..., part].mT.softmax(-1).mean(1, keepdim=True).mT  # [B, N, 1]
        gate = (query @ key).sigmoid() * layer.temperature[h]  # [B, d, 1]
        y[..., part] = (gate * v[..., part].mT).mT
    return y


def test_channel_processing_gates_channels():
    layer = randomized(ChannelProcessing(12, 3))
    x = torch.randn(2, 6, 12)
    with torch.no_grad():
        expected = slow_channel_processing(layer, x, 2, 3)
        torch.testing.assert_close(layer(x, 2, 3), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x, 2, 3).detach(), expected, rtol=1e-4, atol=1e-5)
    assert layer.gates(x).shape == (2, 1, 12)


def test_gradients_of_channel_processing_are_those_of_the_reference():
    layer = randomized(ChannelProcessing(8, 2)).double().train()
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x, 3, 2).square().sum(), inputs)
    expected = torch.autograd.grad(slow_channel_processing(layer, x, 3, 2).square().sum(), inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_pooled_tokens_are_attended_to_and_the_shortcut_is_not_pooled():
    block = randomized(FANBlock(12, 3))
    assert block.dilation_predictor is not None
    x = torch.randn(2, 6, 12)
    pooled = block.dilation_predictor(x, (2, 3))
    expected = x + block.gamma1 * block.attn(block.norm1(pooled), 2, 3)
    expected = expected + block.gamma2 * block.mlp(block.norm2(expected), 2, 3)
    torch.testing.assert_close(block(x, 2, 3), expected)
    assert FANBlock(12, 3, num_scales=1).dilation_predictor is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_unbiased_norm_divides_by_one_less_however_its_input_lies(memory_format: torch.memory_format):
    norm = randomized(LayerNorm2dUnbiased(5, eps=1e-3))
    x = torch.randn(2, 5, 3, 4).to(memory_format=memory_format)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=1, keepdim=True) + 1e-3).sqrt()
    expected = expected * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)


@small
@torch.no_grad()
def test_outputs_do_not_depend_on_the_memory_format(kind: str):
    model = randomized(create(kind))
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-4)


@small
def test_short_cuts_of_inference_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch):
    """In place, in parts, and pooled by bags, with the same numbers as in training."""
    model = create(kind)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
            nn.init.normal_(norm.get_buffer("running_mean"))
    model.eval()
    x = torch.randn(3, 3, 64, 48)
    expected = model(x)
    assert expected.requires_grad
    sizes: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr("vision.fan.fan._TOKENS_AT_ONCE", 24)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.detach(), rtol=1e-4, atol=1e-5)
    assert sizes == [2, 1], "12 tokens an image, 24 at once"
    sizes.clear()
    with torch.no_grad(), record_attention(model) as maps:
        model(x)
    assert sizes == [3] and [len(m[0].attn) for m in maps.values()] == [3] * 4, "whole for who listens"


def test_batch_norm_in_place_is_batch_norm():
    norm = randomized(nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 4, 5)
    expected = norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(vision.inference.batch_norm(x, norm), expected)
    with torch.inference_mode():
        given = x.clone()
        out = vision.inference.batch_norm(given, norm)
        torch.testing.assert_close(out, expected.detach())
        assert out.data_ptr() == given.data_ptr()
        torch.testing.assert_close(vision.inference.gelu(x.clone()), F.gelu(x))


@small
@pytest.mark.parametrize("size", [(16, 16), (32, 80), (50, 41), (64, 64)])
def test_any_size(kind: str, size: tuple[int, int]):
    model = create(kind).train()
    out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 10) and out.isfinite().all()
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with torch.inference_mode():
        assert model.eval()(torch.randn(1, 3, *size)).isfinite().all()


@small
def test_surface(kind: str):
    model = create(kind).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 17, 32)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
        model.reset_classifier(4, "avg")
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
        assert model(x).shape == (2, 4)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), tokens)
    for build in (lambda: create(kind, global_pool="max"), lambda: model.reset_classifier(3, "max")):
        with pytest.raises(ValueError, match="global_pool='max'"):
            build()
    assert model.no_weight_decay() == {
        "cls_token",
        "pos_embed.token_projection.weight",
        "pos_embed.token_projection.bias",
    }


@small
@torch.no_grad()
def test_intermediates_are_the_stages_and_the_blocks(kind: str):
    model = create(kind).eval()
    x = torch.randn(2, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == [
        (info["num_chs"], info["reduction"]) for info in model.feature_info
    ]
    last = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(last, model.norm(maps[-1].flatten(2).transpose(1, 2)))
    stopped, _ = model.forward_intermediates(x, indices=[len(maps) - 2], stop_early=True)
    assert stopped.shape == final.shape and not torch.allclose(stopped, final)
    with pytest.raises(ValueError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    for index in range(len(maps)):
        pruned = create(kind).eval()
        pruned.load_state_dict(model.state_dict())
        kept = pruned.prune_intermediate_layers([index], prune_norm=True)
        (one,) = pruned.forward_intermediates(x, indices=kept, intermediates_only=True)
        torch.testing.assert_close(one, maps[index])
        if index == 0 and kind == "hybrid":
            assert not pruned.blocks and pruned.pos_embed is None and len(pruned.patch_embed.backbone.stages) == 1


@pytest.mark.parametrize("name", ["tap_fan_tiny_8_p4_hybrid", "tap_fan_tiny_12_p16_224"])
def test_features_only_trains_all_that_is_left(name: str):
    model: Any = timm.create_model(name, features_only=True).train()
    maps = model(torch.randn(2, 3, 64, 64))
    assert model.feature_info.reduction() == ([4, 8, 16] if "hybrid" in name else [16] * 3)
    torch.stack([m.square().mean() for m in maps]).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_no_gradient():
    model = create("hybrid").train()
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_drop_path_is_the_same_in_all_blocks():
    model = create("plain", drop_path_rate=0.3)
    drops = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert drops == [0.3, 0.3]
    head = create("plain").head.weight.std()
    assert create("plain", head_init_scale=0.001).head.weight.std() < 0.01 * head


@small
@torch.no_grad()
def test_symbolic_trace_gives_the_same_bits(kind: str):
    model = create(kind).eval()
    x = torch.randn(1, 3, 64, 48)
    assert torch.equal(GraphExtractNet(model, ["head"])(x), model(x))


@torch.no_grad()
def test_onnx(tmp_path: Path):
    model = create("hybrid").eval()
    x = torch.randn(2, 3, 64, 48)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    out: Any = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(out, model(x).numpy(), rtol=1e-3, atol=1e-4)


def segmenter(**kwargs: Any) -> Any:
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_scales": 4, "head_dim": 24, "num_classes": 5, **kwargs}
    return segmentation.FANSegmenter(**args)


@torch.no_grad()
def test_head_is_what_the_authors_build():
    """All maps projected, enlarged, put side by side and fused."""
    head = randomized(segmentation.MLPHead((8, 12, 16, 16), 5, 10))
    sizes = [(12, 20), (6, 10), (3, 5), (3, 5)]
    maps = [torch.randn(2, c, *size) for c, size in zip((8, 12, 16, 16), sizes, strict=True)]
    projected = []
    for i, x in reversed(list(enumerate(maps, 1))):
        y = getattr(head, f"linear_c{i}").proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        projected.append(F.interpolate(y, (12, 20), mode="bilinear", align_corners=False))
    expected = head.linear_pred(head.linear_fuse.bn(head.linear_fuse.conv(torch.cat(projected, 1))).relu())
    torch.testing.assert_close(head(maps), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_code_of_the_segmentation_network_has_other_frequencies():
    """XCiT's code has pairs of a sine and a cosine of one frequency, this one has them all apart."""
    ours, xcit = segmentation._ManyFrequencies(64), PositionalEncodingFourier(dim=64)
    for module in (ours, xcit):
        module.get_parameter("token_projection.weight").copy_(torch.eye(64)[:, :, None, None])
        module.get_parameter("token_projection.bias").zero_()
    a, b = ours(1, 5, 7), xcit(1, 5, 7)
    assert a.shape == b.shape == (1, 64, 5, 7)
    torch.testing.assert_close(a[:, 0::2], b[:, 0::2], rtol=1e-4, atol=1e-5)
    assert (a[:, 1:9:2] - b[:, 1:9:2]).abs().amax((0, 2, 3)).min() > 0.1
    y = 2 * torch.pi * torch.arange(1, 6) / 5
    torch.testing.assert_close(a[0, 3, :, 0], (y / 10000 ** (3 / 32)).cos(), rtol=1e-4, atol=1e-5)


def test_segmenter_trains_every_parameter_on_any_crop():
    model = segmenter().train()
    target = torch.randint(5, (2, 50, 72))
    criterion = ADLCriterion(threshold=0.5, task_loss=segmentation_loss)
    step = criterion(model, torch.randn(2, 3, 50, 72), target)
    assert step.logits.shape == (2, 5, 50, 72)
    step.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@torch.no_grad()
def test_segmenter_slides_over_larger_pictures():
    model = segmenter().eval()
    assert (model.window, model.stride) == ((1024, 1024), (768, 768))
    model.window, model.stride = (32, 32), (24, 24)
    x = torch.randn(1, 3, 32, 56)
    left, right = model(x[..., :32]), model(x[..., 24:])
    whole = model.predict(x)
    torch.testing.assert_close(whole[..., :24], left[..., :24])
    torch.testing.assert_close(whole[..., 32:], right[..., 8:])
    torch.testing.assert_close(whole[..., 24:32], (left[..., 24:] + right[..., :8]) / 2)


def test_segmenter_surface():
    model = segmenter().eval()
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        features = model.forward_features(x)
        assert [tuple(f.shape[1:]) for f in features] == [(128, 8, 12), (256, 4, 6), (32, 2, 3), (32, 2, 3)]
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size, 8, 12)
        model.reset_classifier(7)
        assert model(x).shape == (1, 7, 32, 48) and model.num_classes == 7
        model.reset_classifier(0)
        assert model(x).shape == (1, 24, 32, 48) and isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="global_pool='avg'"):
        model.reset_classifier(3, "avg")
