"""OAT: an encoder of the objects of a scene, and a decoder that points at the object that is fixated next.

Paper: "Oat: Object-Level Attention Transformer for Gaze Scanpath Prediction", Fang et al., ECCV 2024,
https://arxiv.org/abs/2407.13335. The authors' code has no licence; nothing is taken from it.

What differs from it:

* position codes in closed form (`vision.scanpath.positions`), and both halves of a token are of the same scale:
  appearance is standardised, without weights, or it is drowned by positions and ignored;
* what has no look (the start of a scanpath, objects without crops) has one learned vector, `blank`; padding is masked
  and has no vector at all, so that the pointer has no slot for it, which no training target ever was;
* crops are RGB from 0 to 1, and any grid, free places and objects of unequal size are taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision.scanpath.appearance import CropCNN, FrozenBackbone
from vision.scanpath.positions import Position, PositionCode, sinusoid
from vision.scanpath.scenes import PAD, Scenes, check_fixations

__all__ = ["OAT", "EncodedScenes", "OATConfig", "ObjectPointer", "next_objects", "teacher_forcing_loss"]

Appearance = Literal["cnn", "backbone", "features", "none"]
TargetToken = Literal["full", "appearance", "none"]


@dataclass(frozen=True)
class OATConfig:
    """Sizes and parts of an `OAT`; the defaults are the paper's. Holds only what JSON can.

    Attributes:
        dim: C, width of tokens.
        position_dim: of which are for position; the others are for appearance.
        depth: layers of the encoder, and of the decoder.
        num_heads: of each attention.
        mlp_dim: hidden width of the feed-forward networks.
        dropout: in all layers, and on the decoder's tokens.
        pointer_heads: N_c, heads of the pointer.
        position: kind of the position code, see `PositionCode`; 'distance_2d' is for objects that lie freely.
        extent: rows and columns of the largest grid, or with 'distance_2d' height and width of the largest picture.
        sigma: how far, in the same unit, places are alike.
        appearance: 'cnn' learns from crops; 'backbone' takes crops through a frozen network of timm; 'features' takes
            vectors that you made; 'none' looks at nothing.
        crop_size: 'cnn': height and width of crops.
        pools: 'cnn': sizes of its poolings.
        pyramid: 'cnn', 'backbone': levels of a spatial pyramid, for crops of unequal sizes.
        backbone: 'backbone': a model of timm.
        feature_dim: 'features': their length.
        target_token: what the token of the target tells: 'full' is look and place, 'appearance' the look alone, 'none'
            neither, so that the target is known only once it is fixated.
        max_length: fixations after which decoding stops by default: the longest scanpath of the training data.

    Raises:
        ValueError: sizes that do not fit each other, unknown kinds.
    """

    dim: int = 512
    position_dim: int = 256
    depth: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    dropout: float = 0.1
    pointer_heads: int = 2
    position: Position = "distance"
    extent: tuple[float, float] = (14, 14)
    sigma: float = 2.0
    appearance: Appearance = "cnn"
    crop_size: tuple[int, int] = (150, 93)
    pools: tuple[int, int] = (5, 3)
    pyramid: tuple[int, ...] | None = None
    backbone: str | None = None
    feature_dim: int | None = None
    target_token: TargetToken = "full"
    max_length: int = 100

    def __post_init__(self) -> None:
        for name in ("extent", "crop_size", "pools", "pyramid"):
            if getattr(self, name) is not None:  # JSON knows no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, known in (("appearance", get_args(Appearance)), ("target_token", get_args(TargetToken))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, known))}.")
        for name in ("depth", "num_heads", "mlp_dim", "pointer_heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.position_dim < self.dim or self.dim % self.num_heads or self.dim % 2:
            raise ValueError(
                f"dim={self.dim} must be even, a multiple of num_heads={self.num_heads}, and more than "
                f"position_dim={self.position_dim}."
            )
        for kind, name in (("backbone", "backbone"), ("features", "feature_dim")):
            if self.appearance == kind and not getattr(self, name):
                raise ValueError(f"appearance={kind!r} needs {name}.")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `OATConfig(**content)` is the way back."""
        return asdict(self)


