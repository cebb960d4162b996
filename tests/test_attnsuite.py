"""`import attnsuite` in fresh interpreters: what it registers, and what it does when a stranger bears our names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, *path: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs code with the given folders, then the checkout, at the head of the path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=check,
        env=env,
        cwd=path[0] if path else ROOT,
    )


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one fresh interpreter sees before and after the import, with a mere folder `weights` first on its path."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "weights").mkdir()  # people keep checkpoints in such folders
    (folder / "weights" / "best.pt").write_bytes(b"")
    code = """
import json, timm, warnings
warnings.simplefilter("error")  # timm warns when a registered name is replaced
before = timm.list_models()
import attnsuite
after = timm.list_models()
origin = {name: timm.models.model_entrypoint(name).__module__ for name in after}
print(json.dumps({
    "before": before,
    "new": sorted(set(after) - set(before)),
    "taken": [name for name in before if origin[name].split(".")[0] != "timm"],
    "published": [e.name for e in attnsuite.weights.entries() if e.source == "url" and e.library == "timm"],
    "pretrained": timm.list_pretrained(),
    "version": attnsuite.__version__,
    "weights": attnsuite.weights.__file__,
}))
"""
    return json.loads(python(code, folder).stdout)


def test_import_registers_every_backbone(imported):
    litv2 = {f"litv2_{size}" for size in ("nano", "small", "medium", "base", "base_384")}
    biformer = {f"biformer_{size}" for size in ("nano", "tiny", "small", "base", "stl", "stl_nchw")}
    assert litv2 | biformer <= set(imported["new"])


def test_no_name_of_timms_is_taken(imported):
    assert len(imported["before"]) > 1000
    assert imported["taken"] == []


def test_every_published_checkpoint_can_be_asked_of_timm_by_name(imported):
    assert set(imported["published"]) - set(imported["pretrained"]) == set()


def test_version_is_the_distributions(imported):
    assert imported["version"] == importlib.metadata.version("attnsuite")


def test_a_mere_folder_of_our_name_does_no_harm(imported):
    assert imported["weights"] == str(ROOT / "weights" / "__init__.py")


@pytest.mark.parametrize("name", ["vision", "weights"])
def test_a_foreign_package_is_reported_with_both_paths_and_does_not_run(tmp_path: Path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("print('foreign code ran')")
    result = python("import attnsuite", tmp_path, check=False)
    assert result.returncode == 1 and "ImportError" in result.stderr
    assert str(tmp_path / name / "__init__.py") in result.stderr
    assert str(ROOT / name) in result.stderr
    assert "virtual environment" in result.stderr
    assert "foreign code ran" not in result.stdout


def test_a_foreign_package_that_was_imported_before_is_reported_too(tmp_path: Path):
    (tmp_path / "vision.py").write_text("")
    result = python("import vision, attnsuite", tmp_path, check=False)
    assert result.returncode == 1 and str(tmp_path / "vision.py") in result.stderr


def test_attributes_behave_as_on_any_module():
    code = """
import attnsuite
assert attnsuite.vision.__name__ == "vision" and attnsuite.weights.__name__ == "weights"
assert set(attnsuite.__all__) <= set(dir(attnsuite))
assert not hasattr(attnsuite, "nonsense")
for name in ("diffusion", "multimodal"):
    here = name in dir(attnsuite)
    try:
        exec(f"from attnsuite import {name}")
        assert here and getattr(attnsuite, name).__name__ == name
    except ImportError as error:
        assert not here and "cannot import name" in str(error), error
    try:
        getattr(attnsuite, name)
    except AttributeError as error:
        assert not here and f"has no methods in {name!r} yet" in str(error), error
try:
    attnsuite.nonsense
except AttributeError as error:
    print(error)
"""
    assert python(code).stdout.strip() == "module 'attnsuite' has no attribute 'nonsense'"
