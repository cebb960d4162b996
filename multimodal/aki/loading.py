"""The published weights of AKI, wherever they are: on the hub, in a folder, in a file, in our store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import weights

from .configuration import AkiConfig
from .modeling import AkiForConditionalGeneration

__all__ = ["load_aki"]


def load_aki(
    source: str | os.PathLike[str], *, config: AkiConfig | None = None, **kwargs: Any
) -> AkiForConditionalGeneration:
    """Loads AKI, in evaluation mode, every weight or none.

    Parameters are made on the meta device and filled one by one, so that memory holds the weights once.

    Args:
        source: One of

            * the name of a checkpoint of the manifest (`aki_4b`), which is fetched if it is not in the store. Its
              licence is CC BY-NC 4.0: not for commercial use.
            * a file: `model.safetensors`, or a training checkpoint of the authors' code (a dictionary with
              `model_state_dict`, `module.` before each name). Pickles are read without running code.
            * a folder, or a hub id, with `config.json` and `model.safetensors`; the authors' and ours.
        config: The model's configuration, for files that have none beside them; AKI-4B's by default.
        **kwargs: As `from_pretrained` takes them: `dtype`, `device_map`, `attn_implementation`, …

    Raises:
        FileNotFoundError: `source` is nothing of these.
        weights.WeightsError: The file cannot be had or read.
        ValueError: Weights are missing, are not AKI's, or have other shapes; the message names them.
    """
    path = Path(source)
    if not path.exists():
        if _is_known(str(source)):
            path = weights.fetch(str(source))
        elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
            raise FileNotFoundError(
                f"{str(source)!r} is no file or folder here, no checkpoint of AKI in the manifest (aki_4b) and no hub "
                "id (OWNER/NAME)"
            )
    if not path.is_file():
        return AkiForConditionalGeneration.from_pretrained(source, config=config, **kwargs)
    state_dict = weights.load_state_dict(path, key="model_state_dict", mmap=True)
    config = AkiConfig() if config is None else config
    return AkiForConditionalGeneration.from_pretrained(None, config=config, state_dict=state_dict, **kwargs)


def _is_known(name: str) -> bool:
    try:
        return weights.entry(name).family == "aki"
    except weights.WeightsError:
        return False
