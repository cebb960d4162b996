"""Draws the pictures that `attnsuite generate` was asked for, each on its own, so that each can be drawn again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..batch.sinks import stdout_writer
from ..batch.stage import Row, pick_device
from ..console import StepBar
from ..errors import Stopped, UsageError
from .drawing import COLUMNS, Picture, draw, row_of, side_by_side
from .machine import Notes, calm, hushed, machine, out_of_memory, repeatable, usual_dtype
from .models import SHIPPED, Model, find, load, picture_size, unknown_words
from .record import Record, read
from .settings import Settings, place_of

if TYPE_CHECKING:
    from .models import Pipeline

__all__ = ["Options", "generate"]

_OF_SUBJECTS = ("losses", "guidance_steps", "step_size", "layout")


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        output: Folder for the pictures.
        given: Settings that were given, by their names in `Settings`.
        num_images: Pictures, of the seed and those that follow it.
        compare: Also draws each without guidance, and both side by side.
        save_maps: Also writes attention maps and losses.
        source: A picture whose settings are taken, as far as they are not given.
        device: Name of a device, or `auto`.
        threads: CPU threads of the networks; None leaves them to torch.
        as_json: Rows as JSON lines.
        resume: Keeps pictures that the same settings made before.
        overwrite: Replaces whatever is there.
    """

    output: str
    given: Mapping[str, Any] = field(default_factory=dict)
    num_images: int = 1
    compare: bool = False
    save_maps: bool = False
    source: str | None = None
    device: str = "auto"
    threads: int | None = None
    as_json: bool = False
    resume: bool = True
    overwrite: bool = False


def generate(options: Options) -> int:
    """Checks everything that can be checked, then draws.

    Args:
        options: What the user asked for.

    Returns:
        How many pictures failed.

    Raises:
        UsageError: Something is wrong with the options, the model or the picture to be repeated.
        Stopped: The run ended before the last picture: no memory, a full disk.
    """
    source, drawn = (None, None) if options.source is None else read(Path(options.source))
    asked = _asked(options, source)
    folder = _checked_folder(options.output)
    device = _device(options, source)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = _model(options, asked, source)
    report = Notes()
    if source is not None and model.identity != source.identity:
        report.note(f"note: {model.name} is not the model that drew {options.source}: the picture will be another one")
    dtype = _dtype(options, source, asked, device)
    with calm(report), out_of_memory(options.output):
        pipe = load(model, device, dtype)
        with hushed(), repeatable(device):
            asked = _completed(asked, pipe, model, options, source, dtype)
            _check(pipe, asked, report, model)
            pictures = list(_pictures(options, source, asked, model, device, folder))
            kept = {picture.path: found for picture in pictures if (found := _kept(picture, options)) is not None}
            failed = _draw_all(pipe, pictures, kept, options, report)
    if drawn is not None and source is not None and not options.given and options.num_images == 1 and not failed:
        report.note(_compared(pictures[0].path, source, drawn, str(options.source)))
    return failed


def _asked(options: Options, source: Record | None) -> Settings:
    """The settings as far as they are known without the model.

    Raises:
        UsageError: They are not enough, or one of them cannot be.
    """
    given = dict(options.given)
    if options.num_images < 1:
        raise UsageError(f"--num-images {options.num_images}: expected 1 or more")
    if source is None and "prompt" not in given:
        raise UsageError("say what to draw: attnsuite generate 'a red circle and a blue square', or --from PICTURE")
    asked = Settings(**{"model": SHIPPED, **given}) if source is None else replace(source.settings, **given)
    replace(asked, seed=asked.seed + options.num_images - 1)  # the last seed has to be one, too
    if not asked.guided:
        named = [f"--{name.replace('_', '-')}" for name in _OF_SUBJECTS if given.get(name)]
        if named := [
            *named,
            *(["--compare"] if options.compare else []),
            *(["--save-maps"] if options.save_maps else []),
        ]:
            raise UsageError(f"{', '.join(named)}: this is about subjects; name them, e.g. --subjects circle square")
    return asked


