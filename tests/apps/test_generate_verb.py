"""`attnsuite generate`: pictures that say how they were made, and that can be made again from what they say."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from support import ROOT
from transformers import CLIPConfig, CLIPImageProcessor
from typer.testing import CliRunner

import diffusion
import weights
from apps.cli import app
from apps.errors import UsageError
from apps.generate import models, record
from apps.generate.settings import Settings, read_losses
from tests.diffusion import tiny

PROMPT = "a cat and a dog"
SUBJECTS = ("--subjects", "cat", "dog")
FAST = ("--steps", "3")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `save_pretrained` writes them: Stable Diffusion, SDXL, and some that cannot be used."""
    folder = tmp_path_factory.mktemp("zoo")
    pipe = tiny.stable_diffusion(folder / "words")
    pipe.save_pretrained(folder / "sd")
    tiny.stable_diffusion_xl(folder / "words").save_pretrained(folder / "xl")
    for name in ("flux", "pickles", "broken", "half", "other"):
        shutil.copytree(folder / "sd", folder / name)
    index = json.loads((folder / "sd/model_index.json").read_text())
    (folder / "flux/model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    (folder / "pickles/unet/diffusion_pytorch_model.safetensors").rename(folder / "pickles/unet/model.bin")
    os.truncate(folder / "broken/unet/diffusion_pytorch_model.safetensors", 5000)
    shutil.rmtree(folder / "half/unet")
    (folder / "empty").mkdir()
    (folder / "file.safetensors").touch()
    deaf = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,  # type: ignore[arg-type]
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    deaf.save_pretrained(folder / "other/unet")
    return folder


@pytest.fixture
def generate(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the verb in `tmp_path`, where `sd` and `xl` are models."""
    monkeypatch.chdir(tmp_path)
    for name in os.listdir(zoo):
        (tmp_path / name).symlink_to(zoo / name)

    def invoke(*arguments: object, model: str | None = "sd", code: int = 0) -> Any:
        given = [str(argument) for argument in arguments]
        done = CliRunner().invoke(app, ["generate", *given, *(["--model", model] if model else [])])
        assert done.exit_code == code, (done.stderr, done.stdout, done.exception)
        return done

    return invoke


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def said_by(path: Path | str) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["attnsuite"])


def rows(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def words_of(done: Any) -> str:
    return " ".join(done.stderr.replace("│", " ").split())


def real(*arguments: object, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from apps.cli import main; main()", "generate", *map(str, arguments)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, check=False, **more)


def test_the_command_line_as_documented_with_a_bar_on_a_terminal(generate, zoo, tmp_path):
    screen, terminal = pty.openpty()
    done = real(
        PROMPT, *SUBJECTS, "-o", "out/", "--seed", 0, "--compare", "--model", zoo / "sd", *FAST,
        cwd=tmp_path, stderr=terminal,
    )  # fmt: skip
    shown = os.read(screen, 1 << 16).decode()
    for end in (screen, terminal):
        os.close(end)
    assert done.returncode == 0, shown
    assert "a-cat-and-a-dog-0-plain (2 of 2)" in shown and "6/6" in shown and "Loading" not in shown
    names = ("a-cat-and-a-dog-0-compare.png", "a-cat-and-a-dog-0-plain.png", "a-cat-and-a-dog-0.png")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)
    both, plain, guided = (pixels(tmp_path / "out" / name) for name in names)
    assert (both[:, :32] == plain).all() and (both[:, -32:] == guided).all() and (plain != guided).any()
    header, *lines = csv.reader(io.StringIO(done.stdout))
    assert header[:4] == ["path", "status", "error", "model"] and len(lines) == 2
    said = said_by(tmp_path / "out" / names[2])["settings"]
    assert (said["prompt"], said["seed"], said["steps"], said["subjects"]) == (PROMPT, 0, 3, ["cat", "dog"])
    again = generate("--from", f"out/{names[2]}", "-o", "again", model=None)  # in this process
    assert "equals" in again.stderr and (pixels(f"again/{names[2]}") == guided).all()


def test_the_plain_picture_is_that_of_diffusers(generate):
    generate(PROMPT, *SUBJECTS, "-o", "out", "--seed", 3, "--compare", *FAST)
    pipe = tiny.quiet(StableDiffusionPipeline.from_pretrained("sd"))
    picture = pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images[0]
    assert (pixels("out/a-cat-and-a-dog-3-plain.png") == np.asarray(picture)).all()


def test_the_guided_picture_is_that_of_the_library(generate):
    generate(PROMPT, *SUBJECTS, "-o", "out", "--step-size", 9, "--losses", "segregation,retention=0.5", *FAST)
    pipe = tiny.quiet(diffusion.AStarStableDiffusionPipeline.from_pretrained("sd"))
    picture = pipe(
        PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0), subjects=["cat", "dog"],
        step_size=9, losses={"segregation": 1, "retention": 0.5},
    ).images[0]  # fmt: skip
    assert (pixels("out/a-cat-and-a-dog-0.png") == np.asarray(picture)).all()


@pytest.mark.parametrize(
    "arguments",
    [
        (PROMPT, "--subjects", "cat", "dog", "-o", "out"),
        ("--subjects", "cat", "dog", "-o", "out", PROMPT),
        ("-o", "out", "--subjects", "cat", "dog", PROMPT),
        ("-o", "out", "--subjects", "cat", "dog", "--", PROMPT),
        ("-o", "out", PROMPT, "-s", "cat, dog"),
        ("-o", "out", "-s", "cat,", "dog", "--compare", PROMPT),
        ("-s", "cat", "-o", "out", "-s", "dog", PROMPT),
    ],
)
def test_subjects_and_prompt_in_any_order(generate, arguments):
    generate("--seed=7", "--model=sd", "--steps=1", "--guidance-steps=0", *arguments, model=None)
    said, _ = record.read(Path("out/a-cat-and-a-dog-7.png"))
    assert said.settings.prompt == PROMPT and said.settings.subjects == ("cat", "dog")


def test_subjects_of_several_words_and_pieces(generate):
    prompt = "a fire truck and an elephant"
    generate(prompt, "--subjects", "fire truck", "elephant", "-o", "out", *FAST)
    assert record.read(Path("out/a-fire-truck-and-an-elephant-0.png"))[0].settings.subjects[0] == "fire truck"


def test_from_repeats_every_kind_of_picture_exactly(generate):
    generate(PROMPT, *SUBJECTS, "-o", "out", "--seed", 5, "--compare", "--negative-prompt", "a box", *FAST)
    for kind in ("", "-plain", "-compare"):
        name = f"a-cat-and-a-dog-5{kind}.png"
        done = generate("--from", f"out/{name}", "-o", f"again{kind}", model=None)
        assert f"again{kind}/{name} equals out/{name} in every pixel" in done.stderr
        assert (pixels(f"again{kind}/{name}") == pixels(f"out/{name}")).all()
    assert Path("again/a-cat-and-a-dog-5.png").read_bytes() == Path("out/a-cat-and-a-dog-5.png").read_bytes()
    assert os.listdir("again-plain") == ["a-cat-and-a-dog-5-plain.png"]


def test_from_with_an_option_changes_that_alone(generate):
    generate(PROMPT, *SUBJECTS, "-o", "out", "--step-size", 9, *FAST)
    done = generate("--from", "out/a-cat-and-a-dog-0.png", "--seed", 1, "-o", "out", model=None)
    first, second = (record.read(Path(f"out/a-cat-and-a-dog-{seed}.png"))[0].settings for seed in (0, 1))
    assert second.seed == 1 and {**first.as_json(), "seed": 1} == second.as_json()
    assert "equals" not in done.stderr


def test_a_repeat_that_differs_says_by_how_much(generate):
    generate(PROMPT, *SUBJECTS, "-o", "out", *FAST)
    path = Path("out/a-cat-and-a-dog-0.png")
    said, _ = record.read(path)
    touched = pixels(path).copy()
    touched[0, 0] = 255 - touched[0, 0] // 2
    record.write(path, Image.fromarray(touched), said)
    done = generate("--from", path, "-o", "again", model=None)
    assert "in 0.1% of the pixels" in done.stderr and "the file was changed" in done.stderr


def test_each_of_several_pictures_is_the_single_one_of_its_seed(generate):
    done = generate(PROMPT, *SUBJECTS, "-o", "out", "--seed", 10, "--num-images", 3, "--json", *FAST)
    assert [row["seed"] for row in rows(done)] == [10, 11, 12]
    generate(PROMPT, *SUBJECTS, "-o", "single", "--seed", 12, *FAST)
    assert Path("single/a-cat-and-a-dog-12.png").read_bytes() == Path("out/a-cat-and-a-dog-12.png").read_bytes()


def test_the_same_command_goes_on_and_another_is_refused(generate):
    command = (PROMPT, *SUBJECTS, "-o", "out", "--num-images", 2, "--json", *FAST)
    first = generate(*command)
    path = Path("out/a-cat-and-a-dog-0.png")
    made = path.stat().st_mtime_ns
    Path("out/a-cat-and-a-dog-1.png").unlink()
    again = generate(*command)
    assert rows(again) == rows(first) and "1 of them already there" in again.stderr
    assert path.stat().st_mtime_ns == made
    refused = generate(*command, "--step-size", 3, code=2)
    assert f"{path} exists and was made with other settings (step_size)" in refused.stderr
    assert "(model, guidance_scale)" in generate(*command, model="xl", code=2).stderr
    assert "exists; choose" in generate(*command, "--no-resume", code=2).stderr
    generate(*command, "--step-size", 3, "--overwrite")
    assert record.read(path)[0].settings.step_size == 3
    path.write_bytes(b"mine")
    assert "was not made by this command" in generate(*command, code=2).stderr
    assert path.read_bytes() == b"mine"


def test_maps_and_losses_are_written(generate):
    done = generate(PROMPT, *SUBJECTS, "-o", "out", "--compare", "--save-maps", "--json", *FAST)
    guided, plain = rows(done)
    with np.load(guided["maps"], allow_pickle=False) as saved:
        assert saved["maps"].shape == (3, 16, 16, 2) and 0 <= saved["maps"].min() <= saved["maps"].max() <= 1
        assert saved["subjects"].tolist() == ["cat", "dog"]
        assert saved["segregation"].mean() == pytest.approx(json.loads(guided["losses"])["segregation"], abs=1e-6)
    assert (guided["kind"], plain["kind"]) == ("guided", "plain")
    assert json.loads(guided["losses"])["segregation"] < json.loads(plain["losses"])["segregation"]
    for row in (guided, plain):
        assert min(pixels(row["grid"]).shape[:2]) > 100
    Path(plain["grid"]).unlink()
    assert (
        "1 of them already there" in generate(PROMPT, *SUBJECTS, "-o", "out", "--compare", "--save-maps", *FAST).stderr
    )
    assert Path(plain["grid"]).exists()


def test_a_layout_of_boxes_and_masks_travels_with_the_picture(generate, tmp_path):
    (tmp_path / "places").mkdir()
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save("places/right.png")
    Path("places/layout.json").write_text(json.dumps({"cat": [0, 0, 0.5, 1], "dog": "right.png"}))
    generate(PROMPT, *SUBJECTS, "-o", "out", "--layout", "places/layout.json", *FAST)
    generate(PROMPT, *SUBJECTS, "-o", "free", *FAST)
    assert (pixels("out/a-cat-and-a-dog-0.png") != pixels("free/a-cat-and-a-dog-0.png")).any()
    shutil.rmtree("places")
    assert "in every pixel" in generate("--from", "out/a-cat-and-a-dog-0.png", "-o", "again", model=None).stderr


def test_sdxl_is_taken_for_what_it_is(generate):
    done = generate(PROMPT, *SUBJECTS, "-o", "out", "--json", *FAST, model="xl")
    (row,) = rows(done)
    assert row["model"] == "xl" and set(json.loads(row["losses"])) == {"segregation", "retention"}
    assert record.read(Path(row["path"]))[0].settings.guidance_scale == 5.0
    assert models.find("xl").pipeline == "AStarStableDiffusionXLPipeline"


def test_without_subjects_it_is_the_plain_pipeline(generate):
    done = generate(PROMPT, "-o", "out", *FAST)
    assert "no --subjects, so nothing is guided" in done.stderr
    assert os.listdir("out") == ["a-cat-and-a-dog-0-plain.png"]


def test_one_subject_and_a_prompt_that_is_too_long_are_notes(generate):
    done = generate("a cat" + " and a cat" * 5 + " and a dog on the box", "-s", "cat", "-o", "out", *FAST)
    assert "the segregation loss is 0" in done.stderr
    assert "the text encoder reads 20: 'a dog on the box' is cut off" in done.stderr
    assert "[transformers]" not in done.stderr
    assert done.stderr.count("note:") == 2


def test_a_loss_that_is_no_number_is_a_note_and_the_run_goes_on(generate, zoo):
    shutil.copytree(zoo / "sd", "lost")
    file = "lost/unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].fill_(torch.nan)
    save_file(state, file, {"format": "pt"})
    done = generate(PROMPT, *SUBJECTS, "-o", "out", "--num-images", 2, "--json", *FAST, model="lost", code=1)
    assert done.stderr.count("the attention loss of sample [0] is not finite at step 0") == 1
    assert [row["status"] for row in rows(done)] == ["error", "error"]
    assert "values that are not numbers" in rows(done)[1]["error"] and "2 failed" in done.stderr
    assert os.listdir("out") == []


def test_what_the_safety_checker_blanks_is_a_failed_row(generate, zoo):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=16))
    checker.concept_embeds_weights.data.fill_(-2)  # everything is like everything
    pipe = tiny.stable_diffusion(
        zoo / "words",
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained("strict")
    done = generate(PROMPT, *SUBJECTS, "-o", "out", "--json", *FAST, model="strict", code=1)
    assert "safety checker" in rows(done)[0]["error"] and "1 failed" in done.stderr


OK = (PROMPT, *SUBJECTS, "-o", "out", *FAST)
MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "nothing to draw": (("-o", "out", "-s", "cat"), "say what to draw"),
    "empty prompt": ((" ", *SUBJECTS, "-o", "out"), "the prompt is empty"),
    "no output": ((PROMPT, *SUBJECTS), "--output"),
    "output is a file": ((PROMPT, *SUBJECTS, "-o", "file.safetensors/out"), "file.safetensors is a file"),
    "output is a picture": ((PROMPT, *SUBJECTS, "-o", "cat.png"), "give -o DIR"),
    "subject absent": ((PROMPT, "-s", "cat", "bird", "-o", "out"), "'bird' is not in the prompt"),
    "subject twice": ((PROMPT, "-s", "cat", "cat", "-o", "out"), "'cat' is named 2 times"),
    "subjects overlap": ((PROMPT, "-s", "cat", "cat and", "-o", "out"), "stand for the same words"),
    "empty subject": ((PROMPT, "-o", "out", "-s", " , "), "--subjects holds no word"),
    "subject cut off": ((PROMPT + " and the" * 8 + " box", "-s", "cat", "box", "-o", "out"), "text encoder reads 20"),
    "unknown loss": ((*OK, "--losses", "segration=1"), "unknown loss 'segration'"),
    "loss without a number": ((*OK, "--losses", "segregation=much"), "expected different names with weights"),
    "negative loss": ((*OK, "--losses", "segregation=-1"), "--losses segregation -1.0: expected a number from 0"),
    "losses of nothing": ((PROMPT, "-o", "out", "--losses", "retention=1"), "name them, e.g. --subjects"),
    "comparison of nothing": ((PROMPT, "-o", "out", "--compare"), "name them, e.g. --subjects"),
    "no steps": ((*OK, "--steps", 0), "--steps 0: expected a whole number from 1"),
    "negative guidance": ((*OK, "--guidance-steps", -1), "--guidance-steps -1"),
    "step size no number": ((*OK, "--step-size", "nan"), "--step-size nan: expected a number"),
    "odd size": ((*OK, "--height", 30), "--height 30: it must be divisible by 8; 24 and 32 are"),
    "no size": ((*OK, "--width", 0), "--width 0: expected a whole number from 8"),
    "no pictures": ((*OK, "--num-images", 0), "--num-images 0"),
    "negative seed": ((*OK, "--seed", -1), "--seed -1"),
    "seeds run out": ((*OK, "--seed", 2**63 - 1, "--num-images", 2), "--seed 9223372036854775808"),
    "half precision on a CPU": ((*OK, "--dtype", "float16", "--device", "cpu"), "float16 on a CPU"),
    "unknown dtype": ((*OK, "--dtype", "int8"), "--dtype int8: expected one of float32"),
    "no such device": ((*OK, "--device", "cuda:77"), "--device cuda:77 cannot be used here"),
    "no layout": ((*OK, "--layout", "absent.json"), "absent.json: No such file"),
    "layout no JSON": ((*OK, "--layout", "file.safetensors"), "is no JSON"),
    "layout a list": ((*OK, "--layout", "list.json"), "expected an object"),
    "box outside": ((*OK, "--layout", "outside.json"), "in fractions of the picture"),
    "box of three": ((*OK, "--layout", "three.json"), "expected [left, top, right, bottom]"),
    "place of a stranger": ((*OK, "--layout", "stranger.json"), "'bird' has a place"),
    "mask of another size": ((*OK, "--layout", "size.json"), "has shape (8, 8); it must be the picture's 32 x 32"),
    "empty mask": ((*OK, "--layout", "dark.json"), "the place of 'cat' is empty"),
    "mask absent": ((*OK, "--layout", "absent-mask.json"), "the mask nowhere.png cannot be read"),
    "mask no picture": ((*OK, "--layout", "no-mask.json"), "list.json cannot be read: it is no picture"),
    "no such picture": (("--from", "absent.png", "-o", "out"), "absent.png does not exist"),
    "picture no PNG": (("--from", "list.json", "-o", "out"), "cannot be read as a PNG"),
    "picture says nothing": (("--from", "dark.png", "-o", "out"), "does not say how it was made"),
    "no such folder": ((*OK, "--model", "./absent"), "there is no such folder"),
    "a single file": ((*OK, "--model", "file.safetensors"), "from_single_file"),
    "no model in the folder": ((*OK, "--model", "empty"), "holds no model_index.json"),
    "another pipeline": ((*OK, "--model", "flux"), "it works for StableDiffusionPipeline"),
    "pickles": ((*OK, "--model", "pickles"), "use_safetensors=False).save_pretrained"),
    "broken weights": ((*OK, "--model", "broken"), "broken cannot be loaded"),
    "half a model": ((*OK, "--model", "half"), "half lacks the weights of unet"),
    "no cross-attention": ((*OK, "--model", "other"), "no cross-attention layer"),
    "hub out of reach": ((*OK, "--model", "some/model"), "did not answer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(generate, tmp_path, name):
    places = {
        "list": [1], "outside": {"cat": [0, 0, 2, 1]}, "three": {"cat": [0, 0, 1]}, "stranger": {"bird": [0, 0, 1, 1]},
        "size": {"cat": "small.png"}, "dark": {"cat": "dark.png"}, "absent-mask": {"cat": "nowhere.png"},
        "no-mask": {"cat": "list.json"},
    }  # fmt: skip
    for stem, content in places.items():
        Path(f"{stem}.json").write_text(json.dumps(content))
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (32, 32)).save("dark.png")
    arguments, words = MISTAKES[name]
    before = sorted(os.listdir())
    done = generate(*arguments, model=None if {"--model", "--from"} & set(arguments) else "sd", code=2)
    assert words in words_of(done), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    if not done.stderr.startswith("Usage"):
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sorted(os.listdir()) == before, "a command that cannot start leaves nothing behind"


def changed(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda said: {**said, "settings": {**said["settings"], **settings}}


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (lambda said: {**said, "attnsuite": 2}, "another version of attnsuite"),
    "a list": (lambda said: [said], "another version of attnsuite"),
    "no settings": (lambda said: {**said, "settings": None}, "no JSON object"),
    "settings missing": (lambda said: {**said, "settings": {"prompt": PROMPT}}, "the settings lack dtype"),
    "settings unknown": (changed(callback="x"), "hold callback"),
    "no digest": (lambda said: {**said, "model_digest": 1}, "lack model_digest"),
    "endless steps": (changed(steps=10**9), "--steps 1000000000: expected"),
    "a truth for a number": (changed(steps=True), "--steps True: expected"),
    "text for a number": (changed(step_size="20"), "--step-size 20: expected"),
    "an endless picture": (changed(height=10**6), "--height 1000000: expected"),
    "an infinite weight": (changed(losses={"segregation": float("inf")}), "--losses segregation inf"),
    "a prompt that is none": (changed(prompt=["a cat"]), "prompt: expected text"),
    "a book for a prompt": (changed(prompt="a cat " * 10_000), "characters; 20,000 are the most"),
    "subjects as text": (changed(subjects="cat"), "expected words of the prompt"),
    "a mask that is none": (changed(layout={"cat": "bm90IGEgUE5H"}), "the mask of 'cat' is no readable PNG"),
    "a model on the hub": (changed(model="some/model"), "say so: --model some/model"),
    "a model that is gone": (changed(model="/absent/model"), "there is no such folder"),
    "another model": (changed(model="xl"), "the files of xl are not those that drew forged.png"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_what_a_picture_says_is_not_trusted(generate, name):
    forge, words = FORGERIES[name]
    settings = Settings(PROMPT, ("cat",), model="sd", steps=1, height=32, width=32)
    said = json.loads(record.Record(settings, models.find("sd").identity, {}).as_text())
    info = PngImagePlugin.PngInfo()
    info.add_text("attnsuite", json.dumps(forge(said)))
    Image.new("RGB", (32, 32)).save("forged.png", pnginfo=info)
    done = generate("--from", "forged.png", "-o", "out", model=None, code=2)
    assert words in done.stderr and done.stderr.count("\n") == 1 and not os.path.exists("out")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"attnsuite": NaN}', "1" * 5000])
def test_settings_that_are_no_json(generate, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("attnsuite", text)
    Image.new("RGB", (8, 8)).save("forged.png", pnginfo=info)
    assert "cannot be repeated" in generate("--from", "forged.png", "-o", "out", model=None, code=2).stderr


def test_changed_files_of_the_model_are_noticed_and_can_be_meant(generate, zoo, tmp_path):
    shutil.copytree(zoo / "sd", "own")
    generate(PROMPT, *SUBJECTS, "-o", "out", *FAST, model="own")
    file = Path("own/unet/diffusion_pytorch_model.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    refused = generate("--from", "out/a-cat-and-a-dog-0.png", "-o", "again", model=None, code=2)
    assert "the files of own are not those that drew" in refused.stderr
    meant = generate("--from", "out/a-cat-and-a-dog-0.png", "-o", "again", model="own")
    assert "own is not the model that drew" in meant.stderr and os.listdir("again")


def test_a_model_in_the_cache_of_the_hub_is_known_by_its_commit(generate, zoo, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    cached = tmp_path / "hub/models--some--model"
    shutil.copytree(zoo / "sd", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    generate(PROMPT, *SUBJECTS, "-o", "out", *FAST, model="some/model")
    said = said_by("out/a-cat-and-a-dog-0.png")
    assert said["settings"]["model"] == f"some/model@{commit}" and said["model_digest"] == f"commit {commit}"
    assert "in every pixel" in generate("--from", "out/a-cat-and-a-dog-0.png", "-o", "again", model=None).stderr
    (cached / "snapshots" / commit / "unet/diffusion_pytorch_model.safetensors").unlink()  # as when it is cut off
    assert "did not answer" in generate(*OK, "--overwrite", model="some/model", code=2).stderr
    gone = generate("--from", "out/a-cat-and-a-dog-0.png", "-o", "again", model=None, code=2)
    assert f"say so: --model some/model@{commit}" in gone.stderr


def test_a_full_disk_leaves_no_half_of_a_picture(generate):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        done = generate(*OK, code=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "error: cannot write" in done.stderr and "the same command goes on" in done.stderr
    assert os.listdir("out") == []
    generate(*OK)


def test_the_model_that_ships_says_what_it_knows(generate):
    done = generate("a red circle and a blue zebra", "-s", "circle", "zebra", "-o", "out", *FAST, model=None)
    assert "text_to_scene, the model that ships, was trained on drawn scenes of 32 x 32 pixels" in done.stderr
    assert "circle" in done.stderr and "it does not know zebra" in done.stderr
    said = said_by("out/a-red-circle-and-a-blue-zebra-0.png")["settings"]
    assert (said["model"], said["guidance_scale"], said["height"]) == ("text_to_scene", 3.0, 32)


def test_no_permission_to_write(run, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    done = run("generate", PROMPT, *SUBJECTS, "-o", "locked/out", plain_user=True)
    assert done.code == 2 and "no permission to write into" in done.err and "locked" in done.err


def test_out_of_memory_says_what_to_lower(generate):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        done = generate(PROMPT, *SUBJECTS, "-o", "out", "--steps", 1, "--height", 2048, "--width", 2048, code=3)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert done.stderr.startswith("error: out of memory: lower --height and --width"), done.stderr
    assert done.stderr.count("\n") == 1


def test_unknown_words_are_those_that_fall_into_letters(zoo):
    pipe = models.load(models.find(str(zoo / "sd")), torch.device("cpu"), "float32")
    unknown, known = models.unknown_words(pipe, "A cat and a zebra, two dogs")
    assert unknown == ["zebra", "dogs"] and {"a", "cat", "fire", "two"} <= set(known)


def test_weights_of_losses_are_read():
    assert read_losses("segregation, retention = 0.5") == {"segregation": 1.0, "retention": 0.5}
    for text in ("", "=1", "segregation,segregation", "segregation=1=2", "segregation=inf"):
        with pytest.raises(UsageError, match="--losses"):
            read_losses(text)


def test_a_model_that_should_ship_and_does_not_is_named():
    with pytest.raises(weights.WeightsError, match="no_such_model is not part of this installation"):
        weights.shipped("no_such_model")
