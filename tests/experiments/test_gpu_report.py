"""The GPU report: what a case finds stays, whatever becomes of it, and the rest goes on; rehearsed on the CPU."""

import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

from experiments.gpu import __main__ as gpu_report
from experiments.gpu import contest, cuda_tests, machine, predictions, sanitizer
from experiments.gpu.child import Child
from experiments.gpu.plan import FIRST, PREDICTIONS, STAGES, Case, Stage, case_of
from experiments.gpu.records import Records, latest, of_kind, read
from experiments.gpu.summary import status_of, summary_text, table, wrong_of_ours
from experiments.kernels.microbenchmarks import cases as microbenchmarks
from experiments.kernels.microbenchmarks.cases import OURS, Setting, case_builders

pytestmark = pytest.mark.costly

ROOT = Path(__file__).parents[2]
CASES = [case for stage in STAGES for case in stage.cases]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "results.jsonl", case="a case")


def written(records: Records, *kinds: str) -> list[dict[str, Any]]:
    lines = read(records.path)
    return of_kind(lines, *kinds) if kinds else lines


# Records and the plan


def test_a_line_that_was_cut_off_costs_no_other(records: Records) -> None:
    records.write("judged", error=math.nan, shape=(1, 2), path=Path("a"))
    with records.path.open("a") as file:
        file.write('{"kind": "timed", "us"')
    (line,) = written(records)
    assert (line["kind"], line["case"], line["error"], line["shape"], line["path"]) == (
        "judged",
        "a case",
        None,
        [1, 2],
        "a",
    )


def test_a_case_that_began_again_is_told_by_its_last_run(records: Records) -> None:
    for us in (1, 2):
        records.write("begin")
        records.write("timed", us=us)
    records.write("timed", case="another", us=3)
    assert {case: [line.get("us") for line in lines] for case, lines in latest(written(records)).items()} == {
        "a case": [None, 2],
        "another": [3],
    }


def test_every_case_has_a_name_of_its_own_and_a_function() -> None:
    names = [case.name for case in (FIRST, *CASES)]
    assert len(set(names)) == len(names)
    for case in (FIRST, *CASES):
        assert case_of(case.name) is case
        module, _, function = case.function.partition(":")
        code = getattr(importlib.import_module(f"experiments.gpu.{module}"), function).__code__
        assert code.co_argcount in (0, 1 + len(case.arguments)), "0 behind a decorator"
        assert case.least < case.seconds
        before, _, name = (case.before or "encoders:llama4").partition(":")
        assert callable(getattr(importlib.import_module(f"experiments.gpu.{before}"), name))


def test_what_matters_most_comes_first_and_every_op_has_a_case() -> None:
    assert [stage.name for stage in STAGES] == [
        "attention",
        "encoders",
        "ops",
        "tuning",
        "tests",
        "sanitizer",
        "predictions",
    ]
    assert CASES[0].arguments == (88, False)
    ops = {case.name.partition("-")[0] for case in STAGES[2].cases}
    assert ops == {name.partition("-")[0] for name in case_builders(Setting(torch.device("cuda")))} - {
        "varlen_attention"
    }


# A case's process


