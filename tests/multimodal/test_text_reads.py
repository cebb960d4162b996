"""What text read of the images goes wherever its key-value cache goes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import tiny_vlm as tiny
import torch
from tiny_vlm import logits
from torch import Tensor
from transformers import DynamicCache

from multimodal.cmai import inhibit_cross_modality
from multimodal.layout import find_layout
from multimodal.text_reads import TextReads

switch: Any = functools.partial(inhibit_cross_modality, layers=[0, 1], keep_ratio=0.3)


def test_beams_take_what_was_read_with_them():
    model, inputs = tiny.llava_clip()
    options = {"num_beams": 3, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    with switch(model):
        cached = model.generate(**inputs, **options)
        afresh = model.generate(**inputs, **options, use_cache=False)
    assert cached.beam_indices[:, :5].ne(cached.beam_indices[:, :1]).any()  # beams did change places
    assert torch.equal(cached.sequences, afresh.sequences)
    torch.testing.assert_close(cached.sequences_scores, afresh.sequences_scores, atol=1e-4, rtol=0)


def test_a_prompt_in_parts_is_the_prompt_at_once():
    model, _ = tiny.llava_clip()
    inputs = tiny.batch(model, [(1, 10, tiny.IMAGE, 20, 21, tiny.IMAGE, 22, 23), (1, tiny.IMAGE, tiny.IMAGE, 30)])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    ids, mask, cut = inputs["input_ids"], inputs["attention_mask"], 22
    images = (ids == tiny.IMAGE_ID).nonzero()[:, 1]  # the position of each feature
    assert (images < cut).any() and (images >= cut).any()
    with torch.no_grad():
        encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        features = torch.cat(list(encoded.pooler_output))
        with switch(model):
            whole = model(**inputs, mm_encoder_outputs={"image": encoded}).logits
            cache, parts = DynamicCache(), []
            for a, b in ((0, cut), (cut, ids.shape[1])):
                encoded.pooler_output = [features[(images >= a) & (images < b)]]
                part = {"input_ids": ids[:, a:b], "position_ids": inputs["position_ids"][:, a:b]}
                part |= {"attention_mask": mask[:, :b], "mm_encoder_outputs": {"image": encoded}}
                parts.append(model(**part, cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=2e-5, rtol=0)


def test_what_was_read_follows_its_cache():
    model, inputs = tiny.llava_clip()
    ids = torch.tensor([[5, 6], [7, 8]])

    def step(cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
        mask = torch.nn.functional.pad(mask, (0, cache.get_seq_length() + ids.shape[1] - mask.shape[1]), value=1)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache).logits

    mask = inputs["attention_mask"]
    with switch(model, store="per_head"), torch.no_grad():
        cache = DynamicCache()
        model(**inputs, cache=cache)
        expected = step(copy.deepcopy(cache), ids, mask)
        for token in (40, 41):
            step(cache, torch.full((2, 1), token), mask)
        cache.crop(-2)
        assert torch.equal(step(copy.deepcopy(cache), ids, mask), expected)
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        twice = step(repeated, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0))
        torch.testing.assert_close(twice, expected.repeat_interleave(2, 0), atol=1e-5, rtol=0)
        repeated.crop(-2)
        repeated.batch_select_indices(torch.tensor([3, 0]))
        swapped = step(repeated, ids.flip(0), mask.flip(0))
        torch.testing.assert_close(swapped, expected.flip(0), atol=1e-5, rtol=0)
        cache.reset()
        again = model(**inputs, cache=cache).logits
        torch.testing.assert_close(again, logits(model, inputs))
        torch.testing.assert_close(step(cache, ids, mask), expected)


@pytest.mark.parametrize("store", ["head_mean", "per_head"])
def test_what_is_kept_has_the_stated_size(store: str):
    model, inputs = tiny.llava_clip()
    with switch(model, store=store):
        cache = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).cache
    side = TextReads.find(cache)
    layout = find_layout(model, inputs["input_ids"], inputs["attention_mask"])
    T, N = int(layout.text.any(0).sum()) + 3, int(layout.image.any(0).sum())
    heads = 4 if store == "per_head" else 1
    assert side is not None and side.nbytes == 2 * 2 * heads * T * N * 4  # layers, rows, heads, tokens, bytes


def test_a_static_cache_gives_what_a_dynamic_one_gives():
    model, inputs = tiny.llava_clip()
    with switch(model):
        dynamic = model.generate(**inputs, max_new_tokens=5)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, cache_implementation="static"), dynamic)
