"""The page Ask: it answers what the verb answers; what it draws is what the library says; mistakes in words."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import weights
from apps.ask.switches import Switches
from apps.demos import asking
from apps.demos.ask import QUESTIONS, _cards
from apps.demos.home import build
from apps.demos.host import Host, Settings
from apps.demos.uploads import chosen, samples
from apps.errors import UsageError
from recipes.scene_vlm_model import build_model, build_processor, save

DIAMOND = "what colour is the diamond? answer in one word"
DEFAULTS: dict[str, Any] = {
    "image": None, "sample": "scene 1", "question": DIAMOND, "mma": False, "vmtc": 1, "cmai": False, "max_tokens": 32,
    "api_name": "/ask",
}  # fmt: skip
RIGHT = ["blue", "the answer is cross.", "purple", '{"answer":"blue"}', "SQUARE", "cross", "heart", "purple"]
RIGHT += ["the answer is green.", "cross"]
pytestmark = pytest.mark.usefixtures("one_thread")


def silent(*args: Any, **options: Any) -> None:
    assert args or options


def asked(host: Host, switches: Switches, sample: str = "scene 1", question: str = DIAMOND) -> list[asking.Replied]:
    picture = chosen(None, sample, "scenes", host.settings)
    return asking.ask(host, picture, question, switches, 32, silent)  # pyright: ignore[reportArgumentType]


def test_questions_that_are_ready_are_answered_rightly():
    host = Host()
    for (sample, question), right in zip(QUESTIONS["scenes"], RIGHT, strict=True):
        assert [reply.answer for reply in asked(host, Switches(mma=True), sample, question)] == [right] * 2
    assert {sample for sample, _ in QUESTIONS["photographs"]} <= {*samples("photographs")}


def test_what_it_says_is_what_the_verb_says(run, tmp_path):
    picture = samples("scenes")["scene 1"]
    for switches, options in (
        (Switches(vmtc=0.25), ["--vmtc", "0.25"]),
        (Switches(True, 0.25, True), ["--mma", "--vmtc", "0.25", "--cmai"]),
    ):
        done = run(
            "ask", picture, DIAMOND, *options, "--compare", "--max-tokens", "32", "-o", "row.jsonl", "--overwrite"
        )
        assert done.code == 0, done.err
        row = json.loads((tmp_path / "row.jsonl").read_text("utf-8"))
        plain, under, *_ = asked(Host(), switches)
        assert (plain.answer, under.answer) == (row["plain_answer"], row["answer"])
        assert (under.image_tokens, under.kept_tokens, under.model) == (64, row["kept_tokens"], row["model"])
        assert plain.model == "scene_vlm/causal"


def test_each_switch_is_shown_alone_where_there_are_several():
    replies = asked(Host(Settings(max_models=1)), Switches(True, 0.5, True))
    assert [reply.under for reply in replies] == ["plain", "MMA + VMTC 0.5 + CMAI", "MMA", "VMTC 0.5", "CMAI"]
    assert [reply.model.split("/")[1] for reply in replies] == ["causal", "mma", "mma", "causal", "causal"]
    assert [reply.kept_tokens for reply in replies] == [64, 32, 64, 32, 64]
    assert [reply.merged is not None for reply in replies] == [False, True, False, True, False]
    assert all(reply.prefill_ms > 0 for reply in replies)
    assert asking.variants(Switches(cmai=True)) == [Switches(), Switches(cmai=True)]
    assert asking.variants(Switches()) == [Switches()]


def test_the_cache_is_counted_to_the_byte():
    plain, fewer = asked(Host(), Switches(vmtc=0.5))
    config = json.loads((weights.shipped("scene_vlm") / "causal/config.json").read_text("utf-8"))["text_config"]
    heads = config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * heads * width * 4
    prompt = 1000 * plain.cache_kb / token
    assert prompt == int(prompt) and 64 < prompt < 90, "keys and values of each token of the prompt"
    assert 1000 * (plain.cache_kb - fewer.cache_kb) == pytest.approx(32 * token)
    assert fewer.activations_mb < plain.activations_mb


def test_pictures_show_where_the_answer_is_and_what_is_kept():
    plain, fewer = asked(Host(), Switches(vmtc=0.5))
    assert plain.read is not None and fewer.merged is not None
    scene = Image.open(samples("scenes")["scene 1"]).resize(plain.read.size, Image.Resampling.BICUBIC)
    changed = np.abs(np.asarray(plain.read, float) - np.asarray(scene, float)).mean(2)
    row, column = np.unravel_index(changed.argmax(), changed.shape)
    blue = np.asarray(scene, int)[row, column]
    assert blue[2] > blue[0] + 60 and blue[2] > blue[1] + 60, "the answer was read off the blue diamond"
    clear = (np.abs(np.asarray(fewer.merged, float) - np.asarray(scene, float)).max(2) < 3).mean()
    assert 0.3 < clear < 0.45, "27 of 64 tokens stay as they are, less their outlines"
    names = zipfile.ZipFile(io.BytesIO(asking.packed([plain, fewer]))).namelist()
    assert names == ["plain_reads.png", "vmtc_0.5_reads.png", "vmtc_0.5_tokens.png"]
    assert asking.packed([plain, fewer]) == asking.packed([plain, fewer])


def test_words_of_visitors_and_models_are_no_markup():
    replies = asked(Host(), Switches(), question="what colour is the <b>cat</b>? ${1+1} &amp;")
    assert "<b>cat</b>" in replies[0].unknown
    hostile = [
        asking.Replied("plain", "<i>", "<script>alert(1)</script>", 1, 1, 1, 1.0, 1.0, 1.0, None, None, ["<b>cat</b>"])
    ]
    assert "nothing is drawn" in _cards(hostile) and "nothing is drawn" not in _cards(replies)
    for shown in (_cards(replies), _cards(hostile)):
        assert "<b>" not in shown and "<script" not in shown and "<i>" not in shown
        assert "does not know: " in shown and "&lt;b&gt;cat&lt;/b&gt;" in shown


@pytest.fixture
def client(connect: Any) -> Any:
    return partial(connect, "ask")


def test_over_the_wire(client):
    ask = client(max_models=1)
    shown, table, pictures, rows, facts = ask.predict(**{**DEFAULTS, "mma": True, "vmtc": 0.5})
    assert shown.count("<section") == 4 and shown.count('class="read"') == 4 and shown.count('class="merged"') == 2
    assert table["headers"][0] == "Asked" and [row[0] for row in table["data"]][1] == "MMA + VMTC 0.5"
    assert facts["question"] == DIAMOND and facts["unknown_words"] == []
    assert [answer["answer"] for answer in facts["answers"]] == ["blue"] * 4
    with open(rows, encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["answer"] for row in read] == ["blue"] * 4 and read[1]["kept_tokens"] == "32"
    assert read[0]["question"] == DIAMOND and set(facts["answers"][0]) == set(read[0])
    assert len(zipfile.ZipFile(pictures).namelist()) == 6
    facts = ask.predict(**{**DEFAULTS, "sample": "", "image": handle_file(samples("scenes")["scene 4"])})[-1]
    assert len(facts["answers"]) == 1 and facts["answers"][0]["kept_tokens"] == 64


def test_mistakes_are_said_in_words(client, broken, monkeypatch):
    ask = client()
    for path, words in broken:
        with pytest.raises(AppError, match=f"(?i){words}"):
            ask.predict(**{**DEFAULTS, "sample": "", "image": handle_file(path)})
    for change, words in (
        ({"sample": ""}, "no picture yet"),
        ({"sample": "scene 99"}, "scene 99"),
        ({"question": "  "}, "no question yet"),
        ({"question": "why? " * 200}, "has 999 characters: at most 500"),
        ({"vmtc": 0}, "0"),
        ({"vmtc": 1.5}, "1.5"),
        ({"max_tokens": 10_000}, "10000"),
    ):
        with pytest.raises(AppError, match=f"(?i){words}"):
            ask.predict(**{**DEFAULTS, **change})

    def greedy(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(asking, "_reply", greedy)
        with pytest.raises(AppError, match="not enough memory on this server"):
            ask.predict(**DEFAULTS)
    assert ask.predict(**DEFAULTS)[-1]["answers"][0]["answer"] == "blue", "and the server goes on"


def test_shares_and_limits_are_checked_whoever_asks():
    for share in (0, -1, 1.01, float("nan"), None):
        with pytest.raises(UsageError, match="expected a share above 0"):
            asking.switches_of(False, share, False)  # pyright: ignore[reportArgumentType]
    picture = Image.new("RGB", (64, 64))
    for most in (0, 257):
        with pytest.raises(UsageError, match="expected 1 to 256"):
            asking.ask(Host(), picture, "what?", Switches(), most, silent)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"cannot be asked this, VMTC 0\.001.*leaves none"):
        asked(Host(), Switches(vmtc=0.001))


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the owner's, untrained, in a folder; with so few layers that CMAI has none to inhibit in."""
    folder = tmp_path_factory.mktemp("own") / "vlm"
    processor = build_processor()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = build_model(processor)
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:2]
    model.config.text_config.num_hidden_layers = 2
    save(model, processor, folder)
    return str(folder)


def test_the_owners_model_answers_for_all_switches_that_it_can_do_with(client, own_model):
    ask = client(model=own_model)
    facts = ask.predict(**{**DEFAULTS, "sample": "cat", "mma": True, "vmtc": 0.25})[-1]
    assert {answer["model"] for answer in facts["answers"]} == {"vlm"}, "not where it lies"
    assert len(facts["answers"]) == 4 and facts["unknown_words"] == []
    with pytest.raises(AppError, match="cannot be asked under CMAI"):
        ask.predict(**{**DEFAULTS, "sample": "cat", "cmai": True})


def test_a_wrong_model_of_the_owners_is_refused_before_the_server_starts(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        build(Host(Settings(model=str(tmp_path / "empty"))), "ask")
    with pytest.raises(UsageError, match="is called OWNER/NAME"):
        build(Host(Settings(model="no such model")), "ask")
