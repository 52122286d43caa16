"""What the main job measures, whichever encoder it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vit_encoder import CompilationConfig

from experiments.common.measure import Call
from experiments.common.weights import VisionEncoder
from experiments.encode.sweep import Sweep


@dataclass(frozen=True)
class Subject:
    """An encoder and an image for it, on its device and in its dtype.

    Attributes:
        inputs: of the encoder's forward; the pixels come first.
        part, parts: what the times are divided by, and how many of it the image has: its tiles, or itself.
        description: goes into the result as it is.
        reference: computes the reference's features.
        peer: transformers' encoder on the same weights and input, or None where it is not installed.
        swept: the name of the sizes that `sweep` goes through, and these.
        sweep: calls an encoder, compiled so, with batches of several sizes.
    """

    model: VisionEncoder
    inputs: tuple[Tensor, ...]
    part: str
    parts: int
    description: dict[str, Any]
    reference: Callable[[], Tensor]
    peer: Call | None
    swept: tuple[str, list[Any]]
    sweep: Callable[[CompilationConfig], Sweep]

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.inputs[0].device
