"""The options of `attnsuite ask`; importing this stays cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .. import options as opt
from ..errors import UsageError

if TYPE_CHECKING:
    from ..batch.sources import Inputs

__all__ = ["Asking", "ask"]

_HOW = "How to ask"


@dataclass(frozen=True)
class Asking(opt.Reading):
    """Which images are asked about, and what.

    Attributes:
        inputs: Images as of any verb and then the question; or files of pairs.
        question: The question, where it is no argument.
    """

    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT… [QUESTION]",
            help="Images as for classify, then the question; or a .jsonl of lines with image and question.",
            show_default=False,
        ),
    ] = field()
    question: Annotated[
        str | None, typer.Option("--question", "-q", metavar="TEXT", help="The question.", show_default=False)
    ] = None

    def find(self, note: Callable[[str], None]) -> Inputs:
        """The images, or the pairs, as a stream.

        Raises:
            UsageError: There are none, or no question.
        """
        from ..batch.sources import Inputs
        from .questions import Pairs, read_question

        inputs, question = read_question(self.inputs, self.question)
        found = (Pairs if question is None else Inputs)(inputs, self.recursive, self.glob, self.limit, note=note)
        found.check()
        return found


def _drawing(path: str, reading: Asking, overwrite: bool) -> Any:
    """Where `--show-attention` draws.

    Raises:
        UsageError: It cannot, or a file is named for several pictures.
    """
    from .stage import Drawing

    inputs = reading.find(lambda _: None)
    drawing, target = Drawing(path, inputs.root), Path(path)
    if not drawing.one and target.suffix:
        raise UsageError(f"--show-attention {path}: expected a name that ends in .png, or a folder")
    if not drawing.one and target.exists() and not target.is_dir():
        raise UsageError(f"--show-attention {path} is a file; give a folder, or a name that ends in .png")
    if drawing.one and len(list(islice(inputs, 2))) > 1:
        raise UsageError(f"--show-attention {path}: this is one file for several questions; give a folder")
    if drawing.one and not target.absolute().parent.is_dir():
        raise UsageError(f"--show-attention {path}: the folder {target.absolute().parent} does not exist")
    if drawing.one and target.exists() and not overwrite:
        raise UsageError(f"--show-attention {path} exists; --overwrite replaces it")
    return drawing


def _dtype(machine: opt.Machine) -> str:
    """Of the weights."""
    from .models import dtype_on

    return "bfloat16" if machine.amp else dtype_on(machine.device)


def ask(
    reading: Asking,
    writing: opt.Writing,
    machine: opt.Machine,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="ID",
            help="A vision-language model: a folder, or OWNER/NAME on the hub; a small one ships.",
            rich_help_panel="Which model",
            show_default=False,
        ),
    ] = None,
    mma: Annotated[
        bool, typer.Option("--mma", help="Image tokens read the question, too.", rich_help_panel=_HOW)
    ] = False,
    vmtc: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Keep this share of the image tokens, such as 0.25; merge the others.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    cmai: Annotated[
        bool, typer.Option("--cmai", help="Words read only what bears on them.", rich_help_panel=_HOW)
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask without these switches, too: answers, time.", rich_help_panel=_HOW)
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of an answer; the model's own limit, or 128.", rich_help_panel=_HOW, show_default=False
        ),
    ] = None,
    show_attention: Annotated[
        str | None,
        typer.Option(
            metavar="PNG",
            help="Draw where the model looked; a folder, for several pictures.",
            rich_help_panel="What to write",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Answers of a vision-language model, with changes of its attention switched on or off.

    The model that ships knows drawn scenes of coloured shapes only.

    Example: attnsuite ask street.jpg "How many cars are there?" --model llava-hf/llava-1.5-7b-hf --vmtc 0.25 --compare

    Example: attnsuite ask pairs.jsonl -o answers.csv   (lines {"image": "a.jpg", "question": "…"})
    """
    from .switches import Switches

    switches = Switches(mma, vmtc, cmai)
    if compare and not switches:
        raise UsageError("--compare: there is nothing to compare with; give --mma, --vmtc SHARE or --cmai, or several")
    from ..console import RunReport
    from ..run import RunOptions, finish, run
    from .models import VLM, VLMChoice
    from .questions import read_question
    from .screen import Answers
    from .stage import Ask, Given

    _, question = read_question(reading.inputs, reading.question)
    given = Given(question, switches, compare, max_tokens)
    drawing = None if show_attention is None else _drawing(show_attention, reading, writing.overwrite)
    dtype = _dtype(machine)
    summary = run(
        "ask",
        RunOptions(reading, VLMChoice(model, mma, compare, dtype), writing, machine),
        lambda net, compute, _: Ask(cast(VLM, net), compute, given, drawing, RunReport().note),
        {**asdict(given), "dtype": dtype, "show_attention": show_attention},
        cpu_batch=1,
        gpu_batch=1,
        screen=Answers(switches) if sys.stdout.isatty() and not writing.as_json else None,
    )
    return finish(summary, writing.as_json)
