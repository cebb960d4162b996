"""What the tests of the store share: a server, an empty store, a small state dict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from file_server import FileServer

import weights.download


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """The server, made the mirror from which every checkpoint is fetched."""
    server = FileServer()
    monkeypatch.setenv("ATTNSUITE_MIRROR", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of the test's own, and no waiting between attempts."""
    home = tmp_path / "store"
    monkeypatch.setenv("ATTNSUITE_HOME", str(home))
    monkeypatch.setattr(weights.download, "_BACKOFF_SECONDS", 0.01)
    return home


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A small state dict, about 1 MB."""
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(512, 500, generator=generator),
        "stem.bias": torch.randn(512, generator=generator),
        "steps": torch.tensor(7),
    }
