"""The two ways to run a job over a collection of images: the plain loop of one process, and Ray Data."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import cli
from experiments.dataset.encoder import DatasetEncoder, Settings
from experiments.dataset.images import Decoded, Reference, decode


@dataclass(frozen=True)
class Job:
    """What is to be encoded, and how.

    Attributes:
        todo: the images.
        settings: of every encoder.
        out: the folder of the parts.
        budget: the most tiles or patches of a batch.
        part_images: how many images are handed to an encoder, and written, at a time.
        actors: the number of encoders, where there can be several.
    """

    todo: Sequence[Reference]
    settings: Settings
    out: Path
    budget: int
    part_images: int
    actors: int

    def decode(self, reference: Reference) -> Decoded:
        """Decode an image as the encoder takes it."""
        return decode(reference, self.settings.model, self.settings.config, self.settings.images)


def plain(job: Job) -> Iterator[str]:
    """Encode part after part in this process, and give each image's error, or "", when its batch is done."""
    encoder = DatasetEncoder(job.settings, job.out, job.budget)
    for first in range(0, len(job.todo), job.part_images):
        part = job.todo[first : first + job.part_images]
        for embeddings in encoder.encode(map(job.decode, part)):
            yield from (embedding.error for embedding in embeddings)


def with_ray(job: Job) -> Iterator[str]:
    """Encode with Ray Data, where tasks decode images beside the actors that encode them; gives what `plain` does.

    An actor has an accelerator of its own, or an equal share of the CPU cores but one. On a cluster that is running
    already (RAY_ADDRESS) every node must see the images and the folder.
    """
    import ray

    path = os.pathsep.join(filter(None, (str(cli.ROOT), os.environ.get("PYTHONPATH"))))
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, include_dashboard=False, log_to_driver=False)
    try:
        context = ray.data.DataContext.get_current()
        # The job has a bar of its own. It moves with each batch: Ray hands a row on when its block is full, so at once.
        context.enable_progress_bars = False
        context.target_max_block_size = 1
        cores = max(1, int(ray.cluster_resources()["CPU"]) - 1)
        on_gpu = job.settings.device != "cpu"
        threads = None if on_gpu else max(1, cores // job.actors)
        rows = ray.data.from_items([vars(reference) for reference in job.todo])
        answers = rows.map(functools.partial(_decoded, job=replace(job, todo=())), num_cpus=0.5).map_batches(
            _Actor,
            fn_constructor_args=(replace(job.settings, threads=threads), job.out.resolve(), job.budget),
            batch_size=job.part_images,
            compute=ray.data.ActorPoolStrategy(size=job.actors),
            num_gpus=1 if on_gpu else 0,
            num_cpus=0.5 if on_gpu else cores / job.actors,
        )
        for row in answers.iter_rows():
            yield str(row["error"])
    finally:
        ray.shutdown()


def _decoded(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Decode a row of Ray's: it has the fields of a reference, and becomes one with those of the decoded image."""
    return vars(job.decode(Reference(**row)))


class _Actor:
    """One encoder of a pool."""

    def __init__(self, settings: Settings, out: Path, budget: int) -> None:
        self.encoder = DatasetEncoder(settings, out, budget)

    def __call__(self, part: dict[str, np.ndarray]) -> Iterator[dict[str, list[str]]]:
        rows = zip(*(part[field.name] for field in fields(Decoded)), strict=True)
        # Names, sizes and errors are of numpy's types.
        images = (Decoded(str(name), x, int(high), int(wide), str(error)) for name, x, high, wide, error in rows)
        for embeddings in self.encoder.encode(images):
            yield {"error": [embedding.error for embedding in embeddings]}


ENGINES: dict[str, Callable[[Job], Iterator[str]]] = {"plain": plain, "ray": with_ray}
