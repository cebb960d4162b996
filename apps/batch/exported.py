"""A network by another library than PyTorch: for networks of convolutions on a CPU about twice as fast."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..errors import UsageError, in_one_line

__all__ = ["exported"]

_NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def exported(
    module: nn.Module,
    call: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    runtime: Literal["onnx", "openvino"],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Exports what a call does with images of one shape as ONNX, and loads that.

    Args:
        module: The network, on the CPU, in evaluation mode.
        call: The network itself, or something that is computed with it.
        images: `(n, C, H, W)`; others are to have the same shape.
        runtime: What runs it.

    Returns:
        A function from images to what `call` gives for them.

    Raises:
        UsageError: The network has an operation that ONNX or the runtime lacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "network.onnx"))  # a file, since bytes end at 2 GB
        try:
            _export(_Called(module, call).eval(), images, path)
            run = _in_onnxruntime(path) if runtime == "onnx" else _in_openvino(path)
        except Exception as error:  # exporter and runtimes have dozens of kinds
            reason = in_one_line(error.__cause__ or error)
            raise UsageError(
                f"this network cannot be run by {_NAMES[runtime]} ({reason}): leave out --runtime"
            ) from error
    return lambda images: torch.from_numpy(run(images.contiguous().numpy()))


class _Called(nn.Module):
    """A call in the shape of a module, with the weights that it uses."""

    def __init__(self, module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._call(images)


def _export(module: nn.Module, images: torch.Tensor, path: str) -> None:
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it reports which optional packages are missing
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (images.contiguous(),), path, dynamo=True, verbose=False)
    finally:
        exporter.setLevel(level)


def _in_onnxruntime(path: str) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decode processes need the cores
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return lambda images: session.run(None, {name: images})[0]


def _in_openvino(path: str) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    core: Any = openvino.Core()
    network = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda images: network(images)[0].copy()  # what it returns is written over by the next batch
