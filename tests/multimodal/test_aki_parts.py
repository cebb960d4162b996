"""The published state dict, name by name, and what AKI has beside SigLIP and Phi-3: the resampler and two tables."""

from __future__ import annotations

import math

import pytest
import tiny_aki as tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.aki import AkiConfig, AkiForConditionalGeneration, ExtendedEmbedding, ExtendedHead, PerceiverResampler

Shapes = dict[str, tuple[int, ...]]


def with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def vision_shapes() -> Shapes:
    """google/siglip-so400m-patch14-384 with its pooling head, as in the published file."""
    C, M = 1152, 4304
    shapes = {"embeddings.position_embedding.weight": (27 * 27, C), "head.probe": (1, 1, C)}
    shapes |= with_bias("embeddings.patch_embedding", C, 3, 14, 14) | with_bias("post_layernorm", C)
    for n in range(27):
        layer = f"encoder.layers.{n}"
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= with_bias(f"{layer}.{part}", C, C)
        shapes |= with_bias(f"{layer}.layer_norm1", C) | with_bias(f"{layer}.layer_norm2", C)
        shapes |= with_bias(f"{layer}.mlp.fc1", M, C) | with_bias(f"{layer}.mlp.fc2", C, M)
    shapes |= {"head.attention.in_proj_weight": (3 * C, C), "head.attention.in_proj_bias": (3 * C,)}
    shapes |= with_bias("head.attention.out_proj", C, C) | with_bias("head.layernorm", C)
    return shapes | with_bias("head.mlp.fc1", M, C) | with_bias("head.mlp.fc2", C, M)


def connector_shapes() -> Shapes:
    shapes: Shapes = {"latents": (144, 1152)}
    shapes |= with_bias("projection", 3072, 1152) | with_bias("norm", 1152)
    for n in range(6):
        attention, feed_forward = f"layers.{n}.0", f"layers.{n}.1"
        shapes |= with_bias(f"{attention}.norm_media", 1152) | with_bias(f"{attention}.norm_latents", 1152)
        shapes |= {f"{attention}.to_q.weight": (512, 1152), f"{attention}.to_kv.weight": (1024, 1152)}
        shapes |= {f"{attention}.to_out.weight": (1152, 512)} | with_bias(f"{feed_forward}.0", 1152)
        shapes |= {f"{feed_forward}.1.weight": (4608, 1152), f"{feed_forward}.3.weight": (1152, 4608)}
    return shapes


def language_shapes() -> Shapes:
    """microsoft/Phi-3.5-mini-instruct, with a bias on its head and the tables of two more tokens."""
    shapes: Shapes = {"model.embed_tokens.weight": (32064, 3072), "model.norm.weight": (3072,)}
    for n in range(32):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.self_attn.qkv_proj.weight": (3 * 3072, 3072),
            f"{layer}.self_attn.o_proj.weight": (3072, 3072),
            f"{layer}.mlp.gate_up_proj.weight": (2 * 8192, 3072),
            f"{layer}.mlp.down_proj.weight": (3072, 8192),
            f"{layer}.input_layernorm.weight": (3072,),
            f"{layer}.post_attention_layernorm.weight": (3072,),
        }
    return shapes | with_bias("lm_head", 32064, 3072)


ADDITIONAL = {
    "lang_model.model.embed_tokens.additional_embedding.weight": (2, 3072),
    "lang_model.lm_head.additional_fc.weight": (2, 3072),
    "lang_model.lm_head.additional_fc.bias": (2,),
}


@pytest.fixture(scope="module")
def full_size() -> Shapes:
    with torch.device("meta"):
        model = AkiForConditionalGeneration(AkiConfig())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_state_dict_is_the_published_one_in_names_and_shapes(full_size: Shapes):
    parts = {"vision_encoder": vision_shapes(), "vision_tokenizer": connector_shapes(), "lang_model": language_shapes()}
    official = {f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}
    assert full_size == official | ADDITIONAL


def test_the_parts_are_as_large_as_published(full_size: Shapes):
    count = {part: 0 for part in ("vision_encoder", "vision_tokenizer", "lang_model")}
    for name, shape in full_size.items():
        count[name.partition(".")[0]] += math.prod(shape)
    phi = 3_821_079_552
    ours = 32064 + 2 * 3072 + 2 * 3072 + 2  # the head's bias and the additional tables
    assert count == {"vision_encoder": 428_225_600, "vision_tokenizer": 81_608_448, "lang_model": phi + ours}


