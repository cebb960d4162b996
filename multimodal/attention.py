"""Attention functions of transformers with something between the scores and the output.

transformers looks up a model's attention function by name at each call. :func:`interpose` puts one of ours in front of
the one a decoder runs (eager, SDPA or FlexAttention). It calls the decoder's own, bit for bit, unless the forward was
given a :class:`Between` among its keyword arguments, which every decoder layer hands down unchanged. So what acts
belongs to that one forward: no state on modules, and threads, deep copies and recomputation under gradient
checkpointing are right without our doing anything.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "IMPLEMENTATIONS",
    "Between",
    "Call",
    "Listener",
    "Reweighed",
    "base_implementation",
    "check_implementation",
    "hand_down",
    "handed_down",
    "interpose",
    "uncompiled",
]

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""Attention implementations whose scores can be reached."""

_PREFIX = "interposed_"  # transformers gives a meaning to names with "flash" or "|"
_KEY = "attention_between"
_CHUNK_BYTES = 64 * 2**20  # of scores at once that are computed for a listener

Function = TypeVar("Function", bound=Callable[..., Any])

_lock = threading.RLock()
_users = weakref.WeakKeyDictionary[PreTrainedModel, int]()


def uncompiled(function: Function) -> Function:
    """Keeps a function out of compiled graphs, for what reads a context or keeps tensors."""
    return cast(Function, torch.compiler.disable(function))


class Reweighed(NamedTuple):
    """New attention weights for some query rows.

    Attributes:
        rows: Query indices within the call, `[t]`.
        valid: For which rows of the batch they are meant, `[B, t]` bool; elsewhere the layer's own output stays.
        weights: `[B, H, t, K]`, float32 or wider; rows sum to 1.
    """

    rows: Tensor
    valid: Tensor
    weights: Tensor


class Listener(Protocol):
    """What is told the weights that a layer used."""

    def wanted(self, call: Call) -> Tensor:
        """The query indices within the call whose weights are wanted, `[t]`; may be none."""
        ...

    def hear(self, call: Call, rows: Tensor, weights: Tensor) -> None:
        """Gets the weights `[B, H, t, K]` of query rows `[t]`, without a graph; maybe in several pieces."""
        ...


