"""Our plugin inside the real vLLM, on a tiny random Llama 4: ./scripts/test_vllm.sh runs this where vLLM is installed.

Every variant runs once, in a process of its own and with the same cache folder for all; the tests then look at what it
reported (see `tests/vllm_engine.py`).
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from experiments.tiny_llama4 import make_tiny_llama4
from experiments.vllm_variants import VARIANTS, Variant, environment

ROOT = Path(__file__).parents[1]
OURS = [variant for variant in VARIANTS if variant.mode != "off"]
COMPILED = [variant for variant in OURS if variant.compiled]
CASES = ["text only", "several tiles", "several images", "one tile"]
LAYERS = 2
ALONE_UNCOMPILED = Variant("off", compiled=False)
# It is the one variant that can say what one tile generates without us.
ALONE = Variant("off", compiled=True)


class Engines:
    """What each variant reported; it runs when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "tiny-llama4"
        self.reports: dict[Variant, dict[str, Any]] = {}
        make_tiny_llama4(self.model)

    def report(self, variant: Variant) -> dict[str, Any]:
        if variant not in self.reports:
            self.reports[variant] = self._run(variant)
        return self.reports[variant]

    def _run(self, variant: Variant) -> dict[str, Any]:
        out = self.folder / f"{variant.key}.json"
        command = [sys.executable, "-m", "tests.vllm_engine", str(self.model), str(out)]
        variables = environment(variant, self.folder / "cache") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(
            [*command, *(["--compiled"] if variant.compiled else [])],
            cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        report: dict[str, Any] = json.loads(out.read_text())
        return report


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    engines = Engines(tmp_path_factory.mktemp("engines"))
    # In this order: a cache that did not see the variant would be filled by vLLM alone and then read by ours.
    engines.report(ALONE)
    return engines


def ids(variant: Variant) -> str:
    return variant.key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", OURS, ids=ids)
def test_the_same_text_is_generated_as_by_vllm_alone(engines: Engines, variant: Variant, case: str) -> None:
    ours, theirs = engines.report(variant)[case], engines.report(ALONE)[case]
    assert "error" not in ours, ours
    assert ours["prompt_tokens"] == theirs["prompt_tokens"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)


@pytest.mark.parametrize("case", CASES[:-1])
def test_vllm_alone_generates_the_same_compiled_and_not(engines: Engines, case: str) -> None:
    eager, compiled = engines.report(ALONE_UNCOMPILED)[case], engines.report(ALONE)[case]
    assert eager["tokens"] == compiled["tokens"]
    assert eager["logprobs"] == pytest.approx(compiled["logprobs"], abs=1e-4)


def test_images_change_the_text(engines: Engines) -> None:
    report = engines.report(ALONE)
    texts = [report[case]["tokens"] for case in CASES]
    assert all(texts.count(text) == 1 for text in texts)


def test_vllm_alone_fails_on_one_tile_uncompiled_and_ours_does_not(engines: Engines) -> None:
    assert "a.stride(-1) == 1" in engines.report(ALONE_UNCOMPILED)["one tile"]["error"]
    for mode in ("kernels", "encoder"):
        assert len(engines.report(Variant(mode, compiled=False))["one tile"]["tokens"]) == 8


@pytest.mark.parametrize("variant", OURS, ids=ids)
def test_our_attention_runs_once_a_layer_for_every_batch_of_images(engines: Engines, variant: Variant) -> None:
    report = engines.report(variant)
    assert [report[case]["attention_calls"] for case in CASES] == [0, LAYERS, LAYERS, LAYERS]


@pytest.mark.parametrize("variant", [ALONE, ALONE_UNCOMPILED], ids=ids)
def test_off_leaves_vllm_as_it_is(engines: Engines, variant: Variant) -> None:
    report = engines.report(variant)
    assert [report[case]["attention_calls"] for case in CASES] == [0] * 4
    assert report["vision_model"]["module"] == "vllm.model_executor.models.mllama4"
    for graph in report["graphs"]:
        assert not any("vit_kernels" in name for name in [*graph["ops"], *graph["files"]])


@pytest.mark.parametrize("variant", COMPILED, ids=ids)
def test_the_encoder_is_one_whole_graph_of_our_ops(engines: Engines, variant: Variant) -> None:
    report = engines.report(variant)
    assert report["vision_model"]["compiled"]
    # None at all would mean that another variant's graph came out of the cache.
    (graph,) = report["graphs"]
    if variant.mode == "encoder":
        # A region of the graph is every layer's.
        assert graph["ops"]["vit_kernels.varlen_attention.default"] in (1, LAYERS)
        assert graph["ops"]["vit_kernels.rotary_2d_qkv_.default"] in (1, LAYERS)
    else:
        assert graph["ops"]["vit_kernels.varlen_attention.default"] == LAYERS
        # On a CPU it is inlined.
        assert any(file.endswith("vit_kernels/rotary_2d.py") for file in graph["files"])
    assert any(file.endswith("vit_kernels/pixel_shuffle.py") for file in graph["files"])
    assert not any("complex" in op or "scaled_dot_product" in op for op in graph["ops"])


@pytest.mark.parametrize("variant", COMPILED, ids=ids)
def test_no_compiled_artefact_is_shared_with_vllm_alone(engines: Engines, variant: Variant) -> None:
    # vLLM 0.32 writes these files on a CPU too, but cannot load them there: only their names tell.
    ours, theirs = (
        engines.report(variant)["vision_model"]["artefact"],
        engines.report(ALONE)["vision_model"]["artefact"],
    )
    assert ours is not None
    assert ours != theirs


def test_the_uncompiled_encoder_makes_no_graph(engines: Engines) -> None:
    for variant in OURS:
        if not variant.compiled:
            assert engines.report(variant)["graphs"] == []


def test_the_encoder_is_ours(engines: Engines) -> None:
    for compiled in (False, True):
        module = engines.report(Variant("encoder", compiled))["vision_model"]["module"]
        assert module == "vit_encoder.integrations.vllm.encoder"
