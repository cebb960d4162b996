"""Trains the small text-to-image model of `weights/text_to_scene`: a Stable Diffusion pipeline for drawn scenes.

    python -m recipes.text_to_scene --out weights/text_to_scene

Four named objects ("red circle", "blue square", …), alone or two at a time, in some twelve minutes of one CPU thread.
The model is meant to fail as large ones do: it knows each object alone, and of a prompt with two it often draws one. So
most of the scenes that it sees have one object, and training ends where about half of the prompts with two come out.

Cross-attention is told where the objects are (`grounding_loss`). In a network of this size and training the maps of the
nouns otherwise stay flat, and what is done with them at test time would have nothing to act on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion.attention_maps import record
from recipes.scenes import Scene, caption, draw, masks, sample_scene

__all__ = [
    "HELD_OUT_PAIRS",
    "OBJECTS",
    "SEEN_PAIRS",
    "Batch",
    "attention_targets",
    "autoencoder_step",
    "build_pipeline",
    "build_tokenizer",
    "denoiser_step",
    "encode",
    "grounding_loss",
    "images_of",
    "sample_training_scene",
    "save",
    "text_states",
    "train_autoencoder",
    "train_denoiser",
]

OBJECTS = ("red circle", "blue square", "green triangle", "yellow diamond")
HELD_OUT_PAIRS = (("red circle", "yellow diamond"), ("blue square", "green triangle"))
"""Pairs that no training picture shows; each object stands in one of them."""
SEEN_PAIRS = tuple(pair for pair in itertools.combinations(OBJECTS, 2) if pair not in HELD_OUT_PAIRS)

SIZE = 32  # pixels
LATENT_SIZE = SIZE // 2
MAX_TOKENS, TEXT_WIDTH = 24, 64
AUTOENCODER: dict[str, Any] = {
    "sample_size": SIZE,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
UNET: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
    "attention_head_dim": 2,  # diffusers' name for the number of heads
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 8,
}
PAIR_SHARE = 0.3  # of the training scenes
UNCONDITIONAL_SHARE = 0.1  # of the captions, left empty for classifier-free guidance
GROUNDING_WEIGHT = 0.2
COLOUR_POSITIONS, NOUN_POSITIONS = [2, 6], [3, 7]  # in the tokens of "a red circle and a blue square"
NOUN_SHARE, COLOUR_SHARE = 0.2, 0.1  # of an object's attention; the start token takes the rest, as in large models
AUTOENCODER_STEPS, DENOISER_STEPS, BATCH_SIZE = 700, 1500, 8
NUM_SCENES = 4096  # that the denoiser learns from
SEED = 0

_LOG = logging.getLogger(__name__)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the captions is one token, and any other text is spelt in bytes.

    Args:
        folder: Where its `vocab.json` and `merges.txt` are written.

    Raises:
        ValueError: A word comes out in pieces.
    """
    words = sorted({word for name in OBJECTS for word in name.split()} | {"a", "and"}, key=lambda w: (-len(w), w))
    alphabet = sorted(ByteLevel.alphabet())  # a symbol for each of the 256 bytes
    vocabulary = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in words:  # long words first: merges of a short one would break up a longer one that contains it
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            merges.append(("".join(pieces[:end]), pieces[end]))
            vocabulary.append("".join(pieces[: end + 1]))
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in dict.fromkeys(merges))]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    if split := [word for word in words if len(tokenizer.tokenize(word)) != 1]:
        raise ValueError(f"{split} are not one token each: change the order of the merges.")
    return tokenizer


