"""`attnsuite scanpath`: where a searcher might look, on a grid of objects in any picture."""
