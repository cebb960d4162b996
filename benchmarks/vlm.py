"""What the switches on a vision-language model cost and save: prefill, decoding, key-value cache, memory.

    python benchmarks/vlm.py                # everything
    python benchmarks/vlm.py --turns 3      # a quick look

The model has the shape of LLaVA-1.5-7B: CLIP ViT-L/14 at 336 px, 576 image tokens, 32 layers of Llama; the prompt has
64 more tokens, a system prompt and a question. Weights are random: neither arithmetic nor time depends on them.

* **Arithmetic** is of the true size, on the meta device: floating-point operations as torch counts them (two for each
  multiply-add, those of the attention kernel among them), and bytes of the cache in half precision.
* **Time** is of an eighth of its width (512 in the decoder, 128 in the tower; all layers, all tokens), fp32, batch 1,
  on the CPU. All ways run in turns in one process; what counts is the median, over the turns, of the ratio to the plain
  model of the same turn. Linear layers shrink with the square of the width, VMTC and attention with the width: at an
  eighth of it a switch weighs about eight times what it would at full size.
* **VMTC's own time** (scores, clustering, merging, a shorter prompt) is what a forward under it spends outside the
  language model, more than the plain one of the same turn; it is held against what the language model saves by it.
* **Peak memory** is of a fresh process that does one thing once.

Results go to benchmarks/results/vlm.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from benchmarks import machine  # noqa: E402
from multimodal.cmai import inhibit_cross_modality  # noqa: E402
from multimodal.mma import modality_mutual_attention  # noqa: E402
from multimodal.vmtc import compress_visual_tokens  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "vlm.json"
IMAGE_TOKENS, SYSTEM_TOKENS, QUESTION_TOKENS, NEW_TOKENS = 576, 34, 30, 16
IMAGE_ID, STOP_ID = 32000, 32001
KEEP = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}


def config(width: int = 1) -> LlavaConfig:
    """LLaVA-1.5-7B's shape, its widths divided by `width`."""
    tower = CLIPVisionConfig(
        hidden_size=1024 // width,
        intermediate_size=4096 // width,
        num_hidden_layers=24,
        num_attention_heads=16 // width,
        image_size=336,
        patch_size=14,
    )
    decoder = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096 // width,
        intermediate_size=11008 // width,
        num_hidden_layers=32,
        num_attention_heads=32 // width,
        num_key_value_heads=32 // width,
        eos_token_id=None,
    )
    return LlavaConfig(
        vision_config=tower.to_dict(),
        text_config=decoder.to_dict(),
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values, and of whatever rides with them in the cache."""
    held = [own for layer in cache.layers for own in vars(layer).values()]
    tensors = [one for own in held for one in (own.values() if isinstance(own, dict) else [own])]
    return sum(own.nbytes for own in tensors if isinstance(own, Tensor))


def arithmetic() -> list[dict[str, Any]]:
    """Prefill at the true size for each number of image tokens, tower excluded and, once, alone."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config()).half().eval()
        pixels = torch.empty(1, 3, 336, 336, dtype=torch.float16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(pixels)
    tower, rows = counter.get_total_flops(), []
    for keep, ratio in {"1": 1.0, **KEEP}.items():
        tokens = round(ratio * IMAGE_TOKENS)
        length = SYSTEM_TOKENS + tokens + QUESTION_TOKENS
        embeds = torch.empty(1, length, 4096, dtype=torch.float16, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = model.model.language_model(inputs_embeds=embeds, use_cache=True)
            model.lm_head(out.last_hidden_state[:, -1:])
        flops = counter.get_total_flops()
        rows.append(
            {"keep": keep, "tokens": tokens, "length": length, "tflops": round(flops / 1e12, 3)}
            | {"tower_tflops": round(tower / 1e12, 3), "cache_bytes": cache_bytes(out.cache)}
        )
    return rows


def prompt(tokens: int) -> dict[str, Tensor]:
    """A prompt with so many image tokens; random words."""
    ids = torch.randint(3, IMAGE_ID, (1, SYSTEM_TOKENS + tokens + QUESTION_TOKENS))
    ids[:, SYSTEM_TOKENS : SYSTEM_TOKENS + tokens] = IMAGE_ID
    ids[:, -1] = STOP_ID
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Bench:
    """The model at an eighth of its width, the switches, and what one forward under one of them takes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = model = LlavaForConditionalGeneration(config(8)).eval()
        self.inputs = {**prompt(IMAGE_TOKENS), "pixel_values": torch.randn(1, 3, 336, 336)}
        self.switches: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "plain": nullcontext,
            **{f"VMTC, keep {k}": lambda r=r: compress_visual_tokens(model, keep_ratio=r) for k, r in KEEP.items()},
            "MMA": lambda: modality_mutual_attention(model, stop_token_id=STOP_ID),
            "CMAI": lambda: inhibit_cross_modality(model),
            "CMAI, one mask for all heads": lambda: inhibit_cross_modality(model, per_head=False),
        }

    @torch.no_grad()
    def run(self, name: str, new_tokens: int = NEW_TOKENS) -> dict[str, float]:
        """Seconds of one answer under a switch.

        Returns:
            `prefill`, tower included; `decoder`, the part of it in the language model; `token`, each one decoded;
            `cache_bytes` after the prefill.
        """
        decoder, began, inside = self.model.get_decoder(), 0.0, 0.0

        def enter(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def leave(*_: Any) -> None:
            nonlocal inside
            inside += time.perf_counter() - began

        with self.switches[name]():
            hooks = decoder.register_forward_pre_hook(enter), decoder.register_forward_hook(leave)
            start = time.perf_counter()
            out = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            prefill = time.perf_counter() - start
            for hook in hooks:
                hook.remove()
            held = cache_bytes(out.cache)
            token = torch.full((1, 1), 5)
            mask = torch.ones(1, out.cache.get_seq_length(), dtype=torch.long)
            start = time.perf_counter()
            for _ in range(new_tokens):
                mask = torch.cat([mask, mask[:, :1]], 1)
                self.model(input_ids=token, attention_mask=mask, cache=out.cache, use_cache=True)
            each = (time.perf_counter() - start) / max(new_tokens, 1)
        return {"prefill": prefill, "decoder": inside, "token": each, "cache_bytes": held}


def time_in_turns(bench: Bench, turns: int) -> list[dict[str, Any]]:
    """A row for each switch: medians over the turns, of seconds and of what is compared within a turn."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in bench.switches}
    for turn in range(turns + 1):
        for name, own in taken.items():
            seconds = bench.run(name)
            if turn:  # the first warms up
                own.append(seconds)
    rows = []
    for name, own in taken.items():
        pairs = list(zip(own, taken["plain"], strict=True))
        row: dict[str, Any] = {
            "switch": name,
            **{part: round(statistics.median(s[part] for s in own), 4) for part in ("prefill", "decoder", "token")},
            **{
                f"{part}_ratio": round(statistics.median(s[part] / plain[part] for s, plain in pairs), 3)
                for part in ("prefill", "decoder", "token")
            },
            "cache_bytes": int(own[0]["cache_bytes"]),
        }
        if name.startswith("VMTC"):
            row["own_share"] = round(statistics.median(own_share(s, plain) for s, plain in pairs), 4)
        rows.append(row)
    return rows


def own_share(switched: dict[str, float], plain: dict[str, float]) -> float:
    """VMTC's own time, which is spent outside the decoder, over the time that the decoder saves by it."""
    own = (switched["prefill"] - switched["decoder"]) - (plain["prefill"] - plain["decoder"])
    return own / (plain["decoder"] - switched["decoder"])


def peak_memory(name: str, threads: int) -> int:
    """Peak resident memory in MB of a fresh process that makes one answer of two tokens under a switch."""
    command = [sys.executable, __file__, "--measure-memory-of", name, "--threads", str(threads)]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench()
    if args.measure_memory_of:
        bench.run(args.measure_memory_of, new_tokens=2)
        print(machine.peak_mb())
        return
    counted, rows = arithmetic(), time_in_turns(bench, args.turns)
    for row in rows:
        row["peak_mb"] = peak_memory(row["switch"], args.threads)
    for row in (*counted, *rows):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    on = machine.describe("torch", "transformers")
    report = {"command": "python benchmarks/vlm.py", "threads": args.threads, "turns": args.turns, **on}
    args.out.write_text(json.dumps({**report, "arithmetic": counted, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
