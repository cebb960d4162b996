"""What the claims on the small vision-language model share: runs of its recipe, answers to held-out questions, a file.

`recipes.scene_vlm` trains each run, a causal model and one with modality-mutual attention, from a seed of its own;
`recipes.scene_questions` asks what no run has met, and says by program whether a reply is right and has the form that
was asked for. Questions of seeds below 1000 are for development, those from 1000 on for the measurement.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from recipes.scene_questions import Example
from recipes.scene_vlm import MASKS
from recipes.scene_vlm_card import prompts

__all__ = [
    "SEEDS",
    "Answer",
    "Asked",
    "Method",
    "Model",
    "Results",
    "answers",
    "batches",
    "load",
    "load_results",
    "save_results",
    "shares",
    "train_missing",
]

SEEDS = (0, 1, 2)
"""Of the training runs."""
BATCH_SIZE = 50
MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Model:
    """A trained run: what answers, and what makes its inputs."""

    network: LlavaForConditionalGeneration
    processor: Any

    @property
    def stop_token_id(self) -> int:
        """Of the marker that ends the user's turn."""
        return self.processor.tokenizer.convert_tokens_to_ids("<assistant>")


def train_missing(runs: Path) -> None:
    """Trains the runs that a folder does not hold, as `seed0/causal`, `seed0/mma` and so on; all share one tower."""
    for seed in SEEDS:
        masks = [mask for mask in MASKS if not (runs / f"seed{seed}" / mask / "model.safetensors").exists()]
        tower = next(runs.glob("seed*/*/model.safetensors"), None)
        if masks:
            taken = ["--tower", str(tower.parent)] if tower else []
            out = ["--seed", str(seed), "--mask", *masks, "-o", str(runs / f"seed{seed}")]
            subprocess.run([sys.executable, "-m", "recipes.scene_vlm", *out, *taken], check=True)


def load(folder: Path) -> Model:
    """A run in float32, as plain transformers loads it."""
    network = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return Model(network, AutoProcessor.from_pretrained(folder))


@dataclass(frozen=True)
class Method:
    """A way to answer.

    Attributes:
        name: As tables call it.
        switch: What is entered for it.
        prepare: Changes the inputs of a batch, whose first question has the number given.
    """

    name: str
    switch: Callable[[Model], AbstractContextManager[Any]] = field(default=lambda model: nullcontext())
    prepare: Callable[[Model, dict[str, Any], int], dict[str, Any]] = field(default=lambda model, inputs, first: inputs)


@dataclass(frozen=True)
class Answer:
    """What a reply was.

    Attributes:
        right: It gives the right answer, in whatever form.
        follows: It has the form asked for.
    """

    right: bool
    follows: bool


@dataclass(frozen=True)
class Asked:
    """What is kept of a question.

    Attributes:
        number: Its place among the questions of its seed.
        kind: Of question.
        form: Of reply that it asks for.
        new_object: Its picture shows an object that no training picture shows.
        new_form: Training never asked for this kind in this form.
    """

    number: int
    kind: str
    form: str
    new_object: bool
    new_form: bool

    @classmethod
    def of(cls, number: int, example: Example) -> Asked:
        """What is kept of an example."""
        own = example.question
        return cls(number, own.kind, own.format, example.new_object, example.new_format)


Results = Mapping[str, Sequence[Sequence[Answer]]]
"""Of each method, of each run, the answers to the same questions."""


def batches(model: Model, examples: Sequence[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The inputs of all questions, in their order, and the number of the first in each batch."""
    for first in range(0, len(examples), BATCH_SIZE):
        yield first, dict(prompts(model.processor, examples[first : first + BATCH_SIZE]))


@torch.no_grad()
def answers(model: Model, examples: Sequence[Example], method: Method) -> list[Answer]:
    """Greedy answers by one method."""
    replies: list[str] = []
    network: Any = model.network
    for first, inputs in batches(model, examples):
        with method.switch(model):
            inputs = method.prepare(model, inputs, first)
            out = network.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        replies += model.processor.batch_decode(new, skip_special_tokens=True)
    return [
        Answer(e.question.answered(reply), e.question.follows(reply))
        for e, reply in zip(examples, replies, strict=True)
    ]


def shares(runs: Sequence[Sequence[Answer]], quantity: str, where: Sequence[bool] | None = None) -> list[list[float]]:
    """1 or 0 for each answer of each run: `right`, `follows`, or `both`; only of some questions, if told where."""
    chosen = where or [True] * len(runs[0])
    return [
        [
            float(own.right and own.follows if quantity == "both" else getattr(own, quantity))
            for own, taken in zip(run, chosen, strict=True)
            if taken
        ]
        for run in runs
    ]


_ASKED = ("number", "kind", "form", "new_object", "new_form")


def save_results(asked: Sequence[Asked], results: Results, path: Path) -> None:
    """A row for each question; for each method a digit for each run: 1 if right, and 2 more if it has the form."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_ASKED, *results])
        for i, own in enumerate(asked):
            row = [own.number, own.kind, own.form, int(own.new_object), int(own.new_form)]
            codes = ("".join(str(run[i].right + 2 * run[i].follows) for run in runs) for runs in results.values())
            writer.writerow([*row, *codes])


def load_results(path: Path) -> tuple[list[Asked], dict[str, list[list[Answer]]]]:
    """Reads what `save_results` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    asked = [Asked(int(n), kind, form, o == "1", f == "1") for n, kind, form, o, f, *_ in rows]
    results: dict[str, list[list[Answer]]] = {}
    for column, method in enumerate(header[len(_ASKED) :], len(_ASKED)):
        runs = zip(*(row[column] for row in rows), strict=True)
        results[method] = [[Answer(code in "13", code in "23") for code in run] for run in runs]
    return asked, results
