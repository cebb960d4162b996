"""ELA: the operator, where it plugs into timm, its insertion into built networks, the registered ones."""

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
import torchvision
from timm.layers import create_attn
from timm.layers.coord_attn import EfficientLocalAttn
from timm.models import save_for_hf
from torch import nn

from vision.ela import EfficientLocalAttention, InsertedAttention, ela_maps, insert

VARIANTS = ["t", "b", "s", "l"]
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **kwargs)


def slow_ela(layer: EfficientLocalAttention, x: torch.Tensor) -> torch.Tensor:
    """The paper's steps, strip by strip and group by group."""

    def gate(strip: torch.Tensor) -> torch.Tensor:  # [B, C, L]
        C, k, groups = strip.shape[1], layer.conv.kernel_size[0], layer.conv.groups
        width = C // groups
        padded = F.pad(strip, (k // 2, k // 2))
        z = torch.zeros_like(strip)
        for c in range(C):
            first = c // width * width
            for offset in range(k):
                taps = layer.conv.weight[c, :, offset, None]  # [width, 1]
                z[:, c] += (taps * padded[:, first : first + width, offset : offset + strip.shape[2]]).sum(1)
        grouped = z.unflatten(1, (layer.norm.num_groups, -1))
        mean = grouped.mean((2, 3), keepdim=True)
        var = grouped.var((2, 3), unbiased=False, keepdim=True)
        z = ((grouped - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
        return 1 / (1 + torch.exp(-(z * layer.norm.weight[:, None] + layer.norm.bias[:, None])))

    rows, columns = gate(x.sum(3) / x.shape[3]), gate(x.sum(2) / x.shape[2])
    return torch.stack([x[:, :, i] * rows[:, :, i, None] * columns for i in range(x.shape[2])], dim=2)


def trained(layer: EfficientLocalAttention) -> EfficientLocalAttention:
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    return layer


@variants
@pytest.mark.parametrize("size", [(9, 5), (6, 6), (1, 7), (2, 1)])
def test_equals_the_slow_reference(variant: Any, size: tuple[int, int]):
    layer = trained(EfficientLocalAttention(16, variant)).double()
    x = torch.randn(2, 16, *size, dtype=torch.double, requires_grad=True)
    y = torch.randn_like(x)
    parameters = [x, *layer.parameters()]
    ours, slow = layer(x), slow_ela(layer, x)
    torch.testing.assert_close(ours, slow)
    for a, b in zip(
        torch.autograd.grad((ours * y).sum(), parameters),
        torch.autograd.grad((slow * y).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@variants
def test_channels_last_has_the_same_numbers_and_keeps_its_layout(variant: Any):
    layer = trained(EfficientLocalAttention(16, variant))
    x = torch.randn(3, 16, 9, 7)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    x.requires_grad_()
    ours, theirs = layer(last), layer(x)
    assert ours.is_contiguous(memory_format=torch.channels_last) and theirs.is_contiguous()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), last)[0], torch.autograd.grad(theirs.square().sum(), x)[0]
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_skip", [False, True])
def test_inference_reuses_memory_and_leaves_its_input_alone(layout: torch.memory_format, has_skip: bool):
    layer = trained(EfficientLocalAttention(16, has_skip=has_skip))
    x = torch.randn(3, 16, 9, 7).to(memory_format=layout)
    before, expected = x.clone(), layer(x)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected.detach())
    assert torch.equal(x, before) and expected.requires_grad


@pytest.mark.parametrize(("variant", "per_channel"), [("t", 7), ("b", 9), ("s", 42), ("l", 58)])
def test_parameters_per_channel(variant: Any, per_channel: int):
    for channels in (64, 960):
        layer = EfficientLocalAttention(channels, variant, device="meta")
        assert sum(p.numel() for p in layer.parameters()) == per_channel * channels


def test_gates_of_one_half_give_a_quarter():
    layer = EfficientLocalAttention(16)
    nn.init.zeros_(layer.norm.weight)
    x = torch.randn(2, 16, 5, 8)
    assert torch.equal(layer(x), x / 4)
    skip = EfficientLocalAttention(16, has_skip=True)
    nn.init.zeros_(skip.norm.weight)
    torch.testing.assert_close(skip(x), x * 1.25)


def test_statistics_of_the_two_directions_are_apart():
    layer = EfficientLocalAttention(16)
    x = torch.randn(2, 16, 6, 6)
    rows, columns = layer.gates(x)
    torch.testing.assert_close(layer.gates(x.mT)[0], columns)
    # stretching one profile must not move the gates of the other
    other = x + 100 * torch.linspace(-1, 1, 6)[:, None]
    torch.testing.assert_close(layer.gates(other)[1], columns, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(layer.gates(other)[0], rows, atol=1e-2)


@pytest.mark.parametrize(
    ("channels", "variant", "groups", "num_groups"),
    [
        (144, "t", 144, 24),
        (96, "t", 96, 32),
        (144, "b", 144, 16),
        (144, "l", 18, 16),
        (12, "s", 12, 12),
        (7, "l", 7, 7),
        (1, "b", 1, 1),
    ],
)
def test_every_width_works_and_the_repr_says_how(channels: int, variant: Any, groups: int, num_groups: int):
    layer = EfficientLocalAttention(channels, variant)
    assert (layer.conv.groups, layer.norm.num_groups) == (groups, num_groups)
    assert f"num_groups={num_groups}" in repr(layer) and f"groups={groups}" in repr(layer)
    assert ("does not divide" in repr(layer)) == (num_groups not in (16, 32))
    assert layer(torch.randn(2, channels, 4, 6)).isfinite().all()


def test_arguments():
    layer = EfficientLocalAttention(12, kernel_size=3, groups=4, num_groups=6, rd_ratio=0.25, act_layer=nn.ReLU)
    assert (layer.conv.kernel_size, layer.conv.groups, layer.norm.num_groups) == ((3,), 4, 6)
    with pytest.raises(TypeError, match="no argument kernel_szie"):
        EfficientLocalAttention(12, kernel_szie=3)
    with pytest.raises(ValueError, match="variant='xl': expected one of 't', 'b', 's', 'l'"):
        EfficientLocalAttention(12, "xl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel_size=4 must be odd"):
        EfficientLocalAttention(12, kernel_size=4)
    with pytest.raises(ValueError, match="groups=5 must divide the 12 channels"):
        EfficientLocalAttention(12, groups=5)
    with pytest.raises(ValueError, match="num_groups=8 must divide the 12 channels"):
        EfficientLocalAttention(12, num_groups=8)


def test_timms_own_ela_is_another_layer():
    theirs = create_attn("ela", 64)
    assert type(theirs) is EfficientLocalAttn
    assert sum(p.numel() for p in theirs.parameters()) == 18 * 64
    ours = create_attn(EfficientLocalAttention, 64)
    assert type(ours) is EfficientLocalAttention and sum(p.numel() for p in ours.parameters()) == 9 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype):
    layer = EfficientLocalAttention(16)
    x = torch.randn(2, 16, 9, 7)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x.to(dtype))
        assert y.dtype == dtype, "a map keeps its precision"
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).float(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("resnet50", {"block_args": {"attn_layer": EfficientLocalAttention}}, 16),
        ("resnext50_32x4d", {"block_args": {"attn_layer": EfficientLocalAttention}}, 16),
        ("efficientnet_b0", {"se_layer": EfficientLocalAttention}, 16),
        ("nf_resnet50", {"attn_layer": EfficientLocalAttention}, 16),
    ],
)
def test_drops_into_timm(name: str, kwargs: dict, count: int):
    model = build(name, num_classes=5, **kwargs).train()
    layers = [m for m in model.modules() if isinstance(m, EfficientLocalAttention)]
    assert len(layers) == count
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in layers for p in m.parameters())


