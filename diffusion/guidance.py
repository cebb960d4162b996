"""Attention guidance at test time: the latent is moved so that the attention maps do what a loss asks of them.

Before each guided step of the sampler the UNet runs once more, on the prompt alone and only as far as the last layer
whose map is needed, and the latent takes a step down the gradient of the loss (A-STAR, Agarwal et al., ICCV 2023,
arXiv 2306.14544, section 3):

    z'_t = z_t - alpha_t * dL/dz_t,        alpha_t = step_size * sqrt(s_i),  s falling linearly from 1 to 0.5

Then the sampler denoises `z'_t` as it always does. `guide(pipe, ...)` puts this into any UNet pipeline of diffusers
for the length of a `with` block; the pipeline's own loop, its arguments, callbacks and schedulers stay as they are.

The paper gives the losses, the update and that it goes on until the last step; the sizes of the step and the optional
refinement are those of Attend-and-Excite (Chefer et al., SIGGRAPH 2023), whose protocol it follows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.attention_maps import AttentionRecorder, _unet_of, record, subject_maps
from diffusion.losses import (
    MaskRule,
    Normalization,
    attend_and_excite_loss,
    conform_loss,
    divide_and_bind_loss,
    normalize_maps,
    retention_loss,
    retention_masks,
    segregation_loss,
)

__all__ = ["Concepts", "Guidance", "LossName", "Trace", "guide"]

LossName = Literal["segregation", "retention", "attend_and_excite", "divide_and_bind", "conform"]


@dataclass(frozen=True)
class Guidance:
    """What is asked of the maps, and how the latent is moved.

    Attributes:
        losses: the weight of each loss; the paper's A-STAR is `{"segregation": 1, "retention": 1}`.
        steps: how many evaluations of the sampler are guided, from the first; all without it. Samplers of second order
            evaluate twice a step (`len(scheduler.timesteps)` counts them).
        step_size: the factor of alpha.
        step_decay: `s` at the first and the last evaluation.
        refinement: for some steps the attention that the weakest subject must reach somewhere before the sampler goes
            on; the latent is moved again until it does. Attend-and-Excite: `{0: 0.05, 10: 0.5, 20: 0.8}`.
        max_refinements: at most so many moves more in such a step.
        masks_from: the maps of which pass retention remembers for the next step: of the pass that denoised (after the
            move) or of the one that the move was computed from. The paper leaves it open.
        mask_rule: how a map becomes a mask, see `diffusion.losses.retention_masks`.
        mask_options: the parameters of that rule.
        normalize: how maps are scaled before segregation and retention, see `diffusion.losses.normalize_maps`.
        sharpen: see `diffusion.attention_maps.subject_maps`.
        smooth: see there.
        keep_padding: leaves the tokens after the prompt in the softmax, as Attend-and-Excite does for SD 1.x.
        resolution: which maps, see `diffusion.attention_maps.record`.
        layers: see there.

    Raises:
        ValueError: if a value is not what it can be.
    """

    losses: Mapping[str, float] = field(default_factory=lambda: {"segregation": 1.0, "retention": 1.0})
    steps: int | None = None
    step_size: float = 20.0
    step_decay: tuple[float, float] = (1.0, 0.5)
    refinement: Mapping[int, float] = field(default_factory=dict)
    max_refinements: int = 20
    masks_from: Literal["denoising", "move"] = "denoising"
    mask_rule: MaskRule = "half_max"
    mask_options: Mapping[str, float] = field(default_factory=dict)
    normalize: Normalization = "none"
    sharpen: float | None = 100.0
    smooth: float | None = 0.5
    keep_padding: bool = False
    resolution: int | tuple[int, int] | None = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        known = get_args(LossName)
        for name, weight in self.losses.items():
            if name not in known:
                raise ValueError(f"unknown loss {name!r}; there are {', '.join(known)}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {name!r} is {weight}: it must be 0 or more, and finite")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"guidance_steps={self.steps}: it must be 0 or more; None guides every step")
        if not 0 <= self.step_size < float("inf"):
            raise ValueError(f"step_size={self.step_size}: it must be 0 or more, and finite")
        if self.masks_from not in ("denoising", "move"):
            raise ValueError(f"masks_from={self.masks_from!r}: it is 'denoising' or 'move'")
        if self.max_refinements < 0:
            raise ValueError(f"max_refinements={self.max_refinements}: it must be 0 or more")

    @property
    def weighted(self) -> dict[str, float]:
        """The losses that move the latent."""
        return {name: weight for name, weight in self.losses.items() if weight}


@dataclass(frozen=True)
class Concepts:
    """The words of one prompt whose maps are guided.

    Attributes:
        subjects: their names.
        positions: token positions of each subject, then of each attribute.
        end: the position of the end-of-text token; None where the prompt is not known.
        pairs: (attribute, subject) as indices of `positions`.
        layout: for some subjects, by index, the mask `[height, width]` (bool) of where they shall be.
    """

    subjects: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    end: int | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    layout: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Each subject with its attributes, as indices of `positions`."""
        return [
            (subject, *(attribute for attribute, of in self.pairs if of == subject))
            for subject in range(len(self.subjects))
        ]


