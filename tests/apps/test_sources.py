"""Which files a command line means, in which order, and what stands in for those that cannot be read."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from apps.batch.listing import expand_glob, glob_matches, sorted_names
from apps.batch.sources import Inputs, decode_path, encode_path
from apps.errors import UsageError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b/2.jpg", "b/10.PNG", "b/c/deep.webp", "a.jpeg", "notes.txt", "z.jpg", ".hidden/x.jpg"):
        path = tmp_path / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "top"


def names(*arguments: str, **options: object) -> list[str]:
    return [source.name for source in Inputs(arguments, **options)]


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_folder_is_walked_in_order(tree):
    assert names("top") == [
        "top/.hidden/x.jpg",
        "top/a.jpeg",
        "top/b/10.PNG",
        "top/b/2.jpg",
        "top/b/c/deep.webp",
        "top/z.jpg",
    ]
    assert names("top", recursive=False) == ["top/a.jpeg", "top/z.jpg"]
    assert names("top", pattern="*.txt") == ["top/notes.txt"]
    assert names("top", limit=2) == ["top/.hidden/x.jpg", "top/a.jpeg"]
    assert names("top/notes.txt", "top/a.jpeg") == ["top/notes.txt", "top/a.jpeg"], "what is named is taken"


def test_patterns_match_as_in_a_shell(tree):
    assert names("top/*.jp*g") == ["top/a.jpeg", "top/z.jpg"]
    assert names("top/**/*.jpg") == ["top/z.jpg", "top/b/2.jpg"]
    assert names("top/[a-m]") == names("top/b"), "a folder that matches is walked"
    assert names("top/?/*.PNG") == ["top/b/10.PNG"]
    assert names("top/b*") == ["top/b/10.PNG", "top/b/2.jpg", "top/b/c/deep.webp"]
    for pattern in ("top/*.jp*g", "top/**/*.jpg", "top/?/*.PNG", "top/.h*/*"):
        for found in expand_glob(pattern):
            assert glob_matches(os.path.abspath(found.path), os.path.abspath(pattern))
    assert not glob_matches("/top/.hidden/x.jpg", "/top/*/x.jpg")


def test_a_name_with_brackets_is_a_file_first(tree):
    (tree / "[1].jpg").write_bytes(b"x")
    assert names("top/[1].jpg") == ["top/[1].jpg"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("top", "top"),
        ("top", "./top"),
        ("top", "top/b"),
        ("top", "top/b/2.jpg"),
        ("top", "top/*/*.jpg"),
        ("top/b", "top"),
    ],
)
def test_inputs_named_twice_are_taken_once(tree, arguments):
    notes = []
    inputs = Inputs(arguments, note=notes.append)
    found = [os.path.normpath(source.name) for source in inputs]
    assert sorted(found) == sorted(set(names("top"))) and len(found) == 6
    list(inputs)
    assert len(notes) == 1 and "processed once" in notes[0]


def test_patterns_cover_what_is_named_after_them(tree):
    notes = []
    inputs = Inputs(("top/*.jpeg", "top/a.jpeg", "top/z.jpg"), note=notes.append)
    assert [source.name for source in inputs] == ["top/a.jpeg", "top/z.jpg"]
    assert notes == ["top/a.jpeg: 1 inputs were named before and are processed once"]


def test_links_are_followed_but_not_in_circles(tree):
    (tree / "b/up").symlink_to(tree)
    (tree / "b/side").symlink_to(tree / "b/c")
    (tree / "self.jpg").symlink_to(tree / "self.jpg")
    (tree / "gone.jpg").symlink_to("nowhere.jpg")
    by_name = {source.name: source.error for source in Inputs(["top"])}
    assert by_name["top/b/side/deep.webp"] is None
    assert by_name["top/b/up"] == "symbolic link loop: leads back to top"
    assert by_name["top/self.jpg"].startswith("symbolic link loop")
    assert by_name["top/gone.jpg"] == "broken symbolic link: leads to nowhere.jpg"


def test_special_files_do_not_hang(tree):
    os.mkfifo(tree / "pipe.jpg")
    assert {s.name: s.error for s in Inputs(["top"])}["top/pipe.jpg"] == "not a regular file"


def test_order_is_kept_beyond_one_chunk(tmp_path):
    expected = []
    for index in range(257):
        name = f"{(index * 7919) % 10007:05d}".encode() + (
            b"\xff" if index % 5 == 0 else b"\n" if index % 7 == 0 else b""
        )
        (tmp_path / os.fsdecode(name)).touch()
        expected.append((name, False))
    (tmp_path / "folder").mkdir()
    expected.append((b"folder", True))
    for chunk in (1, 10, 64, 257, 258, 1000):
        assert list(sorted_names(str(tmp_path), chunk)) == sorted(expected)


def test_memory_does_not_grow_with_a_folder(tmp_path):
    peaks = {}
    for count in (4_000, 40_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for index in range(count):
            os.mknod(folder / f"a-name-as-long-as-names-are-{index:08d}.jpg")
        tracemalloc.start()
        assert sum(1 for _ in sorted_names(str(folder), 2_000)) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[40_000] < 1.8 * peaks[4_000] < 4_000_000


def test_members_of_an_archive_are_found_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"a.jpg": b"first", "a.cls": b"7", "d/b.PNG": b"second" * 200, "d/b.json": b"{}", "ü.webp": b""}
    make_tar(tmp_path / "s.tar", content)
    sources = list(Inputs(["s.tar"]))
    assert [s.name for s in sources] == ["s.tar::a.jpg", "s.tar::d/b.PNG", "s.tar::ü.webp"]
    raw = (tmp_path / "s.tar").read_bytes()
    assert [raw[s.offset : s.offset + s.size] for s in sources] == [b"first", b"second" * 200, b""]
    assert names(".", pattern="*.json") == ["./s.tar::d/b.json"]


def test_nothing_in_an_archive_is_lost_in_silence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tar(tmp_path / "whole.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(4)})
    raw = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(raw[: 3 * 1536 + 600])
    (tmp_path / "mid.tar").write_bytes(raw[:1536] + b"\x01" * 512 + raw[2048:])
    (tmp_path / "text.tar").write_text("no archive at all " * 100)
    (tmp_path / "none.tar").touch()
    for name, whole_members in {"cut.tar": 4, "mid.tar": 1, "text.tar": 0, "none.tar": 0}.items():
        *members, last = Inputs([name])
        assert len(members) == whole_members and all(m.error is None for m in members), name
        assert last.name == name and "cannot read this archive" in last.error


def test_links_in_an_archive_are_errors(tmp_path):
    with tarfile.open(tmp_path / "l.tar", "w") as archive:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (source,) = Inputs([str(tmp_path / "l.tar")])
    assert "link" in source.error


def test_stamps_change_with_content(tree):
    before = {s.name: s.stamp for s in Inputs(["top"])}
    os.utime(tree / "z.jpg", ns=(1, 1))
    after = {s.name: s.stamp for s in Inputs(["top"])}
    assert {name for name in before if before[name] != after[name]} == {"top/z.jpg"}


@pytest.mark.parametrize(
    "raw",
    [b"plain.jpg", b"new\nline.jpg", b"back\\slash", b"\xff\xfe.jpg", "ü €.jpg".encode(), b"\\xff", b"a\x7f\t"],
)
def test_names_survive_rows(raw):
    path = os.fsdecode(raw)
    text = encode_path(path)
    assert "\n" not in text and text.encode("utf-8") and os.fsencode(decode_path(text)) == raw
    assert (text == path) == (raw in (b"plain.jpg", "ü €.jpg".encode()))


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("missing",), {}, "does not exist"),
        (("top/*.tiff",), {}, "no file matches"),
        (("top/empty",), {}, "found no images"),
        (("top",), {"pattern": "*.xyz"}, "'*.xyz'"),
        (("s.tar.gz",), {}, "compressed"),
    ],
)
def test_what_leads_nowhere_is_said_at_once(tree, arguments, options, words):
    (tree / "empty").mkdir()
    (tree.parent / "s.tar.gz").touch()
    with pytest.raises(UsageError, match=words.replace("*", r"\*")):
        Inputs(arguments, **options).check()


def test_the_root_holds_every_input(tree):
    root = str(tree.parent)
    assert Inputs(["top"]).root == f"{root}/top"
    assert Inputs(["top/a.jpeg"]).root == f"{root}/top"
    assert Inputs(["top/b", "top/z.jpg"]).root == f"{root}/top"
    assert Inputs(["top/b/**/*.webp"]).root == f"{root}/top/b"
    assert Inputs(["top", "/"]).root == "/"
