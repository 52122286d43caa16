"""The main job: what it writes, that a wrong result is not timed, and bad arguments."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from vit_encoder import Llama4VisionConfig, Llama4VisionModel, compilation_counter
from vit_encoder.llama4 import reference_forward
from vit_encoder.llama4.checkpoint import to_hf_tensors, vision_tensors

from experiments.common import comparison, measure
from experiments.common.comparison import ALLOWED_EPS, compare, relative_error
from experiments.common.encoders import ENCODERS, TileEncoder
from experiments.common.peers import transformers_vision_model
from experiments.common.weights import random_encoder
from experiments.encode.__main__ import main
from experiments.encode.report import notes
from experiments.encode.result import result_of
from experiments.encode.sweep import sweep_batches
from scripts import update_readme

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK = ["--config", "tiny", "--backend", "eager", "--tile-counts", "1", "3", "2", "--repeats", "2"]

pytestmark = [pytest.mark.costly, pytest.mark.usefixtures("fresh_dynamo")]


def run(out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run the job in this process and return what it wrote."""
    assert main([*QUICK, "--out", str(out), *arguments]) == code
    (path,) = out.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


def tiny_encoder(**sizes: int) -> Llama4VisionModel:
    config = dataclasses.replace(Llama4VisionConfig.tiny(), **sizes)
    return random_encoder(config, dtype=torch.float32, device=CPU)


def pixel_values(config: Llama4VisionConfig, tiles: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tiles, 3, config.image_size, config.image_size, generator=generator)


# What it writes


def test_the_result_holds_everything_and_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "--max-tiles", "2")
    assert result["right"] is True
    assert result["image"] == {
        "name": "grace_hopper.jpg",
        "width": 512,
        "height": 600,
        "max_tiles": 2,
        "canvas": [2, 1],
        "tiles": 3,
        "encoder_tokens": 3 * 65,
        "features": 3 * 16,
    }
    assert result["encoder"]["weights"] == "random, seed 0"
    assert {"date", "packages", "cpu", "devices"} <= result["environment"].keys()
    assert result["graphs"] == {"graphs": 1, "unique_graphs": 1, "graph_breaks": {}, "problem": None}
    assert result["tile_counts"]["tile_counts"] == [1, 3, 2]
    assert result["tile_counts"]["graphs"] == {"graphs": 1, "unique_graphs": 1, "graph_breaks": {}}
    assert 0 < result["job"]["peak_bytes"] < 2**40
    assert list(rows(result)) == ["eager", "compiled", "transformers"]
    for row in result["rows"]:
        assert row["problem"] is None
        assert 0 < row["error"]["rms"] < ALLOWED_EPS * torch.finfo(torch.float32).eps
        assert row["error"]["rms"] < row["error"]["maximum"] < 1e-3
        times = row["seconds_per_tile"]
        assert len(times["samples"]) == 2
        assert 0 < times["low"] <= times["median"] <= times["high"]
        assert row["first_call_seconds"] > 0
    printed = capsys.readouterr().out
    assert "canvas of 2 x 1" in printed
    assert "random, seed 0" in printed
    assert str(ROOT) not in (tmp_path / "compile_encoder-tiny-2-cpu-float32.json").read_text()
    with Image.open(tmp_path / "compile_encoder-tiny-2-cpu-float32.png") as figure:
        assert figure.size[0] > 1000


@pytest.mark.parametrize("model", ENCODERS)
def test_every_encoder_is_right_and_one_graph(model: str, tmp_path: Path) -> None:
    arguments = ["--model", model, "--config", "tiny", "--backend", "eager", "--repeats", "1", "--out", str(tmp_path)]
    bound = "2" if ENCODERS[model].unit == "tile" else "30000"
    assert main([*arguments, f"--{ENCODERS[model].limit.replace('_', '-')}", bound]) == 0
    (path,) = tmp_path.glob("*.json")
    result = result_of(json.loads(path.read_text()))
    assert [row.name for row in result.rows] == ["eager", "compiled", "transformers"]
    assert (result.kind, result.graphs.graphs, result.problems) == (ENCODERS[model], 1, {})


