"""Attention maps of vision-language models: against the matrices of eager models, rollout against a product of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tiny_vlm as tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

import multimodal.cmai
import multimodal.mma
import multimodal.vmtc
from multimodal.draw import overlay, seen_part
from multimodal.explain import attended
from multimodal.layout import find_layout

PROMPT = (tiny.BOS, 10, tiny.IMAGE, 20, 21, tiny.STOP, 30)
ANSWER = (40, 41, 42)

families = pytest.mark.parametrize("family", tiny.FAMILIES.values(), ids=tiny.FAMILIES.keys())


def one(family: Any, prompt: tuple[int, ...] = PROMPT) -> tuple[Any, dict[str, Tensor]]:
    model, _ = family()
    inputs = tiny.batch(model, [prompt])
    if family is tiny.paligemma:  # prompts are seen in both directions, answers are not
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return model, inputs


def eager_matrices(model: Any, inputs: dict[str, Tensor], answer: tuple[int, ...] = ANSWER) -> list[Tensor]:
    """Attention `[h, L, L]` of each layer to a prompt with its answer, in one forward without a cache."""
    more = torch.tensor([answer[:-1]])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    for name, new in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 1)):
        if name in inputs:
            whole[name] = torch.cat([inputs[name], torch.full_like(more, new).to(inputs[name].dtype)], 1)
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [attention[0] for attention in model(**whole, output_attentions=True).attentions]


def expected_weights(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`[T, l, h, N]`."""
    image = find_layout(model, inputs["input_ids"]).image[0].nonzero()[:, 0]
    matrices = torch.stack(eager_matrices(model, inputs))  # [l, h, L, L]
    return matrices[:, :, -len(ANSWER) :, image].permute(2, 0, 1, 3)


@families
def test_weights_are_those_of_the_eager_model(family: Any):
    model, inputs = one(family)
    found = attended(model, inputs, answer=ANSWER)
    torch.testing.assert_close(found.weights, expected_weights(model, inputs), atol=2e-5, rtol=0)
    assert found.answer.tolist() == list(ANSWER)
    assert found.layers == (0, 1) and found.heads == (0, 1, 2, 3)
    assert (found.weights.sum(-1) < 1 + 1e-5).all()
    (map_,) = found.maps(token=1, layer=1, head=2)
    # Line breaks of tiles have no place; all else of what the picture got is on the map.
    on_map = torch.cat([grid.flatten() for grid in found.grids[0]])  # type: ignore[index]
    torch.testing.assert_close(map_.sum(), found.weights[1, 1, 2, on_map].sum())
    torch.testing.assert_close(found.values(), found.weights.mean((0, 1, 2)))


@families
def test_rollout_is_the_product_of_the_layers(family: Any):
    model, inputs = one(family)
    product: Any = 1
    for matrix in eager_matrices(model, inputs):
        step = (matrix.mean(0) + torch.eye(matrix.shape[-1])) / 2
        product = step if isinstance(product, int) else step @ product
    image = find_layout(model, inputs["input_ids"]).image[0].nonzero()[:, 0]
    found = attended(model, inputs, answer=ANSWER, rollout=True)
    torch.testing.assert_close(found.weights[:, 0, 0], product[-len(ANSWER) :, image], atol=2e-5, rtol=0)
    assert found.layers == (1,) and found.heads == (0,)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers sets it
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_attention_implementations_tell_the_same(implementation: str):
    model, inputs = one(tiny.llava_clip)
    expected = attended(model, inputs, answer=ANSWER)
    rolled = attended(model, inputs, answer=ANSWER, rollout=True)
    model = copy.deepcopy(model)
    model.get_decoder().set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(attended(model, inputs, answer=ANSWER).weights, expected.weights, atol=1e-5, rtol=0)
        again = attended(model, inputs, answer=ANSWER, rollout=True)
    torch.testing.assert_close(again.weights, rolled.weights, atol=1e-5, rtol=0)


def test_some_layers_and_heads():
    model, inputs = one(tiny.llava_clip)
    every = attended(model, inputs, answer=ANSWER)
    some = attended(model, inputs, answer=ANSWER, layers=[-1], heads=[2, 0])
    assert some.layers == (1,) and some.heads == (0, 2)
    assert torch.equal(some.weights, every.weights[:, 1:, [0, 2]])
    matrix = eager_matrices(model, inputs)[1][[0, 2]].mean(0)
    image = find_layout(model, inputs["input_ids"]).image[0].nonzero()[:, 0]
    rolled = attended(model, inputs, answer=ANSWER, layers=[1], heads=[0, 2], rollout=True)
    torch.testing.assert_close(rolled.weights[:, 0, 0], matrix[-3:, image] / 2, atol=2e-5, rtol=0)


