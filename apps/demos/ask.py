"""Ask: a question to a vision-language model about a picture, with changes of its attention on and off."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from .downloads import as_csv, handed_out, within_html
from .host import Host, said
from .permalink import restore, write
from .uploads import chosen, picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from .asking import Replied

__all__ = ["ABOUT", "QUESTIONS", "TITLE", "page"]

TITLE = "Ask"
ABOUT = "What a vision-language model answers about your picture, and how changes of its attention change that."

_SHIPPED_NOTE = """The models that ship are small: they know drawn scenes of coloured shapes, and 85 words to ask about
them. With MMA on, the one answers that was trained under it. `attnsuite demo ask --model OWNER/NAME` asks a large
one."""
QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "scenes": [
        ("scene 1", "what colour is the diamond? answer in one word"),
        ("scene 1", "what shape is the purple object? answer in a sentence"),
        ("scene 1", "what colour has the same shape as the red cross? answer in one word"),
        ("scene 2", "what colour is the heart? answer as json"),
        ("scene 2", "what shape is the green object? answer in capitals"),
        ("scene 2", "what shape has the same colour as the blue heart? answer in one word"),
        ("scene 3", "what shape is the blue object? answer in one word"),
        ("scene 3", "what colour is the smallest object? answer in one word"),
        ("scene 4", "what colour is the circle? answer in a sentence"),
        ("scene 4", "what shape is the yellow object? answer in one word"),
    ],
    "photographs": [
        ("cat", "What animal is this?"),
        ("coffee", "What is in the cup, and what lies beside it?"),
        ("astronaut", "What is the person wearing?"),
        ("rocket", "Where was this picture taken?"),
    ],
}
"""Samples with questions that are ready: for the models that ship those that they answer rightly, and for others."""

_HEADERS = ["Asked", "Image tokens", "Answer tokens", "First token, ms", "KV cache, kB", "Activations, MB"]
_WIDTHS: list[int | str] = [185, 95, 95, 95, 100, 135]
_COLUMNS = (
    "under", "model", "answer", "image_tokens", "kept_tokens", "answer_tokens", "prefill_ms", "cache_kb",
    "activations_mb",
)  # fmt: skip
_LEGENDS = {
    "read": "Over the picture: what the answer reads of it, mean of all layers and heads; bright is most.",
    "merged": "Image tokens: clear if kept, in one colour if merged into one (at the dot), dark if dropped.",
}
_NOT_DRAWN = "Where the image tokens of this model lie in a picture is not known: nothing is drawn."
_GRID = "display:grid;grid-template-columns:repeat(auto-fit,minmax(max(8.5rem,30%),1fr));gap:.6rem"
_CARD = "border:1px solid var(--border-color-primary);border-radius:.5rem;padding:.6rem .8rem;overflow-wrap:anywhere"
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def page(host: Host, blocks: gr.Blocks) -> None:
    """Draws the page.

    Args:
        host: The server.
        blocks: What holds the page.
    """
    kind, note = "scenes", _SHIPPED_NOTE
    if host.settings.model is not None:
        from .asking import check

        label = check(host)
        if not label.startswith("scene_vlm/"):
            kind, note = "photographs", f"Asked is <code>{html.escape(label)}</code>."
    gr.Markdown(note)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image, sample = picture("ask", kind)
            controls, ready = _controls(kind)
            run = gr.Button("Ask", variant="primary", elem_id="ask-run")
        with gr.Column(scale=3, min_width=300):
            outputs = _outputs()

    def begin(at: int | None) -> list[Any]:
        return [gr.skip()] * 2 if at is None else list(QUESTIONS[kind][at])  # None: a list that was closed again

    ready.input(begin, ready, [sample, controls["question"]], **_PRIVATE)
    event = gr.on(
        [run.click, controls["question"].submit],
        _asker(host, kind),
        [image, sample, *controls.values()],
        [*outputs.values()],
        api_name="ask",
        show_progress_on=outputs["answers"],
        **host.heavy,
    )
    link = {"sample": sample, **controls}
    write(event, link)
    restore(blocks, link, "ask-run")


def _controls(kind: str) -> tuple[dict[str, Any], gr.Dropdown]:
    """The controls below the picture, by the names of the API; and the questions that are ready."""
    choices = [(f"{sample}: {question}", at) for at, (sample, question) in enumerate(QUESTIONS[kind])]
    ready = gr.Dropdown(choices, value=None, label="Ready-made questions", elem_id="ask-ready", filterable=False)
    question = gr.Textbox(label="Question", placeholder=QUESTIONS[kind][0][1], max_length=500, elem_id="ask-question")
    mma = gr.Checkbox(label="MMA: image tokens read the question, too", elem_id="ask-mma")
    cmai = gr.Checkbox(label="CMAI: words read only what bears on them", elem_id="ask-cmai")
    vmtc = gr.Slider(
        0.05, 1, value=1, step=0.05, label="VMTC: keep this share of the image tokens, merge the others",
        info="1 keeps all: off", elem_id="ask-vmtc",
    )  # fmt: skip
    with gr.Accordion("More", open=False):
        most = gr.Slider(1, 256, value=32, step=1, label="Tokens of an answer, at most", elem_id="ask-tokens")
    return {"question": question, "mma": mma, "vmtc": vmtc, "cmai": cmai, "max_tokens": most}, ready


def _outputs() -> dict[str, Any]:
    answers = gr.HTML(
        "<p>Answers come here: without switches, and with those that are on.</p>",
        label="Answers",
        show_label=False,
        elem_id="ask-answers",
        min_height=80,
    )
    costs = gr.Dataframe(
        headers=_HEADERS,
        label="What each answer takes",
        elem_id="ask-costs",
        interactive=False,
        wrap=True,
        column_widths=_WIDTHS,
    )
    with gr.Row():
        pictures = gr.DownloadButton("Pictures, ZIP", elem_id="ask-zip", size="sm")
        table = gr.DownloadButton("Rows, CSV", elem_id="ask-csv", size="sm")
    facts = gr.JSON(label="All of it as JSON", visible=False)
    return {"answers": answers, "costs": costs, "pictures": pictures, "table": table, "facts": facts}


def _asker(host: Host, kind: str) -> Any:
    def ask(
        image: str | None = None,
        sample: str = "",
        question: str = "",
        mma: bool = False,
        vmtc: float = 1,
        cmai: bool = False,
        max_tokens: int = 32,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio is asked for it
    ) -> tuple[Any, ...]:
        """What a vision-language model answers about a picture, plain and with changes of its attention.

        Args:
            image: The picture, a file.
            sample: Name of a sample to take instead, such as "scene 1".
            question: About the picture.
            mma: Modality-mutual attention: image tokens read the question, too.
            vmtc: Share of the image tokens that visual token compression keeps, above 0; 1 for all.
            cmai: Cross-modality attention inhibition: words read only what bears on them.
            max_tokens: Tokens of an answer, at most, 1 to 256.
        """
        with said():
            from . import asking

            read = chosen(image, sample, kind, host.settings)
            switches = asking.switches_of(mma, vmtc, cmai)
            replies = asking.ask(host, read, question or "", switches, int(max_tokens or 0), progress)
            asked = {"question": question.strip()}
            rows = [asked | {name: getattr(reply, name) for name in _COLUMNS} for reply in replies]
            files = handed_out("asked.zip", asking.packed(replies)), handed_out("answers.csv", as_csv(rows))
            facts = asked | {"answers": rows, "unknown_words": _unknown(replies)}
            return _cards(replies), _table(replies), *files, facts

    return ask


def _table(replies: Sequence[Replied]) -> list[list[Any]]:
    return [
        [
            one.under, f"{one.kept_tokens} of {one.image_tokens}", one.answer_tokens, round(one.prefill_ms, 1),
            round(one.cache_kb, 1), round(one.activations_mb, 2),
        ]
        for one in replies
    ]  # fmt: skip


def _unknown(replies: Sequence[Replied]) -> list[str]:
    return [*dict.fromkeys(word for reply in replies for word in reply.unknown)]


def _cards(replies: Sequence[Replied]) -> str:
    """The answers side by side, as HTML; what they say is text, not markup."""
    cards, drawn = "", list[str]()
    for reply in replies:
        answer = html.escape(reply.answer) or "<em>nothing</em>"
        kept = f"{reply.kept_tokens} of {reply.image_tokens} image tokens, {reply.prefill_ms:.1f} ms"
        cards += (
            f'<section style="{_CARD}"><strong>{html.escape(reply.under)}</strong>'
            f'<p class="answer" style="font-size:1.2em;margin:.3rem 0">{answer}</p>'
            f"<small>{html.escape(reply.model)}<br>{kept}</small>"
        )
        for drawing, kind, what in (
            (reply.read, "read", "What the answer reads of the picture"),
            (reply.merged, "merged", "Image tokens kept and merged"),
        ):
            if drawing is not None:
                cards += _shown(drawing, kind, f"{what}, {reply.under}")
                drawn.append(_LEGENDS[kind])
        cards += "</section>"
    unknown = ", ".join(_unknown(replies))
    note = f"<p>The model does not know: {html.escape(unknown)}.</p>" if unknown else ""
    legend = "".join(f'<p style="margin:.5rem 0 0">{one}</p>' for one in dict.fromkeys(drawn or [_NOT_DRAWN]))
    return f'{note}<div style="{_GRID}" role="group" aria-label="Answers">{cards}</div>{legend}'


def _shown(drawing: Image, kind: str, words: str) -> str:
    """A picture within HTML."""
    return (
        f'<img class="{kind}" src="{within_html(drawing)}" alt="{html.escape(words)}" '
        f'style="width:100%;max-width:22rem;margin-top:.5rem;border-radius:.3rem">'
    )
