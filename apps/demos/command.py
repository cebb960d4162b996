"""The verb `attnsuite demo`."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from ..errors import UsageError

__all__ = ["demo", "read_auth"]


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
        typer.Option(metavar="USER:PASS", help="Ask visitors for these, also at the API.", show_default=False),
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

    from .host import Settings
    from .server import Serving, launch

    settings = Settings(model, device, max_models, allow_local=allow_local)
    blocks, address = launch(Serving(host, port, user, share, mcp), settings, name)
    typer.echo(f"attnsuite demo at {address} (stop with Ctrl-C)", err=True)
    blocks.block_thread()


def read_auth(text: str) -> tuple[str, str]:
    """Reads `USER:PASS`.

    Raises:
        UsageError: One of the two is missing.
    """
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UsageError("--auth: expected USER:PASS, neither of them empty")
    return user, password
