"""Recording cross-attention: what is heard, what it costs the network (nothing), and which words it belongs to."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, UNet2DModel

from diffusion.attention_maps import attention_probabilities, find_subjects, prompt_end, record, subject_maps


@pytest.fixture
def unet(plain):
    return copy.deepcopy(plain.unet)


def inputs(batch: int = 2, size: tuple[int, int] = (16, 16), tokens: int = tiny.LENGTH):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(batch, 4, *size, generator=generator)
    return z, torch.tensor(500), torch.randn(batch, tokens, 32, generator=generator)


@torch.no_grad()
def test_the_probabilities_are_those_that_the_layer_attends_with(unet):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    x, text = torch.randn(2, 256, 32), torch.randn(2, tiny.LENGTH, 32)
    p = attention_probabilities(attn, x, text)
    assert p.shape == (2, 2, 256, tiny.LENGTH)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 2, 256))
    values = attn.to_v(text).unflatten(-1, (2, -1)).transpose(1, 2)  # [B, h, N, d]
    out = attn.to_out[0]((p @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, attn(x, encoder_hidden_states=text), rtol=1e-4, atol=1e-5)
    mask = torch.zeros(2, 1, tiny.LENGTH).masked_fill(torch.arange(tiny.LENGTH) > 5, -1e4)
    assert attention_probabilities(attn, x, text, mask)[..., 6:].max() == 0


@torch.no_grad()
def test_recording_changes_nothing_and_leaves_nothing(unet):
    z, t, text = inputs()
    before, processors = unet(z, t, text).sample, dict(unet.attn_processors)
    with record(unet) as recorder:
        inside = unet(z, t, text).sample
    assert torch.equal(before, inside) and torch.equal(before, unet(z, t, text).sample)
    assert all(unet.attn_processors[name] is own for name, own in processors.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())
    assert recorder.maps().shape == (2, 16, 16, tiny.LENGTH) and recorder.grid == (16, 16)
    torch.testing.assert_close(recorder.maps().sum(-1), torch.ones(2, 16, 16))


def test_the_hooks_go_also_after_an_exception(unet):
    with pytest.raises(KeyboardInterrupt), record(unet):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in unet.modules())


@torch.no_grad()
def test_levels_and_layers(unet):
    z, t, text = inputs(size=(16, 16))
    down, up = "down_blocks.0.attentions.0.transformer_blocks.0.attn2", "up_blocks.1.attentions"
    with record(unet) as recorder:
        unet(z, t, text)
    assert list(recorder.by_layer) == [down, f"{up}.0.transformer_blocks.0.attn2", f"{up}.1.transformer_blocks.0.attn2"]
    every = recorder.by_layer
    with record(unet, layers=["up_blocks.1.attentions.1"]) as recorder:
        unet(z, t, text)
    assert torch.equal(recorder.maps(), every[f"{up}.1.transformer_blocks.0.attn2"])
    for resolution in (8, (8, 8)):
        with record(unet, resolution=resolution) as recorder:
            unet(z, t, text)
        assert recorder.grid == (8, 8) and any("mid_block" in name for name in recorder.by_layer)


@pytest.mark.parametrize(
    "size, grid", [((16, 32), (16, 32)), ((18, 17), (18, 17)), ((40, 34), (20, 17)), ((8, 8), (8, 8))]
)
@torch.no_grad()
def test_the_grid_follows_the_latent(unet, size, grid):
    z, t, text = inputs(size=size)
    with record(unet) as recorder:
        unet(z, t, text)
    assert recorder.grid == grid and recorder.maps().shape[1:3] == grid


SD = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
XL = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
}


@pytest.mark.parametrize("layout, latent, grid, layers", [(SD, 64, 16, 5), (SD, 96, 24, 5), (XL, 128, 32, 60)])
def test_the_default_level_of_the_released_layouts(layout, latent, grid, layers):
    """16 x 16 of Stable Diffusion at 512 px, 24 x 24 at 768 px, 32 x 32 of SDXL at 1024 px."""
    with torch.device("meta"):
        network = tiny.unet(**layout)
        with record(network) as recorder, torch.no_grad():
            network(torch.empty(1, 4, latent, latent), 1, torch.empty(1, 77, 32))
    assert recorder.grid == (grid, grid) and len(recorder.by_layer) == layers


def loss_of(maps: torch.Tensor) -> torch.Tensor:
    return (maps[..., 3] * maps[..., 5]).sum()


def test_a_pass_that_ends_early_gives_the_same_maps_and_gradients(unet):
    z, t, text = inputs()
    z.requires_grad_()
    ended = []
    unet.conv_out.register_forward_hook(lambda *_: ended.append(True))
    with record(unet, layers=["down_blocks.0"]) as recorder:
        unet(z, t, text)
        full = recorder.maps()
        (gradient,) = torch.autograd.grad(loss_of(full), z)
        assert ended == [True]
        early = recorder.run(unet.forward, z, t, text)
        assert ended == [True], "the pass went on to its end"
        assert torch.equal(full, early)
        torch.testing.assert_close(torch.autograd.grad(loss_of(early), z)[0], gradient)
        unet(z, t, text)
        assert ended == [True, True], "only `run` ends a pass early"


@pytest.mark.parametrize("layers", [None, ["down_blocks.0"]])
def test_gradient_checkpointing_gives_the_same_gradient(unet, layers):
    z, t, text = inputs()
    z.requires_grad_()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with record(unet, layers=layers) as recorder:
            maps = recorder.run(unet.forward, z, t, text)
            found.append(torch.autograd.grad(loss_of(maps), z)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)
    blocks = [m for m in unet.modules() if hasattr(m, "gradient_checkpointing")]
    assert all(block.gradient_checkpointing for block in blocks), "checkpointing is on again in every block"


def test_other_attention_processors_keep_their_work(unet):
    z, t, text = inputs()
    with torch.no_grad(), record(unet) as recorder:
        unet(z, t, text)
        maps = recorder.maps()
        unet.set_attention_slice(1)
        unet(z, t, text)
        torch.testing.assert_close(recorder.maps(), maps, rtol=1e-4, atol=1e-6)
        unet.set_default_attn_processor()
        unet.fuse_qkv_projections()
        unet(z, t, text)
        torch.testing.assert_close(recorder.maps(), maps, rtol=1e-4, atol=1e-6)


def test_autocast(unet):
    z, t, text = inputs()
    with torch.no_grad(), record(unet) as recorder:
        unet(z, t, text)
        exact = subject_maps(recorder.maps(), [(2,), (4,)], end=9)
        with torch.autocast("cpu", torch.bfloat16):
            unet(z, t, text)
            rounded = subject_maps(recorder.maps(), [(2,), (4,)], end=9)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.1


def test_a_compiled_network_reports_when_it_runs_eagerly(unet):
    z, t, text = inputs()
    compiled = torch.compile(unet, backend="eager")
    with torch.no_grad(), record(compiled) as recorder, torch.compiler.set_stance("force_eager"):
        compiled(z, t, text)
    assert recorder.maps().shape == (2, 16, 16, tiny.LENGTH)


def test_mistakes_are_named(unet):
    z, t, text = inputs()
    with record(unet) as recorder, pytest.raises(RuntimeError, match="no attention map was recorded"):
        recorder.maps()
    with pytest.raises(ValueError, match=r"resolution=5.*\(16, 16\), \(8, 8\)"), record(unet, resolution=5):
        unet(z, t, text)
    with (
        pytest.raises(ValueError, match="no cross-attention layer is named 'nowhere'"),
        record(unet, layers=["nowhere"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"none of layers=\['mid_block'\].*up_blocks"),
        record(unet, layers=["mid_block"]),
    ):
        unet(z, t, text)
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, axes_dims_rope=(2, 2, 4)
    )
    with pytest.raises(TypeError, match=r"Stable Diffusion 1\.x and 2\.x, SDXL.*FluxTransformer2DModel"), record(flux):
        pass
    with pytest.raises(TypeError, match="UNet2DModel"), record(UNet2DModel(block_out_channels=(32,) * 4)):
        pass
    blind = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    with pytest.raises(TypeError, match="no cross-attention layer"), record(tiny.unet(**blind)):
        pass
    assert isinstance(tiny.unet(**blind), UNet2DConditionModel)


# Words and tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, subjects, positions",
    [
        ("a cat and a dog", ["cat", "dog"], [(2,), (5,)]),
        ("a cat and a dog", ["dog", "CAT"], [(5,), (2,)]),
        ("a red fire truck and a cat", ["fire truck", "cat"], [(3, 4), (7,)]),
        ("the red deer", ["deer"], [(3, 4, 5, 6)]),  # one word, several pieces
        ("a cat, a cat and a dog", ["cat", "dog"], [(2, 5), (8,)]),  # all occurrences
        ("a cat and a cat", ["cat", "cat"], [(2,), (5,)]),  # each its own
        ("two cats and a box", ["cat", "boxes"], [(2,), (5,)]),  # plural for singular, and the other way round
        ("a cat on two cats", ["cat", "cats"], [(2,), (5,)]),  # exact words come first
        ("a cat and a dog", [2, (4, 5)], [(2,), (4, 5)]),
        ("the (red) cat.", ["cat"], [(5,)]),
    ],
)
def test_subjects_are_found(plain, prompt, subjects, positions):
    tokens = plain.tokenizer.convert_ids_to_tokens(plain.tokenizer(prompt).input_ids)
    assert find_subjects(plain.tokenizer, prompt, subjects) == positions, tokens
    assert tokens[prompt_end(plain.tokenizer, prompt)] == "<|endoftext|>"


@pytest.mark.parametrize(
    "prompt, subjects, message",
    [
        ("a cat and a dog", ["cat", "horse"], r"'horse' is not in the prompt .*'cat', 'and', 'dog'"),
        ("a catalogue", ["cat"], "'cat' is not in the prompt"),
        ("a cat and a dog", ["cat", "cat"], "named 2 times, but stands 1 times"),
        ("a cat, a cat, a cat", ["cat", "cat"], "named 2 times, but stands 3 times"),
        ("a fire truck", ["fire truck", "truck"], "stand for the same words"),
        ("a cat and a dog", ["cat", 2], "stand for the same words"),
        ("", ["cat"], "the prompt is empty"),
        ("  ", ["cat"], "the prompt is empty"),
        ("a cat", [""], "a subject is empty"),
        ("a cat", [9], r"positions \[9\] are not all words .* 1 to 2"),
        ("a cat", [0], r"positions \[0\] are not all words"),
        ("a cat", [()], "are not all words"),
        ("a " * 30 + "cat", ["cat"], r"'cat' is token 31 of the prompt, .* reads 20"),
    ],
)
def test_subjects_that_cannot_be(plain, prompt, subjects, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            find_subjects(plain.tokenizer, prompt, subjects)


def test_the_end_of_a_prompt_that_is_cut_off(plain):
    assert prompt_end(plain.tokenizer, "a " * 30) == tiny.LENGTH - 1


def test_subject_maps_against_a_slow_reference():
    attention = torch.rand(2, 5, 7, 9, dtype=torch.float64).softmax(-1)
    got = subject_maps(attention, [(2,), (3, 5)], end=7)
    words = attention[..., 1:7].numpy() * 100
    words = np.exp(words - words.max(-1, keepdims=True))
    words /= words.sum(-1, keepdims=True)
    row = np.array([np.exp(-1), 1, np.exp(-1)])
    kernel = np.outer(row, row) / np.outer(row, row).sum()
    for k, columns in enumerate([[1], [2, 4]]):
        flat = words[..., columns].mean(-1)
        padded = np.pad(flat, ((0, 0), (1, 1), (1, 1)), mode="reflect")
        smooth = sum(kernel[i, j] * padded[:, i : i + 5, j : j + 7] for i in range(3) for j in range(3))
        np.testing.assert_allclose(got[..., k].numpy(), smooth, rtol=1e-12)


def test_subject_maps_can_leave_out_each_step():
    attention = torch.rand(1, 4, 4, 6).softmax(-1)
    raw = subject_maps(attention, [(2,)], sharpen=None, smooth=None)
    assert torch.equal(raw[..., 0], attention[..., 2])
    assert subject_maps(attention[:, :1, :1], [(2,)]).shape == (1, 1, 1, 1), "a single cell is not smoothed"
    padded, cut = subject_maps(attention, [(2,)]), subject_maps(attention, [(2,)], end=3)
    assert (cut >= padded).all() and (cut > padded).any(), "padding takes its share"
    assert subject_maps(attention.bfloat16(), [(2,)]).dtype == torch.float32


def test_subject_maps_are_attend_and_excites():
    """The values whose maximum diffusers' Attend-and-Excite pipeline takes."""
    from diffusers import StableDiffusionAttendAndExcitePipeline as AttendAndExcite

    attention = torch.rand(16, 16, 77).softmax(-1)
    ours = subject_maps(attention[None], [(2,), (5,)]).amax((0, 1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torch.meshgrid without an order
        theirs = AttendAndExcite._compute_max_attention_per_index(attention.clone(), [2, 5])
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-6, atol=1e-6)
