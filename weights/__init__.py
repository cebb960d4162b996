"""Where checkpoints come from: the manifest of all we know, and the store of those on this machine.

The ground floor of the suite: it imports nothing else of ours, and torch only where tensors are touched.
"""

from .checkpoint import differences, load_state_dict, save_state_dict
from .manifest import Entry, WeightsError, entries, entry
from .pretrained import build_model, cfg, state_dict_for
from .store import fetch, home, import_file, path_of, shipped, shipped_classifiers, verify

__all__ = [
    "Entry",
    "WeightsError",
    "build_model",
    "cfg",
    "differences",
    "entries",
    "entry",
    "fetch",
    "home",
    "import_file",
    "load_state_dict",
    "path_of",
    "save_state_dict",
    "shipped",
    "shipped_classifiers",
    "state_dict_for",
    "verify",
]
