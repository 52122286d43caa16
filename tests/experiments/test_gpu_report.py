"""The GPU report: every stage runs and is reported, whatever the others do, and the time holds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.common.environment import environment
from experiments.gpu import __main__ as gpu_report
from experiments.gpu.__main__ import Stage, cpu_stages, gpu_stages, run_stages
from experiments.gpu.summary import Outcome, summary_text
from experiments.kernels import tune
from experiments.kernels.microbenchmarks.cases import Setting, case_builders
from experiments.kernels.tune import Attempt, Case

ROOT = Path(__file__).parents[2]


def python(code: str, seconds: float = 20, **variables: str) -> Stage:
    return Stage("a stage", seconds, lambda left: ["-c", code], variables)


def test_a_stage_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    failing = python(
        "import os, sys; print('one'); print(os.environ['SAID'], file=sys.stderr); sys.exit(3)", SAID="two"
    )
    failed, passed = run_stages([failing, Stage("next", 20, lambda left: ["-c", "print('=== fine ===')"])], tmp_path)
    assert (failed.name, failed.problem, failed.last_line) == ("a stage", "exit status 3", "two")
    assert (passed.name, passed.problem, passed.last_line) == ("next", None, "fine")
    assert (tmp_path / "a_stage.log").read_text() == "one\ntwo\n"
    assert (tmp_path / "next.log").read_text() == "=== fine ===\n"


@pytest.fixture
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "GRACE_SECONDS", 3)


SLEEP = "import time; print('here', flush=True); time.sleep(60)"
LAST_WORDS = f"""
try:
    {SLEEP}
except KeyboardInterrupt:
    print('written')
"""
DEAF = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {SLEEP}"
WITH_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {DEAF!r}])"
ORPHANING = WITH_A_CHILD.replace("run", "Popen")


@pytest.fixture
def background_job() -> Iterator[None]:
    """Where a shell runs a job in the background, interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("little_grace", "background_job")
@pytest.mark.parametrize(
    ("code", "last_line"), [(LAST_WORDS, "written"), (DEAF, "here"), (WITH_A_CHILD, None), (ORPHANING, "here")]
)
def test_a_stage_is_interrupted_when_its_time_is_up_and_killed_if_it_goes_on(
    tmp_path: Path, code: str, last_line: str | None
) -> None:
    start = time.monotonic()
    (outcome,) = run_stages([python(code, seconds=4)], tmp_path)
    assert time.monotonic() - start < 30, "it would sleep for 60 s"
    assert outcome.problem == "stopped after 4 s"
    assert last_line in (None, outcome.last_line)


def test_a_stage_has_what_earlier_ones_left_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: now[0])
    given = []

    def run_stage(stage: Stage, seconds: float, log: Path) -> Outcome:
        given.append(seconds)
        now[0] += 7 if stage.name == "quick" else seconds + 3
        return Outcome(stage.name, None, 0, "")

    monkeypatch.setattr(gpu_report, "run_stage", run_stage)
    command: Callable[[float], list[str]] = lambda left: []  # noqa: E731
    run_stages([Stage(name, 10, command) for name in ("quick", "slow", "late", "last")], tmp_path)
    assert given == [10, 13, 7, 7]


