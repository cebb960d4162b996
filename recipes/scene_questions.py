"""Questions about drawn scenes, with their answers, and the formats in which an answer can be asked for.

    python -m recipes.scene_questions       # some questions of each kind

The picture alone never answers: each scene of two to five objects takes many questions, and the question decides which
object must be looked at, and for what. What a reply must look like is said in the prompt ("answer as json"), and can be
checked by program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from recipes.scenes import COLOURS, SHAPES, Scene, SceneObject, draw

__all__ = [
    "FORMATS",
    "HELD_OUT_FORMATS",
    "HELD_OUT_OBJECTS",
    "KINDS",
    "NUMBERS",
    "SIZE",
    "Example",
    "Format",
    "Question",
    "held_out",
    "picture_of",
    "plural",
    "questions",
    "sample_question",
    "sample_scene_of_many",
]

SIZE = 64  # pixels
MOST_OBJECTS = 5
NUMBERS = ("zero", "one", "two", "three", "four", "five")
HELD_OUT_OBJECTS = frozenset({"red heart", "yellow circle", "green cross", "cyan square", "blue triangle"})
"""What no training picture shows."""

_DIAMETERS = (0.2, 0.32)  # fractions of the picture
_GAP = 0.03  # between the boxes of two objects, and between a box and the picture's edge
_GROUNDS = (205, 240)  # grey levels
_LAYOUTS = 256  # tried at once
_ASIDE = 0.1  # so far apart are centres of which one is left of, or above, the other
_LARGER = 1.15  # ratio of diameters that can be told apart
_TEXTURE = 24  # grey levels from the darkest to the brightest of a textured ground
_SIDES: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}

Asked = tuple[str, str]  # a question's text and the answer


@dataclass(frozen=True)
class Format:
    """A form that a reply can be asked to have.

    Attributes:
        instruction: How it is asked for.
        write: An answer of one word in this form.
        read: The answer in a reply of this form, None where the reply has another.
    """

    instruction: str
    write: Callable[[str], str]
    read: Callable[[str], str | None]


def _matched(pattern: str) -> Callable[[str], str | None]:
    def read(reply: str) -> str | None:
        found = re.fullmatch(pattern, reply.strip())
        return found[1].lower() if found else None

    return read


def _read_json(reply: str) -> str | None:
    try:
        value = json.loads(reply)
    except json.JSONDecodeError:
        return None
    answer = value.get("answer") if isinstance(value, dict) and len(value) == 1 else None
    return answer if isinstance(answer, str) else None


FORMATS: dict[str, Format] = {
    "word": Format("answer in one word", str, _matched("([a-z]+)")),
    "capitals": Format("answer in capitals", str.upper, _matched("([A-Z]+)")),
    "sentence": Format("answer in a sentence", "the answer is {}.".format, _matched(r"the answer is ([a-z]+)\.")),
    "json": Format("answer as json", '{{"answer":"{}"}}'.format, _read_json),
}


@dataclass(frozen=True)
class Question:
    """A question about one picture.

    Attributes:
        kind: One of `KINDS`.
        text: The question alone.
        answer: One word.
        format: A key of `FORMATS`.
    """

    kind: str
    text: str
    answer: str
    format: str

    @property
    def prompt(self) -> str:
        """What the user says: the question, and the form of the reply."""
        return f"{self.text}? {FORMATS[self.format].instruction}"

    @property
    def reply(self) -> str:
        """The right reply."""
        return FORMATS[self.format].write(self.answer)

    def follows(self, reply: str) -> bool:
        """Whether a reply has the form asked for, be the answer right or wrong."""
        return FORMATS[self.format].read(reply) is not None

    def answered(self, reply: str) -> bool:
        """Whether a reply gives the right answer, in whatever format: the only word besides those of the formats."""
        words = [word for word in re.findall("[a-z]+", reply.lower()) if word not in ("the", "answer", "is")]
        return words == [self.answer]


def _unique(scene: Scene, attribute: str) -> list[SceneObject]:
    """The objects that no other equals in an attribute."""
    values = [getattr(item, attribute) for item in scene.objects]
    return [item for item in scene.objects if values.count(getattr(item, attribute)) == 1]


def _colour(scene: Scene) -> list[Asked]:
    return [(f"what colour is the {item.shape}", item.colour) for item in _unique(scene, "shape")]


def _shape(scene: Scene) -> list[Asked]:
    return [(f"what shape is the {item.colour} object", item.shape) for item in _unique(scene, "colour")]


def plural(shape: str) -> str:
    """A shape's name when there are several."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _count(scene: Scene) -> list[Asked]:
    objects = scene.objects
    colours = {f"{c} objects": sum(item.colour == c for item in objects) for c in COLOURS}
    shapes = {plural(s): sum(item.shape == s for item in objects) for s in SHAPES}
    counts = {"objects": len(objects), **colours, **shapes}
    return [(f"how many {what} are there", NUMBERS[number]) for what, number in counts.items()]


