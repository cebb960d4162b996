"""The options of `attnsuite scanpath`; importing this stays cheap."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options as opt
from ..errors import UsageError

if TYPE_CHECKING:
    from .stage import ResolvedOAT

__all__ = ["SHIPPED", "OATChoice", "Search", "read_pair", "scanpath"]

SHIPPED = "search_scenes"
_MOST_SAMPLES = 1000


@dataclass(frozen=True)
class OATChoice:
    """Which model of scanpaths.

    Attributes:
        model: The one that ships, or a folder that `vision.scanpath.checkpoint.save` wrote.
    """

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help=f"{SHIPPED}, which ships and was trained on drawn scenes, or a folder with a model of your own.",
            rich_help_panel="Which model",
        ),
    ] = SHIPPED

    def resolve(self) -> ResolvedOAT:
        """Finds its files.

        Raises:
            UsageError: There are none.
        """
        from weights import shipped

        from .stage import ResolvedOAT

        folder = shipped(SHIPPED) if self.model == SHIPPED else Path(self.model)
        if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
            raise UsageError(f"--model {self.model}: {missing[0]} is not there; expected {SHIPPED} or a model's folder")
        return ResolvedOAT(folder, self.model)


@dataclass(frozen=True)
class Search:
    """What is searched for, and how often.

    Attributes:
        grid: Rows and columns of the objects, which fill the picture.
        target: Row and column of the target, from 0.
        samples: Scanpaths of each picture.
        temperature: Below 1 for likelier scanpaths.
        max_refixations: How often an object may be fixated again; None for any number.
        seed: Of chance; the same for each picture.
        draws: Whether pictures are written.
        films: Whether the first few scanpaths are written as a film.
    """

    grid: tuple[int, int]
    target: tuple[int, int]
    samples: int = 20
    temperature: float = 1.0
    max_refixations: int | None = None
    seed: int = 0
    draws: bool = False
    films: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.target[0] < self.grid[0] and 0 <= self.target[1] < self.grid[1]):
            row, column = (place + 1 for place in self.target)
            rows, columns = self.grid
            raise UsageError(
                f"--target {row},{column} is not on the grid, which has rows 1 to {rows} and columns 1 to {columns}"
            )

    @property
    def target_name(self) -> str:
        """In words, rows and columns counted from 1."""
        return f"row {self.target[0] + 1}, column {self.target[1] + 1}"


def read_pair(text: str, option: str, example: str) -> tuple[int, int]:
    """Reads `3x9` or `2,5`, two numbers from 1.

    Raises:
        UsageError: It is something else.
    """
    found = re.fullmatch(r"\s*(\d{1,4})\s*[x×,]\s*(\d{1,4})\s*", text)
    if found is None or not all(map(int, found.groups())):
        raise UsageError(f"{option} {text}: expected two numbers from 1, rows first, such as {example}")
    return int(found[1]), int(found[2])


def scanpath(
    reading: opt.Reading,
    writing: opt.WritingPictures,
    model: OATChoice,
    machine: opt.Machine,
    target: Annotated[
        str,
        typer.Option(
            metavar="ROW,COLUMN",
            help="Which object is searched for, from the upper left, which is 1,1.",
            show_default=False,
        ),
    ],
    grid: Annotated[
        str, typer.Option(metavar="ROWSxCOLUMNS", help="The picture is taken as so many objects, side by side.")
    ] = "3x9",
    samples: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="Scanpaths of each picture.")] = 20,
    draw: Annotated[bool, typer.Option("--draw", help="Also draw a scanpath, and where all of them look.")] = False,
    gif: Annotated[bool, typer.Option("--gif", help="Also write the first few scanpaths as a film.")] = False,
    temperature: Annotated[
        float, typer.Option(min=0.01, max=100, help="Below 1 for likelier scanpaths, above for more varied ones.")
    ] = 1.0,
    max_refixations: Annotated[
        int | None,
        typer.Option(min=0, help="How often an object may be fixated again; else any number.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another one gives other scanpaths.")] = 0,
) -> int:
    """Where a searcher might look, one object after the other, until the target is found.

    The model that ships has learned from drawn scenes, not from people.

    Example: attnsuite scanpath shelf.jpg --grid 3x9 --target 2,5 -o out --draw
    """
    from ..pictures import rows_file
    from ..run import RunOptions, finish, run
    from .stage import ScanpathStage

    rows, columns = read_pair(grid, "--grid", "3x9")
    row, column = read_pair(target, "--target", "2,5")
    search = Search((rows, columns), (row - 1, column - 1), samples, temperature, max_refixations, seed, draw, gif)
    folder = writing.output
    summary = run(
        "scanpath",
        RunOptions(reading, model, replace(writing, output=rows_file(folder)), machine),
        lambda net, compute, sources: ScanpathStage(net, compute, folder, sources.root, search),
        {
            "grid": grid, "target": target, "samples": samples, "draw": draw, "gif": gif,
            "temperature": temperature, "max_refixations": max_refixations, "seed": seed,
        },
        cpu_batch=8,
        gpu_batch=32,
    )  # fmt: skip
    return finish(summary, writing.as_json)
