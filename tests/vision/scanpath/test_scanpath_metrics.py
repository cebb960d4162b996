"""Scanpath metrics: stored numbers of public packages, slow obvious references, the tricks, and bad input."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from parity.rule import load

from vision.scanpath.metrics import (
    behaviour,
    behavioural_delta,
    fixation_edit_distance,
    multimatch,
    next_object,
    scanmatch,
    sequence_score,
)

GOLDEN = load("scanpath_metrics")
CELLS = np.stack(np.divmod(np.arange(84), 14), 1).astype(float)  # row, column
SIZE = tuple(GOLDEN["size"])
DIMENSIONS = ("vector", "direction", "length", "position", "duration")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def walks(rng: np.random.Generator, count: int, longest: int = 12, objects: int = 9) -> list[list[int]]:
    """Scanpaths of few objects, so that matches, refixations and revisits abound; some are empty."""
    return [rng.integers(objects, size=n).tolist() for n in rng.integers(0, longest + 1, size=count)]


# --- stored numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", GOLDEN["pairs"], ids=lambda pair: pair["name"])
def test_a_pair_gets_what_public_packages_say(pair: dict[str, Any]):
    a, b, golden = pair["objects_a"], pair["objects_b"], pair["metrics"]
    assert sequence_score(a, b) == pytest.approx(golden["sequence_score"], abs=1e-6)
    assert fixation_edit_distance(a, b) == golden["fed"]
    assert fixation_edit_distance(a, b, normalise=True) == pytest.approx(golden["fed_normalised"], abs=1e-6)
    assert scanmatch(a, b, CELLS) == pytest.approx(golden["scanmatch_thr3_5_gap0"], abs=1e-6)
    penalised = scanmatch(a, b, CELLS, threshold=2, gap=-0.5)
    assert penalised == pytest.approx(golden["scanmatch_thr2_gapm0_5"], abs=1e-6)
    found = multimatch(pair["fixations_a"], pair["fixations_b"], SIZE)
    expected = {name: math.nan if value is None else value for name, value in golden["multimatch"].items()}
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
    for objects, stored in ((a, pair["behaviour_a"]), (b, pair["behaviour_b"])):
        habits = behaviour(objects)
        assert habits["steps"] == stored["length"]
        shares = [habits[name] for name in ("search", "refixation", "revisit")]
        assert shares == pytest.approx([stored[name] for name in ("search", "refixate", "revisit")], abs=1e-6)


def test_all_pairs_at_once_get_the_same():
    a, b = ([pair[side] for pair in GOLDEN["pairs"]] for side in ("objects_a", "objects_b"))
    np.testing.assert_allclose(
        sequence_score(a, b), [p["metrics"]["sequence_score"] for p in GOLDEN["pairs"]], atol=1e-6
    )
    np.testing.assert_array_equal(fixation_edit_distance(a, b), [p["metrics"]["fed"] for p in GOLDEN["pairs"]])
    together = multimatch(
        [pair["fixations_a"] for pair in GOLDEN["pairs"]], [pair["fixations_b"] for pair in GOLDEN["pairs"]], SIZE
    )
    for name in DIMENSIONS:
        stored = [pair["metrics"]["multimatch"][name] for pair in GOLDEN["pairs"]]
        np.testing.assert_allclose(together[name], np.array(stored, float), atol=1e-6)


# --- slow, obvious references -----------------------------------------------------------------------------------------


def aligned(a: list[int], b: list[int], score: Any, gap: float) -> float:
    """Needleman and Wunsch's table, cell by cell."""
    table = np.zeros((len(a) + 1, len(b) + 1))
    table[:, 0], table[0] = gap * np.arange(len(a) + 1), gap * np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = max(table[i - 1, j - 1] + score(x, y), table[i - 1, j] + gap, table[i, j - 1] + gap)
    return table[-1, -1]


def edits(a: list[int], b: list[int]) -> int:
    """Levenshtein's definition, as it stands."""
    if not a or not b:
        return len(a) + len(b)
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            kept = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(kept, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(a), len(b)]


