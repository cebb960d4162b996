"""Real searches, what OAT and simpler searchers foretell of them, and how alike their scanpaths are.

The data is that of `vision.scanpath.datasets.read_sti`: covers of books on a grid, places only. What is learned here
sees no pictures. Its licence is non-commercial: it is read in place, and nothing that was trained on it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.markov_search import MarkovSearcher, fit_centre, fit_markov, fit_markov_target, fit_uniform
from recipes.search_model import Searches, likelihoods, small, train
from vision.scanpath.datasets import ScanpathDataset, drop_outliers, read_sti, split_by_image
from vision.scanpath.decoding import greedy, sample
from vision.scanpath.metrics import (
    behaviour,
    behavioural_delta,
    fixation_edit_distance,
    multimatch,
    scanmatch,
    sequence_score,
)
from vision.scanpath.model import OAT, next_objects
from vision.scanpath.objects import Objects, RegularGrid, load_json
from vision.scanpath.scenes import PAD, Scenes, pad_scanpaths

__all__ = [
    "CHAINS",
    "COLUMNS",
    "ROWS",
    "People",
    "Prediction",
    "fit_oat",
    "fitted_chains",
    "others",
    "predictions",
    "read_people",
    "sampled",
    "score",
    "tokens",
]

ROWS, COLUMNS = 6, 14
SAMPLES = 20  # predictions for each scanpath
STEPS, LEARNING_RATE, IMAGES = 1000, 3e-3, 8  # of training; images of a batch
CHAINS = {
    "uniform": fit_uniform,
    "centre": fit_centre,
    "Markov displacement": fit_markov,
    "Markov + target": fit_markov_target,
}
Paths = list[NDArray[np.int64]]
Prediction = Sequence[Paths]
"""S predictions of each of P scanpaths: `[S][P][T]`."""


@dataclass(frozen=True, eq=False)
class People:
    """Searches of some pictures.

    Attributes:
        objects: of each picture; all are of the same grid.
        targets: of each picture, `[I]`.
        paths: objects that were fixated, `[T]` of each of P searches.
        points: the same in pixels, `[T, 2]` of each.
        image_of: which picture each search is of, `[P]`.
        usual: which searches are of usual length, `[P]`; others are not trained on.
    """

    objects: list[Objects]
    targets: NDArray[np.int64]
    paths: Paths
    points: list[NDArray[np.float64]]
    image_of: NDArray[np.int64]
    usual: NDArray[np.bool_]

    @property
    def cells(self) -> NDArray[np.float64]:
        """Row and column of each object, `[N, 2]`."""
        cells = self.objects[0].cells
        assert cells is not None
        return cells

    @property
    def wanted(self) -> NDArray[np.int64]:
        """The target of each search, `[P]`."""
        return self.targets[self.image_of]

    def scenes(self, index: NDArray[np.int64] | None = None, mirrored: bool = False) -> Scenes:
        """Some of the pictures, or all, as a model takes them."""
        targets = self.targets if index is None else self.targets[index]
        return Scenes.stack([self.cells] * len(targets), (mirror(targets) if mirrored else targets).tolist())


def mirror(objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where objects are, left and right exchanged."""
    row, column = np.divmod(objects, COLUMNS)
    return row * COLUMNS + COLUMNS - 1 - column


def read_people(folder: Path) -> dict[str, People]:
    """The parts of `split.json`, 'train' (with 'val' in it) and 'test'.

    Args:
        folder: of `Amazon.json` and `split.json`.

    Raises:
        FileNotFoundError: The data is not there.
    """
    data, split = read_sti(folder / "Amazon.json"), load_json(folder / "split.json")
    names = {"train": [*split["train"], *split["val"]], "test": split["test"]}
    boxes, sizes = zip(*((scene.target_box, scene.size) for scene in data.scenes), strict=True)
    grid = RegularGrid.fit(np.array(boxes), np.array(sizes), ROWS, COLUMNS)
    return {name: _people(part, grid) for name, part in split_by_image(data, names).items()}


def _people(part: ScanpathDataset, grid: RegularGrid) -> People:
    objects = []
    for scene in part.scenes:
        assert scene.size is not None
        objects.append(grid.on(scene.size))
    targets = [these.index(scene.target_box or ()) for these, scene in zip(objects, part.scenes, strict=True)]
    number = {scene: n for n, scene in enumerate(part.scenes)}
    image_of = np.array([number[path.scene] for path in part.scanpaths])
    points = [path.fixations for path in part.scanpaths]
    paths = [objects[n].at(fixations) for n, fixations in zip(image_of, points, strict=True)]
    usual = {path.id for path in drop_outliers(part).scanpaths}
    is_usual = np.array([path.id in usual for path in part.scanpaths])
    return People(objects, np.array(targets), paths, points, image_of, is_usual)


