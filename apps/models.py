"""From what a user calls a model to a network with weights, labels and the preprocessing it expects.

Resolving is cheap and finds every mistake in the names; loading then builds the network. Nothing here ever runs on
random weights unless that was asked for.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UsageError
from .options import Checkpoint, Model, RandomWeights

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo
    from PIL.Image import Image
    from torch import nn

    import weights

__all__ = [
    "DEFAULT_MODEL",
    "NO_WEIGHTS",
    "ModelChoice",
    "Network",
    "ResolvedModel",
    "SegmenterChoice",
    "cached",
    "digest",
    "label_names",
    "load",
    "require_hub",
    "resolve",
]

DEFAULT_MODEL = "tf_efficientnet_lite0"
DEFAULT_SEGMENTER = "psa_hrnet_w48_ocr"

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
NO_WEIGHTS = "give a file of your own with --checkpoint FILE, or take --random-weights to try the machinery only"


@dataclass(frozen=True)
class ModelChoice:
    """What the user asked for.

    Attributes:
        name: A timm name with or without tag, one of a network that ships here, `hf-hub:OWNER/NAME` or
            `local-dir:FOLDER`.
        checkpoint: A file with weights to use instead of the published ones.
        random_weights: Build the network without trained weights.
    """

    name: Model = DEFAULT_MODEL
    checkpoint: Checkpoint = None
    random_weights: RandomWeights = False

    def resolve(self) -> ResolvedModel:
        """The function `resolve` of this choice."""
        return resolve(self)


@dataclass(frozen=True)
class SegmenterChoice(ModelChoice):
    """The same for networks that give a class to each pixel."""

    name: Model = DEFAULT_SEGMENTER


@dataclass(frozen=True)
class ResolvedModel:
    """A choice whose names are right.

    Attributes:
        choice: The choice.
        origin: Where the weights come from.
        label: What rows call the model.
        identity: Text that differs for other weights: a digest of a local file, or the published name.
        entry: The entry of our manifest, if the weights come from there.
    """

    choice: ModelChoice
    origin: Literal["checkpoint", "folder", "hub", "manifest", "random", "timm"]
    label: str
    identity: str
    entry: weights.Entry | None = None

    def load(self, progress: Callable[[int, int | None], None]) -> Network:
        """The function `load` of this model."""
        return load(self, progress)


@dataclass(frozen=True)
class Network:
    """A network that is ready to run.

    Attributes:
        module: The network, in evaluation mode, on the CPU.
        label: What rows call it.
        labels: Names of its classes; empty for a network without a classifier.
        data_config: timm's description of the input it expects.
        transform: From an RGB picture to uint8 pixels `(C, H, W)`; None for timm's own by `data_config`.
    """

    module: nn.Module
    label: str
    labels: Sequence[str]
    data_config: dict[str, Any]
    transform: Callable[[Image], Any] | None = None


def resolve(choice: ModelChoice) -> ResolvedModel:
    """Checks the names of a choice without building anything.

    Args:
        choice: What the user asked for.

    Returns:
        The choice with the origin of its weights.

    Raises:
        UsageError: A name or file does not exist (near names are offered), or no weights are known for it.
    """
    _register()
    from timm.models import parse_model_name

    try:
        source, name = parse_model_name(choice.name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if choice.checkpoint is not None and choice.random_weights:
        raise UsageError("--checkpoint and --random-weights exclude each other")
    if choice.checkpoint is not None and not Path(choice.checkpoint).is_file():
        raise UsageError(f"checkpoint {choice.checkpoint!r} is not a file on this machine")
    if not source and (folder := _shipped(name)) is not None:
        choice, source, name = replace(choice, name=f"local-dir:{folder}"), "local-dir", str(folder)
    if source == "local-dir":
        return _resolve_folder(choice, Path(name))
    if source == "hf-hub":
        if choice.checkpoint or choice.random_weights:
            raise UsageError("hf-hub: models come with their weights; leave out --checkpoint and --random-weights")
        return ResolvedModel(choice, "hub", choice.name, choice.name)
    architecture, tag = _registered(name)
    if choice.checkpoint is not None:
        return _with_checkpoint(choice, name)
    if choice.random_weights:
        return ResolvedModel(choice, "random", f"{architecture} (random weights)", "random weights, seed 0")
    return _published(choice, architecture, tag)


def load(resolved: ResolvedModel, fetch_progress: Callable[[int, int | None], None] | None = None) -> Network:
    """Builds the network and gives it its weights.

    Args:
        resolved: What `resolve` returned.
        fetch_progress: Told the bytes received and the bytes in all while weights of our manifest are fetched.

    Returns:
        The network in evaluation mode.

    Raises:
        UsageError: The weights cannot be had or do not fit the network; the message says which entries differ.
    """
    from timm.data.config import resolve_model_data_config

    from .building import NoInitialWeights, left_blank

    builders = {
        "checkpoint": _load_checkpoint,
        "folder": _load_folder,
        "hub": _load_hub,
        "manifest": partial(_load_manifest, progress=fetch_progress),
        "timm": _load_timm,
    }
    if resolved.origin == "random":
        module = _load_random(resolved)
    else:
        with NoInitialWeights():
            module = builders[resolved.origin](resolved)
        if left := left_blank(module):  # timm loads some architectures without minding what is missing
            raise UsageError(f"the weights of {resolved.label} lack {len(left)} of its entries ({_first(left, 5)})")
    module = module.eval()
    config = resolve_model_data_config(module)
    if config["input_size"][0] not in (1, 3):
        raise UsageError(f"{resolved.label} takes {config['input_size'][0]} channels; photographs have 3 or 1")
    return Network(module, resolved.label, label_names(module), config)


def label_names(module: nn.Module) -> list[str]:
    """Names of the classes of a network: its checkpoint's own list, else ImageNet's, else `class_17`.

    Args:
        module: A timm network.

    Returns:
        One name a class; an empty list if it has no classifier.
    """
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    count = int(getattr(module, "num_classes", 0) or 0)
    config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    own = config.get("label_names")
    if own:
        descriptions = config.get("label_descriptions") or {}
        pairs = own.items() if isinstance(own, dict) else enumerate(own)
        by_index = {int(index): str(descriptions.get(name, name)) for index, name in pairs}
        return [by_index.get(index, f"class_{index}") for index in range(count)]
    subset = infer_imagenet_subset(module) if count else None
    if subset:
        return list(ImageNetInfo(subset).label_descriptions())
    return [f"class_{index}" for index in range(count)]


def _register() -> None:
    """Makes our models known to timm."""
    import attnsuite  # noqa: F401 - registering is what its import is for


def _shipped(name: str) -> Path | None:
    """The folder of a network that comes with this package."""
    import weights

    return weights.shipped_classifiers().get(name)


def _registered(name: str) -> tuple[str, str]:
    """Architecture and tag of a registered name, or an error that offers the nearest ones."""
    import timm
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    import weights

    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        known = [*timm.list_models(), *weights.shipped_classifiers()]
        near = difflib.get_close_matches(architecture, known, n=4) or fnmatch.filter(known, f"*{architecture}*")[:4]
        hint = f"did you mean {' or '.join(near)}?" if near else "attnsuite models --all lists every name"
        raise UsageError(f"no model is called {architecture!r}; {hint}")
    tags = [full.partition(".")[2] for full in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        known_tags = ", ".join(filter(None, tags)) or "none"
        raise UsageError(f"{architecture} has no weights tagged {tag!r}; there are: {known_tags}")
    return architecture, tag


def _published(choice: ModelChoice, architecture: str, tag: str) -> ResolvedModel:
    from timm.models import get_pretrained_cfg

    import weights

    wanted = f"{architecture}.{tag}" if tag else architecture
    for entry in weights.entries():
        if wanted == entry.name or (entry.default and wanted == entry.architecture):
            return ResolvedModel(choice, "manifest", entry.name, entry.name, entry)
    config = get_pretrained_cfg(wanted)
    if config is None or not config.has_weights:
        raise UsageError(f"no weights are published for {wanted}: {NO_WEIGHTS}")
    label = f"{architecture}.{config.tag}" if config.tag else architecture
    return ResolvedModel(choice, "timm", label, label)


def _with_checkpoint(choice: ModelChoice, name: str) -> ResolvedModel:
    path = Path(str(choice.checkpoint))
    return ResolvedModel(choice, "checkpoint", f"{name} ({path.name})", f"sha256 {digest([path])}")


def _resolve_folder(choice: ModelChoice, folder: Path) -> ResolvedModel:
    if choice.checkpoint or choice.random_weights:
        raise UsageError("local-dir: models come with their weights; leave out --checkpoint and --random-weights")
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{folder} holds no config.json: local-dir: takes a folder that timm's save_for_hf wrote")
    try:
        architecture = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{config} is not a model description (no readable 'architecture')") from error
    _registered(architecture)
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if not files:
        raise UsageError(f"{folder} holds no weights (model.safetensors or pytorch_model.bin)")
    return ResolvedModel(choice, "folder", f"{architecture} ({folder.name})", f"sha256 {digest([config, *files])}")


def digest(files: Sequence[Path]) -> str:
    """The sha256 of what files hold, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _load_random(resolved: ResolvedModel) -> nn.Module:
    import timm
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)  # a run that is resumed must find the same network
        return timm.create_model(resolved.choice.name, pretrained=False)


