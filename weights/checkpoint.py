"""Reading checkpoints that others wrote, without running their code, and writing ours as safetensors.

Files from the net are data, never programs: pickles are read with torch's weights-only unpickler, which knows tensors
and containers. Training checkpoints also hold their configuration (LITv2's a `yacs` node, timm's an
`argparse.Namespace`); for these an inert stand-in takes the place of the class, so that the tensors beside them can be
read although nothing of the foreign class is ever imported or called.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .manifest import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["differences", "load_state_dict", "names_of_safetensors", "save_state_dict"]

_NESTING_KEYS = ("model", "state_dict")  # in this order; never an EMA copy, as the official loaders have it
_WRAPPER_PREFIX = "module."
_LONGEST_HEADER = 100_000_000  # the limit that the safetensors format sets itself


class _InertNode:
    """Takes the place of a configuration class in a pickle.

    "Instances" are plain ordered dictionaries: the one kind of container that the weights-only unpickler fills both by
    item (as yacs nodes are stored) and by attribute (as namespaces are).
    """

    def __new__(cls, *args: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


def _inert(module: str, name: str) -> Any:
    """A stand-in that the unpickler finds under the name of the class it replaces."""
    return type(name, (_InertNode,), {"__module__": module, "__qualname__": name})


_STAND_INS = (_inert("yacs.config", "CfgNode"), _inert("argparse", "Namespace"))


def load_state_dict(path: str | os.PathLike[str], *, key: str | None = None, mmap: bool = False) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint file, on the CPU.

    Args:
        path: A `.safetensors` file, or anything `torch.save` wrote (`.pth`, `.pt`, `.bin`, `.tar`).
        key: Where the state dict lies, if known; tried before `model`, `state_dict` and the file itself.
        mmap: Map the tensors of a file that `torch.save` wrote instead of reading them, where its format allows it
            (a zip archive): for files as large as memory. Those of safetensors files are mapped either way. The file
            must then stay as it is for as long as the tensors are used.

    Returns:
        Name to tensor. A `module.` that stands before every name is removed.

    Raises:
        WeightsError: The file is missing, is no checkpoint, is cut short, holds code, or holds no state dict.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; a checkpoint file (.safetensors, .pth) is expected")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path, mmap)
    return _strip_wrapper(_unwrap(content, key, path))


def names_of_safetensors(path: Path) -> set[str] | None:
    """Names of the tensors in a safetensors file, by its header alone; None for a file of another format."""
    from safetensors import safe_open

    if not _is_safetensors(path):
        return None
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def save_state_dict(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, durably: the bytes are on disk when this returns.

    Tensors that share memory are written once each; safetensors has no notion of views.

    Raises:
        WeightsError: The file cannot be written, or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state_dict.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except (SafetensorError, OSError) as error:  # the writer wraps what the system says
        raise WeightsError(
            f"cannot write {path} ({_first_line(error)}); make room or choose a folder that you may write to"
        ) from error


def differences(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: int = 5) -> str | None:
    """Says how a state dict differs from what a network expects.

    Args:
        state_dict: What a file holds.
        expected: What the network has (`model.state_dict()`).
        limit: How many names to spell out of each kind.

    Returns:
        One line naming missing, unexpected and differently shaped entries, or None if there is no difference.
    """
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    reshaped = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state_dict and state_dict[name].shape != expected[name].shape
    ]
    parts = []
    for word, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            parts.append(f"{len(names)} {word}: {', '.join(names[:limit])}{more}")
    return "; ".join(parts) or None


def _is_safetensors(path: Path) -> bool:
    """Goes by the name, else by the content: the length of a JSON header, then the header."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}); fetch or copy it again") from error


def _read_pickle(path: Path, mmap: bool) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(list(_STAND_INS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(_why_unreadable(path, error)) from error
    except (EOFError, RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # What a damaged file raises depends on where the damage lies; all of these have been seen.
        raise WeightsError(
            f"{path} is cut short or damaged ({type(error).__name__}: {_first_line(error)}); fetch or copy it again"
        ) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """Tells code in a pickle from a file that is no checkpoint at all."""
    with open(path, "rb") as file:
        head = file.read(512).lstrip()
    if head[:1] == b"<" or head[:1] == b"{":
        return f"{path} is a web page or text, not a checkpoint; download the file itself"
    if "Unsupported global" in str(error) or "blocked" in str(error):
        what = str(error).partition("GLOBAL ")[2].split(" ")[0]
        return (
            f"{path} refers to {what or 'foreign code'}, which loading would run; it was refused. "
            "If you trust its origin, convert it to safetensors where that code is installed"
        )
    return f"{path} is not a checkpoint that torch can read without running code ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no details").splitlines()[0]


def _unwrap(content: Any, key: str | None, path: Path) -> dict[str, Tensor]:
    """Finds the state dict inside a training checkpoint."""
    import torch

    keys = tuple(dict.fromkeys((*([key] if key else []), *_NESTING_KEYS)))
    if isinstance(content, Mapping):
        nested = next((content[k] for k in keys if isinstance(content.get(k), Mapping)), content)
        if nested and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in nested.items()):
            return {name: tensor.detach() for name, tensor in nested.items()}
        held = f"keys {', '.join(sorted(map(str, content))[:8]) or '(none)'}"
    else:
        held = f"a {type(content).__name__}"
    raise WeightsError(
        f"{path} holds no state dict: looked for tensors at the top and under {' or '.join(map(repr, keys))}, "
        f"found {held}"
    )


def _strip_wrapper(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefix that data-parallel wrappers put before every name."""
    if all(name.startswith(_WRAPPER_PREFIX) for name in state_dict):
        return {name[len(_WRAPPER_PREFIX) :]: tensor for name, tensor in state_dict.items()}
    return state_dict
