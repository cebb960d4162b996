"""The manifest: which checkpoints exist, where they come from and under which terms.

The facts stand in `manifest.toml` beside this file; here they become typed, immutable `Entry` objects that can be
looked up by name.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any, Literal

__all__ = ["Entry", "WeightsError", "entries", "entry"]


class WeightsError(Exception):
    """A checkpoint cannot be found, fetched, read or used; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """One published checkpoint.

    Attributes:
        name: Architecture and tag, such as `litv2_small.in1k`.
        architecture: The name of the network, such as `litv2_small`.
        family: The method it belongs to, such as `litv2`.
        source: `"url"`: fetched on first use; `"package"`: a file inside an installed Python package.
        license: SPDX-like identifier as timm writes it (lower case).
        paper: Title of the paper.
        paper_url: Where to read it.
        origin_url: The repository that published the file.
        citation: BibTeX.
        url: Where the official file is published (`source="url"`).
        package: Import name of the package that holds the file (`source="package"`).
        distribution: What to `pip install` for `package`.
        file: Path of the file inside `package`.
        sha256: Digest of the official file, or None where it could not be pinned.
        size: Bytes of the official file, where known.
        top1: Published ImageNet-1K top-1 accuracy in per cent, where there is one.
        gmacs: Published multiply-accumulates of one picture, in billions, where there are any.
        key: Where the state dict lies inside the official file; None if it is the file.
        default: Whether the bare architecture name means this checkpoint.
        library: Whose networks `architecture` is one of: timm's registered names, or the models of transformers.
        model_args: Keyword arguments the network must be built with for these weights.
        notes: What a user should know besides.
        terms: What the licence keeps a user from doing, said before the file is fetched; None where it is permissive.
    """

    name: str
    architecture: str
    family: str
    source: Literal["url", "package"]
    license: str
    paper: str
    paper_url: str
    origin_url: str
    citation: str
    url: str | None = None
    package: str | None = None
    distribution: str | None = None
    file: str | None = None
    sha256: str | None = None
    size: int | None = None
    top1: float | None = None
    gmacs: float | None = None
    key: str | None = None
    default: bool = False
    library: Literal["timm", "transformers"] = "timm"
    model_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    notes: str | None = None
    terms: str | None = None

    @property
    def tag(self) -> str:
        """What follows the architecture in the name: `in1k`."""
        return self.name.partition(".")[2]


@functools.cache
def _manifest() -> dict[str, Entry]:
    """Reads `manifest.toml` once; a mistake in it is a defect of the package, so it fails loudly."""
    raw = tomllib.loads(resources.files("weights").joinpath("manifest.toml").read_text(encoding="utf-8"))
    known = {f.name for f in fields(Entry)}
    found = {}
    for name, own in raw["checkpoint"].items():
        facts = {**raw["family"][own["family"]], **own}
        if unknown := set(facts) - known:
            raise ValueError(f"manifest.toml: checkpoint {name!r} has unknown fields {sorted(unknown)}")
        facts["citation"] = facts["citation"].strip()
        found[name] = Entry(name=name, architecture=name.partition(".")[0], **facts)
    return found


def entries(pattern: str | None = None) -> list[Entry]:
    """Lists the checkpoints of the manifest, in its order.

    Args:
        pattern: Shell-style pattern on the name or the architecture (`"litv2*"`); None lists all.

    Returns:
        The matching entries; an empty list if none matches.
    """
    listed = list(_manifest().values())
    if pattern is None:
        return listed
    return [e for e in listed if fnmatch.fnmatch(e.name, pattern) or fnmatch.fnmatch(e.architecture, pattern)]


def entry(name: str) -> Entry:
    """Looks up one checkpoint.

    Args:
        name: Full name (`litv2_small.in1k`), or an architecture (`litv2_small`) for its default checkpoint.

    Returns:
        The entry.

    Raises:
        WeightsError: The name is not in the manifest; the message offers the closest names.
    """
    listed = _manifest()
    if name in listed:
        return listed[name]
    for candidate in listed.values():
        if candidate.default and candidate.architecture == name:
            return candidate
    names = listed if "." in name else [e.architecture for e in listed.values() if e.default]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise WeightsError(f"no checkpoint named {name!r} is known{hint} (`attnsuite weights list` shows all)")
