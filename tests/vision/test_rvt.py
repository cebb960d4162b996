"""RVT: masked attention against a slow reference, masks and image sizes, its surface, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_model_input_config, save_for_hf
from timm.models._features_fx import GraphExtractNet
from torch import Tensor, nn

from vision.attention import record_attention
from vision.rvt import RVT, PositionAwareAttention, RVTBlock, checkpoint_filter_fn, resize_mask

SMALL: dict[str, dict[str, Any]] = {
    "one stage": {"base_dims": (8,), "depths": (2,), "num_heads": (2,), "num_scales": 4},
    "two stages, masks": {
        "base_dims": (8, 8),
        "depths": (2, 1),
        "num_heads": (2, 4),
        "num_scales": 3,
        "masked_blocks": 2,
    },
}
small = pytest.mark.parametrize("kind", SMALL)


def create(kind: str, **kwargs: Any) -> Any:
    return RVT(**{"num_classes": 10, **SMALL[kind], **kwargs})


def randomized(module: nn.Module) -> Any:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.3)
    return module.eval()


def slow_attention(layer: PositionAwareAttention, x: Tensor) -> Tensor:
    """Head by head."""
    B, H, W, C = x.shape
    N, d = H * W, C // layer.num_heads
    q, k, v = layer.qkv(x).reshape(B, N, 3 * C).chunk(3, -1)
    out = []
    for h in range(layer.num_heads):
        part = slice(d * h, d * h + d)
        scores = q[..., part] @ k[..., part].mT / d**0.5
        if layer.att_mask is not None:
            scores = scores * layer.att_mask[h, :N, :N].sigmoid()
        out.append(scores.softmax(-1) @ v[..., part])
    return layer.proj(torch.cat(out, -1)).reshape(B, H, W, C)


@pytest.mark.parametrize("mask_grid", [None, (3, 3), (2, 3)])
def test_masked_attention_is_what_the_equation_says(mask_grid: tuple[int, int] | None):
    layer = randomized(PositionAwareAttention(8, 2, mask_grid))
    x = torch.randn(2, 2, 3, 8, requires_grad=True)
    ours, expected = layer(x), slow_attention(layer, x)
    torch.testing.assert_close(ours, expected)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with record_attention(layer) as maps:
        layer(x)
    ((kept,),) = maps.values()
    assert kept.key_grid == (2, 3) and kept.attn.shape == (2, 2, 6, 6)
    torch.testing.assert_close(kept.attn.sum(-1), torch.ones(2, 2, 6))


def test_a_map_larger_than_the_mask_is_refused_and_a_resized_mask_takes_it():
    layer = PositionAwareAttention(8, 2, (2, 2))
    x = torch.randn(1, 3, 4, 8)
    with pytest.raises(ValueError, match=r"3 x 4 tokens.*set_input_size"):
        layer(x)
    layer.resize_to((3, 4))
    assert layer(x).shape == x.shape and layer.get_parameter("att_mask").shape == (2, 12, 12)
    mask = layer.att_mask
    layer.resize_to((2, 3))
    assert layer.att_mask is mask, "fewer tokens have their part of it"
    with pytest.raises(ValueError, match="num_heads=3"):
        PositionAwareAttention(8, 3)


def test_masks_are_resampled_along_queries_and_keys():
    mask = torch.randn(2, 6, 6)
    assert torch.equal(resize_mask(mask, (2, 3), (2, 3)), mask)
    four = mask.reshape(2, 2, 3, 2, 3)
    keys = F.interpolate(four.reshape(12, 1, 2, 3), (4, 5), mode="bilinear").reshape(2, 6, 20)
    both = F.interpolate(keys.mT.reshape(40, 1, 2, 3), (4, 5), mode="bilinear").reshape(2, 20, 20).mT
    torch.testing.assert_close(resize_mask(mask, (2, 3), (4, 5)), both)
    with pytest.raises(ValueError, match="3 x 3 tokens"):
        resize_mask(mask, (3, 3), (4, 4))


def test_masks_of_the_published_size_serve_small_images_and_grow_for_large_ones():
    model: Any = timm.create_model("tap_rvt_tiny_plus", device="meta")
    masks = [name for name, _ in model.named_parameters() if name.endswith("att_mask")]
    assert len(masks) == 10 and all(model.get_parameter(n).shape == (6, 196, 196) for n in masks)
    model.set_input_size((160, 96))
    assert model.get_parameter(masks[0]).shape == (6, 196, 196)
    large = timm.create_model("tap_rvt_tiny_plus", device="meta", img_size=(256, 320))
    assert large.get_parameter(masks[0]).shape == (6, 320, 320)
    assert large(torch.empty(1, 3, 256, 320, device="meta")).shape == (1, 1000)
    with pytest.raises(ValueError, match="set_input_size"):
        model(torch.empty(1, 3, 256, 320, device="meta"))
    model.set_input_size((256, 320))
    assert model(torch.empty(1, 3, 256, 320, device="meta")).shape == (1, 1000)


def test_a_published_file_is_resampled_for_a_larger_network():
    published, large = create("two stages, masks"), create("two stages, masks", img_size=240)
    state_dict = {name.replace("fc_norm", "norm"): value for name, value in published.state_dict().items()}
    large.load_state_dict(checkpoint_filter_fn({"model": state_dict}, large), strict=True)
    published.set_input_size(240)
    for (name, a), b in zip(large.state_dict().items(), published.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_file_with_more_masks_gives_them_to_the_network(tmp_path: Path):
    """As the printed size of the published network suggests; saved and created again it keeps them."""
    rich = randomized(timm.create_model("tap_rvt_tiny_plus", **{**SMALL["two stages, masks"], "num_classes": 3}))
    poor = timm.create_model(
        "tap_rvt_tiny_plus", **{**SMALL["two stages, masks"], "num_classes": 3, "masked_blocks": 1}
    )
    poor.load_state_dict(checkpoint_filter_fn(rich.state_dict(), poor), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(poor.eval()(x), rich(x))
        save_for_hf(poor, str(tmp_path), safe_serialization=True)
        again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(again(x), rich(x))


@torch.no_grad()
def test_small_images_take_the_upper_left_of_the_mask():
    model = randomized(create("two stages, masks"))
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    for name, mask in model.named_parameters():
        if name.endswith("att_mask"):
            mask[:, 16:], mask[:, :, 16:] = 100, 100
    torch.testing.assert_close(model(x), expected)


def test_mlp_is_three_convolutions_with_batch_norm(monkeypatch: pytest.MonkeyPatch):
    block = randomized(RVTBlock(8, 2))
    mlp = block.mlp
    x = torch.randn(2, 3, 4, 8)
    y = x.permute(0, 3, 1, 2)
    y = F.gelu(mlp.bn2(mlp.dwconv(F.gelu(mlp.bn1(mlp.fc1(y))))))
    expected = mlp.bn3(mlp.fc2(y)).permute(0, 2, 3, 1)
    torch.testing.assert_close(mlp(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), expected.detach())
    after = x + block.attn(block.norm1(block.dilation_predictor(x)))
    torch.testing.assert_close(block(x), after + mlp(block.norm2(after)))


@small
def test_short_cuts_of_inference_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = randomized(create(kind))
    x = torch.randn(5, 3, 64, 48)
    expected = model(x)
    assert expected.requires_grad
    sizes: list[int] = []
    model.stage_blocks(0).register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr("vision.rvt._PIXELS_AT_ONCE", 2 * 64 * 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.detach(), rtol=1e-3, atol=1e-4)
        assert sizes == [2, 2, 1]
        with record_attention(model) as maps:
            model(x)
    assert sizes[3:] == [5] and all(len(m[0].attn) == 5 for m in maps.values())


@small
@pytest.mark.parametrize("size", [(32, 32), (32, 80), (71, 50), (64, 64)])
def test_any_size(kind: str, size: tuple[int, int]):
    model = create(kind).train()
    out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 10) and out.isfinite().all()
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with torch.inference_mode():
        assert model.eval()(torch.randn(1, 3, *size)).isfinite().all()


@small
@torch.no_grad()
def test_surface(kind: str):
    model = create(kind, img_size=(64, 96)).eval()
    width = model.num_features
    assert get_model_input_config(model)["input_size"] == (3, 64, 96)
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, width)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, F.layer_norm(features.mean((2, 3)), (width,), eps=1e-6))
    torch.testing.assert_close(model(x), model.head(pooled))
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4) and model.head_hidden_size == 2 * width
    model.reset_classifier(6, "")
    assert model(x).shape == (2, 6, *features.shape[2:])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), pooled)


@small
@torch.no_grad()
def test_intermediates_are_the_blocks(kind: str):
    model = create(kind).eval()
    x = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, maps[-1])
    assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == [
        (info["num_chs"], info["reduction"]) for info in model.feature_info
    ]
    assert all(
        model.get_submodule(info["module"]) is model.stage_blocks(i) for i, info in enumerate(model.feature_info)
    )
    for index in range(len(maps)):
        pruned = create(kind).eval()
        pruned.load_state_dict(model.state_dict())
        kept = pruned.prune_intermediate_layers([index])
        (one,) = pruned.forward_intermediates(x, indices=kept, intermediates_only=True)
        torch.testing.assert_close(one, maps[index])
        assert sum(isinstance(m, RVTBlock) for m in pruned.modules()) == index + 1


@pytest.mark.parametrize("name", ["tap_rvt_tiny", "tap_rvt_tiny_plus"])
def test_features_only_trains_all_that_is_left(name: str):
    model: Any = timm.create_model(name, features_only=True).train()
    assert model.feature_info.reduction() == [16, 32, 32]
    torch.stack([m.square().mean() for m in model(torch.randn(2, 3, 64, 64))]).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_no_gradient():
    model = create("two stages, masks").train()
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="twice as wide"):
        RVT(base_dims=(8, 8), depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(ValueError, match="masked_blocks=3"):
        create("one stage", masked_blocks=3)


def test_without_pooling_nothing_pools():
    model = timm.create_model("tap_rvt_tiny", num_scales=1, device="meta")
    assert not [n for n, _ in model.named_parameters() if "dilation_predictor" in n]


@small
@torch.no_grad()
def test_symbolic_trace_gives_the_same_bits(kind: str):
    model = create(kind).eval()
    x = torch.randn(1, 3, 64, 48)
    assert torch.equal(GraphExtractNet(model, ["head"])(x), model(x))


def test_saved_and_created_again_at_another_size(tmp_path: Path):
    model: Any = timm.create_model("tap_rvt_tiny_plus", **{**SMALL["two stages, masks"], "num_classes": 3}).eval()
    model.set_input_size((224, 256))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 224, 256)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
