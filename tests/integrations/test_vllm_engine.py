"""Our plugin inside the real vLLM, on a tiny random Llama 4, in one process: ./scripts/test_vllm.sh runs this."""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from tests.integrations.vllm_engines import Run, assert_said_once, assert_same_text, reported

OURS = [Run(mode, compiled) for compiled in (False, True) for mode in ("kernels", "encoder")]
COMPILED = [run for run in OURS if run.compiled]
CASES = ["text only", "several tiles", "several images", "one tile"]
LAYERS = 2
ALONE_UNCOMPILED = Run("off", compiled=False)
# It is the one run that can say what one tile generates without us.
ALONE = Run("off", compiled=True)


@pytest.fixture(scope="module", autouse=True)
def alone_first() -> None:
    # A cache that did not see the variant would be filled by vLLM alone and then read by ours.
    reported(ALONE)


def ids(run: Run) -> str:
    return run.key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", OURS, ids=ids)
def test_the_same_text_is_generated_as_by_vllm_alone(run: Run, case: str) -> None:
    assert_same_text(reported(run)[case], reported(ALONE)[case])


@pytest.mark.parametrize("case", CASES[:-1])
def test_vllm_alone_generates_the_same_compiled_and_not(case: str) -> None:
    assert_same_text(reported(ALONE_UNCOMPILED)[case], reported(ALONE)[case])


def test_images_change_the_text() -> None:
    report = reported(ALONE)
    texts = [report[case]["tokens"] for case in CASES]
    assert all(texts.count(text) == 1 for text in texts)


def test_vllm_alone_fails_on_one_tile_uncompiled_and_ours_does_not() -> None:
    assert "a.stride(-1) == 1" in reported(ALONE_UNCOMPILED)["one tile"]["error"]
    for mode in ("kernels", "encoder"):
        assert len(reported(Run(mode, compiled=False))["one tile"]["tokens"]) == 8


@pytest.mark.parametrize("run", OURS, ids=ids)
def test_our_attention_runs_once_a_layer_for_every_batch_of_images(run: Run) -> None:
    report = reported(run)
    expected = [{"calls": calls, "compiled": calls * run.compiled} for calls in (0, LAYERS, LAYERS, LAYERS)]
    assert [report[case]["attention"] for case in CASES] == [[counts] for counts in expected]


@pytest.mark.parametrize("run", [ALONE, ALONE_UNCOMPILED], ids=ids)
def test_off_leaves_vllm_as_it_is(run: Run) -> None:
    report = reported(run)
    counts = [report[case]["attention"] for case in CASES if "error" not in report[case]]
    assert counts == [[{"calls": 0, "compiled": 0}]] * (4 if run.compiled else 3)
    (vision_model,) = report["vision_models"]
    assert vision_model["module"] == "vllm.model_executor.models.mllama4"
    for graph in report["graphs"]:
        assert not any("vit_kernels" in name for name in [*graph["ops"], *graph["files"]])


@pytest.mark.parametrize("run", COMPILED, ids=ids)
def test_the_encoder_is_one_whole_graph_of_our_ops(run: Run) -> None:
    report = reported(run)
    assert report["vision_models"][0]["compiled"]
    # None at all would mean that another variant's graph came out of the cache.
    (graph,) = report["graphs"]
    if run.mode == "encoder":
        # A region of the graph is every layer's.
        assert graph["ops"]["vit_kernels.varlen_attention.default"] in (1, LAYERS)
        assert graph["ops"]["vit_kernels.rotary_2d_qkv_.default"] in (1, LAYERS)
    else:
        assert graph["ops"]["vit_kernels.varlen_attention.default"] == LAYERS
        # On a CPU it is inlined.
        assert any(file.endswith("vit_kernels/rotary_2d.py") for file in graph["files"])
    assert any(file.endswith("vit_kernels/pixel_shuffle.py") for file in graph["files"])
    assert not any("complex" in op or "scaled_dot_product" in op for op in graph["ops"])


@pytest.mark.parametrize("run", COMPILED, ids=ids)
def test_no_compiled_artefact_is_shared_with_vllm_alone(run: Run) -> None:
    # vLLM 0.32 writes these files on a CPU too, but cannot load them there: only their names tell.
    ours, theirs = (reported(of)["vision_models"][0]["artefact"] for of in (run, ALONE))
    assert ours is not None
    assert ours != theirs


def test_the_uncompiled_encoder_makes_no_graph() -> None:
    for run in OURS:
        if not run.compiled:
            assert reported(run)["graphs"] == []


def test_the_encoder_is_ours() -> None:
    for compiled in (False, True):
        (vision_model,) = reported(Run("encoder", compiled))["vision_models"]
        assert vision_model["module"] == "vit_encoder.integrations.vllm.llama4_encoder"


@pytest.mark.parametrize("run", [ALONE_UNCOMPILED, Run("kernels", compiled=False)], ids=ids)
def test_one_line_of_the_log_says_whose_encoder_runs(run: Run) -> None:
    assert_said_once(reported(run)["log"], run.mode, LAYERS)
