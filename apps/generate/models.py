"""From what a user calls a text-to-image model to a pipeline with attention guidance.

Only safetensors are read. A model on the hub is asked for its kind before anything large is fetched.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weights

from ..errors import UsageError
from ..folders import PICKLES, READ, has_weights
from ..models import digest, require_hub

if TYPE_CHECKING:
    import torch

    from diffusion import AStarStableDiffusionPipeline, AStarStableDiffusionXLPipeline

    Pipeline = AStarStableDiffusionPipeline | AStarStableDiffusionXLPipeline

__all__ = ["SHIPPED", "Model", "find", "load", "picture_size", "unknown_words"]

SHIPPED = "text_to_scene"

# The class in model_index.json and ours that takes its place.
_PIPELINES = {
    "StableDiffusionPipeline": "AStarStableDiffusionPipeline",
    "AStarStableDiffusionPipeline": "AStarStableDiffusionPipeline",
    "StableDiffusionXLPipeline": "AStarStableDiffusionXLPipeline",
    "AStarStableDiffusionXLPipeline": "AStarStableDiffusionXLPipeline",
}
_WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder")


@dataclass(frozen=True)
class Model:
    """A model whose files are on this machine.

    Attributes:
        name: What a picture's record calls it; `find` knows it by that name.
        folder: In the layout of diffusers' `save_pretrained`.
        pipeline: Name of the class in `diffusion`.
        identity: A digest of its files.
        variant: Of its files, if it has no others (`fp16`).
        defaults: Settings that suit it, as names of `Settings`.
    """

    name: str
    folder: Path
    pipeline: str
    identity: str
    variant: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def shipped(self) -> bool:
        """Whether it comes with this suite."""
        return self.name == SHIPPED

    @property
    def suits(self) -> dict[str, Any]:
        """`defaults`, and the guidance scale that is usual for its kind where they do not name one."""
        return {"guidance_scale": 5.0 if self.pipeline.endswith("XLPipeline") else 7.5, **self.defaults}


def find(name: str, *, may_fetch: bool = True) -> Model:
    """The model of that name, fetched if need be.

    Args:
        name: `text_to_scene`, which ships; a folder; or `OWNER/NAME`, `OWNER/NAME@REVISION` on the hub.
        may_fetch: Whether the hub may be asked for what is not here.

    Raises:
        UsageError: There is none, or it is of a kind that has no attention guidance.
        WeightsError: The model that ships is not installed.
    """
    if name == SHIPPED:
        folder = weights.shipped(SHIPPED)
        # The sampler as on its card; the step as it did best in benchmarks/claims/astar.py.
        return _described(name, folder, {"steps": 15, "guidance_scale": 3.0, "step_size": 5.0})
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _described(name, folder)
    if folder.is_file():
        raise UsageError(
            f"--model {name} is a file, expected a folder with model_index.json; diffusers makes one of it: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name):
        raise UsageError(f"--model {name}: there is no such folder, and a model on the hub is called OWNER/NAME")
    return _on_hub(name, may_fetch)


def _on_hub(name: str, may_fetch: bool) -> Model:
    """A model in the hub's cache on this machine, or fetched into it; from then on it is called by its commit."""
    from diffusers import DiffusionPipeline

    repository, _, revision = name.partition("@")
    files: dict[str, Any] = {"revision": revision or None, "use_safetensors": True}
    try:
        folder = DiffusionPipeline.download(repository, local_files_only=True, **files)
        here = not _without_weights(Path(folder))
    except (OSError, ValueError):
        folder, here = None, False
    if not here and not may_fetch:
        raise UsageError(
            f"the picture names the model {name}, which is not on this machine; if you want it fetched from "
            f"huggingface.co, say so: --model {name}"
        )
    found = Path(folder if here and folder else _fetched(name, files))  # a fetch that was cut off goes on
    return _described(f"{repository}@{found.name}", found, identity=f"commit {found.name}")


