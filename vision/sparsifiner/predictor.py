"""Who should attend to whom: connectivity of low rank, predicted before any attention is computed."""

import math
from typing import Any

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vision.inference import is_eager_cpu_inference

__all__ = ["ConnectivityPredictor", "kth_largest", "top_k_mask"]


def kth_largest(x: Tensor, k: int) -> Tensor:
    """The k-th largest entry of each row, `[..., N]` → `[..., 1]`; only on a CPU, in fp32 or fp64, without gradient.

    numpy selects with vector instructions: a quarter of the time that `torch.topk` takes.
    """
    return torch.from_numpy(np.partition(x.numpy(), -k, axis=-1)[..., -k, None])


def top_k_mask(x: Tensor, k: int) -> Tensor:
    """Marks the `k` largest entries of each row; which of equal ones at the border is left open.

    Args:
        x: `[..., N]`.
        k: how many to keep, at most N.

    Returns:
        Bool, `[..., N]`, with `k` ones in each row. Carries no gradient.
    """
    x = x.detach()
    if is_eager_cpu_inference(x) and x.dtype in (torch.float32, torch.float64) and x.numel():
        mask = x >= kth_largest(x, k)
        if int(np.count_nonzero(mask.numpy())) * x.shape[-1] == k * x.numel():
            return mask
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(k, sorted=False).indices, True)


