"""The home of all pages: what there is to see, and the way there."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import gradio as gr

from ..errors import UsageError
from .host import Host

__all__ = ["NAMES", "build"]

# In the order of the bar on top; each is a module of this package with TITLE, ABOUT and `page(host, blocks)`.
NAMES = ("see", "generate", "ask", "look", "models", "results")

_WELCOME = """# attnsuite
Published attention, on your own pictures: what each method attends to, and what changes when it is switched off.
"""


def build(host: Host, name: str | None = None) -> gr.Blocks:
    """All pages under one roof, or one of them alone.

    Args:
        host: The server that they are for.
        name: One of `NAMES`; None for all.

    Returns:
        The app, not yet launched.

    Raises:
        UsageError: There is no such page.
    """
    if name is not None and name not in NAMES:
        raise UsageError(f"there is no demo called {name!r}: expected one of {', '.join(NAMES)}, or none for all")
    pages: dict[str, Any] = {one: import_module(f".{one}", __package__) for one in (NAMES if name is None else [name])}
    blocks = gr.Blocks(title="attnsuite", analytics_enabled=False, delete_cache=(300, 3600))
    if name is not None:
        with blocks:
            gr.Markdown(f"# {pages[name].TITLE}\n{pages[name].ABOUT}")
            pages[name].page(host, blocks)
        return blocks
    with blocks:
        _home(pages)
    for one, page in pages.items():
        with blocks.route(page.TITLE, f"/{one}"):
            gr.Markdown(f"# {page.TITLE}\n{page.ABOUT}")
            page.page(host, blocks)
    return blocks


def _home(pages: dict[str, Any]) -> None:
    gr.Markdown(_WELCOME)
    cards = "".join(
        f'<a class="card" href="{one}"><strong>{page.TITLE}</strong><span>{page.ABOUT}</span></a>'
        for one, page in pages.items()
    )
    gr.HTML(f'<nav class="cards" aria-label="Pages">{cards}</nav>')
