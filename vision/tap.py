"""TAP and ADL: tokens that look around before they attend, and attention that does not all fall on the same tokens.

Paper: "Robustifying Token Attention for Vision Transformers", Guo et al., ICCV 2023, https://arxiv.org/abs/2303.11126.
The authors' code (MIT): https://github.com/guoyongcs/TAPADL.

Written from the paper and checked against outputs of the authors' code. What differs from it:

* token-aware average pooling takes maps of any shape and unfolds nothing;
* the loss is right for a batch of one image, where the authors' code averages over keys instead of queries;
* the loss keeps no second attention matrix for the backward pass;
* the loss works for any network whose attention can be recorded (`ADLCriterion`), which need not know of it.

The networks that the paper builds on are `vision.fan` and `vision.rvt`.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision.attention import attention_layers, record_attention
from vision.criterion import StepLoss, classification_loss, unwrapped
from vision.inference import is_eager_cpu_inference

__all__ = [
    "ADLCriterion",
    "TokenAwareAveragePooling",
    "attention_diversification_loss",
    "pairwise_diversification_loss",
]


class TokenAwareAveragePooling(nn.Module):
    """Each token becomes a mix of averages around it, at scales that it chooses itself (section 3.2 of the paper).

    With X the map and P a small convolutional predictor, `y(p) = Σ_k softmax(P(X)(p))_k · X_k(p)`. Scale k = 0 is the
    token itself, scale k ≥ 1 the mean of the 3x3 tokens at distance k ("dilation"); beyond the border are zeros that
    count. Names in the state dict are the authors' ("dilation_predictor").

    Args:
        dim: width C.
        num_scales: K, the identity included; the published networks have 4.

    Raises:
        ValueError: `num_scales` below 1.
    """

    def __init__(self, dim: int, num_scales: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        if num_scales < 1:
            raise ValueError(f"num_scales={num_scales}: expected 1 (the token alone) or more.")
        self.dim = dim
        self.num_scales = num_scales
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False, device=device, dtype=dtype),
            nn.BatchNorm2d(num_scales, device=device, dtype=dtype),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False, device=device, dtype=dtype),
        )

    def scale_weights(self, x: Tensor) -> Tensor:
        """How much each token takes of each scale: `[B, H, W, C]` → `[B, H, W, num_scales]`, sums to 1."""
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).softmax(-1)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Pools a map, or tokens that are one.

        Args:
            x: `[B, H, W, C]`, or `[B, N, C]` with N = H * W tokens, row by row.
            grid_size: `(H, W)`, for `[B, N, C]`.

        Returns:
            The same shape.

        Raises:
            ValueError: tokens without a `grid_size`, or with one that does not multiply to N.
        """
        if x.ndim == 4:
            return self._mix(x, self.scale_weights(x))
        if grid_size is None or grid_size[0] * grid_size[1] != x.shape[1]:
            raise ValueError(f"{x.shape[1]} tokens are no map of grid_size={grid_size}; pass its height and width.")
        x = x.unflatten(1, grid_size)
        return self._mix(x, self.scale_weights(x)).flatten(1, 2)

    def _mix(self, x: Tensor, scale_weights: Tensor) -> Tensor:
        """The mix of averages, for weights `[B, H, W, num_scales]`."""
        if is_eager_cpu_inference(x):
            return self._mix_bags(x, scale_weights)
        mean = x.new_full((self.dim, 1, 3, 3), 1 / 9)
        channels_first = x.permute(0, 3, 1, 2)
        y = x * scale_weights[..., :1]
        for k in range(1, self.num_scales):
            averages = F.conv2d(channels_first, mean, padding=k, dilation=k, groups=self.dim)
            y = y + averages.permute(0, 2, 3, 1) * scale_weights[..., k : k + 1]
        return y

    def _mix_bags(self, x: Tensor, scale_weights: Tensor) -> Tensor:
        """The same as one weighted sum of tokens each, without a map of averages in between."""
        B, H, W, C = x.shape
        places, scales, shares = _neighbourhoods(H, W, self.num_scales)
        index = places + H * W * torch.arange(B).view(B, 1, 1)
        weight = scale_weights.reshape(B, H * W, -1)[..., scales] * shares.to(x.dtype)
        y = F.embedding_bag(
            index.flatten(0, 1), x.reshape(-1, C), mode="sum", per_sample_weights=weight.flatten(0, 1).contiguous()
        )
        return y.view(B, H, W, C)


register_notrace_module(TokenAwareAveragePooling)  # a decorator would hide its methods from type checkers


