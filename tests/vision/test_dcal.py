"""DCAL: both cross-attentions, the network on any host, its criterion, and what it costs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters, save_for_hf
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vision.attention import record_attention
from vision.dcal import (
    DCAL,
    DCALCriterion,
    GlobalLocalCrossAttention,
    PairWiseCrossAttention,
    batch_hard_triplet_loss,
    fused_logits,
    local_rows,
    random_partners,
)
from vision.rollout import attention_rollout, rollout

NAMES = [
    "dcal_deit_tiny_patch16_224",
    "dcal_deit_small_patch16_224",
    "dcal_deit_base_patch16_224",
    "dcal_vit_base_patch16_224",
]
every = pytest.mark.parametrize("name", NAMES)
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 64, "num_classes": 7}


def build(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **kwargs)


def small(**kwargs: Any) -> Any:
    """Three blocks whose attention is not flat, as after training."""
    return sharpened(build("dcal_deit_tiny_patch16_224", **{**SMALL, **kwargs}))


def small_host(**kwargs: Any) -> Any:
    return sharpened(build("deit_tiny_patch16_224", **{**SMALL, **kwargs}))


def sharpened(model: Any) -> Any:
    for name, p in model.named_parameters():
        if p.device.type != "meta":
            nn.init.normal_(p, std=0.3 if "qkv" in name else 0.1, mean=float("norm" in name and "weight" in name))
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (4, 3, 64, 64))


def tokens(n: int = 9, dim: int = 24) -> torch.Tensor:
    return torch.randn(3, n, dim)


# ---------------------------------------------------------------- operators


def slow_attention(attn: Attention, x: torch.Tensor, rows: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Head by head and query by query, over the tokens of x and of others."""
    C, d = x.shape[-1], attn.head_dim
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).split(C, dim=-1)
    for other in others:
        _, k2, v2 = F.linear(other, attn.qkv.weight, attn.qkv.bias).split(C, dim=-1)
        k, v = torch.cat((k, k2), 1), torch.cat((v, v2), 1)
    out = torch.zeros(*rows.shape, C, dtype=x.dtype)
    for b in range(len(x)):
        for i, row in enumerate(rows[b]):
            for h in range(attn.num_heads):
                part = slice(h * d, (h + 1) * d)
                weights = (k[b, :, part] @ q[b, row, part] / math.sqrt(d)).softmax(0)
                out[b, i, part] = weights @ v[b, :, part]
    return attn.proj(out)


