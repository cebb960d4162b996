"""DCAL: a vision transformer trained with two further attentions, for fine-grained recognition and re-identification.

Paper: "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification", Zhu et al.,
CVPR 2022, https://arxiv.org/abs/2205.02151. The authors released no code; this is written from the paper.

Three branches share one transformer:

* SA: the host, timm's `VisionTransformer`, with its own names and weights;
* GLCA: one more block, in which the class token and the patches with the highest attention rollout ask all tokens;
* PWCA: the host's weights once more, with the keys and values of another image beside; in training alone.

Where the paper is silent:

* the class row is always kept, the ratio counts patches; GLCA reads the host's last block before the final norm, starts
  as a copy of that block, and has a norm and a classifier of its own;
* every image of a batch is the distractor of one other, with keys and values of its own PWCA stream;
* **rows of attention do not see each other.** One GLCA block, read at its class token as the paper reads it, gives the
  same logits and gradients whichever patches are picked. So with `glca_pool='token'` the other rows, and the rollout
  that picks them, are not computed. With `glca_pool='avg'`, which is not in the paper, the selection matters.
"""

from vision.dcal.criterion import DCALCriterion, batch_hard_triplet_loss
from vision.dcal.dcal import DCAL, Branches, checkpoint_filter_fn
from vision.dcal.operators import (
    DCALBlock,
    GLCABlock,
    GlobalLocalCrossAttention,
    PairWiseCrossAttention,
    fused_logits,
    local_rows,
    random_partners,
)

__all__ = [
    "DCAL",
    "Branches",
    "DCALBlock",
    "DCALCriterion",
    "GLCABlock",
    "GlobalLocalCrossAttention",
    "PairWiseCrossAttention",
    "batch_hard_triplet_loss",
    "checkpoint_filter_fn",
    "fused_logits",
    "local_rows",
    "random_partners",
]