class Between(NamedTuple):
    """What acts between scores and output in one forward.

    Attributes:
        first: Position of the forward's first token in the sequence: how many tokens the cache held before.
        reweigh: Gives new weights for query rows of a layer, in pieces; None for a layer that it leaves alone.
        every_row: `reweigh` gives all query rows, for every row of the batch, so that a layer's own attention need not
            run where it gives any.
        listener: Is told the weights that the layers used.
    """

    first: int = 0
    reweigh: Callable[[Call], Iterable[Reweighed] | None] | None = None
    every_row: bool = False
    listener: Listener | None = None


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention.

    Attributes:
        layer: Index of the layer.
        query: `[B, H, L, d]`, with positions applied.
        key, value: `[B, G, K, d]` with `G` key-value heads, cached ones included.
        mask: As the layer got it: None for causality alone, bool (True is seen), float (added), or a `BlockMask`.
        causal: Whether queries see no later key where there is no mask. PaliGemma's layers see all.
        scaling: What the product of query and key is multiplied by.
        softcap: Scores are capped softly at this value (Gemma 2), if given.
        first: Position of the first query in the sequence.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | BlockMask | None
    causal: bool
    scaling: float
    softcap: float | None
    first: int

    @property
    def key_offset(self) -> int:
        """Position of the first key; above 0 where a sliding window has dropped the keys before."""
        return max(self.first + self.query.shape[2] - self.key.shape[2], 0)

    def scores(self, rows: Tensor) -> Tensor:
        """Scores of some query rows before the softmax; keys that are not seen have the lowest number there is.

        Args:
            rows: Query indices within the call, `[t]`.

        Returns:
            `[B, H, t, K]`, float32 or wider.
        """
        B, H, _, d = self.query.shape
        groups = self.key.shape[1]
        # Heads that share keys are rows of one product, so that keys are not repeated.
        query = self.query[:, :, rows].reshape(B, groups, -1, d)  # [B, G, H / G * t, d]
        scores = (query @ self.key.transpose(2, 3)).view(B, H, len(rows), -1)  # [B, H, t, K]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return self._masked(scores, rows)

    def columns(self, positions: Tensor) -> tuple[Tensor, int]:
        """Key indices of ascending positions, and how many of these lie before a sliding window and have none."""
        outside = int((positions < self.key_offset).sum()) if self.key_offset else 0
        return positions[outside:] - self.key_offset, outside

    def output(self, weights: Tensor) -> Tensor:
        """Values averaged by weights `[B, H, t, K]`: `[B, t, H, d]`, as attention functions return it."""
        B, H, t, K = weights.shape
        grouped = weights.to(self.value.dtype).reshape(B, self.value.shape[1], -1, K)
        return (grouped @ self.value).view(B, H, t, -1).transpose(1, 2)

    def row_chunks(self, rows: Tensor, chunk_bytes: int) -> list[Tensor]:
        """`rows` in pieces of which the scores, float32, take at most `chunk_bytes` each, but one row at least."""
        B, H = self.query.shape[:2]
        size = max(chunk_bytes // (4 * B * H * self.key.shape[2]), 1)
        return list(rows.split(size)) if len(rows) else []

    def _masked(self, scores: Tensor, rows: Tensor) -> Tensor:
        lowest, mask = torch.finfo(scores.dtype).min, self.mask
        if isinstance(mask, BlockMask):
            mask = self._dense(mask, rows)
        elif mask is None:
            if not self.causal:
                return scores
            keys = torch.arange(self.key.shape[2], device=scores.device) + self.key_offset
            mask = keys <= rows[:, None] + self.first  # [t, K]
        else:
            mask = mask[:, :, rows, : self.key.shape[2]]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, lowest)
        # The lowest value of half precision is not that of float32, and a sum of two lowest ones is -inf.
        return (scores + mask).masked_fill(mask <= torch.finfo(mask.dtype).min, lowest)

    def _dense(self, mask: BlockMask, rows: Tensor) -> Tensor:
        index = functools.partial(torch.arange, device=rows.device)
        batch = index(self.query.shape[0])[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=rows.device)
        return mask.mask_mod(batch, head, rows[None, None, :, None], index(self.key.shape[2])[None, None, None])


def base_implementation(decoder: PreTrainedModel) -> str:
    """The name of a decoder's own attention implementation, also while something is interposed."""
    return str(decoder.config._attn_implementation).removeprefix(_PREFIX)


def interpose(decoder: PreTrainedModel) -> Callable[[], None]:
    """Makes a decoder's attention heed :class:`Between`; several users are counted.

    Args:
        decoder: The language model inside a vision-language model, with its own configuration.

    Returns:
        What takes it off again; call it once.

    Raises:
        ValueError, TypeError: As :func:`check_implementation` does.
    """
    with _lock:
        if decoder not in _users:
            name = check_implementation(decoder)
            _register()
            decoder.set_attn_implementation(_PREFIX + name)
        _users[decoder] = _users.get(decoder, 0) + 1
    return functools.partial(_release, weakref.ref(decoder))


def _release(reference: weakref.ref[PreTrainedModel]) -> None:
    with _lock:
        if (decoder := reference()) is None:
            return
        _users[decoder] -= 1
        if _users[decoder] == 0:
            del _users[decoder]
            decoder.set_attn_implementation(base_implementation(decoder))


def check_implementation(decoder: PreTrainedModel) -> str:
    """The name of a decoder's attention implementation, where its scores can be reached.

    Raises:
        ValueError: If they cannot, with the implementations of which they can.
        TypeError: If the decoder does not look its attention function up by name.
    """
    name = base_implementation(decoder)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={name!r} gives no access to attention scores; "
            f"call model.set_attn_implementation(…) with one of {', '.join(IMPLEMENTATIONS)} first"
        )
    if not decoder._can_set_attn_implementation():
        raise TypeError(
            f"{type(decoder).__name__} does not look its attention function up by name, so none can be put between"
        )
    return name


