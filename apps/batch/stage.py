"""One step of work, whole: decode sources, run a network on them, make rows.

Engines move batches; a stage knows what is done with them. `decode` may run in any process, `rows` where the network
is. Every source that goes in comes out as exactly one row, in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..errors import UsageError
from .decode import Decoded, Decoder, Framing
from .sources import Source, encode_path

if TYPE_CHECKING:
    from ..models import Network

__all__ = ["COMMON_COLUMNS", "Batch", "Column", "Compute", "Row", "Stage", "decode", "pick_device"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the output: its name and what it holds (`floats`: a list of them, all rows of one length)."""

    name: str
    kind: Literal["text", "integer", "number", "floats"]


COMMON_COLUMNS = (
    Column("path", "text"),
    Column("status", "text"),
    Column("error", "text"),
    Column("model", "text"),
    Column("width", "integer"),
    Column("height", "integer"),
)


@dataclass(frozen=True)
class Batch:
    """Decoded sources on their way to the network.

    Attributes:
        sources: The sources.
        decoded: What became of each, pixels taken out.
        images: `(n, C, H, W)`, uint8, the pixels of those that could be read, in order.
    """

    sources: Sequence[Source]
    decoded: Sequence[Decoded]
    images: np.ndarray


def decode(decoder: Decoder, sources: Sequence[Source], read_timeout: float | None = None) -> Batch:
    """Decodes sources, wherever this process may be.

    Args:
        decoder: How.
        sources: What.
        read_timeout: Seconds that each may take; None for any time. It only holds in a process's main thread, and where
            there are signals.
    """
    decoded = [
        decoder(source) if read_timeout is None else _in_time(decoder, source, read_timeout) for source in sources
    ]
    pixels = [d.pixels for d in decoded if d.pixels is not None]
    images = np.stack(pixels) if pixels else np.empty((0, decoder.channels, *decoder.framing.size), np.uint8)
    return Batch(sources, [dataclasses.replace(d, pixels=None) for d in decoded], images)


class _Late(BaseException):
    """Reading takes too long; not an `Exception`, which decoders may catch for themselves."""