def _load_manifest(resolved: ResolvedModel, progress: Callable[[int, int | None], None] | None) -> nn.Module:
    import timm

    import weights

    entry = resolved.entry
    assert entry is not None
    try:
        weights.fetch(entry.name, progress=progress)
        if entry.source == "url":
            return timm.create_model(resolved.choice.name, pretrained=True)
        module = timm.create_model(entry.architecture, **entry.model_args)
        module.load_state_dict(weights.state_dict_for(entry.name, module))
        return module
    except weights.WeightsError as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        raise UsageError(f"the weights {entry.name} do not fit their network: {_mismatch(error)}") from error


def _load_checkpoint(resolved: ResolvedModel) -> nn.Module:
    """Loads the user's file the way timm loads its own, so that the architecture's renaming of official files runs."""
    import timm
    from timm.models import get_pretrained_cfg

    import weights

    choice = resolved.choice
    try:
        state_dict = weights.load_state_dict(str(choice.checkpoint))
    except weights.WeightsError as error:
        raise UsageError(str(error)) from error
    config = get_pretrained_cfg(choice.name)
    overlay: dict[str, Any] = {"state_dict": state_dict, "label_offset": None, "custom_load": False}
    head = config.classifier if config is not None else None
    head = head[0] if isinstance(head, tuple | list) else head
    classes = state_dict.get(f"{head}.weight") if isinstance(head, str) else None
    if classes is not None:
        overlay["num_classes"] = len(classes)
        if config is not None and len(classes) != config.num_classes:
            overlay["label_names"] = None  # those of other classes
    overlay.update(_labels_beside(Path(str(choice.checkpoint))))
    try:
        module = timm.create_model(choice.name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"{choice.checkpoint} does not fit {choice.name}: {_mismatch(error)}") from error
    module.pretrained_cfg.pop("state_dict", None)  # pyright: ignore - timm keeps a copy of all weights there
    return module


