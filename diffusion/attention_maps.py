"""Cross-attention maps of a diffusion UNet: which pixels listen to which words, with a gradient if one is wanted.

`record(pipe)` listens to the cross-attention layers of one resolution while the network runs; `find_subjects` says at
which token positions the words of a prompt stand; `subject_maps` makes of both one map for each subject, as
Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826) prepares them and A-STAR (Agarwal et al., ICCV 2023,
arXiv 2306.14544) takes them.

The layers are listened to by forward hooks. The attention processors of the network (fused, sliced, LoRA, IP-Adapter)
stay in place and compute its output, so that what it returns is bit for bit what it returns otherwise, and the layers
that are not asked for cost nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

__all__ = ["AttentionRecorder", "attention_probabilities", "find_subjects", "prompt_end", "record", "subject_maps"]

_SIDE = 16
"""Positions along the shorter side below which a map is too coarse to tell two objects apart."""


def attention_probabilities(
    attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """The probabilities `softmax(q k^T / sqrt(d))` of a cross-attention layer, which fused kernels never form.

    Args:
        attn: a layer of diffusers.
        hidden_states: `[B, Q, C]`, or `[B, C, H, W]`, as the layer receives them.
        encoder_hidden_states: `[B, N, D]`, of the text.
        attention_mask: what is added to the scores, as the layer receives it.

    Returns:
        `[B, h, Q, N]`; rows sum to 1 over the tokens.
    """
    x, text = hidden_states, encoder_hidden_states
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)  # [B, Q, C]
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    to_q, to_k = cast(nn.Module, attn.to_q), cast(nn.Module, attn.to_k)
    q, k = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (to_q(x), to_k(text)))
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    mask = attention_mask
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, text.shape[1], len(x))
    probabilities = attn.get_attention_scores(q.flatten(0, 1), k.flatten(0, 1), mask)
    return probabilities.unflatten(0, (len(x), attn.heads))


@dataclass(frozen=True)
class _Layer:
    """A cross-attention layer and how often the latent was halved on the way to it."""

    name: str
    attn: Attention
    halvings: int


class _LastLayerReached(Exception):
    """Ends a forward pass of which nothing is needed but the maps; never leaves this module."""


class AttentionRecorder:
    """Holds the maps of the last forward pass. Made by `record`.

    Attributes:
        by_layer: a map `[B, H, W, N]` for each layer that was heard, averaged over its heads, in the order of the
            pass. `B` counts both halves where guidance runs them as one batch; the second half is the prompt's.
        grid: `(H, W)` of the maps of the last pass.
    """

    def __init__(
        self, unet: UNet2DConditionModel, resolution: int | tuple[int, int] | None, layers: Sequence[str] | None
    ):
        self.by_layer: dict[str, Tensor] = {}
        self.grid: tuple[int, int] = (0, 0)
        self.enabled = True
        self._unet = unet
        self._resolution = resolution
        self._layers = _cross_attention_layers(unet)
        self._names = layers
        self._wanted: list[_Layer] = []
        self._stops = False
        self._was_checkpointed: Any = None  # the block that checkpoints again after a pass that ends early
        _chosen(self._layers, layers)  # a name that no layer has is the caller's mistake, now and not at the first pass

    def maps(self) -> Tensor:
        """The mean over layers and heads, `[B, H, W, N]`; each position's row sums to 1 over the N tokens.

        Raises:
            RuntimeError: if nothing was heard since the last `record`.
        """
        if not self.by_layer:
            raise RuntimeError(
                "no attention map was recorded: run the UNet inside `record(...)`. A network compiled by torch.compile "
                "does not report to hooks; run it under `torch.compiler.set_stance('force_eager')`."
            )
        return torch.stack(list(self.by_layer.values())).mean(0)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Runs a forward pass of the network as far as its last recorded layer, and no further; the maps.

        Args:
            forward: `unet.forward`, or a function that calls the network.
            *args: its arguments.
            **kwargs: its keyword arguments.
        """
        self._stops = True
        try:
            forward(*args, **kwargs)
        except _LastLayerReached:
            pass
        finally:
            self._stops = False
            self._checkpoint_last_again()
        return self.maps()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A pass begins: its latent has the size from which the grid of each layer follows."""
        if not self.enabled:
            return
        self.by_layer = {}
        height, width = args[0].shape[-2:]
        grids = {layer.halvings: _halved(height, width, layer.halvings) for layer in self._layers}
        level = _level(grids, self._resolution)
        self.grid = grids[level]
        self._wanted = [layer for layer in _chosen(self._layers, self._names) if layer.halvings == level]
        if not self._wanted:
            raise ValueError(
                f"none of layers={list(self._names or ())} has maps of {self.grid}; layers that have: "
                f"{[layer.name for layer in self._layers if layer.halvings == level]}"
            )
        if self._stops:
            self._do_not_checkpoint_last()

    def _hear(self, layer: _Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled or layer not in self._wanted:
            return
        received = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | kwargs
        text = received["encoder_hidden_states"]
        text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter hands its images on beside the text
        probabilities = attention_probabilities(
            layer.attn, received["hidden_states"], text, received.get("attention_mask")
        )
        if probabilities.shape[2] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"{layer.name} has {probabilities.shape[2]} positions where {self.grid[0]} x {self.grid[1]} were "
                "expected: the UNet does not halve its latent as UNet2DConditionModel does"
            )
        self.by_layer[layer.name] = probabilities.mean(1).unflatten(1, self.grid)  # [B, H, W, N]
        if self._stops and layer is self._wanted[-1]:
            raise _LastLayerReached

    # A checkpointed block must be left by its end, or the pass backward cannot run it again. So the one block in which
    # the pass stops keeps what it computes.

    def _last_block(self) -> nn.Module:
        return self._unet.get_submodule(self._wanted[-1].name.partition(".transformer_blocks")[0])

    def _do_not_checkpoint_last(self) -> None:
        block = self._last_block()
        self._was_checkpointed = block if getattr(block, "gradient_checkpointing", False) else None
        if self._was_checkpointed is not None:
            self._was_checkpointed.gradient_checkpointing = False

    def _checkpoint_last_again(self) -> None:
        if self._was_checkpointed is not None:
            self._was_checkpointed.gradient_checkpointing = True
            self._was_checkpointed = None


@contextmanager
def record(
    model: Any, *, resolution: int | tuple[int, int] | None = None, layers: Sequence[str] | None = None
) -> Iterator[AttentionRecorder]:
    """Listens to the cross-attention of one resolution while the network runs.

    Args:
        model: a pipeline of diffusers with a UNet, or its `UNet2DConditionModel`; also one that is compiled, as long
            as it runs eagerly inside.
        resolution: which maps: their shorter side, or `(H, W)`. Without it the coarsest level that still has 16
            positions along the shorter side: 16 x 16 for Stable Diffusion at 512 px, 24 x 24 at 768 px, 32 x 32 for
            SDXL at 1024 px; the finest level where none has so many.
        layers: only layers whose names begin so, as `["up_blocks.1", "down_blocks.2.attentions.0"]`. Without it all
            of that resolution.

    Yields:
        A recorder; `recorder.maps()` are those of the last pass. They carry a graph where the pass had one. On exit
        the network is what it was.

    Raises:
        TypeError: if the model has no UNet with cross-attention.
        ValueError: if no layer has such a name or, once the network runs, such a resolution.
    """
    unet = _unet_of(model)
    recorder = AttentionRecorder(unet, resolution, layers)
    handles = [unet.conv_in.register_forward_pre_hook(recorder._begin)]
    for layer in recorder._layers:
        hear = partial(recorder._hear, layer)
        handles.append(layer.attn.register_forward_pre_hook(hear, with_kwargs=True))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _unet_of(model: Any) -> UNet2DConditionModel:
    """The UNet of a pipeline, without the wrapper that torch.compile may have put around it."""
    unet = getattr(model, "unet", model)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        inner = getattr(model, "transformer", None)
        found = type(model).__name__ + (f" with {type(inner).__name__}" if inner is not None else "")
        raise TypeError(
            f"attention maps are recorded in a UNet2DConditionModel (Stable Diffusion 1.x and 2.x, SDXL, and their "
            f"image-to-image, inpainting and ControlNet pipelines); got {found}, whose attention mixes text and image "
            "in one softmax or is of another kind"
        )
    return unet


def _cross_attention_layers(unet: UNet2DConditionModel) -> list[_Layer]:
    """All layers `attn2` that attend to the text, in the order in which a pass meets them."""
    halvings, places = 0, {}
    for i, block in enumerate(unet.down_blocks):
        places[f"down_blocks.{i}."] = halvings
        halvings += getattr(block, "downsamplers", None) is not None
    places["mid_block."] = halvings
    for i, block in enumerate(unet.up_blocks):
        places[f"up_blocks.{i}."] = halvings
        halvings -= getattr(block, "upsamplers", None) is not None
    layers = [
        _Layer(name, cast(Attention, module), depth)
        for place, depth in places.items()
        for name, module in unet.named_modules()
        if name.startswith(place) and name.endswith("attn2") and getattr(module, "is_cross_attention", False)
    ]
    if not layers:
        raise TypeError(
            f"this {type(unet).__name__} has no cross-attention layer (attn2) to record: its blocks are "
            f"{[type(block).__name__ for block in [*unet.down_blocks, *unet.up_blocks]]}"
        )
    return layers


def _chosen(layers: list[_Layer], prefixes: Sequence[str] | None) -> list[_Layer]:
    if prefixes is None:
        return layers
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    for prefix in prefixes:
        if not any(layer.name.startswith(prefix) for layer in layers):
            raise ValueError(
                f"no cross-attention layer is named {prefix!r}; there are {[layer.name for layer in layers]}"
            )
    return [layer for layer in layers if layer.name.startswith(tuple(prefixes))]


def _halved(height: int, width: int, times: int) -> tuple[int, int]:
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _level(grids: dict[int, tuple[int, int]], resolution: int | tuple[int, int] | None) -> int:
    """How often the latent is halved on the level that is wanted."""
    if resolution is None:
        enough = [level for level, grid in grids.items() if min(grid) >= _SIDE]
        return max(enough, default=min(grids))
    for level, grid in grids.items():
        if grid == resolution or min(grid) == resolution:
            return level
    raise ValueError(
        f"resolution={resolution}: no cross-attention layer has such maps at this image size; "
        f"there are {sorted(set(grids.values()), reverse=True)} (height, width)"
    )


def find_subjects(tokenizer: Any, prompt: str, subjects: Sequence[str | int | Sequence[int]]) -> list[tuple[int, ...]]:
    """The positions in the prompt's tokens at which each subject stands.

    A subject is one or more words of the prompt ("cat", "fire truck", "<my-cat>"), in any case, in the singular or the
    plural; all of its pieces count. Where it stands several times in the prompt, all occurrences count, unless
    `subjects` names it as often as it stands: "a cat and a cat" with `["cat", "cat"]` are two subjects, from the left.
    Positions can be given instead of words: an int, or several.

    Args:
        tokenizer: of CLIP, as pipelines have it.
        prompt: the text.
        subjects: words or positions (0 is the start token).

    Returns:
        For each subject its positions, ascending.

    Raises:
        ValueError: if a subject is not in the prompt, stands past the tokens that the text encoder reads, is named
            more often than it occurs, or is empty.
    """
    if not prompt or not prompt.strip():
        raise ValueError("the prompt is empty: there is no word to guide; give a prompt that names the subjects")
    offsets, limit = _offsets(tokenizer, prompt), int(tokenizer.model_max_length)
    found: list[tuple[int, ...]] = []
    asked: dict[str, int] = {}
    for subject in subjects:
        if not isinstance(subject, str):
            positions = (subject,) if isinstance(subject, int) else tuple(subject)
            found.append(_checked_positions(positions, min(len(offsets), limit) - 1, prompt))
            continue
        key = " ".join(subject.lower().split())
        spans = _occurrences(prompt, key)
        named = sum(isinstance(s, str) and " ".join(s.lower().split()) == key for s in subjects)
        nth = asked[key] = asked.get(key, -1) + 1
        if named > 1 and named != len(spans):
            raise ValueError(
                f"the subject {subject!r} is named {named} times, but stands {len(spans)} times in {prompt!r}: name it "
                "once for all of them, or as often as it stands"
            )
        spans = spans if named == 1 else spans[nth : nth + 1]
        positions = [i for i, (a, b) in enumerate(offsets) if any(a < end and start < b for start, end in spans)]
        if not positions:
            raise ValueError(f"the subject {subject!r} is not in the prompt {prompt!r}; its words are {_words(prompt)}")
        if positions[-1] >= limit - 1:
            raise ValueError(
                f"the subject {subject!r} is token {positions[-1]} of the prompt, but the text encoder reads {limit} "
                "with start and end and cuts off the rest: move it forward or shorten the prompt"
            )
        found.append(tuple(positions))
    _refuse_shared(subjects, found)
    return found


def prompt_end(tokenizer: Any, prompt: str) -> int:
    """The position of the end-of-text token, past the last word that the text encoder reads."""
    return min(len(_offsets(tokenizer, prompt)), int(tokenizer.model_max_length)) - 1


def _offsets(tokenizer: Any, prompt: str) -> list[tuple[int, int]]:
    """For each token the characters of the prompt that it stands for; start and end token have none: (0, 0)."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; use the tokenizer that "
            "`transformers.AutoTokenizer` loads, or give token positions as subjects"
        )
    return tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]