def assert_same_with_gradients(ours: torch.Tensor, slow: torch.Tensor, wanted: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, slow)
    y = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * y).sum(), wanted), torch.autograd.grad((slow * y).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_global_local_attention_equals_the_slow_reference(fused: bool, qkv_bias: bool):
    attn: Any = GlobalLocalCrossAttention(24, num_heads=3, qkv_bias=qkv_bias).double()
    attn.fused_attn = fused
    x = tokens().double().requires_grad_()
    rows = torch.tensor([[0, 3, 4], [0, 1, 8], [5, 2, 0]])
    assert_same_with_gradients(attn(x, rows), slow_attention(attn, x, rows), [x, *attn.parameters()])


@pytest.mark.parametrize("fused", [True, False])
def test_pair_wise_attention_equals_the_slow_reference(fused: bool):
    attn: Any = PairWiseCrossAttention(24, num_heads=3, qkv_bias=True).double()
    attn.fused_attn = fused
    x = tokens().double().requires_grad_()
    partner = torch.tensor([2, 0, 1])
    every_row = torch.arange(9).expand(3, -1)
    assert_same_with_gradients(
        attn(x, partner=partner), slow_attention(attn, x, every_row, x[partner]), [x, *attn.parameters()]
    )


def test_without_partner_it_is_timms_attention():
    attn = PairWiseCrossAttention(24, num_heads=3, qkv_bias=True)
    timms = Attention(24, num_heads=3, qkv_bias=True)
    timms.load_state_dict(attn.state_dict())
    x = tokens()
    assert torch.equal(attn(x), timms(x))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(attn(x, mask), timms(x, mask))


def test_an_equal_partner_cancels():
    """Keys that are there twice take half of the softmax each."""
    attn = PairWiseCrossAttention(24, num_heads=3, qkv_bias=True)
    x = tokens()
    torch.testing.assert_close(attn(x, partner=torch.arange(3)), attn(x))
    assert not torch.allclose(attn(x, partner=torch.tensor([1, 2, 0])), attn(x), atol=1e-3)


def test_all_rows_are_self_attention():
    attn = GlobalLocalCrossAttention(24, num_heads=3, qkv_bias=True)
    timms = Attention(24, num_heads=3, qkv_bias=True)
    timms.load_state_dict(attn.state_dict())
    x = tokens()
    torch.testing.assert_close(attn(x, torch.arange(9).expand(3, -1)), timms(x))


@pytest.mark.parametrize("kind", [{"qk_norm": True, "norm_layer": nn.LayerNorm}, {"gated": True}])
def test_variants_of_timms_attention(kind: dict):
    timms = Attention(24, num_heads=3, qkv_bias=True, **kind)
    x = tokens()
    for cls in (GlobalLocalCrossAttention, PairWiseCrossAttention):
        attn = cls(24, num_heads=3, qkv_bias=True, **kind)
        attn.load_state_dict(timms.state_dict())
        index = torch.arange(9).expand(3, -1) if cls is GlobalLocalCrossAttention else None
        out = attn(x, index) if index is not None else attn(x, partner=torch.arange(3))
        torch.testing.assert_close(out, timms(x))


@pytest.mark.parametrize("fused", [True, False])
def test_the_map_is_the_attention_averaged_over_heads(fused: bool):
    attn: Any = PairWiseCrossAttention(24, num_heads=3, qkv_bias=True)
    x = tokens()
    with record_attention(attn) as kept:
        expected = attn(x)
    (layer,) = kept.values()
    attn.fused_attn = fused
    for context in (torch.enable_grad(), torch.inference_mode()):
        with context:
            out, mean = attn.forward_with_map(x)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(mean, layer[0].attn.mean(1))
            assert not mean.requires_grad


def test_rows_are_the_class_token_and_the_patches_of_highest_rollout():
    maps = [torch.randn(2, 3, 21, 21).softmax(-1) for _ in range(4)]
    reached = attention_rollout(maps)[:, 0]
    for prefix, ratio, count in ((1, 0.1, 2), (1, 0.3, 6), (5, 0.5, 8), (1, 1.0, 20), (1, 0.01, 0)):
        rows = local_rows(maps, ratio, prefix)
        assert rows.shape == (2, 1 + count) and (rows[:, 0] == 0).all()
        for b in range(2):
            best = sorted(range(prefix, 21), key=lambda i, b=b: -reached[b, i])[:count]
            assert rows[b, 1:].tolist() == sorted(best)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(784, 0.1, 78), (128, 0.3, 38), (256, 0.3, 76), (100, 0.29, 29)]
)
def test_kept_tokens_as_published(patches: int, ratio: float, kept: int):
    maps = [torch.full((1, 1 + patches, 1 + patches), 1 / (1 + patches))]
    assert local_rows(maps, ratio).shape == (1, 1 + kept)


def test_partners_are_others():
    for batch in (2, 3, 8):
        partner = random_partners(batch)
        assert partner.sort().values.tolist() == list(range(batch))
        assert (partner != torch.arange(batch)).all()
    assert random_partners(1).tolist() == [0]
    assert len({tuple(random_partners(8).tolist()) for _ in range(20)}) > 15


def test_fused_logits_are_the_mean_probability():
    a, b = torch.randn(2, 5, 11)
    fused = fused_logits(3 * a, b)
    torch.testing.assert_close(fused.softmax(-1), ((3 * a).softmax(-1) + b.softmax(-1)) / 2)
    torch.testing.assert_close(fused.exp().sum(-1), torch.ones(5))
    extreme = fused_logits(torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]]))
    torch.testing.assert_close(extreme.softmax(-1), torch.full((1, 2), 0.5))


# ---------------------------------------------------------------- the network


