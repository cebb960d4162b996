"""Draws the pictures of docs/methods/: docs/images/<method>.jpg.

    python docs/pictures.py                # all, some minutes
    python docs/pictures.py biformer psa   # some

The papers' checkpoints cannot be assumed to be on a machine, and attention of random weights shows little. So each
picture's network first learns, for less than a minute, which of the sample photographs a crop comes from; what is drawn
is what came of that, with the seed fixed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import attnsuite  # noqa: E402, F401 - registers the models
import weights  # noqa: E402
from diffusion import AStarPipelineOutput, AStarStableDiffusionPipeline, attention_grid  # noqa: E402
from multimodal import compress_visual_tokens, inhibit_cross_modality, modality_mutual_attention, mutual_mask  # noqa: E402
from multimodal.draw import draw_merged  # noqa: E402
from multimodal.explain import attended as read_of  # noqa: E402
from recipes.scene_questions import Example, held_out  # noqa: E402
from recipes.scene_vlm_card import prompts  # noqa: E402
from recipes.scene_vlm_model import GRID  # noqa: E402
from recipes.scenes import caption, shows  # noqa: E402
from recipes.search_scenes import Searcher, objects, picture, render, sample_scenes, to_model  # noqa: E402
from recipes.text_to_scene_card import GUIDANCE_SCALE, SAMPLING_STEPS  # noqa: E402
from vision.attention import attention_layers  # noqa: E402
from vision.dcal import DCALCriterion  # noqa: E402
from vision.ela import ela_maps, insert  # noqa: E402
from vision.explain import attended, heatmap  # noqa: E402
from vision.psa import polarized_masks  # noqa: E402
from vision.rollout import rollout  # noqa: E402
from vision.scanpath import checkpoint  # noqa: E402
from vision.scanpath.decoding import sample  # noqa: E402
from vision.scanpath.draw import draw_density, draw_scanpaths  # noqa: E402
from vision.scanpath.scenes import PAD  # noqa: E402
from vision.sparsifiner import SparsifinerCriterion, connectivity  # noqa: E402
from vision.tap import ADLCriterion, TokenAwareAveragePooling  # noqa: E402

IMAGES = ROOT / "docs" / "images"
SAMPLES = sorted((ROOT / "samples").glob("*.jpg"))
SIDE = 224
MEAN, STD = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)


def photographs(side: int = SIDE) -> Tensor:
    """The samples, squared and normalised, `[5, 3, side, side]`."""
    square = v2.Compose([v2.PILToTensor(), v2.Resize(side, antialias=True), v2.CenterCrop(side)])
    pictures = torch.stack([square(Image.open(path).convert("RGB")) for path in SAMPLES])
    return (pictures / 255 - MEAN[:, None, None]) / STD[:, None, None]


def colours(image: Tensor) -> np.ndarray:
    """A normalised image `[3, H, W]` as `(H, W, 3)`, uint8."""
    picture = (image * STD[:, None, None] + MEAN[:, None, None]).clamp(0, 1) * 255
    return picture.permute(1, 2, 0).byte().numpy()


def taught(
    model: nn.Module, criterion: nn.Module | None = None, steps: int = 60, batch: int = 16, lr: float = 5e-4
) -> nn.Module:
    """A network with five classes after it has learnt which photograph a crop comes from, by cross-entropy or more."""
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3),
        ]
    )
    pictures = [v2.functional.pil_to_tensor(Image.open(path).convert("RGB")) for path in SAMPLES]
    learnt = [p for p in model.parameters() if p.requires_grad]
    learnt += [] if criterion is None else list(criterion.parameters())
    optimiser = torch.optim.AdamW(learnt, lr=lr, weight_decay=0.05)
    model.train()
    for _ in range(steps):
        labels = torch.randint(len(SAMPLES), (batch,))
        x = torch.stack([crop(pictures[i]) for i in labels.tolist()])
        x = (x / 255 - MEAN[:, None, None]) / STD[:, None, None]
        loss = nn.functional.cross_entropy(model(x), labels) if criterion is None else criterion(model, x, labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"{type(model).__name__}: loss {loss.item():.2f}", flush=True)
    return model.eval()


def overlay(image: Tensor, heat: Tensor, opacity: float = 0.65) -> np.ndarray:
    """A map `[H, W]` from 0 to 1 over a normalised image."""
    field = heat.clamp(0, 1).numpy()
    hot = cv2.applyColorMap((field * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    cover = (opacity * np.sqrt(field))[..., None]
    return (colours(image) * (1 - cover) + hot * cover).round().astype(np.uint8)


def chosen(image: Tensor, mask: Tensor) -> np.ndarray:
    """The image where a mask `[H, W]` from 0 to 1 lets it through, grey and dark elsewhere."""
    picture = colours(image).astype(np.float32)
    grey = picture.mean(2, keepdims=True) * 0.3
    return (grey + (picture - grey) * mask.numpy()[..., None]).round().astype(np.uint8)


def stretched(maps: Tensor) -> Tensor:
    """The first of maps `[B, h, w]`, from its least value at 0 to its largest at 1, at the size of the pictures."""
    low, high = maps[0].min(), maps[0].max()
    unit = (maps[:1] - low) / (high - low).clamp(min=1e-12)
    return nn.functional.interpolate(unit[None], (SIDE, SIDE), mode="bilinear")[0, 0]


def marked(picture: np.ndarray, at: tuple[float, float]) -> np.ndarray:
    """A white ring at a place `(y, x)`, fractions."""
    drawn = picture.copy()
    centre = round(at[1] * drawn.shape[1]), round(at[0] * drawn.shape[0])
    cv2.circle(drawn, centre, 8, (0, 0, 0), 4, cv2.LINE_AA)
    cv2.circle(drawn, centre, 8, (255, 255, 255), 2, cv2.LINE_AA)
    return drawn


def sheet(name: str, rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> None:
    """Writes rows of titled panels as one picture."""
    title, gap = 22, 8
    height, width = rows[0][0][1].shape[:2]
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + title)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for r, row in enumerate(rows):
        for c, (text, panel) in enumerate(row):
            left, top = c * (width + gap), r * (height + title)
            draw.text((left + 2, top + 2), text, fill="black", font=font)
            page.paste(Image.fromarray(panel), (left, top + title))
    IMAGES.mkdir(exist_ok=True)
    page.save(IMAGES / f"{name}.jpg", quality=88, optimize=True)


_CAT, _COFFEE = (next(i for i, path in enumerate(SAMPLES) if path.stem == stem) for stem in ("cat", "coffee"))


def biformer() -> None:
    """Routed regions of one place in three stages, and the attention inside them."""
    model: Any = taught(timm.create_model("biformer_nano", num_classes=5))
    image, at = photographs()[_CAT, None], (0.42, 0.55)
    layers = [name for name in attention_layers(model) if int(name.split(".")[1]) < 3]
    rows = [[("query", marked(colours(image[0]), at))], [("evidence", overlay(image[0], heatmap(model, image)[0]))]]
    for name in (layers[0], layers[1], layers[-1]):
        stage = f"stage {int(name.split('.')[1]) + 1}"
        routed = attended(model, image, at, name, connectivity=True)[0]
        rows[0].append((f"{stage}: routed regions", marked(chosen(image[0], routed), at)))
        rows[1].append((f"{stage}: attention", marked(overlay(image[0], attended(model, image, at, name)[0]), at)))
    sheet("biformer", rows)


def litv2() -> None:
    """Lo-Fi attention of one place to the windows' averages, and the evidence for the class."""
    model: Any = taught(timm.create_model("litv2_nano", num_classes=5))
    rows = []
    for index, at in ((_CAT, (0.42, 0.55)), (_COFFEE, (0.5, 0.5))):
        image = photographs()[index, None]
        panels = [("query", marked(colours(image[0]), at))]
        for layer in (0, 1):
            heat = attended(model, image, at, layer)[0]
            panels.append((f"Lo-Fi attention, layer {layer + 1}", marked(overlay(image[0], heat), at)))
        rows.append([*panels, ("evidence", overlay(image[0], heatmap(model, image)[0]))])
    sheet("litv2", rows)


