"""`attnsuite weights`: the checkpoint store for people."""

from __future__ import annotations

from collections.abc import Sequence

import weights

from .console import FetchBar, stderr

__all__ = ["fetch", "known", "take", "verify"]


def known(pattern: str | None) -> list[dict[str, object]]:
    """Facts on every checkpoint of the manifest that fits a pattern, and where it lies if it is here.

    Raises:
        weights.WeightsError: None fits.
    """
    entries = weights.entries(pattern)
    if not entries:
        raise weights.WeightsError(f"no checkpoint is called like {pattern!r}; `attnsuite weights list` shows all")
    return [
        {
            "name": entry.name,
            "family": entry.family,
            "top1": entry.top1,
            "license": entry.license,
            "source": entry.url if entry.source == "url" else f"package {entry.distribution}",
            "pinned": entry.sha256 is not None,
            "path": None if (path := weights.path_of(entry.name)) is None else str(path),
            "paper": entry.paper_url,
        }
        for entry in entries
    ]


def fetch(names: Sequence[str], force: bool) -> int:
    """Fetches checkpoints, each under a progress bar; one that fails does not keep the others from coming.

    Returns:
        0 if all are here now, else 1.

    Raises:
        weights.WeightsError: A name is unknown; nothing has been fetched then.
    """
    entries = [weights.entry(name) for name in names]
    failed = 0
    for entry in entries:
        try:
            with FetchBar(entry.name) as progress:
                path = weights.fetch(entry.name, progress=progress, force=force)
            print(f"{entry.name}: {path}")
        except weights.WeightsError as error:
            failed += 1
            stderr.print(f"{entry.name}: {error}", markup=False, style="red")
    return 1 if failed else 0


def take(name: str, file: str) -> None:
    """Imports an official file.

    Raises:
        weights.WeightsError: The name is unknown, or the file does not fit; the message says what differs.
    """
    import attnsuite  # noqa: F401 - with the models registered, the file is held against its network

    print(f"{weights.entry(name).name}: {weights.import_file(name, file)}")


def verify(names: Sequence[str] | None) -> int:
    """Prints the state of checkpoints, by default of all that are here.

    Returns:
        0 if all are as they should be, 1 if one is damaged, or absent although it was named.
    """
    if names:
        entries = [weights.entry(name) for name in names]
    else:
        entries = [entry for entry in weights.entries() if weights.path_of(entry.name) is not None]
    bad = 0
    for entry in entries:
        try:
            status = weights.verify(entry.name)
            bad += status == "absent"
            print(f"{entry.name}: {status}")
        except weights.WeightsError as error:
            bad += 1
            print(f"{entry.name}: damaged")
            stderr.print(f"{entry.name}: {error}", markup=False, style="red")
    return 1 if bad else 0
