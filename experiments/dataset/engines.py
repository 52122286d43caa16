"""The two ways to run a job over a collection of images: the plain loop of one process, and Ray Data."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from vit_encoder import Llama4ImageSettings

from experiments.common import cli
from experiments.dataset.encoder import DatasetEncoder, EncoderSettings
from experiments.dataset.images import decode


@dataclass(frozen=True)
class Job:
    """What is to be encoded, and how.

    Args:
        todo: references of images.
        settings: of every encoder.
        out: folder of the parts.
        image_settings: what images are tiled by.
        tile_budget: most tiles of a call.
        part_images: images that are handed to an encoder, and written, at a time.
        actors: encoders, where there can be several.
    """

    todo: Sequence[dict[str, Any]]
    settings: EncoderSettings
    out: Path
    image_settings: Llama4ImageSettings
    tile_budget: int
    part_images: int
    actors: int

    @property
    def decode(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Decodes and tiles the image of a reference."""
        return functools.partial(decode, settings=self.image_settings)


def plain(job: Job) -> Iterator[str]:
    """Encode part after part in this process; gives each image's error, "" where it has features."""
    encoder = DatasetEncoder(job.settings, job.out, job.tile_budget)
    for first in range(0, len(job.todo), job.part_images):
        part = job.todo[first : first + job.part_images]
        yield from (embedding.error for embedding in encoder.encode([job.decode(reference) for reference in part]))


def with_ray(job: Job) -> Iterator[str]:
    """Encode with Ray Data, images decoded by tasks beside the actors that encode them; gives each image's error.

    An actor has an accelerator of its own, or an equal share of the CPU cores but one. On a cluster that is running
    already (RAY_ADDRESS) every node must see the images and the folder.
    """
    import ray

    path = os.pathsep.join(filter(None, (str(cli.ROOT), os.environ.get("PYTHONPATH"))))
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, include_dashboard=False, log_to_driver=False)
    try:
        # The job has a bar of its own.
        ray.data.DataContext.get_current().enable_progress_bars = False
        cores = max(1, int(ray.cluster_resources()["CPU"]) - 1)
        on_gpu = job.settings.device != "cpu"
        threads = None if on_gpu else max(1, cores // job.actors)
        rows = ray.data.from_items(list(job.todo)).map(job.decode, num_cpus=0.5)
        answers = rows.map_batches(
            _Actor,
            fn_constructor_args=(replace(job.settings, threads=threads), job.out.resolve(), job.tile_budget),
            batch_size=job.part_images,
            compute=ray.data.ActorPoolStrategy(size=job.actors),
            num_gpus=1 if on_gpu else 0,
            num_cpus=0.5 if on_gpu else cores / job.actors,
        )
        for row in answers.iter_rows():
            yield str(row["error"])
    finally:
        ray.shutdown()


class _Actor:
    """One encoder of a pool."""

    def __init__(self, settings: EncoderSettings, out: Path, tile_budget: int) -> None:
        self.encoder = DatasetEncoder(settings, out, tile_budget)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        rows = [{name: column[index] for name, column in batch.items()} for index in range(len(batch["source"]))]
        return {"error": [embedding.error for embedding in self.encoder.encode(rows)]}


ENGINES: dict[str, Callable[[Job], Iterator[str]]] = {"plain": plain, "ray": with_ray}
