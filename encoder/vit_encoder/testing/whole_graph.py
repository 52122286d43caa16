"""A check for tests: everything in a block was compiled as so many whole graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vit_encoder.compilation.counter import compilation_counter


@dataclass
class GraphReport:
    """What a `whole_graph` block saw.

    Args:
        graphs: graphs handed to the backends of decorated modules.
        unique_graphs: graphs that Dynamo counted itself.
        graph_breaks: Dynamo's reasons, with how often each came.
    """

    graphs: int = 0
    unique_graphs: int = 0
    graph_breaks: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def whole_graph(graphs: int = 1) -> Iterator[GraphReport]:
    """Decorated modules called in the block compile `graphs` graphs, with no break and no recompilation.

    Independent signals must agree: the graphs that the backends got, those that Dynamo counted, its graph breaks,
    its own `error_on_recompile` and `recompile_limit`, and the recompilations that the decorator counted.

    Raises:
        AssertionError: a signal differs.
        torch._dynamo.exc.RecompileError: something recompiled.
    """
    from torch._dynamo.utils import counters

    report = GraphReport()
    seen, recompiles = compilation_counter.graphs_seen, compilation_counter.recompiles
    unique = counters["stats"]["unique_graphs"]
    breaks = dict(counters["graph_break"])
    with torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=1, suppress_errors=False):
        yield report
    report.graphs = compilation_counter.graphs_seen - seen
    report.unique_graphs = counters["stats"]["unique_graphs"] - unique
    report.graph_breaks = {
        reason: count - breaks.get(reason, 0)
        for reason, count in counters["graph_break"].items()
        if count > breaks.get(reason, 0)
    }
    if report != GraphReport(graphs, graphs):
        raise AssertionError(f"expected {graphs} whole graphs without a break, got {report}")
    if compilation_counter.recompiles > recompiles:
        raise AssertionError(f"expected no recompilation, got {compilation_counter.recompiles - recompiles}")
