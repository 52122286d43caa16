"""The serving experiment, with stand-ins for vLLM's server and benchmark."""

import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from experiments.vllm import __main__ as serve_vllm
from experiments.vllm import load as vllm_load
from experiments.vllm import server as vllm_server
from experiments.vllm.load import TILE_MIX, Load, drive, image_files, image_mix
from experiments.vllm.report import differences, draw, table
from experiments.vllm.server import Server, ServerError, check_port, free_port, serving
from experiments.vllm.timer import EncoderTimer
from experiments.vllm.variants import VARIANTS, Variant, environment, variants_of

# Answers as vLLM does, with a process beside itself; what it must not do comes in the environment.
SERVER = """
import http.server, json, os, signal, subprocess, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        self.answer({"results": [{"seconds": 1.5, "calls": 2}, {"seconds": 2.0, "calls": 2}]})
    def log_message(self, *args):
        pass
wrong = os.environ.get("WRONG")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if wrong == "ends":
    child.kill()
    sys.exit("no such model")
if wrong == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if wrong == "never ready":
    time.sleep(600)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@contextlib.contextmanager
def stub(folder: Path, wrong: str = "", timeout: float = 30) -> Iterator[Server]:
    variables = {**os.environ, "WRONG": wrong}
    command = [sys.executable, "-c", SERVER]
    with serving(command, port=free_port(), log=folder / "server.log", variables=variables, timeout=timeout) as server:
        yield server


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def assert_nothing_left(folder: Path) -> None:
    child = int((folder / "server.log").read_text().split()[1])
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_server_runs_in_the_block_and_nothing_of_it_after(tmp_path: Path) -> None:
    with stub(tmp_path) as server:
        assert server.process.poll() is None
        assert server.encoder_seconds() == 2.0
    assert server.process.poll() is not None
    assert server.encoder_seconds() is None
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("wrong", ["", "deaf"])
def test_a_server_is_stopped_when_the_block_fails(tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_STOPPING_SECONDS", 0.5 if wrong else 30.0)
    with pytest.raises(ZeroDivisionError), stub(tmp_path, wrong) as server:
        raise ZeroDivisionError
    assert server.process.poll() is not None
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "told"), [("ends", "ended with status 1 before it was ready"), ("never ready", "not ready after 1 s")]
)
def test_a_server_that_never_gets_ready_is_reported_with_its_log(tmp_path: Path, wrong: str, told: str) -> None:
    with pytest.raises(ServerError, match=told) as raised, stub(tmp_path, wrong, timeout=30 if wrong == "ends" else 1):
        pytest.fail("the block must not run")
    assert ("no such model" if wrong == "ends" else "child") in str(raised.value)
    assert_nothing_left(tmp_path)


def test_the_encoder_timer_counts_from_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("experiments.vllm.timer.time.perf_counter", lambda: next(clock))
    timer, model = EncoderTimer(), SimpleNamespace(embed_multimodal=lambda tiles: tiles + 1)
    timer.model_runner = SimpleNamespace(get_model=lambda: model)
    model.embed_multimodal(1)
    assert timer.encoder_seconds() == {"seconds": 0, "calls": 0}
    assert [model.embed_multimodal(tiles) for tiles in (1, 2)] == [2, 3]
    assert timer.encoder_seconds() == {"seconds": 2, "calls": 2}
    assert timer.encoder_seconds() == {"seconds": 0, "calls": 0}


def test_a_port_that_is_taken_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"--port: got {port}, expected one that nothing uses"):
            check_port(port)
        with pytest.raises(SystemExit):
            serve_vllm.main(["--port", str(port)])
    assert f"--port: got {port}" in capsys.readouterr().err
    check_port(free_port())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "nowhere"], "--model: got 'nowhere', expected a folder with config.json"),
        (["--images", "nowhere"], "--images: got 'nowhere', expected a folder"),
        (["--rounds", "0"], "got '0', expected a positive integer"),
        (["--variants", "all"], "invalid choice: 'all'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        serve_vllm.main(arguments)
    assert exited.value.code == 2
    assert told in capsys.readouterr().err


def test_the_environment_of_a_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    variables = environment(Variant("encoder", compiled=True), tmp_path)
    assert variables["VIT_KERNELS_VLLM"] == "encoder"
    assert variables["VLLM_CACHE_ROOT"] == str(tmp_path)
    assert "TRITON_INTERPRET" not in variables
    assert len({variant.key for variant in VARIANTS} | {variant.name for variant in VARIANTS}) == 16


@pytest.mark.parametrize(
    ("architecture", "modes"),
    [
        ("Llama4ForConditionalGeneration", ["off", "kernels", "encoder"]),
        ("Qwen2_5_VLForConditionalGeneration", ["off", "attention", "encoder"]),
        ("Gemma3ForConditionalGeneration", ["off", "attention"]),
    ],
)
def test_the_variants_are_those_in_which_a_model_differs(architecture: str, modes: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    expected = [Variant(mode, compiled) for compiled in (False, True) for mode in modes]
    assert variants_of(tmp_path) == expected


def checkpoint(folder: Path, most: int | None) -> Path:
    config = {"model_type": "llama4", "vision_config": {"image_size": 10}}
    (folder / "config.json").write_text(json.dumps(config))
    if most is not None:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"max_patches": most}}))
    return folder


def test_the_image_mix_keeps_to_what_the_checkpoint_allows(tmp_path: Path) -> None:
    whole = image_mix(checkpoint(tmp_path, None))
    assert whole == {(10 * high, 10 * wide): pytest.approx(share) for (high, wide), share in TILE_MIX.items()}
    small = image_mix(checkpoint(tmp_path, 4))
    assert sorted(small) == [(10, 10), (10, 20), (20, 20)]
    assert sum(small.values()) == pytest.approx(1)
    assert small[10, 10] / small[10, 20] == pytest.approx(0.25 / 0.2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    assert image_mix(tmp_path) == {(336 * high, 336 * wide): share for (high, wide), share in TILE_MIX.items()}


def test_only_images_of_a_folder_are_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected images"):
        image_files(tmp_path)
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg", "b.PNG"]


@pytest.mark.parametrize("with_images", [False, True])
def test_the_benchmark_is_asked_for_the_load(
    with_images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").touch()
    load = Load(7, 3, 11, 13, tmp_path if with_images else None)
    code = "import json, sys, pathlib; a = sys.argv; p = pathlib.Path(a[a.index('--result-dir') + 1])"
    code += "; (p / a[a.index('--result-filename') + 1]).write_text(json.dumps({'arguments': a[1:]}))"
    monkeypatch.setattr(vllm_load, "vllm_command", lambda *arguments: [sys.executable, "-c", code, *arguments])
    server = Server("http://127.0.0.1:1", tmp_path / "log", mock.Mock())
    options: dict[str, Any] = {
        "model": checkpoint(tmp_path, 4),
        "seed": 5,
        "folder": tmp_path,
        "name": "x",
        "variables": os.environ,
    }
    asked = drive(server, load, **options)["arguments"]
    given = dict(itertools.pairwise(asked))
    assert (given["--num-prompts"], given["--max-concurrency"], given["--seed"]) == ("7", "3", "5")
    if with_images:
        (prompt,) = Path(given["--dataset-path"]).read_text().splitlines()
        assert json.loads(prompt)["image_files"] == [str(tmp_path / "a.jpg")]
        assert (given["--dataset-name"], given["--custom-output-len"]) == ("custom_image", "13")
    else:
        assert (given["--random-input-len"], given["--random-output-len"]) == ("11", "13")
        assert "(10, 20, 1)" in given["--random-mm-bucket-config"]
    monkeypatch.setattr(vllm_load, "vllm_command", lambda *arguments: [sys.executable, "-c", "exit('no server')"])
    with pytest.raises(RuntimeError, match="no server"):
        drive(server, load, **options)


def measured(throughput: float, failed: int = 0, encoder_seconds: float | None = 2.0) -> dict[str, Any]:
    return {
        "completed": 16 - failed, "failed": failed, "duration": 10.0, "total_output_tokens": 256,
        "request_throughput": throughput, "output_throughput": 25.6, "mean_ttft_ms": 100 / throughput,
        "mean_tpot_ms": 5.0, "mean_itl_ms": 5.0, "encoder_seconds": encoder_seconds, "errors": ["", "lost"],
        "median_ttft_ms": 1.0, "median_tpot_ms": 1.0, "median_itl_ms": 1.0, "total_input_tokens": 99,
        "model_id": "where it lies",
    }  # fmt: skip


def report(alone: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    variants = [("vLLM alone, compiled", alone), ("our kernels, compiled", ours)]
    return {
        "model": "tiny",
        "load": {"prompts": 16, "images": None},
        "variants": [{"name": name, "rounds": rounds, "problems": []} for name, rounds in variants],
        "environment": {"cpu": {"model": "a CPU"}},
    }


def test_a_difference_is_told_only_beyond_the_spread() -> None:
    alone = [measured(1.0), measured(1.1), measured(1.1), measured(1.2)]
    (clear, *_) = differences(report(alone, [measured(2.0), measured(2.2), measured(2.2), measured(2.4)]))
    assert clear == (
        "Request throughput (req/s): our kernels, compiled is at 2.00 x vLLM alone, compiled, more than the spread of "
        "4 rounds"
    )
    (hidden, *_) = differences(report(alone, [measured(1.1), measured(1.5), measured(1.6), measured(1.7)]))
    assert hidden.endswith("but the spread of the rounds hides the difference")
    (few, *_) = differences(report(alone, [measured(2.0), measured(2.1), measured(2.2)]))
    assert few.endswith("of 3 round(s): 4 are needed to tell a difference from the spread")
    (failed, *_) = differences(report(alone, [measured(2.0), measured(2.4, failed=1)]))
    assert failed.endswith("is not compared, since requests failed")
    assert differences(report(alone, [])) == []


def test_the_table_has_the_rows_of_the_pull_request_and_the_encoders_share(tmp_path: Path) -> None:
    shown = table(report([measured(1.0), measured(1.2)], [measured(2.0, encoder_seconds=None)]))
    rows = dict(
        zip(shown.columns[0].cells, zip(*(column.cells for column in shown.columns[1:]), strict=True), strict=True)
    )
    assert rows["Request throughput (req/s)"] == ("1.1 (1 to 1.2)", "2")
    assert rows["Vision encoder (% of duration)"] == ("20", "-")
    assert rows["Successful requests"] == ("16", "16")
    draw(report([measured(1.0)], []), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drive: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The experiment on a server that is always ready."""
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint(folder, 4)
    started: list[str] = []

    @contextlib.contextmanager
    def ready(command: list[str], **options: Any) -> Iterator[Any]:
        started.append(options["variables"]["VIT_KERNELS_VLLM"])
        server = mock.Mock()
        server.encoder_seconds.return_value = 1.0
        server.process.poll.return_value = None
        yield server

    monkeypatch.setattr(serve_vllm, "serving", ready)
    monkeypatch.setattr(serve_vllm, "drive", drive)
    monkeypatch.setattr(serve_vllm.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(serve_vllm.signal, "signal", mock.Mock())
    status = serve_vllm.main(["--model", str(folder), "--out", str(tmp_path), *arguments])
    return status, {"started": started, **json.loads((tmp_path / "serve_vllm-model.json").read_text())}


def test_variants_take_turns_and_each_round_starts_with_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drive = mock.Mock(side_effect=lambda *args, name, **kwargs: measured(9.0 if "warm" in name else 1.0))
    keys = ["off-compiled", "kernels-compiled", "encoder-compiled"]
    status, result = run(monkeypatch, tmp_path, drive, "--rounds", "2", "--variants", *keys)
    assert status == 0
    assert result["started"] == ["off", "kernels", "encoder", "kernels", "encoder", "off"]
    # Each server answers the same prompts twice, and what it says the second time counts.
    asked = [(call.kwargs["seed"], call.kwargs["name"]) for call in drive.call_args_list]
    names = [f"{started}-compiled-{index // 3}" for index, started in enumerate(result["started"])]
    assert asked == [(int(name[-1]), name + suffix) for name in names for suffix in ("-warm-up", "")]
    assert [[of["request_throughput"] for of in variant["rounds"]] for variant in result["variants"]] == [[1, 1]] * 3
    assert "where it lies" not in json.dumps(result)
    assert "4 are needed to tell a difference" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "serve_vllm-model.png").exists()


def test_what_fails_is_in_the_table_and_in_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drive = mock.Mock(
        side_effect=[measured(1.0), measured(1.0, failed=3), ServerError("the server ended with status 9")]
    )
    status, result = run(monkeypatch, tmp_path, drive, "--rounds", "1", "--variants", "off-eager", "kernels-eager")
    assert status == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "vLLM alone, not compiled: round 1: 3 of 128 requests failed: lost" in printed
    assert "our kernels, not compiled: round 1: the server ended with status 9" in printed
    assert [len(variant["rounds"]) for variant in result["variants"]] == [1, 0]
