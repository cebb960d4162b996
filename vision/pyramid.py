"""timm's model surface for backbones that are a stem, a few stages at growing stride, a norm and a linear head."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models import checkpoint_seq, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

import weights
from vision.inference import in_parts

__all__ = ["PyramidBackbone", "imagenet_cfg", "pad_bottom_right"]


@register_notrace_function
def pad_bottom_right(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Zero-pads a map on the bottom and on the right up to multiples of a size; no copy where it fits already.

    Args:
        x: `[B, H, W, C]`.
        multiple: `(h, w)`; the result's height is a multiple of `h` and its width of `w`.

    Returns:
        `[B, ceil(H / h) * h, ceil(W / w) * w, C]`.
    """
    pad_h, pad_w = -x.shape[1] % multiple[0], -x.shape[2] % multiple[1]
    if pad_h or pad_w:
        x = nn.functional.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    return x


_TOKENS_AT_ONCE = 1568  # enough rows for a matrix product to run at full speed


class PyramidBackbone(nn.Module, ABC):
    """timm's model methods over `num_stages` stages; a subclass says what the stages are.

    A subclass builds its layers, then calls `build_head`, and says what a stage is by the three abstract methods.

    Between stages maps are `[B, C, H, W]` in channels-last memory, so that a block may look at them as `[B, H, W, C]`
    without a copy.
    """

    feature_info: list[dict]
    norm: nn.Module

    def __init__(self, in_chans: int, img_size: int | tuple[int, int] | None, drop_rate: float) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.set_input_size(img_size)

    def build_head(self, num_features: int, num_classes: int, global_pool: str, device=None, dtype=None) -> None:
        """Adds the pooling and the classifier.

        Args:
            num_features: width of the last stage.
            num_classes: 0 for none: the model then returns pooled features.
            global_pool: a pooling of timm's `SelectAdaptivePool2d`, or '' to classify each place of the map.
            device: of the new parameters.
            dtype: of the new parameters.
        """
        self.num_features = num_features
        self._set_head(num_classes, global_pool, device=device, dtype=dtype)

    def _set_head(self, num_classes: int, global_pool: str, **dd) -> None:
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()
        self._init_linear(self.head)

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        """Linear layers start from a normal of deviation 0.02, cut at ±2; for `self.apply`."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @abstractmethod
    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        """From the map before a stage, or the image, to the map after it, `[B, C, H, W]`."""

    @abstractmethod
    def stage_blocks(self, index: int) -> nn.Module:
        """The blocks of a stage, in a container that may be iterated and called."""

    @abstractmethod
    def keep_stages(self, count: int) -> None:
        """Forgets all stages from `count` on, and what only they needed."""

    def run_blocks(self, index: int, x: Tensor) -> Tensor:
        """The blocks of one stage on `[B, …]`, with gradient checkpointing where that is on.

        In inference on a CPU a stage with many tokens takes a few images at a time.
        """
        blocks = self.stage_blocks(index)
        if self.grad_checkpointing:
            return checkpoint_seq(blocks, x)
        return in_parts(blocks, x, _TOKENS_AT_ONCE * self.feature_info[index]["num_chs"], blocks)

    @property
    def num_stages(self) -> int:
        """How many stages there are, pruned ones not counted."""
        return len(self.feature_info)

    def get_classifier(self) -> nn.Module:
        """The last layer, `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a fresh classifier on top.

        Args:
            num_classes: 0 removes the classifier.
            global_pool: None keeps the pooling; '' keeps the map and classifies each place of it.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(num_classes, pool, **get_device_dtype(self))
        self.head.train(self.training)
        self.global_pool.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int] | None) -> None:
        """Records the image size that the model is meant for; no weight depends on it and any other size runs too.

        Args:
            img_size: `(height, width)` or one number for both, in pixels; None for the size of the pretrained weights.
        """
        update_model_input_size(self, img_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters beyond the 1-D ones that must not decay: none."""
        return set()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to the last stage's normed map, `[B, num_features, H / 32, W / 32]`."""
        for index in range(self.num_stages):
            x = self.forward_stage(index, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits `[B, num_classes]`, or to `[B, head_hidden_size]` with `pre_logits`.

        Without pooling both stay maps: `[B, num_classes, H, W]`, `[B, head_hidden_size, H, W]`.
        """
        x = self.head_drop(self.global_pool(x))
        if pre_logits:
            return x
        if not self.global_pool.pool_type:
            return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps at the end of the stages.

        Args:
            x: images, `[B, in_chans, H, W]`.
            indices: stages to return: all for None, the last n for a number n, or a list of indices.
            norm: apply the final norm to the last stage's map (it fits no other).
            stop_early: compute nothing past the last stage asked for.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: leave out the final output.

        Returns:
            The list of maps, `[B, C_i, H_i, W_i]`; without `intermediates_only` a pair of
            `forward_features(x)` (or, with `stop_early`, the last map computed) and that list.

        Raises:
            ValueError: unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NHWC'.")
        take, last = feature_take_indices(self.num_stages, indices)
        final = self.num_stages - 1
        maps = []
        for index in range(last + 1 if stop_early else self.num_stages):
            x = self.forward_stage(index, x)
            if index in take:
                y = self.norm(x) if norm and index == final else x
                maps.append(y.permute(0, 2, 3, 1) if output_fmt == "NHWC" else y)
        if intermediates_only:
            return maps
        return (self.norm(x) if index == final else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Sequence[int]:
        """Removes what the maps asked for do not need; returns their indices.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove the final norm.
            prune_head: remove the classifier and the pooling.
        """
        take, last = feature_take_indices(self.num_stages, indices)
        cut = last < self.num_stages - 1
        if cut:
            self.keep_stages(last + 1)
            self.num_features = self.feature_info[last]["num_chs"]
            self.feature_info = self.feature_info[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take


def imagenet_cfg(weights_name: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """The `default_cfgs` entry of a pyramid trained on ImageNet-1K at 224 pixels.

    Args:
        weights_name: the checkpoint's entry in the manifest, which says address, licence and paper; None for a network
            without published weights.
        **kwargs: what is different, and `first_conv`.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **(weights.cfg(weights_name) if weights_name else {}),
        **kwargs,
    }
