"""Explain why a module is not one graph: the lines of its breaks, the reasons of recompilations, guards and times.

Without a subject the module is the tiny Llama 4 encoder.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, compilation_counter

from experiments.common import cli

EXAMPLES = """  %(prog)s
  %(prog)s my_package.my_module:subject
      where subject() returns (module, [arguments of one call, arguments of the next, ...])
  %(prog)s --guards

With tlparse (`pip install tlparse`) a report of every compilation step is written to --report.
"""
STATUSES = {
    0: "one graph, no break, no recompilation",
    1: "anything else",
}

Subject = tuple[nn.Module, list[tuple[Any, ...]]]


def encoder() -> Subject:
    """Return the tiny Llama 4 encoder, and calls with several numbers of tiles."""
    config = Llama4VisionConfig.tiny()
    compilation_config = CompilationConfig(compile_mm_encoder=True, backend="aot_eager")
    model = Llama4VisionModel(config, compilation_config=compilation_config).eval()
    size = (config.num_channels, config.image_size, config.image_size)
    return model, [(torch.zeros(tiles, *size),) for tiles in (1, 17, 2)]


def main(arguments: list[str] | None = None) -> int:
    """Explain, print, and return the exit status."""
    parser = cli.parser(
        "python -m experiments.compile_cost.explain",
        __doc__,
        arguments="[subject] [options]",
        examples=EXAMPLES,
        statuses=STATUSES,
    )
    parser.add_argument(
        "subject", nargs="?", default="experiments.compile_cost.explain:encoder", help="a function, as module:function"
    )
    parser.add_argument("--guards", action="store_true", help="list every guard instead of counting them by kind")
    parser.add_argument("--report", type=Path, default=Path("tlparse"), help="folder for tlparse's report")
    options = parser.parse_args(arguments)
    if (tlparse := shutil.which("tlparse")) and "TORCH_TRACE" not in os.environ:
        return _with_report(tlparse, options.report, sys.argv[1:] if arguments is None else arguments)
    try:
        module, calls = _subject(options.subject)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        parser.error(f"subject: got {options.subject!r}, expected module:function: {error}")
    console = cli.console(markup=False)
    if not tlparse:
        console.print("tlparse is not installed, so there is no report of the single steps")
    whole = _explain_breaks(console, module, calls[0], list_guards=options.guards)
    return 0 if _explain_calls(console, module, calls) and whole else 1


def _subject(name: str) -> Subject:
    module_name, _, function = name.partition(":")
    module, calls = getattr(importlib.import_module(module_name), function)()
    if not isinstance(module, nn.Module) or not calls:
        raise TypeError(f"got {type(module).__name__} and {calls!r} from it")
    return module, list(calls)


def _with_report(tlparse: str, report: Path, arguments: Sequence[str]) -> int:
    """Run again in a process that writes a trace, since torch decides that at its import, and have tlparse read it."""
    with tempfile.TemporaryDirectory() as trace:
        command = [sys.executable, "-m", "experiments.compile_cost.explain", *arguments]
        status = subprocess.run(command, env={**os.environ, "TORCH_TRACE": trace}, check=False).returncode
        for log in Path(trace).glob("*.log"):
            subprocess.run([tlparse, str(log), "-o", str(report), "--overwrite", "--no-browser"], check=False)
    print(f"tlparse's report: {report / 'index.html'}")
    return status


def _explain_breaks(console: Console, module: nn.Module, call: tuple[Any, ...], *, list_guards: bool) -> bool:
    """Trace one call as far as possible, whatever breaks; return whether nothing did."""
    forward: Callable[..., Any] = module._call_impl
    with torch.no_grad():
        explanation = torch._dynamo.explain(forward)(*call)
    console.print(f"{explanation.graph_count} graphs, {explanation.graph_break_count} graph breaks")
    for number, reason in enumerate(explanation.break_reasons, 1):
        console.print(f"break {number}: {reason.reason.splitlines()[0]}")
        for frame in reason.user_stack:
            console.print(f"    {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}")
    guards = explanation.out_guards or []
    if list_guards:
        for guard in guards:
            console.print(f"guard {guard.create_fn_name()} on {guard.name}")
    else:
        kinds = Counter(guard.create_fn_name() for guard in guards)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        console.print(f"guards: {counts}", soft_wrap=True)
    return bool(explanation.graph_break_count == 0)


def _explain_calls(console: Console, module: nn.Module, calls: list[tuple[Any, ...]]) -> bool:
    """Call the module as its configuration says and return whether it took one graph, or why not."""
    torch.compiler.reset()
    before = compilation_counter.graphs_seen
    with _recompilations() as messages, torch.no_grad():
        for call in calls:
            try:
                module(*call)
            except torch._dynamo.exc.TorchDynamoException as error:
                console.print(f"not one graph: {str(error).splitlines()[0]}")
                return False
    graphs = compilation_counter.graphs_seen - before
    console.print(f"{len(calls)} calls: {graphs} graphs compiled")
    if not graphs:
        console.print("nothing was compiled: is the class decorated, and does its configuration turn compilation on?")
    for message in messages:
        console.print(message)
    _print_times(console)
    return graphs == 1


@contextlib.contextmanager
def _recompilations() -> Iterator[list[str]]:
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect()
    logger = torch._logging.getArtifactLogger("torch._dynamo.guards", "recompiles")
    torch._logging.set_logs(recompiles=True)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        torch._logging.set_logs()


def _print_times(console: Console) -> None:
    names, seconds = torch._dynamo.utils.compile_times(repr="csv", aggregate=True)
    longest = sorted(zip(map(float, map(str, seconds)), names, strict=True), reverse=True)[:5]
    for duration, name in longest:
        console.print(f"{duration:8.2f} s  {re.sub(r'.*[.]', '', name)}")


if __name__ == "__main__":
    sys.exit(main())
