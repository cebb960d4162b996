"""Where in its picture each image token lies, family by family: for maps that are drawn over the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from .layout import VisualLayout

__all__ = ["on_grids", "one_grid", "picture_grids", "places_known"]


def picture_grids(model: PreTrainedModel, inputs: Mapping[str, Any], layout: VisualLayout) -> list[list[Tensor]]:
    """The image tokens of one prompt as they lie in its pictures.

    Args:
        model: A model of a family whose image tokens lie on grids.
        inputs: Of that prompt, as its processor made them.
        layout: Of its `input_ids`, a batch of one.

    Returns:
        For each picture one or more grids `[T, H, W]` of indices into the prompt's image tokens, the finest first. Each
        covers the whole picture; a family that looks at tiles and at the picture as a whole has two.

    Raises:
        ValueError: For a family whose tokens have no place, as those of a resampler, or is not known to have one; or
            for a number of tokens that does not fit.
    """
    if not places_known(model):
        raise ValueError(
            f"where the image tokens of a {type(model).__name__} lie in their picture is not known (known for "
            f"{', '.join(sorted(_GRIDS))}); give grid=(height, width), if they lie on one, row by row"
        )
    return _GRIDS[str(model.config.model_type)](model, inputs, layout)


def places_known(model: PreTrainedModel) -> bool:
    """Whether :func:`picture_grids` knows where a model's image tokens lie in their picture."""
    return str(model.config.model_type) in _GRIDS


def on_grids(values: Tensor, grids: list[Tensor]) -> Tensor:
    """What image tokens hold, as a map over their picture; a coarser grid's is shared out among the places it covers.

    Args:
        values: Of the prompt's image tokens, `[N]`.
        grids: Of one picture, as :func:`picture_grids` gives them.

    Returns:
        `[T, H, W]` of the finest grid; its sum is that of the values on all grids.
    """
    finest = values[grids[0]]
    for grid in grids[1:]:
        share = grid[0].numel() / finest[0].numel()
        finest = finest + share * F.interpolate(values[grid][None], finest.shape[1:], mode="nearest-exact")[0]
    return finest


def one_grid(height: int, width: int, layout: VisualLayout) -> list[list[Tensor]]:
    """The grids of pictures that have `height * width` tokens each, row by row."""
    count = _count(layout)
    if height < 1 or width < 1 or count % (height * width):
        raise ValueError(f"grid=({height}, {width}) does not go into the {count} image tokens of the prompt")
    return [[grid] for grid in torch.arange(count).view(-1, 1, height, width)]


def _squares(model: Any, inputs: Mapping[str, Any], layout: VisualLayout) -> list[list[Tensor]]:
    """LLaVA and PaliGemma: as many tokens for each picture, row by row."""
    count = _count(layout)
    pictures = len(inputs["pixel_values"]) if "pixel_values" in inputs else int(layout.block.max()) + 1
    side = math.isqrt(count // pictures)
    if count != pictures * side**2:
        raise ValueError(
            f"{count} image tokens for {pictures} pictures are no squares; give grid=(height, width) of one picture"
        )
    return one_grid(side, side, layout)


def _merged_patches(model: Any, inputs: Mapping[str, Any], layout: VisualLayout) -> list[list[Tensor]]:
    """Qwen2-VL: `image_grid_thw` patches, of which `spatial_merge_size` squared make one token."""
    merge = model.config.vision_config.spatial_merge_size
    shapes = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in inputs["image_grid_thw"]]
    _check_count(layout, sum(map(math.prod, shapes)), "image_grid_thw", inputs)
    index = torch.arange(_count(layout)).split([math.prod(shape) for shape in shapes])
    return [[part.view(shape)] for part, shape in zip(index, shapes, strict=True)]


