"""Batches of scenes and of scanpaths, as tensors that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from vision.scanpath.objects import Objects
from vision.scanpath.pairs import as_array, joined

__all__ = ["PAD", "Scenes", "check_fixations", "pad_scanpaths"]

PAD = -100
"""Stands behind the end of a scanpath that is shorter than others of its batch; `cross_entropy` ignores it."""


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: what a model is given of them.

    Attributes:
        positions: `[B, N, 2]`, vertical and horizontal: row and column, or y and x; padded with zeros.
        targets: `[B]`, int64, the object that is searched for.
        counts: `[B]`, int64, number of objects.
        looks: of all objects of all scenes end to end, without padding: crops `[M, 3, H, W]` or M of `[3, H, W]`, RGB
            from 0 to 1; or features `[M, F]`; None where looks are not known.
        look_of: which of `looks` each object has, `[M]`, where scenes share them, as those of one picture with several
            targets do: each look then costs the model once. None where each object has its own, in order.
    """

    positions: Tensor
    targets: Tensor
    counts: Tensor
    looks: Tensor | tuple[Tensor, ...] | None = None
    look_of: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def mask(self) -> Tensor:
        """Which are objects, and not padding, `[B, N]`."""
        return torch.arange(self.positions.shape[1], device=self.counts.device) < self.counts[:, None]

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        looks = self.looks
        looks = tuple(look.to(device) for look in looks) if isinstance(looks, tuple) else looks
        looks = looks.to(device) if isinstance(looks, Tensor) else looks
        look_of = None if self.look_of is None else self.look_of.to(device)
        return Scenes(self.positions.to(device), self.targets.to(device), self.counts.to(device), looks, look_of)

    @classmethod
    def stack(
        cls,
        positions: Sequence[ArrayLike],
        targets: Sequence[int],
        looks: Sequence[Tensor | Sequence[Tensor]] | None = None,
    ) -> Scenes:
        """A batch of scenes of different numbers of objects.

        Args:
            positions: of each scene `[N, 2]`, vertical and horizontal; N from 1. Objects may be at the same place.
            targets: the object that is searched for in each.
            looks: of each scene `[N, 3, H, W]`, N of `[3, H, W]`, or `[N, F]`; None where looks are not known.

        Raises:
            ValueError: no scene, one without objects, places that are not finite, a target that is not among the
                objects, more or fewer looks than objects.
        """
        if not len(positions) or len(targets) != len(positions) or (looks is not None and len(looks) != len(positions)):
            given = "none" if looks is None else len(looks)
            raise ValueError(
                f"{len(positions)} scenes, {len(targets)} targets, looks of {given}: expected one for each scene."
            )
        places = []
        for n, (position, target) in enumerate(zip(positions, targets, strict=True)):
            place = torch.as_tensor(np.array(as_array(position), np.float32))
            if place.ndim != 2 or place.shape[1] != 2 or not len(place):
                raise ValueError(f"positions of scene {n}: expected [N, 2] with N at least 1, got {list(place.shape)}.")
            if not place.isfinite().all():
                raise ValueError(f"positions of scene {n}: object {_first(~place.isfinite().all(1))} is not finite.")
            if not 0 <= target < len(place):
                raise ValueError(
                    f"target={target} is not among the objects of scene {n}, which are 0 to {len(place) - 1}."
                )
            if looks is not None and len(looks[n]) != len(place):
                raise ValueError(f"scene {n} has {len(place)} objects and {len(looks[n])} looks; give one for each.")
            places.append(place)
        counts = torch.tensor([len(place) for place in places])
        padded = nn.utils.rnn.pad_sequence(places, batch_first=True)
        return cls(padded, torch.tensor([int(target) for target in targets]), counts, _end_to_end(looks))

    @classmethod
    def of_objects(
        cls,
        objects: Sequence[Objects],
        targets: Sequence[int],
        looks: Sequence[Tensor | Sequence[Tensor]] | None = None,
        place: Literal["cells", "centres"] = "cells",
    ) -> Scenes:
        """A batch of pictures' objects.

        Args:
            objects: of each picture.
            targets: see `Objects.index`.
            looks: see `stack`; crops are made by `vision.scanpath.appearance.cut`.
            place: 'cells' for row and column in a grid, 'centres' for y and x in pixels.

        Raises:
            ValueError: objects without cells; what `stack` refuses.
        """
        if place not in ("cells", "centres"):
            raise ValueError(f"place={place!r}: expected 'cells' or 'centres'.")
        positions: list[np.ndarray] = []
        for n, these in enumerate(objects):
            if place == "centres":
                positions.append(these.centres[:, ::-1])
            elif these.cells is None:
                raise ValueError(
                    f"objects of scene {n} have no cells; take place='centres' and position='distance_2d'."
                )
            else:
                positions.append(these.cells)
        return cls.stack(positions, targets, looks)


def _end_to_end(looks: Sequence[Tensor | Sequence[Tensor]] | None) -> Tensor | tuple[Tensor, ...] | None:
    if looks is None:
        return None
    every = [look for scene in looks for look in scene]
    return torch.stack(every) if len({look.shape for look in every}) == 1 else tuple(every)


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0, 0])


def pad_scanpaths(scanpaths: Sequence[ArrayLike]) -> Tensor:
    """Scanpaths of objects, `[T]` each, as one tensor `[P, T]`, int64, padded with `PAD`.

    Raises:
        TypeError: objects that are not integers.
        ValueError: no scanpath, or an empty one: a search has at least one fixation; negative objects.
    """
    objects, lengths = joined(scanpaths, dim=1)
    if not len(lengths) or not lengths.min():
        raise ValueError(f"scanpaths of lengths {lengths.tolist()[:9]}: expected one or more, none of them empty.")
    paths = torch.from_numpy(objects).split(lengths.tolist())
    return nn.utils.rnn.pad_sequence(list(paths), batch_first=True, padding_value=PAD)


def check_fixations(fixations: Tensor, counts: Tensor) -> None:
    """Makes sure that scanpaths go over objects that there are.

    Args:
        fixations: `[P, T]`, padded with `PAD`.
        counts: number of objects of the scene of each, `[P]`.

    Raises:
        ValueError: another object, an empty scanpath, one that goes on after padding.
    """
    is_pad = fixations == PAD
    unknown = ~is_pad & ((fixations < 0) | (fixations >= counts[:, None]))
    if unknown.any():
        path, step = unknown.nonzero()[0].tolist()
        raise ValueError(
            f"scanpath {path}, step {step}: object {int(fixations[path, step])}; its scene has objects 0 to "
            f"{int(counts[path]) - 1}. Behind the end of a scanpath stands {PAD}."
        )
    if not fixations.shape[1] or is_pad[:, 0].any():
        raise ValueError("a scanpath without a fixation: leave it out.")
    if (is_pad[:, :-1] & ~is_pad[:, 1:]).any():
        raise ValueError(f"padding ({PAD}) within a scanpath: it belongs behind its end.")
