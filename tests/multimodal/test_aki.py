"""The whole of AKI against its equations: features, resampler, their places, Phi-3 under the mutual mask, two heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_aki as tiny
import torch
from torch import Tensor

import multimodal
from multimodal.aki import AkiForConditionalGeneration

TWO_PICTURES = (tiny.BOS, 9, tiny.IMAGE, 20, 21, tiny.IMAGE, 22, tiny.STOP, 30)


def visible(ids: Sequence[int]) -> list[list[bool]]:
    """Which key each query sees in one row: what is before, and of an image the text up to the marker or next image."""
    rows = [[j <= i for j in range(len(ids))] for i in range(len(ids))]
    for i in (i for i, id in enumerate(ids) if id == tiny.IMAGE_ID):
        j = i
        while j < len(ids) and ids[j] == tiny.IMAGE_ID:
            j += 1
        while j < len(ids) and ids[j] != tiny.IMAGE_ID and tiny.STOP in ids[j:]:
            rows[i][j] = True
            if ids[j] == tiny.STOP:
                break
            j += 1
    return rows


def language_model(state: dict[str, Tensor], x: Tensor, mask: Tensor, heads: int, groups: int) -> Tensor:
    """Phi-3's equations for one row `[L, C]`: the states after its last norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * state[f"lang_model.model.{name}.weight"]

    def turned(x: Tensor) -> Tensor:  # [h, L, d], by rotary positions
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        one, two = x[..., :half], x[..., half:]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    d = x.shape[-1] // heads
    layers = {name.split(".")[3] for name in state if name.startswith("lang_model.model.layers.")}
    for n in range(len(layers)):
        own = {part: state[f"lang_model.model.layers.{n}.{part}.weight"] for part in (*ATTENTION, *FEED_FORWARD)}
        qkv = norm(x, f"layers.{n}.input_layernorm") @ own["self_attn.qkv_proj"].T
        q, k, v = (
            part.unflatten(-1, (-1, d)).transpose(0, 1) for part in qkv.split([heads * d, groups * d, groups * d], 1)
        )
        k, v = (part.repeat_interleave(heads // groups, 0) for part in (turned(k), v))
        scores = turned(q) @ k.transpose(1, 2) / math.sqrt(d)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + (weights @ v).transpose(0, 1).flatten(1) @ own["self_attn.o_proj"].T
        gate, up = (norm(x, f"layers.{n}.post_attention_layernorm") @ own["mlp.gate_up_proj"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ own["mlp.down_proj"].T
    return norm(x, "norm")


ATTENTION = ("self_attn.qkv_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_up_proj", "mlp.down_proj")


@torch.no_grad()
def by_equations(ids: Sequence[int], pictures: Tensor, mutual: bool = True) -> Tensor:
    """Logits `[L, V]` of one row without padding, from the tiny model's weights alone."""
    model = tiny.model()
    state = dict(model.state_dict())
    embedding = "lang_model.model.embed_tokens"
    x = torch.stack(
        [
            state[f"{embedding}.weight"][id]
            if id < tiny.IMAGE_ID
            else state[f"{embedding}.additional_embedding.weight"][id - tiny.IMAGE_ID]
            for id in ids
        ]
    )
    if len(pictures):
        tokens = model.vision_tokenizer(model.vision_encoder(pictures).last_hidden_state)  # tested beside the parts
        x[torch.tensor(ids) == tiny.IMAGE_ID] = tokens.flatten(0, 1)
    mask = torch.tensor(visible(ids)) if mutual else torch.ones(len(ids), len(ids)).tril().bool()
    states = language_model(state, x, mask, heads=4, groups=2)
    head = "lang_model.lm_head"
    first = states @ state[f"{head}.weight"].T + state[f"{head}.bias"]
    last = states @ state[f"{head}.additional_fc.weight"].T + state[f"{head}.additional_fc.bias"]
    return torch.cat([first[:, : tiny.IMAGE_ID], last], -1)


def rows(inputs: dict[str, Tensor], prompts: Sequence[Sequence[int]]) -> list[tuple[slice, list[int], Tensor]]:
    """Of each row: where it stands between its padding, its ids, its pictures."""
    found, first = [], 0
    for ids, mask, prompt in zip(inputs["input_ids"], inputs["attention_mask"], prompts, strict=True):
        where = mask.nonzero()[:, 0]
        count = list(prompt).count(tiny.IMAGE)
        own = slice(int(where[0]), int(where[-1]) + 1)
        found.append((own, ids[own].tolist(), tiny.pictures(99)[first : first + count]))
        first += count
    return found


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    return model(**inputs, **more).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_forward_is_its_equations(implementation: str, padding: str):
    prompts = (*tiny.PROMPTS, TWO_PICTURES, (tiny.BOS, 7, 8, 9), (tiny.BOS, 61, tiny.IMAGE, 13, 14))
    model = copy.deepcopy(tiny.model())
    model.set_attn_implementation(implementation)
    inputs = tiny.batch(prompts, padding=padding)
    inputs["pixel_values"] = tiny.pictures(99)[: len(inputs["pixel_values"])]
    found = logits(model, inputs)
    assert found.shape == (*inputs["input_ids"].shape, 62) and found.isfinite().all()
    for row, (own, ids, pictures) in zip(found, rows(inputs, prompts), strict=True):
        close(row[own], by_equations(ids, pictures))


def test_the_mask_is_what_makes_the_difference():
    inputs = tiny.batch(tiny.PROMPTS[:1])
    ((_, ids, pictures),) = rows(inputs, tiny.PROMPTS[:1])
    causal = tiny.new_model(modality_mutual=False)
    assert not torch.allclose(by_equations(ids, pictures), by_equations(ids, pictures, mutual=False), atol=1e-2)
    close(logits(causal, inputs)[0], by_equations(ids, pictures, mutual=False))
    with multimodal.modality_mutual_attention(causal):  # its configuration knows the marker
        close(logits(causal, inputs)[0], by_equations(ids, pictures))
    with multimodal.modality_mutual_attention(tiny.model()):  # twice is once
        close(logits(tiny.model(), inputs)[0], by_equations(ids, pictures))


def test_a_switch_told_otherwise_is_heeded():
    inputs, model = tiny.batch([TWO_PICTURES]), tiny.model()
    plain = logits(model, inputs)
    with multimodal.modality_mutual_attention(model, scope="question"):
        assert not torch.allclose(logits(model, inputs), plain, atol=1e-3)
    assert torch.equal(logits(model, inputs), plain)


def test_captions_and_text_alone_are_causal():
    for prompt in (
        (tiny.BOS, tiny.IMAGE, 20, 21),
        (tiny.BOS, tiny.STOP, tiny.IMAGE, 20),
        (tiny.BOS, 20, 21, tiny.STOP),
    ):
        inputs = tiny.batch([prompt])
        close(logits(tiny.model(), inputs), logits(tiny.new_model(modality_mutual=False), inputs))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(padding: str):
    inputs = tiny.batch(padding=padding)
    for index, (own, ids, _) in enumerate(rows(inputs, tiny.PROMPTS)):
        alone = {"input_ids": torch.tensor([ids]), "pixel_values": inputs["pixel_values"][index : index + 1]}
        close(logits(tiny.model(), inputs)[index, own], logits(tiny.model(), alone)[0])


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_what_is_generated_is_what_full_forwards_say(options: dict[str, Any]):
    inputs = tiny.batch((*tiny.PROMPTS, TWO_PICTURES))
    out = tiny.model().generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **options)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], 1)
    full = logits(tiny.model(), {**inputs, "input_ids": out.sequences[:, :-1], "attention_mask": mask})
    close(torch.stack(out.logits, 1), full[:, -4:])
    full[..., tiny.IMAGE_ID] = -torch.inf
    assert torch.equal(full[:, -4:].argmax(-1), out.sequences[:, length:])


def test_beams_of_a_batch_are_those_of_its_rows():
    inputs = tiny.batch()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3}
    new = tiny.model().generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for index, (_, ids, _) in enumerate(rows(inputs, tiny.PROMPTS)):
        alone = {"input_ids": torch.tensor([ids]), "pixel_values": inputs["pixel_values"][index : index + 1]}
        assert torch.equal(new[2 * index : 2 * index + 2], tiny.model().generate(**alone, **options)[:, len(ids) :])


