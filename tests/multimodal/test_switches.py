"""On, off, nested, from several threads: the life of a switch, on a small one that shifts the logits."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from multimodal.switches import Handle, Switch

IDS = torch.tensor([[1, 2, 3]])


def _settings(model: PreTrainedModel, *, by: float) -> float:
    """Shifts the logits by a number."""
    if by == 0:
        raise ValueError("by is 0, which shifts nothing")
    return by


def _attach(model: PreTrainedModel) -> list[Callable[[], None]]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        by = shift.active(module)
        if by is not None:
            output.logits = output.logits + by
        return output

    return [model.register_forward_hook(hook).remove]


shift = Switch("the shift", settings=_settings, attach=_attach)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shifted(model: Any, plain: torch.Tensor) -> float:
    """By how much the logits are shifted now."""
    difference = logits(model) - plain
    torch.testing.assert_close(difference, torch.full_like(difference, float(difference.mean())))
    return round(float(difference.mean()), 4)


def unhooked(model: torch.nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_block_switches_on_and_off(model: LlamaForCausalLM):
    plain = logits(model)
    with shift(model, by=2.0) as handle:
        assert shifted(model, plain) == 2 and handle.model is model and handle.settings == 2
    assert torch.equal(logits(model), plain) and unhooked(model)


def test_an_exception_leaves_nothing_on(model: LlamaForCausalLM):
    plain = logits(model)
    with pytest.raises(KeyError), shift(model, by=2.0):
        raise KeyError
    assert torch.equal(logits(model), plain) and unhooked(model) and shift.active(model) is None


def test_the_same_block_can_be_entered_again_inside_and_after(model: LlamaForCausalLM):
    plain = logits(model)
    switch = shift(model, by=2.0)
    for _ in range(2):
        with switch:
            with switch:
                assert shifted(model, plain) == 2
            assert shifted(model, plain) == 2
        assert torch.equal(logits(model), plain) and unhooked(model)


def test_apply_is_on_until_removed_and_removing_twice_does_no_harm(model: LlamaForCausalLM):
    plain = logits(model)
    handle = shift.apply(model, by=3.0)
    assert shifted(model, plain) == 3
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model), plain) and unhooked(model)
    with shift.apply(model, by=4.0):
        assert shifted(model, plain) == 4
    assert unhooked(model)


@pytest.mark.parametrize("second", ["enter", "apply"])
@pytest.mark.parametrize("first", ["enter", "apply"])
def test_a_second_of_the_kind_is_refused_and_the_first_stays(model: LlamaForCausalLM, first: str, second: str):
    plain = logits(model)

    def on(how: str, by: float) -> Handle[float]:
        return shift.apply(model, by=by) if how == "apply" else shift(model, by=by).__enter__()

    handle = on(first, 2.0)
    with pytest.raises(ValueError, match=r"under the shift already.*remove"):
        on(second, 3.0)
    assert shifted(model, plain) == 2
    handle.__exit__(None, None, None)
    assert torch.equal(logits(model), plain) and unhooked(model)


def test_wrong_settings_put_nothing_on(model: LlamaForCausalLM):
    for put in (shift, shift.apply):
        with pytest.raises(ValueError, match="shifts nothing"):
            put(model, by=0)
    assert unhooked(model)


def test_threads_do_not_disturb_each_other(model: LlamaForCausalLM):
    """Each has its own settings at the same time, one of them none."""
    plain = logits(model)
    meet, found = threading.Barrier(3), dict[float, list[float]]()

    def user(by: float) -> None:
        switch = shift(model, by=by) if by else None
        meet.wait(20)
        if switch:
            switch.__enter__()
        meet.wait(20)
        found[by] = [shifted(model, plain) for _ in range(20)]
        meet.wait(20)
        if switch:
            switch.__exit__(None, None, None)

    threads = [threading.Thread(target=user, args=(by,)) for by in (0.0, 1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {by: [by] * 20 for by in (0.0, 1.0, 2.0)}
    assert unhooked(model)


def test_apply_acts_in_every_thread(model: LlamaForCausalLM):
    plain, found = logits(model), list[float]()
    with shift.apply(model, by=2.0):
        thread = threading.Thread(target=lambda: found.append(shifted(model, plain)))
        thread.start()
        thread.join()
    assert found == [2.0]


def test_entering_and_leaving_while_another_thread_runs(model: LlamaForCausalLM):
    """The hooks come and go under a model that is computing."""
    plain, stop, found = logits(model), threading.Event(), list[bool]()

    def run() -> None:
        while not stop.is_set():
            found.append(torch.equal(logits(model), plain))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(200):
        with shift(model, by=1.0):
            pass
    stop.set()
    thread.join()
    assert found and all(found)


def test_a_copy_of_a_switched_model_is_off(model: LlamaForCausalLM):
    plain = logits(model)
    with shift(model, by=2.0):
        assert torch.equal(logits(copy.deepcopy(model)), plain)


def test_an_applied_switch_keeps_no_model_alive(model: LlamaForCausalLM):
    other = copy.deepcopy(model)
    handle, alive = shift.apply(other, by=2.0), weakref.ref(other)
    del other
    gc.collect()
    assert alive() is None
    with pytest.raises(ReferenceError, match="no more"):
        _ = handle.model
    handle.remove()


def test_a_compiled_model_is_refused_and_a_switched_one_compiles(model: LlamaForCausalLM):
    plain = logits(model)
    with pytest.raises(TypeError, match=r"compiled.*torch.compile afterwards"):
        shift(torch.compile(model, backend="eager"), by=2.0)  # pyright: ignore[reportArgumentType]
    inplace = copy.deepcopy(model)
    inplace.compile(backend="eager")
    with pytest.raises(TypeError, match="compiled"):
        shift(inplace, by=2.0)
    with shift(model, by=2.0):
        assert shifted(torch.compile(model, backend="eager"), plain) == 2
    torch.compiler.reset()


def test_a_switch_tells_what_it_is(model: LlamaForCausalLM):
    assert shift.__doc__ == "Shifts the logits by a number."
    assert repr(shift(model, by=2.0)) == "<the shift: 2.0>"
