"""CLIP scores of generated images: with the full prompt, with its worst half, and of a caption with the prompt.

The protocol of Attend-and-Excite, which A-STAR's evaluation follows: "Attend-and-Excite: Attention-Based Semantic
Guidance for Text-to-Image Diffusion Models", Chefer et al., SIGGRAPH 2023, https://arxiv.org/abs/2301.13826; consulted:
https://github.com/yuval-alaluf/Attend-and-Excite (MIT). CLIP ViT-B/16; a prompt's embedding is the mean over the 80
ImageNet templates; the prompt is split at " and ", else at " with "; a caption is embedded as it is. The models and
templates are open_clip's.

What differs: where a template's article meets the prompt's, the template's is dropped by words and not by letters; on
the 276 prompts of `prompt_list` the texts are the same. All scores are cosines in float32, whatever the model's
precision.
"""

import difflib
import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from weights import WeightsError

__all__ = [
    "BenchmarkPrompt",
    "Captioner",
    "ClipScorer",
    "ImageTextScores",
    "TextTextScores",
    "prompt_list",
    "sub_prompts",
]

Captioner = Callable[[Sequence[Image.Image]], Sequence[str]]


class ImageTextScores(NamedTuple):
    """How well images show their prompts: cosines, `[N]`, float32, on the CPU."""

    full: Tensor
    """With the whole prompt."""
    minimum: Tensor
    """With the sub-prompt that is shown worst; `full` where the prompt has none."""


class TextTextScores(NamedTuple):
    """How well captions of images repeat their prompts."""

    scores: Tensor
    """Cosines, `[N]`, float32, on the CPU."""
    captions: list[str]
    """What the captioner said."""


