"""HiLo and deformable token merging against slow, obvious references, in float64 where the operator allows it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from vision.litv2 import DeformableTokenMerging, HiLo, LITv2, deform_patches

Array = np.ndarray


def array(x: Tensor) -> Array:
    return x.detach().numpy()


def linear(x: Array, layer: torch.nn.Linear) -> Array:
    out = x @ array(layer.weight).T
    return out if layer.bias is None else out + array(layer.bias)


def attention(q: Array, k: Array, v: Array, heads: int, scale: float) -> Array:
    """Tokens `[N, heads * d]`, head by head."""
    out = []
    for q_, k_, v_ in zip(*(np.split(t, heads, -1) for t in (q, k, v)), strict=True):
        e = np.exp(scale * q_ @ k_.T)
        out.append(e / e.sum(-1, keepdims=True) @ v_)
    return np.concatenate(out, -1)


def reference_hilo(hilo: HiLo, x: Array) -> Array:
    """One map `[H, W, C]`, zero padded on the right and on the bottom; padded tokens are not masked."""
    H, W, C = x.shape
    s = hilo.window_size
    x = np.pad(x, ((0, -H % s), (0, -W % s), (0, 0)))
    windows = [(slice(y, y + s), slice(z, z + s)) for y in range(0, x.shape[0], s) for z in range(0, x.shape[1], s)]
    parts = []
    if hilo.h_heads:
        high = np.zeros((*x.shape[:2], hilo.h_dim))
        for window in windows:
            tokens = linear(x[window].reshape(-1, C), hilo.h_qkv)
            high[window] = attention(*np.split(tokens, 3, -1), hilo.h_heads, hilo.scale).reshape(high[window].shape)
        parts.append(linear(high, hilo.h_proj))
    if hilo.l_heads:
        averages = np.stack([x[window].mean((0, 1)) for window in windows])
        k, v = np.split(linear(averages, hilo.l_kv), 2, -1)
        low = attention(linear(x.reshape(-1, C), hilo.l_q), k, v, hilo.l_heads, hilo.scale)
        parts.append(linear(low, hilo.l_proj).reshape(*x.shape[:2], -1))
    return np.concatenate(parts, -1)[:H, :W]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("window_size", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 9)])
def test_hilo_equals_a_loop_over_windows(alpha: float, window_size: int, size: tuple[int, int]):
    hilo = HiLo(24, 6, qkv_bias=True, window_size=window_size, alpha=alpha).double()
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    expected = np.stack([reference_hilo(hilo, image) for image in array(x)])
    np.testing.assert_allclose(array(hilo(x)), expected, rtol=1e-9, atol=1e-9)
    tokens = hilo(x.flatten(1, 2), *size)
    np.testing.assert_allclose(array(tokens), expected.reshape(2, -1, 24), rtol=1e-9, atol=1e-9)


def test_hilo_splits_the_heads_as_the_paper_does():
    for num_heads, alpha, low in ((12, 0.9, 10), (16, 0.9, 14), (12, 0.2, 2), (12, 0.0, 0), (12, 1.0, 12)):
        hilo = HiLo(num_heads * 4, num_heads, window_size=2, alpha=alpha)
        assert (hilo.l_heads, hilo.h_heads) == (low, num_heads - low)
    assert HiLo(48, 12, window_size=1, alpha=0.0).l_heads == 12, "without windows all heads see the whole map"
    assert not any(name.startswith("l_") for name in HiLo(48, 12, alpha=0.0).state_dict())
    assert not any(name.startswith("h_") for name in HiLo(48, 12, alpha=1.0).state_dict())


def test_hilo_with_window_one_is_plain_attention():
    hilo = HiLo(24, 3, qkv_bias=True, window_size=1)
    x = torch.randn(2, 5, 6, 24)
    q = hilo.l_q(x).view(2, 30, 3, 8).transpose(1, 2)
    k, v = hilo.l_kv(x).view(2, 30, 2, 3, 8).permute(2, 0, 3, 1, 4)
    expected = hilo.l_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 6, 24))
    torch.testing.assert_close(hilo(x), expected)


def test_hilo_gradients_are_those_of_its_function():
    hilo = HiLo(8, 4, window_size=2, alpha=0.5).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hilo, (x,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiLo(30, 4), r"width 30 does not divide by num_heads=4"),
        (lambda: HiLo(32, 4, alpha=1.5), r"alpha=1\.5 is a share of heads"),
        (lambda: HiLo(32, 4)(torch.randn(1, 12, 32)), r"12 tokens are not a map of H=3 by W=3"),
        (lambda: HiLo(32, 4)(torch.randn(1, 12, 32), W=5), r"12 tokens are not a map of H=2 by W=5"),
        (lambda: HiLo(32, 4)(torch.randn(1, 12, 32), 5, 2), r"12 tokens are not a map of H=5 by W=2"),
    ],
)
def test_wrong_values_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def deformed(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution by our sampler: `[B, C, H, W]` and `[B, 8, h, w]` → `[B, C', h, w]`."""
    patches = deform_patches(x.permute(0, 2, 3, 1), offset.permute(0, 2, 3, 1).unflatten(-1, (4, 2)))
    return F.linear(patches.flatten(-2), weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9), (2, 3)])