def test_alignments_equal_the_table_filled_cell_by_cell(rng: np.random.Generator):
    a, b = walks(rng, 60), walks(rng, 60)
    longer = [max(len(x), len(y)) for x, y in zip(a, b, strict=True)]
    assert longer.count(0) == 0, "pairs of two empty scanpaths have a test of their own"
    pairs = list(zip(a, b, longer, strict=True))
    common = [aligned(x, y, lambda i, j: float(i == j), 0) / n for x, y, n in pairs]
    np.testing.assert_allclose(sequence_score(a, b), common, atol=1e-12)
    np.testing.assert_array_equal(fixation_edit_distance(a, b), [edits(x, y) for x, y, _ in pairs])
    np.testing.assert_allclose(
        fixation_edit_distance(a, b, normalise=True), [edits(x, y) / n for x, y, n in pairs], atol=1e-12
    )
    places = rng.uniform(0, 5, size=(9, 2))
    for gap in (0.0, -0.4):
        near = [aligned(x, y, lambda i, j: 2.5 - math.dist(places[i], places[j]), gap) / (2.5 * n) for x, y, n in pairs]
        np.testing.assert_allclose(scanmatch(a, b, places, threshold=2.5, gap=gap), near, atol=1e-12)


def ways(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """All ways through a table from corner to corner."""
    if rows == columns == 1:
        return [[(0, 0)]]
    steps = [(rows - 1, columns), (rows, columns - 1), (rows - 1, columns - 1)]
    return [[*way, (rows - 1, columns - 1)] for r, c in steps if r and c for way in ways(r, c)]


def multimatch_of_all_ways(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> dict[str, float]:
    """MultiMatch with the cheapest of all ways, tried one by one, and no complex numbers."""
    steps_a, steps_b, diagonal = np.diff(a[:, :2], axis=0), np.diff(b[:, :2], axis=0), math.hypot(*size)
    every = ways(len(steps_a), len(steps_b))
    costs = [sum(math.dist(steps_a[i], steps_b[j]) for i, j in way) for way in every]
    way = every[int(np.argmin(costs))]
    assert np.sort(costs)[1] - min(costs) > 1e-6, "two ways are equally cheap: nothing to compare"

    def one(i: int, j: int) -> list[float]:
        turn = abs(math.atan2(*steps_a[i][::-1]) - math.atan2(*steps_b[j][::-1]))
        lengths = math.hypot(*steps_a[i]), math.hypot(*steps_b[j])
        return [
            math.dist(steps_a[i], steps_b[j]) / (2 * diagonal),
            min(turn, 2 * math.pi - turn) / math.pi,
            abs(lengths[0] - lengths[1]) / diagonal,
            math.dist(a[i, :2], b[j, :2]) / diagonal,
            abs(a[i, 2] - b[j, 2]) / max(a[i, 2], b[j, 2]),
        ]

    return dict(zip(DIMENSIONS, 1 - np.median([one(i, j) for i, j in way], axis=0), strict=True))


def test_multimatch_equals_the_cheapest_of_all_ways(rng: np.random.Generator):
    a, b = (
        [np.column_stack((rng.uniform(0, 900, n), rng.uniform(0, 500, n), rng.uniform(0.1, 0.6, n))) for n in lengths]
        for lengths in rng.integers(3, 7, size=(2, 40))
    )
    found = multimatch(a, b, (900, 500))
    slow = [multimatch_of_all_ways(x, y, (900, 500)) for x, y in zip(a, b, strict=True)]
    for name in DIMENSIONS:
        np.testing.assert_allclose(found[name], [values[name] for values in slow], atol=1e-9, err_msg=name)


def habits_by_hand(path: list[int]) -> list[int]:
    """Search, refixation and revisit, counted fixation by fixation."""
    counts, seen = [0, 0, 0], set()
    for n, item in enumerate(path):
        kind = 1 if n and path[n - 1] == item else 2 if item in seen else 0
        counts[kind] += 1
        seen.add(item)
    return counts


def test_behaviour_equals_counting_fixation_by_fixation(rng: np.random.Generator):
    paths = walks(rng, 50, objects=4)
    targets = rng.integers(4, size=50)
    found = behaviour(paths, targets)
    assert found["steps"] == pytest.approx(np.mean([len(path) for path in paths]))
    hits = [bool(path) and path[-1] == target for path, target in zip(paths, targets, strict=True)]
    assert found["found"] == pytest.approx(np.mean(hits))
    shares = [np.divide(habits_by_hand(path), len(path)) for path in paths if path]
    assert [found[k] for k in ("search", "refixation", "revisit")] == pytest.approx(np.mean(shares, axis=0).tolist())


def test_next_object_equals_torch_and_ignores_padding():
    logits = torch.randn(3, 5, 7)
    came = torch.randint(7, (3, 5))
    came[0, 3:] = -100
    log_probs = logits.log_softmax(-1)
    found = next_object(log_probs.requires_grad_(), came)
    assert found["nats"] == pytest.approx(torch.nn.functional.cross_entropy(logits.mT, came).item(), rel=1e-5)
    real = came != -100
    assert found["top1"] == pytest.approx((logits.argmax(-1) == came)[real].float().mean().item())
    chosen = log_probs.exp()[real].gather(1, came[real][:, None])
    assert found["probability"] == pytest.approx(chosen.mean().item(), rel=1e-5)


def test_next_object_takes_half_precision():
    logits = torch.randn(40, 85)
    came = torch.randint(85, (40,))
    half = next_object(logits.log_softmax(-1).bfloat16(), came)
    assert half["nats"] == pytest.approx(next_object(logits.log_softmax(-1), came)["nats"], rel=0.01)


# --- many, one, none --------------------------------------------------------------------------------------------------


def test_one_scanpath_is_compared_with_all_of_a_list(rng: np.random.Generator):
    samples = walks(rng, 20)
    human = samples[3]
    for metric in (sequence_score, fixation_edit_distance):
        expected = [metric(human, sample) for sample in samples]
        np.testing.assert_array_equal(metric(human, samples), expected)
        np.testing.assert_array_equal(metric(samples, human), expected)
    points = [rng.uniform(0, 100, size=(n, 2)) for n in (5, 0, 9)]
    np.testing.assert_array_equal(scanmatch(points[0], points), [scanmatch(points[0], other) for other in points])
    together = multimatch(points[0], points, (100, 100))
    assert together["vector"][0] == 1 and np.isnan(together["vector"][1]) and together["vector"][2] < 1


def test_results_do_not_depend_on_the_company(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    a, b = walks(rng, 80, longest=30), walks(rng, 80, longest=30)
    points_a, points_b = ([CELLS[path] for path in paths] for paths in (a, b))
    score, places = sequence_score(a, b), multimatch(points_a, points_b, (6, 14))
    monkeypatch.setattr("vision.scanpath.pairs._TABLE", 2000)  # parts of two to a few pairs
    np.testing.assert_array_equal(sequence_score(a, b), score)
    for name, values in multimatch(points_a, points_b, (6, 14)).items():
        np.testing.assert_array_equal(values, places[name])


def test_many_pairs_together_cost_a_fraction_of_one_by_one(rng: np.random.Generator):
    a, b = (rng.integers(84, size=(120, 15)).tolist() for _ in range(2))
    for metric in (
        sequence_score,
        fixation_edit_distance,
        lambda x, y: scanmatch(x, y, CELLS),
        lambda x, y: multimatch(CELLS[np.array(x)], CELLS[np.array(y)], (6, 14))["vector"],
    ):
        start = time.process_time()
        together = metric(a, b)
        middle = time.process_time()
        one_by_one = [metric(x, y) for x, y in zip(a, b, strict=True)]
        assert middle - start < (time.process_time() - middle) / 4
        np.testing.assert_allclose(together, one_by_one, atol=1e-12)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, np.uint8)])