def _words(prompt: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"[^\s,.;:!?\"()]+", prompt)))


def _occurrences(prompt: str, subject: str) -> list[tuple[int, int]]:
    """Where the words of a subject stand in the prompt; exact words first, else its singular or plural."""
    if not subject:
        raise ValueError("a subject is empty: give words of the prompt, e.g. subjects=['cat', 'dog']")
    *before, last = subject.split()
    for forms in ([last], _numbers(last)):
        pattern = r"\s+".join([*map(re.escape, before), f"(?:{'|'.join(map(re.escape, forms))})"])
        spans = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE)]
        if spans:
            return spans
    return []


def _numbers(word: str) -> list[str]:
    """The regular plurals and singulars that a word may have in English."""
    forms = [f"{word}s", f"{word}es"]
    if word.endswith("y"):
        forms.append(f"{word[:-1]}ies")
    if word.endswith("ies"):
        forms.append(f"{word[:-3]}y")
    forms += [word[: -len(ending)] for ending in ("es", "s") if word.endswith(ending) and len(word) > len(ending) + 1]
    return forms


def _checked_positions(positions: tuple[int, ...], end: int, prompt: str) -> tuple[int, ...]:
    if not positions or any(not 0 < position < end for position in positions):
        raise ValueError(
            f"token positions {list(positions)} are not all words of {prompt!r}: its words are at 1 to {end - 1}"
        )
    return tuple(sorted(positions))