def build_pipeline() -> Any:
    """The untrained `StableDiffusionPipeline`: 1.4 M parameters, cross-attention at 16 x 16 and at 8 x 8."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer: Any = build_tokenizer(Path(folder))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler: Any = DDIMScheduler(
        beta_schedule="linear",  # ends close to pure noise, from which sampling starts
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    nothing: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**AUTOENCODER),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=scheduler,
        **nothing,
    )


def sample_training_scene(rng: np.random.Generator) -> Scene:
    """One object, or two of a pair that is not held out, in either order."""
    if rng.random() >= PAIR_SHARE:
        return sample_scene(rng, [OBJECTS[rng.integers(len(OBJECTS))]])
    pair = SEEN_PAIRS[rng.integers(len(SEEN_PAIRS))]
    return sample_scene(rng, pair if rng.random() < 0.5 else pair[::-1])


def images_of(scenes: Sequence[Scene]) -> Tensor:
    """Drawn, `[B, 3, H, W]` in [-1, 1]."""
    pictures = np.stack([draw(scene, SIZE) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def autoencoder_step(vae: Any, images: Tensor) -> Tensor:
    """The loss of one step: absolute and squared error of the pictures, and a little of the latents' KL divergence."""
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample()).sample - images
    return error.abs().mean() + error.square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()


