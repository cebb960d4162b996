"""Token-aware average pooling and the attention diversification loss: against slow references, and their properties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vision
from vision import tap
from vision.attention import attention_layers
from vision.criterion import classification_loss
from vision.tap import (
    ADLCriterion,
    TokenAwareAveragePooling,
    attention_diversification_loss,
    pairwise_diversification_loss,
)


def slow_pooling(pool: TokenAwareAveragePooling, x: Tensor) -> Tensor:
    """Place by place and scale by scale, as the equation says."""
    B, H, W, _ = x.shape
    weights = pool.scale_weights(x)
    y = torch.zeros_like(x)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                y[b, i, j] = weights[b, i, j, 0] * x[b, i, j]
                for k in range(1, pool.num_scales):
                    near = [
                        x[b, i + k * dy, j + k * dx]
                        for dy in (-1, 0, 1)
                        for dx in (-1, 0, 1)
                        if 0 <= i + k * dy < H and 0 <= j + k * dx < W
                    ]
                    y[b, i, j] += weights[b, i, j, k] * torch.stack(near).sum(0) / 9
    return y


@pytest.fixture
def pool() -> TokenAwareAveragePooling:
    """With statistics and weights that make it choose."""
    made = TokenAwareAveragePooling(6, 4).eval()
    nn.init.normal_(made.get_parameter("proj.0.weight"), std=0.4)
    nn.init.normal_(made.get_parameter("proj.2.weight"), std=1.0)
    return made


@pytest.mark.parametrize("size", [(5, 5), (3, 8), (1, 7), (2, 2)])
def test_pooling_is_what_the_equation_says(pool: TokenAwareAveragePooling, size: tuple[int, int]):
    x = torch.randn(2, *size, 6)
    with torch.no_grad():
        expected = slow_pooling(pool, x)
        torch.testing.assert_close(pool(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pool(x[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_pooling_are_those_of_the_equation(pool: TokenAwareAveragePooling):
    pool = pool.double()
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    inputs = [x, *pool.parameters()]
    ours = torch.autograd.grad((pool(x) * direction).sum(), inputs)
    expected = torch.autograd.grad((slow_pooling(pool, x) * direction).sum(), inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_tokens_are_a_map_of_their_grid(pool: TokenAwareAveragePooling):
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(pool(x.flatten(1, 2), (3, 5)), pool(x).flatten(1, 2))
    for grid in (None, (5, 5), (15, 2)):
        with pytest.raises(ValueError, match="15 tokens are no map"):
            pool(x.flatten(1, 2), grid)


@torch.no_grad()
def test_weights_are_shares_and_the_first_scale_is_the_token_itself(pool: TokenAwareAveragePooling):
    x = torch.randn(2, 4, 4, 6)
    weights = pool.scale_weights(x)
    assert weights.shape == (2, 4, 4, 4) and (weights >= 0).all() and weights.std() > 0.05
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 4))
    one = TokenAwareAveragePooling(6, 1).eval()
    assert torch.equal(one(x), x)
    with pytest.raises(ValueError, match="num_scales=0"):
        TokenAwareAveragePooling(6, 0)


@torch.no_grad()
def test_a_constant_map_stays_constant_where_nothing_lies_outside(pool: TokenAwareAveragePooling):
    y = pool(torch.ones(1, 9, 9, 6))
    torch.testing.assert_close(y[:, 3:-3, 3:-3], torch.ones(1, 3, 3, 6))
    assert (y[:, 0] < 1).all(), "zeros beyond the border count"


def test_state_dict_has_the_authors_names():
    assert set(TokenAwareAveragePooling(6).state_dict()) == {
        "proj.0.weight",
        *(f"proj.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "proj.2.weight",
    }


def attention(*shape: int, sharp: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random attention with preferred keys."""
    B, heads, _, M = shape
    scores = torch.randn(shape, dtype=dtype) + sharp * torch.randn(B, heads, 1, M, dtype=dtype)
    return scores.softmax(-1)


def slow_loss(attns: list[Tensor], threshold: float) -> Tensor:
    """Row by row."""
    total = torch.zeros((), dtype=attns[0].dtype)
    for attn in attns:
        B, _, N, M = attn.shape
        cosines = []
        for b in range(B):
            rows = attn[b].mean(0)
            mean = rows.mean(0)
            mean = mean * (mean > threshold / M)
            for i in range(N):
                row = rows[i] * (rows[i] > threshold / M)
                cosines.append((row * mean).sum() / (row.norm().clamp(min=1e-8) * mean.norm().clamp(min=1e-8)))
        total = total + torch.stack(cosines).mean()
    return total / (len(attns) + 1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 9, 9), (1, 4, 12, 12), (2, 3, 6, 10)])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
def test_diversification_loss_compares_each_row_with_the_mean_row(shape: tuple[int, ...], threshold: float):
    attns = [attention(*shape), attention(*shape)]
    torch.testing.assert_close(attention_diversification_loss(attns, threshold), slow_loss(attns, threshold))


