"""vLLM's tests of its encoders' attention on ours: a file for pytest, run by `python -m tests.peers` in vLLM's
environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from tests.peers.suite_loading import load_file

_ON_CPU = {
    'CUDA_DEVICES = ["cuda"]': 'CUDA_DEVICES = ["cpu"]',
    # The platforms of GPUs, which cannot be imported beside a build for CPUs.
    "from vllm.platforms.cuda import CudaPlatform": "CudaPlatform = None",
    "from vllm.platforms.rocm import RocmPlatform, on_mi3xx": "RocmPlatform = on_mi3xx = None",
}
_suite = load_file(
    "vllm_mha_attn",
    Path(os.environ["PEERS_VLLM"]) / "tests/kernels/attention/test_mha_attn.py",
    {} if torch.cuda.is_available() else _ON_CPU,
)
# Its tests, and the fixture that resets what they leave behind.
globals().update({name: thing for name, thing in vars(_suite).items() if name.startswith(("test_", "reset_"))})


@pytest.fixture
def default_vllm_config() -> Iterator[Any]:
    """vLLM's conftest has it, among much that needs its whole test environment."""
    with set_current_vllm_config(VllmConfig()) as config:
        yield config


@pytest.fixture(scope="session", autouse=True)
def our_attention() -> None:
    """In the place of vLLM's, as `VIT_KERNELS_VLLM=attention` puts it, unless this is the run without."""
    if os.environ["PEERS_RUN"] != "stock":
        from vit_encoder.integrations.vllm.attention import swap_in

        swap_in()
