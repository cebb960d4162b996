"""Many visitors at once at the page See of the demos, on loopback: what they get, how long they wait, what it holds.

    python benchmarks/demo_load.py                             # 50 clients for 2 minutes, and results/demo_load.json
    python benchmarks/demo_load.py --clients 8 --seconds 10    # a smoke run; its figures mean little

The server is a process of its own, `attnsuite demo see`. Each client asks for a map in a loop, by turns of a sample and
of a picture of its own that it uploads, waits for the answer, and asks again; refused politely (503: the line is full;
429: this client or address has enough waiting) it waits a second. Any other end is an error, and there must be none.
Clients speak the API's own protocol, each from an address of its own as a proxy on this machine would pass them on.
A request takes from its first byte to its answer; uploads are not in it. Memory is the server's resident set, sampled
every second; its growth is the slope of a line through the samples of the second half of the time, when every session
and model has long been there.

Before that, two servers are started and stopped for the times until the line with the address and, where Playwright and
Chromium are installed, until the page has been painted (First Contentful Paint) and its button is there.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe

RESULT = Path(__file__).parent / "results/demo_load.json"
_SAMPLES = ("astronaut", "camera", "cat", "coffee", "rocket")
_REFUSALS = {503: "line full", 429: "enough waiting"}


@dataclass
class Log:
    """What happened.

    Attributes:
        seconds: Of each request that was answered, from its first byte.
        ends: How many ended how: `"ok"`, a refusal, or the words of an error.
        memory: Seconds since the start, requests answered by then, and resident megabytes.
    """

    seconds: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int, float]] = field(default_factory=list)


@contextmanager
def server(*args: str) -> Iterator[tuple[str, int, float]]:
    """A server of its own: its address, its process, and the seconds until it said the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from apps.cli import main; main()", "demo", *args, "--port", str(port)],
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        seconds = time.perf_counter() - begin
        if "attnsuite demo at" not in line:
            raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
        # what it says of defects is passed on: a pipe that nobody reads would in the end hold it up
        passing = threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True)
        passing.start()
        yield line.split()[3], process.pid, seconds
        process.terminate()
        passing.join()
    finally:
        process.kill()
        process.communicate()


