"""The moves of the latent, against a loop written from the equations, and what they leave as it was."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.models.attention_processor import AttnProcessor

from diffusion import Guidance, guide
from diffusion.attention_maps import attention_probabilities
from diffusion.losses import retention_loss, retention_masks, segregation_loss
from diffusion.pipelines import find_concepts

PROMPT = "a cat and a dog"
SUBJECTS = ["cat", "dog"]
STEPS = {"num_inference_steps": 4, "output_type": "np"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe, prompt=PROMPT, seed=0, **arguments):
    return pipe(prompt, generator=seeded(seed), **{**STEPS, **arguments}).images


class Listening(AttnProcessor):
    """The plain attention of diffusers, all of it in explicit products, that keeps its probabilities."""

    def __init__(self, kept: list[torch.Tensor]):
        super().__init__()
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        if encoder_hidden_states is not None and hidden_states.shape[1] == 256:
            self.kept.append(attention_probabilities(attn, hidden_states, encoder_hidden_states))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def from_the_equations(plain, scheduler, losses, guided=99, seed=0, step_size=20.0, guidance_scale=7.5):
    """Denoises PROMPT as the paper says: full passes, explicit attention, a mask from the pass that denoised."""
    kept: list[torch.Tensor] = []
    unet = copy.deepcopy(plain.unet)
    unet.set_attn_processor({name: Listening(kept) for name in unet.attn_processors})
    scheduler.set_timesteps(4)
    generator = seeded(seed)
    z = torch.randn(1, 4, 16, 16, generator=generator, dtype=plain.dtype) * scheduler.init_noise_sigma
    text, negative = plain.encode_prompt(PROMPT, "cpu", 1, True)
    extra = {"generator": generator} if isinstance(scheduler, EulerAncestralDiscreteScheduler) else {}
    masks = None

    def maps() -> torch.Tensor:
        attention = torch.cat([p[-1:] for p in kept]).mean((0, 1)).view(1, 16, 16, -1)
        words = (attention[..., 1:6] * 100).softmax(-1)[..., [1, 4]].permute(0, 3, 1, 2)
        row = torch.tensor([np.exp(-1.0), 1, np.exp(-1.0)], dtype=words.dtype)
        kernel = torch.outer(row, row) / torch.outer(row, row).sum()
        padded = torch.nn.functional.pad(words, (1, 1, 1, 1), mode="reflect")
        return torch.nn.functional.conv2d(padded, kernel.expand(2, 1, 3, 3), groups=2).permute(0, 2, 3, 1)

    for i, t in enumerate(scheduler.timesteps):
        if i < guided:
            z = z.detach().requires_grad_()
            kept.clear()
            unet(scheduler.scale_model_input(z, t), t, text)
            found = maps()
            loss = losses.get("segregation", 0) * segregation_loss(found).sum()
            if masks is not None:
                loss = loss + losses.get("retention", 0) * retention_loss(found, masks).sum()
            (gradient,) = torch.autograd.grad(loss, z)
            z = (z - step_size * (1 - 0.5 * i / (len(scheduler.timesteps) - 1)) ** 0.5 * gradient).detach()
        kept.clear()
        with torch.no_grad():
            both = scheduler.scale_model_input(torch.cat([z, z]), t)
            without, with_text = unet(both, t, torch.cat([negative, text])).sample.chunk(2)
            masks = retention_masks(maps())
            z = scheduler.step(without + guidance_scale * (with_text - without), t, z, **extra).prev_sample
    return z.detach()


SCHEDULERS = {
    "DDIM": DDIMScheduler,
    "PNDM": PNDMScheduler,
    "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
    "DPM++": DPMSolverMultistepScheduler,
    "Heun": HeunDiscreteScheduler,
    "LMS": LMSDiscreteScheduler,
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 and diffusers
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_moves_are_those_of_the_equations(exact, name):
    losses = {"segregation": 1.0, "retention": 0.5}
    exact.scheduler = SCHEDULERS[name].from_config(tiny.scheduler().config)
    expected = from_the_equations(exact, copy.deepcopy(exact.scheduler), losses)
    got = images(exact, subjects=SUBJECTS, losses=losses, output_type="latent")
    assert (got - expected).abs().max() < 1e-10
    assert (got - images(exact, output_type="latent")).abs().max() > 1e-2


@pytest.mark.parametrize("losses", [{"segregation": 1.0}, {"retention": 1.0}])
def test_each_loss_alone_and_the_first_steps_alone(exact, losses):
    exact.scheduler = tiny.scheduler()
    expected = from_the_equations(exact, tiny.scheduler(), losses, guided=2)
    got = images(exact, subjects=SUBJECTS, losses=losses, guidance_steps=2, output_type="latent")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def attend_and_excite(plain):
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    return tiny.quiet(
        StableDiffusionAttendAndExcitePipeline(**{**parts, "unet": copy.deepcopy(plain.unet)}, **tiny.UNSAFE)
    )


@pytest.mark.parametrize("refinement", [{}, {0: 0.05, 2: 0.6}, {0: 0.4, 1: 0.99}])
def test_attend_and_excite_is_diffusers_own(plain, pipe, attend_and_excite, refinement):
    """With and without refinement: thresholds that are reached at once, on the way, and never."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torch.meshgrid without an order
        theirs = images(
            attend_and_excite, token_indices=[2, 5], max_iter_to_alter=3, thresholds=refinement, num_inference_steps=4
        )
    ours = images(
        pipe,
        subjects=SUBJECTS,
        losses={"attend_and_excite": 1},
        guidance_steps=3,
        guidance=Guidance(keep_padding=True, refinement=refinement),
    )
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours - images(plain)).max() > 1e-2


