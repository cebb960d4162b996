"""Results: being built."""

import gradio as gr

from .host import Host

TITLE = "Results"
ABOUT = "Being built."


def page(host: Host, blocks: gr.Blocks) -> None:
    gr.Markdown(f"{host.settings.max_models}")
