"""How much memory a computation holds at once."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Alive"]


class Alive(TorchDispatchMode):
    """Counts the bytes of all results of operators that are alive at once; scratch space within operators is not.

    Attributes:
        most: The highest that the count was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                key = self._key(tensor)
                if key not in self._known and key not in given:
                    self._begin(key, tensor.untyped_storage())
        return out

    def _begin(self, key: int, storage: Any) -> None:
        size = cast(int, storage.nbytes())
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata
