"""Modality-mutual attention's claim, measured on the small vision-language model: does it answer more questions?

    python -m benchmarks.claims.mma --runs DIR    # results/mma.json and mma.csv; trains what DIR does not hold yet

Paper: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs", Wang et
al., arXiv 2503.02597. Needs scipy, which the `test` extra brings.

The protocol, fixed before the measurement:

* **Runs.** `recipes.scene_vlm` trains from seeds 0, 1 and 2, each once under a causal mask and once with the image
  tokens open to the question: the same frozen vision tower, the same initial weights of projector and language model,
  the same questions in the same order, as many steps. `DIR/seed0/causal`, `DIR/seed0/mma` and so on hold them; those of
  seed 0 ship in `weights/scene_vlm`.
* **Questions.** 2000 of `recipes.scene_questions.held_out` with seed 1000, 250 of each kind, the same for all: other
  pictures than those of training, objects and combinations of question and format that training never showed among
  them. Nothing was chosen on them.
* **Answers.** Greedy, through `generate`. *Right* is a reply that gives the right answer in whatever form; it *follows*
  if it has the form that was asked for.
* **Methods.** Each model as it was trained. Beside them each under the other's mask: MMA switched on in a model trained
  causally, which the paper does not do, and switched off in one trained with it.
* **Figures.** Shares over all runs and questions; differences of pairs, with 95 % bootstrap intervals that draw runs
  and questions. p is of the sign test over questions: a question counts as gained if more runs answer it than before.
  All p of a table are adjusted for being several (Holm).
* **Verdict.** Below 0.05, and with an interval that leaves out 0, a claim is shown if the difference has its direction,
  and contradicted if it has the other; else it is not shown at this scale.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.claims.report import RESULTS, Report, Table, digests
from benchmarks.claims.scene_vlm import (
    SEEDS,
    Asked,
    Method,
    Model,
    Results,
    answers,
    load,
    load_results,
    save_results,
    shares,
    train_missing,
)
from benchmarks.claims.vlm_report import Pair, Quantity, claims, differences, in_words, share
from multimodal.mma import modality_mutual_attention
from recipes.scene_questions import KINDS, held_out

__all__ = ["CLAIMS", "METHODS", "QUESTIONS", "measure", "report"]

COMMAND = "python -m benchmarks.claims.mma"
QUESTIONS, QUESTION_SEED = 2000, 1000


def _opened(model: Model) -> AbstractContextManager[Any]:
    return modality_mutual_attention(model.network, stop_token_id=model.stop_token_id)


CAUSAL, MMA, SWITCHED_ON, SWITCHED_OFF = "causal", "MMA", "causal, MMA switched on", "MMA, switched off"
METHODS: dict[str, tuple[str, Method]] = {
    CAUSAL: ("causal", Method(CAUSAL)),
    MMA: ("mma", Method(MMA, _opened)),
    SWITCHED_ON: ("causal", Method(SWITCHED_ON, _opened)),
    SWITCHED_OFF: ("mma", Method(SWITCHED_OFF)),
}
"""Name → how the model was trained, and how it answers."""

_PUBLISHED = "+6.2 % on average over three language models; MMBench 64.9 → 71.8, POPE 79.8 → 82.7 (table 1)"
CLAIMS = (
    Pair("A model trained with MMA answers more questions than a causal one", _PUBLISHED, "right", MMA, CAUSAL),
    Pair("A model trained with MMA keeps to the asked form more often", "no figure", "follows", MMA, CAUSAL),
    Pair("It is the mask that helps: switched off, the model answers fewer", "no figure", "right", MMA, SWITCHED_OFF),
)


def measure(runs: Path) -> tuple[list[Asked], dict[str, list[list[Any]]]]:
    """The answers of all methods and runs."""
    examples = held_out(QUESTIONS, QUESTION_SEED)
    models = {mask: [load(runs / f"seed{seed}" / mask) for seed in SEEDS] for mask in ("causal", "mma")}
    results: dict[str, list[list[Any]]] = {}
    for name, (mask, method) in METHODS.items():
        results[name] = [answers(model, examples, method) for model in models[mask]]
        print(
            f"{name}: {', '.join(f'{statistics.fmean(run):.1%}' for run in shares(results[name], 'right'))}", flush=True
        )
    return [Asked.of(number, example) for number, example in enumerate(examples)], results


def _methods_table(results: Results) -> Table:
    header = ["model", "right", *(f"seed {seed}" for seed in SEEDS), "in the asked form", "right − causal"]
    rows = []
    for name, runs in results.items():
        each = [f"{statistics.fmean(run):.1%}" for run in shares(runs, "right")]
        row = [name, f"{share(runs, 'right'):.1%}", *each, f"{share(runs, 'follows'):.1%}"]
        rows.append([*row, "" if name == CAUSAL else in_words(*differences(results, [(name, CAUSAL, "right")])[0])])
    return Table(f"MMA: {QUESTIONS} questions to each of {len(SEEDS)} runs, right in whatever form", header, rows)


def _kinds_table(asked: Sequence[Asked], results: Results) -> Table:
    """Right answers by kind of question, and where something is new."""
    wheres = {kind: [own.kind == kind for own in asked] for kind in KINDS}
    wheres["picture with a new object"] = [own.new_object for own in asked]
    wheres["kind and form new together"] = [own.new_form for own in asked]
    pair: tuple[str, str, Quantity] = (MMA, CAUSAL, "right")
    rows = [
        [kind, *(f"{share(results[method], 'right', where):.1%}" for method in METHODS), in_words(found, p)]
        for (kind, where), (found, p) in zip(
            wheres.items(), differences(results, [pair], list(wheres.values())), strict=True
        )
    ]
    return Table("MMA: right answers by kind of question", ["kind", *METHODS, "MMA − causal"], rows)


def report(asked: Sequence[Asked], results: Results, weights: dict[str, Any], on: dict[str, Any]) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    return Report(
        method="Modality-mutual attention",
        paper="Wang et al., arXiv 2503.02597",
        command=f"{COMMAND} --runs DIR",
        protocol=(
            f"`recipes/scene_vlm.py` trained {len(SEEDS)} pairs of small LLaVA models, causal and with MMA, from the "
            f"same initial weights on the same questions in the same order; {QUESTIONS} held-out questions, the same "
            "for all. Differences are paired, their 95 % bootstrap intervals draw runs and questions; p is of the sign "
            "test over questions, adjusted for the number in a table (Holm). The script holds the whole protocol."
        ),
        machine=on,
        claims=claims(results, CLAIMS, (SEEDS[0], SEEDS[-1])),
        tables=[_methods_table(results), _kinds_table(asked, results)],
        details={"weights": weights},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trained runs; filled where it is not")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of mma.json and mma.csv")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train_missing(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    save_results(*measure(args.runs), args.out / "mma.csv")
    asked, results = load_results(args.out / "mma.csv")
    on = machine.describe("torch", "transformers", "scipy") | {"threads": args.threads}
    made = report(asked, results, digests(args.runs), on)
    made.save(args.out / "mma.json")
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
