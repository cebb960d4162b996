"""Where a server can listen, found out before it tries, so that what is wrong can be said in a line."""

from __future__ import annotations

import errno
import socket

from ..errors import UsageError

__all__ = ["listenable"]

_FIRST = 7860
_TRIED = 100


def listenable(host: str, port: int | None) -> tuple[str, int]:
    """Checks an address, and finds a port where none is named.

    Args:
        host: Address or name of this machine.
        port: None for the first free one from 7860.

    Returns:
        The host as Gradio takes it, and the port.

    Raises:
        UsageError: This machine has no such address, or the port is taken or not for everybody.
    """
    host = host.strip().strip("[]")
    if not host:
        raise UsageError("--host: expected an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them")
    tried = [port] if port is not None else range(_FIRST, _FIRST + _TRIED)
    for one in tried:
        if _is_free(host, one):
            return f"[{host}]" if ":" in host else host, one
    if port is not None:
        raise UsageError(f"port {port} is taken: stop what listens there, or choose another with --port")
    raise UsageError(f"ports {_FIRST} to {_FIRST + _TRIED - 1} are all taken: choose another with --port")


def _is_free(host: str, port: int) -> bool:
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in places:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(place)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host}: this is no address or name that is known here") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} is not for ordinary users: choose one above 1023 with --port") from error
        raise UsageError(f"--host {host}: this machine cannot listen there ({error.strerror})") from error
    return True
