"""`attnsuite ask`: answers that the library itself gives, side by side where asked, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
)
from typer.testing import CliRunner

import weights
from apps.ask.models import VLMChoice, card_of
from apps.ask.screen import Answers
from apps.ask.switches import Switches
from apps.cli import app
from apps.errors import UsageError
from multimodal.cmai import inhibit_cross_modality
from multimodal.explain import attended
from multimodal.mma import modality_mutual_attention
from multimodal.vmtc import compress_visual_tokens
from recipes.scene_vlm_model import build_model, build_processor, save
from tests.multimodal import tiny_aki, tiny_vlm

QUESTION = "what colour is the circle? answer in one word"
CARD = "# tiny\n\nSmall.\n\n- **Data**: 7 scenes,\n  drawn. Never drawn: 8.\n- **Limits**: few words.\n"
pytestmark = pytest.mark.usefixtures("one_thread")


def make(folder: Path, seed: int = 0) -> None:
    """A model that is not trained, but says other things of other pictures."""
    processor = build_processor()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(processor)
    for name, weight in model.named_parameters():
        if any(part in name for part in ("q_proj.weight", "k_proj.weight", "linear_1.weight")):
            weight.data *= 4
    model.generation_config.max_new_tokens = 5
    save(model, processor, folder)
    (folder / "README.md").write_text(CARD)


def spoiled(folder: Path, name: str, **config: Any) -> Path:
    """A copy whose description says something else."""
    made = folder / name
    shutil.copytree(folder / "vlm", made)
    described = json.loads((made / "config.json").read_text()) | config
    (made / "config.json").write_text(json.dumps({key: value for key, value in described.items() if value is not None}))
    return made


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `save_pretrained` writes them, and some that cannot be used; pictures."""
    folder = tmp_path_factory.mktemp("zoo")
    make(folder / "vlm")
    shutil.copytree(folder / "vlm", folder / "shipped/scene_vlm/causal")
    make(folder / "shipped/scene_vlm/mma", seed=1)
    spoiled(folder, "bert", architectures=["BertModel"])
    spoiled(folder, "nameless", architectures=None)
    own_code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    spoiled(folder, "own_code", **own_code)
    (spoiled(folder, "bare") / "model.safetensors").unlink()
    pickled = spoiled(folder, "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    os.truncate(spoiled(folder, "cut") / "model.safetensors", 5000)
    lacking = spoiled(folder, "lacking") / "model.safetensors"
    state = load_file(lacking)
    del state["language_model.model.norm.weight"]
    save_file(state, lacking, {"format": "pt"})
    blind = spoiled(folder, "blind")
    (blind / "processor_config.json").unlink()
    (folder / "empty").mkdir()
    rng = np.random.default_rng(0)
    for place, size in (("in/a.png", (40, 30)), ("in/deep/b.png", (25, 64))):
        (folder / place).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).resize((96, 80)).save(folder / place)
    return folder


