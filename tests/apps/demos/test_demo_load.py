"""The demos under several visitors at once, by the benchmark that does it with many: answers or refusals in words."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

pytest.importorskip("gradio", reason="pip install 'attnsuite[demo]'")

from benchmarks.demo_load import Log, load, picture, server, summary

MODEL = "shapes_biformer"


@pytest.mark.slow
def test_eight_visitors_get_answers_or_polite_refusals():
    with server("see", "--model", MODEL, "--per-client", "1", "--per-address", "1") as (address, pid, _):
        log = asyncio.run(load(address, pid, 8, 6, MODEL))
    found = summary(log, 6)
    assert found["errors"] == {}
    assert found["ok"] >= 8 and len(log.seconds) == found["ok"]  # none is left out
    assert found["memory_mb"]["most"] > 100


def test_figures_tell_errors_from_refusals_and_growth_from_warm_up():
    log = Log([0.5] * 100, Counter({"ok": 100, "line full": 3, "500 Sorry": 2}))
    log.memory = [(second, 10 * second, 500 + (40 * second if second < 5 else 200 + second)) for second in range(10)]
    found = summary(log, 10)
    assert found["refused"] == {"line full": 3, "enough waiting": 0} and found["errors"] == {"500 Sorry": 2}
    assert found["seconds"] == {"p50": 0.5, "p90": 0.5, "p99": 0.5} and found["requests_per_second"] == 10
    assert found["memory_mb"]["growth_per_1000_requests"] == pytest.approx(100)  # 1 MB in 10 requests
    assert picture(1) != picture(2) and picture(1) == picture(1)