def stub_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Child:
    """A child that runs `code` in place of a case."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        "experiments.gpu.child.subprocess.Popen",
        lambda command, **options: popen([sys.executable, "-c", code], **options),
    )
    return Child(FIRST, tmp_path / "results.jsonl", tmp_path / "log", {})


WAITING = "import sys; print(sys.stdin.readline().strip(), flush=True); "


def test_a_child_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = stub_child(tmp_path, monkeypatch, WAITING + "sys.exit(3)")
    assert child.wait(0.3) is None
    child.begin()
    assert child.wait(20) == 3
    assert (tmp_path / "log").read_text() == "go\n"
    child.kill()


def test_a_child_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grandchild = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    started = (
        f"import subprocess, time; p = subprocess.Popen([sys.executable, '-c', {grandchild!r}]); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    child = stub_child(tmp_path, monkeypatch, WAITING + started)
    child.begin()
    while len(lines := (tmp_path / "log").read_text().split()) < 2:
        time.sleep(0.05)
    child.kill()
    assert child.process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path(f"/proc/{lines[1]}").exists() and "Z" not in Path(f"/proc/{lines[1]}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_that_died_while_it_imported_is_no_error_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = stub_child(tmp_path, monkeypatch, "import sys; sys.exit(4)")
    child.process.wait(20)
    child.begin()
    assert child.wait(1) == 4
    child.kill()


@pytest.mark.parametrize("told", ["", "go\n"])
def test_a_case_ends_with_the_report(tmp_path: Path, told: str) -> None:
    """Nobody says go, or the report dies while the case runs: either closes its standard input."""
    code = "import time; from experiments.gpu import machine; machine.describe = lambda records: time.sleep(60); "
    code += "from experiments.gpu.case import main; import os, sys; os._exit(main('machine', sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "results.jsonl")],
        cwd=ROOT,
        input=told,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == (1 if told else 0)


# The report


class FakeChild:
    """Ends as `script` says: (status, seconds, lines)."""

    script: ClassVar[dict[str, tuple[int | None, float, list[Any]]]] = {}
    now = 0.0
    log: ClassVar[list[str]] = []

    def __init__(self, case: Case, results: Path, log: Path, variables: dict[str, str]) -> None:
        self.case, self.results, self.variables = case, results, variables
        log.write_text(f"log of {case.name}")
        FakeChild.log.append(f"start {case.name}")

    def begin(self) -> None:
        FakeChild.log.append(f"begin {self.case.name}")

    def wait(self, seconds: float) -> int | None:
        status, taken, lines = self.script.get(self.case.name, (0, 1.0, []))
        FakeChild.now += min(taken, seconds)
        for kind, fields in lines:
            Records(self.results, case=self.case.name).write(kind, **fields)
        if status is not None and status >= 128:
            raise gpu_report.Stopped("SIGTERM")
        return status if taken <= seconds else None

    def kill(self) -> None:
        FakeChild.log.append(f"kill {self.case.name}")


ENVIRONMENT: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "devices": [{"name": "NVIDIA H100 80GB HBM3"}],
    "cpu": {"cores": 16, "model": "a CPU"},
    "git": None,
    "packages": {"torch": "2.11.0", "vllm": None},
    "python": "3.12.3",
    "cuda": "13.0",
}
MACHINE = [
    ("environment", {"environment": ENVIRONMENT, "rehearsal": False}),
    ("device answers", {"sum": 1024.0}),
]
STUBS = (
    Stage("attention", "?", (Case("a-1", "f:g"), Case("a-2", "f:g"))),
    Stage("ops", "?", (Case("o-1", "f:g", tuned=True),)),
    Stage(PREDICTIONS, "?", (Case(PREDICTIONS, "f:g", seconds=40, least=5),)),
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeChild]]:
    FakeChild.script, FakeChild.now, FakeChild.log = {FIRST.name: (0, 1.0, MACHINE)}, 0.0, []
    monkeypatch.setattr(gpu_report, "Child", FakeChild)
    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: FakeChild.now)
    monkeypatch.setattr(gpu_report, "STAGES", STUBS)
    monkeypatch.setattr("experiments.gpu.summary.STAGES", STUBS)
    yield FakeChild
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def statuses(folder: Path) -> dict[str, str]:
    return {case: status_of(lines) for case, lines in latest(read(folder / "results.jsonl")).items()}


def test_every_case_is_run_in_order_while_the_next_one_imports(fake: type[FakeChild], tmp_path: Path) -> None:
    assert gpu_report.main(["--out", str(tmp_path / "new")]) == 0
    assert fake.log == [
        *("start machine", "begin machine", "start a-1", "kill machine"),
        *("begin a-1", "start a-2", "kill a-1"),
        *("begin a-2", "start o-1", "kill a-2"),
        *("begin o-1", "start predictions", "kill o-1"),
        *("begin predictions", "kill predictions"),
    ]
    assert set(statuses(tmp_path / "new").values()) == {"ok"}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["rest.tar.gz", "results.jsonl", "summary.md"]


@pytest.mark.parametrize(
    ("status", "lines", "ended"),
    [
        (1, [], "exit status 1"),
        (-11, [], "killed by SIGSEGV"),
        (None, [], "stopped after 60 s"),
        (70, [("error", {"problem": "AcceleratorError: illegal address", "lost": True})], "lost the GPU"),
    ],
)
def test_a_case_that_fails_is_named_and_the_others_run(
    fake: type[FakeChild], tmp_path: Path, status: int | None, lines: list[Any], ended: str
) -> None:
    doing = ("doing", {"what": "flash attention again"})
    fake.script["a-1"] = (status, 1.0, [doing, *lines])
    assert gpu_report.main(["--out", str(tmp_path / "new")]) == 1
    found = statuses(tmp_path / "new")
    assert found.pop("a-1") == ended
    assert set(found.values()) == {"ok"}
    row = next(line for line in (tmp_path / "new/summary.md").read_text().splitlines() if "| a-1 |" in line)
    assert ended in row
    assert "last tried: flash attention again" in row
    assert not lines or lines[0][1]["problem"] in row


def test_without_a_gpu_nothing_is_run(
    fake: type[FakeChild], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script[FIRST.name] = (0, 1.0, MACHINE[:1])
    assert gpu_report.main(["--out", str(tmp_path / "new")]) == gpu_report.NO_GPU
    assert "begin a-1" not in fake.log
    assert "kill a-1" in fake.log
    assert "no GPU here" in capsys.readouterr().err


def test_no_case_is_begun_without_time_and_the_predictions_keep_theirs(fake: type[FakeChild], tmp_path: Path) -> None:
    fake.script["a-1"] = (0, 55.0, [])
    assert gpu_report.main(["--out", str(tmp_path / "new"), "--seconds", "80"]) == 1
    assert [line for line in fake.log if line.startswith("begin")] == [
        "begin machine",
        "begin a-1",
        "begin predictions",
    ]
    assert [line for line in fake.log if line.startswith("kill")][-2:] == ["kill o-1", "kill predictions"]
    limits = {line["case"]: line["limit"] for line in of_kind(read(tmp_path / "new/results.jsonl"), "begin")}
    assert limits == {"machine": 60, "a-1": 59, "predictions": 24}


def test_a_report_that_is_stopped_leaves_what_it_found_and_is_resumed(fake: type[FakeChild], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    fake.script |= {"a-1": (2, 1.0, []), "o-1": (143, 1.0, [("timed", {"us": 1})])}
    assert gpu_report.main(["--out", str(folder)]) == 1
    assert fake.log[-2:] == ["kill o-1", "kill predictions"]
    assert statuses(folder) == {"machine": "ok", "a-1": "exit status 2", "a-2": "ok", "o-1": "did not end"}
    assert "| ops | o-1 | did not end |" in (folder / "summary.md").read_text()
    with gpu_report.tarfile.open(folder / "rest.tar.gz") as tar:
        assert tar.getnames() == ["a-1.log", "a-2.log", "machine.log", "o-1.log", "predictions.log"]
    fake.script = {FIRST.name: fake.script[FIRST.name]}
    fake.log.clear()
    for path in folder.iterdir():
        path.chmod(0o444)
    copy = tmp_path / "copy"
    assert gpu_report.main(["--resume", str(folder), "--out", str(copy)]) == 0
    # What no call began comes before what failed in one.
    assert [line for line in fake.log if line.startswith("begin")] == [
        *("begin machine", "begin a-1", "begin o-1", "begin predictions"),
    ]
    assert set(statuses(copy).values()) == {"ok"}
    assert statuses(folder)["a-1"] == "exit status 2"
    fake.log.clear()
    assert gpu_report.main(["--resume", str(copy), "--only", "attention"]) == 0
    assert [line for line in fake.log if line.startswith("begin")] == ["begin machine", "begin a-1", "begin a-2"]


def test_what_no_call_began_comes_before_what_failed(fake: type[FakeChild], tmp_path: Path) -> None:
    fake.script["a-1"] = (2, 1.0, [])
    gpu_report.main(["--out", str(tmp_path / "new"), "--only", "attention"])
    fake.log.clear()
    gpu_report.main(["--resume", str(tmp_path / "new")])
    assert [line for line in fake.log if line.startswith("begin")] == [
        *("begin machine", "begin o-1", "begin a-1", "begin predictions"),
    ]


def test_the_summary_is_written_after_each_case(
    fake: type[FakeChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[list[str]] = []
    write = gpu_report.Report.write

    def noted(report: gpu_report.Report) -> None:
        began.append([line.split()[1] for line in fake.log if line.startswith("begin")])
        write(report)

    monkeypatch.setattr(gpu_report.Report, "write", noted)
    gpu_report.main(["--out", str(tmp_path / "new")])
    assert began[0] == ["machine", "a-1"]
    assert began[1] == ["machine", "a-1", "a-2"]


def test_a_case_gets_the_tuned_configurations_only_where_it_says_so(tmp_path: Path) -> None:
    report = gpu_report.Report(tmp_path, rehearsal=False, seconds=1)
    variables = {name: report._variables(case_of(name)) for name in ("attention-88", "attention-88-tuned", "tune-88")}
    folders = {name: Path(found["VIT_KERNELS_TUNED"]).name for name, found in variables.items()}
    assert folders == {"attention-88": "untuned", "attention-88-tuned": "tuned", "tune-88": "tuned"}
    paths = variables["tune-88"]["PYTHONPATH"].split(os.pathsep)
    assert paths[:3] == [str(ROOT), str(ROOT / "kernels"), str(ROOT / "encoder")]
    assert variables["tune-88"]["TRITON_INTERPRET"] == "0"
    report.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "used"], "expected a new or an empty folder"),
        (["--resume", "used"], "expected a folder with results.jsonl"),
        (["--seconds", "0"], "expected a positive number"),
        (["--only", "nothing"], "invalid choice"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/old.json").touch()
    with pytest.raises(SystemExit) as exited:
        gpu_report.main(arguments)
    assert exited.value.code == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["old.json"]


def test_the_report_itself_imports_neither_torch_nor_anything_that_is_not_pythons() -> None:
    foreign = ["torch", "triton", "numpy", "rich", "tqdm", "matplotlib", "vit_kernels", "vit_encoder"]
    code = f"import sys, experiments.gpu.__main__; print([name for name in {foreign} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# On the device


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.REHEARSAL, "1")


def test_an_error_after_which_the_gpu_answers_ends_nothing(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("\n  head_dim 88 is not taken\nmore")

    monkeypatch.setenv(machine.REHEARSAL, "1")
    assert machine.attempted(records, "cuDNN", fail) == (None, "ValueError: head_dim 88 is not taken")
    assert [line["what"] for line in written(records, "doing")] == ["cuDNN"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(machine.DeviceLostError, match="cuDNN: RuntimeError: CUDA error: an illegal memory access"):
        machine.attempted(records, "cuDNN", fail)


@pytest.mark.usefixtures("rehearsal")
def test_the_machine_says_what_nothing_is_faster_than(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"copy": lambda: None, "matmul": lambda: None}
    monkeypatch.setattr("experiments.kernels.microbenchmarks.comparison.ceilings", lambda *_: (8 * 10**9, 10**12, runs))
    monkeypatch.setattr(machine, "timer", lambda: lambda run: 2.0)
    assert machine._ceilings() == {"GB/s": 4.0, "TFLOP/s": 0.5}


def test_a_trace_is_read_for_what_ran_on_the_device() -> None:
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 9},
        {"ph": "X", "cat": "kernel", "name": "second", "ts": 5.5, "dur": 2.5},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 7, "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "first", "ts": 2, "dur": 3},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 2},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "an annotation", "ts": 2, "dur": 30},
        {"ph": "M", "name": "process_name"},
    ]
    found = machine.traced_kernels({"traceEvents": events})
    assert found == [("first", 3.0), ("second", 2.5), ("Memset (Device)", 1.0)]


def test_a_capture_leaves_the_stream_of_the_caller_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PyTorch's own signatures, as far as this build of it has them."""
    done: list[str] = []
    for name in ("Stream", "CUDAGraph", "graph", "stream", "current_stream", "synchronize"):
        stand_in = mock.create_autospec(getattr(torch.cuda, name))

        def called(*args: Any, name: str = name, value: Any = stand_in.return_value, **options: Any) -> Any:
            done.append(name)
            return value

        stand_in.side_effect = called
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replay = machine.captured(lambda: done.append("run"))
    assert done == [
        *("Stream", "current_stream", "stream", "run", "run", "run", "CUDAGraph", "graph", "run"),
        *("current_stream", "synchronize"),
    ]
    assert replay is torch.cuda.CUDAGraph.return_value.replay  # type: ignore[attr-defined]