def sparsifiner() -> None:
    """The keys that one patch keeps, in three layers: how many of the heads keep each."""
    model: Any = timm.create_model("sparsifiner_deit_tiny_patch16_224", num_classes=5, depth=4, keep_rate=0.15)
    model.set_attention_path("dense")
    taught(model)
    model.set_attention_path("auto")
    criterion = SparsifinerCriterion(phase="attn_self_distill")
    criterion.set_trainable(model)
    taught(model, criterion, lr=1e-3)
    rows = []
    for index, at in ((_CAT, (0.42, 0.35)), (_COFFEE, (0.5, 0.5))):
        image = photographs()[index, None]
        kept = connectivity(model, image, (int(at[0] * 14), int(at[1] * 14)))[0].float().mean(1)  # [depth, h, w]
        panels = [("query", marked(colours(image[0]), at))]
        for layer in range(1, 4):
            mask = kept[layer].repeat_interleave(16, 0).repeat_interleave(16, 1)
            panels.append((f"kept keys, layer {layer + 1}", marked(chosen(image[0], mask), at)))
        rows.append(panels)
    sheet("sparsifiner", rows)


def ela() -> None:
    """Gates inserted into a trained EfficientNet-Lite0, after they and the classifier have learnt."""
    model: Any = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(weights.state_dict_for("tf_efficientnet_lite0", model))
    inserted = insert(model)
    model.reset_classifier(5)
    model.requires_grad_(False)
    for part in (model.get_classifier(), *map(model.get_submodule, inserted)):
        part.requires_grad_(True)
    taught(model, lr=5e-3)
    rows = []
    for index in (_CAT, _COFFEE):
        image = photographs()[index, None]
        maps = list(ela_maps(model, image).values())
        panels = [("photograph", colours(image[0]))]
        for layer in (0, len(maps) // 2, len(maps) - 1):
            panels.append((f"gates, layer {layer + 1} of {len(maps)}", overlay(image[0], stretched(maps[layer]))))
        rows.append(panels)
    sheet("ela", rows)


def psa() -> None:
    """Spatial masks of a ResNet-18 with the paper's form of the layer."""
    model: Any = taught(timm.create_model("psa_resnet18", num_classes=5, layout="sequential", form="paper"))
    rows = []
    for index in (_CAT, _COFFEE):
        image = photographs()[index, None]
        masks = polarized_masks(model, image)
        panels = [("photograph", colours(image[0]))]
        for name in ("layer1.1.deattn", "layer2.1.deattn", "layer3.1.deattn"):
            panels.append((f"spatial mask, {name[:6]}", overlay(image[0], stretched(masks[name].spatial[:, 0]))))
        rows.append(panels)
    sheet("psa", rows)


def dcal() -> None:
    """Rollout through a small DeiT, and the tenth of the patches that ask in global-local cross-attention."""
    model: Any = taught(timm.create_model("dcal_deit_tiny_patch16_224", num_classes=5, depth=4), DCALCriterion())
    rows = []
    for index in (_CAT, _COFFEE):
        image = photographs()[index, None]
        with torch.no_grad():
            _, selected = model.local_tokens(image)
        mask = torch.zeros(14 * 14)
        mask[selected[0, 1:] - model.num_prefix_tokens] = 1
        mask = mask.view(14, 14).repeat_interleave(16, 0).repeat_interleave(16, 1)
        panels = [("photograph", colours(image[0]))]
        panels.append(("rollout of the class token", overlay(image[0], stretched(rollout(model, image)))))
        panels.append(("local queries", chosen(image[0], mask)))
        rows.append([*panels, ("evidence", overlay(image[0], heatmap(model, image)[0]))])
    sheet("dcal", rows)


def tap() -> None:
    """How much each token takes of itself and of the averages around it, in the first block of a TAP-RVT."""
    model: Any = taught(timm.create_model("tap_rvt_tiny", num_classes=5), ADLCriterion())
    pooling = next(m for m in model.modules() if isinstance(m, TokenAwareAveragePooling))
    shares: list[Tensor] = []
    pooling.register_forward_pre_hook(lambda _, args: shares.append(pooling.scale_weights(args[0]).detach()))
    rows = []
    for index in (_CAT, _COFFEE):
        image = photographs()[index, None]
        model(image)
        share = shares.pop()  # [1, H, W, num_scales]
        panels = [("photograph", colours(image[0]))]
        for scale, text in ((0, "the token itself"), (1, "3x3 around it"), (3, "3x3, three apart")):
            panels.append((text, overlay(image[0], stretched(share[..., scale]))))
        rows.append(panels)
    sheet("tap", rows)


def astar() -> None:
    """A prompt with two objects, drawn without guidance and with it from the same noise; the maps of both."""
    pipe: Any = AStarStableDiffusionPipeline.from_pretrained(weights.shipped("text_to_scene"))
    pipe.set_progress_bar_config(disable=True)
    names = ("red circle", "blue square")
    prompt, subjects = caption(names), [name.split()[-1] for name in names]

    def drawn(seed: int, losses: dict[str, float]) -> AStarPipelineOutput:
        settings = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE_SCALE, "return_attention": True}
        settings |= {"step_size": 5.0, "guidance_steps": 8}  # as the claim of benchmarks/claims chose them
        noise = torch.Generator().manual_seed(seed)
        return pipe(prompt, subjects=subjects, losses=losses, generator=noise, **settings)

    for seed in range(1000):  # the first at which the plain picture lacks an object and the guided one has both
        plain, guided = drawn(seed, {"segregation": 0, "retention": 0}), drawn(seed, {"segregation": 1, "retention": 1})
        if shows(np.asarray(guided.images[0]), names) and not shows(np.asarray(plain.images[0]), names):
            break
    for result in (plain, guided):
        result.images = [image.resize((288, 288), Image.Resampling.NEAREST) for image in result.images]
    grids = [attention_grid(result, columns=6, tile=112) for result in (plain, guided)]
    page = Image.new("RGB", (max(g.width for g in grids), sum(g.height for g in grids)), "white")
    page.paste(grids[0], (0, 0))
    page.paste(grids[1], (0, grids[0].height))
    page.save(IMAGES / "astar.jpg", quality=88, optimize=True)
    print(f"seed {seed}")


