"""A network by ONNX Runtime: for networks of convolutions on a CPU about twice as fast as PyTorch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, in_one_line

__all__ = ["onnx_session"]


def onnx_session(module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Any:
    """Exports what a call does with images of one shape, and loads it.

    Args:
        module: The network, on the CPU, in evaluation mode.
        call: The network itself, or something that is computed with it.
        images: `(n, C, H, W)`; others are to have the same shape.

    Returns:
        A function from images to what `call` gives for them.

    Raises:
        UsageError: The network has an operation that ONNX or the runtime lacks.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decode processes need the cores
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "network.onnx"))  # a file, since bytes end at 2 GB
        try:
            _export(_Called(module, call).eval(), images, path)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # exporter and runtime have dozens of kinds
            reason = in_one_line(error.__cause__ or error)
            raise UsageError(f"this network cannot be run by ONNX Runtime ({reason}): leave out --runtime") from error
    (name,) = (entry.name for entry in session.get_inputs())

    def run(images: torch.Tensor) -> torch.Tensor:
        (result,) = session.run(None, {name: images.contiguous().numpy()})
        return torch.from_numpy(result)

    return run


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
