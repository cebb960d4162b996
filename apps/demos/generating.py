"""One prompt drawn by several methods with the same noise, step by step, and stopped within a step."""

from __future__ import annotations

import base64
import io
import json
import queue
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from diffusers.utils import logging as of_diffusers
from PIL import Image
from transformers.utils import logging as of_transformers

from diffusion.attention_maps import find_subjects
from diffusion.draw import attention_grid

from ..batch.stage import pick_device
from ..errors import UsageError
from ..generate import models
from ..generate.drawing import called
from ..generate.settings import Settings, read_subjects
from .host import Host

__all__ = ["LOSSES", "Drawn", "Order", "Step", "drawn_by", "maps_at", "nouns", "order", "regions", "words"]

LOSSES: Mapping[str, Mapping[str, float]] = {
    "plain": {},
    "A-STAR": {"segregation": 1.0, "retention": 1.0},
    "Attend-and-Excite": {"attend_and_excite": 1.0},
}
_MOST_STEPS, _MOST_LETTERS = 100, 300
_NOUNS = ("circle", "square", "triangle", "diamond")  # of the model that ships; nothing is known of others
_NO_SUBJECTS = ("a", "an", "and", "at", "in", "of", "on", "or", "the", "to", "under", "with")
_SHOWN_SIDE = 256


@dataclass(frozen=True)
class Order:
    """What a visitor asks for.

    Attributes:
        settings: Of the guided picture.
        methods: Names of `LOSSES`, in the order in which they are drawn.
    """

    settings: Settings
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A step that is done: the method, how many steps, of how many."""

    method: str
    done: int
    steps: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one method drew.

    Attributes:
        method: Name in `LOSSES`.
        image: The picture.
        subjects: Names of the subjects, K of them.
        maps: Attention to each at each step, `[steps, H, W, K]`, float16, in [0, 1]; None without subjects.
        losses: Of these maps, `[steps]` each.
        grid: Picture, maps and losses over time in one picture; None without subjects.
    """

    method: str
    image: Image.Image
    subjects: Sequence[str]
    maps: np.ndarray | None
    losses: Mapping[str, np.ndarray]
    grid: Image.Image | None


class _Stopped(Exception):
    """The visitor has gone, or pressed stop."""


def words(prompt: str) -> list[str]:
    """The words of a prompt, each once, in order, without those that cannot be subjects."""
    found = re.findall(r"[\w'-]+", prompt[:_MOST_LETTERS])
    return [word for word in dict.fromkeys(found) if word.lower() not in _NO_SUBJECTS]


def nouns(prompt: str) -> list[str]:
    """Those of its words that the model that ships knows as things."""
    return [word for word in words(prompt) if word.lower() in _NOUNS]


def order(
    host: Host, prompt: str, subjects: str, seed: float, steps: float, guidance_scale: float, methods: Sequence[str],
    layout: Mapping[str, Any],
) -> Order:  # fmt: skip
    """Checks what a visitor asks for.

    Args:
        host: The server.
        prompt: The text.
        subjects: Words of it, separated by commas.
        seed: Of the noise.
        steps: Of the sampler.
        guidance_scale: Of classifier-free guidance.
        methods: Names of `LOSSES`.
        layout: Places of subjects, boxes or masks as PNG in base64.

    Raises:
        UsageError: Something is missing, unknown or out of range.
    """
    if len(prompt) > _MOST_LETTERS:
        raise UsageError(f"the prompt has {len(prompt):,} letters: at most {_MOST_LETTERS} are taken here")
    if unknown := [method for method in methods if method not in LOSSES]:
        raise UsageError(f"there is no method {unknown[0]!r}: expected some of {', '.join(LOSSES)}")
    if not methods:
        raise UsageError(f"no method is chosen: choose some of {', '.join(LOSSES)}")
    numbers = {"seed": seed, "steps": steps}
    if any(value is None or value != int(value) for value in numbers.values()) or not 1 <= steps <= _MOST_STEPS:
        raise UsageError(f"seed {seed}, steps {steps}: expected whole numbers, and 1 to {_MOST_STEPS} steps")
    named = read_subjects([subjects]) if subjects.strip() else ()
    guided = [method for method in methods if LOSSES[method]]
    if guided and len(named) < 2:
        raise UsageError(f"{guided[0]} keeps subjects apart: name two or more, words of the prompt")
    model = models.find(host.settings.model or models.SHIPPED)
    settings = Settings(
        **{
            **model.defaults, "prompt": prompt, "subjects": named, "model": model.name, "seed": int(seed),
            "steps": int(steps), "guidance_scale": guidance_scale, "layout": dict(layout),
        }
    )  # fmt: skip
    return Order(settings, tuple(dict.fromkeys(methods)))


