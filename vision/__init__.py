"""Vision attention backbones and operators; importing this package registers every model with timm."""

from vision import attention, biformer, explain, fan, litv2, rollout, rvt, tap

__all__ = ["attention", "biformer", "explain", "fan", "litv2", "rollout", "rvt", "tap"]
