"""Bi-level routing attention against slow, obvious references, in float64 so that nothing hides behind rounding."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from vision import biformer
from vision.biformer import (
    AttentionLePE,
    BiFormer,
    BiLevelRoutingAttention,
    BiLevelRoutingAttentionNCHW,
    routed_attention,
    top_regions,
)

Array = np.ndarray
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def array(x: Tensor) -> Array:
    return x.detach().numpy()


def depthwise(x: Array, weight: Array, bias: Array) -> Array:
    """[H, W, C], zero padded at its border, tap by tap."""
    H, W, _ = x.shape
    size = weight.shape[-1]
    padded = np.pad(x, ((size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    return bias + sum(padded[i : i + H, j : j + W] * weight[:, 0, i, j] for i in range(size) for j in range(size))


def softmax(scores: Array) -> Array:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def regions_of(height: int, width: int, h: int, w: int) -> list[tuple[slice, slice]]:
    """Row by row; those at the border are smaller where the map does not divide."""
    return [(slice(y, y + h), slice(z, z + w)) for y in range(0, height, h) for z in range(0, width, w)]


def choose(q: Array, k: Array, regions: list, topk: int) -> list[Array]:
    """For each region the ones whose mean key has the largest product with its mean query."""
    mean_q = [q[r].mean((0, 1)) for r in regions]
    mean_k = [k[r].mean((0, 1)) for r in regions]
    return [np.argsort([-(a @ b) for b in mean_k], kind="stable")[:topk] for a in mean_q]


def attend_regions(q: Array, k: Array, v: Array, regions: list, chosen: list[Array], heads: int, scale: float) -> Array:
    """Region by region and head by head: softmax over the tokens of the chosen regions."""
    out = np.zeros_like(v)
    for region, choice in zip(regions, chosen, strict=True):
        for q_, k_, v_, o_ in zip(*(np.split(t, heads, -1) for t in (q, k, v, out)), strict=True):
            keys = np.concatenate([k_[regions[i]].reshape(-1, k_.shape[-1]) for i in choice])
            values = np.concatenate([v_[regions[i]].reshape(-1, v_.shape[-1]) for i in choice])
            o_[region] = softmax(scale * q_[region] @ keys.T) @ values  # a view: writes into `out`
    return out


def reference_bra(bra: BiLevelRoutingAttention, x: Array) -> Array:
    """One map `[H, W, C]`: padded before the projection, so that padded tokens are keys with the biases' values."""
    H, W, _ = x.shape
    S = bra.n_win
    h, w = math.ceil(H / S), math.ceil(W / S)
    x = np.pad(x, ((0, h * S - H), (0, w * S - W), (0, 0)))
    qkv = x @ array(bra.qkv.qkv.weight).T + array(bra.qkv.qkv.bias)
    q, k, v = qkv[..., : bra.qk_dim], qkv[..., bra.qk_dim : 2 * bra.qk_dim], qkv[..., 2 * bra.qk_dim :]
    regions = regions_of(h * S, w * S, h, w)
    assert len(regions) == S * S
    out = attend_regions(q, k, v, regions, choose(q, k, regions, bra.topk), bra.num_heads, bra.qk_dim**-0.5)
    if bra.lepe is not None:
        out = out + depthwise(v, array(bra.lepe.weight), array(bra.lepe.bias))
    return (out @ array(bra.wo.weight).T + array(bra.wo.bias))[:H, :W]


