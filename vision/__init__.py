"""Vision attention backbones and operators; importing this package registers every model with timm."""

from vision import (
    attention,
    biformer,
    dcal,
    ela,
    explain,
    fan,
    litv2,
    psa,
    rollout,
    rvt,
    segmentation,
    sparsifiner,
    tap,
)

__all__ = [
    "attention",
    "biformer",
    "dcal",
    "ela",
    "explain",
    "fan",
    "litv2",
    "psa",
    "rollout",
    "rvt",
    "segmentation",
    "sparsifiner",
    "tap",
]
