"""What a generated picture depends on, checked wherever it comes from: the command line, or a picture's metadata."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from ..errors import UsageError

__all__ = ["DType", "Place", "Settings", "place_of", "read_layout", "read_losses", "read_subjects"]

DType = Literal["float32", "float16", "bfloat16"]

Place = tuple[float, float, float, float] | str
"""A box in fractions of the picture (left, top, right, bottom), or a mask: a PNG in base64."""

_MOST_STEPS, _MOST_PIXELS, _MOST_TEXT = 1000, 8192, 20_000
_MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """All that one picture depends on, apart from the model's files and the machine.

    Attributes:
        prompt: The text.
        subjects: Words of it whose attention is guided; none for a picture of the plain pipeline.
        negative_prompt: What the picture is led away from.
        model: The shipped model's name, a folder, or `OWNER/NAME@REVISION` on the hub.
        seed: Of the noise that the picture begins with.
        steps: Of the sampler.
        guidance_scale: Of classifier-free guidance, which has no part in the guidance of attention.
        height: In pixels.
        width: In pixels.
        losses: The weight of each.
        guidance_steps: How many steps are guided, from the first; None for all.
        step_size: How far the latent is moved.
        layout: Where subjects shall be.
        dtype: In which the networks compute.

    Raises:
        UsageError: A value is of the wrong kind or out of range.
    """

    prompt: str
    subjects: tuple[str, ...] = ()
    negative_prompt: str | None = None
    model: str = ""
    seed: int = 0
    steps: int = 50
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512
    losses: Mapping[str, float] = field(default_factory=lambda: {"segregation": 1.0, "retention": 1.0})
    guidance_steps: int | None = None
    step_size: float = 20.0
    layout: Mapping[str, Place] = field(default_factory=dict)
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        _require_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise UsageError("the prompt is empty: say what to draw, e.g. 'a red circle and a blue square'")
        _require_text("--model", self.model)
        if self.negative_prompt is not None:
            _require_text("--negative-prompt", self.negative_prompt)
        if not _is_list_of(self.subjects, str):
            raise UsageError(f"--subjects {self.subjects!r}: expected words of the prompt")
        object.__setattr__(self, "subjects", tuple(self.subjects))
        self._check_numbers()
        for name, weight in _mapping("--losses", self.losses).items():
            _require_number(f"--losses {name}", weight, 0, 1e6)
        for subject, place in _mapping("--layout", self.layout).items():
            _check_place(subject, place)
        if (self.losses or self.layout) and not self.subjects:
            object.__setattr__(self, "losses", {})
            if self.layout:
                raise UsageError("--layout says where subjects shall be: name them with --subjects")
        if self.dtype not in get_args(DType):
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(get_args(DType))}")

    def _check_numbers(self) -> None:
        _require_number("--seed", self.seed, 0, _MOST_SEED, whole=True)
        _require_number("--steps", self.steps, 1, _MOST_STEPS, whole=True)
        _require_number("--guidance-scale", self.guidance_scale, 0, 1000)
        _require_number("--step-size", self.step_size, 0, 1e6)
        if self.guidance_steps is not None:
            _require_number("--guidance-steps", self.guidance_steps, 0, _MOST_STEPS, whole=True)
        for name, side in (("--height", self.height), ("--width", self.width)):
            _require_number(name, side, 8, _MOST_PIXELS, whole=True)
            if side % 8:
                raise UsageError(
                    f"{name} {side}: it must be divisible by 8; {side - side % 8} and {side + 8 - side % 8} are"
                )

    @property
    def guided(self) -> bool:
        """Whether attention is guided at all."""
        return bool(self.subjects)

    def plain(self) -> Settings:
        """The same picture of the pipeline without guidance."""
        return replace(self, subjects=(), losses={}, layout={}, guidance_steps=None, step_size=20.0)

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Any) -> Settings:
        """Reads what `as_json` gave, from wherever it comes.

        Raises:
            UsageError: Something is missing, unknown, of the wrong kind or out of range.
        """
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict):
            raise UsageError("the settings are no JSON object")
        if missing := sorted(names - set(values)):
            raise UsageError(f"the settings lack {', '.join(missing)}")
        if unknown := sorted(set(values) - names):
            raise UsageError(f"the settings hold {', '.join(map(str, unknown[:5]))}, which this version does not know")
        places = _mapping("--layout", values["layout"])
        layout = {subject: tuple(place) if isinstance(place, list) else place for subject, place in places.items()}
        return cls(**{**values, "layout": layout})


def read_subjects(given: Sequence[str]) -> tuple[str, ...]:
    """`["circle, square", "fire truck"]` to `("circle", "square", "fire truck")`."""
    words = tuple(word.strip() for text in given for word in text.split(",") if word.strip())
    if not words:
        raise UsageError("--subjects holds no word: give words of the prompt, e.g. --subjects circle square")
    return words


def read_losses(text: str) -> dict[str, float]:
    """`"segregation=1,retention=0.5"` to weights; a name alone has the weight 1.

    Raises:
        UsageError: It cannot be read so.
    """
    losses: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value) or name in losses:
            raise UsageError(
                f"--losses {text!r}: expected different names with weights, as segregation=1,retention=0.5"
            )
        losses[name] = value
    return losses


def read_layout(file: str) -> dict[str, Place]:
    """Reads `{"circle": [0, 0, 0.5, 1], "square": "mask.png"}`; masks are found from the folder of the file.

    Raises:
        UsageError: It cannot be read so.
    """
    try:
        places = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--layout {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--layout {file} is no JSON: {error}") from error
    if not isinstance(places, dict) or not places:
        raise UsageError(f'--layout {file}: expected an object such as {{"circle": [0, 0, 0.5, 1]}}')
    layout: dict[str, Place] = {}
    for subject, place in places.items():
        layout[subject] = _mask(Path(file).parent / place) if isinstance(place, str) else _box(subject, place)
        _check_place(subject, layout[subject])
    return layout


def place_of(place: Place) -> tuple[float, float, float, float] | Image.Image:
    """A place as `AStarStableDiffusionPipeline` takes it."""
    if not isinstance(place, str):
        return place
    with Image.open(io.BytesIO(base64.b64decode(place)), formats=["PNG"]) as mask:
        return mask.convert("L")


def _mask(path: Path) -> str:
    """A picture in grey, as PNG in base64."""
    content = io.BytesIO()
    try:
        with Image.open(path) as mask:
            mask.convert("L").save(content, "PNG", optimize=True)
    except OSError as error:
        raise UsageError(f"the mask {path} cannot be read: {error.strerror or 'it is no picture'}") from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"the mask {path} cannot be read: {error}") from error
    return base64.b64encode(content.getvalue()).decode()


def _box(subject: str, place: Any) -> tuple[float, float, float, float]:
    if not _is_list_of(place, (int, float)) or len(place) != 4:
        raise UsageError(
            f"the place of {subject!r} is {place!r}: expected [left, top, right, bottom] in fractions of the picture, "
            "or the name of a mask"
        )
    left, top, right, bottom = (float(edge) for edge in place)
    return left, top, right, bottom


def _check_place(subject: str, place: Any) -> None:
    """Order and range of a box are the pipeline's to judge, which knows the picture; here only what it is."""
    if not isinstance(place, str):
        _box(subject, place)
        return
    try:
        place_of(place)
    except (OSError, ValueError, binascii.Error, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"the mask of {subject!r} is no readable PNG") from error


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name}: expected names with values, not {value!r}")
    return value


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected text, not {value!r}")
    if len(value) > _MOST_TEXT:
        raise UsageError(f"{name}: it has {len(value):,} characters; {_MOST_TEXT:,} are the most")


def _require_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise UsageError(f"{name} {value}: expected {kind} from {least:,} to {most:,}")
