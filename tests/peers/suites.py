"""Which suites there are: where each comes from, and what it is run with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Suite:
    """A file for pytest (or, for a sweep, a module to run), the peer it comes from, and the runs to compare."""

    file: str
    peer: str
    runs: tuple[str, ...]
    """`stock` first where there is a run without ours."""
    selected: dict[str, tuple[str, ...]]
    """Run: lower-case words of which a test's name must hold one, where the run concerns only some tests."""
    needs: str = ""
    """A file that only a checkout has, without which the suite does not run."""
    in_vllm: bool = False


_PATCHED: dict[str, tuple[str, ...]] = {"applied": ("llama4", "qwen2")}
SUITES = {
    "transformers-common": Suite(
        "transformers_common.py", "transformers", ("stock", "vit_varlen", "applied"), _PATCHED,
    ),
    "transformers-models": Suite(
        "transformers_models.py", "transformers", ("stock", "vit_varlen", "applied"), _PATCHED,
        needs="tests/models/llama4/test_modeling_llama4.py",
    ),
    "qwen-image-processor": Suite(
        "qwen_image_processor.py", "transformers", ("stock", "patch_image"), {},
        needs="tests/models/qwen2_vl/test_image_processing_qwen2_vl.py",
    ),
    "sweep": Suite("sweep.py", "", ("vit_varlen",), {}),
    "vllm": Suite("vllm_attention.py", "vllm", ("stock", "kernels"), {}, in_vllm=True),
    "flash-attn": Suite("flash_attn_varlen.py", "flash-attn", ("varlen_attention",), {}),
}  # fmt: skip
PEERS = {"transformers": "5.23.0", "vllm": "0.32.0", "flash-attn": "2.8.3.post2"}
"""Peer: the version whose source distribution is taken; that of transformers is the installed one."""


def lacking(suite: Suite, folders: dict[str, Path]) -> str | None:
    """The file that a suite needs and its peer's folder has not."""
    return suite.needs if suite.needs and not (folders[suite.peer] / suite.needs).is_file() else None


def selector(suite: Suite, run: str) -> Callable[[str], bool]:
    """Whether a run concerns the test of a name."""
    words = suite.selected.get(run)
    return lambda test: words is None or any(word in test.lower() for word in words)
