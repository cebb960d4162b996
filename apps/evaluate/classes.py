"""Which class of a network each class of the data is: by name, by WordNet id, or by index."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..models import Network

__all__ = ["Matched", "match"]

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Matched:
    """The classes of the data among those of a network.

    Attributes:
        targets: Index in the network's output of each class of the data.
        how: `name`, `index` (the data's names are numbers) or `order` (first is first).
        count: How many classes the network has.
    """

    targets: tuple[int, ...]
    how: str
    count: int


def match(names: Sequence[str], network: Network, in_order: bool = False) -> Matched:
    """Finds the class of a network that each class of the data is.

    A name counts as found if it is the network's label, its id (such as WordNet's), or one of the words that a label
    separates by commas and no other label has; case, `_` and `-` do not matter. The data may have fewer classes.

    Args:
        names: Names of the data's classes.
        network: With its labels.
        in_order: Take the data's classes as the network's, in the order given, whatever they are called.

    Raises:
        UsageError: The network has no classes, or a name is unknown, is that of two classes, or stands for one class
            together with another name.
    """
    count = len(network.labels)
    if not count:
        raise UsageError(f"{network.label} has no classifier, so it cannot be evaluated on classes")
    nameless = list(network.labels) == [f"class_{index}" for index in range(count)]
    if in_order or (nameless and len(names) == count):
        if len(names) != count:
            raise UsageError(
                f"--in-order: the data have {len(names)} classes and {network.label} has {count}; "
                "without it classes are found by name"
            )
        return Matched(tuple(range(count)), "order", count)
    if all(name.isdecimal() and int(name) < count for name in names) and not set(names) & set(network.labels):
        targets, how = [int(name) for name in names], "index"
    else:
        targets, how = _by_name(names, network, nameless), "name"
    _check_once(names, targets, network)
    return Matched(tuple(targets), how, count)


def _by_name(names: Sequence[str], network: Network, nameless: bool) -> list[int]:
    """The class of each name, or an error that lists all that cannot be told."""
    tables = _tables(network)
    found: list[int] = []
    unknown: list[str] = []
    for name in names:
        hits = next((table[_plain(name)] for table in tables if _plain(name) in table), [])
        if len(hits) > 1:
            raise UsageError(_ambiguous(name, hits, network))
        if hits:
            found.append(hits[0])
        else:
            unknown.append(name)
    if not unknown:
        return found
    if nameless:
        raise UsageError(
            f"{network.label} has {len(network.labels)} classes without names, and the data have {len(names)}: names "
            "cannot be compared; use a checkpoint that has its label_names in config.json, or call the folders 0, 1, …"
        )
    remedy = " or take them in order with --in-order" if len(names) == len(network.labels) else ""
    raise UsageError(
        f"{len(unknown)} of the {len(names)} classes of the data are not among the {len(network.labels)} of "
        f"{network.label}: {_listed(_with_near(unknown, tables))}; rename them{remedy}"
    )


def _tables(network: Network) -> list[dict[str, list[int]]]:
    """From a name to the classes that have it, the surest kind of name first."""
    words = (
        (word, index) for index, label in enumerate(network.labels) for word in set(label.split(",")) if word.strip()
    )
    return [
        _table((label, index) for index, label in enumerate(network.labels)),
        _table((name, index) for index, name in enumerate(_ids(network))),
        _table(words),
    ]


def _table(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for name, index in pairs:
        table.setdefault(_plain(name), []).append(index)
    return table


def _ids(network: Network) -> list[str]:
    """The short names of a network's classes, such as WordNet's `n07920052`; none if it has no such."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    config: Mapping[str, Any] = getattr(network.module, "pretrained_cfg", None) or {}
    own = config.get("label_names")
    if isinstance(own, Mapping):
        own = [own[key] for key in sorted(own, key=int)]
    if own:
        return [str(name) for name in own]
    subset = infer_imagenet_subset(network.module)
    return list(ImageNetInfo(subset).label_names()) if subset else []


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _ambiguous(name: str, hits: Sequence[int], network: Network) -> str:
    ids = _ids(network) or [str(index) for index in range(len(network.labels))]
    meant = ", ".join(f"{ids[index]} ({network.labels[index]})" for index in hits)
    return f"the class {name!r} of the data may be {len(hits)} classes of {network.label}: call it one of {meant}"


def _with_near(unknown: Sequence[str], tables: Sequence[Mapping[str, object]]) -> list[str]:
    """The first names, each with the nearest that is known."""
    known = [name for table in tables for name in table]
    lines = []
    for name in unknown[:_SHOWN]:
        near = difflib.get_close_matches(_plain(name), known, n=1)
        lines.append(f"{name!r} (near: {near[0]!r})" if near else repr(name))
    return lines + [""] * (len(unknown) - len(lines))


def _listed(lines: Sequence[str]) -> str:
    more = len(lines) - _SHOWN
    return ", ".join(lines[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_once(names: Sequence[str], targets: Sequence[int], network: Network) -> None:
    first: dict[int, str] = {}
    for name, target in zip(names, targets, strict=True):
        other = first.setdefault(target, name)
        if other != name:
            raise UsageError(
                f"{other!r} and {name!r} are both the class {network.labels[target]!r} of {network.label}; "
                "put their pictures together"
            )
