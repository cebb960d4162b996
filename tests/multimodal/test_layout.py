"""Where pictures are in a prompt: every family, several pictures, either side of padding, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_vlm as tiny
import torch
from transformers import LlavaForConditionalGeneration
from transformers.masking_utils import create_masks_for_generate

from multimodal import layout as layouts
from multimodal.layout import Family, family_of, find_layout, register_family, valid_tokens

families = pytest.mark.parametrize("family", tiny.FAMILIES.values(), ids=tiny.FAMILIES.keys())
sides = pytest.mark.parametrize("padding", ["left", "right"])

TWO = (tiny.BOS, 10, tiny.IMAGE, 20, tiny.IMAGE, 21, tiny.STOP)
PROMPTS = (TWO, (tiny.BOS, tiny.IMAGE, 22))
FRAME = {
    "qwen2_vl": {tiny.VISION_START, tiny.VISION_END},
    "qwen2_5_vl": {tiny.VISION_START, tiny.VISION_END},
    "idefics3": {tiny.FAKE, tiny.TILE, tiny.TILE + 1, tiny.GLOBAL, tiny.NEWLINE},
    "smolvlm": {tiny.FAKE, tiny.TILE, tiny.TILE + 1, tiny.GLOBAL, tiny.NEWLINE},
}


@families
@sides
def test_every_token_is_what_the_prompt_says(family: Any, padding: str):
    model, _ = family()
    inputs = tiny.batch(model, PROMPTS, padding=padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    found = find_layout(model, ids, inputs["attention_mask"])
    frame = torch.isin(ids, torch.tensor(sorted(FRAME.get(model.config.model_type, ()))))
    assert torch.equal(found.valid, mask)
    assert torch.equal(found.image, ids == tiny.IMAGE_ID)
    assert torch.equal(found.frame, frame & mask)
    assert torch.equal(found.text, mask & ~found.image & ~frame)
    for row, prompt in enumerate(PROMPTS):
        words = [token for token in prompt if token != tiny.IMAGE]
        assert ids[row][found.text[row]].tolist() == words


@families
@sides
def test_pictures_are_counted_in_each_row_tiles_taken_together(family: Any, padding: str):
    model, _ = family()
    inputs = tiny.batch(model, PROMPTS, padding=padding)
    found = find_layout(model, inputs["input_ids"], inputs["attention_mask"])
    pictures = tiny._PICTURES[model.config.model_type](model, [2, 1])
    sizes = tiny._lengths(model, pictures, 3)
    counts = [[int((row == block).sum()) for block in range(3)] for row in found.block]
    assert counts == [[*sizes[:2], 0], [sizes[2], 0, 0]]
    assert torch.equal(found.block >= 0, found.image)
    order = found.block[0][found.image[0]]
    assert torch.equal(order, order.sort().values)


def test_pictures_in_tiles_that_touch_are_told_apart_by_their_markers():
    model, _ = tiny.smolvlm()
    inputs = tiny.batch(model, [(tiny.BOS, tiny.IMAGE, tiny.IMAGE, 20)])
    ids = inputs["input_ids"]
    found = find_layout(model, ids)
    assert found.block.max() == 1 and (found.block == 0).sum() == (found.block == 1).sum()
    assert ids[0][found.text[0]].tolist() == [tiny.BOS, 20]


def test_line_breaks_of_the_text_are_text():
    model, _ = tiny.idefics3()
    inputs = tiny.batch(model, [(tiny.BOS, tiny.NEWLINE, tiny.IMAGE, tiny.NEWLINE, 20)])
    ids = inputs["input_ids"]
    found = find_layout(model, ids)
    assert ids[0][found.text[0]].tolist() == [tiny.BOS, tiny.NEWLINE, tiny.NEWLINE, 20]


def test_a_prompt_that_does_not_close_its_picture_needs_the_markers_id():
    model, _ = tiny.smolvlm()
    ids = torch.tensor([[tiny.BOS, tiny.FAKE, tiny.GLOBAL, tiny.IMAGE_ID, tiny.IMAGE_ID, 20, 21]])
    told = find_layout(model, ids, frame_token_ids=[tiny.FAKE])
    assert told.frame[0].tolist() == [False, True, True, False, False, False, False]
    assert find_layout(model, ids).text[0].tolist() == [True, True, True, False, False, True, True]


def test_a_prompt_without_a_picture_is_text():
    for family in (tiny.llava_clip, tiny.qwen2_vl, tiny.smolvlm):
        found = find_layout(family()[0], torch.tensor([[tiny.BOS, 10, tiny.STOP]]))
        assert found.text.all() and not found.image.any() and (found.block == -1).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_is_found_in_masks_that_are_prepared(implementation: str):
    model, inputs = tiny.llava_clip()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    config = type(model.config.text_config)(**tiny.TEXT, attn_implementation=implementation)
    prepared: Any = create_masks_for_generate(config, torch.zeros(*ids.shape, 32), mask, None)
    assert prepared.ndim == 4
    for given in (prepared, {"full_attention": prepared}):
        assert torch.equal(valid_tokens(ids, given), mask.bool())
    assert valid_tokens(ids, None).all()


def test_tokens_behind_those_in_the_cache():
    model, inputs = tiny.llava_clip()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole, rest = find_layout(model, ids, mask), find_layout(model, ids[:, 9:], mask, offset=9)
    for name in ("image", "frame", "valid", "text"):
        assert torch.equal(getattr(rest, name), getattr(whole, name)[:, 9:])


def test_what_does_not_fit_is_refused():
    model, inputs = tiny.llava_onevision()
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match=r"input_ids has shape \(\d+,\); it must be"):
        find_layout(model, ids[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\).* must be \[2, "):
        find_layout(model, ids, torch.ones(2, 3))
    with pytest.raises(ValueError, match=f"video tokens \\(id {tiny.VIDEO}\\)"):
        find_layout(model, ids.where(ids != 20, tiny.VIDEO))


def test_a_class_that_is_not_known_lists_those_that_are():
    decoder: Any = tiny.llava_clip()[0].get_decoder()
    with pytest.raises(
        TypeError, match=r"^LlamaModel is not supported; supported are AkiFor\w+, Idefics3\w+.*register"
    ):
        find_layout(decoder, torch.tensor([[1]]))
    with pytest.raises(TypeError, match="LlamaModel is not supported"):
        family_of(decoder)


@pytest.fixture
def known() -> Iterator[None]:
    """What is registered in a test is forgotten afterwards."""
    before = dict(layouts._families)
    yield
    layouts._families.clear()
    layouts._families.update(before)


class Better(LlavaForConditionalGeneration):
    """A subclass, as people write them."""


def test_subclasses_belong_to_the_family_and_new_families_are_registered(known: None):
    model = Better(tiny.llava_clip()[0].config)
    assert family_of(model).name == "LLaVA"
    own = Family("ours", ("Better",), image_token_id=lambda model: 7, frame_token_ids=lambda model: frozenset({8}))
    register_family(own)
    assert family_of(model) is own and family_of(tiny.llava_clip()[0]).name == "LLaVA"
    found = find_layout(model, torch.tensor([[1, 8, 7, 7, 8, tiny.IMAGE_ID]]))
    assert found.image[0].tolist() == [False, False, True, True, False, False]
    assert found.text[0].tolist() == [True, False, False, False, False, True]
    with pytest.raises(ValueError, match="'nobody' names no classes"):
        register_family(Family("nobody", ()))
