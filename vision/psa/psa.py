"""ResNets and HRNets with polarized self-attention in every block; timm's, but for the layer."""

from functools import partial
from typing import Any, Literal

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

from vision.psa.attention import Form, Layout, PolarizedSelfAttention, check_option
from vision.pyramid import imagenet_cfg

__all__ = [
    "Placement",
    "PolarizedBasicBlock",
    "PolarizedBottleneck",
    "PolarizedHRNet",
    "PolarizedHRNetFeatures",
    "PolarizedResNet",
    "checkpoint_filter_fn",
]

Placement = Literal["inner", "output"]


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
        check_option("placement", placement, Placement)
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
        check_option("interpolation", interpolation, Literal["nearest", "bilinear"])
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