@pytest.mark.parametrize("reach", [0.7, 3.0, 30.0])
def test_deformable_convolution_equals_torchvision(size: tuple[int, int], reach: float):
    """Values and gradients; odd last rows and columns make no output, offsets may reach far outside."""
    H, W = size
    h, w = H // 2, W // 2
    leaves = [
        torch.randn(3, 6, H, W, requires_grad=True),
        (reach * torch.randn(3, 8, h, w)).requires_grad_(),
        torch.randn(5, 6, 2, 2, requires_grad=True),
        torch.randn(5, requires_grad=True),
    ]
    upstream = torch.randn(3, 5, h, w)
    ours = deformed(*leaves)
    x, offset, weight, bias = leaves
    theirs = deform_conv2d(x, offset, weight, bias, stride=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grads = zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True)
    for name, (a, b) in zip(("x", "offset", "weight", "bias"), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_deformable_convolution_at_the_border():
    """Whole-pixel offsets to either side of the edges, where the two zeros of the definition meet."""
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    weight, bias = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]]), torch.zeros(1)
    for step in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0):
        for axis in (0, 1):
            offset = torch.zeros(1, 8, 2, 2)
            offset[:, axis::2] = step
            expected = deform_conv2d(x, offset, weight, bias, stride=2)
            torch.testing.assert_close(deformed(x, offset, weight, bias), expected, msg=f"step {step}, axis {axis}")


def test_deform_patches_without_offsets_are_the_patches():
    x = torch.randn(2, 5, 6, 3)
    patches = deform_patches(x, torch.zeros(2, 2, 3, 4, 2))
    expected = x[:, :4].reshape(2, 2, 2, 3, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 2, 3, 4, 3)
    assert torch.equal(patches, expected)


def test_deform_patches_are_differentiable_in_both():
    x = torch.randn(1, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    # away from whole pixels, where bilinear sampling has no derivative
    offset = (torch.randint(-2, 3, (1, 2, 2, 4, 2)) + 0.2 + 0.6 * torch.rand(1, 2, 2, 4, 2)).double().requires_grad_()
    assert torch.autograd.gradcheck(deform_patches, (x, offset))


def test_merging_starts_as_a_plain_convolution():
    merge = DeformableTokenMerging(6).eval()
    x = torch.randn(2, 6, 8, 6)
    conv = F.conv2d(x.permute(0, 3, 1, 2), merge.dconv.weight, merge.dconv.bias, stride=2)
    torch.testing.assert_close(merge(x), F.gelu(merge.norm_layer(conv)).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_an_odd_batch_is_no_problem():
    """The authors' operator splits a batch in halves; ours has no such limit."""
    merge = DeformableTokenMerging(4).eval()
    x = torch.randn(7, 4, 4, 4)
    torch.testing.assert_close(merge(x), torch.cat([merge(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


def test_norms_have_the_epsilon_that_no_output_shows():
    model = LITv2(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    eps = {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d)}
    assert eps == {1e-5}


def test_stages_have_the_parts_of_the_spec():
    """No attention in the first two stages; the merging layer belongs to the stage before it."""
    model = LITv2(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    assert [stage.blocks[0].attn is not None for stage in model.layers] == [False, False, True, True]
    assert [isinstance(stage.downsample, DeformableTokenMerging) for stage in model.layers] == [True, True, True, False]


def test_sizes_follow_the_dense_prediction_setting():
    """Padded to whole patches, then rounded down at each merge."""
    model = LITv2(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=0).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 101, 75), intermediates_only=True)
    H, W = math.ceil(101 / 4), math.ceil(75 / 4)
    expected = [(H, W), (H // 2, W // 2), (H // 4, W // 4), (H // 8, W // 8)]
    assert [tuple(m.shape[-2:]) for m in maps] == expected


def test_padding_the_image_is_padding_with_zeros():
    model = LITv2(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)).eval()
    x = torch.randn(1, 3, 62, 93)
    padded = F.pad(x, (0, 3, 0, 2))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(padded))