def _refuse_shared(subjects: Sequence[Any], found: list[tuple[int, ...]]) -> None:
    for i, positions in enumerate(found):
        for j in range(i):
            if set(positions) & set(found[j]):
                raise ValueError(
                    f"the subjects {subjects[j]!r} and {subjects[i]!r} stand for the same words of the prompt: "
                    "name each subject once"
                )


def subject_maps(
    maps: Tensor,
    positions: Sequence[Sequence[int]],
    *,
    end: int | None = None,
    sharpen: float | None = 100.0,
    smooth: float | None = 0.5,
) -> Tensor:
    """One map for each subject, from the attention to all tokens.

    The start token soaks up most of the attention. So it is dropped, together with what follows the prompt, and the
    softmax of `sharpen` times the rest shares each position out among the words again; then the pieces of a subject
    are averaged, and the maps smoothed.

    Args:
        maps: `[B, H, W, N]`, rows that sum to 1, as `AttentionRecorder.maps` gives them.
        positions: for each subject its token positions, as `find_subjects` gives them.
        end: the first position past the prompt, as `prompt_end` gives it; without it only the last token is dropped,
            as Attend-and-Excite does for Stable Diffusion 1.x, and padding takes its share.
        sharpen: what the attention is multiplied by before the softmax; None leaves the probabilities as they are.
        smooth: sigma of a 3 x 3 filter in Attend-and-Excite's form, `exp(-(d / 2 sigma)^2)` (its standard deviation
            is `sigma * sqrt(2)`); borders are reflected. None leaves maps unsmoothed.

    Returns:
        `[B, H, W, K]` in [0, 1], float32 or wider.
    """
    end = maps.shape[-1] - 1 if end is None else end
    words = maps[..., 1:end]
    words = words.float() if words.dtype in (torch.float16, torch.bfloat16) else words
    if sharpen is not None:
        words = (words * sharpen).softmax(-1)
    out = torch.stack([words[..., [p - 1 for p in own]].mean(-1) for own in positions], dim=-1)
    return out if smooth is None or min(out.shape[1:3]) < 2 else _smoothed(out, smooth)


def _smoothed(maps: Tensor, sigma: float) -> Tensor:
    """A separable filter of three taps; sums of slices, which autocast leaves alone and a GPU repeats exactly."""
    side = math.exp(-1 / (2 * sigma) ** 2)
    middle = 1 / (1 + 2 * side)
    side *= middle
    x = torch.cat([maps[:, 1:2], maps, maps[:, -2:-1]], dim=1)  # [B, H + 2, W, K]
    x = side * (x[:, :-2] + x[:, 2:]) + middle * maps
    wide = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], dim=2)  # [B, H, W + 2, K]
    return side * (wide[:, :, :-2] + wide[:, :, 2:]) + middle * x
