"""HiLo attention's claim, measured on single layers: is it faster than window, reduced and full attention?

    python -m benchmarks.claims.hilo              # results/hilo.json and hilo.csv; minutes; wants an idle machine

Paper: "Fast Vision Transformers with HiLo Attention", Pan et al., NeurIPS 2022. Needs scipy, which the `test` extra
brings.

The protocol, fixed before the measurement:

* **Layers.** HiLo with windows of 2 and alpha 0.9, as in LITv2; timm's attention of Swin with windows of 7, partition
  and reversal included; timm's of PVTv2 with a reduction of 2, which is PVT's in the third stage too; timm's of ViT.
  Each has 12 heads and biases on queries, keys and values, and each runs torch's fused kernel (Swin's is switched to
  it).
* **Settings.** Width 384, as in LITv2-S, on maps of 14, 28 and 56 a side, in batches of 64, 16 and 4: 12,544 tokens
  each. Width 768 on 14 a side, batch 64: the authors' own comparison of single layers. fp32, inference mode, weights
  as initialised, inputs of unit variance.
* **Turns.** All layers of a setting run in one process in turns, A B C D A B C D …, after one round that does not
  count. Weights and inputs are drawn anew for each of the seeds 0, 1 and 2; each has as many turns.
* **Figures.** Of each turn how many times as long the other layer took as HiLo; the median over all turns, with its 95
  % bootstrap interval, which draws turns. p is of the sign test over turns, adjusted for the number of claims (Holm).
  Whatever slows the machine down slows all layers of a turn. Multiply-adds of matrix products and convolutions are
  counted by torch, of one picture.
* **Verdict.** Below 0.05, and with an interval that leaves the claimed factor out, a claim is shown if the median is
  above it, and contradicted if below; else it is not shown. Where HiLo has more multiply-adds than the other, nothing
  is shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from timm.layers import Attention
from timm.models import pvt_v2, swin_transformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.claims.measured import Measured, load, runs, save
from benchmarks.claims.paired import holm, sign_test, verdict
from benchmarks.claims.report import RESULTS, Claim, Report, Table
from vision.litv2 import HiLo

__all__ = ["CLAIMS", "LAYERS", "SETTINGS", "Faster", "Setting", "build", "claims", "macs", "measure", "report"]

COMMAND = "python -m benchmarks.claims.hilo"
SEEDS, TURNS, HEADS = (0, 1, 2), 15, 12

HILO, WINDOW, REDUCED, FULL = "HiLo", "window", "spatial reduction", "full"
LAYERS = (HILO, WINDOW, REDUCED, FULL)
OTHERS = LAYERS[1:]


class Setting(NamedTuple):
    """What a layer is given: maps of `side` × `side` tokens of `dim` channels."""

    dim: int
    side: int
    batch: int

    def column(self, layer: str) -> str:
        """The name under which a layer's times are kept."""
        return f"{layer}, width {self.dim}, {self.side}x{self.side}"


SMALL, MEDIUM, LARGE, WIDE = Setting(384, 14, 64), Setting(384, 28, 16), Setting(384, 56, 4), Setting(768, 14, 64)
SETTINGS = (SMALL, MEDIUM, LARGE, WIDE)

PUBLISHED = {HILO: 1029, WINDOW: 631, REDUCED: 710, FULL: 505}
"""Images/s at `WIDE` on an i9-10900X with torch 1.8.1, from the authors' comparison of single layers."""


@dataclass(frozen=True)
class Faster:
    """A claim: HiLo is more than `factor` times as fast as each of `others`.

    Attributes:
        claim: In a sentence without a full stop.
        published: The paper's figures, and where they stand; "no figure" where it has none.
        setting: What the layers are given.
        others: Of several it is the fastest of a turn that counts.
        factor: See above.
    """

    claim: str
    published: str
    setting: Setting
    others: tuple[str, ...]
    factor: float = 1.0