def test_embeddings_instead_of_ids_and_pictures_in_other_forms_say_the_same():
    inputs, model = tiny.batch(), tiny.model()
    expected = logits(model, inputs)
    ids, mask, pictures = inputs.values()
    with torch.no_grad():
        embeds, encoded = model.get_input_embeddings()(ids), model.get_image_features(pictures)
    for other in (
        {"inputs_embeds": embeds, "pixel_values": pictures},
        {"input_ids": ids, "pixel_values": pictures.view(2, 1, 1, 3, 16, 16)},
        {"input_ids": ids, "mm_encoder_outputs": {"image": encoded}},
    ):
        assert torch.equal(logits(model, {**other, "attention_mask": mask}), expected)
    close(logits(model, inputs, logits_to_keep=2), expected[:, -2:])
    both = model.generate(inputs_embeds=embeds, attention_mask=mask, pixel_values=pictures)
    assert torch.equal(both, model.generate(**inputs)[:, ids.shape[1] :])


def test_a_conversation_goes_on_from_its_cache():
    """Pictures of one turn do not see the text of the next, so that a cache stays right."""
    model, turn = tiny.model(), tiny.batch(tiny.PROMPTS[:1])
    more = torch.tensor([[31, 32, tiny.STOP, 33]])
    with torch.no_grad():
        cache = model(**turn, use_cache=True).cache
        mask = torch.ones(1, turn["input_ids"].shape[1] + 4, dtype=torch.long)
        found = model(input_ids=more, attention_mask=mask, cache=cache).logits
    whole = {"input_ids": torch.cat([turn["input_ids"], more], 1), "pixel_values": turn["pixel_values"]}
    close(found, logits(model, whole)[:, -4:])


