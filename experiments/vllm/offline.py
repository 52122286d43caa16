"""What vLLM writes about images with its own vision encoder, with our kernels in it, and with our encoder.

Each variant runs in a process of its own; the texts are printed side by side. Runs where vLLM is installed:
`./scripts/test_vllm.sh --set-up-only` makes such an environment for a CPU, .venv-vllm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.cbook import get_sample_data
from PIL import Image
from rich.table import Table
from tqdm import tqdm

from experiments.common import cli
from experiments.vllm.tiny_models import FAMILIES, make_tiny
from experiments.vllm.variants import VARIANTS, Variant, environment, variants_of

TINY_ENGINE: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4}
NO_VIDEOS = {"limit_mm_per_prompt": {"image": 1, "video": 0}}

EXAMPLES = """  %(prog)s
      the sample photograph and a tiny random Llama 4 that it makes itself: its text means nothing
  %(prog)s --image tower.jpg --model Llama-4-Scout-17B-16E-Instruct --engine '{"tensor_parallel_size": 8}'
"""
STATUSES = {
    0: "every variant wrote the same",
    1: "the texts differ, or a variant failed",
}


@dataclass(frozen=True)
class Answers:
    """What one variant wrote about each image, or why it could not."""

    variant: Variant
    texts: list[dict[str, Any]]
    problem: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run every variant and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = cli.console()
    try:
        _check(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny(options.tiny, Path(folder)) if options.model is None else options.model
        keys = options.variants or [variant.key for variant in variants_of(model)]
        variants = [variant for variant in VARIANTS if variant.key in keys]
        progress = tqdm(variants, unit="variant")
        answers = [_generate(variant, options, model.resolve(), Path(folder)) for variant in progress]
    console.print(_table(options, answers))
    for line in _verdict(answers):
        console.print(line)
    return 0 if _all_agree(answers) else 1


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.vllm --offline", __doc__, examples=EXAMPLES, statuses=STATUSES)
    keys = [variant.key for variant in VARIANTS]
    sample = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    parser.add_argument("--image", type=Path, nargs="+", default=[sample], help="default: matplotlib's photograph")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint (default: a tiny random one)")
    parser.add_argument(
        "--tiny", choices=FAMILIES, default="llama4", metavar="FAMILY",
        help=f"which tiny random one: {' '.join(FAMILIES)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--prompt", default="What is in this image?", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=cli.positive, default=64, help="default: %(default)s")
    parser.add_argument(
        "--variants", nargs="+", choices=keys, metavar="VARIANT",
        help=f"{' '.join(keys)} (default: those in which the model differs)",
    )  # fmt: skip
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vllm.LLM, a JSON object")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.model is not None and not (options.model / "config.json").is_file():
        raise FileNotFoundError(f"--model: got {str(options.model)!r}, expected a folder with config.json")
    for path in options.image:
        try:
            Image.open(path).close()
        except OSError as error:
            raise OSError(f"--image: got {str(path)!r}, expected an image: {error}") from error
    if not isinstance(options.engine, dict):
        raise ValueError(f"--engine: got {options.engine!r}, expected a JSON object")
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"vLLM is not installed for {sys.executable}; ./scripts/test_vllm.sh --set-up-only makes .venv-vllm"
        )


def _generate(variant: Variant, options: argparse.Namespace, model: Path, folder: Path) -> Answers:
    out = folder / f"{variant.key}.json"
    engine = {"compilation_config": variant.compilation_config, "enforce_eager": not variant.compiled}
    if options.model is None:
        engine |= TINY_ENGINE | (NO_VIDEOS if FAMILIES[options.tiny].videos else {})
    engine |= options.engine
    command = [
        sys.executable, "-P", "-m", "experiments.vllm.generate", str(model), str(out), "--prompt", options.prompt,
        "--max-tokens", str(options.max_tokens), "--engine", json.dumps(engine), "--image", *map(str, options.image),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(cli.ROOT), os.environ.get("PYTHONPATH"))))
    variables = environment(variant, folder / "cache") | {"PYTHONPATH": path}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not out.exists():
        return Answers(variant, [], _last_error(done.stdout + done.stderr))
    return Answers(variant, json.loads(out.read_text(encoding="utf-8")))


def _last_error(log: str) -> str:
    """The line that says what went wrong, of a log whose end is about processes that were ended."""
    errors = [line for line in log.splitlines() if "Error: " in line]
    return (errors[0] if errors else log[-500:]).strip()


def _table(options: argparse.Namespace, answers: list[Answers]) -> Table:
    table = Table(title=f"{options.prompt!r}", title_justify="left", show_lines=True)
    table.add_column("")
    for path in options.image:
        table.add_column(path.name)
    for answer in answers:
        cells = [repr(of["text"]) for of in answer.texts] or [f"failed: {answer.problem}"] * len(options.image)
        table.add_row(answer.variant.name, *cells)
    return table


def _all_agree(answers: list[Answers]) -> bool:
    return not any(answer.problem for answer in answers) and all(
        [of["tokens"] for of in answer.texts] == [of["tokens"] for of in answers[0].texts] for answer in answers
    )


def _verdict(answers: list[Answers]) -> list[str]:
    written = [answer for answer in answers if not answer.problem]
    lines = [f"{answer.variant.name} failed: {answer.problem}" for answer in answers if answer.problem]
    if _all_agree(written):
        return [*lines, f"{len(written)} variants wrote the same tokens"]
    return [*lines, "the tokens differ: expected in low precision, where a near tie can fall either way"]
