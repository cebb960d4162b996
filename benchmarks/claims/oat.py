"""OAT's claims, measured on scenes whose best possible prediction is known, and on real eye-tracking.

    ATTNSUITE_STI=FOLDER python -m benchmarks.claims.oat     # results/oat.json and oat_*.csv
    python -m benchmarks.claims.oat --scenes                 # the scenes alone, real data's figures stay

Paper: "Oat: Object-Level Attention Transformer for Gaze Scanpath Prediction", Fang et al., ECCV 2024, arXiv 2407.13335.
Its tables were not at hand: no figure of it is quoted. Needs scipy, which the `test` extra brings.

The protocol, fixed before the measurement:

* **Scenes.** `recipes.search_scenes`, grids of 3 x 9. The searcher's own step probabilities are the bound that nothing
  beats in expectation. A model sees rendered crops, as it would of any picture. Every variant is trained by the same
  recipe for the same number of steps on the same scenes and searches: whole; with sinusoidal or learned codes of
  position in place of the distance-preserving ones; without the target token; without appearance. Three runs each,
  that differ in weights and scenes. Measured on 300 fresh scenes with 4 searches each, the same for all, by nats per
  token, the end of a search being one; also with the crops of a scene shuffled among its objects. What simpler
  searchers know is fitted on 6000 searches.
* **People.** STI, the part with book covers on a grid of 6 x 14, split by picture: 65 to fit on, 20 to measure on, of
  six people each. There are no pictures, so OAT has no appearance. Its settings were chosen by nats and delta on the 10
  validation pictures of the split; then all 65 were trained on. 20 samples for each person's scanpath; whatever is
  scored for OAT is scored for all others. This was measured twice: settings that had been chosen by nats alone (500
  steps, dropout .2) gave 3.11 nats and ended too few searches on the target (delta .21, .40 and .37), so they were
  chosen anew, on the validation pictures again.
* **Together.** Several scores of scanpaths can be won by tricks ("direct" looks at the centre, then twice at the
  target). What was asked of OAT beforehand is all of this at once, on samples: at most 3.15 nats, ScanMatch from 0.23
  to 0.36 (above, answers have leaked), delta at most 0.30, 9 to 18 fixations.
* **Verdict.** Scenes, or pictures, are paired; intervals are bootstraps over runs and inputs, p-values of sign tests,
  adjusted for the number of claims (Holm); a claim is shown, or contradicted, where the interval leaves out 0 too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.claims import oat_people
from benchmarks.claims.measured import Measured, load, save
from benchmarks.claims.oat_report import claims, people_table, scenes_table, transfer_table
from benchmarks.claims.report import RESULTS, Report
from recipes.markov_search import MarkovSearcher
from recipes.search_model import draw_searches, likelihoods, searches_of, small, train
from recipes.search_scenes import Searcher, SearchScenes, render, sample_scenes
from vision.scanpath.model import OAT, next_objects
from vision.scanpath.scenes import PAD

__all__ = ["SEEDS", "STEPS", "VARIANTS", "measure_people", "measure_scenes", "report", "shuffled"]

COMMAND = "python -m benchmarks.claims.oat"
ROWS, COLUMNS = 3, 9
OTHER_GRID = (4, 7)
STEPS = 1000
SEEDS = (0, 1, 2)
TEST_SCENES, TEST_SEARCHES, TEST_SEED = 300, 4, 10_000
FIT_SCENES, FIT_SEED = 1500, 5_000

VARIANTS: dict[str, dict[str, Any]] = {
    "OAT": {},
    "sinusoidal code": {"position": "sinusoidal"},
    "learned code": {"position": "learned"},
    "no target token": {"target_token": "none"},
    "no appearance": {"appearance": "none"},
}


def shuffled(rng: np.random.Generator, looks: torch.Tensor, num_scenes: int) -> torch.Tensor:
    """Crops of scenes, exchanged within each: the same looks, at the wrong objects."""
    per_scene = looks.unflatten(0, (num_scenes, -1))
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(per_scene.shape[1]), (num_scenes, 1)), axis=1))
    return per_scene[torch.arange(num_scenes)[:, None], order].flatten(0, 1)


def _by_scene(log_probs: NDArray[np.float64], paths: NDArray[np.int64], num_scenes: int) -> NDArray[np.float64]:
    """Nats of each scene over the mean number of tokens of a scene, `[B]`: their mean is the nats per token."""
    total = (paths != PAD).sum() + len(paths)
    return -log_probs.sum(1).reshape(num_scenes, -1).sum(1) * num_scenes / total


def _picked(log_probs: NDArray[np.float64], paths: NDArray[np.int64], end: int) -> NDArray[np.float64]:
    """Of `[P, T + 1, N + 1]` what came, `[P, T + 1]`, 0 behind an end."""
    following = next_objects(torch.from_numpy(paths), end).numpy()
    counted = following != PAD
    came = np.take_along_axis(log_probs, np.where(counted, following, 0)[..., None], -1)[..., 0]
    return np.where(counted, came, 0)


class _Test:
    """Scenes to measure on, and what is known of them without training."""

    def __init__(self, rows: int, columns: int) -> None:
        rng = np.random.default_rng(TEST_SEED)
        self.scenes: SearchScenes = sample_scenes(rng, TEST_SCENES, rows, columns)
        paths = Searcher().search(rng, self.scenes, TEST_SEARCHES)
        self.paths = paths.reshape(-1, paths.shape[-1])
        looks = render(self.scenes)
        self.searches = {
            "": searches_of(self.scenes, paths, looks),
            ", crops shuffled": searches_of(self.scenes, paths, shuffled(rng, looks, TEST_SCENES)),
        }
        self._end = rows * columns

    def bounds(self) -> dict[str, NDArray[np.float64]]:
        """Nats of the searcher itself and of those that know less."""
        scene_of = np.repeat(np.arange(TEST_SCENES), TEST_SEARCHES)
        known: dict[str, NDArray[np.float64]] = {}
        rng = np.random.default_rng(FIT_SEED)
        scenes = sample_scenes(rng, FIT_SCENES, self.scenes.rows, self.scenes.columns)
        fitted_on = Searcher().search(rng, scenes, 4)
        for name, fit in oat_people.CHAINS.items():
            targets = scenes.targets.repeat(4)
            chain: MarkovSearcher = fit(scenes.rows, scenes.columns, targets, fitted_on.reshape(len(targets), -1))
            known[name] = chain.log_probs(self.scenes.targets[scene_of], self.paths)
        known["searcher itself"] = Searcher().log_probs(self.scenes, self.paths, scene_of)
        return {name: self._nats(_picked(values, self.paths, self._end)) for name, values in known.items()}

    def model(self, model: OAT, crops: str = "") -> NDArray[np.float64]:
        """Nats of a model."""
        return self._nats(likelihoods(model, self.searches[crops])[0])

    def _nats(self, log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
        return _by_scene(log_probs, self.paths, TEST_SCENES)


def fit_variant(name: str, seed: int, steps: int = STEPS) -> OAT:
    """Trains one variant, able to take the other grid too."""
    torch.manual_seed(seed)
    model = OAT(small(max(ROWS, OTHER_GRID[0]), max(COLUMNS, OTHER_GRID[1]), **VARIANTS[name]))
    with_looks = model.appearance is not None
    train(model, draw_searches(np.random.default_rng(seed), [(ROWS, COLUMNS)], with_looks=with_looks), steps)
    return model


def measure_run(name: str, seed: int, steps: int) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Trains one variant once; its nats by part and name."""
    torch.set_num_threads(1)
    start = time.process_time()
    model, test = fit_variant(name, seed, steps), _Test(ROWS, COLUMNS)
    found = {("scenes", name): test.model(model)}
    if name == "OAT":
        found["scenes", "OAT, crops shuffled"] = test.model(model, ", crops shuffled")
        found["other grid", name] = _Test(*OTHER_GRID).model(model)
    nats = found["scenes", name].mean()
    print(f"{name}, run {seed}: {nats:.3f} nats, {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def measure_scenes(steps: int = STEPS, processes: int = 1) -> dict[str, Measured]:
    """Nats of all variants and runs, scene by scene, on the grid that was trained on, and on another.

    Args:
        steps: of training.
        processes: runs that are trained at a time; the values do not depend on it.
    """
    grids = {"scenes": (ROWS, COLUMNS), "other grid": OTHER_GRID}
    found: dict[str, Measured] = {
        part: {(name, 0): values for name, values in _Test(*grid).bounds().items()} for part, grid in grids.items()
    }
    names, seeds = zip(*((name, seed) for seed in SEEDS for name in VARIANTS), strict=True)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for seed, own in zip(seeds, pool.map(measure_run, names, seeds, [steps] * len(names)), strict=True):
            for (part, name), values in own.items():
                found[part][name, seed] = values
    return found


def measure_people(folder: Path) -> tuple[Measured, dict[str, dict[str, float]]]:
    """Real searches: nats and ScanMatch of each picture, and all scores of all searchers.

    Returns:
        Values `[pictures]` by "nats: NAME" or "ScanMatch: NAME" and run; and by searcher its scores, of OAT for each
        run.
    """
    parts = oat_people.read_people(folder)
    known, people = parts["train"], parts["test"]
    values: Measured = {}
    scores: dict[str, dict[str, float]] = {}

    def keep_nats(name: str, run: int, model: OAT | MarkovSearcher) -> dict[str, float]:
        log_probs, hits = oat_people.tokens(people, model)
        values[f"nats: {name}", run] = _of_images(people, -log_probs.sum(1)) * len(people.paths) / _count(people)
        return {"nats": float(-log_probs.sum()) / _count(people), "top-1": float(hits.sum()) / _count(people)}

    def keep_scores(name: str, run: int, scored: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        values[f"ScanMatch: {name}", run] = _of_images(people, scored["ScanMatch"])
        return {key: float(np.nanmean(value)) for key, value in scored.items()}

    for name, chain in oat_people.fitted_chains(known).items():
        scores[name] = keep_nats(name, 0, chain)
    for name, prediction in oat_people.predictions(known, people).items():
        scores.setdefault(name, {}).update(keep_scores(name, 0, oat_people.score(people, prediction)))
    for seed in SEEDS:
        model = oat_people.fit_oat(known, seed)
        foretold = keep_nats("OAT", seed, model)
        for kind, prediction in oat_people.sampled(people, model, seed).items():
            scored = keep_scores(f"OAT, {kind}", seed, oat_people.score(people, prediction))
            scores[f"OAT, {kind}, run {seed}"] = foretold | scored
        print(f"people, run {seed}: {scores[f'OAT, sampled, run {seed}']}", file=sys.stderr)
    human = oat_people.score(people, oat_people.others(people), in_pixels=True)
    scores["people, each other"] = keep_scores("people, each other", 0, human)
    return values, scores


def _count(people: oat_people.People) -> int:
    return sum(len(path) + 1 for path in people.paths)


def _of_images(people: oat_people.People, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the searches of each picture, which are equally many."""
    counts = np.bincount(people.image_of)
    return np.bincount(people.image_of, values) / counts


def report(
    measured: Mapping[str, Measured], scores: Mapping[str, Mapping[str, float]], on: Mapping[str, Any]
) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    tables = [scenes_table(measured["scenes"]), transfer_table(measured["other grid"])]
    if scores:
        tables.append(people_table(scores))
    return Report(
        method="OAT",
        paper="Fang et al., ECCV 2024, arXiv 2407.13335",
        command=COMMAND,
        protocol=(
            f"Scenes of {ROWS} x {COLUMNS} objects (`recipes/search_scenes.py`), searched by a searcher whose step "
            f"probabilities are known; OAT sees rendered crops. All variants: {STEPS} steps, three runs, {TEST_SCENES} "
            "fresh scenes. The gap is that between the Markov searcher that knows the target's place and the searcher "
            "itself. People: STI, book covers on a grid of 6 x 14, split by picture, 20 pictures to measure on; no "
            "pictures, so OAT goes by places alone; three runs. Less is better of nats, FED and delta. Intervals are "
            "bootstraps over runs and inputs; p is of the sign test over scenes or pictures, adjusted for the number "
            "of claims (Holm). The script holds the whole protocol."
        ),
        machine=dict(on),
        claims=claims(measured, (TEST_SEED, TEST_SEED)),
        tables=tables,
        details={"steps": STEPS, "runs": list(SEEDS), "scores": {name: dict(own) for name, own in scores.items()}},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--sti", type=Path, default=os.environ.get("ATTNSUITE_STI") or None, help="folder of the STI data"
    )
    parser.add_argument("--scenes", action="store_true", help="measure on scenes only, and keep the rest")
    parser.add_argument("--people", action="store_true", help="measure on people only, and keep the rest")
    parser.add_argument("--processes", type=int, default=2, help="runs on scenes at a time, each on one thread")
    args = parser.parse_args()
    if args.sti is None and not args.scenes:
        parser.error("give the folder of the STI data by --sti or ATTNSUITE_STI, or --scenes to do without")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    where = args.out / "oat.json"
    files = {name: args.out / f"oat_{name.replace(' ', '_')}.csv" for name in ("scenes", "other grid", "people")}
    scores = Report.load(where).details["scores"] if where.exists() else {}
    if not args.people:
        for name, values in measure_scenes(processes=args.processes).items():
            save(values, files[name])
    if not args.scenes:
        assert args.sti is not None  # as was checked
        values, scores = measure_people(Path(args.sti))
        save(values, files["people"])
    measured = {name: load(path) for name, path in files.items() if path.exists()}
    on = machine.describe("torch", "timm", "scipy") | {"threads": 1}
    made = report(measured, scores, on)
    made.save(where)
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
