"""Pictures and questions as AKI was trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_aki as tiny
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast

from multimodal.aki import AkiConfig, AkiProcessor

PUBLISHED = (
    "<s> <|system|>\nA chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.<|end|>\n<|user|>\n<image>\nWhat is this?<|end|>\n"
    "<|assistant|>\n"
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def words(ids: torch.Tensor) -> list[str]:
    return tiny.processor().tokenizer.convert_ids_to_tokens(ids)


def test_the_prompt_is_the_published_one():
    assert tiny.processor().prompt("What is this?") == PUBLISHED


def test_a_picture_is_resized_to_the_square_without_keeping_its_aspect():
    wide, inputs = picture(40, 13), tiny.processor()(picture(40, 13), PUBLISHED, return_tensors="pt")
    resized = np.asarray(wide.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float64)
    expected = torch.from_numpy(resized / 255 - 0.5).permute(2, 0, 1) / 0.5
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    torch.testing.assert_close(inputs["pixel_values"][0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes_are_made_rgb(mode: str):
    other = picture(20, 30).convert(mode)
    found, expected = (
        tiny.processor()(image, PUBLISHED, return_tensors="pt")["pixel_values"]
        for image in (other, other.convert("RGB"))
    )
    assert torch.equal(found, expected)


def test_the_default_size_is_384():
    processor = AkiProcessor.from_tokenizer(tiny.tokenizer(), tiny.config(vision_config={"image_size": 384}))
    assert processor(picture(50, 40), PUBLISHED, return_tensors="pt")["pixel_values"].shape == (1, 3, 384, 384)
    default = AkiConfig()
    assert default.vision_config.image_size == 384 and (default.norm_mean, default.norm_std) == (0.5, 0.5)  # type: ignore[union-attr]


def test_an_image_becomes_its_vision_tokens_where_it_stood():
    ids = tiny.processor()(picture(20, 20), PUBLISHED, return_tensors="pt")["input_ids"][0]
    tail = ["<|end|>", "<|user|>", *["<image>"] * tiny.TOKENS, "What", "is", "this", "?", "<|end|>", "<|assistant|>"]
    assert words(ids)[:3] == ["<s>", "<|system|>", "A"] and words(ids)[-len(tail) :] == tail
    assert (ids == tiny.IMAGE_ID).sum() == tiny.TOKENS and ids[-1] == tiny.STOP


def test_rows_are_padded_on_the_left_and_hold_any_number_of_pictures():
    processor = tiny.processor()
    texts = [processor.prompt("What is this?", num_images=2), processor.prompt("What is here?", num_images=1), "A cat"]
    images = [[picture(20, 20), picture(30, 20, 1)], [picture(20, 30, 2)], []]
    inputs = processor([image for row in images for image in row], texts, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert (ids == tiny.IMAGE_ID).sum(1).tolist() == [2 * tiny.TOKENS, tiny.TOKENS, 0]
    assert mask[:, -1].all() and torch.equal(ids == tiny.PAD, mask == 0) and (mask[1:, 0] == 0).all()
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone = processor(own or None, text, return_tensors="pt")
        assert torch.equal(ids[row][mask[row] == 1], alone["input_ids"][0])


def test_a_conversation_puts_pictures_before_the_text_of_their_turn():
    turns = [
        {"role": "system", "content": "A chat."},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "What is here?"},
    ]
    expected = (
        "<s> <|system|>\nA chat.<|end|>\n<|user|>\n<image>\nWhat is this?<|end|>\n<|assistant|>\nA cat.<|end|>\n"
        "<|user|>\nWhat is here?<|end|>\n"
    )
    processor = tiny.processor()
    assert processor.apply_chat_template(turns) == expected
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == expected + "<|assistant|>\n"


def test_a_saved_processor_is_the_same(tmp_path: Path):
    tiny.processor().save_pretrained(tmp_path)
    tiny.config().save_pretrained(tmp_path)
    for again in (AkiProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(again, AkiProcessor) and again.prompt("What is this?") == PUBLISHED
        assert again.num_vision_tokens == tiny.TOKENS
        found, expected = (made(picture(31, 17), PUBLISHED, return_tensors="pt") for made in (again, tiny.processor()))
        assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "attention_mask", "pixel_values"))


def test_what_it_makes_the_model_takes_and_answers():
    inputs = tiny.processor()(picture(20, 20), PUBLISHED, return_tensors="pt")
    new = tiny.model().generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert len(new) == 4 and isinstance(tiny.processor().decode(new), str)


def test_the_special_tokens_get_the_ids_of_the_published_model():
    vocabulary = tiny.processor().tokenizer.get_vocab()
    assert (vocabulary["<pad>"], vocabulary["<image>"], vocabulary["<|endofchunk|>"]) == (59, 60, 61)
    assert len(vocabulary) == tiny.config().text_config.vocab_size  # type: ignore[union-attr]
    default = AkiConfig()
    assert (default.pad_token_id, default.image_token_id, default.stop_token_id) == (32011, 32012, 32001)
    assert default.text_config.vocab_size == 32014  # type: ignore[union-attr]
    again = AkiProcessor.from_tokenizer(tiny.processor().tokenizer, tiny.config())  # AKI's own has them already
    assert len(again.tokenizer) == len(vocabulary)


def test_mistakes_are_named():
    processor = tiny.processor()
    with pytest.raises(ValueError, match=r"no token <image>; AkiProcessor\.from_tokenizer adds"):
        AkiProcessor(processor.image_processor, tiny.tokenizer())
    shorter = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    shorter.add_tokens(["one", "more"])
    with pytest.raises(ValueError, match="<pad> has the id 61 in this tokenizer, but 59 in the model"):
        AkiProcessor.from_tokenizer(shorter, tiny.config())
    with pytest.raises(ValueError, match="holds <image>; say num_images instead"):
        processor.prompt("What is <image>?")
    one = picture(9, 9)
    with pytest.raises(ValueError, match="row 0 has 2 pictures, but 1 <image> in its text"):
        processor([[one, one], []], ["<image>", "<image>"])  # right in total, wrong by rows
    with pytest.raises(ValueError, match="1 <image> tokens and 2 images"):
        processor([one, one], [PUBLISHED])
    with pytest.raises(ValueError, match="<image>"):
        processor(None, [PUBLISHED])
