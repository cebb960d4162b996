"""The options that verbs share, in typer's terms; importing this stays cheap."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = [
    "Amp",
    "BatchSize",
    "Checkpoint",
    "Compile",
    "Debug",
    "Device",
    "Glob",
    "Images",
    "Json",
    "Limit",
    "Model",
    "Output",
    "Overwrite",
    "RandomWeights",
    "Recursive",
    "Resume",
    "SeveralSubjects",
    "Threads",
    "Workers",
]

_INPUT, _MODEL, _OUTPUT, _SPEED = "What to read", "Which model", "What to write", "How fast"

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Image files, folders, quoted patterns such as 'photos/**/*.jpg', and .tar shards.",
        show_default=False,
    ),
]
Recursive = Annotated[
    bool, typer.Option("--recursive/--no-recursive", help="Search folders inside folders.", rich_help_panel=_INPUT)
]
Glob = Annotated[
    str | None,
    typer.Option(
        help="Names to take in folders and shards, e.g. '*.JPG'; else all image suffixes.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after so many inputs.", rich_help_panel=_INPUT, show_default=False),
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Any timm name (attnsuite models lists ours), hf-hub:OWNER/NAME or local-dir:FOLDER.",
        rich_help_panel=_MODEL,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Weights of your own for --model: .safetensors, .pth, ….", rich_help_panel=_MODEL, show_default=False
    ),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="No trained weights: to try speed or set-up.", rich_help_panel=_MODEL)
]

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="OUT.csv, OUT.jsonl or OUT.parquet; else a table on a terminal, CSV in a pipe.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Rows as JSON lines on stdout; with -o, the summary as JSON.", rich_help_panel=_OUTPUT),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Go on where the same command ended; or refuse to.", rich_help_panel=_OUTPUT
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that is there.", rich_help_panel=_OUTPUT)
]

BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images a batch; by default as fits the device.", rich_help_panel=_SPEED, show_default=False
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Decode processes, 0 for none beside this one; by default half the cores, all with a GPU.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of the network.", rich_help_panel=_SPEED, show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_SPEED)]
Amp = Annotated[bool, typer.Option("--amp", help="Half precision (bfloat16).", rich_help_panel=_SPEED)]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network first (torch.compile).", rich_help_panel=_SPEED)
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class SeveralSubjects(TyperCommand):
    """A command whose `--subjects` takes all words up to the next option, as in `--subjects circle square -o out`.

    Where no argument is left to be the prompt, and no `--from` brings one, the last of these words is.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the option before each of its words, which is how the parser takes several."""
        spread: list[str] = []
        last: int | None = None  # of the words that may be the prompt
        rest, options = args, True
        while rest:
            word, *rest = rest
            spread.append(word)
            options = options and word != "--"
            if not options or word not in ("--subjects", "-s") or not rest:
                continue
            count = next((i for i, following in enumerate(rest[1:], 1) if following.startswith("-")), len(rest))
            words, rest = rest[:count], rest[count:]
            spread.append(words[0])
            for following in words[1:]:
                last = len(spread)
                spread += [word, following]
        if last is not None and not self._has_prompt(ctx, spread):
            del spread[last]
        return super().parse_args(ctx, spread)

    def _has_prompt(self, ctx: Any, args: list[str]) -> bool:
        if ctx.resilient_parsing or "--help" in args or "-h" in args:
            return True
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        return bool(given.get("prompt")) or bool(rest) or "source" in given
