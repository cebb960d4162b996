"""A CLIP of open_clip's own classes, small enough for tests, as a folder that open_clip reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def save(folder: Path, seed: int = 0, **preprocess: Any) -> Path:
    """Writes one with weights of that seed; `preprocess` goes over open_clip's description of its input."""
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CONFIG)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    described = {"mean": [0.5] * 3, "std": [0.25] * 3, **preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": described}))
    return folder