class ConnectivityPredictor(nn.Module):
    """Scores of every query and key, as a few coefficients per query times a sparse basis over keys (eq. 3 to 6).

    Queries and keys of all heads are reduced in channels by two linear layers, keys then in number from N to `rank` by
    `proj_n` (W_down in the paper). What a reduced query makes of the reduced keys is its row of coefficients, a
    softmax of which the `coef_top_k` largest stay. The basis, `proj_back_n` (W_up), is used without its sign and
    without what is not above `basis_threshold`. Names in the state dict are the authors'.

    Args:
        num_tokens: N, the class token included.
        num_heads: attention heads; the scores of the coefficients are scaled by its inverse square root.
        head_dim: width of a head.
        rank: number of basis vectors; by default `num_tokens // rank_reduction`.
        rank_reduction: tokens per basis vector.
        channel_reduction: width of a head over its reduced width.
        basis_threshold: entries of the basis up to this become 0.
        coef_top_k: coefficients kept per query; 0 keeps those above `coef_threshold`.
        coef_threshold: see `coef_top_k`; 0 keeps all.
        share_proj: one matrix as both `proj_n` and `proj_back_n`; it is stored once, as `proj_n`.

    Raises:
        ValueError: a count or a factor below 1, or a negative threshold.
    """

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        head_dim: int,
        rank: int | None = None,
        rank_reduction: int = 6,
        channel_reduction: int = 2,
        basis_threshold: float = 0.02,
        coef_top_k: int = 8,
        coef_threshold: float = 0.05,
        share_proj: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        counts = {"rank": rank, "rank_reduction": rank_reduction, "channel_reduction": channel_reduction}
        for name, count in {**counts, "num_tokens": num_tokens}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: expected 1 or more.")
        limits = {"basis_threshold": basis_threshold, "coef_top_k": coef_top_k, "coef_threshold": coef_threshold}
        for name, limit in limits.items():
            if limit < 0:
                raise ValueError(f"{name}={limit}: expected 0 or more.")
        self.scale = num_heads**-0.5
        self.basis_threshold = basis_threshold
        self.coef_top_k = coef_top_k
        self.coef_threshold = coef_threshold
        self.share_proj = share_proj
        rank = rank or max(num_tokens // rank_reduction, 1)
        reduced_dim = max(head_dim // channel_reduction, 1)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        if not share_proj:
            self.proj_back_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        self.proj_c_q = nn.Linear(head_dim, reduced_dim, **dd)
        self.proj_c_k = nn.Linear(head_dim, reduced_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a normal of deviation 0.02, cut at ±2; biases 0."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.proj_c_q.bias)
        nn.init.zeros_(self.proj_c_k.bias)

    @property
    def num_tokens(self) -> int:
        """N, the class token included."""
        return self.proj_n.shape[0]

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return self.proj_n.shape[1]

    def basis(self, raw: bool = False) -> Tensor:
        """The basis over keys, `[rank, N]`.

        Args:
            raw: as trained for the reconstruction of attention, with its sign and its small entries.
        """
        basis = self.proj_n if self.share_proj else self.proj_back_n
        if not raw:
            basis = basis.abs()
            basis = basis.masked_fill(basis <= self.basis_threshold, 0.0)
        return basis.T

    def coefficients(self, q: Tensor, k: Tensor, raw: bool = False, kept: Tensor | None = None) -> Tensor:
        """What each query but the class token takes of each basis vector.

        Args:
            q: `[B, heads, N, d]`.
            k: `[B, heads, N, d]`.
            raw: keep all of them.
            kept: bool, `[B, N]`: tokens that are still there; the reduced queries and keys of others are 0.

        Returns:
            `[B, heads, N - 1, rank]`, not negative; rows sum to 1 if `raw`, else to at most 1.
        """
        logits = self._logits(q, k, kept)
        coef = logits.softmax(-1)
        if raw:
            return coef
        if not self.coef_top_k:
            return coef.masked_fill(coef <= self.coef_threshold, 0.0) if self.coef_threshold else coef
        if self.coef_top_k >= self.rank:
            return coef
        # Logits have fewer ties than their softmax, where the small ones may all be 0.
        return coef * top_k_mask(logits, self.coef_top_k)

    def _logits(self, q: Tensor, k: Tensor, kept: Tensor | None) -> Tensor:
        """The coefficients before their softmax."""
        self._check_tokens(k)
        q, k = self.proj_c_q(q), self.proj_c_k(k)  # [B, heads, N, c]
        if kept is not None:
            q, k = q * kept[:, None, :, None], k * kept[:, None, :, None]
        return q[:, :, 1:] @ (k.mT @ self.proj_n) * self.scale

    def query_map(self, k: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The linear map from queries to the logits of their coefficients, for inference.

        The same function as in `coefficients`, with both linear layers multiplied into what stands around them: few
        multiplications more where the rank is large, but no reduced queries and keys to write and to read.

        Args:
            k: `[heads, N, d]`.
            kept: bool, `[N]`: as in `coefficients`. The logits of queries that are not kept are to be 0.

        Returns:
            `[heads, d, rank]` to multiply queries with, and `[heads, 1, rank]` to add.
        """
        self._check_tokens(k)
        proj_n = self.proj_n if kept is None else self.proj_n * kept[:, None]
        keys = self.proj_c_k.weight @ (k.mT @ proj_n) + torch.outer(self.proj_c_k.bias, proj_n.sum(0))
        keys = keys * self.scale  # [heads, c, rank]
        return self.proj_c_q.weight.T @ keys, (self.proj_c_q.bias @ keys).unsqueeze(1)

    def _check_tokens(self, k: Tensor) -> None:
        if k.shape[-2] != self.num_tokens:
            raise ValueError(
                f"{k.shape[-2]} tokens for a connectivity predictor of {self.num_tokens}; build the network with the "
                "image size it is to see, or call its set_input_size."
            )

    def forward(self, q: Tensor, k: Tensor, raw: bool = False) -> Tensor:
        """Connectivity scores of all queries but the class token, which attends to everything.

        Args:
            q: `[B, heads, N, d]`.
            k: `[B, heads, N, d]`.
            raw: without any sparsity, as trained for the reconstruction of attention.

        Returns:
            `[B, heads, N - 1, N]`; larger means more worth attending to. Never negative, unless `raw`.
        """
        return self.coefficients(q, k, raw) @ self.basis(raw)

    def set_grid(self, new: tuple[int, int], old: tuple[int, int]) -> None:
        """Fits the two matrices to another number of tokens by resampling them over the grid of patches.

        Not in the paper, where another size means another network. Bicubic, as timm resamples position embeddings;
        the class token's row stays. As `proj_n` sums over tokens, it is scaled to the same sum (unless it is shared
        with the basis, whose entries mean something by themselves). The rank stays what it is.

        Args:
            new: height and width of the grid of patches to come.
            old: height and width of the grid of patches so far.
        """
        if new == old:
            return
        for name in ("proj_n",) if self.share_proj else ("proj_n", "proj_back_n"):
            matrix = getattr(self, name)
            setattr(self, name, nn.Parameter(self.resampled(name, matrix.detach(), new, old), matrix.requires_grad))

    def resampled(self, name: str, matrix: Tensor, new: tuple[int, int], old: tuple[int, int]) -> Tensor:
        """One of the two matrices for another grid, see `set_grid`: `[1 + h * w, rank]` of the old to the new."""
        resampled = resample_abs_pos_embed(matrix[None], list(new), list(old), num_prefix_tokens=1)[0]
        if name == "proj_n" and not self.share_proj:
            scale = resampled.new_full((len(resampled), 1), math.prod(old) / math.prod(new))
            scale[0] = 1.0
            resampled = resampled * scale
        return resampled
