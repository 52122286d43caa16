"""The environment of a measurement: every file of results has what `environment()` returns.

Nothing in it names a machine or a person: no host name, no user name, no path.
"""

import argparse
import datetime
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "vit-kernels",
    "torch",
    "triton",
    "transformers",
    "torchvision",
    "flash-attn",
    "vllm",
    "ray",
    "numpy",
    "pillow",
)
_VARIABLES = re.compile(r"(TRITON|TORCH[A-Z]*|PYTORCH|VIT|OMP|KMP|MKL|OPENBLAS|CUDA|HIP|ROCR)_")
_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Return what can change a measurement, ready for JSON.

    Keys: `date` (UTC, ISO 8601), `devices` (accelerators, each with `name`, `capability`, `memory_gib`,
    `processors`), `os`, `cpu` (`model`, `cores` this process may use, `threads` that torch uses, `capability` that
    torch's kernels were chosen for, `isa` flags), `memory_gib`, `python`, `packages` (distribution name to version,
    None where not installed), `cuda` and `rocm` (that torch was built for, or None), `git` (`commit` and whether
    files differ from it, or None outside a repository) and `variables` (those that steer Triton, torch and thread
    pools; a value that holds a path, the host's or the user's name is replaced by `<redacted>`).
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": _devices(),
        # A kernel's release can name the machine or its maker after the dash.
        "os": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "cpu": _cpu(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "git": _git(),
        "variables": _variables(os.environ),
    }


def _devices() -> list[dict[str, Any]]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": device.name,
            "capability": getattr(device, "gcnArchName", None) or f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / 2**30, 1),
            "processors": device.multi_processor_count,
        }
        for device in devices
    ]


def _cpu() -> dict[str, Any]:
    reported = torch.cpu.get_capabilities()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": str(reported.get("cpu_name") or platform.processor()),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "isa": sorted(name for name, present in reported.items() if present is True),
    }


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    try:
        if _git_output("rev-parse", "--show-prefix"):
            return None  # an unpacked copy inside some other repository
        return {"commit": _git_output("rev-parse", "HEAD"), "dirty": bool(_git_output("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git_output(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _variables(variables: Mapping[str, str]) -> dict[str, str]:
    host = socket.gethostname().partition(".")[0]
    private = {"/", "\\", "~", host, *map(variables.get, ("USER", "LOGNAME", "USERNAME"))}
    return {
        name: "<redacted>" if any(part and part in value for part in private) else value
        for name, value in sorted(variables.items())
        if _VARIABLES.match(name)
    }


def _as_text(report: dict[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", _as_text(value, indent + "  ")]
        elif name == "devices":
            lines += [f"{indent}device: {', '.join(map(str, device.values()))}" for device in value]
        else:
            shown = " ".join(value) if isinstance(value, list) else value
            lines.append(f"{indent}{name}: {shown}")
    return "\n".join(line for line in lines if line)


def main(arguments: list[str] | None = None) -> None:
    """Print the report as text or JSON."""
    parser = argparse.ArgumentParser(description="Report what a measurement made here depends on.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    report = environment()
    print(json.dumps(report, indent=2) if options.json else _as_text(report))


if __name__ == "__main__":
    main()
