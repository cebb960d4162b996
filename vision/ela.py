"""ELA: efficient local attention, gates from the two strip-pooled profiles of a convolutional map.

Paper: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", Xu and Wan, 2024,
https://arxiv.org/abs/2403.01123. The authors' code (licensed in part only): https://github.com/Xuwei86/ELA_Code.

Written from the paper. What differs from other code of that name:

* timm's `attn_layer='ela'` is another layer: a convolution and a norm per direction, one norm group, SiLU before the
  gate. It is left as it is; the paper's layer is this module's class.
* the number of norm groups is the largest divisor of the width up to the paper's number, so that every width works
  (32 groups do not divide MobileNetV2's 144 channels); the layer's repr says what was taken.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

import weights
from vision.inference import is_eager_cpu_inference
from vision.pyramid import imagenet_cfg

__all__ = ["ELABottleneck", "EfficientLocalAttention", "InsertedAttention", "Variant", "ela_maps", "insert"]

Variant = Literal["t", "b", "s", "l"]

# variant → kernel size, channels per group of the convolution, groups of the norm
_VARIANTS: dict[str, tuple[int, int, int]] = {"t": (5, 1, 32), "b": (7, 1, 16), "s": (5, 8, 16), "l": (7, 8, 16)}
# what timm's families pass to a channel attention, and ELA has no use for: it reduces no channels, has no activation
_TIMM_KWARGS = frozenset({"act_layer", "gate_layer", "rd_channels", "rd_divisor", "rd_ratio", "rd_round_fn"})


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# A CPU reduces and scales ten times as fast along the dimension that is contiguous in memory. The two functions are
# leaves of a symbolic trace, which knows no memory format.
@torch.fx.wrap
@register_notrace_function
def _strips(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, C, H, W]` → means over the width `[B, C, H]` and over the height `[B, C, W]`."""
    if _is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
        return x.mean(2).mT, x.mean(1).mT
    return x.mean(3), x.mean(2)


