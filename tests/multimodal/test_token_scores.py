"""Scores of image tokens: the attention that their patches receive, as the vision encoder itself computes it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_aki
import tiny_vlm as tiny
import torch
from torch import Tensor
from transformers import AttentionInterface

from multimodal.layout import family_of
from multimodal.token_scores import importance, listen_to, listening, scored_attention, token_scores


@contextmanager
def attention_weights(model: Any) -> Iterator[dict[Any, list[Tensor]]]:
    """What each attention of the vision encoder computes, `[B, h, N, N]` for each call of it."""
    seen: dict[Any, list[Tensor]] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        seen.setdefault(module, []).append(weights)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("seen_by_a_test", attend)
    model.set_attn_implementation({"vision_config": "seen_by_a_test"})
    yield seen


def encoded(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Any, Tensor]:
    """Weights of the scored layer, features, and scores of the image tokens."""
    model = copy.deepcopy(model)
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    pictures = {name: inputs[name] for name in names if name in inputs}
    take_off = listen_to(model)
    with torch.no_grad(), attention_weights(model) as seen, listening() as heard:
        features = model.base_model.get_image_features(**pictures, return_dict=True).pooler_output
    take_off()
    count = sum(feature.flatten(0, -2).shape[0] for feature in features)
    scores = token_scores(model, heard, pictures, count)
    return seen[scored_attention(model)], features, scores


def received(weights: Tensor) -> Tensor:
    return weights.mean(1).mean(1)


def test_with_a_class_token_it_is_what_the_class_token_pays():
    model, inputs = tiny.llava_clip()
    (weights,), _, scores = encoded(model, inputs)
    assert weights.shape == (2, 4, 17, 17) and family_of(model).class_token(model)
    torch.testing.assert_close(scores.view(2, 16), weights[:, :, 0, 1:].mean(1))


@pytest.mark.parametrize("family", [tiny.llava_siglip, tiny.paligemma], ids=lambda family: family.__name__)
def test_without_a_class_token_it_is_what_all_patches_pay_on_average(family: Any):
    (weights,), _, scores = encoded(*family())
    torch.testing.assert_close(scores.view(2, 16), received(weights))


@pytest.mark.parametrize("family", [tiny.idefics3, tiny.smolvlm], ids=lambda family: family.__name__)
def test_of_shuffled_patches_it_is_the_mean(family: Any):
    (weights,), _, scores = encoded(*family())
    squares = received(weights).view(-1, 2, 2, 2, 2).mean((2, 4))  # tiles of 4 × 4 patches: rows, own rows, columns
    torch.testing.assert_close(scores, squares.flatten())


@pytest.mark.parametrize("family", [tiny.qwen2_vl, tiny.qwen2_5_vl], ids=lambda family: family.__name__)
def test_of_merged_patches_it_is_the_mean_wherever_windows_put_them(family: Any):
    model, inputs = family()
    units = []
    hook = model.model.visual.merger.register_forward_hook(lambda module, args, output: units.append(output))
    weights, features, scores = encoded(model, inputs)  # of a copy, with the hook
    hook.remove()
    assert [own.shape[-1] for own in weights] == [24, 32]  # pictures do not see each other
    mean = torch.cat([received(own)[0] for own in weights]).view(-1, 4).mean(1)  # in the encoder's order
    order = [int((units[0] == feature).all(1).nonzero()) for feature in torch.cat(features)]
    torch.testing.assert_close(scores, mean[order])
    if family is tiny.qwen2_5_vl:
        assert order != sorted(order)


@pytest.mark.parametrize("family", [tiny.llava_next, tiny.llava_onevision], ids=lambda family: family.__name__)
def test_at_any_resolution_line_breaks_have_the_mean_of_their_line(family: Any):
    model, inputs = family()
    (weights,), features, scores = encoded(model, inputs)
    own = weights[:, :, 0, 1:].mean(1) if family is tiny.llava_next else received(weights)  # [tiles, 16]
    for picture, side_by_side in enumerate((True, False)):  # the tiles of a wide one, and of a tall one
        whole, *parts = own[3 * picture : 3 * picture + 3].view(3, 4, 4)
        tiled = torch.cat(parts, 1 if side_by_side else 0)
        mine = scores.split([len(feature) for feature in features])[picture]
        torch.testing.assert_close(mine[:16], whole.flatten())
        breaks = (features[picture] == model.model.image_newline).all(1).nonzero()[:, 0]
        lines = mine[16:].view(len(breaks), -1)
        assert torch.equal(breaks, 16 + torch.arange(1, len(breaks) + 1) * lines.shape[1] - 1)
        torch.testing.assert_close(lines[:, -1], lines[:, :-1].mean(1))
        height, width = lines.shape[0], lines.shape[1] - 1
        top, left = (tiled.shape[0] - height) // 2, (tiled.shape[1] - width) // 2
        torch.testing.assert_close(lines[:, :-1], tiled[top : top + height, left : left + width])


def test_a_latent_has_the_scores_of_the_patches_that_it_reads():
    model, inputs = tiny_aki.model(), tiny_aki.batch()
    *_, scores = encoded(model, inputs)
    vision = model.vision_encoder(inputs["pixel_values"].flatten(0, -4), output_hidden_states=True)
    attention = scored_attention(model)
    last = model.vision_encoder.encoder.layers[-1]
    patches = importance(attention, last.layer_norm1(vision.hidden_states[-2]), class_token=False)
    resampler, latents = model.vision_tokenizer, model.vision_tokenizer.latents.expand(len(patches), -1, -1)
    (first, feed), (reading, _) = resampler.layers
    features = vision.last_hidden_state
    latents = latents + first(features, latents)
    latents = latents + feed(latents)
    seen = torch.cat((reading.norm_media(features), reading.norm_latents(latents)), 1)
    query, key = reading.to_q(reading.norm_latents(latents)), reading.to_kv(seen).chunk(2, -1)[0]
    heads = [(query[..., 4 * h : 4 * h + 4] @ key[..., 4 * h : 4 * h + 4].mT / 2).softmax(-1) for h in range(3)]
    reads = torch.stack(heads).mean(0)[:, :, : features.shape[1]]
    torch.testing.assert_close(scores.view(len(patches), -1), (reads @ patches[..., None])[..., 0])


def test_queries_in_chunks_and_masks_change_nothing_and_as_they_should(monkeypatch: pytest.MonkeyPatch):
    attention = scored_attention(tiny.llava_siglip()[0])
    hidden = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(2, 1, 10, 10, dtype=torch.bool)
    seen[1, :, :, 7:] = False
    whole = importance(attention, hidden, class_token=False, mask=seen)
    torch.testing.assert_close(whole[1, :7].sum(), torch.tensor(1.0))
    assert (whole[1, 7:] == 0).all()
    added = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(importance(attention, hidden, class_token=False, mask=added), whole)
    monkeypatch.setattr("multimodal.token_scores._CHUNK_BYTES", 4 * 2 * 4 * 10 * 3)  # three queries
    torch.testing.assert_close(importance(attention, hidden, class_token=False, mask=seen), whole)


def test_nothing_is_heard_when_nobody_listens_nor_of_a_copy():
    model, inputs = tiny.llava_clip()
    take_off = listen_to(model)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with torch.no_grad():
        model.get_image_features(inputs["pixel_values"])
        with listening() as heard:
            model.get_image_features(inputs["pixel_values"])
        model.get_image_features(inputs["pixel_values"])
    take_off()
    assert len(heard.scores) == 1 and not heard.scores[0].requires_grad
    assert hooks - 2 == sum(len(module._forward_pre_hooks) for module in model.modules())