def test_a_batch_is_the_mean_of_its_images():
    attn = attention(4, 2, 16, 16)
    alone = torch.stack([attention_diversification_loss([one]) for one in attn.split(1)])
    torch.testing.assert_close(attention_diversification_loss([attn]), alone.mean())
    assert alone.min() > 0.1


@pytest.mark.parametrize("loss", [attention_diversification_loss, pairwise_diversification_loss])
def test_gradients_are_finite_differences(loss: Any):
    """Through softmax, away from the threshold, where the choice of entries changes."""
    scores = torch.randn(2, 2, 5, 5, dtype=torch.float64) * 3
    rows = scores.softmax(-1).mean(1)
    assert (rows - 1.2 / 5).abs().min() > 1e-4 and (rows.mean(1) - 1.2 / 5).abs().min() > 1e-4
    assert torch.autograd.gradcheck(lambda s: loss([s.softmax(-1)], 1.2), scores.requires_grad_(), eps=1e-6)


def test_uniform_attention_costs_nothing_and_equal_rows_cost_most():
    uniform = torch.full((2, 2, 8, 8), 1 / 8, requires_grad=True)
    loss = attention_diversification_loss([uniform])
    assert loss == 0
    (grad,) = torch.autograd.grad(loss, uniform)
    assert grad.isfinite().all() and not grad.any(), "nothing above the threshold, nothing to learn"
    same = attention(2, 2, 1, 8).expand(-1, -1, 8, -1)
    torch.testing.assert_close(attention_diversification_loss([same], 1.0), torch.tensor(1.0))
    torch.testing.assert_close(pairwise_diversification_loss([same], 1.0), torch.tensor(1.0))
    own = torch.eye(8).expand(2, 2, 8, 8)
    assert pairwise_diversification_loss([own]) == 0, "each row a key of its own"


def test_the_cheap_loss_is_bounded_by_the_pairwise_one():
    """Cauchy-Schwarz: mean_i cos(m, A_i) is at most the mean unit row's length, whose square is the mean cosine."""
    cheap, pairs = [], []
    for sharp in torch.linspace(0, 4, 30):
        attn = attention(2, 3, 20, 20, sharp=float(sharp))
        cheap.append(attention_diversification_loss([attn]))
        pairs.append(pairwise_diversification_loss([attn]))
        assert cheap[-1] <= ((19 * pairs[-1] + 1) / 20) ** 0.5 + 1e-6
    correlation = torch.corrcoef(torch.stack((torch.stack(cheap), torch.stack(pairs))))[0, 1]
    assert correlation > 0.8, "what makes one small makes the other small"


def test_learning_to_lower_the_cheap_loss_lowers_the_pairwise_one():
    scores = (torch.randn(2, 2, 12, 12) + 2 * torch.randn(2, 2, 1, 12)).requires_grad_()
    before = pairwise_diversification_loss([scores.softmax(-1)]).item()
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        attention_diversification_loss([scores.softmax(-1)]).backward()
        optimizer.step()
    assert pairwise_diversification_loss([scores.softmax(-1)]).item() < 0.7 * before


class _Storages(TorchDispatchMode):
    """Remembers every storage that an operation gave, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.given[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, but: Tensor) -> list[int]:
        """Sizes in bytes of what still exists, but for one tensor's memory."""
        return [
            size for key, (ref, size) in self.given.items() if not ref.expired() and key != but.untyped_storage()._cdata
        ]


@pytest.mark.parametrize("loss", [attention_diversification_loss, slow_loss])
def test_no_second_attention_matrix_is_kept_for_the_backward_pass(loss: Any):
    """Nor the mean over heads: of all that is computed only vectors live on. The plain way keeps several."""
    attn = attention(2, 4, 24, 24).requires_grad_()
    with _Storages() as storages:
        kept = loss([attn], 2.0)
    rows = 2 * 24 * 24 * attn.element_size() // 2  # the rows of one image
    largest = max(storages.alive(attn), default=0)
    assert kept.requires_grad
    if loss is attention_diversification_loss:
        assert largest < rows / 4
    else:
        assert sum(storages.alive(attn)) > 2 * rows


def test_the_gradient_is_one_matrix_for_all_heads():
    """It waits for the rest of the network's backward pass, in all layers at once."""
    attn = attention(2, 4, 24, 24).requires_grad_()
    (grad,) = torch.autograd.grad(attention_diversification_loss([attn], 1.0), attn)
    assert grad.shape == attn.shape and grad.any() and grad.untyped_storage().nbytes() == 4 * 2 * 24 * 24


