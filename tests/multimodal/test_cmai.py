"""Cross-modality attention inhibition: against loops, against itself with and without a cache, and what it refuses."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_vlm as tiny
import torch
from tiny_vlm import continued, logits, same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask

from multimodal.cmai import focus_score, inhibit_cross_modality, keep_focused
from multimodal.layout import find_layout

families = pytest.mark.parametrize("family", tiny.FAMILIES.values(), ids=tiny.FAMILIES.keys())
BOTH = [0, 1]  # layers of a tiny model

switch: Any = functools.partial(inhibit_cross_modality, layers=BOTH, keep_ratio=0.3)


def cache_error(model: Any, inputs: dict[str, Tensor], **generation: Any) -> float:
    """The largest difference of logits between generating with a cache and one forward of it all, under the switch."""
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **generation)
    full = logits(model, continued(inputs, out.sequences))
    new = len(out.logits)
    return float((torch.stack(out.logits, 1) - full[:, -new - 1 : -1]).abs().max())


# The reference: everything for one batch row, head and token at a time, in float64.


@contextmanager
def reference(model: Any, inputs: dict[str, Tensor], **options: Any) -> Iterator[None]:
    layout = find_layout(model, inputs["input_ids"], inputs["attention_mask"])
    made: dict[int, Tensor] = {}

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
        k, v = (repeat_kv(x, module.num_key_value_groups) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scaling + mask.double()
        weights = scores.softmax(-1).detach()
        previous = options.get("source") == "previous"
        if not previous:
            made[module.layer_idx] = loop_focus(weights, layout, **options)
        focus = made.get(module.layer_idx - previous)
        inhibited = scores if focus is None else loop_inhibited(scores, mask, focus, layout, **options)
        weights = inhibited.softmax(-1)
        if previous:
            made[module.layer_idx] = loop_focus(weights.detach(), layout, **options)
        return (weights @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("reference", attention)
    AttentionMaskInterface.register("reference", eager_mask)
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("reference")
    yield
    decoder.set_attn_implementation(before)


def loop_focus(A: Tensor, layout: Any, store: str, per_head: bool, renormalise: bool, **_: Any) -> Tensor:
    focus = torch.zeros_like(A)
    B, H, *_ = A.shape
    reads = A if store == "per_head" else A.mean(1, keepdim=True).expand_as(A)
    for b in range(B):
        text, image = layout.text[b].nonzero()[:, 0], layout.image[b].nonzero()[:, 0]
        for h in range(H):
            for i in text:
                A_tt, A_ti = A[b, h, i, text], reads[b, h][text][:, image]
                if renormalise:
                    A_tt = A_tt / A_tt.sum()
                    A_ti = torch.stack([row / row.sum() if row.sum() > 0 else row for row in A_ti])
                focus[b, h, i, image] = sum(a * row for a, row in zip(A_tt, A_ti, strict=True))
    return focus if per_head else focus.mean(1, keepdim=True).expand_as(focus)


def loop_inhibited(
    scores: Tensor, mask: Tensor, focus: Tensor, layout: Any, keep_ratio: float, penalty: float, **_: Any
) -> Tensor:
    lower = torch.zeros_like(scores)
    B, H, *_ = scores.shape
    for b in range(B):
        for i in layout.text[b].nonzero()[:, 0]:
            seen = [m for m in layout.image[b].nonzero()[:, 0] if mask[b, 0, i, m] == 0]
            for h in range(H):
                best = sorted(seen, key=lambda m: -float(focus[b, h, i, m]))
                for m in best[max(math.ceil(round(keep_ratio * len(seen), 6)), 1) :]:
                    lower[b, h, i, m] = penalty
    return (
        scores - lower if penalty < math.inf else scores.masked_fill(lower == math.inf, torch.finfo(torch.double).min)
    )


DEFAULTS = {
    "store": "head_mean",
    "per_head": True,
    "renormalise": False,
    "penalty": math.inf,
    "source": "same",
    "keep_ratio": 0.3,
}


@functools.cache
def in_double(family: Callable[[], Any]) -> Any:
    return copy.deepcopy(family()[0]).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"store": "per_head"},
        {"per_head": False},
        {"store": "per_head", "per_head": False, "renormalise": True},
        {"penalty": 1.5},
        {"source": "previous"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [tiny.llava_clip, tiny.paligemma], ids=lambda family: family.__name__)
def test_it_is_what_the_equations_say(family: Any, options: dict[str, Any]):
    model, (_, inputs) = in_double(family), family()
    options = {**DEFAULTS, **options}
    with reference(model, inputs, **options):
        expected = logits(model, inputs)
    layers = [1] if options["source"] == "previous" else BOTH
    with inhibit_cross_modality(model, layers=layers, **options):
        got = logits(model, inputs)
    valid = inputs["attention_mask"].bool()
    assert (got - logits(model, inputs))[valid].abs().max() > 0.1
    torch.testing.assert_close(got[valid], expected[valid], atol=1e-6, rtol=0)


def test_focus_score_is_the_sum_over_text_tokens():
    generator = torch.Generator().manual_seed(0)
    A_tt = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.double)
    A_ti = torch.rand(2, 3, 5, 6, generator=generator, dtype=torch.double)
    A_ti[:, :, 0] = 0
    focus = focus_score(A_tt, A_ti)
    assert focus[1, 2, 3, 4] == pytest.approx(sum(float(A_tt[1, 2, 3, j] * A_ti[1, 2, j, 4]) for j in range(5)))
    normal = focus_score(A_tt, A_ti, renormalise=True)
    torch.testing.assert_close(normal.sum(-1), 1 - A_tt[..., 0] / A_tt.sum(-1))


@pytest.mark.parametrize("keep_ratio", [1 / 30, 0.1, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_exactly_the_share_of_visible_tokens_stays(keep_ratio: float):
    focus = torch.rand(2, 4, 31, 30, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    visible = torch.arange(30) < torch.arange(31)[:, None]  # the i-th row sees i
    keep = keep_focused(focus, visible, keep_ratio=keep_ratio)
    assert not (keep & ~visible).any()
    assert (keep.sum(-1) == torch.tensor([math.ceil(round(keep_ratio * n, 6)) for n in range(31)])).all()
    lowest_kept = focus.masked_fill(~keep, 9).amin(-1)
    assert (focus.masked_fill(keep | ~visible, 0).amax(-1) <= lowest_kept).all()


def test_a_threshold_is_absolute_or_of_the_maximum_or_of_an_even_share():
    focus, visible = torch.tensor([[0.4, 0.1, 0.3, 0.2, 0.9]]), torch.tensor([[True, True, True, True, False]])

    def kept(threshold: float, of: str, keep_ratio: float = 1.0) -> list[int]:
        options = {"threshold": threshold, "threshold_of": of, "keep_ratio": keep_ratio}
        return keep_focused(focus, visible, **options)[0].nonzero()[:, 0].tolist()  # type: ignore[arg-type]

    assert kept(0.25, "absolute") == [0, 2]
    assert kept(0.5, "maximum") == [0, 2, 3]
    assert kept(0.8, "uniform") == [0, 2, 3]
    assert kept(7, "absolute") == [0]  # a row's best stays
    assert kept(0, "absolute", keep_ratio=0.5) == [0, 2]


@families
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generating_with_a_cache_is_the_full_forward(family: Any, implementation: str):
    model, inputs = family()
    model.set_attn_implementation(implementation)
    plain = logits(model, inputs)
    with switch(model):
        assert cache_error(model, inputs) < 1e-4
    with switch(model, keep_ratio=1):
        everything = logits(model, inputs)
    valid = inputs["attention_mask"].bool()
    same(everything[valid], plain[valid])
    assert torch.equal(logits(model, inputs), plain)
    assert model.get_decoder().config._attn_implementation == implementation


def test_prompts_that_are_seen_in_both_directions():
    model, _ = tiny.paligemma()
    inputs = tiny.batch(model, [tiny.PROMPTS[0]])
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    with switch(model):
        out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
        whole = continued(inputs, out.sequences)
        whole["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, 4), value=1)
        torch.testing.assert_close(torch.stack(out.logits, 1), logits(model, whole)[:, -5:-1], atol=1e-4, rtol=0)
    del inputs["token_type_ids"]  # there is no mask then, and SDPA sees in both directions all the same
    plain = logits(model, inputs)
    with switch(model, keep_ratio=1):
        same(logits(model, inputs), plain)


@families
def test_text_reads_exactly_its_share_and_images_read_as_before(family: Any):
    model, inputs = family()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions
        with switch(model):
            inhibited = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    layout = find_layout(model, inputs["input_ids"], inputs["attention_mask"])
    for before, after in zip(plain, inhibited, strict=True):
        torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))
        for b in range(len(before)):
            seen = (before[b, 0] > 0)[layout.text[b]][:, layout.image[b]].sum(-1)
            read = (after[b] > 0)[:, layout.text[b]][..., layout.image[b]].sum(-1)
            assert (read == torch.ceil(0.3 * seen - 1e-4)).all()
    others = ~layout.text
    assert torch.equal(plain[0].transpose(1, 2)[others], inhibited[0].transpose(1, 2)[others])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_of_a_batch_is_as_alone(padding: str):
    model, _ = tiny.llava_clip()
    together = tiny.batch(
        model, [*tiny.PROMPTS, (1, 4, 4, 4, 4), (1, tiny.IMAGE, 8, 9, tiny.IMAGE, 7)], padding=padding
    )
    alone = {"input_ids": together["input_ids"][1:2], "attention_mask": together["attention_mask"][1:2]}
    alone = {name: value[alone["attention_mask"].bool()][None] for name, value in alone.items()}
    with switch(model):
        positions = (together["attention_mask"].cumsum(1) - 1).clamp(min=0)
        row = logits(model, {**together, "position_ids": positions})[1][together["attention_mask"][1].bool()]
        single = logits(model, {**alone, "pixel_values": together["pixel_values"][1:2]})[0]
    torch.testing.assert_close(row, single, atol=2e-5, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.numel() * tensor.element_size())
        return out


def test_scores_are_computed_in_chunks_of_the_size_asked_for():
    model, _ = tiny.llava_clip()
    inputs = tiny.batch(model, [(1, tiny.IMAGE, *range(2, 50), *range(2, 50))])
    L = inputs["input_ids"].shape[1]
    with switch(model):
        at_once = logits(model, inputs)
        with LargestTensor() as whole:
            logits(model, inputs)
    chunk = 4 * 4 * L * 8  # eight rows of four heads
    with switch(model, chunk_bytes=chunk):
        same(logits(model, inputs), at_once)
        with LargestTensor() as largest:
            logits(model, inputs)
    rows_of_text = L - 16
    assert whole.nbytes >= 4 * 4 * L * rows_of_text
    assert largest.nbytes <= max(2 * chunk, 4 * L * tiny.VOCABULARY)  # a pair of them, as for gradients; or the logits


def test_gradients_take_the_focus_for_a_constant():
    model, inputs = copy.deepcopy(in_double(tiny.llava_clip)), tiny.llava_clip()[1]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill((labels == tiny.IMAGE_ID) | (labels == tiny.BOS), -100)  # padding says the first word

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.get_decoder().parameters() if p.grad is not None]

    model.train()
    with reference(model, inputs, **DEFAULTS):
        expected = gradients()
    for options in ({}, {"chunk_bytes": 4 * 4 * 2 * 40}):
        with switch(model, **options):
            got = gradients()
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("source", ["same", "previous"])
def test_layers_may_be_run_again_by_gradient_checkpointing(source: Any):
    model, inputs = copy.deepcopy(tiny.llava_clip()[0]), tiny.llava_clip()[1]
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with switch(model, source=source, layers=[1]):
            model(**inputs, use_cache=False).logits.square().mean().backward()
        found.append(weight.grad.clone())
    torch.testing.assert_close(*found)


@functools.cache
def windows() -> Any:
    """LLaVA with Gemma 2: scores are capped softly, and every other layer sees the last few tokens only."""
    text = Gemma2Config(**tiny.TEXT, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=3.0, sliding_window=12)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**tiny.VISION), text_config=text, **tiny.LLAVA)
    return tiny._model(LlavaForConditionalGeneration, config)


def test_soft_caps_and_sliding_windows_are_honoured():
    model, inputs = windows(), tiny.batch(windows())
    model.set_attn_implementation("eager")
    plain, valid = logits(model, inputs), inputs["attention_mask"].bool()
    with switch(model, keep_ratio=1):
        same(logits(model, inputs)[valid], plain[valid])
    for store in ("head_mean", "per_head"):
        with switch(model, store=store):
            assert not torch.allclose(logits(model, inputs)[valid], plain[valid], atol=1e-2)
            assert cache_error(model, inputs, max_new_tokens=16) < 1e-4


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers sets it
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # whose kernels for CPUs are wrong
@pytest.mark.parametrize("family", [tiny.llava_clip, tiny.idefics3], ids=lambda family: family.__name__)
def test_flex_attention_gives_what_sdpa_gives(family: Any):
    model, inputs = family()
    with switch(model):
        expected = logits(model, inputs)
    model = copy.deepcopy(model)
    model.get_decoder().set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"), switch(model):
        got = logits(model, inputs)
        assert cache_error(model, inputs) < 1e-4
    valid = inputs["attention_mask"].bool()
    same(got[valid], expected[valid])


def test_half_precision_and_autocast_stay_near():
    model, inputs = tiny.llava_clip()
    valid = inputs["attention_mask"].bool()
    with switch(model):
        exact = logits(model, inputs)[valid]
        with torch.autocast("cpu", torch.bfloat16):
            near = logits(model, inputs)[valid]
    half = copy.deepcopy(model).half()
    with switch(half):
        nearer = logits(half, {**inputs, "pixel_values": inputs["pixel_values"].half()})[valid]
        tokens = half.generate(**{**inputs, "pixel_values": inputs["pixel_values"].half()})
    assert torch.nn.functional.cosine_similarity(near.float(), exact, dim=-1).median() > 0.99
    assert torch.nn.functional.cosine_similarity(nearer.float(), exact, dim=-1).median() > 0.999
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.slow
def test_a_model_compiled_after_switching_on_is_inhibited():
    model, inputs = copy.deepcopy(tiny.llava_clip()[0]), tiny.llava_clip()[1]
    plain = logits(model, inputs)
    with switch(model):
        eager = logits(model, inputs)
        compiled = logits(torch.compile(model, backend="eager"), inputs)
    same(compiled, eager)
    assert not torch.allclose(eager, plain, atol=1e-2)


def test_a_copy_of_a_switched_model_is_a_plain_model():
    model, inputs = tiny.llava_clip()
    plain = logits(model, inputs)
    with switch(model):
        assert torch.equal(logits(copy.deepcopy(model), inputs), plain)


REFUSED = [
    ({"keep_ratio": 0}, "keep_ratio=0 must be above 0"),
    ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
    ({"keep_ratio": math.nan}, "keep_ratio=nan"),
    ({"threshold": -1}, "threshold=-1"),
    ({"threshold_of": "mean"}, "threshold_of='mean' must be one of 'absolute', 'maximum', 'uniform'"),
    ({"penalty": 0}, "penalty=0"),
    ({"layers": [2]}, r"layers=\[2\] must be some of 0 to 1"),
    ({"layers": []}, r"layers=\[\]"),
    ({"layers": None}, r"there are only 2; give layers"),
    ({"source": "next"}, "source='next'"),
    ({"source": "previous"}, "layer 0 has none before it"),
    ({"store": "all"}, "store='all'"),
    ({"chunk_bytes": 0}, "chunk_bytes=0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_wrong_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        switch(tiny.llava_clip()[0], **options)


def test_flash_attention_is_refused_by_name():
    model = copy.deepcopy(tiny.llava_clip()[0])
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' gives no access .* eager, sdpa, flex_attention"):
        switch(model)


def test_prompts_that_nothing_can_be_inhibited_in_are_refused():
    model, _ = tiny.llava_clip()
    with switch(model):
        with pytest.raises(ValueError, match="no image token is in input_ids"):
            model(input_ids=torch.tensor([[1, 2, 3]]))
        with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 4, 32))
        with pytest.raises(RuntimeError, match="run by itself"):
            model.get_decoder()(inputs_embeds=torch.zeros(1, 4, 32))
    model.get_decoder()(inputs_embeds=torch.zeros(1, 4, 32))


def test_a_cache_from_outside_is_refused():
    model, inputs = tiny.llava_clip()
    more = {"input_ids": torch.tensor([[5], [5]]), "attention_mask": torch.ones(2, inputs["input_ids"].shape[1] + 1)}
    plain = model(**inputs, use_cache=True).cache
    with switch(model):
        with pytest.raises(ValueError, match="of which 0 were read under"):
            model(**more, cache=plain)
        ours = model(**inputs, use_cache=True).cache
    with switch(model, keep_ratio=0.6), pytest.raises(ValueError, match="under other settings"):
        model(**more, cache=ours)
    model(**more, cache=ours)  # plainly
    with switch(model), pytest.raises(ValueError, match=r"holds 26 tokens, of which 25"):
        model(**{**more, "attention_mask": torch.ones(2, 27)}, cache=ours)
    windowed = windows()
    static = StaticCache(config=windowed.config, max_cache_len=64)
    with switch(windowed), pytest.raises(ValueError, match="static cache with sliding windows"):
        windowed(**tiny.batch(windowed), cache=static)


def test_another_attention_under_the_switch_is_noticed():
    model, inputs = copy.deepcopy(tiny.llava_clip()[0]), tiny.llava_clip()[1]
    with switch(model):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match=r"layers \[0, 1\] of LlamaModel did not ask"):
            model(**inputs)
    assert model.get_decoder().config._attn_implementation == "eager"
