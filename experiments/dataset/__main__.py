"""Embed a whole collection of images with a vision encoder, on one process or with Ray Data.

Writes parquet files with a row an image: its source, its canvas in tiles or grid in patches, its features, or why it
has none. What is in the folder already is not encoded again, so that an interrupted job goes on where it was. Needs
pyarrow, and ray[data] for `--engine ray`: the extra `ray`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from experiments.common import cli, encoders
from experiments.dataset.encoder import Settings
from experiments.dataset.engines import ENGINES, Job
from experiments.dataset.images import references
from experiments.dataset.parts import difference, read_embeddings, sources_done

# Other batches are other sums: the rounding of float32, with a margin for the depth of the encoder.
ALLOWED = 1e-4

EXAMPLES = """  %(prog)s --images 'photographs/**/*.jpg' --out embeddings --checkpoint Llama-4-Scout-17B-16E-Instruct
  %(prog)s --images 'shards/*.parquet' --out embeddings --checkpoint … --engine ray --actors 8 --device cuda
  %(prog)s --images '*.png' --out embeddings --model qwen2_5_vl --checkpoint Qwen2.5-VL-7B-Instruct
  %(prog)s --images '*.png' --out /tmp/embeddings --config tiny --engine ray --compare
      also encodes them with the plain loop, and says how far the two differ and how fast each is
  %(prog)s --images '*.png' --out /tmp/embeddings --engine ray --compare --record experiments/results/local/ray.json
"""
STATUSES = {
    0: "every image has a row, and no row has an error",
    1: "some images have an error in their row; or, with --compare, embeddings differ",
}


@dataclass
class Progress:
    """The number of images with an error, and when each image was done, in seconds from the start."""

    errors: int = 0
    seconds: list[float] = field(default_factory=list)

    def rate(self, part_images: int) -> float | None:
        """Return images a second after the first part, which waits for the encoders; None where that was all."""
        rest = self.seconds[part_images:]
        elapsed = rest[-1] - self.seconds[part_images - 1] if rest else 0.0
        return len(rest) / elapsed if elapsed else None


@dataclass(frozen=True)
class EngineReport:
    """The seconds of an engine, which include loading the encoders, and its rate without that."""

    seconds: float
    images_per_second: float | None
    errors: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison of two engines whose embeddings are equal up to a relative RMS difference."""

    load_average: list[float]
    images: int
    weights: str
    settings: dict[str, Any]
    engines: dict[str, EngineReport]
    largest_difference: float
    allowed_difference: float = ALLOWED


