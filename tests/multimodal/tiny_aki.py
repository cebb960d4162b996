"""AKI at tiny size: random weights, a tokenizer laid out as Phi-3.5's, and the files that the authors publish."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import Phi3Config, PreTrainedTokenizerFast, SiglipVisionConfig

from multimodal.aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor

BOS, END, STOP, PAD, IMAGE_ID = 1, 49, 50, 59, 60
ROWS = 64  # of the main tables; those from PAD + 1 on are padding
TOKENS, FEATURES = 5, 16  # vision tokens of a picture; its patches

IMAGE = -1
"""In a prompt for :func:`batch`: a picture."""

PROMPTS = ((BOS, 10, 11, IMAGE, 20, 21, 22, STOP, 30), (BOS, 12, IMAGE, 23, STOP))

_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def config(**changes: Any) -> AkiConfig:
    """AKI's layout with small numbers."""
    text = Phi3Config(
        **_LAYERS,
        hidden_size=32,
        vocab_size=ROWS,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=0,
    )
    sizes = {
        "vision_config": SiglipVisionConfig(**_LAYERS, hidden_size=24, image_size=16, patch_size=4),
        "text_config": text,
        "initial_tokenizer_len": IMAGE_ID,
        "stop_token_id": STOP,
        "pad_token_id": PAD,
        "num_vision_tokens": TOKENS,
        "resampler_depth": 2,
        "resampler_heads": 3,
        "resampler_head_dim": 4,
    }
    return AkiConfig(**{**sizes, **changes})


def new_model(**changes: Any) -> AkiForConditionalGeneration:
    """A model with weights of its own, every one of which matters."""
    torch.manual_seed(0)
    model = AkiForConditionalGeneration(config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones when new
            parameter.data += 0.3 * torch.randn_like(parameter)
        if any(part in name for part in ("qkv_proj", "q_proj.weight", "k_proj.weight", "to_q", "to_kv")):
            parameter.data *= 3  # attention then differs from token to token
    model.generation_config.update(pad_token_id=PAD, eos_token_id=None, do_sample=False, max_new_tokens=4)
    model.generation_config.suppress_tokens = [IMAGE_ID]
    return model


@functools.cache
def model() -> AkiForConditionalGeneration:
    """One that tests share and do not change."""
    return new_model()


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batch(prompts: Sequence[Sequence[int]] = PROMPTS, *, padding: str = "left") -> dict[str, Tensor]:
    """Token ids with :data:`IMAGE` expanded, padded, and the pictures."""
    rows = [
        torch.tensor([id for token in prompt for id in ([IMAGE_ID] * TOKENS if token == IMAGE else [token])])
        for prompt in prompts
    ]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=padding)
    inputs = {"input_ids": pad(rows, padding_value=PAD), "attention_mask": pad([torch.ones_like(row) for row in rows])}
    count = sum(list(prompt).count(IMAGE) for prompt in prompts)
    return {**inputs, "pixel_values": pictures(count)} if count else inputs


_WORDS = """A chat between a curious user and an artificial intelligence assistant . The assistant gives helpful ,
detailed , and polite answers to the user ' s questions . What is this here ? cat"""


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows words, and the special tokens of Phi-3.5; not yet those that AKI adds."""
    ids = {word: index for index, word in enumerate(dict.fromkeys(["<unk>", "<s>", *_WORDS.split()]))}
    special = {END: "<|end|>", STOP: "<|assistant|>", 51: "<|system|>", 52: "<|user|>", 53: "<|endoftext|>"}
    assert len(ids) < END
    named = {index: f"<filler{index}>" for index in range(len(ids), PAD)} | special
    inner = Tokenizer(models.WordLevel({**ids, **{word: index for index, word in named.items()}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="<|end|>", pad_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": list(special.values())})
    return made


@functools.cache
def processor() -> AkiProcessor:
    return AkiProcessor.from_tokenizer(tokenizer(), config())


def write_parts(folder: Path) -> dict[str, str]:
    """The folders that a published `config.json` refers to, written; returns the references."""
    made = config()
    parts: Any = {"vision_encoder_path": made.vision_config, "lang_model_path": made.text_config}
    for key, part in parts.items():
        written = part.to_dict() | ({"vocab_size": ROWS} if key == "lang_model_path" else {})
        (folder / key).mkdir(parents=True)
        (folder / key / "config.json").write_text(json.dumps(written), encoding="utf-8")
    return {key: str(folder / key) for key in parts}


def write_published(folder: Path, parts: Path, state_dict: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Files as the authors publish them: no `model_type`, parts by reference, one file of weights.

    What is constant in theirs and smaller here is told besides.
    """
    smaller = ("stop_token_id", "resampler_depth", "resampler_heads", "resampler_head_dim")
    written = {
        **{name: getattr(config(), name) for name in smaller},
        **write_parts(parts),
        "initial_tokenizer_len": IMAGE_ID,
        "pad_token_id": PAD,
        "num_vision_tokens": TOKENS,
        "decoder_layers_attr_name": "model.layers",
        "base_img_size": None,
        "n_px": 16,
        "norm_mean": 0.5,
        "norm_std": 0.5,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    save_file(state_dict or model().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return written
