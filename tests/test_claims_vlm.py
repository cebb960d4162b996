"""Claims on the small vision-language model: statistics over runs, what tokens are dropped by, figures from answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import vlm as cost
from benchmarks.claims import mma, paired, pruning, scene_vlm, vlm_report, vmtc_cmai
from benchmarks.claims.report import RESULTS, Report, digests
from recipes.scene_questions import KINDS, held_out
from recipes.scene_vlm_model import build_model, build_processor

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "weights" / "scene_vlm"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_comparison_of_runs_draws_runs_and_inputs():
    rng = np.random.default_rng(0)
    of_runs, of_inputs = rng.normal(0, 0.3, (4, 1)), rng.normal(0.5, 2, (1, 60))
    differences = of_runs + of_inputs + rng.normal(0, 1, (4, 60))
    theirs = rng.normal(0, 10, (4, 60))
    found = paired.compare_runs((theirs + differences).tolist(), theirs.tolist())
    drawn = [differences[rng.integers(4, size=4)][:, rng.integers(60, size=60)].mean() for _ in range(20_000)]
    assert found.difference == pytest.approx(differences.mean())
    assert found.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.03)
    assert found.n == 60 and found.better == (differences.mean(0) > 0).sum()
    assert found.p == paired.sign_test(found.better, found.worse)


def test_runs_of_one_and_the_same_model_make_it_no_surer():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 2, (2, 200)).tolist()
    alone, thrice = paired.compare(ours, theirs), paired.compare_runs([ours] * 3, [theirs] * 3)
    assert (alone.n, alone.better, alone.worse, alone.p) == (thrice.n, thrice.better, thrice.worse, thrice.p)
    assert thrice.interval == pytest.approx(alone.interval, abs=0.02)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([[1, 0]], [[1, 0]]), ([[1, 0]] * 2, [[1, 0]] * 3), ([[1, 0], [1]], [[1, 0]] * 2), ([[1]] * 2, [[1]] * 2)],
)
def test_a_comparison_of_runs_wants_the_same_runs_and_inputs(ours: Any, theirs: Any):
    with pytest.raises(ValueError, match="the same runs and inputs"):
        paired.compare_runs(ours, theirs)


def test_averages_are_those_of_rectangles():
    features = torch.randn(2, 64, 3)
    for keep, rows, columns in ((64, 8, 8), (32, 8, 4), (16, 4, 4), (8, 4, 2), (1, 1, 1)):
        grid = features.numpy().reshape(2, rows, 8 // rows, columns, 8 // columns, 3)
        expected = grid.mean((2, 4)).reshape(2, keep, 3)
        assert np.allclose(pruning.pooled(features, keep).numpy(), expected, atol=1e-6)
    for keep in (12, 3, 128):
        with pytest.raises(ValueError, match="power of two"):
            pruning.pooled(features, keep)


def test_tokens_kept_at_random_are_others_for_each_picture_and_stay_in_order():
    features = torch.arange(64.0)[None, :, None].expand(3, 64, 2)
    kept = pruning.kept_at_random(features, 16, torch.Generator().manual_seed(0))[..., 0]
    assert kept.shape == (3, 16) and bool((kept.diff(dim=1) > 0).all())
    assert len({tuple(row.tolist()) for row in kept}) == 3
    again = pruning.kept_at_random(features, 16, torch.Generator().manual_seed(0))[..., 0]
    assert torch.equal(kept, again)


@pytest.fixture(scope="module")
def model() -> scene_vlm.Model:
    """As the recipe makes it, before training; its words differ enough to tell attention apart."""
    torch.manual_seed(0)
    processor = build_processor()
    network = build_model(processor).eval()
    for weight in network.parameters():
        if weight.ndim == 2:
            weight.data *= 3
    return scene_vlm.Model(network, processor)


@pytest.fixture(scope="module")
def asked(model: scene_vlm.Model) -> dict[str, Any]:
    """Questions of different lengths, padded."""
    ((_, inputs),) = scene_vlm.batches(model, held_out(8, 0))
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 2
    return inputs


def _generated(model: scene_vlm.Model, inputs: dict[str, Any]) -> Tensor:
    """Logits of four tokens, `[4, B, V]`."""
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    network: Any = model.network
    out = network.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    return torch.stack(list(out.logits))


def test_fastv_that_keeps_all_is_the_model(model: scene_vlm.Model, asked: dict[str, Any]):
    with pruning.fastv(model.network, 64):
        kept = _generated(model, asked)
    assert torch.equal(kept, _generated(model, asked))
    assert not any(module._forward_pre_hooks for module in model.network.modules())


def test_fastv_drops_what_the_last_token_attends_to_least(model: scene_vlm.Model, asked: dict[str, Any]):
    network: Any = model.network
    row = {name: own[:1] for name, own in asked.items()}  # the first need not be padded
    start = int(row["attention_mask"].argmax())
    row |= {name: row[name][:, start:] for name in ("input_ids", "attention_mask")}
    image = row["input_ids"] == network.config.image_token_id
    network.set_attn_implementation("eager")
    attention = network(**row, output_attentions=True).attentions[1]  # of the second layer
    network.set_attn_implementation("sdpa")
    paid = attention[0, :, -1].mean(0).masked_fill(~image[0], 2)
    dropped = paid.argsort()[: 64 - 8]

    def close(_layer: Any, _args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        length = image.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[:, dropped] = False
        seen[range(length), range(length)] = True
        return _args, {**kwargs, "attention_mask": seen[None, None]}

    layers = network.model.language_model.layers[2:]
    hooks = [layer.register_forward_pre_hook(close, with_kwargs=True) for layer in layers]
    expected = network(**row).logits[:, -1]
    for hook in hooks:
        hook.remove()
    with pruning.fastv(network, 8):
        found = network(**row, use_cache=True)
    assert torch.allclose(found.logits[:, -1], expected, atol=1e-4)
    lengths = [layer.get_seq_length() for layer in found.cache.layers]
    assert lengths == [image.shape[1]] * 2 + [image.shape[1] - 56] * 2


def test_fastv_answers_a_padded_question_as_it_does_alone(model: scene_vlm.Model, asked: dict[str, Any]):
    with pruning.fastv(model.network, 8):
        together = _generated(model, asked)
        for i in range(3):
            length = int(asked["attention_mask"][i].sum())
            row = {n: asked[n][i : i + 1] for n in asked}
            row |= {name: row[name][:, -length:] for name in ("input_ids", "attention_mask")}
            assert torch.allclose(_generated(model, row)[:, 0], together[:, i], atol=1e-4)


def test_fewer_features_get_as_many_placeholders(model: scene_vlm.Model, asked: dict[str, Any]):
    everything = pruning.with_fewer(model.network, asked, lambda features: features)
    assert torch.equal(_generated(model, everything), _generated(model, asked))
    fewer = pruning.with_fewer(model.network, asked, lambda features: pruning.pooled(features, 8))
    ids, mask = fewer["input_ids"], fewer["attention_mask"]
    image = model.network.config.image_token_id
    assert ids.shape == (8, asked["input_ids"].shape[1] - 56) == mask.shape
    for row, kept, whole in zip(ids.tolist(), mask.tolist(), asked["input_ids"].tolist(), strict=True):
        assert row.count(image) == 8
        assert [i for i in row if i != image] == [i for i in whole if i != image]
        assert kept.count(0) == row.count(model.processor.tokenizer.pad_token_id)


def test_answers_are_judged_by_the_questions(model: scene_vlm.Model):
    examples = held_out(4, 0)
    replies = iter([examples[0].question.reply, "no idea", examples[2].question.answer, ""])
    processor = model.processor
    judged = scene_vlm.Model(model.network, _Saying(processor, replies))
    found = scene_vlm.answers(judged, examples, scene_vlm.Method("plain"))
    assert [own.right for own in found] == [True, False, True, False]
    assert found[0].follows and not found[1].follows and not found[3].follows


class _Saying:
    """A processor whose model says what it is told to."""

    def __init__(self, processor: Any, replies: Any) -> None:
        self.processor, self.replies = processor, replies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def batch_decode(self, tokens: Tensor, **_: Any) -> list[str]:
        return [next(self.replies) for _ in tokens]


def _made_up(rates: dict[str, float], runs: int = 3, inputs: int = 400) -> dict[str, list[list[scene_vlm.Answer]]]:
    rng = np.random.default_rng(0)
    return {
        name: [[scene_vlm.Answer(bool(rng.random() < rate), True) for _ in range(inputs)] for _ in range(runs)]
        for name, rate in rates.items()
    }


def test_claims_have_the_direction_of_what_was_found():
    results = _made_up({"a": 0.6, "b": 0.4, "c": 0.6})
    pairs = [
        vlm_report.Pair("a over b", "", "right", "a", "b"),
        vlm_report.Pair("b over a", "", "right", "b", "a"),
        vlm_report.Pair("b under a", "", "right", "b", "a", -1),
        vlm_report.Pair("a over c", "", "right", "a", "c"),
        vlm_report.Pair("a follows more", "", "follows", "a", "b"),
    ]
    claims = vlm_report.claims(results, pairs, (0, 2))
    nothing = "not shown at this scale"
    assert [claim.verdict for claim in claims] == ["shown", "contradicted", "shown", nothing, nothing]
    for claim in claims:
        assert claim.interval[0] <= claim.difference <= claim.interval[1]
        assert claim.n == 400 and claim.seeds == (0, 2)


def test_a_difference_that_one_run_alone_makes_is_not_shown():
    results = _made_up({"theirs": 0.5})
    results["ours"] = [[scene_vlm.Answer(True, True)] * 400, *results["theirs"][1:]]
    (claim,) = vlm_report.claims(results, [vlm_report.Pair("", "", "right", "ours", "theirs")], (0, 2))
    assert claim.p < 1e-6 and claim.verdict == "not shown at this scale"


def test_answers_survive_their_file(tmp_path: Path):
    examples = held_out(16, 3)
    asked = [scene_vlm.Asked.of(i, example) for i, example in enumerate(examples)]
    rng = np.random.default_rng(0)
    results = {
        name: [[scene_vlm.Answer(*map(bool, rng.integers(0, 2, 2))) for _ in asked] for _ in range(3)] for name in "ab"
    }
    scene_vlm.save_results(asked, results, tmp_path / "answers.csv")
    assert scene_vlm.load_results(tmp_path / "answers.csv") == (asked, results)


def test_the_setting_with_most_hits_is_chosen_and_of_equals_the_first():
    tried = [vmtc_cmai.Tried(setting, hits, 9) for setting, hits in zip(vmtc_cmai.GRID, (3, 5, 5, 1), strict=False)]
    assert vmtc_cmai.choose(tried) == vmtc_cmai.GRID[1]
    assert vmtc_cmai.GRID[0] == vmtc_cmai.Setting() and len(set(vmtc_cmai.GRID)) == 12


def test_the_cache_of_the_large_model_is_what_its_shape_says():
    rows = cost.arithmetic()
    for row in rows:
        assert row["cache_bytes"] == 2 * 2 * 32 * 4096 * (row["tokens"] + 64)
        linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * row["length"] + 4096 * 32064
        attention = 32 * 2 * 4096 * row["length"] ** 2
        assert row["tflops"] == pytest.approx(2 * (linear + attention) / 1e12, rel=1e-3)
    assert [row["tokens"] for row in rows] == [576, 288, 144, 72]


def _weights_match(report: Report, masks: tuple[str, ...]) -> None:
    for mask in masks:
        for name, digest in digests(SHIPPED / mask).items():
            assert report.details["weights"][f"seed0/{mask}/{name}"] == digest


def test_the_claims_of_mma_follow_from_its_answers_and_are_of_the_models_that_ship():
    report = Report.load(RESULTS / "mma.json")
    asked, results = scene_vlm.load_results(RESULTS / "mma.csv")
    assert len(asked) == mma.QUESTIONS and list(results) == list(mma.METHODS)
    assert all(sum(own.kind == kind for own in asked) == mma.QUESTIONS / len(KINDS) for kind in KINDS)
    assert asked[:40] == [scene_vlm.Asked.of(i, e) for i, e in enumerate(held_out(40, mma.QUESTION_SEED))]
    made = mma.report(asked, results, report.details["weights"], report.machine)
    assert made == report
    _weights_match(report, ("causal", "mma"))


def test_the_claims_of_vmtc_and_cmai_follow_from_their_answers_and_are_of_the_model_that_ships(tmp_path: Path):
    report = Report.load(RESULTS / "vmtc_cmai.json")
    asked, results = scene_vlm.load_results(RESULTS / "vmtc_cmai.csv")
    details = report.details
    tried = [vmtc_cmai.tried_of(own) for own in details["tried"]]
    assert [own.setting for own in tried] == list(vmtc_cmai.GRID)
    assert list(results) == list(vmtc_cmai.methods(vmtc_cmai.choose(tried))) == list(details["cost"])
    made = vmtc_cmai.report(asked, results, tried, details["cost"], details["weights"], report.machine)
    made.save(tmp_path / "made.json")  # which has lists where there are tuples
    assert Report.load(tmp_path / "made.json") == report
    assert results["VMTC 1"] == results[vmtc_cmai.PLAIN]
    assert scene_vlm.load_results(RESULTS / "mma.csv")[1][mma.CAUSAL] == results[vmtc_cmai.PLAIN]
    for keep, tokens in vmtc_cmai.KEEP.items():
        assert details["cost"][f"VMTC {keep}"]["image_tokens"] <= tokens
        assert details["cost"][f"FastV {keep}"]["image_tokens"] == (64 + tokens) / 2
    _weights_match(report, ("causal",))