def test_every_weight_but_the_unused_head_of_the_tower_is_trained_by_the_answer():
    model, inputs = copy.deepcopy(tiny.model()).train(), tiny.batch()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -1] = 30
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, -out.logits[0, -2].log_softmax(-1)[30])
    out.loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without and all(name.startswith("vision_encoder.head.") for name in without)
    state = {name: weight.grad for name, weight in model.named_parameters() if name not in without}
    assert all(gradient.isfinite().all() for gradient in state.values() if gradient is not None)
    checkpointed = copy.deepcopy(tiny.model()).train()
    checkpointed.activation_checkpointing_enable()
    checkpointed(**inputs, labels=labels, use_cache=False).loss.backward()
    for name, weight in checkpointed.named_parameters():
        if name not in without:
            torch.testing.assert_close(weight.grad, state[name], rtol=1e-4, atol=1e-5)


def test_a_copy_is_the_same_model():
    assert torch.equal(logits(copy.deepcopy(tiny.model()), tiny.batch()), logits(tiny.model(), tiny.batch()))


def test_with_compression_and_inhibition_in_any_order():
    inputs, model = tiny.batch(), tiny.model()
    shorter = multimodal.compress_visual_tokens(model, num_tokens=3)
    focused = multimodal.inhibit_cross_modality(model, keep_ratio=0.4, layers=[0, 1])
    outputs = []
    for outer, inner in ((shorter, focused), (focused, shorter)):
        with outer, inner:
            outputs.append(logits(model, inputs))
            assert model.generate(**inputs).shape == (2, inputs["input_ids"].shape[1] + 4)
    assert outputs[0].shape[1] < inputs["input_ids"].shape[1] and torch.equal(*outputs)
    with shorter:
        mutual = logits(model, inputs)
    causal = tiny.new_model(modality_mutual=False)
    with multimodal.compress_visual_tokens(causal, num_tokens=3):
        assert not torch.allclose(logits(causal, inputs), mutual, atol=1e-3)
        with multimodal.modality_mutual_attention(causal):
            close(logits(causal, inputs), mutual)


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch):
    model, inputs = tiny.model(), tiny.batch()
    ids, pictures = inputs["input_ids"], inputs["pixel_values"]
    for changes, message in (
        ({"pixel_values": pictures[:1]}, "the prompt has 10 image tokens, but the pictures make 5"),
        ({"pixel_values": None}, "has 10 image tokens, but no picture was given; give pixel_values"),
        ({"pixel_values": pictures[0]}, r"pixel_values have the shape \(3, 16, 16\)"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds is needed"),
        ({"inputs_embeds": torch.zeros(2, 3, 32)}, "exactly one of input_ids and inputs_embeds is needed"),
        ({"mm_encoder_outputs": {"image": None}}, "were both given"),
        ({"labels": ids}, "stand on text that images see"),
    ):
        with pytest.raises(ValueError, match=message):
            logits(model, {**inputs, **changes})
    with pytest.raises(ValueError, match="tables of their own"):
        model.resize_token_embeddings(70)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    monkeypatch.setattr(model.lang_model.model.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match=r"flash_attention_2.*one of eager, sdpa"):
        logits(model, inputs)


def test_a_prompt_in_parts_is_refused():
    model, inputs = tiny.model(), tiny.batch(tiny.PROMPTS[:1])
    with pytest.raises(ValueError, match="one piece"):
        model.generate(**inputs, prefill_chunk_size=8)
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :9], pixel_values=inputs["pixel_values"], use_cache=True).cache
    with pytest.raises(ValueError, match="one piece"):
        logits(model, {"input_ids": ids[:, 9:], "cache": cache})
    causal = tiny.new_model(modality_mutual=False)
    whole, parts = causal.generate(**inputs), causal.generate(**inputs, prefill_chunk_size=8)
    assert torch.equal(whole, parts)


def test_it_is_a_model_of_the_supported_families():
    layout = multimodal.layout.find_layout(tiny.model(), tiny.batch()["input_ids"], tiny.batch()["attention_mask"])
    assert isinstance(tiny.model(), AkiForConditionalGeneration)
    assert layout.image.sum(1).tolist() == [tiny.TOKENS, tiny.TOKENS] and not layout.frame.any()
