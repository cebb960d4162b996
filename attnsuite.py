"""Published vision and multimodal attention in the libraries that people already use.

`import attnsuite` registers every backbone with timm and offers the suite's packages as attributes::

    import attnsuite, timm

    model = timm.create_model("biformer_small", pretrained=True)
    attention = attnsuite.vision.biformer.BiLevelRoutingAttention(64)

The packages are installed under general names (`vision`, `weights`), which another project on the path may use as
well. So their place is checked before anything of them runs, and a foreign one is reported, not imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["__version__", "vision", "weights"]

_HERE = Path(__file__).resolve().parent
_LAZY = ("diffusion", "multimodal")  # loaded on first use; their host libraries are large


def _load(name: str) -> ModuleType:
    """Imports a package of the suite after making sure that it is the one beside this file."""
    expected, found = _HERE / name, _location(name)
    if found is None or expected not in (found, found.parent):
        raise ImportError(
            f"attnsuite needs its own package {name!r}, but another one comes first on the path:\n"
            f"  found     {found or 'nothing'}\n"
            f"  expected  {expected}\n"
            "Start Python from another folder, take the other project off PYTHONPATH, or give attnsuite a virtual "
            "environment of its own.",
            name=name,
        )
    return importlib.import_module(name)


def _location(name: str) -> Path | None:
    """Where Python takes a package from, without running any of it."""
    if (module := sys.modules.get(name)) is not None:
        origin, folders = getattr(module, "__file__", None), getattr(module, "__path__", None)
    elif (spec := importlib.util.find_spec(name)) is not None:
        origin, folders = spec.origin, spec.submodule_search_locations
    else:
        return None
    place = origin or next(iter(folders or ()), None)
    return Path(place).resolve() if place else None


def _version() -> str:
    try:
        return importlib.metadata.version("attnsuite")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path that was never installed
        return "0+unknown"


def __getattr__(name: str) -> ModuleType:
    # AttributeError, also for what is still to come, keeps `hasattr`, `copy` and `pickle` working as on any module.
    if name not in _LAZY:
        raise AttributeError(f"module 'attnsuite' has no attribute {name!r}")
    if not (_HERE / name / "__init__.py").is_file():
        raise AttributeError(f"attnsuite {__version__} has no methods in {name!r} yet")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for name in _LAZY if (_HERE / name / "__init__.py").is_file())})


__version__ = _version()
weights = _load("weights")
vision = _load("vision")
