"""Words of a prompt, and which of them are its subjects."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

__all__ = ["MOST_LETTERS", "among", "joined", "kept", "legend", "nouns", "words"]

MOST_LETTERS = 300
"""Of a prompt."""

_NOUNS = ("circle", "square", "triangle", "diamond")
_NO_SUBJECTS = ("a", "an", "and", "at", "in", "of", "on", "or", "the", "to", "under", "with")


def words(prompt: str) -> list[str]:
    """The words of a prompt, each once, in order, without those that cannot be subjects."""
    found = re.findall(r"[\w'-]+", prompt[:MOST_LETTERS])
    return [word for word in dict.fromkeys(found) if word.lower() not in _NO_SUBJECTS]


def nouns(prompt: str) -> list[str]:
    """Those of its words that the model that ships knows as things; nothing is known of other models."""
    return [word for word in words(prompt) if word.lower() in _NOUNS]


def among(prompt: str, subjects: Sequence[str]) -> list[str]:
    """The words of a prompt that are subjects."""
    return [word for word in words(prompt) if word in subjects]


def kept(prompt: str, subjects: Sequence[str]) -> list[str]:
    """Those of the subjects that stand in a prompt, which may be several words each."""
    return [one for one in subjects if one and re.search(rf"(?<!\w){re.escape(one)}(?!\w)", prompt, re.IGNORECASE)]


def joined(prompt: str, clicked: Sequence[str], subjects: Sequence[str]) -> list[str]:
    """The subjects once words were clicked: the words that are chosen now, in the order of the prompt, and phrases.

    Args:
        prompt: The text.
        clicked: Words of it that are chosen.
        subjects: Before. Those of several words have no word to click, and stay.
    """
    offered = words(prompt)
    return [*(word for word in offered if word in clicked), *(one for one in subjects if one not in offered)]


def legend(subjects: Sequence[str], colours: Mapping[str, str]) -> str:
    """Which colour is which subject's, as HTML.

    Args:
        subjects: The first has the first colour.
        colours: By name, as `"#rrggbb"`.
    """
    if not subjects:
        return "<p>Choose subjects first: each has a colour of its own.</p>"
    swatch = "display:inline-block;width:1em;height:1em;border-radius:.2em;vertical-align:-.1em;background:"
    shown = [
        f'<li><span style="{swatch}{colour}"></span> {name}: <strong>{html.escape(subject)}</strong></li>'
        for subject, (name, colour) in zip(subjects, colours.items(), strict=False)
    ]
    rest = ", ".join(html.escape(subject) for subject in subjects[len(colours) :])
    more = f"<li>no colour is left for {rest}: write a region instead</li>" if rest else ""
    style = "list-style:none;padding:0;margin:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem"
    return f'<ul style="{style}" aria-label="Colours">{"".join(shown)}{more}</ul>'