def resample(state: dict[str, Tensor], features: Tensor, depth: int, num_heads: int) -> Tensor:
    """The equations of a Perceiver resampler for one picture `[P, C]`, head by head and latent by latent."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    latents = state["latents"]
    for n in range(depth):
        attention, feed_forward = f"layers.{n}.0", f"layers.{n}.1"
        queries = norm(latents, f"{attention}.norm_latents")
        seen = torch.cat([norm(features, f"{attention}.norm_media"), queries])
        to_k, to_v = state[f"{attention}.to_kv.weight"].chunk(2)  # keys are the first half
        d = len(to_k) // num_heads
        rows = []
        for query in queries:
            heads = []
            for h in range(num_heads):
                part = slice(h * d, (h + 1) * d)
                q = state[f"{attention}.to_q.weight"][part] @ query
                weights = ((seen @ to_k[part].T) @ q / math.sqrt(d)).softmax(0)
                heads.append(weights @ (seen @ to_v[part].T))
            rows.append(state[f"{attention}.to_out.weight"] @ torch.cat(heads))
        latents = latents + torch.stack(rows)
        hidden = norm(latents, f"{feed_forward}.0") @ state[f"{feed_forward}.1.weight"].T
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        latents = latents + hidden @ state[f"{feed_forward}.3.weight"].T
    return norm(latents, "norm") @ state["projection.weight"].T + state["projection.bias"]


@pytest.mark.parametrize("patches", [1, 16])
def test_the_resampler_is_its_equations(patches: int):
    torch.manual_seed(0)
    resampler = PerceiverResampler(24, 32, num_latents=5, depth=2, num_heads=3, head_dim=4).double()
    for parameter in resampler.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    features = torch.randn(3, patches, 24, dtype=torch.float64)
    found = resampler(features)
    assert found.shape == (3, 5, 32)
    for picture, expected in zip(features, found, strict=True):
        torch.testing.assert_close(resample(dict(resampler.state_dict()), picture, 2, 3), expected)


def test_the_resampler_does_not_mind_the_order_of_features_and_trains():
    torch.manual_seed(0)
    resampler = PerceiverResampler(24, 32, num_latents=5, depth=2, num_heads=3, head_dim=4)
    features = torch.randn(2, 16, 24)
    out = resampler(features)
    torch.testing.assert_close(resampler(features[:, torch.randperm(16)]), out, rtol=1e-4, atol=1e-5)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in resampler.parameters())


def test_ids_from_the_first_additional_one_on_are_embedded_by_the_second_table():
    table = ExtendedEmbedding(64, 8, num_base=60, num_additional=2)
    ids = torch.tensor([[0, 59, 60, 61]])
    rows = [
        table.weight[0],
        table.weight[59],
        table.additional_embedding.weight[0],
        table.additional_embedding.weight[1],
    ]
    assert torch.equal(table(ids), torch.stack(rows)[None])
    table(ids).sum().backward()
    assert table.weight.grad is not None and table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 59]


def test_logits_are_those_of_the_served_rows_then_the_additional_ones():
    head = ExtendedHead(8, 64, num_base=60, num_additional=2)
    states = torch.randn(2, 3, 8)
    logits = head(states)
    assert logits.shape == (2, 3, 62)
    first = states @ head.weight[:60].T + head.bias[:60]
    last = states @ head.additional_fc.weight.T + head.additional_fc.bias
    torch.testing.assert_close(logits, torch.cat([first, last], -1))


def test_features_are_the_towers_after_its_last_norm_without_the_pooling_head():
    model = tiny.model()
    hooked: list[Tensor] = []
    handle = model.vision_tokenizer.register_forward_pre_hook(lambda module, args: hooked.append(args[0]))
    with torch.no_grad():
        tokens = model.get_image_features(tiny.pictures(2)).pooler_output
        states = model.vision_encoder(tiny.pictures(2), output_hidden_states=True).hidden_states[-1]
    handle.remove()
    norm = model.vision_encoder.post_layernorm
    assert tokens.shape == (2, tiny.TOKENS, 32) and hooked[0].shape == (2, tiny.FEATURES, 24)
    torch.testing.assert_close(hooked[0], F.layer_norm(states, (24,), norm.weight, norm.bias, norm.eps))