def test_names():
    assert sorted(timm.list_models(module="dcal")) == sorted(NAMES)
    assert sorted(timm.list_models(module="dcal", pretrained=True)) == sorted(
        [
            "dcal_deit_base_patch16_224.fb_in1k",
            "dcal_deit_small_patch16_224.fb_in1k",
            "dcal_deit_tiny_patch16_224.fb_in1k",
            "dcal_vit_base_patch16_224.augreg2_in21k_ft_in1k",
            "dcal_vit_base_patch16_224.orig_in21k_ft_in1k",
        ]
    )


@every
def test_sa_is_the_host(name: str):
    """The same names, shapes and weights' place; GLCA comes beside."""
    host = build(name.removeprefix("dcal_"), device="meta")
    model = build(name, device="meta")
    state = {n: t.shape for n, t in model.state_dict().items()}
    assert {n: s for n, s in state.items() if not n.startswith("glca")} == {
        n: t.shape for n, t in host.state_dict().items()
    }
    for key in ("mean", "std", "crop_pct", "interpolation", "input_size", "hf_hub_id", "license", "first_conv"):
        assert model.default_cfg[key] == host.default_cfg[key]
    assert model.default_cfg["classifier"] == ("head", "glca_head")


def test_sa_inference_is_bit_for_bit_the_host():
    host = small_host().eval()
    model = small(inference="sa").eval()
    model.load_state_dict(host.state_dict(), strict=False)
    x = images()
    assert torch.equal(model(x), host(x))
    assert torch.equal(model.forward_features(x), host.forward_features(x))


