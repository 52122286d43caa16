"""The explanations name the line that broke a graph and the guard that cost a second one, and run tlparse."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

from experiments.compile_cost.explain import main

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SUBJECTS = """
    import torch
    from torch import nn
    from vit_encoder import CompilationConfig, support_torch_compile

    def subject(forward, *sizes, **fields):
        fields = {"compile_mm_encoder": True, "backend": "eager", **fields}
        body = {"forward": forward, "compilation_config": CompilationConfig(**fields)}
        cls = support_torch_compile(dynamic_arg_dims={"x": 0})(type("Subject", (nn.Module,), body))
        return cls(), [(torch.ones(size),) for size in sizes]

    def fine(self, x):
        return x + 1

    def breaks(self, x):
        if x.sum() > 0:
            return x + 1
        return x

    def one_graph(): return subject(fine, 1, 2)
    def two_graphs(): return subject(fine, 2, 1, dynamic_shapes="backed")
    def broken(): return subject(breaks, 2)
    def off(): return subject(fine, 2, compile_mm_encoder=False)
    def nothing(): return 3, []
"""


@pytest.fixture(autouse=True)
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of subjects, and no tlparse."""
    (tmp_path / "subjects_to_explain.py").write_text(textwrap.dedent(SUBJECTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("subject", "status", "expected"),
    [
        ("one_graph", 0, ["1 graphs, 0 graph breaks", "2 calls: 1 graphs compiled", "compile_inner", "1 TENSOR_MATCH"]),
        ("two_graphs", 1, ["2 calls: 2 graphs compiled", "2 <= x.size()[0]"]),
        ("broken", 1, ["1 graph breaks", "in breaks: if x.sum() > 0:", "not one graph: "]),
        ("off", 1, ["1 calls: 0 graphs compiled", "nothing was compiled"]),
    ],
)
def test_what_is_printed(subject: str, status: int, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"subjects_to_explain:{subject}"]) == status
    printed = capsys.readouterr().out
    assert [text for text in expected if text not in printed] == []


def test_every_guard_is_listed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subjects_to_explain:one_graph", "--guards"]) == 0
    assert "guard TENSOR_MATCH on L['x']" in capsys.readouterr().out


@pytest.mark.parametrize(
    "subject", ["nope", "no_such_module:f", "subjects_to_explain:nope", "subjects_to_explain:nothing"]
)
def test_what_is_no_subject_is_refused(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([subject])
    assert f"subject: got '{subject}', expected module:function" in capsys.readouterr().err


def test_tlparse_reads_the_trace_of_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "tlparse"
    stub.write_text('#!/bin/sh\n[ -s "$1" ] && printf "%s" "$2 $3" >"$3.called"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    report = tmp_path / "report"
    assert main(["subjects_to_explain:two_graphs", "--report", str(report)]) == 1
    assert (tmp_path / "report.called").read_text() == f"-o {report}"
