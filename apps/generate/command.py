"""The command line of `attnsuite generate`: its options, said to typer, and handed on."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .. import options as opt
from ..verb import verb

__all__ = ["SeveralSubjects", "generate"]


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


@verb
def generate(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the pictures.", show_default=False)
    ],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)] = None,
    subjects: Annotated[
        list[str] | None,
        typer.Option(
            "--subjects", "-s", metavar="WORD…", help="Words of the prompt to keep apart and keep.", show_default=False
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; 0.", show_default=False)] = None,
    num_images: Annotated[int, typer.Option(help="Pictures, of this seed and the next ones.")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Beside each the plain pipeline's picture.")] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="PNG", help="Repeat this picture; options that are given change it.", show_default=False
        ),
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=W,…",
            help="segregation, retention, attend_and_excite, divide_and_bind, conform; segregation=1,retention=1.",
            rich_help_panel="How to guide",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='File with places: {"circle": [0, 0, 0.5, 1], "square": "mask.png"}.',
            rich_help_panel="How to guide",
            show_default=False,
        ),
    ] = None,
    guidance_steps: Annotated[
        int | None,
        typer.Option(help="Steps that are guided; all.", rich_help_panel="How to guide", show_default=False),
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option(
            help="How far the latent is moved; 20, or 5 for the model that ships.",
            rich_help_panel="How to guide",
            show_default=False,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to draw.", rich_help_panel="How to sample", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Of the sampler; as suits the model.", rich_help_panel="How to sample", show_default=False),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Of the prompt; as suits the model.", rich_help_panel="How to sample", show_default=False),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="In pixels; the model's own.", rich_help_panel="How to sample", show_default=False),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="In pixels; the model's own.", rich_help_panel="How to sample", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder in diffusers' layout or OWNER/NAME on the hub; a small one ships.",
            rich_help_panel="Which model",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16, bfloat16; float16 on a GPU.", rich_help_panel="Which model", show_default=False
        ),
    ] = None,
    save_maps: Annotated[
        bool,
        typer.Option(
            "--save-maps", help="Also attention maps and losses: .npz, drawn.", rich_help_panel="What to write"
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Rows as JSON lines on stdout.", rich_help_panel="What to write")
    ] = False,
    resume: opt.Resume = True,
    overwrite: opt.Overwrite = False,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
) -> int:
    """Text to images in which each subject of the prompt has a place of its own (A-STAR).

    Example: attnsuite generate "a red circle and a blue square" --subjects circle square -o out --compare
    """
    from .run import Options
    from .run import generate as draw
    from .settings import read_layout, read_losses, read_subjects

    named = {
        "prompt": prompt, "seed": seed, "guidance_steps": guidance_steps, "step_size": step_size,
        "negative_prompt": negative_prompt, "steps": steps, "guidance_scale": guidance_scale, "height": height,
        "width": width, "model": model, "dtype": dtype,
        "subjects": read_subjects(subjects) if subjects else None,
        "losses": None if losses is None else read_losses(losses),
        "layout": None if layout is None else read_layout(layout),
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None}
    options = Options(
        output, given, num_images, compare, save_maps, source, device, threads, as_json, resume, overwrite
    )
    return 1 if draw(options) else 0