@lru_cache(maxsize=32)
def _neighbourhoods(H: int, W: int, num_scales: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that each token of a map may take from, on the CPU.

    Returns:
        `[H * W, n]`, int64, their places, clamped to the map; `[n]`, int64, the scale that each is of; `[H * W, n]`,
        float32, the share of the scale's weight that each gets: 1 for the token itself, 1/9 for others, 0 outside.
    """
    ring = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    steps = [(0, 0, 0)] + [(k, k * dy, k * dx) for k in range(1, num_scales) for dy, dx in ring]
    scales, dy, dx = torch.tensor(steps).unbind(1)
    y, x = torch.arange(H).view(H, 1, 1) + dy, torch.arange(W).view(1, W, 1) + dx
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    shares = inside * torch.where(scales == 0, 1.0, 1 / 9)
    return (y.clamp(0, H - 1) * W + x.clamp(0, W - 1)).flatten(0, 1), scales, shares.flatten(0, 1)


def attention_diversification_loss(attns: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """How much the queries of a layer attend to the same keys, mean over layers (section 3.3 of the paper).

    With A the mean over heads and m the mean of its rows, both with every entry up to `threshold` / Nk set to 0: the
    mean over rows and images of `cos(m, A_i)`. A row without an entry above that adds 0, so nearly uniform attention
    costs nothing. O(Nq) comparisons; `pairwise_diversification_loss` is what it stands for.

    As in the authors' code the mean over layers divides by their number and 1e-6. For the backward pass no attention
    matrix is kept beyond those given; what is computed from them is computed again.

    Args:
        attns: per layer `[B, heads, Nq, Nk]`, rows sum to 1.
        threshold: in units of uniform attention.

    Returns:
        Scalar from 0 to 1, float32 or what the attention has if that is more.

    Raises:
        ValueError: no layer, or attention of another shape.
    """
    _check_attention(attns)
    layers = [
        checkpoint(_similarity_to_mean_row, attn, threshold, use_reentrant=False, preserve_rng_state=False)
        for attn in attns
    ]
    return torch.stack(layers).sum() / (len(layers) + 1e-6)


def _similarity_to_mean_row(attn: Tensor, threshold: float) -> Tensor:
    """Mean over rows and images of the cosine between a row and the mean row."""
    rows = _head_mean(attn)  # [B, Nq, Nk]
    mean, rows = (_above(x, threshold) for x in (rows.mean(1, keepdim=True), rows))
    length = mean.norm(dim=-1).clamp(min=1e-8) * rows.norm(dim=-1).clamp(min=1e-8)  # [B, Nq]
    return ((rows @ mean.mT).squeeze(-1) / length).mean()


def pairwise_diversification_loss(attns: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """The mean cosine between every two different rows, mean over layers: what diverse attention makes small.

    The definition that `attention_diversification_loss` makes affordable: O(Nq²) comparisons, and a matrix of them is
    kept. For N queries of each image the cheap loss never exceeds `sqrt(((N - 1) * pairwise + 1) / N)`.

    Args:
        attns: per layer `[B, heads, Nq, Nk]`, rows sum to 1.
        threshold: in units of uniform attention; every entry up to `threshold` / Nk counts as 0.

    Returns:
        Scalar from 0 to 1.

    Raises:
        ValueError: no layer, attention of another shape, or of a single query.
    """
    _check_attention(attns)
    layers = []
    for attn in attns:
        N = attn.shape[2]
        if N < 2:
            raise ValueError(f"attention of shape {tuple(attn.shape)} has one query; there are no pairs to compare.")
        rows = F.normalize(_above(_head_mean(attn), threshold), dim=-1, eps=1e-8)
        cosines = rows @ rows.mT  # [B, N, N]
        alone = cosines.diagonal(dim1=1, dim2=2).sum(1)
        layers.append(((cosines.sum((1, 2)) - alone) / (N * (N - 1))).mean())
    return torch.stack(layers).mean()


def _check_attention(attns: Sequence[Tensor]) -> None:
    if not len(attns):
        raise ValueError("no attention given; expected one tensor [B, heads, Nq, Nk] per layer.")
    for attn in attns:
        if attn.ndim != 4:
            raise ValueError(f"attention of shape {tuple(attn.shape)}; expected [B, heads, Nq, Nk] per layer.")


def _head_mean(attn: Tensor) -> Tensor:
    """[B, heads, Nq, Nk] → [B, Nq, Nk], at least in single precision."""
    # Not `mean`: the gradient of a sum is one matrix seen by all heads, that of a mean is written out for each.
    return attn.sum(1, dtype=torch.promote_types(attn.dtype, torch.float32)) / attn.shape[1]


def _above(x: Tensor, threshold: float) -> Tensor:
    """Every entry that is not above `threshold` times uniform attention set to 0; the choice has no gradient."""
    return torch.where(x > threshold / x.shape[-1], x, 0)


class ADLCriterion(nn.Module):
    """The task's loss plus attention diversification loss, for any network whose attention can be recorded.

    The network is neither changed nor told: while the criterion calls it, the chosen layers take their step-by-step
    path and their attention is listened to; every other layer, and the network outside of the criterion, stay fused.
    Fused attention keeps no attention matrix and this keeps one per chosen layer, `B * heads * N * N` values, with all
    layers of a DeiT-S for a twentieth more time: choose fewer `layers` where memory is short.

    Layers with a single query (class attention) have no rows to compare and are left out, as in the paper.

    Args:
        weight: of the diversification loss; the paper's networks have 1.
        threshold: as in `attention_diversification_loss`.
        layers: names of attention layers, or patterns for them such as 'blocks.1?.attn', as
            `vision.attention.attention_layers(model)` lists them; None for all.
        label_smoothing: of the classification loss.
        task_loss: of logits and target, instead of the classification loss; such as
            `vision.segmentation.segmentation_loss`.

    Raises:
        TypeError: one name instead of a sequence of them.
        ValueError: label smoothing for a loss of your own.
    """

    def __init__(
        self,
        weight: float = 1.0,
        threshold: float = 2.0,
        layers: Sequence[str] | None = None,
        label_smoothing: float = 0.0,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(layers, str):
            raise TypeError(f"layers={layers!r}: expected a sequence of names or patterns; put the one into a list.")
        self.weight = weight
        self.threshold = threshold
        self.layers = layers
        if task_loss is not None and label_smoothing:
            raise ValueError(f"label_smoothing={label_smoothing} belongs to the classification loss, not to task_loss.")
        self.task_loss = task_loss or partial(classification_loss, label_smoothing=label_smoothing)

    def forward(self, model: nn.Module, images: Tensor, target: Tensor) -> StepLoss:
        """The loss of one step.

        Args:
            model: the network, wrapped for data-parallel training or not.
            images: normalised, `[B, C, H, W]`.
            target: `[B]`, integer classes, or `[B, num_classes]`, probabilities; or what `task_loss` takes.

        Returns:
            The loss, and its parts "task" and "diversification".

        Raises:
            ValueError: a network without attention to record or none of the name asked for, one that is compiled or
                recomputes its activations; a target of another shape.
        """
        network = unwrapped(model)
        _check_recordable(model)
        listened = nn.ModuleList(network.get_submodule(name) for name in self._chosen(network))
        with record_attention(listened) as recorded:
            logits = model(images)
        kept = [recorded[str(i)] for i in range(len(listened))]
        attns = [layer_map.attn for maps in kept for layer_map in maps if layer_map.attn.shape[-2] > 1]
        if not attns:
            raise ValueError(f"no layer of {type(network).__name__} that was called compares several queries.")
        task = self.task_loss(logits, target)
        diversification = attention_diversification_loss(attns, self.threshold)
        loss = task + self.weight * diversification
        parts = {"task": task.detach(), "diversification": diversification.detach()}
        return StepLoss(loss, logits.detach(), parts)

    def _chosen(self, network: nn.Module) -> list[str]:
        """Full names of the layers to listen to."""
        names = attention_layers(network)
        if not names:
            raise ValueError(
                f"{type(network).__name__} has no attention that can be recorded; expected layers with a "
                "vision.attention.AttentionTap, or timm's attention layers."
            )
        if self.layers is None:
            return names
        missing = [pattern for pattern in self.layers if not any(fnmatchcase(name, pattern) for name in names)]
        if missing or not self.layers:
            raise ValueError(
                f"layers={list(self.layers)}: {missing or 'nothing'} names no attention layer of "
                f"{type(network).__name__}, which has {', '.join(names)}."
            )
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.layers)]


def _check_recordable(model: nn.Module) -> None:
    """Refuses what runs code that listeners do not see, or forgets what they keep."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError("the attention of a compiled network cannot be recorded; pass the network uncompiled.")
        if getattr(module, "grad_checkpointing", False) and torch.is_grad_enabled():
            raise ValueError(
                "the attention of a network with gradient checkpointing cannot be recorded: it is forgotten and "
                "computed again; call model.set_grad_checkpointing(False)."
            )