def _exists(scene: Scene) -> list[Asked]:
    """Of what is not there, only that whose colour and shape both are: either alone would give the answer away."""
    there = {(item.colour, item.shape) for item in scene.objects}
    both = sorted(itertools.product({c for c, _ in there}, {s for _, s in there}))
    if len(both) == len(there):  # every answer would be yes
        return []
    return [(f"is there a {c} {s}", "yes" if (c, s) in there else "no") for c, s in both]


def _offset(item: SceneObject, other: SceneObject, axis: int) -> float:
    return other.centre[axis] - item.centre[axis]


def _beside(scene: Scene) -> list[Asked]:
    """What lies on one side of an object, where just one does and no other nearly does."""
    asked = []
    for item, (side, (axis, sign)) in itertools.product(scene.objects, _SIDES.items()):
        there = [other for other in scene.objects if sign * _offset(item, other, axis) >= _ASIDE]
        nearly = [other for other in scene.objects if abs(_offset(item, other, axis)) < _ASIDE]
        if len(there) == 1 and nearly == [item]:
            asked.append((f"what colour is the object {side} the {item.name}", there[0].colour))
            asked.append((f"what shape is the object {side} the {item.name}", there[0].shape))
    return asked


def _order(scene: Scene) -> list[Asked]:
    return [
        (f"is the {item.name} {side} the {other.name}", "yes" if sign * _offset(other, item, axis) > 0 else "no")
        for item, other in itertools.permutations(scene.objects, 2)
        for side, (axis, sign) in _SIDES.items()
        if abs(_offset(item, other, axis)) >= _ASIDE
    ]


def _same(scene: Scene) -> list[Asked]:
    asked = []
    for item in scene.objects:
        colours = [other for other in scene.objects if other is not item and other.colour == item.colour]
        shapes = [other for other in scene.objects if other is not item and other.shape == item.shape]
        asked += [(f"what shape has the same colour as the {item.name}", o.shape) for o in colours if len(colours) == 1]
        asked += [(f"what colour has the same shape as the {item.name}", o.colour) for o in shapes if len(shapes) == 1]
    return asked


def _size(scene: Scene) -> list[Asked]:
    ranked = sorted(scene.objects, key=lambda item: item.diameter)
    asked = []
    for word, item, next_one in (("smallest", ranked[0], ranked[1]), ("largest", ranked[-1], ranked[-2])):
        small, large = sorted((item.diameter, next_one.diameter))
        if large >= _LARGER * small:
            asked += [
                (f"what colour is the {word} object", item.colour),
                (f"what shape is the {word} object", item.shape),
            ]
    return asked


