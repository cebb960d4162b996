"""Building a network whose weights come from a file, without the initial ones that the file then replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["NoInitialWeights"]

_DRAW = (torch.Tensor.normal_, torch.Tensor.uniform_)


class NoInitialWeights(TorchFunctionMode):
    """A context in which tensors that would be filled with random numbers become zero.

    Drawing them takes most of the time in which a transformer is built. What no file has replaced afterwards can be
    told by that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._filled: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func not in _DRAW:
            return func(*args, **(kwargs or {}))
        self._filled.add(args[0].data_ptr())
        return args[0].zero_()  # not left as it is: what was drawn may be drawn anew until it is within bounds

    def left_in(self, module: nn.Module) -> list[str]:
        """Names of the weights that should have been drawn and that nothing else has been put into."""
        return [
            name for name, weight in module.named_parameters() if weight.data_ptr() in self._filled and not weight.any()
        ]