@pytest.mark.parametrize("losses", [{"segregation": 0, "retention": 0}, {}])
@pytest.mark.parametrize("attention", [False, True])
def test_without_weight_the_picture_is_the_parents(plain, pipe, losses, attention):
    result = pipe(PROMPT, generator=seeded(), subjects=SUBJECTS, losses=losses, return_attention=attention, **STEPS)
    assert np.array_equal(result.images, images(plain))
    assert np.array_equal(images(pipe), images(plain)), "and so without subjects"


def test_step_size_zero_and_no_guided_steps_are_the_parents(plain, pipe):
    for arguments in ({"step_size": 0.0}, {"guidance_steps": 0}):
        assert np.array_equal(images(pipe, subjects=SUBJECTS, **arguments), images(plain))


def test_everything_is_as_it_was_also_after_an_exception(plain, pipe):
    before = images(pipe)
    plain.unet.conv_in.weight.requires_grad_(True)
    plain.unet.conv_in.bias.requires_grad_(False)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images(pipe, subjects=SUBJECTS, callback_on_step_end=stop)
    assert "step" not in vars(pipe.scheduler) and "scale_model_input" not in vars(pipe.scheduler)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipe.unet.modules())
    assert plain.unet.conv_in.weight.requires_grad and not plain.unet.conv_in.bias.requires_grad
    assert all(parameter.grad is None for parameter in plain.unet.parameters())
    plain.unet.conv_in.bias.requires_grad_(True)
    assert np.array_equal(images(pipe), before)


