"""Measure one form of an encoder: what it takes to the first result, and whether the results are right.

`experiments.compile_cost` starts a process for each; the last line that it prints is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vit_encoder import CompilationConfig, export, load

from experiments.common import cli
from experiments.common.comparison import ALLOWED_EPS, relative_error
from experiments.compile_cost.row import Sample
from experiments.compile_cost.subjects import SUBJECTS, Batch, Subject

Call = Callable[[int], Tensor]
"""Returns the features of one of the subject's batches, by its index."""


def main(arguments: list[str] | None = None) -> None:
    """Measure one form and print the sample."""
    parser = cli.parser("python -m experiments.compile_cost.process", __doc__, arguments="form [options]")
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--model", choices=SUBJECTS, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="cache_dir of the form 'decorated'")
    parser.add_argument("--artefact", type=Path, required=True, help="folder to export to or to load")
    parser.add_argument("--started", type=float, required=True, help="when the process was started, by the clock")
    options = parser.parse_args(arguments)
    imported = time.time() - options.started
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    subject = SUBJECTS[options.model](options.layers, options.heads)
    expected = [subject.encoder(*batch).double() for batch in subject.batches]
    cpu, wall = cpu_seconds(), time.perf_counter()
    call = FORMS[options.form](subject, options)
    first = call(0)
    seconds = time.perf_counter() - wall
    used = cpu_seconds() - cpu
    results = [first, *map(call, range(1, len(expected)))]
    sample = Sample(
        cpu_seconds=used,
        seconds=seconds,
        seconds_with_imports=imported + seconds,
        graphs=graphs(),
        deviation=max(relative_error(*pair).rms for pair in zip(results, expected, strict=True)),
        allowed=2 * ALLOWED_EPS * torch.finfo(torch.float32).eps,
    )
    print(json.dumps(vars(sample)))


def cpu_seconds() -> float:
    """Return the user and system seconds of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def graphs() -> int:
    """Return how many graphs Dynamo made in this process, those of an export included."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _on(compiled: Callable[..., Any], batches: list[Batch], mark: Callable[[Tensor, int], None]) -> Call:
    def call(index: int) -> Any:
        for x in batches[index]:
            mark(x, 0)
        return compiled(*batches[index])

    return call


def _plain(subject: Subject, options: argparse.Namespace) -> Call:
    """torch.compile of the same module, its layers inlined."""
    for part, regions in subject.regions.items():
        for region in regions:
            setattr(part, region, part._block)  # type: ignore[attr-defined]
    compiled = torch.compile(subject.encoder.forward, fullgraph=True)
    return _on(compiled, subject.batches, torch._dynamo.decorators.mark_unbacked)


def _transformers(subject: Subject, options: argparse.Namespace) -> Call:
    peer = subject.peer()
    assert isinstance(peer, nn.Module), "transformers is not installed"
    compiled = torch.compile(peer.forward)
    call = _on(compiled, subject.peer_batches, torch._dynamo.maybe_mark_dynamic)
    return lambda index: subject.peer_features(call(index))


def _decorated(subject: Subject, options: argparse.Namespace) -> Call:
    subject.encoder.compilation_config = CompilationConfig(compile_mm_encoder=True, cache_dir=options.cache)
    return lambda index: subject.encoder(*subject.batches[index])


def _exported(subject: Subject, options: argparse.Namespace) -> Call:
    deployed = load(export(subject.encoder, subject.batches[0], options.artefact))
    return lambda index: deployed(*subject.batches[index])


def _loaded(subject: Subject, options: argparse.Namespace) -> Call:
    deployed = load(options.artefact, configuration=subject.encoder.config)
    return lambda index: deployed(*subject.batches[index])


FORMS: dict[str, Callable[[Subject, argparse.Namespace], Call]] = {
    "plain": _plain,
    "transformers": _transformers,
    "decorated": _decorated,
    "exported": _exported,
    "loaded": _loaded,
}


if __name__ == "__main__":
    main()
