"""Pictures and questions to the inputs of AKI."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .configuration import AkiConfig

__all__ = ["AkiProcessor"]

IMAGE_TOKEN = "<image>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<pad>"

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

# The published prompt: a system message, then the turns; pictures are put before the text of their turn.
_CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{ '<s> <|system|>\\n" + SYSTEM_PROMPT.replace("'", "\\'") + "<|end|>\\n' }}"
    "{%- else %}{{ '<s> ' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|' + message.role + '|>\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}"
    "{%- for part in message.content if part.type == 'image' %}{{- '<image>\\n' }}{%- endfor %}"
    "{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}"
    "{%- endif %}"
    "{{- '<|end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)


class AkiProcessor(ProcessorMixin):
    """Makes the inputs of :class:`AkiForConditionalGeneration`.

    `processor(images, text)` resizes the pictures to squares, replaces each `<image>` of the text by the image tokens
    of one picture, and pads rows on the left. `processor.prompt(question)` writes the published prompt,
    `apply_chat_template` that of a whole conversation.

    Args:
        image_processor: Resizes and normalises pictures.
        tokenizer: The tokenizer, with the special tokens; see :meth:`from_tokenizer`.
        num_vision_tokens: Image tokens of one picture.
        chat_template: Jinja template of a conversation; the published one by default.

    Raises:
        ValueError: The tokenizer does not know `<image>` as one token.
    """

    text_kwargs = {"padding": True, "padding_side": "left", "add_special_tokens": False}  # noqa: RUF012
    image_token = IMAGE_TOKEN

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_vision_tokens: int = 144,
        chat_template: str | None = None,
    ) -> None:
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer has no token {IMAGE_TOKEN}; AkiProcessor.from_tokenizer adds AKI's special tokens to it"
            )
        if not isinstance(image_processor, PilBackend):
            # PIL resizes as the published code does; torchvision's own way is off by a level here and there.
            image_processor = SiglipImageProcessorPil.from_dict(image_processor.to_dict())
        self.num_vision_tokens = num_vision_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, config: AkiConfig | None = None) -> AkiProcessor:
        """The processor of a model, from the tokenizer of its language model.

        Args:
            tokenizer: Phi-3.5's tokenizer, or AKI's own. It gets the special tokens that it lacks.
            config: The model's configuration; AKI-4B's by default.

        Raises:
            ValueError: The tokens do not get the ids that the model has for them.
        """
        config = AkiConfig() if config is None else config
        vocabulary = tokenizer.get_vocab()
        if PAD_TOKEN not in vocabulary or tokenizer.pad_token != PAD_TOKEN:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        absent = [token for token in (IMAGE_TOKEN, END_OF_CHUNK_TOKEN) if token not in vocabulary]
        if absent:
            tokenizer.add_tokens(absent, special_tokens=True)
        for token, expected in ((PAD_TOKEN, config.pad_token_id), (IMAGE_TOKEN, config.image_token_id)):
            if (found := tokenizer.convert_tokens_to_ids(token)) != expected:
                raise ValueError(
                    f"{token} has the id {found} in this tokenizer, but {expected} in the model; give the tokenizer of "
                    "the model's own language model, or of the model itself"
                )
        size = config.vision_config.image_size  # type: ignore[union-attr]
        image_processor = SiglipImageProcessorPil(
            size={"height": size, "width": size},
            resample=PILImageResampling.BICUBIC,
            image_mean=[config.norm_mean] * 3,
            image_std=[config.norm_std] * 3,
        )
        return cls(image_processor, tokenizer, num_vision_tokens=config.num_vision_tokens)

    def prompt(self, question: str, num_images: int = 1) -> str:
        """The published prompt: system message, pictures, question, and the marker of the answer.

        Args:
            question: What is asked.
            num_images: Pictures before the question. The published model has seen one.

        Raises:
            ValueError: The question holds `<image>` itself.
        """
        if IMAGE_TOKEN in question:
            raise ValueError(f"the question {question!r} holds {IMAGE_TOKEN}; say num_images instead")
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)  # type: ignore[return-value]

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Holds pictures against placeholders, row by row where the pictures come in rows.

        Raises:
            ValueError: A row has more or fewer pictures than placeholders.
        """
        super().validate_inputs(images=images, text=text, **kwargs)
        if not text or not isinstance(images, list | tuple) or not isinstance(images[0], list | tuple):
            return
        for row, (pictures, sample) in enumerate(zip(images, text, strict=True)):
            if len(pictures) != (places := sample.count(self.image_token)):
                raise ValueError(
                    f"row {row} has {len(pictures)} pictures, but {places} {IMAGE_TOKEN} in its text; each picture "
                    "needs one"
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return IMAGE_TOKEN * self.num_vision_tokens
