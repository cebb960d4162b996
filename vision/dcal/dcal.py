"""The network of DCAL on timm's vision transformers, and its timm entries; see the package's text."""

import copy
import dataclasses
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import Attention, get_device_dtype
from timm.models import checkpoint, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as host_filter_fn
from torch import Tensor, nn

import weights
from vision.dcal.operators import (
    DCALBlock,
    GLCABlock,
    GlobalLocalCrossAttention,
    PairWiseCrossAttention,
    fused_logits,
    local_rows,
    random_partners,
)
from vision.inference import in_parts

__all__ = ["DCAL", "Branches", "checkpoint_filter_fn"]


class Branches(NamedTuple):
    """All three branches of a training step, each in the order SA, GLCA, PWCA."""

    logits: tuple[Tensor, Tensor, Tensor]
    """`[B, num_classes]` each."""
    features: tuple[Tensor, Tensor, Tensor]
    """Final class tokens, `[B, C]` each."""


_NUMBERS_AT_ONCE = 2 * 3 * 448 * 448  # of images

Inference = Literal["sa", "glca", "both"]
GLCAPool = Literal["token", "avg"]


class DCAL(VisionTransformer):
    """A vision transformer with a GLCA block beside its classifier, and pairs of images in training.

    `model(x)` gives logits: of both classifiers fused (`fused_logits`), or of one. `model(x, branches=True)` gives all
    three branches, for `DCALCriterion`. `forward_features` gives the host's normed tokens and, unless `inference='sa'`,
    GLCA's token behind them; `forward_head(…, pre_logits=True)` gives what the classifiers see, side by side, which for
    both is the paper's descriptor for re-identification.

    Args:
        *args: as timm's `VisionTransformer`.
        inference: 'both', 'sa' (then the network is its host, at its cost) or 'glca'. A parameter that such a choice
            does not reach gets no gradient from `model(x)`; it does from the criterion.
        local_ratio: R, the share of patches that ask in GLCA; in the paper 0.1 for categories, 0.3 for
            re-identification.
        glca_pool: 'token' reads GLCA's class token; 'avg' the mean of its tokens, see the package's text.
        **kwargs: as timm's `VisionTransformer`; `img_size` 448 or (256, 128) as in the paper, for one.

    Raises:
        ValueError: an unknown choice, a ratio outside (0, 1], or another pooling than by class token.
    """

    def __init__(
        self,
        *args: Any,
        inference: Inference = "both",
        local_ratio: float = 0.1,
        glca_pool: GLCAPool = "token",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, block_fn=DCALBlock, attn_layer=PairWiseCrossAttention, **kwargs)
        _check_pooling(self.global_pool, self.num_classes)
        self._add_glca(inference, local_ratio, glca_pool)

    @classmethod
    def from_vit(
        cls,
        vit: VisionTransformer,
        inference: Inference = "both",
        local_ratio: float = 0.1,
        glca_pool: GLCAPool = "token",
    ) -> "DCAL":
        """A DCAL on a built vision transformer of timm's; GLCA starts as a copy of its last block and classifier.

        Args:
            vit: any `VisionTransformer` with a class token that it classifies by, and plain blocks; it stays as it is.
            inference: as the class.
            local_ratio: as the class.
            glca_pool: as the class.

        Raises:
            TypeError: the host is no `VisionTransformer`, or its blocks or attention are of another kind.
            ValueError: the host has no class token or pools otherwise; or as the class.
        """
        _check_host(vit)
        model = copy.deepcopy(vit)
        model.__class__ = cls
        for block in model.blocks:  # the same parameters, with further ways to run
            block.__class__, block.get_submodule("attn").__class__ = DCALBlock, PairWiseCrossAttention
        assert isinstance(model, DCAL)
        model._add_glca(inference, local_ratio, glca_pool)
        if cfg := getattr(model, "pretrained_cfg", None):
            architecture = f"dcal_{cfg.get('architecture')}"
            cfg = {**cfg, "architecture": architecture, "classifier": ("head", "glca_head")}
            model.__dict__.update(pretrained_cfg=cfg, default_cfg=cfg)
        return model

    def _add_glca(self, inference: Inference, local_ratio: float, glca_pool: GLCAPool) -> None:
        if not 0 < local_ratio <= 1:
            raise ValueError(f"local_ratio={local_ratio} is a share of the patches; expected more than 0, at most 1.")
        if glca_pool not in ("token", "avg"):
            raise ValueError(f"glca_pool={glca_pool!r}: expected 'token' or 'avg'.")
        self.local_ratio = local_ratio
        self.glca_pool = glca_pool
        self.glca = copy.deepcopy(self.blocks[-1])
        self.glca.__class__, self.glca.get_submodule("attn").__class__ = GLCABlock, GlobalLocalCrossAttention
        self.glca_norm = copy.deepcopy(self.norm if isinstance(self.fc_norm, nn.Identity) else self.fc_norm)
        self.glca_head = copy.deepcopy(self.head)
        self.inference = inference

    @property
    def inference(self) -> Inference:
        """Which branches `model(x)` answers with; may be set."""
        return self._inference

    @inference.setter
    def inference(self, value: Inference) -> None:
        if value not in ("sa", "glca", "both"):
            raise ValueError(f"inference={value!r}: expected 'sa', 'glca' or 'both'.")
        self._inference: Inference = value
        self.head_hidden_size = self.embed_dim * (2 if value == "both" else 1)
        update_model_args(self, inference=value)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates: timm's, then GLCA."""
        groups = super().group_matcher(coarse)
        return {**groups, "blocks": [*groups["blocks"], (r"^glca\.|^glca_norm", (100000,))]}

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        """The classifiers of SA (and PWCA) and of GLCA."""
        return self.head, self.glca_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts fresh classifiers on top.

        Args:
            num_classes: 0 removes them.
            global_pool: 'token'; '' keeps the tokens, without classes only; None what it is.

        Raises:
            ValueError: another pooling.
        """
        _check_pooling(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)
        dd: Any = get_device_dtype(self)
        self.glca_head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.glca_head.train(self.training)

    def _embed(self, x: Tensor) -> Tensor:
        """Images to the tokens that enter the first block."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def _run_blocks(
        self,
        x: Tensor,
        with_maps: bool = False,
        keep: Collection[int] = (),
        partner: Tensor | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Tokens through the host's first `depth` blocks; the maps of these, and the tokens behind those to keep."""
        maps, kept = [], []
        for i, block in enumerate(self.blocks[:depth]):
            assert isinstance(block, DCALBlock)
            run = block.forward_with_map if with_maps else block
            extra = () if partner is None else (None, False, partner)
            out: Any = checkpoint(run, x, *extra) if self.grad_checkpointing else run(x, *extra)
            if with_maps:
                x, attn = out
                maps.append(attn)
            else:
                x = out
            if i in keep:
                kept.append(x)
        return x, maps, kept

    @property
    def _needs_maps(self) -> bool:
        return self.glca_pool == "avg"

    def _glca_token(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Last tokens of the host, and maps if rows have to be selected, to GLCA's normed token `[B, 1, C]`."""
        if not self._needs_maps:  # no other row reaches the class token
            return self.glca_norm(self.glca(x, x.new_zeros((x.shape[0], 1), dtype=torch.long)))
        rows = local_rows(maps, self.local_ratio, self.num_prefix_tokens)
        return self.glca_norm(self.glca(x, rows)).mean(1, keepdim=True)

    def local_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All that the paper's GLCA block computes.

        Args:
            x: normalised images, `[B, in_chans, H, W]`.

        Returns:
            GLCA's tokens `[B, 1 + K, C]` before its norm, and the rows `[B, 1 + K]` of the host's tokens that they
            come from: 0 for the class token, then the patches of highest rollout, from `num_prefix_tokens` on.
        """
        x, maps, _ = self._run_blocks(self._embed(x), with_maps=True)
        rows = local_rows(maps, self.local_ratio, self.num_prefix_tokens)
        return self.glca(x, rows), rows

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images `[B, in_chans, H, W]` to normed tokens `[B, N, C]`; GLCA's token, if it is asked for, is the last."""
        if self.inference == "sa":
            return self.norm(self._run_blocks(self._embed(x))[0])
        return self._both_features(x)

    def _both_features(self, x: Tensor) -> Tensor:
        """Images to the host's normed tokens and GLCA's behind them, `[B, N + 1, C]`."""

        def run(x: Tensor) -> Tensor:
            x, maps, _ = self._run_blocks(self._embed(x), self._needs_maps)
            return torch.cat((self.norm(x), self._glca_token(x, maps)), dim=1)

        is_recorded = not all(block.get_submodule("attn").fused_attn for block in self.blocks)
        # All layers' maps have to be kept, but not those of all images at once.
        return in_parts(run, x, _NUMBERS_AT_ONCE, self) if self._needs_maps and not is_recorded else run(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`forward_features`' tokens to logits `[B, num_classes]`, or to `[B, head_hidden_size]` with `pre_logits`."""
        if not self.global_pool:
            return x
        sa, glca = self.head_drop(self.fc_norm(x[:, 0])), self.head_drop(x[:, -1])
        if pre_logits or not self.num_classes:
            return {"sa": sa, "glca": glca}.get(self.inference, torch.cat((sa, glca), dim=-1))
        if self.inference == "both":
            return fused_logits(self.head(sa), self.glca_head(glca))
        return self.head(sa) if self.inference == "sa" else self.glca_head(glca)

    def descriptor(self, x: Tensor) -> Tensor:
        """What images of one identity have in common, whatever `inference` is.

        Args:
            x: normalised images, `[B, in_chans, H, W]`.

        Returns:
            `[B, 2 C]`: the class tokens of SA and GLCA. Compare by cosine or Euclidean distance.
        """
        tokens = self._both_features(x)
        return torch.cat((self.fc_norm(tokens[:, 0]), tokens[:, -1]), dim=-1)

    def forward(  # type: ignore[override]
        self, x: Tensor, branches: bool = False, partner: Tensor | None = None
    ) -> Tensor | Branches:
        """Normalised images to logits, or to all three branches of training.

        Args:
            x: `[B, in_chans, H, W]`.
            branches: SA, GLCA and PWCA apart.
            partner: for PWCA, `[B]`: the index of each image's distractor in the batch; by default `random_partners`.

        Returns:
            Logits `[B, num_classes]`; or `Branches`.
        """
        if branches is not True:  # by identity: in a symbolic trace arguments have no truth value
            return self.forward_head(self.forward_features(x))
        partner = random_partners(len(x), x.device) if partner is None else partner
        embedded = self._embed(x)
        sa, maps, _ = self._run_blocks(embedded, self._needs_maps)
        pwca, _, _ = self._run_blocks(embedded, partner=partner)
        glca = self._glca_token(sa, maps)[:, 0]
        sa, pwca = (self.fc_norm(self.norm(tokens)[:, 0]) for tokens in (sa, pwca))
        logits = self.head(self.head_drop(sa)), self.glca_head(self.head_drop(glca)), self.head(self.head_drop(pwca))
        return Branches(logits, (sa, glca, pwca))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Tokens behind the host's blocks; arguments and result as timm's, the final output as `forward_features`.

        With `stop_early` before the last block the final output is the host's tokens there, without GLCA's.

        Raises:
            ValueError: unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(len(self.blocks), indices)
        depth = last + 1 if stop_early else len(self.blocks)
        with_glca = not intermediates_only and depth == len(self.blocks) and self.inference != "sa"
        tokens, maps, kept = self._run_blocks(self._embed(x), with_glca and self._needs_maps, take, depth=depth)
        kept = [self.norm(y) if norm else y for y in kept]
        prefix = [y[:, : self.num_prefix_tokens] for y in kept]
        kept = [y[:, self.num_prefix_tokens :] for y in kept]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            kept = [y.mT.unflatten(2, grid).contiguous() for y in kept]
        final = None if intermediates_only else self.norm(tokens)
        if final is not None and with_glca:
            final = torch.cat((final, self._glca_token(tokens, maps)), dim=1)
        if output_dict:
            named = {"image_intermediates": kept, "image_intermediates_prefix": prefix, "image_features": final}
            left_out = set() if return_prefix_tokens else {"image_intermediates_prefix"}
            return {k: v for k, v in named.items() if v is not None and k not in left_out}
        result = list(zip(kept, prefix, strict=True)) if return_prefix_tokens else kept
        return result if intermediates_only else (final, result)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the tokens asked for do not need; returns their indices. Arguments as timm's.

        With its head, or its last block, a network loses GLCA: what stays is the host, `inference='sa'`.
        """
        _, last = feature_take_indices(len(self.blocks), indices)
        if prune_head or last < len(self.blocks) - 1:
            self.inference = "sa"
            self.glca = self.glca_norm = nn.Identity()
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if isinstance(self.glca, nn.Identity):
            self.glca_head = nn.Identity()
        return take


def _check_pooling(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("token", "") or (num_classes and not global_pool):
        raise ValueError(
            f"global_pool={global_pool!r} with {num_classes} classes: DCAL classifies by class tokens; "
            "expected 'token', or '' with num_classes=0."
        )


def _check_host(vit: nn.Module) -> None:
    if type(vit) is not VisionTransformer:
        raise TypeError(
            f"DCAL takes timm's VisionTransformer as host, got {type(vit).__name__}; expected one of `vit_*`, `deit_*` "
            "(not distilled), `deit3_*`."
        )
    kinds = {(type(block), type(getattr(block, "attn", None))) for block in vit.blocks}
    if kinds != {(Block, Attention)}:
        names = sorted({f"{block.__name__} with {attn.__name__}" for block, attn in kinds})
        raise TypeError(f"DCAL takes a host of plain blocks, Block with Attention; this one has {', '.join(names)}.")
    if not vit.has_class_token or vit.global_pool != "token" or vit.attn_pool is not None:
        raise ValueError(
            f"the host pools by {vit.global_pool!r}{'' if vit.has_class_token else ' and has no class token'}; DCAL "
            "needs one that classifies by its class token."
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A host's checkpoint, or one of ours, for a `DCAL`.

    Args:
        state_dict: the content of a file of a timm or official ViT or DeiT, or a state dict of ours; position
            embeddings of another size are resampled.
        model: the network it is for.

    Returns:
        A state dict that `model` loads; where GLCA was not in it, it starts as the host's last block and classifier.
    """
    assert isinstance(model, DCAL)
    state_dict = host_filter_fn(state_dict, model, adapt_layer_scale=True)
    if not any(name.startswith("glca.") for name in state_dict):
        last = f"blocks.{len(model.blocks) - 1}."
        norm = "norm." if isinstance(model.fc_norm, nn.Identity) else "fc_norm."
        for source, place in ((last, "glca."), (norm, "glca_norm."), ("head.", "glca_head.")):
            copies = {place + n.removeprefix(source): t for n, t in state_dict.items() if n.startswith(source)}
            state_dict = {**state_dict, **copies}
    return state_dict


def _of_host(*names: str) -> dict[str, Any]:
    """The configurations of timm's hosts, weights included, as entries of ours."""
    cfgs = {}
    for name in names:
        host = get_pretrained_cfg(name)
        assert host is not None
        cfgs[f"dcal_{name}"] = dataclasses.replace(
            host, architecture=None, tag=None, url=host.url or None, classifier=("head", "glca_head")
        )
    return cfgs


default_cfgs = generate_default_cfgs(
    _of_host(
        "deit_tiny_patch16_224.fb_in1k",
        "deit_small_patch16_224.fb_in1k",
        "deit_base_patch16_224.fb_in1k",
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "vit_base_patch16_224.orig_in21k_ft_in1k",
    )
)


def _create_dcal(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> DCAL:
    return weights.build_model(
        DCAL,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"patch_size": 16, "depth": 12, **defaults, **kwargs},
    )


@register_model
def dcal_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> DCAL:
    """DCAL on DeiT-Ti; `pretrained=True` starts from the host's ImageNet-1K weights."""
    return _create_dcal("dcal_deit_tiny_patch16_224", pretrained, {"embed_dim": 192, "num_heads": 3}, kwargs)


@register_model
def dcal_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> DCAL:
    """DCAL on DeiT-S; `pretrained=True` starts from the host's ImageNet-1K weights."""
    return _create_dcal("dcal_deit_small_patch16_224", pretrained, {"embed_dim": 384, "num_heads": 6}, kwargs)


@register_model
def dcal_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> DCAL:
    """DCAL on DeiT-B; `pretrained=True` starts from the host's ImageNet-1K weights."""
    return _create_dcal("dcal_deit_base_patch16_224", pretrained, {"embed_dim": 768, "num_heads": 12}, kwargs)


@register_model
def dcal_vit_base_patch16_224(pretrained: bool = False, **kwargs) -> DCAL:
    """DCAL on ViT-B/16; `pretrained=True` starts from the host's weights, trained on ImageNet-21K and then 1K."""
    return _create_dcal("dcal_vit_base_patch16_224", pretrained, {"embed_dim": 768, "num_heads": 12}, kwargs)
