"""The small text-to-image model: how it is trained, and what ships."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from recipes import text_to_scene as recipe
from recipes.scenes import caption, sample_scene, shows
from recipes.text_to_scene_card import Rate, card, errors_after_autoencoder, focus, generate

SHIPPED = Path(__file__).parents[2] / "weights" / "text_to_scene"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shipped() -> Any:
    """Loaded as anybody would load it."""
    pipe = StableDiffusionPipeline.from_pretrained(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def untrained() -> Any:
    torch.manual_seed(0)
    pipe = recipe.build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pairs_are_seen_or_held_out_and_each_object_is_in_one_that_is_held_out():
    pairs = [frozenset(pair) for pair in (*recipe.SEEN_PAIRS, *recipe.HELD_OUT_PAIRS)]
    assert len(pairs) == len(set(pairs)) == math.comb(len(recipe.OBJECTS), 2)
    assert sorted(name for pair in recipe.HELD_OUT_PAIRS for name in pair) == sorted(recipe.OBJECTS)
    assert ("red circle", "blue square") in recipe.SEEN_PAIRS


def test_no_training_scene_shows_a_held_out_pair():
    rng = np.random.default_rng(0)
    shown = [tuple(item.name for item in recipe.sample_training_scene(rng).objects) for _ in range(1500)]
    pairs = [names for names in shown if len(names) == 2]
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in recipe.SEEN_PAIRS}
    assert {*pairs} == {*recipe.SEEN_PAIRS, *(pair[::-1] for pair in recipe.SEEN_PAIRS)}  # in either order
    assert len(pairs) / len(shown) == pytest.approx(recipe.PAIR_SHARE, abs=0.05)
    assert {names[0] for names in shown if len(names) == 1} == {*recipe.OBJECTS}


def test_every_word_of_a_caption_is_one_token_and_other_text_is_spelt(tmp_path: Path):
    tokenizer = recipe.build_tokenizer(tmp_path)
    for first, second in (*recipe.SEEN_PAIRS, *recipe.HELD_OUT_PAIRS):
        text = caption([first, second])
        tokens = tokenizer.tokenize(text)
        assert [token.removesuffix("</w>") for token in tokens] == text.split()
        assert [tokens[i - 1] for i in recipe.COLOUR_POSITIONS] == [f"{n.split()[0]}</w>" for n in (first, second)]
        assert [tokens[i - 1] for i in recipe.NOUN_POSITIONS] == [f"{n.split()[1]}</w>" for n in (first, second)]
    other = tokenizer("Fünf große Bären!").input_ids
    assert tokenizer.unk_token_id not in other[1:-1]
    assert tokenizer.decode(other, skip_special_tokens=True) == "fünf große bären !"


def test_targets_of_attention_are_distributions_over_the_tokens():
    shares = torch.rand(3, 2, 16, 16) / 2
    targets = recipe.attention_targets(shares, 24)
    torch.testing.assert_close(targets.sum(-1), torch.ones(3, 16, 16))
    torch.testing.assert_close(targets[..., 7], recipe.NOUN_SHARE * shares[:, 1])
    torch.testing.assert_close(targets[..., 2], recipe.COLOUR_SHARE * shares[:, 0])
    assert (targets[..., [1, 4, 5, *range(8, 24)]] == 0).all()


def test_grounding_is_least_where_attention_is_on_the_objects():
    scene = sample_scene(np.random.default_rng(0), ["red circle", "blue square"])
    shares = torch.from_numpy(recipe.masks(scene, 16))[None]
    right = recipe.attention_targets(shares, 24)
    swapped = recipe.attention_targets(shares.flip(1), 24)
    flat = torch.full_like(right, 1 / 24)
    losses = [recipe.grounding_loss(maps, shares).item() for maps in (right, swapped, flat)]
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] == pytest.approx(math.log(24), rel=1e-5)
    assert recipe.grounding_loss(flat, torch.zeros_like(shares)) == 0  # an empty caption is grounded nowhere


def test_an_empty_caption_has_no_places(untrained: Any):
    rng = np.random.default_rng(0)
    scenes = recipe.encode(untrained.vae, [recipe.sample_training_scene(rng) for _ in range(8)])
    batch = scenes.choose(rng, 200)
    empty = torch.tensor([not text for text in batch.captions])
    assert 0 < empty.sum() < 60
    assert (batch.shares[empty] == 0).all()
    assert (batch.shares[~empty].amax((1, 2, 3)) > 0).all()


def test_a_few_steps_lower_the_loss_of_the_autoencoder(untrained: Any):
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    images = recipe.images_of([recipe.sample_training_scene(rng) for _ in range(4)])
    before = recipe.autoencoder_step(untrained.vae, images).item()
    recipe.train_autoencoder(untrained.vae, steps=6)
    with torch.no_grad():
        assert recipe.autoencoder_step(untrained.vae, images).item() < before
        latents = untrained.vae.encode(images).latent_dist.mode() * untrained.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.3)


def losses_of_denoiser(pipe: Any) -> torch.Tensor:
    torch.manual_seed(1)
    rng = np.random.default_rng(2)
    scenes = recipe.encode(pipe.vae, [recipe.sample_training_scene(rng) for _ in range(16)])
    with torch.no_grad():
        return torch.stack(recipe.denoiser_step(pipe, DDPMScheduler.from_config(pipe.scheduler.config), scenes))


def test_a_few_steps_lower_both_losses_of_the_denoiser(untrained: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recipe, "NUM_SCENES", 32)
    untrained.vae.register_to_config(scaling_factor=1.0)
    before = losses_of_denoiser(untrained)
    recipe.train_denoiser(untrained, steps=8)
    after = losses_of_denoiser(untrained)
    assert after.isfinite().all()
    assert (after < before).all(), f"{before.tolist()} -> {after.tolist()}"


def test_the_shipped_folder_is_small_and_holds_only_safetensors():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    index = json.loads((SHIPPED / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_the_shipped_model_loads_plainly_in_one_precision(shipped: Any):
    assert {shipped.unet.dtype, shipped.vae.dtype, shipped.text_encoder.dtype} == {torch.float32}
    assert shipped.safety_checker is None and shipped.feature_extractor is None
    for name in recipe.OBJECTS:
        assert shipped.tokenizer.tokenize(caption([name])) == [f"{word}</w>" for word in ("a", *name.split())]


def test_the_shipped_model_draws_at_its_own_size(shipped: Any):
    image = shipped("a red circle", num_inference_steps=2).images[0]
    assert image.size == (recipe.SIZE, recipe.SIZE)


def test_objects_are_still_found_after_the_shipped_autoencoder(shipped: Any):
    errors = errors_after_autoencoder(shipped.vae, num=300)
    assert errors.objects > 300
    assert errors.misses < 0.01 * errors.objects
    assert errors.false_alarms < 0.01 * errors.objects


def test_the_shipped_model_knows_every_object_alone(shipped: Any):
    names = [(name,) for name in recipe.OBJECTS] * 3
    pictures = generate(shipped, [caption(own) for own in names], range(len(names)))
    assert sum(map(shows, pictures, names)) >= 10


def test_a_seed_gives_the_same_picture_again(shipped: Any):
    first, again, other = (generate(shipped, ["a blue square"], [seed]) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_nouns_of_the_shipped_model_are_attended_to_on_their_objects(shipped: Any, untrained: Any):
    assert focus(shipped, num=24) > 3
    assert focus(untrained, num=24) < 1.5


def test_the_card_has_what_was_measured(untrained: Any):
    text = card(untrained, num=2, minutes=12.3)
    assert "license: apache-2.0" in text and "12 minutes" in text
    assert text.count("n = 2)") == 3
    assert all(name in text for name in recipe.OBJECTS)


def test_a_rate_is_written_with_its_interval():
    assert str(Rate(50, 100)) == "50.0% (40%–60%, n = 100)"


def test_saving_and_loading_gives_the_same_pictures(untrained: Any, tmp_path: Path):
    before = generate(untrained, ["a red circle"], [0])
    recipe.save(untrained, tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    difference = generate(loaded, ["a red circle"], [0]).astype(int) - before
    assert np.abs(difference).max() <= 3  # weights were rounded to half precision
