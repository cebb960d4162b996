"""AKI: a vision-language model whose images attend to the question that follows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, Phi3ForCausalLM, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, MultimodalCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from ..mma import Found, MutualAttention, look, modality_mutual_attention, open_mask, remember
from .configuration import AkiConfig
from .resampler import PerceiverResampler
from .vocabulary import ExtendedEmbedding, ExtendedHead

__all__ = ["AkiForConditionalGeneration"]


class AkiForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """SigLIP, a Perceiver resampler and Phi-3, under the names of the published state dict.

    As in every vision-language model of transformers, `input_ids` are expanded: the image id stands once for each
    vision token (`config.num_vision_tokens` for a picture), which :class:`AkiProcessor` sees to. Rows may hold any
    number of pictures, and batches rows of any length, padded on either side.

    Args:
        config: The configuration; `AkiConfig()` is AKI-4B.
    """

    config: AkiConfig
    config_class = AkiConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = {"PerceiverResampler", "ExtendedEmbedding", "ExtendedHead"}  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # the mask depends on what the ids say

    def __init__(self, config: AkiConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        tables = (config.initial_tokenizer_len, config.num_additional_tokens)
        self.vision_encoder = SiglipVisionModel(vision)
        self.vision_tokenizer = PerceiverResampler(
            vision.hidden_size,
            text.hidden_size,
            num_latents=config.num_vision_tokens,
            depth=config.resampler_depth,
            num_heads=config.resampler_heads,
            head_dim=config.resampler_head_dim,
            ff_mult=config.resampler_ff_mult,
        )
        self.lang_model = Phi3ForCausalLM(text)
        rows: Any = config.embedding_rows
        self.lang_model.model.embed_tokens = ExtendedEmbedding(rows, text.hidden_size, *tables, text.pad_token_id)
        self.lang_model.lm_head = ExtendedHead(text.hidden_size, rows, *tables)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a folder or hub id, as every model of transformers, but every weight or none.

        Raises:
            ValueError: Weights are missing, unknown or of another shape; the message names them.
        """
        told = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        _refuse_other_weights(info, pretrained_model_name_or_path)
        return (model, info) if told else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents)

    def get_input_embeddings(self) -> nn.Module:
        return self.lang_model.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.lang_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lang_model.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lang_model.lm_head = new_embeddings

    def get_decoder(self) -> PreTrainedModel:
        """The language model without its output layer."""
        return self.lang_model.model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The embedding, where nothing is to change; AKI's vocabulary cannot grow.

        Raises:
            ValueError: Another number of tokens is asked for.
        """
        if new_num_tokens not in (None, self.config.text_config.vocab_size):  # type: ignore[union-attr]
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}): AKI's additional tokens stand in tables of their own, so "
                "that the ids of the published model stay what they are; build a model with "
                "AkiConfig(num_additional_tokens=…) and load the weights into it"
            )
        return self.get_input_embeddings()

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Vision tokens of pictures.

        Args:
            pixel_values: `(N, 3, H, W)`, normalised; or `(B, T, 1, 3, H, W)`, T pictures of one frame in each row.
            **kwargs: For the vision tower (`output_attentions`, `output_hidden_states`).

        Returns:
            The vision tower's output, with the vision tokens `(N, V, C)` as `pooler_output`.

        Raises:
            ValueError: For another shape.
        """
        kwargs.pop("return_dict", None)
        features = self.vision_encoder(_flat(pixel_values), return_dict=True, **kwargs)
        tokens = self.vision_tokenizer(features.last_hidden_state)
        features.pooler_output = tokens  # the tower's own pooling head is in the published weights, but not used
        return features

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next token, and the loss where there are labels.

        Args:
            input_ids: `(B, L)`, with the image id once for each vision token.
            pixel_values: `(N, 3, H, W)` or `(B, T, 1, 3, H, W)`: the pictures, row after row.
            attention_mask: `(B, L)`, 0 for padding; or a mask that is prepared already.
            position_ids: `(B, L)`.
            cache: Keys and values of the tokens before.
            inputs_embeds: `(B, L, C)` instead of `input_ids`; images and the end of a question are then told by the
                embeddings of their ids.
            labels: `(B, L)`, -100 where nothing is to be predicted, which it must be up to the answer: images have
                seen the question.
            use_cache: Whether to return keys and values.
            logits_to_keep: How many of the last positions to compute logits for, 0 for all; or which.
            mm_encoder_outputs: `{"image": …}`, as `get_image_features` returns it, instead of `pixel_values`.
            **kwargs: For the language model and the loss.

        Returns:
            `loss`, `logits` `(B, L, V)`, `cache`, `hidden_states`, `attentions`, `image_outputs`.

        Raises:
            ValueError: Pictures and image ids do not match; labels stand where an image has looked; or the question
                about a picture comes in another forward than the picture.
        """
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("pixel_values and mm_encoder_outputs were both given; they stand for the same pictures")
        ids, inputs_embeds = self._ids_and_embeddings(input_ids, inputs_embeds)
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        inputs_embeds = self._insert(image_outputs, ids, inputs_embeds)
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        found = self._question(ids, {**given, "labels": labels})
        if found.spans is not None and found.spans.opened.any():  # else causal, which has faster kernels than a mask
            given["attention_mask"] = open_mask(self.get_decoder(), given, found.spans)
        outputs = self.get_decoder()(**given, **kwargs)
        remember(outputs.cache, found)
        logits = self.lang_model.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return MultimodalCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=image_outputs,
        )

    def _ids_and_embeddings(self, input_ids: Tensor | None, inputs_embeds: Any) -> tuple[Tensor, Tensor]:
        """Both, from either; of ids those that matter here (images and the marker), as far as embeddings tell them."""
        table = self.get_input_embeddings()
        if input_ids is not None and inputs_embeds is None:
            return input_ids, table(input_ids)
        if input_ids is not None or inputs_embeds is None:
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        ids = inputs_embeds.new_full(inputs_embeds.shape[:-1], -1, dtype=torch.long)
        for known in (self.config.image_token_id, self.config.stop_token_id):
            embedding = table(torch.tensor(known, device=inputs_embeds.device))
            ids = ids.masked_fill((inputs_embeds == embedding).all(-1), known)
        return ids, inputs_embeds

    def _insert(self, image_outputs: Any, ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Puts vision tokens where the image ids are."""
        is_image = ids == self.config.image_token_id
        if image_outputs is None:
            if ids.shape[1] > 1 and is_image.any():
                raise ValueError(
                    f"the prompt has {int(is_image.sum())} image tokens, but no picture was given; give pixel_values"
                )
            return inputs_embeds
        tokens = image_outputs.pooler_output
        if not isinstance(tokens, Tensor):
            tokens = torch.cat(list(tokens))
        tokens = tokens.reshape(-1, tokens.shape[-1]).to(inputs_embeds.device, inputs_embeds.dtype)
        if (found := int(is_image.sum())) != len(tokens):
            raise ValueError(
                f"the prompt has {found} image tokens, but the pictures make {len(tokens)}; each picture needs the id "
                f"{self.config.image_token_id} {self.config.num_vision_tokens} times, as AkiProcessor writes it"
            )
        return inputs_embeds.masked_scatter(is_image[..., None], tokens)

    def _question(self, ids: Tensor, given: dict[str, Any]) -> Found:
        """What pictures see of the text behind them; nothing where a switch sees to it, with settings of its own."""
        if not self.config.modality_mutual or modality_mutual_attention.active(self) is not None:
            return Found(None)
        return look(self, MutualAttention((self.config.stop_token_id,), "segment", None), ids, given)


def _refuse_other_weights(info: Any, source: Any) -> None:
    kinds = {
        "missing": info["missing_keys"],
        "not AKI's": info["unexpected_keys"],
        "of another shape": {
            f"{name} {tuple(theirs)} instead of {tuple(ours)}" for name, theirs, ours in info["mismatched_keys"]
        },
    }
    found = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            found.append(f"{len(names)} {kind}: {', '.join(sorted(names)[:5])}{more}")
    if found:
        whose = "the state dict" if source is None else repr(str(source))
        raise ValueError(f"{whose} does not hold the weights of this AKI configuration: {'; '.join(found)}")


def _flat(pixel_values: Tensor) -> Tensor:
    """Pictures one after the other, `(N, 3, H, W)`."""
    if pixel_values.ndim == 6 and pixel_values.shape[2] == 1:
        pixel_values = pixel_values.flatten(0, 2)
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values have the shape {tuple(pixel_values.shape)}; (N, 3, H, W) or (B, T, 1, 3, H, W), pictures of "
            "one frame, are expected"
        )
    return pixel_values