def reference_bra_nchw(bra: BiLevelRoutingAttentionNCHW, x: Array) -> Array:
    """One map `[H, W, C]`: padded with zeros after the projection, means of what is really there, lepe unpadded."""
    H, W, C = x.shape
    qkv = x @ array(bra.qkv_linear.weight)[..., 0, 0].T + array(bra.qkv_linear.bias)
    h, w = max(H // bra.n_win, 1), max(W // bra.n_win, 1)
    chosen = choose(qkv[..., :C], qkv[..., C : 2 * C], regions_of(H, W, h, w), bra.topk)
    q, k, v = np.split(np.pad(qkv, ((0, -H % h), (0, -W % w), (0, 0))), 3, axis=-1)
    regions = regions_of(*v.shape[:2], h, w)
    out = attend_regions(q, k, v, regions, chosen, bra.num_heads, C**-0.5)[:H, :W]
    if bra.lepe is not None:
        out = out + depthwise(qkv[..., 2 * C :], array(bra.lepe.weight), array(bra.lepe.bias))
    return out @ array(bra.output_linear.weight)[..., 0, 0].T + array(bra.output_linear.bias)


@pytest.mark.parametrize(
    ("size", "n_win", "topk", "kwargs"),
    [
        ((14, 14), 7, 4, {}),
        ((14, 21), 7, 4, {}),  # divides, not square
        ((9, 13), 7, 4, {}),  # padded in both directions
        ((16, 16), 7, 5, {}),  # regions of padding alone, which tie
        ((5, 30), 7, 3, {}),  # fewer rows than regions
        ((10, 12), 4, 16, {}),  # all regions chosen
        ((11, 6), 3, 2, {"qk_dim": 12}),  # queries narrower than values
        ((8, 8), 2, 1, {"qk_dim": 48, "side_dwconv": 5}),  # and wider
        ((8, 10), 5, 3, {"side_dwconv": 0}),
        ((6, 6), 1, 1, {}),  # one region: full attention
    ],
)
def test_bra_equals_a_loop_over_regions(size: tuple[int, int], n_win: int, topk: int, kwargs: dict):
    bra = BiLevelRoutingAttention(24, 3, n_win, topk=topk, **kwargs).double()
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    expected = torch.from_numpy(np.stack([reference_bra(bra, image) for image in array(x)]))
    torch.testing.assert_close(bra(x), expected, **TIGHT)


@pytest.mark.parametrize(
    ("size", "n_win", "topk", "side_dwconv"),
    [
        ((14, 14), 7, 4, 5),
        ((16, 16), 7, 4, 5),  # 8 x 8 regions of 2 x 2
        ((13, 11), 4, 3, 3),  # the last row and column of regions are partly padding
        ((9, 20), 2, 2, 0),
        ((3, 5), 7, 20, 3),  # smaller than the number of regions: a token is a region, and there are 15 of them
    ],
)
def test_second_form_has_a_padding_of_its_own(size: tuple[int, int], n_win: int, topk: int, side_dwconv: int):
    bra = BiLevelRoutingAttentionNCHW(24, 3, n_win, topk=topk, side_dwconv=side_dwconv).double()
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    expected = torch.from_numpy(np.stack([reference_bra_nchw(bra, image) for image in array(x)]))
    torch.testing.assert_close(bra(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), expected, **TIGHT)


@pytest.mark.parametrize("lepe_on", ["x", "v"])
def test_attention_lepe_is_softmax_attention_plus_a_convolution(lepe_on: Literal["x", "v"]):
    attn = AttentionLePE(24, 3, 5, lepe_on).double()
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64)
    for image, out in zip(array(x), array(attn(x)), strict=True):
        q, k, v = np.split(image @ array(attn.qkv.weight).T, 3, -1)
        everything = [(slice(None), slice(None))]
        expected = attend_regions(q, k, v, everything, [np.array([0])], 3, 8**-0.5)
        expected += depthwise(image if lepe_on == "x" else v, array(attn.lepe.weight), array(attn.lepe.bias))
        np.testing.assert_allclose(out, expected @ array(attn.proj.weight).T + array(attn.proj.bias), atol=1e-9)


def test_both_forms_agree_where_the_map_divides():
    first, second = BiLevelRoutingAttention(32, 4, 4), BiLevelRoutingAttentionNCHW(32, 4, 4)
    mine = [first.qkv.qkv, first.wo, first.lepe]
    theirs = [second.qkv_linear, second.output_linear, second.lepe]
    for a, b in zip(mine, theirs, strict=True):
        b.load_state_dict({name: value.reshape(b.state_dict()[name].shape) for name, value in a.state_dict().items()})
    x = torch.randn(2, 12, 8, 32)
    torch.testing.assert_close(second(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), first(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "size", "topk"), [((4, 4), (3, 2), 5), ((2, 3), (2, 2), 1), ((3, 3), (1, 4), 9)])
def test_gathering_and_masking_are_the_same_function(grid: tuple[int, int], size: tuple[int, int], topk: int):
    H, W = grid[0] * size[0], grid[1] * size[1]
    leaves = [torch.randn(2, H, W, dim, dtype=torch.float64, requires_grad=True) for dim in (12, 12, 24)]
    R = grid[0] * grid[1]
    index = torch.stack([torch.randperm(R)[:topk] for _ in range(2 * R)]).view(2, R, topk)
    upstream = torch.randn(2, H, W, 24, dtype=torch.float64)

    def run(mode: Literal["gather", "mask", "auto"]) -> list[Tensor]:
        out = routed_attention(*leaves, index, size, num_heads=3, scale=0.5, mode=mode)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    gathered = run("gather")
    for mode in ("mask", "auto"):
        for a, b in zip(gathered, run(mode), strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


def test_gradient_flows_through_attention_and_not_through_the_choice():
    bra = BiLevelRoutingAttention(8, 2, 2, topk=2).double()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bra, (x,))
    assert not bra.route(bra.qkv(x)).is_floating_point()


