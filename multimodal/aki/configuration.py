"""What an AKI model is made of, and the published model's `config.json` read as such."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, Phi3Config, PreTrainedConfig, SiglipConfig, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

__all__ = ["AkiConfig"]

# google/siglip-so400m-patch14-384, the vision tower of AKI-4B.
_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

# microsoft/Phi-3.5-mini-instruct, its language model. That one also states a sliding window of 262,144 tokens: twice
# the longest sequence it takes, so leaving the window out changes nothing and keeps the cache plain.
# fmt: off
_SHORT_FACTOR = [
    1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, *[1.0499999523162842] * 5, 1.0699999332427979,
    1.0999999046325684, 1.1099998950958252, 1.1599998474121094, 1.1599998474121094, 1.1699998378753662,
    1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083,
    1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745,
    *[2.0199997425079346] * 6, *[2.0299997329711914] * 9, 2.0799996852874756, 2.0899996757507324, 2.189999580383301,
    2.2199995517730713, 2.5899994373321533, 2.729999542236328, 2.749999523162842, 2.8399994373321533,
]
_LONG_FACTOR = [
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
    1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
    4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
    17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
    32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
    50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457, 62.61000442504883,
    62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457, 63.77000427246094, 63.93000411987305,
    63.96000289916992, 63.970001220703125, 64.02999877929688, 64.06999969482422, 64.08000183105469, 64.12000274658203,
    64.41000366210938, 64.4800033569336, 64.51000213623047, 64.52999877929688, 64.83999633789062,
]
# fmt: on
_PHI_3_5_MINI = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 32.0,  # of the longest sequence to the one it was trained on first
        "short_factor": _SHORT_FACTOR,
        "long_factor": _LONG_FACTOR,
    },
    "eos_token_id": [32007, 32000],  # <|end|>, <|endoftext|>
    "pad_token_id": 32000,
}

# What the published file names and these defaults hold, so that reading it needs no network.
_BUILT_IN = {
    "vision_encoder_path": "google/siglip-so400m-patch14-384",
    "lang_model_path": "microsoft/Phi-3.5-mini-instruct",
}


class AkiConfig(PreTrainedConfig):
    """Configuration of :class:`AkiForConditionalGeneration`; the defaults are AKI-4B.

    The published `config.json` names its parts by path instead of describing them; `from_pretrained` reads it too.

    Args:
        vision_config: The SigLIP vision tower; AKI-4B's by default.
        text_config: The Phi-3 language model; AKI-4B's by default. Its `vocab_size` becomes the number of ids that
            the model knows (`initial_tokenizer_len + num_additional_tokens`), which is that of its logits.
        embedding_rows: Rows of the language model's own embedding and output tables, which are padded beyond the
            tokenizer's ids; `text_config.vocab_size` by default.
        initial_tokenizer_len: Ids that these tables serve; the ones from here on stand in the additional tables.
        num_additional_tokens: Rows of the additional tables: `<image>` and `<|endofchunk|>`.
        image_token_id: The id that stands for one vision token; the first additional one by default.
        stop_token_id: The marker of the assistant's turn: the last token that an image is allowed to see.
        pad_token_id: The id of padding, whose embedding is not trained.
        num_vision_tokens: Latents of the resampler, which is the number of vision tokens for each picture.
        resampler_depth: Layers of the resampler.
        resampler_heads: Attention heads of a layer.
        resampler_head_dim: Width of a head.
        resampler_ff_mult: Width of the feed-forward layer, in multiples of the vision tower's.
        modality_mutual: Whether images attend to the question that follows (modality-mutual attention). The first
            stage of training, on captions, has no question and is causal either way.
        norm_mean: Mean of the pixel values, for the processor.
        norm_std: Standard deviation of the pixel values, for the processor.

    Raises:
        ValueError: The ids, the tables and the parts do not go together.
    """

    model_type = "aki"
    sub_configs_defaults = {  # noqa: RUF012 - transformers declares it a class variable
        "vision_config": SubConfigSpec(config_class=SiglipVisionConfig, init_kwargs=_SIGLIP_SO400M),
        "text_config": SubConfigSpec(config_class=Phi3Config, init_kwargs=_PHI_3_5_MINI),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    embedding_rows: int | None = None
    initial_tokenizer_len: int = 32012
    num_additional_tokens: int = 2
    image_token_id: int | None = None
    stop_token_id: int = 32001
    pad_token_id: int = 32011
    num_vision_tokens: int = 144
    resampler_depth: int = 6
    resampler_heads: int = 8
    resampler_head_dim: int = 64
    resampler_ff_mult: int = 4
    modality_mutual: bool = True
    norm_mean: float = 0.5
    norm_std: float = 0.5
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Copies, because the text's vocabulary is set below and a caller may build several models of one part.
        self.vision_config, self.text_config = copy.deepcopy(self.vision_config), copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        if self.embedding_rows is None:
            self.embedding_rows = text.vocab_size
        if self.image_token_id is None:
            self.image_token_id = self.initial_tokenizer_len
        self._refuse_what_does_not_fit(text)
        text.vocab_size = self.initial_tokenizer_len + self.num_additional_tokens
        text.pad_token_id = self.pad_token_id

    def _refuse_what_does_not_fit(self, text: Phi3Config) -> None:
        ids = self.initial_tokenizer_len + self.num_additional_tokens
        if not 0 < self.initial_tokenizer_len <= self.embedding_rows:  # type: ignore[operator]
            raise ValueError(
                f"initial_tokenizer_len is {self.initial_tokenizer_len}, but the embedding has {self.embedding_rows} "
                "rows; it must be between 1 and that (text_config.vocab_size)"
            )
        for name in ("image_token_id", "stop_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < ids:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but this vocabulary has the ids 0 to {ids - 1} "
                    "(initial_tokenizer_len + num_additional_tokens); give the id that its tokenizer has"
                )
        if self.pad_token_id >= self.initial_tokenizer_len:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; padding must be one of the {self.initial_tokenizer_len} tokens "
                "of the main table (initial_tokenizer_len)"
            )
        if text.tie_word_embeddings or self.tie_word_embeddings:
            raise ValueError(
                "AKI's output table has a bias and is not its embedding: tie_word_embeddings must be False"
            )
        for name in ("num_vision_tokens", "resampler_depth", "resampler_heads", "resampler_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; the resampler needs at least 1")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads a dictionary, ours or that of the published `config.json`.

        Raises:
            ValueError: A published file describes a model that this class is not.
        """
        if "lang_model_path" in config_dict:
            config_dict = _read_published(config_dict)
        return super().from_dict(config_dict, **kwargs)