def _register() -> None:
    for name in IMPLEMENTATIONS:
        AttentionInterface.register(_PREFIX + name, functools.partial(_attention, name))
        AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def hand_down(kwargs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Keyword arguments of a decoder with a :class:`Between` among them, changed as named; for a forward pre-hook."""
    return {**kwargs, _KEY: kwargs.get(_KEY, Between())._replace(**changes)}


def handed_down(kwargs: dict[str, Any]) -> Between | None:
    """The :class:`Between` among keyword arguments of a forward; None where there is none."""
    return kwargs.get(_KEY)


def _attention(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it."""
    between: Between | None = kwargs.pop(_KEY, None)
    if name == "eager":
        own = sys.modules[type(module).__module__].eager_attention_forward  # each model has its own
    else:
        own = ALL_ATTENTION_FUNCTIONS[name]
    if between is None:
        return own(module, query, key, value, mask, **kwargs)
    if name == "eager":  # promises the weights of all rows
        between = between._replace(every_row=False)
    attend = functools.partial(own, module, query, key, value, mask, **kwargs)
    return _between(attend, between, module, query, key, value, mask, **kwargs)


@uncompiled  # what is kept between forwards must not lie in memory that compiled graphs use again
def _between(
    attend: Callable[[], tuple[Tensor, Tensor | None]],
    between: Between,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    for unknown in ("s_aux", "position_bias"):
        if others.get(unknown) is not None:
            raise ValueError(f"{type(module).__name__} has {unknown!r} in its softmax, which is not supported")
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    call = Call(module.layer_idx, query, key, value, mask, causal, scaling, softcap, between.first)
    pieces = between.reweigh(call) if between.reweigh is not None else None
    told = []
    if pieces is None:
        output, weights = attend()
    else:
        output, weights = _start(attend, between, call)
        for piece in pieces:
            dropped = nn.functional.dropout(piece.weights, dropout, module.training)
            _replace(output, 1, piece, call.output(dropped))
            if weights is not None:
                _replace(weights, 2, piece, dropped)
            if between.listener is not None:
                told.append(_tell(between.listener, call, piece))
    if between.listener is not None:
        _tell_rest(between.listener, call, told)
    return output, weights


def _start(
    attend: Callable[[], tuple[Tensor, Tensor | None]], between: Between, call: Call
) -> tuple[Tensor, Tensor | None]:
    """What rows are written into: the layer's own output, or nothing yet where every row will be written."""
    if between.every_row:
        B, H, L, _ = call.query.shape
        return call.value.new_empty(B, L, H, call.value.shape[-1]), None
    output, weights = attend()
    # Its own backward may need the output as it is.
    return output.clone(), None if weights is None else weights.clone()


def _replace(whole: Tensor, dim: int, piece: Reweighed, new: Tensor) -> None:
    """Writes a piece into its rows, which are dimension `dim`, where it is valid."""
    valid = piece.valid.view([len(piece.valid), *(piece.valid.shape[1] if i == dim else 1 for i in range(1, 4))])
    old = whole.index_select(dim, piece.rows)
    whole.index_copy_(dim, piece.rows, torch.where(valid, new.to(whole.dtype), old))


@torch.no_grad()
def _tell(listener: Listener, call: Call, piece: Reweighed) -> Tensor:
    """Tells a listener of a piece; gives back its rows."""
    chosen = torch.isin(piece.rows, listener.wanted(call))
    rows, valid = piece.rows[chosen], piece.valid[:, None, chosen, None]
    if len(rows):
        listener.hear(call, rows, torch.where(valid, piece.weights[:, :, chosen], call.scores(rows).softmax(-1)))
    return piece.rows


@torch.no_grad()
def _tell_rest(listener: Listener, call: Call, told: list[Tensor]) -> None:
    """Tells a listener of the rows that no piece had."""
    rows = listener.wanted(call)
    if told:
        rows = rows[~torch.isin(rows, torch.cat(told))]
    for chunk in call.row_chunks(rows, _CHUNK_BYTES):
        listener.hear(call, chunk, call.scores(chunk).softmax(-1))
