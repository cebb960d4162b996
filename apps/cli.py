"""The `attnsuite` command: parse, call, print. What is heavy is imported by the verb that needs it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from weights import WeightsError

from . import options as opt
from .errors import Stopped, UsageError
from .models import DEFAULT_MODEL, DEFAULT_SEGMENTER

if TYPE_CHECKING:
    from .batch.job import Summary

__all__ = ["app", "main"]

app = typer.Typer(
    name="attnsuite",
    help="Published attention, ready to use: label, embed, explain, segment and generate images; list models; keep "
    "weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="The checkpoint store: list, fetch, import, verify.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")


def main() -> None:
    """Entry point of the console script."""
    app()


@app.command()
def classify(
    inputs: opt.Images,
    output: opt.Output = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Labels an image; 5, or all if there are fewer.", show_default=False)
    ] = None,
    model: opt.Model = DEFAULT_MODEL,
    checkpoint: opt.Checkpoint = None,
    random_weights: opt.RandomWeights = False,
    recursive: opt.Recursive = True,
    glob: opt.Glob = None,
    limit: opt.Limit = None,
    as_json: opt.Json = False,
    resume: opt.Resume = True,
    overwrite: opt.Overwrite = False,
    batch_size: opt.BatchSize = None,
    workers: opt.Workers = None,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    amp: opt.Amp = False,
    compile_model: opt.Compile = False,
    debug: opt.Debug = False,
) -> None:
    """The most likely labels of every image.

    Example: attnsuite classify photos -o labels.csv
    """
    with _guarded(debug):
        from .classify import Classify
        from .models import ModelChoice
        from .run import RunOptions, run

        options = RunOptions(
            inputs, output, ModelChoice(model, checkpoint, random_weights), batch_size, workers, device, amp,
            compile_model, recursive, glob, limit, as_json, resume, overwrite, threads,
        )  # fmt: skip
        summary = run("classify", options, lambda net, compute, _: Classify(net, compute, top_k), {"top_k": top_k})
        _finish(summary, as_json)


@app.command()
def embed(
    inputs: opt.Images,
    output: opt.Output = None,
    stage: Annotated[
        int | None,
        typer.Option(
            help="Average over this stage's map (0 is the first), not what enters the classifier.", show_default=False
        ),
    ] = None,
    model: opt.Model = DEFAULT_MODEL,
    checkpoint: opt.Checkpoint = None,
    random_weights: opt.RandomWeights = False,
    recursive: opt.Recursive = True,
    glob: opt.Glob = None,
    limit: opt.Limit = None,
    as_json: opt.Json = False,
    resume: opt.Resume = True,
    overwrite: opt.Overwrite = False,
    batch_size: opt.BatchSize = None,
    workers: opt.Workers = None,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    amp: opt.Amp = False,
    compile_model: opt.Compile = False,
    debug: opt.Debug = False,
) -> None:
    """The features of every image as one vector.

    Example: attnsuite embed photos -o features.parquet
    """
    with _guarded(debug):
        from .embed import Embed
        from .models import ModelChoice
        from .run import RunOptions, run

        options = RunOptions(
            inputs, output, ModelChoice(model, checkpoint, random_weights), batch_size, workers, device, amp,
            compile_model, recursive, glob, limit, as_json, resume, overwrite, threads,
        )  # fmt: skip
        summary = run("embed", options, lambda net, compute, _: Embed(net, compute, stage), {"stage": stage})
        _finish(summary, as_json)


@app.command()
def explain(
    inputs: opt.Images,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for pictures and rows.jsonl.", show_default=False),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Class to explain, by name or index; else the most likely.", show_default=False),
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto, attention (weighted by gradients), activation (Grad-CAM), rollout (no class).")
    ] = "auto",
    at: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Draw where this place attends, e.g. 0.5,0.5 for the middle of what the network sees.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="With --at: attention layer, by index or name; else the last.", show_default=False),
    ] = None,
    connectivity: Annotated[
        bool, typer.Option("--connectivity", help="With --at: what is attended to at all: routed regions, kept keys.")
    ] = False,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="How strongly heat covers the picture.")] = 0.6,
    npy: Annotated[bool, typer.Option("--npy", help="Also write the bare maps as .npy.")] = False,
    model: opt.Model = DEFAULT_MODEL,
    checkpoint: opt.Checkpoint = None,
    random_weights: opt.RandomWeights = False,
    recursive: opt.Recursive = True,
    glob: opt.Glob = None,
    limit: opt.Limit = None,
    as_json: opt.Json = False,
    resume: opt.Resume = True,
    overwrite: opt.Overwrite = False,
    batch_size: opt.BatchSize = None,
    workers: opt.Workers = None,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    amp: opt.Amp = False,
    debug: opt.Debug = False,
) -> None:
    """Heat maps over every image: what the network looks at.

    Example: attnsuite explain photos -o maps --target "tabby cat"
    """
    with _guarded(debug):
        from .explain import Explain, look
        from .models import ModelChoice
        from .pictures import rows_file
        from .run import RunOptions, run

        drawn = look(method, at, layer, connectivity)
        options = RunOptions(
            inputs, rows_file(output), ModelChoice(model, checkpoint, random_weights), batch_size, workers, device, amp,
            False, recursive, glob, limit, as_json, resume, overwrite, threads,
        )  # fmt: skip
        summary = run(
            "explain",
            options,
            lambda net, compute, sources: Explain(net, compute, output, sources.root, target, opacity, npy, drawn),
            {"target": target, "opacity": opacity, "npy": npy, "look": asdict(drawn)},
            cpu_batch=8,
            gpu_batch=32,
        )
        _finish(summary, as_json)


@app.command()
def segment(
    inputs: opt.Images,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for pictures and rows.jsonl.", show_default=False),
    ],
    size: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Longest side in pixels; larger pictures are made smaller. By default that of the training pictures.",
            show_default=False,
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="S,S…",
            help="Sizes that are combined, such as 0.5,1,2; by default the network's own, 1 is fastest.",
            show_default=False,
        ),
    ] = None,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="How strongly colours cover the picture.")] = 0.5,
    model: opt.Model = DEFAULT_SEGMENTER,
    checkpoint: opt.Checkpoint = None,
    random_weights: opt.RandomWeights = False,
    recursive: opt.Recursive = True,
    glob: opt.Glob = None,
    limit: opt.Limit = None,
    as_json: opt.Json = False,
    resume: opt.Resume = True,
    overwrite: opt.Overwrite = False,
    workers: opt.Workers = None,
    threads: opt.Threads = None,
    device: opt.Device = "auto",
    amp: opt.Amp = False,
    debug: opt.Debug = False,
) -> None:
    """The class of every pixel: a map of classes and a coloured picture for each image.

    Example: attnsuite segment streets -o maps --scales 1
    """
    with _guarded(debug):
        from .models import ModelChoice
        from .pictures import rows_file
        from .run import RunOptions, run
        from .segment import Segment, read_scales

        factors = read_scales(scales)
        options = RunOptions(
            inputs, rows_file(output), ModelChoice(model, checkpoint, random_weights), 1, workers, device, amp,
            False, recursive, glob, limit, as_json, resume, overwrite, threads,
        )  # fmt: skip
        summary = run(
            "segment",
            options,
            lambda net, compute, sources: Segment(net, compute, output, sources.root, size, factors, opacity),
            {"size": size, "scales": scales, "opacity": opacity},
        )
        _finish(summary, as_json)


@app.command(cls=opt.SeveralSubjects)
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
    debug: opt.Debug = False,
) -> None:
    """Text to images in which each subject of the prompt has a place of its own (A-STAR).

    Example: attnsuite generate "a red circle and a blue square" --subjects circle square -o out --compare
    """
    with _guarded(debug):
        from .generate.settings import read_layout, read_losses, read_subjects

        named = {
            "prompt": prompt, "seed": seed, "guidance_steps": guidance_steps, "step_size": step_size,
            "negative_prompt": negative_prompt, "steps": steps, "guidance_scale": guidance_scale, "height": height,
            "width": width, "model": model, "dtype": dtype,
            "subjects": read_subjects(subjects) if subjects else None,
            "losses": None if losses is None else read_losses(losses),
            "layout": None if layout is None else read_layout(layout),
        }  # fmt: skip
        from .generate.run import Options
        from .generate.run import generate as draw

        given = {name: value for name, value in named.items() if value is not None}
        options = Options(
            output, given, num_images, compare, save_maps, source, device, threads, as_json, resume, overwrite
        )
        raise typer.Exit(1 if draw(options) else 0)


@app.command()
def models(
    pattern: Annotated[str | None, typer.Argument(help="Part of a name, or a pattern such as '*_tiny'.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of timm's models, not only this suite's.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on stdout.")] = False,
    debug: opt.Debug = False,
) -> None:
    """Models with their size, published accuracy, and where their weights are.

    Example: attnsuite models litv2
    """
    with _guarded(debug):
        from .catalog import catalog
        from .console import print_models

        print_models(catalog(pattern, everything), as_json)


@weights_app.command("list")
def weights_list(
    pattern: Annotated[str | None, typer.Argument(help="Pattern on the name, such as 'litv2*'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on stdout.")] = False,
    debug: opt.Debug = False,
) -> None:
    """Checkpoints this suite knows, and which of them are here.

    Example: attnsuite weights list 'biformer*'
    """
    with _guarded(debug):
        from .checkpoints import known
        from .console import print_checkpoints

        print_checkpoints(known(pattern), as_json)


@weights_app.command("fetch")
def weights_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Checkpoints or models.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is here.")] = False,
    debug: opt.Debug = False,
) -> None:
    """Download checkpoints; a broken download goes on where it stopped.

    Example: attnsuite weights fetch litv2_small biformer_tiny
    """
    with _guarded(debug):
        from .checkpoints import fetch

        raise typer.Exit(fetch(names, force))


@weights_app.command("import")
def weights_import(
    name: Annotated[str, typer.Argument(help="The checkpoint that the file is.", show_default=False)],
    file: Annotated[str, typer.Argument(help="The official file, downloaded by other means.", show_default=False)],
    debug: opt.Debug = False,
) -> None:
    """Take an official file that is on this machine already into the store.

    Example: attnsuite weights import litv2_small litv2_s.pth
    """
    with _guarded(debug):
        from .checkpoints import take

        take(name, file)


@weights_app.command("verify")
def weights_verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Else all that are here.")] = None,
    debug: opt.Debug = False,
) -> None:
    """Compare checkpoints on this machine with their digests.

    Example: attnsuite weights verify
    """
    with _guarded(debug):
        from .checkpoints import verify

        raise typer.Exit(verify(names))


def _finish(summary: Summary, as_json: bool) -> None:
    from .console import print_summary

    print_summary(summary, as_json)
    raise typer.Exit(1 if summary.failed else 0)


@contextlib.contextmanager
def _guarded(debug: bool) -> Iterator[None]:
    """Turns every way a verb can end into its exit code and one line; `--debug` lets errors through."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        # The reader has gone, as in `attnsuite … | head`; Python must not try to flush to it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except (UsageError, Stopped, WeightsError) as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 2)) from None
    except Exception as error:
        if debug:
            raise
        typer.echo(f"internal error: {type(error).__name__}: {error} (--debug shows where)", err=True)
        raise typer.Exit(3) from None
