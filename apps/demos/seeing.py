"""What a vision model makes of one picture: classes, where the evidence lies, where a place attends, what it costs."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import cv2
import gradio as gr
import numpy as np
import torch
from PIL import Image

import weights
from vision.attention import attention_layers
from vision.biformer import BiFormer
from vision.explain import Method, attended, heatmap
from vision.sparsifiner import Sparsifiner

from ..batch.decode import View
from ..batch.stage import Compute, Stage, pick_device
from ..catalog import published
from ..classify import Classify
from ..embed import Embed
from ..errors import UsageError
from ..explain import blend, class_index
from ..models import DEFAULT_MODEL, NO_WEIGHTS, ModelChoice, ResolvedModel, resolve
from .alive import Alive
from .host import Host, fetching

__all__ = ["Costs", "Looked", "attend", "borrowed", "check", "connected", "layers_of", "look", "marked", "overlay"]

_VIEW_SIZE = 768
_TIMED = 3
_TOP = 5
_REMEDY = f"choose one that is here, such as {DEFAULT_MODEL} or shapes_biformer, or tick “Untrained weights”"


@dataclass(frozen=True)
class Costs:
    """What one picture costs.

    Attributes:
        milliseconds: Of a forward pass, the median of three after one that does not count.
        weights_mb: Of parameters and buffers.
        activations_mb: The most that results of operators held at once in a forward pass; scratch space within
            operators is not counted.
        params: Parameters in millions.
    """

    milliseconds: float
    weights_mb: float
    activations_mb: float
    params: float


@dataclass(frozen=True)
class Looked:
    """What a model made of a picture.

    Attributes:
        label: The model.
        classes: The likeliest classes with their probabilities; empty for a network without a classifier.
        target: The class that the map is about, where there are classes.
        view: The picture, and the part of it that the network saw.
        heat: Where the evidence lies, `(H, W)`, float16, from 0 to 1.
        layers: Layers whose attention can be looked at.
        costs: What it cost.
    """

    label: str
    classes: Mapping[str, float]
    target: str | None
    view: View
    heat: np.ndarray
    layers: list[str]
    costs: Costs


def check(host: Host, name: str, untrained: bool = False) -> ResolvedModel:
    """The model of that name, not yet loaded, if a visitor may have it.

    Args:
        host: The server.
        name: As typed.
        untrained: Take random weights where the model's own are not on this machine.

    Raises:
        UsageError: There is no such model here.
    """
    name = host.check_model(name)
    with _in_words_of_the_page():
        if not untrained:
            return resolve(ModelChoice(name))
        try:
            resolved = resolve(ModelChoice(name))
        except UsageError:  # there may be no weights of it anywhere; a wrong name is wrong again
            return resolve(ModelChoice(name, None, True))
        return resolved if _here(resolved) else resolve(ModelChoice(name, None, True))


def _here(resolved: ResolvedModel) -> bool:
    """Whether the weights are on this machine."""
    if resolved.entry is not None:
        return weights.path_of(resolved.entry.name) is not None
    return resolved.origin != "timm" or published(resolved.label)[1]


@contextmanager
def _in_words_of_the_page() -> Iterator[None]:
    """Mistakes name the controls of the page where they would name options of the command line."""
    try:
        yield
    except UsageError as error:
        text = str(error).replace(NO_WEIGHTS, _REMEDY).removeprefix("--target ")
        if isinstance(error.__cause__, weights.WeightsError):
            text += f". Or {_REMEDY}"
        raise UsageError(text) from error


@contextmanager
def borrowed(host: Host, name: str, untrained: bool, progress: gr.Progress) -> Iterator[Stage]:
    """Lends a model from the server's pool, loaded if it has to be.

    Args:
        host: The server.
        name: As typed.
        untrained: Take random weights where the model's own are not on this machine.
        progress: Told what is waited for.

    Raises:
        UsageError: There is no such model, or its weights cannot be had.
    """
    resolved = check(host, name, untrained)

    def load() -> Stage:
        progress(0, desc=f"Loading {resolved.label}")
        with _in_words_of_the_page():
            network = resolved.load(fetching(resolved.label, progress))
        compute = Compute(pick_device(host.settings.device), batch_size=1)
        stage = Classify(network, compute) if network.labels else Embed(network, compute)
        stage.decoder = replace(stage.decoder, view_size=_VIEW_SIZE)
        return stage

    key = ("vision", resolved.label, resolved.identity)
    with host.pool.use(
        key, load, lambda: progress(0, desc=f"Waiting for others to be done with {resolved.label}")
    ) as it:
        progress(0.5, desc=f"Running {resolved.label}")
        yield it


def look(stage: Stage, picture: Image.Image, target: str, method: Method) -> Looked:
    """Shows a picture to a model.

    Args:
        stage: The model.
        picture: RGB.
        target: Name or index of the class to explain; nothing for the likeliest.
        method: As `vision.explain.heatmap` takes it.

    Raises:
        UsageError: The model has no such class, or cannot be explained like that.
    """
    images, view = _prepared(stage, picture)
    labels: Any = stage.network.labels
    chosen, about = None, None
    classes: dict[str, float] = {}
    if labels:
        probabilities = stage.forward(images).softmax(dim=1)[0]
        best = probabilities.topk(min(_TOP, len(labels)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        classes = {labels[index]: round(value, 6) for value, index in pairs}
        with _in_words_of_the_page():
            chosen = class_index(stage.network, target.strip()) if target.strip() else int(best.indices[0])
        about = labels[chosen]
    elif target.strip():
        raise UsageError(f"{stage.network.label} has no classes to choose one of")
    heat = _said_of(stage, lambda: heatmap(stage.module, images, chosen, method))
    layers = attention_layers(stage.module)
    return Looked(stage.network.label, classes, about, view, _kept(heat), layers, _costs(stage, images))


def attend(
    stage: Stage, picture: Image.Image, x: float, y: float, layer: str, connectivity: bool
) -> tuple[View, np.ndarray]:
    """Where one place of a picture attends.

    Args:
        stage: The model.
        picture: RGB.
        x: Place from the left, in per cent of the picture's width.
        y: Place from above, in per cent of its height.
        layer: Name or index of the layer; nothing for the last.
        connectivity: Which places are attended to at all, instead of how much.

    Returns:
        The picture, and the map over what the network saw of it, `(H, W)`, float16.

    Raises:
        UsageError: The network does not see that place, or that layer does not show it.
    """
    images, view = _prepared(stage, picture)
    at = _place(stage, view, x, y)
    name = layer.strip() or "-1"
    chosen = int(name) if re.fullmatch(r"-?\d{1,4}", name) else name
    return view, _kept(_said_of(stage, lambda: attended(stage.module, images, at, chosen, connectivity)))


def connected(stage: Stage, picture: Image.Image, x: float, y: float) -> list[tuple[str, View, np.ndarray]]:
    """What a place is connected to in each stage: BiFormer's routed regions, Sparsifiner's kept keys.

    Args:
        stage: The model.
        picture: RGB.
        x: Place from the left, in per cent of the picture's width.
        y: Place from above, in per cent of its height.

    Returns:
        Name of the layer, picture and map for the last layer of each stage; nothing for other models.

    Raises:
        UsageError: The network does not see that place.
    """
    if not isinstance(stage.module, BiFormer | Sparsifiner):
        return []
    images, view = _prepared(stage, picture)
    at = _place(stage, view, x, y)
    maps = []
    for name in layers_of(stage.module):
        try:
            maps.append((name, view, _kept(attended(stage.module, images, at, name, True))))
        except ValueError:
            continue  # every place attends to every other there, or within windows
    return maps


def layers_of(module: torch.nn.Module) -> list[str]:
    """The last layer of attention of each stage; of a network without stages, three of them."""
    names = attention_layers(module)
    last = list(
        {".".join(name.split(".")[:2]) if name.startswith("stages.") else name: name for name in names}.values()
    )
    return last if len(last) <= 4 else [last[len(last) * part // 3 - 1] for part in (1, 2, 3)]


def overlay(view: View, heat: np.ndarray, opacity: float) -> np.ndarray:
    """A map over its picture in colours that all can tell apart, `(height, width, 3)`, uint8."""
    return blend(view, heat, opacity, cv2.COLORMAP_VIRIDIS)


def marked(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """The picture with a ring around a place, which is given in per cent of width and height."""
    height, width = picture.shape[:2]
    centre, radius = (round(x / 100 * width), round(y / 100 * height)), max(4, min(width, height) // 40)
    drawn = np.ascontiguousarray(picture)
    for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 2)):
        cv2.circle(drawn, centre, radius, colour, thickness, cv2.LINE_AA)
    return drawn


def _prepared(stage: Stage, picture: Image.Image) -> tuple[torch.Tensor, View]:
    decoded = stage.decoder.prepare(picture)
    assert decoded.pixels is not None and decoded.view is not None
    return stage.normalise(decoded.pixels[None]), decoded.view


def _place(stage: Stage, view: View, x: float, y: float) -> tuple[float, float]:
    """A place of the picture as the network has it: y and x, fractions of what it sees."""
    if not (0 <= x <= 100 and 0 <= y <= 100):
        raise UsageError(f"x = {x:g}, y = {y:g}: expected per cent of the width and height, from 0 to 100")
    height, width = view.picture.shape[:2]
    left, top, right, bottom = view.box
    across = (min(x, 99.99) / 100 * width - left) / (right - left)
    down = (min(y, 99.99) / 100 * height - top) / (bottom - top)
    if not (0 <= across < 1 and 0 <= down < 1):
        raise UsageError(f"{stage.network.label} does not see that place: only the middle of the picture reaches it")
    return down, across


def _said_of(stage: Stage, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return compute()
    except ValueError as error:
        raise UsageError(f"{stage.network.label} cannot be shown so: {error}") from error


def _kept(heat: torch.Tensor) -> np.ndarray:
    heat = heat[0].float().cpu()
    if not heat.isfinite().all():
        raise UsageError("the map holds values that are not numbers: the weights of this model are damaged")
    return heat.numpy().astype(np.float16)


def _costs(stage: Stage, images: torch.Tensor) -> Costs:
    """Measured while this model works alone; other models of the server may be busy beside it."""
    tensors = [*stage.module.parameters(), *stage.module.buffers()]
    with Alive() as alive:
        stage.forward(images)
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        stage.forward(images).sum().item()  # a GPU is waited for
        times.append(time.perf_counter() - start)
    return Costs(
        round(1000 * statistics.median(times), 2),
        round(sum(tensor.nbytes for tensor in tensors) / 1e6, 2),
        round(alive.most / 1e6, 2),
        round(sum(p.numel() for p in stage.module.parameters()) / 1e6, 2),
    )
