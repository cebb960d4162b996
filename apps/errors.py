"""The two ways a command ends early, each with its exit code; anything else that escapes is a defect."""

from __future__ import annotations

__all__ = ["Interrupted", "Stopped", "UsageError", "in_one_line"]

_LONGEST = 300  # libraries put whole headers of files into their messages


class UsageError(Exception):
    """The command cannot start as it was given (exit code 2); the message says what to change."""

    exit_code = 2


class Stopped(Exception):
    """A run ended before its last input (exit code 3); the message says why and how to go on."""

    exit_code = 3


class Interrupted(Stopped):
    """A run was asked to stop by a signal and did so after a whole batch (exit code 128 + signal)."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def in_one_line(error: BaseException) -> str:
    """What an error says, cut to size, without line breaks and characters that cannot be printed."""
    words = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
