"""The plugin's modes `attention` and `encoder` inside the real vLLM, on tiny random models of many families."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from experiments.vllm.tiny_models import FAMILIES
from tests.integrations.vllm_engine import cases
from tests.integrations.vllm_engines import Run, assert_same_text, reported

# Layers of each encoder.
LAYERS = {"qwen2_5_vl": 3, "qwen3_vl": 3, "gemma3": 2, "internvl": 2, "pixtral": 2, "glm4_1v": 2, "llama4": 2}
WIDE = ("gemma3", "internvl", "pixtral", "glm4_1v", "llama4")
COMPILED = ("qwen2_5_vl", "qwen3_vl")
THEIRS = "it is vllm.model_executor.layers.attention.mm_encoder_attention.MMEncoderAttention"

RUNS = [
    pytest.param(
        Run("attention", compiled, family), id=f"{family}-{'compiled' if compiled else 'eager'}",
        marks=pytest.mark.thorough if family in WIDE else (),
    )
    for family in LAYERS
    for compiled in (False, True)
    if not compiled or family in COMPILED
]  # fmt: skip
each_run = pytest.mark.parametrize("run", RUNS)
ENCODER_RUNS = [Run("encoder", compiled, "qwen2_5_vl") for compiled in (False, True)]
of_our_encoder = pytest.mark.parametrize("run", ENCODER_RUNS, ids=lambda run: run.key)
each_run_of_ours = pytest.mark.parametrize(
    "run", [*RUNS, *(pytest.param(run, id=f"encoder-{run.key}") for run in ENCODER_RUNS)]
)


def alone(run: Run) -> Run:
    """vLLM alone, uncompiled: compiled it fails where ours does not."""
    return Run("off", compiled=False, family=run.family)


def answered(run: Run) -> dict[str, Any]:
    """The cases that vLLM alone answers too: not one tile of Llama 4."""
    report = reported(run)
    return {case: report[case] for case in cases(run.family) if case != "one tile"}


def test_every_family_is_tested() -> None:
    assert set(LAYERS) == set(FAMILIES)


@each_run_of_ours
def test_the_same_text_is_generated_as_by_vllm_alone(run: Run) -> None:
    for case, ours in answered(run).items():
        assert_same_text(ours, reported(alone(run))[case])


@each_run
def test_images_change_what_is_generated(run: Run) -> None:
    logprobs = [of["logprobs"] for of in answered(run).values()]
    assert all(logprobs.count(some) == 1 for some in logprobs)


@each_run_of_ours
def test_our_attention_runs_once_a_layer_for_images_alone(run: Run) -> None:
    for case, ours in answered(run).items():
        calls = LAYERS[run.family] if cases(run.family)[case] else 0
        assert ours["attention"] == [{"calls": calls, "compiled": calls * run.compiled}]
        if not run.compiled:
            assert reported(alone(run))[case]["attention"] == [{"calls": 0, "compiled": 0}]


@each_run
def test_every_layer_is_ours_and_none_without_us(run: Run) -> None:
    assert reported(run)["attention_layers"] == [{"ours": LAYERS[run.family]}]
    assert reported(alone(run))["attention_layers"] == [{THEIRS: LAYERS[run.family]}]
    told = f"vit_kernels: attention of {LAYERS[run.family]} encoder layers is ours"
    assert any(line.endswith(told) for line in reported(run)["log"].splitlines())


@pytest.mark.parametrize("family", COMPILED)
def test_each_block_is_one_graph_with_our_attention(family: str) -> None:
    ops = [graph["ops"] for graph in reported(Run("attention", compiled=True, family=family))["graphs"]]
    # vLLM compiles each block apart.
    blocks = [of for of in ops if "vit_kernels.varlen_attention.default" in of]
    assert [of["vit_kernels.varlen_attention.default"] for of in blocks] == [1] * LAYERS[family]
    assert not any("sdpa" in op for of in ops for op in of)


@pytest.mark.parametrize("family", COMPILED)
def test_vllm_alone_fails_compiled_and_ours_does_not(family: str) -> None:
    theirs, ours = (reported(Run(mode, compiled=True, family=family)) for mode in ("off", "attention"))
    for case, images in cases(family).items():
        if images:
            assert "Inference tensors cannot be saved for backward" in theirs[case]["error"]
            assert "error" not in ours[case]


@of_our_encoder
def test_the_encoder_is_ours_and_other_models_keep_theirs(run: Run) -> None:
    (vision_model,) = reported(run)["vision_models"]
    assert vision_model["module"] == "vit_encoder.integrations.vllm.qwen2_5_vl_encoder"
    assert vision_model["compiled"] == run.compiled
    other = reported(replace(run, family="qwen3_vl"))
    (vision_model,) = other["vision_models"]
    assert vision_model["module"] == "vllm.model_executor.models.qwen3_vl"
    assert other["attention_layers"] == [{THEIRS: LAYERS["qwen3_vl"]}]
    assert not any("vit_kernels: attention of" in line for line in other["log"].splitlines())


def test_our_encoder_is_one_whole_graph_of_our_ops() -> None:
    uncompiled, compiled = map(reported, ENCODER_RUNS)
    assert [graph for graph in uncompiled["graphs"] if any("vit_kernels" in op for op in graph["ops"])] == []
    (graph,) = compiled["graphs"]
    # A region of the graph is every layer's of its kind.
    assert graph["ops"]["vit_kernels.varlen_attention.default"] in (2, LAYERS["qwen2_5_vl"])
    assert graph["ops"]["vit_kernels.rotary_2d_qkv_.default"] in (2, LAYERS["qwen2_5_vl"])
    assert compiled["vision_models"][0]["artefact"] is not None


def test_a_compiled_encoder_needs_no_gradients_in_any_mode() -> None:
    """Qwen3-VL's is vLLM's own here, and fails with vLLM alone."""
    report = reported(replace(ENCODER_RUNS[1], family="qwen3_vl"))
    for case, theirs in report.items():
        if case in cases("qwen3_vl"):
            assert_same_text(theirs, reported(Run("off", compiled=False, family="qwen3_vl"))[case])
