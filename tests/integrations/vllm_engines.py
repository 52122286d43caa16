"""Runs of the real vLLM for its tests: what each reported, made when it is first asked for.

Runs of a group of families are one process, and all processes share one cache folder; the tests look at the report of
their family (see `tests/integrations/vllm_engine.py`).
"""

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from vit_encoder.integrations.vllm.plugin import MODES

from experiments.vllm.tiny_models import FAMILIES
from experiments.vllm.variants import Variant, environment

ROOT = Path(__file__).parents[2]
# Families that share a process, which takes longer to start than to serve one of them.
GROUPS = (("llama4",), ("qwen2_5_vl", "qwen3_vl"), ("gemma3", "internvl", "pixtral", "glm4_1v"))


@dataclass(frozen=True)
class Run:
    """One run of the engine.

    Args:
        mode, compiled: the variant.
        family: of the checkpoint.
        workers: processes of tensor parallelism.
        encoder_data: the encoder is not sharded; its images are.
        in_process: the engine core is in the process that asks it, and a single worker too.
    """

    mode: str
    compiled: bool
    family: str = "llama4"
    workers: int = 1
    encoder_data: bool = False
    in_process: bool = True

    @property
    def key(self) -> str:
        layout = f"{self.workers}-workers" + "-encoder-data" * self.encoder_data + "-in-process" * self.in_process
        return f"{self.family}-{Variant(self.mode, self.compiled).key}-{layout}"

    @property
    def arguments(self) -> list[str]:
        flags = ["--compiled"] * self.compiled + ["--encoder-data"] * self.encoder_data
        return ["--workers", str(self.workers), *flags]


def reported(run: Run) -> dict[str, Any]:
    """What a run reported of each case and of the engine; `log` is what the processes of its group printed."""
    (group,) = (group for group in GROUPS if run.family in group)
    return _group_report(replace(run, family=group[0]), group)[run.family]


@functools.cache
def _group_report(run: Run, families: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    out = _folder() / f"{run.key}.json"
    for family in families:
        _make(family)
    command = [sys.executable, "-m", "tests.integrations.vllm_engine", str(_folder()), str(out), *families]
    variables = environment(Variant(run.mode, run.compiled), _folder() / "cache")
    variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not run.in_process))
    done = subprocess.run(
        [*command, *run.arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    reports: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return {family: report | {"log": done.stdout + done.stderr} for family, report in reports.items()}


@functools.cache
def _make(family: str) -> None:
    FAMILIES[family].make(_folder() / family)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return folder


def assert_same_text(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same tokens, and their log-probabilities to 1e-4."""
    assert "error" not in ours, ours
    assert ours["prompt_tokens"] == theirs["prompt_tokens"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)


def assert_said_once(log: str, mode: str, layers: int) -> None:
    """One line of all the processes says the mode, and where it swaps attention another one in how many layers."""
    (line,) = [line for line in log.splitlines() if "VIT_KERNELS_VLLM=" in line]
    told = "vit_kernels is installed and off" if mode == "off" else f"VIT_KERNELS_VLLM={mode}: {MODES[mode]} comes from"
    assert told in line
    lines = [line for line in log.splitlines() if "vit_kernels: " in line]
    if mode in ("off", "encoder"):
        assert lines == []
    else:
        (line,) = lines
        assert line.endswith(f"vit_kernels: attention of {layers} encoder layers is ours")