def drawn_by(host: Host, wanted: Order) -> Iterator[Step | Drawn | str]:
    """Draws one picture after the other.

    Args:
        host: The server.
        wanted: What is asked for.

    Yields:
        A note, each step that is done, and each picture. Whoever stops to listen stops the work within a step: the
        pipeline runs in a thread of its own, which is seen off before this generator is closed.

    Raises:
        UsageError: A subject is not in the prompt, or the model does not take these settings.
    """
    model = models.find(wanted.settings.model)
    device = pick_device(host.settings.device)
    key = ("diffusion", model.name, model.identity)

    def load() -> Any:
        for library in (of_diffusers, of_transformers):
            library.disable_progress_bar()  # they would draw on the server's terminal
        return models.load(model, device, "float32")

    yield f"Loading {model.name}" if key not in host.pool.names else f"Waiting for {model.name}"
    with host.pool.use(key, load) as pipe:
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        settings = replace(wanted.settings, height=side, width=side)
        yield from _notes(pipe, settings, model.shipped)
        for method in wanted.methods:
            yield from _listened(pipe, settings, method)


def _notes(pipe: Any, settings: Settings, shipped: bool) -> Iterator[str]:
    """What the visitor should know before anything is drawn."""
    if settings.subjects:
        try:
            find_subjects(pipe.tokenizer, settings.prompt, settings.subjects)
        except ValueError as error:
            raise UsageError(str(error)) from error
    tokens = len(pipe.tokenizer(settings.prompt, verbose=False)["input_ids"])
    if tokens > pipe.tokenizer.model_max_length:
        raise UsageError(
            f"the prompt has {tokens} tokens, of which the model reads {pipe.tokenizer.model_max_length}: shorten it"
        )
    if shipped:
        unknown, known = models.unknown_words(pipe, settings.prompt)
        if unknown:
            yield f"The model does not know {', '.join(unknown)}; it knows {', '.join(known)}."


def _listened(pipe: Any, settings: Settings, method: str) -> Iterator[Step | Drawn]:
    """One picture from a thread of its own, step by step."""
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gone = threading.Event()

    def at_step_end() -> None:
        if gone.is_set():
            raise _Stopped
        told.put(None)

    def work() -> None:
        try:
            told.put(_drawn(pipe, settings, method, at_step_end))
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=work, name=f"drawing {method}", daemon=True)
    thread.start()
    done = 0
    try:
        while True:
            what = told.get()
            if isinstance(what, BaseException):
                raise what
            if isinstance(what, Drawn):
                yield what
                return
            done += 1
            yield Step(method, done, settings.steps)
    finally:
        gone.set()
        thread.join()


def _drawn(pipe: Any, settings: Settings, method: str, at_step_end: Any) -> Drawn:
    losses = LOSSES[method]
    every = {"segregation": 1.0, "retention": 1.0, "attend_and_excite": 1.0}
    # all losses are looked at, whichever of them guides: only then can curves be compared
    weights = {**dict.fromkeys(every, 0.0), **losses}
    watched = replace(settings, losses=weights, layout=settings.layout if losses else {})
    own = watched if losses else settings.plain()
    result = called(pipe, own, watched, at_step_end)
    if not np.isfinite(result.images).all():
        raise UsageError("the picture holds values that are not numbers: try another seed or fewer steps")
    result.images = pipe.image_processor.numpy_to_pil(result.images)
    if result.maps is None:
        return Drawn(method, result.images[0], (), None, {}, None)
    numbers = {name: values[:, 0].float().numpy() for name, values in (result.losses or {}).items()}
    maps = result.maps[:, 0].float().numpy().astype(np.float16)
    return Drawn(method, result.images[0], settings.subjects, maps, numbers, attention_grid(result))


