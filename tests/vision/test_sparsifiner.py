"""Sparsifiner against slow, obvious references, its paths against each other, and its networks as timm models."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from parity import rule
from test_export import DYNAMIC_BATCH, traced
from timm.models import get_model_input_config, save_for_hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vision.attention import record_attention
from vision.sparsifiner import (
    ConnectivityPredictor,
    SparsifinerAttention,
    SparsifinerCriterion,
    blockwise,
    checkpoint_filter_fn,
    connectivity,
    record_connectivity,
    top_k_mask,
)

DEIT, LVVIT = "sparsifiner_deit_tiny_patch16_224", "sparsifiner_lvvit_small"
NAMES = [
    "sparsifiner_deit_base_patch16_224",
    "sparsifiner_deit_base_patch16_384",
    "sparsifiner_deit_small_patch16_224",
    "sparsifiner_deit_small_patch16_384",
    "sparsifiner_deit_tiny_patch16_224",
    "sparsifiner_deit_tiny_patch16_384",
    "sparsifiner_lvvit_medium",
    "sparsifiner_lvvit_medium_384",
    "sparsifiner_lvvit_small",
    "sparsifiner_lvvit_small_384",
]
SIZE = (96, 64)  # 6 x 4 patches
both = pytest.mark.parametrize("name", [DEIT, LVVIT])


def small(name: str = DEIT, **kwargs: Any) -> Any:
    """A little network whose scores and logits are spread enough to tell one choice of keys from another."""
    defaults = {"img_size": SIZE, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10, "coef_top_k": 2}
    model = timm.create_model(name, **{**defaults, **kwargs})
    return spread(model).eval()


def dense_deit() -> Any:
    """timm's own network under `small()`."""
    sizes = {"img_size": SIZE, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", **sizes).eval()


def spread(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3 if "mask_predictor" in name else parameter[0].numel() ** -0.5)
    return module


def images(batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size)


def reference_scores(p: ConnectivityPredictor, q: np.ndarray, k: np.ndarray, coef_top_k: int) -> np.ndarray:
    """One head, queries and keys `[N, d]`, query by query."""
    weights = {name: value.detach().numpy() for name, value in p.state_dict().items()}
    basis = np.abs(weights["proj_back_n"]).T
    basis[basis <= p.basis_threshold] = 0
    reduced_k = (k @ weights["proj_c_k.weight"].T + weights["proj_c_k.bias"]).T @ weights["proj_n"]  # [c, rank]
    rows = []
    for query in q[1:]:
        logits = (weights["proj_c_q.weight"] @ query + weights["proj_c_q.bias"]) @ reduced_k * p.scale
        coef = np.exp(logits) / np.exp(logits).sum()
        coef[np.argsort(coef)[: len(coef) - coef_top_k]] = 0
        rows.append(coef @ basis)
    return np.stack(rows)


def reference_attention(attn: SparsifinerAttention, x: np.ndarray, coef_top_k: int) -> np.ndarray:
    """One image, `[N, C]`, query by query."""
    w = {name: value.detach().numpy() for name, value in attn.state_dict().items()}
    qkv = (x @ w["qkv.weight"].T + w["qkv.bias"]).reshape(len(x), 3, attn.num_heads, -1)
    heads = []
    for h in range(attn.num_heads):
        q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
        scores = reference_scores(attn.mask_predictor, q, k, coef_top_k)
        out = []
        for i, query in enumerate(q):
            keys = np.arange(len(k)) if i == 0 else np.argsort(scores[i - 1])[-attn.budget() :]
            e = np.exp(k[keys] @ query * attn.scale)
            out.append(e / e.sum() @ v[keys])
        heads.append(np.stack(out))
    return np.concatenate(heads, -1) @ w["proj.weight"].T + w["proj.bias"]


def attention(**kwargs: Any) -> SparsifinerAttention:
    defaults = {"dim": 24, "num_heads": 3, "num_tokens": 31, "qkv_bias": True, "coef_top_k": 3}
    attn = spread(SparsifinerAttention(**{**defaults, **kwargs})).double().eval()
    nn.init.normal_(attn.mask_predictor.proj_c_q.bias)
    nn.init.normal_(attn.mask_predictor.proj_c_k.bias)
    return attn  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("path", ["masked", "gather"])
@pytest.mark.parametrize("keep_rate", [0.02, 0.25, 0.7])
def test_attention_equals_a_loop_over_queries(path: Any, keep_rate: float):
    attn = attention(attention_path=path, keep_rate=keep_rate)
    x = torch.randn(2, 31, 24, dtype=torch.float64)
    expected = np.stack([reference_attention(attn, image, 3) for image in x.numpy()])
    np.testing.assert_allclose(attn(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    with torch.inference_mode():
        np.testing.assert_allclose(attn(x).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["masked", "gather"])
def test_gradients_are_those_of_attention_to_the_chosen_keys(path: Any):
    """The choice is fixed: no gradient comes of it."""
    attn = attention(attention_path=path)
    x = torch.randn(1, 31, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 31, 24, dtype=torch.float64)
    (ours,) = torch.autograd.grad(attn(x), x, upstream)
    q, k, v = attn.heads(x)
    mask = attn.connectivity(q, k)
    logits = torch.where(mask, q @ k.mT * attn.scale, -torch.inf)
    out = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(1, 31, 24))
    (expected,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_scores_are_the_coefficients_by_the_basis_and_differentiable():
    predictor = spread(ConnectivityPredictor(25, 2, 8, coef_top_k=2)).double()
    q, k = (torch.randn(1, 2, 25, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scores = predictor(q, k)
    expected = [
        reference_scores(predictor, a, b, 2) for a, b in zip(q[0].detach().numpy(), k[0].detach().numpy(), strict=True)
    ]
    np.testing.assert_allclose(scores[0].detach().numpy(), expected, rtol=1e-9)
    coef = predictor.coefficients(q, k)
    assert ((coef > 0).sum(-1) == 2).all() and predictor.rank == 4
    torch.testing.assert_close(predictor.coefficients(q, k, raw=True).sum(-1), torch.ones(1, 2, 24).double())
    assert torch.equal(predictor.basis(raw=True), predictor.proj_back_n.T) and (predictor.basis() >= 0).all()
    assert torch.autograd.gradcheck(lambda q, k: predictor(q, k, raw=True), (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_top_k_mask_keeps_k_whatever_is_equal(dtype: torch.dtype, k: int):
    x = torch.randn(4, 3, 12, dtype=dtype)
    x[1] = 0.5
    x[2, :, ::2] = x[2, :, 1::2]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            mask = top_k_mask(x, k)
        assert mask.dtype == torch.bool and (mask.sum(-1) == k).all()
        smallest_kept = x.masked_fill(~mask, torch.inf).amin(-1)
        assert (x.masked_fill(mask, -torch.inf).amax(-1) <= smallest_kept).all()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"keep_rate": 1.0},
        {"keep_rate": 0.01},
        {"share_proj": True},
        {"coef_top_k": 0},
        {"coef_top_k": 99},
        {"rank": 1},
        {"prune_at": [1, 2], "token_keep_rate": 0.6},
        {"prune_at": [1, 2], "token_keep_rate": 0.6, "prune_query_rows": True},
    ],
)
def test_paths_give_the_same(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """With gradients the plain operations run, without them those that go block by block, here of 4 queries."""
    model = small(**kwargs).double()
    monkeypatch.setattr(blockwise, "_SCORES_AT_ONCE", 4 * 25)
    x = images().double()
    expected = model(x)
    assert expected.requires_grad
    for path in ("masked", "gather", "auto"):
        model.set_attention_path(path)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10, msg=path)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected.detach(), rtol=1e-9, atol=1e-10, msg=path)


@pytest.mark.parametrize("path", ["masked", "gather"])
def test_a_predictor_that_cannot_tell_keys_apart_still_keeps_the_budget(path: Any):
    model = small(attention_path=path)
    for attn in model.attention_layers():
        nn.init.zeros_(attn.mask_predictor.proj_back_n)
    with torch.no_grad():
        assert model(images()).isfinite().all()
    with record_connectivity(model) as layers, torch.no_grad():
        model(images())
    assert all((layer.mask[:, :, 1:].sum(-1) == 7).all() for layer in layers), "ceil(25 / 4)"


def test_auto_gathers_few_of_many_keys():
    for num_tokens, keep_rate, gathers in ((197, 0.05, False), (577, 0.1, True), (577, 0.25, False), (2305, 0.1, True)):
        attn = SparsifinerAttention(16, 2, num_tokens, keep_rate=keep_rate, device="meta")
        assert attn._gathers(attn.budget()) == gathers


def test_keep_all_equals_dense_and_dense_equals_timm():
    model = small(keep_rate=1.0)
    x = images()
    deit = dense_deit()
    deit.load_state_dict({n: t for n, t in model.state_dict().items() if ".mask_predictor." not in n})
    with torch.no_grad():
        expected = deit(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        model.set_attention_path("dense")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_query_without_keys_gets_nothing():
    attn = attention(score_threshold=1e9)
    x = torch.randn(2, 31, 24, dtype=torch.float64)
    with torch.no_grad():
        out = attn(x)
        torch.testing.assert_close(out[:, 1:], attn.proj.bias.expand(2, 30, -1))
        assert not torch.allclose(out[:, 0], attn.proj.bias.expand(2, -1)), "the class token attends to all"


def test_pruning_leaves_rows_of_zeros_and_the_budget_as_it_is():
    model = small(prune_at=[1, 3], token_keep_rate=0.5)
    x = images(3)
    with torch.no_grad():
        first = model(x)
        maps = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert [int((m[0] != 0).any(-1).sum()) for m in maps] == [24, 12, 12, 3], "r after 2 of 4 quarters, r³ at last"
        assert torch.equal(model(x), first) and {attn.budget() for attn in model.attention_layers()} == {7}
        torch.testing.assert_close(torch.cat([model(image) for image in x.split(1)]), first, rtol=1e-4, atol=1e-5)


@both
def test_every_parameter_gets_a_gradient_of_zero_where_none_comes(name: str):
    model = small(name).train()
    model(images()).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        untaught = ".mask_predictor." in parameter_name or parameter_name.startswith("aux_head")
        assert bool((parameter.grad == 0).all()) == untaught, parameter_name
        if ".mask_predictor." in parameter_name:
            assert parameter_name in model.no_weight_decay(), "zeros and decay would wear it away"


def test_connectivity_is_recorded_and_listening_ends():
    model = small()
    x = images()
    with torch.no_grad():
        expected = model(x)
        with record_connectivity(model) as layers:
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(layers) == 4 and all(attn.recorder is None for attn in model.attention_layers())
    for layer in layers:
        assert layer.mask.shape == (2, 2, 25, 25) and layer.mask[:, :, 0].all()
        torch.testing.assert_close(layer.attn.sum(-1), torch.ones(2, 2, 25))
        assert (layer.attn[~layer.mask] == 0).all()
        torch.testing.assert_close(layer.dense_attn.sum(-1), torch.ones(2, 2, 25))
    with pytest.raises(ValueError, match="Linear has no SparsifinerAttention"), record_connectivity(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("path", ["auto", "gather", "dense"])
def test_attention_maps_can_be_had(path: str):
    model = small(attention_path=path)
    with record_attention(model) as maps, torch.no_grad():
        model(images())
    assert list(maps) == [f"blocks.{i}.attn" for i in range(4)]
    for (layer,) in maps.values():
        assert layer.key_grid == (6, 4) and layer.attn.shape == (2, 2, 25, 25)
        assert ((layer.attn[:, :, 1:] > 0).sum(-1) == (25 if path == "dense" else 7)).all()


def test_the_keys_of_a_patch():
    model = small().train()
    x = images()
    keys = connectivity(model, x, (5, 3))
    assert keys.shape == (2, 4, 2, 6, 4) and keys.dtype == torch.bool and model.training
    model.eval()
    with record_connectivity(model) as layers, torch.no_grad():
        model(x)
    assert torch.equal(keys[:, 2].flatten(2), layers[2].mask[:, :, -1, 1:])
    for query in ((6, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match=r"expected a row from 0 to 5 and a column from 0 to 3"):
            connectivity(model, x, query)


def test_weights_of_a_dense_network_leave_the_predictors_as_they_are():
    model = small()
    deit = timm.create_model("deit_tiny_patch16_224", img_size=SIZE, embed_dim=32, depth=4, num_heads=2, num_classes=10)
    predictor = copy.deepcopy(model.blocks[1].attn.mask_predictor.state_dict())
    model.load_state_dict(checkpoint_filter_fn({"model": deit.state_dict()}, model), strict=True)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, deit.blocks[1].mlp.fc1.weight)
    for name, tensor in model.blocks[1].attn.mask_predictor.state_dict().items():
        assert torch.equal(tensor, predictor[name])
    foreign = {**deit.state_dict(), "stranger": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="stranger"):
        model.load_state_dict(checkpoint_filter_fn(foreign, model), strict=True)


def test_a_checkpoint_of_another_image_size_is_resampled():
    source = small(img_size=64, rank=3)
    target = small(rank=3)
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target), strict=True)
    source.set_input_size(SIZE)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x))
    with pytest.raises(ValueError, match=r"proj_n has rank 3, the network 4; build it with rank=3"):
        checkpoint_filter_fn(source.state_dict(), small())


def test_resampling_keeps_what_is_smooth():
    """Constant over the image: the basis stays, and the sum over tokens, which is 4 times as many of a quarter."""
    predictor = ConnectivityPredictor(1 + 6, 2, 8, rank=2)
    with torch.no_grad():
        predictor.proj_n.copy_(torch.tensor([[5.0, 7.0]] + 6 * [[1.0, 2.0]]))
        predictor.proj_back_n.copy_(torch.tensor([[5.0, 7.0]] + 6 * [[1.0, 2.0]]))
    predictor.set_grid((4, 6), (2, 3))
    torch.testing.assert_close(predictor.proj_n.data, torch.tensor([[5.0, 7.0]] + 24 * [[0.25, 0.5]]))
    torch.testing.assert_close(predictor.proj_back_n.data, torch.tensor([[5.0, 7.0]] + 24 * [[1.0, 2.0]]))


@both
def test_another_input_size_is_saved_and_loaded(name: str, tmp_path: Path):
    model = small(name)
    before = copy.deepcopy(model.state_dict())
    model.set_input_size(SIZE)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    model.set_input_size((64, 128))
    assert get_model_input_config(model)["input_size"] == (3, 64, 128)
    assert model.blocks[0].attn.key_grid == (4, 8) and model.blocks[0].attn.budget() == math.ceil(33 / 4)
    x = images(1, (64, 128))
    save_for_hf(model, tmp_path, safe_serialization=True)
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    with pytest.raises(ValueError, match=r"img_size=\(70, 64\) is not whole patches of patch_size"):
        model.set_input_size((70, 64))


@pytest.mark.parametrize("kwargs", [{"share_proj": True}, {"prune_at": [1], "token_keep_rate": 0.5, "keep_rate": 0.4}])
def test_a_saved_network_comes_back(kwargs: dict[str, Any], tmp_path: Path):
    model = small(**kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_a_shared_matrix_is_read_from_either_name():
    model = small(share_proj=True)
    assert "blocks.0.attn.mask_predictor.proj_back_n" not in model.state_dict()
    official = dict(model.state_dict())
    for name in list(official):
        if name.endswith("proj_n"):
            official[name.replace("proj_n", "proj_back_n")] = official[name]
    model.load_state_dict(checkpoint_filter_fn(official, model), strict=True)


def test_lvvit_heads():
    model = small(LVVIT)
    x = images()
    with torch.no_grad():
        tokens = model.forward_features(x)
        cls, aux = model.head(tokens[:, 0]), model.aux_head(tokens[:, 1:])
        torch.testing.assert_close(model(x), cls + 0.5 * aux.amax(1))
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
        model.head_drop.train()
        model.training = True
        torch.testing.assert_close(model.forward_head(tokens), cls)
    assert model.get_classifier() == (model.head, model.aux_head)
    model.reset_classifier(3)
    assert model.eval()(x).shape == (2, 3) and model.aux_head.out_features == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, 32) and not any(n.startswith("aux_head") for n in model.state_dict())


def test_names():
    assert timm.list_models(module="sparsifiner") == NAMES
    assert timm.list_models(module="sparsifiner", name_matches_cfg=True) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_registered_network(name: str):
    model = timm.create_model(name, device="meta").eval()
    size = 384 if "384" in name else 224
    assert model.default_cfg["input_size"] == (3, size, size)
    assert model(torch.empty(1, 3, size, size, device="meta")).shape == (1, 1000)
    heads = model.default_cfg["classifier"]
    for layer in (model.default_cfg["first_conv"], *([heads] if isinstance(heads, str) else heads)):
        assert f"{layer}.weight" in model.state_dict()
    features = timm.create_model(name, device="meta", features_only=True)
    maps = features(torch.empty(1, 3, size, size, device="meta"))
    assert [m.shape for m in maps] == 3 * [(1, model.embed_dim, size // 16, size // 16)]
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True, device="meta")
    with pytest.raises(TypeError, match="not_a_model_arg"):
        timm.create_model(name, not_a_model_arg=1)


@pytest.mark.parametrize(
    ("golden", "name"),
    [
        ("sparsifiner_deit_t", "sparsifiner_deit_tiny_patch16_224"),
        ("sparsifiner_deit_s", "sparsifiner_deit_small_patch16_224"),
        ("sparsifiner_deit_b", "sparsifiner_deit_base_patch16_224"),
        ("sparsifiner_lvvit_s", "sparsifiner_lvvit_small"),
        ("sparsifiner_lvvit_m", "sparsifiner_lvvit_medium"),
    ],
)
def test_multiply_adds_are_those_of_the_authors(golden: str, name: str):
    """Of the masked path, which is what their code does."""
    model = timm.create_model(name, device="meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(rule.load(golden)["macs"], rel=0.01)


@both
def test_grad_checkpointing_and_dropouts(name: str):
    model = small(name, drop_path_rate=0.2, attn_drop_rate=0.2, proj_drop_rate=0.1).train()
    x = images()
    assert not torch.allclose(model(x), model(x))
    model.eval()
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


CONFIGS = [(DEIT, {}), (LVVIT, {}), (DEIT, {"attention_path": "gather", "prune_at": [1], "token_keep_rate": 0.5})]
configs = pytest.mark.parametrize(("name", "kwargs"), CONFIGS)


@configs
def test_symbolic_trace_gives_the_same_bits(name: str, kwargs: dict[str, Any]):
    model = small(name, **kwargs)
    x = images()
    with torch.inference_mode():
        assert torch.equal(traced(model)(x)["out"], model(x))


@configs
@torch.no_grad()
def test_torch_export_for_any_batch(name: str, kwargs: dict[str, Any]):
    model = small(name, depth=2, **kwargs)
    exported = torch.export.export(model, (images(),), dynamic_shapes=DYNAMIC_BATCH).module()
    for batch in (1, 5):
        x = images(batch)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_onnx(tmp_path: Path):
    model = small(LVVIT, depth=1)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(
        model, (images(),), file, dynamo=True, opset_version=18, dynamic_shapes=DYNAMIC_BATCH, verbose=False
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        x = images(batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(out, model(x).numpy(), rtol=1e-3, atol=1e-4)


@configs
def test_compiles_to_one_graph_and_trains_in_it(name: str, kwargs: dict[str, Any]):
    model = small(name, **{**kwargs, "depth": 1, "prune_at": [0] if kwargs else []})
    x = images()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model).train()
    torch.compile(twin, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    model.train()(x).square().mean().backward()
    for (n, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=n)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(name: str, dtype: torch.dtype):
    """Finite and close; a few keys may be other ones."""
    model = small(name, num_classes=100)
    x = images()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
        assert out.dtype == dtype and (out.float() - expected).std() < 0.15 * expected.std()
        out = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert out.dtype == dtype and (out.float() - expected).std() < 0.15 * expected.std()
    with torch.autocast("cpu", dtype=dtype):
        loss = model.train()(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_state_is_stale_after_weights_change():
    model = small()
    x = images()
    with torch.no_grad():
        model(x)
        other = small()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x))
        assert torch.equal(copy.deepcopy(model)(x), other(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparsifinerAttention(30, 4), r"width 30 does not divide by num_heads=4"),
        (lambda: SparsifinerAttention(32, 4, keep_rate=0.0), r"keep_rate=0\.0 is a share of keys"),
        (lambda: SparsifinerAttention(32, 4, keep_rate=1.5), r"keep_rate=1\.5 is a share of keys"),
        (lambda: SparsifinerAttention(32, 4, attention_path="fast"), r"attention_path='fast': expected one of auto"),
        (
            lambda: SparsifinerAttention(32, 4, attention_path="gather", score_threshold=0.1),
            r"'gather' needs the same number of keys for each query, which score_threshold=0\.1 does not give",
        ),
        (
            lambda: SparsifinerAttention(32, 4, 26)(torch.randn(1, 25, 32)),
            r"25 tokens for a connectivity predictor of 26",
        ),
        (lambda: small()(images(), is_causal=True), r"attn_mask and is_causal: the predictor alone says who attends"),
        (lambda: ConnectivityPredictor(25, 2, 8, rank_reduction=0), r"rank_reduction=0: expected 1 or more"),
        (lambda: ConnectivityPredictor(25, 2, 8, coef_top_k=-1), r"coef_top_k=-1: expected 0 or more"),
        (lambda: small(img_size=70), r"img_size=70 is not whole patches of patch_size=16"),
        (lambda: small(img_size=8), r"img_size=8 is not whole patches of patch_size=16"),
        (lambda: small(prune_at=[4], token_keep_rate=0.5), r"prune_at=\[4\]: expected indices of blocks, 0 to 3"),
        (lambda: small(token_keep_rate=0.0), r"token_keep_rate=0\.0 is a share of tokens"),
        (lambda: small(LVVIT).set_input_size(patch_size=8), r"patch_size=8: the stem of LV-ViT has patches of"),
        (lambda: SparsifinerCriterion(), r"cls_distill, token_distill in the phase 'cls_distill': pass the dense"),
        (lambda: SparsifinerCriterion(phase="warmup"), r"phase='warmup': expected one of attn_recon"),
        (lambda: SparsifinerCriterion(small(), weights={"kl": 1.0}), r"weights of \['kl'\]: expected names of cls"),
    ],
)
def test_wrong_values_are_named(make: Any, message: str):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        make()


def in_predictor(name: str) -> bool:
    return ".mask_predictor." in name


@both
@pytest.mark.parametrize("phase", ["attn_recon", "cls_distill", "attn_self_distill", "joint"])
def test_a_phase_trains_what_it_says(name: str, phase: Any):
    """And its loss falls."""
    model = small(name).train()
    teacher = small(name, attention_path="dense")
    criterion = SparsifinerCriterion(teacher, phase).train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    trained = criterion.set_trainable(model)
    expected = {n for n, _ in model.named_parameters() if phase == "joint" or in_predictor(n) == (phase[:4] == "attn")}
    assert set(trained) == expected
    before = copy.deepcopy(model.state_dict())
    x, target = images(4), torch.tensor([1, 2, 3, 4])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, weight_decay=0.0)
    losses = []
    for _ in range(8):
        step = criterion(model, x, target)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
        assert step.loss.item() == pytest.approx(
            sum(criterion.weights[part] * value.item() for part, value in step.parts.items()), rel=1e-5
        )
        assert step.logits.shape == (4, 10) and not step.logits.requires_grad
    assert losses[-1] < 0.97 * losses[0]
    for parameter_name, parameter in model.named_parameters():
        if parameter_name not in expected:
            assert torch.equal(parameter, before[parameter_name]), f"{parameter_name} was not to be trained"


def test_the_network_is_called_once_and_left_as_it_was():
    model = small().train()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    criterion = SparsifinerCriterion(small(attention_path="dense"), "joint")
    criterion(nn.DataParallel(model), images(), torch.tensor([0, 1]))
    assert len(calls) == 1 and all(attn.recorder is None for attn in model.attention_layers())
    assert not model.norm._forward_hooks


def test_each_loss_by_its_definition():
    model = small(score_threshold=0.4).train()
    x, target = images(), torch.tensor([3, 4])
    names = ("cls", "cls_distill", "token_distill", "attn_self_distill", "least_k", "ratio", "basis_l1")
    teacher = dense_deit()
    step = SparsifinerCriterion(teacher, "joint", dict.fromkeys(names, 1.0))(model, x, target)
    with record_connectivity(model) as layers, torch.no_grad():
        tokens = model.forward_features(x)
        logits = model.forward_head(tokens)
        taught_tokens = teacher.forward_features(x)
        taught = teacher.forward_head(taught_tokens)
    assert not teacher.training
    masks = [layer.mask.float() for layer in layers]
    assert len({int(mask.sum()) for mask in masks}) > 1, "not a budget"
    p = taught.softmax(-1)
    expected = {
        "cls": F.cross_entropy(logits, target),
        "cls_distill": (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean(),
        "token_distill": (tokens - taught_tokens)[:, 1:].square().mean(),
        "attn_self_distill": sum((y.scores - y.dense_attn[:, :, 1:]).square().sum() for y in layers) / 4,
        "least_k": sum(m[:, :, 1:].sort(-1).values[..., : 25 - 25 // 4].mean() for m in masks) / 4,
        "ratio": sum((m.mean(-1) - 0.25).square().mean() for m in masks) / 4,
        "basis_l1": sum(a.mask_predictor.proj_back_n.abs().mean() for a in model.attention_layers()) / 4,
    }
    for name, value in expected.items():
        torch.testing.assert_close(step.parts[name], torch.as_tensor(value).detach(), msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(step.logits, logits)


def test_attention_is_reconstructed_from_timms_own():
    """Raw scores of every block against the teacher's attention; the student attends to all keys meanwhile."""
    model = small().train()
    teacher = dense_deit()
    x = images()
    step = SparsifinerCriterion(teacher, "attn_recon", {"attn_recon": 1.0})(model, x, torch.tensor([0, 1]))
    with record_connectivity(model, reconstruct=True) as layers, record_attention(teacher) as maps, torch.no_grad():
        model(x)
        teacher(x)
    attn = [m[0].attn[:, :, 1:] for m in maps.values()]
    distances = [(y.scores - a).square().sum() for y, a in zip(layers, attn, strict=True)]
    torch.testing.assert_close(step.loss, torch.stack(distances).mean())
    model.set_attention_path("dense")
    torch.testing.assert_close(step.logits, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_pruned_tokens_are_not_distilled():
    model = small(prune_at=[1], token_keep_rate=0.5).train()
    teacher = small(attention_path="dense")
    x = images()
    step = SparsifinerCriterion(teacher, "cls_distill")(model, x, torch.tensor([0, 1]))
    with torch.no_grad():
        final = model.forward_intermediates(x, indices=[3], output_fmt="NLC", intermediates_only=True)[0]
        kept = (final != 0).any(-1)
        distance = (model.forward_features(x) - teacher.forward_features(x))[:, 1:][kept].square().mean()
    assert kept.sum() == 24
    torch.testing.assert_close(step.parts["token_distill"], distance)


def test_criterion_refuses_what_it_cannot_compare():
    x, target = images(), torch.tensor([0, 1])
    model = small().train()
    wider = small(embed_dim=64, attention_path="dense")
    with pytest.raises(ValueError, match=r"the student's patch tokens are \(2, 24, 32\), the teacher's \(2, 24, 64\)"):
        SparsifinerCriterion(wider)(model, x, target)
    with pytest.raises(ValueError, match=r"attention of attn_recon are \(4, 2, 2, 24, 25\), the teacher's \(2, 2, 2"):
        SparsifinerCriterion(small(depth=2, attention_path="dense"), "attn_recon")(model, x, target)
    with pytest.raises(ValueError, match="Sequential has no final `norm` to take tokens from"):
        SparsifinerCriterion(phase="attn_self_distill")(nn.Sequential(nn.Linear(2, 2)), x, target)
    with pytest.raises(ValueError, match="VisionTransformer has no SparsifinerAttention"):
        SparsifinerCriterion(phase="attn_self_distill")(dense_deit(), x, target)
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="turn gradient checkpointing off"):
        SparsifinerCriterion(phase="attn_self_distill")(model, x, target)
