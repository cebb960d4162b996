"""Memory against the number of inputs, and a run that is killed again and again, as in the benchmark but smaller."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from benchmarks.steady import soak

# Both are more than the listing holds of one folder before it spills names to a file.
_GROWTH = """
import pathlib, sys
from benchmarks.steady import make_folder, run_mean

folder = pathlib.Path(sys.argv[1])
counts = (21_000, 46_000)
made = [make_folder(folder / str(count), count) for count in counts]
told = [run_mean(str(path), f"{path}.csv") for path in made]
assert [one["computed"] for one in told] == list(counts) and not any(one["failed"] for one in told), told
print(told[1]["main_mb"] - told[0]["main_mb"])
"""


def test_memory_does_not_grow_with_the_number_of_inputs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, tmp_path],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5  # a list of 25,000 more inputs would be 7


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_makes_the_table_of_an_undisturbed_one(tmp_path: Path):
    told = soak(tmp_path, 900, 3, 2, "litv2_nano")
    assert told["same_table"] and told["errors"] == told["broken"] == 9 and told["reasons"] >= 4
    assert told["kills"] == 2 and 0 < told["killed_after_rows"][0] < told["killed_after_rows"][1] < 900