_PANEL = 336


def _scene_vlm(mask: str) -> tuple[Any, Any]:
    """A small vision-language model that ships, and its processor."""
    folder = weights.shipped("scene_vlm") / mask
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def _panel(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture).resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)


def _read(model: Any, processor: Any, example: Example) -> tuple[str, np.ndarray]:
    """The reply, and what its first word read of the picture through all layers."""
    inputs = prompts(processor, [example])
    found = read_of(model, inputs, rollout=True)
    return processor.decode(found.answer, skip_special_tokens=True), np.asarray(
        found.draw(_panel(example.picture), token=0)
    )


def _first(kind: str, form: str = "word", seed: int = 0) -> Example:
    """The first held-out question of a kind and a form."""
    return next(e for e in held_out(400, seed) if e.question.kind == kind and e.question.format == form)


def mma() -> None:
    """The mask of one prompt, causal and open, and what the answers of the two models read."""
    (causal, processor), (mutual, _) = _scene_vlm("causal"), _scene_vlm("mma")
    stop = processor.tokenizer.convert_tokens_to_ids("<assistant>")
    rows = []
    for kind in ("shape", "same"):
        example = _first(kind)
        panels = [(example.question.text, np.asarray(_panel(example.picture)))]
        for model, title, switch in (
            (causal, "causal", nullcontext()),
            (mutual, "mutual", modality_mutual_attention(mutual, stop_token_id=stop)),
        ):
            with switch:
                reply, shown = _read(model, processor, example)
            panels.append((f"{title}: {reply}", shown))
        ids = prompts(processor, [example])["input_ids"]
        image_token_id = causal.config.image_token_id
        mask = mutual_mask(ids, image_token_id=image_token_id, tokens_per_image=1, stop_token_id=stop)[0, 0]
        rows.append([*panels, ("the mask; yellow: opened", _drawn_mask(mask, ids[0] == image_token_id))])
    sheet("mma", rows)


