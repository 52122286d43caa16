"""experiments.kernels: no figure is worse than the committed one, and what the report says is right."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from vit_kernels.inspection.targets import TARGETS

from experiments.common import roofline
from experiments.kernels import __main__ as kernel_report
from experiments.kernels import diff
from experiments.kernels.__main__ import COMMITTED, main
from experiments.kernels.check import FEWER_IS_BETTER, Report, read_report, regressions
from experiments.kernels.compile import Case, cases_of, compile_case, run_all
from experiments.kernels.registry import DTYPES, HEAD_DIMS, OURS, PEERS, Problem, installed_peers
from experiments.kernels.row import Figures, Row, row_of
from experiments.kernels.text import COLUMNS, cells

ATTENTION = OURS[0]


@pytest.fixture(scope="module")
def committed() -> Report:
    return read_report(COMMITTED)


def test_every_committed_row_is_of_a_kernel_and_configuration_that_still_exist(committed: Report) -> None:
    kept = {
        case.key for kernel in OURS for case in cases_of(kernel, DTYPES, HEAD_DIMS, [*TARGETS], defaults_only=False)
    }
    ours = {kernel.name for kernel in OURS}
    assert {row.key for row in committed.rows if row.kernel in ours} <= kept


ROW = Row(
    kernel="varlen_attention",
    package="vit-kernels 0.1.0",
    dtype="bfloat16",
    head_dim=88,
    target="sm_90",
    configuration={"BLOCK_M": 64, "num_warps": 4},
    default=True,
    figures=Figures(
        num_warps=4,
        num_stages=2,
        registers=160,
        spill_store_bytes=0,
        spill_load_bytes=0,
        stack_bytes=0,
        shared_bytes=40960,
        tensor_memory_columns=0,
        ctas_per_sm=3,
        matrix=["HGMMA.64x64x16.F32.BF16", "HGMMA.64x32x16.F32.BF16"],
        products=1,
        loads={"16": 2},
        async_copies={"8": 1, "16": 6},
        bulk_copies=0,
        stores={"8": 1, "16": 3},
        instructions=2000,
        loop_instructions=370,
        loop_instructions_per_64=370.0,
        matrix_flops_over_dots=1.0,
        flops_issued_over_useful=1.15,
        bytes_requested_over_compulsory=5.5,
        roofline_us={"H100": [34.6, 99.0]},
    ),
)
NAMES = {field.name for field in fields(Row)}


def changed(change: Mapping[str, Any], row: Row = ROW) -> Row:
    """The row with some of what names it, or of its figures, replaced."""
    assert row.figures
    figures = replace(row.figures, **{name: value for name, value in change.items() if name not in NAMES})
    return replace(row, **{"figures": figures, **{name: value for name, value in change.items() if name in NAMES}})


@pytest.mark.parametrize("figure", FEWER_IS_BETTER)
def test_a_figure_that_grew_is_reported_and_one_that_shrank_is_not(figure: str) -> None:
    was = getattr(ROW.figures, figure)
    (line,) = regressions([ROW], [changed({figure: was + 0.01})])
    assert line.startswith("varlen_attention, bfloat16, head_dim 88, sm_90, BLOCK_M=64 num_warps=4: ")
    assert f"{figure} {was} -> " in line
    assert regressions([ROW], [changed({figure: was - 0.01})]) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ctas_per_sm": 2}, "ctas_per_sm 3 -> 2"),
        ({"loads": {"4": 1, "16": 2}}, "bytes of the narrowest load in the loop 8 -> 4"),
        ({"async_copies": {"4": 1}}, "bytes of the narrowest load in the loop 8 -> 4"),
        ({"stores": {"8": 7}}, "bytes of the widest store 16 -> 8"),
        (
            {"matrix": ["HMMA.16816.F32.BF16"]},
            "matrix instructions HGMMA.64x64x16.F32.BF16, HGMMA.64x32x16.F32.BF16 ->",
        ),
        ({"matrix": []}, "-> none"),
        ({"error": "RuntimeError: no", "figures": None}, "compiled, and now: RuntimeError: no"),
        ({"configuration": {"BLOCK_M": 32}}, "not in the committed report"),
        ({"head_dim": 80}, "not in the committed report"),
    ],
)
def test_what_else_got_worse_is_reported(change: dict[str, Any], told: str) -> None:
    (line,) = regressions([ROW], [changed(change)])
    assert told in line


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ctas_per_sm": 4},
        {"async_copies": {"16": 9}},
        {"stores": {"16": 1}},
        {"matrix": ["HGMMA.64x128x16.F32.BF16"]},
        {"roofline_us": {}},
        {"configuration": {"num_warps": 4, "BLOCK_M": 64}},
    ],
)
def test_what_is_no_worse_is_not_reported(change: dict[str, Any]) -> None:
    assert regressions([ROW], [changed(change)]) == []


def test_a_kernel_without_a_loop_is_compared_too() -> None:
    plain = changed({"loop_instructions": None, "matrix_flops_over_dots": None, "matrix": []})
    assert regressions([plain], [plain]) == []
    assert len(regressions([plain], [changed({"registers": 161}, plain)])) == 1


def test_a_row_that_never_compiled_is_not_compared() -> None:
    assert regressions([replace(ROW, error="RuntimeError: no", figures=None)], [ROW]) == []


def test_the_roofline_of_llama_4s_attention() -> None:
    # 16 tiles of 577 tokens, 16 heads of 88: tensor- and HBM-bound at once, about 31 us each.
    flops, nbytes = 4 * 577**2 * 88 * 16 * 16, 4 * 16 * 577 * 16 * 88 * 2
    h100 = roofline.GPUS["H100"]
    by_flops, _ = roofline.interval(h100, "bfloat16", matrix_flops=flops, exponentials=0, nbytes=0)
    by_bytes, _ = roofline.interval(h100, "bfloat16", matrix_flops=0, exponentials=0, nbytes=nbytes)
    assert by_flops == pytest.approx(30e-6, rel=0.02)
    assert by_bytes == pytest.approx(31e-6, rel=0.02)
    exponentials = 577**2 * 16 * 16
    low, high = roofline.interval(h100, "bfloat16", matrix_flops=flops, exponentials=exponentials, nbytes=nbytes)
    assert low == max(by_flops, by_bytes)
    assert high == pytest.approx((by_flops + exponentials / h100.exponentials) / 0.6 + by_bytes / 0.8)


@pytest.mark.parametrize("gpu", roofline.GPUS.values(), ids=list(roofline.GPUS))
def test_a_gpus_figures_belong_together(gpu: roofline.Gpu) -> None:
    """FLOPs a clock and multiprocessor are powers of two: 2,048 of sm_80, 4,096 of sm_90, 8,192 of sm_100."""
    assert gpu.target in TARGETS
    clocks = gpu.exponentials / 16
    assert math.log2(gpu.flops["bfloat16"] / clocks) == pytest.approx(
        {"sm_80": 11, "sm_90": 12, "sm_100": 13, "gfx942": 11}[gpu.target], abs=0.01
    )
    assert gpu.flops["float32"] == pytest.approx(gpu.flops["bfloat16"] / (8 if gpu.target == "gfx942" else 2), rel=0.01)


def test_compulsory_bytes_are_those_of_the_tensors() -> None:
    problem = Problem(88, "bfloat16", tiles=2, heads=3, device="cpu")
    qkv = sum(part.numel() * part.element_size() for part in problem.qkv())
    assert 3 * problem.tensor_bytes == qkv == 3 * 2 * 577 * 3 * 88 * 2
    assert problem.table_bytes == 2 * problem.rotary_table().numel() * 4
    assert problem.cu_seqlens().tolist() == [0, 577, 1154]


class RefusedError(Exception):
    pass


def fail(case: Case) -> None:
    raise RefusedError(case.kernel)


def die(case: Case) -> None:
    os._exit(3)


CASE = Case("varlen_attention", "bfloat16", 88, "sm_90", (), default=True)


def test_a_process_that_dies_is_an_error_that_says_what_it_did() -> None:
    with pytest.raises(RuntimeError, match=r"making: a process died.*varlen_attention.*head_dim=88.*--jobs 1"):
        run_all(die, [CASE], interpret=False, jobs=1, title="making")


def test_an_error_in_a_process_is_raised() -> None:
    with pytest.raises(RefusedError, match="varlen_attention"):
        run_all(fail, [CASE], interpret=False, jobs=1, title="making")


def test_a_configuration_that_does_not_compile_becomes_a_row_that_says_so() -> None:
    good = ATTENTION.candidates(88, "bfloat16", "sm_80")[0]
    assert good
    bad = Case(ATTENTION.name, "bfloat16", 88, "sm_80", tuple(sorted({**good, "BLOCK_D0": 24}.items())), default=True)
    error = run_all(compile_case, [bad], interpret=False, jobs=1, title="compiling")[bad]
    assert isinstance(error, str)
    assert "power of 2" in error
    row = replace(ROW, error=error, figures=None)
    assert len(cells(row)) == len(COLUMNS)
    assert row_of(row.described()) == row


def test_no_peer_is_expected_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed_peers() == ()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel" or None)
    assert {kernel.package for kernel in installed_peers()} == {"liger-kernel"}
    assert len(installed_peers()) == len([kernel for kernel in PEERS if kernel.package == "liger-kernel"])


def rows_of(cases: list[Case], jobs: int) -> list[Row]:
    """In place of `make_rows`: a row a case, compiled by nothing."""
    return [replace(ROW, **vars(case) | {"configuration": dict(case.configuration)}) for case in cases]


@pytest.fixture
def fake_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_report, "make_rows", rows_of)


@pytest.mark.usefixtures("fake_rows")
def test_a_run_writes_a_table_a_report_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--kernel", "varlen_attention", "--target", "sm_90", "--head-dim", "88", "--out", str(tmp_path)])
    assert status == 0
    report = read_report(tmp_path / COMMITTED.name)
    assert {row.target for row in report.rows} == {"sm_90"}
    assert {row.dtype for row in report.rows} == set(DTYPES)
    assert report.triton == metadata.version("triton")
    assert (tmp_path / COMMITTED.with_suffix(".png").name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "model's prediction" in printed
    assert "H100 34.6 to 99" in printed


@pytest.mark.usefixtures("fake_rows")
def test_a_selection_is_made_anew_and_the_other_rows_stay(tmp_path: Path) -> None:
    common = ["--dtype", "bfloat16", "--head-dim", "88", "--out", str(tmp_path)]
    main([*common, "--kernel", "varlen_attention", "--kernel", "pixel_shuffle"])
    path = tmp_path / COMMITTED.name
    report = json.loads(path.read_text())
    for row in report["rows"]:
        row["registers"] = 1
    path.write_text(json.dumps(report))
    main([*common, "--kernel", "varlen_attention", "--target", "sm_80", "--defaults-only"])
    rows = read_report(path).rows
    for row in rows:
        again = (row.kernel, row.target, row.default) == ("varlen_attention", "sm_80", True)
        assert row.figures
        assert (row.figures.registers == 160) == again
    assert len(rows) == len(report["rows"])


@pytest.mark.usefixtures("fake_rows")
@pytest.mark.parametrize("selection", [[], ["--kernel", "pixel_shuffle"]])
def test_figures_of_two_versions_of_triton_are_not_mixed(
    tmp_path: Path, selection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"experiment": "kernel_report", "environment": {"packages": {"triton": "3.0.0"}}, "rows": [ROW.described()]}
    path = tmp_path / COMMITTED.name
    path.write_text(json.dumps(old))
    if selection:
        with pytest.raises(SystemExit, match="2"):
            main([*selection, "--out", str(tmp_path)])
        assert "is of triton 3.0.0: give another --out, or select nothing" in capsys.readouterr().err
    else:
        main(["--out", str(tmp_path)])
        assert ROW not in read_report(path).rows


def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, registers: int) -> int:
    cases = cases_of(ATTENTION, ["bfloat16"], [88], ["sm_90"], defaults_only=True)
    rows = [changed({"registers": registers}, row).described() for row in rows_of(cases, jobs=1)]
    report = {"experiment": "kernel_report", "environment": {"packages": {"triton": version}}, "rows": rows}
    path = tmp_path / "committed.json"
    path.write_text(json.dumps(report))
    monkeypatch.setattr(kernel_report, "COMMITTED", path)
    selection = ["--kernel", ATTENTION.name, "--dtype", "bfloat16", "--head-dim", "88", "--target", "sm_90"]
    return main([*selection, "--defaults-only", "--check"])


@pytest.mark.usefixtures("fake_rows")
@pytest.mark.parametrize(("registers", "status"), [(159, 1), (160, 0), (161, 0)])
def test_the_check_fails_on_what_is_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, registers: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch, tmp_path, metadata.version("triton"), registers) == status
    assert ("WORSE: varlen_attention" in capsys.readouterr().out) == (status == 1)


@pytest.mark.usefixtures("fake_rows")
def test_the_check_refuses_another_version_of_triton(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        check(monkeypatch, tmp_path, "3.0.0", 160)
    assert "the committed report is of triton 3.0.0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"experiment": "compile_encoder", "environment": {"packages": {}}}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a report of"):
        read_report(path)


@pytest.mark.parametrize(
    "arguments", [["--kernel", "softmax"], ["--head-dim", "87"], ["--dtype", "int8"], ["--target", "sm_70"]]
)
def test_an_unknown_selection_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"invalid choice: {arguments[1]!r}".replace("'87'", "87") in capsys.readouterr().err


def test_the_figure_and_the_table_take_every_committed_row(committed: Report, tmp_path: Path) -> None:
    rows = committed.rows
    assert all(len(cells(row)) == len(COLUMNS) for row in rows)
    kernel_report.draw(rows, tmp_path / "figure.png")
    with (tmp_path / "table").open("w+") as table:
        kernel_report.print_report(Console(file=table, width=200), rows, kernel_report.NOTES)
        table.seek(0)
        text = table.read()
    assert all(row.kernel.split()[0] in text for row in rows)
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_kept_configuration_of_attention_in_bf16_is_clean(committed: Report, target: str, head_dim: int) -> None:
    wanted = ("varlen_attention", "bfloat16", target, head_dim)
    rows = [row for row in committed.rows if (row.kernel, row.dtype, row.target, row.head_dim) == wanted]
    figures = [row.figures for row in rows if row.figures]
    assert len(figures) == len(rows) >= 3
    for of in figures:
        assert of.spill_store_bytes == of.spill_load_bytes == of.stack_bytes == 0
        assert {*of.loads, *of.async_copies} == {"16"}
        assert of.matrix_flops_over_dots == 1, "warps repeat each other's work"
        assert of.ctas_per_sm >= 1
        assert "sm" not in target or "16" in of.stores
        if target == "sm_90" and of.num_warps == 8:
            assert of.loop_instructions_per_64
            assert of.loop_instructions_per_64 <= 380
    assert target != "sm_90" or max(of.ctas_per_sm for of in figures) >= 2


def test_two_reports_differ_in_the_figures_that_changed_and_say_which_spill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    for path, triton, change in ((before, "3.0.0", {}), (after, "4.0.0", {"registers": 161, "spill_load_bytes": 8})):
        around = {"experiment": "kernel_report", "environment": {"packages": {"triton": triton}}}
        path.write_text(json.dumps(around | {"rows": [changed(change).described()]}))
    diff.main([str(before), str(after)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "triton 3.0.0 -> 4.0.0" in printed
    assert "registers 160 -> 161" in printed
    assert "1 of 1 rows differ; 1 of the second report spill." in printed
