"""Vision attention backbones and operators; importing this package registers every model with timm."""

from vision import attention, biformer, explain, litv2, rollout

__all__ = ["attention", "biformer", "explain", "litv2", "rollout"]
