"""Codes for where an object is, whose likeness falls with distance.

Two places d apart have codes of cosine `exp(-d² / (2 sigma²))`, and all codes are equally long. The authors of OAT fit
a table of vectors to that by gradient descent. Here it is in closed form: a Gaussian is a sum of cosines (its Fourier
series), and `cos(w·(p - q))` is the product of `[cos w·p, sin w·p]` and `[cos w·q, sin w·q]`. Lengths are then equal by
construction, and places need not be whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["DistanceCode", "LearnedCode", "Position", "PositionCode", "SinusoidalCode", "sinusoid"]

Position = Literal["distance", "distance_2d", "sinusoidal", "learned"]

_TOLERANCE = 1e-5  # largest error of a cosine
_FLAG_SIGMA = 2.0  # the two flags are 1 apart: cosine .88
_FLAG_DIM_2D = 12  # two flags need few dimensions; places in the plane need many


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """The code of "Attention Is All You Need", section 3.5: sines and cosines of falling frequency, in turn.

    Args:
        positions: `[...]`.
        dim: C, even.

    Returns:
        `[..., C]`, float32, of length `sqrt(C / 2)`.
    """
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10_000.0) / dim))
    angles = positions.float()[..., None] * rates  # [..., C / 2]
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


class DistanceCode(nn.Module):
    """`cos(code(p), code(q)) = exp(-|p - q|² / (2 sigma²))`, in one dimension or in the plane, to 1e-5.

    The Gaussian is repeated at a distance where it no longer matters and cut at a frequency where its spectrum no
    longer does; both are chosen so that the two errors are alike. No parameters, no buffers that rounding could harm.

    Args:
        dim: C.
        extent: the largest distance along each axis, one or two of them. Codes are good for places that are no further
            apart.
        sigma: standard deviation of the Gaussian, in the same unit.

    Raises:
        ValueError: a `sigma` that is too small for so few dimensions.
    """

    lattice: Tensor

    def __init__(self, dim: int, extent: Sequence[float], sigma: float = 2.0) -> None:
        super().__init__()
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma={sigma} must be positive.")
        if not all(length > 0 and math.isfinite(length) for length in extent):
            raise ValueError(f"extent={tuple(extent)} must be positive.")
        self.dim, self.extent, self.sigma = dim, tuple(extent), sigma
        lengths = np.array(extent) / sigma
        reach = _reach(dim, lengths)  # in sigmas, of the cut and of the repetition
        self.periods = tuple((lengths + reach).tolist())
        lattice = _half_lattice(self.periods, (dim - 1) // 2)  # [K, A]
        weights = np.exp(-0.5 * ((2 * np.pi / np.array(self.periods) * lattice) ** 2).sum(-1))
        weights[1:] *= 2  # each stands for a frequency and its negative
        # All frequencies together weigh as much as the Gaussian and its repetitions at distance 0, which is nearly 1.
        total = weights.sum() * np.prod(math.sqrt(2 * np.pi) / np.array(self.periods))
        error = 2 * abs(1 - total) + 2 * len(extent) * math.exp(-0.5 * reach**2)
        if not error < _TOLERANCE:
            raise ValueError(
                f"sigma={sigma}: {dim} dimensions do not tell places apart that finely over {self.extent}; the error "
                f"of a cosine would be {error:.1g}. Take a larger sigma, more dimensions, or another unit of length."
            )
        # Integers, which no conversion of the model to half precision rounds; not part of a checkpoint.
        self.register_buffer("lattice", torch.from_numpy(lattice), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """`[..., A]`, in the unit of `extent` → `[..., C]`, float32, of length 1; differentiable."""
        scale = 2 * math.pi / torch.tensor(self.periods, device=positions.device)
        frequencies = self.lattice * scale  # [K, A], per sigma
        centred = (positions.float() - torch.tensor(self.extent, device=positions.device) / 2) / self.sigma
        angles = (centred[..., None, :] * frequencies).sum(-1)  # [..., K]; autocast would round a matrix product
        weights = torch.exp(-0.5 * frequencies.square().sum(-1))
        weights[1:] *= 2
        amplitudes = (weights / weights.sum()).sqrt()
        code = torch.cat((angles.cos() * amplitudes, angles[..., 1:].sin() * amplitudes[1:]), -1)
        return nn.functional.pad(code, (0, self.dim - code.shape[-1]))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.dim}, extent={self.extent}, sigma={self.sigma}"


def _reach(dim: int, lengths: np.ndarray) -> float:
    """How many sigmas the spectrum is kept for, and the repetition kept away by.

    So many frequencies lie in the circle (in one dimension, the interval) of that radius: `a (l + a) = pi dim`, or
    `a² (l_1 + a)(l_2 + a) = 4 pi dim`.
    """
    left = np.array([1.0])
    for length in lengths:
        left = np.polymul(left, [1.0, length])
    if len(lengths) == 1:
        left, right = np.polymul(left, [1.0, 0.0]), math.pi * dim
    else:
        left, right = np.polymul(left, [1.0, 0.0, 0.0]), 4 * math.pi * dim
    roots = np.roots(np.polysub(left, [right]))
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def _half_lattice(periods: Sequence[float], pairs: int) -> np.ndarray:
    """Zero and the `pairs` lowest frequencies without their negatives, `[1 + pairs, A]`, in periods."""
    density = np.prod(periods) ** (1 / len(periods))
    most = [math.ceil(2 * (pairs + 1) ** (1 / len(periods)) * period / density) + 1 for period in periods]
    axes = np.meshgrid(*(np.arange(-n, n + 1) for n in most), indexing="ij")
    lattice = np.stack(axes, -1).reshape(-1, len(periods))
    # Of each pair the one whose first number that is not 0 is positive.
    first = lattice[:, 0] if len(periods) == 1 else np.where(lattice[:, 0] != 0, lattice[:, 0], lattice[:, 1])
    lattice = lattice[(first > 0) | (lattice == 0).all(-1)]
    order = np.argsort(((lattice / np.array(periods)) ** 2).sum(-1), kind="stable")
    return lattice[order[: 1 + pairs]]


class SinusoidalCode(nn.Module):
    """`sinusoid` of one axis, scaled to length 1: what the distance-preserving code is compared with.

    Args:
        dim: C, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, positions: Tensor) -> Tensor:
        """`[..., 1]` → `[..., C]`, float32."""
        return sinusoid(positions[..., 0], self.dim) / math.sqrt(self.dim / 2)


