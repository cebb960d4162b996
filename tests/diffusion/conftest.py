"""Tiny pipelines, built once; what a test changes in them it changes in a copy."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusion import AStarStableDiffusionPipeline, AStarStableDiffusionXLPipeline


@pytest.fixture(scope="module", autouse=True)
def small(one_thread: None) -> None:
    """All networks here are."""


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def plain_xl(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("tokenizer_xl"))


@pytest.fixture
def pipe(plain: StableDiffusionPipeline) -> AStarStableDiffusionPipeline:
    """Shares its networks with `plain`; the scheduler is its own."""
    return tiny.quiet(
        AStarStableDiffusionPipeline(**{**plain.components, "scheduler": tiny.scheduler()}, **tiny.UNSAFE)
    )


@pytest.fixture(scope="session")
def exact(plain: StableDiffusionPipeline) -> AStarStableDiffusionPipeline:
    """In double precision: untrained networks amplify rounding, which hides what is to be compared."""
    parts = copy.deepcopy(plain.components)
    return tiny.quiet(AStarStableDiffusionPipeline(**parts, **tiny.UNSAFE).to(torch.float64))


@pytest.fixture
def pipe_xl(plain_xl: StableDiffusionXLPipeline) -> AStarStableDiffusionXLPipeline:
    parts = {**plain_xl.components, "scheduler": tiny.scheduler()}
    return tiny.quiet(AStarStableDiffusionXLPipeline(**parts, add_watermarker=False))
