"""Our plugin in vLLM's worker processes: tensor parallelism, an encoder that is sharded or whose images are."""

import importlib.util
from dataclasses import replace

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from experiments.vllm.tiny_models import VISION_LAYERS
from tests.integrations.vllm_engine import cases
from tests.integrations.vllm_engines import Run, assert_said_once, assert_same_text, reported

CASES = ["text only", "several tiles", "several images", "one tile"]
LAYERS = 2
BIASES = 3 * 2 * 88  # of q, k and v, for two heads
# Uncompiled, vLLM alone fails on one tile, and takes an engine core in a process of its own along.
ALONE = Run("off", compiled=False, workers=2)
SHARDED = [replace(ALONE, mode=mode, compiled=True, in_process=False) for mode in ("kernels", "encoder")]
DATA = [replace(ALONE, mode=mode, encoder_data=True) for mode in ("kernels", "encoder")]
OURS = [*SHARDED, *DATA]
QWEN2_5_VL = [
    replace(run, mode=mode, family="qwen2_5_vl")
    for run, modes in ((SHARDED[0], ("attention", "encoder")), (DATA[0], ("encoder",)))
    for mode in modes
]


def ids(run: Run) -> str:
    return run.key


@pytest.mark.parametrize("case", CASES[:-1])
@pytest.mark.parametrize("run", OURS, ids=ids)
def test_the_same_text_is_generated_as_by_vllm_alone(run: Run, case: str) -> None:
    assert_same_text(reported(run)[case], reported(ALONE)[case])


@pytest.mark.parametrize("run", OURS, ids=ids)
def test_one_tile_gives_the_same_text_as_in_one_worker(run: Run) -> None:
    assert_same_text(reported(run)["one tile"], reported(Run("encoder", compiled=False))["one tile"])


@pytest.mark.parametrize("run", OURS, ids=ids)
def test_our_attention_runs_in_every_worker_process_and_in_its_compiled_graph(run: Run) -> None:
    report = reported(run)
    expected = [{"calls": calls, "compiled": calls * run.compiled} for calls in (0, LAYERS, LAYERS, LAYERS)]
    assert [report[case]["attention"] for case in CASES] == [[counts] * 2 for counts in expected]
    assert [vision_model["compiled"] for vision_model in report["vision_models"]] == [run.compiled] * 2
    # Nothing of it was in the process that asked.
    assert report["graphs"] == []


@pytest.mark.parametrize("run", [ALONE, *OURS], ids=ids)
def test_each_worker_has_its_share_of_the_heads_or_all_of_them(run: Run) -> None:
    expected = BIASES if run.encoder_data else BIASES // 2
    for vision_model in reported(run)["vision_models"]:
        shapes = [shape for name, shape in vision_model["biases"].items() if "qkv" in name]
        assert shapes == [[expected]] * LAYERS


@pytest.mark.parametrize("run", [ALONE, *OURS], ids=ids)
def test_one_line_of_all_processes_says_whose_encoder_runs(run: Run) -> None:
    assert_said_once(reported(run)["log"], run.mode, LAYERS)


@pytest.mark.thorough
@pytest.mark.parametrize("run", QWEN2_5_VL, ids=ids)
def test_qwen2_5_vl_gives_the_same_text_as_in_one_worker_of_vllm_alone(run: Run) -> None:
    report, alone = reported(run), reported(Run("off", compiled=False, family=run.family))
    for case in cases(run.family):
        assert_same_text(report[case], alone[case])
    assert [sum(worker.values()) for worker in report["attention_layers"]] == [VISION_LAYERS] * 2
