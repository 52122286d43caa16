"""Predicted times held against measured ones: the model by hand, no leak from what judges it, and what is committed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common import cli
from experiments.common.roofline import GPUS, Efficiency, tiled_seconds
from experiments.predictions import attention, measured, ours, products, report
from experiments.predictions.attention import Tile
from experiments.predictions.fit import errors, fit
from experiments.predictions.measured import Attention, Product
from experiments.predictions.text import markdown
from scripts import update_readme

ROOT = Path(__file__).parents[2]
H100 = GPUS["H100"]
PERFECT = Efficiency(launch=0, tile=0, matrix=1, exponentials=1)


@pytest.fixture(scope="module")
def rows() -> list[Attention]:
    return measured.attention()


@pytest.fixture(scope="module")
def efficiency(rows: list[Attention]) -> Efficiency:
    return attention.calibrate(rows)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((cli.COMMITTED / "predictions.json").read_text(encoding="utf-8"))


def tiled(tiles: int, efficiency: Efficiency = PERFECT, *, nbytes: float = 0, resident: int = 1) -> float:
    """Tiles of a microsecond of products and two of exponentials on an H100."""
    rate, processors = H100.flops["bfloat16"], H100.processors
    return tiled_seconds(
        H100,
        efficiency,
        tiles=tiles,
        flops=1e-6 * rate / processors,
        exponentials=2e-6 * H100.exponentials / processors,
        nbytes=nbytes,
        rate=rate,
        resident=resident,
    )


@pytest.mark.parametrize(("tiles", "waves"), [(1, 1), (132, 1), (133, 2), (264, 2), (265, 3)])
def test_tiles_come_in_waves(tiles: int, waves: int) -> None:
    assert tiled(tiles) == pytest.approx(3e-6 * waves)


def test_a_call_pays_its_launch_once_and_a_start_for_each_wave_that_is_resident() -> None:
    efficiency = Efficiency(launch=6e-6, tile=4e-6, matrix=0.5, exponentials=0.8)
    assert tiled(3 * 132, efficiency) == pytest.approx(6e-6 + 3 * (4e-6 + 1e-6 / 0.5 + 2e-6 / 0.8))
    assert tiled(3 * 132, efficiency, resident=3) == pytest.approx(6e-6 + 4e-6 + 3 * (1e-6 / 0.5 + 2e-6 / 0.8))


def test_bytes_bound_a_call_behind_its_launch() -> None:
    efficiency = dataclasses.replace(PERFECT, launch=6e-6)
    assert tiled(1, efficiency, nbytes=3.35e12 * 0.8 * 50e-6) == pytest.approx(56e-6)
    assert tiled(1, efficiency, nbytes=3.35e12 * 0.8 * 2e-6) == pytest.approx(9e-6)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_a_gpu_has_as_many_multiprocessors_as_its_exponentials_say(gpu: Any) -> None:
    clock = gpu.exponentials / (16 * gpu.processors)
    assert 1e9 < clock < 2.5e9


def test_flash_attention_issues_whole_tiles() -> None:
    assert Tile.of_flash_attention("H100", 64) == Tile(192, 192, 64)
    assert Tile.of_flash_attention("H200", 72) == Tile(192, 144, 96)
    assert Tile.of_flash_attention("B200", 72) == Tile(256, 128, 80)
    full, more = (attention.flash_attention_work("H100", 80, length, 1) for length in (576, 577))
    assert (full.tiles, full.exponentials) == (16 * 3, 16 * 576 * 576)
    assert full.flops == 4 * 96 * full.exponentials
    assert (more.tiles, more.exponentials) == (16 * 4, 16 * (4 * 192) * (5 * 144))
    with pytest.raises(ValueError, match="head_dim: got 104, expected at most 96"):
        Tile.of_flash_attention("H100", 104)


def test_the_measured_rows_are_all_there_and_name_their_source(rows: list[Attention]) -> None:
    sizes = {(row.gpu, row.engine, row.head_dim, row.length, row.sequences) for row in rows}
    assert len(rows) == len(sizes) == 3 * 3 * 3 * 77
    assert {row.gpu for row in rows} == {"H100", "H200", "B200"}
    chosen = {row.engine: row.seconds for row in rows if (row.gpu, *_size(row)) == ("H100", 16, 576, 80)}
    assert chosen["VLLM 0.24.0"] == pytest.approx(80.46e-6, rel=1e-3)
    found = measured.products()
    assert len(found) == 6 * 150
    assert min(*(row.seconds for row in rows), *(row.seconds for row in found)) > 0
    for name in ("attention.csv", "products.csv"):
        first = (measured.FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
        assert measured.SOURCE.split(" (")[0] in first


def _size(row: Attention) -> tuple[int, int, int]:
    return row.sequences, row.length, row.head_dim


def test_the_fit_finds_the_parameters_that_made_the_times() -> None:
    sizes = np.linspace(1, 50, 40)
    true = np.array([7.0, 0.3])
    times = true[0] + true[1] * sizes
    times[5] *= 3  # one odd measurement does not pull
    found = fit(lambda parameters: parameters[0] + parameters[1] * sizes, times, (1, 1))
    assert found == pytest.approx(true, rel=0.01)


def test_the_fit_does_not_depend_on_where_it_starts(
    rows: list[Attention], efficiency: Efficiency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "START", (2e-6, 5e-6, 1.5, 0.4))
    assert dataclasses.astuple(attention.calibrate(rows)) == pytest.approx(dataclasses.astuple(efficiency), rel=0.02)


def test_what_judges_the_model_does_not_leak_into_it(rows: list[Attention], efficiency: Efficiency) -> None:
    judging = {(row.gpu, row.head_dim) for row in rows if not attention.is_fitted(row) and row.is_flash_attention}
    assert judging == {(gpu, h) for gpu in ("H100", "H200", "B200") for h in (64, 72, 80)} - {
        ("H100", 64),
        ("H100", 80),
    }
    spoiled = [row if attention.is_fitted(row) else dataclasses.replace(row, seconds=3 * row.seconds) for row in rows]
    assert attention.calibrate(spoiled) == efficiency
    slower = [dataclasses.replace(row, seconds=2 * row.seconds) if attention.is_fitted(row) else row for row in rows]
    assert attention.calibrate(slower).launch == pytest.approx(2 * efficiency.launch, rel=0.05)


def test_nor_into_the_model_of_products() -> None:
    found = [row for row in measured.products() if row.dtype == "fp8" and row.engine.startswith("SGLang")]
    assert {min(row.n, row.k) for row in found if not products.is_fitted(row)} == {1536}
    spoiled = [row if products.is_fitted(row) else dataclasses.replace(row, seconds=3 * row.seconds) for row in found]
    assert products.calibrate(spoiled) == products.calibrate(found)
    with pytest.raises(ValueError, match=r"rows: got the dtypes \['bfloat16', 'fp8'\], expected one"):
        products.calibrate([*found, Product("a", "bfloat16", 512, 4096, 4096, 1e-5)])


def test_a_product_takes_the_best_tile_and_fp8_its_quantisation() -> None:
    kernel = Efficiency(launch=0, tile=0, matrix=1, exponentials=1)
    row = Product("a", "bfloat16", 132 * 128, 2048, 4096, 1)
    exact = products.seconds(row, products.ProductEfficiency(kernel, None))
    assert exact == pytest.approx(2 * row.m * row.n * row.k / H100.flops["bfloat16"])
    fp8 = products.seconds(dataclasses.replace(row, dtype="fp8"), products.ProductEfficiency(kernel, 0.5))
    assert fp8 == pytest.approx(exact / 2 + 3 * row.m * row.k / (0.5 * H100.bandwidth))


def test_errors_and_intervals_by_hand() -> None:
    found = errors([1.1, 0.8, 1.0, 1.3, 1.0], [1.0] * 5)
    assert (found.count, found.bias, found.median) == (5, 0.0, 0.1)
    assert found.ninetieth == pytest.approx(0.26)
    lying = report.interval([(1, 2), (1, 2), (2, 4), (4, 8)], [1.5, 3, 3, 2])
    assert (lying.inside, lying.over_lower, lying.over_upper) == (0.5, 1.5, 0.75)


def test_the_committed_errors_are_those_of_the_committed_rows(
    rows: list[Attention], efficiency: Efficiency, committed: dict[str, Any]
) -> None:
    assert committed["efficiency"] == pytest.approx(dataclasses.asdict(efficiency), rel=1e-3)
    held_out = dataclasses.asdict(report.held_out(rows, efficiency))
    assert committed["held_out"] == pytest.approx(held_out, abs=2e-3)
    assert committed["held_out"]["count"] == 7 * 2 * 77
    _, by_kernel, _ = report.product_groups(measured.products())
    for group, old in zip(by_kernel, committed["products"], strict=True):
        assert old["errors"] == pytest.approx(dataclasses.asdict(group.errors), abs=2e-3)


def test_a_predicted_time_stands_only_beside_a_measured_peer(committed: dict[str, Any], rows: list[Attention]) -> None:
    known = {(row.gpu, *_size(row)) for row in rows if row.is_flash_attention}
    for row in committed["ours"]:
        assert (row["gpu"], row["sequences"], row["length"], row["head_dim"]) in known
        assert row["measured"]
        assert row["label"] == ours.LABEL
        low, high = row["interval"]
        assert low < high
    text = markdown(committed)
    assert ours.LABEL in text
    assert "our own efficiency is unknown" in text
    assert (cli.COMMITTED / "predictions.md").read_text(encoding="utf-8") == text
    sentence = update_readme.predicted_time(cli.COMMITTED)
    errors_said = [f"{committed['held_out'][name]:.1%}" for name in ("median", "ninetieth")]
    assert all(part in sentence for part in (ours.LABEL, "measured by others", "unknown", *errors_said))
    assert sentence in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_size_that_no_peer_was_measured_at_is_refused(
    rows: list[Attention], efficiency: Efficiency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "SIZES", ((1, 65, 80, "a window and a token"),))
    with pytest.raises(ValueError, match=r"SIZES: got \('H100', 1, 65, 80\), expected one that a peer was measured at"):
        ours.beside(rows, efficiency, cli.COMMITTED / "kernel_report.json")


def test_our_work_is_counted_in_our_blocks() -> None:
    window = ours.work(80, 64, sequences=64, block=64)
    assert (window.tiles, window.exponentials) == (1024, pytest.approx(1024 * 64 * 64, rel=0.03))
    assert window.flops == 1024 * 4 * 64 * 64 * 80
    assert window.nbytes == 4 * 2 * 64 * 64 * 16 * 80


def test_where_ours_would_be_behind_the_text_says_so(committed: dict[str, Any]) -> None:
    slow = json.loads(json.dumps(committed))
    slow["ours"][0]["ours"] = 2 * max(slow["ours"][0]["measured"].values())
    first = f"{slow['ours'][0]['sequences']} x {slow['ours'][0]['length']}"
    assert f"**behind** the measured peer at {first}" in markdown(slow)
    for row in slow["ours"]:
        row["ours"] = 0.1
    assert "At none of these sizes" in markdown(slow)


def test_the_command_writes_what_is_committed(tmp_path: Path, committed: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "experiments.predictions", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    written = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    for new, old in zip(written["ours"], committed["ours"], strict=True):
        assert new.keys() == old.keys()
        assert new["ours"] == pytest.approx(old["ours"], rel=5e-3)
    assert (tmp_path / "predictions.png").stat().st_size > 10_000
