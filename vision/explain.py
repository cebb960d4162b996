"""What a model looks at: heat maps over images, for the backbones of this package and for any timm model.

Two ways to one face, `heatmap`:

* `attention_map`: how much the tokens attend to each place, weighted by what that attention does for the class
  (Chefer et al., "Generic Attention-model Explainability", ICCV 2021, https://arxiv.org/abs/2103.15679, without its
  propagation through layers); for models whose attention can be recorded.
* `class_activation`: the last map, weighted by its gradient (Selvaraju et al., "Grad-CAM", ICCV 2017,
  https://arxiv.org/abs/1610.02391); for all others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.attention import AttentionMap, AttentionTap, record_attention
from vision.pyramid import PyramidBackbone

__all__ = ["attention_map", "class_activation", "heatmap"]

_MAX_TOKENS = 1024  # of a layer whose attention, quadratic in this, is recorded


def heatmap(model: nn.Module, images: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Where the evidence for a class lies.

    Args:
        model: a timm model: a backbone of this package, or any other with a spatial or token feature map.
        images: normalised, `[B, C, H, W]`.
        target: a class for all images, or one each, `[B]`; by default each image's most likely one. A model without
            classifier is asked for what makes its pooled features large.

    Returns:
        `[B, H, W]`, float32, from 0 to 1 in each image (all 0 where nothing speaks for the class).

    Raises:
        ValueError: a target that is no class of the model, or a model without a feature map.
    """
    if isinstance(model, PyramidBackbone) and any(isinstance(m, AttentionTap) for m in model.modules()):
        return attention_map(model, images, target)
    return class_activation(model, images, target)


def attention_map(model: PyramidBackbone, images: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Attention received by each place in the last two stages, as far as it speaks for the class.

    For each layer `relu(A ⊙ ∂y/∂A)`, mean over heads, sum over queries; each scaled to 1, then averaged. Where the
    last stage but one has more than 1024 tokens, only the last stage counts, so that memory stays bounded.

    Args, returns and errors are those of `heatmap`.
    """
    side = max(4 * 2 ** (model.num_stages - 2), 1)
    tokens = (images.shape[-2] // side) * (images.shape[-1] // side)
    first = model.num_stages - (2 if tokens <= _MAX_TOKENS else 1)
    listened = nn.ModuleList(model.stage_blocks(i) for i in range(max(first, 0), model.num_stages))
    with _gradients(model, images) as images, record_attention(listened) as layers:
        score = _score(model, model(images), target)
        kept = [layer_map for maps in layers.values() for layer_map in maps]
        grads = torch.autograd.grad(score, [layer_map.attn for layer_map in kept])
    maps = [_received(layer, grad, images.shape[-2:]) for layer, grad in zip(kept, grads, strict=True)]
    return _to_unit(torch.stack(maps).mean(0))


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
        # Class tokens stand in front, but some networks add them late: the rest must be a grid of the image's shape.
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0, 1):
            tokens = features[:, prefix:]
            h = round((tokens.shape[1] * images.shape[-2] / images.shape[-1]) ** 0.5)
            if h and tokens.shape[1] % h == 0:
                return tokens.mT.unflatten(2, (h, -1))
    raise ValueError(f"{type(model).__name__}: features of shape {tuple(features.shape)} are no map.")


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """[B, h, w] → [B, *size], bilinear."""
    return F.interpolate(maps.float().unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def _to_unit(maps: Tensor) -> Tensor:
    """Each map to the range from 0 to 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
