"""The process of one case: imports what it needs, waits for its turn, and then uses the GPU.

`experiments.gpu` starts it while the case before it still runs, so that its imports cost no time of their own.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from experiments.gpu import machine
from experiments.gpu.child import GO
from experiments.gpu.plan import case_of
from experiments.gpu.records import Records

LOST = 70
"""Exit status of a process whose GPU no longer answers."""


def main(name: str, results: str) -> int:
    """Run a case, and return its exit status.

    Args:
        name: of the case.
        results: the file that its findings are appended to.
    """
    case = case_of(name)
    call = _function(case.function)
    if case.before is not None:
        _function(case.before)()
    if sys.stdin.buffer.readline() != GO:
        return 0
    threading.Thread(target=_end_with_the_report, daemon=True).start()
    records = Records(Path(results), case=name)
    try:
        call(records, *case.arguments)
    except BaseException as error:
        traceback.print_exc()
        lost = machine.lost()
        records.write("error", problem=lost or machine.described(error), lost=bool(lost))
        return LOST if lost else 1
    return 0


def _function(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(f"experiments.gpu.{module}"), function)
    return found


def _end_with_the_report() -> None:
    """The report holds the other end of standard input: where it was killed, nothing may go on in its place."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # What was found is written; a GPU that no longer answers could hold up the interpreter's end for ever.
    os._exit(status)
