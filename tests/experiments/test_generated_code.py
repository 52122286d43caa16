"""The CUDA code that Inductor generates for the encoder: what it launches, and that it copies nothing of q, k and v."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

# Two layers at Llama 4's width; the code of a layer is one region, called by each.
SCRIPT = """
    import dataclasses
    import json
    import torch
    from experiments.launches.inductor import generate_cuda_code
    from vit_encoder import Llama4VisionConfig, Llama4VisionModel
    from vit_encoder.testing import fake_cuda

    config = dataclasses.replace(Llama4VisionConfig.scout(), num_hidden_layers=2)
    with fake_cuda(torch.bfloat16):
        with torch.device("cuda"):
            model = Llama4VisionModel(config)
        generated = generate_cuda_code(model, torch.empty(4, 3, 336, 336, device="cuda"), dynamic_tiles=True)
    print(json.dumps({"code": generated.code, "launches": [dataclasses.asdict(x) for x in generated.launches]}))
"""


@pytest.fixture(scope="module")
def generated() -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_nothing_but_the_rotation_stands_between_the_projection_and_attention(generated: dict[str, Any]) -> None:
    kernels = [launch["kernel"] for launch in generated["launches"] if launch["region"]]
    rotations = [i for i, kernel in enumerate(kernels) if kernel == "vit_kernels::rotary_2d_qkv_"]
    assert len(rotations) == 2
    for i in rotations:
        assert kernels[i - 1 : i + 2] == ["aten::addmm", "vit_kernels::rotary_2d_qkv_", "vit_kernels::varlen_attention"]


def test_attention_reads_views_of_the_projection_that_was_rotated(generated: dict[str, Any]) -> None:
    code = generated["code"]
    (rotated,) = re.findall(r"vit_kernels\.rotary_2d_qkv_\.default\(reinterpret_tensor\((\w+), ", code)
    assert len(re.findall(rf"extern_kernels\.addmm\(.*out={rotated}\)", code)) == 1
    (attention,) = re.findall(r"vit_kernels\.varlen_attention\.default\(.*", code)
    views = re.findall(rf"reinterpret_tensor\({rotated}, \([^)]*, 16, 88\), \(4224, 88, 1\), (\d+)\)", attention)
    assert views == ["0", "1408", "2816"]
    # Allocated once, written by the product, rotated, read three times, and by nothing else.
    uses = [line for line in code.splitlines() if re.search(rf"\b{rotated}\b", line) and "empty_strided" not in line]
    assert len([line for line in uses if not re.match(r"\s*(del |#|assert_)", line)]) == 3


def test_the_class_token_is_dropped_without_a_copy(generated: dict[str, Any]) -> None:
    kernels = [launch["kernel"] for launch in generated["launches"]]
    i = kernels.index("vit_kernels::pixel_shuffle")
    assert generated["launches"][i - 1]["region"], "the last layer"
    assert kernels[i + 1] == "aten::mm", "the adapter"