def test_objects_come_in_any_form(form: Any):
    assert sequence_score(form([1, 2, 3]), form([1, 3])) == pytest.approx(2 / 3)
    assert sequence_score([form([1, 2, 3]), form([1])], [form([1, 3]), form([2])]).tolist() == pytest.approx([2 / 3, 0])
    assert behaviour([form([1, 1]), form([2])], form([1, 1]))["found"] == 0.5


def test_results_are_plain_numbers():
    points = np.random.default_rng(0).uniform(0, 9, size=(4, 2))
    assert type(sequence_score([1], [1])) is float and type(scanmatch(points, points)) is float
    values = [*multimatch(points, points, (9, 9)).values(), *behaviour([1, 2], 2).values()]
    values += next_object(np.log([[0.5, 0.5]]), np.array([0])).values()
    assert {type(value) for value in values} == {float}


def test_empty_scanpaths_have_defined_results():
    none: list[int] = []
    assert (sequence_score(none, none), sequence_score(none, [4, 5])) == (1, 0)
    assert (fixation_edit_distance(none, none), fixation_edit_distance(none, [4, 5])) == (0, 2)
    assert fixation_edit_distance(none, none, normalise=True) == 0
    assert fixation_edit_distance([4, 5], none, normalise=True) == 1
    assert (scanmatch(none, none, CELLS), scanmatch(none, [4, 5], CELLS)) == (1, 0)
    assert scanmatch(none, [4, 5], CELLS, threshold=2, gap=-0.5) == -0.25
    assert scanmatch(np.zeros((0, 2)), np.zeros((3, 2))) == 0
    assert all(math.isnan(value) for value in multimatch(np.zeros((0, 2)), np.ones((5, 2)), (9, 9)).values())
    np.testing.assert_array_equal(sequence_score([[], [1], []], [[], [], [2]]), [1, 0, 0])
    np.testing.assert_array_equal(sequence_score([[], []], [3]), [0, 0])
    alone = behaviour(none, 3)
    assert (alone["found"], alone["steps"]) == (0, 0) and math.isnan(alone["search"])
    mixed = behaviour([[], [3, 3]], 3)
    assert mixed == {"found": 0.5, "steps": 1, "search": 0.5, "refixation": 0.5, "revisit": 0}
    assert math.isnan(next_object(np.zeros((0, 4)), np.zeros(0, int))["nats"])


