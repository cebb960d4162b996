"""Trains the small vision-language models of `weights/scene_vlm`: LLaVA in small, for questions about drawn scenes.

    python -m recipes.scene_vlm --seed 0 -o weights/scene_vlm
    python -m recipes.scene_vlm --seed 1 -o seed1 --tower weights/scene_vlm/causal

Two stages. First the vision tower (CLIP's, with a class token) learns alone: the class token says which objects are in
the picture; the patches say what they show, where its centre is and how large it is, since without being asked for it
they keep nothing of where they lie. Then the tower is frozen, and the projector and the language model learn to
answer, once with the causal mask (`causal/` in the folder) and once under modality-mutual attention (`mma/`). The two
begin with the same weights and see the same questions in the same order.

The tower does not depend on `--seed`: all runs share it, and `--tower` takes it from a model that has it already.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from multimodal.mma import modality_mutual_attention
from recipes.scene_questions import (
    FORMATS,
    HELD_OUT_FORMATS,
    KINDS,
    picture_of,
    sample_question,
    sample_scene_of_many,
)
from recipes.scene_vlm_model import (
    FEATURE_LAYER,
    GRID,
    NUM_PATCHES,
    TOWER,
    build_model,
    build_processor,
    dialogue,
    save,
)
from recipes.scenes import COLOURS, SHAPES, Scene, masks

__all__ = [
    "MASKS",
    "Dialogues",
    "Pictures",
    "TowerHead",
    "TowerTargets",
    "draw_pictures",
    "encode",
    "language_step",
    "sample_dialogues",
    "standardise_features",
    "switch_of",
    "tower_step",
    "train_language",
    "train_tower",
]

MASKS = ("causal", "mma")
NUM_PICTURES, DATA_SEED = 16_000, 0
TOWER_STEPS, TOWER_BATCH, TOWER_RATE, TOWER_SEED = 2000, 32, 1e-3, 0
STEPS, BATCH_SIZE, RATE = 2400, 32, 1e-3

_PLACE_MEAN, _PLACE_DEVIATION = (0.5, 0.5, 0.26), (0.23, 0.23, 0.035)  # of objects' centres and diameters
_SHOWS = 0.2  # so much of a patch is an object's where the patch counts as showing it

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """What is learnt from.

    Attributes:
        scenes: P of them.
        pixels: `[P, 3, SIZE, SIZE]`, uint8, RGB.
    """

    scenes: list[Scene]
    pixels: Tensor

    def images(self, chosen: np.ndarray | slice) -> Tensor:
        """As the image processor gives them: `[B, 3, SIZE, SIZE]` in [-1, 1]."""
        return self.pixels[chosen].float() / 127.5 - 1


def draw_pictures(num: int = NUM_PICTURES, seed: int = DATA_SEED) -> Pictures:
    """Training pictures, none with an object that is held out."""
    rng = np.random.default_rng([0, seed])
    scenes = [sample_scene_of_many(rng, held_out=False) for _ in range(num)]
    pixels = torch.from_numpy(np.stack([picture_of(rng, scene) for scene in scenes])).permute(0, 3, 1, 2)
    return Pictures(scenes, pixels.contiguous())


_COLOUR_INDEX = {colour: index for index, colour in enumerate(COLOURS)}
_SHAPE_INDEX = {shape: index for index, shape in enumerate(SHAPES)}
_NUM_KINDS_OF_OBJECTS = len(COLOURS) * len(SHAPES)


class TowerTargets(NamedTuple):
    """What the tower is asked for.

    Attributes:
        shown: 1 for each colour, shape, and colour with shape that the picture shows, `[P, C + S + C * S]`.
        kinds: Colour and shape of the object that each patch shows most of, or one past the last where it shows the
            ground, `[P, N, 2]`.
        places: That object's centre and diameter, standardised, `[P, N, 3]`; of no meaning at the ground.
    """

    shown: Tensor
    kinds: Tensor
    places: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> TowerTargets:
        """Those of P scenes."""
        shown = torch.zeros(len(scenes), len(COLOURS) + len(SHAPES) + _NUM_KINDS_OF_OBJECTS)
        kinds = torch.empty(len(scenes), NUM_PATCHES, 2, dtype=torch.long)
        places = torch.empty(len(scenes), NUM_PATCHES, 3)
        ground = torch.tensor([len(COLOURS), len(SHAPES)])
        for index, scene in enumerate(scenes):
            own = torch.tensor([(_COLOUR_INDEX[item.colour], _SHAPE_INDEX[item.shape]) for item in scene.objects])
            colours, shapes = own.unbind(1)
            shown[index, colours] = shown[index, len(COLOURS) + shapes] = 1
            shown[index, len(COLOURS) + len(SHAPES) + colours * len(SHAPES) + shapes] = 1
            share, most = torch.from_numpy(masks(scene, GRID)).flatten(1).max(0)  # [N]
            kinds[index] = torch.where((share > _SHOWS)[:, None], own[most], ground)
            places[index] = torch.tensor([(*item.centre, item.diameter) for item in scene.objects])[most]
        return cls(shown, kinds, (places - torch.tensor(_PLACE_MEAN)) / torch.tensor(_PLACE_DEVIATION))

    def chosen(self, chosen: np.ndarray, device: torch.device) -> TowerTargets:
        """Those of some of the pictures."""
        return TowerTargets(*(part[chosen].to(device) for part in self))


class TowerHead(nn.Module):
    """Reads off the tower what it is asked for; thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = nn.Linear(TOWER["hidden_size"], len(COLOURS) + len(SHAPES) + _NUM_KINDS_OF_OBJECTS)
        self.kinds = nn.Linear(TOWER["hidden_size"], len(COLOURS) + len(SHAPES) + 2)
        self.places = nn.Linear(TOWER["hidden_size"], 3)


