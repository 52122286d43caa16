"""How the suite is split over processes, pytest-xdist's workers: how many, and what each keeps to itself.

conftest.py imports it before torch and triton, so it imports neither.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BYTES_OF_A_WORKER = 3 << 30
"""A worker was seen to grow to 1.7 GB, and the largest process that its tests start, for a short time, to 2.8."""


def worker_count(*, cores: int, memory: int, files: list[str], in_process: bool) -> int:
    """How many workers a run takes; 0 leaves it in pytest's own process.

    Tests use one thread each. A file is not split, so one alone takes no worker.

    Args:
        cores: that this process may run on.
        memory: bytes of the machine.
        files: files, folders and tests that were named; empty for all.
        in_process: the run needs the terminal, for a debugger or for what tests print.
    """
    one_file = len({name.partition("::")[0] for name in files}) == 1 and files[0].partition("::")[0].endswith(".py")
    count = min(cores, memory // BYTES_OF_A_WORKER)
    return 0 if in_process or one_file or count < 2 else count


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of the machine, or of the container where that has less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    of_container = limit.read_text().strip() if limit.is_file() else "max"
    return of_machine if of_container == "max" else min(of_machine, int(of_container))


def search_path() -> dict[str, str]:
    """The variable that lets a process that a test starts import this checkout, installed or not, from any folder."""
    folders = [str(ROOT / name) for name in ("", "kernels", "encoder")]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys((*folders, *filter(None, given))))}


def own_caches() -> dict[str, str]:
    """Variables that give a worker, and what its tests start, empty caches of compiled code until it ends.

    Otherwise what a test compiles would depend on what another worker compiled before. Outside of a worker there are
    none. xdist's own variables are taken out of the environment: a process that a test starts is no worker, and would
    take itself for one (pytest-benchmark then measures nothing).
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        del os.environ[name]
    if worker is None:
        return {}
    folder = tempfile.mkdtemp(prefix=f"vit-kernels-{worker}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {name: str(Path(folder, name.lower())) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
