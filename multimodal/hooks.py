"""Two places that a switch hangs on in a model of transformers, and how what it finds in the one gets to the other.

A prompt's tokens are seen where the model's forward begins; what is to act on them sits in its decoder, the language
model inside. :class:`Handover` takes what a hook at the first place finds to a hook at the second, within one forward
of one thread. :func:`around_generate` runs something around `generate`, whatever else does, and in whatever order
these come and go.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from transformers import PreTrainedModel

from .attention import uncompiled
from .layout import arguments_of

__all__ = ["Around", "Handover", "around_generate"]

Found = TypeVar("Found")

Around = Callable[[PreTrainedModel, Callable[..., Any], dict[str, Any]], Any]
"""Given the model, what goes on with `generate`, and the arguments by name; calls it with them, changed or not."""

_lock = threading.RLock()


@dataclass(frozen=True)
class _Forward(Generic[Found]):
    """A forward that runs: of the model with this decoder, inside another or not."""

    decoder: torch.nn.Module
    found: Found
    outer: _Forward[Found] | None


class Handover(Generic[Found]):
    """What a hook on a model finds before each forward, handed to a hook on its decoder.

    Args:
        name: What messages call the switch.
        find: Given the model and its forward's arguments by name. What it returns is handed over; None where the switch
            is off for this forward.
        begin: Given the decoder, its arguments by name and what was found, before the decoder's forward. Returns the
            arguments that it is run with.
        is_on: Whether the switch is on for a model, here and now: its decoder is then not to be run by itself.
        finish: Given the output of the model's forward and what was found, after one that went through.
    """

    def __init__(
        self,
        name: str,
        find: Callable[[PreTrainedModel, dict[str, Any]], Found | None],
        begin: Callable[[PreTrainedModel, dict[str, Any], Found], dict[str, Any]],
        is_on: Callable[[PreTrainedModel], bool],
        finish: Callable[[Any, Found], None] | None = None,
    ) -> None:
        self.name = name
        self._find, self._begin, self._is_on, self._finish = find, begin, is_on, finish
        self._running = ContextVar[_Forward[Found] | None](f"forward under {name}", default=None)
        self._owners = weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[PreTrainedModel]]()

    def attach(self, model: PreTrainedModel) -> Callable[[], None]:
        """Hangs the hooks; returns what takes them off. Hooks go by the module they are called for, so that a deep copy
        of the model has none that act."""
        decoder = model.get_decoder()
        self._owners[decoder] = weakref.ref(model)
        # Hooks read a context, which compiled graphs cannot.
        handles = [
            model.register_forward_pre_hook(uncompiled(self._before), with_kwargs=True),
            model.register_forward_hook(uncompiled(self._after), always_call=True),
            decoder.register_forward_pre_hook(uncompiled(self._before_decoder), with_kwargs=True),
        ]

        here = weakref.ref(decoder)  # an applied switch keeps no model alive

        def detach() -> None:
            for handle in handles:
                handle.remove()
            if (decoder := here()) is not None:
                self._owners.pop(decoder, None)

        return detach

    # Another thread may take a hook off while torch goes through them; torch then no longer knows that it takes kwargs.
    def _before(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None and (found := self._find(model, arguments_of(model, args, kwargs))) is not None:
            self._running.set(_Forward(model.get_decoder(), found, self._running.get()))

    def _after(self, model: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
        running = self._running.get()
        if running is not None and running.decoder is model.get_decoder():
            self._running.set(running.outer)
            if self._finish is not None and output is not None:  # None after an exception
                self._finish(output, running.found)

    def _before_decoder(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        running = self._running.get()
        if kwargs is None:
            return None
        if running is not None and running.decoder is decoder:
            return (), self._begin(decoder, arguments_of(decoder, args, kwargs), running.found)
        owner = self._owners.get(decoder, lambda: None)()
        if owner is not None and self._is_on(owner):
            raise RuntimeError(
                f"under {self.name} the language model of a {type(owner).__name__} was run by itself, so that nothing "
                "is known of images; call the whole model, and as model(…) rather than model.forward(…)"
            )
        return None


@dataclass(frozen=True)
class _Wrapped:
    around: Around
    outermost: bool


_wrapped = weakref.WeakKeyDictionary[PreTrainedModel, tuple[_Wrapped, ...]]()


def around_generate(model: PreTrainedModel, around: Around, *, outermost: bool = False) -> Callable[[], None]:
    """Runs `around` instead of the model's `generate`, until what is returned is called.

    Several can be around one model; the last to come is outside of the others, but inside of an `outermost` one.
    """
    entry = _Wrapped(around, outermost)
    with _lock:
        entries = _wrapped.get(model, ())
        if not entries:
            model.generate = types.MethodType(_generate, model)  # type: ignore[method-assign]
        _wrapped[model] = tuple(sorted((*entries, entry), key=lambda each: each.outermost))

    here = weakref.ref(model)

    def leave() -> None:
        with _lock:
            if (model := here()) is None:
                return
            _wrapped[model] = tuple(each for each in _wrapped[model] if each is not entry)
            if not _wrapped[model]:
                del _wrapped[model], model.generate

    return leave


def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model; of a deep copy too, about which `_wrapped` knows nothing."""
    call: Callable[..., Any] = functools.partial(cast(Any, type(self)).generate, self)
    for entry in _wrapped.get(self, ()):
        call = functools.partial(_inside, self, entry.around, call)
    return call(**dict(zip(_names(type(self)), args, strict=False)), **kwargs)


def _inside(model: PreTrainedModel, around: Around, call: Callable[..., Any], **given: Any) -> Any:
    return around(model, call, given)


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    """The arguments of a class's `generate`."""
    return tuple(inspect.signature(kind.generate).parameters)[1:]
