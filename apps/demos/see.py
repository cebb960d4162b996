"""See: what vision models attend to in a picture."""

import gradio as gr

from .host import Host, said
from .permalink import restore, write
from .uploads import chosen, picture

TITLE = "See"
ABOUT = "What a vision model attends to in your picture, two models side by side."


def page(host: Host, blocks: gr.Blocks) -> None:
    image, sample = picture("see", "photographs")
    run = gr.Button("Look", variant="primary", elem_id="see-run")
    out = gr.Textbox(label="Summary")

    def go(image: str | None, sample: str) -> str:
        with said():
            return str(chosen(image, sample, "photographs", host.settings).size)

    event = run.click(go, [image, sample], out, api_name="see", **host.heavy)
    write(event, {"sample": sample})
    restore(blocks, {"sample": sample}, "see-run")
