"""Scanpaths from a model: cached as uncached, ends, limits, many samples, and bad input."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vision.scanpath.decoding import Decoded, StepDecoder, greedy, sample
from vision.scanpath.metrics import behaviour
from vision.scanpath.model import OAT, OATConfig
from vision.scanpath.scenes import PAD, Scenes

CONFIG = OATConfig(dim=160, position_dim=120, depth=2, mlp_dim=64, extent=(20, 25), appearance="none", max_length=12)


def cells(rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


@pytest.fixture
def scenes() -> Scenes:
    return Scenes.stack([cells(3, 4), cells(2, 2), cells(4, 5)], [5, 0, 19])


def lively() -> OAT:
    """An untrained model, with probabilities that differ."""
    model = OAT(CONFIG).eval()
    torch.nn.init.constant_(model.pointer.merge.weight, 1.5)
    return model


def with_end(model: OAT, bias: float) -> OAT:
    """The model as it is, but for the end of search, which is likelier by `bias`."""
    model.pointer.register_forward_hook(
        lambda module, args, logits: torch.cat((logits[..., :-1], logits[..., -1:] + bias), -1)
    )
    return model


@torch.no_grad()
def uncached(model: OAT, scenes: Scenes, scene: int, choose: Any, max_length: int) -> list[int]:
    """One scanpath by a whole pass for each fixation."""
    encoded = model.encode(scenes).select(torch.tensor([scene]))
    path: list[int] = []
    while len(path) < max_length:
        logits = model.decode(encoded, torch.tensor([path], dtype=torch.long).view(1, -1))[0, -1]
        item = choose(logits)
        if item == len(logits) - 1:
            break
        path.append(item)
    return path


# --- the cache --------------------------------------------------------------------------------------------------------


def test_steps_are_the_rows_of_the_whole_pass(scenes: Scenes):
    model = lively()
    paths = torch.randint(0, 4, (3, 6, 9))
    with torch.no_grad():
        encoded = model.encode(scenes)
        whole = model(scenes, paths.flatten(0, 1), torch.arange(3).repeat_interleave(6)).unflatten(0, (3, 6))
        decoder = StepDecoder(model, encoded, num_samples=6, max_length=10)
        steps = [decoder.step(None), *(decoder.step(paths[..., t]) for t in range(9))]
    torch.testing.assert_close(torch.stack(steps, 2), whole, atol=1e-5, rtol=1e-5)
    assert whole.softmax(-1).std(2).max() > 0.01, "the model must depend on what came before"


def test_greedy_is_as_without_a_cache(scenes: Scenes):
    model = with_end(lively(), 1.0)
    expected = [uncached(model, scenes, n, lambda logits: int(logits.argmax()), 12) for n in range(3)]
    found = greedy(model, scenes)
    assert [scene[0].tolist() for scene in found.tolist()] == expected


def test_samples_are_as_without_a_cache(scenes: Scenes):
    model, few = lively(), Scenes(scenes.positions[2:], scenes.targets[2:], scenes.counts[2:])
    for seed in range(5):
        numbers = torch.Generator().manual_seed(seed)

        def draw(logits: Tensor, numbers: torch.Generator = numbers) -> int:
            return int(torch.multinomial((logits / 0.8).softmax(-1), 1, generator=numbers))

        expected = uncached(model, few, 0, draw, 12)
        again = torch.Generator().manual_seed(seed)
        found = sample(model, few, temperature=0.8, generator=again)
        assert found.tolist()[0][0].tolist() == expected


def test_a_fixation_costs_one_token(scenes: Scenes):
    model, tokens, encodings = with_end(lively(), -50.0), [], []
    for layer in model.decoder.layers:
        layer.linear1.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[:-1].numel()))
    model.encoder.register_forward_hook(lambda module, args, output: encodings.append(len(output)))
    found = sample(model, scenes, num_samples=4, max_length=11)
    assert found.lengths.unique().tolist() == [11]
    assert tokens == [3 * 4] * (11 * CONFIG.depth)  # a token of each scanpath, in each step and layer
    assert encodings == [3]


def test_decoding_runs_under_autocast(scenes: Scenes):
    model = lively()
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(model, scenes, 3)
        logits = StepDecoder(model, model.encode(scenes), 1, 2).step(None)
    assert (found.lengths >= 1).all()
    with torch.no_grad():
        whole = model.decode(model.encode(scenes), torch.zeros(3, 0, dtype=torch.long))
    chances = whole.softmax(-1)
    torch.testing.assert_close(logits.float().softmax(-1), chances, atol=0.02, rtol=0)


# --- distribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_models_distribution(temperature: float):
    model = with_end(lively(), 1.0)
    scene = Scenes.stack([cells(1, 2)], [1])
    drawn = sample(
        model, scene, 20_000, temperature=temperature, max_length=2, generator=torch.Generator().manual_seed(1)
    )
    counts: dict[tuple[int, ...], int] = {}
    for path in map(tuple, drawn.objects[0].tolist()):
        counts[path] = counts.get(path, 0) + 1
    chances = {}
    for first in (0, 1):
        with torch.no_grad():
            rows = (model(scene, torch.tensor([[first]])) / temperature).softmax(-1)[0]
        for second in (0, 1, 2):
            chances[first, second if second < 2 else PAD] = float(rows[0, first] * rows[1, second])
    assert sum(chances.values()) == pytest.approx(1)
    for path, chance in chances.items():
        assert counts.get(path, 0) / 20_000 == pytest.approx(chance, abs=5 * math.sqrt(chance / 20_000))


def test_a_cold_sample_is_greedy(scenes: Scenes):
    model = lively()
    cold = sample(model, scenes, 4, temperature=1e-3)
    assert (cold.objects == greedy(model, scenes).objects).all()


def test_the_same_numbers_give_the_same_scanpaths(scenes: Scenes):
    model = lively()
    a, b, c = (sample(model, scenes, 3, generator=torch.Generator().manual_seed(n)).objects for n in (1, 1, 2))
    assert torch.equal(a, b) and not (a.shape == c.shape and torch.equal(a, c))


# --- ends and limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "length", "ended"), [(100.0, 1, True), (-100.0, 12, False)])
def test_a_search_has_a_fixation_and_an_end(scenes: Scenes, bias: float, length: int, ended: bool):
    model = with_end(lively(), bias)
    for found in (greedy(model, scenes), sample(model, scenes, 5)):
        assert (found.lengths == length).all() and (found.ended == ended).all()
        assert found.objects.shape[-1] == length
        assert (found.objects < scenes.counts[:, None, None]).all() and (found.objects >= 0).all()


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_limit_on_refixations_holds_and_ends_the_search(scenes: Scenes, limit: int):
    model = with_end(lively(), -100.0)  # never ends by itself
    for found in (
        greedy(model, scenes, max_length=500, max_refixations=limit),
        sample(model, scenes, 5, max_length=500, max_refixations=limit),
    ):
        for scene, count in zip(found.tolist(), scenes.counts.tolist(), strict=True):
            for path in scene:
                assert np.bincount(path, minlength=count).tolist() == [limit + 1] * count
        assert found.ended.all()


def test_the_limit_frees_a_greedy_scanpath_that_stays():
    model, scene = with_end(lively(), -100.0), Scenes.stack([cells(4, 5)], [7])
    stuck = greedy(model, scene).tolist()[0][0]
    free = greedy(model, scene, max_refixations=0).tolist()[0][0]
    assert len(set(stuck.tolist())) < 12 and len(set(free.tolist())) == 12
    assert behaviour(free)["refixation"] == behaviour(free)["revisit"] == 0


def test_padding_stands_behind_the_end(scenes: Scenes):
    found = sample(with_end(lively(), 1.5), scenes, 50, generator=torch.Generator().manual_seed(0))
    is_pad = found.objects == PAD
    assert is_pad.any() and not (is_pad[..., :-1] & ~is_pad[..., 1:]).any()
    assert found.lengths.unique().numel() > 2
    for scene, paths in enumerate(found.tolist()):
        assert [len(path) for path in paths] == found.lengths[scene].tolist()
    assert found.ended[found.lengths < 12].all()
    # What was drawn can be given to the model as it is.
    logits = lively()(scenes, found.objects.flatten(0, 1), torch.arange(3).repeat_interleave(50))
    assert logits.shape == (150, found.objects.shape[-1] + 1, 21)


def test_the_model_stays_in_the_mode_it_was_in(scenes: Scenes):
    model = lively().train()
    first, second = greedy(model, scenes), greedy(model, scenes)
    assert torch.equal(first.objects, second.objects), "dropout is off"
    assert model.training and model.decoder.training
    with pytest.raises(ValueError, match="larger extent"):
        greedy(model, Scenes.stack([cells(21, 1)], [0]))
    assert model.training


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_hundred_samples_of_eighty_four_objects_in_one_batch():
    model = OAT(OATConfig(appearance="none", extent=(6, 14), depth=1)).eval()
    found = sample(model, Scenes.stack([cells(6, 14)], [40]), 100, max_length=20)
    assert found.objects.shape[:2] == (1, 100) and len({tuple(path) for path in found.tolist()[0]}) > 90


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (20, 25)])
def test_one_object_and_five_hundred(rows: int, columns: int):
    scene = Scenes.stack([cells(rows, columns)], [0])
    for found in (greedy(lively(), scene), sample(lively(), scene, 3), greedy(lively(), scene, max_refixations=0)):
        assert (found.lengths >= 1).all() and found.objects.max() < rows * columns
    if rows == 1:
        assert found.objects.tolist() == [[[0]]]


def test_scenes_of_a_batch_do_not_change_each_other(scenes: Scenes):
    model = with_end(lively(), 1.0)
    alone = [greedy(model, Scenes.stack([cells(*shape)], [t])) for shape, t in (((3, 4), 5), ((2, 2), 0), ((4, 5), 19))]
    together = greedy(model, scenes).tolist()
    for one, path in itertools.zip_longest(alone, together):
        assert one.tolist()[0][0].tolist() == path[0].tolist()


def test_decoded_scanpaths_become_arrays():
    decoded = Decoded(torch.tensor([[[1, 2, PAD], [3, 3, 3]]]), torch.tensor([[True, False]]))
    assert decoded.lengths.tolist() == [[2, 3]]
    assert [[path.tolist() for path in scene] for scene in decoded.tolist()] == [[[1, 2], [3, 3, 3]]]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive and finite; the limit of 0 is `greedy`"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"max_refixations": -1}, "max_refixations=-1 must be at least 0"),
    ],
)
def test_bad_options_are_named(scenes: Scenes, options: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        sample(lively(), scenes, **options)