def test_loss_refuses_what_is_no_attention():
    with pytest.raises(ValueError, match="no attention given"):
        attention_diversification_loss([])
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        attention_diversification_loss([torch.rand(2, 3, 4)])
    with pytest.raises(ValueError, match="one query"):
        pairwise_diversification_loss([attention(2, 2, 1, 5)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attention_is_compared_in_single(dtype: torch.dtype):
    attn = attention(2, 2, 30, 30)
    loss = attention_diversification_loss([attn.to(dtype)])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, attention_diversification_loss([attn]), rtol=0.05, atol=0.02)


def vit(**kwargs: Any) -> Any:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5, **kwargs}
    return timm.create_model("vit_tiny_patch16_224", **args)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])


def test_criterion_is_the_task_plus_the_loss_of_every_layer():
    model, (images, target) = vit(), batch()
    step = ADLCriterion(weight=0.5, threshold=1.0, label_smoothing=0.1)(model, images, target)
    attns: list[Tensor] = []
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _a, out: attns.append(out))
    logits = plain(images)
    expected = classification_loss(logits, target, 0.1) + 0.5 * slow_loss(attns, 1.0)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.logits, logits.detach())
    assert set(step.parts) == {"task", "diversification"} and not step.logits.requires_grad
    step.loss.backward()
    expected.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_attention_is_fused_in_layers_that_were_not_chosen_and_after_the_step(monkeypatch: pytest.MonkeyPatch):
    model, (images, target) = vit(), batch()
    calls: list[tuple[int, ...]] = []
    fused = F.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for layers, remaining in ((None, 0), (["blocks.3.attn"], 3), (["blocks.[01].attn"], 2)):
        calls.clear()
        ADLCriterion(layers=layers)(model, images, target)
        assert len(calls) == remaining
    calls.clear()
    model(images)
    assert len(calls) == 4, "what it was before"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin_tiny_patch4_window7_224", 224),
        ("litv2_nano", 64),
        ("biformer_nano", 64),
        ("tap_fan_tiny_8_p4_hybrid", 64),
    ],
)
def test_criterion_works_for_networks_that_do_not_know_of_it(name: str, size: int):
    model = timm.create_model(name, num_classes=5).train()
    step = ADLCriterion(threshold=0.5)(model, torch.randn(2, 3, size, size), torch.tensor([1, 4]))
    assert 0 < step.parts["diversification"] <= 1
    step.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_class_attention_has_no_rows_to_compare():
    model = timm.create_model("fan_tiny_8_p4_hybrid", num_classes=5)
    images, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    assert attention_layers(model)[-2:] == ["cls_attn_blocks.0.attn", "cls_attn_blocks.1.attn"]
    whole = ADLCriterion(threshold=0.5)(model, images, target)
    mixing = ADLCriterion(threshold=0.5, layers=["blocks.*.attn"])(model, images, target)
    torch.testing.assert_close(whole.loss, mixing.loss)
    with pytest.raises(ValueError, match="compares several queries"):
        ADLCriterion(layers=["cls_attn_blocks.*"])(model, images, target)


def test_criterion_refuses_what_it_cannot_listen_to():
    model, (images, target) = vit(), batch()
    criterion = ADLCriterion()
    with pytest.raises(ValueError, match="compiled"):
        criterion(torch.compile(model, backend="eager"), images, target)
    with pytest.raises(ValueError, match=r"blocks\.9"):
        ADLCriterion(layers=["blocks.0.attn", "blocks.9.attn"])(model, images, target)
    with pytest.raises(ValueError, match="nothing"):
        ADLCriterion(layers=[])(model, images, target)
    with pytest.raises(TypeError, match="sequence"):
        ADLCriterion(layers="blocks.0.attn")
    with pytest.raises(ValueError, match="ResNet has no attention"):
        criterion(timm.create_model("resnet10t", num_classes=5), images, target)
    with pytest.raises(ValueError, match="target of shape"):
        criterion(model, images, target[:2])
    with pytest.raises(ValueError, match="label_smoothing"):
        ADLCriterion(label_smoothing=0.1, task_loss=F.cross_entropy)
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"set_grad_checkpointing\(False\)"):
        criterion(model, images, target)
    with torch.no_grad():
        assert criterion(model, images, target).loss.isfinite(), "nothing is computed twice without gradients"


def test_criterion_takes_another_task():
    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit(num_classes=0, global_pool="")
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.vit(x)[:, 1:]).transpose(1, 2).unflatten(2, (4, 4))

    target = torch.randint(4, (2, 32, 32))
    step = ADLCriterion(task_loss=vision.segmentation.segmentation_loss)(Map(), torch.randn(2, 3, 32, 32), target)
    assert step.logits.shape == (2, 4, 4, 4) and step.loss.isfinite()


def test_neighbourhoods_are_made_once_for_a_size():
    tap._neighbourhoods.cache_clear()
    pool = TokenAwareAveragePooling(4).eval()
    with torch.inference_mode():
        for _ in range(3):
            pool(torch.randn(2, 5, 6, 4))
    assert tap._neighbourhoods.cache_info().misses == 1
    with torch.no_grad():
        pool(torch.randn(1, 5, 6, 4))
    assert pool(torch.randn(1, 5, 6, 4)).requires_grad, "nothing of inference mode gets into training"