def test_top_regions_are_those_with_the_largest_scores():
    q, k = torch.randn(3, 9, 16), torch.randn(3, 9, 16)
    index = top_regions(q, k, 4)
    assert index.shape == (3, 9, 4)
    scores = q @ k.transpose(1, 2)
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter(-1, index, False)
    assert (scores.gather(-1, index).amin(-1) >= scores.masked_fill(~dropped, -math.inf).amax(-1)).all()
    assert top_regions(q, k, 100).shape == (3, 9, 9), "no more than there are"


def test_padding_changes_nothing_where_the_map_divides():
    padded, bare = (BiLevelRoutingAttention(16, 2, 4, topk=3, auto_pad=auto_pad) for auto_pad in (True, False))
    bare.load_state_dict(padded.state_dict())
    x = torch.randn(2, 8, 12, 16)
    assert torch.equal(padded(x), bare(x))
    assert padded.auto_pad and BiLevelRoutingAttention(16).auto_pad, "on by default"


def test_without_padding_a_map_that_does_not_divide_is_refused():
    bra = BiLevelRoutingAttention(16, 2, 7, auto_pad=False)
    with pytest.raises(ValueError, match=r"14x16 map does not divide into n_win=7 .*auto_pad=True"):
        bra(torch.randn(1, 14, 16, 16))


def test_network_without_padding_refuses_and_with_padding_takes_any_size():
    kwargs = {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 32), "num_classes": 3}
    with pytest.raises(ValueError, match="auto_pad=True"):
        BiFormer(auto_pad=False, **kwargs)(torch.randn(1, 3, 256, 224))
    assert BiFormer(**kwargs)(torch.randn(1, 3, 97, 41)).shape == (1, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiLevelRoutingAttention(30, 4), r"width 30 does not divide by num_heads=4"),
        (lambda: BiLevelRoutingAttention(32, 4, qk_dim=30), r"width 30 does not divide by num_heads=4"),
        (lambda: BiLevelRoutingAttentionNCHW(30, 4), r"width 30 does not divide by num_heads=4"),
        (lambda: AttentionLePE(30, 4), r"width 30 does not divide by num_heads=4"),
        (lambda: BiFormer(layout="swin"), r"layout='swin': expected 'biformer', 'stl' or 'stl_nchw'"),
        (lambda: BiFormer(topks=(1, 4, 16, 0)), r"topks=\(1, 4, 16, 0\): expected"),
    ],
)
def test_wrong_values_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_scale_is_that_of_the_whole_width():
    """The released weights need it; the usual scale of one head's width would be another function."""
    assert BiLevelRoutingAttention(64, 4).scale == 64**-0.5
    assert BiLevelRoutingAttention(64, 4, qk_dim=16).scale == 16**-0.5
    assert BiLevelRoutingAttention(64, 4, qk_scale=0.3).scale == 0.3
    assert AttentionLePE(64, 4).scale == 16**-0.5


def test_layer_norms_have_the_epsilon_that_no_output_shows():
    model = BiFormer(depths=(1, 1, 1, 1), embed_dims=(32, 32, 32, 32))
    eps = {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}
    assert eps == {1e-6}


def test_layouts_have_the_stage_sizes_of_the_spec():
    """Overlapping convolutions round up, patches round down."""
    kwargs = {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 32), "num_classes": 0}
    x = torch.randn(1, 3, 101, 75)
    for layout, stem, round_ in (("biformer", 2, math.ceil), ("stl", 4, math.floor), ("stl_nchw", 4, math.floor)):
        maps = BiFormer(layout=layout, **kwargs).eval().forward_intermediates(x, intermediates_only=True)
        steps = [2, 2] if stem == 2 else [4]
        sizes = []
        H, W = 101, 75
        for step in itertools.chain(steps, (2, 2, 2)):
            H, W = round_(H / step), round_(W / step)
            sizes.append((H, W))
        assert [tuple(m.shape[-2:]) for m in maps] == sizes[-4:], layout


def test_mode_is_chosen_by_size():
    assert biformer._prefers_mask(196, 64), "a small map of which a third is attended to"
    assert not biformer._prefers_mask(3136, 64), "56 x 56 tokens, one region of 8 x 8"
