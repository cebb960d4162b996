"""The `attnsuite` command: parse, call, print. What is heavy is imported by the verb that needs it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from . import options as opt
from .ask.command import ask
from .clip.choice import ClipChoice
from .demos.command import demo
from .evaluate.command import evaluate
from .generate.command import SeveralSubjects, generate
from .models import ModelChoice, SegmenterChoice
from .scanpath.command import scanpath
from .train.command import train
from .verb import verb

__all__ = ["app", "main"]

app = typer.Typer(
    name="attnsuite",
    help="Published attention, ready to use: label, embed, search, explain, segment, generate and ask about images; "
    "list models; keep weights.",
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
@verb
def classify(
    reading: opt.Reading,
    writing: opt.WritingRows,
    model: ModelChoice,
    clip: ClipChoice,
    machine: opt.Prepared,
    distributed: opt.Distributed,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Labels an image; 5, or all if there are fewer.", show_default=False)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS",
            help="Labels of your own, 'cat, dog' or @FILE with one a line, told apart by a CLIP.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="With --labels: a sentence such as 'a photo of a {}', may be repeated; else the 80 of ImageNet.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """The most likely labels of every image.

    Example: attnsuite classify photos -o labels.csv

    Example: attnsuite classify photos --labels "cat, dog, a red car"
    """
    from .classify import Classify, in_words
    from .run import RunOptions, finish, run

    words = in_words(labels, template, clip.named)
    options = RunOptions(reading, model if words is None else clip.instead_of(model), writing, machine, distributed)
    summary = run(
        "classify",
        options,
        lambda net, compute, _: Classify(net if words is None else words.named(net, compute.device), compute, top_k),
        {"top_k": top_k, **(words.facts() if words else {})},
    )
    return finish(summary, writing.as_json)


@app.command()
@verb
def embed(
    reading: opt.Reading,
    writing: opt.WritingRows,
    model: ModelChoice,
    clip: ClipChoice,
    machine: opt.Prepared,
    distributed: opt.Distributed,
    stage: Annotated[
        int | None,
        typer.Option(
            help="Average over this stage's map (0 is the first), not what enters the classifier.", show_default=False
        ),
    ] = None,
) -> int:
    """The features of every image as one vector.

    Example: attnsuite embed photos -o features.parquet

    Example: attnsuite embed photos -o features.parquet --clip ViT-B-32   (to search in them by words)
    """
    from .embed import Embed
    from .run import RunOptions, finish, run

    options = RunOptions(reading, clip.instead_of(model) if clip.named else model, writing, machine, distributed)
    summary = run("embed", options, lambda net, compute, _: Embed(net, compute, stage), {"stage": stage})
    return finish(summary, writing.as_json)


@app.command()
@verb
def search(
    reading: opt.Searching,
    clip: ClipChoice,
    machine: opt.Prepared,
    query: Annotated[
        list[str] | None,
        typer.Option("--query", "-q", metavar="TEXT", help="What to search for; may be repeated.", show_default=False),
    ] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with one query a line.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Images a query.")] = 10,
    output: opt.Output = None,
    as_json: opt.Json = False,
    overwrite: opt.Overwrite = False,
) -> int:
    """The images that show best what is asked for in words, in folders or in features saved by `embed --clip`.

    Example: attnsuite search photos "a red car"

    Example: attnsuite search features.parquet -q "a red car" -q "a cat on a sofa" -o hits.csv
    """
    from .clip.search import check, read_queries, say, show, write
    from .clip.search import search as find

    if output is not None:
        check(output, overwrite)
    inputs, asked = read_queries(reading.inputs, query, queries)
    found = find(replace(reading, inputs=inputs), asked, clip, machine, top_k)
    if output is None:
        show(found, as_json)
    else:
        write(found.rows, output)
    say(found, output, as_json)
    return 1 if found.failed else 0


@app.command()
@verb
def explain(
    reading: opt.Reading,
    writing: opt.WritingPictures,
    model: ModelChoice,
    machine: opt.Batches,
    distributed: opt.Distributed,
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
) -> int:
    """Heat maps over every image: what the network looks at.

    Example: attnsuite explain photos -o maps --target "tabby cat"
    """
    from .explain import Explain, look
    from .pictures import rows_file
    from .run import RunOptions, finish, run

    drawn, folder = look(method, at, layer, connectivity), writing.output
    summary = run(
        "explain",
        RunOptions(reading, model, replace(writing, output=rows_file(folder)), machine, distributed),
        lambda net, compute, sources: Explain(net, compute, folder, sources.root, target, opacity, npy, drawn),
        {"target": target, "opacity": opacity, "npy": npy, "look": asdict(drawn)},
        cpu_batch=8,
        gpu_batch=32,
    )
    return finish(summary, writing.as_json)


@app.command()
@verb
def segment(
    reading: opt.Reading,
    writing: opt.WritingPictures,
    model: SegmenterChoice,
    machine: opt.Machine,
    distributed: opt.Distributed,
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
) -> int:
    """The class of every pixel: a map of classes and a coloured picture for each image.

    Example: attnsuite segment streets -o maps --scales 1
    """
    from .pictures import rows_file
    from .run import RunOptions, finish, run
    from .segment import Segment, read_scales

    factors, folder = read_scales(scales), writing.output
    summary = run(
        "segment",
        RunOptions(reading, model, replace(writing, output=rows_file(folder)), machine, distributed),
        lambda net, compute, sources: Segment(net, compute, folder, sources.root, size, factors, opacity),
        {"size": size, "scales": scales, "opacity": opacity},
        cpu_batch=1,
        gpu_batch=1,
    )
    return finish(summary, writing.as_json)


app.command(cls=SeveralSubjects)(generate)
app.command()(verb(ask))
app.command()(verb(scanpath))
app.command()(verb(train))
app.command()(verb(evaluate))
app.command()(verb(demo))


@app.command()
@verb
def merge(
    output: Annotated[str, typer.Argument(metavar="OUT", help="What -o was for each shard.", show_default=False)],
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> int:
    """Put the outputs of all shards of a run together.

    Example: attnsuite classify photos -o labels.csv --shard 0/2; attnsuite classify photos -o labels.csv --shard 1/2;
    attnsuite merge labels.csv
    """
    from .batch.shards import merge
    from .console import print_merged

    merged = merge(output, overwrite)
    print_merged(output, merged, as_json)
    return 1 if merged.failed else 0


@app.command()
@verb
def models(
    pattern: Annotated[str | None, typer.Argument(help="Part of a name, or a pattern such as '*_tiny'.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of timm's models, not only this suite's.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on stdout.")] = False,
) -> None:
    """Models with their size, published accuracy, and where their weights are.

    Example: attnsuite models litv2
    """
    from .catalog import catalog
    from .console import print_models

    print_models(catalog(pattern, everything), as_json)


@weights_app.command("list")
@verb
def weights_list(
    pattern: Annotated[str | None, typer.Argument(help="Pattern on the name, such as 'litv2*'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on stdout.")] = False,
) -> None:
    """Checkpoints this suite knows, and which of them are here.

    Example: attnsuite weights list 'biformer*'
    """
    from .checkpoints import known
    from .console import print_checkpoints

    print_checkpoints(known(pattern), as_json)


@weights_app.command("fetch")
@verb
def weights_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Checkpoints or models.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is here.")] = False,
) -> int:
    """Download checkpoints; a broken download goes on where it stopped.

    Example: attnsuite weights fetch litv2_small biformer_tiny
    """
    from .checkpoints import fetch

    return fetch(names, force)


@weights_app.command("import")
@verb
def weights_import(
    name: Annotated[str, typer.Argument(help="The checkpoint that the file is.", show_default=False)],
    file: Annotated[str, typer.Argument(help="The official file, downloaded by other means.", show_default=False)],
) -> None:
    """Take an official file that is on this machine already into the store.

    Example: attnsuite weights import litv2_small litv2_s.pth
    """
    from .checkpoints import take

    take(name, file)


@weights_app.command("verify")
@verb
def weights_verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Else all that are here.")] = None,
) -> int:
    """Compare checkpoints on this machine with their digests.

    Example: attnsuite weights verify
    """
    from .checkpoints import verify

    return verify(names)