def fit_oat(people: People, seed: int, steps: int = STEPS) -> OAT:
    """Trains an OAT without appearance on searches and their mirror images."""
    torch.manual_seed(seed)
    longest = max(len(path) for path, usual in zip(people.paths, people.usual, strict=True) if usual)
    model = OAT(small(ROWS, COLUMNS, appearance="none", dropout=0.25, max_length=longest))
    train(model, _batches(people, np.random.default_rng(seed)), steps, LEARNING_RATE, weight_decay=0.05)
    return model


def _batches(people: People, rng: np.random.Generator) -> Iterator[Searches]:
    """Epoch by epoch, all searches of a few pictures at a time, half of the time mirrored."""
    while True:
        parts = max(1, round(len(people.objects) / IMAGES))
        for index in np.array_split(rng.permutation(len(people.objects)), parts):
            mirrored = bool(rng.random() < 0.5)
            chosen = np.flatnonzero(np.isin(people.image_of, index) & people.usual)
            paths = [mirror(people.paths[n]) if mirrored else people.paths[n] for n in chosen]
            place = {image: n for n, image in enumerate(index.tolist())}
            scene_of = torch.tensor([place[int(people.image_of[n])] for n in chosen])
            yield Searches(people.scenes(index, mirrored), pad_scanpaths(paths), scene_of)


def fitted_chains(people: People) -> dict[str, MarkovSearcher]:
    """The Markov searchers, fitted on all searches."""
    paths = pad_scanpaths(people.paths).numpy()
    return {name: fit(ROWS, COLUMNS, people.wanted, paths) for name, fit in CHAINS.items()}


def tokens(people: People, model: OAT | MarkovSearcher) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """As `recipes.search_model.likelihoods`, of any searcher."""
    paths = pad_scanpaths(people.paths)
    if isinstance(model, OAT):
        return likelihoods(model, Searches(people.scenes(), paths, torch.from_numpy(people.image_of)))
    log_probs = model.log_probs(people.wanted, paths.numpy())
    following = next_objects(paths, end=ROWS * COLUMNS).numpy()
    counted = following != PAD
    came = np.take_along_axis(log_probs, np.where(counted, following, 0)[..., None], -1)[..., 0]
    return np.where(counted, came, 0), (log_probs.argmax(-1) == following) & counted


def sampled(people: People, model: OAT, seed: int) -> dict[str, Prediction]:
    """An OAT's scanpaths, drawn at random, and greedy."""
    each = np.bincount(people.image_of).max()
    torch.manual_seed(seed)
    drawn = sample(model, people.scenes(), int(each) * SAMPLES).tolist()  # [I][S · people]
    turn = np.zeros(len(people.objects), int)
    result: list[Paths] = [[] for _ in range(SAMPLES)]
    for image in people.image_of:
        for s in range(SAMPLES):
            result[s].append(drawn[image][turn[image] * SAMPLES + s])
        turn[image] += 1
    likeliest = [paths[0] for paths in greedy(model, people.scenes()).tolist()]
    return {"sampled": result, "greedy": [[likeliest[image] for image in people.image_of]]}


def others(people: People) -> Prediction:
    """People as predictions of each other: the next person at the same picture, and so on."""
    groups = [np.flatnonzero(people.image_of == image).tolist() for image in range(len(people.objects))]
    place = {n: (group, k) for group in groups for k, n in enumerate(group)}
    fewest = min(map(len, groups))
    return [
        [people.paths[group[(k + shift) % len(group)]] for group, k in (place[n] for n in range(len(people.paths)))]
        for shift in range(1, fewest)
    ]


