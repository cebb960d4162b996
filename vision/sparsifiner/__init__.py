"""Sparsifiner: attention to the keys that a cheap predictor chose for each query.

Paper: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", Wei et al.,
CVPR 2023, https://arxiv.org/abs/2303.13755.
The authors' code (MIT): https://github.com/lim142857/Sparsifiner. The networks under it: DeiT,
https://arxiv.org/abs/2012.12877, and LV-ViT, https://arxiv.org/abs/2104.10858.

Written from the paper and checked against outputs, losses and gradients of the authors' code. What differs from it:

* attention is really sparse where that is faster (`attention_path`), never computed twice, and no lists are returned:
  `record_connectivity` gives what the losses need;
* the budget of keys under token pruning is a constant of the layer; theirs sinks with each input and stays low;
* any image size: the predictor's matrices are resampled over the grid of patches, like the position embedding.
"""

from vision.sparsifiner.attention import (
    AttentionPath,
    Connectivity,
    SparsifinerAttention,
    connectivity,
    gathered_attention,
    record_connectivity,
)
from vision.sparsifiner.blockwise import blockwise_attention
from vision.sparsifiner.criterion import SparsifinerCriterion
from vision.sparsifiner.layers import LVViTStem, SparsifinerBlock
from vision.sparsifiner.predictor import ConnectivityPredictor, top_k_mask
from vision.sparsifiner.sparsifiner import Sparsifiner, SparsifinerLVViT, checkpoint_filter_fn

__all__ = [
    "AttentionPath",
    "Connectivity",
    "ConnectivityPredictor",
    "LVViTStem",
    "Sparsifiner",
    "SparsifinerAttention",
    "SparsifinerBlock",
    "SparsifinerCriterion",
    "SparsifinerLVViT",
    "blockwise_attention",
    "checkpoint_filter_fn",
    "connectivity",
    "gathered_attention",
    "record_connectivity",
    "top_k_mask",
]
