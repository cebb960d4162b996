"""What engines share, and the local one: worker processes decode while this process runs the network.

Batches come back in the order they were handed out, and only a few are under way at any time, so memory does not
depend on how many inputs there are.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import Any, Protocol

from ..errors import Stopped
from .decode import Decoder
from .processor import WORKERS_SPARE, keep_freed_memory
from .sources import Source
from .stage import Batch, Row, Stage, decode

__all__ = ["Emit", "Engine", "Rest", "Stop", "run_local", "stage_rows"]

_PREFETCH = 2

Emit = Callable[[Sequence[Source], list[Row]], None]


@dataclass(frozen=True)
class Rest:
    """What of a run's inputs is still to do.

    Attributes:
        sources: The sources themselves, one after the other.
        inputs: All inputs of the run, for an engine that lists them in another process.
        done: How many of them come before the rest.
    """

    sources: Iterator[Source]
    inputs: Iterable[Source]
    done: int


class Engine(Protocol):
    """Moves sources through a stage."""

    def __call__(self, stage: Stage, rest: Rest, emit: Emit, stop: Stop) -> None:
        """Works until all is done or a stop is asked for.

        Args:
            stage: The work.
            rest: The inputs that are to do.
            emit: Takes each batch's sources with their rows, in order.
            stop: Whether to end early.

        Raises:
            Stopped: It cannot go on; what was emitted before is whole.
        """
        ...


class Stop:
    """Turns SIGINT and SIGTERM into a request to stop after the batch at hand; a second one stops at once.

    Use as a context; outside it, signals do what they did before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


def run_local(
    stage: Stage,
    rest: Rest,
    emit: Emit,
    stop: Stop,
    *,
    batch_size: int,
    workers: int,
    read_timeout: float | None = None,
) -> None:
    """Runs a stage over sources on this machine.

    Args:
        stage: The work.
        rest: The inputs that are to do.
        emit: Takes each batch's sources with their rows, in order.
        stop: Asked after every batch.
        batch_size: Inputs a batch.
        workers: Decode processes; 0 decodes in this one.
        read_timeout: Seconds that reading one input may take; None for any time.

    Raises:
        Stopped: A worker died or the network failed; what was emitted before is whole.
    """
    if stage.compute.device.type == "cpu":
        keep_freed_memory()
    try:
        for batch in _decoded(_Decoding(stage.decoder, read_timeout), rest.sources, batch_size, workers):
            emit(batch.sources, stage_rows(stage, batch))
            if stop.signum is not None:
                return
    except RuntimeError as error:
        if not _is_dead_worker(error):
            raise
        if stop.signum is None:  # a signal to the whole process group ends workers, too
            raise Stopped(
                f"a decode process died ({' '.join(str(error).split())}); too little memory is the usual reason: "
                "try fewer --workers or a smaller --batch-size"
            ) from error


def _decoded(decoding: _Decoding, sources: Iterator[Source], batch_size: int, workers: int) -> Iterator[Batch]:
    from torch.utils.data import DataLoader

    loader: Iterable[Batch] = DataLoader(
        decoding,  # pyright: ignore[reportArgumentType] - all that is asked of it is __getitems__
        batch_sampler=_Batches(sources, batch_size),
        num_workers=workers,
        collate_fn=_alone,
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )
    return iter(loader)


class _Batches:
    """Lists of sources, made when they are asked for; torch calls it a sampler of indices."""

    def __init__(self, sources: Iterator[Source], batch_size: int) -> None:
        self._sources = sources
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[Source]]:
        while batch := list(islice(self._sources, self._batch_size)):
            yield batch


class _Decoding:
    """The decoder in the shape of a torch dataset whose indices are the sources themselves."""

    def __init__(self, decoder: Decoder, read_timeout: float | None) -> None:
        self._decoder = decoder
        self._read_timeout = read_timeout

    def __getitems__(self, sources: Sequence[Source]) -> list[Batch]:
        return [decode(self._decoder, sources, self._read_timeout)]


def _alone(batches: list[Batch]) -> Batch:
    return batches[0]


def _start_worker(index: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main process handles it and ends workers by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    keep_freed_memory(WORKERS_SPARE)
    os.nice(19)  # the network goes first, whose threads wait for each other; decoding takes what it leaves
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends a worker whose main process was killed; it would wait for ever for somebody to take its last batch."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def stage_rows(stage: Stage, batch: Batch) -> list[Row]:
    """The rows of a batch.

    Raises:
        Stopped: The network failed; the message says on what.
    """
    try:
        return stage.rows(batch)
    except (RuntimeError, MemoryError) as error:
        if _is_dead_worker(error):
            raise
        first, reason = batch.sources[0].name, (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "try a smaller --batch-size" if "memory" in reason.lower() else "--debug shows where"
        raise Stopped(f"the network failed on the batch that begins with {first}: {reason}; {hint}") from error


def _is_dead_worker(error: BaseException) -> bool:
    """torch raises this wherever the main process happens to be when a worker dies."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
