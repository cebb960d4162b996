"""What becomes of pixels, and of files that have none."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import SAMPLES

from apps.batch.decode import Decoder, Framing, image_suffixes, read_image
from apps.batch.sources import Source

FRAMING = Framing((224, 224), 0.875, "center")


def as_bytes(image: Image.Image, form: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return buffer


def timm_decoder(**changes: object) -> Decoder:
    from timm.data.transforms_factory import create_transform

    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, normalize=False)
    return Decoder(**{"transform": transform, "framing": FRAMING, **changes})


def test_pixels_are_those_of_timms_own_transform():
    from timm.data.transforms_factory import create_transform

    own = timm_decoder()(Source(str(SAMPLES / "cat.jpg")))
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875)
    expected = transform(Image.open(SAMPLES / "cat.jpg"))
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close((torch.from_numpy(own.pixels).float() - mean) / std, expected, atol=1e-5, rtol=1e-5)
    assert (own.width, own.height) == (451, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_put_upright(orientation):
    upright = Image.open(SAMPLES / "cat.jpg").resize((60, 40))
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    exif = Image.Exif()
    exif[0x0112] = undo.get(orientation, orientation)
    stored = ImageOps.exif_transpose(Image.open(as_bytes(upright, "PNG", exif=exif)))
    exif[0x0112] = orientation
    back = read_image(as_bytes(stored, "PNG", exif=exif))
    assert back.size == (60, 40)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(upright))


def test_a_damaged_exif_block_does_not_cost_the_picture():
    data = as_bytes(
        Image.open(SAMPLES / "cat.jpg"), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff" + b"\xff" * 40
    )
    assert read_image(data).size == (451, 300)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for form in ("PNG", "TIFF"):
        read = np.asarray(read_image(as_bytes(Image.fromarray(ramp), form)))
        np.testing.assert_array_equal(read, np.repeat((ramp // 257)[..., None], 3, axis=2))


def test_wide_integers_and_floats_span_their_own_range():
    for values in (np.array([[-5.0, 0.0, 5.0]], np.float32), np.array([[0, 500_000, 1_000_000]], np.int32)):
        read = np.asarray(read_image(as_bytes(Image.fromarray(values), "TIFF")))
        assert read[0, :, 0].tolist() == [0, 127, 255]


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    for data in (
        as_bytes(clear, "PNG"),
        as_bytes(clear, "WEBP", lossless=True),
        as_bytes(palette, "PNG", transparency=3),
    ):
        assert np.asarray(read_image(data)).min() == 255
    assert np.asarray(read_image(as_bytes(half, "PNG")))[0, 0].tolist() == [127, 127, 127]


def test_an_animation_stands_for_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(data))[0, 0].tolist() == [255, 0, 0]


def test_cmyk_and_palette_keep_their_colours():
    picture = Image.open(SAMPLES / "coffee.jpg").resize((64, 64))
    for image, form, near in ((picture.convert("CMYK"), "TIFF", 2), (picture.quantize(256), "PNG", 40)):
        read = np.asarray(read_image(as_bytes(image, form)), dtype=int)
        assert np.abs(read - np.asarray(picture)).mean() < near


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 3), (5, 40)])
def test_extreme_shapes_become_ordinary_input(tmp_path, size):
    path = tmp_path / "strip.png"
    Image.new("RGB", size, (10, 200, 30)).save(path)
    for mode in ("center", "squash", "border"):
        from timm.data.transforms_factory import create_transform

        transform = create_transform((3, 224, 224), crop_mode=mode, normalize=False)
        framing = Framing((224, 224), 0.875, mode)
        decoded = timm_decoder(transform=transform, framing=framing, view_size=768)(Source(str(path)))
        assert decoded.error is None and (decoded.width, decoded.height) == size
        assert decoded.pixels.shape == (3, 224, 224)
        assert decoded.pixels[:, 112, 112].tolist() == [10, 200, 30]
        assert max(decoded.view.picture.shape) <= 768


def test_cutting_a_strip_does_not_move_its_middle(tmp_path):
    """The picture of a long strip differs at its ends alone from that of its middle."""
    middle = np.asarray(Image.open(SAMPLES / "cat.jpg").resize((160, 10)))
    Image.fromarray(middle).save(tmp_path / "short.png")
    Image.fromarray(np.pad(middle, ((0, 0), (500, 500), (0, 0)))).save(tmp_path / "long.png")
    short, long = (timm_decoder()(Source(str(tmp_path / f"{name}.png"))) for name in ("short", "long"))
    np.testing.assert_array_equal(short.pixels, long.pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size with hardly any data."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Content that is no whole image, and words of the error it must give."""
    jpeg = (SAMPLES / "cat.jpg").read_bytes()
    png = as_bytes(Image.open(SAMPLES / "cat.jpg"), "PNG").getvalue()
    gif = as_bytes(Image.open(SAMPLES / "cat.jpg").quantize(), "GIF").getvalue()
    webp = as_bytes(Image.open(SAMPLES / "cat.jpg"), "WEBP").getvalue()
    return {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "damaged image"),
        "cut.gif": (gif[: len(gif) // 2], "damaged image"),
        "cut.webp": (webp[: len(webp) // 2], "damaged image"),
        "empty.jpg": (b"", "the file is empty"),
        "text.png": (b"not a picture, for all its name", "not an image in a format that can be read"),
        "bomb.png": (png_header(30_000, 30_000), "too many pixels"),
        "vector.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a format"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_what_is_not_whole_is_an_error_in_words(tmp_path, name):
    data, words = broken_files()[name]
    (tmp_path / name).write_bytes(data)
    decoded = timm_decoder()(Source(str(tmp_path / name), stamp=f"{len(data)}:0"))
    assert decoded.pixels is None and decoded.width is None
    assert words in decoded.error and "\n" not in decoded.error


def test_a_missing_file_is_an_error_in_words(tmp_path):
    assert "No such file" in timm_decoder()(Source(str(tmp_path / "gone.jpg"))).error


def test_suffixes_are_of_pictures():
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".jfif"} <= image_suffixes()
    assert not {".pdf", ".eps", ".mpg", ".h5"} & image_suffixes()


@pytest.mark.parametrize(
    ("mode", "size", "crop_pct"),
    [
        ("center", (224, 224), 0.875),
        ("center", (192, 256), 0.95),
        ("squash", (224, 160), 0.9),
        ("border", (224, 224), 0.9),
    ],
)
def test_framing_says_what_the_network_sees(mode, size, crop_pct):
    """A gradient across the picture, put through timm's transform, begins and ends where the box does."""
    from timm.data.transforms_factory import create_transform

    width, height = 400, 300
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    picture = Image.fromarray(np.stack([x, y, x], axis=2).astype(np.uint8))
    transform = create_transform((3, *size), crop_pct=crop_pct, crop_mode=mode, normalize=False)
    seen = np.asarray(transform(picture)).astype(float)
    left, top, right, bottom = Framing(size, crop_pct, mode).box(width, height)
    columns, rows = seen[0][size[0] // 2], seen[1][:, size[1] // 2]
    assert columns[0] == pytest.approx(left / width * 250, abs=2)
    assert columns[-1] == pytest.approx(right / width * 250, abs=2)
    if mode == "border":  # reaches beyond the picture, which timm fills with a grey
        assert top < 0 and bottom > height and rows[0] == rows[1] == pytest.approx(116, abs=1)
    else:
        assert rows[0] == pytest.approx(top / height * 250, abs=2)
        assert rows[-1] == pytest.approx(bottom / height * 250, abs=2)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_jpeg_gives_nearly_the_same_pixels_and_its_own_size(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = Image.open(SAMPLES / "coffee.jpg").resize((2400, 1600), Image.Resampling.LANCZOS)
    large.save(tmp_path / "large.jpg", quality=90, exif=exif)
    source, decoder = Source(str(tmp_path / "large.jpg")), timm_decoder()
    whole, reduced = decoder(source), decoder.reduced()(source)
    assert (reduced.width, reduced.height) == (whole.width, whole.height)
    assert (whole.width < whole.height) is (orientation == 6)
    assert 0 < np.abs(reduced.pixels.astype(int) - whole.pixels).mean() < 1
    with open(source.path, "rb") as file:
        assert min(read_image(file, decoder.reduced().enough).size) == 800  # half is more than 512, a quarter is less


def test_small_and_broken_files_are_the_same_reduced_or_not(tmp_path):
    reduced = timm_decoder().reduced()
    for name in ("cat.jpg", "rocket.jpg"):
        whole = timm_decoder()(Source(str(SAMPLES / name)))
        np.testing.assert_array_equal(reduced(Source(str(SAMPLES / name))).pixels, whole.pixels)
    data = (SAMPLES / "cat.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    assert "truncated" in reduced(Source(str(tmp_path / "cut.jpg"))).error
