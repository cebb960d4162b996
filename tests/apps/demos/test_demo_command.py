"""`attnsuite demo` as a process: what it says, where it listens, whom it calls, what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="pip install 'attnsuite[demo]'")

from apps.cli import app
from apps.demos.folder import cleaned, own_folder

# Put before a process: any connection or look-up that leaves this machine is written down, and fails.
GUARD = """
import os, socket
HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)
def guarded(function, host_of):
    def call(*given, **named):
        host = host_of(given)
        if host not in HERE:
            with open(os.environ["OUTSIDE"], "a") as log:
                print(host, file=log)
            raise OSError("no way out")
        return function(*given, **named)
    return call
def address(given):
    return given[1][0] if isinstance(given[1], tuple) else None
socket.getaddrinfo = guarded(socket.getaddrinfo, lambda given: given[0])
class Socket(socket.socket):
    connect = guarded(socket.socket.connect, address)
    connect_ex = guarded(socket.socket.connect_ex, address)
socket.socket = Socket
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """A server of its own, and what it said when it began."""

    def __init__(self, process: subprocess.Popen[str], address: str, line: str, temp: Path) -> None:
        self.process, self.address, self.line, self.temp = process, address, line, temp

    def end(self, signum: int) -> tuple[int, str]:
        """Its exit code, and all that it said after its first line."""
        self.process.send_signal(signum)
        assert self.process.stdout is not None and self.process.stderr is not None
        said = self.process.stderr.read() + self.process.stdout.read()
        return self.process.wait(60), said


@contextmanager
def demo(tmp_path: Path, *args: str, **environment: str) -> Iterator[Running]:
    temp = tmp_path / "tmp"
    temp.mkdir(exist_ok=True)
    (tmp_path / "guard").mkdir(exist_ok=True)
    (tmp_path / "guard/sitecustomize.py").write_text(GUARD)
    drop = ("GRADIO_", "ATTNSUITE_DEMO")
    env = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    env |= {"TMPDIR": str(temp), "OUTSIDE": str(tmp_path / "outside"), "PYTHONPATH": str(tmp_path / "guard")}
    env |= {"HTTP_PROXY": "http://proxy.invalid:3128", "http_proxy": "http://proxy.invalid:3128", **environment}
    run = "import sys; from apps.cli import main; main()"
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell takes from what it starts in the background
    process = subprocess.Popen(
        [sys.executable, "-c", run, "demo", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "attnsuite demo at http" in line, line + process.stderr.read()
        yield Running(process, line.split()[3], line, temp)
    finally:
        process.kill()
        process.communicate()


def listening(port: int) -> set[str]:
    """Addresses, as the kernel writes them, at which a port is listened at."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            place, state = row.split()[1], row.split()[3]
            if state == "0A" and int(place.split(":")[1], 16) == port:
                found.add(place.split(":")[0])
    return found


def test_it_listens_at_loopback_calls_nobody_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("kept to myself")
    port = free_port()
    with demo(tmp_path, "see", "--port", str(port), ATTNSUITE_DEMO_AUTH="ann:päss") as running:
        assert running.line == f"attnsuite demo at http://127.0.0.1:{port}/ (stop with Ctrl-C)\n"
        if Path("/proc/net/tcp").exists():
            assert listening(port) == {"0100007F"}
            assert b"ann:" not in Path(f"/proc/{running.process.pid}/cmdline").read_bytes()
        assert httpx.get(f"{running.address}config", trust_env=False).status_code == 401
        with httpx.Client(base_url=running.address, auth=("ann", "päss"), trust_env=False, timeout=20) as client:
            client.post("/gradio_api/upload", files={"files": ("a.png", b"uploaded")})
            for path in ("secret.txt", tmp_path / "secret.txt", "/etc/passwd"):
                assert client.get(f"/gradio_api/file={path}").status_code == 403
            assert client.get("/see").status_code == 404 and client.get("/config").status_code == 200
        assert [path.read_bytes() for path in running.temp.rglob("a.png")] == [b"uploaded"]
        assert running.end(signal.SIGINT) == (0, "")
        assert [*running.temp.iterdir()] == []
    assert not (tmp_path / "outside").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guard", "secret.txt", "tmp"]


def test_open_to_all_it_warns_and_ended_by_the_system_it_removes_its_own_files_only(tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "other.txt").touch()
    with demo(
        tmp_path, "results", "--host", "0.0.0.0", "--port", str(free_port()), GRADIO_TEMP_DIR=str(theirs)
    ) as running:
        assert len([*theirs.iterdir()]) == 2
        code, rest = running.end(signal.SIGTERM)
        assert code == 0 and rest.startswith("warning: whoever reaches this machine") and rest.count("\n") == 1
    assert [path.name for path in theirs.iterdir()] == ["other.txt"]


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert wrong("--port", str(port)) == f"error: port {port} is taken: stop what listens there, or choose " + (
            "another with --port"
        )


def wrong(*args: str, **environment: str) -> str:
    """The one line that the command says of a mistake."""
    run = CliRunner().invoke(app, ["demo", *args], env=environment)
    assert run.exit_code == 2, run.output
    assert run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    return run.stderr.strip()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "nowhere.invalid"], "no address or name that is known here"),
        (["--host", "192.0.2.1"], "this machine cannot listen there"),
        (["--host", ""], "expected an address of this machine"),
        (["--auth", "ann"], "expected USER:PASS"),
        (["--auth", ":x"], "expected USER:PASS"),
        (["sea"], "no demo called 'sea': expected one of see"),
        (["--model", "biformer_tiny"], "give its name"),
        (["see", "--model", "no_such_model"], "no_such_model"),
        (["see", "--device", "abacus"], "--device abacus cannot be used here"),
    ],
)
def test_mistakes_are_one_line(args: list[str], words: str):
    assert words in wrong(*args)


def test_a_variable_may_hold_the_password_and_may_be_wrong():
    assert "ATTNSUITE_DEMO_AUTH: expected USER:PASS" in wrong(ATTNSUITE_DEMO_AUTH="ann")


def test_without_gradio_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest))
    assert "pip install 'attnsuite[demo]'" in wrong()


def test_without_a_network_nothing_is_shared(monkeypatch: pytest.MonkeyPatch):
    def unreachable(**given: Any) -> str:
        raise RuntimeError("could not get the tunnel")

    monkeypatch.setattr("gradio.networking.setup_tunnel", unreachable)
    assert "--share: Gradio gave no public address" in wrong("results", "--share", "--port", str(free_port()))


def test_files_go_when_they_are_old_and_samples_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with own_folder() as folder:
        assert folder.parent == tmp_path and os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "sample").mkdir()
        (folder / "sample/cat.jpg").touch()
        with cleaned(folder, 0.4):
            (folder / "upload").mkdir()
            (folder / "upload/mine.jpg").touch()
            (folder / "broken_off").touch()
            until = time.monotonic() + 20
            while (folder / "upload").exists() or (folder / "broken_off").exists():
                assert time.monotonic() < until
                (folder / "fresh").touch()
                time.sleep(0.05)
            assert (folder / "fresh").exists() and (folder / "sample/cat.jpg").exists()
    assert [*tmp_path.iterdir()] == [] and os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
