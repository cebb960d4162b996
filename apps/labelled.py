"""Labelled pictures, as `train` and `evaluate` read them: class folders, a CSV, or webdataset shards.

Only names and labels are read here. Every picture is a `Source` of `apps.batch`, a file or a place in a shard, so that
any process can read any of them at any time: timm's own readers stream shards, in an order that cannot be taken up in
the middle, and decode without regard to how a camera was held. What cannot be read is found by `unreadable`, or by
whoever decodes; it is never replaced by another picture.
"""

from __future__ import annotations

import csv
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from .batch.decode import image_suffixes
from .batch.listing import expand_glob, has_glob, walk
from .batch.sources import Inputs, Source, encode_path
from .errors import UsageError

__all__ = ["SPLITS", "Labelled", "find", "natural_order", "splits", "unreadable"]

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""What the parts of a data set are called, here and in folders."""

_CLASS_FILE = "classes.txt"
_MOST_NAMED = 5


@dataclass(frozen=True)
class Labelled:
    """Pictures and their classes.

    Attributes:
        where: What messages call them.
        classes: Names, in the order of their numbers.
        sources: One a picture, in an order that stays the same as long as the data do.
        targets: The number of each picture's class.
    """

    where: str
    classes: tuple[str, ...]
    sources: tuple[Source, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def counts(self) -> list[int]:
        """How many pictures each class has."""
        counted = Counter(self.targets)
        return [counted[number] for number in range(len(self.classes))]

    def take(self, places: Iterable[int]) -> Labelled:
        """The pictures at these places, with the same classes."""
        chosen = list(places)
        return replace(
            self,
            sources=tuple(self.sources[place] for place in chosen),
            targets=tuple(self.targets[place] for place in chosen),
        )

    def numbered(self, classes: Sequence[str], owner: str) -> Labelled:
        """The same pictures with their classes numbered as in another list.

        Args:
            classes: The list; classes of it that have no picture here are all right.
            owner: Whose list it is, for the message.

        Raises:
            UsageError: There is a class that the list lacks.
        """
        numbers = {name: number for number, name in enumerate(classes)}
        if strange := [name for name in self.classes if name not in numbers]:
            raise UsageError(
                f"{self.where} has {len(strange)} of {len(self.classes)} classes that {owner} does not know: "
                f"{_some(strange)}; it knows {_some(classes)}. Rename the classes, or take them out"
            )
        return replace(
            self, classes=tuple(classes), targets=tuple(numbers[self.classes[target]] for target in self.targets)
        )


def natural_order(names: Iterable[str]) -> list[str]:
    """Names in timm's order, numbers in them by value."""
    from timm.utils.misc import natural_key

    return sorted(names, key=lambda name: (natural_key(name), name))


def splits(data: str) -> tuple[str, ...]:
    """Which parts a data set is divided into: of `train`, `val` and `test` those that `find` can take; often none."""
    path = Path(data)
    if path.suffix.lower() == ".csv" and path.is_file():
        parts = {row.split for row in _rows(path)}
        return tuple(name for name in SPLITS if name in parts)
    if not path.is_dir():
        return ()
    return tuple(name for name in SPLITS if _split_folder(path, name) or _shards_of_split(path, name))


def find(data: str, split: str | None = None) -> Labelled:
    """Finds labelled pictures.

    Args:
        data: A folder with a folder for each class, or with such folders in `train/`, `val/`, `test/`; a CSV with the
            columns `path`, `label` and perhaps `split`, paths from its own folder on; a `.tar` of webdataset's kind
            (`NAME.jpg` beside `NAME.cls` or `NAME.json`), a folder or a quoted pattern of such. Where labels of shards
            are numbers, a file `classes.txt` beside them gives their names, one a line from 0.
        split: Which part, `train`, `val` or `test`, also by other usual names of folders; None for everything.

    Returns:
        The pictures, with classes in timm's order.

    Raises:
        UsageError: There are none, or not of that part, or something is wrong with the labels.
    """
    if split is not None and split not in SPLITS:
        raise UsageError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    if not os.path.lexists(data) and not has_glob(data):
        raise UsageError(f"data {encode_path(data)!r} does not exist")
    where = encode_path(data) + (f" ({split})" if split else "")
    labels, sources = _named(data, split)
    if not sources:
        raise UsageError(
            f"found no labelled pictures in {where}; expected a folder for each class, a .csv with path,label, or .tar "
            "shards with NAME.jpg beside NAME.cls"
        )
    classes = tuple(natural_order(set(labels)))
    numbers = {name: number for number, name in enumerate(classes)}
    return Labelled(where, classes, tuple(sources), tuple(numbers[label] for label in labels))


