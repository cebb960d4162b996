"""Trainings that are killed, stopped or started again end with the weights of one uninterrupted training."""

from __future__ import annotations

import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from drawn import draw_classes
from safetensors.torch import load_file, save_file
from support import wait_for

EPOCHS, STEPS = 3, 10
MODEL = ("-m", "test_vit", "--img-size", 32, "--device", "cpu")
LONG = (*MODEL, "--epochs", EPOCHS, "--batch-size", 6)
SHORT = (*MODEL, "--batch-size", 30, "--workers", 0)
FILES = [".lock", "best", "last", "log.csv", "settings.json", "state.pt", "val.csv"]
CHANCE = ("--mixup", 0.2, "--cutmix", 0.5, "--ema", "--augment", "strong")


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    return draw_classes(tmp_path_factory.mktemp("data") / "colours", each=25)


@pytest.fixture(scope="module")
def whole(server, colours, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted training leaves."""
    folder = tmp_path_factory.mktemp("whole")
    done = server.start(
        "train", colours, "-o", "run", *LONG, *CHANCE, "--save-every", 1, "--workers", 0, cwd=folder
    ).wait()
    assert done.code == 0, done.err
    return left(folder / "run")


def left(folder: Path) -> dict[str, bytes]:
    """All files that are for people, byte for byte."""
    names = ("best/model.safetensors", "best/config.json", "last/model.safetensors", "last/config.json", "log.csv")
    return {name: (folder / name).read_bytes() for name in names}


def stamp(folder: Path) -> int:
    """Changes with every state that is saved."""
    try:
        return (folder / "state.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def steps(folder: Path) -> int:
    """Of the state that is there."""
    return torch.load(folder / "state.pt", weights_only=True)["updates"] if stamp(folder) else 0


def has_changed(folder: Path, before: int) -> bool:
    return stamp(folder) != before


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments_and_started_again(start, run, colours, tmp_path, whole, workers):
    command = ("train", colours, "-o", "run", *LONG, *CHANCE, "--save-every", 1, "--workers", workers)
    folder, moments, seen = tmp_path / "run", random.Random(workers), []
    for _ in range(3):
        running = start(*command)
        for _ in range(moments.randint(1, 6)):
            wait_for(partial(has_changed, folder, stamp(folder)))
        time.sleep(moments.uniform(0, 0.03))
        running.kill()
        assert running.wait().code == -signal.SIGKILL
        seen.append(steps(folder))
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1] < EPOCHS * STEPS, seen
    assert any(count % STEPS for count in seen), seen
    done = run(*command)
    assert done.code == 0, done.err
    assert left(folder) == whole
    assert sorted(p.name for p in folder.iterdir()) == FILES
    again = run(*command)  # there is nothing left to do
    assert again.code == 0 and "epoch 1/" not in again.err
    assert left(folder) == whole


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_after_the_step(start, run, colours, tmp_path, whole, signum, code):
    # without --save-every: the state that a signal leaves is its own
    command = ("train", colours, "-o", "run", *LONG, *CHANCE, "--workers", 0)
    running = start(*command)
    wait_for(lambda: (tmp_path / "run" / "log.csv").exists())
    time.sleep(0.02)
    running.kill(signum)
    done = running.wait()
    assert done.code == code, done.err
    assert "the same command goes on" in done.err
    assert 0 < steps(tmp_path / "run") <= EPOCHS * STEPS
    assert run(*command).code == 0
    assert left(tmp_path / "run") == whole


def test_other_settings_on_the_same_folder_are_refused(run, colours, tmp_path):
    command = ("train", colours, "-o", "run", *SHORT)
    assert run(*command, "--epochs", 1).code == 0
    before = left(tmp_path / "run")
    done = run(*command, "--epochs", 1, "--lr", 0.01, "--seed", 3)
    assert done.code == 2
    assert "lr was None, is 0.01; seed was 0, is 3" in done.err and "--overwrite" in done.err
    assert left(tmp_path / "run") == before
    next((colours / "red").iterdir()).touch()
    done = run(*command, "--epochs", 1)
    assert done.code == 2 and re.search("(train was '60|val was '15) pictures,", done.err)
    assert run(*command, "--epochs", 1, "--seed", 3, "--overwrite").code == 0
    assert left(tmp_path / "run")["last/model.safetensors"] != before["last/model.safetensors"]


def test_two_trainings_cannot_share_a_folder(start, run, colours, tmp_path):
    command = ("train", colours, "-o", "run", *SHORT)
    first = start(*command, "--epochs", 1000)
    wait_for(lambda: stamp(tmp_path / "run") > 0)
    second = run(*command, "--epochs", 1000)
    first.kill()
    first.wait()
    assert second.code == 2 and "another training is at run right now" in second.err


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(run, colours, tmp_path):
    command = ("train", colours, "-o", "run", *SHORT, "--epochs", 3)
    folder = tmp_path / "run"
    assert run(*command).code == 0
    before = left(folder)
    state = torch.load(folder / "state.pt", weights_only=True)
    state["epoch"] = 2
    state["log"] = state["log"][:2]
    state["network"]["patch_embed.proj.weight"][0] = float("nan")
    torch.save(state, folder / "state.pt")
    done = run(*command)
    assert done.code == 3, done.err
    assert "the loss is nan at step 1 of epoch 3" in done.err and "last is as it was after epoch 2" in done.err
    assert left(folder) == before


def test_a_network_is_trained_on_from_its_folder(run, colours, tmp_path):
    command = ("train", colours, *SHORT[2:])
    assert run(*command, "-m", "test_vit", "-o", "first", "--epochs", 1).code == 0
    done = run(*command, "-m", "local-dir:first/best", "-o", "second", "--epochs", 1, "--lr", 1e-12)
    assert done.code == 0 and "a classifier for these 3 classes already; it is kept" in done.err
    first, second = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_a_damaged_state_is_said(run, colours, tmp_path):
    command = ("train", colours, "-o", "run", *SHORT, "--epochs", 1)
    assert run(*command).code == 0
    save_file({"a": torch.zeros(1)}, tmp_path / "run" / "state.pt")
    done = run(*command)
    assert done.code == 2 and "state.pt cannot be read" in done.err and "--overwrite begins anew" in done.err