_RATES = "images/s of a layer of width 768 on a CPU"
CLAIMS = (
    Faster("A HiLo layer is faster than window attention", f"1029 to 631 {_RATES}", SMALL, (WINDOW,)),
    Faster("… than spatial-reduction attention", f"1029 to 710 {_RATES}", SMALL, (REDUCED,)),
    Faster("… than full attention", f"1029 to 505 {_RATES}", SMALL, (FULL,)),
    Faster("… than all three on maps of 28 × 28", "no figure", MEDIUM, OTHERS),
    Faster("… than window attention on maps of 56 × 56", "no figure", LARGE, (WINDOW,)),
    Faster("… than spatial-reduction and full attention there", "no figure", LARGE, (REDUCED, FULL)),
    Faster("It is 1.6 times as fast as window attention", "1.6 times on CPUs (abstract)", SMALL, (WINDOW,), 1.6),
    Faster("… as spatial-reduction attention 1.4 times", "1.4 times on CPUs (abstract)", SMALL, (REDUCED,), 1.4),
    Faster("At width 768 1.6 times as window attention", "1.6 times on CPUs (abstract)", WIDE, (WINDOW,), 1.6),
    Faster("… as spatial-reduction attention 1.4 times", "1.4 times on CPUs (abstract)", WIDE, (REDUCED,), 1.4),
)


class _Windows(nn.Module):
    """Swin's attention with what a block of Swin does around it: `[B, H, W, C]` in and out, no shift."""

    def __init__(self, attn: nn.Module, side: int) -> None:
        super().__init__()
        self.attn = attn
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        size = self.side, self.side
        windows = self.attn(swin_transformer.window_partition(x, size).flatten(1, 2)).unflatten(1, size)
        return swin_transformer.window_reverse(windows, size, x.shape[1], x.shape[2])


class _Tokens(nn.Module):
    """A layer on tokens `[B, N, C]`, on maps `[B, H, W, C]`."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        if isinstance(self.attn, pvt_v2.Attention):
            return self.attn(tokens, list(x.shape[1:3])).view(x.shape)
        return self.attn(tokens).view(x.shape)


def build(layer: str, dim: int) -> nn.Module:
    """One of `LAYERS`, on `[B, H, W, dim]`, in evaluation mode.

    Raises:
        ValueError: An unknown layer.
    """
    if layer == HILO:
        return HiLo(dim, HEADS, qkv_bias=True, window_size=2, alpha=0.9).eval()
    if layer == WINDOW:
        attn = swin_transformer.WindowAttention(dim, HEADS, window_size=7, qkv_bias=True)
        setattr(attn, "fused_attn", True)  # noqa: B010 - typed as a constant of torch.jit
        return _Windows(attn, 7).eval()
    if layer == REDUCED:
        return _Tokens(pvt_v2.Attention(dim, HEADS, sr_ratio=2, qkv_bias=True)).eval()
    if layer == FULL:
        return _Tokens(Attention(dim, HEADS, qkv_bias=True)).eval()
    raise ValueError(f"layer={layer!r}: expected one of {', '.join(LAYERS)}.")


def macs(layer: str, setting: Setting) -> int:
    """Multiply-adds of one picture: matrix products and convolutions, scores and their use among them."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.inference_mode():
        x = torch.empty(1, setting.side, setting.side, setting.dim)
        module = build(layer, setting.dim)
        with counter:
            module(x)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure(turns: int = TURNS, settings: Sequence[Setting] = SETTINGS) -> Measured:
    """Milliseconds of each turn."""
    measured: Measured = {}
    for setting in settings:
        for seed in SEEDS:
            torch.manual_seed(seed)
            layers = {layer: build(layer, setting.dim) for layer in LAYERS}
            x = torch.randn(setting.batch, setting.side, setting.side, setting.dim)
            times: dict[str, list[float]] = {layer: [] for layer in LAYERS}
            for turn in range(turns + 1):
                for layer, module in layers.items():
                    start = time.perf_counter()
                    module(x)
                    if turn:
                        times[layer].append((time.perf_counter() - start) * 1e3)
            measured |= {(setting.column(layer), seed): np.array(values) for layer, values in times.items()}
    return measured


def _times(measured: Measured, setting: Setting, layer: str) -> np.ndarray:
    """All turns of a layer, seed by seed, `[S * T]`."""
    return np.concatenate(runs(measured, setting.column(layer)))


