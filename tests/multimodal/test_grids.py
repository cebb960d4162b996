"""Where image tokens lie: pictures of their own coordinates go through the real processors and each model's packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_vlm as tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
)

from multimodal.grids import on_grids, one_grid, picture_grids, places_known
from multimodal.layout import find_layout

PLAIN: dict[str, Any] = {"do_normalize": False, "do_convert_rgb": True}
SQUARE = {"height": 16, "width": 16}
PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16]], **PLAIN}


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is x and whose green is y, from 0 to 1."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, 0 * x], -1) * 255).round().astype(np.uint8))


def patches(pixels: Tensor) -> Tensor:
    """Mean colours `[n, P, 3]` of the 4 × 4 patches of squares `[n, 3, S, S]`, row by row."""
    return torch.nn.functional.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)


# Each gives the inputs of two pictures and the mean colour that every image token stands for, `[N, 3]`.


def llava(model: Any, pictures: list[Image.Image]) -> tuple[dict[str, Any], Tensor, list[int]]:
    made = CLIPImageProcessor(size=SQUARE, do_center_crop=False, **PLAIN)(pictures, return_tensors="pt")
    tokens = patches(made["pixel_values"])
    return run_of_images(made, [len(own) for own in tokens]), tokens.flatten(0, 1), [1, 1]


def paligemma(model: Any, pictures: list[Image.Image]) -> tuple[dict[str, Any], Tensor, list[int]]:
    made = SiglipImageProcessor(size=SQUARE, **PLAIN)(pictures, return_tensors="pt")
    tokens = patches(made["pixel_values"])
    return run_of_images(made, [len(own) for own in tokens]), tokens.flatten(0, 1), [1, 1]


def any_resolution(model: Any, pictures: list[Image.Image]) -> tuple[dict[str, Any], Tensor, list[int]]:
    if model.config.model_type == "llava_next":
        processor: Any = LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE, **PINPOINTS)
        strategy = {"vision_feature_select_strategy": "default"}
    else:
        processor, strategy = LlavaOnevisionImageProcessor(size=SQUARE, **PINPOINTS), {}
    made = processor(pictures, return_tensors="pt")
    colours = [patches(tiles) for tiles in made["pixel_values"]]
    tokens, _ = model.model.pack_image_features(colours, made["image_sizes"], image_newline=torch.zeros(3), **strategy)
    return run_of_images(made, [len(own) for own in tokens]), torch.cat(list(tokens)), [2, 2]


def qwen(model: Any, pictures: list[Image.Image]) -> tuple[dict[str, Any], Tensor, list[int]]:
    processor = Qwen2VLImageProcessor(patch_size=4, temporal_patch_size=2, merge_size=2, **PLAIN)
    processor.size = {"shortest_edge": 64, "longest_edge": 1600}
    made = processor(pictures, return_tensors="pt")
    colours = made["pixel_values"].view(-1, 3, 2 * 4 * 4).mean(2)
    tokens = colours.view(-1, 4, 3).mean(1)
    return run_of_images(made, (made["image_grid_thw"].prod(1) // 4).tolist()), tokens, [1, 1]


def tiled(model: Any, pictures: list[Image.Image]) -> tuple[dict[str, Any], Tensor, list[int]]:
    processor = Idefics3ImageProcessor(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, do_image_splitting=True, **PLAIN
    )
    made = processor([pictures], return_tensors="pt", return_row_col_info=True)
    shapes = list(zip(made["rows"][0], made["cols"][0], strict=True))
    row = [tiny.BOS]
    for rows, columns in shapes:
        for r in range(rows):
            row += [id for c in range(columns) for id in (tiny.FAKE, 20 + r * columns + c, *[tiny.IMAGE_ID] * 4)]
            row += [tiny.NEWLINE]
        row += [tiny.NEWLINE, tiny.FAKE, tiny.GLOBAL, *[tiny.IMAGE_ID] * 4, tiny.FAKE, 9]
    colours = patches(made["pixel_values"][0])  # [tiles, 16, 3]
    tokens = torch.stack([shuffled(model, colours[..., i, None]) for i in range(3)], -1)
    return {"input_ids": torch.tensor([row])}, tokens.flatten(0, 1), [2, 2]


def shuffled(model: Any, patch: Tensor) -> Tensor:
    """The mean of the 2 × 2 patches that become one token."""
    return model.model.connector.pixel_shuffle(patch, 2).mean(-1)


def run_of_images(made: Any, lengths: list[int]) -> dict[str, Any]:
    first, second = ([tiny.IMAGE_ID] * length for length in lengths)
    return {**made, "input_ids": torch.tensor([[tiny.BOS, *first, 5, *second, 6]])}


FAMILIES: list[tuple[Callable[[], Any], Callable[..., Any]]] = [
    (tiny.llava_clip, llava),
    (tiny.paligemma, paligemma),
    (tiny.llava_next, any_resolution),
    (tiny.llava_onevision, any_resolution),
    (tiny.qwen2_vl, qwen),
    (tiny.qwen2_5_vl, qwen),
    (tiny.idefics3, tiled),
    (tiny.smolvlm, tiled),
]


@pytest.mark.parametrize(("family", "processed"), FAMILIES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("sizes", [((48, 28), (20, 32)), ((32, 32), (64, 16))], ids=str)
def test_each_token_lies_where_its_patches_came_from(family: Any, processed: Any, sizes: Any):
    model, _ = family()
    inputs, tokens, counts = processed(model, [coordinates(*size) for size in sizes])
    layout = find_layout(model, inputs["input_ids"])
    assert len(tokens) == int(layout.image.sum())
    pictures = picture_grids(model, inputs, layout)
    assert [len(grids) for grids in pictures] == counts and places_known(model)
    for grids in pictures:
        for grid in grids:
            (H, W), found = grid.shape[1:], tokens[grid[0]]  # [H, W, 3]
            x, y = (torch.arange(side).add(0.5) / side for side in (W, H))
            torch.testing.assert_close(found[..., 0], x.expand(H, W), atol=0.5 / W, rtol=0)
            torch.testing.assert_close(found[..., 1], y[:, None].expand(H, W), atol=0.5 / H, rtol=0)
        together = torch.cat([grid.flatten() for grid in grids])
        assert len(together.unique()) == len(together)
    shapes = [grids[0].shape[1:] for grids in pictures]
    if not family.__name__.startswith(("llava_clip", "paligemma")):  # which make squares of all
        assert [h > w for h, w in shapes] == [height > width for width, height in sizes]


def test_a_coarser_grid_is_shared_out_among_the_places_it_covers():
    fine, coarse = torch.arange(24).view(1, 4, 6), torch.arange(24, 30).view(1, 2, 3)
    values = torch.zeros(30)
    values[29] = 1  # the lower right of the coarse ones
    field = on_grids(values, [fine, coarse])
    assert field.shape == (1, 4, 6)
    assert (field[0, 2:, 4:] == 0.25).all() and field.sum() == 1
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(on_grids(values, [fine, coarse]).sum(), values.sum())
    assert torch.equal(on_grids(values, [fine]), values[:24].view(1, 4, 6))


def test_several_pictures_in_onevision_go_without_tiles():
    model, _ = tiny.llava_onevision()
    ids = torch.tensor([[1, *[tiny.IMAGE_ID] * 17, 5, *[tiny.IMAGE_ID] * 17]])
    inputs = {"input_ids": ids, "image_sizes": torch.tensor([[16, 28], [30, 16]])}
    first, second = picture_grids(model, inputs, find_layout(model, ids))
    assert torch.equal(first[0], torch.arange(16).view(1, 4, 4)) and torch.equal(second[0], first[0] + 17)


def test_tiles_without_splitting_and_pictures_in_a_row():
    model, _ = tiny.idefics3()
    whole = [tiny.FAKE, tiny.GLOBAL, *[tiny.IMAGE_ID] * 4, tiny.FAKE]
    for between in ([], [7, 8]):
        ids = torch.tensor([[tiny.BOS, *whole, *between, *whole, 5]])
        pictures = picture_grids(model, {"input_ids": ids}, find_layout(model, ids))
        assert [[grid.flatten().tolist() for grid in grids] for grids in pictures] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_what_does_not_fit_is_named():
    model, _ = tiny.llava_clip()
    ids = torch.tensor([[1, *[tiny.IMAGE_ID] * 15, 5]])
    layout = find_layout(model, ids)
    with pytest.raises(ValueError, match="15 image tokens for 1 pictures are no squares; give grid="):
        picture_grids(model, {"input_ids": ids}, layout)
    grids = one_grid(3, 5, layout)
    assert len(grids) == 1 and math.prod(grids[0][0].shape) == 15
    with pytest.raises(ValueError, match=r"grid=\(4, 4\) does not go into the 15 image tokens"):
        one_grid(4, 4, layout)
    qwen_model, _ = tiny.qwen2_vl()
    shapes = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(ValueError, match=r"image_grid_thw=\[\[1, 4, 4\]\] make 4 image tokens, but the prompt has 15"):
        picture_grids(qwen_model, shapes, layout)
    next_model, _ = tiny.llava_next()
    with pytest.raises(ValueError, match=r"image_sizes=.* make 52 image tokens, but the prompt has 15"):
        picture_grids(next_model, {"image_sizes": torch.tensor([[16, 32]])}, layout)


def test_a_family_whose_grids_are_not_known_is_named(monkeypatch: pytest.MonkeyPatch):
    model, inputs = tiny.llava_clip()
    monkeypatch.setattr(model.config, "model_type", "resampled")
    assert not places_known(model)
    with pytest.raises(
        ValueError, match=r"LlavaForConditionalGeneration .* not known .* paligemma, qwen2_5_vl.*give grid"
    ):
        picture_grids(model, inputs, find_layout(model, inputs["input_ids"]))
