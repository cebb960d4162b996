"""Models of scanpaths on disk: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from vision.scanpath.model import OAT, OATConfig
from vision.scanpath.objects import load_json
from weights import WeightsError, differences, load_state_dict, save_state_dict

__all__ = ["load", "save"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def save(model: OAT, folder: str | Path) -> None:
    """Writes a model.

    Args:
        model: of any device and precision, which the file keeps.
        folder: made if it is not there; what it holds of another model is replaced.

    Raises:
        WeightsError: the file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(model.config.to_dict(), indent=1) + "\n", encoding="utf-8")
    save_state_dict(model.state_dict(), folder / _WEIGHTS)


def load(folder: str | Path) -> OAT:
    """Reads a model that `save` wrote; of the small one that ships the folder is `weights.shipped("search_scenes")`.

    Args:
        folder: with config and weights. Nothing in it is run.

    Returns:
        The model, on the CPU, in evaluation mode.

    Raises:
        WeightsError: one of the two files is missing or damaged, or they are not of one model.
    """
    folder = Path(folder)
    try:
        config = OATConfig(**load_json(folder / _CONFIG))
    except (OSError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / _CONFIG} does not describe a model of scanpaths: {error}") from error
    state_dict = load_state_dict(folder / _WEIGHTS)
    model = OAT(config)
    if difference := differences(state_dict, model.state_dict()):
        raise WeightsError(f"{folder / _WEIGHTS} is not of the model that {_CONFIG} describes: {difference}")
    model.load_state_dict(state_dict)
    return model.eval()
