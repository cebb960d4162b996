"""Visual token compression on models: what the decoder gets, caches, beams, batches, training, and what it refuses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_aki
import tiny_vlm as tiny
import torch
from tiny_vlm import continued, logits, same
from torch import Tensor

from multimodal.layout import find_layout
from multimodal.vmtc import Compression, compress, compress_visual_tokens


def aki() -> tuple[Any, dict[str, Tensor]]:
    return tiny_aki.model(), tiny_aki.batch()


FAMILIES = {**tiny.FAMILIES, "aki": aki}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@contextmanager
def decoder_inputs(model: Any) -> Iterator[list[dict[str, Any]]]:
    """What the language model is given, forward by forward."""
    seen: list[dict[str, Any]] = []
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    yield seen
    hook.remove()


@families
def test_with_all_tokens_nothing_changes(family: Any):
    model, inputs = family()
    plain, written = logits(model, inputs), model.generate(**inputs)
    with compress_visual_tokens(model, keep_ratio=1) as handle:
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(model.generate(**inputs), written)
    shortened = handle.settings.last
    assert shortened is not None and torch.equal(shortened.attention_mask, inputs["attention_mask"])
    assert all(torch.equal(own.index, own.target) for own in shortened.pictures)


@families
def test_the_decoder_gets_text_as_it_was_and_compressed_pictures_in_their_places(family: Any):
    model, inputs = family()
    with decoder_inputs(model) as seen:
        logits(model, inputs)
        with compress_visual_tokens(model, keep_ratio=0.5) as handle:
            short_logits = logits(model, inputs)
    whole, short = seen
    last, image = handle.settings.last, find_layout(model, inputs["input_ids"]).image
    assert last is not None and short_logits.shape[:2] == last.columns.shape == short["inputs_embeds"].shape[:2]
    is_image = image.gather(1, last.columns) & last.attention_mask.bool()
    from_whole = whole["inputs_embeds"].gather(1, last.columns[..., None].expand_as(short["inputs_embeds"]))
    is_text = last.attention_mask.bool() & ~is_image
    assert torch.equal(short["inputs_embeds"][is_text], from_whole[is_text])
    text = find_layout(model, inputs["input_ids"], inputs["attention_mask"]).valid & ~image
    assert is_text.sum() == text.sum()
    features = whole["inputs_embeds"][image].split([len(own.scores) for own in last.pictures])
    left = short["inputs_embeds"][is_image].split([len(own.index) for own in last.pictures])
    for own, before, after in zip(last.pictures, features, left, strict=True):
        total = round(0.5 * len(before))
        merged = int(total / 6 + 1e-4)
        expected = compress(before[None], own.scores[None], total - merged, merged)
        assert torch.equal(own.index, expected.index[0]) and len(after) == total
        same(after, expected.features[0])


@families
def test_generating_with_a_cache_is_the_full_forward(family: Any):
    model, inputs = family()
    with compress_visual_tokens(model, keep_ratio=0.4) as handle:
        out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
        last = handle.settings.last
        full = logits(model, continued(inputs, out.sequences))
    assert torch.equal(out.sequences[:, :-5], inputs["input_ids"]) and last is not None
    same(torch.stack(out.logits, 1), full[:, -6:-1])
    # Of keys and values there are as many as text tokens and those left of the pictures.
    image = find_layout(model, inputs["input_ids"]).image
    text = (inputs["attention_mask"].bool() & ~image).sum(1).tolist()
    kept = [sum(len(own.index) for own in last.pictures if own.row == row) for row in range(2)]
    assert last.attention_mask.sum(1).tolist() == [t + k for t, k in zip(text, kept, strict=True)]
    assert out.cache.get_seq_length() == max(t + k for t, k in zip(text, kept, strict=True)) + 4


@families
def test_a_row_of_a_batch_is_what_it_is_alone(family: Any):
    model, _ = family()
    module = tiny_aki if family is aki else tiny
    image, stop = module.IMAGE, module.STOP
    prompts = [[1, 10, image, 11, 12, stop], [1, image, 10, image, 13, 14, 15, stop, 16], [1, 10, 11, image, stop]]
    make = module.batch if family is aki else lambda prompts, **how: tiny.batch(model, prompts, **how)
    with compress_visual_tokens(model, keep_ratio=0.5) as handle:
        for padding in ("left", "right"):
            together = make(prompts, padding=padding)
            together = continued(together, together["input_ids"])
            if family is tiny.paligemma:  # sees in both directions by these, and as it pleases without
                together["token_type_ids"] = torch.zeros_like(together["input_ids"])
            rows = logits(model, together)
            assert handle.settings.last is not None
            masks = handle.settings.last.attention_mask.bool()
            assert (masks[:, -1 if padding == "left" else 0]).all()
            for row, mask, alone in zip(rows, masks, _alone(make, prompts, together), strict=True):
                same(row[mask], logits(model, alone)[0])


def _alone(make: Any, prompts: list[list[int]], together: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The prompts one by one, with their own part of the pictures."""
    counts = [prompt.count(-1) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        alone = make([prompt])
        first, many = sum(counts[:row]), counts[row]
        for name in ("pixel_values", "image_sizes", "image_grid_thw"):
            if name in alone:
                alone[name] = _own(together, name, row, first, many)
        if "image_grid_thw" in alone or "image_sizes" in alone:  # pictures of another size
            ids, valid = together["input_ids"][row], together["attention_mask"][row].bool()
            alone["input_ids"] = ids[valid][None]
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            if "mm_token_type_ids" in alone:
                alone["mm_token_type_ids"] = together["mm_token_type_ids"][row][valid][None]
        if "token_type_ids" in together:
            alone["token_type_ids"] = torch.zeros_like(alone["input_ids"])
        yield continued(alone, alone["input_ids"])


def _own(together: dict[str, Tensor], name: str, row: int, first: int, many: int) -> Tensor:
    values = together[name]
    if name == "pixel_values" and "image_grid_thw" in together:
        patches = together["image_grid_thw"].prod(1).tolist()
        return values[sum(patches[:first]) : sum(patches[: first + many])]
    if name == "pixel_values" and values.ndim == 5 and "image_sizes" not in together:  # tiles, padded for each row
        return values[row : row + 1, : 3 * many]
    return values[first : first + many]


def test_positions_close_up_or_stay_and_padding_does_not_count():
    model, inputs = tiny.llava_clip()
    for positions in ("consecutive", "source"):
        with compress_visual_tokens(model, num_tokens=4, positions=positions) as handle, decoder_inputs(model) as seen:
            model.generate(**inputs, max_new_tokens=3)
            last = handle.settings.last
            assert last is not None
            logits(model, {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)})
        for row, (columns, mask) in enumerate(zip(last.columns, last.attention_mask.bool(), strict=True)):
            padding = int((inputs["attention_mask"][row] == 0).sum())
            source = columns[mask] - padding
            expected = source if positions == "source" else torch.arange(len(source))
            assert torch.equal(seen[0]["position_ids"][row][mask], expected)
            assert torch.equal(seen[-1]["position_ids"][row][mask], expected)
            assert seen[1]["position_ids"][row].tolist() == [int(expected[-1]) + 1]


