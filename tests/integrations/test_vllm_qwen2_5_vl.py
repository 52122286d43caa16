"""The plugin's mode `kernels` inside the real vLLM, on a tiny random Qwen2.5-VL: its encoder on our attention."""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from tests.encoder.tiny_qwen2_5_vl import VISION_LAYERS
from tests.integrations.vllm_engines import Run, assert_same_text, reported

CASES = ["text only", "whole windows", "ragged windows", "several images"]
ALONE = Run("off", compiled=False, family="qwen2_5_vl")
OURS = [Run("kernels", compiled, family="qwen2_5_vl") for compiled in (False, True)]


def ids(run: Run) -> str:
    return run.key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", OURS, ids=ids)
def test_the_same_text_is_generated_as_by_vllm_alone(run: Run, case: str) -> None:
    assert_same_text(reported(run)[case], reported(ALONE)[case])


def test_images_change_the_text() -> None:
    texts = [reported(ALONE)[case]["tokens"] for case in CASES]
    assert all(texts.count(text) == 1 for text in texts)


@pytest.mark.parametrize("run", [ALONE, *OURS], ids=ids)
def test_our_attention_runs_once_a_layer_in_our_mode_alone(run: Run) -> None:
    report = reported(run)
    calls = [0, *[VISION_LAYERS * (run.mode == "kernels")] * 3]
    expected = [[{"calls": n, "compiled": n * run.compiled}] for n in calls]
    assert [report[case]["attention"] for case in CASES] == expected


def test_each_block_is_one_graph_with_our_attention() -> None:
    ops = [graph["ops"] for graph in reported(OURS[1])["graphs"]]
    # vLLM compiles the patch embedding, each block and the merger apart.
    blocks = [of for of in ops if "vit_kernels.varlen_attention.default" in of]
    assert [of["vit_kernels.varlen_attention.default"] for of in blocks] == [1] * VISION_LAYERS
    assert len(ops) == VISION_LAYERS + 2
    assert not any("sdpa" in op for of in ops for op in of)


def test_vllm_alone_fails_compiled_and_ours_does_not() -> None:
    alone, ours = (reported(Run(mode, compiled=True, family="qwen2_5_vl")) for mode in ("off", "kernels"))
    for case in CASES[1:]:
        assert "Inference tensors cannot be saved for backward" in alone[case]["error"]
        assert "error" not in ours[case]
