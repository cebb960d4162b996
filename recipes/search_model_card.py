"""Measures what `recipes.search_model` trained, and writes its card."""

from __future__ import annotations

import numpy as np

from recipes.markov_search import fit_markov, fit_markov_target
from recipes.search_model import GRIDS, LEARNING_RATE, SEARCHES, SEED, TARGETS, likelihoods, searches_of
from recipes.search_scenes import CROP_SIZE, Searcher, render, sample_scenes
from vision.scanpath.decoding import sample
from vision.scanpath.metrics import behaviour, behavioural_delta, next_object
from vision.scanpath.model import OAT, next_objects
from vision.scanpath.scenes import PAD

__all__ = ["card", "measure"]

MEASURED = ((3, 9), (4, 7), (6, 14))
_SEED = 20_000  # of what is measured on


def measure(model: OAT, rows: int, columns: int, num: int = 100) -> dict[str, float]:
    """How well a model foretells searches of fresh scenes, beside those who know less and the searcher itself.

    Args:
        model: in evaluation mode.
        rows: of the grid.
        columns: of the grid.
        num: scenes, each searched 4 times.

    Returns:
        Nats per token of 'Markov', 'Markov + target', 'model' and 'searcher'; the model's 'top1'; of 4 sampled
        scanpaths of each scene the behavioural 'delta'.
    """
    rng, searcher, end = np.random.default_rng(_SEED), Searcher(), rows * columns
    known = sample_scenes(rng, 1000, rows, columns)
    fitted_on = searcher.search(rng, known, 2).reshape(2000, -1)
    scenes = sample_scenes(rng, num, rows, columns)
    paths = searcher.search(rng, scenes, 4)
    searches = searches_of(scenes, paths, render(scenes))
    flat, targets = searches.fixations.numpy(), scenes.targets.repeat(4)
    following = next_objects(searches.fixations, end).numpy()
    found = {}
    for name, fit in (("Markov", fit_markov), ("Markov + target", fit_markov_target)):
        log_probs = fit(rows, columns, known.targets.repeat(2), fitted_on).log_probs(targets, flat)
        found[name] = next_object(log_probs, following, ignore_index=PAD)["nats"]
    own = searcher.log_probs(scenes, flat, searches.scene_of.numpy())
    found["searcher"] = next_object(own, following, ignore_index=PAD)["nats"]
    log_probs, hits = likelihoods(model, searches)
    count = (following != PAD).sum()
    found |= {"model": -log_probs.sum() / count, "top1": hits.sum() / count}
    drawn = [path for scene in sample(model, searches.scenes, 4).tolist() for path in scene]
    habits = [behaviour(these, targets.tolist()) for these in (drawn, [path[path != PAD] for path in flat])]
    return found | {"delta": behavioural_delta(*habits)}


_CARD = """---
license: apache-2.0
library_name: attnsuite
---
# search_scenes

A small OAT (object-level attention transformer for scanpaths): {parameters:.2f} M parameters, crops of {height} x
{width} pixels, any grid of up to {rows} rows and {columns} columns. It was trained on synthetic searches, no data of
people among them: it shows what such a model does, and is no model of how people search in your pictures.

```python
model = vision.scanpath.checkpoint.load(weights.shipped("search_scenes"))
```

| grid | Markov | Markov + jump to the target | this model | the searcher itself | of the gap closed | delta |
| --- | --- | --- | --- | --- | --- | --- |
{table}

- **Measured** in nats per token on 100 fresh scenes with 4 searches each: less is better, and nothing can be expected
  to be below the searcher itself. The gap is that between Markov + jump to the target and the searcher. Delta is the
  mean relative error of five habits (share found, length, shares of new, repeated and revisited objects), on samples.
- **Data**: `recipes/search_scenes.py`, drawn anew for each step: grids of {least} to {most} objects,
  {targets} targets for each scene and {searches} searches for each of them.
- **Training**: `python -m recipes.search_model --out weights/search_scenes`, seed {seed}, {steps} steps, AdamW with a
  rate of up to {rate:g}, {minutes:.0f} minutes of one CPU thread.
- **Input**: crops as `vision.scanpath.appearance.cut(picture, objects, ({height}, {width}))` makes them, RGB from 0 to
  1; rows and columns; which object is the target.
- **Licence**: Apache-2.0. No data of others was used.
"""


def card(model: OAT, steps: int, minutes: float) -> str:
    """The model's card, measured."""
    lines = []
    for rows, columns in MEASURED:
        own = measure(model, rows, columns)
        closed = (own["Markov + target"] - own["model"]) / (own["Markov + target"] - own["searcher"])
        nats = " | ".join(f"{own[name]:.2f}" for name in ("Markov", "Markov + target", "model", "searcher"))
        lines.append(f"| {rows} x {columns} | {nats} | {closed:.0%} | {own['delta']:.2f} |")
    rows, columns = (int(side) for side in model.config.extent)
    sizes = [a * b for a, b in GRIDS]
    return _CARD.format(
        parameters=sum(weight.numel() for weight in model.parameters()) / 1e6,
        height=CROP_SIZE[0],
        width=CROP_SIZE[1],
        rows=rows,
        columns=columns,
        table="\n".join(lines),
        least=min(sizes),
        most=max(sizes),
        targets=TARGETS,
        searches=SEARCHES,
        seed=SEED,
        steps=steps,
        rate=LEARNING_RATE,
        minutes=minutes,
    )
