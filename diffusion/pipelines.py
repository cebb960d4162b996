"""A-STAR on Stable Diffusion: the pipelines of diffusers, with subjects that are kept apart and kept.

    import torch
    from diffusion import AStarStableDiffusionPipeline

    pipe = AStarStableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    result = pipe("a cat and a dog", subjects=["cat", "dog"], generator=torch.Generator().manual_seed(0))
    result.images[0]

"A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", Agarwal et al., ICCV 2023,
arXiv 2306.14544; no code of the authors' is known. Each pipeline is its parent: it loads the same weights, takes every
argument of the parent and runs the parent's own loop, into which `diffusion.guidance.guide` puts the moves of the
latent. Without subjects, or with all weights 0, its pictures are the parent's bit for bit.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from diffusion.attention_maps import find_subjects, prompt_end
from diffusion.guidance import Concepts, Guidance, Trace, guide

__all__ = ["AStarPipelineOutput", "AStarStableDiffusionPipeline", "AStarStableDiffusionXLPipeline", "find_concepts"]

Subject = str | int | Sequence[int]
Place = Sequence[float] | np.ndarray | Tensor | Image.Image


@dataclass
class AStarPipelineOutput(BaseOutput):
    """What a pipeline returns.

    Attributes:
        images: pictures, or what `output_type` asks for.
        nsfw_content_detected: as Stable Diffusion's pipeline has it; None for SDXL.
        subjects: of each picture the names of its subjects.
        maps: `[steps, B, H, W, K]` on the CPU, in [0, 1]: the attention to each subject in the pass that denoised.
        losses: of these maps, each `[steps, B]`.

    The last three are there with `return_attention=True`. `steps` counts the evaluations of the sampler.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    subjects: list[list[str]] | None = None
    maps: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class _AttentionGuided:
    """What the pipelines share: their parent's `__call__`, run under guidance."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        subjects: Sequence[Subject] | Sequence[Sequence[Subject]] | None = None,
        losses: Mapping[str, float] | None = None,
        guidance_steps: int | None = None,
        step_size: float | None = None,
        layout: Mapping[str, Place] | None = None,
        attributes: Mapping[str, str | Sequence[str]] | None = None,
        guidance: Guidance | None = None,
        return_attention: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generates pictures in which each subject of the prompt keeps a place of its own.

        Args:
            prompt: as the parent takes it.
            *args: the parent's further arguments in its order.
            subjects: words of the prompt, e.g. `["cat", "dog"]`, or token positions; of several prompts the same
                words in each, or a list of lists. None runs the parent as it is.
            losses: the weight of each, `{"segregation": 1, "retention": 1}` without it; also `"attend_and_excite"`,
                `"divide_and_bind"` and `"conform"`.
            guidance_steps: how many evaluations of the sampler are guided, from the first; all without it.
            step_size: how far the latent is moved, 20 without it.
            layout: where subjects shall be: `{subject: place}`, a place being a box `(left, top, right, bottom)` in
                fractions of the picture or a mask of the picture's size (True, or more than half of the range, is
                inside). Retention then holds the subject to its place, from the first step on.
            attributes: `{subject: word or words}`, e.g. `{"cat": "black"}`, which Divide & Bind and CONFORM bind.
            guidance: all further settings; `losses`, `guidance_steps` and `step_size` take precedence.
            return_attention: also returns maps and losses of each step.
            **kwargs: every argument of the parent.

        Returns:
            `AStarPipelineOutput`; with `return_dict=False` the parent's tuple, and with `return_attention` maps and
            losses behind it.

        Raises:
            ValueError: if a subject is not in the prompt, a place has the wrong size, a setting is out of range, or
                the pipeline is in float16 on a CPU.
            TypeError: if the UNet has no cross-attention.
        """
        parent: Any = super()
        settings = _settings(guidance, losses, guidance_steps, step_size)
        concepts: list[Concepts] = []
        if subjects is None:
            self._refuse_without_subjects(losses, layout, attributes, guidance, return_attention)
        else:
            given = inspect.signature(parent.__call__).bind(prompt, *args, **kwargs).arguments
            concepts = self._concepts(given, subjects, attributes or {}, layout or {})
            _warn_of_one_subject(concepts, settings)
        if concepts and settings.weighted:
            self._refuse_half_precision_on_a_cpu()
        if not concepts or not (settings.weighted or return_attention):
            output = parent.__call__(prompt, *args, **kwargs)
            return output if isinstance(output, tuple) else self._output(output, concepts, None)
        with guide(self, concepts, settings, trace=return_attention) as trace:
            output = parent.__call__(prompt, *args, **kwargs)
        if isinstance(output, tuple):
            return (*output, *_stacked(trace)) if return_attention else output
        return self._output(output, concepts, trace if return_attention else None)

    def to_json_string(self) -> str:
        """The configuration under the parent's name: what is saved can be loaded without this package."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = next(base.__name__ for base in type(self).__mro__ if base.__module__ != __name__)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def _refuse_without_subjects(*given: Any) -> None:
        if any(given):
            raise ValueError(
                "losses, layout, attributes, guidance and return_attention are about subjects: name them, e.g. "
                "subjects=['cat', 'dog'], or leave the others out"
            )

    def _concepts(
        self,
        given: Mapping[str, Any],
        subjects: Sequence[Any],
        attributes: Mapping[str, str | Sequence[str]],
        layout: Mapping[str, Place],
    ) -> list[Concepts]:
        """The concepts of each prompt among the arguments that the parent is given."""
        prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
        if prompt is None:
            prompts: list[Any] = [None] * (1 if embeds is None else len(embeds))
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        size = self._picture_size(given.get("height"), given.get("width"))
        return [
            find_concepts(self, text, own, attributes=attributes, layout=layout, size=size)
            for text, own in zip(prompts, _of_each_prompt(subjects, len(prompts)), strict=True)
        ]

    def _picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width as the parent will take them."""
        pipe: Any = self
        sample = pipe.unet.config.sample_size
        default = [side * pipe.vae_scale_factor for side in ((sample, sample) if isinstance(sample, int) else sample)]
        if isinstance(self, StableDiffusionPipeline) and not (height and width):
            height = width = None  # it takes both or neither
        return height or default[0], width or default[1]

    def _refuse_half_precision_on_a_cpu(self) -> None:
        pipe: Any = self
        if pipe.unet.dtype == torch.float16 and pipe._execution_device.type == "cpu":
            raise ValueError(
                "guidance in float16 on a CPU is neither fast nor precise enough for a gradient: convert the pipeline, "
                "pipe.to(torch.float32) or pipe.to(torch.bfloat16), or move it to a GPU"
            )

    @staticmethod
    def _output(output: Any, concepts: list[Concepts], trace: Trace | None) -> AStarPipelineOutput:
        seen: dict[str, Any] = {}
        if trace is not None:
            maps, losses = _stacked(trace)
            names = [list(of.subjects) for of in concepts for _ in range(maps.shape[1] // len(concepts))]
            seen = {"subjects": names, "maps": maps, "losses": losses}
        return AStarPipelineOutput(output.images, output.get("nsfw_content_detected"), **seen)


def _stacked(trace: Trace) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.stack(trace.maps), {name: torch.stack(values) for name, values in trace.losses.items()}


class AStarStableDiffusionPipeline(_AttentionGuided, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x with attention guidance; see `__call__`."""


class AStarStableDiffusionXLPipeline(_AttentionGuided, StableDiffusionXLPipeline):
    """Stable Diffusion XL with attention guidance; see `__call__`."""


def find_concepts(
    pipe: Any,
    prompt: str | None,
    subjects: Sequence[Subject],
    *,
    attributes: Mapping[str, str | Sequence[str]] | None = None,
    layout: Mapping[str, Place] | None = None,
    size: tuple[int, int] | None = None,
) -> Concepts:
    """Where the subjects of a prompt stand among its tokens, and where they shall be in the picture.

    Args:
        pipe: a pipeline with a CLIP tokenizer.
        prompt: one prompt; None where only embeddings are known, and then subjects are token positions.
        subjects: words or token positions, see `diffusion.attention_maps.find_subjects`.
        attributes: `{subject: word or words}`.
        layout: `{subject: box or mask}`, as `AStarStableDiffusionPipeline` takes it.
        size: height and width of the picture in pixels, which the layout needs.

    Returns:
        The concepts, for `diffusion.guidance.guide`.

    Raises:
        ValueError: if one of them is not in the prompt, or a place cannot be used.
    """
    subjects = _checked_subjects(subjects)
    names = [subject if isinstance(subject, str) else str(subject) for subject in subjects]
    words = [(word, of) for of, given in (attributes or {}).items() for word in _as_list(given)]
    for of in [*(of for _, of in words), *(layout or {})]:
        if of not in names:
            raise ValueError(f"{of!r} has a place or an attribute, but is none of the subjects {names}")
    if prompt is None:
        if any(isinstance(subject, str) for subject in [*subjects, *(word for word, _ in words)]):
            raise ValueError(f"subjects={names}: words are looked up in the prompt; with prompt_embeds alone give the "
                             "token positions, e.g. subjects=[2, 5]")  # fmt: skip
        positions = [(s,) if isinstance(s, int) else tuple(s) for s in subjects if not isinstance(s, str)]
        end = None
    else:
        if isinstance(pipe, TextualInversionLoaderMixin):
            prompt = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)  # type: ignore[attr-defined]
        positions = find_subjects(pipe.tokenizer, prompt, [*subjects, *(word for word, _ in words)])  # type: ignore[arg-type]
        end = prompt_end(pipe.tokenizer, prompt)  # type: ignore[arg-type]
    return Concepts(
        tuple(names),
        tuple(positions),
        end,
        tuple((len(names) + i, names.index(of)) for i, (_, of) in enumerate(words)),
        {names.index(of): _place(of, place, size) for of, place in (layout or {}).items()},
    )


def _as_list(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _settings(
    guidance: Guidance | None, losses: Mapping[str, float] | None, steps: int | None, step_size: float | None
) -> Guidance:
    given = {"losses": losses, "steps": steps, "step_size": step_size}
    return replace(guidance or Guidance(), **{name: value for name, value in given.items() if value is not None})


def _checked_subjects(subjects: Sequence[Subject]) -> list[Subject]:
    if isinstance(subjects, str) or not len(subjects):
        raise ValueError(f"subjects={subjects!r}: give a list of words of the prompt, e.g. subjects=['cat', 'dog']")
    return list(subjects)


def _of_each_prompt(subjects: Sequence[Any], prompts: int) -> list[Sequence[Subject]]:
    """The subjects of each prompt: a list of lists is one list a prompt, whatever else is for all of them."""
    nested = not isinstance(subjects, str) and any(
        not isinstance(own, (str, int)) and any(not isinstance(item, int) for item in own) for own in subjects
    )
    if not nested and prompts > 1 and all(not isinstance(own, (str, int)) for own in subjects):
        nested = True  # positions of each prompt
    if not nested:
        return [subjects] * prompts
    if len(subjects) != prompts:
        raise ValueError(f"subjects has {len(subjects)} lists for {prompts} prompts: give one list a prompt")
    return list(subjects)


def _place(subject: str, place: Place, size: tuple[int, int] | None) -> Tensor:
    """A box or mask as a mask `[height, width]` of the picture."""
    if size is None:
        raise ValueError("a layout needs the size of the picture: size=(height, width)")
    if isinstance(place, Image.Image):
        place = np.array(place.convert("L"))
    if isinstance(place, (np.ndarray, Tensor)) and place.ndim != 1:
        mask = torch.tensor(place) if isinstance(place, np.ndarray) else place.detach().cpu()
        if tuple(mask.shape) != tuple(size):
            raise ValueError(
                f"the mask of {subject!r} has shape {tuple(mask.shape)}; it must be the picture's "
                f"{size[0]} x {size[1]} (height, width)"
            )
        if mask.dtype != torch.bool:
            mask = mask > (0.5 if mask.dtype.is_floating_point or mask.max() <= 1 else 127)
    else:
        mask = _box(subject, [float(edge) for edge in place], size)
    if not mask.any():
        raise ValueError(f"the place of {subject!r} is empty: nothing of the picture is inside")
    return mask


def _box(subject: str, box: list[float], size: tuple[int, int]) -> Tensor:
    ordered = len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    if not ordered:
        raise ValueError(
            f"the box of {subject!r} is {box}; it must be (left, top, right, bottom) in fractions of the picture, "
            "0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )
    left, top, right, bottom = box
    mask = torch.zeros(size, dtype=torch.bool)
    rows = slice(int(top * size[0]), max(int(top * size[0]) + 1, round(bottom * size[0])))
    columns = slice(int(left * size[1]), max(int(left * size[1]) + 1, round(right * size[1])))
    mask[rows, columns] = True
    return mask


def _warn_of_one_subject(concepts: list[Concepts], settings: Guidance) -> None:
    if settings.weighted.get("segregation") and all(len(of.subjects) == 1 for of in concepts):
        warnings.warn(
            f"one subject ({concepts[0].subjects[0]!r}) has nothing to be segregated from: the segregation loss is 0",
            UserWarning,
            stacklevel=3,
        )