@pytest.fixture
def case() -> microbenchmarks.Case:
    """`eager` and two more that are ours or not, all of them right."""
    exact = torch.ones(4, dtype=torch.float64)
    calls: dict[str, Callable[[], Any]] = {name: lambda: lambda: (torch.ones(4),) for name in ("eager", OURS, "sdpa")}
    return microbenchmarks.Case("4", (exact,), "eager", 8, 16, calls)


@pytest.mark.usefixtures("rehearsal")
def test_contenders_are_judged_timed_and_traced(records: Records, case: microbenchmarks.Case) -> None:
    contest.hold(records, case, (OURS, "eager", "flash_attn"), graphs=True, head_dim=88)
    assert [(line["form"], line["problem"]) for line in written(records, "judged")] == [(OURS, None), ("eager", None)]
    assert [line.get("same_bits") for line in written(records, "judged")] == [True, None]
    assert {line["form"] for line in written(records, "absent")} == {"flash_attn"}
    for kind in ("timed", "replayed"):
        assert [line["form"] for line in written(records, kind)] == [OURS, "eager"]
        assert all(len(line["us"]) == contest.ROUNDS and line["head_dim"] == 88 for line in written(records, kind))
    assert {line["form"]: line["launches"] for line in written(records, "kernels")} == {OURS: 0, "eager": 0}
    assert not wrong_of_ours(written(records))


