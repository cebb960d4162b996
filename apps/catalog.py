"""`attnsuite models`: what there is, how large it is, and whether its weights are here."""

from __future__ import annotations

import fnmatch
import functools
import json
import math
import warnings
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import UsageError
from .models import DEFAULT_MODEL

__all__ = ["ModelFacts", "catalog", "measure", "own_names", "published"]

# Measuring means building, about half a second a model: too long for all of timm at once.
_MEASURED_AT_MOST = 60


@dataclass(frozen=True)
class ModelFacts:
    """One line of the list.

    Attributes:
        name: Name for `--model`.
        family: The method, or timm's module.
        params: Parameters in millions; None if not measured.
        gmacs: Multiply-accumulates of one image in billions, at the model's own size; None if not measured.
        top1: Published ImageNet-1K accuracy in per cent.
        source: Where weights come from; None if none are published.
        here: Whether they are on this machine.
    """

    name: str
    family: str
    params: float | None
    gmacs: float | None
    top1: float | None
    source: str | None
    here: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def catalog(pattern: str | None, everything: bool) -> list[ModelFacts]:
    """Lists models.

    Args:
        pattern: Shell pattern on the name; a bare word matches anywhere in it.
        everything: All of timm's models, not only those of this suite.

    Returns:
        One entry a name.

    Raises:
        UsageError: Nothing matches.
    """
    import weights

    names = [*(own_names() if not everything else _all()), *weights.shipped_classifiers()]
    if pattern is not None:
        wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        names = [name for name in names if fnmatch.fnmatch(name, wanted)]
    if not names:
        hint = "" if everything else " of this suite (--all also searches timm's)"
        raise UsageError(f"no model{hint} is called like {pattern!r}")
    return [_facts(name, measured=len(names) <= _MEASURED_AT_MOST) for name in names]


def own_names() -> list[str]:
    """Our architectures, and the classifier that is the default of every verb."""
    import timm

    import attnsuite  # noqa: F401 - registers our models

    names = timm.list_models()
    own = [name for name in names if timm.model_entrypoint(name).__module__.partition(".")[0] == "vision"]
    return [*own, DEFAULT_MODEL]


@functools.cache
def _measured_before() -> dict[str, tuple[float, float | None]]:
    """Parameters (M) and multiply-adds (G) of our own models, as `docs/tables.py` measured and wrote them."""
    return json.loads(resources.files("apps").joinpath("sizes.json").read_text(encoding="utf-8"))


def _all() -> list[str]:
    import timm

    import attnsuite  # noqa: F401 - registers our models

    return timm.list_models()


def _facts(name: str, measured: bool) -> ModelFacts:
    import timm

    import weights

    if (folder := weights.shipped_classifiers().get(name)) is not None:
        return _shipped(name, folder)
    params, gmacs = _measured_before().get(name) or (measure(name) if measured else (None, None))
    entry = next((e for e in weights.entries() if e.default and e.architecture == name), None)
    if entry is None:
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        return ModelFacts(name, module, params, gmacs, None, *published(name))
    source = entry.url if entry.source == "url" else f"package {entry.distribution}"
    here = weights.path_of(entry.name) is not None
    return ModelFacts(name, entry.family, params, gmacs, entry.top1, source, here)


def _shipped(name: str, folder: Path) -> ModelFacts:
    """A network that comes with this package, a `local-dir:` folder of timm's."""
    import timm

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture, arguments = config["architecture"], config.get("model_args", {})
    family = timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
    size = tuple(config["pretrained_cfg"]["input_size"])
    return ModelFacts(name, family, *measure(architecture, size, **arguments), None, "ships with attnsuite", True)


def published(architecture: str) -> tuple[str | None, bool]:
    """Where timm's weights of an architecture come from, and whether they are in the hub's cache.

    Args:
        architecture: With a tag, or without for its default weights.
    """
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(architecture)
    if config is None or not config.has_weights:
        return None, False
    if config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        return f"huggingface.co/{config.hf_hub_id}", isinstance(try_to_load_from_cache(config.hf_hub_id, file), str)
    url = config.url[0] if isinstance(config.url, tuple) else config.url
    return url, False


def measure(name: str, input_size: tuple[int, ...] | None = None, **arguments: Any) -> tuple[float, float | None]:
    """Parameters (M) and multiply-accumulates (G), counted on tensors without storage.

    Args:
        name: The architecture.
        input_size: Of an image, `(C, H, W)`; by default the architecture's own.
        **arguments: Of its constructor.
    """
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialisers warn that there is nothing to initialise
        with torch.device("meta"):
            model: Any = timm.create_model(name, **arguments).eval()
            image = torch.empty(1, *(input_size or model.pretrained_cfg["input_size"]))
        params = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable})
        try:
            with torch.inference_mode(), counter:
                model(image)
        except (RuntimeError, NotImplementedError):  # a few of timm's models compute with values while they run
            return params, None
    return params, round(counter.get_total_flops() / 2e9, 2)


def _deformable(image: Any, weight: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    """Cost of a deformable convolution, which torch's counter does not know, without its interpolation."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])
