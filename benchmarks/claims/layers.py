"""Several attention layers in the same small network: the same start for all, and what each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.claims.report import Table

__all__ = ["Build", "Layer", "costs_table", "macs", "parameters", "started", "times"]

Layer = Callable[..., nn.Module] | None
"""Makes an attention of so many channels; None for none."""
Build = Callable[[Layer], nn.Module]
"""Makes a network with that attention in it."""


def started(build: Build, layer: Layer, seed: int) -> nn.Module:
    """A network that shares with the one of that seed without attention whatever both have.

    Args:
        build: Makes the network.
        layer: Its attention.
        seed: Of the weights.

    Raises:
        ValueError: If the network without attention has something that this one lacks.
    """
    torch.manual_seed(seed)
    plain = build(None).state_dict()
    torch.manual_seed(seed)
    model = build(layer)
    if missing := model.load_state_dict(plain, strict=False).unexpected_keys:
        raise ValueError(f"the network with attention lacks {', '.join(missing)}: insert layers, replace none")
    return model


def parameters(model: nn.Module) -> int:
    """How many numbers it learns."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products for one image `[1, 3, H, W]`."""
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def times(models: Mapping[str, nn.Module], images: Tensor, turns: int = 40) -> dict[str, list[float]]:
    """Seconds of each forward pass, in turns A B C A B C …, so that a drifting machine is the same to all.

    Args:
        models: In evaluation mode.
        images: `[B, 3, H, W]`.
        turns: How often, after one that does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            if turn:
                found[name].append(time.perf_counter() - start)
    return found


def costs_table(title: str, build: Build, layers: Mapping[str, Layer], images: Tensor, turns: int = 40) -> Table:
    """Parameters, multiply-adds and time of the network with each layer; the time over that of the first, by median.

    Args:
        title: Of the table.
        build: Makes the network.
        layers: By name.
        images: Of the forward passes, `[B, 3, H, W]`.
        turns: See `times`.
    """
    models = {name: started(build, layer, 0).eval() for name, layer in layers.items()}
    found = times(models, images, turns)
    first = next(iter(found.values()))
    rows: list[list[Any]] = []
    for name, model in models.items():
        ratio = statistics.median(own / base for own, base in zip(found[name], first, strict=True))
        million = macs(model, images[:1]) / 1e6
        rows.append([name, f"{parameters(model) / 1e3:.1f} k", f"{million:.2f} M", f"{ratio:.2f}"])
    header = ["", "parameters", "MACs", f"forward time, batch {len(images)}, over {next(iter(models))}"]
    return Table(title, header, rows)
