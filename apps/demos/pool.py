"""Models of a server: one copy of each however many visitors, the one that rested longest dropped first."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["Pool"]

T = TypeVar("T")


class Pool:
    """At most so many models in memory, each lent to one visitor at a time.

    A model that is lent is neither dropped nor lent again: what listens to its attention hears one picture only. Do
    not ask for a second model while one is lent: with a pool of one nobody would ever get it.

    Args:
        most: How many models.

    Raises:
        ValueError: Fewer than one.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"a pool of {most} models can hold none: expected at least 1")
        self._most = most
        self._changed = threading.Condition()
        self._idle: OrderedDict[Hashable, Any] = OrderedDict()  # the one that rested longest comes first
        self._lent: set[Hashable] = set()

    @property
    def names(self) -> list[Hashable]:
        """Keys of the models in memory."""
        with self._changed:
            return [*self._idle, *self._lent]

    @contextmanager
    def use(self, key: Hashable, load: Callable[[], T], waiting: Callable[[], object] = lambda: None) -> Iterator[T]:
        """Lends a model, which is loaded if it is not there, and takes it back.

        Args:
            key: What tells it from others.
            load: Makes it. If it fails, the model is as absent as before.
            waiting: Called once if others have to be waited for.

        Yields:
            The model.
        """
        model = self._borrow(key, waiting)
        try:
            if model is None:
                model = load()
            yield model
        finally:
            with self._changed:
                self._lent.discard(key)
                if model is not None:
                    self._idle[key] = model
                self._changed.notify_all()

    def _borrow(self, key: Hashable, waiting: Callable[[], object]) -> Any:
        """The model if it is there, else None and room for it."""
        told = False
        with self._changed:
            while key in self._lent or (key not in self._idle and len(self._lent) >= self._most):
                if not told:
                    told = True
                    waiting()
                self._changed.wait()
            model = self._idle.pop(key, None)
            self._lent.add(key)
            dropped = False
            while len(self._idle) + len(self._lent) > self._most:
                self._idle.popitem(last=False)
                dropped = True
        if dropped:
            gc.collect()  # networks hold themselves in cycles
        return model
