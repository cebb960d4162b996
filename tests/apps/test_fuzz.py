"""Files that are broken on purpose, and files that are small and claim to be large: rows, and nothing else."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import ROOT

from apps.batch.decode import read_image
from apps.batch.remote import open_file
from apps.batch.sources import Inputs
from apps.errors import in_one_line
from benchmarks.fuzz import CORPUS, decoder, measure
from benchmarks.mutations import archives, mutated, pictures

CORPUS_FILES = sorted(path.name for path in CORPUS.iterdir())
WHOLE = (
    "png-flat-and-clear.png",
    "png-bits-length.png",
    "webp-tall-canvas.webp",
    "webp-flat-and-clear.webp",
    "gif-flat.gif",
    "tiff-floats.tif",
    "jpeg2000-flat.jp2",
)


def options(**changes: int) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 1, "first": 0, "workers": 1, "cap": 3072, **changes})


@pytest.mark.parametrize(("kind", "count"), [("corpus", len(CORPUS_FILES)), ("pictures", 400), ("archives", 120)])
def test_broken_files_become_rows_within_time_and_memory(kind, count):
    result = measure(options(), kind, count)
    assert result["findings"] == []
    assert sum(form["decoded"] + form["refused"] for form in result["formats"].values()) >= count
    assert kind == "corpus" or all(form["refused"] for form in result["formats"].values())


def test_a_picture_beyond_the_cap_is_a_finding():
    number = CORPUS_FILES.index("png-flat-and-clear.png")
    result = measure(options(cap=128, first=number), "corpus", 1)
    assert result["findings"] == [
        {"finding": number, "file": CORPUS_FILES[number], "what": "AssertionError: beyond the cap"}
    ]


def test_the_same_number_is_the_same_file():
    for files in (pictures(), archives()):
        first = [mutated(files, 5, number) for number in range(200)]
        assert first == [mutated(files, 5, number) for number in range(200)]
        assert sum(content == files[name] for name, content in first) < 20
    assert len({mutated(pictures(), seed, 0)[1] for seed in range(20)}) > 15


@pytest.mark.parametrize("name", CORPUS_FILES)
def test_each_of_the_corpus_is_a_picture_or_an_error(name):
    decoded = [decoder()(source) for source in Inputs([str(CORPUS / name)])]
    assert len(decoded) == (3 if "page-header" in name else 1)
    assert {one.error is None for one in decoded} <= ({True, False} if len(decoded) > 1 else {name in WHOLE})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "F", "I", "I;16"])
def test_large_pictures_are_converted_in_bands_with_the_same_result(mode, monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (90, 70, 4), np.uint8)
    numbers = values.astype(np.int64)[..., 0] * 300
    image = {
        "RGBA": lambda: Image.fromarray(values),
        "LA": lambda: Image.fromarray(values).convert("LA"),
        "F": lambda: Image.fromarray((numbers / 7).astype(np.float32)),
        "I": lambda: Image.fromarray((numbers * 9 - 1_000).astype(np.int32)),
        "I;16": lambda: Image.fromarray(numbers.clip(0, 0xFFFF).astype(np.uint16)),
    }[mode]()
    assert image.mode == mode
    file = io.BytesIO()
    image.save(file, "TIFF")
    whole = np.asarray(read_image(file))
    monkeypatch.setattr("apps.batch.decode._BAND", 7 * 70 + 3)
    np.testing.assert_array_equal(np.asarray(read_image(file)), whole)
    assert len(np.unique(whole)) > 20


def test_a_transparent_picture_takes_little_more_memory_than_its_pixels():
    script = (
        "import sys; from apps.batch.decode import read_image; from benchmarks.machine import peak_mb\n"
        "read_image(open('samples/cat.jpg', 'rb')); before = peak_mb()\n"
        "image = read_image(open(sys.argv[1], 'rb')); print((peak_mb() - before) * 2**20 / image.width / image.height)"
    )
    path = CORPUS / "png-flat-and-clear.png"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, path], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 8  # it took 17 when the whole picture was laid on white at once


def test_a_header_that_lies_does_not_make_room_for_gigabytes(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(b"x" * 3_000_000)
    script = (
        "import resource, sys; from apps.batch.remote import open_file\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "file = open_file(sys.argv[1]); file.seek(10); print(len(file.read(1 << 32)), file.read(1 << 32), file.tell())"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2999990", "b''", "3000000"]
    with open_file(str(path)) as file:
        assert len(file.read()) == 3_000_000


def test_what_libraries_say_is_put_on_one_line_that_can_be_printed():
    assert in_one_line(ValueError("two\nlines,\ta \x0e and a \u2028")) == "two lines, a \\x0e and a"
    assert in_one_line(ValueError("a\u200bb")) == "a\\u200bb"
    assert in_one_line(KeyError()) == "KeyError"
    assert len(in_one_line(ValueError("x" * 5_000))) == 300
