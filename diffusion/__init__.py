"""Attention guidance for diffusers pipelines: A-STAR and the losses that people compare it with."""

from diffusion import attention_maps, draw, guidance, losses, pipelines
from diffusion.draw import attention_grid
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
    "attention_grid",
    "attention_maps",
    "draw",
    "guidance",
    "guide",
    "losses",
    "pipelines",
]
