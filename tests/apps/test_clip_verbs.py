"""`classify --labels`, `embed --clip` and `search`: rows that open_clip itself would give, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import SAMPLES
from test_bad_input import read_rows
from tiny_clip import CONFIG, save
from typer.testing import CliRunner

from apps.cli import app
from apps.clip.choice import ClipChoice, is_same
from apps.clip.search import Ranking

LABELS = ("cat", "a red car", "dog")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CLIPs, one that pads pictures, and things that are none."""
    folder = tmp_path_factory.mktemp("zoo")
    save(folder / "clip")
    save(folder / "other", seed=1)
    save(folder / "padding", resize_mode="longest", fill_color=77)
    save(folder / "bare")
    os.unlink(folder / "bare/open_clip_model.safetensors")
    save(folder / "cut")
    os.truncate(folder / "cut/open_clip_model.safetensors", 5000)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def command(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a verb in `tmp_path`, where the CLIPs are and `in` holds the sample photographs."""
    monkeypatch.chdir(tmp_path)
    for name in os.listdir(zoo):
        (tmp_path / name).symlink_to(zoo / name)
    (tmp_path / "in").symlink_to(SAMPLES)

    def invoke(*arguments: object, code: int = 0) -> Any:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == code, (done.stderr, done.stdout, done.exception)
        return done

    return invoke


@pytest.fixture
def published(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """open_clip with one more name, whose weights are on this machine."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", CONFIG)
    file = str(zoo / "clip/open_clip_model.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"made": {"file": file, "mean": [0.5] * 3}})
    return "ViT-tiny:made"


def reference(folder: Path, texts: list[str], templates: list[Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Image features `[N, D]`, text features `[D, K]` and the scale, by open_clip's own transform and calls."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}", return_transform=True)
    model.eval()
    pictures = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
        classes = open_clip.build_zero_shot_classifier(model, open_clip.tokenize, texts, templates)
        return images, classes, model.logit_scale.exp().item()


@pytest.mark.parametrize("folder", ["clip", "padding"])
@pytest.mark.parametrize("templates", [(), ("a photo of a {}", "{} in a picture")])
def test_labels_in_words_are_those_of_open_clips_zero_shot_classifier(command, zoo, folder, templates):
    flags = [word for template in templates for word in ("--template", template)]
    done = command(
        "classify", "in", "--labels", ", ".join(LABELS), "--clip-checkpoint", folder, "--json", "--workers", 0, *flags
    )
    sentences = list(templates) or open_clip.OPENAI_IMAGENET_TEMPLATES
    images, classes, scale = reference(zoo / folder, list(LABELS), sentences)
    expected, order = (scale * images @ classes).softmax(-1).sort(-1, descending=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [[row[f"label_{k}"] for k in (1, 2, 3)] for row in rows] == [[LABELS[i] for i in line] for line in order]
    found = torch.tensor([[row[f"prob_{k}"] for k in (1, 2, 3)] for row in rows])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)  # logits are cosines times 14
    assert all(row["model"].startswith(f"clip:{folder}@") and row["width"] for row in rows)


def test_another_runtime_gives_the_same_rows(command):
    options = ("--labels", ", ".join(LABELS), "--clip-checkpoint", "clip", "--json", "--workers", 0, "--batch-size", 5)
    one, other = (
        [json.loads(line) for line in command("classify", "in", *options, "--runtime", runtime).stdout.splitlines()]
        for runtime in ("torch", "onnx")
    )
    assert [row["label_1"] for row in one] == [row["label_1"] for row in other]
    assert [row["prob_1"] for row in one] == pytest.approx([row["prob_1"] for row in other], abs=1e-5)


def test_text_features_are_computed_once_a_run(command, tmp_path, monkeypatch):
    calls = []
    real = open_clip.build_zero_shot_classifier
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", lambda *a, **k: calls.append(a[2]) or real(*a, **k))
    command("classify", "in", "--labels", "cat,dog", "--clip-checkpoint", "clip", "--batch-size", 1, "--workers", 0)
    assert calls == [("cat", "dog")]


def test_zero_shot_rows_obey_the_rules_of_rows(command, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(SAMPLES / "cat.jpg", tmp_path / "mine/a.jpg")
    (tmp_path / "mine/b.jpg").touch()
    (tmp_path / "words.txt").write_text("cat\n\ndog, wet\n", encoding="utf-8")
    line = ("classify", "mine", "--labels", "@words.txt", "--clip-checkpoint", "clip", "-o", "o.csv", "--top-k", 1)
    assert "1 ok, 1 failed" in command(*line, code=1).stderr
    good, bad = read_rows(tmp_path / "o.csv")
    assert good["label_1"] in ("cat", "dog, wet") and bad["error"] == "the file is empty"
    assert "nothing to do" in command(*line, code=1).stderr
    (tmp_path / "words.txt").write_text("cat\nbird\n", encoding="utf-8")
    assert "labels was ['cat', 'dog, wet'], is ['cat', 'bird']" in command(*line, code=2).stderr
    other = [word.replace("clip", "other") if word == "clip" else word for word in map(str, line)]
    assert "weights was" in command(*other, code=2).stderr


def test_a_published_clip_is_named_by_its_tag(command, published):
    flags = ("--limit", 1, "--workers", 0, "--json")
    done = command("classify", "in", "--labels", "cat, dog", "--clip", published, *flags)
    assert json.loads(done.stdout)["model"] == f"clip:{published}"
    file = "clip/open_clip_model.safetensors"
    done = command("embed", "in", "--clip", f"ViT-tiny:{file}", *flags)
    assert json.loads(done.stdout)["model"].startswith("clip:ViT-tiny:open_clip_model.safetensors@")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_search_ranks_saved_features_as_the_pictures_themselves(command, zoo, tmp_path, suffix):
    command("embed", "in", "--clip-checkpoint", "clip", "-o", f"f.{suffix}", "--workers", 0)
    queries = ["a red car", "a cat"]
    flags = ("-q", queries[0], "-q", queries[1], "--clip-checkpoint", "clip", "--json", "--top-k", 3)
    from_file = [json.loads(line) for line in command("search", f"f.{suffix}", *flags).stdout.splitlines()]
    from_pictures = [json.loads(line) for line in command("search", "in", *flags, "--workers", 0).stdout.splitlines()]
    assert from_file == from_pictures
    images, texts, _ = reference(zoo / "clip", queries, ["{}"])
    scores, order = (texts.T @ images.T).topk(3)
    names = sorted(path.name for path in SAMPLES.glob("*.jpg"))
    assert [row["path"] for row in from_file] == [f"in/{names[i]}" for i in order.flatten()]
    assert [(row["query"], row["rank"]) for row in from_file] == [(q, r) for q in queries for r in (1, 2, 3)]
    np.testing.assert_allclose([row["score"] for row in from_file], scores.flatten(), atol=1e-4)
    command("search", f"f.{suffix}", "a red car", "--clip-checkpoint", "clip", "-o", f"hits.{suffix}")
    hits = read_rows(tmp_path / f"hits.{suffix}")
    assert [hit["path"] for hit in hits[:3]] == [row["path"] for row in from_file[:3]] and len(hits) == 5
    assert f"hits.{suffix} exists; --overwrite" in command(
        "search", f"f.{suffix}", "a", "--clip-checkpoint", "clip", "-o", f"hits.{suffix}", code=2
    ).stderr  # fmt: skip


def test_search_finds_by_itself_which_published_clip_made_the_features(command, published, tmp_path):
    command("embed", "in", "--clip", published, "-o", "f.jsonl", "--workers", 0)
    done = command("search", "f.jsonl", "a cat", "--top-k", 1)
    assert f",clip:{published}" in done.stdout and "1 hits among 5 images" in done.stderr


def test_search_over_features_and_pictures_names_what_cannot_be_read(command, tmp_path):
    command("embed", "in/cat.jpg", "--clip-checkpoint", "clip", "-o", "f.csv", "--workers", 0)
    (tmp_path / "mine").mkdir()
    shutil.copy(SAMPLES / "coffee.jpg", tmp_path / "mine")
    (tmp_path / "mine/torn.jpg").write_bytes(b"no image")
    (tmp_path / "asked.txt").write_text("a cat\n\na cup\n")
    done = command(
        "search", "f.csv", "mine", "--queries", "asked.txt", "--clip-checkpoint", "clip", "--workers", 0, code=1
    )  # fmt: skip
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert {row["path"] for row in rows} == {"in/cat.jpg", "mine/coffee.jpg"} and len(rows) == 4
    assert "mine/torn.jpg: not an image" in done.stderr and "2 images, 1 could not be read" in done.stderr


def test_a_ranking_in_pieces_is_that_of_the_whole():
    torch.manual_seed(0)
    queries, images = torch.randn(8, 3), torch.randn(100, 8)
    images[50] = images[20]
    queries, names = queries / queries.norm(dim=0), [str(i) for i in range(100)]
    whole, pieces = Ranking(queries, 7), Ranking(queries, 7)
    whole.add(names, images)
    for start in range(0, 100, 9):
        pieces.add(names[start : start + 9], images[start : start + 9])
    assert [row | {"score": 0} for row in whole.rows("abc", "m")] == [
        row | {"score": 0} for row in pieces.rows("abc", "m")
    ]


MISTAKES = {
    "no such clip": (("--labels", "a,b", "--clip", "ViT-B-33"), "did you mean ViT-B-32"),
    "no such tag": (("--labels", "a,b", "--clip", "ViT-B-32:laion"), "no weights tagged 'laion'"),
    "several tags": (("--labels", "a,b", "--clip", "ViT-L-14"), "say which; there are: openai"),
    "out of reach": (("--labels", "a,b"), "--clip-checkpoint DIR"),
    "hub out of reach": (("--labels", "a,b", "--clip", "hf-hub:someone/clip"), "did not answer"),
    "no name of the hub": (("--labels", "a,b", "--clip", "hf-hub:clip"), "hf-hub:OWNER/NAME"),
    "two clips": (("--labels", "a,b", "--clip", "ViT-B-32", "--clip-checkpoint", "clip"), "exclude each other"),
    "no folder": (("--labels", "a,b", "--clip-checkpoint", "nowhere"), "open_clip_config.json"),
    "no clip": (("--labels", "a,b", "--clip-checkpoint", "empty"), "open_clip_config.json"),
    "no weights": (("--labels", "a,b", "--clip-checkpoint", "bare"), "holds no weights"),
    "cut weights": (("--labels", "a,b", "--clip-checkpoint", "cut"), "cannot be loaded"),
    "one label": (("--labels", "cat", "--clip-checkpoint", "clip"), "two names or more"),
    "a label twice": (("--labels", "cat, dog,cat", "--clip-checkpoint", "clip"), "named twice: cat"),
    "no labels": (("--labels", " , ", "--clip-checkpoint", "clip"), "two names or more"),
    "no such file": (("--labels", "@no.txt", "--clip-checkpoint", "clip"), "No such file"),
    "too many asked for": (("--labels", "a,b", "--clip-checkpoint", "clip", "--top-k", 3), "the 2 classes"),
    "template without a place": (("--labels", "a,b", "--template", "a photo"), "expected {} once"),
    "template alone": (("--template", "a {}"), "--labels"),
    "clip alone": (("--clip-checkpoint", "clip"), "--labels"),
    "two kinds of model": (("--labels", "a,b", "--model", "resnet18"), "options of one kind"),
}


def words_of(done: Any) -> str:
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_zero_shot_classification_is_one_clear_line(command, tmp_path, name):
    before = sorted(tmp_path.iterdir())
    options, words = MISTAKES[name]
    assert words in words_of(command("classify", "in", "-o", "fine.csv", "--workers", 0, *options, code=2))
    assert sorted(tmp_path.iterdir()) == before


def test_embed_takes_no_stage_of_a_clip(command):
    done = command("embed", "in", "--clip-checkpoint", "clip", "--stage", 0, "--workers", 0, code=2)
    assert "leave out --stage" in words_of(done)


@pytest.fixture
def files(command, tmp_path) -> None:
    """Files of features that cannot be searched."""
    command("embed", "in", "--clip-checkpoint", "clip", "-o", "good.jsonl", "--workers", 0)
    rows = read_rows(tmp_path / "good.jsonl")

    def jsonl(name: str, changed: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in changed))

    jsonl("other_model.jsonl", [row | {"model": "litv2_small"} for row in rows])
    jsonl("mixed.jsonl", [rows[0], rows[1] | {"model": "clip:else@123"}])
    jsonl("nameless.jsonl", [{k: v for k, v in row.items() if k != "model"} for row in rows])
    jsonl("short.jsonl", [row | {"embedding": row["embedding"][:7]} for row in rows])
    jsonl("uneven.jsonl", [rows[0], rows[1] | {"embedding": [1.0]}])
    jsonl("worded.jsonl", [rows[0] | {"embedding": ["a"] * 16}])
    jsonl("blank.jsonl", [rows[0] | {"embedding": None}])
    jsonl("failed.jsonl", [row | {"status": "error", "embedding": None} for row in rows])
    jsonl("nothing.jsonl", [])
    (tmp_path / "nothing.csv").touch()
    (tmp_path / "cut.jsonl").write_text((tmp_path / "good.jsonl").read_text()[:-40])
    (tmp_path / "cut.csv").write_text('path,status,model,embedding\na.jpg,ok,clip:x,"[1.0, 2\n')
    (tmp_path / "noise.parquet").write_bytes(b"no parquet")
    pq.write_table(pa.table({"path": ["a.jpg"]}), tmp_path / "lacking.parquet")
    text = {"path": ["a"], "status": ["ok"], "model": [rows[0]["model"]], "embedding": ["[1, 2]"]}
    pq.write_table(pa.table(text), tmp_path / "text.parquet")
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in text}), tmp_path / "hollow.parquet")


