"""How a Sparsifiner learns: from labels, from its dense teacher, and its predictors from dense attention."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.attention import record_attention
from vision.criterion import StepLoss, classification_loss, unwrapped
from vision.sparsifiner.attention import Connectivity, SparsifinerAttention, record_connectivity
from vision.sparsifiner.predictor import ConnectivityPredictor

__all__ = ["Phase", "SparsifinerCriterion"]

Phase = Literal["attn_recon", "cls_distill", "attn_self_distill", "joint"]
"""What is trained, on what: the predictors on the teacher's attention; all but the predictors on labels and teacher;
the predictors on the network's own dense attention; everything on all of these but the teacher's attention."""

# Weights of the losses in each phase, as in the authors' configuration (which runs the first two phases).
_WEIGHTS: dict[Phase, dict[str, float]] = {
    "attn_recon": {"attn_recon": 0.01},
    "cls_distill": {"cls": 1.0, "cls_distill": 0.5, "token_distill": 0.5},
    "attn_self_distill": {"attn_self_distill": 0.002},
    "joint": {"cls": 1.0, "cls_distill": 0.5, "token_distill": 0.5, "attn_self_distill": 0.002},
}
_PARTS = ("cls", "cls_distill", "token_distill", "attn_recon", "attn_self_distill", "least_k", "ratio", "basis_l1")
_OF_TEACHER = ("cls_distill", "token_distill", "attn_recon")
_OF_CONNECTIVITY = ("attn_recon", "attn_self_distill", "least_k", "ratio")


class SparsifinerCriterion(nn.Module):
    """The losses of one training phase.

    | part | value |
    | --- | --- |
    | `cls` | cross-entropy with the labels |
    | `cls_distill` | KL divergence of the logits from the teacher's, summed over classes |
    | `token_distill` | mean squared distance of the patch tokens (or of the logits of `aux_head`) from the teacher's |
    | `attn_recon` | squared distance of the raw connectivity scores from the teacher's attention, summed |
    | `attn_self_distill` | the same of the sparse scores from the network's own dense attention |
    | `least_k` | mean of the mask's entries outside of the budget |
    | `ratio` | squared distance of the share of keys kept from `keep_rate`, mean over queries |
    | `basis_l1` | mean absolute value of the bases |

    Sums are over batch, heads, queries and keys, means over blocks. `least_k` and `ratio` hold the number of keys to
    the budget and can be off it only where `score_threshold` chooses; like the mask they have no gradient. In the
    phase `attn_recon` the network attends to all keys.

    Args:
        teacher: a trained dense network of the same sizes: a timm ViT, or a `Sparsifiner` with the path 'dense'. It
            is frozen and stays in evaluation mode. None where no loss needs it.
        phase: what is trained; decides which losses count.
        weights: name of a part → its weight, over the phase's own; 0 leaves a part out.
        label_smoothing: of `cls`.

    Raises:
        ValueError: an unknown phase or part, or a part that needs a teacher without one.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        phase: Phase = "cls_distill",
        weights: Mapping[str, float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if phase not in get_args(Phase):
            raise ValueError(f"phase={phase!r}: expected one of {', '.join(get_args(Phase))}.")
        if unknown := set(weights or ()) - set(_PARTS):
            raise ValueError(f"weights of {sorted(unknown)}: expected names of {', '.join(_PARTS)}.")
        self.phase: Phase = phase
        self.weights = {name: w for name, w in {**_WEIGHTS[phase], **(weights or {})}.items() if w}
        self.label_smoothing = label_smoothing
        if teacher is None and (needed := [part for part in _OF_TEACHER if part in self.weights]):
            raise ValueError(f"{', '.join(needed)} in the phase {phase!r}: pass the dense network as teacher.")
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()

    def train(self, mode: bool = True) -> "SparsifinerCriterion":
        """Changes the mode of the criterion; the teacher stays in evaluation."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def set_trainable(self, model: nn.Module) -> list[str]:
        """Freezes what this phase does not train and frees what it trains; call it before building the optimiser.

        Args:
            model: the network.

        Returns:
            The names of the parameters that are trained.
        """
        in_predictor = {id(p) for m in model.modules() if isinstance(m, ConnectivityPredictor) for p in m.parameters()}
        for parameter in model.parameters():
            is_predictor = id(parameter) in in_predictor
            parameter.requires_grad_(self.phase == "joint" or is_predictor == self.phase.startswith("attn"))
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def forward(self, model: nn.Module, images: Tensor, target: Tensor) -> StepLoss:
        """The loss of one step.

        Args:
            model: a `Sparsifiner`, or a data-parallel wrapper of one.
            images: normalised, `[B, C, H, W]`.
            target: `[B]`, integer classes, or `[B, num_classes]`, probabilities.

        Returns:
            The weighted sum, the student's logits, and the parts of the sum without their weights.

        Raises:
            ValueError: a network without connectivity, with gradient checkpointing (what is recorded would not be what
                is differentiated), or unlike its teacher.
        """
        network = unwrapped(model)
        if getattr(network, "grad_checkpointing", False):
            raise ValueError("SparsifinerCriterion records layers as they run; turn gradient checkpointing off.")
        with ExitStack() as stack:
            heard = stack.enter_context(_listening(network))
            layers: list[Connectivity] = []
            if any(part in self.weights for part in _OF_CONNECTIVITY):
                layers = stack.enter_context(record_connectivity(network, reconstruct=self.phase == "attn_recon"))
            logits = model(images)
        taught, attn = self._teach(images)
        parts = {part: self._part(part, network, logits, target, heard, layers, taught, attn) for part in self.weights}
        loss = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        return StepLoss(loss, logits.detach(), {name: value.detach() for name, value in parts.items()})

    def _teach(self, images: Tensor) -> "tuple[_Heard, list[Tensor]]":
        """What the teacher says of the images, and its attention, `[B, heads, N - 1, N]` per block."""
        if self.teacher is None or not any(part in self.weights for part in _OF_TEACHER):
            return _Heard(), []
        with torch.no_grad(), ExitStack() as stack:
            heard = stack.enter_context(_listening(self.teacher))
            kept = stack.enter_context(record_attention(self.teacher)) if "attn_recon" in self.weights else {}
            logits = self.teacher(images)
        if heard.logits is None:
            heard.logits = logits
        return heard, [layer_map.attn[:, :, 1:] for maps in kept.values() for layer_map in maps]

    def _part(
        self,
        part: str,
        network: nn.Module,
        logits: Tensor,
        target: Tensor,
        heard: "_Heard",
        layers: list[Connectivity],
        taught: "_Heard",
        attn: list[Tensor],
    ) -> Tensor:
        """One of the losses by its name, before its weight."""
        if part == "cls":
            return classification_loss(logits, target, self.label_smoothing)
        if part == "attn_self_distill":
            return _distances([x.scores for x in layers], [x.dense_attn[:, :, 1:] for x in layers], part)
        if part in ("least_k", "ratio"):
            rates: list[float] = [m.keep_rate for m in network.modules() if isinstance(m, SparsifinerAttention)]
            loss = _least_k if part == "least_k" else _ratio
            return torch.stack([loss(x.mask, rate) for x, rate in zip(layers, rates, strict=True)]).mean()
        if part == "basis_l1":
            predictors = [m for m in network.modules() if isinstance(m, ConnectivityPredictor)]
            return torch.stack([m.basis(raw=True).abs().mean() for m in predictors]).mean()
        if part == "attn_recon":
            return _distances([x.scores for x in layers], attn, part)
        if part == "cls_distill":
            assert taught.logits is not None
            _check_same(logits.shape, taught.logits.shape, "logits")
            log_p, log_q = logits.log_softmax(-1), taught.logits.log_softmax(-1)
            return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        assert heard.tokens is not None and heard.kept is not None and taught.tokens is not None
        _check_same(heard.tokens.shape, taught.tokens.shape, "patch tokens")
        return F.mse_loss(heard.tokens[heard.kept], taught.tokens[heard.kept])


@dataclass
class _Heard:
    """What a network says of a batch, as far as it is distilled."""

    tokens: Tensor | None = None
    """`[B, patches, C]`: the output of `aux_head`, where a network has one, else the normed patch tokens."""
    kept: Tensor | None = None
    """Bool, `[B, patches]`: those that were not pruned."""
    logits: Tensor | None = None
    """`[B, num_classes]`: the class token's alone, where a network has an `aux_head` beside it."""


@contextmanager
def _listening(network: nn.Module) -> Iterator[_Heard]:
    """Keeps what a network says in a forward, as long as the context lasts."""
    if not hasattr(network, "norm"):
        raise ValueError(f"{type(network).__name__} has no final `norm` to take tokens from; expected a timm ViT.")
    heard = _Heard()
    prefix = getattr(network, "num_prefix_tokens", 1)

    def after_norm(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        heard.kept = (args[0][:, prefix:] != 0).any(-1)
        heard.tokens = out[:, prefix:]

    def after_aux_head(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        heard.tokens = out

    def after_head(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        heard.logits = out

    hooks = {"norm": after_norm}
    if hasattr(network, "aux_head"):
        hooks |= {"aux_head": after_aux_head, "head": after_head}
    handles = [network.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _distances(scores: Sequence[Tensor], attn: Sequence[Tensor], part: str) -> Tensor:
    """Squared distances of scores and attention, `[B, heads, N - 1, N]` each, summed; mean over blocks."""
    _check_same((len(scores), *scores[0].shape), (len(attn), *(attn[0].shape if attn else ())), f"attention of {part}")
    return torch.stack([F.mse_loss(s, a, reduction="sum") for s, a in zip(scores, attn, strict=True)]).mean()


def _least_k(mask: Tensor, keep_rate: float) -> Tensor:
    """Mean of the smallest entries of each query's mask, those that a budget of `keep_rate` leaves out."""
    num_tokens = mask.shape[-1]
    entries = mask[:, :, 1:].float()
    return entries.topk(num_tokens - int(keep_rate * num_tokens), largest=False, sorted=False).values.mean()


def _ratio(mask: Tensor, keep_rate: float) -> Tensor:
    """Squared distance of the share of keys from `keep_rate`, mean over all queries."""
    return (mask.float().mean(-1) - keep_rate).square().mean()


def _check_same(student: Sequence[int], teacher: Sequence[int], what: str) -> None:
    if tuple(student) != tuple(teacher):
        raise ValueError(
            f"the student's {what} are {tuple(student)}, the teacher's {tuple(teacher)}; they must be networks of the "
            "same sizes, and the teacher's attention that of timm's or of the path 'dense'."
        )
