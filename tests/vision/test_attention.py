"""Recorded attention: what a listener hears, and that the music plays on unchanged."""

from __future__ import annotations

import pytest
import timm
import torch
from test_timm_contract import create, images, small
from torch import nn

from vision.attention import AttentionTap, attention_layers, record_attention
from vision.biformer import AttentionLePE, BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW
from vision.litv2 import HiLo


@small
@pytest.mark.parametrize("size", [(64, 64), (90, 70)])
@torch.no_grad()
def test_listening_changes_no_output_and_rows_sum_to_one(small: str, size: tuple[int, int]):
    model = create(small).eval()
    x = images(2, 3, *size)
    expected = model(x)
    with record_attention(model) as layers:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(layers) == sum(isinstance(m, AttentionTap) for m in model.modules())
    for name, (layer,) in layers.items():
        rows = layer.attn.sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), msg=lambda m, name=name: f"{name}: {m}")
        assert layer.attn.shape[-1] == layer.key_grid[0] * layer.key_grid[1]
    torch.testing.assert_close(model(x), expected)
    assert not any(m.is_open for m in model.modules() if isinstance(m, AttentionTap))


def test_taps_close_after_an_error():
    attn = AttentionLePE(16, 2)
    with pytest.raises(ZeroDivisionError), record_attention(attn):
        attn(images(1, 4, 4, 16))
        raise ZeroDivisionError
    assert not attn.tap.is_open


@pytest.mark.parametrize(("H", "W"), [(8, 8), (7, 5)])
@torch.no_grad()
def test_routed_attention_is_zero_outside_the_chosen_regions(H: int, W: int):
    bra = BiLevelRoutingAttention(16, 2, 4, topk=3)
    x = torch.randn(2, H, W, 16)
    with record_attention(bra) as layers:
        bra(x)
    (layer,) = layers[""]
    (height, width), S = layer.key_grid, 4
    assert height % S == width % S == 0
    assert layer.extent == (height / H, width / W)
    h, w = height // S, width // S
    attn = layer.attn.reshape(2, 2, S, h, S, w, S, h, S, w)
    between_regions = attn.sum((1, 3, 5, 7, 9)).reshape(2, S * S, S * S)
    assert ((between_regions > 0).sum(-1) == 3).all()


def test_padding_stays_outside_the_picture():
    model = timm.create_model("biformer_nano").eval()
    with torch.no_grad(), record_attention(model.stages[2]) as layers:
        model(torch.randn(1, 3, 256, 256))  # 16 x 16 tokens, padded to 21 x 21
    layer_map = next(iter(layers.values()))[0]
    assert layer_map.key_grid == (21, 21)
    assert layer_map.extent == (21 / 16, 21 / 16)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (AttentionLePE(16, 2, side_dwconv=0), (1, 4, 6, 16)),
        (BiLevelRoutingAttention(16, 2, 2, topk=2, side_dwconv=0), (1, 4, 6, 16)),
        (BiLevelRoutingAttentionNCHW(16, 2, 2, topk=2, side_dwconv=0), (1, 16, 4, 6)),
        (HiLo(16, 2, alpha=1.0), (1, 4, 6, 16)),
    ],
)
def test_the_map_is_part_of_the_graph(layer: nn.Module, shape: tuple[int, ...]):
    with record_attention(layer) as layers:
        out = layer(torch.randn(shape))
    (kept,) = next(iter(layers.values()))
    (grad,) = torch.autograd.grad(out.square().sum(), kept.attn)
    assert grad.shape == kept.attn.shape and grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_of_timms_own_layers(name: str):
    """Listened to without a change of output, differentiable, and fused again afterwards."""
    model = timm.create_model(name, num_classes=10, img_size=56).eval()
    x = images(2, 3, 56, 56)
    with torch.no_grad():
        expected = model(x)
    assert all(block.attn.fused_attn for block in model.blocks)
    with record_attention(model) as layers:
        out = model(x)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-5)
    assert list(layers) == attention_layers(model) == [f"blocks.{i}.attn" for i in range(12)]
    for (layer,) in layers.values():
        assert layer.key_grid == (0, 0)
        torch.testing.assert_close(layer.attn.sum(-1), torch.ones(layer.attn.shape[:-1]))
    grads = torch.autograd.grad(out.square().sum(), [layer.attn for (layer,) in layers.values()])
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_only_the_layers_listened_to_leave_the_fused_path():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    with record_attention(model.blocks[3:5]) as layers:
        assert [block.attn.fused_attn for block in model.blocks] == [i not in (3, 4) for i in range(12)]
        model(images(1, 3, 32, 32))
    assert [len(maps) for maps in layers.values()] == [1, 1]