class EncodedScenes(NamedTuple):
    """What the decoder needs of each scene; may be indexed to repeat or to choose scenes."""

    memory: Tensor
    """`[B, N + 1, C]`, of the encoder: the objects, then the target token."""
    padding: Tensor
    """`[B, N + 1]`, True where there is no object."""
    tokens: Tensor
    """`[B, N + 1, C]`, of the decoder, before time is added: of a fixation of each object, then of the start."""

    def select(self, index: Tensor) -> EncodedScenes:
        """Scenes `[P]` of the batch."""
        return EncodedScenes(*(part[index] for part in self))


class ObjectPointer(nn.Module):
    """Object attention: `logit = merge_h(q_h · k_h / sqrt(C))`, heads merged for each object by one linear layer.

    Args:
        dim: C.
        num_heads: each as wide as the whole.
    """

    def __init__(self, dim: int, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.query = nn.Linear(dim, num_heads * dim)
        self.key = nn.Linear(dim, num_heads * dim)
        self.merge = nn.Linear(num_heads, 1)

    def keys(self, memory: Tensor) -> Tensor:
        """`[B, N, C]` → `[B, N, h, C]`."""
        return self.key(memory).unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """`[B, T, C]` and the keys of N objects → `[B, T, N]`."""
        queries = self.query(x).unflatten(-1, (self.num_heads, -1))
        scores = torch.einsum("bthc,bnhc->btnh", queries, keys) * self.scale
        return self.merge(scores).squeeze(-1)


class OAT(nn.Module):
    """Object-level attention transformer: distribution of the next fixation over the objects of a scene, and its end.

    A token is `[appearance ; position]`. The encoder sees all objects and a token of the target; the decoder sees what
    has been fixated so far, and points. Pointing at the target token, the last, ends the search.

    Args:
        config: sizes and parts.
        pretrained: fetch the published weights of the 'backbone', which no training changes.

    Raises:
        ValueError: a position code that does not fit the extent, crops that are too small.
    """

    def __init__(self, config: OATConfig | None = None, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config = config or OATConfig()
        appearance_dim = config.dim - config.position_dim
        self.appearance: nn.Module | None = None
        if config.appearance == "cnn":
            self.appearance = CropCNN(appearance_dim, config.crop_size, pools=config.pools, pyramid=config.pyramid)
        elif config.appearance == "features":
            self.appearance = nn.Linear(cast(int, config.feature_dim), appearance_dim)
        elif config.appearance == "backbone":
            self.appearance = FrozenBackbone(
                cast(str, config.backbone), appearance_dim, config.pyramid or (1, 2), pretrained
            )
        if self.appearance is not None:
            self.appearance_norm = nn.BatchNorm1d(appearance_dim, affine=False)
        self.position = PositionCode(config.position, config.position_dim, config.extent, config.sigma)
        self.blank = nn.Parameter(torch.randn(appearance_dim))
        sizes: dict[str, Any] = {"dropout": config.dropout, "batch_first": True}
        layer = nn.TransformerEncoderLayer(config.dim, config.num_heads, config.mlp_dim, **sizes)
        self.encoder = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        decoder_layer = nn.TransformerDecoderLayer(config.dim, config.num_heads, config.mlp_dim, **sizes)
        self.decoder = nn.TransformerDecoder(decoder_layer, config.depth)
        self.pointer = ObjectPointer(config.dim, config.pointer_heads)
        self.dropout = nn.Dropout(config.dropout)
        self._init_weights()

    def encode(self, scenes: Scenes) -> EncodedScenes:
        """Runs the encoder, once for each scene.

        Raises:
            ValueError: places outside the extent; looks that are not what the model takes.
        """
        self._check_places(scenes)
        looks = self._looks(scenes)  # [B, N, C_a]
        batch = torch.arange(len(scenes), device=scenes.targets.device)
        is_target = torch.zeros_like(scenes.mask)
        is_target[batch, scenes.targets] = True
        blank, middle = self.blank.expand(len(scenes), -1), self._middle(scenes)
        token = self.config.target_token
        target = self._token(
            blank if token == "none" else looks[batch, scenes.targets],
            scenes.positions[batch, scenes.targets] if token == "full" else middle,
            torch.ones_like(scenes.targets),
        )
        start = self._token(blank, middle, torch.zeros_like(scenes.targets))
        objects = self._token(looks, scenes.positions, torch.zeros_like(is_target))
        fixated = self._token(looks, scenes.positions, is_target)
        padding = F.pad(~scenes.mask, (0, 1), value=False)
        memory = self.encoder(torch.cat((objects, target[:, None]), 1), src_key_padding_mask=padding)  # [B, N + 1, C]
        return EncodedScenes(memory, padding, torch.cat((fixated, start[:, None]), 1))

    def forward(self, scenes: Scenes, fixations: Tensor, scene_of: Tensor | None = None) -> Tensor:
        """What comes next, after each of the fixations that came (teacher forcing).

        Args:
            scenes: B of them.
            fixations: objects, `[P, T]`, int64, padded with `PAD`.
            scene_of: which scene each scanpath is of, `[P]`; None where there is one for each.

        Returns:
            Logits `[P, T + 1, N + 1]`, float: column n for object n, the last one for the end of search; minus infinity
            for what is no object, and for an end before the first fixation. Row t is after t fixations; rows behind the
            end of a scanpath mean nothing.

        Raises:
            ValueError: an object that the scene does not have, an empty scanpath, one that goes on after padding; see
                also `encode`.
        """
        if scene_of is None:
            scene_of = torch.arange(len(scenes), device=fixations.device)
        if fixations.ndim != 2 or scene_of.shape != fixations.shape[:1]:
            raise ValueError(
                f"fixations {list(fixations.shape)} of {len(scene_of)} scenes: expected [P, T], and a scene for each; "
                "say which by scene_of=…."
            )
        check_fixations(fixations, scenes.counts[scene_of])
        return self.decode(self.encode(scenes).select(scene_of), fixations)

    def decode(self, encoded: EncodedScenes, fixations: Tensor) -> Tensor:
        """As `forward`, of scenes that are encoded, one for each scanpath, without checks; T may be 0 here."""
        start = encoded.padding.shape[1] - 1
        steps = F.pad(fixations.where(fixations >= 0, 0), (1, 0), value=start)  # [P, T + 1]
        x = encoded.tokens.gather(1, steps[..., None].expand(-1, -1, self.config.dim))
        x = self.dropout(x + self.time(steps.shape[1], x.device).to(x.dtype))
        causal = torch.ones(steps.shape[1], steps.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = self.decoder(
            x, encoded.memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=encoded.padding
        )
        logits = self.pointer(x, self.pointer.keys(encoded.memory))
        impossible = encoded.padding[:, None].repeat(1, steps.shape[1], 1)
        impossible[:, 0, start] = True  # a search has a fixation at least
        return logits.masked_fill(impossible, -torch.inf)

    def time(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """Codes of the first steps of time, `[T, C]`."""
        return sinusoid(torch.arange(length, device=device), self.config.dim)

    def _token(self, look: Tensor, place: Tensor, flag: Tensor) -> Tensor:
        return torch.cat((look, self.position(place, flag).to(look.dtype)), -1)

    def _looks(self, scenes: Scenes) -> Tensor:
        """Appearance of the objects, `[B, N, C_a]`."""
        if self.appearance is None:
            return self.blank.expand(*scenes.mask.shape, -1)
        own = scenes.looks if scenes.look_of is None else scenes.look_of
        if scenes.looks is None or own is None or len(own) != int(scenes.counts.sum()):
            given = "none" if scenes.looks is None or own is None else len(own)
            raise ValueError(
                f"looks of {given} of {int(scenes.counts.sum())} objects: appearance={self.config.appearance!r} needs "
                "one of each; build the model with appearance='none' where there are none."
            )
        if self.config.appearance == "features" and not (
            isinstance(scenes.looks, Tensor) and scenes.looks.shape[1:] == (self.config.feature_dim,)
        ):
            raise ValueError(f"looks: expected features, {self.config.feature_dim} numbers of each object.")
        known = self.appearance_norm(self.appearance(scenes.looks))  # [M, C_a]
        looks = self.blank.to(known.dtype).repeat(*scenes.mask.shape, 1)
        looks[scenes.mask] = known if scenes.look_of is None else known[scenes.look_of]
        return looks

    def _middle(self, scenes: Scenes) -> Tensor:
        """Where a search starts, `[B, 2]`: the cell (rows // 2, columns // 2), or the middle of the places."""
        absent = ~scenes.mask[..., None]
        low = scenes.positions.masked_fill(absent, torch.inf).amin(1)
        high = scenes.positions.masked_fill(absent, -torch.inf).amax(1)
        is_free = self.config.position == "distance_2d"
        return (low + high) / 2 if is_free else ((low + high + 1) / 2).floor()

    def _check_places(self, scenes: Scenes) -> None:
        extent = torch.tensor(self.config.extent, dtype=torch.float32, device=scenes.positions.device)
        last = extent if self.config.position == "distance_2d" else extent - 1
        outside = ((scenes.positions < 0) | (scenes.positions > last)).any(-1)
        if outside.any():
            scene, item = outside.nonzero()[0].tolist()
            raise ValueError(
                f"object {item} of scene {scene} is at {scenes.positions[scene, item].tolist()}: the model knows "
                f"places from 0 to {last.tolist()}; build it with a larger extent."
            )

    def _init_weights(self) -> None:
        """Xavier's uniform initialisation of each matrix; torch's layers of a stack are copies of one."""
        for part in (self.appearance, self.encoder, self.decoder, self.pointer.merge):
            for weight in part.parameters() if part is not None else ():
                if weight.ndim > 1 and weight.requires_grad:
                    nn.init.xavier_uniform_(weight)
        for projection in (self.pointer.query, self.pointer.key):
            for head in projection.weight.chunk(self.pointer.num_heads):
                nn.init.xavier_uniform_(head)


def next_objects(fixations: Tensor, end: int) -> Tensor:
    """What comes after each number of fixations: the next one, the end, then padding.

    Args:
        fixations: `[P, T]`, padded with `PAD`.
        end: what stands for the end: of an `OAT` the number of objects of the largest scene of the batch.

    Returns:
        `[P, T + 1]`, for the rows of `OAT.forward`.
    """
    lengths = (fixations != PAD).sum(1, keepdim=True)
    return F.pad(fixations, (0, 1), value=PAD).scatter(1, lengths, end)


def teacher_forcing_loss(logits: Tensor, fixations: Tensor) -> Tensor:
    """Mean over all fixations and ends of `-log p`, in nats; padding does not count.

    Args:
        logits: of `OAT.forward`, `[P, T + 1, N + 1]`.
        fixations: that they were computed from, `[P, T]`, padded with `PAD`.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.ndim != 3 or logits.shape[:2] != (fixations.shape[0], fixations.shape[1] + 1):
        raise ValueError(f"logits {list(logits.shape)} of fixations {list(fixations.shape)}: expected [P, T + 1, …].")
    following = next_objects(fixations, end=logits.shape[-1] - 1)
    return F.cross_entropy(logits.float().flatten(0, 1), following.flatten(), ignore_index=PAD)