def main(arguments: list[str] | None = None) -> int:
    """Run the job and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = cli.console()
    try:
        _check_installed(options.engine)
        _check_record(options)
        job, known = _job(options)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    console.print(f"{known} images, {known - len(job.todo)} of them have a row already")
    if not job.todo:
        return 0
    progress = _run(options.engine, job)
    console.print(_told(options.engine, job, progress))
    equal = not options.compare or _compared(console, options, job, progress)
    return 0 if progress.errors == 0 and equal else 1


def _check_record(options: argparse.Namespace) -> None:
    """Refuse a --record that could not be written after the job."""
    if options.record is not None and not options.compare:
        raise ValueError("--record: got a file without --compare, expected both: a comparison is what it records")
    if options.record is not None and not options.record.parent.is_dir():
        raise FileNotFoundError(f"--record: got {options.record}, expected a file in a folder that exists")


def _check_installed(engine: str) -> None:
    for module in ("pyarrow", *(["ray"] if engine == "ray" else [])):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{module} is not installed: pip install 'vit-kernels[ray]'")


def _job(options: argparse.Namespace) -> tuple[Job, int]:
    """Return the job, and the number of all images, those that have a row included."""
    settings = _settings(options)
    found = references(options.images)
    options.out.mkdir(parents=True, exist_ok=True)
    done = sources_done(options.out)
    todo = [reference for reference in found if reference.source not in done]
    return Job(todo, settings, options.out, options.budget, options.part_images, options.actors), len(found)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "python -m experiments.dataset",
        __doc__,
        arguments="--images PATTERN --out FOLDER [options]",
        examples=EXAMPLES,
        statuses=STATUSES,
    )
    parser.add_argument("--images", required=True, help="glob pattern of image files or parquet files, in quotes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the parquet files")
    encoders.add_options(parser)
    parser.add_argument("--engine", choices=("plain", "ray"), default="plain", help="default: %(default)s")
    parser.add_argument(
        "--actors", type=cli.positive, default=1, help="encoders, one for each accelerator (default: 1)"
    )
    budgets = ", ".join(f"{kind.budget} {kind.plural} of {name}" for name, kind in encoders.ENCODERS.items())
    parser.add_argument("--budget", type=cli.positive, help=f"most tiles or patches of a batch (default: {budgets})")
    parser.add_argument("--part-images", type=cli.positive, default=64, help="images in a file (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=encoders.DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="compile the encoder as one graph")
    parser.add_argument("--compare", action="store_true", help="compare with the plain loop")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the comparison, where embeddings are equal")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    """Return the encoder's settings, and fill in the options' defaults that depend on it."""
    kind = encoders.chosen(options)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: got {options.device!r}, expected one that PyTorch can use: {error}") from error
    config = kind.config_of(options.checkpoint, options.config)
    images, limit = kind.settings_of(options.checkpoint, config, getattr(options, kind.limit))
    vars(options).update({kind.limit: limit, "budget": options.budget or kind.budget})
    return Settings(
        model=options.model,
        checkpoint=options.checkpoint,
        config=config,
        images=images,
        dtype=encoders.DTYPES[options.dtype],
        device=options.device,
        compiled=options.compile,
    )


def _run(engine: str, job: Job) -> Progress:
    progress = Progress()
    start = time.perf_counter()
    with tqdm(total=len(job.todo), unit="image", desc=engine) as bar:
        for error in ENGINES[engine](job):
            progress.seconds.append(time.perf_counter() - start)
            progress.errors += bool(error)
            bar.update()
            bar.set_postfix(errors=progress.errors)
    return progress


def _told(engine: str, job: Job, progress: Progress) -> str:
    rate = progress.rate(job.part_images)
    after = f"; {rate:.2f} images/s after the first {job.part_images}" if rate is not None else ""
    return (
        f"{engine}: {len(progress.seconds)} images in {progress.seconds[-1]:.1f} s, encoders loaded{after}; "
        f"{progress.errors} have an error"
    )


def _compared(console: Console, options: argparse.Namespace, job: Job, progress: Progress) -> bool:
    """Encode the same images with the plain loop too, and return whether both gave the same."""
    with tempfile.TemporaryDirectory() as folder:
        beside = replace(job, out=Path(folder))
        plain = _run("plain", beside)
        console.print(_told("plain", beside, plain))
        expected, found = read_embeddings(beside.out), read_embeddings(job.out)
    worst = max(difference(found[source], embedding) for source, embedding in expected.items())
    console.print(f"largest relative RMS difference of an image's features: {worst:.1e} (allowed: {ALLOWED:.1e})")
    if worst <= ALLOWED and options.record is not None:
        runs = {options.engine: progress, "plain loop": plain}
        report = _report(options, job, len(expected), runs, worst)
        kind = job.settings.kind
        units = {kind.plural: sum(kind.units(embedding.high, embedding.wide) for embedding in expected.values())}
        cli.write_json(options.record, cli.result("encode_dataset", **units, **vars(report)))
        console.print(f"wrote {options.record}")
    return worst <= ALLOWED


def _report(options: argparse.Namespace, job: Job, images: int, runs: dict[str, Progress], worst: float) -> Report:
    names = ("model", "actors", "budget", job.settings.kind.limit, "part_images", "device", "dtype", "compile")
    engines = {name: EngineReport(run.seconds[-1], run.rate(job.part_images), run.errors) for name, run in runs.items()}
    return Report(
        load_average=[round(load, 2) for load in os.getloadavg()],
        images=images,
        weights=options.checkpoint.name if options.checkpoint else f"random, {options.config}",
        settings={name: getattr(options, name) for name in names},
        engines=engines,
        largest_difference=worst,
    )


if __name__ == "__main__":
    sys.exit(main())
