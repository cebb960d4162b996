"""Which switches of `multimodal` a model is asked under."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

__all__ = ["Switches"]


@dataclass(frozen=True)
class Switches:
    """Switches, all off by default.

    Attributes:
        mma: Modality-mutual attention.
        vmtc: Share of the image tokens that visual token compression leaves; None for off.
        cmai: Cross-modality attention inhibition.
    """

    mma: bool = False
    vmtc: float | None = None
    cmai: bool = False

    def __post_init__(self) -> None:
        if self.vmtc is not None and not 0 < self.vmtc <= 1:
            raise UsageError(
                f"--vmtc {self.vmtc:g}: expected the share of image tokens to keep, above 0 and at most 1, such as 0.25"
            )

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> list[str]:
        """Those that are on."""
        vmtc = [] if self.vmtc is None else [f"VMTC {self.vmtc:g}"]
        return [*(["MMA"] if self.mma else []), *vmtc, *(["CMAI"] if self.cmai else [])]

    def check(self, model: Any, label: str) -> None:
        """Finds out whether a model can be asked under them.

        Raises:
            UsageError: It cannot; the message says why.
        """
        try:
            with self.on(model):
                pass
        except (TypeError, ValueError) as error:
            raise UsageError(f"{label} cannot be asked under {', '.join(self.names)}: {error}") from error

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """Puts them on a model; gives the settings of the compression, which know what it did, or None."""
        from multimodal.cmai import inhibit_cross_modality
        from multimodal.mma import modality_mutual_attention
        from multimodal.vmtc import compress_visual_tokens

        with contextlib.ExitStack() as stack:
            compression = None
            if self.mma:
                stack.enter_context(modality_mutual_attention(model))
            if self.vmtc is not None:
                compression = stack.enter_context(compress_visual_tokens(model, keep_ratio=self.vmtc)).settings
            if self.cmai:
                stack.enter_context(inhibit_cross_modality(model))
            yield compression