class LearnedCode(nn.Module):
    """A learned vector for each place of one axis, of length about 1 at first.

    Args:
        dim: C.
        count: places, 0 to `count - 1`.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.table = nn.Embedding(count, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)

    def forward(self, positions: Tensor) -> Tensor:
        """`[..., 1]`, rounded to whole numbers → `[..., C]`."""
        return self.table(positions[..., 0].float().round().long())  # of flags, which are bool, too


class PositionCode(nn.Module):
    """Where an object is, and whether it is flagged: `[E_vertical ; E_horizontal ; E_flag]`, of three equal weights.

    With 'distance' the cosine of two codes is the mean of three Gaussians, of the distances along the two axes and of
    the flags; with 'distance_2d' place counts two thirds, by one Gaussian of the distance in the plane. 'sinusoidal'
    and 'learned' are like 'distance', with other codes for each axis.

    Args:
        kind: see above.
        dim: C; 256 is 86 for each axis and 84 for the flag.
        extent: vertical and horizontal size of what places are in: rows and columns of the largest grid, or height and
            width of a picture.
        sigma: of the Gaussian, in the same unit.

    Raises:
        ValueError: an unknown kind, too few dimensions, an extent that is not positive, a `sigma` that is too small for
            the extent and the dimensions.
    """

    def __init__(
        self, kind: Position = "distance", dim: int = 256, extent: Sequence[float] = (14, 14), sigma: float = 2.0
    ) -> None:
        super().__init__()
        if kind not in get_args(Position):
            raise ValueError(f"position={kind!r}: expected one of {', '.join(map(repr, get_args(Position)))}.")
        if len(extent) != 2 or not all(side > 0 for side in extent):
            raise ValueError(f"extent={tuple(extent)}: expected two positive sizes, vertical and horizontal.")
        self.kind, self.dim, self.extent = kind, dim, tuple(extent)
        axis = math.ceil(dim / 3)
        axis += axis % 2  # a sinusoid needs pairs
        flag = _FLAG_DIM_2D if kind == "distance_2d" else dim - 2 * axis
        if flag < 4 or dim % 2 or dim - flag < 8:
            raise ValueError(f"dim={dim}: a position code needs an even number of dimensions, 24 or more.")
        longest = math.ceil(max(extent))
        self.flag: nn.Module
        if kind == "distance_2d":
            self.place: nn.Module = DistanceCode(dim - flag, extent, sigma)
        elif kind == "distance":
            self.place = DistanceCode(axis, (longest,), sigma)
        elif kind == "sinusoidal":
            self.place, self.flag = SinusoidalCode(axis), SinusoidalCode(flag)
        else:
            self.place, self.flag = LearnedCode(axis, longest), LearnedCode(flag, 2)
        if kind.startswith("distance"):
            self.flag = DistanceCode(flag, (1,), _FLAG_SIGMA)

    def forward(self, positions: Tensor, flags: Tensor) -> Tensor:
        """Codes of places.

        Args:
            positions: `[..., 2]`, vertical and horizontal, from 0 to `extent`.
            flags: `[...]`, 0 or 1.

        Returns:
            `[..., C]`, float32, of length `sqrt(C)` (of learned codes, at first about that).
        """
        third = math.sqrt(self.dim / 3)
        if self.kind == "distance_2d":
            place = self.place(positions) * math.sqrt(2)
        else:
            place = self.place(positions[..., None]).flatten(-2)  # one table for both axes
        return torch.cat((place, self.flag(flags[..., None])), -1) * third