def test_an_image_a_checkpoint_and_fewer_layers(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "a checkpoint", tiny_encoder())
    Image.new("RGB", (300, 100), "teal").save(tmp_path / "teal.png")
    arguments = ["--image", str(tmp_path / "teal.png"), "--checkpoint", str(folder), "--layers", "1"]
    assert main(["--out", str(tmp_path / "out"), *QUICK[2:], *arguments]) == 0
    result = json.loads((tmp_path / "out/compile_encoder-a checkpoint-1-cpu-float32.json").read_text())
    assert result["encoder"]["weights"] == "checkpoint"
    assert result["encoder"]["num_hidden_layers"] == result["tile_counts"]["layers"] == 1
    assert result["image"]["name"] == "teal.png"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_right_too(dtype: str, tmp_path: Path) -> None:
    result = run(tmp_path, "--dtype", dtype, "--layers", "6")
    assert result["dtype"] == dtype
    assert all(row["error"]["rms"] > 1e-4 for row in result["rows"])


def test_without_transformers_eager_is_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENCODERS, "llama4", dataclasses.replace(ENCODERS["llama4"], peer=lambda model: None))
    assert list(rows(run(tmp_path))) == ["eager", "compiled"]
    assert "twice what eager makes" in capsys.readouterr().out


def test_the_compiled_form_is_called_first_and_finds_nothing_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, list[str]]] = []

    def leaving(*args: Any) -> Any:
        (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "a graph").touch()
        return sweep_batches(*args)

    def compared(calls: Any, *args: Any, **kwargs: Any) -> Any:
        found.append((next(iter(calls)), os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])))
        return compare(calls, *args, **kwargs)

    monkeypatch.setattr("experiments.encode.subject.sweep_batches", leaving)
    monkeypatch.setattr("experiments.encode.__main__.compare", compared)
    assert list(rows(run(tmp_path))) == ["eager", "compiled", "transformers"]
    assert found == [("compiled", [])]


def test_the_encoder_is_one_graph_where_dynamo_counts_those_of_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torch 2.11 does: there the sweep's graph made that of the first call a recompilation.
    monkeypatch.setattr("vit_encoder.compilation.compiled_module._OF_AN_INSTANCE", {})
    assert run(tmp_path)["graphs"]["graphs"] == 1


@pytest.mark.thorough
def test_inductor_compiles_twice_where_the_sweep_has_the_same_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU.
    monkeypatch.setattr(TileEncoder, "narrow", lambda self, config: config)
    with compilation_counter.expect(backend_compilations=2, cache_hits=0):
        result = run(tmp_path, "--backend", "inductor")
    assert result["compilation"]["backend"] == "inductor"
    assert result["right"]


# A wrong result is not timed


def assert_wrong(result: dict[str, Any], *names: str) -> None:
    for name, row in rows(result).items():
        assert bool(row["problem"]) == (name in names), row
        assert (row["seconds_per_tile"] is None) == (name in names)
        assert (row["first_call_seconds"] is None) == (name in names)
    assert not result["right"]


def test_an_encoder_without_rotary_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vit_encoder.attention.rotary_2d_qkv_", lambda qkv, cos, sin, interleaved: qkv)
    assert_wrong(run(tmp_path, code=1), "eager", "compiled")
    printed = capsys.readouterr().out
    assert printed.count("WRONG, not timed") == 2
    assert "WRONG: eager: RMS error" in printed


def test_a_mistake_of_the_compiler_alone_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gelu(x: Tensor) -> Tensor:
        return F.gelu(x) * (1.001 if torch.compiler.is_compiling() else 1.0)

    monkeypatch.setattr("vit_encoder.llama4.model.F", SimpleNamespace(gelu=gelu, layer_norm=F.layer_norm))
    result = run(tmp_path, code=1)
    assert_wrong(result, "compiled")
    assert "with 1 tile(s) compiled and eager features differ" in result["tile_counts"]["problem"]


def test_nan_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(gelu=lambda x: F.gelu(x) * float("nan"), layer_norm=F.layer_norm)
    monkeypatch.setattr("vit_encoder.llama4.model.F", broken)
    result = run(tmp_path, code=1)
    assert_wrong(result, "eager", "compiled")
    assert "RMS error nan" in rows(result)["eager"]["problem"]
    assert "differ by nan" in result["tile_counts"]["problem"]


def test_a_form_that_fails_is_reported_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            raise RuntimeError("\nno kernel image\nis available")

    monkeypatch.setitem(ENCODERS, "llama4", dataclasses.replace(ENCODERS["llama4"], peer=lambda model: Broken()))
    result = run(tmp_path, code=1)
    assert rows(result)["transformers"]["problem"] == "RuntimeError: no kernel image"
    assert "baseline" not in result