def test_the_stages_on_a_gpu_fit_into_8_minutes_and_name_what_exists(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in gpu_stages(tmp_path)}
    assert list(stages) == ["correctness", "tuning", "microbenchmarks", "main job"]
    assert sum(stage.seconds for stage in stages.values()) + gpu_report.GRACE_SECONDS < 8 * 60
    assert all(stage.variables["TRITON_INTERPRET"] == "0" for stage in stages.values())
    for name in ("microbenchmarks", "main job"):
        assert stages[name].variables["VIT_KERNELS_TUNED"] == str(tmp_path / "tuned")
    assert stages["tuning"].command(105) == [
        "-m",
        "experiments.kernels.tune",
        "--out",
        str(tmp_path / "tuned"),
        "--seconds",
        "75",
    ]
    assert stages["tuning"].command(10)[-1] == "0"
    assert stages["correctness"].command(1)[-1] == "cuda"
    assert "--device cuda" in " ".join(stages["main job"].command(1))
    # The expression of -k is one that pytest evaluates over the names of the cases.
    assert stages["microbenchmarks"].command(1)[-2:] == ["-k", "not attention or 88 or 80"]
    assert {
        name
        for name in case_builders(Setting(torch.device("cuda")))
        if "attention" not in name or "88" in name or "80" in name
    } == {
        "pixel_shuffle",
        "layer_norm_pixel_shuffle",
        "linear_gelu",
        "rotary_2d",
        "rotary_2d_qkv_",
        "varlen_attention-88",
        "varlen_attention-80",
        "varlen_attention_backward-88",
        "varlen_attention_backward-80",
    }


@pytest.mark.parametrize("stages", [gpu_stages, cpu_stages])
def test_every_command_of_a_stage_is_understood(stages: Callable[[Path], list[Stage]], tmp_path: Path) -> None:
    from experiments.encode import __main__ as compile_encoder

    commands = {stage.name: stage.command(100.0)[2:] for stage in stages(tmp_path)}
    main_job = compile_encoder._parser().parse_args(commands["main job"])
    assert main_job.out == tmp_path
    if "tuning" in commands:
        assert tune._parser().parse_args(commands["tuning"]).out == tmp_path / "tuned"


BENCHMARK = {
    "extra_info": {
        "case": "an_op",
        "sizes": "2 x 3",
        "dtype": "float32",
        "contender": "eager",
        "GB/s": 12.34,
        "TFLOP/s": 0.5678,
        "flops": 1,
        "fraction of copy": 0.61,
        "fraction of matmul": 0.72,
    },
    "stats": {"median": 3e-6, "min": 2e-6, "max": 9e-6},
}


def test_the_summary_shows_what_every_stage_left(tmp_path: Path) -> None:
    (tmp_path / "microbenchmarks.json").write_text(json.dumps({"benchmarks": [BENCHMARK]}))
    case = Case("varlen_attention", 88, "bfloat16")
    default, chosen, wrong = (Attempt(configuration) for configuration in tune.kept(case, "sm_90")[:3])
    default.seconds, chosen.seconds, wrong.problem = [3e-5], [1e-5, 2e-5, 4e-5], "wrong: a | b\nand more"
    (tmp_path / "tuned").mkdir()
    tune.write(tmp_path / "tuned/gpu.json", tune.merged({}, "sm_90", {case: [default, chosen, wrong]}, {}))
    results = sorted((ROOT / "experiments/results").glob("compile_encoder-*.json"))
    shutil.copy(results[0], tmp_path)
    outcomes = [Outcome("tuning", None, 12.3, "wrote it"), Outcome("main job", "exit status 1", 4, "WRONG")]
    lines = summary_text(tmp_path, environment(), "Some GPU", 0.0, outcomes).splitlines()
    assert lines[0].startswith("# Some GPU, 20")
    for row in [
        "| tuning | ok | 12 | wrote it |",
        "| main job | exit status 1 | 4 | WRONG |",
        "| varlen_attention | 88 bfloat16 | 64x64x4x3 | 30.0 (30.0 to 30.0) |  |",
        "| varlen_attention | 88 bfloat16 | 64x64x4x2 | 20.0 (10.0 to 40.0) | chosen |",
        "| varlen_attention | 88 bfloat16 | 128x64x8x3 | - | wrong: a / b |",
        "| an_op | 2 x 3 | float32 | eager | 3.0 (2.0 to 9.0) | 12.3 | 0.568 | 0.61 | 0.72 |",
    ]:
        assert row in lines
    assert any(line.startswith("| compiled | 1 | 0 | 0 |") for line in lines), "the main job's row"