def maps_at(drawn: Sequence[Drawn], step: int) -> list[tuple[np.ndarray, str]]:
    """The maps of all subjects at a step, over the pictures.

    Args:
        drawn: Of each method.
        step: From 1; beyond the last it is the last.

    Returns:
        Pictures, `(side, side, 3)`, uint8, with what they are.
    """
    shown = []
    for one in drawn:
        if one.maps is None:
            continue
        at = min(max(step, 1), len(one.maps)) - 1
        side = max(_SHOWN_SIDE, *one.image.size)
        grey = np.asarray(one.image.convert("L").resize((side, side), Image.Resampling.LANCZOS), np.float32)[..., None]
        for number, subject in enumerate(one.subjects):
            field = one.maps[at, :, :, number].astype(np.float32)
            grown = cv2.resize(field / max(float(field.max()), 1e-6), (side, side), interpolation=cv2.INTER_CUBIC)
            colours = cv2.applyColorMap((grown.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
            shown.append(((0.3 * grey + 0.7 * colours).astype(np.uint8), f"{one.method}: {subject}, step {at + 1}"))
    return shown


def regions(painted: Any, subjects: Sequence[str], colours: Sequence[str], text: str) -> dict[str, Any]:
    """Places of subjects, painted or written.

    Args:
        painted: What `gr.ImageEditor` gives: layers, `(H, W, 4)`, uint8.
        subjects: The first has the first colour.
        colours: As `"#rrggbb"`.
        text: JSON, `{"circle": [left, top, right, bottom]}` in fractions of the picture; nothing for none.

    Raises:
        UsageError: The text cannot be read, or a colour has no subject.
    """
    places: dict[str, Any] = {}
    if text.strip():
        try:
            places = json.loads(text)
        except ValueError as error:
            raise UsageError('the regions are no JSON: expected such as {"circle": [0, 0, 0.5, 1]}') from error
        if not isinstance(places, dict):
            raise UsageError('the regions: expected an object such as {"circle": [0, 0, 0.5, 1]}')
        places = {name: tuple(place) if isinstance(place, list) else place for name, place in places.items()}
        if any(isinstance(place, str) for place in places.values()):
            raise UsageError("the regions: expected four numbers for each subject")
    layers = [] if not isinstance(painted, dict) else [np.asarray(layer) for layer in painted.get("layers") or []]
    drawn = [layer for layer in layers if layer.ndim == 3 and layer.shape[2] == 4 and layer[..., 3].any()]
    if not drawn:
        return places
    palette = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in colours], np.float32)
    for number, mask in enumerate(_masks(drawn, palette)):
        if mask.mean() < 0.002:  # the soft edge between two other colours
            continue
        if number >= len(subjects):
            raise UsageError(f"a region is painted in colour {number + 1}, but there are only {len(subjects)} subjects")
        content = io.BytesIO()
        Image.fromarray((mask * 255).astype(np.uint8)).save(content, "PNG")
        places[subjects[number]] = base64.b64encode(content.getvalue()).decode()
    return places


def _masks(layers: Sequence[np.ndarray], palette: np.ndarray) -> list[np.ndarray]:
    """Where each colour was painted, later layers over earlier ones, `(H, W)`, bool."""
    chosen = np.full(layers[0].shape[:2], -1)
    for layer in layers:
        distance = ((layer[..., None, :3].astype(np.float32) - palette) ** 2).sum(-1)  # [H, W, colours]
        chosen = np.where(layer[..., 3] > 127, distance.argmin(-1), chosen)
    return [chosen == number for number in range(len(palette))]