def _drawn_mask(mask: Tensor, image: Tensor) -> np.ndarray:
    """A mask `[L, L]`: what is seen, lighter where an image is read, and what is seen ahead."""
    colour = torch.tensor([[38, 40, 46], [70, 110, 180], [120, 170, 215], [253, 200, 40]], dtype=torch.uint8)
    kind = mask.long() * torch.where(image, 2, 1)
    kind[mask & torch.ones_like(mask).triu(1)] = 3
    drawn = Image.fromarray(colour[kind].numpy())
    return np.asarray(drawn.resize((_PANEL, _PANEL), Image.Resampling.NEAREST))


def vmtc() -> None:
    """Which tokens are kept, and which are merged with which, at three budgets."""
    model, processor = _scene_vlm("causal")
    rows = []
    for kind in ("shape", "count"):
        example = _first(kind)
        inputs = prompts(processor, [example])
        panels = [(example.question.text, np.asarray(_panel(example.picture)))]
        for keep in ("1/2", "1/4", "1/8"):
            with compress_visual_tokens(model, keep_ratio=1 / int(keep[2:])) as handle, torch.no_grad():
                written = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            last = handle.settings.last
            assert last is not None
            reply = processor.decode(written, skip_special_tokens=True)
            into = last.pictures[0].target.view(GRID, GRID).numpy()
            own = np.arange(into.size).reshape(into.shape)
            panels.append((f"{keep}: {reply}", np.asarray(draw_merged(_panel(example.picture), own, into))))
        rows.append(panels)
    sheet("vmtc", rows)


