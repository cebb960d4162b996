"""Where routed attention should mask a dense attention, and where it should gather: time of both over the map's size.

    python benchmarks/routing.py

One row per stage shape of BiFormer-T at a range of image sizes; both ways in turns in one process, median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from vision.biformer import _prefers_mask, routed_attention

STAGES = ((4, 64, 2, 1), (8, 128, 4, 4), (16, 256, 8, 16))  # stride, width, heads, topk
MAX_TOKENS = 2048  # past this the N * N scores of a mask are out of the question


def compare(stride: int, dim: int, num_heads: int, topk: int, img_size: int, batch: int, turns: int) -> str | None:
    """The row of one stage at one image size; None where only gathering is possible."""
    region = -(-img_size // stride // 7)
    side = 7 * region
    if side**2 > MAX_TOKENS:
        return None
    q, k, v = torch.randn(3, batch, side, side, dim)
    index = torch.rand(batch, 49, 49).topk(topk).indices
    seconds: dict[Literal["gather", "mask"], list[float]] = {"gather": [], "mask": []}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for mode, times in seconds.items():
                start = time.perf_counter()
                routed_attention(q, k, v, index, (region, region), num_heads, dim**-0.5, mode)
                if turn:
                    times.append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(seconds["gather"], seconds["mask"], strict=True))
    chosen = "mask" if _prefers_mask(side**2, topk * region**2) else "gather"
    return (
        f"{img_size:4} px  {side}x{side} tokens, {topk * region**2} chosen, batch {batch}:  "
        f"gather {statistics.median(seconds['gather']) * 1e3:.2f} ms, "
        f"mask {statistics.median(seconds['mask']) * 1e3:.2f} ms, gather / mask {ratio:.2f}, auto takes {chosen}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", type=int, default=[112, 224, 336, 384, 448, 512, 640])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in STAGES:
        for size in args.size:
            for batch in args.batch:
                row = compare(*stage, size, batch, args.turns)
                if row:
                    print(row, flush=True)


if __name__ == "__main__":
    main()
