"""Attention guidance for diffusers pipelines: A-STAR and the losses that people compare it with."""

from diffusion import attention_maps, guidance, losses, pipelines
from diffusion.guidance import Guidance, guide
from diffusion.pipelines import (
    AStarPipelineOutput,
    AStarStableDiffusionPipeline,
    AStarStableDiffusionXLPipeline,
)

__all__ = [
    "AStarPipelineOutput",
    "AStarStableDiffusionPipeline",
    "AStarStableDiffusionXLPipeline",
    "Guidance",
    "attention_maps",
    "guidance",
    "guide",
    "losses",
    "pipelines",
]