def _fetched(name: str, files: dict[str, Any]) -> Any:
    """Fetches a model from the hub once it is known to be of a kind that can be used."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    remedy = "give a folder in diffusers' layout with --model FOLDER"
    repository = name.partition("@")[0]
    require_hub(name, name, remedy)
    try:
        index = hf_hub_download(repository, "model_index.json", revision=files["revision"])
        _pipeline_class(Path(index), name)
        return DiffusionPipeline.download(repository, **files)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be fetched: {_first_line(error)}; {remedy}") from error


def load(model: Model, device: torch.device, dtype: str) -> Pipeline:
    """The pipeline on its device.

    Raises:
        UsageError: Its files cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError

    import diffusion

    broken = (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError, SafetensorError)
    cls: type[Pipeline] = getattr(diffusion, model.pipeline)
    try:
        pipe = cls.from_pretrained(
            model.folder,
            use_safetensors=True,
            local_files_only=True,
            dtype=getattr(torch, dtype),
            variant=model.variant,
        )
        if pipe.dtype != getattr(torch, dtype):  # of a diffusers that does not take `dtype` yet
            pipe.to(getattr(torch, dtype))
        pipe.to(device)
    except broken as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UsageError(f"{model.name} cannot be loaded: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture_size(pipe: Pipeline) -> tuple[int, int]:
    """Height and width of a pipeline's pictures where nothing else is asked for."""
    sample: Any = pipe.unet.config["sample_size"]
    height, width = (side * pipe.vae_scale_factor for side in ((sample, sample) if isinstance(sample, int) else sample))
    return height, width


def unknown_words(pipe: Pipeline, prompt: str) -> tuple[list[str], list[str]]:
    """Words of a prompt that are no tokens of a small tokenizer, and all words that are.

    A word's last piece carries `</w>`; in a tokenizer that was made for a few words, all longer ones are words.
    """
    pieces = [piece.removesuffix("</w>") for piece in pipe.tokenizer.get_vocab() if piece.endswith("</w>")]
    known = sorted({piece for piece in pieces if len(piece) > 1 and piece.isalpha() and piece.isascii()} | {"a"})
    return [word for word in re.findall(r"\w+", prompt.lower()) if word not in known], known


def _described(name: str, folder: Path, defaults: dict[str, Any] | None = None, identity: str | None = None) -> Model:
    """A folder as a model, once its files are known to be of a kind that is read."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(f"--model {name}: {folder} holds no model_index.json, as diffusers' save_pretrained writes it")
    pipeline = _pipeline_class(index, name)
    files = sorted(file for file in folder.glob("*/*") if file.suffix in (*READ, *PICKLES) and file.is_file())
    for part in _without_weights(folder):
        if any(file.parent.name == part and file.suffix in PICKLES for file in files):
            raise UsageError(
                f"{name} has the weights of {part} as a pickle only, which can run code when it is read; only "
                "safetensors are. If you trust it, convert it once: DiffusionPipeline.from_pretrained(FOLDER, "
                "use_safetensors=False).save_pretrained(NEW_FOLDER)"
            )
        raise UsageError(
            f"{name} lacks the weights of {part}: {folder / part} holds no safetensors, or not all of them"
        )
    weights_of_unet = [file.name for file in files if file.parent.name == "unet" and file.suffix == ".safetensors"]
    variant = "fp16" if weights_of_unet and all(".fp16" in file for file in weights_of_unet) else None
    if identity is None:
        identity = f"sha256 {digest([index, *(file for file in files if file.suffix in READ)])}"
    return Model(name, folder, pipeline, identity, variant, defaults or {})


def _without_weights(folder: Path) -> list[str]:
    """The parts that `model_index.json` names and whose weights are not in the folder, or not all of them."""
    named = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    lacking = []
    for part in _WITH_WEIGHTS:
        if not isinstance(named, dict) or not isinstance(named.get(part), list) or named[part][0] is None:
            continue
        if not has_weights(folder / part):
            lacking.append(part)
    return lacking


def _pipeline_class(index: Path, name: str) -> str:
    """Name of our class for what `model_index.json` says.

    Raises:
        UsageError: It says nothing, or a pipeline that has no attention guidance.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the model_index.json of {name} cannot be read") from error
    if not isinstance(found, str) or found not in _PIPELINES:
        raise UsageError(
            f"{name} is a {found}, for which there is no attention guidance: it works for StableDiffusionPipeline "
            "(Stable Diffusion 1.x and 2.x) and StableDiffusionXLPipeline"
        )
    return _PIPELINES[found]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
