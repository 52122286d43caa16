"""Tuning: a wrong configuration is never chosen, the fastest right one is, and the kernels launch with it."""

import itertools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources
from vit_kernels._triton.configurations import candidates, preferred, tuned_file
from vit_kernels.testing import corrected_interpreter

from experiments.common.measure import Run, Timer, interleaved_seconds, timer_for
from experiments.kernels import tune
from experiments.kernels.tune import Attempt, Case

NAME = "Some GPU, 80 GB"
FORWARD = Case("varlen_attention", 88, "bfloat16")
ONLY_FORWARD = ["--kernel", "varlen_attention", "--head-dim", "88", "--dtype", "bfloat16"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Stands for an sm_90 GPU that can launch nothing; the path of its tuned file."""
    monkeypatch.setenv("VIT_KERNELS_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    driver = mock.Mock()
    driver.get_current_device.return_value = 0
    driver.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    with triton.knobs.runtime.scope(), mock.patch.object(triton.runtime.driver, "_active", driver):
        triton.knobs.runtime.interpret = False
        yield tuned_file(NAME)


def small_problem(head_dim: int) -> tuple[int, int, int, int]:
    return 2, 33, 2, head_dim


def falling_seconds() -> Timer:
    """Whatever is timed last is the fastest."""
    seconds = itertools.count(100, -1)
    return lambda run: float(next(seconds))


def measure_on_cpu(wanted: list[Case], timer: Timer) -> Iterator[tuple[Case, list[Attempt]]]:
    return tune.measure_all(wanted, "sm_90", torch.device("cpu"), timer, None, problem=small_problem)


def stand_in_measure(seconds: dict[int, float], problems: dict[int, str] | None = None) -> Any:
    """Replaces `measure`: the i-th configuration takes seconds[i], or 9 s, or has a problem."""

    def measure(case: Case, configurations: list[tune.Configuration], *rest: object) -> list[Attempt]:
        return [
            Attempt(configuration, problem, seconds=[] if problem else [seconds.get(i, 9.0)] * 3)
            for i, configuration in enumerate(configurations)
            for problem in [(problems or {}).get(i)]
        ]

    return measure


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "prepare", lambda *args: mock.sentinel.attention)


def run_main(monkeypatch: pytest.MonkeyPatch, measure: Any, *arguments: str) -> int:
    monkeypatch.setattr(tune, "measure", measure)
    return tune.main(list(arguments))


@pytest.mark.parametrize(("head_dim", "dtype"), [(88, "bfloat16"), (80, "float32")])
def test_every_kept_configuration_is_launched_judged_and_timed(head_dim: int, dtype: str) -> None:
    timed: list[Run] = []

    def timer(run: Run) -> float:
        timed.append(run)
        return float(len(timed))

    wanted = tune.cases(tune.KERNELS, [head_dim], [dtype])
    with corrected_interpreter():
        measured = dict(measure_on_cpu(wanted, timer))
    assert list(measured) == wanted
    for case, attempts in measured.items():
        assert [attempt.configuration for attempt in attempts] == tune.kept(case, "sm_90")
        assert [attempt.problem for attempt in attempts] == [None] * len(attempts)
        assert [len(attempt.seconds) for attempt in attempts] == [tune.ROUNDS] * len(attempts)
    assert len({id(run) for run in timed}) == sum(map(len, measured.values()))


@pytest.mark.parametrize(("kernel", "place"), [("grad_q", 0), ("grad_kv", 1)])
def test_a_gradient_is_launched_with_its_configuration_beside_the_default_of_the_other(kernel: str, place: int) -> None:
    case = FORWARD._replace(kernel=kernel)
    default, other = tune.kept(case, "sm_90")
    with mock.patch("vit_kernels._triton.varlen_attention_backward.launch") as launch:
        tune.launch(case, other, mock.MagicMock(), "sm_90")
    both = list(launch.call_args.kwargs["configurations"])
    assert both.pop(place) == other != default
    assert both == [candidates(("grad_kv", "grad_q")[place], 88, torch.bfloat16, "sm_90")[0]]


def spoil(results: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    results[place][-1, -1, -1] += 0.1
    return results


@pytest.mark.parametrize(("kernel", "results"), [("varlen_attention", 1), ("grad_q", 3), ("grad_kv", 3)])
def test_a_wrong_configuration_is_neither_timed_nor_chosen(
    monkeypatch: pytest.MonkeyPatch, kernel: str, results: int
) -> None:
    """One element of one result of the last configuration is off; everything but judging says it is the fastest."""
    launch, case = tune.launch, FORWARD._replace(kernel=kernel)
    kept = tune.kept(case, "sm_90")
    for place in range(results):

        def sometimes_wrong(
            case: Case, configuration: tune.Configuration, *rest: Any, place: int = place
        ) -> tuple[Tensor, ...]:
            right = launch(case, configuration, *rest)
            return spoil(right, place) if configuration == kept[-1] else right

        monkeypatch.setattr(tune, "launch", sometimes_wrong)
        with corrected_interpreter():
            attempts = dict(measure_on_cpu([case], falling_seconds()))[case]
        assert [attempt.problem is None for attempt in attempts] == [True] * (len(kept) - 1) + [False]
        assert (attempts[-1].problem or "").startswith("wrong: ")
        assert not attempts[-1].seconds
        assert tune.fastest(attempts) is not attempts[-1]


def test_the_fastest_is_the_lowest_median_and_the_earliest_of_equals() -> None:
    slow, first, second, wrong = (
        Attempt({"BLOCK_M": i}, problem, seconds=seconds)
        for i, (seconds, problem) in enumerate(
            [([1.0, 9.0, 9.0], None), ([5.0, 4.0, 8.0], None), ([5.0, 5.0, 5.0], None), ([1.0] * 3, "wrong")]
        )
    )
    assert tune.fastest([slow, first, second, wrong]) is first
    assert tune.fastest([slow, second, first, wrong]) is second
    assert tune.fastest([wrong]) is None
    assert tune.fastest([]) is None


@pytest.mark.usefixtures("unprepared")
def test_what_was_tuned_is_launched_and_the_rest_keeps_its_default(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    default, other = candidates("varlen_attention", 88, torch.bfloat16, "sm_90")[:2]
    assert run_main(monkeypatch, stand_in_measure({1: 1.0}), *ONLY_FORWARD) == 0
    assert f"wrote {gpu}" in capsys.readouterr().out.replace("\n", "")
    assert preferred("varlen_attention", 88, torch.bfloat16) == other != default
    for kernel, head_dim, dtype in [("varlen_attention", 88, torch.float16), ("varlen_attention", 64, torch.bfloat16)]:
        assert preferred(kernel, head_dim, dtype) == candidates(kernel, head_dim, dtype, "sm_90")[0]
    content = json.loads(gpu.read_text())
    assert content["target"] == "sm_90"
    assert content["environment"].keys() >= {"date", "devices", "packages"}
    assert [entry["seconds"] for entry in content["measurements"]["varlen_attention"]["88 bfloat16"]][1] == [1.0] * 3


@pytest.mark.usefixtures("unprepared", "gpu")
def test_every_case_is_stored_as_something_that_the_kernels_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, stand_in_measure({1: 1.0})) == 0
    with warnings.catch_warnings(action="error"):
        for case in tune.cases(tune.KERNELS, tune.HEAD_DIMS, tune.DTYPES):
            kept = tune.kept(case, "sm_90")
            chosen = preferred(case.kernel, case.head_dim, getattr(torch, case.dtype))
            assert chosen == (kept[1] if len(kept) > 1 else kept[0])


@pytest.mark.usefixtures("unprepared")
def test_tuning_again_replaces_what_it_measured_and_keeps_the_rest(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_64 = ["--kernel", "varlen_attention", "--head-dim", "64"]
    assert run_main(monkeypatch, stand_in_measure({1: 1.0}), *ONLY_FORWARD) == 0
    before = json.loads(gpu.read_text())["configurations"]["varlen_attention"]
    assert run_main(monkeypatch, stand_in_measure({2: 1.0}), *only_64) == 0
    entries = json.loads(gpu.read_text())["configurations"]["varlen_attention"]
    assert entries.keys() == {"88 bfloat16", "64 bfloat16", "64 float16", "64 float32"}
    assert entries["88 bfloat16"] == before["88 bfloat16"]
    broken = dict.fromkeys(range(4), "wrong: by far")
    assert run_main(monkeypatch, stand_in_measure({}, broken), *ONLY_FORWARD) == 1
    assert "88 bfloat16" not in json.loads(gpu.read_text())["configurations"]["varlen_attention"]
    assert [path.name for path in gpu.parent.iterdir()] == [gpu.name], "nothing half written stays"


@pytest.mark.usefixtures("unprepared")
def test_a_file_of_another_target_is_replaced(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.write_text(json.dumps({"target": "sm_80", "configurations": {"varlen_attention": {"64 float16": {}}}}))
    assert run_main(monkeypatch, stand_in_measure({1: 1.0}), *ONLY_FORWARD) == 0
    assert json.loads(gpu.read_text())["configurations"].keys() == {"varlen_attention"}
    assert json.loads(gpu.read_text())["configurations"]["varlen_attention"].keys() == {"88 bfloat16"}


def test_a_stored_configuration_that_is_no_longer_kept_warns_and_is_not_launched(gpu: Path) -> None:
    stale = {"BLOCK_M": 8, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    gpu.write_text(
        json.dumps({"target": "sm_90", "configurations": {"varlen_attention": {"88 bfloat16": stale}}}),
        encoding="utf-8",
    )
    with pytest.warns(UserWarning, match="varlen_attention: the tuned configuration .*'BLOCK_M': 8.* tune again"):
        assert preferred("varlen_attention", 88, torch.bfloat16) == tune.kept(FORWARD, "sm_90")[0]


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"target": "sm_90", "configurations": {}, "measurements": 1}'])
def test_a_damaged_file_is_named_and_left_alone(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    gpu.write_text(content)
    with pytest.raises(SystemExit) as exited:
        run_main(monkeypatch, stand_in_measure({}), *ONLY_FORWARD)
    assert exited.value.code == 2
    assert f"{gpu}: got no file of tuned configurations" in capsys.readouterr().err
    assert gpu.read_text() == content


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_file_is_named_at_the_launch_too(gpu: Path, content: str) -> None:
    gpu.write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(gpu))}: expected tuned configurations"):
        preferred("varlen_attention", 88, torch.bfloat16)


@pytest.mark.usefixtures("gpu", "unprepared")
def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exited:
        run_main(monkeypatch, stand_in_measure({}), "--out", str(tmp_path / "file"))
    assert exited.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "problem", "status"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "does not fit: out of resource: shared memory", 0),
        (RuntimeError("illegal address"), "failed: RuntimeError: illegal address", 1),
    ],
)
def test_a_configuration_that_raises_leaves_the_others_in_the_running(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str, status: int
) -> None:
    kept = tune.kept(FORWARD, "sm_90")
    right = torch.ones(4)

    def launch(case: Case, configuration: tune.Configuration, *rest: object) -> tuple[Tensor, ...]:
        if configuration == kept[0]:
            raise error
        return (right,)

    attention = SimpleNamespace(expected={FORWARD.kernel: (right.double(),)}, pytorch={FORWARD.kernel: (right,)})
    monkeypatch.setattr(tune, "launch", launch)
    monkeypatch.setattr(tune, "prepare", lambda *args: attention)
    monkeypatch.setattr(tune, "timer_for", lambda device: lambda run: 1.0)
    assert tune.main(ONLY_FORWARD) == status
    problems = [entry["problem"] for entry in json.loads(gpu.read_text())["measurements"][FORWARD.kernel][FORWARD.key]]
    assert problems[0].startswith(problem)
    assert problems[1:] == [None] * (len(kept) - 1)
    assert preferred(FORWARD.kernel, 88, torch.bfloat16) == kept[1]


@pytest.mark.usefixtures("unprepared")
def test_no_case_begins_after_the_given_time_and_the_missing_ones_are_named(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(tune.time, "perf_counter", lambda: float(next(clock)))
    assert run_main(monkeypatch, stand_in_measure({}), "--seconds", "2", "--head-dim", "88") == 0
    stored = json.loads(gpu.read_text())["configurations"]
    assert {kernel: list(entries) for kernel, entries in stored.items()} == {
        "varlen_attention": ["88 bfloat16"],
        "grad_q": ["88 bfloat16"],
    }
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not timed, for lack of time (--seconds): grad_kv 88 bfloat16, varlen_attention 88 float16" in printed


def test_without_a_gpu_it_says_so_and_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path)]) == 3
    assert "no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_plan_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "no GPU here" in printed
    assert "16 of 577 x 16 heads" in printed
    assert sum(kernel in line for line in printed.splitlines() for kernel in tune.KERNELS) == 3 * 6 * 3


def test_interpreted_kernels_are_not_timed(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.knobs.runtime.interpret = True
    with pytest.raises(SystemExit) as exited:
        run_main(monkeypatch, stand_in_measure({}))
    assert exited.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    assert not gpu.exists()


def test_rounds_interleave_and_each_begins_with_another_run() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}

    def timer(run: Run) -> float:
        run()
        return float(len(order))

    seconds = interleaved_seconds(runs, timer, rounds=4)
    assert "".join(order) == "abcbcacababc"
    assert seconds == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert interleaved_seconds({}, timer, rounds=4) == {}


def test_the_timer_of_a_cpu_is_the_median_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("experiments.common.measure.time.perf_counter", lambda: next(now))
    assert timer_for(torch.device("cpu"))(lambda: None) == 2.0


@pytest.mark.parametrize(("target", "dropped"), [("sm_100", {(128, 64, 8, 3)}), ("sm_90", set())])
def test_what_one_compiler_spills_is_not_kept_for_it(
    target: str, dropped: set[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(version: str) -> set[tuple[int, ...]]:
        monkeypatch.setattr("triton.__version__", version)
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        found = candidates("varlen_attention", 88, torch.bfloat16, target)
        return {tuple(configuration[name] for name in names) for configuration in found}

    assert kept("3.7.1") - kept("3.9.0") == dropped
    assert kept("3.9.0") <= kept("3.7.1")
    assert len(kept("3.9.0")) >= 3


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VIT_KERNELS_TUNED", "~/tuned")
    assert tuned_file("A GPU") == tmp_path / "tuned" / "A_GPU.json"
