"""Time and memory of the backbones, against timm's networks and against plain transcriptions of the papers' equations.

    python benchmarks/backbones.py                         # pyramids, over swin_tiny: 224 px, batch 1 and 8
    python benchmarks/backbones.py --group tap             # or sparsifiner, psa, layers; over deit_small, batch 8
    python benchmarks/backbones.py --size 384 512 --models biformer_tiny litv2_small
    python benchmarks/backbones.py --memory                # peak resident memory too, a fresh process each

Everything that is compared runs in turns in one process, A B C A B C …; what counts is the median, over the turns, of
the ratio to the group's reference of the same turn, so that a drifting machine cancels out. fp32, eval, inference mode,
weights as initialised; no warm cache is left out but one round before the measured ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.ops import deform_conv2d  # noqa: E402

from benchmarks.machine import peak_mb, processor  # noqa: E402
from vision import biformer, litv2  # noqa: E402


@dataclass(frozen=True)
class Group:
    """Networks that are measured against one another."""

    reference: str
    ours: tuple[str, ...]
    others: tuple[str, ...]
    batches: tuple[int, ...]
    transcribed: bool
    """Whether there are plain transcriptions of the papers' equations to run beside ours."""
    official: dict[tuple[str, int], float]
    """(name, batch) → the authors' code: fp32, 2 threads, time over the reference at 224 px."""


def _over_deit(official: dict[str, float | None], others: tuple[str, ...] = ()) -> Group:
    """Networks that are measured over deit_small at batch 8; None where there is no code of the authors' to measure."""
    by_batch = {(name, 8): ratio for name, ratio in official.items() if ratio}
    return Group("deit_small_patch16_224", tuple(official), others, (8,), transcribed=False, official=by_batch)


GROUPS = {
    "pyramids": Group(
        reference="swin_tiny_patch4_window7_224",
        ours=("biformer_tiny", "biformer_small", "biformer_base", "litv2_small", "litv2_base"),
        others=("convnext_tiny", "deit_small_patch16_224"),
        batches=(1, 8),
        transcribed=True,
        official={
            ("biformer_tiny", 1): 1.15,
            ("biformer_tiny", 8): 1.11,
            ("biformer_small", 1): 2.34,
            ("biformer_small", 8): 2.23,
            ("biformer_base", 1): 3.68,
            ("biformer_base", 8): 4.50,
            ("litv2_small", 1): 1.10,
            ("litv2_small", 8): 1.05,
            ("litv2_base", 1): 2.46,
            ("litv2_base", 8): 2.56,
        },
    ),
    "sparsifiner": _over_deit(
        {
            "sparsifiner_deit_tiny_patch16_224": 0.70,
            "sparsifiner_deit_small_patch16_224": 1.87,
            "sparsifiner_deit_base_patch16_224": 5.5,
            "sparsifiner_lvvit_small": 2.68,
        },
        others=("deit_tiny_patch16_224", "deit_base_patch16_224"),
    ),
    "tap": _over_deit(
        {
            "tap_fan_tiny_8_p4_hybrid": 1.74,
            "tap_fan_small_12_p4_hybrid": 2.8,
            "tap_fan_base_16_p4_hybrid": 4.4,
            "fan_base_16_p4_hybrid": 3.6,
            "tap_fan_large_16_p4_hybrid": 6.2,
            "tap_rvt_small_plus": 2.04,
            "tap_rvt_base_plus": 8.3,
        }
    ),
    "psa": _over_deit({"psa_hrnet_w48_ocr": 8.7}),
    "layers": _over_deit(
        {
            "ela_resnet50": None,
            "ela_mobilenetv2_100": None,
            "psa_resnet50": None,
            "psa_hrnet_w48": None,
            "dcal_deit_small_patch16_224": None,
        },
        others=("resnet50", "mobilenetv2_100", "hrnet_w48"),
    ),
}
# What a network must be built with to be what the authors measured.
BUILT_WITH: dict[str, dict[str, Any]] = {"psa_hrnet_w48_ocr": {"layout": "sequential", "multi_scale": False}}