def _labels_beside(checkpoint: Path) -> dict[str, Any]:
    """The label list of a `config.json` in the checkpoint's folder, as timm writes it."""
    try:
        config = json.loads((checkpoint.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    both = {**(config.get("pretrained_cfg") or {}), **config}
    return {key: both[key] for key in ("label_names", "label_descriptions") if both.get(key)}


def _load_folder(resolved: ResolvedModel) -> nn.Module:
    import timm

    try:
        return timm.create_model(resolved.choice.name, pretrained=True)
    except (RuntimeError, OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{resolved.choice.name} cannot be loaded: {_mismatch(error)}") from error


def _load_hub(resolved: ResolvedModel) -> nn.Module:
    import timm

    repository = resolved.choice.name.partition(":")[2]
    if cached(repository, ("config.json",)) is None:
        require_hub(repository, resolved.label)
    try:
        return timm.create_model(resolved.choice.name, pretrained=True)
    except (RuntimeError, OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{resolved.choice.name} cannot be loaded: {_mismatch(error)}") from error


def _load_timm(resolved: ResolvedModel) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(resolved.choice.name)
    overlay = {}
    if config is not None and config.hf_hub_id:
        files = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        here = cached(config.hf_hub_id, files)
        if here is None:
            require_hub(config.hf_hub_id, resolved.label)
        elif not config.custom_load:
            overlay = {"file": here}  # the hub client would first wait for a network that may not be there
    try:
        return timm.create_model(resolved.choice.name, pretrained=True, pretrained_cfg_overlay=overlay or None)
    except (RuntimeError, OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{resolved.label} cannot be loaded: {_mismatch(error)}; {NO_WEIGHTS}") from error


def cached(repository: str, files: Sequence[str]) -> str | None:
    """Path of the first of these files that the hub's cache on this machine has of `OWNER/NAME[@REVISION]`."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    found = (try_to_load_from_cache(name, file, revision=revision or None) for file in files)
    return next((path for path in found if isinstance(path, str)), None)


def require_hub(repository: str, label: str, remedy: str = NO_WEIGHTS) -> ModelInfo:
    """Asks once, with a short wait, whether the hub has a repository; the hub client would retry for a minute.

    Args:
        repository: `OWNER/NAME` or `OWNER/NAME@REVISION`.
        label: What the user calls the model.
        remedy: What there is to do without the hub.

    Returns:
        What the hub says of it: its commit, its files.

    Raises:
        UsageError: It does not answer, or has none of that name.
    """
    from huggingface_hub import HfApi

    name, _, revision = repository.partition("@")
    try:
        return HfApi().model_info(name, revision=revision or None, timeout=10)
    except Exception as error:  # the client passes on whatever its HTTP library raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"the weights of {label} are not on this machine, and huggingface.co/{name} did not answer "
            f"({reason[0]}): connect to the network, or {remedy}"
        ) from error


def _mismatch(error: Exception, limit: int = 5) -> str:
    """torch's account of what differs in a state dict, with long lists of names cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, RuntimeError) or not lines or "loading state_dict" not in lines[0]:
        return f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__
    parts = []
    shapes = [line for line in lines[1:] if line.startswith("size mismatch")]
    for line in lines[1:]:
        if kind := re.match(r"(Missing|Unexpected) key", line):
            names = re.findall(r'"([^"]+)"', line)
            parts.append(f"{len(names)} {kind[1].lower()} ({_first(names, limit)})")
    if shapes:
        wanted = [re.sub(r"size mismatch for (\S+):.*?\[(.*?)\].*?\[(.*?)\].*", r"\1 [\2] not [\3]", s) for s in shapes]
        parts.append(f"{len(shapes)} of another shape ({_first(wanted, limit)})")
    return "entries differ: " + "; ".join(parts)


def _first(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