def test_the_summary_names_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "microbenchmarks.json").write_text("{")
    text = summary_text(tmp_path, environment(), "Some GPU", 0.0, [])
    assert "microbenchmarks.json cannot be read: JSONDecodeError" in text
    assert "## Tuning" not in text


def test_the_summary_says_when_the_machine_was_busy(tmp_path: Path) -> None:
    around = environment() | {"cpu": {"cores": 8}}
    for load, busy in [(1.9, False), (2.1, True)]:
        text = summary_text(tmp_path, around, "Some GPU", load, [])
        assert (f"Other work ran on the machine (load {load} before the start)" in text) == busy


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    around = environment() | {"devices": []}
    monkeypatch.setattr(gpu_report, "environment", lambda: around)


def test_without_a_gpu_it_says_so_and_runs_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_gpu(monkeypatch)
    seen: list[Stage] = []

    def run_stages(stages: list[Stage], folder: Path) -> list[Outcome]:
        seen.extend(stages)
        return [Outcome(stage.name, None, 1, "") for stage in stages]

    monkeypatch.setattr(gpu_report, "run_stages", run_stages)
    assert gpu_report.main(["--out", str(tmp_path / "new")]) == 0
    assert [stage.name for stage in seen] == ["microbenchmarks", "main job"]
    assert "no GPU here" in capsys.readouterr().err
    assert "No time here is a GPU's." in (tmp_path / "new/summary.md").read_text()
    assert json.loads((tmp_path / "new/environment.json").read_text())["devices"] == []


def test_on_a_gpu_the_folder_has_its_name_and_a_failed_stage_fails_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = environment() | {"devices": [{"name": "Some GPU, 80 GB"}], "date": "2026-01-02T03:04:05+00:00"}
    monkeypatch.setattr(gpu_report, "environment", lambda: around)
    monkeypatch.setattr(gpu_report.cli, "LOCAL", tmp_path)

    def run_stages(stages: list[Stage], folder: Path) -> list[Outcome]:
        return [Outcome(stage.name, "exit status 1" if stage.name == "tuning" else None, 1, "") for stage in stages]

    monkeypatch.setattr(gpu_report, "run_stages", run_stages)
    assert gpu_report.main([]) == 1
    summary = (tmp_path / "Some_GPU_80_GB-20260102T030405Z/summary.md").read_text()
    assert "| tuning | exit status 1 | 1 |  |" in summary
    assert "| main job | ok | 1 |  |" in summary


def test_a_folder_with_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "run_stages", lambda stages, folder: [])
    (tmp_path / "old.json").touch()
    with pytest.raises(SystemExit) as exited:
        gpu_report.main(["--out", str(tmp_path)])
    assert exited.value.code == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


PYTHON = """#!/usr/bin/env bash
case "$*" in
  *experiments.gpu*) printf '%s\\n' "$PYTHONPATH" "$PWD" "$@"; exit 5 ;;
  *) exec 'PYTHON' "$@" ;;
esac
""".replace("PYTHON'", f"{sys.executable}'")


def test_the_script_runs_the_report_in_the_folder_of_the_call(tmp_path: Path) -> None:
    project, called_from = tmp_path / "a project", tmp_path / "elsewhere"
    (project / ".venv/bin").mkdir(parents=True)
    called_from.mkdir()
    shutil.copytree(ROOT / "scripts", project / "scripts")
    setup = project / "scripts/setup.sh"
    setup.write_text(setup.read_text() + "\nis_set_up() { true; }\n")
    (project / "pyproject.toml").touch()
    (project / ".venv/bin/python").write_text(PYTHON)
    (project / ".venv/bin/python").chmod(0o755)
    variables = {"PATH": os.environ["PATH"]}
    command = [str(project / "scripts/gpu_report.sh"), "--out", "a b"]
    done = subprocess.run(command, cwd=called_from, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    said: list[Any] = done.stdout.splitlines()
    assert said == [str(project), str(called_from), "-P", "-m", "experiments.gpu", "--out", "a b"]
