"""From what a user calls a vision-language model to one that can be asked.

Only safetensors are read and no code that comes with a model is run. A model on the hub is asked for its kind before
anything large is fetched.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import weights
from multimodal.layout import family_of

from ..batch.stage import pick_device
from ..errors import UsageError
from ..folders import PICKLES, READ, has_weights
from ..models import Network, digest, require_hub

__all__ = ["SHIPPED", "VLM", "ResolvedVLM", "VLMChoice", "card_of", "dtype_on"]

SHIPPED = {mask: f"scene_vlm/{mask}" for mask in ("causal", "mma")}
"""The models that ship, by the attention that they were trained under."""

_REMEDY = "give a folder, as save_pretrained writes it, with --model FOLDER"
_AKI = "aki"  # whose published files do not say what class they are of
_INPUT = {"input_size": (3, 1, 1), "mean": (0.0,) * 3, "std": (1.0,) * 3}  # pictures go to the processor as they are


@dataclass(frozen=True)
class VLM(Network):
    """A vision-language model.

    Attributes:
        processor: Makes its inputs.
        plain: The model that answers where the switches are off, if that is another one.
        card: What is to be known of a model that ships; else nothing.
    """

    processor: Any = None
    plain: Any = None
    card: str = ""


@dataclass(frozen=True)
class VLMChoice:
    """What the user asked for.

    Attributes:
        name: A folder, or `OWNER/NAME`, `OWNER/NAME@REVISION` on the hub; None for the model that ships.
        mma: Whether it is asked under modality-mutual attention.
        compare: Whether it is asked without switches, too.
        dtype: Of its weights: `float32`, `bfloat16`, or `auto` for that of its files.
    """

    name: str | None
    mma: bool = False
    compare: bool = False
    dtype: str = "float32"

    def resolve(self) -> ResolvedVLM:
        """Finds its files; those on the hub are fetched once it is known that they can be used.

        Raises:
            UsageError: There are none, or they are of a kind that cannot be asked.
            WeightsError: The model that ships is not installed.
        """
        name = SHIPPED["mma" if self.mma else "causal"] if self.name is None else self.name
        if name == SHIPPED["mma"] and not self.mma:
            raise UsageError(f"--model {name} was trained under modality-mutual attention; ask it under that: --mma")
        if name not in SHIPPED.values():
            folder, label, identity = _find(name)
            return ResolvedVLM(folder, label, identity, self.dtype)
        folder = _shipped(name)
        identity = f"sha256 {digest(_files(folder))}"
        # The one that was trained under MMA is no measure of what is said without.
        plain = _shipped(SHIPPED["causal"]) if self.compare and self.mma and self.name is None else None
        if plain is not None:
            identity += f", {digest(_files(plain))}"
        return ResolvedVLM(folder, name, identity, self.dtype, plain, shipped=True)


@dataclass(frozen=True)
class ResolvedVLM:
    """A model whose files are on this machine.

    Attributes:
        folder: With its files.
        label: What rows call it.
        identity: Text that differs for other weights.
        dtype: As of `VLMChoice`.
        plain: With the files of the model that answers where the switches are off, if that is another one.
        shipped: Whether it comes with this suite.
    """

    folder: Path
    label: str
    identity: str
    dtype: str
    plain: Path | None = None
    shipped: bool = False

    def load(self, progress: Callable[[int, int | None], None]) -> VLM:
        """Reads it; everything is on this machine already, so `progress` hears nothing.

        Raises:
            UsageError: Its files do not fit, or lack something.
        """
        from safetensors import SafetensorError

        broken = (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError, SafetensorError)
        try:
            with _without_bars():
                model = _load(self.folder, self.dtype)
                plain = None if self.plain is None else _load(self.plain, self.dtype)
                processor = _processor(self.folder)
        except broken as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(f"--model {self.label} cannot be loaded: {lines[0]}") from error
        card = card_of(self.folder, self.label) if self.shipped else ""
        return VLM(model, self.label, (), _INPUT, processor=processor, plain=plain, card=card)


def dtype_on(device: str) -> str:
    """Of the weights: exact on a CPU; on a GPU, where memory is short, as their files have them.

    Args:
        device: As `--device` names it.
    """
    return "float32" if pick_device(device).type == "cpu" else "auto"


def card_of(folder: Path, label: str) -> str:
    """What a model's card says of its training, and of how it can be asked.

    Args:
        folder: With a `README.md` whose points begin with a name, `- **Data**: …`.
        label: What the model is called.
    """
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^- \*\*([^*]+)\*\*:? (.+?)(?=\n- |\n\n|\Z)", text, re.DOTALL | re.MULTILINE))
    points = {name: " ".join(said.split()) for name, said in found.items()}
    if "Data" in points:
        points["Data"] = re.sub(r"\. .*", ".", points["Data"])  # its first sentence
    named = [f"{name}: {points[name]}" for name in ("Data", "It can be asked", "Limits") if name in points]
    return "\n".join([f"{label} is a small model that ships; its answer to a photograph means nothing.", *named])


def _shipped(name: str) -> Path:
    folder = weights.shipped(name.partition("/")[0]) / name.partition("/")[2]
    if not folder.is_dir():
        raise weights.WeightsError(f"the model {name} is not part of this installation: reinstall attnsuite")
    return folder


def _find(name: str) -> tuple[Path, str, str]:
    """Folder, label and identity of a model of the user's."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check(folder, name)
        return folder, name, f"sha256 {digest(_files(folder))}"
    if folder.exists():
        raise UsageError(f"--model {name} is a file, expected a folder with config.json and model.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name):
        raise UsageError(f"--model {name}: there is no such folder, and a model on the hub is called OWNER/NAME")
    folder = _on_hub(name)
    _check(folder, name)
    return folder, f"{name.partition('@')[0]}@{folder.name}", f"commit {folder.name}"


def _on_hub(name: str) -> Path:
    """A model in the hub's cache on this machine, or fetched into it; a fetch that was cut off goes on."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, _, revision = name.partition("@")
    wanted = {"revision": revision or None, "allow_patterns": [f"*{suffix}" for suffix in READ]}
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **wanted))
        if (folder / "config.json").is_file() and has_weights(folder):
            return folder
    except OSError:
        pass  # nothing of it is here
    files = [file.rfilename for file in require_hub(name, name, _REMEDY).siblings or ()]
    try:
        _architecture(Path(hf_hub_download(repository, "config.json", revision=wanted["revision"])), name)
        if not any(file.endswith(".safetensors") for file in files):
            raise UsageError(_no_weights(name, any(file.endswith(PICKLES) for file in files)))
        return Path(snapshot_download(repository, **wanted))
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"--model {name} cannot be fetched: {lines[0]}; {_REMEDY}") from error


def _check(folder: Path, name: str) -> None:
    """Refuses what cannot be asked, by its description and the names of its files.

    Raises:
        UsageError: It is of no supported kind, or lacks weights.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {name}: {folder} holds no config.json, as save_pretrained writes it")
    _architecture(folder / "config.json", name)
    if not has_weights(folder):
        raise UsageError(_no_weights(name, any(file.suffix in PICKLES for file in folder.iterdir())))


def _no_weights(name: str, pickles: bool) -> str:
    if pickles:
        return (
            f"--model {name} has its weights as a pickle only, which can run code when it is read; only safetensors "
            "are. If you trust it, convert it once: from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"--model {name} lacks weights: it holds no safetensors, or not all of them"


def _architecture(config: Path, name: str) -> str:
    """Name of the class that a `config.json` is of.

    Raises:
        UsageError: It says none, or one that is not supported.
    """
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        kind = "AkiForConditionalGeneration" if found.get("model_type") == _AKI else found["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f"--model {name}: its config.json names no class under 'architectures'") from error
    try:
        family_of(type(str(kind), (), {})())  # type: ignore[arg-type] - families are known by the names of classes
    except TypeError as error:
        raise UsageError(f"--model {name}: {str(error).partition('. ')[0]}") from error
    return kind


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in READ)


def _load(folder: Path, dtype: str) -> Any:
    """A model in evaluation mode, every weight its own."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    import multimodal.aki  # which makes its classes known to transformers

    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if AutoConfig.from_pretrained(folder, **settings).model_type == _AKI:
        return multimodal.aki.load_aki(folder, dtype=dtype).eval()
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **settings
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random ones
        raise ValueError(f"its files lack {len(missing)} weights, such as {missing[0]}")
    return model.eval()


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws no bar for files that are read in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if _architecture(folder / "config.json", str(folder)).startswith("Aki") and not any(folder.glob("*processor*")):
        from multimodal.aki import AkiProcessor

        return AkiProcessor.from_tokenizer(AutoTokenizer.from_pretrained(folder, **settings))
    processor = AutoProcessor.from_pretrained(folder, **settings)
    if not hasattr(processor, "image_processor"):
        raise ValueError("it has no processor for pictures (preprocessor_config.json or processor_config.json)")
    return processor
