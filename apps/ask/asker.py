"""A question to a vision-language model about a picture, under any switches: answer, what it read, time to its start.

What the verb and the demo share.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from multimodal.layout import family_of

from .switches import Switches

__all__ = ["Answer", "Asker"]

_ANSWER_TOKENS = 128  # where neither user nor model sets a limit
_TIMED = 3  # prefills whose median is taken


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer.
        tokens: The same, `[T]`, with what ends it.
        there: Image tokens of the prompt.
        kept: Image tokens that the language model was given.
        compression: What became of the image tokens, `multimodal.vmtc.Shortened`; None without compression.
    """

    text: str
    tokens: Tensor
    there: int
    kept: int
    compression: Any = None


class Asker:
    """A model with its processor.

    Args:
        model: Of a supported family, on its device.
        processor: Makes its inputs.
        max_tokens: Tokens of an answer, at most; None for the model's own limit.
    """

    def __init__(self, model: Any, processor: Any, max_tokens: int | None = None) -> None:
        self.model, self.processor, self.max_tokens = model, processor, max_tokens
        self._image_token = family_of(model).image_token_id(model)

    def inputs(self, picture: Image.Image, question: str) -> Any:
        """The prompt, on the model's device.

        Args:
            picture: RGB.
            question: As the user puts it.

        Raises:
            ValueError: The processor cannot do with them.
        """
        processor = self.processor
        template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        if template is None:  # of a model that was not taught to chat, such as PaliGemma
            inputs = processor(images=[picture], text=[f"{processor.image_token}{question}"], return_tensors="pt")
        else:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def answer(self, inputs: Any, switches: Switches) -> Answer:
        """Lets the model write, always the likeliest token.

        Args:
            inputs: As of `inputs`.
            switches: Under which it is asked.

        Raises:
            ValueError: A switch cannot do with this prompt.
        """
        with torch.inference_mode(), switches.on(self.model) as compression:
            sequence = self.model.generate(**inputs, **self._greedily())[0]
        tokens = sequence[inputs["input_ids"].shape[1] :]
        there = int((inputs["input_ids"] == self._image_token).sum())
        shortened = None if compression is None else compression.last
        kept = there if shortened is None else sum(len(own.index) for own in shortened.pictures)
        return Answer(self.processor.decode(tokens, skip_special_tokens=True).strip(), tokens, there, kept, shortened)

    def prefill(self, inputs: Any) -> Any:
        """Reads the prompt and writes one token; under the switches that are on.

        Returns:
            What `generate` returns; `multimodal.layout.cache_of` finds the cache that the prompt leaves in it.
        """
        one: dict[str, Any] = {"max_new_tokens": 1, "return_dict_in_generate": True}
        with torch.inference_mode():
            return self.model.generate(**inputs, **self._greedily() | one)

    def prefill_ms(self, inputs: Any, switches: Switches) -> float:
        """Time to the first token: pictures, switches and prompt; the median. Let it answer once before."""
        times = []
        with switches.on(self.model):
            for _ in range(_TIMED):
                start = time.perf_counter()
                self.prefill(inputs).sequences[0, -1].item()  # a GPU is waited for
                times.append(time.perf_counter() - start)
        return round(1000 * statistics.median(times), 3)

    def drawn(self, inputs: Any, switches: Switches, answer: Tensor, picture: Image.Image) -> Image.Image:
        """What the answer read of the picture, drawn over it.

        Args:
            inputs: As of `inputs`.
            switches: Under which it was asked.
            answer: Its tokens.
            picture: That was asked about, in any size.

        Returns:
            RGB.

        Raises:
            ValueError: It is not known where in its picture an image token lies.
        """
        from multimodal.explain import attended

        with switches.on(self.model):
            seen = attended(self.model, inputs, answer=answer)
        return seen.draw(picture, processor=self.processor).convert("RGB")

    def unknown_words(self, question: str) -> list[str]:
        """Words of a question that the model has no token for; none where it spells what it does not know."""
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token_id is None:
            return []
        words = dict.fromkeys(question.replace("?", " ").replace(".", " ").replace(",", " ").split())
        return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]

    def _greedily(self) -> dict[str, Any]:
        limit = self.max_tokens or self.model.generation_config.max_new_tokens or _ANSWER_TOKENS
        sampling = {"temperature": None, "top_p": None, "top_k": None}  # else transformers says that they are not used
        return {"do_sample": False, "num_beams": 1, "max_new_tokens": limit, **sampling}