@dataclass
class Trace:
    """What was seen on the way, of the passes that denoised: after the moves, also in steps that were not guided."""

    maps: list[Tensor] = field(default_factory=list)
    """For each evaluation of the sampler `[B, H, W, K]`, on the CPU; K is the largest number of subjects, others have
    zeros."""
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    """For each loss and evaluation `[B]`, on the CPU."""


@contextmanager
def guide(
    pipe: Any, concepts: Sequence[Concepts], guidance: Guidance | None = None, *, trace: bool = False
) -> Iterator[Trace]:
    """Guides every run of a pipeline inside the `with` block.

    The UNet gets a hook that moves the latent before it is denoised, and the scheduler of the pipeline hands the moved
    latent on; on exit both are what they were. One run per block: the steps are counted from its beginning.

    Args:
        pipe: a pipeline of diffusers with a UNet, a scheduler and classifier-free guidance or none.
        concepts: of each prompt in turn; every prompt has the same number of images.
        guidance: the settings; A-STAR's without it.
        trace: fills the trace, which costs one softmax more in each recorded layer.

    Yields:
        The trace.

    Raises:
        TypeError: if the pipeline has no UNet with cross-attention.
        RuntimeError: under `torch.inference_mode()`, where nothing has a gradient.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("guidance needs a gradient: leave torch.inference_mode() (torch.no_grad() is fine)")
    guidance = guidance or Guidance()
    unet = _unet_of(pipe)
    with record(pipe, resolution=guidance.resolution, layers=guidance.layers) as recorder:
        guide = _Guide(pipe, unet, recorder, list(concepts), guidance, trace)
        with _frozen(unet), guide.installed():
            yield guide.trace


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Weights ask for no gradient, so that the graph does not keep what only they would need."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _Call:
    """How the pipeline calls its UNet in one step, reduced to the prompt's half of the batch."""

    z: Tensor  # [B, C, h, w], as the scheduler holds it, unscaled
    beside: Tensor | None  # [B, C', h, w], what an inpainting UNet gets beside the latent
    args: tuple[Any, ...]  # from the timestep on
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Evaluation:
    """The losses at one latent."""

    maps: list[Tensor]  # of each prompt [n, H, W, K], detached
    gradient: Tensor  # [B, C, h, w]
    weakest: Tensor  # [B], the highest attention that the weakest subject gets anywhere


