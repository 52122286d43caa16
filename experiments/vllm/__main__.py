"""vLLM serving a model with its own vision encoder, with our kernels in it, and with our encoder: which is faster.

Our attention runs in the encoders of some 45 models, all kernels in Llama 4's, our encoders in Llama 4 and Qwen2.5-VL.

Starts `vllm serve` on the loopback interface for each variant in turn, puts the same load on each with
`vllm bench serve`, repeats that for several rounds, and prints the table that vLLM's pull request 30709 has. Writes a
JSON file and a figure. Runs where vLLM is installed: `./scripts/test_vllm.sh --set-up-only` makes such an environment
for a CPU, .venv-vllm.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.common import cli
from experiments.common.measure import in_turn
from experiments.vllm import offline
from experiments.vllm.load import Load, drive, image_files
from experiments.vllm.report import ENOUGH_ROUNDS, differences, draw, table
from experiments.vllm.server import ServerError, check_port, end_of, free_port, serving, vllm_command
from experiments.vllm.tiny_models import FAMILIES, make_tiny
from experiments.vllm.variants import VARIANTS, Variant, environment, variants_of

# A tiny checkpoint's sizes; a real one's come from its own configuration.
TINY_ARGUMENTS = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "4")
NO_VIDEOS = ("--limit-mm-per-prompt", '{"image": 1, "video": 0}')
# Of what vLLM's benchmark writes; the rest is about single requests, or names files of this machine.
KEPT = (
    "completed", "failed", "duration", "total_input_tokens", "total_output_tokens", "request_throughput",
    "output_throughput", "mean_ttft_ms", "median_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "mean_itl_ms",
    "median_itl_ms", "encoder_seconds",
)  # fmt: skip

EXAMPLES = """  %(prog)s
      a tiny random Llama 4 that it makes itself, every variant, 4 rounds
  %(prog)s --tiny qwen3_vl --rounds 1
  %(prog)s --model Llama-4-Scout-17B-16E-Instruct --prompts 1000 --serve="--tensor-parallel-size 8"
  %(prog)s --images photographs --variants off-compiled kernels-compiled encoder-compiled