def test_files_that_cannot_be_searched_are_refused_by_name(command, files):
    expected = {
        "other_model.jsonl": "features of litv2_small",
        "mixed.jsonl": "mixes the features",
        "nameless.jsonl": "lacks the columns model",
        "short.jsonl": "features of 7 values",
        "uneven.jsonl": "all of one length",
        "worded.jsonl": "lists of numbers",
        "blank.jsonl": "not numbers",
        "failed.jsonl": "none of its 5 images could be read",
        "nothing.jsonl": "it is empty",
        "nothing.csv": "holds no rows",
        "cut.jsonl": "line 5 of cut.jsonl is not JSON",
        "cut.csv": "was it cut off?",
        "noise.parquet": "is no Parquet file",
        "lacking.parquet": "lacks the columns status, model, embedding",
        "text.parquet": "lists of numbers",
        "hollow.parquet": "it is empty",
        "absent.csv": "No such file",
    }
    for name, words in expected.items():
        said = words_of(command("search", name, "a cat", "--clip-checkpoint", "clip", code=2))
        assert (words in said and name.partition(".")[0] in said) or name == "short.jsonl", (name, said)


SEARCHES = {
    "other weights": (("good.jsonl", "a cat", "--clip-checkpoint", "other"), "cannot be compared with"),
    "no clip named": (("good.jsonl", "a cat"), "say where it is, --clip-checkpoint DIR"),
    "no clip's features": (("other_model.jsonl", "a cat"), "attnsuite embed"),
    "no query": (("good.jsonl",), "say where and what"),
    "a path for a query": (("in", "good.jsonl"), "the last argument is what is searched for"),
    "an empty query": (("in", " "), "say where and what"),
    "no file of queries": (("in", "--queries", "no.txt"), "No such file"),
    "nothing to search in": (("nowhere", "a cat"), "'nowhere' does not exist"),
    "output suffix": (("in", "a cat", "-o", "hits.xlsx"), ".csv, .jsonl, .parquet"),
    "zero hits": (("in", "a cat", "--top-k", 0), "--top-k"),
}


def test_a_mistake_in_a_search_is_one_clear_line(command, files):
    for name, (arguments, words) in SEARCHES.items():
        assert words in words_of(command("search", *arguments, code=2)), name


def test_a_folder_under_another_name_is_the_same_clip(zoo, tmp_path):
    shutil.copytree(zoo / "clip", tmp_path / "moved")
    first, moved = (ClipChoice(None, str(folder)).resolve().label for folder in (zoo / "clip", tmp_path / "moved"))
    assert first != moved and is_same(first, moved)
    assert not is_same(first, ClipChoice(None, str(zoo / "other")).resolve().label)
    assert not is_same("clip:ViT-B-32:openai", "clip:ViT-B-32:laion2b_e16")
