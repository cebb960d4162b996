"""The same command under `accelerate launch`, on two processes of this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import draw_classes
from safetensors.torch import load_file
from support import ROOT

BIN = Path(sys.executable).parent
LAUNCH = (
    "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0", "--no_python",
)  # fmt: skip


def train(tmp_path: Path, data: Path, output: str, launcher: tuple[str, ...] = ()) -> str:
    """Runs the command; what it said."""
    command = (
        "attnsuite", "train", data, "-m", "test_vit", "--img-size", "32", "--epochs", "2", "--batch-size", "9",
        "--device", "cpu", "--workers", "0", "--ema", "-o", output,
    )  # fmt: skip
    words = [str(BIN / word) if word in ("accelerate", "attnsuite") else str(word) for word in (*launcher, *command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_do_what_one_does(tmp_path):
    data = draw_classes(tmp_path / "colours", each=11)  # 27 to learn from, 6 to measure on; steps of 9: 5 and 4
    alone, together = train(tmp_path, data, "one"), train(tmp_path, data, "two", LAUNCH)
    assert "2 processes" in together and "2 processes" not in alone
    assert together.count("epoch 2/2:") == 1  # one of them speaks, and writes
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1] == [".lock", "best", "last", "log.csv", "settings.json", "state.pt", "val.csv"]
    # without dropout and mixup nothing depends on the processes: had one of them not learned, or had a picture been
    # seen twice or not at all, gradients and counts would be others
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("one", "two")]
    assert states[0]["updates"] == states[1]["updates"] == 6
    for one, two in zip(states[0]["log"], states[1]["log"], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    one, two = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
