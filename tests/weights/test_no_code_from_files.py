"""Nothing that arrives as a file or an address is run: what our code may not call, read off its syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("weights", "vision", "diffusion", "multimodal", "apps", "benchmarks", "recipes", "docs")

# Modules that run what they read. An importer that has a reason may use the names that stand with it, no others.
RUNNING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "runpy"}
REASONS = {
    ("weights/checkpoint.py", "pickle"): {"UnpicklingError"},  # what torch raises where it refuses
    # Between the processes of one run, which trust each other.
    ("apps/batch/cluster.py", "pickle"): {"loads"},
    ("apps/batch/ray_tasks.py", "pickle"): {"dumps", "loads"},
}

CALLS = {"eval", "exec", "execfile", "os.system", "os.popen", "torch.hub.load", "torch.jit.load", "yaml.load"}
LAST_NAMES = {"read_pickle", "unsafe_load", "full_load", "load_module", "unsafe_globals"}


def modules() -> list[Path]:
    return [ROOT / "attnsuite.py", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


def breaches(source: str, name: str = "") -> Iterator[str]:
    """What a module does that could run a file's content."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports_that_run(node, tree, name)
        elif isinstance(node, ast.Call):
            yield from calls_that_run(node)


def imports_that_run(node: ast.Import | ast.ImportFrom, tree: ast.Module, name: str) -> Iterator[str]:
    tops = [str(node.module)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level:
        return
    for top in {full.partition(".")[0] for full in tops} & RUNNING:
        allowed = REASONS.get((name, top), set())
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == top}
        plain = isinstance(node, ast.Import) and all(alias.asname is None for alias in node.names)
        if not plain or not allowed or not used <= allowed:
            yield f"line {node.lineno} imports {top}"


def calls_that_run(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if called in CALLS or called.rpartition(".")[2] in LAST_NAMES:
        yield f"line {node.lineno} calls {called}"
    if (called in ("torch.load", "load") and "map_location" in given) or called == "torch.load":
        if not is_constant(given.get("weights_only"), True):
            yield f"line {node.lineno} calls {called} without weights_only=True"
    for word, harmless in (("trust_remote_code", False), ("allow_pickle", False), ("weights_only", True)):
        if word in given and not is_constant(given[word], harmless):
            yield f"line {node.lineno} passes {word}={ast.unparse(given[word])}"
    if is_constant(given.get("shell"), True):
        yield f"line {node.lineno} passes shell=True"


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_runs_what_it_reads():
    found = {
        name: wrong
        for path in modules()
        if (wrong := list(breaches(path.read_text("utf-8"), name := path.relative_to(ROOT).as_posix())))
    }
    assert not found
    assert len(modules()) > 200, "the folders are where they were"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, map_location='cpu', weights_only=flag)",
        "from torch import load\nload(p, map_location='cpu')",
        "import pickle\npickle.loads(b)",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "import joblib.numpy_pickle",
        "np.load(p, allow_pickle=True)",
        "pd.read_pickle(p)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=args.trust)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "torch.hub.load('owner/repository', 'model')",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_check_sees_each_way_to_run_a_file(source: str):
    assert list(breaches(source))


def test_the_check_lets_data_be_read():
    harmless = """
import torch, numpy as np, json
from . import pickle_of_cucumbers
torch.load(p, map_location="cpu", weights_only=True)
np.load(p, allow_pickle=False)
json.load(file)
model.eval()
AutoModel.from_pretrained(p, trust_remote_code=False)
"""
    assert list(breaches(harmless)) == []


def test_a_reason_covers_only_the_names_that_stand_with_it():
    assert list(breaches("import pickle\nrefusal = pickle.UnpicklingError", "weights/checkpoint.py")) == []
    assert list(breaches("import pickle\npickle.load(pickle.UnpicklingError)", "weights/checkpoint.py"))
    assert list(breaches("import pickle\npickle.UnpicklingError", "weights/store.py"))