def test_all_patches_with_copied_weights_are_a_thirteenth_block():
    model = small(local_ratio=1.0).eval()
    model.glca.load_state_dict(model.blocks[-1].state_dict())
    deeper = small_host(depth=4).eval()
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("glca")}
    deeper.load_state_dict({**state, **{f"blocks.3.{n}": t for n, t in model.glca.state_dict().items()}})
    x = images()
    out, rows = model.local_tokens(x)
    assert rows.tolist() == [list(range(17))] * 4
    expected = deeper.norm_pre(deeper._pos_embed(deeper.patch_embed(x)))
    torch.testing.assert_close(out, deeper.blocks(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("img_size", [64, (96, 48)])
def test_local_tokens_are_the_rows_of_highest_rollout(img_size: Any):
    model = small(img_size=img_size, local_ratio=0.3).eval()
    x = images(2, 3, *((img_size, img_size) if isinstance(img_size, int) else img_size))
    out, rows = model.local_tokens(x)
    patches = model.patch_embed.num_patches
    assert rows.shape == (2, 1 + int(0.3 * patches)) and out.shape == (*rows.shape, 48)
    reached = rollout(model, x).flatten(1)
    for b in range(2):
        best = reached[b].topk(rows.shape[1] - 1).indices + 1
        assert sorted(best.tolist()) == rows[b, 1:].tolist()


def test_the_selection_does_not_reach_the_class_token():
    """One block, read at its class token: the reason why the other rows are not computed for logits."""
    model = small(local_ratio=0.5).eval()
    x = images()
    out, _ = model.local_tokens(x)
    torch.testing.assert_close(model.glca_norm(out[:, :1]), model.forward_features(x)[:, -1:], rtol=1e-4, atol=1e-5)
    by_all_rows = fused_logits(model.head(model.forward_features(x)[:, 0]), model.glca_head(model.glca_norm(out[:, 0])))
    torch.testing.assert_close(model(x), by_all_rows, rtol=1e-4, atol=1e-5)
    wanted = [p for n, p in model.named_parameters() if not n.startswith("pos")]
    ours = torch.autograd.grad(model(x)[:, 0].sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad(by_all_rows[:, 0].sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_average_pooling_of_the_local_tokens():
    model = small(local_ratio=0.3, glca_pool="avg").eval()
    x = images()
    out, rows = model.local_tokens(x)
    torch.testing.assert_close(model.forward_features(x)[:, -1], model.glca_norm(out).mean(1))
    assert not (rows == rows[0]).all(), "images ask with patches of their own"
    other = copy.deepcopy(model)
    other.local_ratio = 0.1
    assert not torch.allclose(other(x), model(x), atol=1e-4), "the selection matters"


@pytest.mark.parametrize("glca_pool", ["token", "avg"])
@pytest.mark.parametrize("inference", ["sa", "glca", "both"])
def test_inference(inference: Any, glca_pool: Any):
    model = small(glca_pool=glca_pool).eval()
    x = images()
    features = model.forward_features(x)
    assert features.shape == (4, 18, 48)
    sa, glca = model.head(features[:, 0]), model.glca_head(features[:, -1])
    model.inference = inference
    expected = {"sa": sa, "glca": glca, "both": fused_logits(sa, glca)}[inference]
    torch.testing.assert_close(model(x), expected)
    pooled = {"sa": features[:, 0], "glca": features[:, -1]}.get(inference, features[:, [0, -1]].flatten(1))
    assert model.head_hidden_size == pooled.shape[1]
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model.descriptor(x), features[:, [0, -1]].flatten(1))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    with pytest.raises(ValueError, match="inference='all': expected 'sa', 'glca' or 'both'"):
        model.inference = "all"


def test_images_of_a_batch_do_not_see_each_other():
    for glca_pool in ("token", "avg"):
        model = small(glca_pool=glca_pool).eval()
        x = images()
        torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("glca_pool", ["token", "avg"])
def test_with_and_without_gradients(glca_pool: Any):
    model = small(glca_pool=glca_pool).eval()
    x = images()
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode(), record_attention(model.blocks) as kept:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [m[0].attn.shape[-1] for m in kept.values()] == [17] * 3


def test_a_few_images_at_a_time_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch):
    """In inference all layers' maps are kept for a few images only; who records attention gets those of all."""
    model = small(glca_pool="avg").eval()
    x = images(5, 3, 64, 64)
    expected = model(x)
    calls: list[int] = []
    model.patch_embed.register_forward_hook(lambda _m, _a, out: calls.append(len(out)))
    monkeypatch.setattr("vision.dcal.dcal._NUMBERS_AT_ONCE", 2 * x[0].numel())
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert calls == [2, 2, 1]
        with record_attention(model.blocks) as kept:
            model(x)
    assert [len(maps) for maps in kept.values()] == [1] * 3 and calls[3:] == [5]


@pytest.mark.parametrize("glca_pool", ["token", "avg"])
def test_every_parameter_learns_from_plain_training(glca_pool: Any):
    model = small(num_classes=42, glca_pool=glca_pool, drop_path_rate=0.2).train()
    out = model(images())
    assert out.shape == (4, 42)
    out.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("glca_pool", ["token", "avg"])
def test_gradient_checkpointing(glca_pool: Any):
    model = small(glca_pool=glca_pool).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x, partner = images(), torch.tensor([1, 2, 3, 0])
    for m in (model, twin):
        logits, _ = m(x, branches=True, partner=partner)
        (torch.stack(logits).square().mean() + m(x).square().mean()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_branches():
    model = small().train()
    x = images()
    partner = torch.tensor([3, 0, 1, 2])
    logits, features = model(x, branches=True, partner=partner)
    torch.testing.assert_close(model(x), fused_logits(logits[0], logits[1]))
    torch.testing.assert_close(torch.cat(features[:2], 1), model.descriptor(x))
    # both streams of a pair, block by block, by hand
    stream = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        normed = block.norm1(stream)
        rows = torch.arange(17).expand(4, -1)
        stream = stream + slow_attention(block.attn, normed, rows, normed[partner])
        stream = stream + block.mlp(block.norm2(stream))
    torch.testing.assert_close(features[2], model.norm(stream)[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[2], model.head(features[2]))


def test_a_pair_of_equal_images_is_plain_self_attention():
    model = small().train()
    x = images(1, 3, 64, 64).expand(4, -1, -1, -1)
    logits, features = model(x, branches=True)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[2], features[0], rtol=1e-4, atol=1e-5)
    alone = model(images(1, 3, 64, 64), branches=True).logits
    torch.testing.assert_close(alone[2], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (48, 80)])
def test_image_sizes(size: tuple[int, int]):
    model = small(img_size=size, glca_pool="avg").eval()
    x = images(2, 3, *size)
    assert model(x).shape == (2, 7)
    model.set_input_size((96, 64))
    assert model(images(1, 3, 96, 64)).shape == (1, 7)
    dynamic = small(img_size=64, glca_pool="avg", dynamic_img_size=True).eval()
    assert dynamic(x).shape == (2, 7)


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    ("host", "kwargs", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("deit3_small_patch16_224", {}, 1),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, 5),
        ("vit_base_patch16_clip_224", {"qk_norm": True}, 1),
        ("vit_tiny_r_s16_p8_224", {"img_size": 128}, 1),  # convolutions in front, like the paper's R50-ViT
    ],
)
def test_any_transformer_becomes_a_dcal(host: str, kwargs: dict, prefix: int):
    vit = sharpened(build(host, **{**SMALL, **kwargs})).eval()
    state = copy.deepcopy(vit.state_dict())
    x = images(4, 3, *vit.patch_embed.img_size)
    expected = vit(x)
    model = DCAL.from_vit(vit, local_ratio=0.3, glca_pool="avg")
    assert type(vit.blocks[0]) is Block and type(vit.blocks[0].attn) is Attention and torch.equal(vit(x), expected)
    assert list(vit.state_dict()) == list(state) and not model.training
    model.inference = "sa"
    torch.testing.assert_close(model(x), expected)
    model.inference = "both"
    rows = model.local_tokens(x)[1]
    assert rows.shape == (4, 1 + 4) and (rows[:, 1:] >= prefix).all()
    for ours, theirs in ((model.glca, vit.blocks[-1]), (model.glca_head, vit.head)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    model.train()(x).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in vit.parameters())


