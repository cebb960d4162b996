"""Pictures made worse as in ImageNet-C.

The corruptions are those of Hendrycks and Dietterich (2019, arXiv:1903.12261) as the package `imagecorruptions-imaug`
has them. As there, a picture is first cut to what the network sees and then corrupted; it is not saved as JPEG after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..batch.decode import Decoded, Decoder
from ..batch.sources import Source
from ..errors import UsageError

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "CorruptingDecoder",
    "Sample",
    "corrupt",
    "read_corruptions",
    "read_severities",
    "require_library",
]

_GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
CORRUPTIONS = tuple(name for names in _GROUPS.values() for name in names)
_COMMON = CORRUPTIONS[: -len(_GROUPS["extra"])]  # the fifteen that mCE is the mean of
_SETS = {"common": _COMMON, "all": CORRUPTIONS, **_GROUPS}
SEVERITIES = (1, 2, 3, 4, 5)
_SMALLEST = 32  # pixels a side

_SEEDED = ("glass_blur", "impulse_noise")  # these have generators of their own


@dataclass(frozen=True)
class Sample(Source):
    """A labelled picture, as it is or corrupted.

    Attributes:
        target: Its class, as an index in the network's output.
        corruption: What is done to it; None for nothing.
        severity: How much, from 1 to 5.
    """

    target: int = -1
    corruption: str | None = None
    severity: int = 0

    @property
    def variant(self) -> tuple[str, int] | None:
        """Corruption and severity, or None."""
        return None if self.corruption is None else (self.corruption, self.severity)


@dataclass(frozen=True)
class CorruptingDecoder(Decoder):
    """Decodes, and corrupts those samples that ask for it."""

    def __call__(self, source: Source) -> Decoded:
        """As a decoder does; what is corrupted is what the network would see."""
        decoded = super().__call__(source)
        if decoded.pixels is None or not isinstance(source, Sample) or source.corruption is None:
            return decoded
        try:
            made = corrupt(decoded.pixels, source.corruption, source.severity)
        except Exception as error:  # whatever the library makes of a picture, it is this picture's problem
            return Decoded(width=decoded.width, height=decoded.height, error=f"{source.corruption} failed: {error}")
        return dataclasses.replace(decoded, pixels=made)


def corrupt(pixels: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Corrupts one picture; chance depends on its pixels, the corruption and the severity only.

    Args:
        pixels: `(C, H, W)`, uint8, of 3 channels or 1.
        name: One of `CORRUPTIONS`.
        severity: From 1 to 5.

    Returns:
        The same shape, uint8.
    """
    from imagecorruptions import corrupt as library_corrupt

    content = hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + f"{name} {severity}".encode())
    seed = int.from_bytes(content.digest()[:4], "big")
    own = {"seed": seed} if name in _SEEDED else {}
    before = np.random.get_state()  # noqa: NPY002 - the library takes its chance from there
    try:
        np.random.seed(seed)  # noqa: NPY002
        with contextlib.redirect_stdout(io.StringIO()):  # it prints where sizes are off by one
            made = library_corrupt(np.ascontiguousarray(pixels.transpose(1, 2, 0)), severity, name, **own)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    made = made if pixels.shape[0] == 3 else made[..., :1]
    return np.ascontiguousarray(made.transpose(2, 0, 1))


def require_library(size: Sequence[int]) -> None:
    """Finds out before any work whether pictures can be corrupted.

    Args:
        size: Height and width of what the network sees.

    Raises:
        UsageError: The library is missing or cannot be used, or the pictures are too small.
    """
    try:
        import imagecorruptions  # noqa: F401
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--corruptions needs imagecorruptions-imaug ({error}): pip install 'attnsuite[corruptions]'; "
            "the older package imagecorruptions does not work with today's numpy: uninstall it first"
        ) from error
    if min(size) < _SMALLEST:
        raise UsageError(f"--corruptions needs pictures of {_SMALLEST} pixels a side; the network takes {min(size)}")


def read_corruptions(text: str | None) -> tuple[str, ...]:
    """Names of corruptions or of sets of them, separated by commas; none for None.

    Raises:
        UsageError: An unknown name; the nearest is offered.
    """
    chosen: dict[str, None] = {}
    for name in _words(text):
        if name not in _SETS and name not in CORRUPTIONS:
            near = difflib.get_close_matches(name, [*_SETS, *CORRUPTIONS], n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"--corruptions: there is no {name!r}; {meant}there are {', '.join(CORRUPTIONS)}, "
                f"and sets of them: {', '.join(_SETS)}"
            )
        chosen.update(dict.fromkeys(_SETS.get(name, (name,))))
    if text is not None and not chosen:
        raise UsageError("--corruptions names none; common takes the fifteen of ImageNet-C")
    return tuple(chosen)


def read_severities(text: str) -> tuple[int, ...]:
    """Reads `1-5`, `3` or `1,3,5`.

    Raises:
        UsageError: Something else, or a severity that is not from 1 to 5.
    """
    chosen: set[int] = set()
    for part in _words(text):
        found = re.fullmatch(r"([1-5])(?:-([1-5]))?", part)
        if found is None or (found[2] and found[2] < found[1]):
            raise UsageError(f"--severities {text}: expected numbers from 1 to 5, such as 3 or 1,3,5 or 1-5")
        chosen.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    if not chosen:
        raise UsageError("--severities names none; 1-5 takes all")
    return tuple(sorted(chosen))


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]
