"""experiments.rotate_queries: the variant whose figures it prints is right, and so are its arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vit_kernels import force_impl, rotary_2d, varlen_attention
from vit_kernels.testing import corrected_interpreter, seeded_tensor

from experiments import rotate_queries

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("head_dim", [16, 24, 88])
def test_the_variant_rotates_its_queries(head_dim: int, tmp_path: Path) -> None:
    q, k, v = seeded_tensor((34, 3, 2, head_dim), torch.bfloat16, head_dim).unbind(1)
    cos, sin = seeded_tensor((2, 17, head_dim // 2), torch.float32, 1)
    cu_seqlens = torch.tensor([0, 17, 34], dtype=torch.int32)
    variant = rotate_queries.rotating_variant(tmp_path)
    with corrected_interpreter(), force_impl("triton"):
        rotated, _ = rotary_2d(q, k, cos, sin)
        expected = varlen_attention(rotated, k, v, cu_seqlens)
        out = variant.launch(q, k, v, cu_seqlens, cu_seqlens, head_dim**-0.5, cos, sin)
    assert torch.equal(out, expected)
    assert not torch.equal(out, varlen_attention(q, k, v, cu_seqlens))


def test_it_writes_figures_of_both(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "experiments.rotate_queries", "--target", "sm_90", "--head-dim", "64"]
    subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=environment, check=True, timeout=300)
    (result,) = json.loads(out.read_text())["results"]
    assert result["rotating"]["instructions"] > result["plain"]["instructions"] > result["plain"]["loop"] > 0


@pytest.mark.parametrize(("argument", "message"), [("sm_70", "--target: got sm_70"), ("sm_90", "TRITON_INTERPRET")])
def test_bad_arguments(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if argument != "sm_90":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        rotate_queries.main(["--target", argument])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