def _named(data: str, split: str | None) -> tuple[list[str], list[Source]]:
    """Label and source of every picture."""
    path = Path(data)
    if path.is_dir():
        return _of_folder(path, split)
    if path.suffix.lower() == ".csv":
        return _of_csv(path, split)
    if has_glob(data) and not os.path.lexists(data):
        shards = [Path(found.path) for found in expand_glob(data) if found.error is None]
    else:
        shards = [path]
    if split is not None:
        raise UsageError(f"{encode_path(data)} is not divided into parts; name the shards of each part by themselves")
    return _of_shards(shards)


def _of_folder(folder: Path, split: str | None) -> tuple[list[str], list[Source]]:
    if split is not None:
        part = _split_folder(folder, split)
        if part is None:
            if shards := _shards_of_split(folder, split):
                return _of_shards(shards)
            names = " or ".join(f"{name}/" for name in SPLITS[split])
            raise UsageError(f"{encode_path(str(folder))} has no part {split!r}: expected a folder {names} in it")
        folder = part
    elif parts := [name for name in SPLITS if _split_folder(folder, name)]:
        raise UsageError(f"{encode_path(str(folder))} is divided into {', '.join(parts)}: say which part is meant")
    if shards := _tars(folder):
        return _of_shards(shards)
    return _of_classes(folder)


def _of_classes(folder: Path) -> tuple[list[str], list[Source]]:
    """A class for each folder in `folder`, with all pictures below it."""
    labels: list[str] = []
    sources: list[Source] = []
    loose = [found.path for found in walk(str(folder), recursive=False, wanted=_is_image)]
    if loose:
        raise UsageError(
            f"{len(loose):,} pictures lie in no class, such as {encode_path(loose[0])}; expected a folder for each "
            f"class in {encode_path(str(folder))}"
        )
    for place in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        found = list(Inputs([str(place)]))
        if not found:
            raise UsageError(f"class {place.name!r} has no pictures: {encode_path(str(place))}; fill or remove it")
        labels += [encode_path(place.name)] * len(found)
        sources += found
    return labels, sources


def _is_image(name: bytes) -> bool:
    return os.path.splitext(os.fsdecode(name))[1].lower() in image_suffixes()


def _split_folder(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in SPLITS[split] if (folder / name).is_dir()), None)


@dataclass(frozen=True)
class _Row:
    """A line of a CSV."""

    path: str
    label: str
    split: str | None


