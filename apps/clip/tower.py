"""A CLIP of open_clip as a network of this command: its image tower in timm's terms, and classes that are words."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, PILToTensor

from weights import WeightsError

from ..errors import UsageError
from ..models import Network, cached, require_hub
from .choice import ResolvedClip

__all__ = ["ClipTower", "Words", "load", "read_words"]

_REMEDY = "give a folder with --clip-checkpoint DIR, or a file with --clip MODEL:FILE"


class ClipTower(nn.Module):
    """The image tower of a CLIP.

    Args:
        clip: A model of open_clip.
        tokenizer: list of str → token ids `[N, T]`.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.clip: Any = clip
        self.tokenizer = tokenizer
        self.classes: Tensor | None = None  # [D, K], of unit length, where classes have been named

    def forward_features(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, D]` of unit length, float32."""
        return F.normalize(self.clip.encode_image(images).float(), dim=-1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """`[B, D]` to logits `[B, K]`: cosines with the classes, scaled as in training."""
        if pre_logits or self.classes is None:
            return features
        return self.clip.logit_scale.float().exp() * (features @ self.classes)  # a bias would be the same for all

    def forward(self, images: Tensor) -> Tensor:
        """Logits, or features where no classes have been named."""
        return self.forward_head(self.forward_features(images))

    def encode(self, texts: Sequence[str], templates: Sequence[Callable[[str], str]]) -> Tensor:
        """Texts to `[D, K]`: of each the mean over all templates, of unit length, float32."""
        device = next(self.clip.parameters()).device
        return open_clip.build_zero_shot_classifier(
            self.clip, self.tokenizer, texts, templates, device=device
        ).float()  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Classes in words.

    Attributes:
        labels: A name each, as rows have it.
        templates: Sentences with `{}` in the place of a name; none for the eighty of ImageNet.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...] = ()

    def named(self, network: Network, device: torch.device) -> Network:
        """A CLIP with these classes, its text features computed once, on `device`."""
        tower: Any = network.module.to(device)
        templates = [_filled(template) for template in self.templates] or open_clip.OPENAI_IMAGENET_TEMPLATES
        tower.classes = tower.encode(self.labels, templates)
        return replace(network, labels=self.labels)

    def facts(self) -> dict[str, Any]:
        """What rows depend on, for the ledger."""
        return {"labels": list(self.labels), "templates": list(self.templates)}


def read_words(labels: str, templates: Sequence[str] | None) -> Words:
    """Reads `--labels` and `--template`.

    Args:
        labels: Names with commas between, or `@FILE` with one a line.
        templates: Sentences.

    Raises:
        UsageError: Fewer than two names, one twice, no such file, or a sentence without a place for the name.
    """
    if labels.startswith("@"):
        try:
            with open(labels[1:], encoding="utf-8") as file:
                parts = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
            raise UsageError(f"--labels {labels}: cannot read this file: {reason}") from error
    else:
        parts = labels.split(",")
    names = [name for part in parts if (name := part.strip())]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--labels: named twice: {', '.join(twice)}")
    if len(names) < 2:
        raise UsageError(f"--labels {labels!r}: expected two names or more, such as 'cat, dog'; one is always the best")
    for template in templates or ():
        if template.count("{}") != 1:
            raise UsageError(f"--template {template!r}: expected {{}} once, where the label goes: 'a photo of a {{}}'")
    return Words(tuple(names), tuple(templates or ()))


def load(resolved: ResolvedClip) -> Network:
    """Builds a CLIP; weights that are published are fetched on first use.

    Raises:
        UsageError: They cannot be had or do not fit.
    """
    from safetensors import SafetensorError

    from diffusion.scores import ClipScorer

    _require_reachable(resolved)
    try:
        scorer = ClipScorer.from_pretrained(resolved.model, resolved.pretrained)
    except (WeightsError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UsageError(f"{resolved.label} cannot be loaded: {reason}; {_REMEDY}") from error
    config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(scorer.model))
    described = {"input_size": config.input_size, "mean": config.mean, "std": config.std}
    tower = ClipTower(scorer.model, scorer.tokenizer).eval()
    return Network(tower, resolved.label, (), described, _pixels(config))


def _pixels(config: PreprocessCfg) -> Compose:
    """open_clip's own transform up to the uint8 pixels `[3, H, W]`."""
    whole: Any = image_transform_v2(config, is_train=False)
    steps = [step for step in whole.transforms if not isinstance(step, MaybeToTensor | Normalize)]
    return Compose([*steps, PILToTensor()])


def _require_reachable(resolved: ResolvedClip) -> None:
    """Asks the hub once, with a short wait, for what is not on this machine; its client would retry for a minute."""
    if resolved.model.startswith("hf-hub:"):
        repository, file = resolved.model.removeprefix("hf-hub:"), ""
    elif resolved.pretrained and open_clip.is_pretrained_cfg(resolved.model, resolved.pretrained):
        where = open_clip.get_pretrained_cfg(resolved.model, resolved.pretrained).get("hf_hub", "")
        repository, file = os.path.split(where)
    else:
        return
    stem = os.path.splitext(file or "open_clip_pytorch_model.bin")[0]
    files = [f"{stem}{suffix}" for suffix in (".safetensors", ".bin", ".pt", ".pth")]
    if repository and cached(repository, ["open_clip_model.safetensors", *files]) is None:
        require_hub(repository, resolved.label, _REMEDY)


def _filled(template: str) -> Callable[[str], str]:
    return lambda label: template.replace("{}", label)
