"""Files that are broken on purpose, by seed: small pictures in many formats, tar archives and Parquet, changed.

Number N of seed S is the same bytes wherever the same versions of Pillow and pyarrow write the whole files that are
changed here.
"""

from __future__ import annotations

import functools
import io
import struct
import tarfile
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["archives", "mutated", "pictures"]

_WIDTH, _HEIGHT = 64, 48
_HEADER = 200  # in most formats everything that tells what follows stands before this byte
_ODD_16 = (0, 1, 0x7F, 0xFF, 0x100, 0x32C8, 0x7FFF, 0x8000, 0xFFFF)
_ODD_32 = (0, 1, 0xFF, 0x3400, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@functools.cache
def pictures() -> dict[str, bytes]:
    """Small whole files by a name such as `jpeg-progressive`; what stands before the dash is the format."""
    across, down = np.meshgrid(np.linspace(0, 255, _WIDTH), np.linspace(0, 255, _HEIGHT))
    noise = np.random.default_rng(0).integers(0, 64, (_HEIGHT, _WIDTH))
    colour = Image.fromarray(np.stack([across, down, (across + noise) / 2], 2).astype(np.uint8))
    grey, clear = colour.convert("L"), colour.copy()
    clear.putalpha(grey)
    palette = colour.quantize(32)
    wide = Image.fromarray((across * 257).astype(np.uint16))
    frames = [colour.rotate(angle) for angle in (0, 90, 180)]
    files = {
        **_jpegs(colour),
        **_pngs(colour, grey, clear, palette, wide, frames),
        **_tiffs(colour, grey, clear, palette, wide, frames),
        "webp-lossy": _saved(colour, "WEBP", quality=60),
        "webp-lossless": _saved(colour, "WEBP", lossless=True),
        "webp-alpha": _saved(clear, "WEBP", exif=_turned().tobytes()),
        "webp-animated": _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "gif-plain": _saved(palette, "GIF", interlace=0),
        "gif-interlaced": _saved(palette, "GIF", interlace=1, comment=b"seed"),
        "gif-animated": _saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0),
        "gif-clear": _saved(palette, "GIF", transparency=3),
    }
    files["ico-plain"] = _saved(colour, "ICO", sizes=[(_WIDTH, _HEIGHT), (16, 12)])
    inside = _saved(colour.resize((_WIDTH, _WIDTH)), "PNG")
    files["icns-plain"] = struct.pack(">4sI4sI", b"icns", 16 + len(inside), b"icp6", 8 + len(inside)) + inside
    for form in ("BMP", "PPM", "TGA", "PCX", "SGI", "QOI", "DDS", "JPEG2000", "AVIF", "IM", "MPO"):
        if form in Image.SAVE:
            files[f"{form.lower()}-plain"] = _saved(colour, form)
    return files


