"""CLIP scores on small models of open_clip's own classes: the protocol spelt out slowly, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.scores import ClipScorer, _in_template, prompt_list, sub_prompts
from weights import WeightsError

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = ["a cat and a dog", "a lion with a crown", "a red car", "a cat and a dog"]
# float32 through a small network, in batches of different sizes.
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


def small_clip(kind: type[nn.Module] = open_clip.CLIP) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**CONFIG)


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer(small_clip(), batch_size=50)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Four, of different sizes and modes."""
    random = np.random.default_rng(0)
    shapes = ((40, 40, 3), (33, 50, 3), (64, 32), (9, 9, 4))
    return [Image.fromarray(random.integers(0, 256, shape).astype(np.uint8)) for shape in shapes]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """open_clip with one more name, 'ViT-tiny', and its tags, which the test may fill."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", CONFIG)
    tags: dict[str, Any] = {}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", tags)
    yield tags


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of the small model, in a folder that open_clip reads."""
    save_file(small_clip().state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path / "open_clip_model.safetensors"


def slow_scores(model: Any, image: Image.Image, prompt: str) -> tuple[float, float]:
    """Full and minimum score of one image by the protocol, text after text."""
    model.eval()
    preprocess: Any = image_transform_v2(PreprocessCfg(size=32), is_train=False)

    def unit(vector: Tensor) -> Tensor:
        return vector / vector.square().sum().sqrt()

    def embedded(text: str) -> Tensor:
        total = torch.zeros(16)
        for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
            # The published rule for articles, by letters.
            filled = template(text).replace("a a", "a").replace("the a", "a")
            total += unit(model.encode_text(open_clip.tokenize(filled))[0])
        return unit(total / 80)

    with torch.no_grad():
        looks = unit(model.encode_image(preprocess(image)[None])[0])
        separator = " and " if " and " in prompt else " with "
        halves = [float(looks @ embedded(part)) for part in prompt.split(separator)]
        return float(looks @ embedded(prompt)), min(halves)


def test_scores_are_the_protocol_spelt_out(scorer: ClipScorer, images: list[Image.Image]):
    full, minimum = scorer.image_text(images, PROMPTS)
    assert full.dtype == minimum.dtype == torch.float32 and full.shape == minimum.shape == (4,)
    for i, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        expected = slow_scores(scorer.model, image, prompt)
        assert (full[i].item(), minimum[i].item()) == pytest.approx(expected, abs=1e-6)
    assert full[2] == minimum[2], "a prompt without halves"
    assert minimum[0] != full[0] and minimum[1] != full[1]


def test_prompt_features_are_those_of_the_zero_shot_classifier(scorer: ClipScorer):
    # Prompts without an article go into the templates as they are.
    expected = open_clip.build_zero_shot_classifier(
        scorer.model, open_clip.tokenize, ["cat", "two dogs"], open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(scorer._features_of_prompts(["cat", "two dogs"]), expected.T, **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batches_do_not_change_scores(scorer: ClipScorer, images: list[Image.Image], batch_size: int):
    other = ClipScorer(scorer.model, batch_size=batch_size)
    for ours, theirs in zip(other.image_text(images, PROMPTS), scorer.image_text(images, PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_text_features_are_computed_once_for_each_prompt(images: list[Image.Image]):
    texts: list[str] = []

    def tokenizer(batch: list[str]) -> Tensor:
        texts.extend(batch)
        return open_clip.tokenize(batch)

    scorer = ClipScorer(small_clip(), tokenizer)
    first = scorer.image_text(images, PROMPTS)
    # Three prompts and four halves.
    assert len(texts) == 7 * 80
    torch.testing.assert_close(scorer.image_text(images, PROMPTS), first, atol=0, rtol=0)
    scorer.caption_text(["a photo of a cat"], PROMPTS[:1])
    assert texts[7 * 80 :] == ["a photo of a cat"]


def test_a_model_with_a_text_tower_of_its_own_is_scored_alike(images: list[Image.Image]):
    scorer = ClipScorer(small_clip(open_clip.CustomTextCLIP))
    full, minimum = scorer.image_text(images[:2], PROMPTS[:2])
    for i in range(2):
        expected = slow_scores(scorer.model, images[i], PROMPTS[i])
        assert (full[i].item(), minimum[i].item()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("convert", [lambda m: open_clip.convert_weights_to_lp(m, torch.bfloat16), nn.Module.bfloat16])
def test_a_model_in_half_precision_gives_scores_in_single(
    scorer: ClipScorer, images: list[Image.Image], convert: Callable[[nn.Module], Any]
):
    model = small_clip()
    convert(model)
    half, single = ClipScorer(model).image_text(images, PROMPTS), scorer.image_text(images, PROMPTS)
    for ours, theirs in zip(half, single, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)  # bfloat16 has 8 bits


def test_a_model_in_training_mode_is_put_into_evaluation_mode():
    assert not ClipScorer(small_clip().train()).model.training


def test_captions_are_compared_as_they_are(scorer: ClipScorer, images: list[Image.Image]):
    calls: list[int] = []

    def captioner(batch: Any) -> list[str]:
        calls.append(len(batch))
        return [f"a picture of width {image.width}" for image in batch]

    small = ClipScorer(scorer.model, batch_size=3)
    scores, captions = small.text_text(images, PROMPTS, captioner)
    assert calls == [3, 1]
    assert captions == [f"a picture of width {image.width}" for image in images]
    with torch.no_grad():
        for score, caption, prompt in zip(scores, captions, PROMPTS, strict=True):
            said = scorer.model.encode_text(open_clip.tokenize(caption))[0]
            asked = scorer._features_of_prompts([prompt])[0]
            assert score.item() == pytest.approx(float(said @ asked / said.norm()), abs=1e-6)
    torch.testing.assert_close(scorer.caption_text(captions, PROMPTS), scores, **CLOSE)


# Prompts


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat and a dog", ["a cat", "a dog"]),
        ("a cat with a crown", ["a cat", "a crown"]),
        ("a cat with a crown and a dog", ["a cat with a crown", "a dog"]),
        ("a cat and a dog and a bird", ["a cat", "a dog", "a bird"]),
        ("a sandy bandana", []),
        ("without", []),
    ],
)
def test_prompts_are_split_at_and_else_at_with(prompt: str, parts: list[str]):
    assert sub_prompts(prompt) == parts


def test_the_list_has_276_prompts_in_three_groups():
    prompts = prompt_list()
    assert Counter(p.group for p in prompts) == {"animal-animal": 66, "animal-object": 144, "object-object": 66}
    assert len({p.text for p in prompts}) == len({p.subjects for p in prompts}) == 276
    assert all(len(sub_prompts(p.text)) == 2 for p in prompts)
    for p in prompts:
        assert all(part.split()[-1] == word for part, word in zip(sub_prompts(p.text), p.subjects, strict=True))
        assert len(set(p.subjects)) == 2


def test_the_forms_of_the_list():
    texts = [p.text for p in prompt_list()]
    assert {"a cat and a dog", "a horse and a elephant", "a cat with a crown", "a elephant with a bow"} <= set(texts)
    assert sum(" with a " in text for text in texts) == 36 and all(text.startswith("a ") for text in texts)
    colours = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white"}
    middle = Counter(word for text in texts for word in text.split() if word in colours)
    assert set(middle) == colours and middle.total() == 108 + 2 * 66


def test_colours_are_drawn_by_the_seed_and_nothing_else_is():
    assert prompt_list(3) == prompt_list(3)
    assert prompt_list(3) != prompt_list(4)
    assert [p.subjects for p in prompt_list(3)] == [p.subjects for p in prompt_list(4)]
    state = torch.get_rng_state()
    prompt_list()
    assert torch.equal(state, torch.get_rng_state())


def test_articles_meet_in_templates_as_they_do_in_the_published_code():
    texts = {text for p in prompt_list() for text in (p.text, *sub_prompts(p.text))}
    for template, text in itertools.product(open_clip.OPENAI_IMAGENET_TEMPLATES, sorted(texts)):
        assert _in_template(template, text) == template(text).replace("a a", "a").replace("the a", "a")
    assert _in_template(lambda c: f"a photo of the {c}.", "an apple") == "a photo of an apple."
    assert _in_template(lambda c: f"a photo of the {c}.", "animal") == "a photo of the animal."


# Models by name


def test_a_folder_is_read_with_its_own_preprocessing(checkpoint: Path, images: list[Image.Image]):
    scorer = ClipScorer.from_pretrained(f"local-dir:{checkpoint.parent}")
    preprocess: Any = image_transform_v2(PreprocessCfg(size=32, mean=(0.5,) * 3, std=(0.25,) * 3), is_train=False)
    expected = ClipScorer(small_clip(), preprocess=preprocess).image_text(images, PROMPTS)
    torch.testing.assert_close(scorer.image_text(images, PROMPTS), expected)


def test_a_name_and_a_file_are_read(checkpoint: Path, registry: dict[str, Any], scorer: ClipScorer):
    named = ClipScorer.from_pretrained("ViT-tiny", str(checkpoint))
    torch.testing.assert_close(named._features_of_prompts(PROMPTS), scorer._features_of_prompts(PROMPTS))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_tag_decides_the_activation(checkpoint: Path, registry: dict[str, Any], quick_gelu: bool):
    registry["published"] = {"file": str(checkpoint), "quick_gelu": quick_gelu}
    model = ClipScorer.from_pretrained("ViT-tiny", "published").model
    activations = [m for m in model.modules() if isinstance(m, nn.GELU | QuickGELU)]
    assert activations and all(isinstance(m, QuickGELU) == quick_gelu for m in activations)


def test_the_default_model_of_the_protocol_is_one_of_open_clips():
    assert open_clip.get_pretrained_cfg("ViT-B-16", "openai")["quick_gelu"]


def test_weights_that_cannot_be_fetched_are_named_with_a_remedy(registry: dict[str, Any]):
    registry["away"] = {"url": "http://127.0.0.1:9/vit-tiny.pt"}  # nobody answers there
    with pytest.raises(WeightsError, match=r"'away' of 'ViT-tiny' cannot be had .*refused.*local-dir:"):
        ClipScorer.from_pretrained("ViT-tiny", "away")


def test_a_folder_without_weights_is_refused(checkpoint: Path):
    checkpoint.unlink()
    with pytest.raises(WeightsError, match="could not be loaded"):
        ClipScorer.from_pretrained(f"local-dir:{checkpoint.parent}")


# What is refused


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        (
            "ViT-B-61",
            "openai",
            r"'ViT-B-61' is no model of open_clip; near it.*'ViT-B-16'.*list_models\(\)",
        ),
        ("clip", "openai", "is no model of open_clip"),
        ("ViT-B-16", "opnai", "'opnai' is neither a file nor a tag of 'ViT-B-16', which has 'openai', 'laion400m_e31'"),
        ("ViT-B-16", None, "pretrained=None is neither a file nor a tag"),
    ],
)
def test_unknown_names_say_how_to_find_the_known_ones(name: str, tag: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        ClipScorer.from_pretrained(name, tag)


def test_numbers_that_differ_and_empty_input_are_refused(scorer: ClipScorer, images: list[Image.Image]):
    with pytest.raises(ValueError, match=r"4 images for 2 prompts.*\[prompt\] \* 4"):
        scorer.image_text(images, PROMPTS[:2])
    with pytest.raises(ValueError, match="2 captions for 1 prompts"):
        scorer.caption_text(["one", "two"], PROMPTS[:1])
    with pytest.raises(ValueError, match="no images: there is nothing to score"):
        scorer.image_text([], [])
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        scorer.image_text(images[:2], ["a cat", " "])
    with pytest.raises(ValueError, match="3 captions for 4 images"):
        scorer.text_text(images, PROMPTS, lambda _: ["a", "b", "c"])


def test_wrong_kinds_are_refused(scorer: ClipScorer, images: list[Image.Image]):
    with pytest.raises(TypeError, match="prompts: expected a list of str, got str"):
        scorer.image_text(images, "a cat")
    with pytest.raises(TypeError, match=r"images\[0\]: expected Image, got ndarray"):
        scorer.image_text([np.zeros((4, 4, 3))], ["a cat"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="images: expected a list of Image, got Image"):
        scorer.image_text(images[0], ["a cat"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"captions\[1\]: expected str, got dict"):
        scorer.text_text(images[:2], PROMPTS[:2], lambda _: ["a", {"generated_text": "b"}])  # pyright: ignore


def test_a_model_with_another_vocabulary_needs_its_tokenizer():
    model = open_clip.CLIP(**{**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": 100}})
    with pytest.raises(ValueError, match=r"vocabulary of 100, CLIP's tokenizer one of 49408.*get_tokenizer"):
        ClipScorer(model)
    with pytest.raises(ValueError, match="batch_size=0"):
        ClipScorer(small_clip(), batch_size=0)


def test_scores_are_cosines(scorer: ClipScorer, images: list[Image.Image]):
    texts = [p.text for p in itertools.islice(prompt_list(), 4)]
    for score in itertools.chain(*scorer.image_text(images, texts), scorer.caption_text(texts, texts)):
        assert -1 <= score <= 1 and not math.isnan(score)
