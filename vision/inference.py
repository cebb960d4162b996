"""Short cuts for inference on a CPU, where fresh memory can cost more than the arithmetic on it.

Each function here is an ordinary one in training, under tracing and on other devices.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from vision.attention import AttentionTap

__all__ = ["batch_norm", "channels_last", "gelu", "in_parts", "is_eager_cpu_inference"]


def is_eager_cpu_inference(x: Tensor) -> bool:
    """Whether `x` is a real tensor on a CPU and nobody wants gradients, a lower precision or a graph of what happens.

    Only then may a layer work block by block, so that intermediate results stay in the cache and in memory that the
    process has already: on a CPU fresh pages can cost more than the arithmetic on them.
    """
    return (
        not torch.compiler.is_compiling()
        and isinstance(x, Tensor)  # not the proxy of a symbolic trace
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def in_parts(run: Callable[[Tensor], Tensor], x: Tensor, numel: int, network: nn.Module) -> Tensor:
    """`run(x)`; in inference on a CPU a few images at a time, so that what is in between stays in the cache.

    Not while somebody listens to the attention of `network`, who would get its maps in parts, too.

    Args:
        run: a function of a batch that treats its entries one by one.
        x: `[B, …]`.
        numel: how many numbers of `x` to take at a time; at least one entry is taken.
        network: what `run` runs.

    Returns:
        `[B, …]`.
    """
    if not is_eager_cpu_inference(x) or network.training:
        return run(x)
    at_once = max(numel // x[0].numel(), 1)
    if len(x) <= at_once:
        return run(x)
    if any(isinstance(module, AttentionTap) and module.is_open for module in network.modules()):
        return run(x)
    return torch.cat([run(part) for part in x.split(at_once)])


@torch.fx.wrap
@register_notrace_function
def channels_last(x: Tensor) -> Tensor:
    """Images `[B, C, H, W]`; in inference on a CPU in the memory format in which narrow convolutions run faster.

    A leaf for symbolic tracing, so that a traced network computes the same bits.
    """
    return x.contiguous(memory_format=torch.channels_last) if is_eager_cpu_inference(x) else x


def gelu(x: Tensor) -> Tensor:
    """GELU of a tensor that nobody else needs: in inference on a CPU it is overwritten."""
    return torch.ops.aten.gelu_(x) if is_eager_cpu_inference(x) else F.gelu(x)


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """BatchNorm of a map that nobody else needs: in inference on a CPU it is overwritten.

    Args:
        x: `[B, H, W, C]`.
        norm: of C channels, with weight, bias and running statistics.

    Returns:
        The same shape.
    """
    if not is_eager_cpu_inference(x) or norm.training or norm.running_var is None or norm.running_mean is None:
        return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return torch.addcmul(norm.bias - norm.running_mean * scale, x, scale, out=x)
