"""Asks a vision-language model about pictures, each on its own, so that no answer depends on what else is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..batch.decode import Decoder, Framing
from ..batch.sources import Source, encode_path
from ..batch.stage import Batch, Column, Compute, Row, Stage
from ..errors import UsageError
from ..pictures import PictureFolder, write_png
from .asker import Asker
from .models import VLM
from .questions import Pair
from .switches import Switches

__all__ = ["Ask", "Drawing", "Given"]


@dataclass(frozen=True)
class Drawing:
    """Where it is drawn what an answer was read off.

    Attributes:
        path: A file `.png` for the one picture there is, or a folder.
        root: The deepest folder that holds all inputs.
    """

    path: str
    root: str

    @property
    def one(self) -> bool:
        """Whether it is one file."""
        return self.path.lower().endswith(".png")

    def write(self, source: Source, picture: np.ndarray) -> Row:
        """Writes a picture, `(H, W, 3)`, uint8; gives its column."""
        if self.one:
            write_png(self.path, picture)
            return {"attention": encode_path(self.path)}
        line = f".{source.line}" if isinstance(source, Pair) else ""

        def draw(base: str) -> Row:
            write_png(f"{base}{line}.attention.png", picture)
            return {"attention": encode_path(f"{base}{line}.attention.png")}

        return PictureFolder(self.path, self.root).write(source, draw, "map of attention")


@dataclass(frozen=True)
class Given:
    """What the user asks.

    Attributes:
        question: About all pictures; None where each brings its own.
        switches: Under which it is asked.
        compare: Ask without them, too, and measure the time.
        max_tokens: Tokens of an answer, at most; None for the model's own limit.
    """

    question: str | None
    switches: Switches
    compare: bool = False
    max_tokens: int | None = None


class _Whole:
    """A picture as it is; the model's processor does the rest."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """To `(3, H, W)`, uint8."""
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class Ask(Stage):
    """Answers of a vision-language model.

    Args:
        network: The model with its processor.
        compute: How to run it.
        given: What is asked.
        drawing: Where it is drawn what the model looks at; None for nowhere.
        note: Told what the user should know.

    Raises:
        UsageError: The model cannot be asked so.
    """

    def __init__(
        self,
        network: VLM,
        compute: Compute,
        given: Given,
        drawing: Drawing | None = None,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        super().__init__(network, compute, decoder=Decoder(_Whole(), Framing((1, 1), 1.0, "squash"), keep_strips=True))
        model: Any = self.module
        plain = model if network.plain is None else network.plain.to(compute.device)
        self._asker = Asker(model, network.processor, given.max_tokens)
        self._plain = Asker(plain, network.processor, given.max_tokens)
        self._given, self._drawing, self._note = given, drawing, note
        self._unknown: set[str] = set()
        given.switches.check(model, network.label)
        if drawing is not None:
            self._check_drawing()
        if network.card:
            note(network.card)
        self._is_small = bool(network.card)

    @property
    def columns(self) -> tuple[Column, ...]:
        """`question, answer, image_tokens, kept_tokens`, then those of `--compare` and `--show-attention`."""
        counts = (Column("image_tokens", "integer"), Column("kept_tokens", "integer"))
        compared = (
            Column("plain_answer", "text"),
            Column("prefill_ms", "number"),
            Column("plain_prefill_ms", "number"),
        )
        drawn = (Column("attention", "text"),) if self._drawing else ()
        return (
            Column("question", "text"),
            Column("answer", "text"),
            *counts,
            *(compared if self._given.compare else ()),
            *drawn,
        )

    def run(self, images: Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """Asks about each picture."""
        rows = []
        for pixels, place in zip(batch.images, places, strict=True):
            source = batch.sources[place]
            question = source.question if isinstance(source, Pair) else str(self._given.question)
            self._name_unknown(question)
            try:
                rows.append(
                    {"question": question, **self._row(Image.fromarray(pixels.transpose(1, 2, 0)), question, source)}
                )
            except ValueError as error:  # of a processor or a switch that cannot do with this picture or question
                rows.append({"question": question, "error": " ".join(str(error).split())})
        return rows

    def rows(self, batch: Batch) -> list[Row]:
        """As of any stage; the question stands beside a picture that cannot be read, too."""
        rows = super().rows(batch)
        for row, source in zip(rows, batch.sources, strict=True):
            if row["question"] is None:
                row["question"] = source.question or None if isinstance(source, Pair) else self._given.question
        return rows

    def describe(self, row: Row) -> str:
        """The answer."""
        return row["answer"]

    def _row(self, picture: Image.Image, question: str, source: Source) -> Row:
        inputs, switches = self._asker.inputs(picture, question), self._given.switches
        answer = self._asker.answer(inputs, switches)
        row: Row = {"answer": answer.text, "image_tokens": answer.there, "kept_tokens": answer.kept}
        asked = [(self._asker, switches, answer)]
        if self._given.compare:
            plain = self._plain.answer(inputs, Switches())
            asked.insert(0, (self._plain, Switches(), plain))
            row |= {
                "plain_answer": plain.text,
                "prefill_ms": self._asker.prefill_ms(inputs, switches),
                "plain_prefill_ms": self._plain.prefill_ms(inputs, Switches()),
            }
        if self._drawing is not None:
            drawn = [asker.drawn(inputs, under, answer.tokens, picture) for asker, under, answer in asked]
            row |= self._drawing.write(source, np.hstack([np.asarray(one) for one in drawn]))
        return row

    def _check_drawing(self) -> None:
        from multimodal.grids import places_known

        if not places_known(self._asker.model):
            raise UsageError(
                f"--show-attention: it is not known where the image tokens of {self.network.label} lie in a picture"
            )

    def _name_unknown(self, question: str) -> None:
        """Says which words a model does not know that knows few."""
        unknown = self._asker.unknown_words(question) if self._is_small else []
        if new := [word for word in unknown if word not in self._unknown]:
            self._unknown.update(new)
            self._note(f"note: {self.network.label} does not know {', '.join(new)}")
