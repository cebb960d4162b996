"""One prompt drawn by several methods with the same noise, step by step, and stopped within a step."""

from __future__ import annotations

import base64
import io
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from diffusers.utils import logging as of_diffusers
from PIL import Image
from transformers.utils import logging as of_transformers

from diffusion.draw import attention_grid, heat
from diffusion.pipelines import find_concepts

from ..batch.stage import pick_device
from ..errors import UsageError
from ..generate import models
from ..generate.drawing import called
from ..generate.machine import repeatable, usual_dtype
from ..generate.settings import Settings, place_of
from .downloads import as_png, as_zip
from .host import Host
from .subjects import MOST_LETTERS

__all__ = ["LOSSES", "Drawn", "Note", "Order", "Step", "drawn_by", "maps_at", "order", "packed"]

LOSSES: Mapping[str, Mapping[str, float]] = {
    "plain": {},
    "A-STAR": {"segregation": 1.0, "retention": 1.0},
    "Attend-and-Excite": {"attend_and_excite": 1.0},
}
_MOST_STEPS, _MOST_SUBJECTS, _MOST_SCALE = 100, 8, 20
_SHOWN_SIDE = 192
_PATIENCE = 0.5  # seconds after which whoever listens is told that there is nothing new, and may leave


@dataclass(frozen=True)
class Order:
    """What a visitor asks for.

    Attributes:
        settings: Of the guided picture.
        methods: Names of `LOSSES`, in the order in which they are drawn.
        model: What draws.
    """

    settings: Settings
    methods: tuple[str, ...]
    model: models.Model


@dataclass(frozen=True)
class Step:
    """A step that is done: the method, how many steps, of how many."""

    method: str
    done: int
    steps: int


