"""Building a network whose weights come from a file, without the initial ones that the file then replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["NoInitialWeights", "left_blank"]

_DRAW = (
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
)


class NoInitialWeights(TorchFunctionMode):
    """A context in which tensors that would be filled with random numbers become -0.

    Drawing them takes most of the time in which a transformer is built. Minus, so that `left_blank` can tell them from
    weights that a file says are zero.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAW:
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs["tensor"]
        with torch.no_grad():
            return tensor.fill_(-0.0)  # not left as it is: what was drawn may be drawn anew until it is within bounds


def left_blank(module: nn.Module) -> list[str]:
    """Names of the weights and buffers that should have been drawn and that nothing else has been put into."""
    entries = chain(module.named_parameters(), module.named_buffers())
    return [name for name, tensor in entries if _is_blank(tensor)]


def _is_blank(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return False
    first = tensor[(0,) * tensor.ndim]  # which tells nearly always
    return all(not some.any() and bool(some.signbit().all()) for some in (first, tensor))