def _checked_folder(output: str) -> Path:
    """The output folder, which need not exist yet but must be one that can be made and written to."""
    folder = Path(output)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UsageError(f"-o {output}: {existing} is a file; give a folder for the pictures")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"-o {output}: no permission to write into {existing}")
    if folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not folder.exists():
        raise UsageError(
            f"-o {output}: this is a folder, and the pictures are named after prompt and seed; give -o DIR"
        )
    return folder


def _device(options: Options, source: Record | None) -> torch.device:
    """The device; a picture is repeated on the kind that drew it, if there is one."""
    if source is not None and options.device == "auto":
        kind = source.machine.get("device", "").partition(" ")[0]
        with contextlib.suppress(UsageError):
            return pick_device(kind if kind in ("cpu", "cuda", "mps") else "auto")
    return pick_device(options.device)


def _model(options: Options, asked: Settings, source: Record | None) -> Model:
    named_by_user = source is None or "model" in options.given
    model = find(asked.model, may_fetch=named_by_user)
    if source is not None and model.identity != source.identity and not named_by_user:
        raise UsageError(
            f"the files of {asked.model} are not those that drew {options.source} ({source.identity[:19]}…, now "
            f"{model.identity[:19]}…); --model {asked.model} draws with them all the same, which gives another picture"
        )
    return model


def _dtype(options: Options, source: Record | None, asked: Settings, device: torch.device) -> str:
    dtype: str = asked.dtype
    if source is None and "dtype" not in options.given:
        dtype = usual_dtype(device)
    if dtype == "float16" and device.type == "cpu":
        raise UsageError("float16 on a CPU is neither fast nor precise enough: --dtype float32 or --dtype bfloat16")
    return dtype


def _completed(
    asked: Settings, pipe: Pipeline, model: Model, options: Options, source: Record | None, dtype: str
) -> Settings:
    """The settings with what the model has to say where the user says nothing."""
    if source is not None:
        return replace(asked, model=model.name)
    height, width = picture_size(pipe)
    suits = {"height": height, "width": width, **model.suits}
    suits = {name: value for name, value in suits.items() if name not in options.given}
    return replace(asked, **suits, model=model.name, dtype=dtype)


def _check(pipe: Pipeline, asked: Settings, report: Notes, model: Model) -> None:
    """Finds every mistake that the library would find, and what a user should know beforehand.

    Raises:
        UsageError: A subject is not in the prompt, a place does not fit, the UNet has no maps, ….
    """
    from diffusion.attention_maps import prompt_end, record
    from diffusion.guidance import Guidance
    from diffusion.pipelines import find_concepts

    try:
        if asked.guided:
            with record(pipe):
                Guidance(losses=asked.losses)
            layout = {subject: place_of(place) for subject, place in asked.layout.items()}
            find_concepts(pipe, asked.prompt, asked.subjects, layout=layout, size=(asked.height, asked.width))
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    if not asked.guided:
        report.note("note: no --subjects, so nothing is guided: this is the plain pipeline's picture")
    if model.shipped:
        unknown, known = unknown_words(pipe, asked.prompt)
        report.note(
            f"note: {SHIPPED}, the model that ships, was trained on drawn scenes of {asked.width} x {asked.height} "
            f"pixels and knows the words {', '.join(known)}; --model takes any Stable Diffusion"
        )
        if unknown:
            report.note(f"note: it does not know {', '.join(unknown)} and will not draw it")
    tokens = pipe.tokenizer(asked.prompt, verbose=False)["input_ids"]
    if len(tokens) > pipe.tokenizer.model_max_length:
        rest = pipe.tokenizer.decode(tokens[prompt_end(pipe.tokenizer, asked.prompt) : -1])
        report.note(
            f"note: the prompt has {len(tokens)} tokens, the text encoder reads {pipe.tokenizer.model_max_length}: "
            f"{rest!r} is cut off"
        )


def _pictures(
    options: Options, source: Record | None, asked: Settings, model: Model, device: torch.device, folder: Path
) -> Iterator[Picture]:
    """All pictures of the run, those of a seed together."""
    slug = re.sub(r"[\W_]+", "-", asked.prompt.lower()).strip("-")[:48].strip("-") or "picture"
    here = machine(device)
    both = options.compare or (source is not None and source.compare)
    for seed in range(asked.seed, asked.seed + options.num_images):
        own = replace(asked, seed=seed)
        if own.guided:
            record = Record(own, model.identity, here)
            yield Picture(folder / f"{slug}-{seed}.png", record, own, options.save_maps)
        if both or not own.guided:
            record = Record(own.plain(), model.identity, here)
            yield Picture(folder / f"{slug}-{seed}-plain.png", record, own, options.save_maps)


