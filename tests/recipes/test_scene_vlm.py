"""The small vision-language models: how they are trained, and what ships."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from recipes import scene_vlm as recipe
from recipes.scene_questions import (
    FORMATS,
    HELD_OUT_FORMATS,
    HELD_OUT_OBJECTS,
    KINDS,
    SIZE,
    Example,
    held_out,
    questions,
    sample_scene_of_many,
)
from recipes.scene_vlm_card import card, prompts, replies, score
from recipes.scene_vlm_model import FEATURE_LAYER, GRID, NUM_PATCHES, build_model, build_processor, conversation, save
from recipes.scenes import COLOURS, SHAPES, Scene, SceneObject, masks

SHIPPED = Path(__file__).parents[2] / "weights" / "scene_vlm"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    """Loaded as anybody would load them."""
    return {mask: LlavaForConditionalGeneration.from_pretrained(SHIPPED / mask) for mask in recipe.MASKS}


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def pictures() -> recipe.Pictures:
    return recipe.draw_pictures(48)


@pytest.fixture
def untrained(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(processor)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return held_out(160, seed=3)


def token(processor: LlavaProcessor, word: str) -> int:
    tokenizer: Any = processor.tokenizer
    return tokenizer.convert_tokens_to_ids(word)


def test_every_word_is_a_token_and_every_reply_is_read_back(processor: LlavaProcessor):
    rng = np.random.default_rng(0)
    scenes = [sample_scene_of_many(rng, held_out=True) for _ in range(60)]
    asked = {pair for scene in scenes for kind in KINDS for pair in questions(scene, kind)}
    texts = {text for text, _ in asked} | {own.instruction for own in FORMATS.values()}
    tokenizer: Any = processor.tokenizer
    assert tokenizer.unk_token_id not in {i for text in texts for i in tokenizer(text).input_ids}
    for answer in sorted({answer for _, answer in asked}):
        for own in FORMATS.values():
            ids = tokenizer(own.write(answer)).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == own.write(answer)


def test_users_may_write_capitals_and_unknown_words_are_marked(processor: LlavaProcessor):
    tokenizer: Any = processor.tokenizer
    assert tokenizer("What Colour is the circle?").input_ids == tokenizer("what colour is the circle?").input_ids
    assert tokenizer("RED").input_ids != tokenizer("red").input_ids  # an answer of its own
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]


def test_a_prompt_is_picture_question_and_marker(processor: LlavaProcessor, examples: list[Example]):
    batch = prompts(processor, examples[:8])
    image, padding = token(processor, "<image>"), token(processor, "<pad>")
    assert batch["pixel_values"].shape == (8, 3, SIZE, SIZE)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        own = ids[mask.bool()].tolist()
        assert set(ids[~mask.bool()].tolist()) <= {padding}
        assert own[: NUM_PATCHES + 1] == [token(processor, "<user>"), *[image] * NUM_PATCHES]
        assert own[-1] == token(processor, "<assistant>") and own.count(image) == NUM_PATCHES


def test_training_sees_pixels_as_the_processor_gives_them(
    processor: LlavaProcessor, pictures: recipe.Pictures, examples: list[Example]
):
    drawn = [Image.fromarray(own.permute(1, 2, 0).numpy()) for own in pictures.pixels[:4]]
    given = processor(text=["<image>"] * 4, images=drawn, return_tensors="pt").pixel_values
    torch.testing.assert_close(given, pictures.images(slice(4)), atol=1e-6, rtol=0)


def test_no_training_question_is_of_a_held_out_object_or_format(processor: LlavaProcessor, pictures: recipe.Pictures):
    assert not {item.name for scene in pictures.scenes for item in scene.objects} & HELD_OUT_OBJECTS
    dialogues = recipe.sample_dialogues(processor, pictures.scenes, 640, seed=0)
    tokenizer: Any = processor.tokenizer
    seen = set()
    for ids, index in zip(dialogues.input_ids, dialogues.pictures, strict=True):
        said = tokenizer.decode(ids).replace("<image>", "").replace("<user>", "").split("<assistant>")[0].strip()
        text, instruction = said.split("? ")
        kinds = [k for k in KINDS if text in {t for t, _ in questions(pictures.scenes[index], k)}]
        form = next(name for name, own in FORMATS.items() if own.instruction == instruction)
        seen |= {(kind, form) for kind in kinds}
    assert seen == {(kind, form) for kind in KINDS for form in FORMATS} - HELD_OUT_FORMATS


def test_only_replies_are_learnt(processor: LlavaProcessor, pictures: recipe.Pictures):
    dialogues = recipe.sample_dialogues(processor, pictures.scenes, 32, seed=1)
    tokenizer: Any = processor.tokenizer
    for index, ids, labels in zip(dialogues.pictures, dialogues.input_ids, dialogues.labels, strict=True):
        learnt = labels >= 0
        assert (ids[learnt] == labels[learnt]).all()
        assert tokenizer.decode(ids[learnt]).endswith("<end>")
        prompt, reply = tokenizer.decode(ids).split("<assistant>")
        assert reply.split("<end>")[0].strip() == tokenizer.decode(labels[learnt], skip_special_tokens=True)
        answers = {a for kind in KINDS for t, a in questions(pictures.scenes[index], kind) if f"{t}?" in prompt}
        assert any(answer in reply.lower() for answer in answers)


def test_the_tower_is_asked_for_what_is_there():
    circle = SceneObject("circle", "red", (0.25, 0.25), 0.3)
    cross = SceneObject("cross", "blue", (0.75, 0.6875), 0.3)
    shown, kinds, places = recipe.TowerTargets.of([Scene((circle, cross), 220)])
    names = [*COLOURS, *SHAPES, *(f"{c} {s}" for c in COLOURS for s in SHAPES)]
    assert {n for n, own in zip(names, shown[0], strict=True) if own} == {
        "red", "blue", "circle", "cross", "red circle", "blue cross",
    }  # fmt: skip
    grid = kinds.view(GRID, GRID, 2)
    colours, shapes = [*COLOURS, "ground"], [*SHAPES, "ground"]
    assert [colours[grid[1, 1, 0]], shapes[grid[1, 1, 1]]] == ["red", "circle"]
    assert [colours[grid[5, 5, 0]], shapes[grid[5, 5, 1]]] == ["blue", "cross"]
    assert [colours[grid[0, 7, 0]], shapes[grid[0, 7, 1]]] == ["ground", "ground"]
    left, low = places.view(GRID, GRID, 3)[[1, 5], [1, 5]].T[:2].diff()[:, 0].tolist()  # from circle to cross
    assert left == pytest.approx(0.5 / 0.23) and low == pytest.approx(0.4375 / 0.23)
    assert places.view(GRID, GRID, 3)[5, 5, 2].item() == pytest.approx((0.3 - 0.26) / 0.035)


def test_a_few_steps_lower_all_losses_of_the_tower(untrained: Any, pictures: recipe.Pictures):
    few = slice(16)
    tower, targets = untrained.model.vision_tower, recipe.TowerTargets.of(pictures.scenes[few])
    torch.manual_seed(1)
    head = recipe.TowerHead()
    losses = []
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=3e-4)
    for _ in range(5):
        loss = recipe.tower_step(tower, head, pictures.images(few), targets)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    assert (losses[-1] < losses[0]).all()


def test_the_projector_begins_with_features_standardised(untrained: Any):
    torch.manual_seed(2)
    features = 3 * torch.randn(512, NUM_PATCHES, 128) * torch.linspace(0.1, 5, 128) + torch.arange(128)
    recipe.standardise_features(untrained, features)
    hidden = untrained.model.multi_modal_projector.linear_1(features)
    assert hidden.mean().abs() < 0.1 and hidden.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("mask", recipe.MASKS)
def test_a_few_steps_lower_the_loss_of_the_language_model(
    mask: str, untrained: Any, processor: LlavaProcessor, pictures: recipe.Pictures
):
    features = recipe.encode(untrained.model.vision_tower, pictures)
    recipe.standardise_features(untrained, features)
    dialogues = recipe.sample_dialogues(processor, pictures.scenes, 40, seed=0)
    tower = {name: own.clone() for name, own in untrained.model.vision_tower.state_dict().items()}

    def loss() -> float:
        own = (features[dialogues.pictures], dialogues.input_ids, dialogues.labels)
        with torch.no_grad(), recipe.switch_of(mask, untrained, processor):
            return recipe.language_step(untrained, *own).item()

    before = loss()
    with recipe.switch_of(mask, untrained, processor):
        recipe.train_language(untrained, features, dialogues, batch_size=8)
    assert loss() < 0.8 * before
    assert all((own == tower[name]).all() for name, own in untrained.model.vision_tower.state_dict().items())


def test_under_mma_pictures_see_the_question_and_its_marker_alone(
    untrained: Any, processor: LlavaProcessor, pictures: recipe.Pictures
):
    """The mask written out, given to the model instead of the switch."""
    features = recipe.encode(untrained.model.vision_tower, pictures)
    dialogues = recipe.sample_dialogues(processor, pictures.scenes, 8, seed=0)
    ids = dialogues.input_ids
    own = (features[dialogues.pictures], ids, dialogues.labels)
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().repeat(len(ids), 1, 1, 1)  # [B, 1, L, L]
    for row, marker in enumerate((ids == token(processor, "<assistant>")).int().argmax(1).tolist()):
        mask[row, :, 1 : NUM_PATCHES + 1, NUM_PATCHES + 1 : marker + 1] = True
    with torch.no_grad(), recipe.switch_of("mma", untrained, processor):
        switched = recipe.language_step(untrained, *own)
    forward = untrained.forward
    untrained.forward = lambda **inputs: forward(attention_mask=mask, **inputs)
    with torch.no_grad():
        torch.testing.assert_close(recipe.language_step(untrained, *own), switched, atol=1e-6, rtol=0)
    del untrained.forward
    with torch.no_grad():
        assert (recipe.language_step(untrained, *own) - switched).abs() > 1e-4  # the causal mask is another


def test_the_command_trains_both_from_the_same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {"NUM_PICTURES": 16, "TOWER_STEPS": 2, "STEPS": 2, "BATCH_SIZE": 4}
    for name, value in small.items():
        monkeypatch.setattr(recipe, name, value)
    command = ["scene_vlm", "--seed", "5", "--num", "8", "-o"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path)])
    recipe.main()
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "b"), "--tower", str(tmp_path / "mma")])
    recipe.main()
    runs = [tmp_path / "causal", tmp_path / "mma", tmp_path / "b" / "causal", tmp_path / "b" / "mma"]
    models = [LlavaForConditionalGeneration.from_pretrained(run).state_dict() for run in runs]
    towers = [[own for name, own in model.items() if "vision_tower" in name] for model in models]
    for other in towers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(towers[0], other, strict=True))
    heads = [model["lm_head.weight"] for model in models]
    assert not torch.equal(heads[0], heads[1])  # the masks differ
    torch.testing.assert_close(heads[0], heads[1], atol=0.01, rtol=0)  # and two steps lead not far from one start
    assert "license: apache-2.0" in (tmp_path / "mma" / "README.md").read_text(encoding="utf-8")


def test_saving_rounds_to_half_and_loads_in_single(untrained: Any, processor: LlavaProcessor, tmp_path: Path):
    save(untrained, processor, tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    for name, own in untrained.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], own.half().float())


def test_the_shipped_folders_are_small_and_hold_no_code():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors", ".jinja"}
    assert {path.parent.name for path in files} == {*recipe.MASKS}


@pytest.mark.parametrize("mask", recipe.MASKS)
def test_shipped_models_answer_through_plain_transformers(mask: str, examples: list[Example]):
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED / mask)
    processor = AutoProcessor.from_pretrained(SHIPPED / mask)
    assert model.dtype == torch.float32 and isinstance(model, LlavaForConditionalGeneration)
    said = conversation(examples[0].question)
    said[0]["content"][0]["image"] = Image.fromarray(examples[0].picture).resize((200, 200))
    network: Any = model
    inputs = processor.apply_chat_template(
        said, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = network.generate(**inputs)
    reply = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert examples[0].question.follows(reply)
    assert tokens[0, -1] == model.generation_config.eos_token_id


def test_shipped_models_begin_with_one_tower(shipped: dict[str, Any]):
    causal, mma = (shipped[mask].model.vision_tower.state_dict() for mask in recipe.MASKS)
    assert all(torch.equal(own, mma[name]) for name, own in causal.items())


@pytest.fixture(scope="module")
def scores(shipped: dict[str, Any], processor: LlavaProcessor, examples: list[Example]) -> dict[str, Any]:
    found = {}
    for mask, model in shipped.items():
        with recipe.switch_of(mask, model, processor):
            found[mask] = score(examples, replies(model, processor, examples))
    return found


FLOORS = {"causal": 0.55, "mma": 0.6}


@pytest.mark.parametrize("mask", recipe.MASKS)
def test_shipped_models_answer_held_out_questions(mask: str, scores: dict[str, Any]):
    assert scores[mask].right.mean() > FLOORS[mask]
    assert scores[mask].follows.mean() > 0.95


def test_answers_come_from_the_picture(shipped: dict[str, Any], processor: LlavaProcessor, examples: list[Example]):
    """The same questions about other pictures get worse answers."""
    shifted = examples[len(KINDS) :] + examples[: len(KINDS)]
    swapped = [Example(b.picture, b.scene, a.question) for a, b in zip(examples, shifted, strict=True)]
    with recipe.switch_of("mma", shipped["mma"], processor):
        right = [score(own, replies(shipped["mma"], processor, own)).right.mean() for own in (examples, swapped)]
    assert right[1] < right[0] - 0.2


def test_the_class_token_looks_at_objects(shipped: dict[str, Any], pictures: recipe.Pictures):
    """In the layer whose output the projector reads: this is what ranks patches by importance."""
    tower = LlavaForConditionalGeneration.from_pretrained(SHIPPED / "causal", attn_implementation="eager")
    with torch.no_grad():
        weights = tower.model.vision_tower(pictures.images(slice(None)), output_attentions=True).attentions
    ranks = weights[FEATURE_LAYER][:, :, 0, 1:].mean(1)  # [P, N]
    objects = torch.stack([torch.from_numpy(masks(s, GRID)).sum(0).flatten() for s in pictures.scenes]) > 0.2
    inside = (ranks * objects).sum(1) / objects.sum(1)
    outside = (ranks * ~objects).sum(1) / (~objects).sum(1)
    assert (inside / outside).median() > 2


def test_the_card_has_what_was_measured(untrained: Any, processor: LlavaProcessor):
    text = card(untrained, processor, "mma", seed=7, minutes=12.3, num=16)
    assert "license: apache-2.0" in text and "12 minutes" in text and "--seed 7" in text
    assert all(f"| {kind} (n = 2) |" in text for kind in KINDS)
    assert "**all** (n = 16)" in text and "modality_mutual_attention" in text