class ClipScorer:
    """Scores images and captions by a CLIP model of open_clip.

    Text features are computed once for each prompt and kept.

        scorer = ClipScorer.from_pretrained(device="cuda")
        full, minimum = scorer.image_text(images, [prompt] * len(images))

    Args:
        model: `open_clip.CLIP`, `open_clip.CustomTextCLIP` or alike, where it is to work; put into evaluation mode.
        tokenizer: list of str → token ids `[N, T]`; None for CLIP's own. `open_clip.get_tokenizer(name)` has others.
        preprocess: image → tensor `[3, H, W]`; None for what the model's configuration says.
        batch_size: images, and texts, in one pass.

    Raises:
        ValueError: no tokenizer for a model with a vocabulary other than CLIP's, or a batch size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        preprocess: Callable[[Image.Image], Tensor] | None = None,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.model: Any = model.eval()
        self.tokenizer = tokenizer or _clip_tokenizer(model)
        self.preprocess = preprocess or _transform_of(model)
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        # What images are cast to; normalisation layers may have kept another precision.
        weighted = (m.weight.dtype for m in self.model.visual.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        self._dtype = next(weighted, torch.float32)
        self._prompt_features: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str = "ViT-B-16",
        pretrained: str | None = "openai",
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> "ClipScorer":
        """A scorer with a published model; the protocol's by default. Weights are fetched on first use.

        Args:
            model: a name of `open_clip.list_models()`, `hf-hub:organisation/repository`, or `local-dir:folder`.
            pretrained: a tag of `open_clip.list_pretrained_tags_by_model(model)` or a file; without effect, and may be
                None, where `model` is a repository or a folder.
            device: where to work.
            batch_size: images, and texts, in one pass.

        Raises:
            ValueError: an unknown name or tag.
            WeightsError: the weights cannot be fetched or read.
        """
        # Some checkpoints were trained with an approximate activation, which the model's name need not say.
        quick_gelu = False
        if ":" in model:
            pretrained = None
        else:
            quick_gelu = _checked_tag(model, pretrained).get("quick_gelu", False)
        try:
            built = open_clip.create_model(model, pretrained, force_quick_gelu=quick_gelu, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(model)
        except (RuntimeError, OSError) as error:
            raise WeightsError(
                f"the weights {pretrained!r} of {model!r} cannot be had ({error}). Without a network, give a file, "
                f"pretrained='/path/to/model.safetensors', or a folder, model='local-dir:/path/to/folder'."
            ) from error
        return cls(built.to(device), tokenizer, batch_size=batch_size)

    def image_text(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> ImageTextScores:
        """How well each image shows its prompt, and the half of its prompt that it shows worst.

        Args:
            images: N of them, of any size and mode.
            prompts: one for each image. What exceeds the model's context (77 tokens) is cut off.

        Raises:
            ValueError: numbers that differ, nothing to score, an empty prompt.
            TypeError: something that is no PIL image or no str.
        """
        _check(images, Image.Image, "images")
        _check_pairs(images, prompts, "images")
        parts = [sub_prompts(prompt) or [prompt] for prompt in prompts]
        owner = torch.tensor([i for i, of_prompt in enumerate(parts) for _ in of_prompt])
        image_features = self._image_features(images)
        full = (image_features * self._features_of_prompts(prompts)).sum(-1)
        part_features = self._features_of_prompts([part for of_prompt in parts for part in of_prompt])
        scores = (image_features[owner] * part_features).sum(-1)
        minimum = torch.full_like(full, torch.inf).scatter_reduce(0, owner, scores, "amin")
        return ImageTextScores(full, minimum)

    def text_text(self, images: Sequence[Image.Image], prompts: Sequence[str], captioner: Captioner) -> TextTextScores:
        """How well a captioner recognises each image's prompt in it.

        Args:
            images: N of them.
            prompts: one for each image.
            captioner: images → a caption for each; called with `batch_size` images at most. The paper's is BLIP base,
                fine-tuned on COCO captions.

        Raises:
            ValueError: numbers that differ, nothing to score, an empty prompt.
            TypeError: something that is no PIL image or no str.
        """
        _check(images, Image.Image, "images")
        _check_pairs(images, prompts, "images")
        captions = [caption for batch in _batches(images, self.batch_size) for caption in captioner(batch)]
        if len(captions) != len(images):
            raise ValueError(
                f"the captioner gave {len(captions)} captions for {len(images)} images; expected one each."
            )
        return TextTextScores(self.caption_text(captions, prompts), captions)

    def caption_text(self, captions: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """How well captions that are there already repeat their prompts.

        Args:
            captions: N of them; embedded as they are, without templates.
            prompts: one for each caption.

        Returns:
            Cosines, `[N]`, float32, on the CPU.

        Raises:
            ValueError: numbers that differ, nothing to score, an empty prompt.
            TypeError: something that is no str.
        """
        _check(captions, str, "captions")
        _check_pairs(captions, prompts, "captions")
        return (self._text_features(captions) * self._features_of_prompts(prompts)).sum(-1)

    @torch.no_grad()
    def _image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """`[N, D]`, of unit length."""
        features = []
        for batch in _batches(images, self.batch_size):
            pixels = torch.stack([self.preprocess(image) for image in batch])
            features.append(self.model.encode_image(pixels.to(self.device, self._dtype)))
        return F.normalize(torch.cat(features).float(), dim=-1).cpu()

    @torch.no_grad()
    def _text_features(self, texts: Sequence[str]) -> Tensor:
        """`[N, D]`, of unit length."""
        features = [
            self.model.encode_text(self.tokenizer(batch).to(self.device)) for batch in _batches(texts, self.batch_size)
        ]
        return F.normalize(torch.cat(features).float(), dim=-1).cpu()

    def _features_of_prompts(self, prompts: Sequence[str]) -> Tensor:
        """`[N, D]`: of each prompt the mean over all templates, of unit length."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompt_features]:
            templates = open_clip.OPENAI_IMAGENET_TEMPLATES
            texts = [_in_template(template, prompt) for prompt in new for template in templates]
            features = self._text_features(texts).unflatten(0, (len(new), len(templates))).mean(1)
            self._prompt_features.update(zip(new, F.normalize(features, dim=-1), strict=True))
        return torch.stack([self._prompt_features[prompt] for prompt in prompts])


def sub_prompts(prompt: str) -> list[str]:
    """The halves of a prompt that names two things, by which its minimum is taken.

    Args:
        prompt: split at each " and "; if there is none, at each " with ".

    Returns:
        Two or more; none for a prompt that has neither.
    """
    parts = prompt.split(" and ")
    if len(parts) == 1:
        parts = prompt.split(" with ")
    return [part.strip() for part in parts if part.strip()] if len(parts) > 1 else []


class BenchmarkPrompt(NamedTuple):
    """A prompt of the list on which methods of this kind are compared."""

    text: str
    subjects: tuple[str, str]
    """The two words of the text that must not be lost."""
    group: str
    """'animal-animal', 'animal-object' or 'object-object'."""


