"""transformers' encoders, as the main job has them beside ours on a GPU: on a device that stands in for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.common.encoders import ENCODERS
from experiments.common.weights import random_encoder
from tests.experiments.stand_in_device import moved, stand_in_device

ROOT = Path(__file__).parents[2]


def check_peer(name: str) -> None:
    """transformers' encoder gives our features on the stand-in device, without waiting for it where it need not."""
    kind = ENCODERS[name]
    model = random_encoder(kind.config.tiny(), dtype=torch.float32, device=torch.device("cpu"))
    _, (pixels, *others) = kind.batch(kind.sizes[2], model.config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixels, *others)
    with stand_in_device() as waits:
        moved(model)
        peer = kind.peer(model)
        assert peer is not None
        assert {tensor.device.type for tensor in (*peer.parameters(), *peer.buffers())} == {"cuda"}
        call = kind.peer_call(model, (pixels.to("cuda"), *others))
        assert call is not None
        waits.clear()
        features = call()
        # Of itself Qwen's reads the sizes of the images, and those of the sequences in every block.
        assert waits == [] or kind.unit == "patch"
        torch.testing.assert_close(features.cpu(), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_peer_lies_on_the_device_of_the_encoder(name: str) -> None:
    # Afterwards torch believes that CUDA tensors exist, so it is a process of its own.
    code = (
        "from vit_encoder.testing import install_device_guard; install_device_guard()\n"
        f"from tests.experiments.test_encode_on_a_device import check_peer; check_peer({name!r})"
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