@dataclass(frozen=True)
class Note:
    """What the visitor should know of the pictures."""

    text: str


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one method drew.

    Attributes:
        method: Name in `LOSSES`.
        image: The picture.
        subjects: Names of the subjects, K of them.
        maps: Attention to each at each step, `[steps, H, W, K]`, float16, in [0, 1]; None without subjects.
        losses: Of these maps, `[steps]` each.
        grid: Picture, maps and losses over time as a PNG; None without subjects.
    """

    method: str
    image: Image.Image
    subjects: Sequence[str]
    maps: np.ndarray | None
    losses: Mapping[str, np.ndarray]
    grid: bytes | None


class _Stopped(Exception):
    """The visitor has gone, or pressed stop."""


def order(
    host: Host, prompt: str, subjects: Sequence[str], seed: float, steps: float, guidance_scale: float,
    methods: Sequence[str], layout: Mapping[str, Any],
) -> Order:  # fmt: skip
    """Checks what a visitor asks for.

    Args:
        host: The server.
        prompt: The text.
        subjects: Words of it.
        seed: Of the noise.
        steps: Of the sampler.
        guidance_scale: Of classifier-free guidance.
        methods: Names of `LOSSES`.
        layout: Places of subjects, boxes or masks as PNG in base64.

    Raises:
        UsageError: Something is missing, unknown or out of range.
    """
    if len(prompt) > MOST_LETTERS:
        raise UsageError(f"the prompt has {len(prompt):,} letters: at most {MOST_LETTERS} are taken here")
    Settings(prompt)  # refuses one that is empty
    if unknown := [method for method in methods if method not in LOSSES]:
        raise UsageError(f"there is no method {unknown[0]!r}: expected some of {', '.join(LOSSES)}")
    if not methods:
        raise UsageError(f"no method is chosen: choose some of {', '.join(LOSSES)}")
    _check_number("the seed", seed, 0, 2**31 - 1, whole=True)
    _check_number("the steps", steps, 1, _MOST_STEPS, whole=True)
    _check_number("the guidance scale", guidance_scale, 0, _MOST_SCALE)
    _check_subjects(subjects, methods)
    model = models.find(host.settings.model or models.SHIPPED)
    settings = Settings(
        **{
            **model.suits, "prompt": prompt, "subjects": tuple(subjects), "model": model.name, "seed": int(seed),
            "steps": int(steps), "guidance_scale": guidance_scale, "layout": dict(layout),
            "dtype": usual_dtype(pick_device(host.settings.device)),
        }
    )  # fmt: skip
    return Order(settings, tuple(dict.fromkeys(methods)), model)


def _check_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or (whole and value != int(value)):
        raise UsageError(f"{name}: expected a {'whole ' * whole}number from {least:,} to {most:,}, not {value}")


def _check_subjects(subjects: Sequence[str], methods: Sequence[str]) -> None:
    if not all(isinstance(subject, str) and subject.strip() for subject in subjects):
        raise UsageError("the subjects: expected words of the prompt")
    if len(subjects) > _MOST_SUBJECTS:
        raise UsageError(f"{len(subjects)} subjects are too many to be kept apart: at most {_MOST_SUBJECTS} are taken")
    if "A-STAR" in methods and len(subjects) < 2:
        raise UsageError("A-STAR keeps subjects apart: choose two or more, words of the prompt")
    if "Attend-and-Excite" in methods and not subjects:
        raise UsageError("Attend-and-Excite strengthens subjects: choose one or more, words of the prompt")


def drawn_by(host: Host, wanted: Order) -> Iterator[Step | Drawn | Note | str | None]:
    """Draws one picture after the other, in a thread of its own.

    Args:
        host: The server.
        wanted: What is asked for.

    Yields:
        In words what is waited for, notes, each step that is done, each picture, and None where for a while there is
        nothing new. Once this generator is closed the work ends within a step, and the model goes back to the pool.

    Raises:
        UsageError: A subject is not in the prompt, or the model does not take these settings.
    """
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gone = threading.Event()

    def tell(what: Any) -> None:
        if gone.is_set():
            raise _Stopped
        told.put(what)

    def work() -> None:
        try:
            _draw(host, wanted, tell)
            told.put(StopIteration())
        except BaseException as error:
            told.put(error)

    threading.Thread(target=work, name="drawing", daemon=True).start()
    try:
        while True:
            try:
                what = told.get(timeout=_PATIENCE)
            except queue.Empty:
                yield None
                continue
            if isinstance(what, StopIteration):
                return
            if isinstance(what, BaseException):
                raise what
            yield what
    finally:
        gone.set()


def _draw(host: Host, wanted: Order, tell: Callable[[Any], None]) -> None:
    """Draws, telling of it; whatever `tell` raises ends it."""
    model, device = wanted.model, pick_device(host.settings.device)

    def load() -> Any:
        tell(f"Loading {model.name}")
        for library in (of_diffusers, of_transformers):
            library.disable_progress_bar()  # they would draw on the server's terminal
        return models.load(model, device, wanted.settings.dtype)

    key = ("diffusion", model.name, model.identity)
    with host.pool.use(key, load, lambda: tell(f"Waiting for others to be done with {model.name}")) as pipe:
        settings = _fitted(pipe, wanted.settings)
        for note in _notes(pipe, replace(wanted, settings=settings)):
            tell(Note(note))
        with repeatable(device):
            for method in wanted.methods:
                tell(_drawn(pipe, settings, method, tell))


def _fitted(pipe: Any, settings: Settings) -> Settings:
    """The settings with the model's size of pictures, and masks of that size."""
    height, width = models.picture_size(pipe)
    layout = {}
    for subject, place in settings.layout.items():
        mask = place_of(place)
        if isinstance(mask, Image.Image):
            place = base64.b64encode(as_png(mask.resize((width, height), Image.Resampling.BOX))).decode()
        layout[subject] = place
    return replace(settings, height=height, width=width, layout=layout)