_ANIMALS = "cat dog bird bear lion horse elephant monkey frog turtle rabbit mouse".split()
_OBJECTS = "backpack glasses crown suitcase chair balloon bow car bowl bench clock apple".split()
_WORN = frozenset({"crown", "glasses", "bow"})  # an animal has these on
_COLOURS = "red orange yellow green blue purple pink brown gray black white".split()


def prompt_list(seed: int = 0) -> list[BenchmarkPrompt]:
    """The 276 prompts of Attend-and-Excite in their three groups, with colours drawn anew.

    | group | prompts | form |
    | --- | --- | --- |
    | animal-animal | 66 | "a cat and a dog": all pairs of 12 animals |
    | animal-object | 144 | "a cat and a red car"; "a cat with a crown", and so for glasses and bow |
    | object-object | 66 | "a red car and a blue bench": all pairs of 12 objects |

    The article is always "a" ("a elephant", "a orange bowl"), as in the published list: scores would not compare
    otherwise. Its colours are random, and so are these; a seed repeats them, but the published draw is no seed's.

    Args:
        seed: of the colours.
    """
    draw = random.Random(seed)
    prompts = []
    for x, y in itertools.combinations(_ANIMALS, 2):
        prompts.append(BenchmarkPrompt(f"a {x} and a {y}", (x, y), "animal-animal"))
    for x, y in itertools.product(_ANIMALS, _OBJECTS):
        rest = f"with a {y}" if y in _WORN else f"and a {draw.choice(_COLOURS)} {y}"
        prompts.append(BenchmarkPrompt(f"a {x} {rest}", (x, y), "animal-object"))
    for x, y in itertools.combinations(_OBJECTS, 2):
        text = f"a {draw.choice(_COLOURS)} {x} and a {draw.choice(_COLOURS)} {y}"
        prompts.append(BenchmarkPrompt(text, (x, y), "object-object"))
    return prompts


def _in_template(template: Callable[[str], str], prompt: str) -> str:
    """A prompt in a template made for bare nouns: of two articles in a row the second, the prompt's, is kept."""
    return re.sub(r"\b(a|the) (?=an? )", "", template(prompt))


def _batches(items: Sequence[Any], size: int) -> list[Any]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _check(items: object, kind: type, name: str) -> None:
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise TypeError(f"{name}: expected a list of {kind.__name__}, got {type(items).__name__}.")
    if bad := [i for i, item in enumerate(items) if not isinstance(item, kind)]:
        raise TypeError(f"{name}[{bad[0]}]: expected {kind.__name__}, got {type(items[bad[0]]).__name__}.")


def _check_pairs(items: Sequence[object], prompts: Sequence[str], name: str) -> None:
    _check(prompts, str, "prompts")
    if len(items) != len(prompts):
        raise ValueError(
            f"{len(items)} {name} for {len(prompts)} prompts; expected one prompt each. For one prompt: "
            f"[prompt] * {len(items)}."
        )
    if not items:
        raise ValueError(f"no {name}: there is nothing to score.")
    if empty := [i for i, prompt in enumerate(prompts) if not prompt.strip()]:
        raise ValueError(f"prompts[{empty[0]}] is empty.")


def _checked_tag(model: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip knows of a tag; nothing of a file."""
    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
        raise ValueError(
            f"model={model!r} is no model of open_clip{hint}. open_clip.list_models() names all of them; a folder is "
            f"'local-dir:/path', a repository 'hf-hub:organisation/name'."
        )
    if pretrained is not None and open_clip.is_pretrained_cfg(name, pretrained):
        return open_clip.get_pretrained_cfg(name, pretrained)
    if pretrained is None or not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model!r}, which has "
            f"{', '.join(map(repr, tags)) or 'none'}."
        )
    return {}


def _clip_tokenizer(model: nn.Module) -> Callable[[list[str]], Tensor]:
    config = open_clip.get_model_tokenize_cfg(model)
    tokenizer = open_clip.SimpleTokenizer(context_length=config.get("context_length", 77))
    if config.get("vocab_size") != tokenizer.vocab_size:
        raise ValueError(
            f"{type(model).__name__} has a vocabulary of {config.get('vocab_size')}, CLIP's tokenizer one of "
            f"{tokenizer.vocab_size}; give the model's own: tokenizer=open_clip.get_tokenizer(name)."
        )
    return tokenizer


def _transform_of(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    return cast(Callable[[Image.Image], Tensor], image_transform_v2(config, is_train=False))
