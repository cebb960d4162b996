"""What inhibition holds in memory: chunks of scores while a layer runs, never the attention matrices."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_vlm as tiny
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from multimodal.cmai import inhibit_cross_modality
from multimodal.explain import attended
from multimodal.text_reads import TextReads

TEXT = 256
HEADS = 4


class LiveStorages(TorchDispatchMode):
    """Follows the storages that operations make, and notes the most bytes of them that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._total = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._total += storage.nbytes()  # or less: it may be known, others may be gone
        if self._total > self.most:
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._total = sum(nbytes for _, nbytes in self._alive.values())
            self.most = max(self.most, self._total)
        return out


@torch.no_grad()
def peak(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[int, Any]:
    """Bytes at the peak of a forward, and its output."""
    with LiveStorages() as live:
        out = model(**inputs, logits_to_keep=1, **options)
    return live.most, out


def long_prompt() -> tuple[Any, dict[str, Tensor]]:
    model, _ = tiny.llava_clip()
    return model, tiny.batch(model, [(tiny.BOS, tiny.IMAGE, *(2 + i % 40 for i in range(TEXT - 1)))])


@pytest.mark.parametrize("store", ["head_mean", "per_head"])
def test_five_times_a_chunk_and_what_is_kept(store: Any):
    model, inputs = long_prompt()
    L = inputs["input_ids"].shape[1]
    plain, _ = peak(model, inputs)
    chunk = 4 * HEADS * 24 * L  # of so many rows
    with inhibit_cross_modality(model, layers=[0, 1], chunk_bytes=chunk, store=store):
        under, out = peak(model, inputs)
    side = TextReads.find(out.cache)
    assert side is not None and side.nbytes == 4 * 2 * TEXT * 16 * (HEADS if store == "per_head" else 1)
    reads = side.nbytes  # of one layer they are joined from pieces, so that these are there twice for a moment
    outputs = 3 * 4 * HEADS * L * 8  # of a layer: its own, that which is written into, and on the way between
    assert chunk < under - plain <= 5 * chunk + 2 * reads + outputs


def test_all_matrices_would_be_more():
    model, inputs = long_prompt()
    L = inputs["input_ids"].shape[1]
    plain, _ = peak(model, inputs)
    with inhibit_cross_modality(model, layers=[0, 1], chunk_bytes=4 * HEADS * 16 * L):
        under, _ = peak(model, inputs)
    model.set_attn_implementation("eager")
    try:
        whole, _ = peak(model, inputs, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    matrix = 4 * HEADS * L * L
    assert under - plain < matrix / 2 and whole - plain > 2 * matrix  # of one layer, and of both


def test_explaining_holds_rows_not_matrices():
    model, inputs = long_prompt()
    L = inputs["input_ids"].shape[1]
    plain, _ = peak(model, inputs)
    with LiveStorages() as live:
        attended(model, inputs, answer=[40, 41])
    assert live.most - plain < 4 * HEADS * L * L / 4