@functools.cache
def archives() -> dict[str, bytes]:
    """A tar archive and a Parquet file of three pictures each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = [pictures()[name] for name in ("jpeg-plain", "png-plain", "webp-lossy")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, content in enumerate(chosen):
            member = tarfile.TarInfo(f"{'deep/' * 30 * (number == 1)}{number}.jpg")  # the second has a long name
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    files = {"tar-plain": buffer.getvalue()}
    columns = {"image": chosen, "label": [1, 2, 3]}
    structs = {"image": [{"bytes": content, "path": None} for content in chosen]}
    for name, table in (("bytes", pa.table(columns)), ("structs", pa.table(structs))):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=2)
        files[f"parquet-{name}"] = buffer.getvalue()
    return files


def mutated(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """One changed file.

    Args:
        files: Whole ones by name, such as `pictures()`.
        seed: Of the whole series.
        number: Which of the series.

    Returns:
        The name of the file that was changed, and what became of it.
    """
    random = np.random.default_rng((seed, number))
    names = sorted(files)
    name = names[number % len(names)]
    content = bytearray(files[name])
    for _ in range(1 + random.integers(0, 4)):
        change = _CHANGES[random.choice(len(_CHANGES), p=_WEIGHTS)]
        content = change(random, content, files[names[random.integers(len(names))]])
    # Otherwise a decoder of PNG looks no further than the sum of the first chunk.
    return name, _with_sums(content) if name.startswith("png") and random.random() < 0.8 else bytes(content)


def _flip_bits(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    for _ in range(1 + random.integers(0, 8)):
        if content:
            content[_place(random, content)] ^= 1 << int(random.integers(8))
    return content


def _set_bytes(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    start, count = _place(random, content), int(random.integers(1, 5))
    content[start : start + count] = bytes([random.choice((0, 0x7F, 0x80, 0xFF))]) * count
    return content


def _set_number(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    """A length, a count or a side becomes another one, in either order of bytes."""
    start, order = _place(random, content), random.choice(("<", ">"))
    if random.random() < 0.5:
        content[start : start + 2] = struct.pack(f"{order}H", random.choice(_ODD_16))
    else:
        content[start : start + 4] = struct.pack(f"{order}I", random.choice(_ODD_32))
    return content


def _cut(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    return content[: random.integers(len(content) + 1)]


def _remove(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    start = _place(random, content)
    del content[start : start + int(random.integers(1, 64))]
    return content


def _repeat(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    start, count = _place(random, content), int(random.integers(1, 200))
    content[start:start] = content[start : start + count] * int(random.integers(1, 4))
    return content


def _insert(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    start = _place(random, content)
    content[start:start] = random.bytes(int(random.integers(1, 32)))
    return content


def _splice(random: np.random.Generator, content: bytearray, other: bytes) -> bytearray:
    """The beginning of one file and the end of another."""
    return content[: random.integers(len(content) + 1)] + other[random.integers(len(other)) :]


_CHANGES = (_flip_bits, _set_bytes, _set_number, _cut, _remove, _repeat, _insert, _splice)
_WEIGHTS = (0.25, 0.15, 0.25, 0.07, 0.08, 0.08, 0.06, 0.06)


def _place(random: np.random.Generator, content: Sequence[int]) -> int:
    """Mostly in the header, else anywhere; a tenth of the time near the end, where some formats keep theirs."""
    kind = random.random()
    if not content:
        return 0
    if kind < 0.1:
        return max(0, len(content) - 1 - int(random.integers(_HEADER)))
    return int(random.integers(min(_HEADER, len(content)) if kind < 0.75 else len(content)))


def _with_sums(content: bytearray) -> bytes:
    """A PNG whose chunks, as far as they can be followed, have the check sums that they should have."""
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(content)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    return exif


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _jpegs(colour: Image.Image) -> dict[str, bytes]:
    return {
        "jpeg-plain": _saved(colour, "JPEG", quality=80),
        "jpeg-progressive": _saved(colour, "JPEG", progressive=True),
        "jpeg-cmyk": _saved(colour.convert("CMYK"), "JPEG"),
        "jpeg-grey": _saved(colour.convert("L"), "JPEG"),
        "jpeg-turned": _saved(colour, "JPEG", exif=_turned().tobytes(), dpi=(72, 72)),
        "jpeg-restarts": _saved(colour, "JPEG", restart_marker_blocks=2, subsampling=0),
        "jpeg-profile": _saved(colour, "JPEG", icc_profile=bytes(range(256)), comment=b"seed"),
    }


def _pngs(
    colour: Image.Image,
    grey: Image.Image,
    clear: Image.Image,
    palette: Image.Image,
    wide: Image.Image,
    frames: list[Image.Image],
) -> dict[str, bytes]:
    texts = PngInfo()
    texts.add_text("packed", "text " * 40, zip=True)
    texts.add_itxt("wide", "text", "en", "wide", zip=True)
    return {
        "png-plain": _saved(colour, "PNG"),
        "png-palette": _saved(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "png-grey16": _saved(wide, "PNG"),
        "png-bits": _saved(grey.convert("1"), "PNG"),
        "png-clear": _saved(clear, "PNG", exif=_turned().tobytes()),
        "png-key": _saved(colour, "PNG", transparency=(0, 0, 16)),
        "png-animated": _saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "png-texts": _saved(colour, "PNG", pnginfo=texts, icc_profile=bytes(range(256))),
        "png-interlaced": _interlaced(grey),
    }


def _interlaced(grey: Image.Image) -> bytes:
    """Pillow writes no interlaced PNG: Adam7's seven passes over a grey picture."""
    values, lines = np.asarray(grey), []
    for top, left, down, across in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1),
    ):  # fmt: skip
        lines += [b"\0" + line.tobytes() for line in values[top::down, left::across]]
    header = struct.pack(">IIBBBBB", grey.width, grey.height, 8, 0, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    bare = b"".join(struct.pack(">I", len(body)) + kind + body + bytes(4) for kind, body in chunks)
    return _with_sums(bytearray(b"\x89PNG\r\n\x1a\n" + bare))


def _tiffs(
    colour: Image.Image,
    grey: Image.Image,
    clear: Image.Image,
    palette: Image.Image,
    wide: Image.Image,
    frames: list[Image.Image],
) -> dict[str, bytes]:
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 7)
    return {
        "tiff-plain": _saved(colour, "TIFF"),
        "tiff-lzw": _saved(colour, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": _saved(clear, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-packbits": _saved(palette, "TIFF", compression="packbits"),
        "tiff-jpeg": _saved(colour, "TIFF", compression="jpeg"),
        "tiff-fax": _saved(grey.convert("1"), "TIFF", compression="group4"),
        "tiff-float": _saved(floats, "TIFF", compression="tiff_lzw"),
        "tiff-wide": _saved(wide, "TIFF", big_tiff=True),
        "tiff-pages": _saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "tiff-tiled": _tiled(grey),
        "tiff-cmyk": _saved(colour.convert("CMYK"), "TIFF", exif=_turned()),
    }


def _tiled(grey: Image.Image) -> bytes:
    """Pillow writes no tiled TIFF: a grey picture in tiles of 16 pixels, which are not compressed."""
    values, side = np.asarray(grey), 16
    corners = [(top, left) for top in range(0, grey.height, side) for left in range(0, grey.width, side)]
    tiles = [values[top : top + side, left : left + side].tobytes() for top, left in corners]
    count, size, tags = len(tiles), side * side, 10
    begin = 8 + 2 + 12 * tags + 4  # of the table of offsets; that of sizes and the tiles follow
    offsets = [begin + 8 * count + index * size for index in range(count)]
    fields = (
        (256, grey.width), (257, grey.height), (258, 8), (259, 1), (262, 1), (277, 1), (322, side), (323, side),
    )  # fmt: skip
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields]
    entries += [struct.pack("<HHII", 324, 4, count, begin), struct.pack("<HHII", 325, 4, count, begin + 4 * count)]
    table = struct.pack(f"<{2 * count}I", *offsets, *[size] * count)
    return b"II*\0" + struct.pack("<IH", 8, tags) + b"".join(entries) + bytes(4) + table + b"".join(tiles)