def _advantage(measured: Measured, own: Faster) -> np.ndarray:
    """Of each turn how many times as long the fastest of the others took as HiLo, `[S * T]`."""
    fastest = np.min([_times(measured, own.setting, layer) for layer in own.others], 0)
    return fastest / _times(measured, own.setting, HILO)


def _interval(ratios: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of a median."""
    found = stats.bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def claims(measured: Measured, claimed: Sequence[Faster] = CLAIMS) -> list[Claim]:
    """Holds each claim against what was measured, p adjusted for their number."""
    ratios = [_advantage(measured, own) for own in claimed]
    signs = [
        (int((each > own.factor).sum()), int((each < own.factor).sum()))
        for own, each in zip(claimed, ratios, strict=True)
    ]
    adjusted = holm([sign_test(*own) for own in signs])
    return [_claim(own, each, sign, p) for own, each, sign, p in zip(claimed, ratios, signs, adjusted, strict=True)]


def _claim(own: Faster, ratios: np.ndarray, signs: tuple[int, int], p: float) -> Claim:
    median, (low, high) = float(np.median(ratios)), _interval(ratios)
    ours, theirs = macs(HILO, own.setting), min(macs(layer, own.setting) for layer in own.others)
    beyond = (low > own.factor or high < own.factor) and (ours <= theirs or median < own.factor)
    words = (
        f"{median:.2f} times as fast ({low:.2f} to {high:.2f}), {'faster' if own.factor == 1 else 'by more'} in "
        f"{signs[0]} of {len(ratios)} turns, p = {p:.2g}; {ours / 1e6:.0f} MMACs to {theirs / 1e6:.0f}"
    )
    return Claim(
        own.claim,
        own.published,
        words,
        verdict(median - own.factor, p) if beyond else "not shown at this scale",
        len(ratios),
        (SEEDS[0], SEEDS[-1]),
        median - own.factor,
        (low - own.factor, high - own.factor),
        p,
    )


def _table(measured: Measured) -> Table:
    header = ["setting", "layer", "parameters (k)", "MMACs", "images/s", "time / HiLo's", "published images/s"]
    rows = []
    for setting in SETTINGS:
        hilo = _times(measured, setting, HILO)
        for layer in LAYERS:
            own = _times(measured, setting, layer)
            params = sum(p.numel() for p in build(layer, setting.dim).parameters())
            rows.append(
                [
                    f"width {setting.dim}, {setting.side} × {setting.side}, batch {setting.batch}",
                    layer,
                    f"{params / 1e3:.0f}",
                    f"{macs(layer, setting) / 1e6:.0f}",
                    f"{setting.batch * 1e3 / statistics.median(own):.3g}",
                    f"{np.median(own / hilo):.2f}",
                    f"{PUBLISHED[layer]}" if setting == WIDE else "",
                ]
            )
    return Table("HiLo: single layers in turns, medians over all turns", header, rows)


def report(measured: Measured, on: dict[str, Any]) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    turns = len(next(iter(measured.values())))
    return Report(
        method="HiLo attention",
        paper="Pan et al., NeurIPS 2022",
        command=COMMAND if turns == TURNS else f"{COMMAND} --turns {turns}",
        protocol=(
            "Single layers of 12 heads in one process in turns, each by torch's fused kernel: HiLo (windows of 2, "
            "alpha 0.9), timm's attention of Swin (windows of 7), PVTv2 (reduction 2) and ViT. fp32, "
            f"{on['threads']} threads. For each of {len(SEEDS)} seeds weights and inputs are drawn anew and {turns} "
            "turns run. Ratios are medians over turns, their 95 % bootstrap intervals draw turns; p is of the sign "
            "test over turns, adjusted for the number of claims (Holm). Multiply-adds are of one picture, counted by "
            "torch."
        ),
        machine=on,
        claims=claims(measured),
        tables=[_table(measured)],
        details={"settings": [setting._asdict() for setting in SETTINGS], "heads": HEADS, "turns": turns},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of hilo.json and hilo.csv")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each seed")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    save(measure(args.turns), args.out / "hilo.csv")
    on = machine.describe("torch", "timm", "scipy") | {"threads": args.threads}
    made = report(load(args.out / "hilo.csv"), on)
    made.save(args.out / "hilo.json")
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
