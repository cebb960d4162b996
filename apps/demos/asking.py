"""A question to a vision-language model, without switches, with all that are on, and with each alone: what changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from multimodal.draw import draw_merged, seen_part
from multimodal.grids import picture_grids, places_known
from multimodal.layout import cache_of, find_layout

from ..ask.asker import Answer, Asker
from ..ask.models import SHIPPED, VLM, ResolvedVLM, VLMChoice, dtype_on
from ..ask.switches import Switches
from ..batch.stage import pick_device
from ..errors import UsageError
from .alive import Alive
from .downloads import as_png, as_zip
from .host import Host

__all__ = ["MOST_LETTERS", "MOST_TOKENS", "Replied", "ask", "check", "packed", "switches_of", "variants"]

MOST_LETTERS = 500
MOST_TOKENS = 256
_DRAWN_SIZE = 768  # pixels of the longer side


@dataclass(frozen=True)
class Replied:
    """What a model answered under some switches, and what that took.

    Attributes:
        under: Names of the switches; "plain" without.
        model: What the model is called.
        answer: The answer.
        image_tokens: Of the prompt.
        kept_tokens: Those of them that the language model was given.
        answer_tokens: Of the answer, with what ends it.
        prefill_ms: Time to the first token, the median of three; other models of the server may be busy beside it.
        cache_kb: Of keys and values that the prompt leaves, exactly.
        activations_mb: The most that results of operators held at once up to the first token.
        read: What the answer read of the picture, over it; None where the places of image tokens are not known.
        merged: Image tokens kept and merged, over the picture; None where none were.
        unknown: Words of the question that a model does not know that knows few.
    """

    under: str
    model: str
    answer: str
    image_tokens: int
    kept_tokens: int
    answer_tokens: int
    prefill_ms: float
    cache_kb: float
    activations_mb: float
    read: Image.Image | None
    merged: Image.Image | None
    unknown: Sequence[str] = ()


def switches_of(mma: bool, vmtc: float, cmai: bool) -> Switches:
    """Switches as the page has them.

    Args:
        mma: Modality-mutual attention.
        vmtc: Share of the image tokens that is kept; 1 for all.
        cmai: Cross-modality attention inhibition.

    Raises:
        UsageError: The share is none.
    """
    if vmtc is None or not 0 < vmtc <= 1:
        given = "nothing" if vmtc is None else f"{vmtc:g}"
        raise UsageError(f"VMTC is to keep {given} of the image tokens: expected a share above 0, and 1 for all")
    return Switches(bool(mma), None if vmtc == 1 else float(vmtc), bool(cmai))


def variants(switches: Switches) -> list[Switches]:
    """None of some switches, all together, and where these are several, each alone."""
    alone = [Switches(mma=True)] if switches.mma else []
    alone += [] if switches.vmtc is None else [Switches(vmtc=switches.vmtc)]
    alone += [Switches(cmai=True)] if switches.cmai else []
    return [Switches(), *([switches] if len(alone) > 1 else []), *alone]


def check(host: Host) -> str:
    """Finds the model that the server was started with.

    Returns:
        What it is called.

    Raises:
        UsageError: It is none that can be asked.
    """
    return _resolved(host.settings.model, False, host.settings.device).label


def ask(
    host: Host, picture: Image.Image, question: str, switches: Switches, max_tokens: int, progress: gr.Progress
) -> list[Replied]:
    """Asks with and without switches; first without.

    Where the models that ship answer, it is the one that was trained under modality-mutual attention that answers
    under it, as in `attnsuite ask`.

    Args:
        host: The server.
        picture: RGB.
        question: About it.
        switches: Those that are on.
        max_tokens: Of an answer.
        progress: Told what is done.

    Raises:
        UsageError: There is no question, it is too long, or the model cannot be asked so.
    """
    question = question.strip()
    if not question:
        raise UsageError("there is no question yet: type one, or choose one of those that are ready")
    if len(question) > MOST_LETTERS:
        raise UsageError(f"the question has {len(question)} characters: at most {MOST_LETTERS} are taken")
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise UsageError(f"an answer of {max_tokens} tokens: expected 1 to {MOST_TOKENS}")
    asked = variants(switches)
    replies: dict[Switches, Replied] = {}
    pair = host.settings.model is None or host.settings.model in SHIPPED.values()
    for trained in (False, True) if pair else (False,):  # one model after the other: of a pool only one may be lent
        own = [one for one in asked if not pair or one.mma == trained]
        if not own:
            continue
        with _borrowed(host, trained, progress) as network:
            asker = Asker(network.module, network.processor, max_tokens)
            for one in own:
                progress((len(replies) + 0.5) / len(asked), desc=f"Asking {network.label}: {_name(one)}")
                replies[one] = _reply(asker, network, picture, question, one)
    return [replies[one] for one in asked]


def packed(replies: Sequence[Replied]) -> bytes:
    """All pictures as an archive of PNG files, named by their switches."""
    files: dict[str, bytes] = {}
    for reply in replies:
        for what, drawn in (("reads", reply.read), ("tokens", reply.merged)):
            if drawn is not None:
                name = re.sub(r"[^a-z0-9.]+", "_", f"{reply.under}_{what}".lower())
                files[f"{name}.png"] = as_png(drawn)
    return as_zip(files)


def _name(switches: Switches) -> str:
    return " + ".join(switches.names) or "plain"


@functools.lru_cache(maxsize=8)
def _resolved(name: str | None, mma: bool, device: str) -> ResolvedVLM:
    """Found once: the files of a large model take long to go through."""
    pair = name is None or name in SHIPPED.values()
    found = VLMChoice(None if pair else name, mma, dtype=dtype_on(device)).resolve()
    local = not pair and Path(name or "").expanduser().is_dir()
    return replace(found, label=found.folder.name) if local else found  # where it lies is not for visitors


@contextmanager
def _borrowed(host: Host, mma: bool, progress: gr.Progress) -> Iterator[VLM]:
    """Lends the model that answers under modality-mutual attention, or without."""
    resolved = _resolved(host.settings.model, mma, host.settings.device)

    def load() -> VLM:
        progress(0, desc=f"Loading {resolved.label}")
        network = resolved.load(lambda received, total: None)
        network.module.to(pick_device(host.settings.device))
        return network

    key = ("vlm", resolved.label, resolved.identity)
    with host.pool.use(
        key, load, lambda: progress(0, desc=f"Waiting for others to be done with {resolved.label}")
    ) as it:
        yield it


def _reply(asker: Asker, network: VLM, picture: Image.Image, question: str, switches: Switches) -> Replied:
    switches.check(asker.model, network.label)
    small = picture.copy()
    small.thumbnail((_DRAWN_SIZE, _DRAWN_SIZE))
    try:
        inputs = asker.inputs(picture, question)
        answer = asker.answer(inputs, switches)
        milliseconds = asker.prefill_ms(inputs, switches)
        cache, activations = _memory(asker, inputs, switches)
        known = places_known(asker.model) and len(answer.tokens)
        read = asker.drawn(inputs, switches, answer.tokens, small) if known else None
        merged = _merged(asker, inputs, answer, small) if known else None
    except ValueError as error:  # of a processor or a switch that cannot do with this picture or question
        raise UsageError(f"{network.label} cannot be asked this, {_name(switches)}: {error}") from error
    return Replied(
        _name(switches), network.label, answer.text, answer.there, answer.kept, len(answer.tokens),
        milliseconds, round(cache / 1e3, 3), round(activations / 1e6, 3), read, merged,
        asker.unknown_words(question) if network.card else (),
    )  # fmt: skip


def _memory(asker: Asker, inputs: Any, switches: Switches) -> tuple[int, int]:
    """Bytes of the cache that a prompt leaves, and the most that was held on the way to it."""
    with switches.on(asker.model), Alive() as alive:
        cache = cache_of(asker.prefill(inputs))
    kept = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return sum(part.nbytes for part in kept), alive.most


def _merged(asker: Asker, inputs: Any, answer: Answer, picture: Image.Image) -> Image.Image | None:
    """Image tokens kept and merged; of a model that looks at tiles and at the whole, the finer ones."""
    if answer.compression is None:
        return None
    layout = find_layout(asker.model, inputs["input_ids"], inputs.get("attention_mask"))
    own = picture_grids(asker.model, inputs, layout)[0][0][0].cpu()
    into = answer.compression.pictures[0].target.cpu()[own]
    return draw_merged(seen_part(asker.processor, picture), own.numpy(), into.numpy())
