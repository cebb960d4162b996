"""Weights and inputs that anybody can make again, for comparing networks across implementations.

The JSON files beside this one hold what the authors' own code computes (fp32, CPU, evaluation mode) once its state dict
is filled by `state_dict` and its input is `inputs`. Each file gives the names and shapes of the official state dict, a
few of the values at each point of the network, and how much the same code differs between fp32 and fp64 there: what
differs by much more than this rounding is another function.

Every entry is drawn on its own, from a generator seeded by its official name; neither the order of the entries nor the
presence of others matters.
"""

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["assert_matches", "inputs", "load", "state_dict"]

FOLDER = Path(__file__).parent
_NORM_LIKE = ("weight", "gamma")  # how the last part of a 1-D entry's name begins if it scales rather than shifts


def load(name: str) -> dict[str, Any]:
    """The stored numbers of one network or of a group of operators."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def state_dict(entries: Mapping[str, Sequence[int]], salt: str = "") -> dict[str, Tensor]:
    """Fills an official state dict.

    Args:
        entries: name → shape. `{0:4}` in a name stands for the four names with 0 to 3 in its place.
        salt: another one gives other weights, such as those of a teacher.

    Returns:
        Float32 tensors; a counter of batches is an int64 zero.
    """
    return {name: _entry(name, tuple(shape), salt) for name, shape in _expanded(entries)}


def _expanded(entries: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Sequence[int]]]:
    for pattern, shape in entries.items():
        if span := re.search(r"\{(\d+):(\d+)\}", pattern):
            for i in range(int(span[1]), int(span[2])):
                yield pattern.replace(span[0], str(i)), shape
        else:
            yield pattern, shape


def _entry(name: str, shape: tuple[int, ...], salt: str) -> Tensor:
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    key = f"{salt}:{name}" if salt else name
    drawn = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if last == "running_var":
        filled = 1 + 0.1 * np.abs(drawn)
    elif last != "running_mean" and len(shape) > 1:
        # At full scale the convolutions that BiFormer adds to the features would double their variance in each block.
        scale = 0.25 if "pos_embed" in name else 1.0
        filled = scale * drawn / math.sqrt(math.prod(shape[1:]))
    else:
        filled = 0.02 * drawn + (len(shape) == 1 and last.startswith(_NORM_LIKE))
    return torch.from_numpy(np.asarray(filled, dtype=np.float32))


def inputs(shape: Sequence[int], seed: int) -> Tensor:
    """Float32 noise; for images (`[B, 3, H, W]`) half as much of it, over four plane waves per channel."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(tuple(shape))
    if len(shape) == 4 and shape[1] == 3:
        B, C, H, W = shape
        waves = rng.integers(-4, 5, size=(B, C, 4, 2, 1, 1))  # along H, along W
        phase = 2 * np.pi * rng.random((B, C, 4, 1, 1))
        turns = waves[:, :, :, 0] * (np.arange(H) / H)[:, None] + waves[:, :, :, 1] * (np.arange(W) / W)
        x = 0.5 * x + 0.6 * np.cos(2 * np.pi * turns + phase).sum(2)
    return torch.from_numpy(x.astype(np.float32))


def assert_matches(actual: Tensor, golden: Mapping[str, Any], what: str) -> None:
    """Compares a tensor with stored numbers: shape, sampled values, mean and spread.

    Args:
        actual: in the layout that the numbers were taken in.
        golden: `shape`, `idx` (flat) and `values`, `mean`, `std`, and `rounding`, the authors' fp32 against fp64.
        what: for the message.
    """
    assert list(actual.shape) == golden["shape"], f"{what}: shape {list(actual.shape)}, expected {golden['shape']}"
    flat = actual.detach().flatten().double()
    atol = 30 * golden["rounding"]
    expected = torch.tensor(golden["values"], dtype=torch.float64)
    torch.testing.assert_close(flat[golden["idx"]], expected, rtol=1e-3, atol=atol, msg=lambda m: f"{what}: {m}")
    spread = torch.stack((flat.mean(), flat.std(correction=0)))
    expected = torch.tensor((golden["mean"], golden["std"]), dtype=torch.float64)
    torch.testing.assert_close(spread, expected, rtol=1e-4, atol=atol, msg=lambda m: f"{what}, mean and std: {m}")
