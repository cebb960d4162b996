"""Modality-mutual attention: against the authors' masks and loops, with and without a cache, and what it refuses."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_vlm as tiny
import torch
from tiny_vlm import continued, logits, same
from torch import Tensor
from transformers import CLIPVisionConfig, Gemma2Config, LlavaConfig, LlavaForConditionalGeneration, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from multimodal.layout import find_layout
from multimodal.mma import modality_mutual_attention, mutual_mask

GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "aki_mma_masks.json").read_text(encoding="utf-8"))
IMAGE_ID, STOP_ID = 32012, 32001  # of the authors' model

families = pytest.mark.parametrize("family", tiny.FAMILIES.values(), ids=tiny.FAMILIES.keys())
two_families = pytest.mark.parametrize("family", [tiny.llava_clip, tiny.qwen2_5_vl], ids=lambda family: family.__name__)

# Two pictures in two turns; two side by side; text between two; a picture in the last place but the marker's.
TURNS = (tiny.BOS, 10, tiny.IMAGE, 20, 21, tiny.STOP, 30, 31, tiny.IMAGE, 22, tiny.STOP, 32)
BESIDE = (tiny.BOS, tiny.IMAGE, tiny.IMAGE, 20, 21, tiny.STOP, 30)
BETWEEN = (tiny.BOS, tiny.IMAGE, 20, 21, tiny.IMAGE, 22, 23, tiny.STOP)
LAST = (tiny.BOS, 20, 21, tiny.IMAGE, tiny.STOP)

switch: Any = functools.partial(modality_mutual_attention, stop_token_id=tiny.STOP)


def answered(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens that are generated, and their logits `[B, new, V]`."""
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, 1)


def drawn(rows: Sequence[str]) -> Tensor:
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


# The mask by itself.


@pytest.mark.parametrize("case", [c for c in GOLDEN["cases"] if "mask_rows" in c], ids=lambda case: case["name"])
def test_masks_are_those_of_the_authors_code(case: dict[str, Any]):
    mask = mutual_mask(
        torch.tensor(case["input_ids"]),
        image_token_id=IMAGE_ID,
        tokens_per_image=case["n_vision_tokens"],
        stop_token_id=STOP_ID,
        attention_mask=torch.tensor(case["attention_mask_2d"]),
    )
    assert mask.dtype == torch.bool
    assert torch.equal(mask[:, 0], torch.stack([drawn(rows) for rows in case["mask_rows"]]))


@pytest.mark.parametrize("case", GOLDEN["two_image_union"], ids=lambda case: case["name"])
def test_two_images_are_the_union_of_the_authors_masks_for_each(case: dict[str, Any]):
    ids = torch.full((1, case["length"]), 100)
    image = torch.zeros_like(ids, dtype=torch.bool)
    starts = [block["image_start"] for block in case["image_blocks"]]
    for block, following in zip(case["image_blocks"], [*starts[1:], case["length"]], strict=True):
        image[0, block["image_start"] : min(block["text_start"], following)] = True
        ids[0, block["text_end"] - 1] = STOP_ID
    ids[image] = IMAGE_ID
    mask = mutual_mask(ids, image_token_id=IMAGE_ID, tokens_per_image=1, stop_token_id=STOP_ID)
    assert torch.equal(mask[0, 0], drawn(case["mask_rows"]))


def loop_mask(ids: list[int], image: list[bool], text: list[bool], stops: Any, scope: str) -> Tensor:
    """Who sees whom in a row without padding, query by query, in the words of the documentation."""
    L = len(ids)
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    is_stop = [stops is not None and text[k] and ids[k] in stops for k in range(L)]
    for i in range(L):
        if scope == "all":
            for j in range(i + 1, L):
                mask[i, j] = (image[i] and text[j]) or (text[i] and image[j])
        elif image[i] and (stops is None or any(is_stop[i:])):
            words = False  # since the picture
            for j in range(i + 1, L):
                if image[j] and words and scope == "segment":
                    break  # what follows is another picture's
                words = words or text[j]
                mask[i, j] = text[j]
                if is_stop[j]:
                    break
    return mask