def test_the_answer_may_be_asked_for_given_with_the_prompt_or_end_early():
    model, inputs = one(tiny.llava_clip)
    sequence = model.generate(**inputs)
    asked = attended(model, inputs)
    assert asked.answer.tolist() == sequence[0, inputs["input_ids"].shape[1] :].tolist()
    torch.testing.assert_close(attended(model, inputs, answer=sequence).weights, asked.weights)
    torch.testing.assert_close(attended(model, inputs, answer=asked.answer[:1]).weights, asked.weights[:1])
    ended = copy.deepcopy(model)
    ended.generation_config.eos_token_id = 41
    cut = attended(ended, inputs, answer=[40, 41, tiny.PAD, tiny.PAD])
    assert cut.answer.tolist() == [40, 41] and len(cut.weights) == 2


def test_padding_and_several_pictures():
    model, _ = tiny.llava_clip()
    prompt = (tiny.BOS, tiny.IMAGE, 10, tiny.IMAGE, 20)
    inputs = tiny.batch(model, [prompt])
    alone = attended(model, inputs, answer=ANSWER)
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (5, 0), value=tiny.PAD),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (5, 0)),
    }
    found = attended(model, {**inputs, **padded}, answer=ANSWER)
    torch.testing.assert_close(found.weights, alone.weights, atol=1e-5, rtol=0)
    first, second = alone.maps()
    assert first.shape == second.shape == (4, 4)
    torch.testing.assert_close(torch.cat([first.flatten(), second.flatten()]), alone.values())


def test_under_inhibition_it_is_what_is_left():
    model, inputs = one(tiny.llava_clip)
    with multimodal.cmai.inhibit_cross_modality(model, keep_ratio=0.25, layers=[1]):
        found = attended(model, inputs, answer=ANSWER)
        rolled = attended(model, inputs, answer=ANSWER, rollout=True)
    assert ((found.weights > 0).sum(-1) == torch.tensor([16, 4])[:, None]).all()  # layer 0 as before
    assert rolled.weights.shape == (3, 1, 1, 16) and not torch.allclose(
        rolled.weights, attended(model, inputs, answer=ANSWER, rollout=True).weights, atol=1e-4
    )


def test_under_mutual_attention_it_is_that_of_generating():
    model, inputs = one(tiny.llava_clip)
    plain = attended(model, inputs, answer=ANSWER)
    with multimodal.mma.modality_mutual_attention(model, stop_token_id=tiny.STOP):
        found = attended(model, inputs, answer=ANSWER)
        torch.testing.assert_close(found.weights, expected_weights_here(model, inputs), atol=2e-5, rtol=0)
    torch.testing.assert_close(found.weights[:, 0], plain.weights[:, 0])  # of the first layer images have read nothing
    assert not torch.allclose(found.weights[:, 1], plain.weights[:, 1], atol=1e-3)


def expected_weights_here(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """As :func:`expected_weights`, of the model itself with what is on it."""
    more = torch.tensor([ANSWER[:-1]])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": None}
    image = find_layout(model, inputs["input_ids"]).image[0].nonzero()[:, 0]
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**whole, output_attentions=True).attentions
    model.get_decoder().set_attn_implementation(before)
    return torch.stack(attentions)[:, 0, :, -len(ANSWER) :, image].permute(2, 0, 1, 3)


@families
def test_a_merged_token_shares_with_its_members(family: Any):
    model, inputs = one(family, (tiny.BOS, tiny.IMAGE, 20, tiny.IMAGE, tiny.STOP, 30))
    switch = multimodal.vmtc.compress_visual_tokens(model, keep_ratio=0.5, merge_share=0.5)
    with switch:
        found = attended(model, inputs, answer=ANSWER)
        expected = []
        for picture in switch.settings.last.pictures:  # type: ignore[union-attr]
            members = [(picture.target == place).nonzero()[:, 0] for place in picture.index]
            expected.append(torch.tensor([len(own) for own in members]))
            shares = [picture.scores[own] / picture.scores[own].sum() for own in members]
            start = sum(len(p.target) for p in switch.settings.last.pictures[: len(expected) - 1])  # type: ignore[union-attr]
            for own, share in zip(members, shares, strict=True):
                part = found.weights[0, 1, 0, own + start]
                torch.testing.assert_close(part, part.sum() * share)
    assert all((counts > 1).any() for counts in expected)
    assert found.weights.shape[-1] == int(find_layout(model, inputs["input_ids"]).image.sum())
    assert len(found.maps()) == 2


