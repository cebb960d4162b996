"""A-STAR's claims, measured on the small model that ships: are both subjects of a prompt there more often?

    python -m benchmarks.claims.astar            # development, then the measurement: results/astar.json and astar.csv
    python -m benchmarks.claims.astar --time     # measures seconds per picture again, and leaves the rest

Paper: "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", Agarwal et al., ICCV 2023,
arXiv 2306.14544. Needs scipy, which the `test` extra brings.

The protocol, fixed before the measurement:

* **Model and sampler.** `weights/text_to_scene`, DDIM, 15 steps, guidance scale 3, as on its card. A prompt names two
  objects, "a red circle and a blue square"; their nouns are the subjects. `recipes.scenes.detect` reads the picture.
* **Methods.** Plain sampling; Attend-and-Excite with maps as its authors prepare them (padding kept, smoothed), by our
  implementation, which a test holds against diffusers' pipeline to 1e-5; segregation alone; retention alone; A-STAR,
  which is both with weight 1.
* **Settings.** Each guided method is swept over a grid of the same size: five step sizes, the first half of the steps
  or all, and one choice of its own, without or with: Attend-and-Excite its refinement (thresholds 0.05, 0.5 and 0.8 at
  0, 20 and 40 % of the steps, at most 20 moves), the others maps divided by their maximum. Attend-and-Excite's own
  settings (step size 20, first half, refinement) are among them, and what `Guidance` has without arguments.
* **Choice.** Development seeds are below 10 000, and development pairs are those of the training pictures. All 20
  settings of a method draw 24 pictures; the best three draw 96 more; the one with the most pictures that show both
  objects over both rounds is taken. Of equals the first in the order of the grid is taken.
* **Measurement.** Seeds from 10 000 on, the same for all methods: 312 pictures of the pairs seen in training, 312 of
  pairs that were held out, each pair in both orders equally often. The two kinds are kept apart.
* **Figures.** The share of pictures in which the detector finds both objects, with Wilson's interval; differences of
  pairs with bootstrap intervals; McNemar's exact test. Overlap is the segregation loss, retention the retention loss
  of one subject, both averaged over steps, of the passes that denoise, and from maps prepared alike for all methods.
* **Verdict.** p-values of all claims of the report are adjusted for being several (Holm). Below 0.05 a claim is shown
  if the difference has its direction, and contradicted if it has the other; else it is not shown at this scale. Of
  overlap and retention, differences up to 0.01 say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.claims.astar_report import (
    Outcome,
    Picture,
    Results,
    claims,
    load_outcomes,
    methods_table,
    save_outcomes,
    show_both,
)
from benchmarks.claims.report import RESULTS, Report, Table, digests
from diffusion import AStarStableDiffusionPipeline, Guidance
from diffusion.attention_maps import record, subject_maps
from diffusion.losses import retention_loss, retention_masks, segregation_loss
from diffusion.pipelines import find_concepts
from recipes.scenes import caption, detect
from recipes.text_to_scene import HELD_OUT_PAIRS, SEEN_PAIRS
from recipes.text_to_scene_card import GUIDANCE_SCALE, SAMPLING_STEPS

__all__ = ["GRID", "METHODS", "PAIRS", "Setting", "Tried", "best", "draw", "measure", "report", "sweep"]

MODEL = Path(__file__).resolve().parents[2] / "weights" / "text_to_scene"
COMMAND = "python -m benchmarks.claims.astar"
PAIRS = {"seen": SEEN_PAIRS, "held out": HELD_OUT_PAIRS}
# Pictures, and the seed of the first; each picture has a seed of its own.
SCREENING, RUN_OFF, RUN_OFF_SETTINGS = (24, 0), (96, 5_000), 3
MEASUREMENT = {"seen": (312, 10_000), "held out": (312, 20_000)}
BATCH_SIZE = 24

METHODS: dict[str, dict[str, float]] = {
    "plain": {},
    "Attend-and-Excite": {"attend_and_excite": 1.0},
    "segregation": {"segregation": 1.0},
    "retention": {"retention": 1.0},
    "A-STAR": {"segregation": 1.0, "retention": 1.0},
}
REFINEMENT = {0: 0.05, round(0.2 * SAMPLING_STEPS): 0.5, round(0.4 * SAMPLING_STEPS): 0.8}


@dataclass(frozen=True)
class Setting:
    """A method and what is chosen on the development seeds.

    Attributes:
        method: A key of `METHODS`.
        step_size: Of the move of the latent.
        all_steps: All steps are guided, or the first half.
        extra: The method's own choice: refinement for Attend-and-Excite, maps divided by their maximum for the others.
    """

    method: str
    step_size: float = 0.0
    all_steps: bool = False
    extra: bool = False

    def guidance(self) -> Guidance:
        """As the pipeline takes it."""
        own: dict[str, Any]
        if self.method == "Attend-and-Excite":
            own = {"keep_padding": True, "refinement": REFINEMENT if self.extra else {}}
        else:
            own = {"normalize": "max" if self.extra else "none"}
        steps = None if self.all_steps else (SAMPLING_STEPS + 1) // 2
        return Guidance(losses=METHODS[self.method], step_size=self.step_size, steps=steps, **own)

    def __str__(self) -> str:
        if self.method == "plain":
            return "none"
        extra = "refinement" if self.method == "Attend-and-Excite" else "maps over their maximum"
        steps = "all steps" if self.all_steps else "first half"
        return f"step size {self.step_size:g}, {steps}, {'with' if self.extra else 'without'} {extra}"


GRID = tuple(itertools.product((1.25, 2.5, 5.0, 10.0, 20.0), (False, True), (False, True)))


def pictures(pairs: str, number: int, first_seed: int) -> list[Picture]:
    """Every pair in both orders, in turns.

    Args:
        pairs: A key of `PAIRS`.
        number: A multiple of the number of prompts.
        first_seed: Of the first picture; counts up.

    Raises:
        ValueError: If some prompts would be drawn more often than others.
    """
    prompts = [order for pair in PAIRS[pairs] for order in (pair, pair[::-1])]
    if number % len(prompts):
        raise ValueError(f"{number} pictures of {len(prompts)} prompts: give a multiple, so that all count alike")
    return [Picture(pairs, prompts[i % len(prompts)], first_seed + i) for i in range(number)]


def load(folder: Path) -> AStarStableDiffusionPipeline:
    """The pipeline, in float32, though it is stored in half precision."""
    pipe = AStarStableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _arguments(setting: Setting, batch: Sequence[Picture]) -> dict[str, Any]:
    """What the pipeline is called with."""
    guided = {"subjects": [_nouns(p) for p in batch], "guidance": setting.guidance()} if METHODS[setting.method] else {}
    return {
        "prompt": [caption(p.names) for p in batch],
        "generator": [torch.Generator().manual_seed(p.seed) for p in batch],
        "num_inference_steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "output_type": "np",
        **guided,
    }


def _nouns(picture: Picture) -> list[str]:
    return [name.split()[-1] for name in picture.names]


def draw(pipe: AStarStableDiffusionPipeline, setting: Setting, batch: Sequence[Picture]) -> list[Outcome]:
    """Draws pictures by one method, and looks at them and at the attention with which they were drawn."""
    concepts = [find_concepts(pipe, caption(p.names), _nouns(p)) for p in batch]
    seen: list[torch.Tensor] = []

    with record(pipe) as recorder:

        def after_step(_pipe: Any, _step: int, _time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            attention = recorder.maps()[-len(batch) :].detach().split(1)  # the last pass denoised; its second half
            own = [subject_maps(a, c.positions, end=c.end) for a, c in zip(attention, concepts, strict=True)]
            seen.append(torch.cat(own))  # [B, H, W, 2]
            return kwargs

        drawn = pipe(**_arguments(setting, batch), callback_on_step_end=after_step).images
    overlap = torch.stack([segregation_loss(maps) for maps in seen]).mean(0)
    kept = [retention_loss(now, retention_masks(before)) / 2 for before, now in itertools.pairwise(seen)]
    retention = torch.stack(kept).mean(0)
    found = [
        len(set(p.names) & {f.name for f in detect(np.rint(image * 255).astype(np.uint8))})
        for p, image in zip(batch, drawn, strict=True)
    ]
    return [Outcome(*own) for own in zip(found, overlap.tolist(), retention.tolist(), strict=True)]


# Work is spread over processes, each with a pipeline and one thread.

_PIPE: AStarStableDiffusionPipeline


def _start(folder: Path) -> None:
    global _PIPE
    torch.set_num_threads(1)
    _PIPE = load(folder)


def _work(task: tuple[Setting, Sequence[Picture]]) -> list[Outcome]:
    return draw(_PIPE, *task)


def _draw_all(pool: Executor, asked: Sequence[tuple[Setting, Sequence[Picture]]]) -> list[list[Outcome]]:
    """For each setting the outcomes of its pictures."""
    tasks = [(s, own[i : i + BATCH_SIZE]) for s, own in asked for i in range(0, len(own), BATCH_SIZE)]
    start, outcomes = time.monotonic(), []
    for done, own in enumerate(pool.map(_work, tasks), 1):
        outcomes += own
        seconds = time.monotonic() - start
        print(f"\r{done} of {len(tasks)} batches, {seconds:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rest: Iterator[Outcome] = iter(outcomes)
    return [list(itertools.islice(rest, len(own))) for _, own in asked]


@dataclass(frozen=True)
class Tried:
    """How a setting fared on the development seeds: pictures that show both objects, of how many.

    Attributes:
        setting: What was tried.
        screening: In the first round.
        run_off: In the second; None for those that did not get there.
    """

    setting: Setting
    screening: tuple[int, int]
    run_off: tuple[int, int] | None = None


def sweep(pool: Executor) -> list[Tried]:
    """Every setting of every method, those that reach the second round in both rounds."""
    first, second = pictures("seen", *SCREENING), pictures("seen", *RUN_OFF)
    settings = [Setting(method, *own) for method in METHODS if METHODS[method] for own in GRID]
    drawn = _draw_all(pool, [(setting, first) for setting in settings])
    tried = [Tried(s, (show_both(own), len(first))) for s, own in zip(settings, drawn, strict=True)]
    finalists = [t.setting for t in second_round(tried)]
    again = dict(zip(finalists, _draw_all(pool, [(s, second) for s in finalists]), strict=True))
    return [replace(t, run_off=(show_both(again[t.setting]), len(second))) if t.setting in again else t for t in tried]


def second_round(tried: Sequence[Tried]) -> list[Tried]:
    """The best of each method after screening; of equals the first of the grid."""
    # sorted() keeps the order of equals
    ranked = {m: sorted((t for t in tried if t.setting.method == m), key=lambda t: -t.screening[0]) for m in METHODS}
    return [t for own in ranked.values() for t in own[:RUN_OFF_SETTINGS]]


def best(tried: Sequence[Tried]) -> dict[str, Setting]:
    """The setting of each method that showed both objects most often over both rounds; of equals the first."""
    chosen = {"plain": Setting("plain")}
    for method in METHODS:
        finalists = [
            (t.screening[0] + t.run_off[0], t.setting) for t in tried if t.setting.method == method and t.run_off
        ]
        if finalists:
            chosen[method] = max(finalists, key=lambda own: own[0])[1]
    return chosen


def measure(pool: Executor, chosen: Mapping[str, Setting]) -> Results:
    """The outcomes of all methods on fresh seeds."""
    asked = [p for kind, (per_prompt, seed) in MEASUREMENT.items() for p in pictures(kind, per_prompt, seed)]
    outcomes = _draw_all(pool, [(setting, asked) for setting in chosen.values()])
    return {m: dict(zip(asked, own, strict=True)) for m, own in zip(chosen, outcomes, strict=True)}


def seconds_per_picture(
    pipe: AStarStableDiffusionPipeline, chosen: Mapping[str, Setting]
) -> dict[str, dict[str, float]]:
    """Median wall time of a picture alone, and of its ratio to plain sampling; all methods in turns.

    Each turn is another picture of the first round of development: how often refinement moves depends on the picture.
    """
    seconds: dict[str, list[float]] = {method: [] for method in chosen}
    for turn, picture in enumerate(pictures("seen", *SCREENING)):
        for method, setting in chosen.items():
            arguments = _arguments(setting, [picture])
            start = time.perf_counter()
            pipe(**arguments)
            if turn:
                seconds[method].append(time.perf_counter() - start)
    return {
        method: {
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, seconds["plain"], strict=True)),
        }
        for method, own in seconds.items()
    }


def _settings_table(tried: Sequence[Tried]) -> Table:
    """What was chosen, and how the settings that were not fared on the development seeds."""
    rows = []
    for method, setting in best(tried).items():
        shares = [t.screening[0] / t.screening[1] for t in tried if t.setting.method == method]
        for t in tried:
            if t.setting == setting and t.run_off:
                hits, trials = (a + b for a, b in zip(t.screening, t.run_off, strict=True))
                rows.append([method, str(setting), f"{hits} of {trials}", f"{min(shares):.0%} to {max(shares):.0%}"])
    header = ["method", f"chosen of {len(GRID)} settings", "both subjects, development", "all settings, screening"]
    return Table("A-STAR: settings", header, rows)


def report(
    results: Results,
    tried: Sequence[Tried],
    wall: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, str],
    on: Mapping[str, Any],
) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    return Report(
        method="A-STAR",
        paper="Agarwal et al., ICCV 2023, arXiv 2306.14544",
        command=COMMAND,
        protocol=(
            f"The small text-to-image model of `weights/text_to_scene`, {SAMPLING_STEPS} DDIM steps, guidance scale "
            f"{GUIDANCE_SCALE:g}; prompts with "
            "two objects, which a detector looks for. Every guided method chose among 20 settings on development "
            "seeds; all drew the same fresh seeds. Attend-and-Excite is ours, equal to diffusers' pipeline to 1e-5. "
            "Overlap (segregation loss) and retention (loss of one subject) are means over the steps, and better if "
            "lower; p is of McNemar's exact test (of maps: the sign test), adjusted for the number of claims (Holm); "
            "differences have 95 % bootstrap intervals. Times are of one picture alone, all methods in turns, one "
            "thread. The script holds the whole protocol."
        ),
        machine=dict(on),
        claims=claims(results),
        tables=[*(methods_table(results, pairs, wall) for pairs in PAIRS), _settings_table(tried)],
        details={
            "chosen": {method: asdict(setting) for method, setting in best(tried).items()},
            "weights": dict(weights),
            "wall": {method: dict(own) for method, own in wall.items()},
            "tried": [asdict(own) for own in tried],
        },
    )


def _tried(own: Mapping[str, Any]) -> Tried:
    """What `dataclasses.asdict` made of it, and JSON."""
    return Tried(Setting(**own["setting"]), tuple(own["screening"]), own["run_off"] and tuple(own["run_off"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of astar.json and astar.csv")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--time", action="store_true", help="only measure seconds per picture again")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    where, table = args.out / "astar.json", args.out / "astar.csv"
    weights = digests(args.model)
    if args.time:
        before = Report.load(where)
        if before.details["weights"] != weights:
            raise SystemExit(f"{where} is not of the weights in {args.model}: run without --time")
        tried = [_tried(own) for own in before.details["tried"]]
    else:
        spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(args.workers, spawn, _start, (args.model,)) as pool:
            tried = sweep(pool)
            print("\n".join(f"{method}: {setting}" for method, setting in best(tried).items()), flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            save_outcomes(measure(pool, best(tried)), table)
    wall = seconds_per_picture(load(args.model), best(tried))
    on = machine.describe("torch", "diffusers", "transformers", "scipy") | {"threads": 1}
    made = report(load_outcomes(table), tried, wall, weights, on)
    made.save(where)
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
