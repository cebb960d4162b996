"""The pipelines as their parents' equals: loading, every argument, and mistakes that are named."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from diffusion import AStarPipelineOutput, AStarStableDiffusionPipeline, AStarStableDiffusionXLPipeline, Guidance

PROMPT = "a cat and a dog"
SUBJECTS = ["cat", "dog"]
STEPS = {"num_inference_steps": 3, "output_type": "np"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_from_pretrained_and_from_pipe(plain, pipe, tmp_path):
    plain.save_pretrained(tmp_path / "plain")
    expected = pipe(PROMPT, subjects=SUBJECTS, generator=seeded(), **STEPS).images
    for loaded in (
        AStarStableDiffusionPipeline.from_pretrained(tmp_path / "plain"),
        AStarStableDiffusionPipeline.from_pipe(plain),
    ):
        assert type(loaded) is AStarStableDiffusionPipeline
        got = tiny.quiet(loaded)(PROMPT, subjects=SUBJECTS, generator=seeded(), **STEPS).images
        assert np.array_equal(got, expected)


def test_what_it_saves_loads_without_us(plain, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), StableDiffusionPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is StableDiffusionPipeline
        expected = plain(PROMPT, generator=seeded(), **STEPS).images
        assert np.array_equal(tiny.quiet(loaded)(PROMPT, generator=seeded(), **STEPS).images, expected)


@pytest.mark.parametrize("parent, ours", [(StableDiffusionPipeline, AStarStableDiffusionPipeline),
                                          (StableDiffusionXLPipeline, AStarStableDiffusionXLPipeline)])  # fmt: skip
def test_no_argument_of_ours_hides_one_of_the_parents(parent, ours):
    taken = set(inspect.signature(parent.__call__).parameters) - {"self", "prompt", "kwargs"}
    assert not taken & set(inspect.signature(ours.__call__).parameters)


ARGUMENTS = {
    "negative prompt": {"negative_prompt": "a box"},
    "images per prompt": {"num_images_per_prompt": 2},
    "size": {"height": 48, "width": 32},
    "guidance scale": {"guidance_scale": 3.0},
    "eta": {"eta": 0.7},
    "latents": {"latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8))},
    "guidance rescale": {"guidance_rescale": 0.5},
    "attention of the parent": {"cross_attention_kwargs": {}},
    "pictures": {"output_type": "pil"},
    "latent": {"output_type": "latent"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_argument_of_the_parent_is_kept(plain, pipe, arguments):
    """Guided with a step of 0, each argument does what it does in the parent; guided, the result is another."""
    given = {**STEPS, **arguments}
    expected = plain(PROMPT, generator=seeded(), **given).images
    for extra in ({}, {"subjects": SUBJECTS, "step_size": 0.0}):
        got = pipe(PROMPT, generator=seeded(), **given, **extra).images
        assert np.array_equal(np.asarray(got), np.asarray(expected))
    guided = pipe(PROMPT, generator=seeded(), **given, subjects=SUBJECTS).images
    assert np.asarray(guided).shape == np.asarray(expected).shape
    assert not np.array_equal(np.asarray(guided), np.asarray(expected))


def test_positional_arguments(plain, pipe):
    expected = plain(PROMPT, 48, 32, 3, output_type="np", generator=seeded()).images
    got = pipe(PROMPT, 48, 32, 3, output_type="np", generator=seeded(), subjects=SUBJECTS, step_size=0.0).images
    assert np.array_equal(got, expected) and got.shape == (1, 48, 32, 3)


def test_embeddings_in_place_of_words(pipe):
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    embedded = {"prompt_embeds": text, "negative_prompt_embeds": negative, "generator": seeded(), **STEPS}
    guidance = Guidance(keep_padding=True)  # the end of a prompt that is not known cannot be cut off
    expected = pipe(PROMPT, subjects=SUBJECTS, guidance=guidance, generator=seeded(), **STEPS).images
    got = pipe(subjects=[2, 5], guidance=guidance, **embedded).images
    assert np.abs(got - expected).max() < 1e-5
    with pytest.raises(ValueError, match=r"with prompt_embeds alone give the token positions"):
        pipe(subjects=SUBJECTS, **embedded)


def test_callbacks_see_and_change_the_latents(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].clone(), set(tensors)))
        return {"latents": tensors["latents"] * 0} if step == 1 else {}

    arguments = {"subjects": SUBJECTS, "generator": seeded(), "callback_on_step_end": look, **STEPS}
    pipe(PROMPT, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **arguments)
    assert [step for step, *_ in seen] == [0, 1, 2] and seen[0][2] == {"latents", "prompt_embeds"}
    alone = pipe(PROMPT, subjects=SUBJECTS, generator=seeded(), **{**STEPS, "output_type": "latent"}).images
    assert not torch.allclose(seen[-1][1], alone), "what the callback returns is what goes on"


def test_the_result(pipe):
    result = pipe(PROMPT, subjects=SUBJECTS, generator=seeded(), **STEPS)
    assert isinstance(result, AStarPipelineOutput) and result.maps is None and result.losses is None
    result = pipe(PROMPT, subjects=SUBJECTS, return_attention=True, generator=seeded(), **STEPS)
    assert result.subjects == [SUBJECTS] and set(result.losses) == {"segregation", "retention"}
    assert result.maps.shape == (3, 1, 16, 16, 2) and result.maps.device.type == "cpu"
    again = pipe(PROMPT, subjects=SUBJECTS, return_attention=True, generator=seeded(), return_dict=False, **STEPS)
    assert len(again) == 4 and np.array_equal(again[0], result.images) and torch.equal(again[2], result.maps)
    assert len(pipe(PROMPT, subjects=SUBJECTS, return_dict=False, **STEPS)) == 2
    assert len(pipe(PROMPT, return_dict=False, **STEPS)) == 2


def test_a_red_cat_has_attributes_and_several_words(pipe):
    words = {"subjects": ["red fire truck", "cat"], "attributes": {"cat": ["black"]}}
    result = pipe("a red fire truck and a black cat", **words, losses={"conform": 1}, return_attention=True, **STEPS)
    assert result.subjects == [["red fire truck", "cat"]] and result.maps.shape[-1] == 2


# SDXL ---------------------------------------------------------------------------------------------------------------


def test_sdxl_without_weight_is_its_parent(plain_xl, pipe_xl):
    expected = plain_xl(PROMPT, generator=seeded(), **STEPS).images
    none = {"segregation": 0, "retention": 0}
    result = pipe_xl(PROMPT, generator=seeded(), subjects=SUBJECTS, losses=none, return_attention=True, **STEPS)
    assert np.array_equal(result.images, expected) and result.maps.shape == (3, 1, 16, 16, 2)
    still = pipe_xl(PROMPT, None, 32, 32, generator=seeded(), subjects=SUBJECTS, step_size=0.0, **STEPS)
    assert np.array_equal(still.images, expected)
    assert len(pipe_xl(PROMPT, subjects=SUBJECTS, return_dict=False, **STEPS)) == 1


def test_sdxl_moves_by_the_gradient_with_its_added_conditions(plain_xl, pipe_xl):
    """The first move, from a full pass with the embeddings of size and pooled text that the pipeline makes."""
    from diffusion.attention_maps import record, subject_maps
    from diffusion.losses import segregation_loss

    seen = {}

    def keep(module, args, kwargs):
        seen.setdefault("call", (args, kwargs))

    handle = plain_xl.unet.register_forward_pre_hook(keep, with_kwargs=True)
    plain_xl(PROMPT, generator=seeded(), **STEPS)
    handle.remove()
    (both, t), kwargs = seen["call"]
    added = {name: value[1:] for name, value in kwargs["added_cond_kwargs"].items()}
    z = both[1:].clone().requires_grad_()
    with record(plain_xl) as recorder:
        plain_xl.unet(z, t, kwargs["encoder_hidden_states"][1:], added_cond_kwargs=added)
        maps = subject_maps(recorder.maps(), [(2,), (5,)], end=6)
    (gradient,) = torch.autograd.grad(segregation_loss(maps).sum(), z)
    moved = (z - 20 * gradient).detach()

    def denoised(module, args):
        if len(args[0]) == 2:  # both halves of the batch: the pass that denoises
            seen.setdefault("moved", args[0])

    handle = pipe_xl.unet.conv_in.register_forward_pre_hook(denoised)
    pipe_xl(PROMPT, generator=seeded(), subjects=SUBJECTS, losses={"segregation": 1}, **STEPS)
    handle.remove()
    torch.testing.assert_close(seen["moved"], torch.cat([moved] * 2), rtol=1e-4, atol=1e-4)


def test_sdxl_takes_its_own_arguments(pipe_xl, tmp_path):
    result = pipe_xl(
        PROMPT,
        prompt_2="a red box",
        negative_prompt="a truck",
        negative_prompt_2="a box",
        num_images_per_prompt=2,
        original_size=(64, 64),
        crops_coords_top_left=(1, 2),
        subjects=SUBJECTS,
        layout={"cat": (0, 0, 0.5, 1)},
        height=32,
        width=48,
        return_attention=True,
        **STEPS,
    )
    assert result.images.shape == (2, 32, 48, 3) and result.maps.shape == (3, 2, 16, 24, 2)
    pipe_xl.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionXLPipeline


# Mistakes -----------------------------------------------------------------------------------------------------------


def run(pipe, prompt=PROMPT, **arguments):
    return pipe(prompt, **{"subjects": SUBJECTS, **STEPS, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"subjects": ["cat", "horse"]}, "'horse' is not in the prompt"),
        ({"subjects": ["cat", "cat"]}, "named 2 times, but stands 1 times"),
        ({"subjects": []}, r"subjects=\[\]: give a list of words"),
        ({"subjects": "cat"}, "subjects='cat': give a list of words"),
        ({"subjects": ["cat"], "prompt": "a " * 30 + "cat"}, "is token 31 of the prompt"),
        ({"prompt": [PROMPT] * 2, "subjects": [["cat"]]}, "1 lists for 2 prompts"),
        ({"layout": {"horse": (0, 0, 1, 1)}}, "'horse' has a place or an attribute, but is none of the subjects"),
        ({"attributes": {"horse": "red"}}, "'horse' has a place or an attribute"),
        ({"attributes": {"cat": "red"}}, "'red' is not in the prompt"),
        ({"layout": {"cat": np.ones((8, 8), bool)}}, r"'cat' has shape \(8, 8\); it must be the picture's 32 x 32"),
        ({"layout": {"cat": np.ones((32, 32, 3), bool)}}, r"shape \(32, 32, 3\)"),
        ({"layout": {"cat": np.ones((32, 32), bool)}, "height": 48, "width": 32}, "picture's 48 x 32"),
        ({"layout": {"cat": Image.new("L", (32, 32))}}, "the place of 'cat' is empty"),
        ({"layout": {"cat": (0.5, 0, 0.5, 1)}}, r"box of 'cat' is \[0.5, 0.0, 0.5, 1.0\]; it must be"),
        ({"layout": {"cat": (0, 0, 16, 16)}}, "in fractions of the picture"),
        ({"layout": {"cat": (0, 0, 1)}}, "in fractions of the picture"),
        ({"losses": {"overlap": 1}}, "unknown loss 'overlap'"),
        ({"losses": {"retention": -1}}, "it must be 0 or more"),
        ({"guidance_steps": -1}, "guidance_steps=-1"),
        ({"guidance": Guidance(resolution=5)}, "resolution=5: no cross-attention layer has such maps"),
        ({"guidance": Guidance(layers=["mid"])}, r"none of layers=\['mid'\]"),
        ({"guidance": Guidance(mask_rule="mean")}, "rule='mean'"),
        ({"subjects": None, "return_attention": True}, "are about subjects: name them"),
        ({"subjects": None, "layout": {"cat": (0, 0, 1, 1)}}, "are about subjects: name them"),
        ({"height": 33, "width": 32}, "divisible by 8"),
    ],
)  # fmt: skip
def test_mistakes_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_one_subject_has_nothing_to_be_segregated_from(plain, pipe):
    with pytest.warns(UserWarning, match=r"one subject \('cat'\).*segregation loss is 0"):
        got = run(pipe, subjects=["cat"], losses={"segregation": 1}, generator=seeded()).images
    assert np.array_equal(got, plain(PROMPT, generator=seeded(), **STEPS).images)


def test_float16_on_a_cpu_is_refused(plain):
    half = AStarStableDiffusionPipeline(**copy.deepcopy(plain.components), **tiny.UNSAFE).to(torch.float16)
    with pytest.raises(ValueError, match="float16 on a CPU"):
        run(half)


def test_layout_masks_of_every_kind(pipe):
    left = np.zeros((32, 32), bool)
    left[:, :16] = True
    kinds = [left, torch.from_numpy(left), left.astype("float32"), (left * 255).astype("uint8"),
             left.astype("uint8"), Image.fromarray((left * 255).astype("uint8"))]  # fmt: skip
    results = [run(pipe, layout={"cat": kind}, generator=seeded()).images for kind in kinds]
    assert all(np.array_equal(result, results[0]) for result in results)
    assert not np.array_equal(results[0], run(pipe, generator=seeded()).images)
    small = run(pipe, layout={"cat": (0.01, 0.01, 0.02, 0.02)}, generator=seeded()).images
    assert np.isfinite(small).all(), "a box smaller than a cell of the map keeps the cell"
