"""AKI-4B as a model of transformers, under the published names.

"Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
https://arxiv.org/abs/2503.02597; the authors' code and weights, https://github.com/sony/aki, are CC BY-NC 4.0. Nothing
is copied from there. What differs: batches of rows of any length and any number of pictures, beams, caches and
attention implementations are right, since the mask is :mod:`multimodal.mma`'s and `generate` is transformers' own.

    model = load_aki("Sony/AKI-4B-phi-3.5-mini", dtype=torch.bfloat16)
    processor = AkiProcessor.from_tokenizer(AutoTokenizer.from_pretrained("microsoft/Phi-3.5-mini-instruct"))
    inputs = processor(image, processor.prompt("What is on the table?"), return_tensors="pt")
    print(processor.decode(model.generate(**inputs)[0]))
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration import AkiConfig
from .loading import load_aki
from .modeling import AkiForConditionalGeneration
from .processing import AkiProcessor
from .resampler import PerceiverAttention, PerceiverResampler
from .vocabulary import ExtendedEmbedding, ExtendedHead

__all__ = [
    "AkiConfig",
    "AkiForConditionalGeneration",
    "AkiProcessor",
    "ExtendedEmbedding",
    "ExtendedHead",
    "PerceiverAttention",
    "PerceiverResampler",
    "load_aki",
]

# So that the Auto classes know a folder that `save_pretrained` wrote.
AutoConfig.register(AkiConfig.model_type, AkiConfig, exist_ok=True)
AutoModelForImageTextToText.register(AkiConfig, AkiForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AkiConfig, AkiProcessor, exist_ok=True)
