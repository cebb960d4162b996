"""How a function becomes a verb of the command: its options in groups, each way it can end an exit code and a line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import typer

from weights import WeightsError

from .errors import Stopped, UsageError
from .options import Debug

__all__ = ["verb"]


def verb(function: Callable[..., int | None]) -> Callable[..., None]:
    """Makes a typer command of a function.

    A parameter whose type is a dataclass is a group of options: typer is shown its fields, and the function gets the
    group filled in. `--debug` comes with every verb.

    Args:
        function: Takes groups and single options; returns the exit code, or None for 0.

    Returns:
        What `app.command()` takes.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}

    @functools.wraps(function)
    def command(debug: bool = False, **given: Any) -> None:
        with _guarded(debug):
            for name, kind in groups.items():
                given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
            raise typer.Exit(function(**given) or 0)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        parameters += [_keyword(parameter.name, hints, parameter.default)] if group is None else _fields(group)
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug))
    described: Any = command
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return described


def _fields(group: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters."""
    hints = get_type_hints(group, include_extras=True)
    return [
        _keyword(field.name, hints, inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(group)
    ]


def _keyword(name: str, hints: dict[str, Any], default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])


@contextlib.contextmanager
def _guarded(debug: bool) -> Iterator[None]:
    """Turns every way a verb can end into its exit code and one line; `--debug` lets errors through."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        # The reader has gone, as in `attnsuite … | head`; Python must not try to flush to it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except (UsageError, Stopped, WeightsError) as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 2)) from None
    except Exception as error:
        if debug:
            raise
        typer.echo(f"internal error: {type(error).__name__}: {error} (--debug shows where)", err=True)
        raise typer.Exit(3) from None