def test_a_batch_is_its_single_runs(exact):
    exact.scheduler = tiny.scheduler()
    prompts = ["a cat and a dog", "a red fire truck on a box, two cats"]
    subjects = [["cat", "dog"], ["truck", "box", "cat"]]
    losses = {"segregation": 1, "retention": 1, "attend_and_excite": 0.5}
    arguments = {"losses": losses, "return_attention": True, **STEPS}
    noise = [seeded(i) for i in range(4)]
    both = exact(prompts, subjects=subjects, num_images_per_prompt=2, generator=noise, **arguments)
    for i in range(4):
        alone = exact(prompts[i // 2], subjects=subjects[i // 2], generator=seeded(i), **arguments)
        assert np.abs(both.images[i] - alone.images[0]).max() < 1e-6
        count = len(subjects[i // 2])
        torch.testing.assert_close(both.maps[:, i, ..., :count], alone.maps[:, 0])
        assert both.subjects[i] == subjects[i // 2] and (both.maps[:, i, ..., count:] == 0).all()
        for name, values in alone.losses.items():
            torch.testing.assert_close(both.losses[name][:, i], values[:, 0])


def test_refinement_stops_for_each_sample_by_itself(exact):
    exact.scheduler = tiny.scheduler()
    guidance = Guidance(losses={"attend_and_excite": 1.0}, refinement={0: 0.45}, steps=1)
    arguments = {"subjects": SUBJECTS, "guidance": guidance, "num_inference_steps": 4, "output_type": "latent"}
    noise = torch.randn(2, 4, 16, 16, generator=seeded(0), dtype=torch.float64)
    both = exact([PROMPT] * 2, latents=noise, **arguments).images
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], exact(PROMPT, latents=noise[i : i + 1], **arguments).images)


def test_the_overlap_falls_and_the_losses_are_reported(pipe):
    def last(losses, name):
        result = pipe(PROMPT, subjects=SUBJECTS, losses=losses, generator=seeded(), return_attention=True,
                      num_inference_steps=8, output_type="np")  # fmt: skip
        assert result.maps.shape == (8, 1, 16, 16, 2) and 0 <= result.maps.min() and result.maps.max() <= 1
        assert result.losses[name].shape == (8, 1)
        torch.testing.assert_close(result.losses["segregation"][-1], segregation_loss(result.maps[-1]))
        masks = retention_masks(result.maps[-2])
        torch.testing.assert_close(result.losses["retention"][-1], retention_loss(result.maps[-1], masks))
        assert result.losses["retention"][0] == 0, "there is no step before the first"
        return float(result.losses[name][1:].mean())

    plain = {name: last({"segregation": 0, "retention": 0}, name) for name in ("segregation", "retention")}
    assert last({"segregation": 1, "retention": 0}, "segregation") < 0.9 * plain["segregation"]
    assert last({"segregation": 0, "retention": 1}, "retention") < plain["retention"]
    both = {"segregation": 1, "retention": 1}
    assert last(both, "segregation") < plain["segregation"] and last(both, "retention") < plain["retention"]


@pytest.mark.parametrize("name", ["divide_and_bind", "conform"])
def test_the_losses_of_comparison_fall(pipe, name):
    def total(step_size):
        bound = {"cat": "black", "dog": ["red"]}
        result = pipe(
            "a black cat and a red dog", subjects=SUBJECTS, attributes=bound, losses={name: 1}, step_size=step_size,
            generator=seeded(), return_attention=True, **STEPS,
        )  # fmt: skip
        return float(result.losses[name].mean())

    assert total(2.0) < total(0.0)


def test_masks_can_come_from_the_pass_of_the_move(pipe):
    here, there = (
        images(pipe, subjects=SUBJECTS, guidance=Guidance(masks_from=masks_from), output_type="latent")
        for masks_from in ("denoising", "move")
    )
    assert (here - there).abs().max() > 1e-3


def test_a_layout_takes_the_place_of_the_masks(pipe):
    left, right = torch.zeros(32, 32, dtype=torch.bool), torch.zeros(32, 32, dtype=torch.bool)
    left[:, :16], right[:, 16:] = True, True

    def run(layout, step_size=2.0):
        return pipe(
            PROMPT, subjects=SUBJECTS, losses={"retention": 1}, layout=layout, step_size=step_size,
            generator=seeded(), return_attention=True, **STEPS,
        )  # fmt: skip

    masks, boxes = {"cat": left, "dog": right.numpy()}, {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 1)}
    guided, still = run(masks), run(masks, step_size=0.0)
    assert np.array_equal(guided.images, run(boxes).images)
    assert guided.losses["retention"][0] < still.losses["retention"][0], "from the first step on"
    assert guided.losses["retention"].mean() < still.losses["retention"].mean()
    at_grid = torch.zeros(1, 16, 16, 2)
    at_grid[:, :, :8, 0], at_grid[:, :, 8:, 1] = 1, 1
    for maps, loss in zip(guided.maps, guided.losses["retention"], strict=True):
        torch.testing.assert_close(loss, retention_loss(maps, at_grid))
    only = run({"dog": right}).losses["retention"]
    assert 0.5 <= only[0] <= 1 < only[1], "a place that is given counts from the first step on, masks from the second"


def test_without_classifier_free_guidance(plain, pipe):
    free = images(plain, guidance_scale=1.0)
    result = pipe(PROMPT, generator=seeded(), subjects=SUBJECTS, guidance_scale=1.0, return_attention=True, **STEPS)
    assert result.maps.shape[1] == 1 and np.abs(result.images - free).max() > 1e-3


def test_gradient_checkpointing_changes_nothing(pipe):
    before = images(pipe, subjects=SUBJECTS)
    pipe.unet.enable_gradient_checkpointing()
    try:
        assert np.abs(images(pipe, subjects=SUBJECTS) - before).max() < 1e-5
    finally:
        pipe.unet.disable_gradient_checkpointing()


def test_autocast_and_bfloat16(pipe, plain):
    exact = images(pipe, subjects=SUBJECTS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = images(pipe, subjects=SUBJECTS)
    assert 0 < np.abs(rounded - exact).mean() < 0.05
    half = copy.deepcopy(plain.components)
    half = type(pipe)(**half, **tiny.UNSAFE).to(torch.bfloat16)
    result = tiny.quiet(half)(PROMPT, generator=seeded(), subjects=SUBJECTS, return_attention=True, **STEPS)
    assert np.isfinite(result.images).all() and result.maps.dtype == torch.float32


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_guided_alike(pipe, plain, in_place):
    arguments = {"subjects": SUBJECTS, "return_attention": True, "num_inference_steps": 2, "output_type": "np"}
    expected = pipe(PROMPT, generator=seeded(), **arguments)
    network = copy.deepcopy(plain.unet)
    if in_place:
        network.compile(backend="eager")
        pipe.unet = network
    else:
        pipe.unet = torch.compile(network, backend="eager")
    got = pipe(PROMPT, generator=seeded(), **arguments)
    assert np.abs(got.images - expected.images).max() < 1e-4
    torch.testing.assert_close(got.maps, expected.maps, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_other_pipelines_with_a_unet(plain):
    """Image to image, inpainting with a UNet of nine channels, ControlNet: guided inside `guide`, and left alone."""
    picture = np.random.default_rng(0).random((1, 32, 32, 3), dtype=np.float32)
    parts = plain.components
    wide = tiny.unet(in_channels=9)
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for block in control.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.02)
    cases = [
        (StableDiffusionImg2ImgPipeline(**parts, **tiny.UNSAFE), {"image": picture, "strength": 0.8}),
        (
            StableDiffusionInpaintPipeline(**{**parts, "unet": wide}, **tiny.UNSAFE),
            {"image": picture, "mask_image": np.tri(32, dtype=np.float32)[None]},
        ),
        (StableDiffusionControlNetPipeline(**parts, controlnet=control, **tiny.UNSAFE), {"image": picture}),
    ]
    for other, arguments in cases:
        tiny.quiet(other).image_processor.config.vae_scale_factor = 2
        before = images(other, **arguments)
        concepts = [find_concepts(other, PROMPT, SUBJECTS)]
        with guide(other, concepts, Guidance(step_size=0.0)) as trace:
            assert np.array_equal(images(other, **arguments), before), type(other)
        with guide(other, concepts, trace=True) as trace:
            moved = images(other, **arguments)
        assert np.abs(moved - before).max() > 1e-3, type(other)
        assert len(trace.maps) >= 3 and all(maps.shape == (1, 16, 16, 2) for maps in trace.maps)
        assert np.array_equal(images(other, **arguments), before), type(other)


def test_a_loss_that_is_not_finite_stops_guiding_that_sample(pipe):
    # The first move of sample 1 throws it so far out that the network overflows.
    noise = torch.randn(2, 4, 16, 16, generator=seeded())
    noise[1] *= 1e30
    good = pipe(PROMPT, latents=noise[:1], subjects=SUBJECTS, **STEPS).images
    with pytest.warns(RuntimeWarning, match=r"sample \[1\] is not finite at step 0.*without guidance"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "invalid value encountered in cast")
            got = pipe([PROMPT] * 2, latents=noise, subjects=SUBJECTS, **STEPS).images
    assert len(got) == 2 and np.abs(got[0] - good[0]).max() < 1e-4, "the other sample goes on"


def test_out_of_memory_says_what_to_lower(pipe, monkeypatch):
    def too_much(*_):
        return torch.empty(2**60)

    monkeypatch.setattr("diffusion.attention_maps.attention_probabilities", too_much)
    with pytest.raises(torch.OutOfMemoryError, match="Lower num_images_per_prompt, the image size"):
        images(pipe, subjects=SUBJECTS)


def test_inference_mode_is_refused(pipe):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"leave torch\.inference_mode"):
        images(pipe, subjects=SUBJECTS)


def test_too_few_concepts_for_the_batch(plain):
    concepts = [find_concepts(plain, PROMPT, SUBJECTS)] * 2
    with guide(plain, concepts), pytest.raises(ValueError, match="batch of 6 for 2 prompts"):
        images(plain, [PROMPT] * 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"losses": {"segregate": 1}}, "unknown loss 'segregate'; there are segregation, retention"),
        ({"losses": {"retention": -1}}, "weight of 'retention' is -1"),
        ({"losses": {"retention": float("nan")}}, "weight of 'retention' is nan"),
        ({"steps": -1}, "guidance_steps=-1"),
        ({"step_size": float("inf")}, "step_size=inf"),
        ({"masks_from": "later"}, "masks_from='later'"),
        ({"max_refinements": -2}, "max_refinements=-2"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)