def _any_resolution(model: Any, inputs: Mapping[str, Any], layout: VisualLayout) -> list[list[Tensor]]:
    """LLaVA-NeXT and LLaVA-OneVision: the whole picture, then its tiles without padding, and a break after each row."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    base, sizes = torch.arange(side * side).view(1, side, side), inputs["image_sizes"]
    if _count(layout) == len(sizes) * (side * side + 1):  # several pictures may go without tiles, with one line break
        return [[base + i * (side * side + 1)] for i in range(len(sizes))]
    first, pictures = 0, []
    for size in sizes:
        tiles = _unpadded_tiles(model, size, side) + side * side
        pictures.append([tiles + first, base + first])
        first += int(tiles.max()) + 2
    _check_count(layout, first, "image_sizes", inputs)
    return pictures


def _unpadded_tiles(model: Any, size: Tensor, side: int) -> Tensor:
    """Indices `[1, H, W]` of the tokens of a picture's tiles, counted from the first of these."""
    config = model.config
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    blank, line_break = torch.zeros(1 + rows * columns, side * side, 1), torch.ones(1)
    strategy = {"vision_feature_select_strategy": "default"} if config.model_type == "llava_next" else {}
    (packed,), _ = model.model.pack_image_features([blank], size[None], image_newline=line_break, **strategy)
    breaks = packed[side * side :, 0].nonzero()[:, 0]
    height, width = len(breaks), int(breaks[0])
    return torch.arange(height * (width + 1)).view(1, height, width + 1)[..., :width]


def _tiles(model: Any, inputs: Mapping[str, Any], layout: VisualLayout) -> list[list[Tensor]]:
    """Idefics3 and SmolVLM: tiles row by row, with a line break where a row of tiles ends; last the whole picture."""
    positions, frame = layout.image[0].nonzero()[:, 0], layout.frame[0]
    new_run = (positions.diff() > 1).nonzero()[:, 0] + 1
    tiles = torch.arange(len(positions)).tensor_split(new_run.tolist())
    gaps = [0, *(positions.diff() - 1)[new_run - 1].tolist()]  # tokens between a tile and the one before
    picture_of = [int(layout.block[0, positions[tile[0]]]) for tile in tiles]
    pictures = []
    for picture in range(max(picture_of) + 1):
        own = [i for i, of in enumerate(picture_of) if of == picture]
        lead = _frames_before(frame, int(positions[tiles[own[0]][0]]))
        if own[0] > 0:  # less the marker that closes the picture before, where that is next to this one
            lead = min(lead, gaps[own[0]] - 1)
        # A tile's own lead, and a line break besides where a row begins.
        row_starts = [n for n, i in enumerate(own[:-1]) if n == 0 or gaps[i] > lead]
        pictures.append(_tiled([tiles[i] for i in own], max(len(row_starts), 1)))
    return pictures


def _frames_before(frame: Tensor, position: int) -> int:
    others = (~frame[:position]).nonzero()[:, 0]
    return position - (int(others[-1]) + 1 if len(others) else 0)


def _tiled(tiles: list[Tensor], rows: int) -> list[Tensor]:
    """Grids of a picture whose last tile is the whole."""
    side = math.isqrt(len(tiles[0]))
    *parts, whole = [tile.view(side, side) for tile in tiles]
    if not parts:
        return [whole[None]]
    if len(parts) % rows:
        raise ValueError(
            f"{len(parts)} tiles of a picture are not {rows} rows; give the prompt as the processor makes it"
        )
    grid = torch.stack(parts).view(rows, -1, side, side).transpose(1, 2).reshape(1, rows * side, -1)
    return [grid, whole[None]]


def _count(layout: VisualLayout) -> int:
    return int(layout.image.sum())


def _check_count(layout: VisualLayout, made: int, name: str, inputs: Mapping[str, Any]) -> None:
    if made != _count(layout):
        raise ValueError(
            f"{name}={torch.as_tensor(inputs[name]).tolist()} make {made} image tokens, but the prompt has "
            f"{_count(layout)}"
        )


_GRIDS: dict[str, Callable[[Any, Mapping[str, Any], VisualLayout], list[list[Tensor]]]] = {
    "llava": _squares,
    "paligemma": _squares,
    "qwen2_vl": _merged_patches,
    "qwen2_5_vl": _merged_patches,
    "llava_next": _any_resolution,
    "llava_onevision": _any_resolution,
    "idefics3": _tiles,
    "smolvlm": _tiles,
}
