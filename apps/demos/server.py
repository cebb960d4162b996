"""The web server of the demos: its limits, and how it starts."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..errors import UsageError
from .home import build
from .host import Host, Settings

__all__ = ["Serving", "launch"]

_FIRST_PORT = 7860
_CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.cards .card { display: flex; flex-direction: column; gap: .4rem; padding: 1rem; border-radius: .6rem;
    border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
    color: var(--body-text-color); text-decoration: none; }
.cards .card:hover, .cards .card:focus-visible { border-color: var(--color-accent); }
"""


@dataclass(frozen=True)
class Serving:
    """Where and for whom pages are served.

    Attributes:
        host: Address to listen at.
        port: Port; None for the first free one from 7860.
        auth: User and password that are asked for.
        share: Whether a public address is made by Gradio's tunnel.
        mcp: Whether agents may call the pages as tools.
        queue: How many requests may wait; more are refused politely.
        per_client: How many requests one client may have waiting or running.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    auth: tuple[str, str] | None = None
    share: bool = False
    mcp: bool = False
    queue: int = 32
    per_client: int = 4


def launch(serving: Serving, settings: Settings, name: str | None = None) -> tuple[gr.Blocks, str]:
    """Starts the server in threads of its own.

    Args:
        serving: Where and for whom.
        settings: Of the pages.
        name: One page alone; None for all.

    Returns:
        The app and its address.

    Raises:
        UsageError: The port is taken, or the page does not exist.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="attnsuite-demo-"))
    blocks = build(Host(settings), name)
    blocks.queue(max_size=serving.queue, api_open=False, default_concurrency_limit=settings.workers)
    theme = _theme()
    try:
        _, address, _ = blocks.launch(
            server_name=serving.host,
            server_port=serving.port or _free_port(serving.host),
            auth=serving.auth,
            share=serving.share,
            mcp_server=serving.mcp,
            max_file_size=f"{settings.max_megabytes}mb",
            prevent_thread_lock=True,
            inbrowser=False,
            show_error=True,
            quiet=True,
            ssr_mode=False,
            run_history=False,
            footer_links=["api", "settings"],
            theme=theme,
            css=_CSS,
        )
    except OSError as error:
        raise UsageError(f"{serving.host}:{serving.port or 7860} cannot be listened at: {error}") from error
    return blocks, address


def _theme() -> Any:
    """Gradio's own look in fonts that every machine has, where its greys and orange are too pale to read, darker."""
    theme: Any = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    primary = {f"button_primary_background_fill{dark}": "*primary_700" for dark in ("", "_dark")}
    hovered = {f"button_primary_background_fill_hover{dark}": "*primary_800" for dark in ("", "_dark")}
    return theme.set(body_text_color_subdued="*neutral_600", **primary, **hovered)


def _free_port(host: str) -> int | None:
    """The first port from 7860 that nobody listens at; None if all of a hundred are taken, which is then said."""
    for port in range(_FIRST_PORT, _FIRST_PORT + 100):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, port))
            except OSError:
                continue
            return port
    return None
