"""Measure what a call of the compiled encoder costs before any arithmetic, in microseconds, by its guards.

The graph is replaced by one that returns a ready tensor. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel
from vit_kernels import _dispatch

from experiments.common import cli

OP_CALLS = 20


@dataclass(frozen=True, kw_only=True)
class Report:
    """The microseconds of each call by its name, for an encoder with so many layers and parameters."""

    layers: int
    parameters: int
    microseconds: dict[str, float]
    load_before: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the report."""
    parser = cli.parser("python -m experiments.compile_cost --calls", __doc__)
    parser.add_argument("--layers", type=cli.positive, default=34, help="layers of the tiny encoder (default: 34)")
    parser.add_argument("--rounds", type=cli.positive, default=300, help="of 20 calls, of which the best counts")
    cli.add_out(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    config = replace(Llama4VisionConfig.tiny(), num_hidden_layers=options.layers)
    model = Llama4VisionModel(config).eval()
    pixel_values = torch.zeros(2, config.num_channels, config.image_size, config.image_size)
    report = Report(
        layers=options.layers,
        parameters=sum(1 for _ in model.parameters()),
        microseconds=_forms(model, pixel_values, options.rounds) | _ops(options.rounds),
        load_before=load,
    )
    console = cli.console()
    console.print(f"{report.layers} layers, {report.parameters} parameters, best of {options.rounds} rounds")
    for name, microseconds in report.microseconds.items():
        console.print(f"{microseconds:8.1f} us  {name}")
    path = options.out / f"call_overhead-{options.layers}.json"
    cli.write_json(path, cli.result("call_overhead", **vars(report)))
    console.print(f"wrote {path}")
    return 0


@torch.no_grad()
def _forms(model: Llama4VisionModel, pixel_values: Tensor, rounds: int) -> dict[str, float]:
    config = model.config
    out = torch.zeros(len(pixel_values), config.output_tokens_per_tile, config.vision_output_dim)

    def no_op(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., tuple[Tensor]]:
        return lambda *args: (out,)

    times = {}
    for name, frozen in (("decorated, all guards", False), ("decorated, frozen_parameters", True)):
        model.compilation_config = CompilationConfig(compile_mm_encoder=True, backend=no_op, frozen_parameters=frozen)
        times[name] = _best(lambda: model(pixel_values), rounds)
    model.compilation_config = None
    filters: dict[str, Any] = {
        "torch.compile, all guards": None,
        "torch.compile, tensor guards only (unsafe)": torch.compiler.keep_tensor_guards_unsafe,
        "torch.compile, no guards (unsafe)": torch.compiler.skip_all_guards_unsafe,
    }
    for name, guard_filter in filters.items():
        torch.compiler.reset()
        options = {"guard_filter_fn": guard_filter} if guard_filter else None
        compiled = torch.compile(model._call_impl, backend=no_op, fullgraph=True, options=options)
        times[name] = _best(lambda call=compiled: call(pixel_values), rounds)  # type: ignore[misc]
    return times


@torch.no_grad()
def _ops(rounds: int) -> dict[str, float]:
    """Measure an op that does nothing, registered as ours with attention's schema: 20 in a graph against none."""
    q, cu_seqlens = torch.zeros(1, 1, 16), torch.zeros(2, dtype=torch.int32)
    _dispatch.define(
        "call_overhead(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, str? impl) -> Tensor",
        implementations={"eager": lambda q, *args: torch.empty_like(q)},
        fake=lambda q, *args: torch.empty_like(q),
    )

    def chain(count: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for _ in range(count):
                x = torch.ops.vit_kernels.call_overhead.default(x, x, x, cu_seqlens, 1.0, "eager")
            return x + 1

        return torch.compile(run, fullgraph=True)

    none, all_of_them = chain(0), chain(OP_CALLS)
    without = _best(lambda: none(q), rounds)
    microseconds = (_best(lambda: all_of_them(q), rounds) - without) / OP_CALLS
    return {"one opaque op inside the graph, an allocation included": microseconds}


def _best(call: Callable[[], Any], rounds: int, calls: int = 20) -> float:
    """Return the microseconds of a call in the best round, since what disturbs a round only adds to it."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - start)
    return min(times) / calls * 1e6
