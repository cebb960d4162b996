"""The network that is trained: built for the classes and the size of the pictures, with the weights it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..console import FetchBar
from ..errors import UsageError
from ..models import DEFAULT_MODEL, ModelChoice, label_names, load, resolve
from .settings import METHODS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Built", "Start", "build", "teacher_for"]


@dataclass(frozen=True)
class Start:
    """What is trained, and from where.

    Attributes:
        name: As `attnsuite classify` takes it.
        pretrained: Start from published weights.
        checkpoint: Start from this file.
        method: One of `METHODS`.
        teacher: A trained dense network, for the method `sparsifiner`.
        img_size: Height and width of what the network sees; None for its own.
    """

    name: str = DEFAULT_MODEL
    pretrained: bool = False
    checkpoint: str | None = None
    method: str = "plain"
    teacher: str | None = None
    img_size: int | None = None

    def check(self) -> None:
        """Finds what does not go together.

        Raises:
            UsageError: What, and what to do.
        """
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method}: expected {', '.join(METHODS)}")
        if self.method == "sparsifiner" and not self.name.startswith(("sparsifiner_", "local-dir:", "hf-hub:")):
            raise UsageError(
                f"--method sparsifiner trains a network with predictors, which {self.name} has not; "
                "'attnsuite models sparsifiner' lists those that have, such as sparsifiner_deit_tiny_patch16_224"
            )
        if self.method == "sparsifiner" and self.teacher is None:
            raise UsageError(
                "--method sparsifiner learns from the dense network: train that first, then add "
                "--teacher local-dir:DIR/best"
            )
        if self.teacher is not None and self.method != "sparsifiner":
            raise UsageError(f"--teacher is for --method sparsifiner, not {self.method}")

    @property
    def brings_weights(self) -> bool:
        """Whether it starts from trained weights."""
        return self.pretrained or self.checkpoint is not None or self.name.startswith(("local-dir:", "hf-hub:"))

    def choice(self) -> ModelChoice:
        """The model as other verbs take it."""
        return ModelChoice(self.name, self.checkpoint, not self.brings_weights)


@dataclass(frozen=True)
class Built:
    """A network ready to be trained.

    Attributes:
        module: The network.
        label: What messages call it.
        identity: Text that differs for other weights to start from.
        data_config: timm's description of the input it expects.
    """

    module: nn.Module
    label: str
    identity: str
    data_config: dict[str, Any]


def build(start: Start, classes: Sequence[str], seed: int, note: Callable[[str], None]) -> Built:
    """Builds a network for these classes.

    Args:
        start: Which network, from which weights.
        classes: Their names.
        seed: Of what is drawn: weights, or a fresh classifier.
        note: Told what the user should know.

    Returns:
        The network. A classifier for the very same classes in the same order is kept; any other is replaced.

    Raises:
        UsageError: There is no such network, or it cannot be trained like this.
    """
    import timm

    from vision.segmentation import Segmenter

    from .data import seed_everything

    resolved = resolve(start.choice())
    seed_everything(seed)
    if start.brings_weights:
        with FetchBar(resolved.label) as progress:
            network = load(resolved, progress)
        module, label = network.module, network.label
    else:
        module, label = timm.create_model(start.name), start.name
    if isinstance(module, Segmenter):
        raise UsageError(f"{label} gives a class to each pixel; expected a network that classifies pictures")
    if start.method == "dcal":
        module = _with_branches(module, label)
    if not start.brings_weights or _other_classes(module, classes, label, note):
        seed_everything(seed)
        module.get_submodule("").reset_classifier(len(classes))  # pyright: ignore[reportCallIssue]
    return Built(module, label, resolved.identity, _sized(module, start.img_size, label))


def _other_classes(module: nn.Module, classes: Sequence[str], label: str, note: Callable[[str], None]) -> bool:
    """Whether the classifier is for other classes than these, which is said."""
    known = label_names(module)
    if known == list(classes):
        note(f"{label} has a classifier for these {len(classes)} classes already; it is kept")
        return False
    if known and sorted(known) == sorted(classes):
        note(f"{label} has the same classes in another order; it gets a new classifier")
    elif known:
        strange = [name for name in classes if name not in known]
        example = f", such as {strange[0]!r}" if strange else ""
        note(
            f"{label} tells {len(known):,} classes apart and does not know {len(strange):,} of these "
            f"{len(classes):,}{example}; it gets a new classifier"
        )
    return True


def _with_branches(module: nn.Module, label: str) -> nn.Module:
    """The network as a DCAL, which those of its names that are registered are already."""
    import timm

    from vision.dcal import DCAL

    if isinstance(module, DCAL):
        return module
    known = [name for name in timm.list_models("dcal_*")]
    try:
        made = DCAL.from_vit(module)  # pyright: ignore[reportArgumentType] - checked there
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method dcal cannot train {label}: {error} Known are {', '.join(known)}") from error
    config: Any = getattr(made, "pretrained_cfg", None) or {}
    if config.get("architecture") not in known:
        raise UsageError(f"--method dcal could not save what it makes of {label}; choose of {', '.join(known)}")
    return made


def _sized(module: nn.Module, size: int | None, label: str) -> dict[str, Any]:
    """Fits a network to a size of pictures; the description of its input."""
    import torch
    from timm.data.config import resolve_model_data_config

    config = dict(resolve_model_data_config(module))
    if config["input_size"][0] not in (1, 3):
        raise UsageError(f"{label} takes {config['input_size'][0]} channels; photographs have 3 or 1")
    if size is None or tuple(config["input_size"][1:]) == (size, size):
        return config
    channels = config["input_size"][0]
    setter: Any = getattr(module, "set_input_size", None)
    try:
        if setter is not None:
            setter(img_size=(size, size))
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, size, size))
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(f"--img-size {size} does not suit {label}: {error}") from error
    return {**config, "input_size": (channels, size, size)}


def teacher_for(name: str, built: Built, classes: Sequence[str]) -> nn.Module:
    """The dense network that a Sparsifiner learns from; the Sparsifiner starts from its weights, predictors aside.

    Args:
        name: As `attnsuite classify` takes it.
        built: The Sparsifiner.
        classes: Names of the classes.

    Raises:
        UsageError: It knows other classes or sees pictures of another size, or its weights do not fit.
    """
    from vision.sparsifiner import checkpoint_filter_fn

    network = load(resolve(ModelChoice(name)))
    if list(network.labels) != list(classes):
        strange = [label for label in classes if label not in network.labels]
        raise UsageError(
            f"the teacher {network.label} knows other classes than the data"
            + (f", not {strange[0]!r}" if strange else ", or in another order")
            + "; train it on the same data first"
        )
    if network.data_config["input_size"] != built.data_config["input_size"]:
        theirs, ours = network.data_config["input_size"], built.data_config["input_size"]
        raise UsageError(f"the teacher sees {theirs}, {built.label} {ours}; give both the same --img-size")
    try:
        built.module.load_state_dict(checkpoint_filter_fn(network.module.state_dict(), built.module))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"the teacher {network.label} is not the dense network of {built.label}: {reason}") from error
    return network.module
