"""What guidance costs: A-STAR's step against a loss pass through the whole UNet and against Attend-and-Excite.

    python benchmarks/astar.py                    # the shipped model, and a UNet of Stable Diffusion 1.5's size
    python benchmarks/astar.py --models shipped   # one of them

A guided step is a loss pass (forward and backward) and the pass that denoises (both halves of guidance). The ways:

* plain: the pass that denoises, alone;
* A-STAR: both losses, the loss pass ends after the last layer whose map it needs;
* A-STAR, whole UNet: the same, but the loss pass runs to its end;
* Attend-and-Excite, ours: the loss of Attend-and-Excite in the way of A-STAR;
* Attend-and-Excite, diffusers: `StableDiffusionAttendAndExcitePipeline`, without refinement, which A-STAR has not.

All run in turns in one process, on the same UNet; what counts is the median, over the turns, of the ratio to diffusers'
pipeline of the same turn. Peak memory is of a fresh process each. One picture, fp32, latents out, random weights for
Stable Diffusion's size: time does not depend on them. Results go to benchmarks/results/astar.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from benchmarks import machine  # noqa: E402
from diffusion import AStarStableDiffusionPipeline, Guidance  # noqa: E402
from diffusion.attention_maps import AttentionRecorder, find_subjects  # noqa: E402
from recipes.text_to_scene import build_tokenizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "astar.json"
PROMPT, SUBJECTS = "a red circle and a blue square", ["circle", "square"]
REFERENCE = "Attend-and-Excite, diffusers"
STEPS = {"shipped": 15, "sd15": 2}


def sd15() -> StableDiffusionPipeline:
    """A UNet of Stable Diffusion 1.5's size at 512 pixels, 860 M parameters, with small parts around it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder))
    tokenizer.model_max_length = 77
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=1,
        num_attention_heads=12,
        **special,
    )
    small: dict[str, Any] = {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
    }
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**small),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def shipped() -> StableDiffusionPipeline:
    """The small model that ships, 32 pixels."""
    return StableDiffusionPipeline.from_pretrained(ROOT / "weights" / "text_to_scene", dtype=torch.float32)


MODELS: dict[str, Callable[[], StableDiffusionPipeline]] = {"shipped": shipped, "sd15": sd15}


@contextmanager
def whole_unet() -> Iterator[None]:
    """Loss passes run to the end of the UNet, though nothing of what follows the last map is needed."""

    def run(self: AttentionRecorder, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        forward(*args, **kwargs)
        return self.maps()

    ending = AttentionRecorder.run
    AttentionRecorder.run = run
    try:
        yield
    finally:
        AttentionRecorder.run = ending


def ways(plain: StableDiffusionPipeline, steps: int) -> dict[str, Callable[[], object]]:
    """Name → what makes one latent, all steps guided."""
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    ours = AStarStableDiffusionPipeline(**parts, requires_safety_checker=False)
    theirs = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    for pipe in (plain, ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    indices = [positions[0] for positions in find_subjects(plain.tokenizer, PROMPT, SUBJECTS)]
    excite = Guidance(losses={"attend_and_excite": 1}, keep_padding=True)

    def call(pipe: Any, **kwargs: Any) -> object:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, num_inference_steps=steps, generator=generator, output_type="latent", **kwargs)

    def whole() -> object:
        with whole_unet():
            return call(ours, subjects=SUBJECTS)

    return {
        "plain": lambda: call(plain),
        REFERENCE: lambda: call(theirs, token_indices=indices, max_iter_to_alter=steps, thresholds={}),
        "Attend-and-Excite, ours": lambda: call(ours, subjects=SUBJECTS, guidance=excite),
        "A-STAR, whole UNet": whole,
        "A-STAR": lambda: call(ours, subjects=SUBJECTS),
    }


def time_in_turns(model: str, turns: int) -> list[dict[str, Any]]:
    """A row for each way: median seconds of a step, and the median ratio to diffusers' pipeline of the same turn."""
    steps = STEPS[model]
    runs = ways(MODELS[model](), steps)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append((time.perf_counter() - start) / steps)
    return [
        {
            "model": model,
            "way": name,
            "seconds": round(statistics.median(own), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(own, seconds[REFERENCE], strict=True)), 3),
        }
        for name, own in seconds.items()
    ]


def peak_memory(model: str, way: str, threads: int) -> int:
    """Peak resident memory in MB of a fresh process that makes one latent."""
    command = [sys.executable, __file__, "--models", model, "--measure-memory-of", way, "--threads", str(threads)]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=5, help="of the shipped model four times as many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if args.measure_memory_of:
        model = args.models[0]
        ways(MODELS[model](), STEPS[model])[args.measure_memory_of]()
        print(machine.peak_mb())
        return
    rows = []
    for model in args.models:
        for row in time_in_turns(model, 4 * args.turns if model == "shipped" else args.turns):
            row["peak_mb"] = peak_memory(model, row["way"], args.threads)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    on = machine.describe("torch", "diffusers", "transformers")
    report = {"command": "python benchmarks/astar.py", "threads": args.threads, "turns": args.turns, **on, "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