# ---------------------------------------------------------------- insertion

BUILT = {
    "timm resnet18": (lambda: build("resnet18", num_classes=5), 8, "layer1.0.se"),
    "timm seresnet18": (lambda: build("seresnet18", num_classes=5), 8, "layer1.0.se.1"),
    "timm mobilenetv2": (lambda: build("mobilenetv2_035", num_classes=5), 10, "blocks.1.1.drop_path"),
    "timm mobilenetv3": (lambda: build("mobilenetv3_small_050", num_classes=5), 7, "blocks.1.1.drop_path"),
    "timm efficientnet": (
        lambda: build("efficientnet_b0", num_classes=5, drop_path_rate=0.1),
        9,
        "blocks.1.1.drop_path.0",
    ),
    "timm regnet": (lambda: build("regnetx_002", num_classes=5), 13, "s1.b1.drop_path"),
    "timm convnext": (lambda: build("convnext_atto", num_classes=5), 12, "stages.0.blocks.0.drop_path"),
    "timm vgg": (lambda: build("vgg11", num_classes=5), 5, "features.2.0"),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(num_classes=5), 16, "layer1.0.bn3.1"),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=5), 17, "features.1.conv.3"),
    "torchvision mobilenet_v3": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        11,
        "features.1.block.3",
    ),
    "torchvision efficientnet": (
        lambda: torchvision.models.efficientnet_b0(num_classes=5),
        9,
        "features.2.1.stochastic_depth.0",
    ),
    "torchvision convnext": (
        lambda: torchvision.models.convnext_tiny(num_classes=5),
        18,
        "features.1.0.stochastic_depth.0",
    ),
    "torchvision regnet": (
        lambda: torchvision.models.regnet_y_400mf(num_classes=5),
        16,
        "trunk_output.block1.block1-0.f.4",
    ),
    "torchvision mnasnet": (lambda: torchvision.models.mnasnet0_5(num_classes=5), 16, "layers.8.0.layers.8"),
}