@pytest.mark.usefixtures("rehearsal")
@pytest.mark.parametrize(
    ("results", "said"),
    [
        (lambda calls: torch.full((4,), 1.1), "wrong: maximum error 0.1"),
        (lambda calls: torch.tensor([1.0, 1.0, 1.0, 1.0 + calls * 1e-7]), "another call gave other bits"),
        (lambda calls: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_is_named_and_not_timed(
    records: Records, case: microbenchmarks.Case, results: Callable[[int], Tensor], said: str
) -> None:
    calls = iter(range(9))
    case.calls[OURS] = lambda: lambda: (results(next(calls)),)
    contest.hold(records, case, (OURS, "eager"), graphs=False)
    judged = {line["form"]: line["problem"] for line in written(records, "judged")}
    assert judged["eager"] is None
    assert (judged[OURS] or "").startswith(said)
    assert [line["form"] for line in written(records, "timed")] == ["eager"]
    assert wrong_of_ours(written(records)) == [judged[OURS]]


# The tests


def test_the_files_with_tests_that_need_a_gpu_are_found() -> None:
    assert {"tests/kernels/test_cuda.py", "tests/encoder/test_cuda_encoders.py"} <= set(cuda_tests.files())
    assert all((ROOT / name).is_file() for name in cuda_tests.files())


TESTS = """
import os
import pytest

pytestmark = pytest.mark.cuda

def test_passes(): pass
def test_fails(): assert 1 == 2, "not two"
def test_dies(): os._exit(9)
def test_after_it(): pass
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
def test_not_mine_alone(): pass
"""


@pytest.mark.usefixtures("rehearsal")
def test_a_test_that_kills_its_process_is_named_and_the_others_run(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={tmp_path}", "-q", "-m", "cuda"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest"]
    command += ["-p", "experiments.gpu.pytest_findings", str(file)]
    monkeypatch.setattr(cuda_tests, "_command", lambda: command)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    cuda_tests.run(records)
    found = {line["test"].partition("::")[2]: line for line in written(records, "test")}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_dies": "died",
        "test_after_it": "passed",
        "test_skipped": "skipped",
        "test_not_mine_alone": "passed",
    }
    assert "not two" in found["test_fails"]["problem"]
    assert found["test_dies"]["problem"] == "the process ended with status 9 in this test"
    assert len(wrong_of_ours(written(records))) == 2
    text = summary_text([dict(line, case="tests") for line in written(records)])
    assert "1 died, 1 failed, 3 passed, 1 skipped" in text


def test_a_shard_that_cannot_begin_ends_with_its_status(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tests, "_command", lambda: [sys.executable, "-c", "raise SystemExit(4)"])
    assert cuda_tests._until_done(records, 0, 1, 0) == "pytest of shard 0: exit status 4"


# The sanitizer


SANITIZER = """#!/usr/bin/env python3
import subprocess, sys
tool = sys.argv[sys.argv.index("--tool") + 1]
op = sys.argv[-1]
if op == "refused":
    print("Device not supported"); sys.exit(1)
if op == "races" and tool == "racecheck":
    print("========= Error: Race reported between Write access at a and Read access at b")
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"); sys.exit(66)
print("========= ERROR SUMMARY: 0 errors" if tool == "memcheck" else "========= RACECHECK SUMMARY: 0 hazards displayed")
"""


def test_each_op_is_run_under_each_tool(records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin/compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "OPS", dict.fromkeys(["clean", "races", "refused", "fails by itself"]))
    status = {"fails by itself": "raise SystemExit('no kernel')"}
    monkeypatch.setattr(sanitizer, "_command", lambda op: [sys.executable, "-c", status.get(op, ""), op])
    sanitizer.run(records)
    found = {(line["tool"], line["op"]): line["problem"] for line in written(records, "sanitized")}
    assert found == {
        ("none", "fails by itself"): "exit status 1: no kernel",
        ("memcheck", "clean"): None,
        ("racecheck", "clean"): None,
        ("memcheck", "races"): None,
        ("racecheck", "races"): "found: Error: Race reported between Write access at a and Read access at b; "
        "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
        ("memcheck", "refused"): "could not run, exit status 1: Device not supported",
        ("racecheck", "refused"): "could not run, exit status 1: Device not supported",
    }


def test_a_machine_without_the_sanitizer_says_so(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitizer, "USUAL_PLACE", Path("/nowhere"))
    sanitizer.run(records)
    assert [line["problem"] for line in written(records, "absent")] == ["not installed"]


# Predictions and the summary


def h100(*lines: tuple[str, str, dict[str, Any]]) -> list[dict[str, Any]]:
    around = {"kind": "environment", "case": "machine", "environment": ENVIRONMENT, "rehearsal": False}
    return [around, *({"kind": kind, "case": case, **fields} for case, kind, fields in lines)]


def test_what_was_measured_stands_beside_what_was_predicted() -> None:
    attention = {"form": OURS, "head_dim": 80, "flops": 27_179_089_920, "nbytes": 94_371_840}
    found = predictions.predictions(
        h100(
            ("attention-80", "timed", attention | {"sizes": "16 x 577 x 16 x 80", "us": [99.0]}),
            ("attention-80", "replayed", attention | {"sizes": "16 x 577 x 16 x 80", "us": [50.0, 60.0, 70.0]}),
            ("attention-80", "timed", attention | {"sizes": "16 x 576 x 16 x 80", "us": [200.0]}),
            ("attention-80", "timed", attention | {"sizes": "16 x 576 x 16 x 80", "us": [1.0], "form": "sdpa"}),
            (
                "varlen_attention_backward-88",
                "timed",
                {"form": OURS, "op": "varlen_attention_backward", "head_dim": 88, "flops": 1, "nbytes": 1}
                | {"sizes": "16 x 577 x 16 x 88", "us": [300.0]},
            ),
            (
                "rotary_2d",
                "timed",
                {"form": OURS, "op": "rotary_2d", "head_dim": None, "flops": 0, "nbytes": 1}
                | {"sizes": "q and k of 16 x 577 x 16 x 88", "us": [20.0]},
            ),
        )
    )
    by_name = {(each.name, each.sizes): each for each in found}
    assert len(by_name) == len(found) == 4
    tiles = by_name["varlen_attention, head_dim 80", "16 x 577 x 16 x 80"]
    assert (tiles.low, tiles.high, tiles.measured, tiles.verdict) == (29.02, 123.0, 60.0, "within")
    others = by_name["varlen_attention, head_dim 80", "16 x 576 x 16 x 80"]
    assert others.low == pytest.approx(1e6 * 94_371_840 / 3.35e12), "the bytes take longer than the products"
    assert others.verdict.endswith("x the upper end")
    gradients = by_name["varlen_attention_backward, head_dim 88", "16 x 577 x 16 x 88"]
    assert (gradients.low, gradients.high) == pytest.approx((56.47 + 75.29, 194.6 + 226.0))
    assert by_name["rotary_2d", "q and k of 16 x 577 x 16 x 88"].verdict.startswith("faster than the model allows")


def test_an_encoders_kernels_stand_beside_its_ledger() -> None:
    fields = {"encoder": "llama4", "form": "compiled", "sizes": "16 tiles"}
    (found,) = predictions.predictions(
        h100(
            ("llama4", "timed", fields | {"wall_ms": [1.0]}),
            ("llama4", "kernels", fields | {"us": 9000.0, "launches": 320}),
            ("llama4", "timed", fields | {"wall_ms": [1.0], "sizes": "5 tiles"}),
        )
    )
    assert found.launches == (9 * 34 + 9, 320)
    assert found.low < found.high
    assert predictions.ledger("qwen2_5_vl", "1 x 56 x 72 patches") is not None
    assert predictions.ledger("qwen2_5_vl", "3 images and a video") is None


def test_a_rehearsal_and_a_gpu_that_the_model_does_not_know_have_no_predictions() -> None:
    line = {"form": OURS, "head_dim": 88, "flops": 1, "nbytes": 1, "sizes": "16 x 577 x 16 x 88", "us": [1.0]}
    for change in ({"rehearsal": True}, {"environment": ENVIRONMENT | {"devices": [{"name": "L4"}]}}):
        around, measured = h100(("attention-88", "timed", line))
        assert predictions.predictions([around | change, measured]) == []


def test_the_figure_is_drawn_beside_the_results(records: Records) -> None:
    attention = {"form": OURS, "head_dim": 88, "flops": 1, "nbytes": 1, "sizes": "16 x 577 x 16 x 88", "us": [50.0]}
    Records(records.path, case="machine").write("environment", environment=ENVIRONMENT, rehearsal=False)
    records.write("timed", **attention)
    predictions.draw_figure(records)
    assert records.path.with_name(predictions.FIGURE).read_bytes().startswith(b"\x89PNG")
    (line,) = written(records, "predicted")
    assert (line["low"], line["high"], line["verdict"]) == (34.82, 136.2, "within")


def test_the_summary_tells_what_every_stage_found() -> None:
    contender = {"form": OURS, "sizes": "16 x 577 x 16 x 88", "workload": "tiles", "head_dim": 88}
    errors = {"errors": [{"rms": 2e-3, "maximum": 1e-2}], "eager_errors": [{"rms": 1e-3, "maximum": 2e-2}]}
    work = {"flops": 10**9, "nbytes": 10**8}
    encoder = {"encoder": "llama4", "form": "compiled", "sizes": "16 tiles"}
    text = summary_text(
        h100(
            ("attention-88", "begin", {"limit": 60}),
            ("attention-88", "judged", contender | errors | {"problem": None, "same_bits": True}),
            ("attention-88", "timed", contender | work | {"us": [9.0, 10.0, 11.0], "host_us": 41.0}),
            ("attention-88", "replayed", contender | work | {"us": [4.0, 5.0, 6.0]}),
            ("attention-88", "kernels", contender | {"launches": 1, "us": 5.0, "names": {"attention_kernel": 5.0}}),
            ("attention-88", "absent", contender | {"form": "vllm", "problem": "vllm is not installed"}),
            ("attention-88", "end", {"status": "ok", "seconds": 12.3}),
            ("llama4", "judged", encoder | errors | {"problem": None, "first_call_seconds": 40.0, "graphs": 1}),
            ("llama4", "timed", encoder | {"wall_ms": [8.0], "device_ms": [7.0], "peak_bytes": 2**30}),
            ("llama4", "kernels", encoder | {"launches": 315, "us": 6500.0, "names": {}}),
            (
                "tune-88",
                "tuned",
                {"kernel": "grad_q", "head_dim": 88, "configuration": {"BLOCK_M": 64, "BLOCK_N": 32}}
                | {"us": [3.0], "chosen": True, "problem": None},
            ),
            ("tests", "test", {"test": "a::b", "outcome": "failed", "problem": "x | y"}),
            ("sanitizer", "sanitized", {"tool": "memcheck", "op": "rotary_2d", "problem": None, "summary": "0 errors"}),
        )
    )
    lines = text.splitlines()
    assert lines[0] == "# NVIDIA H100 80GB HBM3, 2026-01-02T03:04:05+00:00"
    for row in [
        "| attention | attention-88 | ok | 12 |  |",
        "| attention | attention-80 | not begun | - |  |",
        "| attention-88 | tiles | triton | RMS 2.00e-03 (PyTorch 1.00e-03), same bits | 10.0 (9.0 to 11.0) | "
        "5.0 (4.0 to 6.0) | 41 | 200 | 20000 | 1 | attention_kernel |",
        "| attention-88 | tiles | vllm | vllm is not installed | - | - | - | - | - | - | - |",
        "| llama4 | compiled | 16 tiles | RMS 2.00e-03 (PyTorch 1.00e-03) | 40.00 | 8.00 (8.00 to 8.00) | "
        "7.00 (7.00 to 7.00) | 6.50 | 315 (ledger: 315) | 1.00 | 1 |",
        "| grad_q | 88 | 64x32 | 3.0 (3.0 to 3.0) | chosen |",
        "| a::b | failed | x / y |",
        "| memcheck | rotary_2d | nothing found | 0 errors |",
        "| varlen_attention, head_dim 88 | 16 x 577 x 16 x 88 | 34.8 to 136.2 | 5.0 | "
        "faster than the model allows: the measurement or the model is wrong | - |",
    ]:
        assert row in lines


def test_what_a_summary_does_not_expect_costs_it_one_section() -> None:
    strange = ("attention-88", "judged", {"form": OURS})
    text = summary_text(h100(strange, ("tests", "test", {"test": "a::b", "outcome": "died", "problem": "x"})))
    assert "## attention: is attention right, the same bits twice, and how fast beside peers?\n\ncannot be told" in text
    assert "1 died" in text


def test_a_table_keeps_a_cell_on_its_line() -> None:
    assert table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x/y z |"


# The whole command

# Nothing of the project but the copy, and no network.
BARE = """
import os, socket, sys
kept = os.environ["PYTHONPATH"].split(os.pathsep)
sys.path[:] = [path for path in sys.path if path in kept or not os.path.isdir(os.path.join(path, "vit_kernels"))]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]

def connect(self, address, connect=socket.socket.connect):
    if self.family != socket.AF_UNIX:
        raise OSError("no network")
    return connect(self, address)

socket.socket.connect = connect
"""


@pytest.fixture
def bare(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the project, and an environment in which it is not installed and there is no network."""
    project, site = tmp_path / "a project", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "local", ".venv*", ".git", "*.png", ".hypothesis")
    for name in ("experiments", "kernels", "encoder", "tests", "scripts", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=ignored)
        else:
            shutil.copy(source, project / name)
    site.mkdir()
    (site / "sitecustomize.py").write_text(BARE)
    paths = [project, project / "kernels", project / "encoder", site]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    caches = {name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    return project, kept | caches | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def test_the_whole_report_is_rehearsed_killed_after_a_stage_and_resumed(
    bare: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    _, environment = bare
    folder, elsewhere = tmp_path / "report", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-P", "-m", "experiments.gpu", "--rehearse", "--seconds", "3000"]
    with (tmp_path / "said").open("w") as said:
        report = subprocess.Popen(
            [*command, "--out", str(folder)], cwd=elsewhere, env=environment, stderr=said, stdout=said
        )
        deadline = time.monotonic() + 300
        while "llama4" not in latest(read(folder / "results.jsonl")):
            assert report.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        report.kill()
        report.wait(20)
    found = statuses(folder)
    assert [found[case.name] for case in STAGES[0].cases] == ["ok"] * 4
    assert found["llama4"] == "did not end"
    assert "| attention | attention-88 | ok |" in (folder / "summary.md").read_text()
    assert not wrong_in(folder)
    command += ["--resume", str(folder)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=3000)
    told = (folder / "summary.md").read_text()
    assert done.returncode == 0, done.stderr + told
    assert done.stdout.strip() == told.strip()
    assert statuses(folder) == dict.fromkeys([FIRST.name, *(case.name for case in CASES)], "ok")
    assert not wrong_in(folder)
    for kind in ("judged", "timed", "replayed", "kernels", "tuned", "test"):
        assert of_kind(read(folder / "results.jsonl"), kind), kind
    assert len(list(folder.iterdir())) <= 8
    assert "A rehearsal" in told
    assert str(tmp_path) not in told


@pytest.mark.thorough
def test_every_test_that_needs_a_gpu_passes_its_rehearsal() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:xdist", "-p", "no:cacheprovider"]
    variables = os.environ | {machine.REHEARSAL: "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *cuda_tests.files()], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def wrong_in(folder: Path) -> list[str]:
    return [wrong for lines in latest(read(folder / "results.jsonl")).values() for wrong in wrong_of_ours(lines)]


# The script


PYTHON = """#!/usr/bin/env bash
case "$*" in
  *experiments.gpu*) printf '%s\\n' "$0" "$PYTHONPATH" "$PWD" "$@"; exit 5 ;;
  *-m*) echo "must not be called: $*" >&2; exit 9 ;;
  *) exec 'PYTHON' "$@" ;;
