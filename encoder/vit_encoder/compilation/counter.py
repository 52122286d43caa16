"""Counts what was compiled, so that tests can say what they expect."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class CompilationCounter:
    """Counts of this process; after vLLM's `compilation/counter.py`.

    Args:
        models_seen: module instances that `support_torch_compile` compiled, once for each configuration.
        graphs_seen: graphs that Dynamo handed to a backend, recompilations included.
        backend_compilations: graphs that a backend really compiled, rather than taking them from a cache.
        cache_hits: graphs that Inductor or AOTAutograd took from a cache.
        artifacts_saved, artifacts_loaded: files written to and taken from `CompilationConfig.cache_dir`.
        recompiles: graphs made for a module and range of sizes that had one already.
    """

    models_seen: int = 0
    graphs_seen: int = 0
    backend_compilations: int = 0
    cache_hits: int = 0
    artifacts_saved: int = 0
    artifacts_loaded: int = 0
    recompiles: int = 0

    @contextlib.contextmanager
    def expect(self, **expected: int) -> Iterator[None]:
        """The counts named grow by exactly so much inside the block.

        Raises:
            TypeError: a name that is no count.
            AssertionError: a count grew by another number.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(expected) - set(known)):
            raise TypeError(f"expect: got {', '.join(unknown)}, expected names among {', '.join(known)}")
        before = dataclasses.asdict(self)
        yield
        after = dataclasses.asdict(self)
        grown = {name: after[name] - before[name] for name in expected}
        if grown != expected:
            raise AssertionError(f"compilation_counter grew by {grown}, expected {expected}")


compilation_counter = CompilationCounter()
