"""What becomes of files that are broken on purpose, many of them: rows with an error, and nothing else.

    python benchmarks/fuzz.py                               # 100,000 pictures, 10,000 archives: results/fuzz.json
    python benchmarks/fuzz.py --pictures 2000 --archives 200   # a smoke run
    python benchmarks/fuzz.py --show 4711                   # which file number 4711 is, and what became of it

`benchmarks/mutations.py` makes the files, from a seed. Each is written to disk, listed and decoded as `classify` does,
every other round as `explain` does; of a tar archive or Parquet file all pictures. Files that once were more than a row
with an error, or might be, come first (`tests/apps/fuzz`). Each must give pixels of the right shape, or one line that
says why not. Worker processes have an address space of so many MiB (`--cap`) more than whole files of each kind take,
and end after five seconds of computing on one file: a file that breaks one of these rules, raises anything, or ends a
worker is a finding, with its number.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apps.batch.decode import Decoded, Decoder, Framing
from apps.batch.sources import Inputs
from benchmarks.machine import describe, peak_mb
from benchmarks.mutations import archives, mutated, pictures

CORPUS = Path(__file__).resolve().parents[1] / "tests/apps/fuzz"
RESULT = Path(__file__).parent / "results/fuzz.json"
SECONDS = 5
_HUNG = (1, -signal.SIGPROF)
_SIDE = 32
_MOST_ROWS = 1_000  # of one archive; a footer may claim any number
_KINDS = ("corpus", "pictures", "archives")


def decoder(view_size: int = 0) -> Decoder:
    """The decoder of a network of 32 pixels."""
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform((3, _SIDE, _SIDE), crop_pct=0.875, normalize=False)
    return Decoder(transform, Framing((_SIDE, _SIDE), 0.875, "center"), view_size=view_size)


def check(decoded: Decoded) -> str:
    """How decoding ended: `decoded`, or the reason with numbers and names left out.

    Raises:
        AssertionError: It is neither pixels nor one line of words.
    """
    if decoded.error is None:
        assert decoded.pixels is not None and decoded.pixels.shape == (3, _SIDE, _SIDE), decoded
        assert decoded.width and decoded.height and decoded.pixels.dtype == "uint8", decoded
        return "decoded"
    line = decoded.error
    assert decoded.pixels is None and line.strip() and line.isprintable() and len(line) < 500, decoded
    assert not line.startswith("not enough memory"), "beyond the cap"
    return re.sub(r"0x[0-9a-f]+|b?'[^']*'|\d[\d,.]*", "…", line)


def ends(path: str, decode: Decoder) -> Iterator[str]:
    """How a picture, or each of an archive, ended."""
    for source in islice(Inputs([path]), _MOST_ROWS):
        yield check(decode(source))


def file_of(kind: str, seed: int, number: int) -> tuple[str, bytes]:
    """Name and content of one file: `corpus` goes by their order, the other kinds by what `mutated` makes of them."""
    if kind == "corpus":
        path = sorted(CORPUS.iterdir())[number]
        return path.name, path.read_bytes()
    return mutated(_whole(kind), seed, number)


def _whole(kind: str) -> dict[str, bytes]:
    """What is changed; for the corpus, what memory is measured with first."""
    return {"pictures": pictures(), "archives": archives()}.get(kind) or {**pictures(), **archives()}


def work(kind: str, seed: int, numbers: range, report: Callable[[dict[str, Any]], None], cap: int = 0) -> None:
    """Decodes some files of a series.

    Args:
        kind: `"corpus"`, `"pictures"` or `"archives"`.
        seed: Of the series.
        numbers: Which of them.
        report: Told of each file before it is tried, of findings, and of everything at the end.
        cap: MiB of address space beyond what a file of each kind takes; 0 for any.
    """
    whole = _whole(kind)
    decoders = (decoder(), decoder(view_size=64))
    counts: Counter[tuple[str, str]] = Counter()
    slowest = (0.0, -1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for name, content in whole.items():
            assert set(ends(_written(folder, name, content), decoders[1])) == {"decoded"}, name
        if cap:
            _limit_memory(cap)
        for number in numbers:
            report({"begun": number})
            name, content = file_of(kind, seed, number)
            path = _written(folder, name, content)
            begin = time.perf_counter()
            try:
                for end in ends(path, decoders[number // len(whole) % 2]):
                    counts[name.partition("-")[0], end] += 1
            except Exception as error:
                report({"finding": number, "file": name, "what": f"{type(error).__name__}: {error}"})
            slowest = max(slowest, (time.perf_counter() - begin, number))
    report({
        "counts": [[*key, count] for key, count in counts.items()], "slowest": slowest, "peak_mb": peak_mb(),
    })  # fmt: skip


def _written(folder: str, name: str, content: bytes) -> str:
    suffix = {"tar": ".tar", "parquet": ".parquet"}.get(name.partition("-")[0], "")
    path = os.path.join(folder, f"file{suffix}")
    Path(path).write_bytes(content)
    return path


def _limit_memory(cap: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (cap << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def serve(kind: str, seed: int, numbers: range, cap: int, begun: int) -> None:
    """A worker process: reports as lines of JSON, and which file it has begun in a file that it inherits."""

    def report(message: dict[str, Any]) -> None:
        if "begun" in message:
            os.pwrite(begun, f"{message['begun']:12d}".encode(), 0)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # nobody handles it, so it ends decoders that never return
            faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # and this, what waits without computing
        else:
            print(json.dumps(message), flush=True)

    work(kind, seed, numbers, report, cap)
    signal.setitimer(signal.ITIMER_PROF, 0)
    faulthandler.cancel_dump_traceback_later()


class Run:
    """A worker process and what it has told; one that dies is started again after the file that it died of."""

    def __init__(self, options: argparse.Namespace, kind: str, numbers: range) -> None:
        self.options, self.kind, self.numbers = options, kind, numbers
        self.findings: list[dict[str, Any]] = []
        self.totals: list[dict[str, Any]] = []
        self._begun = tempfile.TemporaryFile()
        self._start(numbers)

    def _start(self, numbers: range) -> None:
        begun, steps = self._begun.fileno(), (numbers.start, numbers.stop, numbers.step)
        arguments = [self.kind, self.options.seed, *steps, self.options.cap, begun]
        os.pwrite(begun, b" " * 12, 0)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *map(str, arguments)], stdout=subprocess.PIPE, pass_fds=[begun],
            stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip

    def wait(self) -> None:
        """Until all files were tried."""
        with self._begun:
            self._wait()

    def _wait(self) -> None:
        while True:
            out, _ = self._process.communicate()
            told = [json.loads(line) for line in out.splitlines()]
            self.findings += [line for line in told if "finding" in line]
            self.totals += [line for line in told if "counts" in line]
            if self._process.returncode == 0:
                return
            begun = os.pread(self._begun.fileno(), 12, 0).strip()
            if not begun:
                raise RuntimeError("a worker ended before its first file")
            ended = "hang" if self._process.returncode in _HUNG else f"crash: {self._process.returncode}"
            self.findings.append({"finding": int(begun), "what": ended})
            self._start(range(int(begun) + self.numbers.step, self.numbers.stop, self.numbers.step))


def measure(options: argparse.Namespace, kind: str, count: int) -> dict[str, Any]:
    """Tries a series in as many processes as asked for."""
    begin = time.perf_counter()
    first = options.first
    runs = [Run(options, kind, range(first + i, first + count, options.workers)) for i in range(options.workers)]
    for run in runs:
        run.wait()
    seconds = time.perf_counter() - begin
    totals = [total for run in runs for total in run.totals]
    by_format: dict[str, Counter[str]] = {}
    for form, end, number in (entry for total in totals for entry in total["counts"]):
        by_format.setdefault(form, Counter())[end] += number
    return {
        "files": count,
        "seconds": round(seconds, 1),
        "slowest_ms": round(1000 * max(total["slowest"][0] for total in totals), 1),
        "peak_mb": round(max(total["peak_mb"] for total in totals)),
        "formats": {form: _summary(ends) for form, ends in sorted(by_format.items())},
        "findings": [finding for run in runs for finding in run.findings],
    }


def _summary(ends: Counter[str]) -> dict[str, Any]:
    refused = {end: number for end, number in ends.most_common() if end != "decoded"}
    return {
        "decoded": ends["decoded"], "refused": sum(refused.values()), "reasons": len(refused),
        "commonest": dict(islice(refused.items(), 3)),
    }  # fmt: skip


def show(options: argparse.Namespace, kind: str) -> None:
    """Writes one file of a series where it can be looked at, and tries it in this process."""
    name, content = file_of(kind, options.seed, options.show)
    path = _written(tempfile.gettempdir(), name, content)
    print(f"{path}: {name}, {len(content):,} bytes", flush=True)
    work(kind, options.seed, range(options.show, options.show + 1), print, options.cap)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--archives", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number to begin with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cap", type=int, default=3072, help="MiB that one file may take")
    parser.add_argument("--show", type=int, metavar="N", help="write out one picture, or with --pictures 0 one archive")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *numbers = options.worker
        seed, start, stop, step, cap, begun = map(int, numbers)
        serve(kind, seed, range(start, stop, step), cap, begun)
        return
    if options.show is not None:
        show(options, "pictures" if options.pictures else "archives")
        return
    results: dict[str, Any] = {**describe("pillow", "pyarrow"), "seed": options.seed, "cap_mb": options.cap}
    options.corpus = len(list(CORPUS.iterdir()))
    for kind in _KINDS:
        results[kind] = measure(options, kind, vars(options)[kind])
        print(kind, json.dumps({name: value for name, value in results[kind].items() if name != "formats"}, indent=1))
    options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