KINDS: dict[str, Callable[[Scene], list[Asked]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "beside": _beside,
    "order": _order,
    "same": _same,
    "size": _size,
}
HELD_OUT_FORMATS = frozenset(
    {("colour", "capitals"), ("shape", "json"), ("count", "sentence"), ("exists", "json")}
    | {("beside", "word"), ("order", "capitals"), ("same", "sentence"), ("size", "json")}
)
"""Kinds of questions and formats that are never asked for together in training."""


def questions(scene: Scene, kind: str) -> list[Asked]:
    """All that can be asked about a scene.

    Args:
        scene: Of two or more objects, no two of one name.
        kind: One of `KINDS`.

    Returns:
        Text and answer of each question that has exactly one answer.
    """
    return KINDS[kind](scene)


def sample_scene_of_many(rng: np.random.Generator, held_out: bool) -> Scene:
    """Two to five small objects of different names; in half of the scenes two of them share colour or shape.

    Args:
        rng: Where chance comes from.
        held_out: Whether `HELD_OUT_OBJECTS` may be among them.
    """
    names = [
        f"{c} {s}" for c, s in itertools.product(COLOURS, SHAPES) if held_out or f"{c} {s}" not in HELD_OUT_OBJECTS
    ]
    chosen = [str(rng.choice(names))]
    if rng.random() < 0.5:
        word = chosen[0].split()[rng.integers(2)]
        chosen.append(str(rng.choice([name for name in names if word in name.split() and name not in chosen])))
    rest = [name for name in names if name not in chosen]
    chosen += [str(n) for n in rng.permutation(rest)[: rng.integers(2, MOST_OBJECTS, endpoint=True) - len(chosen)]]
    return _placed(rng, chosen)


def _placed(rng: np.random.Generator, names: Sequence[str]) -> Scene:
    """Objects at random, apart from one another: the first that fits of many layouts, since of five few do."""
    while True:
        sides = rng.uniform(*_DIAMETERS, (_LAYOUTS, len(names)))
        margins = sides / 2 + _GAP
        centres = rng.uniform(margins[..., None], 1 - margins[..., None], (*sides.shape, 2))
        distance = np.abs(centres[:, :, None] - centres[:, None]).max(-1)  # [layouts, K, K]
        apart = distance >= (sides[:, :, None] + sides[:, None]) / 2 + _GAP
        fits = (apart | np.eye(len(names), dtype=bool)).all((1, 2))
        if fits.any():
            break
    layout = fits.argmax()
    objects = tuple(
        SceneObject(shape, colour, (float(x), float(y)), float(side))
        for (colour, shape), (x, y), side in zip(map(str.split, names), centres[layout], sides[layout], strict=True)
    )
    return Scene(objects, ground=int(rng.integers(*_GROUNDS, endpoint=True)))


def picture_of(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """A scene on a plain ground, or as often on a cloudy one: `[SIZE, SIZE, 3]`, uint8, RGB."""
    if rng.random() < 0.5:
        return draw(scene, SIZE)
    coarse = rng.uniform(-_TEXTURE, 0, (rng.integers(3, 9),) * 2).astype(np.float32)
    return draw(scene, SIZE, cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR))


def sample_question(
    rng: np.random.Generator, scene: Scene, kind: str, formats: Sequence[str] = tuple(FORMATS)
) -> Question | None:
    """A question about a scene; each answer that its questions can have is as likely as the others.

    Args:
        rng: Where chance comes from.
        scene: What is asked about.
        kind: One of `KINDS`.
        formats: To choose from.

    Returns:
        The question; None where the scene has none of this kind.
    """
    if not (asked := questions(scene, kind)):
        return None
    answers = sorted({answer for _, answer in asked})
    answer = answers[rng.integers(len(answers))]
    texts = [text for text, given in asked if given == answer]
    return Question(kind, texts[rng.integers(len(texts))], answer, formats[int(rng.integers(len(formats)))])


@dataclass(frozen=True)
class Example:
    """A picture and a question about it.

    Attributes:
        picture: `[SIZE, SIZE, 3]`, uint8, RGB.
        scene: What it shows.
        question: With its answer.
    """

    picture: np.ndarray
    scene: Scene
    question: Question

    @property
    def new_object(self) -> bool:
        """Whether the picture shows an object that no training picture shows."""
        return any(item.name in HELD_OUT_OBJECTS for item in self.scene.objects)

    @property
    def new_format(self) -> bool:
        """Whether this kind of question was never asked for in this format in training."""
        return (self.question.kind, self.question.format) in HELD_OUT_FORMATS


def held_out(n: int, seed: int = 0) -> list[Example]:
    """Questions that no training run has met: about new pictures, with new objects and new formats among them.

    Args:
        n: How many; the kinds take turns, so that all are equally frequent if n is a multiple of their number.
        seed: Other seeds give other questions. Those below 1000 are for development, those above for claims.

    Returns:
        The examples; the first m are the same for every n >= m.
    """
    rng = np.random.default_rng([1, seed])  # training draws from [0, seed]
    kinds = itertools.cycle(KINDS)
    examples: list[Example] = []
    kind = next(kinds)
    while len(examples) < n:
        scene = sample_scene_of_many(rng, held_out=True)
        if (question := sample_question(rng, scene, kind)) is not None:
            examples.append(Example(picture_of(rng, scene), scene, question))
            kind = next(kinds)
    return examples


def main() -> None:
    """Prints some questions of each kind, with their answers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--num", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for example in held_out(args.num, args.seed):
        names = ", ".join(item.name for item in example.scene.objects)
        print(f"{example.question.kind:8}{example.question.prompt}  →  {example.question.reply}   ({names})")


if __name__ == "__main__":
    main()
