from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Running:
    """A command under way in a process of its own."""

    def __init__(self, server: Server, pid: int, out: Path, err: Path) -> None:
        self._server = server
        self.pid = pid
        self._out = out
        self._err = err

    def kill(self, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signum)

    def wait(self) -> Done:
        code = self._server.ask({"wait": self.pid})["code"]
        return Done(code, *(_content(path) for path in (self._out, self._err)))


def _content(path: Path) -> str:
    """What was written; a terminal cannot be read from this end."""
    return path.read_text("utf-8", errors="surrogateescape") if path.is_file() else ""


class Server:
    """The other end of cli_server.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cli_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        )
        assert self._answer() == {"ready": True}

    def start(self, *argv: object, cwd: Path | None = None, **order: object) -> Running:
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        defaults = {"stdin": os.devnull, "stdout": str(out), "stderr": str(err), "env": {}, "cwd": str(cwd or ROOT)}
        args = [os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in argv]
        pid = self.ask({**defaults, "argv": args, **order})["pid"]
        return Running(self, pid, Path(str(order.get("stdout", out))), Path(str(order.get("stderr", err))))

    def ask(self, order: dict) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        server = Server(Path(folder))
        yield server
        server.close()


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Callable[..., Running]:
    """Starts a command in `tmp_path`."""
    return lambda *argv, **order: server.start(*argv, **{"cwd": tmp_path, **order})


@pytest.fixture
def run(start: Callable[..., Running]) -> Callable[..., Done]:
    """Runs a command in `tmp_path` to its end."""
    return lambda *argv, **order: start(*argv, **order).wait()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 small pictures in nested folders, each different."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(160):
        place = folder / f"day {index % 3}" / f"{index:03d}.jpg"
        place.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((80, 60), Image.Resampling.BICUBIC).save(place)
    return folder
