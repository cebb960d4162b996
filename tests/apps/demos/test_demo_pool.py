"""The demos' models: one copy of each, few at once, none lost."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from apps.demos.pool import Pool


class Model:
    """Counts how many there are, and refuses to be used by two at once."""

    alive = 0
    most = 0
    lock = threading.Lock()

    def __init__(self) -> None:
        self.used = threading.Lock()
        with Model.lock:
            Model.alive += 1
            Model.most = max(Model.most, Model.alive)

    def __del__(self) -> None:
        with Model.lock:
            Model.alive -= 1

    def work(self) -> None:
        assert self.used.acquire(blocking=False)
        time.sleep(0.001)
        self.used.release()


@pytest.fixture(autouse=True)
def counted() -> None:
    Model.alive = Model.most = 0


def test_one_copy_serves_everybody_one_at_a_time():
    pool, loads = Pool(3), []

    def visit(_: int) -> Any:
        with pool.use("a", lambda: loads.append(1) or Model()) as model:
            model.work()
            return id(model)

    with ThreadPoolExecutor(20) as threads:
        assert len(set(threads.map(visit, range(100)))) == 1
    assert len(loads) == 1 and pool.names == ["a"]


def test_the_one_that_rested_longest_is_dropped():
    pool = Pool(2)
    for name in ("a", "b", "a", "c"):
        with pool.use(name, Model):
            pass
    assert pool.names == ["a", "c"]
    assert Model.alive == 2 and Model.most == 2  # room is made before the next is loaded


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_bound_holds_for_twenty_at_once(most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("apps.demos.pool.gc.collect", lambda: None)  # slow, and these have no cycles
    pool = Pool(most)

    def visit(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(20):
            try:
                with pool.use(drawn.choice("abcdef"), Model if drawn.random() < 0.9 else fails) as model:
                    model.work()
                    assert len(pool.names) <= most
                    if drawn.random() < 0.1:
                        raise OSError("in use")
            except (OSError, LookupError):
                pass

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(visit, range(20)))
    assert Model.alive == len(pool.names) <= most  # none, where room was made for one that then failed
    for name in "abcdef":
        with pool.use(name, Model) as model:
            model.work()  # nobody has kept anything
    assert len(pool.names) == most


def fails() -> Model:
    raise LookupError("cannot be fetched")


def test_a_load_that_fails_leaves_the_pool_as_it_was():
    pool = Pool(1)
    for _ in range(3):
        with pytest.raises(LookupError), pool.use("a", fails):
            raise AssertionError("nothing to use")
        assert pool.names == []
    with pool.use("a", Model) as model:
        assert isinstance(model, Model)


def test_an_error_in_use_gives_the_model_back():
    pool = Pool(1)
    with pytest.raises(ZeroDivisionError), pool.use("a", Model) as first:
        raise ZeroDivisionError
    with pool.use("a", fails) as again:
        assert again is first


def test_a_handler_that_is_dropped_gives_the_model_back():
    pool = Pool(1)

    def steps() -> Any:
        with pool.use("a", Model):
            while True:
                yield

    handler = steps()
    next(handler)
    handler.close()  # what Gradio does to one that is cancelled
    with pool.use("b", Model):
        assert pool.names == ["b"]


def test_who_waits_is_told_once_and_served_at_last():
    pool, told, began = Pool(1), [], threading.Event()
    with ThreadPoolExecutor(1) as threads:
        with pool.use("a", Model):

            def visit() -> str:
                with pool.use("b", Model, lambda: (told.append(1), began.set())):
                    return "served"

            waiting = threads.submit(visit)
            assert began.wait(10) and not waiting.done()
        assert waiting.result(10) == "served"
    assert told == [1]


def test_a_pool_holds_something():
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)
