"""`attnsuite search`: the images that show best what was asked for in words."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..batch.job import check_output
from ..batch.sinks import file_sink, stdout_writer
from ..batch.stage import Column, Row, Stage, pick_device
from ..console import FetchBar, RunReport, stderr
from ..embed import Embed
from ..errors import Stopped, UsageError
from ..models import Network
from ..options import Prepared, Reading, Writing
from ..run import RunOptions, run
from .choice import ClipChoice, ResolvedClip, choice_of, is_same
from .features import is_features, label_of, pieces

__all__ = ["COLUMNS", "Found", "Ranking", "check", "read_queries", "say", "search", "show", "write"]

COLUMNS = (
    Column("query", "text"),
    Column("rank", "integer"),
    Column("score", "number"),
    Column("path", "text"),
    Column("model", "text"),
)
_MOST_NOTES = 10


class Ranking:
    """The best of a stream of images for each of some queries; memory does not depend on how many there are.

    Args:
        queries: Text features, `[D, Q]`, of unit length.
        top_k: How many are kept.
    """

    def __init__(self, queries: Tensor, top_k: int) -> None:
        self._queries = queries
        self._top_k = top_k
        self._scores = queries.new_empty(0, queries.shape[1])  # [k, Q], best first
        self._paths = np.empty((0, queries.shape[1]), object)

    def add(self, paths: Sequence[str], features: Tensor) -> None:
        """Takes images in: `features` is `[N, D]`. Of equals the earlier stays before.

        Raises:
            UsageError: They are not as long as those of the queries.
        """
        if features.shape[1] != len(self._queries):
            raise UsageError(
                f"the images have features of {features.shape[1]} values, the model gives texts {len(self._queries)}: "
                "the file was not made by this model"
            )
        scores = F.normalize(features.to(self._queries), dim=-1) @ self._queries  # [N, Q]
        named = np.broadcast_to(np.array(paths, object)[:, None], scores.shape)
        self._scores, order = torch.cat([self._scores, scores]).sort(dim=0, descending=True, stable=True)
        self._scores, order = self._scores[: self._top_k], order[: self._top_k]
        self._paths = np.take_along_axis(np.concatenate([self._paths, named]), order.cpu().numpy(), 0)

    def rows(self, queries: Sequence[str], label: str) -> list[Row]:
        """A row for each hit, query by query, best first."""
        scores = self._scores.T.tolist()
        return [
            {"query": query, "rank": rank, "score": round(score, 6), "path": path, "model": label}
            for query, of_query, paths in zip(queries, scores, self._paths.T, strict=True)
            for rank, (score, path) in enumerate(zip(of_query, paths, strict=True), 1)
        ]


@dataclass(frozen=True)
class Found:
    """What came of a search.

    Attributes:
        rows: The hits.
        images: How many images were compared.
        failed: How many could not be read.
    """

    rows: list[Row]
    images: int
    failed: int


@dataclass(frozen=True)
class _Loaded:
    """A CLIP that is loaded already, where a run would load one."""

    label: str
    identity: str
    network: Network

    def resolve(self) -> _Loaded:
        return self

    def load(self, progress: Callable[[int, int | None], None]) -> Network:
        return self.network


class _Collector:
    """Takes the rows of `embed` into a ranking, where they would be shown."""

    def __init__(self, ranking: Ranking, note: Callable[[str], None]) -> None:
        self._ranking, self._note = ranking, note
        self.images = self.failed = 0

    def begin(self, stage: Stage, columns: tuple[Column, ...]) -> None:
        """A ranking has no header."""

    def show(self, rows: list[Row]) -> None:
        good = [row for row in rows if row["status"] == "ok"]
        if good:
            features = torch.from_numpy(np.stack([row["embedding"] for row in good]))
            self._ranking.add([row["path"] for row in good], features)
        self.images += len(good)
        for row in rows:
            if row["status"] != "ok":
                self.failed += 1
                if self.failed <= _MOST_NOTES:
                    self._note(f"{row['path']}: {row['error']}")


def search(reading: Reading, queries: Sequence[str], clip: ClipChoice, machine: Prepared, top_k: int) -> Found:
    """Ranks images by how well they show each query.

    Args:
        reading: Images, and files of features that `embed` wrote.
        queries: Texts.
        clip: The CLIP; where none is named, the one that made the features, else the default.
        machine: How to run it.
        top_k: Hits a query.

    Raises:
        UsageError: There is nothing to search in, or features and model do not belong together.
        Stopped: The run ended early.
    """
    if reading.shard is not None:
        raise UsageError("--shard: a search looks through everything; embed in shards, merge, then search in that")
    files = [name for name in reading.inputs if is_features(name)]
    images = [name for name in reading.inputs if not is_features(name)]
    report = RunReport()
    if images:
        reading = replace(reading, inputs=images)
        reading.find(lambda _: None)
    resolved = _resolve(files, clip)
    device = pick_device(machine.device)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    with FetchBar(resolved.label) as progress:
        network = resolved.load(progress)
    tower: Any = network.module.to(device)
    ranking = Ranking(tower.encode(list(queries), [lambda text: text]), top_k)
    count = 0
    for path in files:
        for piece in pieces(path):
            if piece.paths:
                ranking.add(piece.paths, torch.tensor(piece.features))
                count += len(piece.paths)
    collector = _Collector(ranking, report.note)
    if images:
        options = RunOptions(reading, _Loaded(resolved.label, resolved.identity, network), Writing(), machine)
        run("search", options, lambda net, compute, _: Embed(net, compute), {}, screen=collector)
    if collector.failed > _MOST_NOTES:
        report.note(f"and {collector.failed - _MOST_NOTES:,} more that could not be read")
    return Found(ranking.rows(queries, resolved.label), count + collector.images, collector.failed)


def read_queries(inputs: Sequence[str], queries: Sequence[str] | None, file: str | None) -> tuple[list[str], list[str]]:
    """Tells inputs and queries apart: where no option gives a query, the last argument is one.

    Args:
        inputs: The arguments.
        queries: `--query`.
        file: `--queries`, a file with a query a line.

    Returns:
        Inputs and queries.

    Raises:
        UsageError: There is no input, or no query.
    """
    inputs, asked = list(inputs), list(queries or ())
    if file is not None:
        try:
            with open(file, encoding="utf-8") as lines:
                asked += lines.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
            raise UsageError(f"--queries {file}: cannot read this file: {reason}") from error
    elif not asked:
        asked = [inputs.pop()]
        if inputs and os.path.exists(asked[0]):
            raise UsageError(
                f"{asked[0]!r} is a file or folder, but the last argument is what is searched for: "
                "attnsuite search photos 'a red car' (for such a text, --query)"
            )
    asked = [text for query in asked if (text := query.strip())]
    if not asked or not inputs:
        raise UsageError("say where and what to search: attnsuite search photos 'a red car'")
    return inputs, list(dict.fromkeys(asked))


def write(rows: list[Row], output: str) -> None:
    """Writes hits to a file.

    Raises:
        UsageError: It cannot be written, by its name.
        Stopped: The disk is full.
    """
    sink = file_sink(output, COLUMNS)
    try:
        sink.begin(0)
        sink.append(rows)
        sink.finish()
    except OSError as error:
        raise Stopped(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        sink.close()


def show(found: Found, as_json: bool) -> None:
    """Prints hits: a table on a terminal, CSV in a pipe, JSON lines if asked for."""
    if as_json or not sys.stdout.isatty():
        stdout_writer(sys.stdout, COLUMNS, "json" if as_json else "csv")(found.rows)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("query", "rank", "score", "image"):
        table.add_column(name, justify="right" if name in ("rank", "score") else "left", no_wrap=True)
    for row in found.rows:
        table.add_row(Text(row["query"]), str(row["rank"]), f"{row['score']:.3f}", Text(row["path"]))
    Console(highlight=False).print(table)


def say(found: Found, output: str | None, as_json: bool) -> None:
    """Says on stderr what came of a search; with `as_json` and an output file, as an object on stdout too."""
    where = f" → {output}" if output else ""
    failed = f", {found.failed:,} could not be read" if found.failed else ""
    stderr.print(f"{len(found.rows):,} hits among {found.images:,} images{failed}{where}", markup=False)
    if as_json and output:
        facts = {"output": output, "hits": len(found.rows), "images": found.images, "failed": found.failed}
        print(json.dumps(facts))


def check(output: str, overwrite: bool) -> None:
    """Finds out before any long work whether hits can be written to a file.

    Raises:
        UsageError: They cannot, or something is there.
    """
    check_output(output)
    if os.path.exists(output) and not overwrite:
        raise UsageError(f"{output} exists; --overwrite replaces it")


def _resolve(files: Sequence[str], clip: ClipChoice) -> ResolvedClip:
    labels = {path: label_of(path) for path in files}
    if files and not clip.named:
        clip = choice_of(labels[files[0]])
    resolved = clip.resolve()
    for path, label in labels.items():
        if not is_same(label, resolved.label):
            raise UsageError(
                f"{path} holds features of {label}, which texts of {resolved.label} cannot be compared with: name that "
                "model, or embed the images with this one"
            )
    return resolved