def test_more_than_one_graph_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "--dynamic-shapes", "backed", code=1)
    assert "RecompileError" in result["tile_counts"]["problem"]
    timed = {name for name, row in rows(result).items() if row["seconds_per_tile"]}
    assert timed == {"eager", "transformers"}
    assert "WRONG: tile counts: RecompileError" in capsys.readouterr().out


# Bad arguments


def save_checkpoint(folder: Path, model: Llama4VisionModel) -> Path:
    folder.mkdir()
    tensors = to_hf_tensors(model.state_dict(), vision_tensors(model.config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vision_config": dataclasses.asdict(model.config)}))
    return folder


@pytest.fixture
def bad_inputs(tmp_path: Path) -> Path:
    """Return a folder with a text file, a checkpoint, one of something else, one without tensors, and one that pads."""
    (tmp_path / "text.png").write_text("no image")
    whole = save_checkpoint(tmp_path / "whole", tiny_encoder())
    for name in ("foreign", "empty", "padded"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((whole / "config.json").read_bytes())
    (tmp_path / "padded" / "preprocessor_config.json").write_text('{"do_pad": true}')
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "foreign/model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers 0", "argument --layers: got '0', expected a positive integer"),
        ("--layers many", "argument --layers: got 'many', expected a positive integer"),
        ("--repeats -1", "argument --repeats"),
        ("--max-tiles 1.5", "argument --max-tiles"),
        ("--tile-counts 1 0", "argument --tile-counts"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--device tpu", "--device: got 'tpu', but PyTorch"),
        ("--device cuda:99", "--device: got 'cuda:99', but PyTorch"),
        ("--image absent.png", "image: expected the path of an image file, got"),
        ("--image text.png", "which PIL cannot read"),
        ("--out text.png", "--out: expected a folder to write into, got"),
        ("--out text.png/below", "--out: expected a folder to write into, got"),
        ("--checkpoint absent", "absent"),
        ("--checkpoint whole --layers 3", "layers: got 3, expected at most the 2 of the checkpoint"),
        ("--checkpoint empty", "holds neither model.safetensors nor model.safetensors.index.json"),
        ("--checkpoint foreign", "does not hold the expected tensors"),
        ("--checkpoint padded", "preprocessor_config.json: do_pad: got True, expected False"),
        ("--checkpoint meta-llama/Llama-4", "hf download meta-llama/Llama-4 --local-dir FOLDER"),
        ("--checkpoint whole --config tiny", "not allowed with argument"),
        ("--colour blue", "unrecognized arguments: --colour blue"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_message(
    arguments: str,
    message: str,
    bad_inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(bad_inputs)
    with pytest.raises(SystemExit) as caught:
        main(["--out", "out", *([] if "--checkpoint" in arguments else ["--config", "tiny"]), *arguments.split()])
    assert caught.value.code == 2
    errors = capsys.readouterr().err.split("usage: ")[-1].splitlines()
    assert message in errors[1]
    assert len(errors) == 2 or "foreign" in arguments
    assert len(errors) < 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="here --device cuda is no mistake")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda", "--out", str(tmp_path)])
    assert f"--device: got 'cuda', but PyTorch {torch.__version__} sees only cpu" in capsys.readouterr().err


def test_help_shows_examples_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "--config tiny --out" in printed
    assert "exit status:" in printed


def test_the_module_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.encode", "--image", str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "is not a regular file" in refused.stderr


# The parts


def test_a_cpu_that_emulates_the_dtype_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert run(tmp_path, "--dtype", "bfloat16")["slow_dtype"]
    assert "warning: this CPU has no bfloat16 instructions" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "said"), [(0.4, False), (0.6, True)])
def test_a_busy_machine_is_named(load: float, said: bool) -> None:
    (path,) = (ROOT / "experiments/results").glob("compile_encoder-scout-34-cpu-float32.json")
    result = json.loads(path.read_text())
    result["job"]["load_before"], result["environment"]["cpu"]["cores"] = load, 2
    assert any("cannot be compared" in note for note in notes(result_of(result))) == said


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/results").glob("compile_encoder-*.json")), ids=str)
def test_a_result_is_read_from_its_file_and_written_as_it_was(path: Path) -> None:
    written = json.loads(path.read_text())
    # Llama 4's is older than the key.
    assert result_of(written).described() == {"model": "llama4"} | written


def test_a_wrong_result_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_encoder.attention.rotary_2d_qkv_", lambda qkv, cos, sin, interleaved: qkv)
    run(tmp_path, code=1)
    with pytest.raises(ValueError, match="got a result that is not right"):
        update_readme.results_text(tmp_path)


def test_the_peer_uses_the_very_same_weights() -> None:
    model = tiny_encoder()
    peer = transformers_vision_model(model)
    assert peer is not None
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in peer.parameters()} == ours
    x = pixel_values(model.config)
    with torch.no_grad():
        assert relative_error(peer(pixel_values=x).last_hidden_state, reference_forward(model, x)).rms < 4e-6


def test_random_weights_do_not_amplify_rounding_but_show_a_missing_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_encoder(num_hidden_layers=34)
    x = pixel_values(model.config)
    expected = reference_forward(model, x)
    with torch.no_grad():
        assert relative_error(model(x), expected).rms < ALLOWED_EPS / 2 * torch.finfo(torch.float32).eps
        monkeypatch.setattr("vit_encoder.attention.rotary_2d_qkv_", lambda qkv, cos, sin, interleaved: qkv)
        assert relative_error(model(x), expected).rms > ALLOWED_EPS * torch.finfo(torch.bfloat16).eps


def features(error_in_eps: float) -> tuple[Tensor, Tensor]:
    """Expected features, and float32 ones that differ by an RMS error of so many eps."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(2, 50, 64, generator=generator, dtype=torch.float64)
    noise = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    return expected, (expected + error_in_eps * torch.finfo(torch.float32).eps * noise).float()


@pytest.mark.parametrize(
    ("pytorch", "other", "wrong"),
    [
        (4.0, 4.0, []),
        (4.0, 7.0, []),
        (4.0, 12.0, ["other"]),
        (25.0, 40.0, ["other"]),
        (40.0, 4.0, ["pytorch"]),
        (4.0, float("nan"), ["other"]),
        (float("nan"), 4.0, ["pytorch", "other"]),
    ],
)
def test_which_errors_are_wrong(pytorch: float, other: float, wrong: list[str]) -> None:
    expected = features(0)[0]
    calls = {"other": lambda: features(other)[1], "pytorch": lambda: features(pytorch)[1]}
    compared = compare(calls, expected, baseline="pytorch", device=CPU, rounds=1)
    assert sorted(row.name for row in compared if row.problem) == sorted(wrong)
    assert sorted(row.name for row in compared if not row.timing.seconds) == sorted(wrong)


def test_relative_error_is_in_units_of_the_features() -> None:
    error = relative_error(torch.tensor([3.0, -3.0, 3.0, -1.0]), torch.tensor([3.0, -3.0, 3.0, -3.0]).double())
    assert (error.rms, error.maximum) == pytest.approx((1 / 3, 2 / 3))


def test_rounds_are_interleaved_and_each_starts_with_another_call() -> None:
    order: list[str] = []

    def call(name: str) -> measure.Call:
        def called() -> Tensor:
            order.append(name)
            return torch.zeros(())

        return called

    measured = measure.interleaved({name: call(name) for name in "abc"}, CPU, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert [len(measurement.seconds) for measurement in measured.values()] == [3, 3, 3]


@pytest.mark.parametrize(("limit", "rounds"), [(0.0, measure.MIN_ROUNDS), (60.0, measure.MAX_ROUNDS)])
def test_without_a_number_rounds_start_until_the_time_is_up(
    limit: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ROUND_SECONDS", limit)
    measured = measure.interleaved({"a": lambda: torch.zeros(())}, CPU, rounds=None)
    assert len(measured["a"].seconds) == rounds


def test_the_spread_of_samples() -> None:
    assert measure.spread([3.0, 1.0, 7.0]) == measure.Spread(3.0, 1.0, 7.0, samples=[3.0, 1.0, 7.0])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell the resident memory")
def test_peak_memory_sees_what_was_freed_again() -> None:
    def hold(mebibytes: int) -> int:
        with measure.peak_memory(CPU) as peak:
            torch.ones(mebibytes, 2**20, dtype=torch.uint8).sum()
        assert peak.nbytes is not None
        return peak.nbytes

    assert hold(96) - hold(1) > 64 * 2**20


def test_the_first_line_of_an_error_says_something() -> None:
    assert comparison.first_line(RuntimeError("\n  \n what \nwhy")) == "what"
    assert comparison.first_line(RuntimeError()) == "no message"
