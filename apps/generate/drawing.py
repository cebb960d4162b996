"""One picture: drawn by the pipeline, written with its record and its attention maps, and said in a row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..batch.sources import encode_path
from ..batch.stage import COMMON_COLUMNS, Column, Row
from ..errors import UsageError
from .record import Record, replaced, write
from .settings import Settings, place_of

if TYPE_CHECKING:
    from diffusion import AStarPipelineOutput

    from .models import Pipeline

__all__ = ["COLUMNS", "Picture", "called", "draw", "row_of", "side_by_side"]

COLUMNS = (
    *COMMON_COLUMNS,
    Column("prompt", "text"),
    Column("seed", "integer"),
    Column("kind", "text"),
    Column("subjects", "text"),
    Column("losses", "text"),
    Column("maps", "text"),
    Column("grid", "text"),
    Column("side_by_side", "text"),
)


@dataclass(frozen=True)
class Picture:
    """One picture to be drawn.

    Attributes:
        path: Where it goes.
        record: What it will say of itself.
        watched: The settings whose subjects are watched, also where nothing is guided.
        save_maps: Whether its attention maps are written, too.
    """

    path: Path
    record: Record
    watched: Settings
    save_maps: bool = False

    @property
    def maps(self) -> Path:
        """Where its attention maps go as numbers."""
        return self.path.with_name(f"{self.path.stem}-maps.npz")

    @property
    def grid(self) -> Path:
        """Where its attention maps go as a picture."""
        return self.path.with_name(f"{self.path.stem}-maps.png")


def draw(pipe: Pipeline, picture: Picture, step: Callable[[], None]) -> Row:
    """Draws and writes one picture."""
    result = called(pipe, picture.record.settings, picture.watched, step)
    values = np.asarray(result.images)
    flagged = (result.nsfw_content_detected or [False])[0]
    if flagged or not np.isfinite(values).all():
        why = (
            "the safety checker of the model has blanked the picture; try another --seed"
            if flagged
            else "the picture holds values that are not numbers; try a smaller --step-size or --dtype float32"
        )
        return row_of(picture, picture.record) | {"status": "error", "error": why, "maps": None, "grid": None}
    result.images = pipe.image_processor.numpy_to_pil(values)
    means = {name: _mean(losses[:, 0]) for name, losses in (result.losses or {}).items()}
    if picture.save_maps:
        _write_maps(picture, result)
    record = replace(picture.record, losses=means)
    write(picture.path, result.images[0], record)
    return row_of(picture, record)


def called(pipe: Pipeline, settings: Settings, watched: Settings, step: Callable[[], None]) -> AStarPipelineOutput:
    """Runs a pipeline.

    Args:
        pipe: The pipeline.
        settings: Of the picture.
        watched: Whose subjects and losses are looked at; those of `settings`, or of the guided picture beside it.
        step: Called after each step; what it raises ends the run.

    Returns:
        With pictures as arrays, and with maps and losses where there are subjects.

    Raises:
        UsageError: The pipeline does not take these settings.
    """
    attention: dict[str, Any] = {}
    if watched.guided:
        attention = {
            "subjects": list(watched.subjects),
            "losses": dict(watched.losses) if settings.guided else dict.fromkeys(watched.losses, 0.0),
            "guidance_steps": watched.guidance_steps,
            "step_size": watched.step_size,
            "layout": {subject: place_of(place) for subject, place in watched.layout.items()},
            "return_attention": True,
        }

    def at_step_end(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step()
        return tensors

    try:
        return pipe(
            settings.prompt,
            negative_prompt=settings.negative_prompt,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator().manual_seed(settings.seed),  # of the CPU: the same noise on every device
            output_type="np",
            callback_on_step_end=at_step_end,
            **attention,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _mean(values: torch.Tensor) -> float | None:
    mean = float(values.float().mean())
    return round(mean, 6) if math.isfinite(mean) else None


def _write_maps(picture: Picture, result: AStarPipelineOutput) -> None:
    """Maps `[steps, H, W, K]` and each loss `[steps]` as numbers, and as a picture."""
    from diffusion.draw import attention_grid

    assert result.maps is not None and result.losses is not None
    arrays: dict[str, Any] = {
        "maps": result.maps[:, 0].float().numpy(),
        "subjects": np.array(picture.watched.subjects),
        **{name: values[:, 0].float().numpy() for name, values in result.losses.items()},
    }

    def as_numbers(part: Path) -> None:
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)

    replaced(picture.maps, as_numbers)
    drawing = attention_grid(result)
    replaced(picture.grid, lambda part: drawing.save(part, "PNG"))


def side_by_side(picture: Picture) -> str | None:
    """Puts the plain picture at the left of the guided one, if both are there."""
    guided = picture.path.with_name(picture.path.name.removesuffix("-plain.png") + ".png")
    if not (guided.exists() and picture.path.exists()):
        return None
    with Image.open(picture.path) as left, Image.open(guided) as right:
        gap = max(2, left.width // 32)
        page = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
        page.paste(left, (0, 0))
        page.paste(right, (left.width + gap, 0))
    path = guided.with_name(f"{guided.stem}-compare.png")
    write(path, page, replace(picture.record, settings=picture.watched, compare=True))
    return encode_path(str(path))


def row_of(picture: Picture, record: Record) -> Row:
    own, watched = record.settings, picture.watched
    return {
        "path": encode_path(str(picture.path)),
        "status": "ok",
        "error": None,
        "model": own.model,
        "width": own.width,
        "height": own.height,
        "prompt": own.prompt,
        "seed": own.seed,
        "kind": "guided" if own.guided else "plain",
        "subjects": json.dumps(watched.subjects, ensure_ascii=False),
        "losses": json.dumps(dict(record.losses)),
        "maps": encode_path(str(picture.maps)) if picture.save_maps else None,
        "grid": encode_path(str(picture.grid)) if picture.save_maps else None,
        "side_by_side": None,
    }
