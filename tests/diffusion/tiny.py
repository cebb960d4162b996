"""Real pipelines of diffusers, small enough for tests: random weights, but every part is what it is in the large."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ["a", "and", "the", "on", "cat", "cats", "dog", "fire", "truck", "box", "boxes", "red", "blue", "black", "two"]
LENGTH = 20
UNSAFE = {"requires_safety_checker": False}
"""What keeps a pipeline without a safety checker from warning of it."""


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of CLIP's kind that knows a few words; all others fall apart into letters."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []

    for word in sorted(WORDS, key=len, reverse=True):  # a merge of a short word must not come first in a long one
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if merge not in merges:
                merges.append(merge)
            if pieces[0] not in vocab:
                vocab.append(pieces[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, pad_token="<|endoftext|>"
    )


def text_config(words: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **changes,
    )


def unet(cross_attention_dim: int = 32, **changes: Any) -> UNet2DConditionModel:
    """Cross-attention on the latent's own level and on the next; the mid block on the coarser one."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    network = UNet2DConditionModel(**{**config, **changes}).eval()
    # Random maps are nearly flat; larger queries and keys make them differ from place to place, as trained ones do.
    for name, parameter in network.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.data *= 6
    return network


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def stable_diffusion(folder: Path, **changes: Any) -> StableDiffusionPipeline:
    words = tokenizer(folder)
    torch.manual_seed(2)
    parts: dict[str, Any] = {
        "vae": autoencoder(),
        "text_encoder": CLIPTextModel(text_config(words)).eval(),
        "tokenizer": words,
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return quiet(StableDiffusionPipeline(**{**parts, **changes}, **UNSAFE))


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    words = tokenizer(folder)
    torch.manual_seed(2)
    pooled = text_config(words, projection_dim=32)
    return quiet(
        StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=CLIPTextModel(text_config(words)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(pooled).eval(),
            tokenizer=words,
            tokenizer_2=words,
            unet=unet(
                cross_attention_dim=64,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
                transformer_layers_per_block=(1, 2),
            ),
            scheduler=scheduler(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    )
