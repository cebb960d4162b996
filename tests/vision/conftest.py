"""What the tests of the backbones share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vision  # noqa: F401 - registers the models

sys.path.append(str(Path(__file__).parents[1]))  # `parity` lies beside this folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weight store of the test's own, so that nothing depends on what this machine has."""
    monkeypatch.setenv("ATTNSUITE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("ATTNSUITE_MIRROR", "http://127.0.0.1:9")  # nobody answers there
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def one_default_dtype() -> Iterator[None]:
    yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype behind"
