"""Asks a vision-language model about pictures, each on its own, so that no answer depends on what else is asked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multimodal.layout import family_of

from ..batch.decode import Decoder, Framing
from ..batch.sources import Source, encode_path
from ..batch.stage import Batch, Column, Compute, Row, Stage
from ..errors import UsageError
from ..pictures import PictureFolder, write_png
from .models import VLM
from .questions import Pair
from .switches import Switches

__all__ = ["Ask", "Drawing", "Given"]

_ANSWER_TOKENS = 128  # where neither user nor model sets a limit
_TIMED = 3  # prefills whose median is taken


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


@dataclass(frozen=True)
class _Answer:
    text: str
    tokens: Tensor  # [T]
    kept: int | None  # image tokens that the language model was given, where these were made fewer


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
        self._model: Any = self.module
        self._plain: Any = self._model if network.plain is None else network.plain.to(compute.device)
        self._processor = network.processor
        self._given, self._drawing, self._note = given, drawing, note
        self._image_token = family_of(self._model).image_token_id(self._model)
        self._unknown: set[str] = set()
        given.switches.check(self._model, network.label)
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
        inputs = self._inputs(picture, question)
        there = int((inputs["input_ids"] == self._image_token).sum())
        answer = self._answer(self._model, inputs, self._given.switches)
        row: Row = {
            "answer": answer.text,
            "image_tokens": there,
            "kept_tokens": there if answer.kept is None else answer.kept,
        }
        asked = [(self._model, self._given.switches, answer)]
        if self._given.compare:
            plain = self._answer(self._plain, inputs, Switches())
            asked.insert(0, (self._plain, Switches(), plain))
            row |= {
                "plain_answer": plain.text,
                "prefill_ms": self._prefill_ms(self._model, inputs, self._given.switches),
                "plain_prefill_ms": self._prefill_ms(self._plain, inputs, Switches()),
            }
        if self._drawing is not None:
            drawn = [self._drawn(model, inputs, switches, answer.tokens, picture) for model, switches, answer in asked]
            row |= self._drawing.write(source, np.hstack(drawn))
        return row

    def _inputs(self, picture: Image.Image, question: str) -> Any:
        processor = self._processor
        template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        if template is None:  # of a model that was not taught to chat, such as PaliGemma
            inputs = processor(images=[picture], text=[f"{processor.image_token}{question}"], return_tensors="pt")
        else:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        return inputs.to(self.compute.device, dtype=self._model.dtype)

    def _answer(self, model: Any, inputs: Any, switches: Switches) -> _Answer:
        with torch.inference_mode(), switches.on(model) as compression:
            sequence = model.generate(**inputs, **self._greedily(model))[0]
        tokens = sequence[inputs["input_ids"].shape[1] :]
        kept = None if compression is None else sum(len(own.index) for own in compression.last.pictures)
        return _Answer(self._processor.decode(tokens, skip_special_tokens=True).strip(), tokens, kept)

    def _greedily(self, model: Any) -> dict[str, Any]:
        limit = self._given.max_tokens or model.generation_config.max_new_tokens or _ANSWER_TOKENS
        sampling = {"temperature": None, "top_p": None, "top_k": None}  # else transformers says that they are not used
        return {"do_sample": False, "num_beams": 1, "max_new_tokens": limit, **sampling}

    def _prefill_ms(self, model: Any, inputs: Any, switches: Switches) -> float:
        """Time to the first token: pictures, switches and prompt; the median. All have run once before."""
        times = []
        with torch.inference_mode(), switches.on(model):
            for _ in range(_TIMED):
                start = time.perf_counter()
                model.generate(**inputs, **self._greedily(model) | {"max_new_tokens": 1})[0, -1].item()
                times.append(time.perf_counter() - start)
        return round(1000 * statistics.median(times), 3)

    def _drawn(self, model: Any, inputs: Any, switches: Switches, answer: Tensor, picture: Image.Image) -> np.ndarray:
        from multimodal.explain import attended

        with switches.on(model):
            seen = attended(model, inputs, answer=answer)
        return np.asarray(seen.draw(picture, processor=self._processor).convert("RGB"))

    def _check_drawing(self) -> None:
        from multimodal.grids import places_known

        if not places_known(self._model):
            raise UsageError(
                f"--show-attention: it is not known where the image tokens of {self.network.label} lie in a picture"
            )

    def _name_unknown(self, question: str) -> None:
        """Says which words a model does not know that knows few."""
        tokenizer = self._processor.tokenizer
        if not self._is_small or tokenizer.unk_token_id is None:
            return
        words = dict.fromkeys(question.replace("?", " ").replace(".", " ").replace(",", " ").split())
        unknown = [
            word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
        ]
        if new := [word for word in unknown if word not in self._unknown]:
            self._unknown.update(new)
            self._note(f"note: {self.network.label} does not know {', '.join(new)}")