def cmai() -> None:
    """What the answer reads of the picture, plain and inhibited."""
    model, processor = _scene_vlm("causal")
    rows = []
    for kind in ("colour", "same"):
        example = _first(kind)
        panels = [(example.question.text, np.asarray(_panel(example.picture)))]
        for title, switch in (
            ("plain", nullcontext()),
            ("keeps 1/2", inhibit_cross_modality(model, keep_ratio=0.5)),
            ("keeps 1/8", inhibit_cross_modality(model, keep_ratio=0.125)),
        ):
            with switch:
                reply, shown = _read(model, processor, example)
            panels.append((f"{title}: {reply}", shown))
        rows.append(panels)
    sheet("cmai", rows)


def oat() -> None:
    """A new scene: a search of the searcher and one of the model; below what 100 of each look at on the way."""
    rng, rows, columns = np.random.default_rng(11), 3, 9
    scenes, shelf = sample_scenes(rng, 1, rows, columns), objects(rows, columns)
    shown = picture(scenes)
    places, target = shelf.centres, int(scenes.targets[0])
    theirs = [path[path != PAD] for path in Searcher().search(rng, scenes, 100)[0]]
    model = checkpoint.load(weights.shipped("search_scenes"))
    drawn = sample(model, to_model(scenes, render(scenes)), 100, generator=torch.Generator().manual_seed(0))
    both = (theirs, drawn.tolist()[0])
    # The first that passes by several objects and ends on the target.
    usual = [next(path for path in paths if 5 <= len(set(path)) <= 7 and path[-1] == target) for paths in both]
    left, upper, right, lower = shelf.boxes[target].tolist()
    above = draw_scanpaths(
        shown, {"the searcher": places[usual[0]], "the model": places[usual[1]]},
        target=(left, upper, right, lower), longer_side=500,
    )  # fmt: skip
    below = [draw_density(shown, [places[path[path != target]] for path in paths], longer_side=500) for paths in both]
    page = Image.new("RGB", (above.width, above.height + 8 + below[0].height), "white")
    page.paste(above, (0, 0))
    for left_edge, panel in zip((0, above.width - below[1].width), below, strict=True):
        page.paste(panel, (left_edge, above.height + 8))
    page.save(IMAGES / "oat.jpg", quality=88, optimize=True)


PICTURES: dict[str, Callable[[], None]] = {
    "biformer": biformer,
    "litv2": litv2,
    "sparsifiner": sparsifiner,
    "ela": ela,
    "psa": psa,
    "dcal": dcal,
    "tap": tap,
    "astar": astar,
    "mma": mma,
    "vmtc": vmtc,
    "cmai": cmai,
    "oat": oat,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[[], *PICTURES], help="all without one")
    for name in parser.parse_args().methods or PICTURES:
        torch.manual_seed(0)
        PICTURES[name]()
        print(f"docs/images/{name}.jpg")


if __name__ == "__main__":
    main()
