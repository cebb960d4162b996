"""What switches hang on: what is found at a model's forward reaches its decoder, and what runs around generate."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import tiny_vlm as tiny
import torch

from multimodal.hooks import Handover, around_generate

IDS = torch.tensor([[1, 2, 3]])


def handover(begun: list[Any], is_on: Any = lambda model: True, **options: Any) -> Handover[int]:
    """Hands the first id over, unless it is 0."""

    def begin(decoder: Any, given: dict[str, Any], found: int) -> dict[str, Any]:
        begun.append((decoder, found))
        return {**given, "inputs_embeds": given["inputs_embeds"] * 0 + found}

    return Handover("the test", lambda model, given: int(given["input_ids"][0, 0]) or None, begin, is_on, **options)


@torch.no_grad()
def logits(model: Any, first: int = 1, **changes: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([[first, 2, 3]]), **changes).logits


def test_what_is_found_reaches_the_decoder_and_what_comes_out_the_end():
    model = copy.deepcopy(tiny.llava_clip()[0])
    plain, begun, ended = logits(model, 0), [], []
    detach = handover(begun, finish=lambda output, found: ended.append((output.logits, found))).attach(model)
    changed = logits(model, 5)
    assert begun == [(model.get_decoder(), 5)]
    assert len(ended) == 1 and ended[0][0] is not plain and ended[0][1] == 5
    torch.testing.assert_close(ended[0][0], changed)
    detach()
    assert torch.equal(logits(model, 0), plain) and len(begun) == 1
    assert not model._forward_pre_hooks and not model.get_decoder()._forward_pre_hooks


def test_a_decoder_that_is_run_by_itself_is_refused_only_while_on():
    model = copy.deepcopy(tiny.llava_clip()[0])
    on = [True]
    detach = handover([], is_on=lambda model: on[0]).attach(model)
    embeds = torch.zeros(1, 3, 32)
    with pytest.raises(RuntimeError, match=r"under the test the language model of a LlavaFor.* was run by itself"):
        model.get_decoder()(inputs_embeds=embeds)
    on[0] = False
    model.get_decoder()(inputs_embeds=embeds)
    on[0] = True
    detach()
    model.get_decoder()(inputs_embeds=embeds)


def test_nothing_is_left_over_from_a_forward_that_failed():
    model = copy.deepcopy(tiny.llava_clip()[0])
    begun: list[Any] = []
    ended: list[Any] = []
    made = handover(begun, finish=lambda *args: ended.append(args))
    detach = made.attach(model)
    with pytest.raises(ValueError):
        logits(model, 5, mm_encoder_outputs={}, pixel_values=torch.zeros(1, 3, 16, 16))
    assert made._running.get() is None and not ended
    logits(model, 6)
    assert [found for _, found in begun] == [6]
    detach()


def test_a_forward_inside_a_forward_has_its_own():
    model, inner = copy.deepcopy(tiny.llava_clip()[0]), copy.deepcopy(tiny.llava_siglip()[0])
    begun: list[Any] = []
    made = handover(begun)
    takers = [made.attach(model), made.attach(inner)]
    inside = model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: [logits(inner, 7)].clear())
    logits(model, 5)
    assert begun == [(model.get_decoder(), 5), (inner.get_decoder(), 7)]
    assert made._running.get() is None
    for take_off in (*takers, inside.remove):
        take_off()


def test_threads_do_not_hand_over_to_each_other():
    model = copy.deepcopy(tiny.llava_clip()[0])
    begun: list[Any] = []
    detach = handover(begun).attach(model)
    both = threading.Barrier(2)
    wait = model.model.register_forward_pre_hook(lambda *_: [both.wait(30)].clear())
    got: dict[int, torch.Tensor] = {}

    def run(first: int) -> None:
        got[first] = logits(model, first)

    threads = [threading.Thread(target=run, args=(first,)) for first in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait.remove()
    assert sorted(found for _, found in begun) == [5, 6]
    for first in (5, 6):
        assert torch.equal(got[first], logits(model, first))
    detach()


def test_a_model_may_go_while_something_hangs_on_it():
    model = copy.deepcopy(tiny.llava_clip()[0])
    detach, leave = handover([]).attach(model), around_generate(model, lambda model, call, given: call(**given))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    detach()
    leave()


def named(name: str, calls: list[str]) -> Any:
    def around(model: Any, call: Any, given: dict[str, Any]) -> Any:
        calls.append(name)
        assert "input_ids" in given or "inputs" in given
        try:
            return call(**given)
        finally:
            calls.append(f"/{name}")

    return around


def test_what_runs_around_generate_comes_and_goes_in_any_order():
    model, calls = copy.deepcopy(tiny.llava_clip()[0]), []
    plain = model.generate(IDS, max_new_tokens=2)
    leave_outer = around_generate(model, named("outer", calls), outermost=True)
    leave_first = around_generate(model, named("first", calls))
    leave_second = around_generate(model, named("second", calls))
    assert torch.equal(model.generate(IDS, max_new_tokens=2), plain)
    assert calls == ["outer", "second", "first", "/first", "/second", "/outer"]
    calls.clear()
    leave_first()
    model.generate(input_ids=IDS, max_new_tokens=2)
    assert calls == ["outer", "second", "/second", "/outer"]
    calls.clear()
    leave_outer()
    leave_second()
    assert torch.equal(model.generate(IDS, max_new_tokens=2), plain)
    assert not calls and "generate" not in vars(model)


def test_a_copy_generates_plainly():
    model, calls = copy.deepcopy(tiny.llava_clip()[0]), []
    leave = around_generate(model, named("it", calls))
    other = copy.deepcopy(model)
    assert torch.equal(other.generate(IDS, max_new_tokens=2), tiny.llava_clip()[0].generate(IDS, max_new_tokens=2))
    assert not calls
    leave()