@pytest.mark.parametrize("scope", ["segment", "question", "all"])
@pytest.mark.parametrize("stops", [None, (tiny.STOP,), (tiny.STOP, 22)], ids=str)
def test_decoders_get_the_mask_that_loops_make(scope: Any, stops: tuple[int, ...] | None):
    for family in (tiny.llava_clip, tiny.smolvlm):  # all in one run; markers, tiles and line breaks
        model, _ = family()
        for prompt in (TURNS, BESIDE, BETWEEN, LAST, *tiny.PROMPTS):
            inputs = tiny.batch(model, [prompt, prompt[:-1] if prompt[-1] != tiny.STOP else prompt])
            ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
            given: list[Any] = []
            handle = (
                model.get_decoder()
                .layers[0]
                .register_forward_pre_hook(
                    lambda module, args, kwargs, given=given: given.append(kwargs["attention_mask"]), with_kwargs=True
                )
            )
            with modality_mutual_attention(model, stop_token_id=stops, scope=scope):
                logits(model, inputs)
            handle.remove()
            layout = find_layout(model, ids, inputs["attention_mask"])
            for row, mask in enumerate(given[0][:, 0]):
                own = valid[row]
                parts = [part[row][own].tolist() for part in (ids, layout.image, layout.text)]
                expected = loop_mask(*parts, stops, scope)
                assert torch.equal(mask[own][:, own], expected)
                assert not mask[own][:, ~own].any()


def test_rows_with_fewer_images_are_padded_where_padding_is():
    ids = torch.tensor([[1, 9, 9, 5, 3], [0, 1, 9, 5, 3]])
    options: Any = {"image_token_id": 9, "tokens_per_image": 3, "stop_token_id": 3}
    both = mutual_mask(ids, attention_mask=(ids > 0).long(), **options)
    alone = mutual_mask(ids[1:, 1:], **options)
    assert both.shape == (2, 1, 9, 9)
    assert torch.equal(both[1:, :, 3:, 3:], alone) and not both[1, :, :, :3].any()
    right = mutual_mask(ids[:, [0, 1, 2, 3, 4]].where(torch.tensor([[True], [False]]), ids.roll(-1, 1)), **options)
    assert torch.equal(right[1:, :, :6, :6], alone)


def test_several_markers_and_none():
    ids = torch.tensor([[9, 5, 6, 7, 8]])
    make = functools.partial(mutual_mask, ids, image_token_id=9, tokens_per_image=1)
    assert make(stop_token_id=[7, 6])[0, 0, 0].tolist() == [True, True, True, False, False]
    assert make(stop_token_id=4)[0, 0, 0].tolist() == [True, False, False, False, False]
    assert make(stop_token_id=None)[0, 0, 0].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, "must be \\[batch, length\\]"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\), but input_ids \(1, 2\)"),
        ({"tokens_per_image": 0}, "tokens_per_image=0"),
        ({"stop_token_id": []}, r"stop_token_id=\[\] must be the id"),
        ({"stop_token_id": -5}, "stop_token_id=-5"),
        ({"scope": "prompt"}, "scope='prompt' must be one of 'segment', 'question', 'all'"),
    ],
)
def test_a_mask_of_nothing_is_refused(options: dict[str, Any], message: str):
    good: dict[str, Any] = {"input_ids": torch.tensor([[9, 2]]), "image_token_id": 9, "tokens_per_image": 2}
    with pytest.raises(ValueError, match=message):
        mutual_mask(**{**good, "stop_token_id": 2, **options})


# On models.


@families
def test_text_behind_an_image_changes_and_off_again_nothing_does(family: Any):
    model, inputs = family()
    plain, valid = logits(model, inputs), inputs["attention_mask"].bool()
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with switch(model):
        on = logits(model, inputs)
    assert torch.equal(logits(model, inputs), plain)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
    assert "generate" not in vars(model)
    image = find_layout(model, inputs["input_ids"], inputs["attention_mask"]).image
    ahead = valid & (image.cumsum(1) == 0)  # the system's words, and what leads an image in
    same(on[ahead], plain[ahead])
    change = (on - plain).abs().amax(-1)
    assert on.isfinite().all() and change[image].min() > 1e-3
    assert change[valid & ~image & ~ahead].max() > 1e-2


@families
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generating_with_a_cache_is_the_full_forward(family: Any, implementation: str):
    model = copy.deepcopy(family()[0])
    model.set_attn_implementation(implementation)
    for prompts, side in ((tiny.PROMPTS, "left"), ((TURNS, BESIDE), "left")):
        inputs = tiny.batch(model, prompts, padding=side)
        with switch(model):
            sequences, cached = answered(model, inputs)
            full = logits(model, continued(inputs, sequences))[:, -5:-1]
            uncached = answered(model, inputs, use_cache=False)
            static = answered(model, inputs, cache_implementation="static")
        same(cached, full)
        for other in (uncached, static):
            assert torch.equal(other[0], sequences)
            same(other[1], cached)


