"""What the processor and the C library decide: where speed comes from, and that results do not move."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support import ROOT, SAMPLES
from torch import nn

from apps import run as run_module
from apps.batch import processor
from apps.batch.stage import Compute
from apps.classify import Classify
from apps.models import ModelChoice, Network, load, resolve
from apps.options import Machine, Reading, Writing

_FAULTS = """
import resource, sys, torch
from apps.batch.processor import keep_freed_memory
if len(sys.argv) > 1:
    keep_freed_memory(*map(int, sys.argv[2:]))
faults = []
for _ in range(12):
    torch.ones(24 << 20, dtype=torch.uint8), torch.ones(64 << 20, dtype=torch.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[5])  # the first few find their places
"""


def faults(*argv: object) -> int:
    command = [sys.executable, "-c", _FAULTS, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
def test_what_layers_free_is_not_cleared_again_for_the_next():
    left_alone, kept, spare = faults(), faults("keep"), faults("keep", 128 << 20)
    assert kept < left_alone / 5
    assert spare > left_alone / 4  # a decode process gives the largest blocks back


def test_networks_get_channels_last_on_a_cpu_and_say_the_same():
    network = load(resolve(ModelChoice("resnet10t", random_weights=True)))
    layouts = []

    class Watched(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            layouts.append(images.is_contiguous(memory_format=torch.channels_last))
            return network.module(images)

    stage = Classify(Network(Watched(), "watched", network.labels, network.data_config), Compute(torch.device("cpu")))
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network.module(images)
    torch.testing.assert_close(stage.forward(images), expected, atol=1e-5, rtol=1e-4)
    assert layouts == [True]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_is_a_matter_of_instructions(monkeypatch, bf16, amx):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert processor.has_bfloat16() is (bf16 or amx)


@pytest.mark.parametrize("able", [False, True])
def test_half_precision_without_instructions_for_it_goes_on_with_a_note(monkeypatch, capsys, tmp_path, able):
    monkeypatch.setattr(run_module, "has_bfloat16", lambda: able)
    options = run_module.RunOptions(
        Reading([str(SAMPLES / "cat.jpg")]),
        ModelChoice("resnet10t", random_weights=True),
        Writing(str(tmp_path / "rows.jsonl")),
        Machine(workers=0, device="cpu", amp=True),
    )
    summary = run_module.run("classify", options, lambda network, compute, _: Classify(network, compute), {})
    assert (summary.rows, summary.failed) == (1, 0)
    assert ("no instructions for bfloat16" in capsys.readouterr().err) is not able


def test_fast_decode_moves_probabilities_a_little_and_is_part_of_the_command(run, tmp_path):
    (tmp_path / "large").mkdir()
    for path in sorted(SAMPLES.glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.LANCZOS).save(tmp_path / "large" / path.name)
    command = ("classify", "large", "--model", "tf_efficientnet_lite0", "--workers", 0)
    for name, options in (("whole", ()), ("fast", ("--fast-decode",))):
        assert run(*command, "-o", f"{name}.jsonl", *options).code == 0
    whole, fast = (
        [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("whole", "fast")
    )
    assert [(r["width"], r["height"]) for r in fast] == [(r["width"], r["height"]) for r in whole]
    moved = []
    for before, after in zip(whole, fast, strict=True):
        probabilities = {after[f"label_{rank}"]: after[f"prob_{rank}"] for rank in range(1, 6)}
        moved.append(abs(before["prob_1"] - probabilities[before["label_1"]]))
        if before["prob_1"] - before["prob_2"] > 0.03:  # what is nearer may change places
            assert after["label_1"] == before["label_1"]
    assert 0 < max(moved) < 0.03
    refused = run(*command, "-o", "fast.jsonl")
    assert refused.code == 2 and "fast_decode" in refused.err
