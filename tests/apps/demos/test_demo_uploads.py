"""Pictures and names that visitors give to the demos: what is taken, and what is said of the rest."""

from __future__ import annotations

import io
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="pip install 'attnsuite[demo]'")

import gradio as gr

from apps.batch.decode import Unreadable
from apps.demos.host import Host, Settings, said
from apps.demos.uploads import chosen, read_upload, samples
from apps.errors import UsageError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def saved(path: Path, **options: Any) -> str:
    Image.fromarray(NOISE).save(path, **options)
    return str(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_pictures_are_read(tmp_path: Path, suffix: str):
    picture = read_upload(saved(tmp_path / f"picture{suffix}"), Settings())
    assert picture.size == (32, 24) and picture.mode == "RGB"


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 6
    assert read_upload(saved(tmp_path / "turned.jpg", exif=exif), Settings()).size == (24, 32)


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour and few bytes, whose header says how large it is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


def refused(path: Path, words: str, content: bytes | None = None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Unreadable, match=words):
        read_upload(str(path), Settings(max_megabytes=1))


def test_what_cannot_be_taken_is_told_apart(tmp_path: Path):
    refused(tmp_path / "large.png", "× 7000 pixels: at most 50 megapixels", bomb(8572, 7000))
    refused(tmp_path / "bomb.png", "at most 50 megapixels", bomb(200_000, 200_000))
    refused(tmp_path / "heavy.png", "more than 1 MB", b"\x89PNG" + b"x" * 1_100_000)
    refused(tmp_path / "text.png", "no picture that can be read: expected .*.png", b"<svg onload=alert(1)>")
    refused(tmp_path / "nothing.png", "no picture", b"")
    refused(tmp_path / "gone.png", "no longer here")
    whole = io.BytesIO()
    Image.fromarray(NOISE).save(whole, "PNG")
    refused(tmp_path / "half.png", "damaged|truncated", whole.getvalue()[:900])
    frames = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    refused(tmp_path / "moving.gif", "an animation")
    with pytest.raises(Unreadable, match="no picture yet"):
        read_upload(None, Settings())


def test_no_bytes_end_in_anything_but_words(tmp_path: Path):
    """Pictures with bytes turned over, seeded: read, or refused as `Unreadable`."""
    path = tmp_path / "broken"
    for number, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM")):
        content = io.BytesIO()
        Image.fromarray(NOISE).save(content, kind)
        drawn = random.Random(number)
        for _ in range(25):
            broken = bytearray(content.getvalue())
            for _ in range(drawn.randint(1, 12)):
                broken[drawn.randrange(min(len(broken), 200))] = drawn.randrange(256)
            path.write_bytes(broken[: drawn.randint(1, len(broken))] if drawn.random() < 0.3 else broken)
            try:
                assert read_upload(str(path), Settings()).mode == "RGB"
            except Unreadable as error:
                assert str(error)


def test_samples_are_chosen_by_name_and_by_nothing_else():
    name = next(iter(samples("photographs")))
    assert chosen("/not/looked/at", name, "photographs", Settings()).mode == "RGB"
    for wrong in ("../scenes/x", "/etc/passwd", name + "\0", "<b>"):
        with pytest.raises(Unreadable, match="there is no sample"):
            chosen(None, wrong, "photographs", Settings())


WRONG_NAMES = [
    "../..", "..", "/etc/passwd", "a/b", "a\\b", "hf-hub:someone/something", "timm/resnet18", "local-dir:/tmp",
    "LOCAL-DIR:/tmp", "http://127.0.0.1/x", "https://example.org/m.safetensors", "file:///etc/passwd", "s3://b/k",
    "C:\\models\\m.bin", "hf_hub:a", "\0", "a\0b", "x" * 10_000, "<img src=x onerror=alert(1)>", "модель", "🙂", "%s%n",
    "${HOME}", "$(id)", "model.pt", "model.pkl", "a\nb", "*", "bif*", "[a-z]", ".", "-", "os.system('id')",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG_NAMES, ids=range(len(WRONG_NAMES)))
def test_a_name_leads_to_a_registered_model_or_nowhere(name: str, monkeypatch: pytest.MonkeyPatch):
    from apps.models import ModelChoice, resolve

    def touched(*given: Any, **named: Any) -> Any:
        raise AssertionError(f"{name!r} was opened")

    monkeypatch.setattr("torch.load", touched)
    monkeypatch.setattr("timm.create_model", touched)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", touched)
    with pytest.raises(UsageError) as raised:
        resolve(ModelChoice(Host(Settings()).check_model(name)))
    assert len(str(raised.value)) < 500


def test_only_the_owner_opens_folders():
    folder = "local-dir:/models/mine"
    assert Host(Settings(allow_local=True)).check_model(f" {folder} ") == folder
    assert Host(Settings(model=folder)).check_model(folder) == folder
    with pytest.raises(UsageError, match="without --allow-local"):
        Host(Settings(model=folder)).check_model("local-dir:/models/other")
    with pytest.raises(UsageError, match="not an address"):
        Host(Settings(allow_local=True)).check_model("hf-hub:a/b")
    with pytest.raises(UsageError, match="no model is chosen"):
        Host().check_model("  ")


def test_a_folder_with_a_program_in_its_weights_is_refused(tmp_path: Path):
    import pickle

    from apps.models import ModelChoice, resolve

    class Program:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "it ran",))

    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {}}')
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"conv1.weight": Program()}))
    name = Host(Settings(allow_local=True)).check_model(f"local-dir:{tmp_path}")
    with pytest.raises(gr.Error), said():
        resolve(ModelChoice(name)).load(lambda got, total: None)
    assert not (tmp_path / "it ran").exists()


def test_what_is_said_cannot_be_a_page():
    for error in (UsageError("<img src=x onerror=alert(1)>"), Unreadable("<b>&\"'"), RuntimeError("out of memory <b>")):
        with pytest.raises(gr.Error) as raised, said():
            raise error
        assert "<" not in raised.value.message and "<" not in str(raised.value.title)


def test_pages_are_drawn_without_the_libraries_of_models():
    import subprocess

    program = (
        "import sys; from apps.demos.home import build; from apps.demos.host import Host; build(Host());"
        "heavy = {'torch', 'timm', 'transformers', 'diffusers', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-500:]
