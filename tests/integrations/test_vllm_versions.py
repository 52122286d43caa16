"""The versions of vLLM that the plugin accepts have the classes that it swaps: the same files."""

import hashlib
from importlib import metadata, util
from pathlib import Path

import pytest
from vit_encoder.integrations.vllm import plugin

if util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: ./scripts/test_vllm.sh", allow_module_level=True)

# The beginning of the SHA-256 of each file of vLLM 0.32.0, which is that of 0.33.0 too. Another file is no fault by
# itself: read what changed, and run the tests inside vLLM.
FILES = {
    "model_executor/custom_op.py": "caaa422b914d74a5",
    "model_executor/layers/attention/mm_encoder_attention.py": "336e665cd84574d7",
    "model_executor/layers/rotary_embedding/llama4_vision_rope.py": "96cf9d52db3bdd6c",
    "model_executor/models/mllama4.py": "0d31ea87b1a8b63e",
    "model_executor/models/qwen2_5_vl.py": "2bf91675732b6baf",
    "model_executor/models/vision.py": "c6936825b529a59d",
    "plugins/__init__.py": "06942d64e526c2c7",
    "v1/attention/ops/vit_attn_wrappers.py": "367aa96a4316915a",
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_swapped_is_what_was_tested_or_compared(name: str) -> None:
    spec = util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    content = (Path(spec.submodule_search_locations[0]) / name).read_bytes()
    assert hashlib.sha256(content).hexdigest()[:16] == FILES[name]


def test_the_installed_version_is_accepted() -> None:
    major, minor, *_ = metadata.version("vllm").split(".")
    assert (int(major), int(minor)) in plugin.SUPPORTED_VERSIONS