def tower_step(tower: CLIPVisionModel, head: TowerHead, images: Tensor, targets: TowerTargets) -> Tensor:
    """The losses of one step: of the class token, at the end and in the layer that the projector reads; of the patches.

    Read where the projector reads, what the class token attends to there is what the picture shows.

    Args:
        tower: In training.
        head: What reads it.
        images: `[B, 3, SIZE, SIZE]` in [-1, 1].
        targets: Theirs.

    Returns:
        Of the class token, of what patches show, and of where it is: `[3]`.
    """
    outputs = tower(images, output_hidden_states=True)
    features = outputs.hidden_states[FEATURE_LAYER]
    class_tokens = torch.stack([tower.post_layernorm(features[:, 0]), outputs.pooler_output])
    class_loss = F.binary_cross_entropy_with_logits(head.shown(class_tokens), targets.shown.expand(2, -1, -1))
    patches = features[:, 1:]
    split = head.kinds(patches).split([len(COLOURS) + 1, len(SHAPES) + 1], dim=-1)
    pairs = zip(split, targets.kinds.unbind(-1), strict=True)
    kind_loss = torch.stack([F.cross_entropy(logits.flatten(0, 1), kind.flatten()) for logits, kind in pairs]).mean()
    objects = targets.kinds[..., 0] < len(COLOURS)  # [B, N]
    place_loss = F.mse_loss(head.places(patches[objects]), targets.places[objects])
    return torch.stack([class_loss, kind_loss, place_loss])


def _optimised(parameters: Sequence[nn.Parameter], rate: float, steps: int) -> Iterator[int]:
    """Yields each step's number; the gradients made in between are applied, and cleared."""
    optimizer = AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    for step in range(1, steps + 1):
        yield step
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def train_tower(tower: CLIPVisionModel, pictures: Pictures, steps: int = TOWER_STEPS, seed: int = TOWER_SEED) -> None:
    """Trains the tower on what the pictures show.

    Args:
        tower: Untrained.
        pictures: What to learn from.
        steps: Of the optimiser.
        seed: Of the order of the pictures.
    """
    rng = np.random.default_rng([2, seed])
    targets = TowerTargets.of(pictures.scenes)
    head = TowerHead().to(tower.device)
    tower.train()
    for step in _optimised([*tower.parameters(), *head.parameters()], TOWER_RATE, steps):
        chosen = rng.integers(len(pictures.scenes), size=TOWER_BATCH)
        images = pictures.images(chosen).to(tower.device)
        losses = tower_step(tower, head, images, targets.chosen(chosen, tower.device))
        losses.sum().backward()
        if step % 50 == 0:
            _LOG.info("tower, step %d: class token %.4f, kinds %.4f, places %.4f", step, *losses.tolist())
    tower.eval()


@torch.no_grad()
def encode(tower: CLIPVisionModel, pictures: Pictures) -> Tensor:
    """What the projector reads of each picture: `[P, N, C]` in single precision."""
    features = [
        tower(pictures.images(slice(start, start + 64)).to(tower.device), output_hidden_states=True)
        .hidden_states[FEATURE_LAYER][:, 1:]
        .float()
        for start in range(0, len(pictures.scenes), 64)
    ]
    return torch.cat(features)


def standardise_features(model: LlavaForConditionalGeneration, features: Tensor) -> None:
    """Initialises the projector for features of mean 0 and variance 1, whatever mean and variance they have.

    Args:
        model: Its projector is drawn anew, from torch's own generator, with weights of variance 1 / width.
        features: `[P, N, C]`, from `encode`.
    """
    projector: Any = model.model.multi_modal_projector
    sample = features[::16].flatten(0, 1)
    mean, deviation = sample.mean(0), sample.std(0)
    with torch.no_grad():
        for layer in (projector.linear_1, projector.linear_2):
            layer.weight.normal_(0, layer.in_features**-0.5)
            layer.bias.zero_()
        projector.linear_1.weight /= deviation
        projector.linear_1.bias -= projector.linear_1.weight @ mean


@dataclass(frozen=True)
class Dialogues:
    """Tokens to learn from, padded on the right.

    Attributes:
        pictures: `[E]`, which picture each is about.
        input_ids: `[E, L]`.
        labels: `[E, L]`, the reply and its end; -100 elsewhere.
    """

    pictures: np.ndarray
    input_ids: Tensor
    labels: Tensor