def test_one_fixation_has_defined_results():
    assert (sequence_score([7], [7]), sequence_score([7], [8]), sequence_score([7], [8, 7])) == (1, 0, 0.5)
    assert (fixation_edit_distance([7], [7]), fixation_edit_distance([7], [8, 9])) == (0, 2)
    assert scanmatch([7], [8], CELLS) == pytest.approx(2.5 / 3.5)
    for few in (1, 2):
        short = multimatch(np.ones((few, 2)), np.eye(5, 2), (9, 9))
        assert all(math.isnan(value) for value in short.values())
    assert behaviour([7], 7) == {"found": 1, "steps": 1, "search": 1, "refixation": 0, "revisit": 0}


# --- what they measure ------------------------------------------------------------------------------------------------


def test_scanmatch_of_cells_is_scanmatch_of_pixels():
    rows, columns = CELLS.T
    pixels = np.stack((columns * 179 + 90, rows * 263 + 130), 1)
    a, b = [17, 18, 32, 60], [19, 33, 60]
    in_cells = scanmatch(a, b, CELLS)
    assert 0 < in_cells < 1
    assert scanmatch(a, b, pixels, unit=(179, 263)) == pytest.approx(in_cells)
    assert scanmatch(pixels[a], pixels[b], unit=(179, 263)) == pytest.approx(in_cells)


