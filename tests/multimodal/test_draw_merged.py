"""What is drawn of kept and merged tokens: kept ones clear, each cluster in a colour, dropped ones dark."""

from __future__ import annotations

import numpy as np
from PIL import Image

from multimodal.draw import draw_merged

WHITE = Image.new("RGB", (32, 16), "white")
OWN = np.arange(8).reshape(2, 4)


def middle(drawn: Image.Image, token: int, aside: int = 25) -> tuple[int, ...]:
    """The colour of a token, beside the dot that may be in its middle."""
    width, height = drawn.size
    row, column = divmod(token, 4)
    return drawn.getpixel((int((column + 0.5) * width / 4) + aside, int((row + 0.5) * height / 2)))  # type: ignore


def test_tokens_of_one_cluster_share_a_colour():
    #                  0, 1 alone; 2 and 3 in 3; 4 dropped; 5, 6, 7 in 6
    drawn = draw_merged(WHITE, OWN, np.array([[0, 1, 3, 3], [-1, 6, 6, 6]]))
    assert drawn.size == (336, 168), "a small picture is enlarged"
    colours = [middle(drawn, token) for token in range(8)]
    assert colours[0] == colours[1] == (255, 255, 255)
    assert colours[2] == colours[3] and colours[5] == colours[6] == colours[7]
    assert len(set(colours)) == 4
    assert max(colours[4]) < 110 < max(colours[2])
    dots = [middle(drawn, token, aside=0) == (255, 255, 255) for token in range(2, 8)]
    assert dots == [False, True, False, False, True, False], "a dot where the merged token stands"


def test_outlines_part_clusters_but_not_what_stays():
    drawn = np.asarray(draw_merged(WHITE, OWN, np.array([[0, 1, 3, 3], [-1, 6, 6, 6]]), opacity=1.0))
    assert (drawn[100, [83, 84]] == 255).all() and (drawn[130, 168 - 20 : 168 + 20] < 255).any(1).all()
    grey = Image.new("RGB", (32, 16), (90, 90, 90))
    whole = np.asarray(draw_merged(grey, OWN, OWN))
    assert (whole == 90).all(), "all tokens kept: the picture as it is"
