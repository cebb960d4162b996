"""The networks and operators against numbers of the authors' own code, under weights that anybody can make again.

Tolerances follow the rounding that each file states: the authors' fp32 against their fp64. Thirty times that is still
an order of magnitude below what any mistake tried on the authors' code (a head, the scale, top-k, offset order) moves.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from parity import rule
from torch import Tensor, nn

from vision import biformer, litv2

# `litv2_base` and `litv2_base_384` follow one another: they have the same weights, which take a second to draw.
MODELS = [
    "biformer_tiny",
    "biformer_small",
    "biformer_base",
    "biformer_stl",
    "biformer_stl_nchw",
    "litv2_small",
    "litv2_medium",
    "litv2_base",
    "litv2_base_384",
]


@lru_cache(maxsize=1)
def weights_for(entries: tuple) -> dict[str, Tensor]:
    return rule.state_dict(dict(entries))


def official(name: str) -> dict[str, Tensor]:
    """A filled state dict under the authors' names."""
    entries = rule.load(name)["state_dict"]
    return weights_for(tuple((entry, tuple(shape)) for entry, shape in entries.items()))


def converter(name: str) -> Any:
    return (biformer if name.startswith("biformer") else litv2).checkpoint_filter_fn


def build(name: str) -> Any:
    """A registered network with the rule's weights, from a file as the authors publish it: nested under "model"."""
    model = timm.create_model(name, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(converter(name)({"model": official(name)}, model), strict=True)
    return model


def taps(name: str, model: Any, x: Tensor) -> dict[str, Tensor]:
    """The features at the points that the files name, all as the authors' tensors lie: `[B, C, H, W]`."""
    seen: dict[str, Tensor] = {}

    def keep(key: str, channels_last: bool) -> Any:
        return lambda _module, _args, out: seen.update({key: out.permute(0, 3, 1, 2) if channels_last else out})

    with ExitStack() as hooks:

        def listen(module: nn.Module, key: str, channels_last: bool = False) -> None:
            hooks.callback(module.register_forward_hook(keep(key, channels_last)).remove)

        if name.startswith("biformer"):
            listen(model.downsample_layers[0], "stem")
        else:
            listen(model.patch_embed, "stem", channels_last=True)
            for i in range(3):
                listen(model.layers[i].downsample, f"merge{i}", channels_last=True)
        final, stages = model.forward_intermediates(x)
    seen.update({f"stage{i}": stage for i, stage in enumerate(stages)})
    return {**seen, "norm": final, "pooled": model.forward_head(final, pre_logits=True)}


def assert_logits_match(logits: Tensor, golden: dict[str, Any]) -> None:
    assert list(logits.shape) == golden["shape"]
    assert logits.argmax(1).tolist() == golden["argmax"]
    atol = 30 * golden["rounding"]
    torch.testing.assert_close(logits[0, :16], torch.tensor(golden["first16"]), rtol=1e-3, atol=atol)
    logits = logits.double()
    # a sum of n values: the rounding of each adds up, at worst
    assert logits.sum().item() == pytest.approx(golden["sum"], rel=1e-3, abs=atol * logits.numel() ** 0.5)
    assert logits.norm().item() == pytest.approx(golden["l2"], rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_network_equals_the_authors(name: str):
    golden = rule.load(name)
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    x = rule.inputs(**golden["input"])
    with torch.inference_mode():
        features = taps(name, model, x)
        logits = model.forward_head(features["norm"])
    assert set(features) == set(golden["features"])
    for key, feature in features.items():
        rule.assert_matches(feature, golden["features"][key], f"{name}, {key}")
    assert_logits_match(logits, golden["logits"])


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw", "litv2_small"])
def test_training_path_equals_the_authors(name: str):
    """With gradients on, no layer takes a short cut that is for inference alone."""
    golden = rule.load(name)
    logits = build(name)(rule.inputs(**golden["input"]))
    assert logits.requires_grad
    assert_logits_match(logits.detach(), golden["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_official_state_dict_loads_nested_or_bare_and_a_saved_one_again(name: str):
    state_dict = official(name)
    model = timm.create_model(name, device="meta")
    own = {key: value.shape for key, value in model.state_dict().items()}
    for source in (state_dict, {"model": state_dict, "epoch": 299}):
        converted = converter(name)(source, model)
        assert {key: value.shape for key, value in converted.items()} == own, "strict: every entry, and no other"
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(converted.values(), state_dict.values(), strict=True))
        again = converter(name)(converted, model)
        assert list(again) == list(converted), "a state dict of ours passes through"


def test_a_foreign_entry_is_not_swallowed():
    model = timm.create_model("litv2_small", device="meta")
    state_dict = {**official("litv2_small"), "stranger.weight": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"stranger\.weight"):
        model.load_state_dict(litv2.checkpoint_filter_fn({"model": state_dict}, model), assign=True)


OPERATORS = rule.load("operators")


def operator(key: str, module: nn.Module) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The operator with the rule's weights, its input, and the numbers to reach."""
    golden = OPERATORS[key]
    state_dict = rule.state_dict(golden["state_dict"])
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    module.load_state_dict({name: value.reshape(shapes[name]) for name, value in state_dict.items()})
    return module.eval(), rule.inputs(**golden["input"]), golden


@torch.inference_mode()
def test_bra_equals_the_authors():
    kwargs = OPERATORS["bra_legacy_topk4"]["kwargs"]
    bra, x, golden = operator("bra_legacy_topk4", biformer.BiLevelRoutingAttention(**kwargs))
    rule.assert_matches(bra(x), golden["output"], "BRA")
    index = bra.route(bra.qkv(x)).sort(-1).values
    assert index[0, :6].tolist() == golden["routed_regions_first6_rows_of_sample0_sorted"]
    assert index[1, -1].tolist() == golden["routed_regions_last_row_of_sample1_sorted"]


@torch.inference_mode()
def test_bra_nchw_equals_the_authors():
    kwargs = OPERATORS["bra_nchw_topk4"]["kwargs"]
    bra, x, golden = operator("bra_nchw_topk4", biformer.BiLevelRoutingAttentionNCHW(**kwargs))
    rule.assert_matches(bra(x.permute(0, 3, 1, 2)), golden["output"], "BRA, second form")


@torch.inference_mode()
def test_attention_lepe_equals_the_authors():
    attn, x, golden = operator("attention_lepe_7x7", biformer.AttentionLePE(dim=512, side_dwconv=5))
    rule.assert_matches(attn(x), golden["output"], "AttentionLePE")


@torch.inference_mode()
def test_attention_lepe_on_values_equals_the_authors():
    module = biformer.AttentionLePE(dim=512, side_dwconv=5, lepe_on="v")
    attn, x, golden = operator("attention_lepe_nchw_7x7", module)
    rule.assert_matches(attn(x).permute(0, 3, 1, 2), golden["output"], "AttentionLePE on v")


@pytest.mark.parametrize("key", ["hilo_alpha0.5_14x14", "hilo_alpha0.9_14x14"])
@torch.inference_mode()
def test_hilo_equals_the_authors(key: str):
    hilo, x, golden = operator(key, litv2.HiLo(**OPERATORS[key]["kwargs"]))
    rule.assert_matches(hilo(x), golden["output"], key)


@torch.inference_mode()
def test_deformable_token_merging_equals_the_authors():
    merge, x, golden = operator("dtm_14x14", litv2.DeformableTokenMerging(96))
    x = x.unflatten(1, (14, 14))
    offset = merge.dconv.conv_offset(x.permute(0, 3, 1, 2))
    rule.assert_matches(offset, golden["offset"], "offsets")
    rule.assert_matches(merge(x).flatten(1, 2), golden["output"], "DeformableTokenMerging")
