"""The segmentation network of polarized self-attention: its head, its scales, its training objective."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vision.attention import record_attention
from vision.psa import (
    MultiScaleLoss,
    ObjectContextHead,
    PolarizedBasicBlock,
    PyramidConv2d,
    fuse_scales,
    hrnet_ocr,
)

NAME = "psa_hrnet_nano_ocr"


def create(**kwargs: Any) -> Any:
    return timm.create_model(NAME, **{"num_classes": 5, **kwargs})


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 64, 96))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("sizes", [[(16, 24), (8, 12), (4, 6), (2, 3)], [(15, 9), (8, 5), (4, 3), (7, 9)], [(6, 6)]])
def test_convolution_of_a_pyramid_is_that_of_the_resized_maps(kernel_size: int, sizes: list[tuple[int, int]]):
    channels = [5, 7, 11, 40][: len(sizes)]
    conv: Any = PyramidConv2d(sum(channels), 6, kernel_size).double()
    maps = [
        torch.randn(2, c, *size, dtype=torch.double, requires_grad=True)
        for c, size in zip(channels, sizes, strict=True)
    ]
    resized = [F.interpolate(x, sizes[0], mode="bilinear", align_corners=False) for x in maps]
    expected = F.conv2d(torch.cat(resized, 1), conv.weight, conv.bias, padding=kernel_size // 2)
    y = conv(maps)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(y)
    inputs = [*maps, *conv.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((y * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_each_map_takes_the_cheaper_way():
    conv: Any = PyramidConv2d(720, 512, 3, device="meta")
    shape = lambda *size: torch.empty(1, *size, device="meta")  # noqa: E731
    small = [shape(96, 28, 28), shape(192, 14, 14), shape(384, 7, 7)]
    assert [conv.is_cheaper_small(x, (56, 56)) for x in small] == [True, True, True]
    large = [shape(48, 256, 512), shape(96, 128, 256), shape(192, 64, 128), shape(384, 32, 64)]
    assert [conv.is_cheaper_small(x, (256, 512)) for x in large] == [False, False, True, True]


def test_head_follows_the_formulas():
    head = ObjectContextHead(12, num_classes=3, num_regions=4, channels=8, key_channels=6).eval()
    maps = [torch.randn(2, 8, 6, 5), torch.randn(2, 4, 3, 3)]
    features, regions = head(maps)
    pixels = head.conv3x3_ocr(maps)
    belongs = regions.flatten(2).softmax(-1)  # [B, K, P]
    objects = torch.einsum("bkp,bcp->bck", belongs, pixels.flatten(2))[..., None]
    block = head.ocr_distri_head.object_context_block
    q, k, v = block.f_pixel(pixels), block.f_object(objects), block.f_down(objects)
    attn = (torch.einsum("bdp,bdk->bpk", q.flatten(2), k.flatten(2)) * 6**-0.5).softmax(-1)
    context = block.f_up(torch.einsum("bpk,bdk->bdp", attn, v.flatten(2)).unflatten(2, (6, 5)))
    expected = head.ocr_distri_head.conv_bn_dropout(torch.cat([context, pixels], 1))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    with record_attention(head) as layers:
        recorded, _ = head(maps)
    torch.testing.assert_close(recorded, features, rtol=1e-4, atol=1e-5)
    ((kept,),) = layers.values()
    torch.testing.assert_close(kept.attn[:, 0], attn, rtol=1e-4, atol=1e-6)


def test_fusion_keeps_the_higher_scale_where_the_lower_is_not_trusted():
    maps = [torch.full((1, 2, side, side), value) for side, value in ((8, 1.0), (4, 2.0), (2, 3.0))]
    ones, zeros = ([torch.full((1, 1, s, s), v) for s in (8, 4, 2)] for v in (1.0, 0.0))
    scales = (2.0, 1.0, 0.5)
    assert torch.equal(fuse_scales(scales, maps, zeros), torch.full((1, 2, 4, 4), 1.0))
    assert torch.equal(fuse_scales(scales, maps, ones), torch.full((1, 2, 4, 4), 3.0))
    mixed = fuse_scales(scales, maps, [ones[0], 0.25 * ones[1], 0.5 * ones[2]])
    assert torch.allclose(mixed, torch.tensor(0.5 * 3 + 0.5 * (0.25 * 2 + 0.75 * 1)))


@pytest.mark.parametrize("kwargs", [{}, {"layout": "sequential"}, {"multi_scale": False}, {"form": "paper"}])
def test_every_parameter_is_trained(kwargs: dict[str, Any]):
    model = create(**kwargs).train()
    out = model(images())
    assert out.shape == (2, 5, 64, 96) and out.isfinite().all()
    out.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("size", [(32, 32), (97, 41), (40, 150)])
@pytest.mark.parametrize("multi_scale", [True, False])
def test_any_size_and_images_do_not_see_each_other(size: tuple[int, int], multi_scale: bool):
    model = create(multi_scale=multi_scale).eval()
    x = images(3, 3, *size)
    with torch.inference_mode():
        y = model.predict(x)
        assert y.shape == (3, 5, *size) and y.isfinite().all()
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y[2:], model.predict(x[2:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multi_scale", [True, False])
def test_a_batch_taken_in_parts_gives_what_it_gives_at_once(multi_scale: bool, monkeypatch: pytest.MonkeyPatch):
    model = create(multi_scale=multi_scale).eval()
    x = images(5, 3, 64, 64)
    whole = model(x)
    assert whole.requires_grad
    calls: list[int] = []
    model.ocr.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0][0])))
    monkeypatch.setattr(hrnet_ocr, "_PIXELS_AT_ONCE", 2 * 64 * 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), whole.detach(), rtol=1e-4, atol=1e-5)
        assert sum(calls) == 5 * (1 + multi_scale) and max(calls) == 2, "the parts were really taken"
        model.train()(x)
    assert calls[-1] == 5, "in training the norms need the whole batch"


def test_forward_is_two_scales_and_predict_three():
    model = create().eval()
    x = images()
    with torch.no_grad():
        low, one, two = (model.predict_scale(x, scale) for scale in (0.5, 1.0, 2.0))
        assert low.attention is not None and one.attention is not None
        assert low.logits.shape == (2, 5, 32, 48) and two.logits.shape == (2, 5, 128, 192)
        up = lambda t: F.interpolate(t, (64, 96), mode="bilinear", align_corners=False)  # noqa: E731
        pair = up(low.attention * low.logits) + (1 - up(low.attention)) * one.logits
        torch.testing.assert_close(model(x), pair, rtol=1e-5, atol=1e-6)
        fused = one.attention * one.logits + (1 - one.attention) * up(two.logits)
        fused = up(low.attention * low.logits) + (1 - up(low.attention)) * fused
        torch.testing.assert_close(model.predict(x), fused, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.predict(x, (1.0,)), one.logits)
        assert model.predict(x, (0.5, 2.0)).shape == (2, 5, 64, 96)


def test_single_scale_network_averages_probabilities_over_scales():
    model = create(multi_scale=False).eval()
    x = images()
    with torch.no_grad():
        assert model.scales == (1.0,) and torch.equal(model.predict(x), model(x))
        probabilities = [F.interpolate(model(F.interpolate(x, scale_factor=s, mode="bilinear")), (64, 96),
                         mode="bilinear").softmax(1) for s in (1.0, 2.0)]  # fmt: skip
        got = model.predict(x, (1.0, 2.0)).softmax(1)
    torch.testing.assert_close(got, sum(probabilities, torch.zeros(())) / 2, rtol=1e-4, atol=1e-5)


def test_surface_of_timm():
    model = create(in_chans=4).eval()
    x = images(2, 4, 64, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        assert sum(f.shape[1] for f in features) == model.num_features == 120
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, model.head_hidden_size, 16, 24)
        logits = model.get_classifier()(hidden)
        torch.testing.assert_close(model.forward_head(features), logits)
        final, maps = model.forward_intermediates(x, indices=[0, 2])
        assert torch.equal(maps[1], final[2]) and torch.equal(maps[0], features[0])
        assert len(model.forward_intermediates(x, 1, intermediates_only=True)) == 1
    assert model.no_weight_decay() == set()
    with pytest.raises(ValueError, match="expected 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="low_scale=2"):
        create(low_scale=2.0)
    with pytest.raises(TypeError, match="not_a_model_arg"):
        create(not_a_model_arg=1)


def test_reset_classifier():
    model = create().eval()
    model.backbone.requires_grad_(False)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(images()).shape == (2, 7, 64, 96)
    assert model(images(), detailed=True).aux_logits.shape == (2, 7, 64, 96)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images()).shape == (2, model.head_hidden_size, 64, 96)
    assert create(num_classes=0)(images()).shape == (2, 32, 64, 96)
    assert not any(m.training for m in model.modules()) and not any(
        p.requires_grad for p in model.backbone.parameters()
    )
    with pytest.raises(ValueError, match="each pixel is classified"):
        model.reset_classifier(3, "avg")


def test_features_only_needs_no_head():
    model: Any = timm.create_model(NAME, features_only=True, out_indices=(0, 3))
    assert model.feature_info.channels() == [8, 64] and model.feature_info.reduction() == [4, 32]
    assert [tuple(m.shape) for m in model(images())] == [(2, 8, 16, 24), (2, 64, 2, 3)]
    assert not any("ocr." in name or "scale_attn." in name for name, _ in model.named_parameters())


def test_layer_groups_cover_all_parameters_in_order():
    model = create(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    fine = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(fine) == set(coarse) == {n for n, _ in model.named_parameters()}
    order = ["conv1", "layer1.0.conv1", *(f"stage{n}.0.branches.0.0.conv1" for n in (2, 3, 4))]
    for groups in (fine, coarse):
        layers = [groups[f"backbone.{key}.weight"] for key in order]
        assert layers == sorted(set(layers)) and groups["ocr.cls_head.weight"] == max(groups.values()) > layers[-1]


def test_saved_and_loaded_again_also_for_other_classes(tmp_path: Path):
    model = create(layout="sequential").eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    x = images()
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))
    other: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert other(x).shape == (2, 3, 64, 96)
    assert torch.equal(other.backbone.conv1.weight, model.backbone.conv1.weight)


def test_checkpointing_has_the_same_gradients():
    model = create().train()
    for drop in (m for m in model.modules() if isinstance(m, nn.Dropout2d)):
        drop.p = 0
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images()
    for net in (model, twin):
        net(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_objective_is_the_published_sum():
    model = create().eval()
    x, target = images(), torch.randint(5, (2, 64, 96))
    target[:, :10] = 255
    step = MultiScaleLoss(0.4, 0.05)(model, x, target)
    cross_entropy = lambda logits: F.cross_entropy(logits, target, ignore_index=255)  # noqa: E731
    up = lambda t: F.interpolate(t, (64, 96), mode="bilinear", align_corners=False)  # noqa: E731
    low, one = model.predict_scale(x, 0.5), model.predict_scale(x, 1.0)
    assert low.attention is not None
    first = F.interpolate(low.regions, (32, 48), mode="bilinear", align_corners=False)
    aux = up(low.attention * first) + (1 - up(low.attention)) * up(one.regions)
    terms = {
        "main": cross_entropy(model(x)),
        "aux": cross_entropy(aux),
        "scale_1": cross_entropy(one.logits),
        "scale_0.5": cross_entropy(up(low.logits)),
    }
    for name, term in terms.items():
        torch.testing.assert_close(step.parts[name], term.detach(), msg=lambda m, name=name: f"{name}: {m}")
    total = terms["main"] + 0.4 * terms["aux"] + 0.05 * (terms["scale_1"] + terms["scale_0.5"])
    torch.testing.assert_close(step.loss, total)
    assert step.logits.shape == (2, 5, 64, 96) and not step.logits.requires_grad
    single = MultiScaleLoss()(create(multi_scale=False).eval(), x, target)
    assert set(single.parts) == {"main", "aux"} and set(step.parts) == set(terms)


def test_it_learns_to_tell_pixels_apart():
    """A few steps: bright pixels are one class, dark ones another."""
    model = create(num_classes=2).train()
    criterion = MultiScaleLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    coarse = torch.randint(2, (4, 1, 4, 4)).float()
    x = F.interpolate(2 * coarse - 1, scale_factor=16.0).expand(-1, 3, -1, -1)
    target = (x[:, 0] > 0).long()
    losses = []
    for _ in range(15):
        step = criterion(model, x, target)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < 0.4 * losses[0], losses


@pytest.mark.parametrize("multi_scale", [True, False])
def test_symbolic_trace_and_autocast(multi_scale: bool):
    model = create(multi_scale=multi_scale).eval()
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    node = get_graph_node_names(model, tracer_kwargs=leaves)[1][-1]
    graph = create_feature_extractor(model, {node: "out"}, tracer_kwargs=leaves)
    x = images()
    with torch.inference_mode():
        y = model(x)
        assert torch.equal(graph(x)["out"], y)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
    assert low.isfinite().all() and (low - y).abs().mean() < 0.05 * y.abs().mean()


@torch.no_grad()
def test_torch_export():
    model = create(multi_scale=False).eval()
    x = images()
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (x,), dynamic_shapes=batch).module()
    for images_at_once in (1, 3):
        x = images(images_at_once, 3, 64, 96)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


class Parts(nn.Module):
    """What is ours to compile, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.parallel = PolarizedBasicBlock(8, 8)
        self.sequential = PolarizedBasicBlock(8, 8, layout="sequential")
        self.head = ObjectContextHead(16, 3, 3, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sequential(self.parallel(x))
        features, _ = self.head([x, F.avg_pool2d(y, 2)])
        return self.head.cls_head(features)


def test_parts_compile_to_one_graph_with_the_same_gradients():
    parts = Parts().eval()
    twin = copy.deepcopy(parts)
    x = torch.randn(2, 8, 16, 12)
    y = parts(x)
    z = torch.compile(twin, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    for out in (y, z):
        out.square().mean().backward()
    for (name, p), q in zip(parts.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def assert_onnx_equals(model: nn.Module, x: Tensor, folder: Path) -> None:
    file = str(folder / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    out: Any
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, model(x).numpy(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_onnx_of_the_parts(tmp_path: Path):
    assert_onnx_equals(Parts().eval(), torch.randn(2, 8, 16, 12), tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_the_network(tmp_path: Path):
    assert_onnx_equals(create(layout="sequential").eval(), images(), tmp_path)


@pytest.mark.slow
def test_network_compiles_to_one_graph():
    model = create().eval()
    x = images()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
