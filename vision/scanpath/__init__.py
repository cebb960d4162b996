"""Where people look when they search: object-level scanpaths, how to predict, read, compare and draw them.

Paper: "Oat: Object-Level Attention Transformer for Gaze Scanpath Prediction", Fang et al., ECCV 2024,
https://arxiv.org/abs/2407.13335.

A fixation is `(x, y)` in pixels of its picture, from the upper left corner. An object is known by its index among the
objects of its picture. A scanpath is the sequence of fixations of one search, `[T, 2]`, or of the objects they fell on,
`[T]`.
"""

from vision.scanpath import appearance, datasets, decoding, draw, metrics, model, objects, positions, scenes

__all__ = ["appearance", "datasets", "decoding", "draw", "metrics", "model", "objects", "positions", "scenes"]
