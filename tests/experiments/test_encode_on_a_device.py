"""transformers' encoders, as the main job has them beside ours on a GPU: on a device that stands in for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.stand_in_device import moved, stand_in_device

ROOT = Path(__file__).parents[2]


def llama4() -> None:
    import torch
    from vit_encoder import Llama4VisionConfig

    from experiments.common.peers import transformers_vision_model
    from experiments.common.weights import random_encoder

    model = random_encoder(Llama4VisionConfig.tiny(), dtype=torch.float32, device=torch.device("cpu"))
    pixel_values = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values)
    with stand_in_device() as waits:
        moved(model)
        peer = transformers_vision_model(model)
        assert peer is not None
        pixel_values = pixel_values.to("cuda")
        waits.clear()
        features = peer(pixel_values=pixel_values).last_hidden_state
        assert waits == [], "a call made the CPU wait"
        torch.testing.assert_close(features.cpu(), expected)


def qwen2_5_vl() -> None:
    import torch
    from vit_encoder import Qwen2_5_VLVisionConfig

    from experiments.common.peers import transformers_qwen2_5_vl
    from experiments.common.weights import random_encoder

    config = Qwen2_5_VLVisionConfig.tiny()
    model = random_encoder(config, dtype=torch.float32, device=torch.device("cpu"))
    grid_thw = torch.tensor([[1, 10, 12], [2, 4, 4]])
    pixel_values = torch.randn(152, config.patch_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values, grid_thw)
    with stand_in_device():
        moved(model)
        peer = transformers_qwen2_5_vl(model)
        assert peer is not None
        assert {tensor.device.type for tensor in (*peer.parameters(), *peer.buffers())} == {"cuda"}
        features = peer(pixel_values.to("cuda"), grid_thw=grid_thw.to("cuda")).pooler_output
        torch.testing.assert_close(features.cpu(), expected)


@pytest.mark.parametrize("encoder", [llama4, qwen2_5_vl])
def test_the_peer_lies_on_the_device_of_the_encoder(encoder: object) -> None:
    # Afterwards torch believes that CUDA tensors exist, so it is a process of its own.
    name = encoder.__name__  # type: ignore[attr-defined]
    code = (
        "from vit_encoder.testing import install_device_guard; install_device_guard()\n"
        f"from tests.experiments.test_encode_on_a_device import {name}; {name}()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


KERNELS = """
from triton.runtime.jit import JITFunction
from vit_kernels._triton import rotary_2d, varlen_attention
from experiments.common.measure import empty_caches

kernels = [each for module in (rotary_2d, varlen_attention) for each in vars(module).values()]
kernels = [kernel for kernel in kernels if isinstance(kernel, JITFunction)]
assert len(kernels) > 2
for kernel in kernels:
    kernel.device_caches[0] = "binaries"
with empty_caches():
    assert not any(kernel.device_caches for kernel in kernels)
"""


def test_binaries_of_kernels_are_forgotten_with_all_other_compiled_code() -> None:
    variables = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", KERNELS]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