def _notes(pipe: Any, wanted: Order) -> list[str]:
    """What the visitor should know before anything is drawn.

    Raises:
        UsageError: It cannot be drawn like that.
    """
    settings, notes = wanted.settings, []
    tokens = len(pipe.tokenizer(settings.prompt, verbose=False)["input_ids"])
    if tokens > pipe.tokenizer.model_max_length:
        raise UsageError(
            f"the prompt has {tokens} tokens, of which the model reads {pipe.tokenizer.model_max_length}: shorten it"
        )
    if settings.subjects:
        layout = {subject: place_of(place) for subject, place in settings.layout.items()}
        try:
            size = settings.height, settings.width
            find_concepts(pipe, settings.prompt, settings.subjects, layout=layout, size=size)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if wanted.model.shipped:
        unknown, known = models.unknown_words(pipe, settings.prompt)
        if unknown:
            notes.append(f"The model does not know {', '.join(unknown)}; it knows {', '.join(known)}.")
    if settings.layout and "A-STAR" not in wanted.methods:
        notes.append("Regions guide A-STAR only, which was not drawn.")
    return notes


def _drawn(pipe: Any, settings: Settings, method: str, tell: Callable[[Any], None]) -> Drawn:
    losses = LOSSES[method]
    # all losses are looked at, whichever of them guides: only then can curves be compared
    weights = {**dict.fromkeys((name for own in LOSSES.values() for name in own), 0.0), **losses}
    layout = settings.layout if "retention" in losses else {}
    watched = replace(settings, losses=weights if settings.guided else {}, layout=layout)
    done = 0

    def at_step_end() -> None:
        nonlocal done
        done += 1
        tell(Step(method, done, settings.steps))

    result = called(pipe, watched if losses else settings.plain(), watched, at_step_end)
    if (result.nsfw_content_detected or [False])[0]:
        raise UsageError("the safety checker of the model has blanked the picture: try another seed")
    if not np.isfinite(result.images).all():
        raise UsageError("the picture holds values that are not numbers: try another seed or fewer steps")
    result.images = pipe.image_processor.numpy_to_pil(result.images)
    if result.maps is None:
        return Drawn(method, result.images[0], (), None, {}, None)
    numbers = {name: values[:, 0].float().numpy() for name, values in (result.losses or {}).items()}
    maps = result.maps[:, 0].float().numpy().astype(np.float16)
    return Drawn(method, result.images[0], settings.subjects, maps, numbers, as_png(attention_grid(result)))


def maps_at(drawn: Sequence[Drawn], step: int) -> tuple[list[tuple[str, list[tuple[str, Image.Image]]]], float]:
    """The maps of all subjects at a step, over the pictures; one scale of colours for all methods, steps and subjects.

    Args:
        drawn: Of each method.
        step: From 1; beyond the last it is the last.

    Returns:
        For each method that has maps those of its subjects, by name; and the largest value there is, 0 without maps.
    """
    watched = [(one, one.maps) for one in drawn if one.maps is not None]
    largest = max((float(maps.max()) for _, maps in watched), default=0.0)
    rows = []
    for one, maps in watched:
        at = min(max(step, 1), len(maps)) - 1
        width, height = (round(side * _SHOWN_SIDE / max(one.image.size)) for side in one.image.size)
        small = one.image.convert("L").resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
        shown = [np.asarray(maps[at, :, :, number], np.float32) / (largest or 1) for number in range(len(one.subjects))]
        over = [Image.fromarray(heat(np.asarray(small), field)) for field in shown]
        rows.append((one.method, list(zip(one.subjects, over, strict=True))))
    return rows, largest


def packed(drawn: Sequence[Drawn]) -> bytes:
    """All pictures, maps and losses as a ZIP: PNG for the eye, NPZ with `maps` `[steps, H, W, K]` for programs.

    Args:
        drawn: Of each method.
    """
    files: dict[str, bytes] = {}
    for one in drawn:
        name = re.sub(r"[^a-z]+", "_", one.method.lower())
        files[f"{name}.png"] = as_png(one.image)
        if one.maps is not None and one.grid is not None:
            numbers = io.BytesIO()
            arrays: dict[str, Any] = {"maps": one.maps, "subjects": np.array(one.subjects), **one.losses}
            np.savez_compressed(numbers, **arrays)
            files |= {f"{name}_maps.npz": numbers.getvalue(), f"{name}_maps.png": one.grid}
    return as_zip(files)
