"""Vision attention backbones and operators; importing this package registers every model with timm."""

from vision import biformer, litv2

__all__ = ["biformer", "litv2"]
