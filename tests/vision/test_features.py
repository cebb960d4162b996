"""Intermediate features, pruning and gradient checkpointing, on small networks of each layout."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from test_timm_contract import create, images, small
from torch import nn

SELECTIONS = [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), ((1,), [1])]


@small
@pytest.mark.parametrize(("indices", "stages"), SELECTIONS)
@torch.no_grad()
def test_forward_intermediates(small: str, indices: int | list[int] | None, stages: list[int]):
    model = create(small).eval()
    x = images(2, 3, 64, 96)
    all_maps = model.forward_intermediates(x, intermediates_only=True)
    final, maps = model.forward_intermediates(x, indices=indices)
    torch.testing.assert_close(final, model.forward_features(x))
    for stage, chosen in zip(stages, maps, strict=True):
        info = model.feature_info[stage]
        assert chosen.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
        torch.testing.assert_close(chosen, all_maps[stage])
    channels_last = model.forward_intermediates(x, indices=indices, output_fmt="NHWC", intermediates_only=True)
    for a, b in zip(channels_last, maps, strict=True):
        torch.testing.assert_close(a, b.permute(0, 2, 3, 1))


@small
@torch.no_grad()
def test_norm_fits_the_last_stage_alone(small: str):
    model = create(small).eval()
    x = images()
    plain = model.forward_intermediates(x, intermediates_only=True)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    for a, b in zip(plain[:3], normed[:3], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(normed[3], model.forward_features(x))
    torch.testing.assert_close(model.norm(plain[3]), normed[3])


@small
@torch.no_grad()
def test_stop_early_computes_nothing_past_the_last_stage_asked_for(small: str):
    model = create(small).eval()
    x = images()
    expected = model.forward_intermediates(x, intermediates_only=True)
    ran = []
    for i in range(4):
        model.stage_blocks(i).register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    last, (chosen,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    torch.testing.assert_close(chosen, expected[1])
    torch.testing.assert_close(last, expected[1])
    assert set(ran) == {0, 1}
    ran.clear()
    final, _ = model.forward_intermediates(x, indices=[1])
    torch.testing.assert_close(final, model.norm(expected[3]))
    assert set(ran) == {0, 1, 2, 3}


@small
def test_wrong_layout_and_wrong_index_are_refused(small: str):
    model = create(small).eval()
    with pytest.raises(ValueError, match=r"output_fmt='NLC': expected 'NCHW' or 'NHWC'"):
        model.forward_intermediates(images(), output_fmt="NLC")
    with pytest.raises((ValueError, AssertionError)):
        model.forward_intermediates(images(), indices=[4])


@small
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,), (-2, -1)])
@torch.no_grad()
def test_features_only(small: str, out_indices: tuple[int, ...]):
    model = create(small).eval()
    features = create(small, features_only=True, out_indices=out_indices).eval()
    kept = {k: v for k, v in model.state_dict().items() if f"model.{k}" in features.state_dict()}
    features.load_state_dict({f"model.{k}": v for k, v in kept.items()})
    x = images()
    expected = model.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
    for a, b, channels in zip(features(x), expected, features.feature_info.channels(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.shape[1] == channels
    assert not any("head" in name for name in features.state_dict())


@small
@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
@torch.no_grad()
def test_other_feature_extractors_of_timm_see_the_same_maps(small: str, feature_cls: str):
    torch.manual_seed(1)
    model = create(small).eval()
    torch.manual_seed(1)
    features = create(small, features_only=True, feature_cls=feature_cls).eval()
    x = images()
    expected = model.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(features(x), expected, strict=True):
        # the module that a hook or a graph listens to may work channels-last
        torch.testing.assert_close(a if a.shape == b.shape else a.permute(0, 3, 1, 2), b)


@small
@pytest.mark.parametrize("indices", [[0], [1], [0, 2], [3], 2])
@pytest.mark.parametrize("prune_norm", [False, True])
def test_pruning(small: str, indices: list[int] | int, prune_norm: bool):
    model = create(small, drop_rate=0.5).eval()
    x = images()
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    pruned = copy.deepcopy(model)
    kept = pruned.prune_intermediate_layers(indices, prune_norm=prune_norm)
    assert list(kept) == ([2, 3] if indices == 2 else indices)
    maps = pruned.forward_intermediates(x, indices=kept, intermediates_only=True)
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert pruned.num_stages == len(pruned.feature_info) == max(kept) + 1
    assert isinstance(pruned.get_classifier(), nn.Identity) and pruned.num_classes == 0
    assert pruned.num_features == model.feature_info[max(kept)]["num_chs"]
    pruned.train()
    features = pruned.forward_intermediates(x, indices=kept, norm=not prune_norm, intermediates_only=True)
    sum(f.sum() for f in features).backward()
    unused = [n for n, p in pruned.named_parameters() if p.grad is None]
    assert unused == [], "a distributed run stops at a parameter without a gradient"


@small
@torch.no_grad()
def test_pruning_nothing_keeps_the_output(small: str):
    model = create(small).eval()
    x = images()
    expected = model(x)
    model.prune_intermediate_layers([3], prune_head=False)
    torch.testing.assert_close(model(x), expected)


@small
@torch.no_grad()
def test_a_pruned_network_is_a_network(small: str):
    """It can get a classifier of its own, as wide as its last stage."""
    model = create(small).eval()
    x = images()
    expected = model.forward_intermediates(x, intermediates_only=True)[1]
    model.prune_intermediate_layers([1])
    torch.testing.assert_close(model.forward_features(x), expected)
    model.reset_classifier(6, "avg")
    assert model(x).shape == (2, 6)


@small
@pytest.mark.parametrize("features_only", [False, True])
def test_gradient_checkpointing_changes_no_gradient(small: str, features_only: bool):
    model = create(small, features_only=features_only).train()
    twin = copy.deepcopy(model)
    (twin.model if features_only else twin).set_grad_checkpointing()
    x = images()

    def gradients(network: nn.Module) -> dict[str, torch.Tensor | None]:
        out = network(x)
        sum(o.square().mean() for o in (out if features_only else [out])).backward()
        return {n: p.grad for n, p in network.named_parameters()}

    plain, checkpointed = gradients(model), gradients(twin)
    assert None not in [*plain.values(), *checkpointed.values()]
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=lambda m, name=name: f"{name}: {m}")


@small
def test_gradient_checkpointing_keeps_fewer_activations(small: str):
    model = create(small).train()
    x = images()

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(x)
        return sum(sizes)

    plain = kept()
    model.set_grad_checkpointing()
    assert kept() < 0.6 * plain
    model.set_grad_checkpointing(False)
    assert kept() == plain


def test_a_backbone_in_two_parts_equals_the_whole():
    """A detector may run the stages one by one."""
    model = timm.create_model("biformer_nano").eval()
    x = images()
    with torch.no_grad():
        y = x
        for i in range(model.num_stages):
            y = model.forward_stage(i, y)
        torch.testing.assert_close(model.forward_head(model.norm(y)), model(x))
