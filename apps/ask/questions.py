"""What is asked about which picture: one question about all, or a file with a question for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ..batch.listing import Found
from ..batch.sources import Inputs, Source, encode_path
from ..errors import UsageError

__all__ = ["Pair", "Pairs", "read_question"]

_SUFFIX = ".jsonl"
_EXAMPLE = '{"image": "a.jpg", "question": "What colour is the car?"}'


@dataclass(frozen=True)
class Pair(Source):
    """A picture with its own question.

    Attributes:
        question: The question; empty where the line cannot be read.
        line: Its line in the file, from 1.
    """

    question: str = ""
    line: int = 0

    @property
    def key(self) -> str:
        """Text that changes with the question, too."""
        return f"{super().key}\0{self.question}"


@dataclass
class Pairs(Inputs):
    """Files with a picture and a question a line; pictures are found from the folder of their file."""

    def check(self) -> None:
        """Tells before any long work whether there is something to ask.

        Raises:
            UsageError: A file cannot be read, or holds no line.
        """
        for file in self.arguments:
            try:
                if next(iter(_lines(file)), None) is None:
                    raise UsageError(f"{file} holds no line; expected lines such as {_EXAMPLE}")
            except OSError as error:
                raise UsageError(f"cannot read {file}: {error.strerror}") from error

    def __iter__(self) -> Iterator[Source]:
        lines = ((file, *line) for file in self.arguments for line in _lines(file))
        return islice((self._pair(*line) for place, line in enumerate(lines) if self._takes(place)), self.limit)

    def _pair(self, file: str, number: int, line: bytes) -> Pair:
        """A line that cannot be read becomes an input with an error, as a picture that cannot be."""
        bad = Pair(f"{file}:{number}", line=number)
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return replace(bad, error=f"line {number:,} of {encode_path(file)} is not JSON; expected {_EXAMPLE}")
        image, question = (found.get(name) if isinstance(found, dict) else None for name in ("image", "question"))
        if not (isinstance(image, str) and isinstance(question, str) and image and "\0" not in image):
            return replace(
                bad, error=f"line {number:,} of {encode_path(file)} lacks 'image' or 'question'; expected {_EXAMPLE}"
            )
        path = os.path.join(os.path.dirname(file), image)
        asked = {"question": question.strip(), "line": number}
        if not question.strip():
            return Pair(path, error=f"the question in line {number:,} of {encode_path(file)} is empty", **asked)
        if path.lower().endswith(".tar") or os.path.isdir(path):
            return Pair(path, error="not an image: a line asks about one", **asked)
        source = next(iter(self._sources(Found(path))))
        return Pair(source.path, stamp=source.stamp, error=source.error, **asked)


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, with their numbers."""
    with open(file, "rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def read_question(arguments: Sequence[str], question: str | None) -> tuple[list[str], str | None]:
    """Tells inputs and question apart: where no option gives it, the last argument is the question.

    Args:
        arguments: The arguments.
        question: `--question`.

    Returns:
        Inputs, and the question; None where the inputs are files that bring theirs.

    Raises:
        UsageError: There is no input or no question, or there are two.
    """
    inputs = list(arguments)
    files = [name for name in inputs if name.lower().endswith(_SUFFIX)]
    if question is None and len(files) == len(inputs):
        return inputs, None
    if question is None:
        question = inputs.pop()
        if os.path.exists(question):
            raise UsageError(
                f"{question!r} is a file or folder, but the last argument is the question: "
                "attnsuite ask street.jpg 'How many people are there?' (for such a question, --question)"
            )
    if not inputs or not question.strip():
        raise UsageError("say about what and what to ask: attnsuite ask street.jpg 'How many people are there?'")
    if files:
        raise UsageError(
            f"{files[0]} brings a question for each image, so name nothing beside it, and ask nothing else"
        )
    return inputs, question.strip()