class _Guide:
    """The state of one guided run."""

    def __init__(
        self,
        pipe: Any,
        unet: nn.Module,
        recorder: AttentionRecorder,
        concepts: list[Concepts],
        guidance: Guidance,
        trace: bool,
    ):
        self.trace = Trace(losses={name: [] for name in guidance.losses})
        self._pipe, self._unet, self._recorder = pipe, unet, recorder
        self._concepts, self._guidance, self._tracing = concepts, guidance, trace
        # Also where only its repeated blocks are. A network that is not is spared torch.compile's machinery altogether.
        inner = (getattr(module, "_compiled_call_impl", None) for module in unet.modules())
        self._compiled = pipe.unet is not unet or any(call is not None for call in inner)
        self._scale: Callable[..., Tensor] | None = getattr(pipe.scheduler, "scale_model_input", None)
        self._step = 0
        self._latents: Tensor | None = None  # as the pipeline holds them, once or twice the batch
        self._moved: Tensor | None = None  # what takes their place until the scheduler has made its step
        self._previous: list[Tensor] | None = None  # the maps of the step before, for each prompt
        self._lost: Tensor | None = None  # [B], samples whose loss was not finite

    @contextmanager
    def installed(self) -> Iterator[None]:
        scheduler, step = self._pipe.scheduler, self._pipe.scheduler.step
        before = {name: scheduler.__dict__.get(name) for name in ("step", "scale_model_input")}

        # The pipeline reads the signature of `step` to see what it takes; `wraps` shows it.
        @functools.wraps(step)
        def step_from_the_moved(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            moved, self._moved = self._moved, None
            return step(model_output, timestep, sample if moved is None else moved, *args, **kwargs)

        outside: Callable[[Any], Any] = torch.compiler.disable if self._compiled else lambda hook: hook
        hooks = [
            self._pipe.unet.register_forward_pre_hook(outside(self._before), with_kwargs=True),
            self._pipe.unet.register_forward_hook(outside(self._after), with_kwargs=True),
        ]
        try:
            scheduler.step = step_from_the_moved
            if self._scale is not None:
                scale = self._scale

                @functools.wraps(scale)
                def scale_what_is_seen(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                    self._latents = sample
                    return scale(sample, *args, **kwargs)

                scheduler.scale_model_input = scale_what_is_seen
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, own in before.items():
                scheduler.__dict__.pop(name, None)
                if own is not None:
                    scheduler.__dict__[name] = own

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline calls the UNet: the latent is moved first, if this step is guided."""
        args, kwargs = _sample_first(args, kwargs)
        call = self._call(args, kwargs)
        steps, moves = self._guidance.steps, self._guidance.weighted
        if moves and (steps is None or self._step < steps):
            moved = self._moved = self._move(call).to(call.z.dtype)
            args = (self._model_input(moved, args[0], call), *args[1:])
            call = _Call(moved, call.beside, call.args, call.kwargs)
        if self._compiled and self._listens():
            with torch.no_grad():
                self._remember(self._observe(call.z, call))
        self._recorder.enabled = self._listens() and not self._compiled
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The UNet has denoised: its maps are what the next step has to retain."""
        if self._recorder.enabled:
            maps = self._recorder.maps()
            self._remember(maps[-self._batch(maps) :])
        self._recorder.enabled = True
        self._step += 1

    def _listens(self) -> bool:
        """Whether the pass that denoises has to give its maps."""
        needs_previous = bool({"retention", "conform"} & set(self._guidance.weighted))
        steps = self._guidance.steps
        goes_on = steps is None or self._step + 1 < steps
        return self._tracing or (needs_previous and goes_on and self._guidance.masks_from == "denoising")

    def _halves(self) -> int:
        return 2 if getattr(self._pipe, "do_classifier_free_guidance", False) else 1

    def _batch(self, both: Tensor) -> int:
        """The number of samples in a batch that guidance may have doubled."""
        batch, rest = divmod(len(both), self._halves())
        if rest or batch % len(self._concepts):
            raise ValueError(
                f"the UNet got a batch of {len(both)} for {len(self._concepts)} prompts and "
                f"{'classifier-free guidance' if self._halves() == 2 else 'no guidance'}: give the concepts of each "
                "prompt; pipelines that run more than two copies of the batch are not supported"
            )
        return batch

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        sample = args[0]
        batch = self._batch(sample)
        latents = sample if self._latents is None else self._latents
        self._latents = None
        half = functools.partial(_last, batch=batch, both=len(sample))
        z, channels = half(latents), latents.shape[1]
        beside = half(sample)[:, channels:] if sample.shape[1] > channels else None
        return _Call(z, beside, half(args[1:]), half(kwargs))

    def _model_input(self, z: Tensor, like: Tensor, call: _Call) -> Tensor:
        """What the UNet is called with for the latent `z`, as often as in `like`."""
        # Samplers that count in sigmas scale their latent for the network; the gradient is that of the unscaled one.
        x = z if self._scale is None else self._scale(z, call.args[0])
        if call.beside is not None:
            x = torch.cat([x, call.beside.to(x.dtype)], 1)
        return torch.cat([x] * (len(like) // len(x))).to(like.dtype)

    def _observe(self, z: Tensor, call: _Call) -> Tensor:
        """The attention to all tokens at a latent, `[B, H, W, N]`, from a pass that ends where it is known."""
        x = self._model_input(z, z, call)
        # Compiled blocks would not report to the recorder.
        with torch.compiler.set_stance("force_eager") if self._compiled else nullcontext():
            return self._recorder.run(self._unet.forward, x, *call.args, **call.kwargs)

    def _maps(self, attention: Tensor) -> list[Tensor]:
        """For each prompt the maps of its subjects and attributes, `[n, H, W, K]`."""
        guidance = self._guidance
        return [
            subject_maps(
                own,
                of.positions,
                end=None if guidance.keep_padding else of.end,
                sharpen=guidance.sharpen,
                smooth=guidance.smooth,
            )
            for own, of in zip(attention.chunk(len(self._concepts)), self._concepts, strict=True)
        ]

    def _losses(self, maps: list[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Each loss, one value a sample `[B]`."""
        previous = self._previous or [None] * len(maps)
        return {
            name: torch.cat(
                [
                    _loss(name, own, before, of, self._guidance)
                    for own, before, of in zip(maps, previous, self._concepts, strict=True)
                ]
            )
            for name in names
        }

    def _evaluate(self, z: Tensor, call: _Call) -> _Evaluation:
        weighted = self._guidance.weighted
        with torch.enable_grad(), _advice_when_out_of_memory():
            z = z.detach().requires_grad_()
            maps = self._maps(self._observe(z, call))
            losses = self._losses(maps, list(weighted))
            total = torch.stack([weight * losses[name] for name, weight in weighted.items()]).sum(0)  # [B]
            (gradient,) = torch.autograd.grad(total.sum(), z)
        maps = [own.detach() for own in maps]
        subjects = [own[..., : len(of.subjects)] for own, of in zip(maps, self._concepts, strict=True)]
        weakest = torch.cat([own.amax((1, 2)).amin(-1) for own in subjects])
        return _Evaluation(maps, self._finite(total.detach(), gradient), weakest)

    def _finite(self, total: Tensor, gradient: Tensor) -> Tensor:
        """The gradient, zero from now on for samples that have none."""
        lost = ~(total.isfinite() & gradient.flatten(1).isfinite().all(1))
        before = torch.zeros_like(lost) if self._lost is None else self._lost
        if bool((lost & ~before).any()):
            warnings.warn(
                f"the attention loss of sample {(lost & ~before).nonzero().flatten().tolist()} is not finite at step "
                f"{self._step}: it is denoised without guidance from here on. A smaller step_size or a wider dtype may "
                "help.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._lost = lost | before
        return torch.where(self._lost.view(-1, 1, 1, 1), torch.zeros_like(gradient), gradient)

    def _move(self, call: _Call) -> Tensor:
        """`z' = z - alpha * gradient`, after as many moves more as refinement asks for."""
        guidance, evaluations = self._guidance, len(self._pipe.scheduler.timesteps)
        first, last = guidance.step_decay
        done = min(self._step / max(evaluations - 1, 1), 1.0)
        alpha = guidance.step_size * (first + (last - first) * done) ** 0.5
        z, now = call.z, self._evaluate(call.z, call)
        threshold = guidance.refinement.get(self._step)
        if threshold is not None:
            z, now = self._refine(z, now, call, alpha, threshold)
        if guidance.masks_from == "move":
            self._previous = now.maps
        return z - alpha * now.gradient

    def _refine(
        self, z: Tensor, now: _Evaluation, call: _Call, alpha: float, threshold: float
    ) -> tuple[Tensor, _Evaluation]:
        """Moves samples until their weakest subject reaches the threshold, and once more, as Attend-and-Excite does."""
        active = now.weakest < threshold
        for _ in range(self._guidance.max_refinements):
            if not bool(active.any()):
                break
            reached = now.weakest >= threshold
            z = z - alpha * now.gradient * active.view(-1, 1, 1, 1)
            now = self._evaluate(z, call)
            active = active & ~reached
        return z, now

    def _remember(self, attention: Tensor) -> None:
        maps = self._maps(attention.detach())
        if self._tracing:
            for name, values in self._losses(maps, list(self._guidance.losses)).items():
                self.trace.losses[name].append(values.cpu())
            most = max(len(of.subjects) for of in self._concepts)
            shown = [
                F.pad(own[..., : len(of.subjects)], (0, most - len(of.subjects)))
                for own, of in zip(maps, self._concepts, strict=True)
            ]
            self.trace.maps.append(torch.cat(shown).cpu())
        if self._guidance.masks_from == "denoising" or not self._guidance.weighted:
            self._previous = maps


def _loss(name: str, maps: Tensor, before: Tensor | None, of: Concepts, guidance: Guidance) -> Tensor:
    """One loss of one prompt's maps, `[n]`."""
    subjects = maps[..., : len(of.subjects)]
    if name == "segregation":
        return segregation_loss(normalize_maps(subjects, guidance.normalize))
    if name == "retention":
        return _retention(subjects, before, of, guidance)
    if name == "attend_and_excite":
        return attend_and_excite_loss(subjects)
    if name == "divide_and_bind":
        return divide_and_bind_loss(maps, of.pairs)
    return conform_loss(maps, of.groups, before)


def _retention(subjects: Tensor, before: Tensor | None, of: Concepts, guidance: Guidance) -> Tensor:
    """Retention of the places of the step before and of a layout; 0 as long as there is neither."""
    known = list(of.layout) if before is None else list(range(len(of.subjects)))
    if not known:
        return (subjects * 0).sum((1, 2, 3))
    if before is None:
        masks = torch.zeros_like(subjects, dtype=torch.bool)
    else:
        earlier = normalize_maps(before[..., : len(of.subjects)], guidance.normalize)
        masks = retention_masks(earlier, guidance.mask_rule, **guidance.mask_options)
    for index, place in of.layout.items():
        masks[..., index] = _at_grid(place, masks.shape[1:3]).to(masks.device)
    scaled = normalize_maps(subjects, guidance.normalize)
    return retention_loss(scaled[..., known], masks[..., known])


def _at_grid(place: Tensor, grid: Sequence[int]) -> Tensor:
    """A mask of the picture at the size of the maps; a place smaller than a cell keeps the cell it covers most of."""
    covered = F.adaptive_avg_pool2d(place[None].float(), (grid[0], grid[1]))[0]
    return covered >= covered.max().clamp(max=0.5)


def _sample_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a UNet's call with sample and timestep in front, however the pipeline passes them."""
    kwargs = dict(kwargs)
    for position, name in enumerate(("sample", "timestep")):
        if len(args) <= position:
            args = (*args, kwargs.pop(name))
    return args, kwargs


def _last(value: Any, *, batch: int, both: int) -> Any:
    """The prompt's half of whatever was doubled for guidance: tensors, and what holds them."""
    if isinstance(value, Tensor):
        return value[-batch:] if value.ndim and len(value) == both else value
    if isinstance(value, dict):
        return {key: _last(item, batch=batch, both=both) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_last(item, batch=batch, both=both) for item in value)
    return value


@contextmanager
def _advice_when_out_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(
            "out of memory while the attention loss was computed. Lower num_images_per_prompt, the image size, or the "
            "number of recorded layers (layers=...); call pipe.unet.enable_gradient_checkpointing(); or load the "
            f"pipeline in bfloat16. ({str(error).splitlines()[0]})"
        ) from error
