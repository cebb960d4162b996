"""The picture of a guided generation: what it shows, where, and what it refuses."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from diffusion.draw import _step_ticks, _ticks, attention_grid, heat
from diffusion.pipelines import AStarPipelineOutput

CAT = Path(__file__).parents[2] / "samples" / "cat.jpg"
BLUE, VERMILLION = (0, 114, 178), (213, 94, 0)  # the first two curves


def result(
    steps: int = 6, subjects: tuple[str, ...] = ("cat", "red ball"), size: tuple[int, int] = (96, 64)
) -> AStarPipelineOutput:
    """Two images, a mirror of each other; blobs of attention that wander to the right and grow."""
    image = Image.open(CAT).resize(size)
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    maps = torch.empty(steps, 2, 16, 16, len(subjects))
    for step in range(steps):
        along = (step + 1) / (steps + 1)
        for k in range(len(subjects)):
            blob = torch.exp(-((x - along) ** 2 + (y - (k + 1) / (len(subjects) + 1)) ** 2) / 0.02)
            maps[step, 0, ..., k] = along * blob
    maps[:, 1] = maps[:, 0].flip(-2)
    losses = {
        "segregation": torch.linspace(0.4, 0.1, steps)[:, None].expand(-1, 2),
        "retention": torch.linspace(1.9, 1.5, steps)[:, None].repeat(1, 2),
    }
    losses["retention"][0] = torch.nan
    images = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return AStarPipelineOutput(images, subjects=[list(subjects)] * 2, maps=maps, losses=losses)


def parts(output: AStarPipelineOutput) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    assert output.maps is not None and output.losses is not None
    return output.maps, output.losses


def difference(a: Image.Image, b: Image.Image) -> tuple[int, int, int, int]:
    """Where two pictures of one size differ: left, upper, right, lower."""
    assert a.size == b.size
    box = ImageChops.difference(a, b).getbbox()
    assert box is not None, "no difference"
    return box


def count(page: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(page) == colour).all(-1).sum())


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(
    "subjects", [("cat",), ("cat", "ball"), ("cat", "ball", "hat", "a very long name of a subject")]
)
def test_any_number_of_steps_and_subjects_is_drawn(steps: int, subjects: tuple[str, ...]):
    page = attention_grid(result(steps, subjects))
    assert page.mode == "RGB"
    assert page.width > 128 * min(steps, 8) and page.height > 288 * 0.6 + 80 * len(subjects)
    # White around: nothing runs into the border.
    pixels = np.asarray(page)
    for border in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (border == 255).all()


def test_a_map_changes_its_own_tile_and_nothing_else():
    before, after = result(), result()
    # No new maximum, which would change the colours of all.
    parts(after)[0][5, 0, :, :, 1] = 0
    page = attention_grid(before, tile=120)
    left, upper, right, lower = difference(page, attention_grid(after, tile=120))
    assert right - left <= 120 and lower - upper <= 80
    # The last tile of the last row.
    assert left > page.width - 120 - 120 and upper > page.height - 80 - 30
    # The blob lies to the right of the tile's middle.
    assert right - left < 100


def test_rows_are_subjects_and_columns_are_steps():
    original = attention_grid(result(), tile=120)
    corners = {}
    for step in range(6):
        for k in range(2):
            after = result()
            parts(after)[0][step, 0, :, :, k] *= 0.8 if (step, k) != (5, 0) else 0.99
            corners[step, k] = difference(original, attention_grid(after, tile=120))
    for k in range(2):
        lefts = [corners[step, k][0] for step in range(5)]
        assert all(b - a > 100 for a, b in pairwise(lefts))
    assert all(corners[step, 1][1] > corners[step, 0][3] - 10 for step in range(5))


def test_the_steps_shown_are_spread_from_the_first_to_the_last():
    steps, seen = 50, []
    before = attention_grid(result(steps), columns=4)
    for step in range(steps):
        after = result(steps)
        parts(after)[0][step, 0, :, :, 1] = 0
        if ImageChops.difference(before, attention_grid(after, columns=4)).getbbox():
            seen.append(step)
    assert seen == [0, 16, 33, 49]


def test_all_maps_share_one_scale_so_that_fading_is_seen():
    # The same shape at every step, ever weaker.
    fading = result(4, ("cat",))
    maps, _ = parts(fading)
    for step in range(4):
        maps[step] = maps[0] / maps[0].amax() * (1 - 0.25 * step)
    fading.losses = None
    page = np.asarray(attention_grid(fading, tile=100).convert("HSV"), dtype=float)
    # The maps end where the scale begins.
    tiles = np.split(page[-90:, -68 - 4 * 106 : -68, 1], 4, axis=1)
    colour = [tile.sum() for tile in tiles]
    assert all(a > 1.1 * b for a, b in pairwise(colour))


def test_heat_lies_where_the_map_is_high_and_leaves_the_rest_alone():
    grey = np.full((64, 96, 3), 120, np.uint8)
    field = np.zeros((16, 16))
    field[2:5, 11:14] = 1
    drawn = heat(grey, field).astype(int)
    colour = drawn.max(-1) - drawn.min(-1)
    y, x = np.unravel_index(colour.argmax(), colour.shape)
    assert 8 <= y < 20 and 66 <= x < 84
    assert drawn[y, x, 0] > 200 and drawn[y, x, 1] > 200 and drawn[y, x, 2] < 100, "yellow"
    assert (drawn[:, :48] == 120).all() and (drawn[32:] == 120).all()


def test_the_index_picks_the_image_and_its_maps():
    output = result(subjects=("cat",))
    first, second = attention_grid(output), attention_grid(output, 1)
    one = copy.copy(output)
    maps, losses = parts(output)
    one.images, one.maps, one.subjects = output.images[1:], maps[:, 1:], [["cat"]]
    one.losses = {name: values[:, 1:] for name, values in losses.items()}
    assert ImageChops.difference(second, attention_grid(one)).getbbox() is None
    left, upper, _, lower = difference(first, second)
    assert left < 32 and upper < 32 and lower > first.height - 120


def test_curves_have_gaps_where_a_loss_was_not_evaluated():
    whole, broken, bare = result(20), result(20), result(20)
    parts(broken)[1]["retention"][5:12] = torch.nan
    parts(bare)[1]["retention"][:] = torch.nan
    drawn = [count(attention_grid(output), VERMILLION) for output in (whole, broken, bare)]
    legend = drawn[2]
    assert 20 < legend < 100
    assert legend < drawn[1] < drawn[0]
    assert (drawn[1] - legend) / (drawn[0] - legend) == pytest.approx(11 / 18, abs=0.12)
    # The other curve stays what it is.
    assert len({count(attention_grid(output), BLUE) for output in (whole, broken, bare)}) == 1


def test_a_lone_value_is_a_dot():
    lone, none = result(9), result(9)
    for output in (lone, none):
        parts(output)[1]["retention"][:] = torch.nan
    parts(lone)[1]["retention"][4] = 1.7
    assert count(attention_grid(lone), VERMILLION) - count(attention_grid(none), VERMILLION) > 30


def test_a_falling_loss_falls_in_the_picture():
    pixels = (np.asarray(attention_grid(result(20))) == BLUE).all(-1)
    pixels[:40] = False  # the legend
    y, x = np.nonzero(pixels)
    assert y[x < np.quantile(x, 0.2)].mean() + 20 < y[x > np.quantile(x, 0.8)].mean()


def test_without_losses_the_maps_are_drawn_all_the_same():
    output = result()
    output.losses = {}
    assert count(attention_grid(output), BLUE) == 0
    output.losses = None
    assert attention_grid(output).width > 6 * 128


def test_precision_and_gradients_do_not_matter_and_the_result_is_left_alone():
    output = result()
    maps, _ = parts(output)
    kept = maps.clone()
    page = attention_grid(output)
    assert torch.equal(maps, kept)
    output.maps = maps.clone().requires_grad_()
    assert ImageChops.difference(page, attention_grid(output)).getbbox() is None
    output.maps = maps.bfloat16()
    assert np.abs(np.asarray(page, int) - np.asarray(attention_grid(output), int)).mean() < 1


def test_maps_that_are_empty_or_no_numbers_are_drawn_as_nothing():
    output = result()
    output.maps = torch.full_like(parts(output)[0], torch.nan)
    bare = attention_grid(output)
    output.maps = torch.zeros_like(parts(output)[0])
    assert ImageChops.difference(bare, attention_grid(output)).getbbox() is None


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.12, 0.43), (1.61, 1.64), (-30, -2), (-1, 3), (0, 0), (0.5, 0.5), (1e-7, 3e-7), (0, 5e4)],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float):
    ticks = _ticks(np.array([high, np.nan, low]), most=4)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-6 * abs(low) and ticks[-1] >= high - 1e-6 * abs(high)
    step = ticks[1] - ticks[0]
    leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(leading - digit) for digit in (1, 2, 5)) < 1e-6
    assert all((b - a) == pytest.approx(step) for a, b in pairwise(ticks))
    assert low < 0 or ticks[0] >= 0


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 11, 50, 51, 1000])
def test_steps_are_marked_from_the_first_to_the_last(steps: int):
    marks = _step_ticks(steps)
    assert marks[0] == 1 and marks[-1] == steps and marks == sorted(set(marks)) and len(marks) <= 12


def test_what_a_pipeline_returns_is_drawn(pipe):
    output = pipe(
        ["a cat and a dog", "a red fire truck on a box, two cats"],
        subjects=[["cat", "dog"], ["truck", "box", "cat"]],
        num_inference_steps=3,
        height=32,
        width=32,
        return_attention=True,
        generator=torch.Generator().manual_seed(0),
    )
    two, three = attention_grid(output), attention_grid(output, 1)
    # A row for each subject of its own prompt.
    assert three.height - two.height == 128 + 6
    assert count(two, BLUE) > 100 and count(two, VERMILLION) > 100


def test_a_result_without_maps_says_how_to_have_them():
    with pytest.raises(ValueError, match="return_attention=True"):
        attention_grid(AStarPipelineOutput([Image.new("RGB", (8, 8))]))


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_out_of_range_is_refused(index: int):
    with pytest.raises(ValueError, match=f"index={index} is out of range for 2 images"):
        attention_grid(result(), index)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="columns=0"):
        attention_grid(result(), columns=0)
    with pytest.raises(ValueError, match="tile=8"):
        attention_grid(result(), tile=8)
    latent = result()
    latent.images = torch.zeros(2, 4, 8, 8)
    with pytest.raises(TypeError, match="expected PIL images, got Tensor; call with output_type='pil'"):
        attention_grid(latent)