@pytest.mark.parametrize("built", list(BUILT))
def test_a_network_keeps_its_outputs_until_it_trains(built: str):
    build, count, first = BUILT[built]
    model = build().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    size = 96 if built.endswith("vgg") else 64
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        names = insert(model)
        assert torch.equal(model(x), expected), "bit for bit"
    assert len(names) == count and names[0] == first
    inserted = [name for name, m in model.named_modules() if isinstance(m, InsertedAttention)]
    assert inserted == names
    assert not any(m.training for m in model.modules()), "evaluation stays evaluation"
    after = dict(model.state_dict())
    kept = {n: t for n, t in after.items() if not any(n.startswith(f"{name}.") for name in names)}
    assert len(kept) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), before.values(), strict=True))
    renamed = {"timm seresnet18": (".se.0.", ".se."), "torchvision resnet50": (".bn3.0.", ".bn3.")}.get(built, ("", ""))
    assert [name.replace(*renamed) for name in kept] == list(before), "no other name changed"


def test_torchvisions_vgg_has_places_like_timms():
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn()
    assert insert(model) == [f"features.{i}.0" for i in (3, 7, 14, 21, 28)]


def test_inserted_layers_train():
    """The gain alone at the first step, everything from the second on."""
    model = build("resnet18", num_classes=5, zero_init_last=False).train()
    names = insert(model, "t")
    layers: list[Any] = [model.get_submodule(name) for name in names]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 64, 64)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        for layer in layers:
            assert layer.gain.grad.abs().sum() > 0
            moved = [bool(p.grad.abs().sum() > 0) for p in layer.attn.parameters()]
            assert moved == [step > 0] * 3
        optimizer.step()


def test_a_gain_of_one_is_the_attention():
    layer = InsertedAttention(16, "s")
    x = torch.randn(2, 16, 5, 7)
    assert torch.equal(layer(x), x)
    nn.init.ones_(layer.gain)
    torch.testing.assert_close(layer(x), layer.attn(x))


def test_insertion_where_it_was_asked_for():
    model = build("resnet18", num_classes=5).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert insert(model, "l", where="layer[34].*.conv2") == [f"layer{i}.{j}.conv2.1" for i in (3, 4) for j in (0, 1)]
    assert torch.equal(model(x), expected)
    assert insert(twin, "l", where=lambda name, m: isinstance(m, nn.MaxPool2d)) == ["maxpool.1"]
    assert twin.maxpool[1].attn.variant == "l" and twin.maxpool[1].attn.conv.in_channels == 64
    assert torch.equal(twin(x), expected)


def test_insertion_into_parts_of_other_networks():
    features = build("resnet50", features_only=True)
    assert len(insert(features)) == 16
    unet: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 12, (3, 5), (2, 1))).eval()
    x = torch.randn(2, 3, 20, 30)
    expected = unet(x)
    assert insert(unet, where=["0", "2"]) == ["0.1", "2.1"]
    assert torch.equal(unet(x), expected) and unet[2][1].attn.conv.in_channels == 12


