"""Polarized self-attention: where and what, each at full resolution in one direction and collapsed in the other.

Paper: Liu, Liu, Fan and Huang, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
https://arxiv.org/abs/2107.00782. Original code: https://github.com/DeLightCMU/PSA (Apache-2.0).

What differs from that code:

* The products are taken in another order, with the same result up to rounding: a 1x1 convolution commutes with a
  (weighted) mean over places, so three convolutions that were run at every place are run once an image. In the parallel
  layout nothing wider than one channel is left at every place, in the sequential one a single convolution.
* `form="paper"` computes the spatial mask as the paper writes it. The released weights belong to `form="released"`,
  whose mask hardly varies over a large map (the softmax over places stands inside the sigmoid).
* HRNet, ResNet and their blocks are timm's; this module adds the layer to them. Maps of any size go through the fusion
  of HRNet, which in timm needs multiples of 32.

The segmentation network that the authors published is in `vision.ocr`.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from timm.layers import LayerNorm2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models.hrnet import (
    HighResolutionModule,
    HighResolutionNet,
    HighResolutionNetFeatures,
    SequentialList,
    cfg_cls,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from vision.pyramid import imagenet_cfg, is_eager_cpu_inference

__all__ = [
    "Form",
    "Layout",
    "Placement",
    "PolarizedBasicBlock",
    "PolarizedBottleneck",
    "PolarizedHRNet",
    "PolarizedHRNetFeatures",
    "PolarizedMasks",
    "PolarizedResNet",
    "PolarizedSelfAttention",
]

Layout = Literal["parallel", "sequential"]
Form = Literal["released", "paper"]
Placement = Literal["inner", "output"]

# What timm tells squeeze-and-excitation layers in whose place this one may stand; it has no meaning here.
_SQUEEZE_ARGS = {"rd_ratio", "rd_channels", "rd_divisor", "rd_round_fn", "act_layer", "norm_layer", "gate_layer"}


def _check_option(name: str, value: object, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, get_args(kind)))}.")


class PolarizedMasks(NamedTuple):
    """The two masks of a map, values in (0, 1)."""

    channel: Tensor
    """`[B, C, 1, 1]`."""
    spatial: Tensor
    """`[B, 1, H, W]`."""


class PolarizedSelfAttention(nn.Module):
    """A mask over channels and a mask over places, both of them a sigmoid of an attention product (PSA, eqs. 1 to 4).

    With places p, softmax over places σ and 1x1 convolutions q, v (channels halved):

        channel mask = sigmoid(up(Σ_p σ(q_r x)_p · v_r x_p))
        spatial mask = sigmoid(σ(ḡ · v_l x))   released, parallel      ḡ = mean over p of q_l x
                       sigmoid(ḡ · σ(v_l x))   released, sequential
                       sigmoid(σ'(ḡ) · v_l x)  paper                   σ': softmax over channels

    In parallel layout `y = x · (channel + spatial)`; in sequential layout the spatial mask is that of the map after the
    channel mask, and `y = x · channel · spatial`. Works on maps in either memory format, without copies. At a place it
    costs some 4 C multiply-adds in parallel, and C² / 2 more in released sequential; the authors' order 3 C² / 2.

    The names of the layers are the authors'. It fits wherever timm takes an attention class:
    `timm.create_model("resnet50", block_args=dict(attn_layer=PolarizedSelfAttention))`.

    Args:
        channels: C; at least 2, or 8 in sequential layout.
        layout: whether the masks are added ("parallel", PSA_p) or follow each other ("sequential", PSA_s).
        form: "released", as the published weights were trained, or "paper", as the paper writes the spatial mask.
        device: of the parameters.
        dtype: of the parameters.
        **squeeze_args: what timm passes to layers of its own in this place; no meaning here.

    Raises:
        ValueError: unknown `layout` or `form`, or too few channels.
        TypeError: an argument that timm does not pass either.
    """

    def __init__(
        self,
        channels: int,
        layout: Layout = "parallel",
        *,
        form: Form = "released",
        device=None,
        dtype=None,
        **squeeze_args: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(squeeze_args) - _SQUEEZE_ARGS):
            raise TypeError(f"PolarizedSelfAttention got {', '.join(unknown)}; its options are 'layout' and 'form'.")
        _check_option("layout", layout, Layout)
        _check_option("form", form, Form)
        least = 2 if layout == "parallel" else 8
        if channels < least:
            raise ValueError(f"channels={channels}: polarized self-attention ({layout}) needs at least {least}.")
        self.layout = layout
        self.form = form
        inter = channels // 2
        conv = partial(nn.Conv2d, kernel_size=1, device=device, dtype=dtype)
        # "right" is the channel branch and "left" the spatial one
        self.conv_q_right = conv(channels, 1, bias=False)
        self.conv_v_right = conv(channels, inter, bias=False)
        if layout == "parallel":
            self.conv_up = conv(inter, channels, bias=False)
        else:
            self.conv_up = nn.Sequential(
                conv(inter, inter // 4),
                LayerNorm2d(inter // 4, eps=1e-5, device=device, dtype=dtype),
                nn.ReLU(inplace=True),
                conv(inter // 4, channels),
            )
        self.conv_q_left = conv(channels, inter, bias=False)
        self.conv_v_left = conv(channels, inter, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal queries and values (fan in); `conv_up` as torch starts its convolutions."""
        for layer in (self.conv_q_right, self.conv_v_right, self.conv_q_left, self.conv_v_left):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in")
        for layer in self.conv_up.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()

    def masks(self, x: Tensor) -> PolarizedMasks:
        """Both masks of a map `[B, C, H, W]`; in sequential layout the spatial one sees what the channel one leaves."""
        flat = x.flatten(2)  # [B, C, P]
        channel = self._channel_mask(x, flat)  # [B, C, 1, 1]
        spatial = self._spatial_mask(flat, channel.flatten(1))  # [B, 1, P]
        return PolarizedMasks(channel, spatial.unflatten(2, (x.shape[2], x.shape[3])))

    def _channel_mask(self, x: Tensor, flat: Tensor) -> Tensor:
        weight = self.conv_q_right(x).flatten(2).softmax(-1)  # [B, 1, P]
        pooled = weight @ flat.mT  # [B, 1, C]
        return self.conv_up(self.conv_v_right(pooled.mT.unsqueeze(3))).sigmoid()  # [B, C, 1, 1]

    def _spatial_mask(self, flat: Tensor, channel: Tensor) -> Tensor:
        """`[B, C, P]` and the channel mask `[B, C]` to `[B, 1, P]`."""
        mean = flat.mean(2)  # [B, C]
        if self.layout == "sequential":
            mean = mean * channel
        query = self.conv_q_left(mean[..., None, None]).flatten(1)  # [B, C/2]
        if self.form == "paper":
            query = query.softmax(1)
        value = self.conv_v_left.weight.flatten(1)  # [C/2, C]
        if self.layout == "sequential":
            value = value * channel.unsqueeze(1)  # [B, C/2, C]: the channel mask moved from the map into the weights
        if self.layout == "sequential" and self.form == "released":
            return (query.unsqueeze(1) @ (value @ flat).softmax(-1)).sigmoid()
        scores = query.unsqueeze(1) @ value @ flat  # [B, 1, P]
        return (scores.softmax(-1) if self.form == "released" else scores).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        channel, spatial = self.masks(x)
        if is_eager_cpu_inference(x):
            y = x * channel
            return y.addcmul_(x, spatial) if self.layout == "parallel" else y.mul_(spatial)
        return torch.addcmul(x * channel, x, spatial) if self.layout == "parallel" else x * channel * spatial

    def extra_repr(self) -> str:
        """The options."""
        return f"layout={self.layout!r}, form={self.form!r}"


class PolarizedBasicBlock(BasicBlock):
    """timm's basic block with polarized attention between its two convolutions (`deattn`), where HRNet has it.

    Args:
        inplanes: input channels.
        planes: output channels.
        *args: as timm's block takes them.
        layout: as in `PolarizedSelfAttention`.
        form: as in `PolarizedSelfAttention`.
        device: of the parameters.
        dtype: of the parameters.
        **kwargs: as timm's block takes them.
    """

    aa: Any

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *args: Any,
        layout: Layout = "parallel",
        form: Form = "released",
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        super().__init__(inplanes, planes, *args, device=device, dtype=dtype, **kwargs)
        self.deattn = PolarizedSelfAttention(self.conv1.out_channels, layout, form=form, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H / stride, W / stride]`."""
        y = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        y = self.bn2(self.conv2(self.deattn(y)))
        return _close(self, x, y, self.act2)


class PolarizedBottleneck(Bottleneck):
    """timm's bottleneck with polarized attention after its 3x3 convolution (`deattn`), as in the paper's ResNets.

    Args are those of `PolarizedBasicBlock`.
    """

    aa: Any

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *args: Any,
        layout: Layout = "parallel",
        form: Form = "released",
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        super().__init__(inplanes, planes, *args, device=device, dtype=dtype, **kwargs)
        self.deattn = PolarizedSelfAttention(self.conv2.out_channels, layout, form=form, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H / stride, W / stride]`."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(y)))))
        y = self.bn3(self.conv3(self.deattn(y)))
        return _close(self, x, y, self.act3)


def _close(block: Any, x: Tensor, y: Tensor, act: nn.Module) -> Tensor:
    """The end of a residual block of timm's: what stands behind the last norm, the shortcut, the activation."""
    if block.se is not None:
        y = block.se(y)
    if block.drop_path is not None:
        y = block.drop_path(y)
    y += x if block.downsample is None else block.downsample(x)
    return act(y)


class PolarizedResNet(ResNet):
    """timm's ResNet with polarized attention in every block.

    Args:
        block: `BasicBlock` or `Bottleneck` of timm's.
        layers: blocks in each stage.
        layout: as in `PolarizedSelfAttention`.
        form: as in `PolarizedSelfAttention`.
        placement: "inner", after the 3x3 convolution of a bottleneck or the first one of a basic block, as published;
            "output", after the last norm, where timm has attention.
        block_args: further arguments of the blocks.
        **kwargs: as timm's `ResNet` takes them.

    Raises:
        ValueError: unknown `layout`, `form` or `placement`.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: tuple[int, ...],
        layout: Layout = "parallel",
        form: Form = "released",
        placement: Placement = "inner",
        block_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_option("placement", placement, Placement)
        options: dict[str, Any] = {"layout": layout, "form": form}
        if placement == "inner":
            block = PolarizedBottleneck if issubclass(block, Bottleneck) else PolarizedBasicBlock
        else:
            options = {"attn_layer": partial(PolarizedSelfAttention, **options)}
        super().__init__(block, layers, block_args={**options, **(block_args or {})}, **kwargs)  # pyright: ignore[reportArgumentType] - timm unpacks any sequence

    def init_weights(self, zero_init_last: bool = True) -> None:
        """timm's, and the attention's own start for the attention."""
        super().init_weights(zero_init_last)
        _reset_attention(self)

    def no_weight_decay(self) -> set[str]:
        """Parameters beyond the 1-D ones that must not decay: none."""
        return set()


def _reset_attention(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PolarizedSelfAttention):
            module.reset_parameters()


class _FusionModule(HighResolutionModule):
    """timm's module of parallel branches; fuses maps of any size, by either interpolation."""

    fuse_layers: Any

    def __init__(self, *args: Any, interpolation: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interpolation = interpolation
        self.grad_checkpointing = False
        for i, row in enumerate(self.fuse_layers):
            for layer in row[i + 1 :]:
                layer[2] = nn.Identity()  # in place of an upsampling by a fixed factor

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """One map a branch to one map a branch, each the sum of all after their blocks."""
        maps = [
            checkpoint_seq(branch, y) if self.grad_checkpointing else branch(y)
            for branch, y in zip(self.branches, x, strict=True)
        ]
        return [self._fused(i, row, maps) for i, row in enumerate(self.fuse_layers)]

    def _fused(self, i: int, row: Any, maps: list[Tensor]) -> Tensor:
        y = maps[i]
        for j, layer in enumerate(row):
            if j != i:
                y = y + self._resized(layer(maps[j]), maps[i])
        return self.fuse_act(y)

    def _resized(self, x: Tensor, like: Tensor) -> Tensor:
        size = (like.shape[2], like.shape[3])
        if self.interpolation == "bilinear":
            return nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
        return nn.functional.interpolate(x, size, mode="nearest")


class PolarizedHRNet(HighResolutionNet):
    """timm's HRNet with polarized attention in every basic block, that is in stages 2 to 4.

    Takes images of any size, unlike timm's.

    Args:
        cfg: the architecture, as in `timm.models.hrnet.cfg_cls`.
        layout: as in `PolarizedSelfAttention`.
        form: as in `PolarizedSelfAttention`.
        interpolation: by which a lower branch joins a higher one: "nearest" as in classifiers, "bilinear" as in
            segmentation.
        **kwargs: as timm's `HighResolutionNet` takes them.

    Raises:
        ValueError: unknown `layout`, `form` or `interpolation`.
    """

    def __init__(
        self,
        cfg: dict[str, Any],
        layout: Layout = "parallel",
        form: Form = "released",
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        **kwargs: Any,
    ) -> None:
        _check_option("interpolation", interpolation, Literal["nearest", "bilinear"])
        # timm builds everything in its constructor, which asks `_make_stage` of this class
        self._block = partial(PolarizedBasicBlock, layout=layout, form=form)
        self._block.expansion = PolarizedBasicBlock.expansion  # pyright: ignore[reportAttributeAccessIssue]
        self._interpolation = interpolation
        super().__init__(cfg, **kwargs)

    def _make_stage(
        self, layer_config: dict, num_in_chs: list[int], multi_scale_output: bool = True, device=None, dtype=None
    ) -> tuple[nn.Module, list[int]]:
        modules = []
        for _ in range(layer_config["num_modules"]):
            module = _FusionModule(
                layer_config["num_branches"],
                self._block,
                layer_config["num_blocks"],
                num_in_chs,
                layer_config["num_channels"],
                layer_config["fuse_method"],
                multi_scale_output,
                interpolation=self._interpolation,
                device=device,
                dtype=dtype,
            )
            modules.append(module)
            num_in_chs = module.get_num_in_chs()
        return SequentialList(*modules), num_in_chs

    def init_weights(self) -> None:
        """timm's, and the attention's own start for the attention."""
        super().init_weights()
        _reset_attention(self)

    def no_weight_decay(self) -> set[str]:
        """Parameters beyond the 1-D ones that must not decay: none."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of stages 2 to 4 in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, _FusionModule):
                module.grad_checkpointing = enable


class PolarizedHRNetFeatures(HighResolutionNetFeatures, PolarizedHRNet):
    """The same as a pyramid of features, under the same names of its parameters; what `features_only=True` gives."""


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """A file of the authors' to the names and shapes of these networks.

    Nesting and prefixes are taken off. The authors' norm of the sequential layout keeps one number a channel as
    `[C, 1, 1]`, which would be taken for a matrix, and decay; here it is `[C]`.

    Args:
        state_dict: the content of a file (state dict under "state_dict", or bare; "module." before names), or a state
            dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    named = ((name.removeprefix("module."), value) for name, value in state_dict.items())
    return {name: value.flatten() if "conv_up.1." in name else value for name, value in named}


def _cfg(classifier: str) -> dict[str, Any]:
    return imagenet_cfg(first_conv="conv1", classifier=classifier)


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg("fc") for name in ("psa_resnet18", "psa_resnet50", "psa_resnet101")},
        **{name: _cfg("classifier") for name in ("psa_hrnet_w32", "psa_hrnet_w48")},
    }
)