@two_families
def test_without_a_marker_what_is_generated_is_not_seen(family: Any):
    model, inputs = family()
    with modality_mutual_attention(model):
        sequences, cached = answered(model, inputs)
        uncached = answered(model, inputs, use_cache=False)
        with pytest.raises(AssertionError):  # in a forward of all, answers are text as any other
            same(logits(model, continued(inputs, sequences))[:, -5:-1], cached)
    assert torch.equal(uncached[0], sequences)
    same(uncached[1], cached)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers sets it
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # whose kernels for CPUs are wrong
@pytest.mark.parametrize("family", [tiny.llava_clip, tiny.idefics3], ids=lambda family: family.__name__)
def test_flex_attention_gives_what_sdpa_gives(family: Any):
    model, inputs = family()
    with switch(model):
        expected, (sequences, answers) = logits(model, inputs), answered(model, inputs)
    model = copy.deepcopy(model)
    model.get_decoder().set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"), switch(model):
        got = logits(model, inputs)
        tokens, cached = answered(model, inputs)
    valid = inputs["attention_mask"].bool()
    same(got[valid], expected[valid])
    assert torch.equal(tokens, sequences)
    same(cached, answers)


@families
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(family: Any, padding: str):
    model, _ = family()
    prompts = (TURNS, BESIDE, BETWEEN)
    inputs = tiny.batch(model, prompts, padding=padding)
    if family is tiny.paligemma:  # without, transformers makes it causal in a padded batch and not so alone
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    mask = inputs["attention_mask"]
    positions = {} if "mm_token_type_ids" in inputs else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with switch(model):
        together = logits(model, {**inputs, **positions})
        for row in (1, 2):
            alone = rows_of(model, inputs, prompts, row)
            same(together[row][mask[row].bool()], logits(model, alone)[0])


def rows_of(model: Any, inputs: dict[str, Tensor], prompts: Sequence[Any], row: int) -> dict[str, Tensor]:
    """One row of a batch, without padding, and its pictures."""
    own = inputs["attention_mask"][row].bool()
    alone = {n: inputs[n][row : row + 1, own] for n in ("input_ids", "attention_mask") if n in inputs}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            alone[name] = inputs[name][row : row + 1, own]
    first, count = (sum(p.count(tiny.IMAGE) for p in some) for some in (prompts[:row], prompts[row : row + 1]))
    pictures = slice(first, first + count)
    if model.config.model_type in ("idefics3", "smolvlm"):
        alone["pixel_values"] = inputs["pixel_values"][row : row + 1, : 3 * count]
    elif "image_grid_thw" in inputs:
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        alone["image_grid_thw"] = inputs["image_grid_thw"][pictures]
        alone["pixel_values"] = inputs["pixel_values"].split(sizes)[first : first + count]
        alone["pixel_values"] = torch.cat(list(alone["pixel_values"]))
    else:
        alone |= {name: inputs[name][pictures] for name in ("pixel_values", "image_sizes") if name in inputs}
    return alone


@two_families
def test_beams_are_scored_as_the_full_forward_scores_them(family: Any):
    model, inputs = family()
    with switch(model):
        out = model.generate(**inputs, num_beams=3, return_dict_in_generate=True, output_scores=True, length_penalty=0)
        whole = continued(inputs, out.sequences)
        scores = logits(model, whole)[:, -5:-1].log_softmax(-1)
    chosen = scores.gather(2, out.sequences[:, -4:, None]).sum((1, 2))
    torch.testing.assert_close(chosen, out.sequences_scores, atol=1e-4, rtol=0)


def test_prompts_seen_in_both_directions_stay_what_they_are():
    model, inputs = tiny.paligemma()
    prefix = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    plain, written = logits(model, prefix), model.generate(**prefix)
    with switch(model):
        assert torch.equal(logits(model, prefix), plain)
        assert torch.equal(model.generate(**prefix), written)