def test_far_fixations_are_left_out_at_no_cost_but_length():
    assert scanmatch([0, 83], [0], CELLS) == scanmatch([0, 5], [0], CELLS) == 0.5
    assert scanmatch([0, 83], [0], CELLS, gap=-0.7) == pytest.approx(0.5 - 0.7 / 7)


def test_directions_are_compared_around_the_circle():
    """Steps a hair above and below due left differ by almost nothing, not by almost a full turn."""
    up = np.array([[90, 50], [60, 51], [30, 52], [0, 53]], float)
    down = up * (1, -1) + (0, 100)
    assert multimatch(up, down, (100, 100))["direction"] > 0.97
    assert multimatch(up, up[::-1], (100, 100))["direction"] < 1e-9


def test_multimatch_does_not_see_where_a_scanpath_ends(rng: np.random.Generator):
    """A trick that the docstring names: the last fixation's place enters no position."""
    a = rng.uniform(0, 100, size=(8, 2))
    b = a.copy()
    b[-1] += 1
    assert multimatch(a, b, (100, 100))["position"] == 1


def test_durations_are_the_fifth_dimension_where_both_have_them(rng: np.random.Generator):
    a = np.column_stack((rng.uniform(0, 100, size=(5, 2)), np.full(5, 0.2)))
    b = a * (1, 1, 2)
    assert multimatch(a, b, (100, 100))["duration"] == pytest.approx(0.5)
    assert multimatch(a, b * (1, 1, 1000), (100, 100))["duration"] == pytest.approx(0.0005)
    without = multimatch(a, b[:, :2], (100, 100))
    assert math.isnan(without.pop("duration")) and set(without.values()) == {1}
    mixed = multimatch([a, a], [b, b[:, :2]], (100, 100))["duration"]
    assert mixed[0] == pytest.approx(0.5) and np.isnan(mixed[1])


def test_the_tricks_of_the_docstrings_work(rng: np.random.Generator):
    """People wander for a while and end on the target; a guess that knows the target beats them among each other."""
    target, centre = 5, 34
    people = [[centre, *rng.integers(84, size=n), target, target] for n in (2, 3, 4, 9, 16, 25)]
    others = [(a, b) for a in people for b in people if a is not b]
    among = fixation_edit_distance([a for a, _ in others], [b for _, b in others]).mean()
    trick = [centre, target, target]
    assert fixation_edit_distance(trick, people).mean() < among
    assert sequence_score(trick, people).mean() > 0.9 * np.mean([sequence_score(a, b) for a, b in others])
    assert behavioural_delta(behaviour([trick] * 6, target), behaviour(people, target)) > 0.3


def test_delta_is_the_mean_relative_error():
    human = {"found": 0.8, "steps": 10.0, "search": 0.8, "refixation": 0.1, "revisit": 0.1}
    model = {"found": 0.4, "steps": 15.0, "search": 0.8, "refixation": 0.2, "revisit": 0.0}
    assert behavioural_delta(model, human) == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5)
    assert behavioural_delta(human, human) == 0
    assert behavioural_delta(model, human | {"revisit": 0.0}) == pytest.approx(2 / 5)
    assert behavioural_delta(human, human | {"revisit": 0.0}) == math.inf


def test_equal_probabilities_share_a_hit():
    constant = np.log(np.full((4, 5), 0.2))
    assert next_object(constant, np.array([0, 0, 0, 0]))["top1"] == pytest.approx(0.2)
    assert next_object(constant, np.array([4, 3, 2, 1]))["top1"] == pytest.approx(0.2)
    with np.errstate(divide="ignore"):
        sure = np.log(np.eye(3))
    assert next_object(sure, np.arange(3)) == {"nats": 0, "top1": 1, "probability": 1}
    assert next_object(sure, np.array([1, 1, 1]))["nats"] == math.inf


# --- bad input --------------------------------------------------------------------------------------------------------

