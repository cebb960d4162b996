"""Where attention to chosen keys overtakes attention to all: Sparsifiner's two paths against timm's DeiT-S.

    python benchmarks/sparsifiner.py                       # 224, 384, 512 and 768 px, keep rates 0.25, 0.1 and 0.05
    python benchmarks/sparsifiner.py --size 224 --models   # whole networks too

What is compared runs in turns in one process; what counts is the median over the turns of the ratio to dense, fused
attention of the same turn. `MACs` is what was executed, counted as it ran, over the dense attention's. fp32, inference
mode; a predictor as initialised, whose rank grows with the number of tokens as in the authors' networks. Results go to
benchmarks/results/sparsifiner.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import vision  # noqa: E402, F401 - registers the models
from vision.sparsifiner import ConnectivityPredictor, blockwise_attention  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sparsifiner.json"
REFERENCE, OURS = "deit_small_patch16_224", "sparsifiner_deit_small_patch16_224"
HEADS, HEAD_DIM, DEPTH = 6, 64, 12  # of DeiT-S
# MFLOPs (multiply-adds) of attention and predictors in DeiT-S at 224 px, as published.
PUBLISHED = {0.9: 396.8, 0.7: 324.6, 0.5: 254.2, 0.3: 183.6, 0.2: 147.5, 0.1: 111.4, 0.05: 93.3, 0.01: 78.9}


class MacCounter(TorchDispatchMode):
    """Counts multiply-adds of matrix products as they run, the sparse ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.macs += out.numel() * args[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.macs += out.numel() * args[1].shape[-1]
        elif name == "sparse_sampled_addmm":
            self.macs += args[0].values().numel() * args[1].shape[-1]
        elif "embedding_bag" in name:
            self.macs += args[1].numel() * args[0].shape[-1]
        elif "scaled_dot_product" in name:
            q, k = args[:2]
            self.macs += 2 * q.numel() * k.shape[-2]
        return out


def macs_by_formula(num_tokens: int, budget: int, predictor: ConnectivityPredictor) -> float:
    """Multiply-adds of predictor and attention for one image and block, as the gathering path executes them."""
    rank, top = predictor.rank, min(predictor.coef_top_k, predictor.rank)
    c = predictor.proj_c_q.out_features
    to_logits = 2 * num_tokens * HEAD_DIM * rank + 2 * c * HEAD_DIM * rank
    scores = num_tokens * top * num_tokens
    attention = 2 * HEAD_DIM * ((num_tokens - 1) * budget + num_tokens)
    return HEADS * (to_logits + scores + attention)


class Layer:
    """Attention of one DeiT-S block to random tokens, in each of the ways."""

    def __init__(self, num_tokens: int, keep_rate: float, batch: int) -> None:
        self.predictor = ConnectivityPredictor(num_tokens, HEADS, HEAD_DIM).eval()
        self.budget = math.ceil(keep_rate * num_tokens)
        self.num_tokens = num_tokens
        qkv = torch.randn(batch, num_tokens, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)  # as a layer has them
        self.q, self.k, self.v = qkv.unbind(0)

    def dense(self) -> None:
        """By torch's fused kernel, as timm's DeiT does it."""
        F.scaled_dot_product_attention(self.q, self.k, self.v)

    def sparse(self, gather: bool, batch: int | None = None) -> None:
        """By one of our paths."""
        q, k, v = self.q[:batch], self.k[:batch], self.v[:batch]
        blockwise_attention(q, k, v, self.predictor, self.budget, HEAD_DIM**-0.5, gather)

    def macs(self) -> int:
        """Multiply-adds of the gathering path for one image."""
        counter = MacCounter()
        with torch.no_grad(), counter:
            self.sparse(gather=True, batch=1)
        return counter.macs


def in_turns(ways: Mapping[str, Callable[[], object]], turns: int) -> dict[str, tuple[float, float]]:
    """Name → median seconds, and the median ratio to the first of the ways."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(ways))]
    return {
        name: (statistics.median(times), statistics.median(a / b for a, b in zip(times, first, strict=True)))
        for name, times in seconds.items()
    }


def layer_row(size: int, keep_rate: float, batch: int, turns: int) -> dict[str, Any]:
    """One attention layer at one size."""
    layer = Layer(1 + (size // 16) ** 2, keep_rate, batch)
    ways = {"dense": layer.dense, "masked": lambda: layer.sparse(False), "gather": lambda: layer.sparse(True)}
    times = in_turns(ways, turns)
    dense_macs = 2 * HEADS * HEAD_DIM * layer.num_tokens**2
    return {
        "size": size,
        "tokens": layer.num_tokens,
        "keep_rate": keep_rate,
        "batch": batch,
        "dense_ms": 1e3 * times["dense"][0],
        "masked": times["masked"][1],
        "gather": times["gather"][1],
        "macs": layer.macs() / dense_macs,
        "macs_by_formula": macs_by_formula(layer.num_tokens, layer.budget, layer.predictor) / dense_macs,
    }


def model_row(size: int, keep_rate: float, batch: int, turns: int) -> dict[str, Any]:
    """Whole networks at one size."""
    x = torch.randn(batch, 3, size, size)
    models = {"dense": timm.create_model(REFERENCE, img_size=size).eval()}
    for path in ("masked", "gather", "auto"):
        models[path] = timm.create_model(OURS, img_size=size, keep_rate=keep_rate, attention_path=path).eval()
    times = in_turns({name: lambda model=model: model(x) for name, model in models.items()}, turns)
    ratios = {path: ratio for path, (_, ratio) in times.items() if path != "dense"}
    return {"size": size, "keep_rate": keep_rate, "batch": batch, "dense_ms": 1e3 * times["dense"][0], **ratios}


def published_rows() -> list[dict[str, Any]]:
    """Multiply-adds of DeiT-S at 224 px in millions: published, by formula and as executed."""
    rows = []
    for keep_rate, published in PUBLISHED.items():
        layer = Layer(197, keep_rate, 1)
        by_formula = DEPTH * macs_by_formula(197, layer.budget, layer.predictor)
        rows.append(
            {
                "keep_rate": keep_rate,
                "keys": layer.budget,
                "published": published,
                "formula": by_formula / 1e6,
                "executed": DEPTH * layer.macs() / 1e6,
            }
        )
    return rows


def crossing(rows: list[dict[str, Any]], path: str, against: str) -> str:
    """The smallest size from which on a path is the faster one, for each keep rate."""
    found = []
    for keep_rate in sorted({row["keep_rate"] for row in rows}, reverse=True):
        of_rate = sorted(
            (row["size"], row[path], row.get(against, 1.0)) for row in rows if row["keep_rate"] == keep_rate
        )
        slower = [size for size, ours, theirs in of_rate if ours >= theirs]
        sizes = [size for size, _, _ in of_rate if size > max(slower, default=0)]
        found.append(
            f"keep rate {keep_rate}: " + (f"from {sizes[0]} px" if sizes else f"not up to {of_rate[-1][0]} px")
        )
    return f"{path} overtakes {against}: " + "; ".join(found)


def show(rows: list[dict[str, Any]]) -> None:
    """A table on the screen."""
    for row in rows:
        cells = (f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", type=int, default=[224, 384, 512, 768], help="pixels, multiples of 16")
    parser.add_argument("--keep-rate", nargs="+", type=float, default=[0.25, 0.1, 0.05])
    parser.add_argument("--models", action="store_true", help="whole networks too")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__, "layers": [], "models": []}
    for size in args.size:
        batch = max(1, round(8 * (224 / size) ** 4))  # about the same work at each size
        for keep_rate in args.keep_rate:
            results["layers"].append(layer_row(size, keep_rate, batch, args.turns))
            show(results["layers"][-1:])
            if args.models:
                results["models"].append(model_row(size, keep_rate, batch, args.turns))
                show(results["models"][-1:])
    results["deit_small_mmacs"] = published_rows()
    show(results["deit_small_mmacs"])
    results["crossing"] = [crossing(results["layers"], "gather", other) for other in ("dense", "masked")]
    print("\n".join(results["crossing"]))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
