"""Trains the small classifier of `weights/shapes_biformer`, and writes its card.

    python -m recipes.shape_classifier --out weights/shapes_biformer

A `biformer_nano` for pictures of 64 pixels learns colour and shape of what `recipes.named_shapes` draws, anew for each
step, so that nothing can be learnt by heart. It is for demonstrations and tests: whoever sees one of its pictures knows
what the right answer is, and where in the picture it lies.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import vision  # noqa: F401 - registers the architecture
from recipes.named_shapes import DIAMETERS, NAMES, pictures

__all__ = ["ARCHITECTURE", "MODEL_ARGS", "NAME", "SIZE", "build", "card", "measure", "prepared", "save", "train"]

NAME, ARCHITECTURE, SIZE = "shapes_biformer", "biformer_nano", 64
MODEL_ARGS: dict[str, Any] = {"num_classes": len(NAMES), "img_size": SIZE, "n_win": 4}
"""Four regions a side, so that the map of 16 × 16 in the first stage needs no padding."""

SEED, MEASURED_SEED = 0, 20_000
STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP = 400, len(NAMES), 2e-3, 0.1
MEASURED = 3600

_LOG = logging.getLogger(__name__)


def build() -> nn.Module:
    """The network, untrained."""
    return timm.create_model(ARCHITECTURE, **MODEL_ARGS)


def prepared(images: np.ndarray) -> Tensor:
    """uint8 `[N, 3, H, W]` → what the network takes: float32 from -1 to 1."""
    return torch.from_numpy(images).float().div_(127.5).sub_(1)


def train(model: nn.Module, steps: int = STEPS, seed: int = SEED) -> None:
    """Trains on pictures that are drawn anew for each step; ends in evaluation mode.

    Args:
        model: As `build` makes it.
        steps: Of AdamW, with a rate that rises and falls by a cosine; each class is in each step once.
        seed: Of the pictures: step n draws those of `seed + n + 1`.
    """
    optimizer = create_optimizer_v2(model, "adamw", LEARNING_RATE, 0.05)
    schedule = CosineLRScheduler(
        optimizer, steps, warmup_t=round(WARMUP * steps), warmup_lr_init=LEARNING_RATE / 25, t_in_epochs=False
    )
    model.train()
    for step in range(steps):
        images, labels = pictures(seed + step + 1, BATCH_SIZE, SIZE)
        schedule.step_update(step)
        logits = model(prepared(images))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            _LOG.info("step %d: loss %.3f", step + 1, loss.item())
    model.eval()


def save(model: nn.Module, folder: Path) -> None:
    """Writes timm's `local-dir:` folder in half precision, the names of the classes inside."""
    data: dict[str, Any] = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    save_for_hf(
        copy.deepcopy(model).half(),
        str(folder),
        model_config={"label_names": list(NAMES)},
        safe_serialization=True,
        data_config={**data, "interpolation": "bilinear"},
    )
    for name in ("config.json", "model.safetensors"):
        (folder / name).chmod(0o644)  # safetensors lets nobody else read what it writes


@torch.inference_mode()
def measure(model: nn.Module, num: int = MEASURED, seed: int = MEASURED_SEED) -> dict[str, float]:
    """How often a model tells what held-out pictures show.

    Args:
        model: In evaluation mode.
        num: Pictures, each class equally often.
        seed: Of the pictures.

    Returns:
        Shares of `num` pictures whose 'class', 'colour' and 'shape' were told.
    """
    images, labels = pictures(seed, num, SIZE)
    told = np.concatenate([model(own).argmax(1).numpy() for own in prepared(images).split(120)])
    colour, shape = (np.array([name.split()[part] for name in NAMES]) for part in (0, 1))
    return {
        "class": float((told == labels).mean()),
        "colour": float((colour[told] == colour[labels]).mean()),
        "shape": float((shape[told] == shape[labels]).mean()),
    }


_CARD = """---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
---
# {name}

A small BiFormer (bi-level routing attention) that tells colour and shape of one drawn object, 36 classes from `red
circle` to `purple heart`: {parameters:.2f} M parameters in half precision, pictures of {size} pixels. It is for
demonstrations and tests; of photographs it knows nothing.

```python
import attnsuite
import timm

folder = attnsuite.weights.shipped("{name}")
model = timm.create_model(f"local-dir:{{folder}}", pretrained=True)
```

```sh
attnsuite classify shapes --model {name} --json
```

| {num} held-out pictures | told right |
| --- | --- |
| colour and shape | {class_:.1%} (95 % interval {low:.1%} to {high:.1%}) |
| colour | {colour:.1%} |
| shape | {shape:.1%} |

- **Data**: `recipes/named_shapes.py`, one object of {least:g} to {most:g} of the picture's side, anywhere on a ground
  with stripes and spots, drawn anew for each step; measured on the pictures of seed {measured_seed}.
- **Training**: `python -m recipes.shape_classifier --out weights/{name}`, seed {seed}, {steps} steps of {batch}
  pictures, AdamW with a rate of up to {rate:g}, about {minutes:.0f} min of one CPU thread.
- **Input**: RGB, {size} x {size}, from -1 to 1.
- **Routing**: 4 x 4 regions; a region attends to 1 of 16 in the first stage, to 4 in the second, to all in the third.
- **Licence**: Apache-2.0. No data of others was used.
"""


def card(model: nn.Module, steps: int, minutes: float, num: int = MEASURED) -> str:
    """The model's card, measured."""
    found = measure(model, num)
    share, z = found["class"], 1.96
    middle, half = (share + z * z / (2 * num)), z * (share * (1 - share) / num + z * z / (4 * num * num)) ** 0.5
    return _CARD.format(
        name=NAME,
        parameters=sum(weight.numel() for weight in model.parameters()) / 1e6,
        size=SIZE,
        num=num,
        class_=share,
        low=(middle - half) / (1 + z * z / num),
        high=(middle + half) / (1 + z * z / num),
        colour=found["colour"],
        shape=found["shape"],
        least=DIAMETERS[0],
        most=DIAMETERS[1],
        measured_seed=MEASURED_SEED,
        seed=SEED,
        steps=steps,
        batch=BATCH_SIZE,
        rate=LEARNING_RATE,
        minutes=minutes,
    )


def main() -> None:
    """Trains, saves and measures the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = build()
    train(model, args.steps)
    minutes = time.process_time() / 60
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out)
    kept = timm.create_model(f"local-dir:{args.out}", pretrained=True).eval()
    text = card(kept, args.steps, minutes)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