esac
""".replace("PYTHON'", f"{sys.executable}'")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The scripts, a python3 on PATH, and a .venv that is set up, in folders with spaces."""
    project = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    setup = project / "scripts/setup.sh"
    setup.write_text(setup.read_text() + "\nis_set_up() { true; }\n")
    (project / "pyproject.toml").touch()
    for path in (tmp_path / "bin/python3", project / ".venv/bin/python"):
        path.parent.mkdir(parents=True)
        path.write_text(PYTHON)
        path.chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    return project


def make_stack(folder: Path, version: str, *, triton: bool = True) -> None:
    """Packages that are found, and would fail if they were imported."""
    for name in ("torch", "triton") if triton else ("torch",):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "torch/version.py").write_text(f"from typing import Optional\n{version}\n")


@pytest.mark.parametrize(
    ("version", "triton", "bare"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", True, True),
        ("cuda = None\nhip = '7.1'", True, True),
        ("cuda = None\nhip = None", True, False),
        ("cuda = '13.0'\nhip = None", False, False),
    ],
)
def test_the_script_takes_a_python_that_has_what_it_takes_and_installs_nothing(
    project: Path, tmp_path: Path, version: str, triton: bool, bare: bool
) -> None:
    make_stack(tmp_path / "stack", version, triton=triton)
    # Before whatever the Python of this test has.
    finder = "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]"
    (tmp_path / "stack/sitecustomize.py").write_text(finder)
    variables = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "stack")}
    command = [str(project / "scripts/gpu_report.sh"), "--out", "a b"]
    cwd = tmp_path / "elsewhere"
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    python, path, folder, *arguments = done.stdout.splitlines()
    assert python == str(tmp_path / "bin/python3" if bare else project / ".venv/bin/python")
    expected = [project, project / "kernels", project / "encoder", tmp_path / "stack"]
    assert path.split(os.pathsep) == list(map(str, expected))
    assert folder == str(cwd)
    assert arguments == ["-P", "-m", "experiments.gpu", "--out", "a b"]
    assert ("nothing is installed" in done.stderr, "the project is set up" in done.stderr) == (bare, not bare)