def _read_published(published: dict[str, Any]) -> dict[str, Any]:
    """The published file's keys in our words."""
    published = dict(published)
    layers = published.pop("decoder_layers_attr_name", None)
    tiles = published.pop("base_img_size", None)
    if layers not in (None, "model.layers") or tiles is not None:
        raise ValueError(
            f"this config.json has decoder_layers_attr_name={layers!r} and base_img_size={tiles!r}; only a language "
            "model of the Phi-3 kind ('model.layers') and pictures of one tile (null) can be loaded"
        )
    vision = _part(published.pop("vision_encoder_path"), "vision_encoder_path")
    text = _part(published.pop("lang_model_path"), "lang_model_path")
    n_px = published.pop("n_px", None)
    read = {key: published.pop(key) for key in list(published) if key in AkiConfig.__dataclass_fields__}
    if vision is not None:
        read["vision_config"] = vision.vision_config if isinstance(vision, SiglipConfig) else vision
    if text is not None:
        read["text_config"] = text
        if (window := getattr(text, "sliding_window", None)) and window >= text.max_position_embeddings:
            text.sliding_window = None
    image_size = _SIGLIP_SO400M["image_size"] if vision is None else getattr(vision, "vision_config", vision).image_size
    if n_px not in (None, image_size):
        raise ValueError(
            f"this config.json has n_px={n_px}, but its vision tower takes pictures of {image_size} pixels"
        )
    return read


def _part(path: str, key: str) -> Any:
    """The configuration of a part by its hub id or folder; None for the ones that are our defaults."""
    if path == _BUILT_IN[key]:
        return None
    config = AutoConfig.from_pretrained(path)
    expected = (SiglipConfig, SiglipVisionConfig) if key == "vision_encoder_path" else (Phi3Config,)
    if not isinstance(config, expected):
        raise ValueError(
            f"{key} is {path!r}, which is a {type(config).__name__}; AKI has a "
            f"{' or '.join(kind.__name__ for kind in expected)} there"
        )
    return config