def routed_attention_as_written(q, k, v, index, size, num_heads, scale, **_) -> Tensor:
    """Eq. 5 and 6 of BiFormer word for word: expand keys and values over all regions, gather, attend."""
    B, H, W, C = v.shape
    (h, w), R, d = size, index.shape[1], C // num_heads

    def regions(x: Tensor) -> Tensor:  # [B, R, h * w, C]
        return x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(B, R, h * w, C)

    def gathered(x: Tensor) -> Tensor:  # [B, R, topk, h * w, C]
        pick = index.view(B, R, -1, 1, 1).expand(-1, -1, -1, h * w, C)
        return x.view(B, 1, R, h * w, C).expand(-1, R, -1, -1, -1).gather(2, pick)

    q = regions(q).view(B, R, -1, num_heads, d).transpose(2, 3)
    k, v = (gathered(regions(x)).view(B, R, -1, num_heads, d).transpose(2, 3) for x in (k, v))
    x = (scale * q @ k.transpose(-1, -2)).softmax(-1) @ v  # [B, R, heads, h * w, d]
    x = x.transpose(2, 3).reshape(B, H // h, W // w, h, w, C)
    return x.transpose(2, 3).reshape(B, H, W, C)


def attend_as_written(q, k, v, scale, mask=None, *_, **__) -> Tensor:
    """Softmax attention, step by step."""
    scores = q @ k.transpose(-1, -2) * scale
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def conv_mlp_as_written(self: Any, x: Tensor) -> Tensor:
    """LITv2's feed-forward layer on contiguous [B, C, H, W] for the convolution, [B, H, W, C] for the rest."""
    hidden = self.fc1(x).permute(0, 3, 1, 2).contiguous()
    hidden = self.dwconv.dwconv(hidden).permute(0, 2, 3, 1).contiguous()
    return self.fc2(nn.functional.gelu(hidden))


def merge_as_written(self: Any, x: Tensor) -> Tensor:
    """LITv2's deformable convolution by torchvision's operator."""
    x = x.permute(0, 3, 1, 2).contiguous()
    x = deform_conv2d(x, self.conv_offset(x), self.weight, self.bias, stride=(2, 2))
    return x.permute(0, 2, 3, 1).contiguous()


_AS_WRITTEN: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (biformer, "routed_attention", routed_attention_as_written),
    (biformer, "attend", attend_as_written),
    (litv2, "attend", attend_as_written),
    (litv2._ConvMlp, "forward", conv_mlp_as_written),
    (litv2._DeformableConv, "forward", merge_as_written),
)


@contextmanager
def as_written():
    """Our networks with the papers' equations in place of our kernels, and the batch in one piece."""
    from vision import inference

    changes = (*_AS_WRITTEN, (inference, "is_eager_cpu_inference", lambda x: False))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, function in changes:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _build(name: str, size: int) -> nn.Module:
    sized: dict[str, Any] = {"img_size": size} if any(part in name for part in ("swin", "deit", "lvvit")) else {}
    return timm.create_model(name, **sized, **BUILT_WITH.get(name, {})).eval()


def time_in_turns(
    group: Group, names: list[str], size: int, batch: int, turns: int, transcriptions: bool
) -> list[dict[str, Any]]:
    """One row per network: median milliseconds, and the median ratio to the reference of the same turn."""
    models = {name: _build(name, size) for name in dict.fromkeys((group.reference, *names))}
    written = [name for name in models if transcriptions and group.transcribed and name in group.ours]
    images = torch.randn(batch, 3, size, size)
    seconds: dict[str, list[float]] = {name: [] for name in (*models, *(f"{n} as written" for n in written))}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for label, times in seconds.items():
                model = models[label.removesuffix(" as written")]
                if label in models:
                    elapsed = _seconds(model, images)
                else:
                    with as_written():
                        elapsed = _seconds(model, images)
                if turn:
                    times.append(elapsed)
    reference = seconds[group.reference]
    rows = []
    for label, times in seconds.items():
        ratios = [a / b for a, b in zip(times, reference, strict=True)]
        rows.append(
            {
                "model": label,
                "size": size,
                "batch": batch,
                "ms": round(statistics.median(times) * 1e3, 1),
                "ratio": round(statistics.median(ratios), 3),
                "official_ratio": group.official.get((label, batch)) if size == 224 else None,
            }
        )
    return rows


def _seconds(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def peak_memory(name: str, size: int, batch: int) -> float:
    """Peak resident memory in MB of a fresh process that builds the network and runs it three times."""
    command = [sys.executable, __file__, "--measure-memory-of", name, "--size", str(size), "--batch", str(batch)]
    out = subprocess.run(
        [*command, "--threads", str(torch.get_num_threads())], check=True, capture_output=True, text=True
    )
    return float(out.stdout)


def _measure_memory(name: str, size: int, batch: int) -> None:
    model, images = _build(name.removesuffix(" as written"), size), torch.randn(batch, 3, size, size)
    with torch.inference_mode():
        for _ in range(3):
            if name.endswith(" as written"):
                with as_written():
                    model(images)
            else:
                model(images)
    print(peak_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, default="pyramids")
    parser.add_argument("--models", nargs="+", help="instead of all of the group")
    parser.add_argument("--size", nargs="+", type=int, default=[224])
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-transcriptions", action="store_true", help="leave the plain transcriptions out")
    parser.add_argument("--memory", action="store_true", help="peak resident memory too")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--measure-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure_memory_of:
        _measure_memory(args.measure_memory_of, args.size[0], args.batch[0])
        return

    group = GROUPS[args.group]
    names = args.models or [*group.ours, *group.others]
    rows = []
    for size in args.size:
        for batch in args.batch or group.batches:
            for row in time_in_turns(group, names, size, batch, args.turns, not args.no_transcriptions):
                if args.memory:
                    row["peak_mb"] = round(peak_memory(row["model"], size, batch))
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)
    if args.json:
        machine = {"cpu": processor(), "threads": args.threads, "torch": torch.__version__, "timm": timm.__version__}
        command = "python benchmarks/backbones.py" + (f" --group {args.group}" if args.group != "pyramids" else "")
        report = {"command": command, "reference": group.reference, **machine, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