@torch.fx.wrap
@register_notrace_function
def _scaled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[B, C, H, W]`, `[B, C, H]`, `[B, C, W]` → their product in the layout and dtype of x."""
    rows, columns = rows.to(x.dtype), columns.to(x.dtype)  # autocast may have normed in single precision
    last = _is_channels_last(x)
    if last:
        x, rows, columns = x.permute(0, 2, 3, 1), rows.mT.contiguous(), columns.mT.contiguous()
    y = x * rows.unsqueeze(2 if last else 3)
    columns = columns.unsqueeze(1 if last else 2)
    # In inference one map of this size will do: fresh memory costs a CPU more than the product.
    y = y.mul_(columns) if is_eager_cpu_inference(x) else y * columns
    return y.permute(0, 3, 1, 2) if last else y


class EfficientLocalAttention(nn.Module):
    """`y = x · a_h · a_w`: a gate per row and one per column, of every channel.

    A strip is the mean of a map along its width (or height); one convolution along the strip, one GroupNorm and a
    sigmoid make it a gate. Both strips go through the same weights, each with statistics of its own. Drops into timm
    where an attention class is taken: `block_args=dict(attn_layer=EfficientLocalAttention)` of ResNets, `se_layer=` of
    EfficientNets, `attn_layer=` of NF-ResNets.

    | variant | kernel | channels per group | norm groups | parameters |
    | --- | --- | --- | --- | --- |
    | t | 5 | 1 | 32 | 7 C |
    | b | 7 | 1 | 16 | 9 C |
    | s | 5 | 8 | 16 | 42 C |
    | l | 7 | 8 | 16 | 58 C |

    Args:
        channels: width C.
        variant: a row of the table. Where 8 does not divide C, 's' and 'l' convolve channel by channel; where C does
            not divide into the norm groups, their number is the largest divisor of C below.
        kernel_size: length of the convolution, in place of the variant's; odd.
        groups: groups of the convolution, in place of the variant's; divides C.
        num_groups: groups of the norm, in place of the variant's; divides C.
        has_skip: `x + y` in place of `y`, as in the authors' segmentation network.
        **timm_kwargs: `rd_ratio`, `act_layer` and what else timm passes to a channel attention; without effect.

    Raises:
        ValueError: an unknown variant, an even kernel, or groups that do not divide C.
        TypeError: an argument that neither this layer nor timm's have.
    """

    def __init__(
        self,
        channels: int,
        variant: Variant = "b",
        kernel_size: int | None = None,
        groups: int | None = None,
        num_groups: int | None = None,
        has_skip: bool = False,
        *,
        device=None,
        dtype=None,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(timm_kwargs.keys() - _TIMM_KWARGS):
            raise TypeError(f"EfficientLocalAttention has no argument {', '.join(unknown)}.")
        if variant not in _VARIANTS:
            raise ValueError(f"variant={variant!r}: expected one of {', '.join(map(repr, _VARIANTS))}.")
        variant_kernel, group_width, variant_num_groups = _VARIANTS[variant]
        kernel_size = variant_kernel if kernel_size is None else kernel_size
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, or a strip would change its length.")
        if groups is None:
            groups = channels if channels % group_width else channels // group_width
        if num_groups is None:
            num_groups = next(n for n in range(min(variant_num_groups, channels), 0, -1) if channels % n == 0)
        for name, value in (("groups", groups), ("num_groups", num_groups)):
            if value < 1 or channels % value:
                raise ValueError(f"{name}={value} must divide the {channels} channels; leave it out for the variant's.")
        self.variant = variant
        self.has_skip = has_skip
        padding = kernel_size // 2
        self.conv = nn.Conv1d(
            channels, channels, kernel_size, padding=padding, groups=groups, bias=False, device=device, dtype=dtype
        )
        self.norm = nn.GroupNorm(num_groups, channels, device=device, dtype=dtype)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates of a map.

        Args:
            x: `[B, C, H, W]`.

        Returns:
            `[B, C, H]` and `[B, C, W]`, from 0 to 1: of the rows and of the columns.
        """
        rows, columns = _strips(x)
        return self.norm(self.conv(rows)).sigmoid(), self.norm(self.conv(columns)).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → the same shape, dtype and memory format; any H and W."""
        y = _scaled(x, *self.gates(x))
        return x + y if self.has_skip else y

    def extra_repr(self) -> str:
        """What the variant came to at this width."""
        channels, groups, num_groups = self.conv.in_channels, self.conv.groups, self.norm.num_groups
        _, group_width, variant_num_groups = _VARIANTS[self.variant]
        text = f"{channels}, variant={self.variant!r}, kernel_size={self.conv.kernel_size[0]}, groups={groups}"
        text += f" ({group_width} does not divide {channels})" if channels % group_width else ""
        text += f", num_groups={num_groups}"
        text += f" ({variant_num_groups} does not divide {channels})" if channels % variant_num_groups else ""
        return text + (", has_skip=True" if self.has_skip else "")


@torch.no_grad()
def ela_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Where the ELA layers of a network let through most: `a_h a_wᵀ`, mean over channels.

    Args:
        model: a network with ELA layers, as it is: put it into evaluation mode first.
        images: normalised, `[B, C, H, W]`.

    Returns:
        Layer name → `[B, h, w]`, from 0 to 1, of the layer's own size; in the order of the model's modules.

    Raises:
        ValueError: the network has no such layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, EfficientLocalAttention)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no EfficientLocalAttention; vision.ela.insert can put some in.")
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, EfficientLocalAttention)
            rows, columns = layer.gates(args[0])
            maps[name] = torch.einsum("bch,bcw->bhw", rows, columns) / rows.shape[1]

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: maps[name] for name in layers if name in maps}


class InsertedAttention(nn.Module):
    """An attention that begins as the identity: `y = x + gain · (ELA(x) - x)`, with a learnt gain that starts at 0.

    At gain 0 the output equals the input and the attention's own weights get no gradient, the gain does; from the first
    step on all of them learn. At gain 1 this is the attention itself.

    Args:
        channels: width C.
        variant: as `EfficientLocalAttention`.
    """

    def __init__(self, channels: int, variant: Variant = "b", device=None, dtype=None) -> None:
        super().__init__()
        self.attn = EfficientLocalAttention(channels, variant, device=device, dtype=dtype)
        self.gain = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → the same shape."""
        return torch.lerp(x, self.attn(x), self.gain.to(x.dtype))


Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


class _Place(NamedTuple):
    """Somewhere to insert."""

    measured: str
    """The module whose map says how wide it is."""
    before: bool
    """In front of that module; else behind it."""
    slot: str
    """The module to replace or to extend; for None or `nn.Identity` in it, what is inserted takes its place."""


# torchvision: block → the layer that ends its residual branch; other blocks, and timm's, have a drop path there
_BRANCH_ENDS = {
    "torchvision.models.resnet.BasicBlock": "bn2",
    "torchvision.models.resnet.Bottleneck": "bn3",
    "torchvision.models.mobilenetv2.InvertedResidual": "conv",
    "torchvision.models.mobilenetv3.InvertedResidual": "block",
    "torchvision.models.mnasnet._InvertedResidual": "layers",
    "torchvision.models.regnet.ResBottleneckBlock": "f",
}


def insert(model: nn.Module, variant: Variant = "b", where: Where | None = None) -> list[str]:
    """Puts an ELA layer into a built network, at many places, so that its outputs stay what they are until it trains.

    By default it goes to the end of each residual branch, before the shortcut is added:

    * timm's ResNet family and HRNet: the slot that timm has for attention, behind one that is there already;
    * other networks of timm (EfficientNet, MobileNet, RegNet, ConvNeXt, …): before the drop path; torchvision's
      EfficientNet and ConvNeXt likewise. Blocks without a shortcut get none;
    * torchvision's ResNet, MobileNet, MNASNet and RegNet: behind the branch's last layer;
    * VGG, which has no shortcuts: before each max pooling.

    Load a published checkpoint first, insert afterwards: names of what was there stay, except where a single layer has
    to be followed (torchvision's ResNet: `bn3` → `bn3.0`; an attention of timm's: `se` → `se.0`). To load what was
    trained, build the same network, insert with the same arguments, then `load_state_dict`. For timm's `save_for_hf`
    use a registered name, `ela_resnet50`.

    Args:
        model: a convolutional network with maps `[B, C, H, W]`, of timm, torchvision or your own; changed in place.
        variant: as `EfficientLocalAttention`.
        where: names of modules to insert behind, or shell patterns of them (`"layer[34].*.bn3"`), or a function of
            name and module; None for the default.

    Returns:
        Names of the inserted layers, in the order of the network's modules.

    Raises:
        ValueError: nothing matches, a place's output is no map, or the network has inserted layers already.
    """
    if present := [name for name, m in model.named_modules() if isinstance(m, InsertedAttention)]:
        raise ValueError(f"{type(model).__name__} has ELA layers inserted at {_some(present)} already.")
    places = _default_places(model) if where is None else _named_places(model, where)
    widths = _widths(model, places, only_square=where is None) if places else []
    if where is None:  # what is not run (a drop path without a shortcut) or no map is no place
        places = [place for place, width in zip(places, widths, strict=True) if width]
        widths = [width for width in widths if width]
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no residual branch that is known here; say `where`, of "
            f"{_some([name for name, _ in model.named_modules() if name])}."
        )
    if bad := [place.measured for place, width in zip(places, widths, strict=True) if not width]:
        raise ValueError(f"what {_some(bad)} give is no single map [B, C, H, W], or they are not run at all.")
    dd = get_device_dtype(model)
    return [
        _put(model, place, InsertedAttention(width, variant, **dd)) for place, width in zip(places, widths, strict=True)
    ]


def _some(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(map(repr, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")


def _default_places(model: nn.Module) -> list[_Place]:
    """The ends of residual branches, by what blocks of timm and torchvision look like."""
    places = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        path = f"{name}." if name else ""
        kind = f"{type(block).__module__}.{type(block).__name__}"
        if isinstance(block, BasicBlock | Bottleneck):
            places.append(_Place(f"{path}bn{3 if 'bn3' in children else 2}", False, f"{path}se"))
        elif kind in _BRANCH_ENDS:
            places.append(_Place(path + _BRANCH_ENDS[kind], False, path + _BRANCH_ENDS[kind]))
        elif drop := next((c for c in ("drop_path", "stochastic_depth") if c in children), None):
            places.append(_Place(path + drop, True, path + drop))
        elif type(model).__name__ == "VGG" and isinstance(block, nn.MaxPool2d):
            places.append(_Place(name, True, name))
    return places


def _named_places(model: nn.Module, where: Where) -> list[_Place]:
    """What the user asked for."""
    names = [name for name, _ in model.named_modules() if name]
    if callable(where):
        chosen = {name for name, module in model.named_modules() if name and where(name, module)}
        missing = ["the function"] if not chosen else []
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        matches = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}
        chosen = {name for found in matches.values() for name in found}
        missing = [repr(pattern) for pattern, found in matches.items() if not found]
    if missing or not chosen:
        raise ValueError(
            f"where: {' and '.join(missing) or 'an empty list'} matches no module of {type(model).__name__}; "
            f"it has {_some(names)}."
        )
    return [_Place(name, False, name) for name in names if name in chosen]


def _widths(model: nn.Module, places: Sequence[_Place], only_square: bool) -> list[int]:
    """Channels of the map at each place, 0 where there is no single one; by a run without numbers.

    What a square image makes is `[B, C, s, s]`; with `only_square` other shapes count as none, as `[B, s, s, C]` is.
    """
    seen: list[set[int]] = [set() for _ in places]

    def watch(widths: set[int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Any = None) -> None:
            x = args[0] if out is None else out
            is_map = isinstance(x, Tensor) and x.ndim == 4 and (not only_square or x.shape[2] == x.shape[3])
            widths.add(x.shape[1] if is_map else 0)

        return hook

    handles = []
    for place, widths in zip(places, seen, strict=True):
        module = model.get_submodule(place.measured)
        register = module.register_forward_pre_hook if place.before else module.register_forward_hook
        handles.append(register(watch(widths)))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shadows = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    side = max(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:])
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    image = torch.empty(2, getattr(model, "in_chans", 3), side, side, device="meta", dtype=dtype)
    try:
        with torch.no_grad():
            torch.func.functional_call(model, shadows, (image,))
    finally:
        for handle in handles:
            handle.remove()
    return [next(iter(widths)) if len(widths) == 1 else 0 for widths in seen]


def _sequential(first: nn.Module, second: nn.Module, training: bool) -> nn.Sequential:
    """Both, one after the other; frozen layers inside them stay in evaluation."""
    both = nn.Sequential(first, second)
    both.training = training
    return both


def _put(model: nn.Module, place: _Place, layer: InsertedAttention) -> str:
    """Inserts one layer; returns its name."""
    path, _, child = place.slot.rpartition(".")
    parent = model.get_submodule(path)
    present = getattr(parent, child)
    layer.train(parent.training)
    if present is None or isinstance(present, nn.Identity):
        setattr(parent, child, layer)
        return place.slot
    if place.before:
        setattr(parent, child, _sequential(layer, present, parent.training))
        return f"{place.slot}.0"
    if isinstance(present, nn.Sequential) and type(present).forward is nn.Sequential.forward:
        present.append(layer)
        return f"{place.slot}.{len(present) - 1}"
    setattr(parent, child, _sequential(present, layer, parent.training))
    return f"{place.slot}.1"


Placement = Literal["timm", "published"]


class ELABottleneck(Bottleneck):
    """timm's ResNet bottleneck with `u + ELA(u)` behind the 3x3 convolution, on the narrow width (the authors' place).

    Args:
        variant: as `EfficientLocalAttention`.

    Other arguments are those of `timm.models.resnet.Bottleneck`.
    """

    def __init__(self, *args: Any, variant: Variant = "b", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dd: Any = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        ela = EfficientLocalAttention(self.conv3.in_channels, variant, has_skip=True, **dd)
        self.act2 = nn.Sequential(OrderedDict(act=self.act2, ela=ela))


def _check_placement(placement: str) -> None:
    if placement not in ("timm", "published"):
        raise ValueError(f"placement={placement!r}: expected 'timm' or 'published'.")


def _create_resnet(
    name: str, pretrained: bool, block: type[nn.Module], layers: tuple[int, ...], kwargs: dict
) -> ResNet:
    """A ResNet of timm's with ELA in each block."""
    variant, placement = kwargs.pop("variant", "b"), kwargs.pop("placement", "timm")
    _check_placement(placement)
    if placement == "published" and block is Bottleneck:
        defaults: dict[str, Any] = {"block": ELABottleneck, "block_args": {"variant": variant}}
    else:  # in a basic block both places are the same, the published one has a skip
        attn = partial(EfficientLocalAttention, variant=variant, has_skip=placement == "published")
        defaults = {"block": block, "block_args": {"attn_layer": attn}}
    return weights.build_model(ResNet, name, pretrained, **{"layers": layers, **defaults, **kwargs})


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(**{"first_conv": "conv1", "classifier": "fc", "interpolation": "bilinear", **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "ela_resnet18": _cfg(),
        "ela_resnet34": _cfg(),
        "ela_resnet50": _cfg(),
        "ela_resnet101": _cfg(),
        "ela_mobilenetv2_100": _cfg(first_conv="conv_stem", classifier="classifier", interpolation="bicubic"),
    }
)


@register_model
def ela_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with ELA, 11.7 M parameters, 1.8 GMACs at 224.

    `variant='t' | 'b' | 's' | 'l'`, `placement='timm' | 'published'`, which has an inner skip.
    """
    return _create_resnet("ela_resnet18", pretrained, BasicBlock, (2, 2, 2, 2), kwargs)


@register_model
def ela_resnet34(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-34 with ELA, 21.8 M parameters, 3.7 GMACs at 224; arguments as `ela_resnet18`."""
    return _create_resnet("ela_resnet34", pretrained, BasicBlock, (3, 4, 6, 3), kwargs)


@register_model
def ela_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with ELA, 25.7 M parameters, 4.1 GMACs at 224; arguments as `ela_resnet18`.

    Placement 'timm' is at the end of the residual branch, on its wide map; 'published' is behind the 3x3 convolution,
    on the narrow one, with an inner skip.
    """
    return _create_resnet("ela_resnet50", pretrained, Bottleneck, (3, 4, 6, 3), kwargs)


@register_model
def ela_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-101 with ELA, 44.8 M parameters, 7.8 GMACs at 224; arguments as `ela_resnet50`."""
    return _create_resnet("ela_resnet101", pretrained, Bottleneck, (3, 4, 23, 3), kwargs)


@register_model
def ela_mobilenetv2_100(
    pretrained: bool = False, variant: Variant = "b", placement: Placement = "published", **kwargs
) -> EfficientNet:
    """MobileNetV2 with ELA behind each depthwise convolution, on the expanded map; 3.6 M parameters, 0.3 GMACs at 224.

    `placement='timm'` also has one in the first block, which does not expand, as timm's EfficientNets do.
    """
    _check_placement(placement)
    first = "ds_r1_k3_s1_c16" + ("_se0.25" if placement == "timm" else "")
    stages = ["r2_k3_s2_e6_c24", "r3_k3_s2_e6_c32", "r4_k3_s2_e6_c64", "r3_k3_s1_e6_c96", "r3_k3_s2_e6_c160"]
    arch = [[first], *([f"ir_{stage}_se0.25"] for stage in [*stages, "r1_k3_s1_e6_c320"])]
    defaults = {
        "block_args": decode_arch_def(arch),
        "num_features": 1280,
        "stem_size": 32,
        "se_layer": partial(EfficientLocalAttention, variant=variant),
        "act_layer": resolve_act_layer(kwargs, "relu6"),
        "norm_layer": partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
    }
    feature_cfg = {"feature_cls": "getter"}
    return weights.build_model(
        EfficientNet, "ela_mobilenetv2_100", pretrained, feature_cfg=feature_cfg, **{**defaults, **kwargs}
    )