def first_paint(address: str, selector: str) -> dict[str, float] | None:
    """Seconds until something was painted and until a control is there, for a browser that was never here before."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        page = browser.new_page()
        begin = time.perf_counter()
        page.goto(address)
        page.locator(selector).first.wait_for()
        there = time.perf_counter() - begin
        painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000")
        browser.close()
    return {"painted": round(painted, 2), "usable": round(there, 2)}


def measure_start() -> dict[str, Any]:
    """How soon a server says its address and shows its pages."""
    found: dict[str, Any] = {}
    for name, args, selector in (("home", [], ".cards a"), ("see", ["see"], "#see-run")):
        with server(*args) as (address, _, seconds):
            found[name] = {"address": round(seconds, 2), **(first_paint(address, selector) or {})}
    return found


def picture(seed: int) -> bytes:
    """A picture like no other, as JPEG."""
    drawn = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(drawn).resize((400, 300), Image.Resampling.BICUBIC).save(content, "JPEG")
    return content.getvalue()


def inputs(address: str, model: str) -> dict[str, Any]:
    """What the page See is asked for, by the names of its API and in their order, with the model filled in."""
    told = httpx.get(f"{address}gradio_api/info", trust_env=False, timeout=60).json()["named_endpoints"]["/see"]
    defaults = {one["parameter_name"]: one.get("parameter_default") for one in told["parameters"]}
    return {**defaults, "image": None, "target": "", "model": model}


async def visit(address: str, number: int, usual: dict[str, Any], until: float, log: Log) -> None:
    """One client: asks, waits, asks again."""
    headers = {"x-forwarded-for": f"198.51.{100 + number // 250}.{1 + number % 250}"}
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=300, trust_env=False) as client:
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            if (number + turn) % 2:
                mine = {"sample": _SAMPLES[(number + turn) % len(_SAMPLES)]}
            else:
                upload = {"files": ("picture.jpg", picture(1000 * number + turn))}
                path = (await client.post("/gradio_api/upload", files=upload)).raise_for_status().json()[0]
                mine = {"image": {"path": path, "meta": {"_type": "gradio.FileData"}}}
            begin = time.perf_counter()
            end = await ask(client, {"data": [*{**usual, **mine}.values()], "session_hash": f"visitor{number}"})
            log.ends[end] += 1
            if end == "ok":
                log.seconds.append(time.perf_counter() - begin)
            elif end in _REFUSALS.values():
                await asyncio.sleep(1)


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """How a request ended."""
    try:
        sent = await client.post("/gradio_api/call/see", json=body)
        if sent.status_code != 200:
            return _REFUSALS.get(sent.status_code) or f"{sent.status_code} {sent.text[:200]}"
        event = ""
        async with client.stream("GET", f"/gradio_api/call/see/{sent.json()['event_id']}") as answer:
            async for line in answer.aiter_lines():
                event = line.removeprefix("event: ") if line.startswith("event: ") else event
                if line.startswith("data: ") and event in ("complete", "error"):
                    return "ok" if event == "complete" else line[:200]
        return "the answer broke off"
    except httpx.HTTPError as error:
        return f"{type(error).__name__} {error}"


async def watch(pid: int, until: float, log: Log) -> None:
    """Samples the memory of the server."""
    begin = time.perf_counter()
    while time.perf_counter() < until:
        status = Path(f"/proc/{pid}/status").read_text()
        held = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
        log.memory.append((round(time.perf_counter() - begin, 1), log.ends["ok"], round(held, 1)))
        await asyncio.sleep(1)


async def load(address: str, pid: int, clients: int, seconds: float, model: str) -> Log:
    """All clients at once, after one request that loads the model."""
    log, usual = Log(), inputs(address, model)
    await visit(address, clients, usual, time.perf_counter() + 0.1, Log())
    until = time.perf_counter() + seconds
    visits = [visit(address, number, usual, until, log) for number in range(clients)]
    await asyncio.gather(watch(pid, until, log), *visits)
    return log


def summary(log: Log, seconds: float) -> dict[str, Any]:
    """The figures of a run; growth of memory is None where too little was answered to tell."""
    refused = {name: log.ends[name] for name in _REFUSALS.values()}
    errors = {end: count for end, count in log.ends.items() if end != "ok" and end not in refused}
    later = np.array([row for row in log.memory if row[0] >= seconds / 2]).reshape(-1, 3)
    answered = np.ptp(later[:, 1]) if len(later) else 0
    percentiles = {f"p{p}": round(float(np.percentile(log.seconds, p)), 2) for p in (50, 90, 99) if log.seconds}
    return {
        "ok": log.ends["ok"],
        "refused": refused,
        "errors": errors,
        "requests_per_second": round(log.ends["ok"] / seconds, 2),
        "seconds": percentiles,
        "memory_mb": {
            "first": log.memory[0][2],
            "half_time": float(later[0, 2]) if len(later) else None,
            "last": log.memory[-1][2],
            "most": max(row[2] for row in log.memory),
            "growth_per_1000_requests": round(1000 * float(np.polyfit(later[:, 1], later[:, 2], 1)[0]), 1)
            if answered >= 20
            else None,
        },
        "samples": log.memory[:: max(1, len(log.memory) // 60)],
    }


def print_tables(results: dict[str, Any]) -> None:
    """The figures as Markdown."""
    for name, times in results.get("start", {}).items():
        print(f"{name}: " + ", ".join(f"{what} {seconds} s" for what, seconds in times.items()))
    found, memory = results["load"], results["load"]["memory_mb"]
    print("\n| clients | seconds | ok | refused | errors | requests/s | p50 (s) | p90 (s) | p99 (s) |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    cells = [results["clients"], results["duration"], found["ok"], sum(found["refused"].values())]
    cells += [sum(found["errors"].values()), found["requests_per_second"], *found["seconds"].values()]
    print("| " + " | ".join(map(str, cells)) + " |")
    print(
        f"\nserver's memory: {memory['first']} MB at first, {memory['half_time']} MB at half time, {memory['last']} MB "
        f"at last; {memory['growth_per_1000_requests']} MB more per 1000 requests in the second half"
    )
    for words, count in found["errors"].items():
        print(f"error, {count} times: {words}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--model", default="shapes_biformer", help="that each asks for; this one is in the package")
    parser.add_argument("--no-start", action="store_true", help="leave out the times of starting")
    parser.add_argument("--output", type=Path, help=f"else {RESULT.name} if nothing was changed")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": describe("gradio", "torch")}
    results |= {"clients": options.clients, "duration": options.seconds, "model": options.model}
    if not options.no_start:
        results["start"] = measure_start()
    with server("see", "--model", options.model) as (address, pid, _):
        log = asyncio.run(load(address, pid, options.clients, options.seconds, options.model))
    results["load"] = summary(log, options.seconds)
    print_tables(results)
    output = options.output or (RESULT if (options.clients, options.seconds) == (50, 120) else None)
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if results["load"]["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
