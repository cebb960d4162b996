"""Runs the real command in real processes without paying for its imports each time.

Started once, this program imports what the verbs import and then forks a child for every command line it is sent as
a line of JSON; the child runs `apps.cli.main` with its own arguments, folder, streams and limits, as the console script
would, and can be killed like any process. Answers are lines of JSON: the child's pid at once, its end on demand.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys


def child(order: dict) -> None:
    os.setsid()
    os.chdir(order["cwd"])
    for stream, fd in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        flags = os.O_RDONLY if fd == 0 else os.O_RDWR | os.O_CREAT
        os.dup2(os.open(order[stream], flags, 0o666), fd)
    # Python made these for the pipes of this server; a console script makes them for what it is given.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, errors="backslashreplace", buffering=1)
    os.environ.update(order["env"])
    if order.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
    if order.get("plain_user") and os.geteuid() == 0:
        heed_permissions()
    sys.argv = ["attnsuite", *order["argv"]]
    for name in ("stdout", "stderr"):
        refresh(name)

    from apps.cli import main

    main()


def heed_permissions() -> None:
    """Gives up root's right to pass over file permissions (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH), and no other."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for index in range(3):  # effective, permitted and inheritable of the first 32 capabilities
        sets[index] &= ~0b110 & 0xFFFFFFFF
    assert libc.capset(header, sets) == 0


def refresh(name: str) -> None:
    """A console made at import time keeps the stream it found then."""
    import apps.console

    if name == "stderr":
        apps.console.stderr.__init__(stderr=True, highlight=False, soft_wrap=True)


def run_child(order: dict) -> None:
    code = 70
    try:
        child(order)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            code = code or 120
        sys.stderr.flush()
        # As the interpreter does at its end, so that worker processes are seen off.
        import atexit

        atexit._run_exitfuncs()
        os._exit(code)


def main() -> None:
    import numpy  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torchmetrics.classification  # noqa: F401

    import apps.catalog
    import apps.checkpoints
    import apps.classify
    import apps.embed
    import apps.explain
    import apps.run
    import apps.train.trainer  # noqa: F401
    import attnsuite  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest's own Ctrl-C
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                run_child(order)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