def test_hosts_that_cannot():
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
    with pytest.raises(TypeError, match="got VisionTransformerDistilled"):
        DCAL.from_vit(build("deit_tiny_distilled_patch16_224", **tiny))
    with pytest.raises(TypeError, match="got ResNet"):
        DCAL.from_vit(build("resnet18"))
    with pytest.raises(TypeError, match="got DCAL"):
        DCAL.from_vit(small())
    with pytest.raises(TypeError, match="ParallelScalingBlock"):
        DCAL.from_vit(build("vit_little_patch16_reg4_gap_256", block_fn=ParallelScalingBlock, **tiny))
    with pytest.raises(ValueError, match="pools by 'avg' and has no class token"):
        DCAL.from_vit(build("vit_little_patch16_reg4_gap_256", **tiny))
    with pytest.raises(ValueError, match="pools by 'avg'; DCAL needs"):
        DCAL.from_vit(build("vit_tiny_patch16_224", global_pool="avg", **tiny))


def test_bad_arguments():
    for bad, message in (
        ({"inference": "x"}, "inference='x'"),
        ({"local_ratio": 0.0}, "local_ratio=0.0"),
        ({"local_ratio": 1.5}, "local_ratio=1.5"),
        ({"glca_pool": "max"}, "glca_pool='max'"),
        ({"global_pool": "avg"}, "global_pool='avg' with 7 classes"),
        ({"global_pool": ""}, "global_pool='' with 7 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**bad)
    with pytest.raises(ValueError, match="global_pool='map'"):
        small().reset_classifier(3, "map")
    with pytest.raises(TypeError, match="not_a_model_arg"):
        small(not_a_model_arg=1)


# ---------------------------------------------------------------- weights


def test_starts_from_the_hosts_own_file(tmp_path: Path):
    host = small_host(num_classes=1000).eval()
    file = tmp_path / "host.pth"
    torch.save({"model": host.state_dict()}, file)
    tiny = {k: v for k, v in SMALL.items() if k != "num_classes"}
    model = build(NAMES[0], pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **tiny).eval()
    x = images()
    model.inference = "sa"
    assert torch.equal(model(x), host(x))
    for ours, theirs in ((model.glca, host.blocks[-1]), (model.glca_norm, host.norm), (model.glca_head, host.head)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    other = build(
        NAMES[0],
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        **{**tiny, "num_classes": 5, "in_chans": 1, "img_size": (96, 64)},
    )
    assert other.glca_head.weight.shape == (5, 48) and other.pos_embed.shape[1] == 25
    assert torch.equal(other.glca.mlp.fc1.weight, host.blocks[-1].mlp.fc1.weight)


def test_own_weights_load_as_they_are(tmp_path: Path):
    model = small(local_ratio=0.3, inference="glca", glca_pool="avg").eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = build(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images()
    assert torch.equal(loaded(x), model(x)) and loaded.inference == "glca"
    model.inference = "both"
    model.set_input_size((96, 64))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = build(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(2, 3, 96, 64)
    assert torch.equal(loaded(x), model(x)) and loaded.inference == "both"


def test_a_wrapped_host_saves_under_the_registered_name(tmp_path: Path):
    model = DCAL.from_vit(small_host(), glca_pool="token").eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    x = images()
    assert torch.equal(build(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


# ---------------------------------------------------------------- timm's surface


def test_intermediates():
    for glca_pool in ("token", "avg"):
        model = small(glca_pool=glca_pool).eval()
        host = small_host().eval()
        host.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("glca")})
        x = images(2, 3, 64, 64)
        for options in (
            {},
            {"indices": 2, "norm": True},
            {"indices": [0, 2], "output_fmt": "NLC", "return_prefix_tokens": True},
            {"indices": [1], "stop_early": True},
        ):
            ours = model.forward_intermediates(x, intermediates_only=True, **options)
            theirs = host.forward_intermediates(x, intermediates_only=True, **options)
            torch.testing.assert_close(ours, theirs)
            final, ours = model.forward_intermediates(x, **options)
            torch.testing.assert_close(ours, theirs)
            if options.get("stop_early"):
                torch.testing.assert_close(final, host.forward_intermediates(x, **options)[0])
            else:
                torch.testing.assert_close(final, model.forward_features(x))
        named = model.forward_intermediates(x, output_dict=True, return_prefix_tokens=True)
        theirs = host.forward_intermediates(x, output_dict=True, return_prefix_tokens=True)
        assert named.keys() == theirs.keys()
        torch.testing.assert_close(named["image_intermediates_prefix"], theirs["image_intermediates_prefix"])
        with pytest.raises(ValueError, match="output_fmt='NHWC'"):
            model.forward_intermediates(x, output_fmt="NHWC")


def test_features_only():
    model = build(NAMES[0], features_only=True, **SMALL).train()
    assert model.feature_info.channels() == [48] * 3 and model.feature_info.reduction() == [16] * 3
    maps = model(images(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 48, 4, 4)] * 3
    torch.stack(maps).mean().backward()
    assert not [n for n, _ in model.named_parameters() if "glca" in n], "no weights that nothing reaches"


def test_pruning():
    model = small().eval()
    x = images()
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True), expected)
    assert len(model.blocks) == 2 and not [n for n, _ in model.named_parameters() if "glca" in n]


@every
def test_layers_for_layer_decay(name: str):
    model = build(name, device="meta")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups["patch_embed.proj.weight"] == 0 and groups["blocks.11.mlp.fc1.weight"] == 12
    assert groups["norm.weight"] == 12 and groups["glca.attn.qkv.weight"] == groups["glca_norm.weight"] == 13
    assert groups["head.weight"] == groups["glca_head.weight"] == 14
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()} | {"reg_token", "dist_token"}


def test_classifiers():
    model = small().eval()
    assert model.get_classifier() == (model.head, model.glca_head)
    model.reset_classifier(5)
    assert [c.out_features for c in model.get_classifier()] == [5, 5] and model(images()).shape == (4, 5)
    assert not model.glca_head.training
    model.reset_classifier(0, "")
    x = images()
    torch.testing.assert_close(model(x), model.forward_features(x))


# ---------------------------------------------------------------- cost


def multiply_adds(model: Any, size: tuple[int, int], call: Any = None) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        (call or model)(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops() / 2


@every
def test_published_size(name: str):
    """A block, a norm and a classifier of 200 species on top of the published host: 8.4 to 8.5 %."""
    host = sum(p.numel() for p in build(name.removeprefix("dcal_"), device="meta").parameters())
    model = build(name, num_classes=200, device="meta")
    added = sum(p.numel() for n, p in model.named_parameters() if n.startswith("glca"))
    assert 0.0835 < added / host < 0.0855


@pytest.mark.parametrize(
    ("size", "ratio", "low", "high"),
    [((448, 448), 0.1, 0.016, 0.019), ((256, 128), 0.3, 0.033, 0.035), ((256, 256), 0.3, 0.033, 0.035)],
)
@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_published_cost(name: str, size: tuple[int, int], ratio: float, low: float, high: float):
    """Of the whole GLCA block; reading its class token alone costs less, and SA alone nothing."""
    kwargs: dict[str, Any] = {"img_size": size, "num_classes": 200, "device": "meta"}
    host = multiply_adds(build(name.removeprefix("dcal_"), **kwargs).eval(), size)
    model = build(name, local_ratio=ratio, **kwargs).eval()
    whole = multiply_adds(model, size, model.local_tokens)
    assert low - 5e-4 < whole / host - 1 < high + 5e-4
    assert 0.005 < multiply_adds(model, size) / host - 1 < 0.02
    model.inference = "sa"
    assert multiply_adds(model, size) == host


# ---------------------------------------------------------------- criterion


def test_criterion():
    model, criterion = small().train(), DCALCriterion(label_smoothing=0.1)
    with torch.no_grad():
        criterion.log_vars.copy_(torch.tensor([0.5, -0.3, 1.0]))
    x, target = images(), torch.tensor([1, 0, 6, 1])
    torch.manual_seed(3)
    step = criterion(model, x, target)
    torch.manual_seed(3)
    logits, _ = model(x, branches=True)
    losses = [F.cross_entropy(part, target, label_smoothing=0.1) for part in logits]
    w = criterion.log_vars.tolist()
    expected = sum(math.exp(-a) * loss + a for a, loss in zip(w, losses, strict=True)) / 2
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.logits, fused_logits(logits[0], logits[1]))
    assert list(step.parts) == ["sa", "glca", "pwca"] and not step.logits.requires_grad
    assert all(not p.requires_grad and torch.equal(p, x) for p, x in zip(step.parts.values(), losses, strict=True))
    step.loss.backward()
    for name, p in [*model.named_parameters(), *criterion.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all(), name
    # at L the best w is log L: the derivative of the loss by w
    torch.testing.assert_close(
        criterion.log_vars.grad,
        torch.stack([(1 - math.exp(-a) * x.detach()) / 2 for a, x in zip(w, losses, strict=True)]),
    )


def test_criterion_runs_the_model_once_in_any_wrapper():
    model = small().train()
    calls = []
    model.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    step = DCALCriterion()(nn.DataParallel(model), images(), torch.rand(4, 7).softmax(-1))
    assert calls == [4] and step.loss.isfinite() and "_triplet" not in "".join(step.parts)


def slow_triplets(features: torch.Tensor, target: torch.Tensor, margin: float) -> torch.Tensor:
    losses = []
    for i in range(len(target)):
        far = [(features[i] - features[j]).norm() for j in range(len(target)) if j != i and target[j] == target[i]]
        near = [(features[i] - features[j]).norm() for j in range(len(target)) if target[j] != target[i]]
        if far and near:
            losses.append((max(far) - min(near) + margin).clamp(min=0))
    return torch.stack(losses).mean() if losses else features.sum() * 0


@pytest.mark.parametrize("target", [[0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]])
def test_triplets(target: list[int]):
    features = torch.randn(6, 8, dtype=torch.float32, requires_grad=True)
    labels = torch.tensor(target)
    ours, slow = batch_hard_triplet_loss(features, labels, 0.4), slow_triplets(features, labels, 0.4)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in (ours, slow)))


def test_triplets_of_equal_features_have_finite_gradients():
    features = torch.ones(4, 8, requires_grad=True)
    batch_hard_triplet_loss(features, torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_criterion_for_reidentification():
    model, criterion = small().train(), DCALCriterion(triplet_margin=0.3)
    x, target = images(), torch.tensor([1, 1, 3, 3])
    torch.manual_seed(3)
    step = criterion(model, x, target)
    torch.manual_seed(3)
    logits, features = model(x, branches=True)
    terms = [F.cross_entropy(a, target) + slow_triplets(b, target, 0.3) for a, b in zip(logits, features, strict=True)]
    torch.testing.assert_close(step.loss, sum(terms) / 2)
    assert list(step.parts) == ["sa", "glca", "pwca", "triplet_sa", "triplet_glca", "triplet_pwca"]


def test_criterion_learns_to_tell_two_kinds_apart():
    torch.manual_seed(0)
    model, criterion = build(NAMES[0], **{**SMALL, "num_classes": 2}).train(), DCALCriterion()
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=2e-3)
    target = torch.arange(8) % 2
    x = images(8, 3, 64, 64) + (2 * target - 1).view(-1, 1, 1, 1)
    first = criterion(model, x, target).loss.item()
    for _ in range(12):
        optimizer.zero_grad()
        step = criterion(model, x, target)
        step.loss.backward()
        optimizer.step()
    assert step.loss.item() < 0.6 * first
    assert (model.eval()(x).argmax(1) == target).all()


def test_what_the_criterion_refuses():
    target = torch.tensor([0, 1, 2, 3])
    with pytest.raises(TypeError, match="got VisionTransformer; see"):
        DCALCriterion()(small_host(), images(), target)
    with pytest.raises(ValueError, match="needs classifiers"):
        DCALCriterion()(small(num_classes=0), images(), target)
    with pytest.raises(ValueError, match="triplets need class indices"):
        DCALCriterion(triplet_margin=0.3)(small(), images(), torch.rand(4, 7))
    with pytest.raises(ValueError, match="expected class indices"):
        DCALCriterion()(small(), images(), torch.rand(4, 3))


# ---------------------------------------------------------------- out of eager mode

pools = pytest.mark.parametrize("glca_pool", ["token", "avg"])


def traced(model: nn.Module) -> nn.Module:
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    node = get_graph_node_names(model, tracer_kwargs=leaves)[not model.training][-1]
    return create_feature_extractor(model, {node: "out"}, tracer_kwargs=leaves)


@pools
def test_symbolic_trace(glca_pool: Any):
    model = small(glca_pool=glca_pool).train()
    x = images()
    graph = traced(copy.deepcopy(model))
    out, expected = graph(x)["out"], model(x)
    assert torch.equal(out, expected)
    out.square().mean().backward()
    expected.square().mean().backward()
    gradients = {n: p.grad for n, p in graph.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


@torch.no_grad()
def test_export_and_onnx(tmp_path: Path):
    model = small(glca_pool="avg", depth=2).eval()  # has all that the other has, and the selection
    x = images(2, 3, 64, 64)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (x,), dynamic_shapes=dynamic).module()
    file = str(tmp_path / "dcal.onnx")
    torch.onnx.export(model, (x,), file, dynamo=True, opset_version=18, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for y in (x, images(5, 3, 64, 64)):
        torch.testing.assert_close(exported(y), model(y), rtol=1e-4, atol=1e-5)
        (out,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        np.testing.assert_allclose(np.asarray(out), model(y).numpy(), rtol=1e-3, atol=1e-4)


@pools
def test_compile_takes_it_as_one_graph(glca_pool: Any):
    model = small(glca_pool=glca_pool, depth=2).train()
    x, partner = images(), torch.tensor([1, 2, 3, 0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(compiled(x, True, partner).logits, model(x, True, partner).logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pools
def test_autocast(glca_pool: Any):
    model = small(glca_pool=glca_pool).eval()
    x = images()
    with torch.no_grad():
        expected = model(x).exp()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x).float().exp(), expected, rtol=0.1, atol=0.03)
        half = copy.deepcopy(model).bfloat16()
        torch.testing.assert_close(half(x.bfloat16()).float().exp(), expected, rtol=0.2, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        DCALCriterion()(model, x, torch.tensor([0, 1, 2, 3])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
