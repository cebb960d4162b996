"""Attention rollout: the product of all layers, and one row of it."""

from typing import Any

import pytest
import timm
import torch

from vision.attention import record_attention
from vision.rollout import attention_rollout, rollout, rollout_row


def build(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **kwargs)


def random_maps(layers: int = 4, heads: int = 3, tokens: int = 7) -> list[torch.Tensor]:
    return [torch.randn(2, heads, tokens, tokens).softmax(-1) for _ in range(layers)]


def slow_rollout(maps: list[torch.Tensor], share: float = 0.5) -> torch.Tensor:
    """Token by token, in double precision: what reaches i from j over every path."""
    total = torch.eye(maps[0].shape[-1], dtype=torch.double).expand(len(maps[0]), -1, -1)
    for attn in maps:
        nxt = torch.zeros_like(total)
        for i in range(attn.shape[-1]):
            nxt[:, i] = (1 - share) * total[:, i]
            for k in range(attn.shape[-1]):
                nxt[:, i] += share * attn.double().mean(1)[:, i, k, None] * total[:, k]
        total = nxt
    return total


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_product_of_layers(share: float):
    maps = random_maps()
    full = attention_rollout(maps, share)
    torch.testing.assert_close(full.double(), slow_rollout(maps, share), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 7))
    assert (full >= 0).all()


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_row_is_the_row_of_the_product(layers: int):
    maps = random_maps(layers)
    full = attention_rollout(maps, 0.4)
    for i in (0, 3, 6):
        torch.testing.assert_close(rollout_row(maps, i, 0.4), full[:, i])
    weights = torch.rand(7)
    torch.testing.assert_close(rollout_row(maps, weights, 0.4), weights @ full)
    weights = torch.rand(2, 7)
    torch.testing.assert_close(rollout_row(maps, weights, 0.4), (weights.unsqueeze(1) @ full).squeeze(1))


def test_order_of_layers_matters_and_maps_stay_as_they_are():
    maps = random_maps(3)
    before = [m.clone() for m in maps]
    forward, backward = rollout_row(maps), rollout_row(maps[::-1])
    assert not torch.allclose(forward, backward, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


def test_head_means_may_be_given():
    maps = random_maps()
    means = [m.mean(1) for m in maps]
    torch.testing.assert_close(attention_rollout(means), attention_rollout(maps))
    torch.testing.assert_close(rollout_row(means), rollout_row(maps))
    assert torch.equal(means[-1], maps[-1].mean(1)), "a single row is not written into the map"


def test_half_precision_is_multiplied_in_single():
    maps = [m.bfloat16() for m in random_maps(12)]
    row = rollout_row(maps)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, attention_rollout([m.float() for m in maps])[:, 0], rtol=1e-4, atol=1e-5)


def test_bad_maps():
    with pytest.raises(ValueError, match="no attention maps"):
        attention_rollout([])
    with pytest.raises(ValueError, match="same tokens"):
        rollout_row([torch.rand(1, 2, 4, 5)])
    with pytest.raises(ValueError, match="same tokens"):
        rollout_row([torch.rand(1, 2, 4, 4), torch.rand(1, 2, 5, 5)])
    with pytest.raises(ValueError, match=r"attention_share=1\.5"):
        rollout_row(random_maps(), attention_share=1.5)


TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": (48, 64)}


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("vit_small_patch16_dinov3", 5)],
)
def test_any_transformer(name: str, prefix: int):
    model = build(name, **TINY).eval()
    x = torch.randn(2, 3, 48, 64)
    rolled = rollout(model, x)
    with torch.no_grad(), record_attention(model.blocks) as layers:
        model(x)
    full = attention_rollout([maps[0].attn for maps in layers.values()])
    row = full[:, 0]
    if name == "vit_small_patch16_dinov3" and model.global_pool == "avg":
        row = full[:, prefix:].mean(1)
    torch.testing.assert_close(rolled, row[:, prefix:].unflatten(1, (3, 4)))
    assert rolled.shape == (2, 3, 4) and not rolled.requires_grad


def test_pooled_patches_are_asked_for_their_mean():
    model = build("vit_tiny_patch16_224", class_token=False, global_pool="avg", **TINY).eval()
    torch.testing.assert_close(rollout(model, torch.randn(2, 3, 48, 64)).sum((1, 2)), torch.ones(2))


def test_networks_that_cannot():
    with pytest.raises(ValueError, match="ResNet has no `blocks`"):
        rollout(build("resnet18"), torch.randn(1, 3, 64, 64))