def _create_resnet(variant: str, pretrained: bool, block: type, layers: tuple[int, ...], kwargs: dict) -> ResNet:
    return build_model_with_cfg(PolarizedResNet, variant, pretrained, **{"block": block, "layers": layers, **kwargs})


def _create_hrnet(variant: str, pretrained: bool, kwargs: dict) -> HighResolutionNet:
    """timm's own way to build HRNet: its feature extractor is another class, with the same names of parameters."""
    kwargs = dict(kwargs)
    as_features = kwargs.get("features_only", False) and "feature_cls" not in kwargs
    if as_features:
        del kwargs["features_only"]
    model: Any = build_model_with_cfg(
        PolarizedHRNetFeatures if as_features else PolarizedHRNet,
        variant,
        pretrained,
        model_cfg=cfg_cls[variant.removeprefix("psa_")],
        pretrained_strict=not as_features,
        kwargs_filter=("num_classes", "global_pool") if as_features else None,  # pyright: ignore[reportArgumentType]
        **kwargs,
    )
    if as_features:
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.default_cfg)
    return model


@register_model
def psa_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with polarized attention after the first convolution of each block."""
    return _create_resnet("psa_resnet18", pretrained, BasicBlock, (2, 2, 2, 2), kwargs)


@register_model
def psa_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with polarized attention after the 3x3 convolution of each block, as in the paper."""
    return _create_resnet("psa_resnet50", pretrained, Bottleneck, (3, 4, 6, 3), kwargs)


@register_model
def psa_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-101 with polarized attention after the 3x3 convolution of each block, as in the paper."""
    return _create_resnet("psa_resnet101", pretrained, Bottleneck, (3, 4, 23, 3), kwargs)


@register_model
def psa_hrnet_w32(pretrained: bool = False, **kwargs) -> HighResolutionNet:
    """HRNet-W32 with polarized attention in each basic block."""
    return _create_hrnet("psa_hrnet_w32", pretrained, kwargs)


@register_model
def psa_hrnet_w48(pretrained: bool = False, **kwargs) -> HighResolutionNet:
    """HRNet-W48 with polarized attention in each basic block, the backbone of the published networks."""
    return _create_hrnet("psa_hrnet_w48", pretrained, kwargs)
