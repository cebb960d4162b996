"""The layer: a mask over channels and a mask over places."""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vision.inference import is_eager_cpu_inference

__all__ = ["Form", "Layout", "PolarizedMasks", "PolarizedSelfAttention", "check_option", "polarized_masks"]

Layout = Literal["parallel", "sequential"]
Form = Literal["released", "paper"]

# What timm tells squeeze-and-excitation layers in whose place this one may stand; it has no meaning here.
_SQUEEZE_ARGS = {"rd_ratio", "rd_channels", "rd_divisor", "rd_round_fn", "act_layer", "norm_layer", "gate_layer"}


def check_option(name: str, value: object, kind: Any) -> None:
    """Refuses a value that is none of a `Literal`'s.

    Raises:
        ValueError: naming the option and its choices.
    """
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
        check_option("layout", layout, Layout)
        check_option("form", form, Form)
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


@torch.no_grad()
def polarized_masks(model: nn.Module, images: Tensor) -> dict[str, PolarizedMasks]:
    """What each polarized attention of a network lets through, for pictures and study.

    Args:
        model: a network; runs as it is, so put it into evaluation mode first.
        images: its input, `[B, C, H, W]`.

    Returns:
        Layer name → its masks, in the order of the model's modules; those of the last call where a layer runs more
        than once.

    Raises:
        ValueError: a network without such a layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PolarizedSelfAttention)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PolarizedSelfAttention whose masks could be shown.")
    kept: dict[str, PolarizedMasks] = {}

    def keep(name: str) -> Any:
        return lambda layer, args: kept.update({name: layer.masks(args[0])})

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: kept[name] for name in layers if name in kept}
