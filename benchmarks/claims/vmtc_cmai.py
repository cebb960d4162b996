"""VMTC's and CMAI's claims, measured on the small vision-language model: fewer tokens, answers and forms of answers.

    python -m benchmarks.claims.vmtc_cmai --runs DIR           # results/vmtc_cmai.json and vmtc_cmai.csv
    python -m benchmarks.claims.vmtc_cmai --runs DIR --time    # measures prefill and cache again, and leaves the rest

Paper: "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy", Yang et al.,
arXiv 2411.15453. We know its abstract and what others wrote of it, and no figure of it that could be verified. Needs
scipy, which the `test` extra brings.

The protocol, fixed before the measurement:

* **Runs.** The causal models of `recipes.scene_vlm` with seeds 0, 1 and 2, as in `benchmarks.claims.mma`. A picture
  has 64 tokens. Nothing is trained for fewer of them.
* **Methods.** VMTC with the library's defaults at 1, 1/2, 1/4 and 1/8 of the tokens. At the same numbers: VMTC that
  merges all tokens and keeps none as primary, added when development questions showed that from the defaults, whose
  tokens are nearly all of objects, these models answer little; spatial down-sampling by averages over equal rectangles
  of the grid, which is the paper's own pilot; tokens kept at random; and FastV (Chen et al., ECCV 2024), which lets all
  tokens through the first two layers and keeps those that the last token attends to most there: of these models' four
  layers two hold all tokens, so FastV has more than the others. CMAI with the library's defaults, and as chosen; VMTC
  at 1/4 with CMAI as chosen.
* **Choice.** CMAI's share of image tokens kept (0.75, 0.5, 0.25), one mask for each head or for all, and its layers
  (from 2 on or all) are chosen on 400 development questions (seed 500) to all runs: the setting with most replies that
  are right and in the asked form; of equals the first. Nothing else is chosen.
* **Questions, answers, figures, verdict.** As in `benchmarks.claims.mma`, with the same 2000 questions. What follows
  the instruction is a reply in the form that was asked for, be it right or wrong.
* **Cost.** Of one question at a time, 40 of them, all methods in turns: seconds until the first token, tower included,
  as the median ratio to the plain model; image tokens and bytes in the cache after it, means over the layers. The model
  is so small that not arithmetic counts but how many operations start; `benchmarks/vlm.py` measures a larger one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.claims.mma import QUESTION_SEED, QUESTIONS
from benchmarks.claims.pruning import fastv, kept_at_random, pooled, with_fewer
from benchmarks.claims.report import RESULTS, Report, Table, digests
from benchmarks.claims.scene_vlm import (
    SEEDS,
    Answer,
    Asked,
    Method,
    Model,
    Results,
    answers,
    batches,
    load,
    load_results,
    save_results,
    shares,
    train_missing,
)
from benchmarks.claims.vlm_report import Pair, claims, differences, in_words, share
from benchmarks.vlm import cache_bytes
from multimodal.cmai import inhibit_cross_modality
from multimodal.text_reads import TextReads
from multimodal.vmtc import compress_visual_tokens
from recipes.scene_questions import KINDS, held_out

__all__ = ["CLAIMS", "GRID", "Setting", "choose", "costs", "measure", "methods", "report", "sweep"]

COMMAND = "python -m benchmarks.claims.vmtc_cmai"
DEVELOPMENT = (400, 500)  # questions, and their seed
COSTED = 40
KEEP = {"1/2": 32, "1/4": 16, "1/8": 8}
PLAIN, CHOSEN = "all tokens", "CMAI, as chosen"


@dataclass(frozen=True)
class Setting:
    """What is chosen of CMAI on the development questions."""

    keep_ratio: float = 0.5
    per_head: bool = True
    layers: tuple[int, ...] = (2, 3)

    def method(self, name: str = "CMAI") -> Method:
        """Answers under it."""
        options: dict[str, Any] = asdict(self)
        return Method(name, lambda model: inhibit_cross_modality(model.network, **options))

    def __str__(self) -> str:
        heads = "a mask for each head" if self.per_head else "one mask for all heads"
        return f"keeps {self.keep_ratio:g}, {heads}, layers {', '.join(map(str, self.layers))}"


GRID = tuple(
    Setting(ratio, per_head, layers)
    for layers, per_head, ratio in itertools.product(((2, 3), (0, 1, 2, 3)), (True, False), (0.5, 0.75, 0.25))
)


def _vmtc(name: str, tokens: int) -> Method:
    return Method(name, lambda model: compress_visual_tokens(model.network, num_tokens=tokens))


def _merged(name: str, tokens: int) -> Method:
    return Method(name, lambda model: compress_visual_tokens(model.network, num_tokens=tokens, merge_share=1))


def _averaged(name: str, tokens: int) -> Method:
    def prepare(model: Model, inputs: dict[str, Any], first: int) -> dict[str, Any]:
        return with_fewer(model.network, inputs, lambda features: pooled(features, tokens))

    return Method(name, prepare=prepare)


def _random(name: str, tokens: int) -> Method:
    def prepare(model: Model, inputs: dict[str, Any], first: int) -> dict[str, Any]:
        def fewer(features: Tensor) -> Tensor:
            return kept_at_random(features, tokens, torch.Generator().manual_seed(first))

        return with_fewer(model.network, inputs, fewer)

    return Method(name, prepare=prepare)


def _fastv(name: str, tokens: int) -> Method:
    return Method(name, lambda model: fastv(model.network, tokens))


_FEWER = {"VMTC": _vmtc, "VMTC, all merged": _merged, "down-sampling": _averaged, "random": _random, "FastV": _fastv}


def methods(chosen: Setting) -> dict[str, Method]:
    """All that are measured, by name."""
    both = chosen.method()

    def vmtc_with_cmai(model: Model) -> Any:
        stack = ExitStack()
        stack.enter_context(compress_visual_tokens(model.network, num_tokens=KEEP["1/4"]))
        stack.enter_context(both.switch(model))
        return stack

    made = [
        Method(PLAIN),
        _vmtc("VMTC 1", 64),
        *(make(f"{name} {keep}", tokens) for keep, tokens in KEEP.items() for name, make in _FEWER.items()),
        Setting().method("CMAI"),
        chosen.method(CHOSEN),
        Method("VMTC 1/4 and CMAI", vmtc_with_cmai),
    ]
    return {method.name: method for method in made}


_STATED = "stated without a figure that we could verify"
CLAIMS = (
    Pair("Down-sampling to 1/4 raises instruction following", _STATED, "follows", "down-sampling 1/4", PLAIN),
    Pair("Down-sampling to 1/4 costs right answers", _STATED, "right", "down-sampling 1/4", PLAIN, -1),
    *(
        Pair(f"VMTC at {keep} answers more questions than {words} at {keep}", published, "right", f"VMTC {keep}", over)
        for name, words, published in (
            ("down-sampling", "down-sampling", _STATED),
            ("random", "tokens kept at random", "no figure"),
            ("FastV", "FastV", "no figure"),
        )
        for keep in KEEP
        for over in [f"{name} {keep}"]
    ),
    *(
        Pair(f"VMTC that merges all, at {keep}, answers more than {words} at {keep}", "no figure", "right", own, over)
        for name, words in (("VMTC", "its defaults"), ("down-sampling", "down-sampling"), ("random", "random tokens"))
        for keep in KEEP
        for own, over in [(f"VMTC, all merged {keep}", f"{name} {keep}")]
    ),
    Pair("VMTC at 1/4 raises instruction following", _STATED, "follows", "VMTC 1/4", PLAIN),
    Pair("CMAI raises instruction following", _STATED, "follows", CHOSEN, PLAIN),
    Pair("VMTC at 1/4 and CMAI raise instruction following", _STATED, "follows", "VMTC 1/4 and CMAI", PLAIN),
    Pair("CMAI answers more questions", "no figure", "right", CHOSEN, PLAIN),
)


@dataclass(frozen=True)
class Tried:
    """How a setting fared on the development questions: replies right and in the asked form, of how many."""

    setting: Setting
    hits: int
    trials: int


def sweep(models: Sequence[Model]) -> list[Tried]:
    """Every setting of CMAI, over all runs."""
    examples, tried = held_out(*DEVELOPMENT), []
    for setting in GRID:
        own = [answer for model in models for answer in answers(model, examples, setting.method())]
        tried.append(Tried(setting, sum(answer.right and answer.follows for answer in own), len(own)))
        print(f"{setting}: {tried[-1].hits} of {tried[-1].trials}", flush=True)
    return tried


def choose(tried: Sequence[Tried]) -> Setting:
    """The setting with most hits; of equals the first."""
    return max(tried, key=lambda own: own.hits).setting


def measure(models: Sequence[Model], chosen: Setting) -> tuple[list[Asked], dict[str, list[list[Answer]]]]:
    """The answers of all methods and runs."""
    examples, results = held_out(QUESTIONS, QUESTION_SEED), {}
    for name, method in methods(chosen).items():
        results[name] = [answers(model, examples, method) for model in models]
        print(name, *(f"{statistics.fmean(run):.1%}" for run in shares(results[name], "right")), flush=True)
    return [Asked.of(number, example) for number, example in enumerate(examples)], results


@torch.no_grad()
def costs(model: Model, chosen: Setting) -> dict[str, dict[str, float]]:
    """Of each method the median ratio of seconds to the first token, and mean image tokens and bytes in the cache."""
    seconds: dict[str, list[float]] = {name: [] for name in methods(chosen)}
    tokens: dict[str, list[float]] = {name: [] for name in seconds}
    held: dict[str, list[int]] = {name: [] for name in seconds}
    for example in held_out(COSTED, DEVELOPMENT[1]):
        ((_, asked),) = batches(model, [example])
        text = int((asked["input_ids"] != model.network.config.image_token_id).sum())
        for name, method in methods(chosen).items():
            start = time.perf_counter()
            with method.switch(model):
                cache = model.network(**method.prepare(model, asked, 0), use_cache=True, logits_to_keep=1).cache
            seconds[name].append(time.perf_counter() - start)
            layers = [layer for layer in cache.layers if not isinstance(layer, TextReads)]
            tokens[name].append(statistics.fmean(layer.get_seq_length() - text for layer in layers))
            held[name].append(cache_bytes(cache))
    return {
        name: {
            "prefill_ratio": statistics.median(a / b for a, b in zip(own[1:], seconds[PLAIN][1:], strict=True)),
            "image_tokens": statistics.fmean(tokens[name]),
            "cache_bytes": statistics.fmean(held[name]),
        }
        for name, own in seconds.items()
    }


def _methods_table(results: Results, cost: Mapping[str, Mapping[str, float]]) -> Table:
    header = ["method", "image tokens", "cache, KB", "prefill / all", "right", *(f"seed {seed}" for seed in SEEDS)]
    header += ["in the asked form", "both", "right − all tokens", "in the asked form − all tokens"]
    rows = []
    for name, runs in results.items():
        own = cost[name]
        each = [f"{statistics.fmean(run):.1%}" for run in shares(runs, "right")]
        row = [name, f"{own['image_tokens']:.1f}", f"{own['cache_bytes'] / 1024:.0f}", f"{own['prefill_ratio']:.2f}"]
        row += [f"{share(runs, 'right'):.1%}", *each, f"{share(runs, 'follows'):.1%}", f"{share(runs, 'both'):.1%}"]
        found = differences(results, [(name, PLAIN, "right"), (name, PLAIN, "follows")])
        rows.append([*row, *("" if name == PLAIN else in_words(*one) for one in found)])
    return Table(f"VMTC and CMAI: {QUESTIONS} questions to each of {len(SEEDS)} runs", header, rows)


def _kinds_table(asked: Sequence[Asked], results: Results) -> Table:
    rows = []
    for name, runs in results.items():
        wheres = [[own.kind == kind for own in asked] for kind in KINDS]
        rows.append([name, *(f"{share(runs, 'right', where):.0%}" for where in wheres)])
    return Table("VMTC and CMAI: right answers by kind of question", ["method", *KINDS], rows)


def _settings_table(tried: Sequence[Tried]) -> Table:
    chosen = choose(tried)
    rows = [
        [str(own.setting), f"{own.hits / own.trials:.1%}", "chosen" if own.setting == chosen else ""]
        for own in sorted(tried, key=lambda own: -own.hits)
    ]
    return Table("CMAI: settings, on development questions", ["setting", "right and in the asked form", ""], rows)


def report(
    asked: Sequence[Asked],
    results: Results,
    tried: Sequence[Tried],
    cost: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, str],
    on: Mapping[str, Any],
) -> Report:
    """Everything that is known, as `docs/tables.py` takes it."""
    return Report(
        method="VMTC and CMAI",
        paper="Yang et al., arXiv 2411.15453",
        command=f"{COMMAND} --runs DIR",
        protocol=(
            f"The causal models of `recipes/scene_vlm.py`, {len(SEEDS)} runs, 64 tokens a picture, not trained for "
            f"fewer; the same {QUESTIONS} held-out questions as for MMA. CMAI's setting was chosen among "
            f"{len(GRID)} on development questions; VMTC has the library's defaults. FastV keeps all tokens in "
            "the first two of four layers. Differences are paired, their 95 % bootstrap intervals draw runs and "
            "questions; p is of the sign test over questions, adjusted for the number of claims, or in the table for a "
            "row (Holm). Prefill is of one question, tower included, one thread, all methods in turns; cache and "
            "tokens are means over the layers. The script holds the whole protocol."
        ),
        machine=dict(on),
        claims=claims(results, CLAIMS, (SEEDS[0], SEEDS[-1])),
        tables=[_methods_table(results, cost), _kinds_table(asked, results), _settings_table(tried)],
        details={
            "weights": dict(weights),
            "tried": [asdict(own) for own in tried],
            "cost": {name: dict(own) for name, own in cost.items()},
        },
    )


def tried_of(own: Mapping[str, Any]) -> Tried:
    """What `dataclasses.asdict` made of it, and JSON."""
    setting = {**own["setting"], "layers": tuple(own["setting"]["layers"])}
    return Tried(Setting(**setting), own["hits"], own["trials"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trained runs; filled where it is not")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of vmtc_cmai.json and vmtc_cmai.csv")
    parser.add_argument("--time", action="store_true", help="only measure prefill and cache again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_missing(args.runs)
    where, table, weights = args.out / "vmtc_cmai.json", args.out / "vmtc_cmai.csv", digests(args.runs)
    models = [load(args.runs / f"seed{seed}" / "causal") for seed in SEEDS]
    if args.time:
        before = Report.load(where)
        if before.details["weights"] != weights:
            raise SystemExit(f"{where} is not of the weights in {args.runs}: run without --time")
        tried = [tried_of(own) for own in before.details["tried"]]
    else:
        tried = sweep(models)
        args.out.mkdir(parents=True, exist_ok=True)
        save_results(*measure(models, choose(tried)), table)
    asked, results = load_results(table)
    on = machine.describe("torch", "transformers", "scipy") | {"threads": 1}
    made = report(asked, results, tried, costs(models[0], choose(tried)), weights, on)
    made.save(where)
    for claim in made.claims:
        print(f"{claim.verdict}: {claim.claim}: {claim.ours}")


if __name__ == "__main__":
    main()
