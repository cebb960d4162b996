"""Which CLIP: what the user calls it, checked before anything is built; importing this stays cheap."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..models import ModelChoice, digest

if TYPE_CHECKING:
    from ..models import Network

__all__ = ["DEFAULT_CLIP", "ClipChoice", "ResolvedClip", "choice_of", "is_same"]

DEFAULT_CLIP = "ViT-B-32:laion2b_s34b_b79k"

_PANEL = "Which model"
_PREFIX = "clip:"  # of the labels of all models of this kind
_CONFIG = "open_clip_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_SHOWN = 12  # digits of a digest in a label


@dataclass(frozen=True)
class ClipChoice:
    """What the user asked for; nothing stands for the default.

    Attributes:
        clip: `MODEL`, `MODEL:TAG`, `MODEL:FILE` of open_clip, or `hf-hub:OWNER/NAME`.
        clip_checkpoint: A folder with `open_clip_config.json` and weights.
    """

    clip: Annotated[
        str | None,
        typer.Option(
            "--clip",
            metavar="MODEL[:WEIGHTS]",
            help=f"A CLIP of open_clip and its weights, by tag or file, or hf-hub:OWNER/NAME; {DEFAULT_CLIP}.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None
    clip_checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help=f"A CLIP of your own: a folder with {_CONFIG} and weights.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None

    @property
    def named(self) -> bool:
        """Whether the user named one."""
        return self.clip is not None or self.clip_checkpoint is not None

    def instead_of(self, model: ModelChoice) -> ClipChoice:
        """This choice, where the verb could also take a network of timm.

        Raises:
            UsageError: The user named one of those, too.
        """
        if model != type(model)():
            raise UsageError(
                "--model, --checkpoint and --random-weights choose a network of timm, --labels, --clip and "
                "--clip-checkpoint a CLIP: give options of one kind"
            )
        return self

    def resolve(self) -> ResolvedClip:
        """Checks the names without building anything.

        Raises:
            UsageError: There is no such model, tag, file or folder; near names are offered.
        """
        if self.clip is not None and self.clip_checkpoint is not None:
            raise UsageError("--clip and --clip-checkpoint exclude each other")
        if self.clip_checkpoint is not None:
            return _folder(Path(self.clip_checkpoint))
        name = self.clip or DEFAULT_CLIP
        if name.startswith("hf-hub:"):
            if not re.fullmatch(r"hf-hub:[\w-][\w.-]*/[\w-][\w.-]*", name):
                raise UsageError(f"--clip {name}: a model on the hub is called hf-hub:OWNER/NAME")
            return ResolvedClip(_PREFIX + name, name, name, None)
        if name.startswith("local-dir:"):
            return _folder(Path(name.partition(":")[2]))
        model, _, tag = name.partition(":")
        return _published(model, tag)


@dataclass(frozen=True)
class ResolvedClip:
    """A CLIP whose names are right.

    Attributes:
        label: What rows call it; two CLIPs whose features can be compared have the same (see `is_same`).
        identity: Text that differs for other weights.
        model: open_clip's name, with its schema.
        pretrained: A tag or a file; None where `model` says it all.
    """

    label: str
    identity: str
    model: str
    pretrained: str | None

    def load(self, progress: Callable[[int, int | None], None]) -> Network:
        """Builds it as a network of image features; open_clip fetches by itself, so `progress` hears nothing."""
        from .tower import load

        return load(self)


def choice_of(label: str) -> ClipChoice:
    """The choice that leads to the CLIP of that label.

    Raises:
        UsageError: The label is no CLIP's, or one's whose files only the user knows.
    """
    if not label.startswith(_PREFIX):
        raise UsageError(
            f"these are features of {label}, which words cannot be compared with: make them by "
            "`attnsuite embed … --clip MODEL` or `--clip-checkpoint DIR`"
        )
    name = label.removeprefix(_PREFIX)
    if "@" in name:
        raise UsageError(f"these are features of {label}, a model of your own: say where it is, --clip-checkpoint DIR")
    return ClipChoice(name)


def is_same(label: str, other: str) -> bool:
    """Whether two labels stand for the same weights; a folder may have got another name."""
    kept = [text.rpartition("@")[2] if text.startswith(_PREFIX) else text for text in (label, other)]
    return kept[0] == kept[1]


def _published(model: str, tag: str) -> ResolvedClip:
    import open_clip

    if model not in (known := open_clip.list_models()):
        near = difflib.get_close_matches(model, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"{DEFAULT_CLIP} is one"
        raise UsageError(f"--clip {model}: open_clip has no model of that name; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not tag and DEFAULT_CLIP.startswith(f"{model}:"):
        tag = DEFAULT_CLIP.partition(":")[2]
    if tag in tags:
        return ResolvedClip(f"{_PREFIX}{model}:{tag}", f"{model}:{tag}", model, tag)
    if Path(tag).is_file():
        return _of_own(f"{model}:{Path(tag).name}", [Path(tag)], model, tag)
    what = f"has no weights tagged {tag!r}, and there is no such file" if tag else "has several weights; say which"
    raise UsageError(f"--clip {model}:{tag or 'WEIGHTS'}: {model} {what}; there are: {', '.join(tags) or 'none'}")


def _folder(folder: Path) -> ResolvedClip:
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"--clip-checkpoint {folder}: it must be a folder with {_CONFIG}, as open_clip's hub has it")
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", *_WEIGHTS))
    if not any(file.suffix in _WEIGHTS for file in files):
        raise UsageError(f"--clip-checkpoint {folder}: it holds no weights, such as open_clip_model.safetensors")
    return _of_own(folder.absolute().name, files, f"local-dir:{folder}", None)


def _of_own(name: str, files: list[Path], model: str, pretrained: str | None) -> ResolvedClip:
    found = digest(files)
    return ResolvedClip(f"{_PREFIX}{name}@{found[:_SHOWN]}", f"sha256 {found}", model, pretrained)
