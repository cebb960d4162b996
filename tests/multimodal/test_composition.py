"""The three switches together: any subset, in any order, from several threads, and gone without a trace."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny_vlm as tiny
import torch
from tiny_vlm import logits
from torch import Tensor

import multimodal

SWITCHES: dict[str, Callable[[Any], Any]] = {
    "mma": lambda model: multimodal.modality_mutual_attention(model, stop_token_id=tiny.STOP),
    "vmtc": lambda model: multimodal.compress_visual_tokens(model, keep_ratio=0.5),
    "cmai": lambda model: multimodal.inhibit_cross_modality(model, keep_ratio=0.4, layers=[0, 1]),
}
ORDERS = list(itertools.permutations(SWITCHES))
SUBSETS = [subset for count in range(1, 4) for subset in itertools.combinations(SWITCHES, count)]

families = pytest.mark.parametrize("family", tiny.FAMILIES.values(), ids=tiny.FAMILIES.keys())


@contextlib.contextmanager
def switched(model: Any, names: Sequence[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SWITCHES[name](model))
        yield


def traces(model: Any) -> dict[str, object]:
    """All that a switch could leave behind on a model."""
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "config": model.config.to_json_string(),
    }


@families
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_off_again_the_model_is_what_it_was(family: Any, names: Sequence[str]):
    model, inputs = family()
    before, plain = traces(model), logits(model, inputs)
    with switched(model, names):
        on = logits(model, inputs)
        assert on.isfinite().all()
        if names != ("mma",) or family is not tiny.paligemma:  # sees in both directions already
            assert on.shape != plain.shape or not torch.allclose(on, plain, atol=1e-4)
    assert traces(model) == before
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("family", [tiny.llava_clip, tiny.qwen2_5_vl], ids=lambda family: family.__name__)
def test_the_order_of_entering_and_leaving_changes_nothing(family: Any):
    model, inputs = family()
    before, plain = traces(model), logits(model, inputs)
    with switched(model, ORDERS[0]):
        expected, written = logits(model, inputs), model.generate(**inputs)
    for enter, leave in zip(ORDERS, reversed(ORDERS), strict=True):
        entered = {name: SWITCHES[name](model).__enter__() for name in enter}
        assert torch.equal(logits(model, inputs), expected), enter
        assert torch.equal(model.generate(**inputs), written), enter
        for name in leave:
            entered.pop(name).__exit__(None, None, None)
            with switched(model, ()), torch.no_grad():  # those still on are those of an own start
                here = logits(model, inputs)
            assert entered or torch.equal(here, plain), leave
        assert traces(model) == before


@families
def test_generating_with_a_cache_is_the_full_forward(family: Any):
    model, inputs = family()
    with switched(model, ("vmtc", "mma", "cmai")):
        out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        assert new.shape[1] == 4 and torch.equal(out.sequences[:, :-4], inputs["input_ids"])
        whole = {**inputs, "input_ids": out.sequences[:, :-1]}
        ones = torch.ones_like(new[:, :-1])
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                whole[name] = torch.cat([inputs[name], 0 * ones.to(inputs[name].dtype)], 1)
        full = logits(model, {**whole, **positions(model, whole)})[:, -4:]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, rtol=1e-4, atol=3e-5)


def positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `generate` counts and a plain forward does not: positions without padding."""
    if model.config.model_type.startswith("qwen"):
        return {}  # counts so by itself
    return {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def test_threads_have_switches_of_their_own():
    """What a demo server does: users at once on one model, each with other switches."""
    model, inputs = tiny.llava_clip()
    model = copy.deepcopy(model)
    users = [(), *SUBSETS]
    before = traces(model)

    def answer(names: Sequence[str]) -> Tensor:
        with switched(model, names):
            out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
            return torch.stack(out.logits)

    alone = [answer(names) for names in users]
    start, together = threading.Barrier(len(users)), dict[int, list[Tensor]]()

    def user(index: int) -> None:
        start.wait(30)
        together[index] = [answer(users[index]) for _ in range(3)]

    threads = [threading.Thread(target=user, args=(index,)) for index in range(len(users))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(together) == list(range(len(users)))
    for index, expected in enumerate(alone):
        assert all(torch.equal(found, expected) for found in together[index]), users[index]
    assert traces(model) == before


def test_an_exception_inside_a_forward_leaves_nothing_on():
    model, inputs = tiny.llava_clip()
    before, plain = traces(model), logits(model, inputs)
    with pytest.raises(RuntimeError), switched(model, ORDERS[0]):
        model(**{**inputs, "pixel_values": torch.zeros(2, 5, 16, 16)})
    assert traces(model) == before and torch.equal(logits(model, inputs), plain)


def test_a_copy_of_a_switched_model_is_a_plain_model():
    model, inputs = tiny.llava_clip()
    plain = logits(model, inputs)
    with switched(model, ORDERS[0]):
        other = copy.deepcopy(model)
        torch.testing.assert_close(logits(other, inputs), plain)
        torch.testing.assert_close(other.generate(**inputs)[:, :-4], inputs["input_ids"])


@pytest.mark.parametrize(
    ("switch", "options"),
    [
        (multimodal.modality_mutual_attention, {"stop_token_id": tiny.STOP}),
        (multimodal.compress_visual_tokens, {"keep_ratio": 0.5}),
        (multimodal.inhibit_cross_modality, {"layers": [0, 1]}),
    ],
    ids=SWITCHES,
)
def test_an_applied_switch_keeps_no_model_alive(switch: multimodal.Switch[..., Any], options: dict[str, Any]):
    model = copy.deepcopy(tiny.llava_clip()[0])
    handle = switch.apply(model, **options)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype: torch.dtype):
    model, inputs = tiny.llava_clip()
    with switched(model, ORDERS[0]):
        exact = logits(model, inputs)
        with torch.autocast("cpu", dtype=dtype):
            mixed = logits(model, inputs)
    half = copy.deepcopy(model).to(dtype)
    with switched(half, ORDERS[0]):
        rough = logits(half, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    assert exact.shape == mixed.shape == rough.shape
    # Other tokens may be kept where scores nearly tie; most of the logits stay near.
    for other in (mixed, rough):
        assert other.isfinite().all() and (other.float() - exact).abs().median() < 0.1 * exact.std()


def test_beams_and_sampling_run_under_all_three():
    model, inputs = tiny.qwen2_vl()
    length = inputs["input_ids"].shape[1]
    with switched(model, ORDERS[-1]):
        beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=3)
        torch.manual_seed(0)
        sampled = model.generate(**inputs, do_sample=True, max_new_tokens=3)
    assert beams.shape == (4, length + 3) and sampled.shape == (2, length + 3)
    assert torch.equal(beams[::2, :length], inputs["input_ids"])
