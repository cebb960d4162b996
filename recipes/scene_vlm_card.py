"""Asks what `recipes.scene_vlm` trained, counts right answers and right formats, and writes the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from recipes import scene_vlm as recipe
from recipes.scene_questions import FORMATS, HELD_OUT_FORMATS, HELD_OUT_OBJECTS, KINDS, SIZE, Example, held_out
from recipes.scene_vlm_model import NUM_PATCHES, conversation

__all__ = ["Scores", "card", "prompts", "replies", "score"]

CARD_SEED = 1  # of the card's questions: of those for development


def prompts(processor: LlavaProcessor, examples: Sequence[Example]) -> Any:
    """Pictures and questions as a model takes them, padded on the left.

    Args:
        processor: The model's.
        examples: B of them.

    Returns:
        The processor's batch: `input_ids` and `attention_mask` `[B, L]`, `pixel_values` `[B, 3, H, W]`.
    """
    texts = [
        processor.apply_chat_template(conversation(example.question), add_generation_prompt=True)
        for example in examples
    ]
    images = [Image.fromarray(example.picture) for example in examples]
    process: Any = processor
    return process(text=texts, images=images, return_tensors="pt", padding=True)


@torch.inference_mode()
def replies(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, examples: Sequence[Example], batch_size: int = 64
) -> list[str]:
    """What a model says, greedily; under whatever switches it is.

    Args:
        model: Trained.
        processor: Its own.
        examples: Asked in batches.
        batch_size: Of one call of `generate`.

    Returns:
        One reply for each example, without special tokens.
    """
    network: Any = model
    said: list[str] = []
    for start in range(0, len(examples), batch_size):
        inputs = prompts(processor, examples[start : start + batch_size]).to(model.device)
        tokens = network.generate(**inputs)
        said += processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return said


@dataclass(frozen=True)
class Scores:
    """What became of questions.

    Attributes:
        right: Whether the answer is right, in whatever format, `[E]` bool.
        follows: Whether the format is the one asked for, be the answer right or wrong, `[E]` bool.
    """

    right: np.ndarray
    follows: np.ndarray


def score(examples: Sequence[Example], said: Sequence[str]) -> Scores:
    """Judges replies by program.

    Args:
        examples: What was asked, E of them.
        said: The reply to each.
    """
    pairs = [(example.question, reply) for example, reply in zip(examples, said, strict=True)]
    return Scores(
        np.array([question.answered(reply) for question, reply in pairs]),
        np.array([question.follows(reply) for question, reply in pairs]),
    )


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# scene_vlm, {name}

LLaVA in small: {parameters:.1f} M parameters, {SIZE} x {SIZE} pixels, {NUM_PATCHES} image tokens. It answers questions
about drawn scenes of two to five coloured shapes, in the format asked for. With it, what a change of attention does to
a vision-language model can be seen on any machine and without a download.
{mask}
```python
model = LlavaForConditionalGeneration.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
content = [
    {{"type": "image", "image": picture}},
    {{"type": "text", "text": "{prompt}"}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
tokens = model.generate(**inputs)
processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```

| questions | right | in the format asked for |
| --- | --- | --- |
{rows}

- **Measured** on {num} held-out questions (`recipes.scene_questions.held_out({num}, seed={CARD_SEED})`), greedily, by
  program: an answer is right whatever its format, a format is right whatever the answer.
- **It can be asked** in the words of `recipes/scene_questions.py` only, with one of: {instructions}.
- **Data**: {NUM_PICTURES:,} scenes drawn by `recipes/scenes.py`, {questions:,} questions about them. Never drawn:
  {objects}. Never asked for together: {formats}.
- **Training**: `python -m recipes.scene_vlm --seed {seed}`, on one CPU thread. {TOWER_STEPS} steps of the vision tower
  alone, whose class token learns which objects are in the picture and whose patches learn what they show, its place
  and its size; then, the tower frozen, {STEPS} steps of the projector and the language model in {minutes:.0f} minutes.
  The model with the other mask began with the same weights and saw the same questions in the same order.
- **Limits**: it knows {words} words and this one kind of picture. A photograph is taken, and means nothing to it.
- **Licence**: Apache-2.0. No data of others was used.
"""
_MASKS = {
    "causal": "Its attention is causal, as in most models.\n",
    "mma": """
It was trained under modality-mutual attention, where image tokens also read the question, and must be used under it:
`with modality_mutual_attention(model, stop_token_id=processor.tokenizer.convert_tokens_to_ids("<assistant>")):` from
`multimodal`.
""",
}


def _rows(examples: Sequence[Example], scores: Scores) -> list[str]:
    kinds = np.array([example.question.kind for example in examples])
    groups = {kind: kinds == kind for kind in KINDS}
    groups["an object in the picture that is new"] = np.array([example.new_object for example in examples])
    groups["a format that is new for the kind"] = np.array([example.new_format for example in examples])
    groups["**all**"] = np.ones(len(examples), dtype=bool)
    return [
        f"| {name} (n = {own.sum()}) | {scores.right[own].mean():.1%} | {scores.follows[own].mean():.1%} |"
        for name, own in groups.items()
        if own.any()
    ]


def card(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    mask: str,
    seed: int,
    minutes: float,
    num: int,
) -> str:
    """The model's card, with shares measured on `num` questions.

    Args:
        model: Trained with `mask`.
        processor: Its own.
        mask: One of `recipes.scene_vlm.MASKS`.
        seed: It was trained from.
        minutes: CPU time of training without the tower.
        num: Of questions.
    """
    examples = held_out(num, CARD_SEED)
    with recipe.switch_of(mask, model, processor):
        scores = score(examples, replies(model, processor, examples))
    tokenizer: Any = processor.tokenizer
    facts = {
        "name": {"causal": "causal attention", "mma": "modality-mutual attention"}[mask],
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "SIZE": SIZE,
        "NUM_PATCHES": NUM_PATCHES,
        "mask": _MASKS[mask],
        "folder": f"weights/scene_vlm/{mask}",
        "prompt": examples[0].question.prompt,
        "rows": "\n".join(_rows(examples, scores)),
        "num": num,
        "CARD_SEED": CARD_SEED,
        "instructions": "; ".join(own.instruction for own in FORMATS.values()),
        "NUM_PICTURES": recipe.NUM_PICTURES,
        "questions": recipe.STEPS * recipe.BATCH_SIZE,
        "objects": ", ".join(sorted(HELD_OUT_OBJECTS)),
        "formats": "; ".join(f"{kind} and {form}" for kind, form in sorted(HELD_OUT_FORMATS)),
        "seed": seed,
        "TOWER_STEPS": recipe.TOWER_STEPS,
        "STEPS": recipe.STEPS,
        "minutes": minutes,
        "words": len(tokenizer),
    }
    return _CARD.format(**facts)
