"""The options of `attnsuite evaluate`; importing this stays cheap."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import options as opt
from ..models import ModelChoice

__all__ = ["evaluate"]

_MEASURED, _OUTPUT = "What is measured", "What to write"


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder with a folder for each class (or val/ of such), a .csv with path,label, or .tar shards.",
            show_default=False,
        ),
    ],
    model: ModelChoice,
    machine: opt.Batches,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, val or test, where the data are divided; by default val, or test if there is no val.",
            rich_help_panel="What to read",
            show_default=False,
        ),
    ] = None,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order",
            help="Take the data's classes as the model's, in order, not by name.",
            rich_help_panel="What to read",
        ),
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Some of top1,top5,ece,confusion; by default all that apply.",
            rich_help_panel=_MEASURED,
            show_default=False,
        ),
    ] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Also with pictures corrupted as in ImageNet-C: common for its fifteen, all, noise, blur, weather, "
            "digital, extra, or names such as fog,snow.",
            rich_help_panel=_MEASURED,
            show_default=False,
        ),
    ] = None,
    severities: Annotated[
        str, typer.Option(metavar="FROM-TO", help="Of the corruptions, such as 3 or 1,3,5.", rich_help_panel=_MEASURED)
    ] = "1-5",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Another network's metrics.json, or {corruption: error, …} with clean: gives mCE and relative mCE.",
            rich_help_panel=_MEASURED,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for metrics.json, predictions.csv, per_class.csv, confusion.csv and confusion.png.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="What was measured as JSON on stdout.", rich_help_panel=_OUTPUT)
    ] = False,
    overwrite: opt.Overwrite = False,
) -> int:
    """How often a network is right on labelled pictures, as they are and corrupted.

    Example: attnsuite evaluate photos/val -m litv2_small -o report

    Example: attnsuite evaluate photos/val --corruptions common --reference alexnet.json
    """
    from .run import Order, run

    order = Order(data, split, in_order, metrics, corruptions, severities, reference)
    return run(order, model, machine, output, as_json, overwrite)