def train_autoencoder(vae: Any, steps: int = AUTOENCODER_STEPS, seed: int = SEED) -> None:
    """Trains the autoencoder, then sets the factor by which its latents have a standard deviation of 1."""
    rng = np.random.default_rng(seed)
    optimizer = AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = OneCycleLR(optimizer, 2e-3, steps, cycle_momentum=False)
    vae.train()
    for step in range(1, steps + 1):
        images = images_of([sample_training_scene(rng) for _ in range(BATCH_SIZE)]).to(vae.device)
        loss = autoencoder_step(vae, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            _LOG.info("autoencoder, step %d: loss %.4f", step, loss.item())
    vae.eval().requires_grad_(False)
    latents = vae.encode(images_of([sample_training_scene(rng) for _ in range(128)]).to(vae.device)).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


@dataclass(frozen=True)
class Batch:
    """What the denoiser learns from.

    Attributes:
        captions: B texts; empty where the model learns to do without.
        latents: `[B, 4, h, w]`, scaled.
        shares: `[B, 2, h, w]` in [0, 1], how much of each position shows the first and the second object of the
            caption; zero where the caption names none.
    """

    captions: list[str]
    latents: Tensor
    shares: Tensor

    def choose(self, rng: np.random.Generator, num: int) -> Batch:
        """`num` at random, some of them without their captions."""
        chosen = rng.integers(len(self.captions), size=num)
        kept = rng.random(num) >= UNCONDITIONAL_SHARE
        captions = [self.captions[i] if keep else "" for i, keep in zip(chosen, kept, strict=True)]
        shares = self.shares[chosen] * torch.from_numpy(kept).to(self.shares)[:, None, None, None]
        return Batch(captions, self.latents[chosen], shares)


@torch.no_grad()
def encode(vae: Any, scenes: Sequence[Scene]) -> Batch:
    """All that there is to learn from scenes of one and two objects, on the autoencoder's device."""
    shares = torch.zeros(len(scenes), 2, LATENT_SIZE, LATENT_SIZE)
    for share, scene in zip(shares, scenes, strict=True):
        share[: len(scene.objects)] = torch.from_numpy(masks(scene, LATENT_SIZE))
    latents = [
        vae.encode(images_of(scenes[start : start + 64]).to(vae.device)).latent_dist.sample()
        for start in range(0, len(scenes), 64)
    ]
    captions = [caption([item.name for item in scene.objects]) for scene in scenes]
    return Batch(captions, torch.cat(latents) * vae.config.scaling_factor, shares.to(vae.device))


def attention_targets(shares: Tensor, num_tokens: int) -> Tensor:
    """Where each token of "a COLOUR NOUN and a COLOUR NOUN" should be attended to.

    Args:
        shares: `[B, 2, h, w]`, see `Batch`.
        num_tokens: N.

    Returns:
        `[B, h, w, N]`; each row sums to 1.
    """
    targets = shares.new_zeros(*shares.shape[:1], *shares.shape[2:], num_tokens)
    targets[..., COLOUR_POSITIONS] = COLOUR_SHARE * shares.permute(0, 2, 3, 1)
    targets[..., NOUN_POSITIONS] = NOUN_SHARE * shares.permute(0, 2, 3, 1)
    targets[..., 0] = 1 - targets.sum(-1)  # the start token
    return targets


def grounding_loss(maps: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy between attention and the places of the objects, which weigh more than the ground.

    Args:
        maps: `[B, h, w, N]`, rows sum to 1.
        shares: `[B, 2, H, W]`, see `Batch`; averaged where the maps are coarser.

    Returns:
        One value. Captions that name nothing do not count.
    """
    _, height, width, num_tokens = maps.shape
    shares = F.adaptive_avg_pool2d(shares, (height, width))
    targets = attention_targets(shares, num_tokens)
    entropy = -(targets * maps.clamp(min=1e-6).log()).sum(-1)  # [B, h, w]
    weights = (1 + 4 * shares.sum(1)) * (shares.amax((1, 2, 3)) > 0)[:, None, None]
    return (weights * entropy).sum() / weights.sum().clamp(min=1)


def text_states(pipe: Any, captions: list[str]) -> Tensor:
    """What the UNet gets to see of texts, `[B, N, D]`."""
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(tokens.to(pipe.device))[0]


def denoiser_step(pipe: Any, noising: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The two losses of one step.

    Args:
        pipe: Its UNet and text encoder learn.
        noising: The scheduler that adds noise; predicts velocities.
        batch: On the pipeline's device.

    Returns:
        The mean squared error of the velocity, and the grounding loss of the 16 x 16 and 8 x 8 maps.
    """
    text = text_states(pipe, batch.captions)
    latents, noise = batch.latents, torch.randn_like(batch.latents)
    times = torch.randint(noising.config.num_train_timesteps, (len(latents),), device=latents.device)
    with record(pipe.unet, resolution=16) as fine, record(pipe.unet, resolution=8) as coarse:
        velocity = pipe.unet(noising.add_noise(latents, noise, times), times, text).sample
    grounding = (grounding_loss(fine.maps(), batch.shares) + grounding_loss(coarse.maps(), batch.shares)) / 2
    return F.mse_loss(velocity, noising.get_velocity(latents, noise, times)), grounding


def train_denoiser(pipe: Any, steps: int = DENOISER_STEPS, seed: int = SEED) -> None:
    """Trains UNet and text encoder, of which the moving average is kept.

    Args:
        pipe: Its autoencoder is trained.
        steps: Of the optimiser.
        seed: Of the scenes; noise comes from torch's own generator.
    """
    rng = np.random.default_rng(seed + 1)
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    scenes = encode(pipe.vae, [sample_training_scene(rng) for _ in range(NUM_SCENES)])
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.1, cycle_momentum=False)
    average = EMAModel(parameters, decay=0.99)
    pipe.unet.train()
    pipe.text_encoder.train()
    for step in range(1, steps + 1):
        error, grounding = denoiser_step(pipe, noising, scenes.choose(rng, BATCH_SIZE))
        optimizer.zero_grad()
        (error + GROUNDING_WEIGHT * grounding).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        if step % 50 == 0:
            _LOG.info("denoiser, step %d: velocity %.4f, grounding %.4f", step, error.item(), grounding.item())
    average.copy_to(parameters)
    pipe.unet.eval()
    pipe.text_encoder.eval()


def save(pipe: Any, folder: Path) -> None:
    """Writes the pipeline as safetensors: UNet and autoencoder in half precision.

    diffusers loads these in single precision unless asked otherwise. transformers loads a model in the precision of its
    file, so the text encoder stays in single precision, or the two would not fit together.
    """
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(folder)


def main() -> None:
    """Trains, measures and saves the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--num", type=int, default=300, help="pictures of each kind of prompt for the card's rates")
    args = parser.parse_args()
    from recipes.text_to_scene_card import card  # which measures by what stands here

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    train_autoencoder(pipe.vae)
    train_denoiser(pipe)
    minutes = time.process_time() / 60
    save(pipe, args.out)
    shipped = StableDiffusionPipeline.from_pretrained(args.out)
    shipped.set_progress_bar_config(disable=True)
    text = card(shipped, args.num, minutes)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