@pytest.fixture
def ask(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the verb in `tmp_path`, where models are and pictures in `in`; on `vlm` unless another is named."""
    monkeypatch.chdir(tmp_path)
    for name in os.listdir(zoo):
        (tmp_path / name).symlink_to(zoo / name)
    monkeypatch.setattr(weights, "shipped", lambda name: zoo / "shipped" / name)

    def invoke(*arguments: object, code: int = 0, model: str | None = "vlm") -> Any:
        named = () if model is None else ("--model", model)
        words = ["ask", *map(str, arguments), *named, "--workers", "0"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == code, (done.stderr, done.stdout, done.exception)
        assert "Traceback" not in done.stderr and "internal error" not in done.stderr
        return done

    return invoke


def rows(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def words_of(done: Any) -> str:
    return " ".join(done.stderr.replace("│", " ").split())


def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval(), AutoProcessor.from_pretrained(
        folder
    )


def inputs_of(processor: Any, path: Path, question: str = QUESTION) -> Any:
    content = [{"type": "image", "image": Image.open(path).convert("RGB")}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


def said(model: Any, processor: Any, path: Path, *switches: Any) -> str:
    """What the library says, under switches."""
    inputs = inputs_of(processor, path)
    with contextlib.ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch)
        tokens = model.generate(**inputs, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_the_library_under_the_same_switches(ask, zoo):
    model, processor = loaded(zoo / "vlm")
    cases = {
        (): (),
        ("--mma",): (modality_mutual_attention(model),),
        ("--vmtc", "0.25"): (compress_visual_tokens(model, keep_ratio=0.25),),
        ("--mma", "--vmtc", "0.25", "--cmai"): (
            modality_mutual_attention(model),
            compress_visual_tokens(model, keep_ratio=0.25),
            inhibit_cross_modality(model),
        ),
    }
    answers = []
    for flags, switches in cases.items():
        found = rows(ask("in", QUESTION, "--json", *flags))
        expected = [said(model, processor, zoo / place, *switches) for place in ("in/a.png", "in/deep/b.png")]
        assert [row["answer"] for row in found] == expected
        assert [row["path"] for row in found] == ["in/a.png", "in/deep/b.png"]
        kept = 16 if "--vmtc" in flags else 64
        assert all((row["image_tokens"], row["kept_tokens"], row["model"]) == (64, kept, "vlm") for row in found)
        answers.append(tuple(expected))
    assert len(set(answers)) == len(answers)  # else the switches would not have been needed


def test_answers_side_by_side_are_those_of_two_runs(ask):
    (row,) = rows(ask("in/a.png", QUESTION, "--vmtc", "0.125", "--cmai", "--compare", "--json"))
    (plain,) = rows(ask("in/a.png", QUESTION, "--json"))
    (switched,) = rows(ask("in/a.png", QUESTION, "--vmtc", "0.125", "--cmai", "--json"))
    assert (row["plain_answer"], row["answer"], row["kept_tokens"]) == (plain["answer"], switched["answer"], 8)
    assert row["prefill_ms"] > 0 and row["plain_prefill_ms"] > 0
    assert "plain_answer" not in plain


def test_the_model_that_ships_is_the_one_trained_under_the_switch_and_says_what_it_knows(ask, zoo):
    done = ask("in/a.png", "what is this bicycle", "--json", model=None)
    assert rows(done)[0]["model"] == "scene_vlm/causal"
    assert "scene_vlm/causal is a small model that ships; its answer to a photograph means nothing" in done.stderr
    assert "Data: 7 scenes, drawn.\n" in done.stderr and "Limits: few words." in done.stderr
    assert "does not know this, bicycle" in done.stderr
    done = ask("in/a.png", QUESTION, "--mma", "--compare", "--json", model=None)
    (row,) = rows(done)
    causal, mma = (rows(ask("in/a.png", QUESTION, "--json", *flags, model=None))[0] for flags in ((), ("--mma",)))
    assert row["model"] == mma["model"] == "scene_vlm/mma"
    assert (row["plain_answer"], row["answer"]) == (causal["answer"], mma["answer"])
    assert "does not know" not in done.stderr
    model, processor = loaded(zoo / "shipped/scene_vlm/mma")
    stop = processor.tokenizer.convert_tokens_to_ids("<assistant>")
    assert mma["answer"] == said(
        model, processor, zoo / "in/a.png", modality_mutual_attention(model, stop_token_id=stop)
    )  # fmt: skip
    assert "ships" not in ask("in/a.png", QUESTION, "--json").stderr
    assert "ask it under that: --mma" in ask("in/a.png", QUESTION, model="scene_vlm/mma", code=2).stderr


@pytest.mark.parametrize("mask", ["causal", "mma"])
def test_the_card_of_a_model_that_ships_is_read(mask):
    said = card_of(weights.shipped("scene_vlm") / mask, "x")
    assert [line.partition(":")[0] for line in said.splitlines()[1:]] == ["Data", "It can be asked", "Limits"]
    assert "scenes drawn" in said and "answer in one word" in said


def test_rows_obey_the_rules_of_rows(ask, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(tmp_path / "in/a.png", tmp_path / "mine/a.png")
    (tmp_path / "mine/b.png").write_bytes(b"no picture")
    line = ("mine", QUESTION, "-o", "o.csv", "--vmtc", "0.5")
    assert "1 ok, 1 failed" in ask(*line, code=1).stderr
    good, bad = csv.DictReader((tmp_path / "o.csv").read_text().splitlines())
    assert good["kept_tokens"] == "32" and good["question"] == bad["question"] == QUESTION
    assert bad["error"] == "not an image in a format that can be read" and not bad["answer"]
    assert "nothing to do" in ask(*line, code=1).stderr
    assert "vmtc" in ask("mine", QUESTION, "-o", "o.csv", "--vmtc", "0.25", code=2).stderr
    assert "question was" in ask("mine", "who?", "-o", "o.csv", "--vmtc", "0.5", code=2).stderr
    # Of 64 tokens this share leaves none: the trouble of each picture, not of the run.
    (row,) = rows(ask("mine/a.png", QUESTION, "--vmtc", "0.001", "--json", code=1))
    assert row["status"] == "error" and "keep_ratio=0.001 leaves none" in row["error"]


def test_each_line_of_a_file_of_pairs_is_a_row(ask, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "in").symlink_to(tmp_path / "in")
    lines = [
        json.dumps({"image": "in/a.png", "question": QUESTION}),
        json.dumps({"image": "in/a.png", "question": "how many objects are there? answer as json", "more": 1}),
        "",
        '{"image": "in/a.png", "question": ',
        json.dumps({"image": "in/a.png"}),
        json.dumps({"image": "in/deep/b.png", "question": " "}),
        json.dumps({"image": "in/none.png", "question": QUESTION}),
        json.dumps({"image": "in", "question": QUESTION}),
        json.dumps([1]),
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    line = ("data/pairs.jsonl", "-o", "o.jsonl")
    assert "2 ok, 6 failed" in ask(*line, code=1).stderr
    found = [json.loads(text) for text in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["path"] for row in found[:3]] == ["data/in/a.png", "data/in/a.png", "data/pairs.jsonl:4"]
    assert found[0]["answer"] == rows(ask("in/a.png", QUESTION, "--json"))[0]["answer"] != found[1]["answer"]
    errors = ["line 4", "line 5", "line 6", "No such file", "not an image: a line asks about one", "line 9"]
    assert all(part in row["error"] for part, row in zip(errors, found[2:], strict=True))
    assert found[5]["question"] == QUESTION
    assert "nothing to do" in ask(*line, code=1).stderr
    lines[1] = json.dumps({"image": "in/a.png", "question": "what shape is the object? answer in capitals"})
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    assert "inputs have changed" in ask(*line, code=1).stderr
    again = [json.loads(text) for text in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert again[0] == found[0] and again[1]["question"].startswith("what shape")
    assert len(rows(ask("data/pairs.jsonl", "--limit", 1, "--json"))) == 1


def test_what_was_looked_at_is_drawn_as_the_library_draws_it(ask, zoo, tmp_path):
    model, processor = loaded(zoo / "vlm")
    (row,) = rows(ask("in/a.png", QUESTION, "--vmtc", "0.25", "--compare", "--show-attention", "seen.png", "--json"))
    assert row["attention"] == "seen.png"
    inputs = inputs_of(processor, zoo / "in/a.png")
    picture = Image.open(zoo / "in/a.png").convert("RGB")
    plain = attended(model, inputs).draw(picture, processor=processor)
    with compress_visual_tokens(model, keep_ratio=0.25):
        fewer = attended(model, inputs).draw(picture, processor=processor)
    drawn = np.asarray(Image.open(tmp_path / "seen.png"))
    np.testing.assert_array_equal(drawn, np.hstack([np.asarray(plain), np.asarray(fewer)]))
    many = rows(ask("in", QUESTION, "--show-attention", "maps", "--json"))
    assert [row["attention"] for row in many] == ["maps/a.png.attention.png", "maps/deep/b.png.attention.png"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "in/a.png", "question": QUESTION}) + "\n")
    (row,) = rows(ask("pairs.jsonl", "--show-attention", "maps", "--json"))
    assert row["attention"] == "maps/in/a.png.1.attention.png" and (tmp_path / row["attention"]).is_file()


def words(image: str, markers: dict[int, str]) -> Any:
    """A tokenizer with the ids of `tiny_vlm`."""
    named = {tiny_vlm.PAD: "<pad>", tiny_vlm.BOS: "<bos>", tiny_vlm.IMAGE_ID: image, **markers}
    ids = {named.get(index, f"w{index}"): index for index in range(tiny_vlm.VOCABULARY)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", unk_token="w2")
    made.add_special_tokens({"additional_special_tokens": [image, *markers.values()]})
    return made


def qwen() -> tuple[Any, Any]:
    markers = {
        tiny_vlm.VISION_START: "<|vision_start|>",
        tiny_vlm.VISION_END: "<|vision_end|>",
        tiny_vlm.VIDEO: "<|video_pad|>",
    }
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    small = {"size": {"shortest_edge": 256, "longest_edge": 1024}}
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|>"
        "<|image_pad|><|vision_end|> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes, **small),
        words("<|image_pad|>", markers),
        Qwen2VLVideoProcessor(**sizes, **small),
        chat_template=template,
    )
    return tiny_vlm.qwen2_vl()[0], processor


def paligemma() -> tuple[Any, Any]:
    pictures = SiglipImageProcessor(size={"height": 16, "width": 16})
    pictures.image_seq_length = 16
    return tiny_vlm.paligemma()[0], PaliGemmaProcessor(pictures, words("<image>", {}))


def aki() -> tuple[Any, Any]:
    return tiny_aki.model(), tiny_aki.processor()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of PaliGemma's own processor
@pytest.mark.parametrize("family", [qwen, paligemma, aki])
def test_models_of_other_families_are_asked_in_their_own_way(ask, tmp_path, family):
    model, processor = family()
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    question = "w10 w11 w20"
    (row,) = rows(ask("in/a.png", question, "--vmtc", "0.5", "--mma", "--max-tokens", 3, "--json", model="own"))
    picture = Image.open(tmp_path / "in/a.png").convert("RGB")
    if processor.chat_template is None:
        inputs = processor(images=[picture], text=[f"<image>{question}"], return_tensors="pt")
    else:
        inputs = inputs_of(processor, tmp_path / "in/a.png", question)
    with compress_visual_tokens(model, keep_ratio=0.5), modality_mutual_attention(model):
        tokens = model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
    assert row["answer"] == processor.decode(tokens, skip_special_tokens=True).strip()
    assert row["kept_tokens"] == row["image_tokens"] // 2 > 1


def test_answers_on_a_terminal_are_whole_and_side_by_side():
    text = io.StringIO()
    answers = Answers(Switches(mma=True, vmtc=0.25), Console(file=text, width=60))
    long = "there are three people, a dog, two cars and a bicycle in front of the second house on the left"
    row = {"path": "a.jpg", "status": "ok", "question": "what is there?", "answer": long}
    row |= {"image_tokens": 64, "kept_tokens": 16}
    answers.show([row, {"path": "b.jpg", "status": "error", "error": "torn", "question": None}])
    shown = " ".join(text.getvalue().split())
    assert long in shown and "16 of 64 image tokens kept" in shown and "b.jpg: torn" in shown
    answers.show([row | {"answer": "red", "plain_answer": "blue", "prefill_ms": 1.26, "plain_prefill_ms": 3.0}])
    lines = [line.split() for line in text.getvalue().splitlines()[-5:]]
    assert lines[1:] == [
        ["plain", "MMA,", "VMTC", "0.25"],
        ["answer", "blue", "red"],
        ["image", "tokens", "64", "16"],
        ["first", "token", "after", "3.0", "ms", "1.3", "ms"],
    ]


MODELS = {
    "nowhere": "there is no such folder",
    "no/such": "did not answer",
    "in/a.png": "is a file, expected a folder",
    "empty": "holds no config.json",
    "bert": "BertModel is not supported; supported are Aki",
    "nameless": "names no class",
    "own_code": "cannot be loaded",
    "bare": "lacks weights",
    "pickled": "only safetensors are",
    "cut": "cannot be loaded",
    "lacking": "lack 1 weights, such as model.language_model.norm.weight",
    "blind": "cannot be loaded",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_asked_is_refused_by_name(ask, tmp_path, name):
    before = sorted(tmp_path.iterdir())
    done = ask("in/a.png", QUESTION, "-o", "o.csv", model=name, code=2)
    assert MODELS[name] in words_of(done) and name in words_of(done)
    assert sorted(tmp_path.iterdir()) == before


MISTAKES = {
    "no question": (("in/a.png",), "the last argument is the question"),
    "no picture": (("what is there?",), "say about what and what to ask"),
    "an empty question": (("in/a.png", " "), "say about what and what to ask"),
    "no such picture": (("none.png", "what?"), "'none.png' does not exist"),
    "share of none": (("in", "what?", "--vmtc", "0"), "--vmtc 0: expected the share"),
    "share above all": (("in", "what?", "--vmtc", "1.5"), "--vmtc 1.5: expected the share"),
    "no number": (("in", "what?", "--vmtc", "nan"), "expected the share"),
    "nothing to compare": (("in", "what?", "--compare"), "nothing to compare with"),
    "one picture for two": (("in", "what?", "--show-attention", "a.png"), "one file for several"),
    "no folder": (("in/a.png", "what?", "--show-attention", "no/a.png"), "does not exist"),
    "another kind": (("in/a.png", "what?", "--show-attention", "a.jpg"), "ends in .png, or a folder"),
    "picture is there": (("in/a.png", "what?", "--show-attention", "in/a.png"), "--overwrite replaces it"),
    "no such pairs": (("none.jsonl",), "cannot read none.jsonl: No such file"),
    "no pairs": (("hollow.jsonl",), "hollow.jsonl holds no line"),
    "pairs and a question": (("hollow.jsonl", "what?"), "brings a question for each image"),
    "no tokens": (("in", "what?", "--max-tokens", "0"), "--max-tokens"),
}


def test_a_mistake_is_one_clear_line(ask, tmp_path):
    (tmp_path / "hollow.jsonl").write_text("\n \n")
    for name, (arguments, expected) in MISTAKES.items():
        assert expected in words_of(ask(*arguments, code=2)), name


def test_an_attention_that_has_no_scores_is_refused(zoo):
    model, _ = loaded(zoo / "vlm")
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    for switches in (Switches(mma=True), Switches(cmai=True)):
        with pytest.raises(UsageError, match=r"vlm cannot be asked under .*flash_attention_2.*eager"):
            switches.check(model, "vlm")


def test_rows_of_other_weights_are_not_mixed(zoo):
    first, second = (VLMChoice(str(zoo / name)).resolve().identity for name in ("vlm", "shipped/scene_vlm/mma"))
    assert first != second and first.startswith("sha256 ")
