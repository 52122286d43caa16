"""experiments.compile_cost: its processes measure what they say, and what is wrong or failed has no figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vit_encoder import CompilationConfig

from experiments.compile_cost import __main__ as compile_cost
from experiments.compile_cost import process
from experiments.compile_cost.row import Failure, Row, Sample
from experiments.compile_cost.subjects import SUBJECTS, Subject

pytestmark = pytest.mark.costly

ROOT = Path(__file__).parents[2]
NARROW = ["--layers", "1", "--heads", "1"]
SIZE = ["--model", "llama4", *NARROW]


def in_this_process(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    folders = ["--cache", str(folder / "cache"), "--artefact", str(folder / "artefact"), "--started", "0"]
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        process.main([form, *SIZE, *folders])
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
    seen: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return seen


@pytest.mark.parametrize("model", SUBJECTS)
def test_a_process_of_its_own(tmp_path: Path, model: str) -> None:
    seen = compile_cost._run("decorated", ["--model", model, *NARROW], tmp_path)
    assert isinstance(seen, Sample)
    assert seen.graphs == 1
    assert 0 < seen.seconds < seen.seconds_with_imports
    assert list((tmp_path / "cache").glob("*.artefact"))


# Llama 4's is what tests/compilation/test_deployment.py exports.
@pytest.mark.parametrize("model", [model for model in SUBJECTS if model != "llama4"])
def test_an_export_is_right_for_every_size_in_the_process_that_made_it_and_another(tmp_path: Path, model: str) -> None:
    size = ["--model", model, *NARROW]
    exported, loaded = (compile_cost._run(form, size, tmp_path) for form in ("exported", "loaded"))
    assert isinstance(exported, Sample), exported.problem
    assert isinstance(loaded, Sample), loaded.problem
    assert loaded.graphs == 0


def test_a_process_that_fails_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = compile_cost._run("loaded", SIZE, tmp_path)
    assert isinstance(failed, Failure)
    assert "FileNotFoundError" in failed.problem
    monkeypatch.setattr(compile_cost, "SECONDS_OF_A_PROCESS", 0.01)
    assert compile_cost._run("loaded", SIZE, tmp_path) == Failure("no end within 0.01 s")


@pytest.mark.usefixtures("fresh_dynamo")
def test_wrong_features_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(subject: Subject, options: Any) -> process.Call:
        # One batch alone goes wrong, and not in the first call.
        return lambda index: subject.encoder(*subject.batches[index]) * (1.001 if index == 1 else 1.0)

    monkeypatch.setitem(process.FORMS, "plain", wrong)
    seen = in_this_process("plain", tmp_path, capsys)
    assert seen["deviation"] > seen["allowed"]
    monkeypatch.setitem(process.FORMS, "plain", lambda s, _: lambda index: s.encoder(*s.batches[index]))
    seen = in_this_process("plain", tmp_path, capsys)
    assert seen["deviation"] <= seen["allowed"]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("model", SUBJECTS)
def test_the_plain_form_inlines_the_layers_and_ours_does_not(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    subject = SUBJECTS[model](8, 1)
    for part, names in subject.regions.items():
        for name in names:
            monkeypatch.setattr(part, name, getattr(part, name))
    regions = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        regions.append(sum("invoke_subgraph" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiler(*args, **{**kwargs, "backend": backend}))
    with torch.no_grad():
        subject.encoder.compilation_config = CompilationConfig(compile_mm_encoder=True)
        subject.encoder(*subject.batches[0])
        subject.encoder.compilation_config = None
        call = process.FORMS["plain"](subject, None)  # type: ignore[arg-type]
        for index, batch in enumerate(subject.batches):
            torch.testing.assert_close(call(index), subject.encoder(*batch), rtol=1e-4, atol=1e-4)
    parts = [module for module in subject.encoder.modules() if type(module) in subject.regions]
    assert regions == [len(parts), 0]
    assert len(parts) >= 8


def sample(cpu_seconds: float) -> Sample:
    times = {"seconds": cpu_seconds, "seconds_with_imports": cpu_seconds + 1}
    return Sample(cpu_seconds=cpu_seconds, **times, graphs=1, deviation=0.0, allowed=1e-5)


def test_goals_are_met_missed_or_not_measured() -> None:
    seconds = {"plain": 10.0, "transformers": 20.0, "ours, cold": 6.0, "ours, warm": 1.5, "export": 9.0, "load": 3.0}
    rows = [Row(name, "", [sample(of)]) for name, of in seconds.items()]
    assert [str(compile_cost.reached(goal, rows)) for goal in compile_cost.GOALS["llama4"]] == [
        "ours, cold of plain: 0.6x, goal 0.55x: MISSED",
        "ours, cold of transformers: 0.3x, goal 0.55x: met",
        "ours, warm of plain: 0.15x, goal 0.15x: met",
        "load: 4 s, goal 5.0 s: met",
    ]
    rows[1] = Row("transformers", "", [Failure("wrong")])
    assert str(compile_cost.reached(compile_cost.GOALS["llama4"][1], rows)).endswith("not measured (goal 0.55x)")


def test_the_medians_are_of_all_rounds_and_one_wrong_sample_spoils_them() -> None:
    samples = [sample(cpu) for cpu in (1.0, 2.0, 9.0)]
    assert Row("x", "", samples).described()["cpu_seconds"] == 2.0
    spoiled = Row("x", "", [*samples, Failure("wrong")])
    assert "cpu_seconds" not in spoiled.described()
    assert spoiled.problem == "wrong"
    assert compile_cost._cells(spoiled) == ["-"] * 4


def test_a_figure_and_a_file_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples: dict[str, list[Sample | Failure]] = {name: [sample(2.0)] for name, _, _ in compile_cost.ROWS}
    samples["transformers"] = [Failure("wrong")]
    monkeypatch.setattr(compile_cost, "measure", lambda *size: samples)
    assert compile_cost.main(["--out", str(tmp_path)]) == 1
    assert "MISSED" in capsys.readouterr().out
    result = json.loads((tmp_path / "compile_ledger-llama4-176.json").read_text())
    assert [each["problem"] for each in result["rows"]].count("wrong") == 1
    committed = json.loads((ROOT / "experiments/results/compile_ledger-llama4-176.json").read_text())
    assert result.keys() == committed.keys()
    assert result["goals"][0].keys() == committed["goals"][0].keys()
    assert result["rows"][0].keys() == committed["rows"][0].keys()
    assert result["rows"][0]["samples"][0].keys() == committed["rows"][0]["samples"][0].keys()
    assert (tmp_path / "compile_ledger-llama4-176.png").stat().st_size > 10_000


def test_the_calls_of_every_committed_form_are_measured(tmp_path: Path) -> None:
    # In a process of its own: it registers an op and takes one thread.
    command = [sys.executable, "-m", "experiments.compile_cost", "--calls", "--layers", "1", "--rounds", "1"]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    made = json.loads((tmp_path / "call_overhead-1.json").read_text())
    committed = json.loads((ROOT / "experiments/results/call_overhead-34.json").read_text())
    assert made["microseconds"].keys() == committed["microseconds"].keys()
    assert committed.keys() <= made.keys()
    assert (made["layers"], committed["layers"]) == (1, 34)
