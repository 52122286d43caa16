"""One form of the encoder in a process of its own: what it takes to its first result, judged before it counts.

`experiments.compile_ledger` starts it; the last line that it prints is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, export, load
from vit_encoder.llama4.model import EncoderLayer

from experiments.comparison import ALLOWED_EPS, relative_error
from experiments.peers import transformers_vision_model
from experiments.weights import SEED, random_encoder

FIRST, OTHERS = 2, (1, 17, 5)
"""Tiles of the first call, which compiles, and of those after it."""

Call = Callable[[Tensor], Tensor]


def config_of(layers: int, heads: int) -> Llama4VisionConfig:
    """Tiles of 112 pixels through so many layers of so many heads of 88."""
    width = 88 * heads
    return replace(
        Llama4VisionConfig.tiny(),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        intermediate_size=4 * width,
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure one form and print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compile_process", description=__doc__)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="cache_dir of the form 'decorated'")
    parser.add_argument("--artefact", type=Path, required=True, help="folder to export to or to load")
    parser.add_argument("--started", type=float, required=True, help="when the process was started, by the clock")
    options = parser.parse_args(arguments)
    imported = time.time() - options.started
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = random_encoder(config_of(options.layers, options.heads), dtype=torch.float32, device=torch.device("cpu"))
    batches = {tiles: pixels(model.config, tiles) for tiles in (FIRST, *OTHERS)}
    expected = {tiles: model(batch).double() for tiles, batch in batches.items()}
    cpu, wall = cpu_seconds(), time.perf_counter()
    call = FORMS[options.form](model, options)
    first = call(batches[FIRST])
    seconds = time.perf_counter() - wall
    seen: dict[str, Any] = {
        "cpu_seconds": cpu_seconds() - cpu,
        "seconds": seconds,
        "seconds_with_imports": imported + seconds,
    }
    deviations = [relative_error(first, expected[FIRST]).rms]
    deviations += [relative_error(call(batches[tiles]), expected[tiles]).rms for tiles in OTHERS]
    seen |= {"deviation": max(deviations), "allowed": 2 * ALLOWED_EPS * torch.finfo(torch.float32).eps}
    seen |= {"graphs": graphs(), "parameters": sum(x.numel() for x in model.parameters())}
    print(json.dumps(seen))


def pixels(config: Llama4VisionConfig, tiles: int) -> Tensor:
    """[tiles, 3, image_size, image_size], the same in every process."""
    generator = torch.Generator().manual_seed(SEED + tiles)
    return torch.randn(tiles, 3, config.image_size, config.image_size, generator=generator)


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def graphs() -> int:
    """Graphs that Dynamo made in this process, an export's own ones included."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _plain(model: Llama4VisionModel, options: argparse.Namespace) -> Call:
    """torch.compile of the same module, its layers inlined."""
    EncoderLayer._region = EncoderLayer._block
    compiled = torch.compile(model.forward, fullgraph=True)

    def call(pixel_values: Tensor) -> Tensor:
        torch._dynamo.decorators.mark_unbacked(pixel_values, 0)
        return compiled(pixel_values)

    return call


def _transformers(model: Llama4VisionModel, options: argparse.Namespace) -> Call:
    peer = transformers_vision_model(model)
    assert isinstance(peer, nn.Module), "transformers is not installed"
    compiled = torch.compile(peer.forward)

    def call(pixel_values: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(pixel_values, 0)
        out: Tensor = compiled(pixel_values).last_hidden_state
        return out

    return call


def _decorated(model: Llama4VisionModel, options: argparse.Namespace) -> Call:
    model.compilation_config = CompilationConfig(compile_mm_encoder=True, cache_dir=options.cache)
    return model


def _exported(model: Llama4VisionModel, options: argparse.Namespace) -> Call:
    return load(export(model, [pixels(model.config, FIRST)], options.artefact))


def _loaded(model: Llama4VisionModel, options: argparse.Namespace) -> Call:
    return load(options.artefact, configuration=model.config)


FORMS: dict[str, Callable[[Llama4VisionModel, argparse.Namespace], Call]] = {
    "plain": _plain,
    "transformers": _transformers,
    "decorated": _decorated,
    "exported": _exported,
    "loaded": _loaded,
}


if __name__ == "__main__":
    main()
