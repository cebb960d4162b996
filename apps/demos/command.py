"""The verb `attnsuite demo`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import ipaddress
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Annotated

import typer

from ..errors import UsageError
from .folder import cleaned, own_folder

__all__ = ["demo", "read_auth"]

_KEPT_SECONDS = 3600


def demo(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One page alone: see, generate, ask, look, models or results; else all.", show_default=False
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Else the first free one from 7860.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASS",
            envvar="ATTNSUITE_DEMO_AUTH",
            help="Ask visitors for these, at the API and files, too. Given here, other users of this machine see it in "
            "the list of processes; in the variable they do not.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="A public address, by Gradio's tunnel.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="What the page NAME starts with.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where models run: auto, cpu, cuda, cuda:1.")] = "auto",
    max_models: Annotated[int, typer.Option(min=1, help="Models in memory at once; idle ones are dropped.")] = 3,
    allow_local: Annotated[
        bool, typer.Option("--allow-local", help="Visitors may load local-dir:FOLDER, any folder of this machine.")
    ] = False,
    mcp: Annotated[bool, typer.Option("--mcp", help="Agents may call the pages as tools, by MCP.")] = False,
    per_client: Annotated[
        int, typer.Option(min=1, help="Requests that one tab or program may have waiting or running.")
    ] = 4,
    per_address: Annotated[
        int, typer.Option(min=1, help="The same for one address, of which many visitors may come through a router.")
    ] = 16,
) -> None:
    """Web pages on which to see each method on one's own pictures.

    Example: attnsuite demo

    Example: attnsuite demo see --model litv2_small --port 8000
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("the demos need Gradio, which is not installed: pip install 'attnsuite[demo]'")
    if model is not None and name is None:
        raise UsageError("--model is what one page starts with: give its name, such as attnsuite demo see --model …")
    user = None if auth is None else read_auth(auth)
    if device not in ("auto", "cpu"):
        from ..batch.stage import pick_device

        pick_device(device)
    _keep_memory_flat()
    with _stoppable() as stopped, own_folder() as folder:
        from .host import Settings
        from .server import Serving, launch

        serving = Serving(host, port, user, share, mcp, per_client=per_client, per_address=per_address)
        blocks, address = launch(serving, Settings(model, device, max_models, allow_local=allow_local), name)
        public = f", for everybody at {blocks.share_url}" if blocks.share_url else ""
        agents = f", for agents at {address}gradio_api/mcp/" if mcp else ""
        typer.echo(f"attnsuite demo at {address}{public}{agents} (stop with Ctrl-C)", err=True)
        if user is None and not _is_loopback(host):
            typer.echo("warning: whoever reaches this machine can use it; --auth USER:PASS asks for more", err=True)
        with cleaned(folder, _KEPT_SECONDS):
            stopped.wait()
        blocks.close(verbose=False)
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(0)  # a model at work would keep the process until it is done; what it makes nobody will get


def _keep_memory_flat() -> None:
    """Has glibc share two arenas among all threads, and give back what is free.

    Left to itself it makes an arena for each thread, and a server has many: results of thousands of requests leave
    holes in all of them, and the process grows without holding anything.
    """
    arena_max, trim_threshold = -8, -1  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(arena_max, 2)
        libc.mallopt(trim_threshold, 1 << 17)


@contextlib.contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Turns Ctrl-C, and what systems send to end a process, into an event; the second time it ends at once."""
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + signum)
        stopped.set()

    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]  # else nohup asked for that
    before = {signum: signal.signal(signum, stop) for signum in heeded}
    try:
        yield stopped
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_auth(text: str) -> tuple[str, str]:
    """Reads `USER:PASS`.

    Raises:
        UsageError: One of the two is missing.
    """
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UsageError("--auth or ATTNSUITE_DEMO_AUTH: expected USER:PASS, neither of them empty")
    return user, password
