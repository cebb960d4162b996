"""What routed attention costs beside dense attention in the same network: multiply-adds, peak memory, time.

    python -m benchmarks.claims.biformer_cost NAME WAY SIZE    # MB by which one forward raises the peak

`rebuilt` takes a BiFormer and gives it another attention with the same weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.claims.measured import Measured
from benchmarks.machine import peak_mb
from vision.attention import attend
from vision.biformer import BiFormer, BiFormerBlock, BiLevelRoutingAttention

__all__ = ["DENSE", "ITSELF", "ROUTED", "WAYS", "WRITTEN", "counted", "macs", "peak", "rebuilt", "score_gb", "times"]

ROUTED, DENSE, WRITTEN, ITSELF = "routed", "dense, fused kernel", "dense, scores in memory", "own region alone"


class Dense(BiLevelRoutingAttention):
    """Every token attends to all tokens of the map, by torch's fused kernel. No padding, as it needs none."""

    dim: int
    num_heads: int
    scale: float
    qkv: nn.Module
    lepe: nn.Module | None
    wo: nn.Module

    def attend_to_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, heads, N, d]` each → `[B, heads, N, d]`."""
        return attend(q, k, v, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]."""
        qkv = self.qkv(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).flatten(1, 2).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        out = self.attend_to_all(q, k, v).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            out = out + self.lepe(qkv[..., -self.dim :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.wo(out)


class Written(Dense):
    """The same step by step, with all scores in memory at once, as attention was computed before fused kernels."""

    def attend_to_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.scale * q @ k.transpose(-1, -2)).softmax(-1) @ v


class Itself(BiLevelRoutingAttention):
    """Every region attends to itself alone: windows, without a choice."""

    n_win: int

    def route(self, qkv: Tensor) -> Tensor:
        regions = torch.arange(self.n_win**2, device=qkv.device)
        return regions.view(1, -1, 1).expand(len(qkv), -1, -1)


WAYS: Mapping[str, type[BiLevelRoutingAttention]] = {
    ROUTED: BiLevelRoutingAttention,
    DENSE: Dense,
    WRITTEN: Written,
    ITSELF: Itself,
}


def rebuilt(model: BiFormer, way: str) -> BiFormer:
    """Replaces the routed attention of a network, in place, by another way to use the same weights.

    Args:
        model: Of layout 'biformer' or 'stl'.
        way: One of `WAYS`.

    Raises:
        ValueError: An unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}: expected one of {', '.join(WAYS)}.")
    for block in model.modules():
        if isinstance(block, BiFormerBlock) and isinstance(block.attn, BiLevelRoutingAttention):
            old = block.attn
            kernel = int(old.lepe.kernel_size[0]) if isinstance(old.lepe, nn.Conv2d) else 0
            new = WAYS[way](old.dim, old.num_heads, old.n_win, topk=old.topk, side_dwconv=kernel)
            new.load_state_dict(old.state_dict())
            block.attn = new.train(block.training)
    return model


def _network(name: str, way: str) -> BiFormer:
    model = timm.create_model(name)
    if not isinstance(model, BiFormer):
        raise ValueError(f"{name} is a {type(model).__name__}: expected a BiFormer, such as biformer_nano.")
    return rebuilt(model, way).eval()


def counted(model: nn.Module, size: int) -> int:
    """Multiply-adds on one picture of `size` × `size`: matrix products and convolutions, scores among them.

    Args:
        model: In evaluation mode; nothing of it is computed.
        size: Side of the picture.
    """
    counter = FlopCounterMode(display=False)
    # Where nothing runs, routed attention gathers: masking, which it prefers on small maps, computes all scores.
    with torch.inference_mode(), counter:
        model.to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def macs(name: str, way: str, size: int) -> int:
    """`counted` of a registered network, by one of `WAYS`."""
    return counted(_network(name, way), size)


def score_gb(size: int) -> float:
    """Of dense attention in the first stage: one head's scores for a picture, in GB of fp32."""
    return 4 * (size // 4) ** 4 / 1e9


def peak(name: str, way: str, size: int, threads: int) -> float:
    """By how many MB the peak memory of a fresh process rises while a network runs on one picture."""
    command = [sys.executable, "-m", "benchmarks.claims.biformer_cost", name, way, str(size), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _rise(name: str, way: str, size: int) -> float:
    """The same in this process."""
    model = _network(name, way)
    with torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))  # what is loaded at the first use does not count
        image = torch.randn(1, 3, size, size)
        before = peak_mb()
        model(image)
    return peak_mb() - before


@torch.inference_mode()
def times(name: str, ways: Mapping[str, int], sizes: Mapping[int, int]) -> Measured:
    """Milliseconds of networks with the same weights on one picture, in turns in this process.

    Args:
        name: Of the network.
        ways: Those of `WAYS` to run, each up to the largest size given here.
        sizes: Side of the picture → turns.

    Returns:
        By way and size the milliseconds of each turn.
    """
    torch.manual_seed(0)
    weights = _network(name, ROUTED).state_dict()
    models = {way: _network(name, way) for way in ways}
    for model in models.values():
        model.load_state_dict(weights)
    measured: Measured = {}
    for size, turns in sizes.items():
        image = torch.randn(1, 3, size, size)
        taken: dict[str, list[float]] = {way: [] for way, largest in ways.items() if size <= largest}
        for turn in range(turns + 1):
            for way, values in taken.items():
                start = time.perf_counter()
                models[way](image)
                if turn:
                    values.append((time.perf_counter() - start) * 1e3)
        measured |= {(way, size): np.array(values) for way, values in taken.items()}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("size", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(_rise(args.name, args.way, args.size))


if __name__ == "__main__":
    main()
