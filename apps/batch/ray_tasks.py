"""What runs in Ray's own processes: listing, decoding, and the stage.

Batches travel as pickles, each a row of a table of its own: sources, then perhaps decoded, then with their rows. An
error travels in place of what it prevented.
"""

from __future__ import annotations

import os
import pickle
import platform
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..errors import Stopped, UsageError
from .decode import Decoder
from .engines import Rest, stage_rows
from .processor import keep_freed_memory
from .sources import Source, encode_path
from .stage import Batch, Row, Stage, decode, pick_device

__all__ = ["Failed", "Place", "Tries", "Worker", "decoded", "listing"]

_DEATHS = 3  # how often a batch may lose its worker before it is taken for the cause


@dataclass(frozen=True)
class Failed:
    """An error from another thread or process, with its traceback in words, since that cannot be sent."""

    error: Exception
    trace: str


@dataclass(frozen=True)
class Place:
    """How a process of Ray's becomes one of the run: the folder that paths are found from, the device, the threads."""

    folder: str
    device: str
    threads: int

    def enter(self) -> None:
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise UsageError(
                f"the node {platform.node()} has no folder {self.folder} ({error.strerror}): start the command from a "
                "folder that all nodes share, or name inputs by an address such as s3://…"
            ) from error


class Tries:
    """Counts how often each batch was begun and not ended. Ray makes one an actor, which outlives workers."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}

    def begin(self, batch: str) -> int:
        self._begun[batch] = self._begun.get(batch, 0) + 1
        return self._begun[batch]

    def end(self, batch: str) -> None:
        self._begun.pop(batch, None)


class Worker:
    """A copy of the stage in a process of its own. Ray makes one an actor, and again if it dies."""

    def __init__(self, place: Place, stage: Stage, read_timeout: float | None, tries: Any) -> None:
        self._place = place
        self._stage = stage
        self._read_timeout = read_timeout
        self._tries = tries
        self._is_set_up = False

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        return _mapped(self._rows, block)

    def _rows(self, content: Sequence[Source] | Batch) -> tuple[Sequence[Source], list[Row]]:
        import ray

        if not self._is_set_up:  # not in __init__: an error there would never reach the user
            self._place.enter()
            torch.set_num_threads(self._place.threads)
            if self._place.device == "cpu":
                keep_freed_memory()
            self._stage.move(pick_device(self._place.device))
            self._is_set_up = True
        sources = content.sources if isinstance(content, Batch) else content
        first = encode_path(sources[0].name)
        attempt: Any = ray.get(self._tries.begin.remote(first))
        if attempt > _DEATHS:
            raise Stopped(
                f"the batch that begins with {first} has ended its worker {_DEATHS} times; too little memory is the "
                "usual reason: try fewer --num-workers, more --memory-per-worker or a smaller --batch-size"
            )
        batch = content if isinstance(content, Batch) else decode(self._stage.decoder, sources, self._read_timeout)
        rows = stage_rows(self._stage, batch)
        self._tries.end.remote(first)
        return sources, rows


def decoded(block: dict[str, Any], place: Place, decoder: Decoder, read_timeout: float | None) -> dict[str, Any]:
    """Decoding as a task of its own, while a worker's GPU has other things to do."""

    def work(sources: Sequence[Source]) -> Batch:
        place.enter()
        return decode(decoder, sources, read_timeout)

    return _mapped(work, block)


def _mapped(work: Callable[[Any], Any], block: dict[str, Any]) -> dict[str, Any]:
    """Does something with what a block holds; what goes wrong takes the place of the result."""
    results: list[Any] = []
    for content in map(pickle.loads, block["content"]):
        try:
            results.append(content if isinstance(content, Failed) else work(content))
        except Exception as error:
            results.append(Failed(_sendable(error), traceback.format_exc()))
    return {"content": [pickle.dumps(result) for result in results]}


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def listing(rest: Rest, batch_size: int, place: Place) -> Any:
    """A source of data for Ray: lists of sources, made as they are asked for, by one task so that there is an order."""
    import pyarrow as pa
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    inputs, done = rest.inputs, rest.done  # not the iterator, which cannot be sent

    def read() -> Iterator[pa.Table]:
        try:
            place.enter()
            sources = islice(inputs, done, None)
            while batch := list(islice(sources, batch_size)):
                yield pa.table({"content": [pickle.dumps(batch)]})
        except Exception as error:
            yield pa.table({"content": [pickle.dumps(Failed(_sendable(error), traceback.format_exc()))]})

    class Listing(Datasource):
        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    return Listing()