"""
STATUSES = {
    0: "every variant answered every request",
    1: "a server did not start, or a request failed: the table says which",
}


@dataclass
class Result:
    """What one variant did: a benchmark's result a round, and what went wrong."""

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--offline" in arguments:
        return offline.main([argument for argument in arguments if argument != "--offline"])
    parser = _parser()
    options = parser.parse_args(arguments)
    console = cli.console()
    try:
        load = _prepare(options)
    except OSError as error:
        parser.error(str(error))
    if importlib.util.find_spec("vllm") is None:
        parser.error(
            f"vLLM is not installed for {sys.executable}; ./scripts/test_vllm.sh --set-up-only makes .venv-vllm"
        )
    # Otherwise a terminated experiment would leave its server behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _model(options) as model:
        results = _rounds(options, model, load)
    report = cli.result(
        "serve_vllm",
        model=model.name,
        load=asdict(load) | {"images": load.images and load.images.name},
        variants=[asdict(result) for result in results],
    )
    console.print(table(report))
    for line in differences(report):
        console.print(line)
    path = options.out / f"serve_vllm-{model.name}.json"
    cli.write_json(path, report)
    draw(report, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png').name}")
    return 1 if any(result.problems for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.vllm", __doc__, examples=EXAMPLES, statuses=STATUSES)
    parser.add_argument(
        "--offline", action="store_true", help="compare the text about images instead; --offline --help says more"
    )
    keys = [variant.key for variant in VARIANTS]
    parser.add_argument("--model", type=Path, help="folder of a checkpoint (default: a tiny random one)")
    parser.add_argument(
        "--tiny", choices=FAMILIES, default="llama4", metavar="FAMILY",
        help=f"which tiny random one: {' '.join(FAMILIES)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, help="folder of images for the prompts (default: random images)")
    parser.add_argument(
        "--variants", nargs="+", choices=keys, metavar="VARIANT",
        help=f"{' '.join(keys)} (default: those in which the model differs)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=cli.positive, default=ENOUGH_ROUNDS, help="default: %(default)s")
    parser.add_argument("--prompts", type=cli.positive, default=128, help="requests a round (default: %(default)s)")
    parser.add_argument("--concurrency", type=cli.positive, help="most requests at a time (default: all)")
    parser.add_argument(
        "--input-tokens", type=cli.positive, default=32, help="of a random prompt (default: %(default)s)"
    )
    parser.add_argument("--output-tokens", type=cli.positive, default=16, help="default: %(default)s")
    parser.add_argument("--serve", default="", metavar="ARGUMENTS", help="further arguments of vllm serve, in one word")
    parser.add_argument("--port", type=cli.positive, help="default: one that is free")
    parser.add_argument("--ready-seconds", type=cli.positive, default=1800, help="default: %(default)s")
    cli.add_out(parser, "results")
    return parser


def _prepare(options: argparse.Namespace) -> Load:
    if options.model is not None and not (options.model / "config.json").is_file():
        raise FileNotFoundError(f"--model: got {str(options.model)!r}, expected a folder with config.json")
    if options.images is not None:
        image_files(options.images)
    if options.port is not None:
        check_port(options.port)
    return Load(options.prompts, options.concurrency, options.input_tokens, options.output_tokens, options.images)


@contextlib.contextmanager
def _model(options: argparse.Namespace) -> Iterator[Path]:
    if options.model is not None:
        yield options.model.resolve()
        return
    with tempfile.TemporaryDirectory() as parent:
        yield make_tiny(options.tiny, Path(parent))


def _rounds(options: argparse.Namespace, model: Path, load: Load) -> list[Result]:
    variants = variants_of(model) if options.variants is None else _named(options.variants)
    results = {variant: Result(variant.name) for variant in variants}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=options.rounds * len(variants), unit="server") as progress:
        for number, variant in in_turn(variants, options.rounds):
            progress.set_postfix_str(f"round {number + 1}, {variant.name}")
            try:
                measured = _measure(options, variant, model, load, number, Path(folder))
            except (OSError, RuntimeError) as error:
                results[variant].problems.append(f"round {number + 1}: {error}")
            else:
                results[variant].rounds.append({name: measured[name] for name in KEPT})
                if measured["failed"]:
                    reason = next(filter(None, measured["errors"]), "no reason given").strip().splitlines()[-1]
                    results[variant].problems.append(
                        f"round {number + 1}: {measured['failed']} of {load.prompts} requests failed: {reason}"
                    )
            progress.update()
    return list(results.values())


def _named(keys: Sequence[str]) -> list[Variant]:
    return [variant for variant in VARIANTS if variant.key in keys]


def _measure(
    options: argparse.Namespace, variant: Variant, model: Path, load: Load, number: int, folder: Path
) -> dict[str, Any]:
    """One server and two benchmarks on it, of which the second one counts."""
    name = f"{variant.key}-{number}"
    # The encoder's seconds come through an endpoint for developers, and from a module of this project.
    path = os.pathsep.join(filter(None, (str(cli.ROOT), os.environ.get("PYTHONPATH"))))
    variables = environment(variant, folder / "cache") | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    port = options.port or free_port()
    command = _serve_command(options, variant, model)
    with serving(
        command, port=port, log=folder / f"{name}.log", variables=variables, timeout=options.ready_seconds
    ) as server:
        ask = functools.partial(drive, server, load, model=model, seed=number, folder=folder, variables=variables)
        # A batch of a size that is new is slower than the next one of that size, in every variant.
        ask(name=f"{name}-warm-up")
        server.encoder_seconds()
        result = ask(name=name)
        result["encoder_seconds"] = server.encoder_seconds()
        if server.process.poll() is not None:
            raise ServerError(f"the server died under the load:\n{end_of(server.log)}")
    return result


def _serve_command(options: argparse.Namespace, variant: Variant, model: Path) -> Sequence[str]:
    return vllm_command(
        "serve", str(model), "--compilation-config", json.dumps(variant.compilation_config),
        "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0",
        "--worker-extension-cls", "experiments.vllm.timer.EncoderTimer",
        *(_tiny_arguments(options.tiny) if options.model is None else ()), *options.serve.split(),
    )  # fmt: skip


def _tiny_arguments(family: str) -> tuple[str, ...]:
    return (*TINY_ARGUMENTS, *NO_VIDEOS) if FAMILIES[family].videos else TINY_ARGUMENTS


if __name__ == "__main__":
    sys.exit(main())
