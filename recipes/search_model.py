"""Trains the scanpath model of `weights/search_scenes`, and what its claims are measured on.

    python -m recipes.search_model --out weights/search_scenes

An `OAT` learns from searches of `recipes.search_scenes`, of which it sees the crops, as anybody's model would learn
from recorded scanpaths. Scenes are drawn anew for each step, so that nothing can be learnt by heart, and each is
searched several times, for several targets: looking at the crops of a scene costs more than a search of it.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from recipes.search_scenes import CROP_SIZE, Searcher, SearchScenes, render, sample_scenes, to_model
from vision.scanpath.checkpoint import save
from vision.scanpath.model import OAT, OATConfig, next_objects, teacher_forcing_loss
from vision.scanpath.scenes import PAD, Scenes

__all__ = ["SHIPPED", "Searches", "draw_searches", "likelihoods", "searches_of", "small", "step_loss", "train"]

TARGETS, SEARCHES = 4, 2  # of each scene of a batch, and of each of its targets
STEPS, LEARNING_RATE, WARMUP = 3000, 4e-3, 0.1
SEED = 0
_PARTS = 6  # of a batch, by length

_LOG = logging.getLogger(__name__)


def small(rows: int, columns: int, **changes: object) -> OATConfig:
    """The size that the scenes need: one layer each of encoder and decoder, a width of 116.

    Args:
        rows: of the largest grid.
        columns: of the largest grid.
        **changes: other fields of `OATConfig`.
    """
    fields: dict[str, object] = {
        "dim": 116, "position_dim": 68, "depth": 1, "mlp_dim": 192, "dropout": 0.0, "pointer_heads": 1, "sigma": 1.6,
        "extent": (rows, columns), "crop_size": CROP_SIZE, "pools": (2, 2), "max_length": Searcher.max_length,
    }  # fmt: skip
    return OATConfig(**(fields | changes))  # type: ignore[arg-type]


SHIPPED = small(6, 14)
"""What ships: any grid of up to 6 rows and 14 columns."""
GRIDS = tuple((rows, columns) for rows in range(2, 7) for columns in range(4, 15) if 12 <= rows * columns <= 60)
"""Those that it is trained on; larger ones follow from these."""


@dataclass(frozen=True)
class Searches:
    """What a model learns from in a step.

    Attributes:
        scenes: B of them.
        fixations: `[P, T]`, padded with `PAD`.
        scene_of: which scene each is of, `[P]`.
    """

    scenes: Scenes
    fixations: Tensor
    scene_of: Tensor

    def to(self, device: torch.device | str) -> Searches:
        """The same on another device."""
        return Searches(self.scenes.to(device), self.fixations.to(device), self.scene_of.to(device))


def searches_of(scenes: SearchScenes, paths: np.ndarray, looks: Tensor | None) -> Searches:
    """Searches `[B, S, T]` of scenes, as a model takes them."""
    flat = torch.from_numpy(paths.reshape(-1, paths.shape[-1]))
    return Searches(to_model(scenes, looks), flat, torch.arange(len(paths)).repeat_interleave(paths.shape[1]))


def draw_searches(
    rng: np.random.Generator, grids: Sequence[tuple[int, int]], num_objects: int = 432, with_looks: bool = True
) -> Iterator[Searches]:
    """Batches without end, each of new scenes of one grid.

    Args:
        rng: where randomness comes from.
        grids: rows and columns, taken at random.
        num_objects: of a batch, about; each scene comes with `TARGETS` targets.
        with_looks: render crops.
    """
    searcher = Searcher()
    while True:
        rows, columns = grids[int(rng.integers(len(grids)))]
        scenes = sample_scenes(rng, max(1, round(num_objects / (rows * columns))), rows, columns)
        several = scenes.with_targets(rng.integers(rows * columns, size=(len(scenes), TARGETS)))
        paths = searcher.search(rng, several, SEARCHES)
        yield searches_of(several, paths, render(scenes) if with_looks else None)


def step_loss(model: OAT, searches: Searches) -> Tensor:
    """`teacher_forcing_loss` of a batch, in which scenes are encoded once, and long scanpaths do not pad short ones."""
    encoded = model.encode(searches.scenes)
    lengths = (searches.fixations != PAD).sum(1)
    total = encoded.memory.new_zeros(())
    for part in lengths.argsort().tensor_split(min(_PARTS, len(lengths))):
        fixations = searches.fixations[part, : int(lengths[part].max())]
        logits = model.decode(encoded.select(searches.scene_of[part]), fixations)
        total = total + teacher_forcing_loss(logits, fixations) * (lengths[part] + 1).sum()
    return total / (lengths + 1).sum()


def train(
    model: OAT,
    batches: Iterable[Searches],
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 1e-4,
) -> None:
    """Trains by AdamW, with a rate that rises for a tenth of the steps and falls by a cosine; ends in evaluation mode.

    Args:
        model: on the device where it is to be trained.
        batches: at least `steps` of them.
        steps: of the optimiser.
        learning_rate: at its highest.
        weight_decay: of matrices.
    """
    device = next(model.parameters()).device
    optimizer = create_optimizer_v2(model, "adamw", learning_rate, weight_decay, betas=(0.9, 0.98))
    schedule = CosineLRScheduler(
        optimizer, steps, warmup_t=round(WARMUP * steps), warmup_lr_init=learning_rate / 25, t_in_epochs=False
    )
    model.train()
    for step, searches in enumerate(islice(batches, steps), 1):
        schedule.step_update(step - 1)
        loss = step_loss(model, searches.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            _LOG.info("step %d: %.3f nats", step, loss.item())
    model.eval()


@torch.no_grad()
def likelihoods(model: OAT, searches: Searches) -> tuple[np.ndarray, np.ndarray]:
    """What a model gives to searches, token by token.

    Args:
        model: in evaluation mode.
        searches: on the model's device.

    Returns:
        Natural logarithms of the probability of each fixation and end, `[P, T + 1]`, 0 behind an end; and whether it
        was the likeliest.
    """
    logits = model(searches.scenes, searches.fixations, searches.scene_of)
    following = next_objects(searches.fixations, end=logits.shape[-1] - 1)
    counted = following != PAD
    log_probs = logits.float().log_softmax(-1)
    came = log_probs.gather(-1, following.where(counted, 0)[..., None])[..., 0]
    hits = (log_probs.argmax(-1) == following) & counted
    return came.where(counted, 0).cpu().double().numpy(), hits.cpu().numpy()


def main() -> None:
    """Trains, measures and saves the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    from recipes.search_model_card import card  # which measures by what stands here

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = OAT(SHIPPED)
    train(model, draw_searches(np.random.default_rng(SEED), GRIDS), args.steps)
    minutes = time.process_time() / 60
    save(model, args.out)
    text = card(model, args.steps, minutes)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
