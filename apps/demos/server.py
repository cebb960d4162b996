"""The web server of the demos: its limits, and how it starts."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from typing import Any, cast

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ..errors import UsageError
from .gate import Gate, check_files
from .home import build
from .host import Host, Settings, said
from .ports import listenable
from .turns import bound

__all__ = ["Serving", "launch"]

_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    # Gradio keeps the times of so many requests, and at every so many goes through all of them; nobody looks at that
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000",
}
_FIXED: dict[str, Any] = {
    "prevent_thread_lock": True,
    "inbrowser": False,
    "show_error": True,
    "quiet": True,
    "ssr_mode": False,
    "num_workers": 0,
    "run_history": False,
    "enable_monitoring": False,
    "footer_links": ["api", "settings"],
}
_SESSIONS = 100  # of which Gradio remembers what they last saw: some megabytes each
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
        per_client: How many requests one client may have waiting or running; see `turns.bound`.
        per_address: How many requests from one address may be waiting or running.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    auth: tuple[str, str] | None = None
    share: bool = False
    mcp: bool = False
    queue: int = 32
    per_client: int = 4
    per_address: int = 16


def launch(serving: Serving, settings: Settings, name: str | None = None) -> tuple[gr.Blocks, str]:
    """Starts the server in threads of its own.

    Args:
        serving: Where and for whom.
        settings: Of the pages.
        name: One page alone; None for all.

    Returns:
        The app and its address.

    Raises:
        UsageError: This machine cannot listen there, there is no such page, or no public address is to be had.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    _reach_oneself()
    host, port = listenable(serving.host, serving.port)
    blocks = build(Host(settings), name)
    blocks.queue(max_size=serving.queue, api_open=False, default_concurrency_limit=settings.workers)
    bound(blocks._queue, serving.per_client, serving.per_address)
    folder = get_upload_folder()
    _check_inputs(blocks, folder)
    pages = tuple(f"/{path}" for path, *_ in blocks.pages)
    gate = Middleware(cast(Any, Gate), folder, settings.max_megabytes, serving.auth, pages)
    try:
        # Gradio's own lines about sharing and agents; the verb prints one that says it all
        with contextlib.redirect_stdout(io.StringIO()):
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                auth=serving.auth,
                share=serving.share,
                mcp_server=serving.mcp,
                max_file_size=f"{settings.max_megabytes}mb",
                app_kwargs={"middleware": [gate]},
                state_session_capacity=_SESSIONS,
                theme=_theme(),
                css=_CSS,
                **_FIXED,
            )
    except OSError as error:
        raise UsageError(f"{serving.host}:{port} cannot be listened at: {error}") from error
    if serving.share and not blocks.share_url:
        blocks.close(verbose=False)
        raise UsageError("--share: Gradio gave no public address; is this machine connected to the internet?")
    if serving.mcp:
        _let_agents_in(blocks, serving, address)
    return blocks, address


def _reach_oneself() -> None:
    """Gradio asks its own server whether it runs; a proxy for the world outside must not be asked that."""
    for variable in ("NO_PROXY", "no_proxy"):
        given = [part for part in os.environ.get(variable, "").split(",") if part]
        os.environ[variable] = ",".join(dict.fromkeys([*given, "127.0.0.1", "localhost", "::1"]))


def _check_inputs(blocks: gr.Blocks, folder: str) -> None:
    """Before a handler gets its inputs, by whichever route: Gradio would fetch addresses, and tell of its insides."""
    preprocess = blocks.preprocess_data

    async def checked(block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        with said():
            check_files(inputs, folder)
            try:
                return await preprocess(block_fn, inputs, *args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise UsageError(f"these inputs are not what this takes ({str(error).strip()[:200]})") from error

    setattr(blocks, "preprocess_data", checked)  # noqa: B010 - of these


def _let_agents_in(blocks: gr.Blocks, serving: Serving, address: str) -> None:
    """Gradio calls tools through a client of its own, which does not log in and would send files of this machine."""
    from gradio_client import Client

    server: Any = blocks.mcp_server_obj
    if server is None:
        raise UsageError("--mcp: the package for it is missing: pip install 'gradio[mcp]'")
    read = server.convert_strings_to_filedata

    def converted(value: Any, positions: Any) -> Any:
        check_files(value, get_upload_folder())
        return read(value, positions)

    server.convert_strings_to_filedata = converted
    server.pop_returned_state = _without_states
    if serving.auth is not None:
        server._client_instance = Client(
            address,
            auth=serving.auth,
            headers={"x-gradio-user": "mcp"},
            download_files=False,
            verbose=False,
            analytics_enabled=False,
            _skip_components=False,
        )


def _without_states(outputs: Any, data: list[Any]) -> list[Any]:
    """What a tool hands out. Gradio drops states by their place, also where its own client has left them out before."""
    states = {place for place, output in enumerate(outputs) if isinstance(output, gr.State)}
    if len(data) == len(outputs) - len(states):
        return data
    return [value for place, value in enumerate(data) if place not in states]


def _theme() -> Any:
    """Gradio's own look in fonts that every machine has, where its greys and orange are too pale to read, darker."""
    theme: Any = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    primary = {f"button_primary_background_fill{dark}": "*primary_700" for dark in ("", "_dark")}
    hovered = {f"button_primary_background_fill_hover{dark}": "*primary_800" for dark in ("", "_dark")}
    return theme.set(body_text_color_subdued="*neutral_600", **primary, **hovered)