def predictions(known: People, people: People, seed: int = 0) -> dict[str, Prediction]:
    """What simple searchers do, who know the habits of some people, on the pictures of others.

    Args:
        known: whose lengths, first fixations and steps they go by.
        people: whose targets they look for.
        seed: of all chance.
    """
    rng, count, cells = np.random.default_rng(seed), ROWS * COLUMNS, people.cells
    lengths = np.array([len(path) for path in known.paths])
    every = np.concatenate(known.paths)
    first = np.bincount([path[0] for path in known.paths], minlength=count)
    distances = np.linalg.norm(cells[:, None] - cells, axis=-1)
    longest = int(lengths.max())

    def until(order: NDArray[np.int64], target: int) -> NDArray[np.int64]:
        return order[: int(np.flatnonzero(order == target)[0]) + 1]

    def nearest(target: int) -> NDArray[np.int64]:
        at, left, path = int(rng.choice(count, p=first / first.sum())), np.ones(count, bool), []
        while True:
            path.append(at)
            left[at] = False
            if at == target:
                return np.array(path)
            at = int(np.where(left, distances[at] + 1e-6 * rng.random(count), np.inf).argmin())

    simple: dict[str, Callable[[int], NDArray[np.int64]]] = {
        "random objects, people's lengths": lambda target: rng.integers(count, size=rng.choice(lengths)),
        "random order until the target": lambda target: until(rng.permutation(count), target),
        "centre, people's lengths": lambda target: rng.choice(every, rng.choice(lengths)),
        "nearest unvisited until the target": nearest,
        "line by line until the target": lambda target: np.arange(target + 1),
        "direct: centre, target, target": lambda target: np.array([int(first.argmax()), target, target]),
    }
    result: dict[str, Prediction] = {
        name: [[searcher(int(target)) for target in people.wanted] for _ in range(SAMPLES)]
        for name, searcher in simple.items()
    }
    for name, chain in fitted_chains(known).items():
        if name.startswith("Markov"):
            # Chains that stop by themselves may wander for long: they are not cut where people would have stopped.
            drawn = [chain.search(rng, people.wanted, max_length=10 * longest) for _ in range(SAMPLES)]
            result[name] = [[path[path != PAD] for path in paths] for paths in drawn]
    return result


def score(people: People, prediction: Prediction, in_pixels: bool = False) -> dict[str, NDArray[np.float64]]:
    """How alike predictions are to what each person did, and to what all did.

    Args:
        people: who searched.
        prediction: of each of their searches.
        in_pixels: the predictions are people's; MultiMatch is given what was recorded, in the order of `others`.

    Returns:
        SS, FED, ScanMatch, MM direction, MM position: `[P]`, means over the predictions of each search; found, steps,
        delta: one value.
    """
    pixels = others_points(people) if in_pixels else _centres(people, prediction)
    of_each: list[dict[str, NDArray[np.float64]]] = []
    for paths, points in zip(prediction, pixels, strict=True):
        of_each.append(
            {
                "SS": sequence_score(paths, people.paths),
                "FED": fixation_edit_distance(paths, people.paths),
                "ScanMatch": scanmatch(paths, people.paths, people.cells),
                **_multimatch(people, points),
            }
        )
    means = {name: _mean([values[name] for values in of_each]) for name in of_each[0]}
    flat = [path for paths in prediction for path in paths]
    habits = behaviour(flat, np.tile(people.wanted, len(prediction)).tolist())
    delta = behavioural_delta(habits, behaviour(people.paths, people.wanted.tolist()))
    single = {"found": habits["found"], "steps": habits["steps"], "delta": delta}
    return means | {name: np.array([value]) for name, value in single.items()}


def others_points(people: People) -> list[list[NDArray[np.float64]]]:
    """The pixels of `others`."""
    by_id = {id(path): points for path, points in zip(people.paths, people.points, strict=True)}
    return [[by_id[id(path)] for path in paths] for paths in others(people)]


def _centres(people: People, prediction: Prediction) -> list[list[NDArray[np.float64]]]:
    centres = [these.centres for these in people.objects]
    return [
        [centres[n][path] for n, path in zip(people.image_of.tolist(), paths, strict=True)]
        for paths in prediction
    ]  # fmt: skip


def _multimatch(people: People, points: Sequence[NDArray[np.float64]]) -> Mapping[str, NDArray[np.float64]]:
    """Direction and position, picture by picture, for these differ in size."""
    result = {"MM direction": np.full(len(points), np.nan), "MM position": np.full(len(points), np.nan)}
    for image, objects in enumerate(people.objects):
        own = np.flatnonzero(people.image_of == image)
        ours, theirs = ([side[n] for n in own.tolist()] for side in (points, people.points))
        found = multimatch(ours, theirs, objects.size)
        result["MM direction"][own], result["MM position"][own] = found["direction"], found["position"]
    return result


def _mean(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Over predictions; those that have no value (too short for MultiMatch) do not count."""
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    total = np.where(known, stacked, 0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(len(total), np.nan), where=known.any(0))
