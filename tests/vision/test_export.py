"""The networks outside of eager fp32 code: traced, exported, compiled, copied, in lower precision."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from test_timm_contract import create, images, small
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vision.biformer import BiLevelRoutingAttention
from vision.litv2 import DeformableTokenMerging, HiLo

DYNAMIC_BATCH = ({0: torch.export.Dim("batch")},)
# a compiler takes seconds for each; `biformer_stl` has no operation that these have not
compiled_small = pytest.mark.parametrize("small", ["biformer", "biformer_stl_nchw", "litv2"])


def traced(model: nn.Module) -> nn.Module:
    """By torch.fx, as timm does it: some modules are leaves of the graph."""
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    train, evaluation = get_graph_node_names(model, tracer_kwargs=leaves)
    node = (train if model.training else evaluation)[-1]
    return create_feature_extractor(model, {node: "out"}, tracer_kwargs=leaves)


@small
def test_symbolic_trace_gives_the_same_bits(small: str):
    model = create(small).eval()
    x = images()
    with torch.inference_mode():
        assert torch.equal(traced(model)(x)["out"], model(x))


@small
def test_symbolic_trace_gives_the_same_gradients(small: str):
    model = create(small).train()
    graph = traced(copy.deepcopy(model))
    x = images()
    graph(x)["out"].square().mean().backward()
    model(x).square().mean().backward()
    gradients = {n: p.grad for n, p in graph.named_parameters()}
    assert set(gradients) == {n for n, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda m, name=name: f"{name}: {m}")


@compiled_small
@torch.no_grad()
def test_torch_export(small: str):
    model = create(small).eval()
    x = images(2, 3, 64, 96)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)


@compiled_small
@torch.no_grad()
def test_torch_export_for_any_batch(small: str):
    model = create(small).eval()
    exported = torch.export.export(model, (images(),), dynamic_shapes=DYNAMIC_BATCH).module()
    for batch in (1, 2, 5):
        x = images(batch, 3, 64, 64)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def assert_onnx_equals(model: nn.Module, size: tuple[int, int], folder: Path) -> None:
    file = str(folder / "model.onnx")
    torch.onnx.export(
        model, (images(2, 3, *size),), file, dynamo=True, opset_version=18, dynamic_shapes=DYNAMIC_BATCH, verbose=False
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = images(batch, 3, *size)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = model(x).numpy()
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.std())))


@pytest.mark.parametrize("name", ["biformer_nano", "litv2_nano"])
@torch.no_grad()
def test_onnx(name: str, tmp_path: Path):
    assert_onnx_equals(timm.create_model(name, num_classes=10).eval(), (64, 64), tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_published_network_on_a_map_that_needs_padding(tmp_path: Path):
    assert_onnx_equals(timm.create_model("litv2_small").eval(), (100, 132), tmp_path)


@compiled_small
def test_compile_takes_the_whole_network_as_one_graph(small: str):
    model = create(small).eval()
    x = images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@compiled_small
def test_compiled_training_has_the_same_gradients(small: str):
    model = create(small).train()
    twin = copy.deepcopy(model)
    x = images()
    torch.compile(twin, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    model(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


class Operators(nn.Module):
    """What is ours to compile, one after another, on maps that need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bra = BiLevelRoutingAttention(16, 2, 3, topk=2)
        self.hilo = HiLo(16, 4, qkv_bias=True, alpha=0.5)
        self.merge = DeformableTokenMerging(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merge(self.hilo(self.bra(x)))


@pytest.mark.slow
def test_operators_compile_to_machine_code():
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler")
    operators = Operators().eval()
    nn.init.normal_(operators.merge.dconv.conv_offset.weight)
    x = torch.randn(2, 10, 7, 16)
    with torch.no_grad():
        compiled = torch.compile(operators, fullgraph=True)
        torch.testing.assert_close(compiled(x), operators(x), rtol=1e-4, atol=1e-5)


@small
def test_a_copy_works_after_a_forward(small: str):
    model = create(small).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        twin.head.bias.add_(1.0)
        torch.testing.assert_close(twin(x), expected + 1)
        assert torch.equal(model(x), expected), "nothing is shared"


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@small
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close(small: str, device: str, dtype: torch.dtype):
    """Within 5 % of the logits' spread: what the type itself loses; a wrong cast loses more."""
    model = create(small, num_classes=100).to(device).eval()
    nn.init.normal_(model.head.weight)
    x = images(2, 3, 128, 128).to(device)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast(device, dtype=dtype):
            out = model(x)
    assert out.dtype == dtype
    assert (out.float() - expected).std() < 0.05 * expected.std()


@small
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_trains(small: str, device: str):
    model = create(small).to(device).train()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(images().to(device)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@small
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_network_in_another_precision(small: str, device: str, dtype: torch.dtype):
    model = create(small, num_classes=100).to(device).eval()
    nn.init.normal_(model.head.weight)
    x = images(1, 3, 64, 64).to(device)
    with torch.no_grad():
        expected = model(x)
        out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    assert (out.float() - expected).std() < tolerance * expected.std()


@small
def test_device_and_dtype_are_taken_at_creation(small: str):
    model = create(small, device="cpu", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16
