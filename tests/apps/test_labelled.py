"""Labelled pictures are found in folders, lists and shards alike, and what is wrong with them is said."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.batch.decode import read_source
from apps.errors import UsageError
from apps.labelled import Labelled, find, splits, unreadable


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, *names: str) -> Path:
    """Pictures of those names, each with a shade of its own."""
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(shade))
    return folder


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def named(data: Labelled) -> list[tuple[str, str]]:
    """Name and class of each picture."""
    return [
        (Path(source.member or source.path).name, data.classes[target])
        for source, target in zip(data.sources, data.targets, strict=True)
    ]


def shades(data: Labelled) -> list[int]:
    return [int(np.asarray(read_source(source))[0, 0, 0]) for source in data.sources]


def test_a_folder_for_each_class(tmp_path):
    put(tmp_path, "b10/0.png", "b2/1.png", "b2/2020/2.png", "a/3.png", ".hidden/4.png")
    data = find(str(tmp_path))
    assert data.classes == ("a", "b2", "b10")  # numbers by value
    assert named(data) == [("3.png", "a"), ("0.png", "b10"), ("1.png", "b2"), ("2.png", "b2")]
    assert data.counts() == [1, 2, 1] and find(str(tmp_path)) == data
    assert splits(str(tmp_path)) == ()


def test_folders_of_parts_by_their_usual_names(tmp_path):
    put(tmp_path, "training/a/0.png", "training/b/1.png", "validation/b/2.png")
    assert splits(str(tmp_path)) == ("train", "val")
    assert named(find(str(tmp_path), "train")) == [("0.png", "a"), ("1.png", "b")]
    assert named(find(str(tmp_path), "val")) == [("2.png", "b")]
    with pytest.raises(UsageError, match="divided into train, val"):
        find(str(tmp_path))
    with pytest.raises(UsageError, match="no part 'test': expected a folder test/"):
        find(str(tmp_path), "test")


def test_a_list(tmp_path):
    put(tmp_path, "x/0.png", "x/1.png", "x/2.png")
    (tmp_path / "all.csv").write_text("path,label,split\nx/0.png,a,train\nx/1.png,b,training\nx/2.png,b,valid\n")
    data = str(tmp_path / "all.csv")
    assert splits(data) == ("train", "val")
    assert named(find(data, "train")) == [("0.png", "a"), ("1.png", "b")]
    assert shades(find(data, "val")) == [2]
    with pytest.raises(UsageError, match="divided into train, val"):
        find(data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\nx,a\n", "no column path"),
        ("path,label\nx/0.png,\n", "line 2: label is empty"),
        ("path,label\nx/0.png,a\nx/0.png,b\n", "line 3: 'x/0.png' stands in line 2 already"),
        ("path,label,split\nx/0.png,a,tain\n", "line 2: split 'tain'"),
        ("path,label\n", "found no labelled pictures"),
        ("path,label\n\xff\xfe", "cannot be read as CSV"),
    ],
)
def test_mistakes_in_a_list_are_said_with_their_line(tmp_path, text, said):
    (tmp_path / "all.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=said):
        find(str(tmp_path / "all.csv"))


def test_a_picture_that_a_list_names_and_that_is_not_there_is_unreadable(tmp_path):
    put(tmp_path, "0.png")
    (tmp_path / "all.csv").write_text("path,label\n0.png,a\n1.png,b\n")
    failed = unreadable(find(str(tmp_path / "all.csv")), workers=0)
    assert failed == {str(tmp_path / "1.png"): "cannot open this file: No such file or directory"}


def test_shards_with_numbers_and_names_for_them(tmp_path):
    members = {"s/0.png": png(7), "s/0.cls": b"1", "s/1.seg.png": png(8), "s/1.json": b'{"label": 0}'}
    members["s/1.png"] = png(9)
    shard(tmp_path / "set-train-000.tar", members)
    shard(tmp_path / "set-val-000.tar", {"0.png": png(3), "0.cls": b"1"})
    data = find(str(tmp_path), "train")
    assert splits(str(tmp_path)) == ("train", "val")
    assert named(data) == [("0.png", "1"), ("1.png", "0")] and shades(data) == [7, 9]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert named(find(str(tmp_path), "train")) == [("0.png", "dog"), ("1.png", "cat")]
    assert named(find(str(tmp_path / "*val*.tar"))) == [("0.png", "dog")]
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(UsageError, match="names 1 classes, but there is a label 1"):
        find(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"0.png": png(0)}, "1 pictures have no label"),
        ({"0.cls": b"1"}, "1 labels have no picture, such as 0"),
        ({"0.png": png(0), "0.json": json.dumps({"text": "a cat"}).encode()}, "holds no label"),
        ({"0.png": png(0), "0.json": b"{"}, "is no label"),
    ],
)
def test_shards_that_do_not_fit_together(tmp_path, members, said):
    with pytest.raises(UsageError, match=said):
        find(str(shard(tmp_path / "x.tar", members)))


def test_folders_that_do_not_fit_together(tmp_path):
    with pytest.raises(UsageError, match="found no labelled pictures"):
        find(str(tmp_path))
    put(tmp_path, "a/0.png", "1.png")
    with pytest.raises(UsageError, match=r"1 pictures lie in no class, such as .*1\.png"):
        find(str(tmp_path))
    (tmp_path / "1.png").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="class 'b' has no pictures"):
        find(str(tmp_path))
    with pytest.raises(UsageError, match="does not exist"):
        find(str(tmp_path / "nowhere"))


def test_classes_are_numbered_as_in_another_list(tmp_path):
    data = find(str(put(tmp_path, "a/0.png", "b/1.png")))
    assert named(data.numbered(["b", "c", "a"], "the model")) == named(data)
    assert data.numbered(["b", "c", "a"], "the model").targets == (2, 0)
    with pytest.raises(UsageError, match="1 of 2 classes that the model does not know: 'b'; it knows 'a', 'c'"):
        data.numbered(["a", "c"], "the model")


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pictures_are_found_and_told_why(tmp_path, workers):
    put(tmp_path, *(f"a/{index}.png" for index in range(70)))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a/cut.jpg")
    (tmp_path / "a/cut.jpg").write_bytes((tmp_path / "a/cut.jpg").read_bytes()[:1500])
    (tmp_path / "a/empty.png").write_bytes(b"")
    read: list[int] = []
    failed = unreadable(find(str(tmp_path)), workers, read.append)
    assert sum(read) == 72
    assert failed.keys() == {str(tmp_path / "a/cut.jpg"), str(tmp_path / "a/empty.png")}
    assert failed[str(tmp_path / "a/empty.png")] == "the file is empty"
    assert "damaged image" in failed[str(tmp_path / "a/cut.jpg")]
