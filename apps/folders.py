"""Folders of models as the libraries of the hub write them: which files are read, and whether all are there."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["PICKLES", "READ", "has_weights"]

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
READ = (".json", ".txt", ".model", ".jinja", ".safetensors")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors, and of those that are in several files all of them."""
    files = {file.name for file in folder.glob("*.safetensors")}
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        wanted.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return bool(files) and not (files < wanted)  # besides shards there may be all in one file
