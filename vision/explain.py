"""What a model looks at: heat maps over images, for the backbones of this package and for any timm model.

Ways to one face, `heatmap`:

* `attention_map`: how much the tokens attend to each place, weighted by what that attention does for the class
  (Chefer et al., "Generic Attention-model Explainability", ICCV 2021, https://arxiv.org/abs/2103.15679, without its
  propagation through layers); for models whose attention can be recorded.
* `class_activation`: the last map, weighted by its gradient (Selvaraju et al., "Grad-CAM", ICCV 2017,
  https://arxiv.org/abs/1610.02391); for all others.

And `attended`: where one place of the image attends, in one layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.attention import AttentionMap, attention_layers, record_attention
from vision.pyramid import PyramidBackbone
from vision.rollout import rollout

__all__ = ["Method", "attended", "attention_map", "class_activation", "heatmap"]

Method = Literal["auto", "attention", "activation", "rollout"]
_MAX_TOKENS = 1024  # of a layer whose attention, quadratic in this, is recorded


def heatmap(
    model: nn.Module,
    images: Tensor,
    target: int | Tensor | None = None,
    method: Method = "auto",
) -> Tensor:
    """Where the evidence for a class lies.

    Args:
        model: a timm model: a backbone of this package, or any other with a spatial or token feature map.
        images: normalised, `[B, C, H, W]`.
        target: a class for all images, or one each, `[B]`; by default each image's most likely one. A model without
            classifier is asked for what makes its pooled features large.
        method: 'attention' for `attention_map`, 'activation' for `class_activation`, 'auto' for the first where a
            pyramid of this package attends, else the second; 'rollout' for `vision.rollout.rollout`, which knows no
            classes and so does not see `target`.

    Returns:
        `[B, H, W]`, float32, from 0 to 1 in each image (all 0 where nothing speaks for the class).

    Raises:
        ValueError: an unknown method, a target that is no class of the model, a model without a feature map or, asked
            for its attention, without that.
    """
    if method == "auto":
        method = "attention" if isinstance(model, PyramidBackbone) and attention_layers(model) else "activation"
    ways = {"attention": attention_map, "activation": class_activation, "rollout": _rollout_map}
    if method not in ways:
        raise ValueError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(Method)))}.")
    return ways[method](model, images, target)


def attention_map(model: nn.Module, images: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Attention received by each place, as far as it speaks for the class.

    With `relu(A ⊙ ∂y/∂A)`, mean over heads, of each layer: for a pyramid of this package the sum over queries in the
    last two stages, each layer scaled to 1, then averaged (only the last stage where the one before has more than 1024
    tokens, so that memory stays bounded). For a network whose layers all see the same tokens, the paper's equation 6:
    what reaches the class token, or the mean of all tokens, through all layers and their residual connections.

    Args, returns and errors are those of `heatmap`.
    """
    listened = model
    if isinstance(model, PyramidBackbone):
        side = model.feature_info[max(model.num_stages - 2, 0)]["reduction"]
        tokens = (images.shape[-2] // side) * (images.shape[-1] // side)
        first = model.num_stages - (2 if tokens <= _MAX_TOKENS else 1)
        listened = nn.ModuleList(model.stage_blocks(i) for i in range(max(first, 0), model.num_stages))
    with _gradients(model, images) as images, record_attention(listened) as layers:
        score = _score(model, model(images), target)
        kept = [layer_map for maps in layers.values() for layer_map in maps]
        if listened is model:  # a class attention, or a few tokens' own, mixes no patches
            kept = [layer_map for layer_map in kept if layer_map.attn.shape[-2] == layer_map.attn.shape[-1]]
        if not kept:
            raise ValueError(f"{type(model).__name__} has no attention to record; method='activation' works for it.")
        grads = torch.autograd.grad(score, [layer_map.attn for layer_map in kept])
    if isinstance(model, PyramidBackbone):
        maps = [_received(layer, grad, images.shape[-2:]) for layer, grad in zip(kept, grads, strict=True)]
        return _to_unit(torch.stack(maps).mean(0))
    return _to_unit(_resize(_propagated(model, kept, grads, images), images.shape[-2:]))


def _rollout_map(model: nn.Module, images: Tensor, _: int | Tensor | None) -> Tensor:
    """`vision.rollout.rollout` in evaluation mode, over the images."""
    with _gradients(model, images) as images:
        return _to_unit(_resize(rollout(model, images), images.shape[-2:]))


def _propagated(model: nn.Module, kept: list[AttentionMap], grads: Sequence[Tensor], images: Tensor) -> Tensor:
    """Relevance of each patch to the class token, `[B, h, w]`: a row of the product over layers of 1 + relu(A ⊙ ∂A)."""
    sizes = {tuple(layer.attn.shape[-2:]) for layer in kept}
    if len(sizes) > 1 or kept[0].attn.shape[0] != len(images):
        raise ValueError(
            f"{type(model).__name__} attends in windows or over changing tokens; method='activation' works for it."
        )
    N = kept[0].attn.shape[-1]
    prefix, h, w = _token_grid(model, N, images)
    row = torch.zeros(len(images), 1, N, device=images.device)
    row[..., : prefix or N] = 1
    for layer, grad in zip(reversed(kept), reversed(grads), strict=True):
        row = row + row @ (layer.attn.detach() * grad).relu().mean(1).float()
    return row[:, 0, prefix:].unflatten(1, (h, w))


@torch.no_grad()
def attended(
    model: nn.Module, images: Tensor, at: tuple[float, float], layer: int | str = -1, connectivity: bool = False
) -> Tensor:
    """Where one place of the image attends: a row of a layer's attention, mean over heads, over the image.

    Args:
        model: a backbone of this package that attends, or a vision transformer of timm's.
        images: normalised, `[B, C, H, W]`.
        at: the place, `(y, x)`, as fractions of the height and the width from the upper left.
        layer: a name or an index into `attention_layers(model)`.
        connectivity: instead of how much, the share of heads that attend there at all: the routed regions of BiFormer,
            the kept keys of Sparsifiner.

    Returns:
        `[B, H, W]`, float32; its largest value in each image is 1, or with `connectivity` at most 1.

    Raises:
        ValueError: a place outside the image, no such layer, or one that attends within windows of their own.
    """
    if not all(0 <= fraction < 1 for fraction in at):
        raise ValueError(f"at={at}: expected (y, x) from 0 up to, but not including, 1.")
    name = _layer_name(model, layer)
    with _gradients(model, images) as images, torch.no_grad(), record_attention(model.get_submodule(name)) as layers:
        model(images)
        maps = next(iter(layers.values()))
    if len(maps) != 1 or len(maps[0].attn) != len(images):
        raise ValueError(f"layer {name!r} of {type(model).__name__} attends within windows; choose another layer.")
    attn, grid, extent = maps[0]
    prefix, h, w = (
        (attn.shape[-1] - grid[0] * grid[1], *grid) if grid[0] else _token_grid(model, attn.shape[-1], images)
    )
    # queries may lie on a finer grid than keys, of the same shape
    finer = round(((attn.shape[-2] - prefix) / (h * w)) ** 0.5) if attn.shape[-2] > prefix else 0
    if not finer or finer**2 * h * w != attn.shape[-2] - prefix:
        raise ValueError(f"in layer {name!r} of {type(model).__name__} not every place attends; choose another layer.")
    y, x = (int(fraction / e * side * finer) for fraction, e, side in zip(at, extent, (h, w), strict=True))
    row = attn[:, :, prefix + y * w * finer + x, prefix:].float()  # [B, heads, h * w]
    row = ((row > 0).float() if connectivity else row).mean(1).unflatten(1, (h, w))
    size = images.shape[-2:]
    covered = tuple(round(side * e) for side, e in zip(size, extent, strict=True))
    row = F.interpolate(row[:, None], covered, mode="nearest")[:, 0, : size[0], : size[1]]
    return row if connectivity else row / row.amax((1, 2), keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)


def _layer_name(model: nn.Module, layer: int | str) -> str:
    """The layer's full name."""
    names = attention_layers(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no attention that can be recorded.")
    if isinstance(layer, str) and layer in names:
        return layer
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return names[layer]
    listed = ", ".join(names if len(names) <= 4 else [*names[:2], "…", names[-1]])
    raise ValueError(f"layer={layer!r}: {type(model).__name__} has {len(names)} layers of attention: {listed}.")


def class_activation(model: nn.Module, images: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Grad-CAM: the channels of the last map, each weighted by the mean of its gradient; what is negative is cut.

    With average pooling and a linear classifier this is the class activation map up to a factor. For a vision
    transformer the map is the input of its last block, since past that the class token alone counts.

    Args, returns and errors are those of `heatmap`.
    """
    with _gradients(model, images) as images:
        features, logits = _last_map(model, images)
        if not isinstance(features, Tensor):
            raise ValueError(f"{type(model).__name__} has several last maps at once; class activation needs one.")
        (grad,) = torch.autograd.grad(_score(model, logits, target), features)
    features, grad = _as_map(model, features, images), _as_map(model, grad, images)  # [B, C, h, w]
    cam = (grad.mean((2, 3), keepdim=True) * features).sum(1).relu()
    return _to_unit(_resize(cam.detach(), images.shape[-2:]))


@contextmanager
def _gradients(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Evaluation mode with gradients on, whatever is set outside; gives images from which a graph starts."""
    training = [module for module in model.modules() if module.training]  # some may be frozen in evaluation
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield images.detach().clone().requires_grad_(True)
    finally:
        for module in training:
            module.training = True


def _score(model: nn.Module, logits: Tensor, target: int | Tensor | None) -> Tensor:
    """The sum over the batch of what is to be explained."""
    if logits.ndim != 2:
        raise ValueError(f"the model gives {tuple(logits.shape)}; expected one row of logits or features per image.")
    if not getattr(model, "num_classes", 1):
        return logits.square().sum() / 2
    if target is None:
        return logits.max(dim=1).values.sum()
    chosen = torch.as_tensor(target, device=logits.device, dtype=torch.long).expand(len(logits))
    if chosen.min() < 0 or chosen.max() >= logits.shape[1]:
        raise ValueError(f"target={target} is no class of this model; expected 0 to {logits.shape[1] - 1}.")
    return logits.gather(1, chosen[:, None]).sum()


def _received(layer: AttentionMap, grad: Tensor, size: torch.Size) -> Tensor:
    """One layer's relevance of each place, `[B, H, W]`, its largest value 1."""
    relevance = (layer.attn.detach() * grad).relu().mean(1).sum(1)  # [B, Nk]
    relevance = relevance.unflatten(1, layer.key_grid)
    covered = tuple(round(s * e) for s, e in zip(size, layer.extent, strict=True))
    relevance = _resize(relevance, covered)[:, : size[0], : size[1]]
    return relevance / relevance.amax((1, 2), keepdim=True).clamp(min=torch.finfo(relevance.dtype).tiny)


def _last_map(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The features to weight, and the logits that depend on them."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(model, "patch_embed"):
        inputs: list[Tensor] = []
        handle = blocks[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            logits = model(images)
        finally:
            handle.remove()
        return inputs[-1], logits
    to_features, to_logits = getattr(model, "forward_features", None), getattr(model, "forward_head", None)
    if to_features is None or to_logits is None:
        raise ValueError(f"{type(model).__name__} has no feature map to explain; expected a timm model.")
    features = to_features(images)
    if not isinstance(features, Tensor):
        raise ValueError(
            f"{type(model).__name__} has several feature maps at once, which class activation cannot weigh."
        )
    return features, to_logits(features)


def _as_map(model: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """Features of any of timm's layouts as `[B, C, h, w]`."""
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features
    if features.ndim == 3:
        prefix, h, w = _token_grid(model, features.shape[1], images)
        return features[:, prefix:].mT.unflatten(2, (h, w))
    raise ValueError(f"{type(model).__name__}: features of shape {tuple(features.shape)} are no map.")


def _token_grid(model: nn.Module, count: int, images: Tensor) -> tuple[int, int, int]:
    """How many class tokens stand in front of the others, and the height and width of those.

    Some networks add their class tokens late: what is left must be a grid of the image's shape.
    """
    for prefix in (getattr(model, "num_prefix_tokens", 0), 0, 1):
        h = round(((count - prefix) * images.shape[-2] / images.shape[-1]) ** 0.5)
        if h and (count - prefix) % h == 0:
            return prefix, h, (count - prefix) // h
    raise ValueError(
        f"{type(model).__name__}: {count} tokens are no map of a {images.shape[-2]} × {images.shape[-1]} image."
    )


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """[B, h, w] → [B, *size], bilinear."""
    return F.interpolate(maps.float().unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def _to_unit(maps: Tensor) -> Tensor:
    """Each map to the range from 0 to 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
