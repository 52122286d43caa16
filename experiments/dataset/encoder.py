"""What every process runs: an encoder that turns decoded images into rows of a folder, batch after batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vit_encoder import CompilationConfig

from experiments.common.encoders import ENCODERS, Encoder, Prepared
from experiments.common.weights import VisionEncoder
from experiments.dataset.images import Decoded
from experiments.dataset.parts import Embedding, write_part


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What it takes to make an encoder, and to prepare its images, in any process.

    Attributes:
        model: its name among `ENCODERS`.
        checkpoint: the folder of its weights; None draws random ones for `config`.
        config: its sizes.
        images: the settings that images are prepared by.
        dtype, device: of the weights.
        compiled: whether it is compiled as one graph.
        threads: how many PyTorch uses on a CPU; None leaves its own choice.
    """

    model: str
    checkpoint: Path | None
    config: Any
    images: Any
    dtype: torch.dtype
    device: str
    compiled: bool
    threads: int | None = None

    @property
    def kind(self) -> Encoder:
        """The encoder's entry among those that commands know."""
        return ENCODERS[self.model]

    def make(self) -> VisionEncoder:
        """Make the encoder; raises what its entry's `make` does."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = self.kind.make(self.checkpoint, self.config, dtype=self.dtype, device=torch.device(self.device))
        model.compilation_config = CompilationConfig(compile_mm_encoder=self.compiled)
        return model


class DatasetEncoder:
    """Encodes decoded images and writes them as parts of a folder.

    Args:
        settings: of its one encoder.
        folder: the folder that the parts are written to.
        budget: the most tiles or patches of a batch; an image that has more makes a batch of its own.
    """

    def __init__(self, settings: Settings, folder: Path, budget: int) -> None:
        self.settings = settings
        self.model = settings.make()
        self.folder = folder
        self.budget = budget

    def encode(self, images: Iterable[Decoded]) -> Iterator[list[Embedding]]:
        """Give the rows of one part in order, those of a batch as soon as it is encoded, and then write the part."""
        part: list[Embedding] = []
        for batch in filled(images, self.budget):
            part += (embeddings := self._encode_batch(batch))
            yield embeddings
        write_part(self.folder, part)

    @torch.inference_mode()
    def _encode_batch(self, images: Sequence[Decoded]) -> list[Embedding]:
        kind = self.settings.kind
        # Ray hands arrays out that must not be written to, which PyTorch warns about.
        prepared = [
            Prepared(torch.from_numpy(np.array(image.pixel_values, np.float32)), image.high, image.wide)
            for image in images
            if not image.error
        ]
        features = iter(kind.encode(self.model, prepared) if prepared else [])
        nothing = np.zeros((0, kind.features(self.settings.config)), np.float32)
        return [
            Embedding(
                image.source,
                image.high,
                image.wide,
                nothing if image.error else next(features).float().cpu().numpy(),
                image.error,
            )
            for image in images
        ]


def filled(images: Iterable[Decoded], budget: int) -> Iterator[list[Decoded]]:
    """Give batches of consecutive images that fit into the budget together, each as long as possible."""
    batch: list[Decoded] = []
    units = 0
    for image in images:
        if batch and units + len(image.pixel_values) > budget:
            yield batch
            batch, units = [], 0
        batch.append(image)
        units += len(image.pixel_values)
    if batch:
        yield batch