def _kept(picture: Picture, options: Options) -> Record | None:
    """The record of a picture that is there already; None where it has to be drawn.

    Raises:
        UsageError: Something else has its name.
    """
    if options.overwrite or not picture.path.exists():
        return None
    or_else = "choose another -o, or --overwrite it"
    if not options.resume:
        raise UsageError(f"{picture.path} exists; {or_else}")
    try:
        found, _ = read(picture.path)
    except UsageError as error:
        raise UsageError(f"{picture.path} exists and was not made by this command; {or_else}") from error
    own = picture.record
    changed = [
        entry.name
        for entry in fields(Settings)
        if getattr(found.settings, entry.name) != getattr(own.settings, entry.name)
    ]
    if changed or found.identity != own.identity:
        raise UsageError(
            f"{picture.path} exists and was made with other settings ({', '.join(changed or ['the model'])}); {or_else}"
        )
    wanted = (picture.maps, picture.grid) if picture.save_maps else ()
    return found if all(path.exists() for path in wanted) else None


def _draw_all(
    pipe: Pipeline,
    pictures: list[Picture],
    kept: Mapping[Path, Record],
    options: Options,
    report: Notes,
) -> int:
    """Draws what is not kept and prints a row for each; how many failed."""
    todo = [picture for picture in pictures if picture.path not in kept]
    show = _shown(options.as_json)
    failed = number = 0
    try:
        pictures[0].path.parent.mkdir(parents=True, exist_ok=True)
        with StepBar(len(todo), pictures[0].record.settings.steps) as bar:
            for picture in pictures:
                if picture.path in kept:
                    row = row_of(picture, kept[picture.path])
                else:
                    bar.begin(number, picture.path.stem)
                    number += 1
                    row = draw(pipe, picture, bar.step)
                failed += row["status"] == "error"
                if not picture.record.settings.guided and picture.watched.guided:
                    row["side_by_side"] = side_by_side(picture)
                show(row)
    except BrokenPipeError:
        raise  # the reader of the rows has gone
    except OSError as error:
        raise Stopped(
            f"cannot write {error.filename or options.output}: {error.strerror or error}. What is written is "
            "whole; the same command goes on"
        ) from error
    there = f", {len(kept):,} of them already there" if kept else ""
    report.note(f"{len(pictures) - failed:,} ok, {failed:,} failed{there} → {options.output}")
    return failed


def _shown(as_json: bool) -> Callable[[Row], None]:
    """Shows rows as they come: lines on a terminal, CSV in a pipe, or JSON lines."""
    if as_json or not sys.stdout.isatty():
        rows = stdout_writer(sys.stdout, COLUMNS, "json" if as_json else "csv")
        return lambda row: rows([row])

    def line(row: Row) -> None:
        losses = "  ".join(f"{name} {value}" for name, value in json.loads(row["losses"]).items())
        print(f"{row['path']}  {row['error'] or losses}", flush=True)
        if row["side_by_side"]:
            print(row["side_by_side"], flush=True)

    return line


def _compared(path: Path, source: Record, drawn: np.ndarray, name: str) -> str:
    """In words, whether a picture is what it repeats."""
    if source.compare:
        path = path.with_name(f"{path.stem}-compare.png")
    again, pixels = read(path)
    if pixels.shape == drawn.shape and (pixels == drawn).all():
        return f"{path} equals {name} in every pixel"
    if pixels.shape != drawn.shape:
        return f"{path} differs from {name} in size: the file was changed after it was drawn"
    off = np.abs(pixels.astype(int) - drawn.astype(int))
    changed = [f"{key} {value}, now {again.machine.get(key)}" for key, value in source.machine.items()
               if again.machine.get(key) != value]  # fmt: skip
    why = f"made with {'; '.join(changed)}" if changed else "the file was changed after it was drawn"
    share = f"{(off > 0).any(-1).mean():.1%} of the pixels, by up to {off.max()} of 255"
    return f"{path} differs from {name} in {share}: {why}"
