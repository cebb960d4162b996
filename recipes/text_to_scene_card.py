"""Measures what `recipes.text_to_scene` trained, and writes its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy.stats import binomtest

from diffusion.attention_maps import record
from recipes.scenes import DetectorErrors, caption, detector_errors, sample_scene, shows
from recipes.text_to_scene import (
    AUTOENCODER_STEPS,
    DENOISER_STEPS,
    HELD_OUT_PAIRS,
    NOUN_POSITIONS,
    OBJECTS,
    PAIR_SHARE,
    SEED,
    SEEN_PAIRS,
    SIZE,
    encode,
    images_of,
    sample_training_scene,
    text_states,
)

__all__ = ["Rate", "card", "errors_after_autoencoder", "focus", "generate", "rates"]

SAMPLING_STEPS, GUIDANCE_SCALE = 15, 3.0


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval (Wilson).

    Attributes:
        hits: How often.
        trials: Out of how many.
    """

    hits: int
    trials: int

    def __str__(self) -> str:
        low, high = binomtest(self.hits, self.trials).proportion_ci(method="wilson")
        return f"{self.hits / self.trials:.1%} ({low:.0%}–{high:.0%}, n = {self.trials})"


def generate(pipe: Any, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """One picture for each prompt, from its own seed, with the settings of the card: `[B, H, W, 3]`, uint8."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE_SCALE, "output_type": "np"}
    return np.rint(pipe(list(prompts), generator=generators, **settings).images * 255).astype(np.uint8)


def rates(pipe: Any, num: int, seed: int = 0) -> dict[str, Rate]:
    """How often a picture shows all that its prompt names.

    Args:
        pipe: Trained.
        num: Pictures of each kind of prompt.
        seed: Of the first picture; counts up. Seeds below 10 000 are for development, those above for claims.

    Returns:
        The rates of prompts with one object, with two that were seen together, and with two that were not.
    """
    found = {}
    for kind, groups in {
        "one object": [(name,) for name in OBJECTS],
        "two objects, pair seen": SEEN_PAIRS,
        "two objects, pair held out": HELD_OUT_PAIRS,
    }.items():
        names = [groups[i % len(groups)] for i in range(num)]
        pictures = generate(pipe, [caption(own) for own in names], range(seed, seed + num))
        found[kind] = Rate(sum(map(shows, pictures, names)), num)
    return found


@torch.no_grad()
def focus(pipe: Any, num: int = 64, seed: int = 0) -> float:
    """How much more a noun is attended to on its object than on average, in 16 x 16 maps of drawn scenes with noise.

    Args:
        pipe: Trained.
        num: Scenes with two objects.
        seed: Of scenes and noise.
    """
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batch = encode(pipe.vae, [sample_scene(rng, SEEN_PAIRS[n % len(SEEN_PAIRS)]) for n in range(num)])
    noising: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    times = torch.arange(num) * noising.config.num_train_timesteps // num
    noisy = noising.add_noise(batch.latents, torch.randn(batch.latents.shape, generator=noise).to(pipe.device), times)
    with record(pipe.unet, resolution=16) as recorder:
        pipe.unet(noisy, times.to(pipe.device), text_states(pipe, batch.captions))
    nouns = recorder.maps()[..., NOUN_POSITIONS].permute(0, 3, 1, 2)  # [B, 2, 16, 16]
    inside = (nouns * batch.shares).sum((2, 3)) / batch.shares.sum((2, 3))
    return (inside / nouns.mean((2, 3))).mean().item()


@torch.no_grad()
def errors_after_autoencoder(vae: Any, num: int = 300, seed: int = 0) -> DetectorErrors:
    """The detector's errors on pictures that were drawn, encoded and decoded."""
    rng = np.random.default_rng(seed)
    scenes = [sample_training_scene(rng) for _ in range(num)]
    pictures = []
    for start in range(0, num, 50):
        latents = vae.encode(images_of(scenes[start : start + 50]).to(vae.device)).latent_dist.mode()
        pixels = (vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
        pictures += list(pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return detector_errors(pictures, scenes)


_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# text_to_scene

A Stable Diffusion pipeline in small: {parameters:.1f} M parameters, {SIZE} x {SIZE} pixels. Its world is {objects},
alone or two at a time, on a plain ground. With it, what guidance of cross-attention does can be seen on any machine and
without a download: as large models do, it knows each object alone, and of a prompt with two it often draws one.

```python
pipe = StableDiffusionPipeline.from_pretrained("weights/text_to_scene")
pipe("a red circle and a blue square", num_inference_steps={SAMPLING_STEPS}, guidance_scale={GUIDANCE_SCALE}).images[0]
```

| prompts | pictures that show all they name |
| --- | --- |
{rows}

- **Measured** with these settings, DDIM, in single precision, by the detector of `recipes/scenes.py`, picture n from
  seed n; 95 % intervals are Wilson's. The detector's own errors on {errors.objects} drawn objects that went through the
  autoencoder: {errors.misses} missed, {errors.false_alarms} false alarms.
- **Attention**: averaged over noise levels, a noun is attended to {focus:.1f} times as much on its object as over the
  whole 16 x 16 map.
- **Data**: scenes drawn by `recipes/scenes.py`, {PAIR_SHARE:.0%} of them with two objects. Never drawn together:
  {held_out}.
- **Training**: `python -m recipes.text_to_scene --out weights/text_to_scene`, seed {SEED}, {minutes:.0f} minutes of one
  CPU thread: {AUTOENCODER_STEPS} steps of the autoencoder, {DENOISER_STEPS} of UNet and text encoder (velocity
  prediction; cross-attention is taught where the objects are). Few scenes with two objects and an early end are meant:
  they leave something to guide.
- **Limits**: it knows the words of its objects, "a" and "and". Other text is taken, and means nothing to it.
- **Licence**: Apache-2.0. No data of others was used.
"""


def card(pipe: Any, num: int, minutes: float) -> str:
    """The model's card, with rates measured on `num` pictures of each kind of prompt."""
    modules = (pipe.unet, pipe.text_encoder, pipe.vae)
    facts = {
        "SIZE": SIZE,
        "SAMPLING_STEPS": SAMPLING_STEPS,
        "GUIDANCE_SCALE": GUIDANCE_SCALE,
        "PAIR_SHARE": PAIR_SHARE,
        "SEED": SEED,
        "AUTOENCODER_STEPS": AUTOENCODER_STEPS,
        "DENOISER_STEPS": DENOISER_STEPS,
        "parameters": sum(p.numel() for module in modules for p in module.parameters()) / 1e6,
        "objects": ", ".join(OBJECTS),
        "held_out": "; ".join(" and ".join(pair) for pair in HELD_OUT_PAIRS),
        "rows": "\n".join(f"| {kind} | {rate} |" for kind, rate in rates(pipe, num).items()),
        "errors": errors_after_autoencoder(pipe.vae, num),
        "focus": focus(pipe),
        "minutes": minutes,
    }
    return _CARD.format(**facts)