def _rows(file: Path) -> Iterator[_Row]:
    """The lines of a CSV; what is wrong with one is said with its number."""
    name = encode_path(str(file))
    seen: dict[str, int] = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if missing := {"path", "label"} - set(reader.fieldnames or ()):
                raise UsageError(
                    f"{name} has no column {' and no '.join(sorted(missing))}; expected path,label and perhaps split"
                )
            for row in reader:
                yield _row(row, f"{name}, line {reader.line_num}", seen, reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{name} cannot be read as CSV in UTF-8: {error}") from error


def _row(row: dict[str, Any], place: str, seen: dict[str, int], line: int) -> _Row:
    path, label, split = ((row.get(name) or "").strip() for name in ("path", "label", "split"))
    if not path or not label:
        raise UsageError(f"{place}: {'path' if not path else 'label'} is empty")
    if path in seen:
        raise UsageError(f"{place}: {path!r} stands in line {seen[path]} already; each picture may have one line")
    seen[path] = line
    if "split" not in row:
        return _Row(path, label, None)
    known = next((name for name, others in SPLITS.items() if split.lower() in others), None)
    if known is None:
        raise UsageError(f"{place}: split {split!r}; expected {', '.join(SPLITS)}")
    return _Row(path, label, known)


def _of_csv(file: Path, split: str | None) -> tuple[list[str], list[Source]]:
    if not file.is_file():
        raise UsageError(f"data {encode_path(str(file))!r} is not a file")
    rows = list(_rows(file))
    if split is not None and rows and rows[0].split is None:
        raise UsageError(f"{encode_path(str(file))} has no column split, so no part {split!r}")
    if split is None and len(parts := {row.split for row in rows}) > 1:
        raise UsageError(
            f"{encode_path(str(file))} is divided into {', '.join(filter(parts.__contains__, SPLITS))}: say which part "
            "is meant"
        )
    rows = [row for row in rows if split is None or row.split == split]
    return [row.label for row in rows], [_source_of(file.parent / row.path) for row in rows]


def _source_of(path: Path) -> Source:
    try:
        status = path.stat()
    except OSError as error:
        return Source(str(path), error=f"cannot open this file: {error.strerror or error}")
    return Source(
        str(path),
        stamp=f"{status.st_size}:{status.st_mtime_ns}",
        error=None if stat.S_ISREG(status.st_mode) else "not a regular file",
    )


def _tars(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".tar")


def _shards_of_split(folder: Path, split: str) -> list[Path]:
    """Shards of a part that lie beside those of others, told apart by a word in their names: `set-train-003.tar`."""
    words = set(SPLITS[split])
    return [
        file for file in _tars(folder) if words & set(file.stem.lower().replace("_", "-").replace(".", "-").split("-"))
    ]


def _of_shards(shards: Sequence[Path]) -> tuple[list[str], list[Source]]:
    labels: list[str] = []
    sources: list[Source] = []
    for shard in shards:
        for label, source in _of_shard(shard):
            labels.append(label)
            sources.append(source)
    names = shards[0].parent / _CLASS_FILE if shards else Path(_CLASS_FILE)
    if names.is_file() and all(label.isdecimal() for label in labels):
        known = names.read_text(encoding="utf-8").split("\n")
        known = [name.strip() for name in known if name.strip()]
        if (most := max(map(int, labels), default=0)) >= len(known):
            raise UsageError(f"{encode_path(str(names))} names {len(known)} classes, but there is a label {most}")
        labels = [known[int(label)] for label in labels]
    return labels, sources


def _of_shard(shard: Path) -> list[tuple[str, Source]]:
    """Label and place of every picture of one shard; a picture and its label have the same name up to the first dot."""
    name = encode_path(str(shard))
    pictures: dict[str, Source] = {}
    labels: dict[str, str] = {}
    try:
        stamp = shard.stat()
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}", suffix.lower()
                if member.isreg() and suffix in ("cls", "json"):
                    labels.setdefault(key, _label(archive.extractfile(member), suffix, f"{name}::{member.name}"))
                elif member.isreg() and f".{suffix}" in image_suffixes():
                    place = (member.name, member.offset_data, member.size)
                    pictures[key] = Source(str(shard), *place, f"{stamp.st_size}:{stamp.st_mtime_ns}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"{name} cannot be read as an uncompressed .tar: {error}") from error
    if bare := [source.name for key, source in pictures.items() if key not in labels]:
        raise UsageError(
            f"{len(bare):,} pictures have no label, such as {bare[0]}: expected NAME.cls or NAME.json beside"
        )
    if lone := [key.lstrip("/") for key in labels if key not in pictures]:
        raise UsageError(f"{name}: {len(lone):,} labels have no picture, such as {lone[0]}")
    return [(labels[key], source) for key, source in pictures.items()]


def _label(file: IO[bytes] | None, suffix: str, place: str) -> str:
    """What a `.cls` says, or the `label` or `cls` of a `.json`."""
    assert file is not None
    try:
        text = file.read().decode("utf-8").strip()
        if suffix == "json":
            content = json.loads(text)
            text = str(content.get("label", content.get("cls", ""))).strip()
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{place} is no label: {error}") from error
    if not text:
        raise UsageError(f"{place} holds no label; expected a number or name, in .json under label or cls")
    return text


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more


def unreadable(data: Labelled, workers: int, advance: Callable[[int], None] = lambda count: None) -> dict[str, str]:
    """Reads every picture to its end, so that none is found broken in the middle of a long run.

    Args:
        data: The pictures.
        workers: Processes that read; 0 for this one.
        advance: Told after some pictures how many were read.

    Returns:
        Name of each picture that cannot be read, and why.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pieces = [data.sources[start : start + 64] for start in range(0, len(data), 64)]
    found: dict[str, str] = {}

    def collect(results: Iterable[dict[str, str]]) -> None:
        for piece, failed in zip(pieces, results, strict=True):
            found.update(failed)
            advance(len(piece))

    if workers:
        # not forked: a process with threads of torch cannot be copied safely
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            collect(pool.map(_failed, pieces))
    else:
        collect(map(_failed, pieces))
    return found


def _failed(sources: Sequence[Source]) -> dict[str, str]:
    from .batch.decode import Unreadable, read_source

    failed = {}
    for source in sources:
        try:
            read_source(source)
        except Unreadable as error:
            failed[encode_path(source.name)] = str(error)
    return failed
