"""The small vision-language model of `recipes.scene_vlm`: LLaVA's parts in small, and how one talks to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from recipes.scene_questions import NUMBERS, SIZE, Question, plural
from recipes.scenes import COLOURS, SHAPES

__all__ = [
    "FEATURE_LAYER",
    "GRID",
    "NUM_PATCHES",
    "TOWER",
    "build_model",
    "build_processor",
    "conversation",
    "dialogue",
    "save",
]

PATCH = 8
GRID = SIZE // PATCH
NUM_PATCHES = GRID * GRID
TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
    "projection_dim": 128,
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # about 1 / sqrt(width); with 0.02, made for wide models, it hardly learns where to look
}
FEATURE_LAYER = -2
"""Of the tower's hidden states, the one that the projector reads; LLaVA's."""

_SPECIALS = ("<pad>", "<unk>", "<user>", "<assistant>", "<end>", "<image>")
_WORDS = """
    what colour shape is the object objects how many are there a left right of above below has same as smallest largest
    answer in one word capitals sentence json ? . {" ":" "}
"""
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_processor() -> LlavaProcessor:
    """Pictures of any size to tower's size; words to tokens, one each; `<image>` to as many as there are patches.

    The user's words may be in capitals or not. The answers in capitals are words of their own.
    """
    answers = [*COLOURS, *SHAPES, *NUMBERS, "yes", "no"]
    words = list(dict.fromkeys([*_SPECIALS, *_WORDS.split(), *map(plural, SHAPES), *answers]))
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken(answer.upper(), single_word=True, normalized=False) for answer in answers])
    spaces = {" ?": "?", " .": ".", '{" ': '{"', ' ":" ': '":"', ' "}': '"}'}
    joined = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*joined, *(decoders.Replace(old, new) for old, new in spaces.items())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>", "<image>"],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=LANGUAGE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    side = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy then takes away
        chat_template=_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The untrained model; it takes its weights from torch's own generator."""
    tokenizer: Any = processor.tokenizer
    marks = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **LANGUAGE, **marks),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=LANGUAGE["tie_word_embeddings"],
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**marks, max_new_tokens=12, do_sample=False)
    return model


def conversation(question: Question) -> list[dict[str, Any]]:
    """What the user says, for `apply_chat_template`: the picture, then the question."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]


def dialogue(question: Question) -> list[dict[str, Any]]:
    """A question with its right reply, for `apply_chat_template`."""
    return [*conversation(question), {"role": "assistant", "content": question.reply}]


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes model and processor; the weights in half precision, to be loaded in single."""
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
