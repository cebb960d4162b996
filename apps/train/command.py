"""The options of `attnsuite train`; importing this stays cheap."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import options as opt
from .network import Start
from .settings import METHODS, Learning

__all__ = ["train"]

_MODEL, _OUTPUT = "Which model", "What to write"


def train(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder with a folder for each class, or with train/ and val/ of such; a .csv with path,label and "
            "perhaps split; .tar shards of webdataset's kind.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for best/, last/, log.csv and what the run goes on from.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ],
    learning: Learning,
    machine: opt.Machine,
    model: opt.Model = Start.name,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from published weights.", rich_help_panel=_MODEL)
    ] = False,
    checkpoint: opt.Checkpoint = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Side of what the network sees, in pixels; else its own.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="|".join(METHODS),
            help="What is learned by: labels alone, or as DCAL, ADL or Sparsifiner do.",
            rich_help_panel=_MODEL,
        ),
    ] = "plain",
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --method sparsifiner: the dense network, such as local-dir:DIR/best.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    val_share: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=0.9,
            help="Share of each class to measure on, where DATA has no val/.",
            rich_help_panel="What to read",
        ),
    ] = 0.2,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable",
            help="Leave out pictures that cannot be read; else the run does not begin.",
            rich_help_panel="What to read",
        ),
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Save also within an epoch, every so many steps.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log for TensorBoard.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The outcome as JSON on stdout.", rich_help_panel=_OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where a run was.", rich_help_panel=_OUTPUT)
    ] = False,
) -> int:
    """Fine-tune or train a model on pictures of your own; the same command again goes on where it ended.

    Example: attnsuite train flowers --pretrained -o run   (then attnsuite classify photos -m local-dir:run/best)

    Example: accelerate launch --no_python attnsuite train flowers -m litv2_small -o run   (as accelerate is set up)
    """
    from .run import Order, run

    start = Start(model, pretrained, checkpoint, method, teacher, img_size)
    order = Order(data, output, start, learning, val_share, skip_unreadable, save_every, tensorboard, overwrite)
    return run(order, machine, as_json)