def _in_time(decoder: Decoder, source: Source, seconds: float | None) -> Decoded:
    """Decodes one source, or says that it took too long: a pipe that nobody writes to, a server that went silent."""
    can_ring = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if seconds is None or not can_ring:
        return decoder(source)

    def ring(signum: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return decoder(source)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Late:
        return Decoded(error=f"reading took longer than {seconds:g} s (--read-timeout)")
    finally:
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Compute:
    """How a network is run.

    Attributes:
        device: Where.
        amp: Half precision where autocast deems it safe: bfloat16, or float16 on a GPU without it.
        compile: Compile the network first; batches are then padded to one size.
        batch_size: Pictures a batch.
        runtime: What runs it: `torch`, or on the CPU `onnx` for ONNX Runtime or `openvino`, with batches of one size
            likewise.
    """

    device: torch.device
    amp: bool = False
    compile: bool = False
    batch_size: int = 32
    runtime: Literal["torch", "onnx", "openvino"] = "torch"

    @property
    def prepares(self) -> bool:
        """Whether the network is made into something else first, for batches of one size."""
        return self.compile or self.runtime != "torch"


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes a GPU if there is one.

    Raises:
        UsageError: There is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used here: {reason} (auto, cpu and cuda:0 are names)") from error
    return device


class Stage(ABC):
    """What one verb does with a batch; subclasses say which columns they add and compute them.

    Args:
        network: The network with its labels and preprocessing.
        compute: How to run it.
        view_size: Longest side of the pictures that the verb draws on; 0 if it draws none.
        decoder: How pictures are read; None for timm's evaluation transform of the network.

    Raises:
        UsageError: The network is for another verb.
    """

    segments = False  # whether the verb is for networks that give a class to each pixel

    def __init__(self, network: Network, compute: Compute, view_size: int = 0, decoder: Decoder | None = None) -> None:
        from vision.segmentation import Segmenter

        if isinstance(network.module, Segmenter) and not self.segments:
            raise UsageError(f"{network.label} gives a class to each pixel: use `attnsuite segment`")
        self.network = network
        self.compute = compute
        self.module = network.module.to(compute.device)
        config = network.data_config
        self._mean = 255 * torch.tensor(config["mean"], device=compute.device).view(1, -1, 1, 1)
        self._std = 255 * torch.tensor(config["std"], device=compute.device).view(1, -1, 1, 1)
        self.decoder = decoder or _decoder(network, view_size)
        self._prepared: Any = None

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The verb's own columns, after the common ones."""

    @abstractmethod
    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """Computes the verb's own columns.

        Args:
            images: `(n, C, H, W)`, float, normalised, on the device.
            batch: The batch they come from.
            places: Index in the batch of each image.

        Returns:
            One dictionary an image; one with an `error` makes a row with `status=error`.
        """

    @abstractmethod
    def describe(self, row: Row) -> str:
        """The row's own columns in words, for a table on a terminal."""

    def rows(self, batch: Batch) -> list[Row]:
        """Turns a batch into rows, one a source, in order."""
        rows = [self._blank(source, decoded) for source, decoded in zip(batch.sources, batch.decoded, strict=True)]
        places = [index for index, decoded in enumerate(batch.decoded) if decoded.error is None]
        if places:
            results = self.run(self.normalise(batch.images), batch, places)
            for index, result in zip(places, results, strict=True):
                rows[index].update(result)
                if result.get("error"):
                    rows[index].update(status="error", error=result["error"])
        return rows

    def forward(self, images: torch.Tensor, call: Any = None) -> torch.Tensor:
        """Runs the network, or always the same `call` for it, without gradients, as `compute` says; float32 out."""
        call, count = self.module if call is None else call, len(images)
        if self.compute.device.type == "cpu":  # convolutions are faster so, and networks without any no slower
            images = images.contiguous(memory_format=torch.channels_last)
        if self.compute.prepares and count < self.compute.batch_size:
            padding = images.new_zeros(self.compute.batch_size - count, *images.shape[1:])
            images = torch.cat([images, padding])
        if self.compute.prepares and self._prepared is None:
            self._prepared = self._prepare(call, images)
        run = call if self._prepared is None else self._prepared
        with torch.inference_mode(), self.autocast():
            return run(images)[:count].float()

    def move(self, device: torch.device) -> None:
        """Puts the network on another device, in a process that a copy of this stage was sent to."""
        self.compute = dataclasses.replace(self.compute, device=device)
        self.module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def _prepare(self, call: Any, images: torch.Tensor) -> Any:
        """What runs instead, made on first use: it cannot be sent to other processes."""
        if self.compute.compile:
            return torch.compile(call)
        from .exported import exported

        assert self.compute.runtime != "torch"
        return exported(self.module, call, images, self.compute.runtime)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that was asked for, as a context."""
        if not self.compute.amp:
            return contextlib.nullcontext()
        kind = self.compute.device.type
        half = torch.float16 if kind == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
        return torch.autocast(kind, dtype=half)

    def normalise(self, images: np.ndarray) -> torch.Tensor:
        """Pixels, `(n, C, H, W)`, uint8, as the network takes them, on its device."""
        on_device = torch.from_numpy(images).to(self.compute.device, non_blocking=True)
        return on_device.float().sub_(self._mean).div_(self._std)

    def _blank(self, source: Source, decoded: Decoded) -> Row:
        row: Row = {
            "path": encode_path(source.name),
            "status": "ok" if decoded.error is None else "error",
            "error": decoded.error,
            "model": self.network.label,
            "width": decoded.width,
            "height": decoded.height,
        }
        return row | {column.name: None for column in self.columns}


def _decoder(network: Network, view_size: int) -> Decoder:
    """The network's own transform or timm's for evaluation, up to the uint8 pixels; the rest is done on the batch."""
    from timm.data.transforms_factory import create_transform

    config = network.data_config
    channels, *size = config["input_size"]
    transform: Any = network.transform or create_transform(**config, is_training=False, normalize=False)
    framing = Framing((size[0], size[1]), config.get("crop_pct", 1.0), config.get("crop_mode", "center"))
    return Decoder(transform, framing, channels, view_size)