def sample_dialogues(processor: LlavaProcessor, scenes: Sequence[Scene], num: int, seed: int) -> Dialogues:
    """Training questions: all kinds alike, in the formats in which the kind is not held out.

    Args:
        processor: Makes tokens of them.
        scenes: What is asked about.
        num: How many.
        seed: Of the choice.
    """
    rng = np.random.default_rng([3, seed])
    formats = {kind: [f for f in FORMATS if (kind, f) not in HELD_OUT_FORMATS] for kind in KINDS}
    kinds = itertools.cycle(KINDS)
    chosen: list[int] = []
    texts: list[str] = []
    while len(texts) < num:
        kind, question = next(kinds), None
        while question is None:
            index = int(rng.integers(len(scenes)))
            question = sample_question(rng, scenes[index], kind, formats[kind])
        chosen.append(index)
        texts.append(str(processor.apply_chat_template(dialogue(question))))
    tokenizer: Any = processor.tokenizer
    texts = [text.replace("<image>", "<image>" * NUM_PATCHES) for text in texts]
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids  # [E, L]
    stop = ids == tokenizer.convert_tokens_to_ids("<assistant>")
    reply = (stop.cumsum(1) > 0) & ~stop & (ids != tokenizer.pad_token_id)
    return Dialogues(np.array(chosen), ids, ids.where(reply, -100))


def switch_of(
    mask: str, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> AbstractContextManager[Any]:
    """What a model of one of `MASKS` is trained and used under."""
    if mask == "causal":
        return nullcontext()
    tokenizer: Any = processor.tokenizer
    return modality_mutual_attention(model, stop_token_id=tokenizer.convert_tokens_to_ids("<assistant>"))


def train_language(
    model: LlavaForConditionalGeneration, features: Tensor, dialogues: Dialogues, batch_size: int = BATCH_SIZE
) -> None:
    """Trains projector and language model; the tower has done its part.

    Args:
        model: Its tower is trained. Under whatever switches it is.
        features: `[P, N, C]`, from `encode`.
        dialogues: Taken in their order; what is left over is not used.
        batch_size: Dialogues of a step.
    """
    parameters = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    model.train()
    for step in _optimised(parameters, RATE, len(dialogues.pictures) // batch_size):
        own = slice((step - 1) * batch_size, step * batch_size)
        loss = language_step(model, features[dialogues.pictures[own]], dialogues.input_ids[own], dialogues.labels[own])
        loss.backward()
        if step % 50 == 0:
            _LOG.info("language, step %d: %.4f", step, loss.item())
    model.eval()


def language_step(model: LlavaForConditionalGeneration, features: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of one step: the mean over the tokens of the replies.

    Args:
        model: In training.
        features: Of the pictures, `[B, N, C]`.
        input_ids: `[B, L]`.
        labels: `[B, L]`, -100 where nothing is learnt.
    """
    features, input_ids, labels = (part.to(model.device) for part in (features, input_ids, labels))
    pictures: Any = list(model.model.multi_modal_projector(features))  # one tensor each, as the model's own code has it
    vision = BaseModelOutputWithPooling(pooler_output=pictures)
    return model(input_ids=input_ids, labels=labels, mm_encoder_outputs={"image": vision}, use_cache=False).loss


def main() -> None:
    """Trains a causal model and one with modality-mutual attention, measures and saves them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the language model and of its questions")
    parser.add_argument("--mask", choices=MASKS, nargs="+", default=MASKS, help="which to train; both by default")
    parser.add_argument("--tower", type=Path, help="folder of a model whose tower is taken; without it, it is trained")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for a folder of each mask")
    parser.add_argument("--num", type=int, default=1000, help="questions for the card's shares")
    args = parser.parse_args()
    from recipes.scene_vlm_card import card  # which measures by what stands here

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    processor, pictures = build_processor(), draw_pictures(NUM_PICTURES)
    if args.tower:
        tower = LlavaForConditionalGeneration.from_pretrained(args.tower).model.vision_tower
    else:
        torch.manual_seed(TOWER_SEED)
        tower = build_model(processor).model.vision_tower
        train_tower(tower, pictures, TOWER_STEPS)
    features = encode(tower, pictures)
    dialogues = sample_dialogues(processor, pictures.scenes, STEPS * BATCH_SIZE, args.seed)
    for mask in args.mask:
        torch.manual_seed(args.seed)
        model = build_model(processor)
        model.model.vision_tower.load_state_dict(tower.state_dict())
        standardise_features(model, features)
        start = time.process_time()
        with switch_of(mask, model, processor):
            train_language(model, features, dialogues, BATCH_SIZE)
        minutes = (time.process_time() - start) / 60
        save(model, processor, args.out / mask)
        shipped = LlavaForConditionalGeneration.from_pretrained(args.out / mask)
        text = card(shipped, processor, mask, args.seed, minutes, args.num)
        (args.out / mask / "README.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