def test_of_a_model_whose_tokens_lie_nowhere_there_are_weights(monkeypatch: pytest.MonkeyPatch):
    model, inputs = one(tiny.llava_clip)
    monkeypatch.setattr("multimodal.grids._GRIDS", {})
    found = attended(model, inputs, answer=ANSWER)
    assert found.weights.shape == (3, 2, 4, 16) and found.grids is None
    with pytest.raises(ValueError, match=r"not known; give grid=\(height, width\)"):
        found.draw(Image.new("RGB", (16, 16)))
    assert attended(model, inputs, answer=ANSWER, grid=(2, 8)).maps()[0].shape == (2, 8)


def test_what_gets_most_is_brightest():
    model, inputs = one(tiny.llava_clip)
    found = attended(model, inputs, answer=ANSWER)
    drawn = found.draw(Image.new("RGB", (40, 20), "black"), token=-1)
    assert drawn.size == (336, 168)
    best, least = found.values(-1).argmax(), found.values(-1).argmin()
    light = np.asarray(drawn).astype(int).sum(-1)

    def at(place: Tensor) -> int:
        return light[int(place) // 4 * 42 + 21, int(place) % 4 * 84 + 42]

    assert at(best) > 2 * at(least)
    assert np.asarray(found.draw(Image.new("RGB", (40, 20)), quantile=0.5)).sum() > np.asarray(drawn).sum()


@pytest.mark.parametrize("kind", [CLIPImageProcessor, CLIPImageProcessorPil])
def test_what_a_processor_crops_is_not_drawn(kind: Any):
    picture = Image.new("RGB", (120, 60), "red")
    picture.paste("blue", (30, 0, 90, 60))
    crops = kind(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    assert seen_part(crops, picture).size == (60, 60)
    assert np.asarray(seen_part(crops, picture))[..., 0].max() == 0
    assert seen_part(kind(do_center_crop=False), picture) is picture
    distorts = kind(size={"height": 30, "width": 30}, crop_size={"height": 15, "width": 30})
    assert seen_part(distorts, picture).size == (120, 30)


def test_where_nothing_is_the_picture_shows():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 340, 3), np.uint8))
    field = np.zeros((4, 4), np.float32)
    field[3, 3] = 1
    drawn = np.asarray(overlay(picture, field)).astype(int)
    assert (drawn[:120] == np.asarray(picture)[:120]).all() and (
        drawn[-20:, -20:] != np.asarray(picture)[-20:, -20:]
    ).any()


WRONG = [
    ({"layers": [2]}, r"layers=\[2\] must be some of 0 to 1"),
    ({"layers": []}, r"layers=\[\] must be"),
    ({"heads": [-5]}, r"heads=\[-5\] must be some of 0 to 3"),
    ({"answer": []}, "the answer has no token"),
    ({"grid": (3, 5)}, r"grid=\(3, 5\) does not go into the 16 image tokens"),
    ({"grid": (0, 4)}, r"grid=\(0, 4\)"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_wrong_options_are_refused(options: dict[str, Any], message: str):
    model, inputs = one(tiny.llava_clip)
    with pytest.raises(ValueError, match=message):
        attended(model, inputs, **{"answer": ANSWER, **options})


def test_wrong_inputs_and_choices_are_refused():
    model, several = tiny.llava_clip()
    _, inputs = one(tiny.llava_clip)
    with pytest.raises(ValueError, match=r"a shape of \(2, 25\); give one prompt at a time"):
        attended(model, several, answer=ANSWER)
    with pytest.raises(ValueError, match="have none; give one prompt"):
        attended(model, {"inputs_embeds": torch.zeros(1, 4, 32)})
    with pytest.raises(ValueError, match="no image token is in input_ids"):
        attended(model, {"input_ids": torch.tensor([[1, 5, 6]])}, answer=ANSWER)
    flash = copy.deepcopy(model)
    flash.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' gives no access"):
        attended(flash, inputs, answer=ANSWER)
    with pytest.raises(TypeError, match="LlamaModel is not supported; supported are"):
        attended(model.get_decoder(), inputs, answer=ANSWER)
    found = attended(model, inputs, answer=ANSWER, layers=[1])
    for choice, message in (
        ({"token": 3}, "token=3: the answer has 3 tokens"),
        ({"layer": 0}, "layer=0 was not recorded; recorded are 1"),
        ({"head": 4}, "head=4 was not recorded; recorded are 0, 1, 2, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            found.values(**choice)
    with pytest.raises(ValueError, match="index=1: the prompt has 1 pictures"):
        found.draw(Image.new("RGB", (8, 8)), 1)
    with pytest.raises(ValueError, match="quantile=0 must be above 0"):
        found.draw(Image.new("RGB", (8, 8)), quantile=0)


def hooks_on(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_stays_on_the_model():
    model, inputs = one(tiny.llava_clip)
    model = copy.deepcopy(model)
    before, hooks = model(**inputs).logits, hooks_on(model)
    attended(model, inputs, answer=ANSWER)
    assert hooks_on(model) == hooks
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)