@pytest.mark.parametrize("family", [tiny.qwen2_vl, tiny.qwen2_5_vl], ids=lambda family: family.__name__)
def test_positions_in_three_dimensions_are_those_of_the_tokens_that_stay(family: Any):
    model, inputs = family()
    with decoder_inputs(model) as seen:
        model.generate(**inputs, max_new_tokens=2)
        with compress_visual_tokens(model, keep_ratio=0.5) as handle:
            model.generate(**inputs, max_new_tokens=2)
            logits(model, inputs)
    last = handle.settings.last
    assert last is not None
    whole, step, short, short_step, forward = (given["position_ids"][-3:] for given in seen)
    mask = last.attention_mask.bool()
    for own in (short, forward):
        assert torch.equal(own[:, mask], whole.gather(2, last.columns.expand(3, -1, -1))[:, mask])
    assert torch.equal(short_step, step)


@pytest.mark.parametrize("family", [tiny.llava_siglip, tiny.qwen2_5_vl], ids=lambda family: family.__name__)
def test_decoding_by_forwards_is_generate(family: Any):
    model, inputs = family()
    row = {**inputs, "input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    if "mm_token_type_ids" in inputs:
        row["mm_token_type_ids"] = inputs["mm_token_type_ids"][:1]
        row["image_grid_thw"], row["pixel_values"] = inputs["image_grid_thw"][:1], inputs["pixel_values"][:24]
    else:
        row["pixel_values"] = inputs["pixel_values"][:1]
    with compress_visual_tokens(model, keep_ratio=0.5) as handle, torch.no_grad():
        out = model.generate(**row, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        step = model(**row, use_cache=True)
        assert handle.settings.last is not None
        given = {"attention_mask": handle.settings.last.attention_mask}
        for token, expected in zip(out.sequences[0, -3:], out.logits, strict=True):
            same(step.logits[:, -1], expected)
            if family is tiny.qwen2_5_vl:  # which takes no mask of one token more, with this switch or without
                given = {}
            else:
                given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
            step = model(input_ids=token.view(1, 1), **given, cache=step.cache, use_cache=True)
        with pytest.raises(ValueError, match="columns, but the cache has"):
            model(input_ids=out.sequences[:, -1:], attention_mask=row["attention_mask"], cache=step.cache)


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("family", [tiny.llava_clip, tiny.qwen2_vl], ids=lambda f: f.__name__)
def test_a_second_turn_goes_on_from_the_cache_of_the_first(family: Any, pictures: int):
    model = family()[0]
    row = tiny.batch(model, [tiny.PROMPTS[0]])
    with compress_visual_tokens(model, keep_ratio=0.25):
        first = model.generate(**row, return_dict_in_generate=True)
        written = first.sequences[0, row["input_ids"].shape[1] :].tolist()
        both = tiny.batch(model, [(*tiny.PROMPTS[0], *written, *[tiny.IMAGE] * pictures, 20, 21, 22)])
        if pictures and family is not tiny.qwen2_vl:
            both["pixel_values"][0] = row["pixel_values"][0]
        elif pictures:
            both["pixel_values"][:24] = row["pixel_values"]
        more = both["input_ids"]
        fresh = model.generate(**both, return_dict_in_generate=True, output_logits=True)
        second = model.generate(**both, cache=first.cache, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(second.sequences, fresh.sequences) and torch.equal(fresh.sequences[:, : more.shape[1]], more)
    same(torch.stack(second.logits), torch.stack(fresh.logits))


@pytest.mark.parametrize("family", [tiny.llava_clip, tiny.qwen2_vl, tiny.paligemma], ids=lambda f: f.__name__)
def test_a_static_cache_and_none_write_what_the_dynamic_one_does(family: Any):
    model, inputs = family()
    with compress_visual_tokens(model, keep_ratio=0.5):
        expected = model.generate(**inputs)
        options = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(**inputs, **options), expected)
        assert torch.equal(model.generate(**inputs, use_cache=False), expected)


@families
def test_beams_have_the_scores_of_the_full_forward(family: Any):
    model, inputs = family()
    length = inputs["input_ids"].shape[1]
    with compress_visual_tokens(model, keep_ratio=0.5):
        out = model.generate(
            **inputs, num_beams=3, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, length_penalty=0
        )
        full = logits(model, continued(inputs, out.sequences))[:, -4:-1]
        full[..., model.generation_config.suppress_tokens] = -torch.inf
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
    chosen = full.log_softmax(-1).gather(2, out.sequences[:, length:, None])[..., 0]
    unsuppressed = logits_of_suppressed(model, continued(inputs, out.sequences))
    torch.testing.assert_close(out.sequences_scores, (chosen + unsuppressed).sum(1), atol=1e-4, rtol=1e-4)


def logits_of_suppressed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What log-probabilities lose where ids are suppressed after the softmax, as beams do it: `[B, 3]`."""
    with compress_visual_tokens(model, keep_ratio=0.5):
        full = logits(model, inputs)[:, -4:-1]
    left = full.clone()
    left[..., model.generation_config.suppress_tokens] = -torch.inf
    return left.logsumexp(-1) - full.logsumexp(-1)


def test_limits_on_the_length_count_the_whole_prompt():
    model, inputs = copy.deepcopy(tiny.llava_clip()[0]), tiny.llava_clip()[1]
    length = inputs["input_ids"].shape[1]
    limited = copy.deepcopy(model.generation_config)
    limited.update(max_new_tokens=None, max_length=length + 2)

    def written(*args: Tensor, **more: Any) -> int:
        return model.generate(*args, **_without_ids(inputs), **more).shape[1] - length

    with compress_visual_tokens(model, num_tokens=2):
        assert written(inputs["input_ids"]) == 4
        model.generation_config = limited
        assert written(inputs["input_ids"]) == 2
        model.generation_config = copy.deepcopy(limited)
        model.generation_config.update(max_length=None)
        assert written(inputs["input_ids"], generation_config=limited) == 2
        assert written(inputs["input_ids"], max_length=length + 3) == 3
    assert limited.max_length == length + 2


def _without_ids(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "input_ids"}


@families
def test_it_trains_with_labels_of_the_whole_prompt(family: Any):
    model = copy.deepcopy(family()[0]).train()
    module = tiny_aki if family is aki else tiny
    make = tiny_aki.batch if family is aki else lambda prompts, **how: tiny.batch(model, prompts, **how)
    inputs = make(module.PROMPTS, padding="right")
    labels = torch.where(find_layout(model, inputs["input_ids"]).image, -100, inputs["input_ids"])
    labels[:, : int((inputs["input_ids"] == module.STOP).long().argmax(1).max()) + 1] = -100  # answers alone
    labels[inputs["attention_mask"] == 0] = -100
    assert (labels != -100).any()
    if family is tiny.paligemma:
        inputs["token_type_ids"] = (labels != -100).long()
    with compress_visual_tokens(model, keep_ratio=0.5) as handle:
        out = model(**inputs, labels=labels)
    last = handle.settings.last
    assert last is not None and out.logits.shape[:2] == last.columns.shape
    short = labels.gather(1, last.columns).masked_fill(last.attention_mask == 0, -100)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), short[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    vision = model.base_model.get_image_features.__self__
    names = [name for name, _ in vision.named_parameters() if "patch_embed" in name and name.endswith("weight")]
    gradients = [dict(vision.named_parameters())[name].grad for name in names]
    assert gradients and all(own is not None and own.isfinite().all() and own.abs().sum() > 0 for own in gradients)


def test_before_a_connector_the_encoder_s_tokens_are_merged():
    for family in (tiny.llava_clip, tiny.paligemma):
        model, inputs = family()
        dropped = {"num_tokens": 6, "merge_share": 0}
        with compress_visual_tokens(model, **dropped):
            behind = logits(model, inputs)
        with compress_visual_tokens(model, **dropped, before_connector=True):
            same(logits(model, inputs), behind)
        with compress_visual_tokens(model, num_tokens=6, merge_share=0.5, before_connector=True) as handle:
            merged = logits(model, inputs)
        assert merged.shape == behind.shape and not torch.allclose(merged, behind, atol=1e-4)
        assert handle.settings.last is not None
        assert all(len(own.index) == 6 and (own.target >= 0).all() for own in handle.settings.last.pictures)


def test_columns_of_padding_alone_go_with_what_is_dropped_and_stay_otherwise():
    model, inputs = tiny.llava_clip()
    inputs = {name: inputs[name] for name in inputs}
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (3, 0))
    plain = logits(model, inputs)
    for tokens, length in ((16, 28), (15, 24)):
        with compress_visual_tokens(model, num_tokens=tokens) as handle:
            out = logits(model, inputs)
        assert handle.settings.last is not None
        assert out.shape[1] == length == handle.settings.last.columns.shape[1]
        assert tokens < 16 or torch.equal(out, plain)


def test_a_model_that_is_compiled_under_the_switch_does_what_it_did():
    model = copy.deepcopy(tiny.llava_clip()[0])
    inputs = tiny.llava_clip()[1]
    with compress_visual_tokens(model, num_tokens=6):
        expected = logits(model, inputs)
        compiled = torch.compile(model, backend="eager")
        same(logits(compiled, inputs), expected)
    with pytest.raises(TypeError, match="compiled"):
        compress_visual_tokens(compiled, num_tokens=6)


def test_scores_may_be_lengths_of_features():
    model, inputs = tiny.llava_clip()
    with compress_visual_tokens(model, num_tokens=5, score="norm") as handle, torch.no_grad():
        logits(model, inputs)
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert handle.settings.last is not None
    for own, feature in zip(handle.settings.last.pictures, features, strict=True):
        torch.testing.assert_close(own.scores, feature.norm(dim=-1))


@pytest.mark.parametrize(
    "count, options, expected",
    [
        (576, {"keep_ratio": 0.25}, (120, 24)),
        (576, {"num_tokens": 64}, (54, 10)),
        (576, {"num_tokens": 192}, (160, 32)),
        (64, {"keep_ratio": 1 / 8}, (7, 1)),
        (10, {"keep_ratio": 1.0}, (10, 0)),
        (10, {"num_tokens": 10}, (10, 0)),
        (8, {"num_tokens": 4, "merge_share": 1.0}, (0, 4)),
    ],
)
def test_the_budget_is_of_kept_and_merged_tokens_together(count: int, options: Any, expected: tuple[int, int]):
    settings = compress_visual_tokens(tiny.llava_clip()[0], **options).settings
    assert isinstance(settings, Compression) and settings.split(count) == expected


def test_threads_have_budgets_of_their_own():
    model, inputs = tiny.llava_clip()
    lengths = dict[int, list[int]]()

    def run(tokens: int) -> None:
        with compress_visual_tokens(model, num_tokens=tokens):
            lengths[tokens] = [logits(model, inputs).shape[1] for _ in range(5)]

    threads = [threading.Thread(target=run, args=(tokens,)) for tokens in (2, 5, 9)]
    for thread in threads:
        thread.start()
    with compress_visual_tokens(model, num_tokens=16):
        assert logits(model, inputs).shape[1] == 25
    for thread in threads:
        thread.join()
    assert lengths == {tokens: [25 - 16 + tokens] * 5 for tokens in (2, 5, 9)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give one of them"),
        ({"keep_ratio": 0.5, "num_tokens": 3}, "give one of them"),
        ({"keep_ratio": 0.0}, "above 0"),
        ({"keep_ratio": 1.5}, "at most 1"),
        ({"num_tokens": 0}, "at least 1"),
        ({"num_tokens": 4, "merge_share": 1.2}, "from 0 to 1"),
        ({"num_tokens": 4, "rounds": -1}, "negative"),
        ({"num_tokens": 4, "score": "beauty"}, "'attention', 'norm'"),
        ({"num_tokens": 4, "positions": "random"}, "'consecutive', 'source'"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        compress_visual_tokens(tiny.llava_clip()[0], **options)


def test_wrong_prompts_and_pictures_are_refused():
    model, inputs = tiny.llava_clip()
    text = {"input_ids": torch.tensor([[1, 20, 21]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    features = {"mm_encoder_outputs": {"image": model.get_image_features(inputs["pixel_values"], return_dict=True)}}
    for call in (model, model.generate):
        with compress_visual_tokens(model, keep_ratio=0.5), pytest.raises(ValueError, match="no picture was given"):
            call(**text)
    cases = [
        ({"pixel_values": inputs["pixel_values"][:1]}, "16, 16 image tokens, but the pictures make 16, 16 each"),
        ({"input_ids": inputs["input_ids"].flatten().roll(20).view(2, -1)}, "its place in a prompt"),
        ({"inputs_embeds": torch.zeros(2, 25, 32), "input_ids": None}, "give input_ids"),
        ({"logits_to_keep": torch.tensor([3])}, "logits_to_keep"),
    ]
    with compress_visual_tokens(model, keep_ratio=0.5):
        for changes, message in cases:
            with pytest.raises(ValueError, match=message):
                model(**{**inputs, **changes})
        with pytest.raises(ValueError, match="not mm_encoder_outputs"):
            model(input_ids=inputs["input_ids"], **features)
    for options, message in (({"num_tokens": 17}, "only 16 tokens"), ({"keep_ratio": 0.02}, "leaves none")):
        with compress_visual_tokens(model, **options), pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match="needs all patches"):
        compress_visual_tokens(tiny.qwen2_vl()[0], keep_ratio=0.5, before_connector=True)
    with pytest.raises(TypeError, match="supported are"):
        compress_visual_tokens(model.model.language_model, keep_ratio=0.5)


def test_a_vision_encoder_that_is_not_known_can_be_ranked_by_lengths_alone():
    model, inputs = copy.deepcopy(tiny.llava_clip()[0]), tiny.llava_clip()[1]
    tower = model.model.vision_tower
    layers = tower.encoder.layers
    del tower.encoder.layers
    with pytest.raises(TypeError, match="score='norm'"):
        compress_visual_tokens(model, keep_ratio=0.5)
    tower.encoder.layers = layers
    with compress_visual_tokens(model, keep_ratio=0.5, score="norm"):
        assert logits(model, inputs).shape[1] == 17