LOST = [[1.0, 2.0], [math.nan, 3.0], [4.0, 5.0]]
THREE = [[1.0, 2.0], [2.0, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: sequence_score([1.5, 2], [1]), TypeError, "expected objects as integers, got float64; `Objects.at`"),
        (lambda: fixation_edit_distance(THREE, THREE), TypeError, "`Objects.at` makes them of pixels"),
        (lambda: fixation_edit_distance([[THREE]], [1]), ValueError, "something of 4 dimensions"),
        (lambda: sequence_score([1, -1], [1]), ValueError, "object -1: objects count from 0; cut the padding off"),
        (lambda: sequence_score([[1], [1, -100]], [1]), ValueError, "scanpath 1: object -100"),
        (lambda: sequence_score([[1], [2]], [[1], [2], [3]]), ValueError, "2 scanpaths and 3: expected one for each"),
        (lambda: sequence_score(3, [1]), TypeError, "expected a scanpath or a list of scanpaths, got int"),
        (lambda: sequence_score("12", [1]), TypeError, "got str"),
        (lambda: scanmatch([1, 84], [2], CELLS), ValueError, "object 84 has no position: positions are given for 84"),
        (lambda: scanmatch([1], [2], np.zeros((0, 2))), ValueError, "object 1 has no position"),
        (lambda: scanmatch([1], [2], LOST), ValueError, "positions: number 1 is [nan, 3.0]"),
        (lambda: scanmatch(LOST, THREE), ValueError, "scanpath: number 1 is [nan, 3.0]; leave lost samples out"),
        (lambda: scanmatch([1, 2], [2]), ValueError, "a scanpath of places, [T, 2], or a list of such"),
        (lambda: scanmatch([1], [2], CELLS, threshold=0), ValueError, "threshold=0 must be positive"),
        (lambda: scanmatch([1], [2], CELLS, threshold=math.nan), ValueError, "threshold=nan must be positive"),
        (lambda: scanmatch([1], [2], CELLS, gap=0.1), ValueError, "gap=0.1 must not be above 0"),
        (lambda: scanmatch([1], [2], CELLS, unit=(1, 0)), ValueError, "unit=(1, 0): what counts as a distance"),
        (lambda: multimatch(LOST, THREE, (9, 9)), ValueError, "number 1 is [nan, 3.0]"),
        (lambda: multimatch([THREE, LOST], THREE, (9, 9)), ValueError, "scanpath 1: number 1 is [nan, 3.0]"),
        (lambda: multimatch([[1.0, math.inf]] * 3, THREE, (9, 9)), ValueError, "number 0 is [1.0, inf]"),
        (lambda: multimatch(np.zeros((3, 4)), THREE, (9, 9)), ValueError, "[T, 3] with durations, got [3, 4]"),
        (lambda: multimatch(np.zeros((3, 3)), THREE, (9, 9)), ValueError, "duration 0.0 is not positive"),
        (lambda: multimatch([1, 2, 3], THREE, (9, 9)), ValueError, "a scanpath of places"),
        (lambda: multimatch(THREE, THREE, (9, 0)), ValueError, "size=(9, 0): expected the width and height"),
        (lambda: behaviour([[1], [2]], [1, 2, 3]), ValueError, "expected one object for all or one for each of 2"),
        (lambda: behaviour([[1], [2]], 1.5), ValueError, "targets=1.5"),
        (lambda: behavioural_delta({"steps": 1}, {"found": 1}), ValueError, "['steps'] and ['found'] differ"),
        (lambda: next_object(np.zeros((2, 3)), np.array([0, 1])), ValueError, "sum to 3 … 3; take log_softmax"),
        (lambda: next_object(np.log([[0.5, 0.5]]), np.array([2])), ValueError, "objects from 2 to 2: expected 0 to 1"),
        (lambda: next_object(np.log([[0.5, 0.5]]), np.array([0, 1])), ValueError, "expected [..., K] and [...]"),
        (lambda: next_object(np.log([[0.5, 0.5]]), np.array([0.0])), TypeError, "expected integers, got float64"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], says: str):
    with pytest.raises(error, match=re.escape(says)):
        call()
