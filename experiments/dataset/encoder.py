"""An encoder that turns decoded images into rows of a folder, in batches filled by tiles: what every process runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, TiledImage, encode_images

from experiments.common.weights import random_encoder
from experiments.dataset.parts import Embedding, write_part


@dataclass(frozen=True)
class EncoderSettings:
    """What makes an encoder, wherever it runs.

    Args:
        checkpoint: folder of a Llama 4 checkpoint; None draws random weights of `config`.
        config: of the random weights.
        dtype, device: of the weights.
        compiled: whether it is compiled as one graph.
        threads: of PyTorch on a CPU; None leaves them.
    """

    checkpoint: Path | None
    config: Llama4VisionConfig
    dtype: torch.dtype
    device: str
    compiled: bool
    threads: int | None = None

    def make(self) -> Llama4VisionModel:
        """Load or draw the weights; raises what `Llama4VisionModel.from_pretrained` does."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.checkpoint is not None:
            model = Llama4VisionModel.from_pretrained(self.checkpoint, dtype=self.dtype, device=self.device)
        else:
            model = random_encoder(self.config, dtype=self.dtype, device=torch.device(self.device))
        model.compilation_config = CompilationConfig(compile_mm_encoder=self.compiled)
        return model


class DatasetEncoder:
    """Encodes rows as `decode` gives them and writes them as one part of a folder.

    Args:
        settings: of its one encoder.
        folder: gets the parts.
        tile_budget: most tiles of a call of the encoder; an image that has more goes alone.
    """

    def __init__(self, settings: EncoderSettings, folder: Path, tile_budget: int) -> None:
        self.model = settings.make()
        self.folder = folder
        self.tile_budget = tile_budget

    @torch.inference_mode()
    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Embedding]:
        """Features of each row, in order; an image that could not be decoded keeps its error."""
        embeddings: list[Embedding] = []
        for group in filled([len(row["pixel_values"]) for row in rows], self.tile_budget):
            embeddings += self._encode_group([rows[index] for index in group])
        write_part(self.folder, embeddings)
        return embeddings

    def _encode_group(self, rows: Sequence[dict[str, Any]]) -> list[Embedding]:
        tiled = [
            TiledImage(torch.from_numpy(np.asarray(row["pixel_values"], dtype=np.float32)), (row["high"], row["wide"]))
            for row in rows
            if not row["error"]
        ]
        features = iter(encode_images(self.model, tiled) if tiled else [])
        width = self.model.config.vision_output_dim
        return [
            Embedding(
                str(row["source"]),
                int(row["high"]),
                int(row["wide"]),
                np.zeros((0, width), np.float32) if row["error"] else next(features).float().cpu().numpy(),
                str(row["error"]),
            )
            for row in rows
        ]


def filled(tile_counts: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive indices whose tiles fit into the budget together, each group as long as possible."""
    group: list[int] = []
    tiles = 0
    for index, count in enumerate(tile_counts):
        if group and tiles + count > budget:
            yield group
            group, tiles = [], 0
        group.append(index)
        tiles += count
    if group:
        yield group
