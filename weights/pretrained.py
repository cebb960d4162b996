"""From an entry of the manifest to a timm network that carries its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import store
from .checkpoint import differences, load_state_dict
from .manifest import Entry, WeightsError, entries, entry

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["build_model", "cfg", "state_dict_for"]

# A caller who names one of these in `pretrained_cfg_overlay` has chosen where the weights come from.
_SOURCE_FIELDS = ("file", "url", "hf_hub_id", "state_dict")


def cfg(name: str) -> dict[str, Any]:
    """The fields of timm's `PretrainedCfg` that an entry of the manifest fills.

    Args:
        name: Name of an entry, such as `litv2_small.in1k`.

    Returns:
        `url` (only where the file is published at one), `license`, `origin_url`, `paper_name`, `paper_ids` and
        `notes` (the citation), to be merged into a `default_cfgs` entry.
    """
    e = entry(name)
    fields: dict[str, Any] = {
        "license": e.license,
        "origin_url": e.origin_url,
        "paper_name": e.paper,
        "paper_ids": f"arXiv:{e.paper_url.rpartition('/')[2]}",
        "notes": (e.citation, e.notes) if e.notes else (e.citation,),
    }
    return {"url": e.url, **fields} if e.url else fields


def build_model(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg`, with published weights taken from our store.

    With `pretrained=True`, and unless the caller says where the weights come from (`pretrained_cfg` given as a
    dictionary, or a source in `pretrained_cfg_overlay`), the file of the manifest is used; it is fetched first where
    it is not on this machine yet. Arguments that a checkpoint needs (`model_args` of its entry) are defaults of the
    network built under its name, with or without weights.

    Args:
        model_cls: Class of the network.
        variant: Registered architecture name.
        pretrained: Whether to load weights.
        **kwargs: As `timm.models.build_model_with_cfg` takes them.

    Returns:
        The network, or the feature wrapper that `features_only=True` asks for.

    Raises:
        WeightsError: The weights cannot be fetched or read.
    """
    from timm.models import build_model_with_cfg

    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    chosen = _manifest_entry(variant, kwargs.get("pretrained_cfg"))
    if chosen is not None:
        kwargs = {**chosen.model_args, **kwargs}
        if pretrained and not any(overlay.get(field) for field in _SOURCE_FIELDS):
            overlay["file"] = str(store.fetch(chosen.name))
    return build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg_overlay=overlay or None, **kwargs)


def state_dict_for(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Reads the weights of an entry under the names that a network uses.

    Files whose names are the network's own pass through. Those of a family whose entries agree with timm's in order
    and shape but not in name are mapped by order. Renaming that only a method knows stays with that method's
    `checkpoint_filter_fn`.

    Args:
        name: Name of an entry, such as `tf_efficientnet_lite0`.
        model: The network to be loaded, `timm.create_model(architecture)`.

    Returns:
        A state dict for `model.load_state_dict`.

    Raises:
        WeightsError: The file is absent and cannot be fetched, is unreadable, or does not fit the network.
    """
    e = entry(name)
    state_dict = load_state_dict(store.fetch(e.name), key=e.key if e.source == "package" else None)
    expected = model.state_dict()
    if e.family == "efficientnet_lite":
        state_dict = _by_order(state_dict, expected, e.name)
    if diff := differences(state_dict, expected):
        raise WeightsError(f"the weights {e.name} do not fit {type(model).__name__}: {diff}")
    return state_dict


def _manifest_entry(variant: str, pretrained_cfg: Any) -> Entry | None:
    """The entry that timm's `pretrained_cfg` argument stands for: None or a tag; anything else is the caller's own."""
    if pretrained_cfg and not isinstance(pretrained_cfg, str):
        return None
    name = f"{variant}.{pretrained_cfg}" if pretrained_cfg else variant
    known = any(name == e.name or (e.default and name == e.architecture) for e in entries())
    return entry(name) if known else None


def _by_order(state_dict: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Renames entry after entry in order; the shapes must agree throughout."""
    if len(state_dict) != len(expected):
        raise WeightsError(f"the weights {name} have {len(state_dict)} entries, the network has {len(expected)}")
    renamed = {}
    for (theirs, tensor), (ours, place) in zip(state_dict.items(), expected.items(), strict=True):
        if tensor.shape != place.shape:
            raise WeightsError(
                f"the weights {name} do not follow the network's order: {theirs} {tuple(tensor.shape)} would become "
                f"{ours} {tuple(place.shape)}"
            )
        renamed[ours] = tensor
    return renamed