def test_trained_insertions_load_into_a_network_built_the_same_way():
    model = build("mobilenetv2_035", num_classes=5).eval()
    for name in insert(model, "s"):
        nn.init.normal_(model.get_parameter(f"{name}.gain"))
    other = build("mobilenetv2_035", num_classes=5).eval()
    insert(other, "s")
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(other(x), model(x))


def test_insertion_follows_device_dtype_and_mode():
    model = build("resnet18", device="meta", dtype=torch.bfloat16).train()
    layer = model.get_submodule(insert(model)[0])
    assert layer.gain.device.type == "meta" and layer.gain.dtype == torch.bfloat16 and layer.training
    grey = build("resnet18", in_chans=1).train()
    before = copy.deepcopy(grey.state_dict())
    insert(grey)
    after = grey.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "statistics did not move"


def test_insertions_that_cannot_be():
    model = build("resnet18", num_classes=5)
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'layer9\*' matches no module of ResNet; it has 'conv1', 'bn1'"):
        insert(model, where=["layer1.0.conv1", "layer9*"])
    with pytest.raises(ValueError, match="the function matches no module"):
        insert(model, where=lambda name, m: False)
    with pytest.raises(ValueError, match="'fc' give is no single map"):
        insert(model, where="fc")
    with pytest.raises(ValueError, match="no residual branch that is known"):
        insert(build("vit_tiny_patch16_224", depth=1))
    with torch.device("meta"), pytest.raises(ValueError, match="SwinTransformer has no residual branch"):
        insert(torchvision.models.swin_t())  # its maps are [B, H, W, C]
    with pytest.raises(ValueError, match="variant='x'"):
        insert(model, "x")  # type: ignore[arg-type]
    assert list(model.state_dict()) == state, "a refused insertion changes nothing"
    insert(model)
    with pytest.raises(ValueError, match=r"inserted at 'layer1\.0\.se'.* already"):
        insert(model)


# ---------------------------------------------------------------- maps