def windowed() -> Any:
    """LLaVA with Gemma 2, of whose layers every other one sees the last few tokens only."""
    text = Gemma2Config(**tiny.TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=12)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**tiny.VISION), text_config=text, **tiny.LLAVA)
    return tiny._model(LlavaForConditionalGeneration, config)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_layers_with_windows_are_opened_too(cache: str):
    model = windowed()
    inputs = tiny.batch(model)
    plain = logits(model, inputs)
    with switch(model):
        assert not torch.allclose(logits(model, inputs), plain, atol=1e-2)
        sequences, cached = answered(model, inputs, cache_implementation=cache, max_new_tokens=6)
        full = logits(model, continued(inputs, sequences))[:, -7:-1]
    same(cached, full)


# Training.


def training_batch(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    inputs = tiny.batch(model, [(*p, 33, 34) for p in tiny.PROMPTS], padding="right")
    ids = inputs["input_ids"]
    answer = ((ids == tiny.STOP).cumsum(1) > 0) & (ids != tiny.STOP) & inputs["attention_mask"].bool()
    return inputs, ids.where(answer, -100)


@families
def test_training_reaches_the_question_through_the_image(family: Any):
    model = copy.deepcopy(family()[0]).train()
    inputs, labels = training_batch(model)
    with switch(model):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        model.activation_checkpointing_enable()
        grads = [p.grad.clone() for p in model.get_decoder().layers.parameters()]
        model.zero_grad()
        again = model(**inputs, labels=labels, use_cache=False).loss
        again.backward()
    plain = model(**inputs, labels=labels, use_cache=False).loss
    assert loss.isfinite() and not torch.allclose(plain, loss)
    same(again.detach(), loss.detach())
    for own, first in zip(model.get_decoder().layers.parameters(), grads, strict=True):
        torch.testing.assert_close(own.grad, first, atol=1e-5, rtol=1e-3)


def test_labels_that_images_see_are_refused():
    model, _ = tiny.llava_clip()
    inputs, labels = training_batch(model)
    leak = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    with switch(model):
        with pytest.raises(ValueError, match=r"8 labels, the first at \[0, 19\], stand on text that images see"):
            model(**inputs, labels=leak)
        with pytest.raises(ValueError, match=r"labels have shape \(2, 3\)"):
            model(**inputs, labels=labels[:, :3])
    with modality_mutual_attention(model), pytest.raises(ValueError, match="give stop_token_id="):
        model(**inputs, labels=labels)


def test_captions_without_a_marker_are_trained_causally():
    model, _ = tiny.llava_clip()
    inputs = tiny.batch(model, [(tiny.BOS, tiny.IMAGE, 20, 21, 22)])
    plain = logits(model, {**inputs, "labels": inputs["input_ids"]})
    with switch(model):
        same(logits(model, {**inputs, "labels": inputs["input_ids"]}), plain)


# What it refuses.


def test_prompts_in_parts_are_refused():
    model, inputs = tiny.llava_clip()
    cut = 14  # within both pictures
    first = {name: inputs[name][:, :cut] for name in ("input_ids", "attention_mask")}
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    counts = (first["input_ids"] == tiny.IMAGE_ID).sum(1).tolist()
    rows = [own[:count] for own, count in zip(features, counts, strict=True)]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=rows)}
    rest = {"input_ids": inputs["input_ids"][:, cut:], "attention_mask": inputs["attention_mask"]}
    with switch(model), torch.no_grad():
        cache = model(**first, mm_encoder_outputs=encoded, use_cache=True).cache
        with pytest.raises(ValueError, match="holds an image whose question comes only now"):
            model(**rest, cache=cache)
        with pytest.raises(ValueError, match="the cache ends between an image and its question"):
            model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache)
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**inputs, prefill_chunk_size=8)
    model.generate(**inputs, max_new_tokens=1)  # plainly


def test_a_second_turn_goes_on_from_the_cache():
    model, _ = tiny.llava_clip()
    inputs = tiny.batch(model, [(tiny.BOS, tiny.IMAGE, 20, 21, tiny.STOP)])
    with switch(model):
        out = model.generate(**inputs, return_dict_in_generate=True)
        turn = torch.cat([out.sequences, torch.tensor([[40, 41, tiny.STOP]])], 1)
        whole = {**inputs, "input_ids": turn, "attention_mask": torch.ones_like(turn)}
        text = {"input_ids": turn, "attention_mask": torch.ones_like(turn), "cache": out.cache}
        same(answered(model, text)[1], answered(model, whole)[1])


