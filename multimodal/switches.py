"""What the switches on a vision-language model share: on, off, and whose forwards they act on.

A switch is put on an unmodified model of transformers and taken off again. What it changes hangs on hooks; the hooks
ask :meth:`Switch.active` at every forward whether they are meant, so that several users of one model do not disturb
each other:

* ``with switch(model, …):`` acts on forwards made in the same thread (the same :mod:`contextvars` context) only.
  Another thread may at that time run the model plainly, or under other settings.
* ``handle = switch.apply(model, …)`` acts on forwards of all threads, until ``handle.remove()``.

A thread that is started *inside* a ``with`` block begins with an empty context and is therefore not under the switch:
for streaming from a background thread use :meth:`Switch.apply`, or start it by ``contextvars.copy_context().run``.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

__all__ = ["Handle", "Switch"]

Options = ParamSpec("Options")
Settings = TypeVar("Settings")

# One lock for all: attaching and detaching take microseconds, and no forward ever waits for it.
_lock = threading.RLock()
_NONE: Mapping[int, Any] = MappingProxyType({})


class Handle(Generic[Settings]):
    """A switch on a model: enter it, or remove it where :meth:`Switch.apply` has put it on.

    Entering it again while it is on, as a callback of ``generate`` may do, is counted and changes nothing else.

    Attributes:
        settings: What the switch was told, and where it says so, what it did at the last forward.
    """

    def __init__(self, switch: Switch[Any, Settings], model: PreTrainedModel, settings: Settings) -> None:
        self.switch, self.settings = switch, settings
        self._model = weakref.ref(model)  # an applied switch does not keep a model alive that its owner has dropped
        self._applied = False
        self._depth = contextvars.ContextVar[int](f"depth of {switch.name}", default=0)

    @property
    def model(self) -> PreTrainedModel:
        """The model; raises ReferenceError where it is no more."""
        if (model := self._model()) is None:
            raise ReferenceError(f"the model under {self.switch.name} is no more")
        return model

    def remove(self) -> None:
        """Takes off what `apply` put on. Once is enough; more do no harm."""
        with _lock:
            if self._applied and (model := self._model()) is not None:
                self.switch._unapply(model)
            self._applied = False

    def __enter__(self) -> Handle[Settings]:
        if not self._applied:  # else it is on already, for every thread
            if self._depth.get() == 0:
                self.switch._enter(self.model, self.settings)
            self._depth.set(self._depth.get() + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._applied:
            return self.remove()
        self._depth.set(self._depth.get() - 1)
        if self._depth.get() == 0:
            self.switch._leave(self.model)

    def __repr__(self) -> str:
        return f"<{self.switch.name}: {self.settings}>"


class Switch(Generic[Options, Settings]):
    """A change of attention that is put on a model and taken off again.

    Args:
        name: What messages call it.
        settings: Makes and checks the settings for a model; raises where the model cannot take the switch. Its
            documentation is the switch's.
        attach: Hangs the hooks, which ask :meth:`active` at each forward, and returns what takes them off. Called for
            the first user of a model; the last one's leaving undoes it.
    """

    def __init__(
        self,
        name: str,
        settings: Callable[Concatenate[PreTrainedModel, Options], Settings],
        attach: Callable[[PreTrainedModel], Sequence[Callable[[], None]]],
    ) -> None:
        self.name = name
        self._settings, self._attach = settings, attach
        self._entered = contextvars.ContextVar[Mapping[int, tuple[PreTrainedModel, Settings]]](name, default=_NONE)
        self._applied = weakref.WeakKeyDictionary[PreTrainedModel, Settings]()
        self._users = weakref.WeakKeyDictionary[PreTrainedModel, int]()
        self._takers = weakref.WeakKeyDictionary[PreTrainedModel, Sequence[Callable[[], None]]]()
        self.__doc__ = settings.__doc__

    def __call__(self, model: PreTrainedModel, /, *args: Options.args, **options: Options.kwargs) -> Handle[Settings]:
        """A context manager that puts the switch on `model` for the forwards made in this thread.

        Raises:
            TypeError: For a model that is none of the supported families, or was compiled.
            ValueError: For wrong options; on entering, where the model is under this switch already.
        """
        _refuse_compiled(model, self.name)
        return Handle(self, model, self._settings(model, *args, **options))

    def apply(self, model: PreTrainedModel, /, *args: Options.args, **options: Options.kwargs) -> Handle[Settings]:
        """Puts the switch on `model` for the forwards of all threads, until the handle's ``remove()``.

        Raises:
            TypeError, ValueError: As calling the switch does.
        """
        handle = self(model, *args, **options)
        with _lock:
            self._refuse_second(model)
            self._hold(model)
            self._applied[model] = handle.settings
            handle._applied = True
        return handle

    def active(self, model: Any) -> Settings | None:
        """The settings under which a forward of `model` runs here and now; None where the switch is off."""
        if (entered := self._entered.get().get(id(model))) is not None:
            return entered[1]
        return self._applied.get(model)

    def _refuse_second(self, model: PreTrainedModel) -> None:
        if self.active(model) is not None:
            raise ValueError(
                f"this {type(model).__name__} is under {self.name} already; leave that `with` block or call "
                "remove() on its handle before putting it on again"
            )

    def _enter(self, model: PreTrainedModel, settings: Settings) -> None:
        with _lock:
            self._refuse_second(model)
            self._hold(model)
        self._entered.set({**self._entered.get(), id(model): (model, settings)})

    def _leave(self, model: PreTrainedModel) -> None:
        self._entered.set({key: entry for key, entry in self._entered.get().items() if key != id(model)})
        self._release(model)

    def _unapply(self, model: PreTrainedModel) -> None:
        del self._applied[model]
        self._release(model)

    def _hold(self, model: PreTrainedModel) -> None:
        if model not in self._users:
            self._takers[model] = self._attach(model)
        self._users[model] = self._users.get(model, 0) + 1

    def _release(self, model: PreTrainedModel) -> None:
        with _lock:
            self._users[model] -= 1
            if self._users[model] == 0:
                del self._users[model]
                for take_off in self._takers.pop(model):
                    take_off()


def _refuse_compiled(model: object, name: str) -> None:
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None)
    if compiled:
        raise TypeError(
            f"{name} was given a compiled model, whose graph cannot be changed any more; apply the switch to the model "
            "first and call torch.compile afterwards"
        )