def test_maps():
    model = build("ela_resnet18", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 96)
    maps = ela_maps(model, x)
    assert [tuple(m.shape) for m in maps.values()] == [(2, 16 // 2**i, 24 // 2**i) for i in range(4) for _ in range(2)]
    assert all(0 < m.min() and m.max() < 1 and not m.requires_grad for m in maps.values())
    seen: list[torch.Tensor] = []
    layer = model.layer2[1].se
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    handle.remove()
    rows, columns = layer.gates(seen[0])
    outer = (rows.unsqueeze(3) * columns.unsqueeze(2)).mean(1)
    torch.testing.assert_close(maps["layer2.1.se"], outer)
    assert not layer._forward_pre_hooks
    with pytest.raises(ValueError, match="ResNet has no EfficientLocalAttention"):
        ela_maps(build("resnet18"), x)


# ---------------------------------------------------------------- registered networks

NAMES = ["ela_mobilenetv2_100", "ela_resnet18", "ela_resnet34", "ela_resnet50", "ela_resnet101"]
every = pytest.mark.parametrize("name", NAMES)


def test_names():
    assert timm.list_models(module="ela") == NAMES


@pytest.mark.parametrize(
    ("placement", "extra"),
    [
        ("timm", {"t": 0.106, "b": 0.136, "s": 0.634, "l": 0.876}),
        ("published", {"t": 0.026, "b": 0.034, "s": 0.159, "l": 0.219}),
    ],
)
@variants
def test_what_ela_adds_to_a_resnet50(placement: str, extra: dict[str, float], variant: str):
    def size(name: str, **kwargs: Any) -> int:
        return sum(p.numel() for p in build(name, device="meta", **kwargs).parameters())

    added = size("ela_resnet50", variant=variant, placement=placement) - size("resnet50")
    assert added / 1e6 == pytest.approx(extra[variant], abs=6e-4)


def test_published_placements():
    resnet = build("ela_resnet50", placement="published", device="meta")
    layers = {n: m for n, m in resnet.named_modules() if isinstance(m, EfficientLocalAttention)}
    assert next(iter(layers)) == "layer1.0.act2.ela" and len(layers) == 16
    assert all(m.has_skip for m in layers.values()) and layers["layer4.2.act2.ela"].conv.in_channels == 512
    basic = build("ela_resnet18", placement="published", device="meta")
    assert basic.layer1[0].se.has_skip and not build("ela_resnet18", device="meta").layer1[0].se.has_skip
    mobile = build("ela_mobilenetv2_100", variant="t", device="meta")
    layers = {n: m for n, m in mobile.named_modules() if isinstance(m, EfficientLocalAttention)}
    assert [m.conv.in_channels for m in layers.values()][:4] == [96, 144, 144, 192] and len(layers) == 16
    assert layers["blocks.1.1.se"].norm.num_groups == 24
    wide = build("ela_mobilenetv2_100", placement="timm", device="meta")
    assert sum(isinstance(m, EfficientLocalAttention) for m in wide.modules()) == 17


def test_mobilenet_is_timms_but_for_the_attention():
    plain = build("mobilenetv2_100", device="meta").state_dict()
    ours = build("ela_mobilenetv2_100", device="meta").state_dict()
    assert {n: t.shape for n, t in ours.items() if ".se." not in n} == {n: t.shape for n, t in plain.items()}


@every
def test_configuration(name: str):
    model = build(name, device="meta").eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    assert state[f"{cfg['classifier']}.weight"].shape == (1000, model.head_hidden_size)
    assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[2:] == cfg["pool_size"]
    maps = build(name, features_only=True, device="meta")
    assert maps.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [f.shape[1] for f in maps(torch.empty(1, 3, 64, 96, device="meta"))] == maps.feature_info.channels()
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        build(name, pretrained=True, device="meta")


@pytest.mark.parametrize("kwargs", [{"variant": "s"}, {"placement": "published", "variant": "t"}])
@pytest.mark.parametrize("name", ["ela_resnet50", "ela_mobilenetv2_100"])
def test_save_and_load(name: str, kwargs: dict, tmp_path: Path):
    model = build(name, num_classes=3, **kwargs).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = build(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["ela_resnet18", "ela_mobilenetv2_100"])
def test_forward_and_backward(name: str):
    model = build(name, num_classes=4, in_chans=2, drop_path_rate=0.1).train()
    out = model(torch.randn(2, 2, 97, 65))
    out.square().mean().backward()
    assert out.shape == (2, 4)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_images_of_a_batch_do_not_see_each_other():
    model = build("ela_resnet18", num_classes=4).eval()
    x = torch.randn(3, 3, 64, 48)
    torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


def test_bad_placement():
    for name in ("ela_resnet50", "ela_mobilenetv2_100"):
        with pytest.raises(ValueError, match="placement='middle': expected 'timm' or 'published'"):
            build(name, placement="middle")


# ---------------------------------------------------------------- out of eager mode


class Small(nn.Module):
    """Both gates, a skip, an insertion: all there is to export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1)
        self.plain = trained(EfficientLocalAttention(16, "l"))
        self.skip = trained(EfficientLocalAttention(16, "t", has_skip=True))
        self.inserted = InsertedAttention(16)
        nn.init.constant_(self.inserted.gain, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inserted(self.skip(self.plain(self.conv(x))))


def test_symbolic_trace():
    model = Small()
    x = torch.randn(2, 3, 20, 28)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    resnet = build("ela_resnet18", num_classes=3).eval()
    assert torch.equal(torch.fx.symbolic_trace(resnet)(x), resnet(x))


@torch.no_grad()
def test_export_and_onnx(tmp_path: Path):
    model = Small().eval()
    x = torch.randn(2, 3, 20, 28)
    sides = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    dynamic = {0: torch.export.Dim("batch"), **sides}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dynamic,)).module()
    file = str(tmp_path / "ela.onnx")
    torch.onnx.export(model, (x,), file, dynamo=True, opset_version=18, dynamic_shapes=(dynamic,), verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for y in (x, torch.randn(1, 3, 33, 41)):
        torch.testing.assert_close(exported(y), model(y), rtol=1e-4, atol=1e-5)
        (out,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        np.testing.assert_allclose(np.asarray(out), model(y).numpy(), rtol=1e-3, atol=1e-4)


def test_compile_takes_it_as_one_graph():
    model = Small()
    x = torch.randn(2, 3, 20, 28)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for y in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(compiled(y), model(y))