def test_prompts_in_which_images_see_nothing_are_refused():
    model, inputs = tiny.llava_clip()
    with switch(model):
        with pytest.raises(ValueError, match="no image token is in input_ids"):
            model(input_ids=torch.tensor([[1, 2, 3]]))
        with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 4, 32))
        with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
            model.generate(inputs_embeds=torch.zeros(1, 4, 32))
        with pytest.raises(RuntimeError, match="run by itself"):
            model.get_decoder()(inputs_embeds=torch.zeros(1, 4, 32))
    with modality_mutual_attention(model, stop_token_id=63):
        with pytest.raises(ValueError, match=r"images of rows \[0, 1\] see no text .* a marker that ends it"):
            model.generate(**inputs)
    model.get_decoder()(inputs_embeds=torch.zeros(1, 4, 32))


def test_packed_sequences_are_refused():
    model, _ = tiny.llava_clip()
    inputs = tiny.batch(model, [tiny.PROMPTS[0]])
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)])[None]
    with switch(model), pytest.raises(ValueError, match="several sequences in one row"):
        model(**inputs, position_ids=positions, use_cache=False)


def test_flash_attention_is_refused_by_name():
    model = copy.deepcopy(tiny.llava_clip()[0])
    inputs = tiny.llava_clip()[1]
    decoder = model.get_decoder()
    with switch(model):
        decoder.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(ValueError, match=r"'flash_attention_2' takes no mask .* eager, sdpa, flex_attention"):
            model(**inputs)
    with pytest.raises(ValueError, match=r"'flash_attention_2' takes no mask .* eager, sdpa, flex_attention"):
        switch(model)


def test_wrong_models_and_options_are_refused():
    model, _ = tiny.llava_clip()
    with pytest.raises(TypeError, match="LlamaModel is not supported; supported are AkiFor"):
        switch(model.get_decoder())
    with pytest.raises(ValueError, match="scope='turn' must be one of"):
        switch(model, scope="turn")
    with pytest.raises(ValueError, match="stop_token_id='<assistant>' must be the id"):
        modality_mutual_attention(model, stop_token_id="<assistant>")
    with pytest.raises(TypeError, match="compiled"):
        switch(torch.compile(model, backend="eager"))
    with switch(model), pytest.raises(ValueError, match="under modality-mutual attention already"), switch(model):
        pass


# Models that are not plain.


@pytest.mark.slow
def test_a_model_compiled_after_switching_on_has_the_mask():
    model, inputs = copy.deepcopy(tiny.llava_clip()[0]), tiny.llava_clip()[1]
    plain = logits(model, inputs)
    with switch(model):
        eager = logits(model, inputs)
        compiled = logits(torch.compile(model, backend="eager"), inputs)
    same(compiled, eager)
    assert not torch.allclose(eager, plain, atol=1e-2)


def test_a_model_in_pieces_has_the_mask():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = copy.deepcopy(tiny.llava_clip()[0]), tiny.llava_clip()[1]
    with switch(model):
        expected, written = logits(model, inputs), model.generate(**inputs)
    accelerate.cpu_offload(model)
    with switch(model):
        same(logits(model, inputs), expected)
        assert torch.equal(model.generate(**inputs), written)


def test_prepared_masks_of_the_caller_are_opened_and_keep_what_they_close():
    model, _ = tiny.llava_clip()
    inputs = tiny.batch(model, [tiny.PROMPTS[1]])
    length = inputs["input_ids"].shape[1]
    embeds = torch.zeros(1, length, 32)
    made: Any = create_masks_for_generate(
        model.get_decoder().config, embeds, torch.ones(1, length), None, or_mask_function=lambda b, h, q, k: q < 0
    )
    with switch(model):
        same(logits(model, {**inputs, "attention_mask": made}), logits(model, inputs))


def test_a_static_cache_of_the_callers_is_filled_alike():
    model, inputs = tiny.llava_clip()
    with switch(model):
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        same(logits(model, {**inputs, "cache": cache}), logits(model, inputs))


def test_where_everything_is_seen_without_a_mask_it_stays_seen():
    """PaliGemma's layers are not causal by themselves: a prompt without padding sees itself in both directions."""
    model, inputs = tiny.paligemma()
    alone = {"input_ids": inputs["input_ids"][:1], "pixel_values": inputs["pixel_values"][:1]}
    with torch.no_grad():
        plain = model(**alone).logits
        with modality_mutual_attention(model, stop_token_id=tiny.STOP):
            assert torch.equal(model(**alone).logits, plain)
